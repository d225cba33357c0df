"""RLAIF after Constitutional AI (arXiv:2212.08073): principles in the place of people's labels of harm.

First the model criticises and rewrites its answers under the principles, and M0 is fine-tuned on the last revisions and
on people's helpful answers (section 3). What came of that answers each prompt several times, a frozen judge says which
answer keeps to a principle better, and DPO trains on that with p as a soft label, in the place of a preference model
and PPO (section 4).
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from srlm_core import answers, comparisons, judgments, pairs, responses, revisions, schemas, training
from srlm_core.config import RunConfig
from srlm_core.engines.protocol import Sampling
from srlm_core.judgments import Rubric
from srlm_core.methods import steps
from srlm_core.methods.record import Asked, Measure, Method, Shard, Step, Training
from srlm_core.rates import rate
from srlm_core.seed_data import SeedData

# --- the supervised stage -------------------------------------------------------------------------------------------


def answer(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Sample the one answer of M_t that is to be revised."""
    config = shard.config
    return responses.respond(
        shard.inputs["prompts"], shard.engine, config.responses.sampling,
        n=1, iteration=shard.iteration, model=shard.policy, seed=config.seed,
    )  # fmt: skip


def revise(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Criticise and rewrite each answer that ended by itself; rows REVISIONS, and DROPS.

    What comes back unchanged in the end teaches nothing, and is dropped.
    """
    ended = [row for row in shard.inputs["answers"].to_pylist() if row["finish_reason"] == "stop"]
    ended = [row for row in ended if row["response"].strip()]
    rows, drops = revisions.revise(
        shard.inputs["prompts"], ended, shard.engine, shard.config, iteration=shard.iteration, model=shard.policy
    )
    last = revisions.last(rows)
    same = [
        {"id": row["response_id"], "stage": "revisions", "reason": "unchanged", "iteration": shard.iteration,
         "detail": None}
        for row in ended
        if row["response_id"] in last and last[row["response_id"]]["revision"].strip() == row["response"].strip()
    ]  # fmt: skip
    return rows, pa.concat_tables([drops, schemas.table(same, schemas.DROPS)])


def asks_for_revisions(config: RunConfig, t: int) -> Asked:
    """Count a critique and a revision a round; each reads the answer, the last also what was criticised."""
    rounds = config.rlaif.rounds
    return Asked(2 * rounds, config.responses.sampling.max_tokens, 2 * rounds)


def asks_for_preferences(config: RunConfig, t: int) -> Asked:
    """Count comparisons, and what explains them where that is asked for."""
    asked = steps.asks_for_comparisons(config, t)
    return asked._replace(writes=config.rlaif.explanation_tokens) if config.rlaif.justified else asked


def lessons(config: RunConfig, seed: SeedData, whole: Mapping[str, Iterable[pa.Table]]) -> Iterator[pa.Table]:
    """Lay out prompt and last revision, and people's answers beside them; rows EXAMPLES.

    No critique is in what is learnt, nor in what it is learnt from.
    """
    for prompts, first, revised in zip(*(whole[name] for name in ("prompts", "answers", "revisions")), strict=True):
        asked = {row["prompt_id"]: row["messages"] for row in prompts.to_pylist()}
        rows = [
            {"id": row["revision_id"], "kind": "revision", "prompt": asked[row["prompt_id"]],
             "completion": [{"role": "assistant", "content": row["revision"]}]}
            for row, _ in _changed(first, revised)
        ]  # fmt: skip
        yield schemas.table(rows, schemas.EXAMPLES)
    yield training.ift_examples(seed.ift)


def _changed(first: pa.Table, revised: pa.Table) -> list[tuple[dict[str, Any], str]]:
    """List (row of the last revision, the answer it began as) of the answers that were changed."""
    began = dict(zip(first["response_id"].to_pylist(), first["response"].to_pylist(), strict=True))
    both = ((row, began[name]) for name, row in revisions.last(revised).items())
    return [(row, text) for row, text in both if row["revision"].strip() != text.strip()]


# --- the stage of preferences ---------------------------------------------------------------------------------------


def respond(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Sample N responses to each prompt from the model that learnt the revisions."""
    config = shard.config
    return responses.respond(
        shard.inputs["prompts"], shard.engine, config.responses.sampling,
        n=config.responses.n, iteration=shard.iteration, model=shard.models["revised"], seed=config.seed,
    )  # fmt: skip


def prefer(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Compare each two responses in both orders, under a principle drawn for the prompt; rows JUDGMENTS, and DROPS."""
    how, among = shard.config.rlaif, revisions.principles(shard.config.rlaif.principles)
    told = responses.judgeable(shard.inputs["responses"], shard.inputs["drops:responses"])
    drawn = {
        prompt: {"principle": revisions.drawn(among, shard.config.seed, shard.iteration, prompt).text}
        for prompt in shard.inputs["prompts"]["prompt_id"].to_pylist()
    }
    return comparisons.compare(
        comparisons.all_pairs(shard.inputs["prompts"], told), shard.engine, judge_name=shard.models["judge"],
        iteration=shard.iteration, stage="preferences", rubric=_rubric(shard.config), also=drawn,
        explained=Sampling(max_tokens=how.explanation_tokens) if how.justified else None, seed=shard.config.seed,
    )  # fmt: skip


def _rubric(config: RunConfig) -> Rubric:
    asks_with = ("principle", "prompt", "first", "second")
    return judgments.load_rubric("preference", justified=config.rlaif.justified, kind="better_", asks_with=asks_with)


def label(p: float, config: RunConfig) -> float:
    """Return what a pair of probability p is worth: 1 for hard labels, else p, clamped where the judge explained.

    0.69 is 0.69; after an explanation, 0.6.
    """
    how = config.rlaif
    if how.labels == "hard":
        return 1.0
    return min(max(p, how.clamp), 1 - how.clamp) if how.justified else p


def pair(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Pair the response that wins most with the one that wins least, p as its label; rows PAIRS, and DROPS."""
    found = comparisons.win_rates(shard.inputs["preferences"])
    made, drops = pairs.best_and_worst(
        shard.inputs["prompts"], shard.inputs["responses"], found.mean, shard.config.pairs, iteration=shard.iteration
    )
    p_of = {row["pair_id"]: found.p.get((row["chosen_id"], row["rejected_id"]), 1.0) for row in made.to_pylist()}
    rows = [{**row, "label": label(p_of[row["pair_id"]], shard.config)} for row in made.to_pylist()]
    return schemas.table(rows, schemas.PAIRS), drops


def measures(made: Mapping[str, Iterable[pa.Table]], config: RunConfig) -> dict[str, Measure]:
    """Say how much was rewritten, what was refused before and after, and how sure and how steady the judge is."""
    changed: list[float] = []
    before: list[float] = []
    after: list[float] = []
    revised: list[float] = []
    for first, rows in zip(made["answers"], made["revisions"], strict=True):
        both = _changed(first, rows)
        kept = {row["response_id"] for row, _ in both}
        revised += [float(name in kept) for name in first["response_id"].to_pylist()]
        for row, text in both:
            likeness = difflib.SequenceMatcher(None, text.split(), row["revision"].split(), autojunk=False).ratio()
            changed.append(1 - likeness)
            before.append(float(answers.refuses(text)))
            after.append(float(answers.refuses(row["revision"])))
    labels = [row["label"] for part in made["pairs"] for row in part.to_pylist()]
    return {
        "revised_rate": Measure("answers that were revised", rate(revised)),
        "revision_distance": Measure("… share of the words that changed", rate(changed)),
        "refused_before": Measure("… refusals before", rate(before)),
        "refused_after": Measure("… refusals after", rate(after)),
        "label_mean": Measure("mean label of a pair", rate(labels)),
        **steps.measure_comparisons(made["preferences"]),
    }


METHOD = Method(
    name="rlaif",
    title="Reinforcement learning from AI feedback, offline",
    source="arXiv:2212.08073",
    given=steps.own_prompts,
    teaches_judging=False,
    starts_from="revised",
    refuses=steps.refuses_one_response,
    measures=measures,
    steps=(
        steps.PROMPTS,
        Step(
            "answers",
            ("prompts",),
            "policy",
            responses.VERSION,
            ("responses.sampling",),
            answer,
            asks=lambda config, t: Asked(1, config.responses.sampling.max_tokens),
        ),
        Step(
            "revisions",
            ("prompts", "answers"),
            "policy",
            revisions.VERSION,
            ("responses.sampling", "rlaif.rounds", "rlaif.principles"),
            revise,
            texts=revisions.texts,
            asks=asks_for_revisions,
        ),
        Training("revised", "sft", ("prompts", "answers", "revisions"), lessons, init_from="base"),
        Step(
            "responses",
            ("prompts",),
            "revised",
            responses.VERSION,
            ("responses",),
            respond,
            asks=steps.asks_for_responses,
        ),
        Step(
            "preferences",
            ("prompts", "responses"),
            "judge",
            comparisons.VERSION,
            ("rlaif.principles", "rlaif.justified", "rlaif.explanation_tokens"),
            prefer,
            texts=lambda config: [_rubric(config).identity, *revisions.texts(config)],
            asks=asks_for_preferences,
        ),
        Step("pairs", ("prompts", "responses", "preferences"), None, pairs.VERSION, ("pairs", "rlaif"), pair),
    ),
)
