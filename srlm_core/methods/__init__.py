"""A method is a frozen record: an ordered tuple of steps, and how M_{t+1} is trained. No base class, no registry.

Each module of this folder that has a METHOD is one; nothing else names it.
"""

import difflib
import importlib
import pkgutil

from srlm_core.config import RunConfig
from srlm_core.engines.training_job import refuses
from srlm_core.errors import ConfigError
from srlm_core.methods import temporal
from srlm_core.methods.record import Method, Training

_MODULES = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]

METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in _MODULES if hasattr(module, "METHOD")}


def method_of(config: RunConfig) -> Method:
    """Return the method that a config names, with the steps that its settings add: ask by `config.at(t)`."""
    return temporal.extended(METHODS[config.method], config)


def require_fit(config: RunConfig) -> None:
    """Refuse a method that there is not, and settings that it cannot work with. Raises ConfigError."""
    if config.method not in METHODS:
        near = difflib.get_close_matches(config.method, METHODS, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(METHODS)}."
        raise ConfigError(f"method: expected a module of srlm_core/methods, got {config.method!r}. {hint}")
    for t in sorted({1, *(change.iteration for change in config.schedule)}):
        at = config.at(t)
        refused = METHODS[config.method].refuses(at) or _refuses_points(at) or _refuses_loss(at) or _refuses_others(at)
        refused = refused or _refuses_steps(at) or _refuses_self_taught(at) or _refuses_explanations(at)
        refused = refused or _refuses_ranks(at) or _refuses_endpoint(at)
        if refused:
            raise ConfigError(refused if t == 1 else f"schedule, from iteration {t} on: {refused}")


def _refuses_points(config: RunConfig) -> str | None:
    """Refuse the loss that takes scores for probabilities where they are none."""
    method = METHODS[config.method]
    if config.training.dpo.loss != "sppo" or method.learns != "dpo" or method.scores_win_rates(config):
        return None
    return (
        f"training.dpo.loss=sppo reads the scores of a pair as win rates, and method={config.method} pairs by others. "
        "Set training.dpo.loss=sigmoid, or a method that compares responses: method=sppo, or dno with "
        "dno.judge_by=win_rate."
    )


def _refuses_loss(config: RunConfig) -> str | None:
    """Refuse labelled pairs for a loss that finds the label out by itself, and unlabelled ones for any other."""
    labels, loss = METHODS[config.method].labels, config.training.dpo.loss
    if labels == config.training.dpo.labelled or METHODS[config.method].learns != "dpo":
        return None
    wants = "says which response of a pair is better" if labels else "leaves open which response of a pair is better"
    takes = "finds that out by itself" if labels else "has to be told"
    remedy = "Set training.dpo.loss=sigmoid, or method=scir." if labels else "Set training.dpo.loss=scir."
    return f"method={config.method} {wants}, and training.dpo.loss={loss} {takes}. {remedy}"


def _refuses_others(config: RunConfig) -> str | None:
    """Refuse responses of other models where no judge scores single ones."""
    fitting = [name for name, method in METHODS.items() if temporal.fits(method)]
    return temporal.refuses(METHODS[config.method], config, fitting)


def _refuses_steps(config: RunConfig) -> str | None:
    """Refuse scores of steps where no response is scored by a judge."""
    judged = (step for step in METHODS[config.method].makes if step.makes == "judgments")
    if config.judgments.steps is None or any(step.passes(config) for step in judged):
        return None
    return (
        f"judgments.steps={config.judgments.steps} scores the steps of a response, and method={config.method} has no "
        "judge score responses. Leave judgments.steps out, or take a method that does, such as self_rewarding."
    )


def _refuses_ranks(config: RunConfig) -> str | None:
    """Refuse steps that the ranks of a training cannot share evenly, and what was written for one rank."""
    method, how = METHODS[config.method], config.training
    if how.launcher == "single":
        return None
    taught = {"sft", method.learns, *(step.kind for step in method.steps if isinstance(step, Training))}
    refused = (refuses(kind, getattr(how, kind), how.ranks, how.fsdp) for kind in sorted(taught))
    return next(filter(None, refused), None)


def _refuses_endpoint(config: RunConfig) -> str | None:
    """Refuse a policy that only answers."""
    if config.engine.kind != "openai":
        return None
    return (
        "engine.kind: expected an engine that runs a local policy (auto, vllm, transformers, scripted), got 'openai': "
        "an endpoint cannot be trained. Name it as a judge instead, e.g. "
        "evaluation.judge='model@http://127.0.0.1:8000/v1'."
    )


def _refuses_self_taught(config: RunConfig) -> str | None:
    """Refuse to teach comparing where nothing is compared, or in another form than comparisons are asked for."""
    if config.seed_data.eft_targets != "self_taught":
        return None
    if not METHODS[config.method].compares(config):
        return (
            "seed_data.eft_targets=self_taught teaches M1 to say which of two responses is better, and "
            f"method={config.method} does not ask it that. Take other targets, or a method that compares: method=sppo, "
            "scir, or dno with dno.judge_by=win_rate."
        )
    form, explained = config.seed_data.eft_form, config.judgments.comparisons_justified
    if explained == (form == "justified"):
        return None
    return (
        f"seed_data.eft_form={form} teaches M1 to compare {'after an' if form == 'justified' else 'without an'} "
        f"explanation, and judgments.comparisons_justified={str(explained).lower()} asks it otherwise. Set "
        "seed_data.eft_form=score with judgments.comparisons_justified=false, or justified with true."
    )


def _refuses_explanations(config: RunConfig) -> str | None:
    """Refuse explained comparisons for a loss that reads the verdict at each step of training."""
    if config.training.dpo.labelled or not config.judgments.comparisons_justified:
        return None
    return (
        f"training.dpo.loss={config.training.dpo.loss} asks which response is better while it trains, without an "
        "explanation, got judgments.comparisons_justified=true. Set it to false."
    )
