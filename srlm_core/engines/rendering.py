"""From messages to token ids, the same way in every engine that runs a model itself.

A chat request goes through the checkpoint's own template, its prefix begins the assistant's turn, and the whole text
is tokenized at once; special tokens come from the template alone. A raw request is tokenized as the tokenizer does
by itself, which for some models begins with a BOS token.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from srlm_core.engines.protocol import Message
from srlm_core.errors import ModelError


class Asked(NamedTuple):
    """A prompt, and the tokens that are asked about at its end."""

    prompt: list[int]
    tokens: list[int]


class Renderer:
    """Renders and tokenizes for one checkpoint."""

    def __init__(self, model: Path, *, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        self.name = str(model)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.name, trust_remote_code=trust_remote_code)
        self.ends = frozenset(_declared_ends(model) | {self.tokenizer.eos_token_id} - {None} | self._template_end())
        """Tokens that end an assistant's turn."""

    def text(self, messages: Sequence[Message], prefix: str) -> str:
        """Return the text that the model is to continue."""
        if not messages:
            return prefix
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True) + prefix

    def prompt(self, messages: Sequence[Message], prefix: str) -> list[int]:
        """Return the ids of what the model is to continue."""
        return self._ids(self.text(messages, prefix), chat=bool(messages))

    def scored(self, messages: Sequence[Message], response: str) -> Asked:
        """Return the ids of a prompt and of a response to it, from where the assistant speaks to its end-of-turn token.

        The two are tokenized apart, as they are when the response is drawn and when it is trained on.
        """
        prompt = self.text(messages, "")
        turn: Message = {"role": "assistant", "content": response}
        whole = self.tokenizer.apply_chat_template([*messages, turn], tokenize=False)
        if not whole.startswith(prompt):
            raise ModelError(
                f"expected the chat template of {self.name} to render a prompt as the beginning of prompt and "
                f"response, got {whole[: len(prompt)][-80:]!r} where the prompt ends with {prompt[-80:]!r}. "
                "Mend the chat template."
            )
        response_ids = self._ids(whole[len(prompt) :], chat=True)
        last = max((i for i, token in enumerate(response_ids) if token in self.ends), default=None)
        if last is None:
            raise ModelError(
                f"expected the chat template of {self.name} to end the assistant's turn with one of "
                f"{self.tokenizer.convert_ids_to_tokens(sorted(self.ends))}, got {whole[-40:]!r}. "
                "Set eos_token to what the template writes."
            )
        return Asked(self._ids(prompt, chat=True), response_ids[: last + 1])

    def whole(self, messages: Sequence[Message], response: str) -> list[int]:
        """Return the ids of a prompt and a response to it as one text, to the last word that the template writes.

        That is what reward models are trained on.
        """
        turn: Message = {"role": "assistant", "content": response}
        return self._ids(self.tokenizer.apply_chat_template([*messages, turn], tokenize=False), chat=True)

    def raw(self, prefix: str, response: str) -> Asked:
        """Return the ids of a raw text and of what continues it, split where the text ends.

        The two are tokenized together, as evaluation harnesses do; a space at the end of the text belongs to what
        follows. After no text at all, the tokenizer's own first token, or an end of text, comes before.
        """
        text = prefix.rstrip(" ")
        whole = self._ids(prefix + response, chat=False)
        n_before = len(self._ids(text, chat=False))
        if n_before:
            return Asked(whole[:n_before], whole[n_before:])
        first = self.tokenizer.bos_token_id
        return Asked([self.tokenizer.eos_token_id if first is None else first], whole)

    def choices(self, messages: Sequence[Message], prefix: str, choices: Sequence[str]) -> Asked:
        """Return the ids before the choices, and each choice's one token.

        What all choices begin with belongs to the prompt: some tokenizers make ` 3` a space and a digit. Raises
        ModelError for a choice that is more than one token after that.
        """
        text = self.text(messages, prefix)
        ids = [self._ids(text + choice, chat=bool(messages)) for choice in choices]
        shared = min(_shared(ids), min(map(len, ids)) - 1)
        for choice, its in zip(choices, ids, strict=True):
            if len(its) != shared + 1:
                raise ModelError(
                    f"expected each choice to be one token after {text[-30:]!r}, got {choice!r} as "
                    f"{self.tokenizer.convert_ids_to_tokens(its[shared:])} in the tokenizer of {self.name}. "
                    "Ask for choices that differ in one token, such as single digits."
                )
        return Asked(ids[0][:shared], [its[shared] for its in ids])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text of ids that follow a prompt: some tokenizers drop a space that a text begins with."""
        before = list(prompt[-8:])
        head, whole = self.decode(before), self.decode([*before, *ids])
        return whole[len(head) :] if whole.startswith(head) else self.decode(ids)

    def _ids(self, text: str, *, chat: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=not chat)["input_ids"]

    def _template_end(self) -> set[int]:
        """Return the special token that the template writes after an assistant's words, if it writes one."""
        if not getattr(self.tokenizer, "chat_template", None):
            return set()
        mark = "a3f9"  # stands for a response; no template contains it
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        rest = self.tokenizer.apply_chat_template(turns, tokenize=False).rpartition(mark)[2]
        following = self._ids(rest, chat=True)[:1]
        return set(following) & set(self.tokenizer.all_special_ids)


def _shared(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the longest common beginning."""
    return next(
        (i for i, tokens in enumerate(zip(*sequences, strict=False)) if len(set(tokens)) > 1), min(map(len, sequences))
    )


def _declared_ends(model: Path) -> set[int]:
    return {end for name in ("generation_config.json", "config.json") for end in _eos(model / name)}


def _eos(path: Path) -> Iterable[int]:
    if not path.exists():
        return ()
    declared = json.loads(path.read_text()).get("eos_token_id")
    return (declared,) if isinstance(declared, int) else declared or ()


def context_of(model: Path) -> int | None:
    """Return the positions that the model was made for; null where its config does not say."""
    settings = json.loads((model / "config.json").read_text())
    return settings.get("text_config", settings).get("max_position_embeddings")
