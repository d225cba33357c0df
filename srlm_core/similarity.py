"""similarity: is a text nearly one of many? ROUGE-L over words, without looking at most of the many.

Self-Instruct's filter on new prompts (arXiv:2212.10560), and what keeps the prompts that measure out of training.
"""

import math
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from rapidfuzz.distance import LCSseq


def words(text: str) -> list[str]:
    """Split as ROUGE does: lower case, letters and digits only, no stemmer."""
    return re.findall(r"[a-z0-9]+", text.lower())


class Similarity:
    """ROUGE-L F of one text against many: 2 LCS / (m + n) over words, exact.

    Few are compared, and the others not even looked at: a similar text holds one of the new one's rarest words, and an
    index by length and word says which texts do.
    """

    def __init__(self, threshold: float, split: Callable[[str], list[str]] = words) -> None:
        self.threshold = threshold
        self._split = split
        self._alphabet: dict[str, str] = {}
        self._texts, self._ends = bytearray(), array("Q", [0])  # end to end: a str of each would take thrice the memory
        self._labels: list[str] = []
        self._frequency: Counter[str] = Counter()
        self._holders: defaultdict[int, defaultdict[str, array[int]]] = defaultdict(_places_by_word)

    def __len__(self) -> int:
        return len(self._labels)

    def _text(self, place: int) -> str:
        return self._texts[self._ends[place] : self._ends[place + 1]].decode("utf-32-le", "surrogatepass")

    def add(self, text: str, label: str) -> None:
        """Remember a text; `label` names it when another is too similar."""
        # one character per distinct word: the string metric then compares words at the speed of letters
        alphabet = self._alphabet
        encoded = "".join(alphabet.setdefault(word, chr(0x100 + len(alphabet))) for word in self._split(text))
        for word in set(encoded):
            self._holders[len(encoded)][word].append(len(self))
            self._frequency[word] += 1
        self._texts += encoded.encode("utf-32-le", "surrogatepass")
        self._ends.append(len(self._texts))
        self._labels.append(label)

    def forget(self, size: int) -> None:
        """Forget all texts but the first `size`."""
        for place in reversed(range(size, len(self))):
            encoded = self._text(place)
            for word in set(encoded):
                self._holders[len(encoded)][word].pop()
                self._frequency[word] -= 1
        del self._ends[size + 1 :], self._labels[size:]
        del self._texts[self._ends[-1] :]

    def nearest(self, text: str) -> str | None:
        """Return the label of the first remembered text whose similarity is above the threshold, or None."""
        return next(self.alike(text), None)

    def alike(self, text: str) -> Iterator[str]:
        """Yield the labels of all remembered texts whose similarity is above the threshold, in order."""
        # what no remembered text has may all be one character: it matches nothing
        new = "".join(self._alphabet.get(word, "\0") for word in self._split(text))
        by_rarity = sorted(new, key=self._frequency.__getitem__)
        places: list[int] = []
        for length, holders in self._holders.items():
            least = self._least(len(new), length)
            if least <= min(len(new), length):
                # a common subsequence of `least` words leaves out too few to miss all of these
                rare = by_rarity[: len(new) - least + 1]
                places += set().union(*(holders[word] for word in rare if word in holders))
        for place in sorted(places):
            old = self._text(place)
            least = self._least(len(new), len(old))
            if LCSseq.similarity(new, old, score_cutoff=least) >= least:
                yield self._labels[place]

    def _least(self, m: int, n: int) -> int:
        """Return the shortest LCS by which texts of m and n words are too similar: 2 LCS / (m + n) > threshold."""
        # it is a whole number, so that rounding hides below a billionth
        return math.floor(self.threshold * (m + n) / 2 + 1e-9) + 1


def _places_by_word() -> "defaultdict[str, array[int]]":
    return defaultdict(lambda: array("I"))


def rouge_l(a: str, b: str) -> float:
    """Return the ROUGE-L F measure of two texts, in [0, 1]."""
    first, second = words(a), words(b)
    total = len(first) + len(second)
    return 2 * LCSseq.similarity(first, second) / total if total else 0.0
