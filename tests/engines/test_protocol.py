"""What every engine that runs a model promises, asked of vllm and of transformers over the same real model."""

import math
import threading
from collections.abc import Iterator

import pytest
from engines.real import CONTEXT, engine_of

from srlm_core.engines import hardware
from srlm_core.engines.local import LocalEngine
from srlm_core.engines.protocol import Completion, Message, Request, Sampling, ScoredText
from srlm_core.errors import ModelError

pytestmark = pytest.mark.engine
GREEDY = Sampling(temperature=0, max_tokens=24)
WARM = Sampling(temperature=0.8, top_p=0.9, max_tokens=16)
LIST = "Days of the week:\n1. Monday\n2. Tuesday\n3."
NO_VLLM = pytest.mark.skipif(hardware.why_not_vllm() is not None, reason=str(hardware.why_not_vllm()))
KINDS = [pytest.param("vllm", marks=NO_VLLM), "transformers"]


def user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def by_sample(completions: Iterator[Completion]) -> dict[tuple[str, int], Completion]:
    found = {(c.request_id, c.index): c for c in completions}
    return dict(sorted(found.items()))


@pytest.fixture(scope="session")
def engines(tmp_path_factory):
    """Start each kind when it is first asked for, and keep it."""
    started: dict[str, LocalEngine] = {}

    def get(kind: str) -> LocalEngine:
        if kind not in started:
            started[kind] = engine_of(kind, tmp_path_factory.mktemp("logs") / f"{kind}.log").__enter__()
        return started[kind]

    yield get
    for engine in started.values():
        engine.__exit__(None, None, None)


@pytest.fixture(params=KINDS)
def engine(request, engines) -> LocalEngine:
    return engines(request.param)


def test_every_sample_of_every_request_comes_once(engine):
    asked = [Request(f"r{i}", user(f"Say the number {i}."), sampling=WARM, n=i % 4 + 1, seed=100 * i) for i in range(9)]
    answers = list(engine.generate(iter(asked)))
    assert len(answers) == sum(request.n for request in asked)
    assert set(by_sample(answers)) == {(request.id, index) for request in asked for index in range(request.n)}
    assert all(0 < c.n_tokens <= 16 and c.finish_reason in ("stop", "length") for c in answers)


def test_nothing_asked_is_nothing_answered(engine):
    assert list(engine.generate([])) == []


def test_a_stop_string_ends_the_text_and_is_not_in_it(engine):
    (said,) = engine.generate(
        [Request("a", prefix=LIST, sampling=Sampling(temperature=0, max_tokens=24, stop=("\n4", "zzz")))]
    )
    assert (said.text, said.finish_reason) == (" Wednesday", "stop")


def test_the_budget_ends_a_text_with_length_and_the_models_own_end_with_stop(engine):
    said = by_sample(engine.generate([
        Request("cut", user("Tell me a long story."), sampling=Sampling(temperature=0, max_tokens=5)),
        Request("done", user("Reply with the one word yes."), sampling=Sampling(temperature=0, max_tokens=60)),
    ]))  # fmt: skip
    assert (said["cut", 0].finish_reason, said["cut", 0].n_tokens) == ("length", 5)
    assert said["done", 0].finish_reason == "stop"
    assert "<|im_end|>" not in said["done", 0].text


def test_what_does_not_fit_the_context_is_refused_and_the_rest_goes_on(engine):
    said = by_sample(engine.generate([
        Request("prompt", user("word " * CONTEXT), n=2),
        Request("budget", user("Hello."), sampling=Sampling(max_tokens=CONTEXT)),
        Request("fits", user("Hello."), sampling=WARM),
    ]))  # fmt: skip
    assert [said[key] for key in [("prompt", 0), ("prompt", 1), ("budget", 0)]] == [
        Completion("prompt", 0, "", 0, "too_long"), Completion("prompt", 1, "", 0, "too_long"),
        Completion("budget", 0, "", 0, "too_long"),
    ]  # fmt: skip
    assert said["fits", 0].n_tokens > 0
    (score,) = engine.token_scores([Request("long", user("word " * CONTEXT))], ["1", "2"])
    assert score.logprobs is None
    (weight,) = engine.logprobs([ScoredText("long", user("Hi."), "word " * CONTEXT)])
    assert weight.logprob is None


def test_a_seed_gives_the_same_text_alone_and_in_company(engine):
    asked = Request("a", user("Name an animal and say why you like it."), sampling=WARM, n=3, seed=7)
    company = [Request(f"c{i}", user(f"Count from {i}."), sampling=WARM, seed=1000 + i) for i in range(6)]
    alone = by_sample(engine.generate([asked]))
    together = by_sample(engine.generate([*company[:3], asked, *company[3:]]))
    assert [alone["a", i].text for i in range(3)] == [together["a", i].text for i in range(3)]
    assert len({alone["a", i].text for i in range(3)}) == 3


def test_sample_i_draws_from_stream_seed_plus_i(engine):
    both = by_sample(engine.generate([Request("a", user("Name an animal."), sampling=WARM, n=2, seed=40)]))
    (second,) = engine.generate([Request("b", user("Name an animal."), sampling=WARM, seed=41)])
    assert both["a", 1].text == second.text


def test_a_prefix_begins_the_assistants_turn(engine):
    (said,) = engine.generate(
        [Request("a", user("What is the capital of France?"), prefix="The capital of France is", sampling=GREEDY)]
    )
    assert said.text.startswith(" Paris")


def test_choices_have_probabilities_that_sum_to_less_than_one(engine):
    asked = [Request(f"s{i}", user("How many legs has a dog? One digit."), prefix="Answer: ") for i in range(3)]
    scores = list(engine.token_scores(asked, [str(i) for i in range(6)]))
    assert {score.request_id for score in scores} == {"s0", "s1", "s2"}
    for score in scores:
        assert 0 < sum(map(math.exp, score.logprobs)) <= 1 + 1e-6


def test_the_space_that_choices_share_belongs_to_the_prompt(engine):
    (spaced,) = engine.token_scores([Request("a", user("Rate it."), prefix="Score:")], [" 1", " 2"])
    (after,) = engine.token_scores([Request("b", user("Rate it."), prefix="Score: ")], ["1", "2"])
    assert spaced.logprobs == pytest.approx(after.logprobs, abs=1e-4)


def test_a_choice_of_several_tokens_is_refused_by_name(engine):
    with pytest.raises(ModelError, match="'1234'"):
        list(engine.token_scores([Request("a", user("Rate it."), prefix="Score: ")], ["1234", "2"]))
    assert len(list(engine.generate([Request("b", user("Go on."), sampling=WARM)]))) == 1


def test_the_probability_of_what_greedy_said_is_marked_greedy(engine):
    (said,) = engine.generate(
        [Request("a", user("Reply with the one word yes."), sampling=Sampling(temperature=0, max_tokens=60))]
    )
    weighed = {w.id: w for w in engine.logprobs([
        ScoredText("greedy", user("Reply with the one word yes."), said.text),
        ScoredText("other", user("Reply with the one word yes."), "Purple."),
    ])}  # fmt: skip
    assert weighed["greedy"].greedy
    assert not weighed["other"].greedy
    assert weighed["greedy"].n_tokens == said.n_tokens
    assert weighed["other"].logprob < 0


def test_several_threads_ask_at_once_and_each_gets_its_own(engine):
    found: dict[int, list] = {}

    def ask(i: int) -> None:
        if i % 3 == 2:
            found[i] = list(
                engine.token_scores(
                    [Request(f"{i}.{j}", user("Rate it."), prefix="Score: ") for j in range(4)], ["1", "2"]
                )
            )
        else:
            found[i] = list(
                engine.generate(Request(f"{i}.{j}", user(f"Say {j}."), sampling=WARM, seed=j) for j in range(4))
            )

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert {i: sorted(answer.request_id for answer in answers) for i, answers in found.items()} == {
        i: [f"{i}.{j}" for j in range(4)] for i in range(6)
    }


def test_requests_are_pulled_as_others_finish(engine):
    pulled: list[int] = []
    asked = (
        pulled.append(i) or Request(str(i), prefix=LIST, sampling=Sampling(max_tokens=2), seed=i) for i in range(80)
    )
    answers = engine.generate(asked)
    next(answers)
    assert len(pulled) <= 2 * 16
    assert len(list(answers)) == 79


def test_a_caller_that_leaves_early_costs_nobody_else_anything(engine):
    story = Request("long", user("Tell me a long story."), sampling=Sampling(max_tokens=400), n=16, seed=1)
    answers = engine.generate([Request("short", prefix=LIST, sampling=Sampling(max_tokens=1)), story])
    assert next(answers).request_id == "short"
    answers.close()
    (said,) = engine.generate([Request("b", user("Go on."), sampling=WARM)])
    assert said.request_id == "b"


@NO_VLLM
def test_the_engines_agree_on_probabilities(engines):
    scored = [Request("s", user("How good is this answer: 42?"), prefix="Score:"), Request("r", prefix=LIST)]
    weighed = [
        ScoredText("short", user("Name a colour."), "Red."),
        ScoredText("long", user("Describe the sea."), "The sea is wide and blue. " * 9),
    ]
    ours, theirs = (
        {s.request_id: s.logprobs for s in engines(kind).token_scores(scored, [" 1", " 2", " 3"])}
        for kind in ("vllm", "transformers")
    )
    for name, logprobs in ours.items():
        assert logprobs == pytest.approx(theirs[name], abs=2e-3)
    ours, theirs = ({w.id: w for w in engines(kind).logprobs(weighed)} for kind in ("vllm", "transformers"))
    for name, weight in ours.items():
        assert weight.n_tokens == theirs[name].n_tokens
        assert weight.logprob == pytest.approx(theirs[name].logprob, abs=2e-2)


@NO_VLLM
def test_the_engines_agree_on_greedy_text(engines):
    asked = [
        Request("a", user("What is the capital of France?"), sampling=GREEDY),
        Request("r", prefix=LIST, sampling=GREEDY),
    ]
    ours, theirs = ({c.request_id: c.text for c in engines(kind).generate(asked)} for kind in ("vllm", "transformers"))
    assert ours == theirs


def test_raw_text_is_weighed_as_it_continues_with_no_end_of_a_turn(engine):
    (choice,) = engine.token_scores([Request("c", prefix=LIST)], [" Wednesday", " Friday"])
    asked = [ScoredText(day, (), f" {day}", LIST) for day in ("Wednesday", "Friday")]
    asked += [ScoredText("spaced", (), "Wednesday", f"{LIST} "), ScoredText("nothing before", (), "Hello there")]
    weighed = {found.id: found for found in engine.logprobs(asked)}
    assert weighed["Wednesday"].logprob == pytest.approx(choice.logprobs[0], abs=1e-3)
    assert weighed["Friday"].logprob == pytest.approx(choice.logprobs[1], abs=1e-3)
    assert (weighed["Wednesday"].n_tokens, weighed["Wednesday"].greedy, weighed["Friday"].greedy) == (1, True, False)
    # a space at the end of the text belongs to what follows
    assert weighed["spaced"].logprob == pytest.approx(weighed["Wednesday"].logprob, abs=1e-3)
    assert weighed["nothing before"].n_tokens == 2
