"""A module of ours in a process of its own, which ends with its parent however that dies.

The parent holds the write end of the child's stdin. When the parent is gone, even by kill -9, the kernel closes that
end, and the child kills its whole session: nothing that it started outlives it. `python -m srlm_core.engines.child
MODULE ARGS…` runs any module, a server too, under the same rule.

Messages, where wanted, are frames of bytes over a socket pair; what is in them is the caller's affair, never a pickle.
"""

import contextlib
import os
import re
import runpy
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Self

PARENT, _CHANNEL = "SRLMPARENT_PID", "SRLM_CHANNEL_FD"
MEETING = "SRLM_RANKS_MEET_AT"
"""A file in which the ranks of one training on one machine find one another."""
_LAST_LINES, _LAST_BYTES = 20, 16_384
_NOISE = re.compile(r"^\s*$|^\s*\^+\s*$|Loading safetensors|FutureWarning|resource_tracker|warnings\.warn\(")
_HEADER = struct.Struct("!I")


class Channel:
    """Frames of bytes between two processes. Any thread may send; one thread receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()

    def send(self, frame: bytes) -> None:
        """Send one frame; raises OSError when the other side is gone."""
        with self._sending:
            self._socket.sendall(_HEADER.pack(len(frame)) + frame)

    def __iter__(self) -> Iterator[bytes]:
        """Yield frames until the other side is gone."""
        with contextlib.suppress(OSError), self._socket.makefile("rb") as stream:
            while len(header := stream.read(_HEADER.size)) == _HEADER.size:
                (size,) = _HEADER.unpack(header)
                if len(frame := stream.read(size)) < size:
                    return
                yield frame

    def close(self) -> None:
        """End both directions, so that a thread waiting in either process wakes."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Child:
    """The parent's handle on a module that runs in a process, session and log of its own."""

    def __init__(
        self,
        module: str,
        args: Sequence[str] = (),
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        channel: bool = False,
    ) -> None:
        """Start `python -m module args`. `env` adds to ours; `log` receives stdout and stderr, appended."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.channel, theirs = log, None, None
        if channel:
            ours, theirs = socket.socketpair()
            self.channel = Channel(ours)
        root = str(
            Path(__file__).parents[2]
        )  # our package must be importable even where the parent only has it on sys.path
        surroundings = os.environ | dict(env or {}) | {
            PARENT: str(os.getpid()),
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        }  # fmt: skip
        if theirs is not None:
            surroundings[_CHANNEL] = str(theirs.fileno())
        with log.open("ab") as words:
            self._said_before = words.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "srlm_core.engines.child", module, *args],
                stdin=subprocess.PIPE, stdout=words, stderr=words, start_new_session=True, env=surroundings,
                pass_fds=() if theirs is None else (theirs.fileno(),),
            )  # fmt: skip
        if theirs is not None:
            theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Return the exit status, negative for a signal; null if it still runs after timeout_s."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def close(self, patience_s: float = 0.0) -> None:
        """End the child and all that it started: give it patience_s to go by itself, then kill its session."""
        if patience_s and self.wait(patience_s) is None:
            self.process.terminate()
            self.wait(min(patience_s, 2.0))
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM where only zombies are left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        if self.channel is not None:
            self.channel.close()

    def last_words(self) -> str:
        """Return the last lines that say something, of those this child wrote."""
        size = self.log.stat().st_size
        with self.log.open("rb") as file:
            file.seek(max(self._said_before, size - _LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join([line for line in lines if not _NOISE.search(line)][-_LAST_LINES:])

    def obituary(self) -> str:
        """Say how it ended, where its log is, and its last words."""
        code = self.wait(5.0)
        if code is None:
            how = "stopped answering"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += " (is the machine out of memory? see `dmesg`)" if -code == signal.SIGKILL else ""
        else:
            how = f"ended with code {code}"
        return f"its process {how}. Log: {self.log}. Its last words:\n{self.last_words() or '(none)'}"


def channel_to_parent() -> Channel:
    """Return the child's end of the channel; raises KeyError in a process that was not started with one."""
    return Channel(socket.socket(fileno=int(os.environ.pop(_CHANNEL))))


def end_with_parent(parent: int | None = None) -> None:
    """Kill our whole session once the parent is gone. For the leader of a session whose stdin is the parent's pipe.

    Where another library starts the process and stdin is no pipe, the parent's pid is all there is to watch.
    """
    if os.getsid(0) != os.getpid():
        return  # started by hand: the session is somebody else's
    lifeline = os.dup(0) if stat.S_ISFIFO(os.fstat(0).st_mode) else None
    with Path(os.devnull).open("rb") as nothing:  # code that reads stdin must not eat the lifeline
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=_watch, args=(lifeline, parent), daemon=True, name="lifeline").start()


def _watch(lifeline: int | None, parent: int | None) -> NoReturn:
    # The pid is asked too: a process forked off the parent may hold a copy of the pipe's write end
    while parent is None or os.getppid() == parent:
        readable, _, _ = select.select([] if lifeline is None else [lifeline], [], [], 1.0)
        if lifeline in readable and not os.read(lifeline, 4096):
            break
    os.killpg(0, signal.SIGKILL)
    time.sleep(60)  # the signal is on its way
    raise SystemExit


def main() -> None:
    """Run the module named on the command line as `__main__`, under the watch."""
    parent = os.environ.pop(PARENT, None)
    end_with_parent(int(parent) if parent else None)
    if len(sys.argv) < 2:
        sys.exit("usage: python -m srlm_core.engines.child MODULE ARGS…")
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
