"""The SCIR-style training step, as claims: on a model of two layers with a real tokenizer and chat template."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srlm_core import comparisons, schemas, training
from srlm_core.config import DpoConfig
from srlm_core.engines.training_job import TrainingJob
from srlm_core.errors import ModelError, TrainingFailed

pytestmark = pytest.mark.engine

WORDS = ("a", "model", "learns", "from", "what", "it", "says", "and", "keeps", "better", "of", "two", "answers")
UNHURRIED = {"learning_rate": 1e-12, "final_learning_rate": 0, "max_grad_norm": 1e9}
"""A step that moves nothing and cuts nothing: what is measured after it was there before it."""
LOGGED = ("agreement", "masked", "order_flips", "generative_confidence", "implicit_confidence", "divergence", "entropy")


def pairs(n: int) -> pa.Table:
    """Pairs without labels, as the method lays them out for the trainer."""
    rng = random.Random(0)
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(2, 12)))  # noqa: E731
    rows = [
        {
            "pair_id": f"r{i}", "prompt_id": f"p{i}", "iteration": 1, "kind": "response", "chosen": text(),
            "rejected": text(), "chosen_id": f"r{i}a", "rejected_id": f"r{i}b", "chosen_score": None,
            "rejected_score": None, "label": None, "weight": 1.0, "messages": [{"role": "user", "content": text()}],
        }
        for i in range(n)
    ]  # fmt: skip
    return training.preferences(schemas.table(rows, schemas.PAIRS), comparisons.pairwise().ask)


def job(tmp_path: Path, model: Path, rows: pa.Table, *, name: str = "M1", reference: Path | None = None,
        scir: dict[str, Any] | None = None, **changes: Any) -> TrainingJob:  # fmt: skip
    pq.write_table(rows, tmp_path / f"{name}.parquet")
    quick = {
        "learning_rate": 1e-3, "final_learning_rate": 1e-4, "batch_size": 4, "micro_batch_size": 4, "max_length": 512,
        "precision": "float32",
    }  # fmt: skip
    return TrainingJob(
        kind="dpo", rows=tmp_path / f"{name}.parquet", init_from=model, reference=reference, output=tmp_path / name,
        work_dir=tmp_path / f"{name}_work", threads=2,
        settings=DpoConfig.model_validate({"loss": "scir", "scir": scir or {}, **quick, **changes}),
    )  # fmt: skip


def train(child: Any, asked: TrainingJob) -> Any:
    asked.work_dir.mkdir(parents=True, exist_ok=True)
    return child.run(asked, lambda **_: None)


def gradient(child: Any, asked: TrainingJob) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gradient of a run's only step, as the optimizer is given it, and what the step logged."""
    from transformers import AutoTokenizer, TrainerCallback

    found: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.update({name: weight.grad.clone() for name, weight in kwargs["model"].named_parameters()})

    asked.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(asked.init_from)
    rows, _, _ = child.load_rows(asked, tokenizer, lambda **_: None)
    trainer = child.make_trainer(asked, rows, [], tokenizer, lambda **_: None)
    trainer.add_callback(Look())
    child.fit(trainer, asked, None)
    (step,) = child.steps_of(trainer.state)
    return found, step


def by_the_book(asked: TrainingJob, rows: list[dict[str, Any]], *, warm: bool) -> tuple[float, dict[str, Any], Any]:
    """Mean loss of the rows, its gradient and both probabilities: plain formulas, a pass for each text by itself."""
    import torch
    from torch.nn.functional import log_softmax, logsigmoid
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, settings = AutoTokenizer.from_pretrained(asked.init_from), asked.settings
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (asked.init_from, asked.reference)
    )

    def logp(model: Any, row: dict[str, Any], role: str) -> Any:
        before = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        said = tokenizer(row[role][0]["content"] + "<|im_end|>")["input_ids"]
        each = log_softmax(model(torch.tensor([before + said])).logits[0, :-1], dim=-1)
        return each[range(len(before) - 1, len(before) + len(said) - 1), said].sum()

    def ratio(row: dict[str, Any], role: str) -> Any:
        with torch.no_grad():
            anchor = logp(reference, row, role)
        return logp(policy, row, role) - anchor

    def takes_a(question: list[dict[str, str]]) -> Any:
        text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False) + "Better:"
        logits = policy(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0, -1]
        return logits[[tokenizer(" A")["input_ids"][0], tokenizer(" B")["input_ids"][0]]].softmax(0)[0]

    total, seen = torch.tensor(0.0), []
    how = settings.scir
    for row in rows:
        margin = settings.beta * (ratio(row, "chosen") - ratio(row, "rejected"))
        q, p = margin.sigmoid(), (takes_a(row["asked_ab"]) + 1 - takes_a(row["asked_ba"])) / 2
        seen.append((p.item(), q.item()))
        kl = lambda a, b: a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()  # noqa: E731
        h = lambda a: -a * a.log() - (1 - a) * (1 - a).log()  # noqa: E731
        loss = how.alpha * (0.5 * (kl(p, q) + kl(q, p)) + how.gamma * 0.5 * (h(p) + h(q)))
        if warm or (p - 0.5) * (q - 0.5) > 0:
            loss = loss - logsigmoid(margin if p > 0.5 else -margin)
        total = total + row["weight"] * loss
    mean = total / len(rows)
    mean.backward()
    return mean.item(), {name: weight.grad for name, weight in policy.named_parameters()}, seen


@pytest.mark.parametrize("warm", [False, True])
def test_a_steps_loss_and_gradient_are_the_formulas(
    warm: bool, child: Any, tiny: Path, other: Path, tmp_path: Path
) -> None:
    """Three rows in micro batches of two and one, of unequal weight."""
    rows = pairs(3)
    rows = rows.set_column(rows.schema.get_field_index("weight"), "weight", pa.array([1.0, 0.5, 2.0]))
    asked = job(tmp_path, tiny, rows, reference=other, beta=2.0, scir={"warmup": float(warm), "gamma": 0.3},
                batch_size=4, micro_batch_size=2, **UNHURRIED)  # fmt: skip
    found, step = gradient(child, asked)
    loss, expected, seen = by_the_book(asked, rows.to_pylist(), warm=warm)
    assert found.keys() == expected.keys()
    for name, slope in expected.items():
        assert (found[name] - slope).norm() / slope.norm() < 1e-3, name
    assert step["loss"] == pytest.approx(loss, rel=1e-4)
    agree = [(p - 0.5) * (q - 0.5) > 0 for p, q in seen]
    assert 0 < sum(agree) < 3, "the seed makes both kinds"
    assert step["scir/agreement"] == pytest.approx(sum(agree) / 3)
    assert step["scir/masked"] == pytest.approx(0 if warm else 1 - sum(agree) / 3)
    assert step["scir/generative_confidence"] == pytest.approx(sum(abs(p - 0.5) for p, _ in seen) / 3, abs=1e-5)
    assert step["scir/implicit_confidence"] == pytest.approx(sum(abs(q - 0.5) for _, q in seen) / 3, abs=1e-5)
    assert step.keys() >= {f"scir/{name}" for name in LOGGED}
    assert not step.keys() & {"rewards/accuracies", "rewards/margins", "logps/chosen", "rewards/rejected"}


@pytest.mark.slow
def test_the_warm_up_ends_and_a_resumed_run_knows_at_which_step_it_is(
    child: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps, half of them warm: nothing is left out in the first two, as delta is 0."""
    from srlm_core.engines import losses

    settings: dict[str, Any] = {"epochs": 4, "checkpoint_steps": 1, "scir": {"warmup": 0.5}}
    calm = train(child, job(tmp_path, tiny, pairs(3), name="calm", **settings))
    warm: list[bool] = []
    scir = losses.scir

    def watched(*given: Any, **how: Any) -> Any:
        warm.append(how["warming_up"])
        return scir(*given, **how)

    monkeypatch.setattr(losses, "scir", watched)
    killed = job(tmp_path, tiny, pairs(3), name="killed", **settings)
    with monkeypatch.context() as patch:

        def die(*_: Any, **__: Any) -> None:
            if len(warm) == 2:
                raise KeyboardInterrupt

        patch.setattr(child.Log, "on_log", die)
        with pytest.raises(KeyboardInterrupt):
            train(child, killed)
    assert warm == [True] * 2
    warm.clear()
    result = train(child, killed)
    assert result.resumed_from_step == 1
    assert warm == [True, False, False]
    assert calm.log[0]["scir/implicit_confidence"] == pytest.approx(0, abs=1e-4), "SC-2"
    assert [row["scir/masked"] for row in calm.log[:2]] == [0, 0]
    for ours, undisturbed in zip(result.log[1:], calm.log[1:], strict=True):
        assert ours["loss"] == pytest.approx(undisturbed["loss"], abs=1e-5)


def test_training_brings_the_two_rewards_together(child: Any, tiny: Path, other: Path, tmp_path: Path) -> None:
    log = train(child, job(tmp_path, tiny, pairs(2), reference=other, epochs=6, beta=2.0)).log
    assert log[-1]["scir/divergence"] < 0.5 * log[0]["scir/divergence"]


def test_lora_asks_too(child: Any, tiny: Path, tmp_path: Path) -> None:
    result = train(child, job(tmp_path, tiny, pairs(2), lora_rank=4))
    assert result.log[0].keys() >= {f"scir/{name}" for name in LOGGED}


def test_verdict_tokens_follow_the_prefix_as_an_engine_finds_them(tiny: Path) -> None:
    from srlm_core.engines.rendering import Renderer
    from srlm_core.engines.training_rows import questions

    renderer = Renderer(tiny)
    (row,) = pairs(1).to_pylist()
    for asked in questions(row, renderer):
        assert [renderer.decode([token]).strip() for token in asked.tokens] == ["A", "B"]
        assert renderer.decode(asked.prompt).rstrip().endswith("Better:")


def test_choices_of_more_than_a_token_are_refused_in_words(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from srlm_core.engines.rendering import Renderer
    from srlm_core.engines.training_rows import questions

    monkeypatch.setattr(schemas, "SHOWN", ("Antidisestablishment", "B"))
    with pytest.raises(ModelError, match="expected each choice to be one token"):
        questions(pairs(1).to_pylist()[0], Renderer(tiny))


@pytest.mark.parametrize("name", ["asked_ab", "asked_ba"])
def test_a_row_without_its_question_is_refused_with_its_id(name: str, child: Any, tiny: Path, tmp_path: Path) -> None:
    rows = pairs(2)
    rows = rows.set_column(
        rows.schema.get_field_index(name), name, pa.array([rows[name][0].as_py(), None], schemas.MESSAGES)
    )
    with pytest.raises(TrainingFailed, match=rf"expected {name} .*got null \(row r1\)\. Lay the rows out"):
        child.load_rows(job(tmp_path, tiny, rows), _tokenizer(tiny), lambda **_: None)


def test_a_question_that_is_too_long_leaves_its_pair_out(child: Any, tiny: Path, tmp_path: Path) -> None:
    from srlm_core.engines.training_rows import questions

    told: list[dict[str, Any]] = []
    rows = pairs(3)
    lengths = [max(len(asked.prompt) for asked in questions(row, _renderer(tiny))) for row in rows.to_pylist()]
    kept, _, dropped = child.load_rows(
        job(tmp_path, tiny, rows, max_length=max(lengths) - 1), _tokenizer(tiny), lambda **event: told.append(event)
    )
    assert [row.id for row in dropped] == [f"r{lengths.index(max(lengths))}"]
    assert dropped[0].n_tokens == max(lengths)
    assert len(kept) == 2


def test_rows_held_out_have_no_better_response_to_check_by(tiny: Path, tmp_path: Path) -> None:
    asked = json.loads(job(tmp_path, tiny, pairs(1)).model_dump_json())
    with pytest.raises(ValueError, match="heldout rows check by which response is better, and loss=scir has none"):
        TrainingJob.model_validate(asked | {"heldout": asked["rows"]})


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _renderer(path: Path) -> Any:
    from srlm_core.engines.rendering import Renderer

    return Renderer(path)
