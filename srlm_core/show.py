"""show: one prompt's way through the house, from where it came to which model it trained.

What models wrote is hostile until shown: `visible` keeps it from steering a terminal or reordering a page.
"""

import heapq
import textwrap
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from srlm_core import comparisons, counting, judgments, store, summary, weights
from srlm_core.config import RunConfig
from srlm_core.errors import DataError
from srlm_core.responses import DATASETS as RESPONSES
from srlm_core.store import digest

_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}
# line ends stay; other control characters are drawn (␛), and what turns the writing direction is spelled out
_VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "␡",
    **{code: f"‹U+{code:04X}›" for code in (*range(0x80, 0xA0), *sorted(_BIDI), 0x2028, 0x2029)},
}


def visible(text: str) -> str:
    """Make control and direction characters harmless and visible: ESC becomes ␛."""
    return text.replace("\r\n", "\n").translate(_VISIBLE)


_WEIGHTS = {"logprob": "log p", "reward": "reward"}
"""Column with a number of a response, and what it is called."""


_PLACE = {True: "first", False: "second"}


class Story(NamedTuple):
    """Everything that happened to one prompt."""

    prompt: dict[str, Any]
    responses: list[dict[str, Any]]
    judged: dict[str, list[dict[str, Any]]]
    """By the id of what was judged, in order of passes."""
    weighed: dict[str, list[str]]
    """By response: what else was found of it: log-probabilities, rewards, who it was compared with."""
    scores: dict[str, judgments.Score]
    pairs: list[dict[str, Any]]
    drops: dict[str, list[dict[str, Any]]]
    """By the id of what was left out: the prompt or a response."""
    k: int
    """Passes that make a score."""

    def role(self, row_id: str) -> str | None:
        """`chosen`, `rejected`, both, `paired` where the pair has no label, or None for what is in no pair."""
        sides = ((role, pair) for pair in self.pairs for role in ("chosen", "rejected") if pair[f"{role}_id"] == row_id)
        roles = {"paired" if pair["label"] is None else role for role, pair in sides}
        return " and ".join(sorted(roles)) or None

    def brought(self) -> list[tuple[str, str]]:
        """List (role, text) of the sides of a pair that no model sampled here, such as people's answers."""
        sampled = {response["response_id"] for response in self.responses}
        roles = ("chosen", "rejected")
        of_responses = [pair for pair in self.pairs if pair["kind"] == "response"]
        return [(role, pair[role]) for pair in of_responses for role in roles if pair[f"{role}_id"] not in sampled]

    def why_not(self, row_id: str) -> str | None:
        """The reason why a prompt or response was left out, or None."""
        return ", ".join(f"{drop['stage']}: {drop['reason']}" for drop in self.drops.get(row_id, [])) or None

    def said(self, judged: Mapping[str, Any]) -> str:
        """What one judgment says: its verdict or why there is none, and whether it counts."""
        verdict = judged["verdict"]
        said = f"{verdict:g}" if verdict is not None else f"unreadable ({judged['unreadable_reason']})"
        role = self.role(judged["judgment_id"])
        said = f"{said}, {role} of the judgments" if role else said
        return said if judged["index"] < self.k else f"{said}, not counted (k is {self.k})"

    def fate(self) -> str:
        """What became of the prompt, in a few words."""
        if self.pairs:
            margins = ", ".join(_margin(pair) for pair in self.pairs)
            return f"{len(self.pairs)} pair{'s' if len(self.pairs) > 1 else ''}, {margins}"
        reason = self.why_not(self.prompt["prompt_id"])
        return f"no pair ({reason})" if reason else "no pair yet"


def length(response: Mapping[str, Any]) -> str:
    """How long a response is, and where it came from if not from the policy."""
    n_tokens, source = response["n_tokens"], response["source"]
    if n_tokens is None:
        return f"from the data ({source})"
    return f"{n_tokens} tokens" if source == "policy" else f"{n_tokens} tokens by {response['model']} ({source})"


def _margin(pair: Mapping[str, Any]) -> str:
    if pair["label"] is None:
        return "no label"
    if pair["chosen_score"] is None or pair["rejected_score"] is None:
        return "no scores"
    return f"{pair['chosen_score']:.2f} over {pair['rejected_score']:.2f}"


# --- finding --------------------------------------------------------------------------------------------------------


def _ids(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every prompt id with the part that it is in, one part in memory at a time."""
    for t in summary.iterations(folder):
        for path in store.parts(folder / f"iter_{t:02d}" / "prompts"):
            for prompt_id in _rows(path, columns=["prompt_id"], wanted=None):
                yield path, prompt_id["prompt_id"]


def _rows(path: Path, *, columns: list[str] | None, wanted: tuple[str, Collection[str]] | None) -> list[dict[str, Any]]:
    """Read rows of a part; `wanted` is a column and the values looked for. Absent or damaged parts have none."""
    try:
        rows = counting.read_columns(path, columns)
    except (OSError, pa.ArrowException):
        return []
    if wanted is not None:
        rows = rows.filter(pa.array([value in wanted[1] for value in rows[wanted[0]].to_pylist()], pa.bool_()))
    return rows.to_pylist()


def find(folder: Path, prefix: str) -> Story:
    """Find one prompt by its id or a unique prefix. Raises DataError that names near ids or says how to find some."""
    prefix = prefix.strip()
    found = heapq.nsmallest(6, ((prompt_id, path) for path, prompt_id in _ids(folder) if prompt_id.startswith(prefix)))
    if not found or not prefix:
        raise DataError(_unknown(folder, prefix))
    if len(found) > 1 and found[0][0] != prefix:
        several = ", ".join(prompt_id for prompt_id, _ in found[:5]) + (", …" if len(found) > 5 else "")
        raise DataError(
            f"expected the id of one prompt, got {prefix!r}, which begins several: {several}. Give more of it."
        )
    prompt_id, path = found[0]
    return stories(folder, path, [prompt_id])[0]


def _unknown(folder: Path, prefix: str) -> str:
    def likeness(found: tuple[Path, str]) -> tuple[int, str]:
        alike = (a == b for a, b in zip(prefix, found[1], strict=False))
        return sum(1 for _ in takewhile(bool, alike)), found[1]

    near = [prompt_id for _, prompt_id in heapq.nlargest(3, _ids(folder), key=likeness)]
    got = f"expected the id of a prompt of {folder.name}, got {prefix!r}."
    dropped = _dropped_prompt(folder, prefix) if prefix else None
    if dropped:
        return f"{got} That one was never kept: {dropped['reason']} ({visible(dropped['detail'] or '')!r})."
    if not near:
        return f"{got} There are no prompts in {folder} yet: run the campaign first."
    return (
        f"{got} Near ones: {', '.join(near)}. All are in the column prompt_id of iter_*/prompts/*.parquet, "
        "and the samples in report/index.html show some."
    )


def _dropped_prompt(folder: Path, prefix: str) -> dict[str, Any] | None:
    for t in summary.iterations(folder):
        for path in store.parts(folder / f"iter_{t:02d}" / "drops"):
            for row in _rows(path, columns=None, wanted=None):
                if row["stage"] == "prompts" and row["id"].startswith(prefix):
                    return row
    return None


def stories(folder: Path, prompts_part: Path, prompt_ids: Sequence[str]) -> list[Story]:
    """Read what happened to some prompts of one part: shards hold whole prompts, so its namesakes have the rest."""
    iteration, name = prompts_part.parents[1], prompts_part.name
    wanted = ("prompt_id", prompt_ids)
    prompts = {row["prompt_id"]: row for row in _rows(prompts_part, columns=None, wanted=("prompt_id", prompt_ids))}
    responses, judged, pairs = (
        _by_prompt([row for of in datasets for row in _rows(iteration / of / name, columns=None, wanted=wanted)])
        for datasets in (RESPONSES, judgments.DATASETS, ("pairs",))
    )
    of_interest = {*prompt_ids, *(row["response_id"] for rows in responses.values() for row in rows)}
    drops: dict[str, list[dict[str, Any]]] = defaultdict(list)
    shards = {name.removeprefix("part-"), "00000.parquet"}  # what is gathered from all shards has but one part
    for path in sorted(path for shard in shards for path in (iteration / "drops").glob(f"part-*-{shard}")):
        for row in _rows(path, columns=None, wanted=("id", of_interest)):
            drops[row["id"]].append(row)
    config = summary.campaign_config(folder)
    number = {row["response_id"]: row["index"] + 1 for rows in responses.values() for row in rows}
    found = _weighed(sorted(iteration.glob(f"*/{name}")), prompt_ids, number)
    return [
        _story(prompts[prompt_id], responses[prompt_id], judged[prompt_id], pairs[prompt_id], drops, config, found)
        for prompt_id in prompt_ids
        if prompt_id in prompts
    ]


def _weighed(parts: Sequence[Path], prompt_ids: Sequence[str], number: Mapping[str, int]) -> dict[str, list[str]]:
    """Say of each response what there is of it beside judgments; `number` has its place among those of its prompt."""
    told: dict[str, list[str]] = defaultdict(list)
    for path in parts:
        columns = _columns(path)
        weights = [name for name in _WEIGHTS if {name, "response_id", "model"} <= columns]
        rows = _rows(path, columns=None, wanted=("prompt_id", prompt_ids)) if weights or "other_id" in columns else []
        for name, row in ((name, row) for name in weights for row in rows):
            value = "unknown" if row[name] is None else f"{row[name]:.2f}"
            told[row["response_id"]].append(f"{_WEIGHTS[name]} {value} by {row['model']}")
        compared = [row for row in rows if row.get("other_id") in number and row["target_id"] in number]
        met = comparisons.by_pair(pa.Table.from_pylist(compared)) if compared else {}
        for (one, other), orders in met.items():
            turned = {not first: 1 - p for first, p in orders.items()}
            for side, opponent, chances in ((one, other, orders), (other, one, turned)):
                said = ", ".join(f"{chances[first]:.2f} shown {_PLACE[first]}" for first in sorted(chances)[::-1])
                told[side].append(
                    f"better than response {number[opponent]} by {compared[0]['judge']}: {said or 'unreadable'}"
                )
    return told


def _columns(path: Path) -> set[str]:
    try:
        return {*pq.read_schema(path).names}
    except (OSError, pa.ArrowException):
        return set()


def _by_prompt(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    result: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        result[row["prompt_id"]].append(row)
    return result


def _story(
    prompt: dict[str, Any],
    responses: list[dict[str, Any]],
    judged: list[dict[str, Any]],
    pairs: list[dict[str, Any]],
    drops: Mapping[str, list[dict[str, Any]]],
    config: RunConfig | None,
    weighed: Mapping[str, list[str]],
) -> Story:
    k = config.judgments.k if config else 1 + max((row["index"] for row in judged), default=0)
    required = config.judgments.required if config else (k + 1) // 2
    columns = {name: [row[name] for row in judged] for name in ("target_id", "index", "verdict")}
    scores = judgments.scores(pa.table(columns), k=k, required=required)
    by_target: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(judged, key=lambda row: row["index"]):
        by_target[row["target_id"]].append(row)
    responses = sorted(responses, key=lambda row: row["index"])
    of_it = {row["response_id"]: weighed.get(row["response_id"], []) for row in responses}
    return Story(prompt, responses, dict(by_target), of_it, scores, pairs, dict(drops), k)


def sample(folder: Path, t: int, count: int, seed: int) -> list[Story]:
    """Draw prompts of an iteration by the hash of their ids: the same ones on every machine, in any order of parts."""
    found = heapq.nsmallest(
        count,
        (
            (digest("sample", seed, row["prompt_id"]), row["prompt_id"], path)
            for path in store.parts(folder / f"iter_{t:02d}" / "prompts")
            for row in _rows(path, columns=["prompt_id"], wanted=None)
        ),
    )
    return [story for _, prompt_id, path in found for story in stories(folder, path, [prompt_id])]


def trained(folder: Path, pair_id: str) -> list[str]:
    """Say which trainings a pair was in: `M2`, `M2 (held out, chooses among checkpoints)`, `M2 (left out: …)`."""
    result: list[str] = []
    for t in summary.iterations(folder):
        iteration, model = folder / f"iter_{t:02d}", f"M{t + 1}"
        done = (folder / "models" / model / weights.MARKER).exists()
        left_out = _rows(iteration / "drops" / f"part-training-{model}.parquet", columns=None, wanted=("id", [pair_id]))
        if left_out:
            result.append(f"{model} (left out: {left_out[0]['reason']})")
        elif _holds(iteration / "training" / "rows.parquet", pair_id):
            result.append(model if done else f"{model} (not finished)")
        elif _holds(iteration / "training" / "heldout.parquet", pair_id):
            result.append(f"{model} (held out, chooses among checkpoints)")
    return result


def _holds(path: Path, row_id: str) -> bool:
    try:
        return path.exists() and pq.read_table(path, columns=["id"], filters=[("id", "=", row_id)]).num_rows > 0
    except (OSError, pa.ArrowException):
        return False


# --- the text -------------------------------------------------------------------------------------------------------


def show(campaign_folder: Path, prompt_id: str) -> str:
    """Tell one prompt's way through the house as text for a terminal.

    Takes a full id or a unique prefix. Raises DataError for an unknown one, naming near ids.
    """
    story = find(campaign_folder, prompt_id)
    lines = [*_prompt_lines(story), ""]
    for response in story.responses:
        lines += [*_response_lines(story, response), ""]
    for role, text in story.brought():
        lines += [f"{role}, as it stands in the pair", *_indent(text, "  │ "), ""]
    if not story.responses and not story.pairs:
        lines += ["No responses yet.", ""]
    return "\n".join([*lines, *_end_lines(campaign_folder, story)])


def _prompt_lines(story: Story) -> list[str]:
    prompt = story.prompt
    writer = f", written by {prompt['generator']}" if prompt["generator"] else ""
    lines = [f"prompt {prompt['prompt_id']}  iteration {prompt['iteration']}, source {prompt['source']}{writer}"]
    for message in prompt["messages"]:
        speaker = "" if len(prompt["messages"]) == 1 else f"[{message['role']}] "
        lines += _indent(speaker + message["content"], "  │ ")
    return lines


def _response_lines(story: Story, response: Mapping[str, Any]) -> list[str]:
    response_id = response["response_id"]
    score = story.scores.get(response_id)
    role = story.role(response_id)
    facts = [
        length(response),
        "cut at max_tokens" if response["finish_reason"] == "length" else f"ended by {response['finish_reason']}",
        *([f"score {score.mean:.2f} of {score.n} readable"] if score else []),
        *([] if score or story.weighed[response_id] else ["no score"]),
    ]
    reason = story.why_not(response_id)
    facts += [reason] if reason else []
    title = f"response {response['index'] + 1}  {response_id}  {', '.join(facts)}"
    lines = [f"{title}  ← {role}" if role else title, *_indent(response["response"], "  │ ")]
    lines += [visible(f"    {said}") for said in story.weighed[response_id]]
    for row in story.judged.get(response_id, []):
        title = f"    judgment {row['index'] + 1} by {row['judge']}: {story.said(row)}"
        lines += [visible(title), *_indent(row["text"], "    │ ")]
    return lines


def _end_lines(folder: Path, story: Story) -> list[str]:
    if not story.pairs:
        return [f"{story.fate()[0].upper()}{story.fate()[1:]}."]
    lines: list[str] = []
    for pair in story.pairs:
        models = trained(folder, pair["pair_id"])
        lines.append(
            f"pair {pair['pair_id']}: {pair['chosen_id']} {'and' if pair['label'] is None else 'over'} "
            f"{pair['rejected_id']} ({_margin(pair)}); "
            + (f"trained {', '.join(models)}" if models else "has trained nothing yet")
        )
    return lines


def _indent(text: str, margin: str) -> list[str]:
    """Every line of a text behind a margin, so that no text can pass for a line of ours."""
    lines = visible(text).strip("\n").split("\n")
    return [margin + piece for line in lines for piece in textwrap.wrap(line, 100) or [""]]
