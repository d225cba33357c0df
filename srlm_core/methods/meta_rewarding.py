"""Meta-Rewarding Language Models (arXiv:2407.19594): the model also judges its judgments, and learns to judge by that.

Responses are paired under length control. Of the response whose verdicts vary most all judgments are compared in both
orders, and the best against the worst of them is a pair, too; one DPO on both kinds. What the paper leaves open is
settled in srlm_core/meta_judgments.py and marked there.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from srlm_core import judgments, meta_judgments, pairs, schemas
from srlm_core.config import RunConfig
from srlm_core.methods import steps
from srlm_core.methods.record import Asked, Measure, Method, Shard, Step
from srlm_core.pairs import Side
from srlm_core.rates import rate
from srlm_core.store import seed_for

_EPSILON = 1e-9


def refuses(config: RunConfig) -> str | None:
    """Refuse judgments of which there is nothing to compare or to learn."""
    how = config.judgments
    if config.meta.trains_judge and how.k < 2:
        return (
            f"method=meta_rewarding compares the judgments of one response, got judgments.k={how.k}. "
            "Set judgments.k=2 or more, or meta.trains_judge=false."
        )
    if config.meta.trains_judge and how.reading == "expected":
        return (
            "method=meta_rewarding trains on judgments as they are written, got judgments.reading=expected, which "
            "writes no score. Set judgments.reading=text or guided, or meta.trains_judge=false."
        )
    if config.meta.trains_judge and how.steps:
        return (
            "method=meta_rewarding trains on a judgment as the answer to one question, got judgments.steps="
            f"{how.steps}, which asks one a step. Leave judgments.steps out, or set meta.trains_judge=false."
        )
    return steps.refuses_one_response(config)


def compare_judgments(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Compare the judgments of one response of each prompt, all in both orders; rows JUDGMENTS, and DROPS."""
    config = shard.config
    if not config.meta.trains_judge:
        return schemas.JUDGMENTS.empty_table(), schemas.DROPS.empty_table()
    found, why_not = meta_judgments.contests(shard.inputs["judgments"], k=config.judgments.k, seed=config.seed)
    rows, drops = meta_judgments.judge(
        found, shard.inputs["prompts"], shard.inputs["responses"], shard.engine, config,
        iteration=shard.iteration, judge_name=shard.models["judge"],
    )  # fmt: skip
    left_out = [
        {"id": prompt, "stage": "meta_judgments", "reason": reason, "iteration": shard.iteration, "detail": None}
        for prompt, reason in why_not.items()
    ]
    return rows, pa.concat_tables([drops, schemas.table(left_out, schemas.DROPS)])


def asks_for_comparisons(config: RunConfig, t: int) -> Asked:
    """Count the judgments of one response, each two in both orders; two judgments and the response are read."""
    how, k = config.meta, config.judgments.k
    meetings = k * (k - 1)
    if not how.trains_judge:
        return Asked()
    return Asked(meetings, how.sampling.max_tokens if how.reading == "text" else 0, 3 * meetings)


class Rated(NamedTuple):
    """A judgment that was compared: its row, what it judged, and how it is rated."""

    judgment: Mapping[str, Any]
    prompt: str
    response: str
    rating: float


def pair_judgments(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Pair the best-rated judgment of each prompt with the worst-rated; rows PAIRS of kind judgment, and DROPS.

    It waits for the whole iteration, since what a place in the prompt is worth is counted over all comparisons.
    """
    config = shard.config
    rubric = judgments.load_rubric(config.judgments.rubric, justified=config.judgments.justified)
    rows: list[dict[str, Any]] = []
    drops: list[dict[str, object]] = []
    said: dict[str, float] = {}
    for prompt_id, best, worst in _best_and_worst(shard.whole, config.meta.regularisation):
        reason = _why_no_pair(best, worst, config.meta.max_chosen_chars)
        if reason:
            drops.append(_drop(prompt_id, reason, shard.iteration))
            continue
        asked = rubric.ask(prompt=best.prompt, response=best.response)
        sides = (Side(of.judgment["text"], of.judgment["judgment_id"], of.rating) for of in (best, worst))
        row = pairs.row(
            {"prompt_id": prompt_id, "messages": list(asked)}, *sides, iteration=shard.iteration, kind="judgment"
        )
        rows.append(row)
        said[row["pair_id"]] = round(best.judgment["verdict"])
    kept = capped(said, config.meta.max_score_share, seed=config.seed)
    drops += [_drop(row["prompt_id"], "score_cap", shard.iteration) for row in rows if row["pair_id"] not in kept]
    taken = [row for row in rows if row["pair_id"] in kept]
    return schemas.table(taken, schemas.PAIRS), schemas.table(drops, schemas.DROPS)


def _best_and_worst(
    whole: Mapping[str, Iterable[pa.Table]], regularisation: float
) -> Iterator[tuple[str, Rated, Rated]]:
    """Rate the judgments of each prompt, shard by shard; of equals the earlier pass."""
    wins = meta_judgments.position_wins(
        verdict for part in whole["meta_judgments"] for verdict in part["verdict"].to_pylist()
    )
    read = (whole[name] for name in ("prompts", "responses", "judgments", "meta_judgments"))
    for prompts, responses, judged, compared in zip(*read, strict=True):
        asked = {row["prompt_id"]: schemas.conversation(row["messages"]) for row in prompts.to_pylist()}
        said = dict(zip(responses["response_id"].to_pylist(), responses["response"].to_pylist(), strict=True))
        row_of = {row["judgment_id"]: row for row in judged.to_pylist()}
        for prompt_id, battle in meta_judgments.battles(compared).items():
            ratings = meta_judgments.elo(meta_judgments.battle_matrix(battle.won, *wins), regularisation).tolist()
            rated = [
                Rated(row_of[name], asked[prompt_id], said[row_of[name]["target_id"]], rating)
                for name, rating in zip(battle.ids, ratings, strict=True)
            ]
            rated.sort(key=lambda one: one.judgment["index"])
            yield prompt_id, max(rated, key=lambda one: one.rating), min(rated, key=lambda one: one.rating)


def _why_no_pair(best: Rated, worst: Rated, longest: int | None) -> str | None:
    if best.rating - worst.rating <= _EPSILON:
        return "judgments_rated_equal"
    return "judgment_too_long" if longest is not None and len(best.judgment["text"]) > longest else None


def _drop(prompt_id: str, reason: str, iteration: int) -> dict[str, object]:
    return {"id": prompt_id, "stage": "judgment_pairs", "reason": reason, "iteration": iteration, "detail": None}


def capped(said: Mapping[str, float], share: float, *, seed: int) -> set[str]:
    """Thin out the pairs whose chosen judgments give one score, until none has more than `share` of what is left.

    Which of them stay is drawn. Scores 5, 5, 5, 5, 4, 3 at a share of 1/2: two of the fives stay. Where a single score
    is given and the share is below 1, none stays: it is what a collapsed judge would be taught.
    """
    by_score: dict[float, list[str]] = defaultdict(list)
    for name in sorted(said, key=lambda name: seed_for(seed, "score cap", name)):
        by_score[said[name]].append(name)
    sizes = [len(names) for names in by_score.values()]
    fewer = range(max(sizes, default=0), 0, -1)
    most = next((n for n in fewer if n <= share * sum(min(size, n) for size in sizes) + _EPSILON), 0)
    return {name for names in by_score.values() for name in names[:most]}


def pair(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Pair responses under length control, and put the pairs of judgments beside them; rows PAIRS, and DROPS."""
    made, drops = steps.pair(shard)
    mine, judged = set(shard.inputs["prompts"]["prompt_id"].to_pylist()), shard.inputs["judgment_pairs"]
    beside = judged.filter(pa.array([name in mine for name in judged["prompt_id"].to_pylist()], pa.bool_()))
    return pa.concat_tables([made, beside]), drops


def measures(made: Mapping[str, Iterable[pa.Table]], config: RunConfig) -> dict[str, Measure]:
    """Say how the judge compares its judgments: what decides, the place, the score, or neither."""
    readable: list[float] = []
    first: list[float] = []
    higher: list[float] = []
    for judged, compared in zip(made["judgments"], made["meta_judgments"], strict=True):
        verdict_of = dict(zip(judged["judgment_id"].to_pylist(), judged["verdict"].to_pylist(), strict=True))
        for row in compared.select(["target_id", "other_id", "first", "verdict"]).to_pylist():
            readable.append(float(row["verdict"] is not None))
            if row["verdict"] in (None, 0.5):
                continue
            first.append(float(row["verdict"] > 0.5))
            second = row["other_id"] if row["first"] == row["target_id"] else row["target_id"]
            lead = verdict_of[row["first"]] - verdict_of[second]
            if lead:
                higher.append(float((lead > 0) == (row["verdict"] > 0.5)))
    taken = (row for part in made["judgment_pairs"] for row in part.to_pylist())
    lengths = [float(len(row["chosen"]) - len(row["rejected"])) for row in taken]
    return {
        "meta_readable_rate": Measure("comparisons of judgments that could be read", rate(readable)),
        "meta_first_wins": Measure("… the one shown first wins", rate(first)),
        "meta_higher_wins": Measure("… the one with the higher score wins", rate(higher)),
        "judgment_chosen_longer": Measure("… chosen longer than rejected by, characters", rate(lengths)),
    }


METHOD = Method(
    name="meta_rewarding",
    title="Meta-Rewarding Language Models",
    source="arXiv:2407.19594",
    given=steps.own_prompts,
    refuses=refuses,
    measures=measures,
    pairs_of_a_prompt=lambda config: 2.0 if config.meta.trains_judge else 1.0,
    steps=(
        steps.PROMPTS,
        steps.RESPONSES,
        steps.JUDGMENTS,
        Step(
            "meta_judgments", ("prompts", "responses", "judgments"), "judge", meta_judgments.VERSION,
            ("meta.trains_judge", "meta.reading", "meta.rubric", "meta.sampling", "judgments.k", "judgments.rubric",
             "judgments.justified"),
            compare_judgments, texts=meta_judgments.texts, asks=asks_for_comparisons,
        ),
        Step(
            "judgment_pairs", ("prompts", "responses", "judgments", "meta_judgments"), None, 1,
            ("meta.regularisation", "meta.max_chosen_chars", "meta.max_score_share"), pair_judgments, gathers=True,
            texts=judgments.texts,
        ),
        Step(
            "pairs", ("prompts", "responses", "judgments", "judgment_pairs"), None, steps.PAIRS.version,
            steps.PAIRS.settings, pair,
        ),
    ),
)  # fmt: skip
