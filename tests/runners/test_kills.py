"""A process killed amid an operation on a file costs the steps since the last state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "operations",
    [("40",), pytest.param((), marks=pytest.mark.slow, id="all")],
)
def test_a_killed_run_comes_to_the_same_bits(tmp_path: Path, operations: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "tests.runners.kills", str(tmp_path), *operations]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("the same") == (len(operations) or ended.stdout.count("\n") - 1)
