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
from runners.benchmarks.clock import CpuClock, Run
from runners.benchmarks.overhead import OverheadConfig, Row
from runners.shell.cli import UsageError
from runners.shell.errors import UserError
from tests.rounding import FP32

SMALL = OverheadConfig(tokens=(6,), layers=2, width=64, rounds=2, seconds=1e-3)


@pytest.mark.parametrize("model", overhead.PAIRS)
def test_both_of_a_pair_compute_the_same(model: str) -> None:
    if model == "from_module":
        pytest.importorskip("transformers")
    module, forward = overhead.PAIRS[model](SMALL, 7, torch.device("cpu"))
    with torch.no_grad():
        want, got = module(), forward()
    assert want.flatten(0, -2).shape == (7, 1024)
    assert want.std() > 1e-3
    torch.testing.assert_close(got, want, rtol=FP32, atol=FP32)


def test_a_pair_that_is_not_one_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (lambda: torch.ones(3), lambda: torch.tensor([1.0, 1.0, 1.1]))
    monkeypatch.setitem(overhead.PAIRS, "native", lambda *_: pair)
    with pytest.raises(UserError, match="native, eager, is not the module: off by 5"):
        overhead.measure("native", 6, replace(SMALL, compiled=False), CpuClock())


def test_a_run_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(overhead.PAIRS, "from_module")
    said = io.StringIO()
    config = replace(SMALL, out=str(tmp_path))
    output = Console(file=said, width=150)
    assert overhead.bench(config, iter([CpuClock()]), "the command", output, "aot_eager") == 0
    lines = [json.loads(line) for line in (tmp_path / "overhead.jsonl").read_text().splitlines()]
    assert [(line["by"], line["forward"]) for line in lines] == [
        ("eager", "native's module"), ("eager", "native"),
        ("compiled", "native's module"), ("compiled", "native"),
    ]  # fmt: skip
    for line in lines:
        assert line["command"] == "the command"
        assert len(line["samples"]) == SMALL.rounds
        assert len(line["ratios"]) == (SMALL.rounds if line["goal"] else 0)
    page = (tmp_path / "overhead.md").read_text()
    assert "`the command`" in page
    assert page.count("| CPU | 6 |") == 4
    assert "native's module" in said.getvalue()


class SetClock(CpuClock):
    """The calls of a run take what is set for it, in ms."""

    def __init__(self, ms: dict[Run, float]) -> None:
        super().__init__()
        self.ms, self.order = ms, []  # type: dict[Run, float], list[Run]

    def sample(self, run: Run, before: Run | None, count: int) -> list[float]:
        self.order += [run] * count
        return [self.ms[run]] * count


def test_ratios_are_those_of_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def module() -> torch.Tensor:
        return torch.ones(2)

    def forward() -> torch.Tensor:
        return torch.ones(2)

    monkeypatch.setitem(overhead.PAIRS, "native", lambda *_: (module, forward))
    config = replace(SMALL, compiled=False, seconds=0.006)
    clock = SetClock({module: 2.0, forward: 4.0})
    first, second = overhead.measure("native", 6, config, clock)
    assert first.samples == [[2.0, 2.0]] * 2  # 12 ms for the two of them, 6 ms a turn
    assert second.samples == [[4.0, 4.0]] * 2
    assert second.ratios == [2.0, 2.0]
    assert clock.order[-8:] == [module, forward] * 4
    assert first.met == ""
    assert second.met == "no"


@pytest.mark.parametrize(
    ("ratios", "met"),
    [([1.0, 1.1, 1.2], "yes"), ([1.2, 1.4, 1.5], "noise"), ([1.4, 1.5, 1.6], "no")],
)
def test_met(ratios: list[float], met: str) -> None:
    row = Row("CPU", "from_module", 16, "eager", "from_module", goal=1.3, ratios=ratios)
    assert row.met == met


@pytest.mark.parametrize(
    "flags", [["--width=65"], ["--layers=0"], ["--rounds=0"], ["--tokens=0"], ["--seconds=0"]]
)
def test_what_makes_no_measurement_is_refused(flags: list[str]) -> None:
    with pytest.raises(UsageError, match=flags[0].partition("=")[0]):
        command_line.run(["overhead", *flags])
