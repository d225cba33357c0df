"""The commands that look at what a campaign left, as a user types them."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from flows.cli import app
from srlm_core.errors import SrlmError


def srlm(*words: object, typed: str | None = None) -> str:
    """Run a command that succeeds; returns what it printed."""
    done = CliRunner().invoke(app, [str(word) for word in words], input=typed, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


SMALL = ("prompts.target=8", "engine.shard_rows=4", "seed_data.ift_rows=24", "seed_data.eft_groups=4", "iterations=1",
         "evaluation.prompts=4", "evaluation.heldout_groups=6", "evaluation.text_judgments=8")  # fmt: skip


def run(root: Path, name: str, *settings: str) -> Path:
    """Run a scripted campaign in a second or two."""
    overrides = [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    srlm("run", "smoke", "--root", root, "--name", name, "--no-prefect", "--no-mlflow", *overrides)
    return root / name


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("runs"), "c")


def test_report_prints_the_table_of_models_and_compare_one_of_methods(campaign: Path) -> None:
    printed = json.loads(srlm("report", "c", "--root", campaign.parent, "--json"))
    assert Path(printed["report"]).read_text().startswith("<!doctype html>")
    assert [row["model"] for row in printed["models"]] == ["M0", "sft_baseline", "M1", "M2"]
    run(campaign.parent, "wider", "pairs.min_margin=1")
    assert "judge accuracy" in srlm("compare", "c", "wider", "--root", campaign.parent)  # two rows: settings differ
    alone = CliRunner().invoke(app, ["compare", "c", "c", "--root", str(campaign.parent)])
    assert "expected two campaigns or recipes or more" in str(alone.exception)
    told = json.loads(srlm("compare", "c", "wider", "--root", campaign.parent, "--json"))
    assert [(row["method"], row["model"], row["points"]["n"]) for row in told["methods"]] == [
        ("c", "M2", 1), ("wider", "M2", 1),
    ]  # fmt: skip
    assert Path(told["page"]).read_text().startswith("<!doctype html>")


def test_show_tells_one_prompts_way(campaign: Path) -> None:
    pair = pq.read_table(campaign / "iter_01" / "pairs" / "part-00000.parquet").to_pylist()[0]
    told = " ".join(srlm("show", "c", pair["prompt_id"], "--root", campaign.parent).split())
    assert " ".join(pair["chosen"].split())[:60] in told
    assert " ".join(pair["rejected"].split())[:60] in told


def test_a_campaign_that_is_not_there_is_an_error_that_names_what_is(campaign: Path) -> None:
    done = CliRunner().invoke(app, ["report", "cc", "--root", str(campaign.parent)])
    assert isinstance(done.exception, SrlmError)
    assert "There are: c" in str(done.exception)


def test_evaluate_measures_a_model_with_errors_and_counts(campaign: Path) -> None:
    asked = ("evaluate", campaign / "models" / "M2", "--size", "smoke", "--root", campaign.parent,
             "--set", "evaluation.heldout_groups=6", "--set", "evaluation.prompts=4")  # fmt: skip
    told = srlm(*asked)
    found = json.loads(srlm(*asked, "--json"))["judge"]["pairwise_accuracy"]
    assert 0 < found["n"] <= 36  # 6 groups of 4, 6 pairs each, less what could not be read
    assert f"  pairwise_accuracy: {found['value']:.3f} ± {found['stderr']:.3f} (n = {found['n']})" in told


def test_evaluate_measures_how_a_model_judges_a_file_of_rankings(campaign: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    good, bad = "Sound: nothing is left out. Sound: the steps are in order.", "Hollow: opinions differ widely."
    rows = [{"prompt": f"What is tea number {n}?", "chosen": good, "rejected": bad} for n in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    asked = ("evaluate", campaign / "models" / "M2", "--size", "smoke", "--root", tmp_path, "--ranked", file, "--json")
    found = json.loads(srlm(*asked))
    assert found["judge"]["n_groups"] == 9
    assert found["judge"]["pairwise_accuracy"]["n"] > 6  # but for what could not be read
    assert found["judge"]["pairwise_accuracy"]["value"] > 0.7
    assert found["judge"]["longer_accuracy"]["value"] == 1
    assert "responses" not in found
    assert json.loads(srlm(*asked)) == found


def test_models_named_alike_are_evaluated_into_folders_of_their_own(campaign: Path, tmp_path: Path) -> None:
    shutil.copytree(campaign / "models" / "M1", tmp_path / "other" / "M2")
    sets = ("--size", "smoke", "--root", tmp_path, "--set", "evaluation.heldout_groups=2")
    where = [
        srlm("evaluate", folder, *sets).splitlines()[-1].removeprefix("kept in ")
        for folder in (campaign / "models" / "M2", tmp_path / "other" / "M2")
    ]
    kept = [json.loads((Path(folder) / "evaluation/M2/results.json").read_text())["digest"] for folder in where]
    assert len(set(where)) == len(set(kept)) == 2


def test_data_shows_what_a_file_holds_and_what_was_set_aside(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"instruction": "Add 2 and 2", "output": "4"}\n{"instruction": "Say hi", "output": ""}\nx\n')
    found = json.loads(srlm("data", file, "--json"))
    assert (found["form"], found["rows"], found["examples"], found["prompts"]) == ("examples", 3, 1, 1)
    assert sum(found["set_aside"].values()) == 2
    told = srlm("data", file)
    assert "3 rows, examples" in told
    assert "not JSON" in told


def test_chat_ends_with_the_input(campaign: Path) -> None:
    told = srlm("chat", campaign / "models" / "M1", typed="What is a fjord?\n")
    assert told.startswith("you: M1: ")


def test_recipes_and_plan_say_what_there_is_and_what_it_costs() -> None:
    assert {"smoke", "demo", "small", "node", "paper"} <= set(srlm("recipes").split())
    lines = {line["what"]: line["value"] for line in json.loads(srlm("plan", "demo", "--json"))}
    assert lines["responses"] == 200  # 2 iterations of 25 prompts, 4 each
    assert lines["hours of sampling"] > 0
    words = ("--size", "paper", "--parameters", "70e9", "--gpus", 20, "--set", "engine.tensor_parallel=4")
    told = {line["what"]: line["value"] for line in json.loads(srlm("plan", "self_rewarding", *words, "--json"))}
    assert (told["nodes"], told["replicas"], told["training ranks"]) == (3, 5, 16)


def test_doctor_says_what_was_chosen_and_why() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    lacking = [finding for finding in found if finding["needed"] and not finding["ok"]]
    assert done.exit_code == bool(lacking)  # a nearly full disk is no fault of the tests' machine
    assert all(finding["remedy"] for finding in lacking)
    assert {"python", "vllm", "memory", "engine.compiled", "engine.max_sequences"} <= {
        finding["what"] for finding in found
    }


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("run", "self_rewardin"), "self_rewarding"),
        (("run", "demo", "--set", "prompts.targett=3"), "prompts.target"),
        (("plan", "demo", "--set", "prompts.target=many"), "prompts.target"),
    ],
)
def test_a_wrong_word_is_answered_with_the_near_one(asked: tuple[str, ...], told: str) -> None:
    done = CliRunner().invoke(app, list(asked))
    assert isinstance(done.exception, SrlmError)
    assert told in str(done.exception)


def test_approve_decides_and_the_same_command_goes_on(tmp_path: Path) -> None:
    asks = ("iterations=2", "gates.approval=true", 'evaluation.models="none"')
    with pytest.raises(SrlmError, match="waits for a decision after iteration 1"):
        run(tmp_path, "asks", *asks)
    assert srlm("approve", "asks", "--root", tmp_path, "--stop") == "asks: decided after iteration 1: it ends there.\n"
    with pytest.raises(SrlmError, match="somebody decided so"):
        run(tmp_path, "asks", *asks)
    assert "goes on with iteration 2" in srlm("approve", "asks", "--root", tmp_path)
    assert (run(tmp_path, "asks", *asks) / "models" / "M3" / "complete.json").is_file()
