"""contamination: what measures must not train. Copies of measuring prompts are found in whatever else comes in.

A copy has the same words (however it is cased, punctuated or spaced), nearly the same, or holds the whole of a
measuring prompt of eight words or more. Nearly the same: a ROUGE-L F above 0.7, by which new prompts are told apart
too, and two thirds of the words in common, a word weighing as much as it is rare: "What is the capital of" is no copy.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from srlm_core.similarity import Similarity

THRESHOLD = 0.7
IN_COMMON = 2 / 3
RUN = 8
"""Words of a measuring prompt from which on it is looked for inside longer texts: fewer may stand there by chance."""


def words(text: str) -> list[str]:
    """Split into words of any script, without case, accents' encoding or punctuation."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


class Copy(NamedTuple):
    """What a text is a copy of."""

    measures: str
    """The set that the measuring prompt is of."""
    prompt: str
    how: str
    """`the same words as`, `nearly the same words as`, or `holds`."""

    def __str__(self) -> str:
        return f"{self.how} a prompt that measures ({self.measures}): {' '.join(self.prompt.split())[:100]!r}"


class Watch:
    """Knows every prompt that measures."""

    def __init__(self, measuring: Mapping[str, Iterable[str]]) -> None:
        self._prompts: list[tuple[str, str]] = []
        self._whole: dict[tuple[str, ...], int] = {}
        self._begins: defaultdict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
        self._similar = Similarity(THRESHOLD, words)
        self._frequency: Counter[str] = Counter()
        """In how many measuring prompts a word stands."""
        for name, texts in measuring.items():
            for text in texts:
                self._learn(name, text)

    def _learn(self, name: str, text: str) -> None:
        said = tuple(words(text))
        if not said or said in self._whole:
            return
        place = self._whole[said] = len(self._prompts)
        self._prompts.append((name, text))
        self._similar.add(text, str(place))
        self._frequency.update(set(said))
        if len(said) >= RUN:
            self._begins[said[:RUN]].append(said)

    def copy_in(self, text: str) -> Copy | None:
        """Return the measuring prompt that a text copies, or None."""
        said = tuple(words(text))
        if said in self._whole:
            return self._copy(self._whole[said], "the same words as")
        for at in range(len(said) - RUN + 1):
            for run in self._begins.get(said[at : at + RUN], ()):
                if said[at : at + len(run)] == run:
                    return self._copy(self._whole[run], "holds")
        near = (int(place) for place in self._similar.alike(text))
        alike = (place for place in near if self._in_common(said, words(self._prompts[place][1])) >= IN_COMMON)
        return next((self._copy(place, "nearly the same words as") for place in alike), None)

    def _in_common(self, a: Sequence[str], b: Sequence[str]) -> float:
        """Return the share of two texts' words that both have, each weighed by how rare it is, in [0, 1]."""
        first, second = Counter(a), Counter(b)
        both = self._weight(first) + self._weight(second)
        return 2 * self._weight(first & second) / both

    def _weight(self, said: Mapping[str, int]) -> float:
        # a word that no prompt has is as rare as one that one has, and one that all have weighs something too
        often = {word: max(1, self._frequency[word]) for word in said}
        return sum(count * math.log((len(self._prompts) + 2) / (often[word] + 1)) for word, count in said.items())

    def _copy(self, place: int, how: str) -> Copy:
        return Copy(*self._prompts[place], how)

    def sift(
        self, rows: Sequence[Mapping[str, Any]], texts_of: Callable[[Mapping[str, Any]], Sequence[str]]
    ) -> tuple[list[Any], list[tuple[Any, Copy]]]:
        """Split rows into those that copy nothing and those that do, each with what it copies."""
        clean: list[Any] = []
        copies: list[tuple[Any, Copy]] = []
        for row in rows:
            found = next((copy for text in texts_of(row) if (copy := self.copy_in(text))), None)
            if found:
                copies.append((row, found))
            else:
                clean.append(row)
        return clean, copies
