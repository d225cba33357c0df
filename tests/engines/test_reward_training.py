"""A reward model, as claims: its loss by hand, its training and its scoring on a model of two layers."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_core import training
from srlm_core.config import EngineConfig, RewardConfig
from srlm_core.engines import models, open_engine
from srlm_core.engines.protocol import Request, ScoredText
from srlm_core.engines.training_job import TrainingJob
from srlm_core.errors import ModelError, TrainingFailed

pytestmark = pytest.mark.engine

WORDS = ("a", "model", "learns", "from", "what", "it", "says", "and", "keeps", "better", "of", "two", "answers")


def groups(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Ranked groups of 2 to 4 responses, of which those that thank are the better ones."""
    rng = random.Random(seed)
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(2, 12)))  # noqa: E731
    return [
        {
            "prompt": f"{text()} {i}",
            "responses": [
                {"text": text() + (" thanks" if rank == 0 else ""), "rank": rank} for rank in range(rng.randint(2, 4))
            ],
        }
        for i in range(n)
    ]


def job(
    tmp_path: Path, model: Path, rows: list[dict[str, Any]], *, name: str = "reward", **changes: Any
) -> TrainingJob:
    pq.write_table(training.rankings(rows), tmp_path / f"{name}.parquet")
    quick = {
        "learning_rate": 3e-3, "final_learning_rate": 3e-4, "batch_size": 4, "max_length": 256, "precision": "float32",
    }  # fmt: skip
    return TrainingJob(
        kind="reward", rows=tmp_path / f"{name}.parquet", init_from=model, output=tmp_path / name,
        work_dir=tmp_path / f"{name}_work", threads=2, settings=RewardConfig.model_validate({**quick, **changes}),
    )  # fmt: skip


def train(child: Any, asked: TrainingJob) -> Any:
    asked.work_dir.mkdir(parents=True, exist_ok=True)
    return child.run(asked, lambda **_: None)


def rewards_of(model: Path, rows: list[ScoredText]) -> dict[str, float]:
    """Reward texts in one pass, without a process of its own."""
    import torch

    from srlm_core.engines.rendering import Renderer
    from srlm_core.engines.rewarding import RewardModel

    renderer = Renderer(model)
    of = RewardModel(model, renderer, dtype=torch.float32, device="cpu", trust_remote_code=False)
    rewards = of.rewards([renderer.whole(row.messages, row.response) for row in rows])
    return {row.id: reward for row, reward in zip(rows, rewards, strict=True)}


def scored(group: dict[str, Any]) -> list[ScoredText]:
    asked: Any = ({"role": "user", "content": group["prompt"]},)
    return [ScoredText(f"{group['prompt']}/{r['rank']}", asked, r["text"]) for r in group["responses"]]


# -------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(
    ("rewards", "ranks", "how", "loss"),
    [
        ((1.3, 0.4), (0, 1), {}, 0.341154),  # -log sigmoid(0.9)
        ((1.3, 0.4), (0, 1), {"margin": 0.5}, 0.513015),
        ((1.3, 0.4), (0, 1), {"centre": 0.01}, 0.370054),  # + 0.01 x 1.7^2
        ((0.4, 1.3), (0, 1), {}, 1.241154),  # the worse one leads
        ((2.0, 1.0, 0.0), (0, 1, 2), {}, 0.251150),  # (.313262 + .126928 + .313262) / 3
        ((2.0, 9.0, 1.0), (0, 0, 1), {}, (0.313262 + 0.000335) / 2),  # of two that are ranked alike nothing is asked
    ],
)
def test_the_loss_by_hand(rewards: tuple[float, ...], ranks: tuple[int, ...], how: Any, loss: float) -> None:
    import torch

    from srlm_core.engines import losses

    assert losses.ranking(torch.tensor(rewards), torch.tensor(ranks), **how).item() == pytest.approx(loss, abs=1e-6)


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), min_size=2, max_size=6), st.floats(-50, 50))
def test_a_constant_added_to_all_rewards_changes_nothing(rows: list[tuple[float, int]], constant: float) -> None:
    import torch

    from srlm_core.engines import losses

    rewards, ranks = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    if len(set(ranks.tolist())) > 1:
        before, after = losses.ranking(rewards, ranks), losses.ranking(rewards + constant, ranks)
        assert after.item() == pytest.approx(before.item(), abs=1e-9)


def test_a_step_is_the_mean_over_prompts_whatever_the_micro_batch(child: Any, tiny: Path, tmp_path: Path) -> None:
    """Each prompt counts once, be it of one pair or of six; by a plain implementation, a pass for each text."""
    import torch
    from torch.nn.functional import logsigmoid
    from transformers import AutoTokenizer

    from srlm_core.engines import reward_training
    from srlm_core.engines.rendering import Renderer

    rows = groups(4, seed=3)
    assert {len(group["responses"]) for group in rows} > {2}
    model = reward_training.load(tiny, Renderer(tiny), seed=0, trust_remote_code=False, packed=False)
    tokenizer, of_rows, right = AutoTokenizer.from_pretrained(tiny), [], []
    for group in rows:
        rewards = []
        for response in group["responses"]:
            turns = [{"role": "user", "content": group["prompt"]}, {"role": "assistant", "content": response["text"]}]
            ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
            rewards.append(model(input_ids=ids).logits[0, 0])
        pairs = [(a, b) for i, a in enumerate(rewards) for b in rewards[i + 1 :]]
        of_rows.append(sum(-logsigmoid(a - b) for a, b in pairs) / len(pairs))
        right.append(sum(float(a > b) for a, b in pairs) / len(pairs))
    loss = sum(of_rows) / 4
    loss.backward()
    for micro in (4, 1):
        gradient, log = only_step(child, job(tmp_path, tiny, rows, name=f"by_{micro}", micro_batch_size=micro))
        assert log["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert log["accuracy"] == pytest.approx(sum(right) / 4, abs=1e-6)
        for name, weight in model.named_parameters():
            assert torch.allclose(gradient[name], weight.grad, atol=1e-5), name


def only_step(child: Any, asked: TrainingJob) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gradient of a run's only step, before it is clipped, and what the step logged."""
    from transformers import AutoTokenizer, TrainerCallback

    found: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.update({name: weight.grad.clone() for name, weight in kwargs["model"].named_parameters()})

    asked = asked.model_copy(update={"settings": asked.settings.model_copy(update={"max_grad_norm": 1e9})})
    asked.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(asked.init_from)
    rows, _, _ = child.load_rows(asked, tokenizer, lambda **_: None)
    trainer = child.make_trainer(asked, rows, [], tokenizer, lambda **_: None)
    trainer.add_callback(Look())
    trainer.train()
    return found, child.steps_of(trainer.state)[0]


# ---------------------------------------------------------------------------------------------------------- training


def test_it_learns_what_people_prefer_and_scores_alike_alone_and_in_a_batch(
    child: Any, tiny: Path, tmp_path: Path
) -> None:
    result = train(child, job(tmp_path, tiny, groups(32), epochs=4))
    assert result.n_rows == 32
    unseen = [text for group in groups(12, seed=9) for text in scored(group)]
    together = rewards_of(tmp_path / "reward", unseen)
    better = [text.id for text in unseen if text.response.endswith("thanks")]
    mean = lambda ids: sum(together[i] for i in ids) / len(ids)  # noqa: E731
    assert mean(better) > mean([text.id for text in unseen if text.id not in better]) + 0.5
    alone = {text.id: rewards_of(tmp_path / "reward", [text])[text.id] for text in unseen[:2]}
    assert alone == pytest.approx({name: together[name] for name in alone}, abs=1e-4)


def test_a_reward_is_read_at_the_end_of_the_turn_padded_on_either_side(child: Any, tiny: Path, tmp_path: Path) -> None:
    """SmolLM2 pads with the token that ends its turns: read at the last other one, the end would not be seen."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    train(child, job(tmp_path, tiny, groups(4)))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.config.pad_token_id == tokenizer.pad_token_id != end
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], return_dict=False
    )
    pad = [tokenizer.pad_token_id] * 3
    with torch.no_grad():
        plain, right, left = (model(input_ids=torch.tensor([row])).logits.item() for row in (ids, ids + pad, pad + ids))
        states = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        read_at_the_end = model.score(states[0, -1]).item()
    assert plain == pytest.approx(read_at_the_end, abs=1e-5)
    assert right == pytest.approx(plain, abs=1e-5)
    masked = {"attention_mask": torch.tensor([[0] * 3 + [1] * len(ids)])}
    with torch.no_grad():
        assert model(input_ids=torch.tensor([pad + ids]), **masked).logits.item() == pytest.approx(plain, abs=1e-4)
    assert math.isfinite(left)


def test_a_killed_training_goes_on_as_if_it_had_not_been(child: Any, tiny: Path, tmp_path: Path) -> None:
    rows = groups(16)
    train(child, job(tmp_path, tiny, rows, name="whole", checkpoint_steps=2))
    cut = job(tmp_path, tiny, rows, name="cut", checkpoint_steps=2)
    save, child.save = child.save, _dies
    try:
        with pytest.raises(KeyboardInterrupt):
            train(child, cut)
    finally:
        child.save = save
    result = train(child, cut)
    assert result.resumed_from_step == 2
    texts = scored(rows[0])
    whole, again = (rewards_of(tmp_path / name, texts) for name in ("whole", "cut"))
    assert again == pytest.approx(whole, abs=1e-6)


def _dies(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_heldout_rankings_choose_the_checkpoint_by_their_pairs(child: Any, tiny: Path, tmp_path: Path) -> None:
    pq.write_table(training.rankings(groups(8, seed=5)), tmp_path / "heldout.parquet")
    asked = job(tmp_path, tiny, groups(32), epochs=2, checkpoint_steps=4, heldout_share=0.2)
    result = train(child, asked.model_copy(update={"heldout": tmp_path / "heldout.parquet"}))
    checks = {row["step"]: row["eval_accuracy"] for row in result.log if "eval_accuracy" in row}
    assert result.n_heldout == 8
    assert checks[result.best_step] == max(checks.values())


def test_ranks_that_prefer_nothing_are_refused(child: Any, tiny: Path, tmp_path: Path) -> None:
    level = [{"prompt": "Why?", "responses": [{"text": "So.", "rank": 1}, {"text": "Thus.", "rank": 1}]}]
    with pytest.raises(TrainingFailed, match=r"ranks that prefer some response.* got \[1, 1\] for 2 responses"):
        train(child, job(tmp_path, tiny, level))


def test_lora_trains_the_head_whole_and_is_merged(child: Any, tiny: Path, tmp_path: Path) -> None:
    train(child, job(tmp_path, tiny, groups(8), lora_rank=4))
    assert models.is_reward_model(tmp_path / "reward")
    assert not list((tmp_path / "reward").glob("adapter*"))
    assert len(set(rewards_of(tmp_path / "reward", scored(groups(1)[0])).values())) > 1


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def trained(child: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(child, job(folder, tiny, groups(4)))
    return folder / "reward"


def changed(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(settings | config))
    return target


def test_what_does_not_fit_the_context_has_no_reward(trained: Path, tmp_path: Path) -> None:
    asked: Any = ({"role": "user", "content": "Why?"},)
    rows = [ScoredText("short", asked, "So."), ScoredText("long", asked, "so " * 300)]
    config = EngineConfig(kind="transformers", context=256, dtype="float32")
    with open_engine(config, trained, log=tmp_path / "log") as engine:
        found = {row.id: row.reward for row in engine.rewards(rows)}
    assert found == {"short": pytest.approx(rewards_of(trained, rows[:1])["short"], abs=1e-5), "long": None}


def test_rewards_of_a_bfloat16_model_are_not_rounded(trained: Path, tiny: Path) -> None:
    """From 1 on a bfloat16 is a multiple of 1/128, around 5 of 1/32, and many texts would have one reward."""
    import torch

    from srlm_core.engines.rendering import Renderer
    from srlm_core.engines.rewarding import RewardModel

    model = RewardModel(trained, Renderer(tiny), dtype=torch.bfloat16, device="cpu", trust_remote_code=False)
    rewards = torch.tensor(model.rewards([[5 + n, 7, 9 * n + 11] for n in range(16)]))
    assert ((rewards * 128) % 1 != 0).float().mean() > 0.5


def test_a_language_model_gives_no_rewards_and_a_reward_model_no_text(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    config = EngineConfig(kind="transformers", context=256)
    with (
        open_engine(config, tiny, log=tmp_path / "log") as language,
        open_engine(config, trained, log=tmp_path / "log") as reward,
    ):
        with pytest.raises(ModelError, match=r"asked for rewards, got one for generate.*Name a reward model"):
            language.rewards([])
        with pytest.raises(ModelError, match=r"asked for generate, got one for rewards\. Name a language model"):
            reward.generate([Request("a")])
    with pytest.raises(ModelError, match=r"expected a reward model .*got LlamaForCausalLM with 2 labels"):
        models.resolve_model(str(tiny), None, tmp_path, rewards=True)
    assert models.resolve_model(str(trained), None, tmp_path, rewards=True) == trained
    with pytest.raises(ModelError, match=r"expected a causal language model .*got LlamaForSequenceClassification"):
        models.resolve_model(str(trained), None, tmp_path)


def test_another_models_tokenizer_is_refused(trained: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    _smaller(trained, small)
    with pytest.raises(ModelError, match=r"reward model's own tokenizer, got one of 49152 tokens .*knows 1000"):
        rewards_of(small, [])
    other = changed(trained, tmp_path / "other", eos_token_id=700)
    with pytest.raises(ModelError, match=r"the token that ends its texts, 700, is '.+', an ordinary one"):
        rewards_of(other, [])


def _smaller(source: Path, target: Path) -> None:
    """The same model with a vocabulary of 1,000 beside the old tokenizer."""
    from transformers import AutoModelForSequenceClassification

    shutil.copytree(source, target)
    model = AutoModelForSequenceClassification.from_pretrained(source)
    model.resize_token_embeddings(1000)
    model.save_pretrained(target)


def test_a_reward_model_without_its_head_is_refused(trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    headless = changed(trained, tmp_path / "headless")
    weights = load_file(headless / "model.safetensors")
    weights.pop("score.weight")
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"score\.weight is missing: its rewards would be random"):
        rewards_of(headless, [])
