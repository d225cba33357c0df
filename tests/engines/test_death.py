"""However an engine or its owner dies, the other side notices and no process stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engines.real import engine_of
from engines.test_child import alive, wait_until
from engines.test_protocol import NO_VLLM, user

from srlm_core.config import EngineConfig
from srlm_core.engines import open_engine
from srlm_core.engines.protocol import Request, Sampling
from srlm_core.errors import EngineDied

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]
LONG = Sampling(max_tokens=400)


@pytest.mark.slow
def test_an_engine_killed_while_it_answers_is_reported_with_its_last_words(tmp_path):
    with engine_of("transformers", tmp_path / "log") as engine:
        pid = engine.replicas[0].child.process.pid
        answers = engine.generate(
            Request(str(i), user("Tell me a long story."), sampling=LONG if i else Sampling(max_tokens=1), seed=i)
            for i in range(6)
        )
        next(answers)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDied, match=r"(?s)killed by SIGKILL.*Log: .*log.*last words"):
            list(answers)
        with pytest.raises(EngineDied, match="killed by SIGKILL"):
            list(engine.generate([Request("after", user("Hello."))]))
    assert not alive(pid)


def test_an_engine_that_cannot_start_says_why(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config = EngineConfig(kind="transformers", context=256)
    with (
        pytest.raises(EngineDied, match=r"(?s)expected it to start.*last words"),
        open_engine(config, tmp_path, log=tmp_path / "log"),
    ):
        pass


def test_an_engine_that_was_not_entered_says_so(tmp_path):
    with pytest.raises(EngineDied, match="enter it first"):
        list(engine_of("transformers", tmp_path / "log").generate([Request("a", user("Hello."))]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("vllm", marks=NO_VLLM)])
def test_an_engine_whose_owner_is_killed_by_kill_9_is_gone_in_seconds(kind, tmp_path):
    owner = subprocess.Popen(
        [sys.executable, "-c",
         f"import pathlib, time; from engines.real import engine_of\n"
         f"engine = engine_of({kind!r}, pathlib.Path({str(tmp_path / 'log')!r})).__enter__()\n"
         f"from engines.test_protocol import user; from srlm_core.engines.protocol import Request, Sampling\n"
         f"answers = engine.generate([Request('short', user('Hi.'), sampling=Sampling(max_tokens=1)),\n"
         f"  Request('long', user('Tell me a long story.'), sampling=Sampling(max_tokens=400), n=8)])\n"
         f"next(answers); print(engine.replicas[0].child.process.pid, flush=True); list(answers)"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    pid = int(owner.stdout.readline())
    assert alive(pid)
    time.sleep(0.5)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    assert wait_until(lambda: not alive(pid), 5)
    assert not subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.strip()
