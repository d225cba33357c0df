"""Training with several ranks, as claims: it does what one does, rounding aside, and dies and goes on as one does."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from engines import test_reward_training as rewarding
from engines import test_scir_training as unlabelled
from engines import test_training as alone

from srlm_core import recipes
from srlm_core.backend import resolve
from srlm_core.config import DpoConfig, OnlineConfig, SftConfig
from srlm_core.engines.training_job import TrainingJob, refuses, split, train
from srlm_core.errors import ConfigError, TrainingFailed

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "passes"),
    [
        (16, 4, 1, (4, 4)),
        (16, 4, 2, (4, 2)),
        (16, 4, 8, (2, 1)),  # less than 4 rows are left to each
        (16, 4, 16, (1, 1)),
        (12, 2, 3, (2, 2)),
    ],
)
def test_ranks_share_a_step(batch: int, micro: int, ranks: int, passes: tuple[int, int]) -> None:
    settings = SftConfig(batch_size=batch, micro_batch_size=micro)
    assert split(settings, ranks) == passes
    assert passes[0] * passes[1] * ranks == batch
    assert refuses("sft", settings, ranks, "off") is None


@pytest.mark.parametrize(("batch", "micro", "ranks"), [(16, 4, 3), (16, 4, 32), (4, 3, 1), (10, 4, 2)])
def test_a_step_that_ranks_cannot_share_is_refused(batch: int, micro: int, ranks: int) -> None:
    said = refuses("sft", SftConfig(batch_size=batch, micro_batch_size=micro), ranks, "off")
    assert said is not None
    for name in ("batch_size", "micro_batch_size", "training.ranks"):
        assert name in said


def test_what_was_written_for_one_rank_is_refused() -> None:
    assert "Set training.ranks=1" in (refuses("online", OnlineConfig(), 2, "off") or "")
    assert "Set training.fsdp=off" in (refuses("sft", SftConfig(lora_rank=4), 2, "full_shard") or "")
    assert "Set training.fsdp=off" in (refuses("dpo", DpoConfig(loss="scir"), 2, "full_shard") or "")


@pytest.mark.parametrize(
    ("recipe", "settings", "said"),
    [
        ("self_rewarding", ["training.ranks=2"], r"training\.launcher=single starts one"),
        ("self_rewarding", ["training.fsdp=full_shard"], r"training\.launcher=single starts one"),
        ("self_rewarding", ["training.launcher=torchrun", "training.ranks=3"], r"training\.(dpo|sft): expected batch"),
        ("rlhf_online", ["training.launcher=ray", "training.ranks=2"], r"Set training\.ranks=1"),
        (
            "self_rewarding",
            ["training.launcher=torchrun", "training.fsdp=full_shard", "engine.kind=transformers"],
            r"training\.fsdp=full_shard: expected GPUs to split a model over",
        ),
    ],
)
def test_it_is_refused_before_anything_is_loaded(
    recipe: str, settings: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from srlm_core.engines import hardware

    monkeypatch.setattr(hardware, "gpus", lambda: ())
    with pytest.raises(ConfigError, match=said):
        resolve(recipes.load(recipe, "smoke", settings))


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from srlm_core.engines import hardware

    monkeypatch.setattr(hardware, "gpus", lambda: ("0", "1"))
    asked = ["training.launcher=torchrun", "training.ranks=4", "engine.kind=transformers"]
    with pytest.raises(ConfigError, match=r"training\.ranks=4: expected a GPU .* got 2\. Set training\.ranks=2"):
        resolve(recipes.load("self_rewarding", "smoke", asked))


def test_blank_rows_fill_the_last_step_and_change_no_other() -> None:
    from srlm_core.engines.trainers import StepSampler
    from srlm_core.engines.training_rows import Tokenized, blank_rows

    lengths = [5, 9, 2, 7, 7, 3, 8, 1, 4, 6, 2]
    steps = list(StepSampler(lengths, 4, seed=3))
    assert list(StepSampler(lengths, 4, seed=3, blanks=1)) == [*steps, 11]
    row = Tokenized("r", [5, 6, 7], ([8], [9, 10]), {"label": 1.0, "weight": 1.0})
    blanks = blank_rows([row] * 11, 4)
    assert len(blanks) == 1
    assert blanks[0].completions == ([], [])
    assert blanks[0].numbers["weight"] == 0
    assert blank_rows([row] * 12, 4) == []


def test_another_number_of_ranks_goes_on_from_the_same_checkpoints(child: Any, tiny: Path, tmp_path: Path) -> None:
    job = alone._job(tmp_path, "sft", tiny, alone._rows("sft", 4))
    assert child.fingerprint(_of(2, job)) == child.fingerprint(job)
    assert child.fingerprint(job.model_copy(update={"fsdp": "full_shard"})) != child.fingerprint(job)


# ---------------------------------------------------------------------------------------------- one rank against two


def _of(ranks: int, job: TrainingJob, launcher: str = "torchrun") -> TrainingJob:
    return job.model_copy(update={"ranks": ranks, "launcher": launcher, "threads": 1})


def _jobs(folder: Path, tiny: Path, other: Path) -> dict[str, TrainingJob]:
    """Jobs of each kind; 11 rows leave a last step of 3, of which two ranks cannot take equally many."""
    folder.mkdir()
    short, long = alone._rows("sft", 2)
    short["completion"], long["completion"] = alone._said("assistant", "two"), alone._said("assistant", "word " * 30)
    held = {"checkpoint_steps": 2, "patience": 50}
    sft, dpo = alone._rows("sft", 11), alone._unsure(11)
    small = {"micro_batch_size": 2, "epochs": 2}
    far = {"reference": other, "nll": 0.7}
    return {
        "sft": alone._job(folder, "sft", tiny, sft, name="sft", heldout=alone._rows("sft", 5, 4), **small, **held),
        "lora": alone._job(folder, "sft", tiny, sft, name="lora", lora_rank=4, **small),
        "uneven": alone._job(
            folder, "sft", tiny, [short, long], name="uneven", batch_size=2, micro_batch_size=1, **alone.UNHURRIED
        ),
        "dpo": alone._job(folder, "dpo", tiny, alone._rows("dpo", 8), name="dpo", reference=other, **small),
        "soft": alone._job(
            folder, "dpo", tiny, dpo, name="soft", heldout=alone._unsure(5, 4), **small, **held, **far
        ),
        "sppo": alone._job(folder, "dpo", tiny, dpo, name="sppo", loss="sppo", beta=0.05, **small, reference=other),
        "scir": unlabelled.job(folder, tiny, unlabelled.pairs(7), name="scir", reference=other, micro_batch_size=2),
        "reward": rewarding.job(folder, tiny, rewarding.groups(7), name="reward", micro_batch_size=2),
    }  # fmt: skip


@pytest.fixture(scope="module")
def both(
    child: Any, tiny: Path, other: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[TrainingJob, Any, TrainingJob, Any]]:
    """Each job with what came of it, of one rank and of two."""
    folder = tmp_path_factory.mktemp("ranks")
    ones, twos, described = _jobs(folder / "one", tiny, other), _jobs(folder / "two", tiny, other), []
    twos = {name: _of(2, job) for name, job in twos.items()}
    for name, job in twos.items():
        job.work_dir.mkdir()
        described.append(folder / f"{name}.json")
        described[-1].write_text(job.model_dump_json())
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(ROOT / "tests/engines/several.py"), *map(str, described)],
        check=True, env=os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}, timeout=500,
    )  # fmt: skip
    found = {}
    for name, job in ones.items():
        result, _ = alone._run(child, job)
        done = child.TrainingResult.model_validate_json((twos[name].work_dir / "result.json").read_text())
        found[name] = (job, result, twos[name], done)
    return found


@pytest.mark.cluster
@pytest.mark.parametrize("name", ["sft", "lora", "dpo", "soft", "sppo", "scir", "reward"])
def test_two_ranks_train_what_one_does(name: str, both: Any) -> None:
    job, one, of_two, two = both[name]
    assert (two.steps, two.n_rows, two.n_heldout, two.best_step) == (
        one.steps,
        one.n_rows,
        one.n_heldout,
        one.best_step,
    )
    assert len(one.log) == len(two.log) >= 2
    of_rows = ("loss", "rewards/", "logps/", "scir/", "accuracy", "margin", "mean_reward")
    for single, double in zip(one.log, two.log, strict=True):
        assert single.keys() == double.keys()
        for key in single:
            if key.removeprefix("eval_").startswith(of_rows):
                assert double[key] == pytest.approx(single[key], rel=1e-4, abs=1e-5), (single["step"], key)
        for key in ("step", "epoch", "learning_rate", "num_tokens"):
            assert double.get(key) == single.get(key), key
        if "grad_norm" in single:
            assert double["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-3)
    if name != "reward":  # another class; its loss has shown the same
        assert alone._share_apart(job.output, of_two.output) < 1e-3
    assert two.memory_mib > 0


@pytest.mark.cluster
def test_the_mean_is_over_the_tokens_of_all_ranks(both: Any, tiny: Path) -> None:
    """One rank has an answer of 2 tokens, the other one of 30 and more: not the mean of their two means."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    job, _, _, two = both["uneven"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), alone._tokenizer(tiny)
    sums = []
    for row in alone.pq.read_table(job.rows).to_pylist():
        before = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        said = tokenizer(row["completion"][0]["content"] + "<|im_end|>")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([before + said])).logits[0, len(before) - 1 : -1]
        sums.append((cross_entropy(logits, torch.tensor(said), reduction="sum").item(), len(said)))
    (few, n_few), (many, n_many) = sums
    assert n_many > 10 * n_few
    pooled, of_means = (few + many) / (n_few + n_many), (few / n_few + many / n_many) / 2
    assert abs(pooled - of_means) > 1e-3
    assert two.log[0]["loss"] == pytest.approx(pooled, abs=1e-5)


# ----------------------------------------------------------------------------------------------------------- deaths


_others: set[psutil.Process] = set()
"""What other tests of this process have running."""


@pytest.fixture(autouse=True)
def _whose_is_whose() -> None:
    _others.clear()
    _others.update(psutil.Process().children(recursive=True))


def _descendants() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if each not in _others]


def _gone(processes: list[psutil.Process], within_s: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive if process.is_running())


def _listens_at(process: psutil.Process) -> set[str]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return {one.laddr.ip for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    return set()


def _rank(number: int) -> psutil.Process:
    """A rank among our descendants."""
    for process in _descendants():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RANK") == str(number) and "srlm_core.engines.trl" in process.cmdline():
                return process
    raise AssertionError(f"no rank {number}")


def _ends_as(calm: Any, result: Any, job: TrainingJob, other: TrainingJob) -> None:
    assert [row["step"] for row in result.log] == [row["step"] for row in calm.log]
    for row, undisturbed in zip(result.log, calm.log, strict=True):
        assert row["loss"] == pytest.approx(undisturbed["loss"], rel=1e-4, abs=1e-5)
        assert row["num_tokens"] == undisturbed["num_tokens"]
    assert alone._share_apart(job.output, other.output) < 1e-3


def _to_be_killed(tmp_path: Path, tiny: Path, name: str, launcher: str) -> tuple[TrainingJob, TrainingJob]:
    # many steps after the last kill: the news of a step takes a while to whoever kills
    settings = {"epochs": 8, "checkpoint_steps": 2, "micro_batch_size": 2}
    calm, killed = (
        alone._job(tmp_path, "dpo", tiny, alone._unsure(11), name=each, **settings) for each in (f"{name}_calm", name)
    )
    return calm, _of(2, killed, launcher)


@pytest.mark.cluster
def test_killed_a_rank_and_then_all_of_them_it_ends_as_one_does(child: Any, tiny: Path, tmp_path: Path) -> None:
    quiet, job = _to_be_killed(tmp_path, tiny, "torchrun", "torchrun")
    seen: list[psutil.Process] = []

    def kill(step: int, find: Callable[[], psutil.Process]) -> Any:
        victim: list[psutil.Process] = []

        def on_progress(event: dict[str, Any]) -> None:
            if event["event"] == "step" and not victim:
                victim.append(find())
                seen.extend(_descendants())
            if event["event"] == "step" and event["step"] == step:
                victim[0].kill()

        return on_progress

    def launcher() -> psutil.Process:
        return next(each for each in psutil.Process().children() if "srlm_core.engines.launch" in each.cmdline())

    with pytest.raises(TrainingFailed, match=r"(?s)expected a model in .*Run again to go on from the last checkpoint"):
        train(job, log=tmp_path / "log", on_progress=kill(5, partial(_rank, 1)))
    assert _gone(seen, 5)
    with pytest.raises(TrainingFailed, match=r"killed by SIGKILL"):
        train(job, log=tmp_path / "log", on_progress=kill(9, launcher))
    assert _gone(seen, 5)
    events: list[dict[str, Any]] = []
    result = train(job, log=tmp_path / "log", on_progress=events.append)
    assert result.resumed_from_step in range(8, 24)
    assert not any(event["event"] == "reference" for event in events), "scored once, before the first kill"
    assert [event["step"] for event in events if event["event"] == "step"][-1] == 24
    calm, _ = alone._run(child, quiet)
    _ends_as(calm, result, quiet, job)
    assert train(job, log=tmp_path / "log") == result  # done is done
    assert not _descendants()


@pytest.mark.cluster
def test_rays_ranks_are_started_again_when_one_dies_and_end_as_one_does(child: Any, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    quiet, job = _to_be_killed(tmp_path, tiny, "ray", "ray")
    seen: list[psutil.Process] = []
    events: list[dict[str, Any]] = []

    def kill_one(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "step" and event["step"] == 5 and not seen:
            seen.extend(_descendants())
            workers = [each for each in seen if "RayTrainWorker" in " ".join(each.cmdline())]
            assert len(workers) == 2
            workers[1].kill()

    result = train(job, log=tmp_path / "log", on_progress=kill_one)
    assert result.resumed_from_step in range(4, 24)
    assert {"resumed", "saved", "step"} <= {event["event"] for event in events}
    calm, _ = alone._run(child, quiet)
    _ends_as(calm, result, quiet, job)
    assert _gone(seen, 10)
    assert not _descendants()


@pytest.mark.cluster
@pytest.mark.parametrize("launcher", ["torchrun", "ray"])
def test_no_rank_outlives_who_asked_for_it(launcher: str, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    job = _of(2, alone._job(tmp_path, "sft", tiny, alone._rows("sft", 16), epochs=5000), launcher)
    described = tmp_path / "described.json"
    described.write_text(job.model_dump_json())
    parent = subprocess.Popen(
        [sys.executable, "-c",
         "import sys\nfrom pathlib import Path\nfrom srlm_core.engines.training_job import TrainingJob, train\n"
         "job = TrainingJob.model_validate_json(Path(sys.argv[1]).read_text())\n"
         "train(job, log=Path(sys.argv[2]), on_progress=lambda event: print(event['event'], flush=True))\n",
         str(described), str(tmp_path / "log")],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert parent.stdout is not None
    while parent.stdout.readline().strip() != "step":
        assert parent.poll() is None
    started = psutil.Process(parent.pid).children(recursive=True)
    assert len(started) >= 3
    if launcher == "torchrun":  # Ray Train's ranks meet where PyTorch has it, on every interface
        assert {place for each in started for place in _listens_at(each)} <= {"127.0.0.1", "::1"}
    parent.kill()
    parent.wait()
    time.sleep(0.1)
    assert _gone(started, 15), [each for each in started if each.is_running()]
