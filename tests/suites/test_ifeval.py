"""IFEval's accuracies against lm-evaluation-harness itself, and by hand."""

import json
from pathlib import Path

import pytest
from suites import published
from typer.testing import CliRunner

from flows.cli import app
from srlm_core.suites import ifeval

RESPONSES = {
    "Name three birds without commas.": "Heron and crane and tern.",
    "Write at least five words, in lower case.": "Here you are:\nthe heron stands quite still here",
    "Say the word heron.": "",
}


def given(tmp_path):
    rows = [json.loads(line) for line in published.ifeval(tmp_path).read_text().splitlines()]
    return [(row, RESPONSES[row["prompt"]]) for row in rows]


def test_worked_by_hand(tmp_path):
    found = ifeval.scores(given(tmp_path))
    # the second is in lower case only without its first line; an empty answer follows nothing
    assert found["prompt_level_strict_acc"]["value"] == pytest.approx(1 / 3)
    assert found["prompt_level_loose_acc"]["value"] == pytest.approx(2 / 3)
    assert found["inst_level_strict_acc"] == {"value": 0.5, "stderr": pytest.approx(0.5**0.5 / 4), "n": 4}
    assert found["inst_level_loose_acc"]["value"] == 0.75
    assert found["unchecked"] == 0


def test_the_same_as_lm_evaluation_harness(tmp_path):
    import lm_eval
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Given(LM):
        def generate_until(self, requests, disable_tqdm=False):
            return [RESPONSES[request.args[0]] for request in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise NotImplementedError

    own = Path(lm_eval.__file__).parent / "tasks" / "ifeval" / "ifeval.yaml"
    (tmp_path / "here.yaml").write_text(
        f"include: {own}\ntask: ifeval_here\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{train: {published.ifeval(tmp_path)}}}}}\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = simple_evaluate(Given(), tasks=["ifeval_here"], task_manager=manager, bootstrap_iters=0)["results"]
    ours = ifeval.scores(given(tmp_path))
    for name in ("prompt_level_strict_acc", "prompt_level_loose_acc", "inst_level_strict_acc", "inst_level_loose_acc"):
        assert ours[name]["value"] == theirs["ifeval_here"][f"{name},none"], name


def test_a_check_that_cannot_run_is_counted_and_in_no_rate(tmp_path, monkeypatch):
    from lm_eval.tasks.ifeval import instructions_util

    def missing():
        raise LookupError("punkt_tab")

    monkeypatch.setattr(instructions_util, "_get_sentence_tokenizer", missing)
    row = {"key": 4, "prompt": "?", "instruction_id_list": ["length_constraints:number_sentences"],
           "kwargs": [{"relation": "at least", "num_sentences": 1}]}  # fmt: skip
    found = ifeval.scores([*given(tmp_path), (row, "One. Two.")])
    assert (found["unchecked"], found["prompt_level_strict_acc"]["n"]) == (1, 3)


def test_the_same_answer_gets_the_same_score_though_the_checker_draws():
    row = {"key": 1129, "prompt": "Use 6 exclamation marks.", "instruction_id_list": ["keywords:letter_frequency"],
           "kwargs": [{"let_relation": "at least", "letter": "!", "let_frequency": 6}]}  # fmt: skip
    found = [ifeval.scores([(row, "An apple is an apple is an apple.")]) for _ in range(20)]
    assert found == found[:1] * 20


def test_from_the_command_line_on_given_responses(tmp_path):
    file = published.ifeval(tmp_path)
    said = [{"prompt": prompt, "response": response} for prompt, response in list(RESPONSES.items())[:2]]
    mine = published.lines(tmp_path / "mine.jsonl", [*said, {"prompt": "Something else", "response": "?"}])
    done = CliRunner().invoke(app, ["ifeval", str(mine), "--questions", str(file), "--json"])
    told = json.loads(done.stdout)
    assert told["prompt_level_strict_acc"]["value"] == 0.5
    assert (told["not_asked"], told["not_answered"]) == (1, 1)
    wrong = CliRunner().invoke(app, ["ifeval", str(file), "--questions", str(file)])
    assert "expected rows with prompt, response" in str(wrong.exception)
