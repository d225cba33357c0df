"""A child ends with its parent, takes its own children with it, and leaves its last words."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from srlm_core.engines.child import Child

ROOT = Path(__file__).parents[2]
FAMILY = """
import pathlib, subprocess, sys, time
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
import os
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {grandchild.pid}")
time.sleep(600)
"""
ECHO = """
from srlm_core.engines.child import channel_to_parent
channel = channel_to_parent()
for frame in channel:
    if frame == b"die":
        raise RuntimeError("the reason why")
    channel.send(frame[::-1])
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a module that a child can be told to run; returns its name."""

    def write(text: str, name: str = "told_to_run") -> str:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return name

    return write


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
        status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
        return bool(status.strip()) and not status.startswith("Z")
    except ProcessLookupError:
        return False


def wait_until(claim, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not claim() and time.monotonic() < deadline:
        time.sleep(0.05)
    return claim()


def pids_in(path: Path) -> list[int]:
    assert wait_until(lambda: path.exists() and len(path.read_text().split()) == 2)
    return [int(pid) for pid in path.read_text().split()]


def test_closing_ends_the_child_and_what_it_started(module, tmp_path):
    with Child(module(FAMILY), [str(tmp_path / "pids")], log=tmp_path / "log"):
        pids = pids_in(tmp_path / "pids")
        assert all(map(alive, pids))
    assert wait_until(lambda: not any(map(alive, pids)))


def test_a_parent_killed_by_kill_9_takes_the_whole_family_with_it(module, tmp_path):
    name = module(FAMILY)
    parent = subprocess.Popen(
        [sys.executable, "-c",
         f"from pathlib import Path; from srlm_core.engines.child import Child; import time\n"
         f"Child({name!r}, [{str(tmp_path / 'pids')!r}], log=Path({str(tmp_path / 'log')!r})); time.sleep(600)"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )  # fmt: skip
    pids = pids_in(tmp_path / "pids")
    assert all(map(alive, pids))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert wait_until(lambda: not any(map(alive, pids)), 5)


def test_frames_of_any_length_go_both_ways(module, tmp_path):
    with Child(module(ECHO), log=tmp_path / "log", channel=True) as child:
        answers = iter(child.channel)
        for frame in (b"abc", b"", b"x" * 300_000):
            child.channel.send(frame)
            assert next(answers) == frame[::-1]


def test_a_child_that_dies_leaves_its_last_words(module, tmp_path):
    (tmp_path / "log").write_text("what an earlier child said\n")
    with Child(module(ECHO), log=tmp_path / "log", channel=True) as child:
        child.channel.send(b"die")
        assert list(child.channel) == []
        words = child.obituary()
    assert "ended with code 1" in words
    assert "RuntimeError: the reason why" in words
    assert "earlier child" not in words


def test_arguments_reach_the_module_and_stdin_is_empty(module, tmp_path):
    name = module("import sys; print(sys.argv[1:], repr(sys.stdin.read()))")
    with Child(name, ["--port", "8000"], log=tmp_path / "log") as child:
        assert child.wait(20) == 0
        assert child.last_words() == "['--port', '8000'] ''"


def test_the_module_imports_nothing_heavy():
    told = (
        "import sys, srlm_core.engines.child\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'vllm') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"
