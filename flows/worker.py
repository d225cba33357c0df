"""A flow run's process and the worker that started it: when the worker is gone, or deaf, the run still ends.

Its engines end with the run's process (srlm_core/engines/child.py), so a worker that was killed leaves nothing that
holds a device, and the campaign is free for the next run.
"""

import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from uuid import UUID

import httpx
from prefect import get_client
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed

STARTED_BY_WORKER = "PREFECT__FLOW_RUN_ID"
"""In the environment of a process that a worker started for a flow run."""
GRACE_S = 20.0
TELL_S = 10.0
LOOK_S = 10.0
DEAF_S = 30.0
"""A worker hears of a cancellation at once, or within ten seconds where its stream of events is cut."""
UNHEARD = "Cancelled by the run itself: its worker did not hear of it."
LEFT = "Its worker is gone, and the run did not end when it was asked to."
RELAY = "trap '' PIPE; cat; exec cat > /dev/null"
"""Hands on what it is given, and takes it all the same once nobody reads on."""
_watching = False
_relays: list[subprocess.Popen[bytes]] = []
"""Kept, since Python warns of a child that is forgotten while it runs."""


def end_with_worker() -> None:
    """Have this process end once its worker is gone, or does not hear that it is cancelled. Else nothing."""
    global _watching
    worker, run_id = os.getppid(), os.environ.get(STARTED_BY_WORKER)
    if _watching or run_id is None:
        return
    _watching = True
    if worker != 1:  # 1: a container's, that ends with its container
        _print_by_relay()
        threading.Thread(target=_watch_worker, args=(worker, UUID(run_id)), daemon=True, name="worker watch").start()
    threading.Thread(target=_watch_run, args=(UUID(run_id),), daemon=True, name="cancellation watch").start()


def _print_by_relay() -> None:
    """Print through a process that outlives the worker, who reads what is printed from pipes.

    Once nobody reads a pipe, printing fails: Rich then ends the process, amid Prefect's word that the run crashed.
    """
    for stream in (1, 2):
        if stat.S_ISFIFO(os.fstat(stream).st_mode):
            relay = subprocess.Popen(
                ["sh", "-c", RELAY], stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.DEVNULL,
                start_new_session=True,  # what ends the run's process group must not take its words away
            )  # fmt: skip
            assert relay.stdin is not None
            os.dup2(relay.stdin.fileno(), stream)
            relay.stdin.close()
            _relays.append(relay)


def _watch_worker(worker: int, run_id: UUID) -> None:
    while os.getppid() == worker:
        time.sleep(1.0)
    _end(partial(_say_crashed, run_id))


def _say_crashed(run_id: UUID) -> None:
    """Tell what nobody else will: a run that is not told to have crashed is running, in the pages, until it is lost."""
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run_id).state
        if state is None or not state.is_final():
            client.set_flow_run_state(run_id, Crashed(message=LEFT), force=True)


def _watch_run(run_id: UUID) -> None:
    """Cancel the run ourselves where nobody does: after a server was away, Prefect's worker hears of it no more."""
    asked_at: float | None = None
    with get_client(sync_client=True) as client:
        while True:
            time.sleep(LOOK_S)
            try:
                state = client.read_flow_run(run_id).state
                asked = state is not None and state.is_cancelling()
                asked_at = (asked_at or time.monotonic()) if asked else None
                if asked_at is not None and time.monotonic() - asked_at >= DEAF_S:
                    client.set_flow_run_state(run_id, Cancelled(message=UNHEARD), force=True)
                    break
            except httpx.HTTPError:
                continue  # the server is away: it is asked again
            except ObjectNotFound:
                return  # somebody deleted the run, so that nobody can cancel it
    _end()


def _end(last_word: Callable[[], None] | None = None) -> None:
    """End this process as a signal would, which says so itself; else say the last word, and end it by force."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    if last_word is not None:  # in a thread: whoever hangs may hold a lock that it needs
        saying = threading.Thread(target=last_word, daemon=True)
        saying.start()
        saying.join(TELL_S)
    os.kill(os.getpid(), signal.SIGKILL)
