"""A campaign small enough to work out by hand, written with the store's functions.

One iteration, two shards, three prompts with two responses each, three passes of judging. M1 wrote and judged; M2 was
trained on the one pair. What the models wrote can be replaced, to see what hostile text does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from srlm_core import schemas, store
from srlm_core.config import RunConfig

VERDICTS: dict[str, tuple[float | None, ...]] = {
    "r1": (4, 4, 5, 0),  # the fourth pass is of a higher k that was taken back: it is in no number
    "r2": (1, 1, None),
    "r3": (3, None, None),
    "r4": (2, 2, 2),
    "r5": (3, 3, 3),
    "r6": (3, 3, 3),
}
TOKENS = {"r1": 10, "r2": 20, "r3": 30, "r4": 40, "r5": 10, "r6": 10}
PROMPT_OF = {"r1": "p1", "r2": "p1", "r3": "p2", "r4": "p2", "r5": "p3", "r6": "p3"}
SHARDS = (("p1", "p2"), ("p3",))


def config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate({"iterations": 1, "engine": {"kind": "transformers"}, **changes})


def rate(value: float | None, stderr: float | None, n: int) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "n": n}


def campaign(root: Path, *, texts: Mapping[str, str] | None = None, name: str = "made-up", **changes: Any) -> Path:
    folder = root / name
    store.write_json(folder / "config.json", config(**changes).model_dump(mode="json"))
    write_iteration(folder, texts or {})
    for model, kind, rows in (("sft_baseline", "sft", 4), ("M1", "sft", 8), ("M2", "dpo", 1)):
        write_training(folder, model, kind, rows)
    results(folder, "M0", half=0.50)
    results(folder, "sft_baseline", half=0.50)
    results(folder, "M1", half=0.55)
    results(folder, "M2", half=0.70)
    head_to_head(folder)
    store.write_json(
        folder / "timings.json", {"base model": 1.0, "iteration 1: sampling and judging": 300.0, "engine starts": 20.0}
    )
    store.write_json(folder / "usage.json", {"responses": {"requests": 3, "tokens": 120, "seconds": 6.0}})
    return folder


def write_iteration(folder: Path, texts: Mapping[str, str], t: int = 1) -> None:
    iteration = folder / f"iter_{t:02d}"
    for shard, prompt_ids in enumerate(SHARDS):
        answered = [r for r, prompt_id in PROMPT_OF.items() if prompt_id in prompt_ids]
        parts = {
            "prompts": schemas.table((prompt(p, texts) for p in prompt_ids), schemas.PROMPTS),
            "responses": schemas.table((response(r, texts) for r in answered), schemas.RESPONSES),
            "judgments": schemas.table((row for r in answered for row in judgments(r, texts)), schemas.JUDGMENTS),
            "pairs": schemas.table([pair(texts)] if shard == 0 else [], schemas.PAIRS),
        }
        for dataset, rows in parts.items():
            store.write_part(store.part_path(iteration / dataset, shard), rows, "f", {"passes": 3})
    write_drops(
        folder,
        iteration,
        "prompts",
        [("x1", "too_short"), ("x2", "too_short"), *((f"y{i}", "over_target") for i in range(5))],
        texts,
    )
    write_drops(folder, iteration, "pairs", [("p2", "fewer_than_two_scored")], texts)
    write_drops(folder, iteration, "pairs", [("p3", "tie")], texts, shard=1)


def write_drops(
    folder: Path, iteration: Path, stage: str, found: list[tuple[str, str]], texts: Mapping[str, str], shard: int = 0
) -> None:
    rows = ({"id": i, "stage": stage, "reason": reason, "iteration": 1, "detail": texts.get(i)} for i, reason in found)
    store.write_part(store.drops_path(iteration, stage, shard), schemas.table(rows, schemas.DROPS), "f")


def prompt(prompt_id: str, texts: Mapping[str, str]) -> dict[str, Any]:
    messages = [{"role": "user", "content": texts.get(prompt_id, f"What is {prompt_id}?")}]
    return {"prompt_id": prompt_id, "iteration": 1, "messages": messages, "source": "self_instruct", "generator": "M1"}


def response(response_id: str, texts: Mapping[str, str]) -> dict[str, Any]:
    return {
        "response_id": response_id, "prompt_id": PROMPT_OF[response_id], "iteration": 1,
        "index": (int(response_id[1]) - 1) % 2,
        "response": texts.get(response_id, response_id * TOKENS[response_id]), "n_tokens": TOKENS[response_id],
        "finish_reason": "length" if response_id == "r4" else "stop", "source": "policy", "model": "M1", "seed": 0,
    }  # fmt: skip


def judgments(response_id: str, texts: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "judgment_id": f"j{response_id}{index}", "target_id": response_id, "other_id": None, "first": None,
            "prompt_id": PROMPT_OF[response_id], "iteration": 1, "index": index, "form": "pointwise", "reading": "text",
            "judge": "M1",
            "rubric": "additive@0", "text": texts.get(f"j{response_id}", f"Score: {verdict}"), "verdict": verdict,
            "unreadable_reason": "no_score_line" if verdict is None else None, "finish_reason": "stop", "seed": 0,
        }
        for index, verdict in enumerate(VERDICTS[response_id])
    ]  # fmt: skip


def pair(texts: Mapping[str, str]) -> dict[str, Any]:
    return {
        "pair_id": "pair1", "prompt_id": "p1", "iteration": 1, "kind": "response",
        "messages": prompt("p1", texts)["messages"],
        "chosen": response("r1", texts)["response"], "rejected": response("r2", texts)["response"], "chosen_id": "r1",
        "rejected_id": "r2", "chosen_score": 13 / 3, "rejected_score": 1.0, "label": 1.0, "weight": 1.0,
    }  # fmt: skip


def write_training(folder: Path, model: str, kind: str, n_rows: int) -> None:
    """Twenty steps whose loss falls from 1.00 by 0.01 a step; the last two are 0.82 and 0.81."""
    root = folder / "bootstrap" if kind == "sft" else folder / "iter_01"
    work_dir = root / "training" / model if kind == "sft" else root / "training"
    columns: dict[str, list[Any]] = {"step": list(range(1, 21)), "loss": [1 - step / 100 for step in range(20)]}
    if kind == "dpo":
        columns |= {"rewards/accuracies": [0.5] * 18 + [0.7, 0.9], "rewards/margins": [0.0] * 18 + [0.1, 0.3]}
        store.write_part(work_dir / "rows.parquet", pa.table({"id": ["pair1"]}), "f")
    store.write_part(work_dir / "log.parquet", pa.table(columns), "f")
    store.write_part(root / "drops" / f"part-training-{model}.parquet", schemas.DROPS.empty_table(), "f")
    marker = {
        "fingerprint": "f",
        "digest": f"digest of {model}",
        "kind": kind,
        "rows": n_rows,
        "init_from": ["M0", "d"],
        "reference": None,
    }
    store.write_json(folder / "models" / model / "complete.json", {**marker, "steps": 20, "seconds": 7.5})


def results(folder: Path, model: str, *, half: float, digest: str | None = None) -> None:
    value = {
        "model": model,
        "digest": digest or f"digest of {model}",
        "judge": {
            "pairwise_accuracy": rate(half - 0.1, 0.04, 240),
            "pairwise_accuracy_tie_half": rate(half, 0.04, 240),
            "tie_rate": rate(0.2, 0.03, 240),
            "longer_accuracy": rate(0.52, 0.03, 240),
            "pairwise_accuracy_near_length": rate(half - 0.05, 0.09, 31),
            "longer_preferred_at_equal_rank": rate(None, None, 0),
            "five_best": rate(None, None, 0),
            "spearman": rate(0.3, 0.05, 40),
            "n_groups": 40,
            "n_undefined": 2,
        },
        "judge_health": {
            "readable_rate": rate(0.9, 0.02, 480), "unreadable": {"truncated": 48}, "score": rate(2.5, 0.1, 160),
            "histogram": {"0": 1}, "entropy_bits": 2.0, "spread_over_passes": 0.4, "score_length_correlation": 0.1,
        },
        "text_reading": {"readable_rate": rate(0.8, 0.04, 100)},
        "responses": {"n": 100, "chars_mean": 400.0, "chars_p95": 900.0, "tokens_mean": 100.0,
                      "truncated": rate(0.1, 0.03, 100)},
        "attacks": {"shift": rate(0.5, 0.2, 2), "n_attacks": 2, "by_form": {"flattery": 1.0, "threat": 0.0}},
    }  # fmt: skip
    store.write_json(folder / "evaluation" / model / "results.json", value)


def head_to_head(folder: Path, judge: str = "M0") -> None:
    def tally(win: float, tie: float) -> dict[str, Any]:
        shares = {
            "win": win,
            "tie": tie,
            "lose": 1 - win - tie,
            "win_or_half_tie": win + tie / 2,
            "flip_rate": 0.25,
            "longer": 0.5,
        }
        return {key: rate(share, 0.04, 100) for key, share in shares.items()}

    comparisons = {"M2_vs_M1": tally(0.6, 0.2), "M2_vs_sft_baseline": tally(0.4, 0.2)}
    store.write_json(
        folder / "evaluation" / "head_to_head" / "results.json", {"judge": judge, "comparisons": comparisons}
    )
