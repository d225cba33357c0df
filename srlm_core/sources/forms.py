"""The published forms of a row: what it is known by, and what it becomes. Message trees are in oasst.py."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from srlm_core.schemas import conversation

Row = Mapping[str, Any]
Turn = Mapping[str, str]
"""What one side said: its role and its content."""

PROMPT = ("prompt", "instruction", "question", "query", "input", "turns")
RESPONSE = ("response", "output", "completion", "answer")
RESPONSES = ("responses", "completions", "answers")
TEXT = ("text", *RESPONSE, "content")
GOODNESS = ("quality", "score", "overall_score", "rating")
"""More is better; a rank goes the other way and stands before them all."""
TURNS = ("messages", "conversations")


class SetAside(NamedTuple):
    """A row, or a part of one, that could not be used."""

    line: int | None
    """Line or row of the file; null for what was left out after the reading."""
    reason: str
    text: str


class Found(NamedTuple):
    """What one row, or all trees together, came to."""

    form: str
    examples: tuple[dict[str, Any], ...] = ()
    groups: tuple[dict[str, Any], ...] = ()
    prompts: tuple[dict[str, Any], ...] = ()
    set_aside: tuple[SetAside, ...] = ()
    n_ordered_pairs: int = 0
    """Among all usable responses: in the groups each text stands once."""
    counts: Mapping[str, Any] = {}


class _Unusable(Exception):
    """Says why a row cannot be used."""


def read_row(number: int, row: Row) -> Found:
    """Read one row by the first form that knows its keys."""
    for form, knows, read in _FORMS:
        if knows(row):
            try:
                return read(number, row)._replace(form=form)
            except _Unusable as wrong:
                return Found(form, set_aside=(SetAside(number, str(wrong), str(row)[:300]),))
    reason = f"expected a prompt, an example or a ranking, got {', '.join(map(str, row)) or 'nothing'}"
    return Found("", set_aside=(SetAside(number, reason, str(row)[:300]),))


# --- rankings -------------------------------------------------------------------------------------------------------


def n_ordered_pairs(group: Row) -> int:
    """Count the pairs of a group's responses of which one is ranked above the other."""
    return n_ordered([response["rank"] for response in group["responses"]])


def n_ordered(ranks: Sequence[float]) -> int:
    """Count the pairs of different ranks."""
    return sum(a != b for a, b in itertools.combinations(ranks, 2))


class Reply(NamedTuple):
    """A response as a person ranked it: the lower, the better."""

    text: str
    bad: float
    more: Mapping[str, Any] = {}
    """Whatever else its row says of it."""


def ranked(prompt: str, replies: Sequence[Reply], more: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Make a group: each rank is the number of better replies, so that ties share one."""
    bads = [reply.bad for reply in replies]
    told = [{**reply.more, "text": reply.text, "rank": sum(bad < reply.bad for bad in bads)} for reply in replies]
    return {**more, "prompt": prompt, "responses": told}


def distinct(replies: Sequence[Reply]) -> list[Reply]:
    """Keep each text once, where it is ranked best: a text cannot be better than itself."""
    best: dict[str, Reply] = {}
    for reply in sorted(replies, key=lambda reply: reply.bad):
        best.setdefault(reply.text, reply)
    return [reply for reply in replies if best[reply.text] is reply]


def ranking(line: int, said: Sequence[Turn], replies: Sequence[Reply], more: Mapping[str, Any] = {}) -> Found:
    """Make a group of what was replied to a conversation, and a prompt where that is a single turn.

    A group of several turns keeps what the user said as `turns`; there is none where no two replies are ranked apart.
    """
    prompt, kept = conversation(said), distinct(replies)
    again = SetAside(line, "the same text as a response ranked above", prompt[:300])
    turns = {} if _opens(said) else {"turns": [turn["content"] for turn in said if turn["role"] == "user"]}
    group = ranked(prompt, kept, {**more, **turns})
    return Found(
        "",
        groups=(group,) if n_ordered_pairs(group) else (),
        prompts=({"prompt": prompt},) if _opens(said) else (),
        set_aside=(again,) * (len(replies) - len(kept)),
        n_ordered_pairs=n_ordered([reply.bad for reply in replies]),
    )


def _opens(said: Sequence[Turn]) -> bool:
    return len(said) == 1


def _group(number: int, row: Row) -> Found:
    said, name = _asked_in(row), _key(row, RESPONSES)
    aside: list[SetAside] = []
    usable: list[Reply] = []
    for response in row[name]:
        try:
            usable.append(_reply(response))
        except _Unusable as wrong:
            aside.append(SetAside(number, str(wrong), str(response)[:300]))
    found = ranking(number, said, usable, {key: value for key, value in row.items() if key != name})
    aside += found.set_aside
    if not found.groups:
        reason = (
            "fewer than two usable responses"
            if len(usable) - len(found.set_aside) < 2
            else "all responses are ranked alike"
        )
        aside.append(SetAside(number, reason, conversation(said)[:300]))
    return _with_best(found._replace(set_aside=tuple(aside)))


def _with_best(found: Found) -> Found:
    """Take the best response to a single turn as an example."""
    if not found.groups or not found.prompts:
        return found
    (group,) = found.groups
    best = next(response for response in group["responses"] if response["rank"] == 0)
    return found._replace(examples=({"instruction": group["prompt"], "response": best["text"]},))


def _reply(response: Any) -> Reply:
    if not isinstance(response, Mapping):
        raise _Unusable("expected each response as an object with a text and a rank")
    text = _text(_first(response, TEXT), "expected a non-empty text in each response")
    for key, sign in (("rank", 1), *((name, -1) for name in GOODNESS)):
        if _is_number(response.get(key)):
            return Reply(text, sign * float(response[key]), response)
    raise _Unusable(f"a response without a number under rank, {', '.join(GOODNESS)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _pair(number: int, row: Row) -> Found:
    """Read {chosen, rejected}, as texts or as conversations that share their prompt."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _two(number, _asked_in(row), chosen, rejected)
    said, better = _split(chosen)
    before, worse = _split(rejected)
    if said != before:
        raise _Unusable("chosen and rejected answer different prompts")
    return _two(number, _asked_in(row) if _key(row, PROMPT) else said, better, worse)


def _labelled(number: int, row: Row) -> Found:
    """Read {output_1, output_2, label}: label 1 or 2 is the better one (LLMBar)."""
    label = str(row["label"]).strip()
    if label not in ("1", "2"):
        raise _Unusable(f"expected 1 or 2 under 'label', got {row['label']!r}")
    first, second = row["output_1"], row["output_2"]
    better, worse = (first, second) if label == "1" else (second, first)
    return _two(number, _asked_in(row), better, worse)


def _two(number: int, said: Sequence[Turn], better: Any, worse: Any) -> Found:
    better, worse = (_text(text, "expected two non-empty texts") for text in (better, worse))
    if better == worse:
        raise _Unusable("both responses are the same text")
    return _with_best(ranking(number, said, [Reply(better, 0), Reply(worse, 1)]))


# --- examples and prompts -------------------------------------------------------------------------------------------


def _conversation(number: int, row: Row) -> Found:
    """Take the first turn of a conversation; one that nobody answered is a prompt."""
    turns = [_turn(turn) for turn in row[_key(row, TURNS)]]
    spoken = [turn for turn in turns if turn["role"] != "system"]
    if not spoken or spoken[0]["role"] != "user":
        raise _Unusable("expected a conversation that begins with the user")
    left_out = [turn for turn in turns if turn["role"] == "system"]
    aside = tuple(SetAside(number, "a system turn, left out", turn["content"][:300]) for turn in left_out)
    prompt = _text(spoken[0]["content"], "expected a non-empty turn of the user")
    if len(spoken) == 1:
        return Found("", prompts=({"prompt": prompt},), set_aside=aside)
    if spoken[1]["role"] != "assistant":
        raise _Unusable("expected the assistant's turn after the user's")
    return _example(prompt, spoken[1]["content"])._replace(set_aside=aside)


def _turn(turn: Any) -> dict[str, str]:
    spoken_by = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
    role = _first(turn, ("role", "from")) if isinstance(turn, Mapping) else None
    if not isinstance(role, str):
        raise _Unusable("expected turns with role and content, or from and value")
    text = _first(turn, ("content", "value"))
    return {"role": spoken_by.get(role, role), "content": text if isinstance(text, str) else ""}


def _split(turns: Any) -> tuple[list[dict[str, str]], str]:
    """Cut a conversation into what was asked and its last answer."""
    if not isinstance(turns, list) or len(turns) < 2:
        raise _Unusable("expected a text or a conversation under 'chosen' and 'rejected'")
    said = _turns(turns)
    return said[:-1], said[-1]["content"]


def _turns(turns: Sequence[Any]) -> list[dict[str, str]]:
    said = [_turn(turn) for turn in turns]
    for turn in said:
        _text(turn["content"], "expected no empty turn")
    return said


def _alpaca(number: int, row: Row) -> Found:
    """Read {instruction, input, output}; an input stands below its instruction (Taori et al. 2023)."""
    instruction = _text(row["instruction"], "expected a non-empty text under 'instruction'")
    return _example(_with_input(instruction, row.get("input")), row["output"])


def _task(number: int, row: Row) -> Found:
    """Read a task of Self-Instruct: {instruction, instances: [{input, output}, …]}, its first instance."""
    instances = row["instances"] or [{}]
    instruction = _text(row["instruction"], "expected a non-empty text under 'instruction'")
    return _example(_with_input(instruction, instances[0].get("input")), instances[0].get("output"))


def _with_input(instruction: str, given: Any) -> str:
    given = given.strip() if isinstance(given, str) else ""
    return f"{instruction}\n\n{given}" if given and given != "<noinput>" else instruction


def _answered(number: int, row: Row) -> Found:
    answer = _first(row, RESPONSE)
    if isinstance(answer, list) and answer:  # as a conversation's last turn
        answer = _turn(answer[-1])["content"]
    return _example(_prompt(row), answer, **_kind(row))


def _example(instruction: str, response: Any, **kept: Any) -> Found:
    response = _text(response, "expected a non-empty response")
    row = {**kept, "instruction": instruction, "response": response}
    return Found("", examples=(row,), prompts=({"prompt": instruction},))


def _asked(number: int, row: Row) -> Found:
    turns = {"turns": row["turns"]} if isinstance(row.get("turns"), list) and len(row["turns"]) > 1 else {}
    return Found("", prompts=({**_kind(row), "prompt": _prompt(row), **turns},))


def _kind(row: Row) -> dict[str, Any]:
    return {"kind": row["kind"]} if "kind" in row else {}


def _prompt(row: Row) -> str:
    said = _asked_in(row)
    if not _opens(said):
        raise _Unusable("a conversation of several turns, which only a ranking may have as its prompt")
    return said[0]["content"]


def _asked_in(row: Row) -> list[dict[str, str]]:
    """Return what was said before the response: of several questions (MT-Bench), the first."""
    found = row.get(_key(row, PROMPT))
    turns = found if isinstance(found, list) and found else [found]
    if isinstance(turns[0], Mapping):
        return _turns(turns)
    expected = f"expected a non-empty text under {', '.join(PROMPT[:-1])} or {PROMPT[-1]}"
    return [{"role": "user", "content": _text(turns[0], expected)}]


def _text(text: Any, expected: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise _Unusable(expected)
    return text


def _key(row: Row, names: Sequence[str]) -> str:
    return next((name for name in names if row.get(name) not in (None, "")), "")


def _first(row: Row, names: Sequence[str]) -> Any:
    return row.get(_key(row, names))


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(name in row for name in names)


def _any(names: Sequence[str]) -> Callable[[Row], bool]:
    return lambda row: bool(_key(row, names))


def _lists(names: Sequence[str]) -> Callable[[Row], bool]:
    return lambda row: isinstance(_first(row, names), list)


_FORMS: tuple[tuple[str, Callable[[Row], bool], Callable[[int, Row], Found]], ...] = (
    ("ranked groups", _lists(RESPONSES), _group),
    ("pairs", _has("chosen", "rejected"), _pair),
    ("labelled pairs", _has("output_1", "output_2", "label"), _labelled),
    ("conversations", _lists(TURNS), _conversation),
    ("self-instruct tasks", lambda row: isinstance(row.get("instances"), list) and "instruction" in row, _task),
    ("alpaca", _has("instruction", "input", "output"), _alpaca),
    ("examples", lambda row: any(name in row for name in RESPONSE), _answered),
    ("prompts", _any(PROMPT), _asked),
)
