"""Methods compared by one command: on the same prompts, nothing made twice, killed and gone on with."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from srlm_core import backend, standings, store, summary
from srlm_core.errors import ConfigError, SrlmError, StoreError

ROOT = Path(__file__).parents[2]
SMALL = ("prompts.target=8", "engine.shard_rows=4", "seed_data.ift_rows=24", "seed_data.eft_groups=4", "iterations=1",
         "evaluation.prompts=6", "evaluation.heldout_groups=4", "evaluation.text_judgments=4",
         "evaluation.bootstrap_samples=20")  # fmt: skip
METHODS = ("self_rewarding", "cream", "spin")


def words(root: Path, *more: object) -> list[str]:
    sets = [word for setting in SMALL for word in ("--set", setting)]
    return ["compare", *sets, "--size", "smoke", "--no-prefect", "--no-mlflow", "--root", str(root), *map(str, more)]


def compare(root: Path, *more: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, words(root, "--json", *more), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def parquet(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.glob("compare-*/**/*.parquet"))
    }


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """Three methods and two seeds: where, what was printed, and the models that were trained."""
    root, trained = tmp_path_factory.mktemp("runs"), list[str]()
    real = backend.scripted.train

    def train(job: Any, **how: Any) -> Any:
        trained.append("/".join(job.output.relative_to(root).parts[::2]))
        return real(job, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.scripted, "train", train)
        told = compare(root, *METHODS, "--seeds", 2)
    return root, told, trained


def test_a_row_per_method_over_its_seeds_with_errors_and_budgets(compared: Any) -> None:
    root, told, _ = compared
    assert [(row["method"], row["model"], row["seeds"]) for row in told["methods"]] == [
        (method, "M2", [0, 1]) for method in METHODS
    ]
    for row in told["methods"]:
        assert row["points"]["n"] == row["judge_accuracy"]["n"] == row["tokens"]["n"] == 2
        assert row["points"]["stderr"] != 0
        assert row["tokens_planned"] > 0
    assert told["methods"][0]["tokens_of_the_first"] == 1
    cream = told["methods"][1]
    assert cream["tokens_judging"]["value"] == 0
    page = Path(told["page"])
    assert page.parent == root / "comparisons" / "compare-smoke"
    assert "Points over generated tokens" in page.read_text()
    assert (page.parent / "figures" / "over_tokens.svg").is_file()
    assert page.read_text().count("<th>tokens</th>") == 1


def test_methods_that_have_prompts_written_have_the_same_and_the_table_says_which_have_not(compared: Any) -> None:
    root, told, _ = compared
    prompts = {method: [list(store.iter_rows(root / f"compare-smoke-{method}-s{seed}/iter_01/prompts"))
                        for seed in (0, 1)] for method in METHODS}  # fmt: skip
    assert prompts["cream"] == prompts["self_rewarding"]
    assert prompts["cream"][0] != prompts["cream"][1]
    assert {row["generator"] for rows in prompts["cream"] for row in rows} == {"M0"}
    assert [row["prompts"]["same"] for row in told["methods"]] == [16, 16, 0]
    assert any(line.startswith("spin: 0 of its 16 prompts") for line in told["caveats"])


def test_nothing_is_made_twice(compared: Any) -> None:
    """sft_baseline once a seed, M1 where judging is taught, and M2 of each method."""
    root, _, trained = compared
    expected = [
        f"compare-smoke-{method}-s{seed}/{model}"
        for seed in (0, 1)
        for method, models in (("self_rewarding", ["sft_baseline", "M1", "M2"]), ("cream", ["M2"]), ("spin", ["M2"]))
        for model in models
    ]
    assert trained == expected
    for seed in (0, 1):
        shared = (
            "models/sft_baseline/scripted.json", "bootstrap/training/sft_baseline/log.parquet",
            "evaluation/M0/heldout/part-00000.parquet", "evaluation/sft_baseline/responses/part-00000.parquet",
        )  # fmt: skip
        for name in shared:
            inodes = {(root / f"compare-smoke-{method}-s{seed}" / name).stat().st_ino for method in METHODS}
            assert len(inodes) == 1, name
    one, other = ((root / f"compare-smoke-{name}-s0/iter_01/prompts/part-00000.parquet").stat().st_ino
                  for name in ("self_rewarding", "cream"))  # fmt: skip
    assert one == other


def test_what_is_linked_costs_as_much_as_what_is_made(compared: Any, tmp_path: Path) -> None:
    """A campaign's tokens do not hang on who was first."""
    root, _, _ = compared
    compare(tmp_path, "cream", "self_rewarding")
    for method, asks_itself in (("cream", True), ("self_rewarding", False)):
        folder, other = (where / f"compare-smoke-{method}-s0" for where in (tmp_path, root))
        assert ("prompts" in store.read_json(folder / "usage.json")) == asks_itself
        config = summary.campaign_config(folder)
        found = standings.spent(folder, config)
        assert found == standings.spent(other, config)
        assert found is not None
        assert found.prompts > 0


def test_the_same_command_again_trains_nothing_and_reads_the_same(compared: Any) -> None:
    root, told, trained = compared
    before, rows = list(trained), {path: path.stat().st_ino for path in root.rglob("part-*.parquet")}
    again = compare(root, *METHODS, "--seeds", 2)
    assert [row["points"] for row in again["methods"]] == [row["points"] for row in told["methods"]]
    assert trained == before
    assert {path: path.stat().st_ino for path in root.rglob("part-*.parquet")} == rows


def test_campaigns_are_read_beside_recipes_and_a_name_that_is_both_is_read_unless_said(
    compared: Any, tmp_path: Path
) -> None:
    root, _, _ = compared
    read = compare(root, "compare-smoke-cream-s0", "compare-smoke-cream-s1", "compare-smoke-spin-s0")
    assert [(row["method"], row["seeds"]) for row in read["methods"]] == [("cream", [0, 1]), ("spin", [0])]
    (root / "cream").symlink_to(root / "compare-smoke-cream-s0")
    both = CliRunner().invoke(app, words(root, "--json", "cream", "compare-smoke-spin-s1"), catch_exceptions=False)
    assert "cream is a campaign and a recipe: the campaign is read. recipe:cream would be run." in both.stderr
    forced = compare(root, "recipe:cream", "campaign:compare-smoke-spin-s0")
    assert [row["campaigns"][0].split("/")[-1] for row in forced["methods"]] == [
        "compare-smoke-cream-s0", "compare-smoke-spin-s0",
    ]  # fmt: skip


def test_a_budget_sets_the_prompts_of_each_method(tmp_path: Path) -> None:
    told = compare(tmp_path, "self_rewarding", "spin", "--tokens", 60_000)
    rewarding, spin = told["methods"]
    # a prompt: 80 / 0.6 to write, 4 answers of 512, 12 judgments of 256
    assert rewarding["tokens_planned"] == pytest.approx(60_000, rel=0.1)
    target = store.read_json(tmp_path / "compare-smoke-self_rewarding-s0" / "config.json")["prompts"]["target"]
    assert target == round(60_000 / (80 / 0.6 + 4 * 512 + 12 * 256)) == 11
    assert spin["tokens_planned"] == 24 * 512  # it has no more instructions
    assert any("budgets are not equal" in line for line in told["caveats"])


@pytest.mark.parametrize(
    ("asked", "kind", "told"),
    [
        (("cream",), StoreError, "expected two campaigns or recipes or more"),
        (("cream", "recipe:cream"), StoreError, "expected two campaigns or recipes or more"),
        (("cream", "spinn"), StoreError, "Recipes: spin"),
        (("cream", "campaign:spin"), StoreError, "expected a campaign 'spin'"),
        (("cream", "recipe:spinn"), ConfigError, "Did you mean spin"),
        (("cream", "spin", "--tokens", "100"), ConfigError, "expected at least 1,670 for cream at size smoke"),
        (("cream", "spin", "--set", "seed=3"), ConfigError, "--seeds"),
        (("cream", "spin", "--set", "responses.n=2"), ConfigError, "spin samples one response"),
        (("cream", "spin", "--set", "spin:responses.nn=2"), ConfigError, "responses.n"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_run(
    tmp_path: Path, asked: tuple[str, ...], kind: type[SrlmError], told: str
) -> None:
    done = CliRunner().invoke(app, words(tmp_path, *asked))
    assert isinstance(done.exception, kind), done.output
    assert told in str(done.exception)
    assert not list(tmp_path.glob("compare-*"))


@pytest.mark.slow
def test_kill_9_loses_nothing_and_the_same_command_goes_on(compared: Any, tmp_path: Path) -> None:
    calm, _, _ = compared
    command = [sys.executable, "-m", "flows.cli", *words(tmp_path, *METHODS, "--seeds", 2)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for wait_for in ("compare-smoke-cream-s0/models", "compare-smoke-self_rewarding-s1/iter_01"):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        until = time.monotonic() + 120
        while not (tmp_path / wait_for).exists() and child.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        child.kill()
        child.wait()
    finished = {path: path.stat().st_ino for path in tmp_path.rglob("part-*.parquet") if store.stamp_of(path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "÷ first" in done.stdout
    assert parquet(tmp_path) == parquet(calm)
    again = [path for path, inode in finished.items() if path.stat().st_ino != inode and "drops" not in path.parts]
    assert not again, "a finished shard was made twice"
