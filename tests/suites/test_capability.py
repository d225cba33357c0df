"""The capability panel: lm-evaluation-harness's tasks on our engines, worked by hand and against its own model."""

import pytest
from engines.real import engine_of, small_model
from suites import published

from srlm_core import store
from srlm_core.engines.protocol import Completion, LogProb
from srlm_core.errors import ConfigError
from srlm_core.suites import capability

CHOICES = [
    {"question": "Which bird wades?", "choices": ["heron", "robin"], "answer": 0},
    {"question": "Which bird sings at dusk?", "choices": ["gull", "blackbird"], "answer": 1},
    {"question": "Which bird " + "very " * 50 + "is small?", "choices": ["wren", "swan"], "answer": 0},
]
SUMS = [{"question": "2 + 3 =", "answer": "5"}, {"question": "4 + 4 =", "answer": "8"}]


@pytest.fixture(scope="session")
def panel(tmp_path_factory):
    """Write two tasks of our own, once: the harness reads all of its own with them."""
    folder = tmp_path_factory.mktemp("tasks")
    birds = published.lines(folder / "birds.jsonl", CHOICES)
    sums = published.lines(folder / "sums.jsonl", SUMS)
    (folder / "birds.yaml").write_text(
        f"""task: our_birds
dataset_path: json
dataset_kwargs: {{data_files: {{test: {birds}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
num_fewshot: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    (folder / "sums.yaml").write_text(
        f"""task: our_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {sums}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 4}}
num_fewshot: 0
metric_list: [{{metric: exact_match}}]
"""
    )
    return capability.Panel(None, None, str(folder))


class Knows:
    """An engine that likes short answers, adds up badly, and fits a hundred characters."""

    def __init__(self):
        self.seen = []

    def logprobs(self, rows):
        for row in rows:
            self.seen.append(row)
            fits = len(row.prefix) < 100
            yield LogProb(row.id, -float(len(row.response)) if fits else None, 1, False)

    def generate(self, requests):
        for request in requests:
            self.seen.append(request)
            yield Completion(request.id, 0, "5", 1, "stop")


def test_choices_worked_by_hand_and_what_does_not_fit_is_null(panel):
    engine = Knows()
    rows, drops = capability.take("our_birds", engine, panel)
    assert engine.seen[0].prefix == "Question: Which bird wades?\nAnswer:"
    assert {row.response for row in engine.seen[:2]} == {" heron", " robin"}
    found = capability.measure("our_birds", rows)
    # heron and robin are equally long: the first wins; gull is shorter than blackbird; the third does not fit
    assert found["our_birds_acc"]["value"] == 0.5
    assert found["our_birds_acc"]["n"] == 2
    assert drops["reason"].to_pylist() == ["prompt_too_long"] * 2
    assert [row["value"] for row in rows.to_pylist() if row["metric"] == "acc"] == [1.0, 0.0, None]


def test_texts_are_drawn_greedily_up_to_the_tasks_end(panel):
    engine = Knows()
    rows, _ = capability.take("our_sums", engine, panel)
    asked = engine.seen[0]
    assert (asked.messages, asked.prefix, asked.sampling.stop) == ((), "2 + 3 =", ("\n",))
    assert (asked.sampling.temperature, asked.sampling.max_tokens) == (0, 4)
    assert capability.measure("our_sums", rows)["our_sums_exact_match"]["value"] == 0.5


def test_an_unknown_task_is_an_error_with_a_remedy(panel):
    with pytest.raises(ConfigError, match=r"got 'our_fish'. `lm-eval ls tasks` lists them"):
        capability.take("our_fish", Knows(), panel)


def test_a_campaign_takes_the_panel_with_the_engine_that_is_open(panel, scripted):
    sets = (
        'evaluation.suites.capability=["our_birds","our_sums"]',
        f"evaluation.suites.capability_tasks='{panel.own_tasks}'",
    )
    folder = scripted(*sets, "evaluation.suites.sampling.max_tokens=64", "iterations=1", "evaluation.models=policy")
    found = store.read_json(folder / "evaluation" / "M2" / "results.json")["suites"]["capability"]
    assert found["our_birds_acc"]["n"] == 3
    assert found["our_sums_exact_match"] == {"value": 0, "stderr": 0, "n": 2}


@pytest.mark.engine
@pytest.mark.slow
def test_the_same_as_the_harness_with_its_own_model(tmp_path, panel):
    """On the same weights: the harness's HFLM, and our engine through the adapter."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with engine_of("transformers", tmp_path / "log") as engine:
        rows, _ = capability.take("our_birds", engine, panel)
        said, _ = capability.take("our_sums", engine, panel)
    manager = TaskManager(include_path=panel.own_tasks, include_defaults=False)
    model = HFLM(str(small_model()), device="cpu", dtype="float32")
    theirs = simple_evaluate(model, tasks=["our_birds", "our_sums"], task_manager=manager, bootstrap_iters=0)["results"]
    ours = capability.measure("our_birds", rows) | capability.measure("our_sums", said)
    assert ours["our_birds_acc"]["n"] == 3
    assert ours["our_birds_acc"]["value"] == theirs["our_birds"]["acc,none"]
    assert ours["our_birds_acc_norm"]["value"] == theirs["our_birds"]["acc_norm,none"]
    assert ours["our_sums_exact_match"]["value"] == theirs["our_sums"]["exact_match,none"]
