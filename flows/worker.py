"""A flow run's process and the worker that started it: when the worker is gone, the run ends.

Its engines end with the run's process (srlm_core/engines/child.py), so a worker that was killed leaves nothing that
holds a device, and the campaign is free for the next run.
"""

import os
import signal
import threading
import time

STARTED_BY_WORKER = "PREFECT__FLOW_RUN_ID"
"""In the environment of a process that a worker started for a flow run."""
GRACE_S = 20.0
_watching = False


def end_with_worker() -> None:
    """Ask this process to stop once its worker is gone, and make it, if it does not. Once a process; else nothing."""
    global _watching
    worker = os.getppid()
    if (
        _watching or STARTED_BY_WORKER not in os.environ or worker == 1
    ):  # 1: a container's, that ends with its container
        return
    _watching = True
    threading.Thread(target=_watch, args=(worker,), daemon=True, name="worker watch").start()


def _watch(worker: int) -> None:
    while os.getppid() == worker:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
