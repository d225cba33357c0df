"""What may go for its room: what is needed stays, what went says so, and a rerun makes nothing again."""

import json
import os

import pytest
from conftest import TINY
from made_up import campaign as made_up
from typer.testing import CliRunner

from flows.cli import app
from srlm_core import cleaning, gates, recipes, store, summary, weights
from srlm_core.engines import models
from srlm_core.errors import ModelError, SrlmError
from srlm_core.gates import Gate
from srlm_core.mirror import Mirror
from srlm_core.report import write_report
from srlm_core.store import Campaign


def settings(*overrides, recipe="self_rewarding"):
    return recipes.load(recipe, "smoke", overrides=[*TINY, *overrides])


def with_weights(folder):
    return sorted(path.parent.name for path in folder.glob("models/*/scripted.json"))


# --- what is needed -------------------------------------------------------------------------------------------------


def test_a_chain_needs_its_last_model_alone():
    assert cleaning.needed(settings("iterations=3"), 1) == {"M0", "M2", "M3", "M4"}
    assert cleaning.needed(settings("iterations=3"), 3) == {"M0", "M4"}  # one more can be added


@pytest.mark.parametrize(
    ("overrides", "recipe", "needs"),
    [
        (["training.dpo.reference=sft"], "self_rewarding", {"M1"}),
        (["training.dpo.init_from=sft"], "self_rewarding", {"M1"}),
        (["judgments.judge=sft_baseline"], "self_rewarding", {"sft_baseline"}),
        (["prompts.generator=M1"], "self_rewarding", {"M1"}),
        (["evaluation.judge=M1"], "self_rewarding", {"M1"}),
        (['evaluation.more_judges=["sft_baseline"]'], "self_rewarding", {"sft_baseline"}),
        (["temporal.rejected_from=sft"], "self_rewarding", {"M1"}),
        ([], "cream", {"M3"}),  # it ranks with the model before
        ([], "rlhf", {"reward"}),
        ([], "rlhf_online", {"reward", "M1"}),
        (['schedule=[{iteration = 5, set = { "training.dpo.reference" = "sft" }}]', "iterations=5"],
         "self_rewarding", {"M1"}),
    ],
)  # fmt: skip
def test_whatever_a_later_step_loads_is_needed(overrides, recipe, needs):
    config = settings(*(overrides if any("iterations" in one for one in overrides) else ["iterations=4", *overrides]),
                      recipe=recipe)  # fmt: skip
    assert cleaning.needed(config, 3) - {"M0", "M4", "M5", "M6"} == needs


# --- as it runs -----------------------------------------------------------------------------------------------------


def test_a_campaign_keeps_its_last_models_and_makes_the_same(scripted, tmp_path):
    whole = scripted("iterations=3", name="whole")
    lean = scripted("iterations=3", "training.keep_last=1", name="lean")
    assert with_weights(whole) == ["M1", "M2", "M3", "M4", "sft_baseline"]
    assert with_weights(lean) == ["M4"]
    for model in ("M1", "M2", "M3", "M4", "sft_baseline"):
        kept, there = (store.read_json(folder / "models" / model / "complete.json") for folder in (lean, whole))
        assert (kept["digest"], kept["fingerprint"]) == (there["digest"], there["fingerprint"])
    same = lambda folder: {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}  # noqa: E731
    assert same(lean) == same(whole)


def test_a_finished_campaign_without_old_weights_makes_nothing_again_and_can_be_extended(scripted):
    folder = scripted("training.keep_last=1")
    before = {path: path.stat().st_ino for path in folder.rglob("*.parquet")}
    starts = (folder / "logs" / "engine_starts.txt").read_text()
    scripted("training.keep_last=1")
    assert {path: path.stat().st_ino for path in folder.rglob("*.parquet")} == before
    assert (folder / "logs" / "engine_starts.txt").read_text() == starts
    scripted("training.keep_last=2", "iterations=3")
    assert with_weights(folder) == ["M3", "M4"]
    assert summary.evaluation_results(folder, "M4")


@pytest.mark.parametrize("recipe", ["cream", "rlhf"])
def test_no_method_misses_a_model_that_was_dropped(scripted, recipe):
    folder = scripted("iterations=3", "training.keep_last=1", recipe=recipe)
    assert "M4" in with_weights(folder)
    assert not {"M1", "M2"} & set(with_weights(folder))


def test_a_fixed_reference_and_what_is_made_on_the_way(scripted):
    folder = scripted("training.keep_last=1", "training.dpo.reference=sft", "temporal.chosen_from_future=true")
    assert with_weights(folder) == ["M1", "M3"]
    assert weights.are_dropped(folder / "models" / "M1_future")


def test_asking_a_dropped_model_says_what_happened_and_how_to_get_it_back(scripted):
    folder = scripted("training.keep_last=1")
    part = folder / "iter_01" / "responses" / "part-00001.parquet"
    part.unlink()
    with pytest.raises(ModelError, match=r"weights of M1 .* dropped after iteration 1 .*keep_last=1.* storage.mirror"):
        scripted("training.keep_last=1")
    with pytest.raises(ModelError, match="were dropped"):
        models.check(folder / "models" / "M1", "M1")


def test_deleting_the_marker_trains_a_dropped_model_again(scripted):
    folder = scripted("training.keep_last=1")
    kept = store.read_json(folder / "models" / "M1" / "complete.json")["digest"]
    (folder / "models" / "M1" / "complete.json").unlink()
    (folder / "iter_01" / "responses" / "part-00001.parquet").unlink()
    scripted()
    assert store.read_json(folder / "models" / "M1" / "complete.json")["digest"] == kept
    assert "M1" in with_weights(folder)


def test_with_a_mirror_a_dropped_model_is_fetched_when_it_is_asked(tmp_path):
    from test_mirror import run

    more = ("training.keep_last=1", "iterations=2")
    folder = run(tmp_path / "runs", *more, mirror=f"file://{tmp_path}/far")
    run(tmp_path / "runs", *more, mirror=f"file://{tmp_path}/far")  # what waited for its copy goes now
    assert with_weights(folder) == ["M3"]
    part = folder / "iter_02" / "responses" / "part-00001.parquet"
    want = part.read_bytes()
    part.unlink()
    (tmp_path / "far" / "c" / "iter_02" / "responses" / part.name).unlink()
    run(tmp_path / "runs", "iterations=2", mirror=f"file://{tmp_path}/far")
    assert part.read_bytes() == want
    assert with_weights(folder) == ["M2", "M3"]


def test_no_weights_go_before_their_copy_is_there(tmp_path):
    from test_mirror import campaign_with_a_part

    campaign = campaign_with_a_part(tmp_path / "runs")
    with Mirror(f"file://{tmp_path}/far", campaign, wait_s=60) as mirror:
        assert not mirror.holds(campaign.model("M1"))


# --- by hand --------------------------------------------------------------------------------------------------------


def cli(*arguments):
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    if isinstance(done.exception, SrlmError):
        return str(done.exception)
    assert done.exception is None, done.output
    return done.output


@pytest.fixture
def finished(tmp_path):
    """Weights of 3000, 2000 and 1000 bytes; a training that was finished left a checkpoint, a writer a file."""
    folder = made_up(tmp_path)
    for size, model in ((3, "sft_baseline"), (2, "M1"), (1, "M2")):
        (folder / "models" / model / "model.safetensors").write_bytes(b"w" * 1000 * size)
    (folder / "bootstrap" / "training" / "M1" / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    (folder / "bootstrap" / "training" / "M1" / "checkpoints" / "checkpoint-3" / "optimizer.pt").write_bytes(b"o" * 500)
    (folder / "iter_02" / "training" / "checkpoints").mkdir(parents=True)  # M3 is not finished
    (folder / "models" / "M3").mkdir()
    (folder / "models" / "M3" / "model.safetensors").write_bytes(b"h" * 70)
    (folder / ".part.parquet.123.tmp").write_bytes(b"t" * 7)
    return folder


def test_it_says_what_would_go_how_much_it_takes_and_what_it_costs_and_deletes_nothing(finished, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    told = json.loads(cli("clean", finished.name, "--root", tmp_path, "--json"))
    assert not told["deleted"]
    assert {one["what"]: one["bytes"] for one in told["found"]} == {
        "weights of M1": 2000, "weights of sft_baseline": 3000, "checkpoints of M1": 500,
        "what a cut training left of M3": 70, "temporary .part.parquet.123.tmp": 7,
    }  # fmt: skip
    assert "M1 cannot be talked to, exported" in told["found"][0]["then"]
    text = cli("clean", finished.name, "--root", tmp_path)
    assert "say --yes" in text
    assert "5 KiB" in text  # 5577 bytes together
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != ".lock"] == before


def test_with_yes_it_goes_and_the_report_says_the_same(finished, tmp_path):
    write_report(finished)
    before = (finished / "report" / "report.md").read_bytes()
    cli("clean", finished.name, "--root", tmp_path, "--yes")
    assert sorted(path.parent.name for path in finished.glob("models/*/model.safetensors")) == ["M2"]
    assert weights.are_dropped(finished / "models" / "M1")
    assert not (finished / "bootstrap" / "training" / "M1" / "checkpoints").exists()
    assert (finished / "iter_02" / "training" / "checkpoints").exists()
    assert (finished / "bootstrap" / "training" / "M1" / "log.parquet").exists()
    write_report(finished)
    assert (finished / "report" / "report.md").read_bytes() == before
    assert "nothing to delete" in cli("clean", finished.name, "--root", tmp_path, "--yes")


def test_weights_that_another_campaign_holds_too_give_no_room(finished, tmp_path):
    os.link(finished / "models" / "M1" / "model.safetensors", tmp_path / "elsewhere")
    told = {one.what: one.bytes for one in cleaning.find(Campaign(tmp_path, finished.name), settings())}
    assert told["weights of M1"] == 0
    (tmp_path / "elsewhere").unlink()
    (finished / "models" / "sft_baseline" / "model.safetensors").unlink()
    os.link(*(finished / "models" / model / "model.safetensors" for model in ("M1", "sft_baseline")))
    told = {one.what: one.bytes for one in cleaning.find(Campaign(tmp_path, finished.name), settings())}
    assert sorted((told["weights of M1"], told["weights of sft_baseline"])) == [0, 2000]  # one file, two names


def test_what_is_kept_champions_and_what_is_not_measured_yet_stays(finished, tmp_path):
    (finished / "evaluation" / "sft_baseline" / "results.json").unlink()
    for t, passed in ((1, True), (2, False)):
        gate = Gate("win_rate", 0.6, 0.05, 16, 0.5, passed, "")
        digest = store.read_json(finished / "models" / f"M{t}" / "complete.json")["digest"]
        gates.keep(finished, t, settings("iterations=1"), digest, [gate])
    assert cleaning.champions(finished) == {"M1"}
    assert not [one for one in cleaning.find(Campaign(tmp_path, finished.name), settings()) if one.model]
    (finished / "iter_01" / "gates.json").unlink()
    assert "weights of M1" not in cli("clean", finished.name, "--root", tmp_path, "--keep", "M1")
    assert "weights of M1" in cli("clean", finished.name, "--root", tmp_path)
    assert "There are: M1, M2, sft_baseline" in cli("clean", finished.name, "--root", tmp_path, "--keep", "M7")


def test_a_campaign_that_runs_is_not_cleaned(finished, tmp_path):
    with Campaign(tmp_path, finished.name):
        assert "another process works on it" in cli("clean", finished.name, "--root", tmp_path, "--yes")
    assert (finished / "models" / "M1" / "model.safetensors").exists()
