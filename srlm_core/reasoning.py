"""reasoning: a response cut into its steps, and what their scores come to (process rewards, idea of arXiv:2503.03746).

How a response is cut, and how scores are put together, is ours.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Literal

MOST = 20
"""Steps of a response; what comes after the last but one is one step. The paper searches at most 20."""
Together = Literal["min", "mean", "last"]

# `1.`, `(2)`, `3:` and `Step 4`, also as a heading or in bold, at the left margin; not `1.5` and no year
_NUMBERED = re.compile(r" {0,3}[#*_]{0,6} ?(?:step\s*\d{1,3}\b|\(?\d{1,3}[.):](?=[\s*_]|$))", re.IGNORECASE)
_FENCE = re.compile(r" {0,3}(?:```|~~~)")


def cut(response: str, most: int = MOST) -> list[str]:
    """Cut a response into its steps, in order; together they are the response, white space apart.

    A line that is numbered or says `Step n` begins a step, and so does a paragraph that is not indented; where there is
    neither, each line that is not empty is one. What is fenced as code stays whole. From the step number `most` on all
    is one step. A response without a text is one empty step.
    """
    lines = response.strip().splitlines()
    free = [at for at, inside in enumerate(_fenced(lines)) if at and not inside and lines[at].strip()]
    begins = [at for at in free if _NUMBERED.match(lines[at]) or _is_paragraph(lines, at)]
    if not begins and not _NUMBERED.match(response.strip()):
        begins = free
    bounds = [0, *begins[: most - 1], len(lines)]
    return ["\n".join(lines[a:b]).strip() for a, b in itertools.pairwise(bounds)]


def _is_paragraph(lines: Sequence[str], at: int) -> bool:
    return not lines[at - 1].strip() and not lines[at][0].isspace()


def _fenced(lines: Sequence[str]) -> list[bool]:
    """Say of each line whether it stands inside a block of code, the fence that ends it included."""
    inside, found = False, list[bool]()
    for line in lines:
        found.append(inside)
        inside ^= bool(_FENCE.match(line))
    return found


def together(scores: Sequence[float], how: Together) -> float:
    """Make one score of the steps'. 4, 2, 5: the lowest 2, the mean 3.67, the last 5."""
    if how == "mean":
        return math.fsum(scores) / len(scores)
    return min(scores) if how == "min" else scores[-1]
