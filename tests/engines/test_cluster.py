"""Replicas on a Ray cluster: the same datasets as here, whatever dies, and clear words where there is no room."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from engines.echo import EchoEngine
from engines.test_child import alive, wait_until

from srlm_core.config import EngineConfig
from srlm_core.engines import cluster, hardware, machine_of, open_engine
from srlm_core.engines.protocol import Request
from srlm_core.engines.scripted import base_model
from srlm_core.errors import ConfigError, EngineDied, ModelError

ROOT = Path(__file__).parents[2]


def test_a_replica_takes_gpus_where_there_are_some_and_half_of_one_if_that_is_all_it_uses():
    cpus, gpus = {"CPU": 8.0}, {"CPU": 96.0, "GPU": 8.0}
    assert cluster.share(EngineConfig(), [cpus]) == {"CPU": 1.0}
    assert cluster.share(EngineConfig(threads=4), [cpus]) == {"CPU": 4.0}
    assert cluster.share(EngineConfig(tensor_parallel=4), [cpus, gpus]) == {"GPU": 4.0, "CPU": 1.0}
    assert cluster.share(EngineConfig(gpu_memory=0.45), [gpus]) == {"GPU": 0.45, "CPU": 1.0}
    assert cluster.share(EngineConfig(kind="scripted"), [gpus]) == {"CPU": 1.0}


def test_what_fits_is_counted_node_by_node():
    nodes = [{"CPU": 96.0, "GPU": 8.0}, {"CPU": 96.0, "GPU": 6.0}, {"CPU": 2.0}]
    assert cluster.fitting({"GPU": 4.0, "CPU": 1.0}, nodes) == 3  # 2 + 1: two halves on two nodes make no group
    assert cluster.fitting({"GPU": 1.0, "CPU": 16.0}, nodes) == 12
    assert cluster.fitting({"GPU": 0.45, "CPU": 1.0}, nodes) == 30  # 17 and 13
    assert cluster.fitting({"CPU": 1.0}, nodes) == 194
    assert cluster.fitting({"GPU": 16.0, "CPU": 1.0}, nodes) == 0


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:", ":6379"])
def test_an_address_that_is_none_is_refused_with_what_one_looks_like(address):
    with pytest.raises(ConfigError, match=r"engine\.ray_address: expected HOST:PORT.*such as ray-head:6379"):
        cluster._reached(address)


def test_a_cluster_that_is_not_there_is_an_error_at_once(monkeypatch):
    config = EngineConfig(kind="scripted", placement="ray", ray_address=f"127.0.0.1:{_free_port()}")
    with pytest.raises(ConfigError, match=r"expected a Ray cluster at 127.*refused.*ray start --head"):
        cluster.require(config)
