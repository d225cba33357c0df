"""The stack, once for all tests of this folder: real servers, a real worker, PostgreSQL where it is installed."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from team import PLANTED, Team, free_port

from deployments.stack import Stack


@pytest.fixture(scope="session")
def team() -> Iterator[Team]:
    """The stack, in a folder that PostgreSQL's own user may enter, which pytest's are not."""
    with ExitStack() as up:
        patch = up.enter_context(pytest.MonkeyPatch.context())
        for name in ("PREFECT_API_URL", "PREFECT_HOME"):
            patch.delenv(name, raising=False)
        for name, secret in PLANTED.items():
            patch.setenv(name, secret)
        root = Path(up.enter_context(tempfile.TemporaryDirectory(prefix="srlm-stack-")))
        root.chmod(0o711)
        yield Team(up.enter_context(Stack(root / "runs", free_port(), free_port())))
