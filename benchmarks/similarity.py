"""The filter on new prompts, against the plain definition: each candidate compared with everything kept.

And the watch that keeps what measures out of training, over as many prompts.
"""

import random
from collections import defaultdict
from typing import NamedTuple

from rapidfuzz.distance import LCSseq

from benchmarks.sides import Comparison, allowed, in_turn, say, stopwatch
from srlm_core import data
from srlm_core.contamination import Watch
from srlm_core.similarity import Similarity, words

THRESHOLD = 0.7


class Size(NamedTuple):
    candidates: int
    compared: int
    """Candidates that the plain side can afford; both sides run on these."""
    measuring: int
    """Prompts that measure: AlpacaEval, MT-Bench, Arena-Hard, IFEval and a few hundred rankings have as many."""


SIZES = {"cpu": Size(20_000, 2_000, 2_700), "gpu": Size(20_000, 2_000, 2_700)}


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Filter the same candidates both ways, hold the decisions together, and filter all of them our way."""
    decided: dict[str, list[list[bool]]] = {"ours": [], "theirs": []}
    walls: list[float] = []
    watched: list[float] = []

    def ours(r: int) -> float:
        texts = candidates(size.candidates, seed=r)
        with stopwatch() as seconds:
            decided["ours"].append(indexed(texts[: size.compared]))
            few = seconds()
        with stopwatch() as seconds:
            kept = sum(indexed(texts))
            walls.append(round(seconds(), 3))
        with stopwatch() as seconds:
            watch = Watch({"measuring": candidates(size.measuring, seed=r + 1_000)})
            copies = sum(watch.copy_in(text) is not None for text in texts)
            watched.append(round(seconds(), 3))
        say(f"similarity: {kept} of {len(texts)} kept in {walls[-1]:.1f} s, {copies} copies in {watched[-1]:.1f} s")
        return few

    def theirs(r: int) -> float:
        texts = candidates(size.candidates, seed=r)[: size.compared]
        with stopwatch() as seconds:
            decided["theirs"].append(plain(texts))
            return seconds()

    made = Comparison(
        f"similarity filter, {size.compared} candidates", "index by word, then rapidfuzz",
        "the definition: rapidfuzz on everything kept", "s", "at most", 1.0,
    )  # fmt: skip
    in_turn(ours, [(made, theirs)], rounds)
    if decided["ours"] != decided["theirs"]:
        raise SystemExit("similarity: the two sides decided differently")
    return [
        made,
        allowed(f"similarity filter, {size.candidates} candidates", walls, 120, "s"),
        allowed(f"contamination filter, {size.candidates} against {size.measuring} that measure", watched, 60, "s"),
    ]


def indexed(texts: list[str]) -> list[bool]:
    """Say of each text whether the project's filter keeps it."""
    similarity = Similarity(THRESHOLD)
    kept = []
    for text in texts:
        kept.append(similarity.nearest(text) is None)
        if kept[-1]:
            similarity.add(text, "kept")
    return kept


def plain(texts: list[str]) -> list[bool]:
    """Say it by the definition."""
    kept: list[list[str]] = []
    decisions = []
    for new in map(words, texts):
        shared = ((2 * LCSseq.similarity(old, new), len(old) + len(new)) for old in kept)
        decisions.append(all(both <= THRESHOLD * total + 1e-9 for both, total in shared))
        if decisions[-1]:
            kept.append(new)
    return decisions


def candidates(n: int, seed: int) -> list[str]:
    """Make texts like a model's new tasks: chains of word pairs of the shipped instructions, some nearly repeated."""
    rng = random.Random(seed)
    follows: defaultdict[str, list[str]] = defaultdict(list)
    for row in data.load(data.SEED / "instructions.jsonl", "examples").rows:
        for first, second in zip(["", *row["instruction"].split()], [*row["instruction"].split(), ""], strict=True):
            follows[first].append(second)
    made: list[str] = []
    while len(made) < n:
        if made and rng.random() < 0.2:
            chain = rng.choice(made).split()
            chain[rng.randrange(len(chain))] = rng.choice(list(follows))
        else:
            chain = [rng.choice(follows[""])]
            while chain[-1] and len(chain) < 40:
                chain.append(rng.choice(follows[chain[-1]]))
        made.append(" ".join(chain).strip())
    return made
