"""`bench checkpointing`, on a CPU: every way takes its steps, as the flags of the trainer say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from runners.bench import run
from runners.benchmarks.clock import CpuClock
from runners.benchmarks.ladders import WAYS, CheckpointingConfig
from runners.benchmarks.steps import bench
from runners.shell.cli import UsageError
from runners.shell.errors import UserError

MICRO = (
    "text.dim=32",
    "text.layers=4",
    "text.heads=4",
    "text.kv_heads=2",
    "text.mlp_dim=48",
    "text.vocab_size=128",
)
SMALL = CheckpointingConfig(
    preset="tiny", override=MICRO, rows=1, length=16, by=("eager",), steps=1, rounds=1
)


def test_every_way_is_measured(tmp_path: Path) -> None:
    config = replace(SMALL, out=str(tmp_path))
    assert bench(config, CpuClock(), "bench checkpointing", Console(quiet=True)) == 0
    lines = (tmp_path / "checkpointing.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["label"] for row in rows] == list(WAYS)
    assert {row["reason"] for row in rows} == {None}
    # recomputation changes no number
    assert {row["loss"] for row in rows} == {rows[0]["loss"]}
    assert rows[0]["times_baseline"] == 1
    page = (tmp_path / "checkpointing.md").read_text()
    assert "| eager | none |" in page
    assert "--checkpoint_every=4" in page


def test_offloading_is_for_eager_autograd() -> None:
    made = CheckpointingConfig().rungs()
    assert len(made) == 3 * len(WAYS) - 2
    assert [rung.phase for rung in made if rung.label == "offload"] == ["eager"]


def test_bad_flags(monkeypatch) -> None:
    for change, message in (
        ({"preset": "tini"}, "no preset 'tini'"),
        ({"only": ("all",)}, "--only all: there are none"),
        ({"rows": 0}, "--rows must be 1 or more, not 0"),
        ({"by": ("blocks",)}, "--by blocks: there are eager, compiled blocks"),
    ):
        with pytest.raises(UsageError, match=message):
            replace(SMALL, **change).check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch sees none here"):
        run(["checkpointing"])
