"""plan: what a campaign will ask for, with the arithmetic, before anything is loaded."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError
from srlm_core.layout import Layout, Line
from srlm_core.methods import METHODS, method_of, steps
from srlm_core.methods.record import Asked, Training

ASSUMED_YIELD = 0.6
"""Share of asked prompts that survive the filters; small models do worse."""
ASSUMED_FILL = 0.5
"""Share of max_tokens that a completion uses."""
ASSUMED_PROMPT_TOKENS = 60
RUBRIC_TOKENS = 180
"""Rubric and chat template around what is judged. An engine reads them once, a trainer in every row."""


ASSUMED_PAIRED = 0.6
"""Share of prompts that give a pair where a judge has to tell two responses apart."""


class Hardware(NamedTuple):
    """Stated rates; measured ones of an earlier campaign are better."""

    name: str
    flops: float
    """Useful floating-point operations per second of one device while decoding."""
    training_flops: float
    devices: int
    """That sample."""
    ranks: int | None = None
    """Devices that train; null = all."""


class Iteration(NamedTuple):
    """What one iteration of a method asks for."""

    t: int
    target: int
    """Prompts that it holds."""
    trainings: int
    """Models that learn from pairs."""
    asked: Mapping[str, Asked]
    """Of one prompt, by what the step makes; a prompt that is written is asked for as often as it takes."""

    @classmethod
    def of(cls, config: RunConfig, t: int, target: int) -> "Iteration":
        """Look at the method's steps, by the settings of iteration t."""
        now = config.at(t)
        method = method_of(now)
        asked = {step.makes: step.asks(now, t) for step in method.makes}
        asked["responses in training"] = method.training_asks(now, t)
        written = asked["prompts"]
        trainings = 1 + sum(isinstance(step, Training) and step.kind == "dpo" for step in method.steps)
        asked["prompts"] = written._replace(requests=written.requests / ASSUMED_YIELD)
        return cls(t, target, trainings, asked)

    def requests(self, step: str) -> float:
        """Return what a step asks for in all; 0 for one that the method does not have."""
        return self.target * self.asked.get(step, Asked()).requests

    @property
    def generated(self) -> float:
        """Tokens that its engines write."""
        return self.target * sum(of.requests * of.writes for of in self.asked.values()) * ASSUMED_FILL

    @property
    def read(self) -> float:
        """Texts as long as a response that its engines read."""
        return self.target * sum(of.reads for of in self.asked.values())

    @property
    def paired(self) -> float:
        """Share of prompts that give a pair: where something has to tell two responses apart, not all do."""
        told_apart = any(of.reads for of in self.asked.values())
        return ASSUMED_PAIRED if told_apart else 1.0


def of_this_machine(cores: int, gpus: int = 0) -> Hardware:
    """State rates: 35 GFLOP/s a core (measured, float32 on AVX2), 60 and 150 TFLOP/s a GPU (an H100-class guess)."""
    if gpus:
        return Hardware(f"{gpus} GPU", 60e12, 150e12, gpus)
    return Hardware(f"{cores} CPU cores", 35e9 * cores, 50e9 * cores, 1)


def of_layout(
    laid: Layout, group: int, parameters: int, sampling_rate: float | None, training_rate: float | None
) -> Hardware:
    """State rates of a cluster whose replicas hold `group` GPUs each.

    Measured ones take their place: tokens a second of one GPU, generated in a full batch, and learned by SFT.
    """
    stated, measured = of_this_machine(0, 1), bool(sampling_rate or training_rate)
    return Hardware(
        f"{laid.replicas * group} GPU, {laid.ranks} to train, {'measured' if measured else 'stated'} rates",
        2 * parameters * sampling_rate if sampling_rate else stated.flops,
        6 * parameters * training_rate if training_rate else stated.training_flops,
        laid.replicas * group, laid.ranks,
    )  # fmt: skip


def plan(
    config: RunConfig,
    parameters: int,
    weights_bytes: int,
    hardware: Hardware,
    seed_rows: Mapping[str, int],
    prompts: Sequence[int],
) -> list[Line]:
    """Return requests, tokens, memory, disk and hours.

    `seed_rows` counts ift, eft (responses), evaluation and heldout (responses); `prompts` those of each iteration.
    """
    its = [Iteration.of(config, t, target) for t, target in enumerate(prompts, start=1)]
    answer, written = _answer(config), _written(config)
    models = len(its) + 3 if config.evaluation.models == "all" else len(its) + 1
    models = 0 if config.evaluation.models == "none" else models
    lines = [Line("new prompts", sum(prompts), "prompts", " + ".join(map(str, prompts)) or "no iteration")]
    asking = dict.fromkeys(["prompts", "responses", "judgments", *(step for one in its for step in one.asked)])
    for step in asking:
        asked = [one.requests(step) for one in its]
        if any(asked) or step in ("prompts", "responses", "judgments"):
            name = "requests for prompts" if step == "prompts" else step.replace("_", " ")
            lines.append(Line(name, sum(asked), "requests" if step == "prompts" else name, _spelled(its, step)))
    eft = _written_for_eft(config, seed_rows["eft"])
    if eft:
        lines.append(eft)
    generated = generated_tokens(config, seed_rows["eft"], prompts)
    # a prompt is read once to be answered and once to be judged
    read = sum(one.requests("prompts") * 300 + one.read * answer for one in its)
    read += sum(prompts) * 2 * ASSUMED_PROMPT_TOKENS
    evaluated = models * (seed_rows["evaluation"] * answer + seed_rows["heldout"] * (80 + written))
    lines += [
        Line("tokens generated", generated, "tokens", f"completions at {ASSUMED_FILL:.0%} of max_tokens"),
        Line("tokens read", read, "tokens", "prompts and rubrics, each prefix once"),
        Line("tokens of evaluation", evaluated, "tokens", f"{models} models"),
    ]
    epochs = config.training.sft.epochs
    instructed, judged = seed_rows["ift"] * 120, seed_rows["eft"] * (RUBRIC_TOKENS + 120)
    teaches_judging = METHODS[config.method].teaches(config)
    sft = epochs * (2 * instructed + judged if teaches_judging else instructed)
    asks = not config.training.dpo.labelled
    asked_of_pair = 2 * (RUBRIC_TOKENS + ASSUMED_PROMPT_TOKENS + 2 * answer) if asks else 0
    pair = 2 * (ASSUMED_PROMPT_TOKENS + answer) + asked_of_pair
    many = METHODS[config.method].pairs_of_a_prompt(config)
    dpo = config.training.dpo.epochs * pair * sum(one.trainings * one.target * one.paired * many for one in its)
    sfts = "SFT twice (baseline, M1)" if teaches_judging else "SFT once"
    dpos = "DPO twice" if any(one.trainings > 1 for one in its) else "DPO"
    share = f"{its[0].paired:.0%}" if its else "none"
    each = f", up to {many:g} pairs each" if many > 1 else ""
    how = f"{sfts} + {dpos} on {share} of the prompts{each}, both sides{', compared in both orders' if asks else ''}"
    lines.append(Line("tokens trained on", sft + dpo, "tokens", how))
    return lines + _costs(config, parameters, weights_bytes, hardware, generated + read + evaluated, sft, dpo)


def _spelled(its: Sequence[Iteration], step: str) -> str:
    """Write prompts × requests of a prompt, iterations that are alike together."""
    alike = Counter((one.target, one.asked.get(step, Asked()).requests) for one in its)
    kept = f", {ASSUMED_YIELD:.0%} of them kept" if step == "prompts" else ""
    return " + ".join(f"{count} × {target} × {each:.3g}" for (target, each), count in alike.items()) + kept


def generated_tokens(config: RunConfig, eft: int, prompts: Sequence[int]) -> float:
    """Return the tokens that are generated to train on; evaluation comes on top.

    `eft`: ranked responses that the seed data hold; `prompts`: those of each iteration.
    """
    its = [Iteration.of(config, t, target) for t, target in enumerate(prompts, start=1)]
    return _eft_tokens(config, eft) + sum(one.generated for one in its)


def target_for(config: RunConfig, eft: int, tokens: float) -> int | None:
    """Return the prompts.target by which a campaign generates about so many tokens to train on; at least 1.

    None where it generates none for a prompt. Raises ConfigError for fewer tokens than one prompt an iteration takes.
    """
    fixed, iterations = _eft_tokens(config, eft), range(1, config.iterations + 1)
    one_more = sum(Iteration.of(config, t, 1).generated for t in iterations)
    if not one_more:
        return None
    smallest = math.ceil(fixed + one_more)
    if tokens < smallest:
        raise ConfigError(
            f"--tokens: expected at least {smallest:,} for {config.recipe} at size {config.size}, one prompt an "
            f"iteration, got {tokens:,}. Raise it, or lower max_tokens."
        )
    return max(1, round((tokens - fixed) / one_more))


def _eft_tokens(config: RunConfig, eft: int) -> float:
    texts = _written_for_eft(config, eft)
    if texts is None or config.seed_data.eft_endpoint:
        return 0.0
    return texts.value * config.seed_data.eft_sampling.max_tokens * ASSUMED_FILL


def _written_for_eft(config: RunConfig, rows: int) -> Line | None:
    """Count the judgments that a model writes of ranked responses, or what `self_taught` has it write."""
    seed = config.seed_data
    if not seed.eft_is_judged or not METHODS[config.method].teaches(config):
        return None
    if seed.eft_targets == "self_taught":
        passes = seed.eft_passes if seed.eft_form == "justified" else 0
        how = f"{rows // 2} instructions: another request, its answer, {passes} verdicts in both orders"
        return Line("texts for EFT", rows * (1 + passes), "texts", how)
    passes = 1 if seed.eft_targets == "ranked" else seed.eft_passes
    return Line("judgments for EFT", rows * passes, "judgments", f"{rows} ranked responses, each pass")


def _answer(config: RunConfig) -> float:
    return config.responses.sampling.max_tokens * ASSUMED_FILL


def _written(config: RunConfig) -> float:
    """Tokens of one judgment."""
    of_one = config.judgments.sampling.max_tokens * ASSUMED_FILL if config.judgments.justified else 1
    return of_one * steps.ASSUMED_STEPS if config.judgments.steps else of_one


def sampling_seconds(config: RunConfig, parameters: int, hardware: Hardware) -> float:
    """Return how long the engines of one iteration are expected to write; one that only evaluates writes less."""
    its = (Iteration.of(config, t, config.prompts.target) for t in range(1, config.iterations + 1))
    most = max((one.generated for one in its), default=0.0)
    return most * 2 * parameters / (hardware.flops * hardware.devices)


def _costs(
    config: RunConfig, parameters: int, weights_bytes: int, hardware: Hardware, inference: float, sft: float, dpo: float
) -> list[Line]:
    speed = hardware.flops * hardware.devices / (2 * parameters)
    training = (sft * 6 + dpo * 8) * parameters / (hardware.training_flops * (hardware.ranks or hardware.devices))
    kept = 4 if config.training.dpo.save_dtype == "float32" else 2
    saved = sum(Iteration.of(config, t, 0).trainings for t in range(1, config.iterations + 1)) + 2
    gib = 1024**3
    state = parameters * (4 + 4 + 8) if not config.training.dpo.lora_rank else parameters * 4.5
    sampled = f"{inference:,.0f} tokens at {speed:,.0f}/s ({hardware.name})"
    trained = f"6 FLOP a parameter and token for SFT, 8 for DPO, {hardware.name}"
    loaded = f"{weights_bytes / gib:.2f} GiB weights + 2 KV cache"
    stored = f"{saved} models in {config.training.dpo.save_dtype} + two checkpoints while training"
    moments = "float32 weights, gradients, two Adam moments; activations come on top"
    return [
        Line("hours of sampling", inference / speed / 3600, "h", sampled),
        Line("hours of training", training / 3600, "h", trained),
        Line("memory to sample", (weights_bytes + 2 * gib) / gib, "GiB", loaded),
        Line("memory to train", state / gib, "GiB", moments),
        Line("disk", (saved * parameters * kept + 2 * parameters * 12) / gib, "GiB", stored),
    ]


def as_dict(lines: list[Line]) -> list[dict[str, Any]]:
    """Return the plan for --json."""
    return [line._asdict() for line in lines]
