"""`bench overhead`: the pairs are the same model, and the figures are what was measured."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from runners import bench as command_line
from runners.benchmarks import overhead
from runners.benchmarks.clock import CpuClock
from runners.benchmarks.overhead import OverheadConfig
from runners.shell.cli import UsageError
from tests.rounding import FP32

SMALL = OverheadConfig(tokens=(6,), layers=2, width=64, rounds=2, seconds=1e-3)


pytest.importorskip("transformers")


def test_both_of_a_pair_compute_the_same() -> None:
    module, forward = overhead.llama_pair(SMALL, 7, torch.device("cpu"))
    with torch.no_grad():
        want, got = module(), forward()
    assert want.flatten(0, -2).shape == (7, 1024)
    assert want.std() > 1e-3
    torch.testing.assert_close(got, want, rtol=FP32, atol=FP32)


def test_a_run_writes_its_figures(tmp_path: Path) -> None:
    said = io.StringIO()
    config = replace(SMALL, out=str(tmp_path))
    output = Console(file=said, width=150)
    assert overhead.bench(config, CpuClock(), "the command", output, "aot_eager") == 0
    lines = [json.loads(line) for line in (tmp_path / "overhead.jsonl").read_text().splitlines()]
    assert [(line["mode"], line["provider"]) for line in lines] == [
        (f"{by}, CPU", name) for by in ("eager", "compiled") for name in ("module", "from_module")
    ]
    for line in lines:
        assert (line["status"], line["command"]) == ("ok", "the command")
        assert len(line["samples"]) >= SMALL.rounds
        assert line["speedup"] > 0
        # the same operations in fp32, which a compiler may round otherwise
        assert line["error"] is None or line["error"] < 1e-5
    assert "`the command`" in (tmp_path / "overhead.md").read_text()


@pytest.mark.parametrize(
    "flags", [["--width=65"], ["--layers=0"], ["--rounds=0"], ["--tokens=0"], ["--seconds=0"]]
)
def test_what_makes_no_measurement_is_refused(flags: list[str]) -> None:
    with pytest.raises(UsageError, match=flags[0].partition("=")[0]):
        command_line.run(["overhead", *flags])
