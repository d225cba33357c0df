import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from conftest import TINY

from srlm_core import recipes, store
from srlm_core.backend import make_backend
from srlm_core.errors import EngineDied, NothingLeft
from srlm_core.executor import PlainExecutor
from srlm_core.run import Run
from srlm_core.store import Campaign


def parquet(folder):
    """Every dataset of a campaign, as bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.parquet"))
    }


def rows(folder, dataset, t=1):
    return list(store.iter_rows(folder / f"iter_{t:02d}" / dataset))


def events():
    seen = []
    return seen, lambda what, details: seen.append((what, details))


def test_a_campaign_makes_every_dataset_and_every_model(scripted):
    folder = scripted()
    for t in (1, 2):
        assert [len(rows(folder, name, t)) > 0 for name in ("prompts", "responses", "judgments", "pairs", "drops")] == [
            True
        ] * 5
    for name in ("sft_baseline", "M1", "M2", "M3"):
        assert store.read_json(folder / "models" / name / "complete.json")["digest"]
    for name in ("M0", "sft_baseline", "M1", "M2", "M3", "head_to_head"):
        assert store.read_json(folder / "evaluation" / name / "results.json")


def test_what_threads_count_at_once_is_all_counted(scripted):
    """Engines start in the threads of their shards, while the loop times its phases."""
    folder = scripted()
    config = recipes.load("self_rewarding", "smoke", overrides=TINY)
    with Campaign(folder.parent, "c") as campaign:
        run = Run(config, campaign, PlainExecutor(), make_backend(config, cache=folder, logs=folder))
        before = run.timings.get("engine starts", 0.0)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: run.add_time("engine starts", 1.0), range(200)))
    assert store.read_json(folder / "timings.json")["engine starts"] == pytest.approx(before + 200)


def test_iteration_t_starts_from_the_model_of_t_minus_1(scripted):
    folder = scripted("iterations=3")
    marker = {name: store.read_json(folder / "models" / name / "complete.json") for name in ("M1", "M2", "M3", "M4")}
    for t in (1, 2, 3):
        assert marker[f"M{t + 1}"]["init_from"] == [f"M{t}", marker[f"M{t}"]["digest"]]
        assert {row["model"] for row in rows(folder, "responses", t)} == {f"M{t}"}


def test_a_fixed_reference_is_m1_in_every_iteration(scripted):
    folder = scripted("training.dpo.reference=sft")
    assert store.read_json(folder / "models" / "M3" / "complete.json")["reference"][0] == "M1"


def test_held_out_rows_are_of_other_prompts_and_none_is_lost(scripted):
    folder = scripted("training.dpo.heldout_share=0.4", "prompts.target=24", "engine.shard_rows=5")
    sides = [store.read_part(folder / "iter_01" / "training" / f"{name}.parquet") for name in ("rows", "heldout")]
    asked = [{messages[-1]["content"] for messages in side["prompt"].to_pylist()} for side in sides]
    assert asked[0]
    assert asked[1]
    assert not asked[0] & asked[1]
    ids = [row_id for side in sides for row_id in side["id"].to_pylist()]
    assert sorted(ids) == sorted(row["pair_id"] for row in rows(folder, "pairs"))


def test_skill_rises_by_construction_and_the_win_rate_shows_it(scripted):
    folder = scripted("prompts.target=24", "evaluation.prompts=60")
    table = store.read_json(folder / "evaluation" / "head_to_head" / "results.json")["comparisons"]
    assert table["M3_vs_M0"]["win"]["value"] > table["M3_vs_M0"]["lose"]["value"]


def test_one_engine_start_per_model(scripted):
    folder = scripted()
    started = (folder / "logs" / "engine_starts.txt").read_text().split()
    assert sorted(started) == ["M0", "M1", "M2", "M3", "sft_baseline"]


def test_a_finished_campaign_starts_no_engine_and_writes_no_row(scripted):
    folder = scripted()
    before = {path: path.stat().st_ino for path in folder.rglob("*.parquet")}
    scripted()
    assert {path: path.stat().st_ino for path in folder.rglob("*.parquet")} == before
    assert len((folder / "logs" / "engine_starts.txt").read_text().split()) == 5


def test_two_campaigns_of_one_seed_are_the_same_bytes_and_another_seed_is_not(scripted):
    one, two, other = scripted(name="a"), scripted(name="b"), scripted("seed=1", name="d")
    assert parquet(one) == parquet(two)
    assert parquet(one) != parquet(other)


def test_prompts_are_disjoint_between_iterations(scripted):
    folder = scripted()
    asked = [row["messages"][0]["content"] for t in (1, 2) for row in rows(folder, "prompts", t)]
    assert len(asked) == len(set(asked))


def test_users_prompts_are_mixed_in_at_their_share_and_each_is_used_once(scripted, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("\n".join(" ".join(f"own{n}word{w}" for w in range(6)) + "?" for n in range(40)))
    folder = scripted(f'prompts.file="{path}"', "prompts.file_share=0.5")
    own = [
        [r["messages"][0]["content"] for r in rows(folder, "prompts", t) if r["source"].startswith("dataset:")]
        for t in (1, 2)
    ]
    assert [len(texts) for texts in own] == [6, 6]
    assert not set(own[0]) & set(own[1])


def test_every_id_leads_back_and_no_count_is_a_mystery(scripted):
    folder = scripted()
    prompts = {row["prompt_id"] for row in rows(folder, "prompts")}
    responses = {row["response_id"]: row for row in rows(folder, "responses")}
    dropped = {row["id"] for row in rows(folder, "drops")}
    for judgment in rows(folder, "judgments"):
        assert responses[judgment["target_id"]]["prompt_id"] == judgment["prompt_id"]
    judged = {judgment["target_id"] for judgment in rows(folder, "judgments")}
    assert all(response_id in judged or response_id in dropped for response_id in responses)
    paired = {pair["prompt_id"] for pair in rows(folder, "pairs")}
    assert paired | (dropped & prompts) == prompts
    for pair in rows(folder, "pairs"):
        assert responses[pair["chosen_id"]]["response"] == pair["chosen"]
        assert responses[pair["rejected_id"]]["finish_reason"] == "stop"


def test_another_pairs_setting_samples_and_judges_nothing_again_in_that_iteration(scripted):
    folder = scripted("iterations=1")
    kept = {
        name: [path.stat().st_ino for path in store.parts(folder / "iter_01" / name)]
        for name in ("prompts", "responses", "judgments", "pairs")
    }
    scripted("iterations=1", "pairs.min_margin=1.5")
    now = {name: [path.stat().st_ino for path in store.parts(folder / "iter_01" / name)] for name in kept}
    assert {name for name in kept if kept[name] != now[name]} == {"pairs"}
    assert all(row["chosen_score"] - row["rejected_score"] >= 1.5 for row in rows(folder, "pairs"))


def test_a_higher_k_adds_the_missing_passes_only(scripted):
    folder = scripted("iterations=1")
    before = {row["judgment_id"]: row for row in rows(folder, "judgments")}
    responses = [path.stat().st_ino for path in store.parts(folder / "iter_01" / "responses")]
    scripted("iterations=1", "judgments.k=5")
    after = {row["judgment_id"]: row for row in rows(folder, "judgments")}
    assert [path.stat().st_ino for path in store.parts(folder / "iter_01" / "responses")] == responses
    assert before.items() <= after.items()
    assert {row["index"] for key, row in after.items() if key not in before} == {3, 4}
    fresh = scripted("iterations=1", "judgments.k=5", name="fresh")
    assert {row["judgment_id"] for row in rows(fresh, "judgments")} == set(after)


def test_more_iterations_extend_a_finished_campaign(scripted):
    folder = scripted("iterations=1")
    before = parquet(folder / "iter_01")
    scripted("iterations=2")
    assert parquet(folder / "iter_01") == before
    assert (folder / "models" / "M3" / "complete.json").exists()


@pytest.mark.parametrize("dataset", ["prompts", "responses", "judgments", "pairs", "drops"])
def test_a_lost_or_damaged_part_is_made_again_the_same(scripted, dataset):
    folder = scripted("iterations=1")
    before = parquet(folder)
    path = store.parts(folder / "iter_01" / dataset)[1]
    whole = bytearray(path.read_bytes())
    for place in range(len(whole) // 3, len(whole) // 3 + 40):
        whole[place] ^= 0xFF
    path.write_bytes(whole)
    scripted("iterations=1")
    assert parquet(folder) == before


def test_smaller_campaigns_leave_no_stale_parts(scripted):
    folder = scripted("iterations=1", "prompts.target=12")
    scripted("iterations=1", "prompts.target=8")
    assert len(store.parts(folder / "iter_01" / "prompts")) == 2
    assert len(rows(folder, "pairs")) + len([r for r in rows(folder, "drops") if r["stage"] == "pairs"]) == len(
        rows(folder, "prompts")
    )


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("prompts.min_words=100", "No prompt survived"),
        ("judgments.sampling.max_tokens=4000", "could be judged"),
        ("pairs.min_margin=5.5", "margin_too_small"),
    ],
)
def test_an_iteration_that_leaves_nothing_stops_and_says_what_to_change(scripted, override, told):
    with pytest.raises(NothingLeft, match=told):
        scripted(override)


class Dying:
    """Wraps an engine; dies in the middle of its nth call."""

    def __init__(self, engine, deaths):
        self.engine, self.deaths = engine, deaths

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def generate(self, requests):
        for number, done in enumerate(self.engine.generate(requests)):
            if number == 3 and self.deaths and self.deaths.pop():
                raise EngineDied("killed for a test; its last words: out of memory")
            yield done


def with_dying_engine(scripted, monkeypatch, deaths):
    from srlm_core import backend

    opened = backend.scripted.ScriptedEngine
    monkeypatch.setattr(backend.scripted, "ScriptedEngine", lambda config, path: Dying(opened(config, path), deaths))
    return scripted("iterations=1")


def test_an_engine_that_dies_once_is_started_again_and_the_rows_are_the_same(scripted, monkeypatch, tmp_path):
    undisturbed = parquet(scripted("iterations=1", name="calm"))
    folder = with_dying_engine(scripted, monkeypatch, [True])
    assert parquet(folder) == undisturbed


def test_an_engine_that_dies_again_is_an_error_with_its_last_words(scripted, monkeypatch):
    with pytest.raises(EngineDied, match="out of memory"):
        with_dying_engine(scripted, monkeypatch, [True] * 50)


# --- kill and resume, from the command line -------------------------------------------------------------------------


def command(root, *more):
    overrides = [word for override in TINY for word in ("--set", override)]
    return [
        sys.executable,
        "-m",
        "flows.cli",
        "run",
        "smoke",
        "--root",
        str(root),
        "--no-prefect",
        "--no-mlflow",
        *overrides,
        *more,
    ]


ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def run_to_the_end(root):
    done = subprocess.run(command(root), capture_output=True, text=True, env=ENV, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return root / "smoke"


def kill_and_resume(tmp_path, moments, whole_group):
    started = time.monotonic()
    calm = parquet(run_to_the_end(tmp_path / "calm"))
    length = time.monotonic() - started
    for number, moment in enumerate(moments):
        root = tmp_path / f"killed{number}"
        child = subprocess.Popen(
            command(root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV, start_new_session=True
        )
        time.sleep(0.6 + moment * (length - 0.6))
        below = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
        if whole_group and child.poll() is None:  # at a late moment it may have ended by itself
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
        child.wait()
        finished = {path: path.stat().st_ino for path in root.rglob("part-*.parquet") if store.stamp_of(path)}
        _, alive = psutil.wait_procs(below, timeout=5)
        assert not alive, "a child process is left"
        folder = run_to_the_end(root)
        assert parquet(folder) == calm
        again = [path for path, inode in finished.items() if path.stat().st_ino != inode and "drops" not in path.parts]
        assert not again, "a finished shard was made twice"


def test_kill_9_at_two_moments_loses_nothing(tmp_path):
    kill_and_resume(tmp_path, [0.4, 0.75], whole_group=True)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("whole_group", [True, False], ids=["group", "command"])
def test_kill_9_at_twenty_random_moments_loses_nothing(tmp_path, whole_group):
    rng = random.Random(20)
    kill_and_resume(tmp_path, [rng.random() for _ in range(20)], whole_group)


def test_the_same_campaign_started_twice_stops_with_a_clear_message(tmp_path):
    (tmp_path / "smoke").mkdir()
    with store.Campaign(tmp_path, "smoke"):
        done = subprocess.run(command(tmp_path), capture_output=True, text=True, env=ENV, timeout=60, check=False)
    assert done.returncode == 1
    assert "another process works on it" in done.stderr


def test_a_changed_setting_stops_with_the_difference_and_redo_goes_on(tmp_path):
    run_to_the_end(tmp_path)
    changed = ["--set", "pairs.min_margin=1"]
    done = subprocess.run(command(tmp_path, *changed), capture_output=True, text=True, env=ENV, timeout=60, check=False)
    assert done.returncode == 1
    assert "pairs.min_margin: 0.0 -> 1.0" in done.stderr
    assert "--redo" in done.stderr
    done = subprocess.run(
        command(tmp_path, *changed, "--redo"), capture_output=True, text=True, env=ENV, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_fork_shares_what_is_unchanged_and_leaves_the_first_alone(tmp_path):
    before = parquet(run_to_the_end(tmp_path))
    done = subprocess.run(
        command(tmp_path, "--set", "pairs.min_margin=1", "--fork", "wider"),
        capture_output=True,
        text=True,
        env=ENV,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert parquet(tmp_path / "smoke") == before
    same = [Path(d) / "iter_01" / "responses" / "part-00000.parquet" for d in (tmp_path / "smoke", tmp_path / "wider")]
    assert same[0].stat().st_ino == same[1].stat().st_ino


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path):
    # long enough that it cannot end by itself first
    asked = command(tmp_path, "--set", "prompts.target=4000")
    child = subprocess.Popen(asked, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=ENV, text=True)
    while not (tmp_path / "smoke" / "iter_01" / "prompts").exists() and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 130, said
    assert "the same command goes on" in said
    assert "Traceback" not in said


NOBODY = "x@http://127.0.0.1:9/v1"


@pytest.mark.parametrize("setting", ["judgments.judge", "prompts.generator"])
def test_an_endpoint_that_iterations_ask_and_that_is_not_there_ends_the_run_before_anything_is_made(scripted, setting):
    with pytest.raises(EngineDied, match=rf"{setting}=x@http.*expected an OpenAI-compatible endpoint.*Start it"):
        scripted(f"{setting}={NOBODY}", name="none")
    folder = scripted(name="done")
    assert not (folder.parent / "none" / "models").exists()
    with pytest.raises(EngineDied):
        scripted(f"{setting}={NOBODY}", "iterations=3", name="done")


def test_one_that_only_measures_is_told_of_at_the_start_and_missed_when_its_time_comes(scripted):
    said = []
    with pytest.raises(EngineDied):
        scripted(f"evaluation.judge={NOBODY}", observers=[lambda what, details: said.append((what, details))])
    notes = [i for i, (what, details) in enumerate(said) if what == "note" and "not there yet" in details["text"]]
    models = [i for i, (what, _) in enumerate(said) if what == "model"]
    assert notes[0] < models[0] < models[-1]
