"""Temporal self-rewarding: which sides other models give, that one judge scores all, and that M_f is only asked."""

import functools
from collections import Counter

import pytest
import tables
from hypothesis import given, settings
from hypothesis import strategies as st

from srlm_core import pairs, recipes, report, schemas, show, store
from srlm_core.config import PairsConfig
from srlm_core.engines.protocol import Completion
from srlm_core.errors import ConfigError, NothingLeft
from srlm_core.methods import METHODS, method_of, require_fit, steps, temporal
from srlm_core.methods.record import Shard

BOTH = ("temporal.rejected_from=base", "temporal.chosen_from_future=true")
ONE = ("iterations=1", "evaluation.models=none")
FITTING = {"self_rewarding", "meta_rewarding"}


def read(folder, dataset, t=1):
    return list(store.iter_rows(folder / f"iter_{t:02d}" / dataset))


def shard(config, inputs, **other):
    return Shard(
        config=config, iteration=1, number=0, wanted=1, given=(), policy="M1",
        models={"judge": "M1", "base": "M0", "sft": "M1"}, kept=None, inputs=inputs, **{"engine": None, **other},
    )  # fmt: skip


# --- by hand --------------------------------------------------------------------------------------------------------


def paired(makes, *pools, rules=(), **scores):
    """Pair by scores: a list for each prompt, by pool (`policy` is M_t's). Ids are `pool/prompt/place`."""
    config = one_judgment(*(f"pairs.{name}={value}" for name, value in rules))
    inputs = {"prompts": tables.prompts(*("?" for _ in scores["policy"]))}
    for place, pool in enumerate(("policy", "early", "future")):
        ids, said = [], []
        for number, of_prompt in enumerate(scores.get(pool, ())):
            ids += [f"{pool}/{number}/{index}" for index in range(len(of_prompt))]
            said += [(f"p{number}", text_of(score), "stop") for score in of_prompt]
        rows = tables.responses(said).to_pylist()
        rows = [
            {**row, "response_id": name, "source": pool, "index": row["index"] + 10 * place}
            for name, row in zip(ids, rows, strict=True)
        ]
        verdicts = [score_of(score) for of_prompt in scores.get(pool, ()) for score in of_prompt]
        judged = tables.judgments([(name, 0, verdict) for name, verdict in zip(ids, verdicts, strict=True)])
        prefix = "" if pool == "policy" else f"{pool}_"
        inputs[f"{prefix}responses"], inputs[f"{prefix}judgments"] = schemas.table(rows, schemas.RESPONSES), judged
        for of in ("responses", "judgments"):
            inputs[f"drops:{prefix}{of}"] = schemas.DROPS.empty_table()
    made, drops = temporal._paired(steps.PAIRS, makes, *pools).run(shard(config, inputs))
    found = {row["prompt_id"]: (row["chosen_id"], row["rejected_id"]) for row in made.to_pylist()}
    return found, made.to_pylist(), drops.to_pylist()


@functools.cache
def one_judgment(*changes):
    return recipes.load("self_rewarding", "smoke", ["judgments.k=1", *changes])


def text_of(score):
    return score[1] if isinstance(score, tuple) else "words"


def score_of(score):
    return score[0] if isinstance(score, tuple) else score


SCORES = {
    "policy": [[4, 2], [3, 3], [4, 1]],
    "early": [[3, 1], [2, 4], [1, 2]],
    "future": [[5, 0], [3, 3], [2, 4]],
}


def test_d1_and_d2_worked_by_hand():
    """Of the first prompt M0 wrote worse than M_t's worst, 1 < 2, and M_f better than its best, 5 > 4.

    Of the second M_t's responses are equal: alone they give no pair, and M0's 4 is never chosen. Of the third M0's
    worst and M_f's best equal M_t's: nothing is replaced.
    """
    plain, _, drops = paired("plain_pairs", **SCORES)
    assert plain == {"p0": ("policy/0/0", "policy/0/1"), "p2": ("policy/2/0", "policy/2/1")}
    assert [(row["id"], row["stage"], row["reason"]) for row in drops] == [("p1", "plain_pairs", "tie")]
    anchored, rows, _ = paired("anchored_pairs", "early", **SCORES)
    assert anchored == {**plain, "p0": ("policy/0/0", "early/0/1"), "p1": ("policy/1/0", "early/1/0")}
    assert [(row["chosen_score"], row["rejected_score"]) for row in rows] == [(4, 1), (3, 2), (4, 1)]
    both, rows, _ = paired("pairs", "early", "future", **SCORES)
    assert both == {**anchored, "p0": ("future/0/0", "early/0/1")}
    assert [(row["chosen_score"], row["rejected_score"]) for row in rows] == [(5, 1), (3, 2), (4, 1)]


def test_each_half_alone():
    assert paired("pairs", "early", **SCORES)[0]["p0"] == ("policy/0/0", "early/0/1")
    assert paired("pairs", "future", **SCORES)[0]["p0"] == ("future/0/0", "policy/0/1")


def test_what_could_not_be_read_replaces_nothing():
    assert paired("pairs", "early", "future", policy=[[4, 2]], early=[[None]], future=[[None]])[0] == {
        "p0": ("policy/0/0", "policy/0/1")
    }
    found, _, drops = paired("pairs", "early", "future", policy=[[None]], early=[[1, 3]], future=[[None]])
    assert found == {}
    assert drops[0]["reason"] == "none_may_be_chosen"


def test_a_mean_that_is_greater_in_its_last_bit_replaces_nothing():
    a, b = 0.1 + 0.2, 0.3  # the same but for the last bit
    found = paired("pairs", "early", "future", policy=[[b, 0, a]], early=[[]], future=[[a]])[0]
    assert found["p0"] == ("policy/0/0", "policy/0/1")


def test_the_methods_rules_hold_whoever_wrote_it():
    """Of scores 5 to 0 those from 3.4 up are the top tier of rho = 0.32: M_t's short 3.5 goes before M_f's long 5."""
    long, short = "many words " * 9, "few"
    scores = {"policy": [[(3.5, short), (3, long)]], "early": [[(0, short), (1, long)]], "future": [[(5, long)]]}
    rho = [("length_control", 0.32)]
    assert paired("pairs", "early", "future", rules=rho, **scores)[0]["p0"] == ("policy/0/0", "early/0/1")
    most = [("max_chosen_chars", 20)]
    assert paired("pairs", "early", "future", rules=most, **scores)[0]["p0"] == ("policy/0/0", "early/0/0")
    margin = [("min_margin", 3)]
    assert paired("plain_pairs", rules=margin, **scores)[2][0]["reason"] == "margin_too_small"
    assert paired("pairs", "early", rules=margin, **scores)[0]["p0"] == ("policy/0/0", "early/0/0")


of_one_model = st.lists(st.one_of(st.none(), st.integers(0, 10).map(lambda score: score / 2)), max_size=4)


@settings(deadline=None)
@given(of_one_model, of_one_model, of_one_model)
def test_a_gap_never_shrinks_and_each_model_keeps_to_its_side(policy, early, future):
    scores = {"policy": [policy], "early": [early], "future": [future]}
    made = [
        paired("plain_pairs", **scores)[1],
        paired("anchored_pairs", "early", **scores)[1],
        paired("pairs", "early", "future", **scores)[1],
    ]
    gaps = [rows[0]["chosen_score"] - rows[0]["rejected_score"] if rows else 0 for rows in made]
    assert gaps[0] <= gaps[1] <= gaps[2]
    for row in made[2]:
        assert not row["chosen_id"].startswith("early")
        assert not row["rejected_id"].startswith("future")
        if row["chosen_id"].startswith("future"):
            assert row["chosen_score"] > max((score for score in policy if score is not None), default=-1)
        if row["rejected_id"].startswith("early"):
            assert row["rejected_score"] < min((score for score in policy if score is not None), default=6)


def test_a_cut_response_of_any_model_keeps_to_the_rule_of_all():
    cut = {"finish_reason": "length", "response": "half an", "source": "early"}
    assert not pairs.may_be_rejected(cut, PairsConfig())
    assert pairs.may_be_rejected(cut, PairsConfig(truncated_rejected=True))
    assert not pairs.may_be_rejected({**cut, "source": "future"}, PairsConfig(truncated_rejected=True))
    assert not pairs.may_be_chosen({**cut, "source": "future"}, PairsConfig())


class Says:
    """An engine that gives each prompt the same answers, and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = answers, []

    def generate(self, requests):
        for request in requests:
            self.asked.append(request)
            for index in range(request.n):
                yield Completion(request.id, index, self.answers[index], 2, "stop")


def test_the_words_of_an_earlier_model_are_not_judged_again():
    config = recipes.load("self_rewarding", "smoke", ["responses.n=3"])
    inputs = {"prompts": tables.prompts("Why?", "How?"), "responses": tables.responses([("p0", " known", "stop")])}
    respond, judge = temporal._pool("early", "base")
    engine = Says("known", "new", "")
    rows, drops = respond.run(shard(config, inputs, engine=engine))
    assert [(row["prompt_id"], row["index"], row["source"], row["model"]) for row in rows.to_pylist()] == [
        (prompt, index, "early", "M0") for prompt in ("p0", "p1") for index in (3, 4, 5)
    ]
    why = {row["id"]: (row["stage"], row["reason"]) for row in drops.to_pylist()}
    by_place = {(row["prompt_id"], row["index"]): why.get(row["response_id"]) for row in rows.to_pylist()}
    assert by_place["p0", 3] == ("early_responses", "duplicate")
    assert by_place["p1", 3] is None  # another prompt's
    assert by_place["p0", 5] == ("early_responses", "empty")
    asks = Says(*["Score: 3"] * 3)
    judged, _ = judge.run(
        shard(config, {**inputs, "early_responses": rows, "drops:early_responses": drops}, engine=asks)
    )
    assert len(asks.asked) == len(set(judged["target_id"].to_pylist())) == 3
    own = steps.respond(shard(config, inputs, engine=Says("a", "b", "c")))[0]
    assert not {*own["seed"].to_pylist()} & {*rows["seed"].to_pylist()}, "another model draws from another stream"


# --- campaigns ------------------------------------------------------------------------------------------------------


def test_a_campaign_asks_three_models_and_one_judge(scripted):
    folder = scripted(*ONE, *BOTH, name="both")
    said = {
        row["response_id"]: row
        for dataset in ("responses", "early_responses", "future_responses")
        for row in read(folder, dataset)
    }
    assert Counter((row["source"], row["model"]) for row in said.values()) == {
        ("policy", "M1"): 48, ("early", "M0"): 48, ("future", "M1_future"): 48,
    }  # fmt: skip
    judged = [read(folder, dataset) for dataset in ("judgments", "early_judgments", "future_judgments")]
    assert len({(row["judge"], row["rubric"], row["reading"]) for rows in judged for row in rows}) == 1
    assert {row["judge"] for row in judged[0]} == {"M1"}
    by = {
        name: {row["prompt_id"]: row for row in read(folder, name)}
        for name in ("plain_pairs", "anchored_pairs", "pairs")
    }
    for row in by["pairs"].values():
        chosen, rejected = said[row["chosen_id"]], said[row["rejected_id"]]
        assert (chosen["response"], rejected["response"]) == (row["chosen"], row["rejected"])
        assert chosen["response"] != rejected["response"]
        assert chosen["source"] in ("policy", "future")
        assert rejected["source"] in ("policy", "early")
    gap = {name: {prompt: row["chosen_score"] - row["rejected_score"] for prompt, row in rows.items()}
           for name, rows in by.items()}  # fmt: skip
    assert all(
        gap["pairs"][prompt] >= gap["anchored_pairs"][prompt] >= there for prompt, there in gap["plain_pairs"].items()
    )
    assert sum(gap["pairs"].values()) > sum(gap["plain_pairs"].values())
    # what M_f learnt, and that it is nobody's beginning
    future, last = (store.read_json(folder / "models" / name / "complete.json") for name in ("M1_future", "M2"))
    assert [(of["init_from"][0], of["reference"][0]) for of in (future, last)] == [("M1", "M1")] * 2
    assert (future["rows"], last["rows"]) == (len(by["anchored_pairs"]), len(by["pairs"]))
    # M_t writes the prompts, and judges what others wrote: three turns of it, and one of each other
    starts = (folder / "logs" / "engine_starts.txt").read_text().split()
    assert starts == ["M1", "M0", "M1", "M1_future", "M1"]
    # what is told of it
    told = store.read_json(folder / "iter_01" / "measures.json")
    for side, pool in (("rejected", "early"), ("chosen", "future")):
        replaced = [said[row[f"{side}_id"]]["source"] == pool for row in by["pairs"].values()]
        assert told[f"{side}_replaced"]["value"] == pytest.approx(sum(replaced) / len(replaced))
        assert told[f"{side}_replaced"]["n"] == len(replaced)
        assert 0 < told[f"{side}_replaced"]["value"] < 1
    both = gap["plain_pairs"].keys()
    assert told["score_gap"]["value"] == pytest.approx(sum(gap["pairs"][name] for name in both) / len(both))
    assert told["score_gap_alone"]["value"] == pytest.approx(sum(gap["plain_pairs"].values()) / len(both))
    assert told["paired_anew"]["value"] == pytest.approx(1 - len(both) / len(by["pairs"]))
    report.write_report(folder)
    page = (folder / "report" / "report.md").read_text()
    assert "pairs whose rejected the early model wrote" in page
    assert "responses alone would give, too" in page
    prompt = next(row["prompt_id"] for row in by["pairs"].values() if said[row["rejected_id"]]["source"] == "early")
    story = show.show(folder, prompt)
    assert "tokens by M0 (early)" in story
    assert "tokens by M1_future (future)" in story
    assert "as it stands in the pair" not in story, "both sides are among the responses shown"
    assert next(line for line in story.splitlines() if line.endswith("← rejected")).count("(early)") == 1


def test_the_tokens_of_what_other_models_wrote_count_where_they_are_paired(scripted):
    folder = scripted(*ONE, *BOTH, name="both")
    tokens = {
        row["response_id"]: row["n_tokens"]
        for dataset in ("responses", "early_responses", "future_responses")
        for row in read(folder, dataset)
    }
    counted = report.counting.read_iteration(folder, 1, None)
    lengths = [tokens[row["chosen_id"]] for row in read(folder, "pairs")]
    assert counted.chosen_tokens.value == pytest.approx(sum(lengths) / len(lengths))
    assert counted.tokens.n == 48, "of M_t alone"


def test_a_finished_campaign_is_reused_and_a_higher_k_adds_the_missing_passes(scripted):
    folder = scripted(*ONE, *BOTH, name="both")
    before = {path: path.stat().st_ino for path in folder.rglob("*.parquet")}
    scripted(*ONE, *BOTH, name="both")
    assert {path: path.stat().st_ino for path in folder.rglob("*.parquet")} == before
    assert len((folder / "logs" / "engine_starts.txt").read_text().split()) == 5
    kept = {row["judgment_id"] for row in read(folder, "early_judgments")}
    scripted(*ONE, *BOTH, "judgments.k=5", name="both")
    assert kept < {row["judgment_id"] for row in read(folder, "early_judgments")}
    same = [path for path in before if path.parent.name == "early_responses"]
    assert {path: path.stat().st_ino for path in same} == {path: before[path] for path in same}


def test_meta_rewarding_keeps_its_judgments_pairs(scripted):
    sets = ("judgments.k=4", "meta.max_score_share=1.0", *ONE)
    folder = scripted(*sets, *BOTH, recipe="meta_rewarding", name="meta")
    plain = scripted(*sets, recipe="meta_rewarding", name="plain")
    rows = read(folder, "pairs")
    assert [row for row in rows if row["kind"] == "judgment"] == read(plain, "judgment_pairs") != []
    assert read(folder, "plain_pairs") == read(plain, "pairs")
    told = store.read_json(folder / "iter_01" / "measures.json")
    assert 0 < told["rejected_replaced"]["value"] <= 1
    assert told["rejected_replaced"]["n"] == sum(row["kind"] == "response" for row in rows)
    assert "meta_first_wins" in told
    starts = (folder / "logs" / "engine_starts.txt").read_text().split()
    assert starts == ["M1", "M0", "M1", "M1_future", "M1"]


@pytest.mark.parametrize(
    ("setting", "datasets", "starts"),
    [
        (BOTH[0], {"plain_pairs", "early_responses", "early_judgments"}, ["M1", "M0", "M1"]),
        (BOTH[1], {"plain_pairs", "future_responses", "future_judgments"}, ["M1", "M1_future", "M1"]),
    ],
)
def test_half_of_it_makes_half_of_it(scripted, setting, datasets, starts):
    plain, folder = scripted(*ONE, name="plain"), scripted(*ONE, setting, name="half")
    names = [{path.parent.name for path in of.glob("iter_01/*/part-0*.parquet")} for of in (plain, folder)]
    assert names[1] - names[0] == datasets
    assert read(folder, "plain_pairs") == read(plain, "pairs") != read(folder, "pairs")
    assert (folder / "logs" / "engine_starts.txt").read_text().split() == starts


def test_off_nothing_is_added_and_switched_off_it_leaves_nothing_behind(scripted):
    for name, method in METHODS.items():
        assert method_of(recipes.load(name, "smoke")) is method
    plain, folder = scripted(*ONE, name="plain"), scripted(*ONE, *BOTH, name="both")
    scripted(*ONE, name="both")
    made = [
        {path.relative_to(of): path.read_bytes() for path in of.glob("iter_01/**/*.parquet")} for of in (plain, folder)
    ]
    extra = made[1].keys() - made[0].keys()
    assert {str(path) for path in extra} <= {
        "iter_01/training/M1_future/rows.parquet", "iter_01/training/M1_future/log.parquet",
        "iter_01/drops/part-training-M1_future.parquet",
    }  # fmt: skip
    assert {path: data for path, data in made[1].items() if path not in extra} == made[0]


def test_m1_is_early_from_the_second_iteration_on(scripted):
    folder = scripted("iterations=2", "evaluation.models=none", "temporal.rejected_from=sft", name="sft")
    assert read(folder, "early_responses") == read(folder, "early_judgments") == []
    assert read(folder, "plain_pairs") == read(folder, "pairs")
    assert {row["model"] for row in read(folder, "early_responses", 2)} == {"M1"}
    assert {row["judge"] for row in read(folder, "early_judgments", 2)} == {"M2"}
    assert (folder / "logs" / "engine_starts.txt").read_text().split() == ["M1", "M2", "M1", "M2"]


def test_it_can_begin_and_end_on_the_way(scripted):
    later = 'schedule=[{iteration=2, set={"temporal.rejected_from"="base"}}]'
    folder = scripted("iterations=2", "evaluation.models=none", later, name="later")
    plain = scripted(*ONE, name="plain")
    assert not (folder / "iter_01" / "plain_pairs").exists()
    assert read(folder, "pairs") == read(plain, "pairs")
    assert {row["model"] for row in read(folder, "early_responses", 2)} == {"M0"}


def test_where_every_iteration_restarts_from_m1_so_does_the_future_model(scripted):
    folder = scripted(
        "iterations=2", "evaluation.models=none", BOTH[1], recipe="self_rewarding_anchored", name="anchored"
    )
    for name in ("M2_future", "M3"):
        marker = store.read_json(folder / "models" / name / "complete.json")
        assert marker["init_from"][0] == marker["reference"][0] == "M1"


def test_a_frozen_judge_is_one_engine_for_what_m0_wrote_too(scripted):
    folder = scripted(*ONE, *BOTH, "judgments.judge=base", name="frozen")
    assert (folder / "logs" / "engine_starts.txt").read_text().split() == ["M1", "M0", "M1_future", "M0"]


def test_two_campaigns_of_one_seed_are_the_same_bytes(scripted):
    one, two = (scripted(*ONE, *BOTH, name=name) for name in ("a", "b"))
    made = [{path.relative_to(of): path.read_bytes() for path in of.rglob("*.parquet")} for of in (one, two)]
    assert made[0] == made[1]


def test_a_future_model_with_nothing_to_learn_stops_it_and_says_what_to_change(scripted):
    with pytest.raises(NothingLeft, match=r"rows in anchored_pairs to train the future model on.*chosen_from_future"):
        scripted(*ONE, *BOTH, "pairs.min_margin=5", "pairs.max_chosen_chars=1")


# --- what it cannot work with, and what it costs ----------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("setting", BOTH)
def test_methods_that_do_not_score_single_responses_refuse_it(name, setting):
    config = recipes.load(name, "smoke", [setting])
    if name in FITTING:
        require_fit(config)
        assert method_of(config).steps[-1].makes == "pairs"
    else:
        said = setting.replace(".", r"\.")
        with pytest.raises(ConfigError, match=rf"{said} .*method={name} does not.* Set .*one of .*self_rewarding"):
            require_fit(config)


def test_m1_in_a_single_iteration_is_refused():
    config = recipes.load("self_rewarding", "smoke", ["temporal.rejected_from=sft", "iterations=1"])
    with pytest.raises(ConfigError, match=r"temporal\.rejected_from=sft .* iterations=1 that is M_t itself\. Set"):
        require_fit(config)


def test_a_schedule_is_refused_by_the_iteration_in_which_it_cannot_be():
    later = 'schedule=[{iteration=2, set={"temporal.chosen_from_future"=true}}]'
    with pytest.raises(
        ConfigError, match=r"schedule, from iteration 2 on: temporal\.chosen_from_future=true .*method=cream"
    ):
        require_fit(recipes.load("cream", "smoke", [later]))


@pytest.mark.parametrize("name", sorted(FITTING))
def test_every_step_reads_what_was_made_before(name):
    method = method_of(recipes.load(name, "smoke", BOTH))
    before = set()
    for step in method.steps:
        assert set(step.reads) <= before
        before |= {step.makes} if step in method.makes else set()
    assert method.makes[-1].makes == "pairs"
    assert temporal.fits(METHODS[name])
