"""`bench checkpointing`, on a CPU: every way computes, and the search for the longest row ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from runners.bench import run
from runners.benchmarks import checkpointing
from runners.benchmarks.checkpointing import WAYS, CheckpointingConfig, bench, check, longest_row
from runners.shell.cli import UsageError
from runners.shell.errors import UserError

CPU = torch.device("cpu")
SMALL = CheckpointingConfig(preset="tiny", rows=1, length=16, by=("eager",), steps=1, rounds=2)


def test_every_way_is_measured(tmp_path: Path) -> None:
    config = replace(SMALL, out=str(tmp_path))
    assert bench(config, CPU, "bench checkpointing", Console(quiet=True)) == 0
    lines = (tmp_path / "checkpointing.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["way"] for row in rows] == list(WAYS)
    assert all(row["tokens_per_second"] > 0 and row["error"] is None for row in rows)


def test_running_out_of_memory_is_a_result(tmp_path: Path, monkeypatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("full\nof it")

    monkeypatch.setattr(checkpointing, "value_and_grad", lambda loss: full)
    config = replace(SMALL, out=str(tmp_path), only=("none",))
    bench(config, CPU, "", Console(quiet=True))
    (row,) = map(json.loads, (tmp_path / "checkpointing.jsonl").read_text().splitlines())
    assert (row["error"], row["tokens_per_second"]) == ("full", 0.0)


@pytest.mark.parametrize("limit", [200, 2048, 3000, 5000, 100_000, 300_000])
def test_the_longest_row_is_within_a_sixteenth(limit: int, monkeypatch) -> None:
    class Properties:
        total_memory = 2**40

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    shares: list[float] = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share)
    )

    def row_step(config: object, way: str, tokens: int, *rest: object) -> None:
        if tokens > limit:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(checkpointing, "row_step", row_step)
    found = longest_row(replace(SMALL, most=200_000), "none", 24.0, {}, CPU)
    assert shares == [24 / 1024, 1.0]
    limit = min(limit, 200_000)
    assert (found == 0) if limit < 2048 else (limit * 15 / 16 - 128 <= found <= limit)


def test_memory_between_forward_and_backward() -> None:
    rows = [
        checkpointing.Measured("none", "eager", 100.0, 40.0, 30.0, 1.0),
        checkpointing.Measured("every block", "eager", 82.0, 12.0, 1.5, 1.0),
    ]
    output = Console(record=True, width=200)
    checkpointing.show(rows, output)
    text = output.export_text()
    assert "18.0%" in text
    assert "5%" in text


def test_bad_flags(monkeypatch) -> None:
    with pytest.raises(UsageError, match="no preset 'tini'"):
        check(replace(SMALL, preset="tini"))
    with pytest.raises(UsageError, match="--only all: there are none"):
        check(replace(SMALL, only=("all",)))
    with pytest.raises(UsageError, match="--rows must be 1 or more, not 0"):
        check(replace(SMALL, rows=0))
    with pytest.raises(UsageError, match="--by blocks: there are eager, compiled blocks"):
        check(replace(SMALL, by=("blocks",)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch sees none here"):
        run(["checkpointing", "--preset", "tiny"])
