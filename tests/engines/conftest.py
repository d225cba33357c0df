"""Shared by the tests of training: tiny models, and the child's module."""

from pathlib import Path
from typing import Any

import pytest
from engines.tiny import tiny_model


@pytest.fixture(scope="session")
def child() -> Any:
    """The child's module, imported into the test: most claims need no process of their own."""
    from srlm_core.engines import trl

    return trl


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers and 64 dimensions behind SmolLM2's tokenizer and chat template."""
    return tiny_model(tmp_path_factory.mktemp("models") / "M0", seed=0)


@pytest.fixture(scope="session")
def other(tiny: Path) -> Path:
    """Another random model of the same shape."""
    return tiny_model(tiny.with_name("other"), seed=1)
