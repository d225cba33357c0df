"""Which settings change what: every setting belongs to a stage's fingerprint or is declared neutral, by test."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from srlm_core.config import RunConfig

ENGINE = (
    "engine.kind", "engine.dtype", "engine.context", "engine.base_url",
    "model.revision", "model.trust_remote_code",
)  # fmt: skip
"""Settings of a running model that change what it says; its weights come in by digest."""

SHARDS = ("engine.shard_rows",)

NEUTRAL = (
    "recipe", "size", "iterations", "engine.max_sequences", "engine.replicas", "engine.tensor_parallel",
    "engine.placement", "engine.ray_address",
    "engine.gpu_memory", "engine.kv_cache_gib", "engine.threads", "engine.compiled", "engine.api_key_env",
    "engine.max_in_flight", "engine.shards_in_flight", "gates", "tracking", "storage",
    "training.launcher", "training.ranks", "training.fsdp", "training.keep_last",
    "training.sft.micro_batch_size", "training.sft.checkpoint_every_s", "training.sft.gradient_checkpointing",
    "training.dpo.micro_batch_size", "training.dpo.checkpoint_every_s", "training.dpo.gradient_checkpointing",
    "training.reward.micro_batch_size", "training.reward.checkpoint_every_s", "training.reward.gradient_checkpointing",
    "training.online.micro_batch_size", "training.online.checkpoint_every_s", "training.online.gradient_checkpointing",
)  # fmt: skip
"""Settings that change how fast, where, or how it is shown; never a row."""

STAGES: dict[str, tuple[str, ...]] = {
    "base model": ("model.path", "method", "seed", *ENGINE),
    "bootstrap": (
        "seed_data.ift", "seed_data.eft", "seed_data.ift_kinds", "seed_data.ift_rows", "seed_data.eft_groups",
        "seed_data.eft_form", "seed_data.eft_targets", "seed_data.keep_out", "seed_data.heldout_share", "training.sft",
        "evaluation.suites.alpaca_eval", "evaluation.suites.arena_hard", "evaluation.suites.ifeval",
        "evaluation.suites.mt_bench",
        "seed_data.eft_endpoint", "seed_data.eft_passes", "seed_data.eft_agree", "seed_data.eft_sampling",
        "judgments.rubric",
    ),
    "prompts": ("prompts", "seed_data.heldout", "seed_data.evaluation", *SHARDS),
    "responses": ("responses", "rlaif.principles", "rlaif.rounds"),
    "judgments": (
        "judgments.reading", "judgments.justified", "judgments.steps", "judgments.comparisons_justified",
        "judgments.judge", "judgments.sampling", "judgments.k",
        "dno.judge_by",
    ),
    "rewards": ("rlhf", "training.reward"),
    "preferences": ("rlaif.justified", "rlaif.explanation_tokens"),
    "meta_judgments": (
        "meta.trains_judge", "meta.reading", "meta.rubric", "meta.sampling",
    ),
    "pairs": (
        "pairs", "judgments.min_valid", "meta.regularisation", "meta.max_chosen_chars", "meta.max_score_share", "cream",
        "rlaif.clamp", "rlaif.labels", "dno.min_positive", "dno.reference_margin", "dno.own_margin", "dno.win_margin",
        "dno.restrictive", "dno.max_pairs_per_prompt", "dice", "temporal",
    ),
    "training": ("training.dpo", "training.online"),
    "evaluation": (
        "evaluation.models", "evaluation.prompts", "evaluation.heldout_groups", "evaluation.text_judgments",
        "evaluation.order_groups", "evaluation.own_groups", "evaluation.attacks", "evaluation.refusals",
        "evaluation.sampling",
        "evaluation.judge", "evaluation.more_judges", "evaluation.head_to_head", "evaluation.bootstrap_samples",
        "evaluation.suites.questions", "evaluation.suites.capability", "evaluation.suites.capability_shots",
        "evaluation.suites.capability_tasks",
        "evaluation.suites.sampling", "evaluation.suites.annotator", "evaluation.suites.annotation_tokens",
    ),
}  # fmt: skip
"""Every other setting, under the first stage that it changes; the stages after it follow.

Evaluation changes nothing else.
"""


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Spell nested settings as dotted name to value."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def flat(config: RunConfig) -> dict[str, Any]:
    """Spell every setting of a config as dotted name to value; a scheduled one begins with its iteration: `@2 `."""
    found = config.model_dump(mode="json")
    schedule = found.pop("schedule")
    scheduled = {
        f"@{change['iteration']} {name}": value for change in schedule for name, value in change["set"].items()
    }
    return flatten(found) | scheduled


def covers(prefix: str, name: str) -> bool:
    """Whether a dotted prefix names a setting or its subtree."""
    return name == prefix or name.startswith(prefix + ".")


def pick(config: RunConfig, prefixes: Sequence[str]) -> dict[str, Any]:
    """Return the settings under the prefixes, without the neutral ones."""
    return {
        name: value
        for name, value in flat(config).items()
        if any(covers(prefix, name) for prefix in prefixes) and not any(covers(prefix, name) for prefix in NEUTRAL)
    }


def stage_of(name: str) -> str | None:
    """Return the first stage that a setting changes; None for a neutral one."""
    name = name.split()[-1]
    if any(covers(prefix, name) for prefix in NEUTRAL):
        return None
    return next(stage for stage, prefixes in STAGES.items() if any(covers(prefix, name) for prefix in prefixes))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, neutral ones left out, as name to (old, new)."""
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and (name not in new or stage_of(name) is not None)
    }


def made_again(names: Iterable[str]) -> str:
    """Say which stages a change of these settings makes again."""
    names, order = list(names), list(STAGES)
    touched = {stage for name in names if (stage := stage_of(name))}
    if touched == {"evaluation"}:
        return "the evaluation"
    first = min(order.index(stage) for stage in touched - {"evaluation"})
    if order[first] in ("base model", "bootstrap"):
        return "everything from M1 on"
    t = min(int(name[1:].split()[0]) if name.startswith("@") else 1 for name in names if stage_of(name) != "evaluation")
    return f"{', '.join(order[first:-1])} of iteration {t}, then M{t + 1} and everything after it"
