"""plan: what a campaign will ask for, with the arithmetic, before anything is loaded."""

from typing import Any, NamedTuple

from srlm_core import responses
from srlm_core.config import RunConfig
from srlm_core.methods import METHODS, method_of
from srlm_core.methods.record import Training

ASSUMED_YIELD = 0.6
"""Share of asked prompts that survive the filters; small models do worse."""
ASSUMED_FILL = 0.5
"""Share of max_tokens that a completion uses."""
ASSUMED_PROMPT_TOKENS = 60
RUBRIC_TOKENS = 180
"""Rubric and chat template around what is judged. An engine reads them once, a trainer in every row."""
ASSUMED_STEPS = 5
"""Steps of a response, where each is judged."""

ASSUMED_PAIRED = 0.6
"""Share of prompts that give a pair where a judge has to tell two responses apart."""


class Line(NamedTuple):
    """One quantity: what, how much, and the arithmetic behind it."""

    what: str
    value: float
    unit: str
    arithmetic: str


class Hardware(NamedTuple):
    """Stated rates; measured ones of an earlier campaign are better."""

    name: str
    flops: float
    """Useful floating-point operations per second of one device while decoding."""
    training_flops: float
    devices: int


class Iteration(NamedTuple):
    """What one iteration of a method asks for."""

    target: int
    """Prompts that it holds."""
    asked: int
    """Prompts that the model is asked to write."""
    n: int
    """Responses sampled to each, by all models."""
    k: int
    """Judgments of each."""
    compared: int
    """Comparisons of the responses of a prompt, both orders."""
    paired: float
    """Share of prompts that give a pair."""
    trainings: int
    """Models that learn from pairs."""

    @classmethod
    def of(cls, config: RunConfig, target: int) -> "Iteration":
        """Look at the method's steps."""
        method = method_of(config)
        made = {step.makes: step for step in method.makes}
        writes, n = made["prompts"].role is not None, config.responses.n * len(made.keys() & {*responses.DATASETS})
        k = made["judgments"].passes(config) if "judgments" in made else 0
        compared = made["comparisons"].passes(config) * n * (n - 1) // 2 if "comparisons" in made else 0
        return cls(
            target,
            round(target * (1 - config.prompts.file_share) / ASSUMED_YIELD) if writes else 0,
            n,
            k,
            compared,
            ASSUMED_PAIRED if k or compared else 1.0,
            1 + sum(isinstance(step, Training) and step.kind == "dpo" for step in method.steps),
        )


def of_this_machine(cores: int, gpus: int = 0) -> Hardware:
    """State rates: 35 GFLOP/s a core (measured, float32 on AVX2), 60 and 150 TFLOP/s a GPU (an H100-class guess)."""
    if gpus:
        return Hardware(f"{gpus} GPU", 60e12, 150e12, gpus)
    return Hardware(f"{cores} CPU cores", 35e9 * cores, 50e9 * cores, 1)


def plan(
    config: RunConfig, parameters: int, weights_bytes: int, hardware: Hardware, seed_rows: dict[str, int]
) -> list[Line]:
    """Return requests, tokens, memory, disk and hours.

    `seed_rows` counts ift, eft (responses), evaluation, heldout (responses), and the prompts of an iteration.
    """
    its, one = config.iterations, Iteration.of(config, seed_rows["prompts"])
    target, asked, n, k, compared, paired, trainings = one
    answer, written = _answer(config), _written(config)
    sampled = f"N={n}" if n <= config.responses.n else f"N={config.responses.n} of {n // config.responses.n} models"
    models = its + 3 if config.evaluation.models == "all" else its + 1 if config.evaluation.models == "policy" else 0
    lines = [
        Line("new prompts", its * target, "prompts", f"{its} iterations × {target}"),
        Line("requests for prompts", its * asked, "requests", f"{its} × {asked}, {ASSUMED_YIELD:.0%} of them kept"),
        Line("responses", its * target * n, "responses", f"{its} × {target} × {sampled}"),
        Line("judgments", its * target * n * k, "judgments", f"{its} × {target} × {n} × K={k}{_of_steps(config)}"),
    ]
    if compared:
        each_pair = f"{its} × {target} × {n} × {n - 1}, each two in both orders"
        lines.append(Line("comparisons", its * target * compared, "comparisons", each_pair))
    eft = _written_for_eft(config, seed_rows["eft"])
    if eft:
        lines.append(eft)
    eft_tokens = eft.value * config.seed_data.eft_sampling.max_tokens * ASSUMED_FILL if eft else 0
    generated = its * generated_tokens(config, one) + (0 if config.seed_data.eft_endpoint else eft_tokens)
    # a prompt is read once to be answered and once to be judged, a response once to be judged
    read = its * (asked * 300 + target * (2 * ASSUMED_PROMPT_TOKENS + n * answer))
    read += its * target * compared * 2 * answer  # nothing is written, both responses are read
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
    dpo = its * trainings * config.training.dpo.epochs * target * paired * pair
    sfts = "SFT twice (baseline, M1)" if teaches_judging else "SFT once"
    taught = f"{sfts} + {'DPO twice' if trainings > 1 else 'DPO'}"
    how = f"{taught} on {paired:.0%} of the prompts, both sides{', compared in both orders' if asks else ''}"
    lines.append(Line("tokens trained on", sft + dpo, "tokens", how))
    return lines + _costs(config, parameters, weights_bytes, hardware, generated + read + evaluated, sft, dpo)


def generated_tokens(config: RunConfig, one: Iteration) -> float:
    """Return the tokens that one iteration's engine writes: prompts, responses, judgments, explained comparisons."""
    task = config.prompts.sampling.max_tokens * ASSUMED_FILL
    explained = config.judgments.sampling.max_tokens * ASSUMED_FILL if config.judgments.comparisons_justified else 0
    judged = one.n * one.k * _written(config) + one.compared * explained
    return one.asked * task + one.target * (one.n * _answer(config) + judged)


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


def _of_steps(config: RunConfig) -> str:
    return f", each over the steps of a response: {ASSUMED_STEPS} assumed" if config.judgments.steps else ""


def _answer(config: RunConfig) -> float:
    return config.responses.sampling.max_tokens * ASSUMED_FILL


def _written(config: RunConfig) -> float:
    """Tokens of one judgment."""
    of_one = config.judgments.sampling.max_tokens * ASSUMED_FILL if config.judgments.justified else 1
    return of_one * ASSUMED_STEPS if config.judgments.steps else of_one


def sampling_seconds(config: RunConfig, parameters: int, hardware: Hardware) -> float:
    """Return how long the engines of one iteration are expected to write; one that only evaluates writes less."""
    one = Iteration.of(config, config.prompts.target)
    return generated_tokens(config, one) * 2 * parameters / (hardware.flops * hardware.devices)


def _costs(
    config: RunConfig, parameters: int, weights_bytes: int, hardware: Hardware, inference: float, sft: float, dpo: float
) -> list[Line]:
    speed = hardware.flops * hardware.devices / (2 * parameters)
    training = (sft * 6 + dpo * 8) * parameters / (hardware.training_flops * hardware.devices)
    kept = 4 if config.training.dpo.save_dtype == "float32" else 2
    saved = config.iterations * Iteration.of(config, 0).trainings + 2
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
