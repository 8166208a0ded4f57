"""`bench lengths`, on a CPU: its lines, their figures, and what a row that does not fit becomes."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from core import PRESETS, VLMConfig
from runners.bench import run
from runners.benchmarks import ladders, training
from runners.benchmarks.clock import CpuClock
from runners.benchmarks.documents import Documents, batches_of, draw_documents
from runners.benchmarks.ladder import RungConfig
from runners.benchmarks.ladders import LengthsConfig
from runners.benchmarks.steps import Entry, bench
from runners.shell.cli import UsageError
from runners.shell.errors import UserError
from runners.training.config import parse_config
from runners.training.flops import training_flops

MICRO = (
    "text.dim=32",
    "text.layers=2",
    "text.heads=4",
    "text.kv_heads=2",
    "text.mlp_dim=48",
    "text.vocab_size=128",
)
SMALL = LengthsConfig(
    preset="tiny", override=MICRO, lengths=(16, 24, 64, 96), tokens=48, once=96, steps=2, warmup=1
)


def no_ceilings(clock: object) -> dict:
    return {"copy": 1e12, "bf16": 1e14, "int8": 1e14}


def measured(config: LengthsConfig) -> list[dict]:
    assert bench(config, CpuClock(), "bench lengths", Console(quiet=True), no_ceilings) == 0
    lines = (Path(config.out) / "lengths.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def lines_of(config: LengthsConfig) -> list[tuple[Entry, RungConfig, Documents]]:
    """Each entry, its plan and its documents."""
    entries = config.entries(torch.device("cpu"))
    return [(entry, entry.start.args[0], entry.start.args[1]) for entry in entries]  # type: ignore[attr-defined]


def test_a_step_has_as_many_tokens_or_one_row() -> None:
    made = {documents.row_len: (e, p, documents) for e, p, documents in lines_of(LengthsConfig())}
    assert {n: len(line[2].rows) for n, line in made.items()} == {
        2048: 8,
        8192: 2,
        32_768: 1,
        131_072: 1,
    }
    assert {n: line[0].phase for n, line in made.items()} == {
        2048: "blocks",
        8192: "blocks",
        32_768: "checkpoint",
        131_072: "checkpoint",
    }
    for n, (entry, plan, documents) in made.items():
        config = plan.config
        assert config.speed.use_gradient_checkpointing == (n > 16_384)
        assert (config.data.device_batch_size, config.data.sequence_len) == (len(documents.rows), n)
        assert (config.speed.compile, entry.pace) == (True, None)
        assert documents.full
    (alone,) = (line for line in lines_of(LengthsConfig(once=131_072)) if line[0].pace)
    assert (alone[2].row_len, alone[1].config.speed.compile) == (131_072, False)


def test_policies_are_lines_where_they_matter() -> None:
    config = replace(
        SMALL,
        lengths=(64,),
        only=("blocks", "checkpoint", "checkpoint_dots"),
        checkpoint_policy=("nothing", "attention"),
    )
    kept = {entry.phase: plan.config.speed.checkpoint_policy for entry, plan, _ in lines_of(config)}
    assert kept == {
        "blocks": "nothing",
        "checkpoint": "nothing",
        "checkpoint (attention)": "attention",
        "checkpoint_dots": "dots+attention",
    }


def test_flags_are_the_trainer_s() -> None:
    for entry, plan, _ in lines_of(replace(SMALL, checkpoint_policy=("attention",))):
        assert parse_config(entry.changed.split()) == plan.config


def test_every_length_is_a_line(tmp_path: Path, uncompiled: None, monkeypatch) -> None:
    steps: list[tuple[int, int]] = []  # tokens of a step's batches, and how many

    class Noted(training.Learner):
        def train_step(self, grad_fn, batches):
            steps.append((sum(len(b["tokens"]) for b in batches), len(batches)))
            return super().train_step(grad_fn, batches)

    monkeypatch.setattr(training, "Learner", Noted)
    monkeypatch.setattr(ladders, "SHORT", 8)
    rows = measured(replace(SMALL, out=str(tmp_path)))
    assert [(row["key"], row["tokens"]) for row in rows] == [
        ("blocks@16", 48),
        ("blocks@24", 48),
        ("checkpoint@64", 64),
        ("checkpoint@96", 96),
    ]
    # the row of 96 takes one step, after one on a short row that is not counted
    assert steps == [(48, 1)] * 6 + [(64, 1)] * 3 + [(8, 1), (96, 1)]
    assert [len(row["samples"]) for row in rows] == [2, 2, 2, 1]
    assert [len(row["walls"]) for row in rows] == [1, 1, 1, 0]
    for row in rows:
        assert (row["status"], row["reason"]) == ("ok", None)
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["ms"] * 1e3)
        assert row["mfu"] > 0
        assert 4 < row["loss"] < 6  # about log 128
    page = (tmp_path / "lengths.md").read_text()
    for words in (
        "| 3 x 16, blocks |",
        "| 1 x 64, checkpoint |",
        "| 1 x 96, checkpoint, one step |",
    ):
        assert words in page
    assert "--use_gradient_checkpointing=1" in page
    assert (tmp_path / "lengths.png").exists()


def test_operations_grow_with_the_length() -> None:
    """A line's are those of its own documents: attention is half of the square."""
    config = replace(SMALL, override=(), lengths=(1024, 2048), tokens=2048)
    short, long = (entry.operations for entry in config.entries(torch.device("cpu")))
    model = PRESETS["tiny"]
    text = model.text
    a_pair = 3 * 4 * text.heads * text.head_size * text.layers
    assert long - short == pytest.approx(a_pair * (2048**2 - 2 * 1024**2) / 2, rel=1e-12)


def test_a_length_that_does_not_fit_is_a_line_and_the_next_goes_on(
    tmp_path: Path, uncompiled: None, monkeypatch
) -> None:
    class Full(training.Learner):
        def train_step(self, grad_fn, batches):
            if len(batches[0]["tokens"]) == 64:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
            return super().train_step(grad_fn, batches)

    monkeypatch.setattr(training, "Learner", Full)
    rows = measured(replace(SMALL, out=str(tmp_path)))
    assert [row["status"] for row in rows] == ["ok", "ok", "out of memory", "ok"]
    page = (tmp_path / "lengths.md").read_text()
    assert "- 1 x 64, checkpoint: out of memory: CUDA out of memory." in page


def test_no_line_is_begun_after_the_time_is_up(tmp_path: Path, uncompiled: None) -> None:
    rows = measured(replace(SMALL, out=str(tmp_path), minutes=0.0))
    assert {row["status"] for row in rows} == {"not begun"}


def test_a_very_long_row_is_made_of_nothing_quadratic() -> None:
    n = 524_288
    tracemalloc.start()
    documents = draw_documents(1, n, 0.0)
    (batch,), bounds = batches_of(documents, 1000, 1, True)
    training_flops(VLMConfig(PRESETS["vlm_1.5b"].text), documents.load, {"text"})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bounds.max_seqlen == n
    assert sum(tensor.numel() for tensor in batch.values()) < 4 * n
    assert peak < 64 * n  # what numpy and Python took: 8 bytes a random token


def test_bad_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for change, message in (
        ({"lengths": (2048, 1)}, "--lengths are tokens of a row"),
        ({"tokens": 0}, "--tokens must be 1 or more, not 0"),
        ({"only": ("blcks",)}, "--only blcks: .*did you mean blocks"),
        ({"checkpoint_policy": ("dot",)}, "--checkpoint_policy dot: .*did you mean dots"),
        ({"preset": "tini"}, "no preset 'tini'"),
    ):
        with pytest.raises(UsageError, match=message):
            replace(SMALL, **change).check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="bench lengths measures a GPU"):
        run(["lengths", "--lengths", "2048", "8192"])
