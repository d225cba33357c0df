"""A training of several ranks: `python -m srlm_core.engines.launch job.json` starts them, and ends when they have.

Each rank runs what one alone would (engines/trl.py). The first writes what happens into a file, and we pass it on to
the parent: a rank may be on another machine, and no library here hands a socket down.
"""

import json
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from srlm_core.engines import cluster
from srlm_core.engines.child import MEETING, PARENT, Channel, channel_to_parent
from srlm_core.engines.training_job import TrainingJob
from srlm_core.errors import SrlmError, TrainingFailed

_POLL_S = 0.1
_ATTEMPTS = 2
"""Of Ray: a group of ranks that died is started once more, as an engine is."""


@contextmanager
def _passed_on(said: Path, channel: Channel) -> Iterator[None]:
    """Send the lines of a file that grows, as they come."""
    said.write_bytes(b"")
    over = threading.Event()

    def follow() -> None:
        with said.open("rb") as file:
            rest, ended = b"", False
            while not ended:
                ended = over.wait(_POLL_S)  # what came before the end is read after it
                *lines, rest = (rest + file.read()).split(b"\n")
                for line in lines:
                    channel.send(line)

    thread = threading.Thread(target=follow, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _torchrun(job: TrainingJob, described: Path) -> None:
    """Have PyTorch's elastic agent start the ranks on this machine; if one dies, it ends the others and raises.

    It gives each a session of its own, so each watches us and ends when we do (engines/child.py). They meet in files:
    PyTorch's own meeting place listens on every interface, to whoever comes.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="srlm-ranks-") as folder:
        os.environ |= {
            PARENT: str(os.getpid()), MEETING: str(Path(folder) / "ranks"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }  # fmt: skip
        how = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=job.ranks, run_id=f"srlm-{os.getpid()}", max_restarts=0,
            rdzv_backend="c10d", rdzv_endpoint=str(Path(folder) / "agent"), rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1", shutdown_timeout=5,
        )  # fmt: skip
        elastic_launch(how, sys.executable)("-m", "srlm_core.engines.child", "srlm_core.engines.trl", str(described))


def _ray(job: TrainingJob, described: Path) -> None:
    """Have Ray Train start the ranks on the machines of a cluster; if one dies, it starts all of them again."""
    cluster.connect(job.ray_address, aloud=True)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    storage = job.work_dir.resolve() / "ray"  # on the folder that all machines see, as Ray Train asks
    shutil.rmtree(storage, ignore_errors=True)
    try:
        TorchTrainer(
            _rank,
            train_loop_config={"job": str(described.resolve())},
            scaling_config=ScalingConfig(num_workers=job.ranks, use_gpu=_has_room(job, cluster.total())),
            run_config=RunConfig(
                name="ranks", storage_path=str(storage), failure_config=FailureConfig(max_failures=_ATTEMPTS - 1)
            ),
        ).fit()
    finally:
        cluster.leave()
        shutil.rmtree(storage, ignore_errors=True)


def _has_room(job: TrainingJob, resources: Mapping[str, float]) -> bool:
    """Say whether ranks are to have GPUs; raises TrainingFailed where the cluster cannot hold them: Ray would wait."""
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if (gpus or cores) < job.ranks:
        raise TrainingFailed(
            f"training.ranks={job.ranks}: expected a GPU for each in the Ray cluster, or a core where it has no GPU, "
            f"got {gpus} GPUs and {cores} cores. Lower training.ranks, or add machines."
        )
    if job.fsdp != "off" and not gpus:
        raise TrainingFailed(
            f"training.fsdp={job.fsdp}: expected GPUs in the Ray cluster to split a model over, got none. Set "
            "training.fsdp=off."
        )
    return gpus > 0


def _rank(how: dict[str, str]) -> None:
    """Be one rank, in Ray's process: torch's process group and RANK are there already."""
    from srlm_core.engines import trl

    trl.work(TrainingJob.model_validate_json(Path(how["job"]).read_text()))


_LAUNCHERS = {"torchrun": _torchrun, "ray": _ray}


def main() -> int:
    """Start the ranks of the job named on the command line."""
    described = Path(sys.argv[1])
    job = TrainingJob.model_validate_json(described.read_text())
    channel = channel_to_parent()
    one_machine = job.launcher == "torchrun" or not cluster.named(job.ray_address)
    if one_machine and not os.environ.get("GLOO_SOCKET_IFNAME"):
        loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
        os.environ |= {"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {}  # nobody else is to connect
    with _passed_on(job.said, channel):
        try:
            _LAUNCHERS[job.launcher](job, described)
        except SrlmError as error:
            channel.send(json.dumps({"event": "failed", "message": str(error)}).encode())
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
