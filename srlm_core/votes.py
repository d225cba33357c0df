"""votes: people compare two models' answers blind, on a page of their own, and their votes are read back.

After the paper's human study (section 3.2, figure 5: 50 prompts, three people, the majority counts). The page does not
say which model wrote what; each prompt shows the two in an order that depends on the prompt and the pair alone.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from srlm_core import evaluation, pages, side_by_side, store, summary
from srlm_core.errors import DataError
from srlm_core.rates import rate
from srlm_core.store import digest, seed_for

CHOICES = ("left", "tie", "right")


class Ballot(NamedTuple):
    """One prompt to vote on."""

    prompt_id: str
    prompt: str
    left: str
    left_text: str
    right: str
    right_text: str


def write_page(folder: Path, newer: str, older: str, count: int) -> Path:
    """Write a page with up to `count` prompts; return its path. Raises DataError where there is nothing to compare."""
    shown = ballots(folder, newer, older, count)
    name = digest("votes", folder.name, newer, older, length=8)
    data = {"campaign": folder.name, "page": name, "ballots": [ballot._asdict() for ballot in shown]}
    # inside a script element nothing is escaped but what could end it
    spelled = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    page = pages.html().get_template("votes_template.html.j2").render(data=Markup(spelled), count=len(shown))
    path = folder / "report" / f"votes_{name}.html"
    store.write_text(path, page)
    return path


def ballots(folder: Path, newer: str, older: str, count: int) -> list[Ballot]:
    """Lay out the prompts that both models answered, differently, in an order of no meaning."""
    prompts = side_by_side.prompts(folder)
    said = [_answers(folder, model) for model in (newer, older)]
    found: list[Ballot] = []
    for prompt_id, prompt in prompts.items():
        if prompt_id in said[0] and prompt_id in said[1]:
            pair = [of[prompt_id] for of in said]
            if pair[0]["response"].strip() != pair[1]["response"].strip():
                left, right = pair[:: 1 if seed_for("side", prompt_id, newer, older) >> 8 & 1 else -1]
                shown = (left["response_id"], left["response"], right["response_id"], right["response"])
                found.append(Ballot(prompt_id, prompt, *shown))
    if not found:
        raise DataError(
            f"expected prompts that {newer} and {older} answered differently, got none of {len(prompts)}: "
            f"answered by {newer} {len(said[0])}, by {older} {len(said[1])}."
        )
    return sorted(found, key=lambda ballot: seed_for("vote", ballot.prompt_id))[:count]


def _answers(folder: Path, model: str) -> dict[str, dict[str, Any]]:
    found = side_by_side.answers(folder, model)
    if not found:
        there = [path.parent.name for path in sorted(folder.glob("evaluation/*/responses"))]
        raise DataError(f"expected answers of {model} in {folder}, got those of {', '.join(there) or 'no model'}.")
    return found


# --- reading them back ----------------------------------------------------------------------------------------------


def read(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Take in files of votes, and count all that were ever given for this campaign.

    Each file is kept under evaluation/votes. What is no vote on two answers of this campaign is set aside and counted;
    of a person's votes on the same two answers the last file's counts. Raises DataError for a file that holds no votes.
    """
    kept = folder / "evaluation" / "votes"
    for file in files:
        told = _of_file(file)
        store.write_json(kept / f"{digest(told)}.json", told)
    results = count(folder, [store.read_json(path) for path in _given(kept)])
    store.write_json(kept / "results.json", results)
    return results


def _given(kept: Path) -> list[Path]:
    files = (path for path in kept.glob("*.json") if path.name != "results.json")
    return sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _of_file(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"expected a file of votes at {path}, got: {error}.") from error
    if not isinstance(told, dict) or not isinstance(told.get("votes"), list):
        raise DataError(f"expected a file of votes as the page saves it at {path}, got {str(told)[:80]!r}.")
    return told


def count(folder: Path, given: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count votes: by pair of models, the majority on each prompt; rates of win, tie and lose of the newer one."""
    models = summary.models(folder)
    written = {
        row["response_id"]: (model, row["prompt_id"])
        for model in models
        for row in side_by_side.answers(folder, model).values()
    }
    votes: dict[tuple[str, str, str], float] = {}
    aside: Counter[str] = Counter()
    for number, told in enumerate(given):
        voter = str(told.get("voter") or f"file {number + 1}")
        for vote in told["votes"]:
            wrong = _what_is_wrong(vote, written)
            if wrong:
                aside[wrong] += 1
                continue
            a, b = sorted((vote["left"], vote["right"]), key=lambda name: -models.index(written[name][0]))
            points = {"left": 1.0, "tie": 0.5, "right": 0.0}[vote["choice"]]
            votes[a, b, voter] = points if a == vote["left"] else 1 - points
    return {"comparisons": dict(_by_pair(folder, votes, written)), "set_aside": dict(aside)}


def _what_is_wrong(vote: Any, written: Mapping[str, tuple[str, str]]) -> str | None:
    if not isinstance(vote, Mapping) or vote.get("choice") not in CHOICES:
        return f"no choice of {', '.join(CHOICES)}"
    sides = [written.get(vote.get(side, "")) for side in ("left", "right")]
    if sides[0] is None or sides[1] is None:
        return "no answer of this campaign as it is now"
    if sides[0][0] == sides[1][0] or sides[0][1] != sides[1][1]:
        return "no two models' answers to one prompt"
    return None


def _by_pair(
    folder: Path, votes: Mapping[tuple[str, str, str], float], written: Mapping[str, tuple[str, str]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    on: defaultdict[tuple[str, str], dict[tuple[str, str], dict[str, float]]] = defaultdict(dict)
    for (a, b, voter), points in votes.items():
        on[written[a][0], written[b][0]].setdefault((a, b), {})[voter] = points
    for (newer, older), of in sorted(on.items()):
        majority = {answers: _majority(list(by.values())) for answers, by in of.items()}
        points = list(majority.values())
        same = [float(x == y) for by in of.values() for x, y in combinations(by.values(), 2)]
        told: dict[str, Any] = {
            "win": rate([float(point == 1) for point in points])._asdict(),
            "tie": rate([float(point == 0.5) for point in points])._asdict(),
            "lose": rate([float(point == 0) for point in points])._asdict(),
            "win_or_half_tie": rate(points)._asdict(),
            "voters": len({voter for by in of.values() for voter in by}),
            "two_people_agree": rate(same)._asdict(),
        }
        judged = folder / "evaluation" / "head_to_head" / f"{newer}_vs_{older}" / "part-00000.parquet"
        if judged.exists():
            told["judge_agrees"] = evaluation.agreement(evaluation.results(store.read_part(judged)), majority)
        yield f"{newer}_vs_{older}", told


def _majority(points: Sequence[float]) -> float:
    """Return 1, 1/2 or 0: what most said of the newer model's answer; a tie where none has more. 1, 1, 0: 1."""
    lead = sum(point - 0.5 for point in points)
    return 0.5 if lead == 0 else float(lead > 0)
