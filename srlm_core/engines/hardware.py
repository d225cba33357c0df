"""What this machine can run, found without importing torch."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple


class Placement(NamedTuple):
    """Where one replica of an engine runs."""

    threads: int
    cores: tuple[int, ...] = ()
    """That its threads are bound to; none = wherever there is room."""
    gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them; none = all there are."""
    on_gpu: bool = False

    def visible(self) -> dict[str, str]:
        """Return the environment that shows a process these GPUs alone."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}


class Machine(NamedTuple):
    """What settings are chosen by."""

    cores: int
    gpus: int
    bfloat16: bool
    """Whether its products are native."""
    free_memory: int
    """Bytes."""
    why_not_vllm: str | None


def here() -> Machine:
    """Describe this machine."""
    return Machine(len(cores()), len(gpus()), multiplies_bfloat16(), free_memory(), why_not_vllm())


@cache
def gpus() -> tuple[str, ...]:
    """Return the CUDA devices that torch may use, as CUDA_VISIBLE_DEVICES names them; none if torch has no CUDA."""
    if not _torch_has_cuda():
        return ()
    found = _nvidia_smi("index")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not found:
        return tuple(found)
    return tuple(name.strip() for name in visible.split(",") if name.strip() not in ("", "-1"))


@cache
def cpu_flags() -> frozenset[str]:
    """Return the instruction sets of the processor, in the names of /proc/cpuinfo; none where that file is not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(
        flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":", 1)[1].split()
    )


def cores() -> tuple[int, ...]:
    """Return the processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 products are native: compute capability 8 or more, or AMX, AVX512-bf16, Arm's bf16."""
    if gpus():
        return all(float(capability) >= 8 for capability in _nvidia_smi("compute_cap"))
    return bool(cpu_flags() & {"amx_bf16", "avx512_bf16", "bf16"})


def why_not_vllm() -> str | None:
    """Say what keeps vLLM from running here; null if nothing does."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    if gpus():
        return None
    if sys.platform != "linux":
        return f"vllm needs Linux, this is {platform.system()}"
    if platform.machine() == "x86_64" and "avx2" not in cpu_flags():
        return "vllm on CPU needs AVX2, which this processor lacks"
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"vllm has no build for {platform.machine()}"
    return None


def free_memory() -> int:
    """Return the bytes of memory that can be had without swapping."""
    import psutil

    return psutil.virtual_memory().available


def openmp(place: Placement) -> dict[str, str]:
    """Return an environment that gives each of a replica's processors one OpenMP thread.

    Intel's OpenMP, where its package is installed, lets waiting threads sleep after 5 ms. GNU's let them spin: on a
    machine that does anything else, a thread that is waited for then waits for one that is only waiting.
    """
    threads = {"OMP_NUM_THREADS": str(place.threads)}
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    if sys.platform == "linux" and platform.machine() == "x86_64" and library.exists():
        bound = f"granularity=fine,explicit,proclist=[{','.join(map(str, place.cores))}]" if place.cores else "disabled"
        return threads | {"LD_PRELOAD": str(library), "KMP_AFFINITY": bound, "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
    return threads | {"OMP_WAIT_POLICY": "PASSIVE"}


def _torch_has_cuda() -> bool:
    try:
        return (
            sys.platform == "linux"
            and not version("torch").endswith(("+cpu", "+xpu"))
            and "+rocm" not in version("torch")
        )
    except PackageNotFoundError:
        return False


@cache
def _nvidia_smi(column: str) -> tuple[str, ...]:
    if (program := shutil.which("nvidia-smi")) is None:
        return ()
    asked = subprocess.run(
        [program, f"--query-gpu={column}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return tuple(line.strip() for line in asked.stdout.splitlines() if line.strip()) if asked.returncode == 0 else ()
