"""What is read as a probability comes from a head in float32, also where the model is in bfloat16."""

from pathlib import Path

import pytest
from engines.tiny import tiny_model

torch = pytest.importorskip("torch")
from srlm_core.config import EngineConfig  # noqa: E402
from srlm_core.engines import open_engine  # noqa: E402
from srlm_core.engines.exact_head import exact  # noqa: E402
from srlm_core.engines.protocol import Request, Sampling  # noqa: E402

pytestmark = pytest.mark.engine

POINTS = tuple("012345")


def test_logits_are_compared_in_float32_under_bfloat16() -> None:
    """20.03 and 20.00 are both 20 in bfloat16, and so would their difference be 0."""
    head = torch.nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[20.03], [20.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = head(torch.ones(1, 1))
        with exact(head):
            said = head(torch.ones(1, 1))
        again = head(torch.ones(1, 1))
    assert (rounded[0, 0] - rounded[0, 1]).item() == (again[0, 0] - again[0, 1]).item() == 0
    assert (said[0, 0] - said[0, 1]).item() == pytest.approx(0.03, abs=1e-5)


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose logits are around 100, halves in bfloat16; with heads of a size that vLLM has for that."""
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path_factory.mktemp("models") / "M0", seed=0, heads=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.norm.weight.data *= 1000
    model.save_pretrained(folder)
    return folder


def asked(n: int, **more: object) -> list[Request]:
    said = [({"role": "user", "content": f"Say {i} words."},) for i in range(n)]
    return [Request(f"r{i}", messages=messages, **more) for i, messages in enumerate(said)]  # type: ignore[arg-type]


def coarse(differences: "torch.Tensor") -> float:
    """The share of numbers that are multiples of a sixty-fourth, give or take a thousandth: by chance one in eight."""
    steps = differences * 64
    return ((steps - steps.round()).abs() < 0.064).float().mean().item()


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_probabilities_are_not_those_of_rounded_logits(kind: str, loud: Path, tmp_path: Path) -> None:
    """Also while others are sampled in the same batch, for which vLLM on a processor keeps the faster head."""
    config = EngineConfig(kind=kind, dtype="bfloat16", context=256, max_sequences=16, kv_cache_gib=1)  # type: ignore[arg-type]
    with open_engine(config, loud, log=tmp_path / "log") as engine:
        sampled = engine.generate(asked(8, sampling=Sampling(max_tokens=24)))
        next(sampled)  # the others are under way
        scores = [scored.logprobs for scored in engine.token_scores(asked(16, prefix="Score: "), POINTS)]
        assert len(list(sampled)) == 7
    of_points = torch.tensor(scores, dtype=torch.float64)
    assert coarse(of_points[:, 1:] - of_points[:, :1]) < 0.4
