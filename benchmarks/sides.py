"""Two sides in turn, several times in one run. What is believed is the ratio within a round, not a time."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from srlm_core.engines import hardware

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "trl", "vllm", "rapidfuzz", "pyarrow", "prefect", "mlflow")


@dataclass
class Comparison:
    """One line of evidence: what ours and the other side took, round by round."""

    name: str
    ours_is: str
    theirs_is: str
    unit: str
    """Of both sides: `s`, `tok/s`, `rows/s`."""
    want: str
    """`at most` or `at least`: which way the ratio ours / theirs should go."""
    aim: float
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    limit: float | None = None
    """The most (for rates) or least (for times) that the hardware allows our side, where it can be computed."""
    limit_is: str = ""
    also: dict[str, Any] = field(default_factory=dict)
    """Whatever else was seen in the same run."""

    @property
    def ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.ratios)

    @property
    def reached(self) -> bool:
        return self.ratio <= self.aim if self.want == "at most" else self.ratio >= self.aim

    @property
    def share_of_limit(self) -> float | None:
        """How near our side came to the limit, 1 = at it."""
        if self.limit is None:
            return None
        mine = statistics.median(self.ours)
        return self.limit / mine if self.unit == "s" else mine / self.limit

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        told = {key: value for key, value in vars(self).items() if value not in (None, "", {})}
        spread = [round(min(self.ratios), 4), round(max(self.ratios), 4)]
        told |= {"ratio": round(self.ratio, 4), "ratio_spread": spread, "reached": self.reached}
        return told | ({"share_of_limit": round(self.share_of_limit, 4)} if self.share_of_limit else {})

    def __str__(self) -> str:
        mine, other = statistics.median(self.ours), statistics.median(self.theirs)
        low, high = min(self.ratios), max(self.ratios)
        lines = [
            self.name,
            f"  ours    {mine:10.4g} {self.unit}   {self.ours_is}",
            f"  theirs  {other:10.4g} {self.unit}   {self.theirs_is}",
            f"  ratio   {self.ratio:10.3f}     {low:.3f} to {high:.3f} over {len(self.ours)} round(s); "
            f"{self.want} {self.aim:g}: {'reached' if self.reached else 'NOT REACHED'}",
        ]
        if self.share_of_limit is not None:
            lines.append(f"  limit   {self.limit:10.4g} {self.unit}   {self.share_of_limit:.0%} of it: {self.limit_is}")
        lines += [f"  {key}: {json.dumps(value)}" for key, value in self.also.items()]
        return "\n".join(lines)


Side = Callable[[int], float]
"""Does round r's work and returns what it took, in the comparison's unit."""


def in_turn(ours: Side, others: Sequence[tuple[Comparison, Side]], rounds: int, *, ours_first: bool = False) -> None:
    """Fill comparisons, each with its other side; our side runs once a round for all of them.

    The side that begins changes from round to round, so that a drift of the machine cancels. `ours_first`: ours always
    begins, where the other sides are given what ours made.
    """
    sides = [ours, *(side for _, side in others)]
    for r in range(rounds):
        first = 0 if ours_first else r % len(sides)
        order = [*range(first, len(sides)), *range(first)]
        took = {i: round(sides[i](r), 5) for i in order}
        for i, (comparison, _) in enumerate(others, start=1):
            comparison.ours.append(took[0])
            comparison.theirs.append(took[i])
            say(f"{comparison.name}: round {r + 1}/{rounds}: {took[0]:.4g} and {took[i]:.4g}")


def allowed(name: str, taken: list[float], most: float, unit: str) -> Comparison:
    """Hold what ours took against what the project allows itself."""
    made = Comparison(name, "taken", "allowed", unit, "at most", 1.0)
    made.ours, made.theirs = taken, [most] * len(taken)
    return made


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Give a function that says the seconds since."""
    began = time.perf_counter()
    yield lambda: time.perf_counter() - began


def say(text: str) -> None:
    """Tell how far it is, beside what is printed as the result."""
    os.write(2, f"{text}\n".encode())


def arithmetic(batch: int, dtype: str) -> float | None:
    """Measure the product of [batch, 576] and [576, 1536], the small model's layers, in FLOP/s; None on a GPU."""
    if hardware.gpus():
        return None
    import torch

    number = getattr(torch, dtype)
    left, right = torch.randn(batch, 576, dtype=number), torch.randn(1536, 576, dtype=number)
    best = float("inf")
    for _ in range(5):
        with stopwatch() as seconds:
            for _ in range(50):
                torch.nn.functional.linear(left, right)
            best = min(best, seconds() / 50)
    return 2 * batch * 576 * 1536 / best


def machine() -> dict[str, Any]:
    """Say what this was measured on."""
    named = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout if hardware.gpus() else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in hardware.cpu_flags()]
    return {
        "processor": named[0] if named else platform.processor(), "cores": len(hardware.cores()),
        "vectors": vectors, "memory_gib": round(memory, 1), "gpus": gpus.splitlines(),
        "system": platform.platform(), "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))}, "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def results(benchmark: str) -> Path:
    """Name the file where results are committed: one a benchmark and kind of machine."""
    here = machine()
    vectors = here["vectors"][-1] if here["vectors"] else platform.machine()
    kind = f"{len(here['gpus'])}-gpu" if here["gpus"] else f"{here['cores']}-core-{vectors}"
    return RESULTS / kind / f"{benchmark}.json"


def require_alike(earlier: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse to add to rounds of another machine, other versions or other sizes."""
    here = machine()
    for said, before, now in [
        *((name, earlier["machine"][name], here[name]) for name in ("processor", "cores", "gpus", "packages")),
        *((name, earlier["settings"].get(name), value) for name, value in settings.items()),
    ]:
        if before != now:
            raise SystemExit(f"--more: expected {said} of the rounds that are kept, {before}, got {now}. Leave it out.")


def add_rounds(earlier: list[dict[str, Any]], made: list[Comparison]) -> None:
    """Put the rounds of an earlier run before those just made."""
    for comparison in made:
        for result in earlier:
            if (result["name"], result["theirs_is"]) == (comparison.name, comparison.theirs_is):
                comparison.ours[:0], comparison.theirs[:0] = result["ours"], result["theirs"]
                seen = {name: value for name, value in result.get("also", {}).items() if isinstance(value, list)}
                comparison.also |= {name: value + comparison.also.get(name, []) for name, value in seen.items()}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _commit() -> str:
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()
