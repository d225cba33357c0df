"""The example of CONTRIBUTING.md works as it stands there, and needs no file but its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_method_of_the_guide(tmp_path):
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    files = re.findall(r"`([\w/]+/(?:test_)?shortest\.\w+)`:\n\n```\w+\n(.*?)```", guide, re.DOTALL)
    assert len(files) == 3
    for folder in ("srlm_core", "flows", "tasks", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, text in files:
        assert not (ROOT / path).exists()
        (tmp_path / path).write_text(text)
    tests = ["tests/methods/test_shortest.py", "tests/methods/test_methods.py", "-k", "shortest"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    # one of its own, and three that hold for every method
    assert "4 passed" in done.stdout
