"""What the end of a campaign prints: commands that this environment can run."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from flows import leaving
from flows.console import Console
from srlm_core.config import DEMO_MODEL
from srlm_core.engines.models import resolve_model
from srlm_core.store import Campaign


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "runs" / "c" / "models" / "M2"
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text("{}")
    return folder


def found(monkeypatch, *packages, distributions=()):
    def distribution(name):
        if name not in distributions:
            raise PackageNotFoundError(name)

    monkeypatch.setattr(leaving.importlib.util, "find_spec", lambda name: name in packages or None)
    monkeypatch.setattr(leaving, "distribution", distribution)


def test_the_serve_command_is_of_what_is_installed(monkeypatch, model):
    found(monkeypatch, "vllm", "transformers", distributions=["vllm"])
    assert leaving.serve_command(model).endswith(f"vllm serve {model} --served-model-name M2 --host 127.0.0.1")
    found(monkeypatch, "vllm", "transformers")
    asked = f"{sys.executable} -m vllm.entrypoints.openai.api_server --model {model} --served-model-name M2"
    assert leaving.serve_command(model).startswith(f"{asked} --host 127.0.0.1 --enforce-eager --kv-cache-memory-bytes ")
    found(monkeypatch, "transformers", "fastapi", "uvicorn")
    assert leaving.serve_command(model).endswith(f"transformers serve {model}")
    found(monkeypatch, "transformers")
    assert leaving.serve_command(model) is None
    (model / "scripted.json").write_text("{}")
    found(monkeypatch, "vllm", distributions=["vllm"])
    assert leaving.serve_command(model) is None


def test_the_end_says_how_to_talk_serve_and_take_it_along(model, capsys, monkeypatch):
    monkeypatch.setattr("flows.console.serve_command", lambda path: f"vllm serve {path}")
    root = model.parents[2]
    console = Console(Campaign(root, "c"), as_json=False)
    rows = [{"model": name} for name in ("M0", "M1", "M2", "reward")]
    monkeypatch.setattr("flows.console.table.as_text", lambda rows: "")
    console.farewell(rows, root / "c" / "report" / "index.html", root)
    said = capsys.readouterr().out
    assert f"srlm chat {model}" in said
    assert f"vllm serve {model}" in said
    assert f"srlm export c --datasets --root {root}" in said


@pytest.mark.cluster
@pytest.mark.engine
def test_the_printed_command_serves_the_model(tmp_path):
    """The `transformers` server on the real 135M model, which starts in seconds; vLLM's is asked for its options."""
    folder = resolve_model(DEMO_MODEL, None, Path("runs/.cache/models").resolve())
    printed = leaving.serve_command(folder)
    if "vllm" in printed:
        options = " ".join(word for word in shlex.split(printed) if word.startswith("--"))
        ask = [*shlex.split(printed)[: 3 if " -m " in printed else 2], "--help=all"]
        said = subprocess.run(ask, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=True).stdout
        assert all(option in said for option in options.split())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [leaving._script("transformers"), "serve", str(folder), "--port", str(port)]
    log = (tmp_path / "log").open("wb")
    server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True,
                              env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    try:
        body = b'{"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 8, "model": "%s"}'
        ask = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", body % str(folder).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        deadline, answer = time.monotonic() + 240, b""
        while not answer and time.monotonic() < deadline and server.poll() is None:
            try:
                answer = urllib.request.urlopen(ask, timeout=120).read()
            except OSError:
                time.sleep(1)
        assert b'"content":"' in answer.replace(b" ", b""), (tmp_path / "log").read_text()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
