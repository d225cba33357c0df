"""A flow run's process beside a worker that does not hear, or is gone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import psutil
import pytest
from flow_runs import client

from flows import worker
from flows.server import PrefectServer

pytestmark = [pytest.mark.prefect, pytest.mark.cluster]

RUN = """
import time
from flows import worker
worker.LOOK_S, worker.DEAF_S = 0.2, 0.5
worker.end_with_worker()
print("begun", flush=True)
time.sleep(120)
"""


@contextmanager
def process_of_a_run(
    server: PrefectServer, *code: str, pass_fds: Sequence[int] = ()
) -> Iterator[tuple[Any, UUID, "subprocess.Popen[bytes]"]]:
    """A run that Prefect takes for running, and a Python process that a worker seems to have started for it."""
    from prefect import flow
    from prefect.states import Running

    @flow
    def running() -> None: ...

    with client() as here:
        run_id = here.create_flow_run(running).id
        here.set_flow_run_state(run_id, Running(), force=True)
        given = os.environ | {"PREFECT_API_URL": server.url, worker.STARTED_BY_WORKER: str(run_id)}
        with subprocess.Popen(
            [sys.executable, "-c", *code], env=given, stdout=subprocess.PIPE, pass_fds=pass_fds
        ) as process:
            try:
                yield here, run_id, process
            finally:
                process.kill()


def test_a_run_whose_worker_does_not_hear_that_it_is_cancelled_cancels_itself(server: PrefectServer) -> None:
    from prefect.states import Cancelling

    with process_of_a_run(server, RUN) as (here, run_id, process):
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        time.sleep(2)
        assert process.poll() is None  # nobody has asked it to end
        here.set_flow_run_state(run_id, Cancelling())
        assert process.wait(30) == -signal.SIGTERM
        state = here.read_flow_run(run_id).state
    assert state.is_cancelled()
    assert state.message == worker.UNHEARD


HANGS = """
import signal, time
from flows import worker
signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker.GRACE_S = 0.5
worker.end_with_worker()
print("begun", flush=True)
time.sleep(120)
"""
WORKER = """
import subprocess, sys, time
run = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
run.stdout.readline()
print(run.pid, flush=True)
time.sleep(120)
"""


def test_a_run_that_hangs_when_its_worker_is_gone_is_told_to_have_crashed(server: PrefectServer) -> None:
    with process_of_a_run(server, WORKER, HANGS) as (here, run_id, of_worker):
        assert of_worker.stdout is not None
        left = psutil.Process(int(of_worker.stdout.readline()))
        of_worker.kill()
        left.wait(30)
        state = here.read_flow_run(run_id).state
    assert state.is_crashed()
    assert state.message == worker.LEFT


PRINTS = """
import os, signal, sys, time
from flows import worker

def asked(*_):
    print("ending", flush=True)
    sys.stderr.write("ending")
    os.write(int(sys.argv[1]), b"as asked")
    os._exit(0)

signal.signal(signal.SIGTERM, asked)
worker.end_with_worker()
print("begun", flush=True)
while True:
    print("going on", flush=True)
    time.sleep(0.01)
"""
READS = """
import subprocess, sys
given = int(sys.argv[2])
run = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(given)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                       pass_fds=[given])
while line := run.stdout.readline():
    print(line.decode().strip(), flush=True)
"""


def test_a_run_whose_worker_is_gone_can_still_print_until_it_has_ended(server: PrefectServer) -> None:
    """Prefect's own lines are printed by Rich, which ends the process where nobody reads them."""
    said, of_run = os.pipe()
    with process_of_a_run(server, READS, PRINTS, str(of_run), pass_fds=[of_run]) as (_, _, of_worker):
        os.close(of_run)
        assert of_worker.stdout is not None
        assert [of_worker.stdout.readline() for _ in range(2)] == [b"begun\n", b"going on\n"]
        of_worker.kill()
        assert os.read(said, 100) == b"as asked"
    os.close(said)
