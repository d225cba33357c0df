"""Temporal Self-Rewarding, a setting: rejected responses from an early model, chosen ones from a future one.

The better a policy answers, the nearer its worst response comes to its best, and the less a pair says. So M0 or M1
answers the same prompts, and what it wrote may be rejected beside M_t's own (`temporal.rejected_from`). And M_f,
trained as M_{t+1} would be on the pairs so far, answers them, too, and what it wrote may be chosen
(`temporal.chosen_from_future`). M_{t+1} begins where it would have begun, never from M_f. The method's judge scores
them all.

What pairs is the method's own step, over more responses: its highest-scored and its lowest-scored, of equal ones M_t's
before any other's. So the gap between a pair's scores is never below that of M_t's responses alone. The method's other
rules hold over all of them, too: a response that was cut or is too long is not chosen, and length control takes the
shortest of the top tier and the longest of the bottom tier whoever wrote them, where the tiers are shares of the wider
range, and a gap may shrink. Known to us from one note; what it leaves open is settled here.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from srlm_core import judgments, responses, schemas, training
from srlm_core.config import DpoConfig, RunConfig
from srlm_core.errors import NothingLeft
from srlm_core.methods import steps
from srlm_core.methods.record import Measure, Method, Shard, Step, Training
from srlm_core.rates import rate
from srlm_core.seed_data import SeedData
from srlm_core.store import seed_for

_ROLES = {"previous": "policy", "sft": "sft", "base": "base"}
"""What `training.dpo` calls a model, as the role of it."""
_SIDES = {"early": "rejected", "future": "chosen"}
"""Which side of a pair the responses of a pool may take."""


def fits(method: Method) -> bool:
    """Whether a method samples and scores single responses by the shared steps, and pairs what they make."""
    pairing = method.makes[-1]
    shared = steps.RESPONSES in method.steps and steps.JUDGMENTS in method.steps
    return shared and {"responses", "judgments"} <= {*pairing.reads} and not pairing.gathers


def refuses(method: Method, config: RunConfig, fitting: Sequence[str]) -> str | None:
    """Refuse the setting where it cannot work; `fitting` names the methods that it works with."""
    how = config.temporal
    if not how.on:
        return None
    said = f"temporal.rejected_from={how.rejected_from}" if how.rejected_from else "temporal.chosen_from_future=true"
    if not fits(method):
        return (
            f"{said} has a judge score the responses of another model like M_t's, and method={method.name} does not "
            "pair by scores of single responses. Set temporal.rejected_from=null and "
            f"temporal.chosen_from_future=false, or method to one of {', '.join(fitting)}."
        )
    if how.rejected_from == "sft" and config.iterations == 1:
        return (
            "temporal.rejected_from=sft rejects what M1 wrote, and with iterations=1 that is M_t itself. "
            "Set iterations=2 or more, or temporal.rejected_from=base."
        )
    return None


def extended(method: Method, config: RunConfig) -> Method:
    """Put what the setting asks for between a method's judging and its pairs; off, it is the method as it stands.

    `plain_pairs` are those of M_t's responses alone, to compare with, `anchored_pairs` those with the early model's
    beside them. M_f learns from the latter if there are any, else from the former.
    """
    how = config.temporal
    if not how.on:
        return method
    pairing = method.makes[-1]
    added: list[Step | Training] = [_paired(pairing, "plain_pairs")]
    pools: tuple[str, ...] = ()
    if how.rejected_from:
        added += _pool("early", how.rejected_from)
        pools = ("early",)
    if how.chosen_from_future:
        if pools:
            added.append(_paired(pairing, "anchored_pairs", *pools))
        learns = "anchored_pairs" if pools else "plain_pairs"
        added += [_future(learns, config.training.dpo), *_pool("future", "future", *pools)]
        pools = (*pools, "future")

    def measured(made: Mapping[str, Iterable[pa.Table]], now: RunConfig) -> Mapping[str, Measure]:
        return {**method.measures(made, now), **measures(made, now)}

    return replace(method, steps=(*method.steps[:-1], *added, _paired(pairing, "pairs", *pools)), measures=measured)


# --- what another model answers -------------------------------------------------------------------------------------


def _pool(pool: str, role: str, *before: str) -> tuple[Step, Step]:
    """Make the steps in which the model of a role answers the prompts, and the method's judge scores what is new.

    An answer in the words of M_t's, or of a pool before, is named in the drops and judged by nobody: one text has one
    score, and never meets itself in a pair.
    """
    said, earlier = f"{pool}_responses", ("responses", *(f"{name}_responses" for name in before))

    def respond(shard: Shard) -> tuple[pa.Table, pa.Table]:
        model, how = shard.models[role], shard.config.responses
        if model == shard.policy:  # in the first iteration M1 is M_t: nothing is earlier
            return schemas.RESPONSES.empty_table(), schemas.DROPS.empty_table()
        made, drops = responses.respond(
            shard.inputs["prompts"], shard.engine, how.sampling, n=how.n, iteration=shard.iteration, model=model,
            seed=seed_for(shard.config.seed, pool),
        )  # fmt: skip
        # numbered after M_t's, since of equal scores the first is taken
        rows = [{**row, "index": row["index"] + how.n * len(earlier), "source": pool} for row in made.to_pylist()]
        known = {_words(row) for name in earlier for row in shard.inputs[name].to_pylist()}
        left_out = {*drops["id"].to_pylist()}
        again = [row["response_id"] for row in rows if _words(row) in known and row["response_id"] not in left_out]
        more = schemas.table(
            ({"id": name, "stage": said, "reason": "duplicate", "iteration": shard.iteration, "detail": None}
             for name in again), schemas.DROPS,
        )  # fmt: skip
        return schemas.table(rows, schemas.RESPONSES), pa.concat_tables([_at(said, drops), more])

    def judge(shard: Shard) -> tuple[pa.Table, pa.Table]:
        inputs = {**shard.inputs, "responses": shard.inputs[said], "drops:responses": shard.inputs[f"drops:{said}"]}
        rows, drops = steps.JUDGMENTS.run(replace(shard, inputs=inputs))
        return rows, _at(f"{pool}_judgments", drops)

    return (
        replace(steps.RESPONSES, makes=said, reads=("prompts", *earlier), role=role, run=respond),
        replace(steps.JUDGMENTS, makes=f"{pool}_judgments", reads=("prompts", said), run=judge),
    )


def _words(response: Mapping[str, Any]) -> tuple[str, str]:
    return response["prompt_id"], response["response"].strip()


def _at(stage: str, drops: pa.Table) -> pa.Table:
    """Say in which of several stages alike something was left out."""
    return schemas.table(({**row, "stage": stage} for row in drops.to_pylist()), schemas.DROPS)


def _future(learns: str, how: DpoConfig) -> Training:
    """Train M_f as M_{t+1} is trained, on this iteration's pairs alone."""

    def lay_out(config: RunConfig, seed: SeedData, whole: Mapping[str, Iterable[pa.Table]]) -> Iterator[pa.Table]:
        if not any(part.num_rows for part in whole[learns]):
            raise NothingLeft(
                f"temporal.chosen_from_future: expected rows in {learns} to train the future model on, got none. "
                "Raise judgments.k or responses.n, set judgments.reading=expected, or "
                "temporal.chosen_from_future=false, and run again with --redo."
            )
        return map(training.preferences, whole[learns])

    return Training("future", "dpo", (learns,), lay_out, _ROLES[how.init_from], _ROLES[how.reference])


# --- what is paired -------------------------------------------------------------------------------------------------


def _paired(pairing: Step, makes: str, *pools: str) -> Step:
    """Make a method's pairing read the responses and judgments of pools beside M_t's.

    Which side a response may take goes by its source; see `pairs.may_be_chosen`.
    """
    beside = {of: [f"{pool}_{of}" for pool in pools] for of in ("responses", "judgments")}

    def run(shard: Shard) -> tuple[pa.Table, pa.Table]:
        inputs = dict(shard.inputs)
        for of, others in beside.items():
            for name in (of, f"drops:{of}"):
                tables = [inputs[name.replace(of, other)] for other in (of, *others)]
                inputs[name] = pa.concat_tables(tables)
        rows, drops = pairing.run(replace(shard, inputs=inputs))
        return rows, drops if makes == pairing.makes else _at(makes, drops)

    return replace(pairing, makes=makes, reads=(*pairing.reads, *beside["responses"], *beside["judgments"]), run=run)


# --- what is measured -----------------------------------------------------------------------------------------------


def measures(made: Mapping[str, Iterable[pa.Table]], config: RunConfig) -> dict[str, Measure]:
    """Say which sides other models gave, what that does to the gap between scores, and how those models are judged."""
    sides = {pool: side for pool, side in _SIDES.items() if f"{pool}_responses" in made}
    names = ("plain_pairs", "pairs", *(f"{pool}_{of}" for pool in sides for of in ("responses", "judgments")))
    found: dict[str, list[float]] = defaultdict(list)
    for parts in zip(*(made[name] for name in names), strict=True):
        part = dict(zip(names, parts, strict=True))
        taken, plain = _of_responses(part["pairs"]), _of_responses(part["plain_pairs"])
        found["new"] += [prompt not in plain for prompt in taken]
        for prompt in taken.keys() & plain.keys():
            found["gap"].append(_gap(taken[prompt]))
            found["gap alone"].append(_gap(plain[prompt]))
        for pool, side in sides.items():
            wrote = {*part[f"{pool}_responses"]["response_id"].to_pylist()}
            found[f"{pool} replaced"] += [pair[f"{side}_id"] in wrote for pair in taken.values()]
            judged = part[f"{pool}_judgments"]
            found[f"{pool} readable"] += [verdict is not None for verdict in judged["verdict"].to_pylist()]
            scores = judgments.scores(judged, k=config.judgments.k, required=config.judgments.required)
            found[f"{pool} score"] += [score.mean for score in scores.values()]
    told = {
        "score_gap": Measure("score gap of a pair that M_t's responses alone would give, too", rate(found["gap"])),
        "score_gap_alone": Measure("… by its responses alone", rate(found["gap alone"])),
        "paired_anew": Measure("pairs that its responses alone do not give", rate(found["new"])),
    }
    for pool, side in sides.items():
        told |= {
            f"{side}_replaced": Measure(f"pairs whose {side} the {pool} model wrote", rate(found[f"{pool} replaced"])),
            f"{pool}_score": Measure("… mean score of its responses", rate(found[f"{pool} score"])),
            f"{pool}_readable_rate": Measure("… judgments of them that could be read", rate(found[f"{pool} readable"])),
        }
    return told


def _of_responses(made: pa.Table) -> dict[str, dict[str, Any]]:
    """Return prompt id to its pair of responses, without the texts."""
    columns = ["prompt_id", "kind", "chosen_id", "rejected_id", "chosen_score", "rejected_score"]
    return {row["prompt_id"]: row for row in made.select(columns).to_pylist() if row["kind"] == "response"}


def _gap(pair: Mapping[str, Any]) -> float:
    return pair["chosen_score"] - pair["rejected_score"]
