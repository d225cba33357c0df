"""How much more this machine multiplies with all its cores at once than with one: what replicas can gain at most.

`python -m benchmarks.products CORE` multiplies for some seconds on one core, each time it is told to.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from srlm_core.engines import hardware

SECONDS = 2.0


class Products:
    """A process for each core, which waits until it is asked."""

    def __init__(self, workers: list["subprocess.Popen[str]"]) -> None:
        self._workers = workers
        self.gains: list[float] = []

    def measure(self) -> None:
        """Measure one core alone before and after all of them at once, and note their sum over the one's."""
        alone = self._rates(self._workers[:1])
        together = self._rates(self._workers)
        again = self._rates(self._workers[:1])
        self.gains.append(round(sum(together) / statistics.mean(alone + again), 3))

    def _rates(self, workers: list["subprocess.Popen[str]"]) -> list[float]:
        for worker in workers:
            assert worker.stdin
            worker.stdin.write("go\n")
            worker.stdin.flush()
        return [float(worker.stdout.readline()) for worker in workers if worker.stdout]


@contextmanager
def products() -> Iterator[Products]:
    """Start the processes, and end them."""
    with ExitStack() as stack:
        workers = []
        for core in hardware.cores():
            worker = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.products", str(core)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            workers.append(stack.enter_context(worker))
            stack.callback(worker.kill)
        yield Products(workers)


def main(core: int) -> None:
    """Multiply what the small model's layers multiply, [64, 576] by [576, 1536], and print how often a second."""
    os.sched_setaffinity(0, {core})
    import torch

    torch.set_num_threads(1)
    left, right = torch.randn(64, 576), torch.randn(1536, 576)
    for _ in sys.stdin:
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS:
            for _ in range(50):
                torch.nn.functional.linear(left, right)
            done += 50
        sys.stdout.write(f"{done / (time.perf_counter() - began)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
