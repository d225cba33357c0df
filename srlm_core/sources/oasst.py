"""Open Assistant's message trees (Köpf et al. 2023, arXiv:2304.07327): flat messages, or one tree a line.

An instruction is a tree's first message and its answer the reply that people ranked best: the paper's IFT
(arXiv:2401.10020 section 3.1.1). Two or more ranked replies to one message, at any depth, are a ranked group: its EFT.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from srlm_core.sources.forms import Found, Reply, SetAside, n_ordered_pairs, ranking


class Message(NamedTuple):
    """One message, with where it stands."""

    line: int
    tree: str
    id: str
    parent: str | None
    role: str
    text: str
    language: str
    rank: int | None
    wrong: str | None
    """Why it cannot be used, whatever its tree is."""


class Told(NamedTuple):
    """The messages of one row."""

    form: str
    messages: list[Message]
    set_aside: list[SetAside]


def messages_of(number: int, row: Mapping[str, Any]) -> Told | None:
    """Read a row as a message or as a tree of them; None where it is neither."""
    if {"message_id", "parent_id", "text", "role"} <= row.keys():
        return _told("oasst messages", number, [row])
    if isinstance(row.get("prompt"), Mapping) and "message_tree_id" in row:
        return _told("oasst trees", number, list(_flat(row["prompt"], None, row["message_tree_id"])))
    return None


def _told(form: str, number: int, rows: Sequence[Mapping[str, Any]]) -> Told:
    messages: list[Message] = []
    aside: list[SetAside] = []
    for row in rows:
        if not isinstance(row.get("message_id"), str) or row.get("role") not in ("prompter", "assistant"):
            reason = "expected a message with a message_id and the role prompter or assistant"
            aside.append(SetAside(number, reason, str(row)[:300]))
        else:
            messages.append(_message(number, row))
    return Told(form, messages, aside)


def _flat(root: Mapping[str, Any], parent: str | None, tree: str) -> Iterator[dict[str, Any]]:
    """Walk a nested tree, without recursion: a conversation may be long."""
    todo: list[tuple[Mapping[str, Any], str | None]] = [(root, parent)]
    while todo:
        message, parent = todo.pop()
        yield {**message, "parent_id": parent, "message_tree_id": tree}
        replies = message.get("replies")
        known = [reply for reply in replies if isinstance(reply, Mapping)] if isinstance(replies, list) else []
        todo += [(reply, message.get("message_id")) for reply in reversed(known)]


def _message(number: int, row: Mapping[str, Any]) -> Message:
    text, rank, parent = row.get("text"), row.get("rank"), row.get("parent_id")
    return Message(
        line=number,
        tree=str(row.get("message_tree_id") or row["message_id"]),
        id=row["message_id"],
        parent=parent or None,
        role=row["role"],
        text=text if isinstance(text, str) else "",
        language=str(row.get("lang") or ""),
        rank=int(rank) if isinstance(rank, int | float) and not isinstance(rank, bool) and rank == rank else None,
        wrong=_wrong(row),
    )


def _wrong(row: Mapping[str, Any]) -> str | None:
    if row.get("deleted"):
        return "deleted"
    if row.get("review_result") is False:
        return "failed its review"
    if row.get("synthetic"):
        return "written by a model"
    return None if isinstance(row.get("text"), str) and row["text"].strip() else "an empty text"


def read_trees(messages: Sequence[Message], language: str) -> Found:
    """Find the instructions, the examples and the ranked groups of all trees; the first message gives the language."""
    trees = _Trees(messages, language)
    read = [*map(trees.read, trees.prompters())]
    groups = [found.groups[0] for found in read if found.groups]
    first = [group for group in groups if "turns" not in group]
    return Found(
        "",
        examples=tuple(row for found in read for row in found.examples),
        groups=tuple(groups),
        prompts=tuple(row for found in read for row in found.prompts),
        n_ordered_pairs=sum(found.n_ordered_pairs for found in read),
        set_aside=(*trees.set_aside, *(aside for found in read for aside in found.set_aside)),
        counts={
            "trees": len({message.tree for message in messages}),
            "messages": len(messages),
            "languages": dict(Counter(root.language for root in trees.roots).most_common()),
            "first_turn": {"ranked_groups": len(first), "ordered_pairs": sum(map(n_ordered_pairs, first))},
        },
    )


class _Trees:
    """Messages by id and by parent, and which of them can be used."""

    def __init__(self, messages: Sequence[Message], language: str) -> None:
        self.set_aside: list[SetAside] = []
        self._by_id: dict[str, Message] = {}
        for message in messages:
            if message.id in self._by_id:
                self._put_aside(message, "its message_id occurs before")
            else:
                self._by_id[message.id] = message
        self._replies: defaultdict[str, list[Message]] = defaultdict(list)
        for message in self._by_id.values():
            if message.parent:
                self._replies[message.parent].append(message)
        self.roots = [message for message in self._by_id.values() if not message.parent]
        self._usable: dict[str, list[dict[str, str]]] = {}
        """What was said up to a usable message, itself included."""
        self._look(language)

    def _put_aside(self, message: Message, reason: str) -> None:
        self.set_aside.append(SetAside(message.line, reason, message.text[:300]))

    def _look(self, language: str) -> None:
        """Go down from the roots: nothing below what cannot be used can be used."""
        reached: set[str] = set()
        todo: list[tuple[Message, list[dict[str, str]], str | None]] = []
        for root in self.roots:
            wrong = None if root.role == "prompter" else "a first message that asks nothing"
            foreign = f"another language: {root.language}" if root.language not in ("", language) else None
            todo.append((root, [], foreign or wrong))
        while todo:
            message, before, above = todo.pop()
            reached.add(message.id)
            wrong = above or message.wrong
            if wrong:
                self._put_aside(message, wrong)
                above = above or "below a message that is set aside"
            role = "user" if message.role == "prompter" else "assistant"
            said = [*before, {"role": role, "content": message.text}]
            if not wrong:
                self._usable[message.id] = said
            todo += [(reply, said, above) for reply in reversed(self._replies[message.id])]
        for message in self._by_id.values():
            if message.id not in reached:
                self._put_aside(message, "its parent is not in the file")

    def prompters(self) -> list[Message]:
        """List the usable messages of people, in the file's order."""
        return [m for m in self._by_id.values() if m.role == "prompter" and m.id in self._usable]

    def read(self, message: Message) -> Found:
        """Read one message of a person: what it asks, its best reply, its ranked replies."""
        said = self._usable[message.id]
        replies = [r for r in self._replies[message.id] if r.role == "assistant" and r.id in self._usable]
        rated = [Reply(r.text, float(r.rank)) for r in replies if r.rank is not None]
        found = ranking(message.line, said, rated)
        aside = [SetAside(r.line, "a reply without a rank", r.text[:300]) for r in replies if r.rank is None]
        best = [reply.text for reply in rated if reply.bad == 0]
        if found.prompts and not best:
            aside.append(SetAside(message.line, "no example: its best-ranked reply is not there", message.text[:300]))
        examples = [{"instruction": message.text, "response": text} for text in best[:1] if found.prompts]
        return found._replace(examples=tuple(examples), set_aside=(*aside, *found.set_aside))
