"""Training, as claims: on a model of two layers with a real tokenizer and chat template."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srlm_core.config import DpoConfig, SftConfig
from srlm_core.engines.training_job import TrainingJob, train
from srlm_core.errors import TrainingFailed

pytestmark = pytest.mark.engine

WORDS = ("a", "model", "learns", "from", "what", "it", "says", "and", "keeps", "better", "of", "two", "answers")
ROLES = ("chosen", "rejected")
CERTAIN = {"label": 1.0, "weight": 1.0, "chosen_score": None, "rejected_score": None}


def _text(rng: random.Random, most: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, most)))


def _said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _rows(kind: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        row = {"id": f"r{i}", "prompt": _said("user", _text(rng))}
        columns = ("completion",) if kind == "sft" else ROLES
        row |= {column: _said("assistant", _text(rng)) for column in columns}
        rows.append(row if kind == "sft" else row | CERTAIN)
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def _job(tmp_path: Path, kind: str, model: Path, rows: list[dict[str, Any]], *, name: str = "M1", heldout: Any = None,
         reference: Path | None = None, seed: int = 0, **settings: Any) -> TrainingJob:  # fmt: skip
    """A job whose settings are quick unless said otherwise: steps of 4 rows at a rate that shows."""
    defaults = {
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "batch_size": 4,
        "micro_batch_size": 4,
        "max_length": 256,
        "precision": "float32",  # numbers are compared to the fifth digit; a processor with bfloat16 would take that
    }
    return TrainingJob(
        kind=kind, rows=_write(tmp_path / f"{name}.parquet", rows), init_from=model, reference=reference, seed=seed,
        heldout=None if heldout is None else _write(tmp_path / f"{name}_heldout.parquet", heldout),
        output=tmp_path / name, work_dir=tmp_path / f"{name}_work", threads=2,
        settings=(SftConfig if kind == "sft" else DpoConfig)(**(defaults | settings)),
    )  # fmt: skip


def _run(child: Any, job: TrainingJob) -> tuple[Any, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    job.work_dir.mkdir(parents=True, exist_ok=True)
    result = child.run(job, lambda **event: events.append(event))
    return result, events


def _weights(path: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters())


def _gap(a: Path, b: Path) -> float:
    """Largest difference of any weight."""
    ours, theirs = _weights(a), _weights(b)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


# ------------------------------------------------------------------------------------------------------------ tokens


def test_the_end_of_turn_token_is_in_the_loss_and_is_the_last(child: Any, tiny: Path) -> None:
    from transformers import AutoTokenizer

    from srlm_core.engines.training_rows import tokenize

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    row = {"id": "a", "prompt": _said("user", "Say two words."), "completion": _said("assistant", "two words")}
    tokenized = tokenize(row, "sft", tokenizer, {2})
    assert tokenizer.decode(tokenized.completions[0]) == "two words<|im_end|>"
    assert tokenizer.decode(tokenized.prompt).endswith("<|im_start|>assistant\n")
    dataset = child.as_dataset([tokenized], "sft")
    assert [label for label in dataset[0]["labels"] if label != -100] == tokenized.completions[0]
    assert tokenizer.convert_ids_to_tokens(dataset[0]["labels"][-1]) == "<|im_end|>"


def test_a_template_without_an_end_of_turn_token_is_refused(tiny: Path) -> None:
    from transformers import AutoTokenizer

    from srlm_core.engines.training_rows import tokenize

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(TrainingFailed, match="never stops"):
        tokenize(_rows("sft", 1)[0], "sft", tokenizer, {2})


def test_rows_that_are_too_long_are_left_out_reported_first_and_never_cut(
    child: Any, tiny: Path, tmp_path: Path
) -> None:
    rows = _rows("sft", 6)
    rows[2]["completion"] = _said("assistant", "word " * 100)
    job = _job(tmp_path, "sft", tiny, rows, max_length=90)
    seen: list[int] = []
    as_dataset = child.as_dataset
    child.as_dataset = lambda kept, kind: seen.extend(row.n_tokens for row in kept) or as_dataset(kept, kind)
    try:
        result, events = _run(child, job)
    finally:
        child.as_dataset = as_dataset
    assert [(row.id, row.reason) for row in result.dropped] == [("r2", "too_long")]
    assert result.dropped[0].n_tokens > 90
    assert result.n_rows == 5
    assert len(seen) == 5
    assert max(seen) <= 90
    assert [event["event"] for event in events][:2] == ["dropped", "rows"]


def test_when_every_row_is_too_long_the_error_says_how_long(child: Any, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"max_length=16.*the shortest has \d+\. Raise max_length"):
        _run(child, _job(tmp_path, "sft", tiny, _rows("sft", 3), max_length=16))


# -------------------------------------------------------------------------------------------------------------- loss


def test_dpo_starts_at_ln_2_when_the_policy_is_its_own_reference(child: Any, tiny: Path, tmp_path: Path) -> None:
    result, _ = _run(child, _job(tmp_path, "dpo", tiny, _rows("dpo", 4)))
    assert result.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # -log sigmoid(0) = ln 2 = 0.6931
    assert result.log[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_dpo_loss_is_the_papers(child: Any, tiny: Path, tmp_path: Path) -> None:
    """beta 0.1, logp chosen -40 (reference -42), rejected -52 (reference -50): 0.1 x (2 - -2) = 0.4."""
    trainer = _trainer(child, _job(tmp_path, "dpo", tiny, _rows("dpo", 4)))
    assert _loss_of(trainer, policy=(-40.0, -52.0), reference=(-42.0, -50.0)) == pytest.approx(
        (0.513015, -0.040131), abs=1e-4
    )  # -0.1 x sigmoid(-0.4)
    assert _loss_of(trainer, policy=(-52.0, -40.0), reference=(-50.0, -42.0))[0] == pytest.approx(
        0.913015, abs=1e-4
    )  # the same pair, labels swapped


def _loss_of(
    trainer: Any, *, policy: tuple[float, float], reference: tuple[float, float], **numbers: float
) -> tuple[float, float]:
    """The trainer's loss of one pair, and its gradient by the chosen response's log-probability."""
    import torch

    sums = torch.tensor([[value] for value in policy], requires_grad=True)
    zero = torch.zeros(2, 1)
    model = lambda **_: SimpleNamespace(log_probs=sums, entropy=zero, mean_logits=zero, is_top1=zero.bool())  # noqa: E731
    ones = torch.ones(2, 2, dtype=torch.long)
    inputs = {"input_ids": ones, "attention_mask": ones, "completion_mask": ones}
    references = {f"ref_{role}_logps": torch.tensor([value]) for role, value in zip(ROLES, reference, strict=True)}
    given = {name: torch.tensor([value]) for name, value in numbers.items()}
    loss = trainer.compute_loss(model, inputs | references | given)
    loss.backward()
    return loss.item(), sums.grad[0].item()


def _trainer(child: Any, job: TrainingJob) -> Any:
    child.claim(job.model_copy(update={"work_dir": _made(job.work_dir)}))
    rows, heldout, _ = child.load_rows(job, _tokenizer(job.init_from), lambda **_: None)
    return child.make_trainer(job, rows, heldout, _tokenizer(job.init_from), lambda **_: None)


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def test_another_reference_moves_the_first_loss_and_is_the_one_asked(
    child: Any, tiny: Path, other: Path, tmp_path: Path
) -> None:
    result, _ = _run(child, _job(tmp_path, "dpo", tiny, _rows("dpo", 4), reference=other))
    assert abs(result.log[0]["loss"] - math.log(2)) > 1e-3
    mirrored, _ = _run(child, _job(tmp_path, "dpo", other, _rows("dpo", 4), reference=tiny, name="mirrored"))
    # log p(policy) - log p(reference) changes its sign when the two change places
    assert mirrored.log[0]["rewards/margins"] == pytest.approx(-result.log[0]["rewards/margins"], abs=1e-4)


def test_a_soft_label_reaches_the_trainers_loss(child: Any, tiny: Path, tmp_path: Path) -> None:
    """CR-6: TRL's sigmoid loss overlooks label_smoothing, and its `robust` would say 0.413015."""
    rows = _rows("dpo", 4)
    rows[0]["label"] = 0.9
    trainer = _trainer(child, _job(tmp_path, "dpo", tiny, rows))
    pair = {"policy": (-40.0, -52.0), "reference": (-42.0, -50.0)}
    # 5/6 x 0.513015 + 1/6 x 0.913015; 0.1 x (sigmoid(0.4) - 5/6)
    assert _loss_of(trainer, **pair, label=5 / 6, weight=1.0) == pytest.approx((0.579682, -0.0234646), abs=1e-5)
    assert _loss_of(trainer, **pair, label=1.0, weight=1.0) == pytest.approx((0.513015, -0.040131), abs=1e-5)
    assert _loss_of(trainer, **pair, label=5 / 6, weight=2.0) == pytest.approx((1.159364, -0.0469292), abs=1e-5)


def test_certain_pairs_of_equal_weight_are_left_to_trl(child: Any, tiny: Path, other: Path, tmp_path: Path) -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = _trainer(child, _job(tmp_path, "dpo", tiny, _rows("dpo", 4), reference=other))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch.keys().isdisjoint(CERTAIN)
    theirs = DPOTrainer._compute_loss(trainer, trainer.model, batch, False)
    assert trainer.compute_loss(trainer.model, batch).equal(theirs)


def _unsure(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs with other labels, weights and scores from row to row."""
    rng = random.Random(seed)
    return [row | {name: round(rng.random(), 3) for name in CERTAIN} for row in _rows("dpo", n, seed)]


@pytest.mark.parametrize("loss", ["sigmoid", "sppo"])
def test_labels_weights_and_scores_reach_the_loss_row_by_row(loss: str, child: Any, tiny: Path, tmp_path: Path) -> None:
    """G-6: a trainer drops the columns that it does not know."""
    rows, heldout = _unsure(5), _unsure(3, seed=1)
    trainer = _trainer(child, _job(tmp_path, "dpo", tiny, rows, heldout=heldout, loss=loss))
    read = {"sigmoid": ("label", "weight"), "sppo": ("chosen_score", "rejected_score", "weight")}[loss]
    for given, loader in ((rows, trainer.get_train_dataloader()), (heldout, trainer.get_eval_dataloader())):
        found = {}
        for batch in loader:
            texts = trainer.processing_class.batch_decode(batch["input_ids"])
            for i in range(len(texts) // 2):
                found[texts[i].replace("<|im_end|>", "").rstrip()] = [batch[name][i].item() for name in read]
        for row in given:
            said = next(text for text in found if text.endswith(f"assistant\n{row['chosen'][0]['content']}")
                        and row["prompt"][0]["content"] in text)  # fmt: skip
            assert found.pop(said) == pytest.approx([row[name] for name in read])
        assert not found


def _gradient(child: Any, job: TrainingJob) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Gradient of a run's only step, as the optimizer is given it, and the run's log."""
    from transformers import TrainerCallback

    found: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            named = kwargs["model"].named_parameters()
            found.update({name: weight.grad.clone() for name, weight in named if weight.grad is not None})

    trainer = _trainer(child, job)
    trainer.add_callback(Look())
    child.fit(trainer, job, None)
    assert trainer.state.global_step == 1
    return found, child.steps_of(trainer.state)


def _by_the_book(job: TrainingJob, rows: list[dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    """Mean loss of the rows and its gradient, from the papers' formulas and a pass for each text by itself."""
    import torch
    from torch.nn.functional import log_softmax, logsigmoid
    from transformers import AutoModelForCausalLM

    tokenizer, settings = _tokenizer(job.init_from), job.settings
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (job.init_from, job.reference)
    )

    def logp(model: Any, row: dict[str, Any], role: str) -> tuple[Any, int]:
        before = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        said = tokenizer(row[role][0]["content"] + "<|im_end|>")["input_ids"]
        each = log_softmax(model(torch.tensor([before + said])).logits[0, :-1], dim=-1)
        return each[range(len(before) - 1, len(before) + len(said) - 1), said].sum(), len(said)

    total = torch.tensor(0.0)
    for row in rows:
        ratio = {}
        for role in ROLES:
            with torch.no_grad():
                anchor, _ = logp(reference, row, role)
            ours, n_tokens = logp(policy, row, role)
            ratio[role] = ours - anchor
            if role == "chosen":
                likelihood = ours / n_tokens
        if settings.loss == "sppo":
            aims = {role: (row[f"{role}_score"] - 0.5) / settings.beta for role in ROLES}
            loss = 0.5 * sum((ratio[role] - aims[role]) ** 2 for role in ROLES)
        else:
            margin = settings.beta * (ratio["chosen"] - ratio["rejected"])
            loss = -row["label"] * logsigmoid(margin) - (1 - row["label"]) * logsigmoid(-margin)
        total = total + row["weight"] * (loss - settings.nll * likelihood)
    mean = total / len(rows)
    mean.backward()
    return mean.item(), {name: weight.grad for name, weight in policy.named_parameters()}


def _assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        apart = (found[name] - gradient).norm() / gradient.norm()
        assert apart < 1e-4, name


UNHURRIED = {"learning_rate": 1e-12, "final_learning_rate": 0, "max_grad_norm": 1e9}
"""A step that moves nothing and cuts nothing: what is measured after it was there before it."""


@pytest.mark.parametrize(
    "settings",
    [{}, {"nll": 0.7}, {"loss": "sppo", "beta": 0.05}, {"loss": "sppo", "nll": 0.7}],
    ids=["sigmoid", "sigmoid, nll", "sppo", "sppo, nll"],
)
def test_a_steps_loss_and_gradient_are_the_papers(
    settings: dict[str, Any], child: Any, tiny: Path, other: Path, tmp_path: Path
) -> None:
    """Three rows in micro batches of two and one, and the same rows held out."""
    rows = _unsure(3)
    job = _job(tmp_path, "dpo", tiny, rows, heldout=rows, reference=other, micro_batch_size=2, **UNHURRIED, **settings)
    found, log = _gradient(child, job)
    loss, expected = _by_the_book(job, rows)
    _assert_close(found, expected)
    assert log[0]["loss"] == pytest.approx(loss, rel=1e-4)
    assert log[1]["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert log[0].keys() >= {"rewards/margins", "rewards/accuracies", "logps/chosen", "entropy", "num_tokens"}


def test_a_row_that_weighs_two_counts_as_that_row_twice(child: Any, tiny: Path, other: Path, tmp_path: Path) -> None:
    one, another = _unsure(2)
    sums = {}
    for name, rows in {
        "heavy": [one | {"weight": 2.0}, another | {"weight": 1.0}],
        "twice": [one | {"weight": 1.0}] * 2 + [another | {"weight": 1.0}],
    }.items():
        job = _job(tmp_path, "dpo", tiny, rows, name=name, reference=other, nll=0.5, **UNHURRIED)
        mean, _ = _gradient(child, job)
        sums[name] = {parameter: gradient * len(rows) for parameter, gradient in mean.items()}
    _assert_close(sums["heavy"], sums["twice"])


@pytest.mark.parametrize(
    ("loss", "wrong", "told"),
    [
        ("sigmoid", {"label": None}, r"expected label to be a number from 0 to 1.*got null \(row r1\)\. Write 1"),
        ("sigmoid", {"label": 1.2}, r"expected label .*got 1\.2 \(row r1\)"),
        ("sigmoid", {"label": math.nan}, r"expected label .*got nan \(row r1\)"),
        ("sigmoid", {"weight": -1.0}, r"expected weight to be a number from 0 up.*got -1\.0 \(row r1\)\. Write 1"),
        ("sigmoid", {"weight": math.inf}, r"expected weight .*got inf \(row r1\)"),
        ("sppo", {"chosen_score": None}, r"expected chosen_score .*got null \(row r1\).*set training\.dpo\.loss"),
        ("sppo", {"rejected_score": 4.5}, r"expected rejected_score .*loss=sppo.*got 4\.5 \(row r1\)"),
    ],
)
def test_a_number_that_the_loss_cannot_read_is_refused_with_its_row(
    loss: str, wrong: dict[str, Any], told: str, child: Any, tiny: Path, tmp_path: Path
) -> None:
    rows = _unsure(2)
    rows[1] |= wrong
    for where in ({"rows": rows}, {"rows": _unsure(2), "heldout": rows}):
        job = _job(tmp_path, "dpo", tiny, **where, loss=loss)
        with pytest.raises(TrainingFailed, match=told):
            child.load_rows(job, _tokenizer(tiny), lambda **_: None)


@pytest.mark.parametrize("loss", ["sigmoid", "sppo"])
def test_a_number_that_the_loss_does_not_read_may_be_anything(
    loss: str, child: Any, tiny: Path, tmp_path: Path
) -> None:
    unread = {"sigmoid": {"chosen_score": 13 / 3, "rejected_score": None}, "sppo": {"label": None}}
    rows = [row | unread[loss] for row in _unsure(2)]
    result, _ = _run(child, _job(tmp_path, "dpo", tiny, rows, loss=loss))
    assert result.steps == 1


# ------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_every_parameter_moves(kind: str, child: Any, tiny: Path, tmp_path: Path) -> None:
    job = _job(tmp_path, kind, tiny, _rows(kind, 8))
    _run(child, job)
    before, after = _weights(tiny), _weights(job.output)
    for name, weight in before.items():
        assert not weight.equal(after[name]), f"{name} has not changed."


def test_the_margin_grows(child: Any, tiny: Path, tmp_path: Path) -> None:
    result, _ = _run(child, _job(tmp_path, "dpo", tiny, _rows("dpo", 4), epochs=8))
    assert result.steps == 8
    assert result.log[-1]["rewards/margins"] > result.log[1]["rewards/margins"] > 0
    assert result.log[-1]["loss"] < 0.6
    assert result.log[-1]["rewards/accuracies"] == 1.0


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_micro_batch_changes_memory_and_not_the_result(kind: str, child: Any, tiny: Path, tmp_path: Path) -> None:
    """7 rows in steps of 4: the second step has 3 rows, which micro batches of 2 split into 2 and 1."""
    runs = {}
    for micro in (1, 2, 4):
        job = _job(tmp_path, kind, tiny, _rows(kind, 7), name=f"micro{micro}", micro_batch_size=micro)
        runs[micro], _ = _run(child, job)
    for micro in (1, 2):
        for row, whole in zip(runs[micro].log, runs[4].log, strict=True):
            assert row["loss"] == pytest.approx(whole["loss"], abs=1e-5)
            assert row["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
        # Adam divides by the gradient's size: where that is rounding error, so is the sign of a step of 1e-3
        assert _share_apart(tmp_path / f"micro{micro}", tmp_path / "micro4") < 1e-3


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_rows_that_share_a_rubric_train_as_they_would_alone(
    lora_rank: int, child: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from srlm_core.engines import packed

    found: list[int] = []
    cut = packed.tree

    def counted(rows: Any) -> list[packed.Stretch]:
        found.append(sum(map(len, rows)) - sum(len(stretch.ids) for stretch in cut(rows)))
        return cut(rows)

    monkeypatch.setattr(packed, "tree", counted)
    rubric = " ".join(WORDS * 6)
    rows = _rows("sft", 8)
    for row in rows:
        row["prompt"] = _said("user", f"{rubric} {row['prompt'][0]['content']}")
    runs = {}
    for micro in (1, 4):  # one row alone has nobody to share with
        job = _job(tmp_path, "sft", tiny, rows, name=f"m{micro}", micro_batch_size=micro, lora_rank=lora_rank)
        runs[micro], _ = _run(child, job)
    assert found[:8] == [0] * 8
    assert min(found[8:]) > 3 * 78, "four rows saved three times the six times thirteen words, and the template"
    for alone, together in zip(runs[1].log, runs[4].log, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)


def _share_apart(a: Path, b: Path, tolerance: float = 2e-5) -> float:
    """Share of the weights that differ by more than rounding."""
    ours, theirs = _weights(a), _weights(b)
    apart = sum(((ours[name] - theirs[name]).abs() > tolerance).sum().item() for name in ours)
    return apart / sum(weight.numel() for weight in ours.values())


def test_a_step_depends_on_seed_and_epoch_alone() -> None:
    from srlm_core.engines.trainers import StepSampler

    lengths = [random.Random(i).randint(5, 90) for i in range(11)]
    sampler = StepSampler(lengths, 4, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(11))
    assert list(StepSampler(lengths, 4, seed=3)) == first
    for start in (0, 4, 8):
        step = [lengths[i] for i in first[start : start + 4]]
        assert step == sorted(step, reverse=True)
    sampler.set_epoch(1)
    assert list(sampler) != first
    made = {frozenset(list(StepSampler(lengths[:8], 4, seed))[:4]) for seed in range(6)}
    assert len(made) > 3, "also where there are few rows, which ones meet in a step is the seed's"


def test_a_step_holds_rows_of_like_length() -> None:
    from srlm_core.engines.trainers import StepSampler

    lengths = [10] * 32 + [300] * 32 + [20]
    steps = list(StepSampler(lengths, 8, seed=1))
    assert sorted(steps) == list(range(65))
    whole = [[lengths[i] for i in steps[start : start + 8]] for start in range(0, 64, 8)]
    assert sum(len(set(step)) > 1 for step in whole) <= 2, "one in each of two pools"
    assert len({step[0] for step in whole[:5]}) > 1, "short and long steps take turns at random"


def test_the_rate_follows_a_cosine_after_its_warmup(child: Any, tiny: Path, tmp_path: Path) -> None:
    job = _job(tmp_path, "sft", tiny, _rows("sft", 8), epochs=10, warmup=0.25)
    result, _ = _run(child, job)
    rates = [row["learning_rate"] for row in result.log]
    assert len(rates) == 20
    assert rates[:6] == pytest.approx([0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3])  # 5 of 20 steps
    # halfway down the cosine, (10 - 5) / 15 = 1/3: 1e-4 + 9e-4 x (1 + cos(pi / 3)) / 2
    assert rates[10] == pytest.approx(1e-4 + 9e-4 * 0.75)
    assert 1e-4 < rates[-1] < 1.2e-4


def test_a_batch_that_micro_batches_do_not_divide_is_refused(child: Any, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="batch_size to be a multiple"):
        _run(child, _job(tmp_path, "sft", tiny, _rows("sft", 4), batch_size=4, micro_batch_size=3))


def test_bfloat16_arithmetic_moves_what_float32_moves_at_the_papers_rate(
    child: Any, tiny: Path, tmp_path: Path
) -> None:
    """The weights stay float32: stored in bfloat16, a step of 1e-6 would vanish."""
    moved = {}
    before = _weights(tiny)
    for precision in ("float32", "bfloat16"):
        job = _job(
            tmp_path,
            "dpo",
            tiny,
            _rows("dpo", 8),
            name=precision,
            precision=precision,
            learning_rate=1e-6,
            final_learning_rate=1e-7,
        )
        _run(child, job)
        after = _weights(job.output)
        moved[precision] = {name: (after[name] - before[name]).detach() for name in before}
    full = sum((delta != 0).sum().item() for delta in moved["float32"].values())
    both = sum(((moved["bfloat16"][name] != 0) & (delta != 0)).sum().item() for name, delta in moved["float32"].items())
    assert both / full >= 0.95
    norms = {
        precision: math.sqrt(sum(d.double().pow(2).sum().item() for d in deltas.values()))
        for precision, deltas in moved.items()
    }
    assert norms["bfloat16"] == pytest.approx(norms["float32"], rel=0.05)


def test_a_loss_that_is_no_number_ends_the_run(child: Any, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="expected a finite loss at step"):
        _run(child, _job(tmp_path, "sft", tiny, _rows("sft", 8), learning_rate=1e30, epochs=2))


# ------------------------------------------------------------------------------------------------------ what is saved


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
def test_the_model_is_a_plain_checkpoint_with_its_chat_template(
    save_dtype: str, child: Any, tiny: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    job = _job(tmp_path, "sft", tiny, _rows("sft", 4), save_dtype=save_dtype)
    _run(child, job)
    model = AutoModelForCausalLM.from_pretrained(job.output)
    assert str(model.dtype) == f"torch.{save_dtype}"
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert _tokenizer(job.output).chat_template == _tokenizer(tiny).chat_template
    assert (job.output / "generation_config.json").read_text() == (tiny / "generation_config.json").read_text()
    assert sorted(path.name for path in job.output.glob("*.safetensors")) == ["model.safetensors"]
    assert not list(tmp_path.glob(".tmp-*"))
    assert not (job.work_dir / "checkpoints").exists()


@pytest.mark.parametrize("far_reference", [False, True])
def test_lora_ends_as_a_plain_model(far_reference: bool, child: Any, tiny: Path, other: Path, tmp_path: Path) -> None:
    job = _job(
        tmp_path, "dpo", tiny, _rows("dpo", 8), lora_rank=4, epochs=2, reference=other if far_reference else tiny
    )
    result, _ = _run(child, job)
    at_ln_2 = result.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert at_ln_2 != far_reference
    assert not list(job.output.glob("adapter*"))
    assert not (job.output / "ref").exists()
    before, after = _weights(tiny), _weights(job.output)
    assert before.keys() == after.keys()
    assert before["model.embed_tokens.weight"].equal(after["model.embed_tokens.weight"])
    for name, weight in before.items():
        assert ("proj" in name) != weight.equal(after[name]), name


def test_the_best_checkpoint_is_kept_and_patience_ends_training(child: Any, tiny: Path, tmp_path: Path) -> None:
    """Held-out rows say the opposite of the training rows after the first steps, so their loss soon rises."""
    rows, heldout = _rows("sft", 8), _rows("sft", 4, seed=9)
    job = _job(tmp_path, "sft", tiny, rows, heldout=heldout, epochs=40, learning_rate=2e-2, final_learning_rate=2e-2,
               checkpoint_steps=2, patience=2)  # fmt: skip
    result, events = _run(child, job)
    checks = {row["step"]: row["eval_loss"] for row in result.log if "eval_loss" in row}
    assert result.best_step == min(checks, key=checks.get)
    assert result.steps == result.best_step + 2 * job.settings.patience
    assert result.steps < 80
    assert [event["step"] for event in events if event["event"] == "evaluated"] == list(checks)
    again, _ = _run(
        child,
        _job(
            tmp_path, "sft", job.output, rows, name="check", heldout=heldout, learning_rate=1e-12, final_learning_rate=0
        ),
    )
    assert again.log[-1]["eval_loss"] == pytest.approx(checks[result.best_step], abs=1e-4)


def test_held_out_pairs_are_counted_one_by_one(child: Any, tiny: Path, tmp_path: Path) -> None:
    """5 pairs in batches of 4: the share is of 5, not the mean of two batches."""
    job = _job(
        tmp_path,
        "dpo",
        tiny,
        _rows("dpo", 8),
        heldout=_rows("dpo", 5, seed=4),
        epochs=3,
        checkpoint_steps=1,
        patience=50,
    )
    result, _ = _run(child, job)
    shares = [row["eval_rewards/accuracies"] for row in result.log if "eval_rewards/accuracies" in row]
    assert len(shares) == 6
    for share in shares:
        assert share * 5 == pytest.approx(round(share * 5), abs=1e-6)
    assert result.best_step == 1 + shares.index(max(shares))


# --------------------------------------------------------------------------------------------------------- processes


def _the_child() -> int:
    """Process id of the one training child of this process."""
    found = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "srlm_core.engines.trl"], capture_output=True, text=True, check=True
    )
    return int(found.stdout.split()[0])


@pytest.mark.slow
def test_a_killed_training_goes_on_and_ends_where_an_undisturbed_one_does(
    child: Any, tiny: Path, tmp_path: Path
) -> None:
    rows, settings = _rows("dpo", 12), {"epochs": 4, "checkpoint_steps": 2, "micro_batch_size": 2}
    calm, _ = _run(child, _job(tmp_path, "dpo", tiny, rows, name="calm", **settings))
    job = _job(tmp_path, "dpo", tiny, rows, name="killed", **settings)

    def kill_at_step_7(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 7:
            os.kill(_the_child(), signal.SIGKILL)

    with pytest.raises(TrainingFailed, match="after step 7: its process was killed by SIGKILL"):
        train(job, log=tmp_path / "child.log", on_progress=kill_at_step_7)
    half = job.work_dir / "checkpoints" / "checkpoint-99"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step": 9')

    events: list[dict[str, Any]] = []
    result = train(job, log=tmp_path / "child.log", on_progress=events.append)
    assert result.resumed_from_step in (6, 8)
    assert [row["step"] for row in result.log] == list(range(1, 13))
    written = [json.loads(line) for line in (job.work_dir / "log.jsonl").read_text().splitlines()]
    assert tuple(written) == result.log
    for row, undisturbed in zip(result.log, calm.log, strict=True):
        assert row["loss"] == pytest.approx(undisturbed["loss"], abs=1e-6)
        assert row["learning_rate"] == undisturbed["learning_rate"]
        assert row["num_tokens"] == undisturbed["num_tokens"]
    assert _gap(job.output, tmp_path / "calm") < 1e-6
    assert not any(event["event"] == "reference" for event in events)  # scored once, before the kill
    assert train(job, log=tmp_path / "child.log") == result  # done is done


@pytest.mark.parametrize("checked", [False, True])
def test_killed_before_the_final_save_it_trains_no_step_more(
    checked: bool, child: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With held-out checks the last step has a checkpoint, without them the last two steps are taken again."""
    settings = (
        {"epochs": 20, "learning_rate": 2e-2, "checkpoint_steps": 2, "patience": 1}
        if checked
        else {"epochs": 3, "checkpoint_steps": 4}
    )
    heldout = _rows("sft", 4, seed=9) if checked else None
    calm, _ = _run(child, _job(tmp_path, "sft", tiny, _rows("sft", 8), name="calm", heldout=heldout, **settings))
    job = _job(tmp_path, "sft", tiny, _rows("sft", 8), name="killed", heldout=heldout, **settings)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(child, "save", die)
        with pytest.raises(KeyboardInterrupt):
            _run(child, job)
    result, events = _run(child, job)
    assert (result.steps, result.best_step) == (calm.steps, calm.best_step)
    assert [row["step"] for row in result.log] == [row["step"] for row in calm.log]
    assert [row.get("num_tokens") for row in result.log] == [row.get("num_tokens") for row in calm.log]
    assert sum(event["event"] == "step" for event in events) == (0 if checked else 2)
    assert _gap(job.output, tmp_path / "calm") < 1e-6


def test_another_job_does_not_go_on_from_these_checkpoints(child: Any, tiny: Path, tmp_path: Path) -> None:
    job = _job(tmp_path, "sft", tiny, _rows("sft", 4))
    _made(job.work_dir / "checkpoints" / "checkpoint-2")
    child.claim(job)
    assert not (job.work_dir / "checkpoints").exists()
    _made(job.work_dir / "checkpoints" / "checkpoint-2")
    child.claim(job)
    assert (job.work_dir / "checkpoints" / "checkpoint-2").exists()
    _write(job.rows, _rows("sft", 4, seed=1))
    child.claim(job)
    assert not (job.work_dir / "checkpoints").exists()


def test_no_child_outlives_its_parent(tiny: Path, tmp_path: Path) -> None:
    job = _job(tmp_path, "sft", tiny, _rows("sft", 16), epochs=5000)
    script = (
        "import sys\nfrom pathlib import Path\nfrom srlm_core.engines.training_job import TrainingJob, train\n"
        "job = TrainingJob.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "train(job, log=Path(sys.argv[2]), on_progress=lambda event: print(event['event'], flush=True))\n"
    )
    described = tmp_path / "described.json"
    described.write_text(job.model_dump_json())
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(described), str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    while parent.stdout.readline().strip() != "step":
        assert parent.poll() is None
    children = subprocess.run(
        ["pgrep", "-P", str(parent.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert children
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(_lives(int(pid)) for pid in children):
        assert time.monotonic() < deadline, "the child is still there 10 s after its parent was killed"
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_missing_file_of_rows_is_named_by_the_parent(tiny: Path, tmp_path: Path) -> None:
    job = _job(tmp_path, "sft", tiny, _rows("sft", 4))
    job.rows.unlink()
    with pytest.raises(TrainingFailed, match=r"expected a Parquet file of rows at .*M1\.parquet.*Make the rows again"):
        train(job, log=tmp_path / "child.log")


def test_a_corrupt_file_of_rows_or_a_missing_column_is_named(tmp_path: Path) -> None:
    from srlm_core.engines.training_rows import read_rows

    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(TrainingFailed, match="expected a Parquet file of rows"):
        read_rows(broken, "sft")
    with pytest.raises(TrainingFailed, match="missing: chosen, rejected"):
        read_rows(_write(tmp_path / "sft.parquet", _rows("sft", 2)), "dpo")


def test_a_model_that_is_not_there_is_named(child: Any, tiny: Path, tmp_path: Path) -> None:
    for role in ("init_from", "reference"):
        job = _job(tmp_path, "dpo", tiny, _rows("dpo", 4)).model_copy(update={role: tmp_path / "nothing"})
        with pytest.raises(TrainingFailed, match=f"expected a checkpoint folder with a config.json as {role}"):
            _run(child, job)


def test_a_child_that_breaks_down_leaves_its_last_words(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(
        TrainingFailed, match=r"(?s)after step 0: its process ended with code 1.*words:.*SafetensorError"
    ):
        train(_job(tmp_path, "sft", broken, _rows("sft", 4)), log=tmp_path / "child.log")
