"""Published benchmarks: prompts, answers, verdicts and figures as their papers define them.

A benchmark is one module with a SUITE. Its questions are kept out of everything that trains.
"""

from collections.abc import Mapping
from typing import NamedTuple

from srlm_core import data
from srlm_core.config import SuitesConfig
from srlm_core.store import digest
from srlm_core.suites import alpaca_eval, arena_hard, ifeval, mt_bench
from srlm_core.suites.record import Item, Suite

SUITES: dict[str, Suite] = {module.SUITE.name: module.SUITE for module in (alpaca_eval, arena_hard, ifeval, mt_bench)}


class Taken(NamedTuple):
    """A benchmark that this campaign's models take."""

    suite: Suite
    items: list[Item]
    """The questions taken."""
    everything: list[str]
    """All that it asks, whether taken here or not: none of it may train."""

    @property
    def identity(self) -> str:
        """Hash of the questions taken."""
        return digest([list(item[:5]) for item in self.items])


def load(config: SuitesConfig) -> Mapping[str, Taken]:
    """Read the benchmarks that the settings name. Raises DataError where a file is not what it should be."""
    taken: dict[str, Taken] = {}
    for name, suite in SUITES.items():
        where = getattr(config, name)
        if where is None:
            continue
        items = suite.read(where)
        rows = data.spread([{"kind": item.category, "item": item} for item in items], config.questions)
        taken[name] = Taken(suite, [row["item"] for row in rows], [turn for item in items for turn in item.turns])
    return taken
