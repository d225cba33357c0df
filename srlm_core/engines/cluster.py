"""Replicas as actors on a Ray cluster: Ray places them, watches them and starts them again.

An actor starts the child that would run here on its own node (engines/child.py), and passes frames on as they are. So
the child ends with its actor, however that dies, and whoever asks cannot tell where it runs. Model and campaign folders
are shared with the nodes.

Where no cluster is named, one is started here: a child of ours, on loopback, behind a token, that ends with us.
"""

import atexit
import contextlib
import importlib
import logging
import os
import queue
import secrets
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Self

from srlm_core.config import EngineConfig
from srlm_core.engines import hardware
from srlm_core.engines.child import Child, channel_to_parent
from srlm_core.engines.hardware import Machine, Placement
from srlm_core.engines.replica import RESTARTS
from srlm_core.errors import ConfigError

log = logging.getLogger("srlm")
PATIENCE_S = 300.0
"""How long an engine waits for what others on the cluster hold."""
_AT_ONCE = 4
"""Engines that may be open at once on a Ray of our own: they share its cores, as they do without Ray."""
_OBJECTS = 128 * 2**20
"""Bytes of Ray's own store there: frames are small."""
_REACH_S, _CLOSE_S, _LISTEN_S = 5.0, 10.0, 5.0
_OWN = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # how Ray is told to stay on loopback
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill an engine for memory that others on this machine use
}
"""Environment of a Ray of our own."""

_lock = threading.Lock()
_leave: contextlib.ExitStack | None = None
_whose = "the Ray cluster"
"""What it is called in errors."""
_overbooked = 1
"""How many times its processors Ray was told that a node has."""


# --- the cluster ----------------------------------------------------------------------------------------------------


def named(address: str | None) -> str | None:
    """Say which cluster is meant: the one of the setting, else of the environment; None for a Ray of our own."""
    return address or os.environ.get("RAY_ADDRESS")


def connect(address: str | None, *, aloud: bool = False) -> None:
    """Connect this process to the cluster, once; it stays so until `leave`, or its end. Raises ConfigError.

    `aloud`: what actors print is printed here, too.
    """
    global _leave, _whose, _overbooked
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError(
            "engine.placement=ray: expected the package ray, which is not installed. "
            "Install it (`pip install -e '.[ray]'`), or set engine.placement=local."
        ) from error

    with _lock:
        if ray.is_initialized():
            return
        address = named(address)
        with contextlib.ExitStack() as opened:
            _whose = f"the Ray cluster at {address}" if address else "the Ray on this machine"
            _overbooked = 1 if address else _AT_ONCE
            where = _reached(address) if address else opened.enter_context(_own())
            _join(where, aloud=aloud)
            opened.callback(ray.shutdown)
            _leave = opened.pop_all()
    atexit.register(leave)


def leave() -> None:
    """Disconnect, and end a Ray of our own."""
    global _leave
    with _lock:
        if _leave is not None:
            _leave.close()
        _leave = None


def _reached(address: str) -> str:
    """See that somebody listens there: Ray itself would try for a minute, and then end the process."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return address
    if "//" in address or not host or not port.isdigit():
        raise ConfigError(
            f"engine.ray_address: expected HOST:PORT of the head, such as ray-head:6379, or auto, got {address!r}. "
            "This process joins the cluster itself: run it on one of its nodes (one without GPUs is enough)."
        )
    try:
        socket.create_connection((host, int(port)), _REACH_S).close()
    except OSError as error:
        raise ConfigError(
            f"engine.ray_address: expected a Ray cluster at {address}, got: {error}. "
            "Start it (`ray start --head`), or mend the address."
        ) from error
    return address


def _join(address: str, *, aloud: bool) -> None:
    import ray

    def join() -> None:
        ray.init(address, log_to_driver=aloud, logging_level=logging.ERROR)

    try:
        with ThreadPoolExecutor(1) as elsewhere:  # in the main thread it would take SIGTERM from us
            elsewhere.submit(join).result()
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"engine.ray_address: expected to join {_whose} from this machine, got: {error}. It must be one of the "
            "cluster's nodes, with the same versions of Ray and Python: `ray start --address=HEAD:6379 --num-cpus=0`."
        ) from error


@contextlib.contextmanager
def _own() -> Iterator[str]:
    """Start a Ray on this machine; gives its address."""
    surroundings = _OWN | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in surroundings}
    cores = len(hardware.cores()) * _AT_ONCE
    with tempfile.TemporaryDirectory(prefix="srlm-ray-", ignore_cleanup_errors=True) as folder:
        arguments = [folder, str(cores), str(len(hardware.gpus()))]
        words = Path(folder) / "head.log"
        with Child("srlm_core.engines.cluster", arguments, log=words, env=surroundings, channel=True) as head:
            assert head.channel is not None
            address = next(iter(head.channel), None)
            if address is None:
                raise ConfigError(f"engine.placement=ray: expected Ray to start here, but {head.obituary()}")
            os.environ |= surroundings
            _heed_environment()
            try:
                yield address.decode()
            finally:
                for name, value in before.items():
                    os.environ.pop(name) if value is None else os.environ.update({name: value})


def _heed_environment() -> None:
    """Have Ray read its environment again: it did so when it was imported, which may be before we set it."""
    from ray._private import ray_constants

    native: Any = importlib.import_module("ray._raylet")
    ray_constants.ENABLE_RAY_CLUSTER = False
    native.Config.initialize("")
    native.AuthenticationTokenLoader.instance().reset_cache()


def _lead(folder: str, cores: str, gpus: str) -> None:
    """Be the Ray of our own, until the parent is gone."""
    import ray

    channel = channel_to_parent()
    ray.init(
        num_cpus=int(cores), num_gpus=int(gpus), include_dashboard=False, _node_ip_address="127.0.0.1",
        object_store_memory=_OBJECTS, _temp_dir=folder, log_to_driver=False,
    )  # fmt: skip
    channel.send(ray.get_runtime_context().gcs_address.encode())
    for _ in channel:
        pass


# --- what it has ----------------------------------------------------------------------------------------------------


def total() -> dict[str, float]:
    """Say what all nodes really have, together."""
    nodes = [_resources(node) for node in _nodes()]
    return {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}


def share(config: EngineConfig, nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Say what one replica takes of a node: GPUs where any node has some, else processors.

    With engine.gpu_memory up to one half, two engines share a GPU.
    """
    threads = float(config.threads or 1)
    if config.kind == "scripted" or not any(node.get("GPU") for node in nodes):
        return {"CPU": threads}
    shared = config.tensor_parallel == 1 and config.gpu_memory <= 0.5
    return {"GPU": config.gpu_memory if shared else float(config.tensor_parallel), "CPU": threads}


def fitting(needed: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """Count how many that need so much fit on nodes that have so much."""
    return sum(min(int(node.get(name, 0.0) / much + 1e-9) for name, much in needed.items()) for node in nodes)


def require(config: EngineConfig) -> None:
    """Connect, and see that the cluster could hold the replicas. Raises ConfigError."""
    connect(config.ray_address)
    nodes = [_resources(node) for node in _nodes()]
    needed = share(config, nodes)
    if fitting(needed, nodes) < config.replicas:
        raise ConfigError(
            f"engine.replicas: expected {_whose} to hold {config.replicas} × {_spelled(needed)}, each on one node, but "
            f"it has {', '.join(map(_spelled, nodes)) or 'no node'}. Lower engine.replicas, engine.tensor_parallel or "
            "engine.threads, or add nodes."
        )


def machine(config: EngineConfig) -> Machine:
    """Describe the cluster as replicas find it: one of the nodes that could hold one, all nodes' cores."""
    require(config)
    nodes = _nodes()
    needed = share(config, [_resources(node) for node in nodes])
    found = next(node for node in nodes if fitting(needed, [_resources(node)]))
    one = _described(found["NodeID"])
    cores = int(sum(_resources(node).get("CPU", 0.0) for node in nodes))
    return one._replace(cores=min(cores, one.cores * config.replicas))


@cache
def _described(node: str) -> Machine:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    asked = ray.remote(_describe).options(num_cpus=0, scheduling_strategy=there).remote()
    return Machine(**_get(asked, PATIENCE_S, "to describe a node"))


def _describe() -> dict[str, Any]:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides the GPUs from what asks for none
    return hardware.here()._asdict()


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _resources(node: Mapping[str, Any]) -> dict[str, float]:
    """Return what a node really has."""
    told = node["Resources"]
    return told | {"CPU": told.get("CPU", 0.0) / _overbooked}


def _spelled(much: Mapping[str, float]) -> str:
    return " and ".join(f"{much.get(name, 0.0):g} {name}" for name in ("GPU", "CPU") if name in much or name == "CPU")


def _get(asked: Any, timeout_s: float | None, what: str) -> Any:
    """Wait for a result. Raises ConfigError where the cluster does not give it."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return ray.get(asked, timeout=timeout_s)
    except GetTimeoutError:
        raise ConfigError(f"engine.placement=ray: expected {_whose} {what} within {timeout_s:.0f} s.") from None
    except RayError as error:
        told = getattr(error, "cause", None) or error
        raise ConfigError(f"engine.placement=ray: expected {_whose} {what}, got: {told}") from error


# --- an engine's replicas -------------------------------------------------------------------------------------------


class RayCluster:
    """Where an engine's replicas run: a placement group, and an actor in each of its bundles."""

    def __init__(self, config: EngineConfig) -> None:
        require(config)
        self._nodes = [_resources(node) for node in _nodes()]
        self._share = share(config, self._nodes)
        place = Placement(config.threads or 1, on_gpu="GPU" in self._share)
        self.places = [place] * config.replicas
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Take the resources. Raises ConfigError where others keep them."""
        import ray
        from ray.util import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        with contextlib.ExitStack() as opened:
            group = placement_group([self._share] * len(self.places), strategy="PACK")
            opened.callback(remove_placement_group, group)
            self._wait_for(group)
            actor: Any = ray.remote(concurrency_groups={"hearing": 1})(Host)  # pyright: ignore[reportCallIssue]
            self._actors: list[Any] = []
            for number in range(len(self.places)):
                there = PlacementGroupSchedulingStrategy(group, number)
                options = {"num_cpus": self._share["CPU"], "num_gpus": self._share.get("GPU", 0)}
                self._actors.append(actor.options(**options, max_restarts=RESTARTS, scheduling_strategy=there).remote())
                opened.callback(ray.kill, self._actors[-1])
            self._open = opened.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def host(self, number: int, module: str, *, log: Path, env: Mapping[str, str]) -> "Actor":
        return Actor(self._actors[number], module, log, env)

    def _wait_for(self, group: Any) -> None:
        if group.wait(min(_REACH_S, PATIENCE_S)):
            return
        wanted = f"{len(self.places)} × {_spelled(self._share)} of {', '.join(map(_spelled, self._nodes))}"
        log.warning("%s: waiting for %s, which others hold", _whose, wanted)
        if not group.wait(PATIENCE_S):
            raise ConfigError(
                f"engine.placement=ray: expected {_whose} to give {wanted} within {PATIENCE_S:.0f} s, but others hold "
                "them (`ray status` says who). Wait for them, or lower engine.replicas."
            )


class Host:
    """The actor: holds a child on its node, and passes frames on."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._words: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def begin(self, module: str, log: str, env: dict[str, str]) -> None:
        """Start a child, in the place of one that is there."""
        self.close()
        if not Path(log).parent.is_dir():
            raise FileNotFoundError(
                f"{Path(log).parent} is not there on {socket.gethostname()}: share it with the nodes"
            )
        self._child, self._words = Child(module, log=Path(log), env=env, channel=True), queue.SimpleQueue()
        threading.Thread(target=_listen, args=(self._child, self._words), daemon=True).start()

    def send(self, frames: list[bytes]) -> None:
        """Pass frames to the child; whether it is gone, `hear` tells."""
        assert self._child is not None
        assert self._child.channel is not None
        with contextlib.suppress(OSError):
            for frame in frames:
                self._child.channel.send(frame)

    def hear(self) -> tuple[list[bytes], str | None]:
        """Wait a while for frames of the child; with the last ones, say how it ended."""
        words, child = self._words, self._child
        frames = _all_of(words, _LISTEN_S)
        if None not in frames:
            return frames, None
        words.put(None)  # for whoever asks again
        return frames[:-1], "it was not started" if child is None else child.obituary()

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.close()


def _listen(child: Child, words: queue.SimpleQueue[bytes | None]) -> None:
    assert child.channel is not None
    for word in child.channel:
        words.put(word)
    words.put(None)


def _all_of(words: queue.SimpleQueue[bytes | None], timeout_s: float | None = None) -> list[Any]:
    """Wait for a word; returns it and those behind it, up to the last one, which is null."""
    found: list[bytes | None] = []
    with contextlib.suppress(queue.Empty):
        found.append(words.get(timeout=timeout_s))
        while found[-1] is not None:
            found.append(words.get_nowait())
    return found


class Actor:
    """A child on the cluster, as a replica sees it (replica.Host)."""

    def __init__(self, actor: Any, module: str, log: Path, env: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._actor, self._log, self._over = actor, log, ""
        # however often it takes Ray to bring a dead actor back, and not after the last time
        begun = actor.begin.options(max_task_retries=-1).remote(module, str(log), dict(env))
        _get(begun, None, f"to start {module}")
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._pass_on, daemon=True).start()

    @property
    def channel(self) -> Self:
        return self

    def send(self, frame: bytes) -> None:
        if self._over:
            raise OSError(self._over)
        self._outbox.put(frame)

    def __iter__(self) -> Iterator[bytes]:
        while not self._over:
            heard = self._ask(lambda: self._actor.hear.options(concurrency_group="hearing").remote())
            if heard is not None:
                frames, over = heard
                yield from frames
                self._over = self._over or over or ""

    def obituary(self) -> str:
        return self._over or "it stopped answering"

    def close(self) -> None:
        self._over = self._over or "it was closed"
        self._outbox.put(None)
        self._ask(self._actor.close.remote, _CLOSE_S)

    def _pass_on(self) -> None:
        """Send what there is, and then what came in the meantime."""
        while not self._over:
            frames = [frame for frame in _all_of(self._outbox) if frame is not None]
            self._ask(lambda frames=frames: self._actor.send.remote(frames))

    def _ask(self, call: Callable[[], Any], timeout_s: float | None = None) -> Any:
        """Call the actor; None where it is gone."""
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(call(), timeout=timeout_s)
        except RayError as error:
            told = " ".join(str(error).split())
            self._over = self._over or f"its Ray actor is gone: {told} Log: {self._log}"
            return None


if __name__ == "__main__":
    _lead(*sys.argv[1:])
