"""Rows on disk, lines in the terminal, and the two pictures."""

from __future__ import annotations

import json
import logging
import os
import resource
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from runners.shell.errors import UserError
from runners.training.config import TrainConfig
from runners.training.figures import (
    RIGHT,
    WRONG,
    Sample,
    draw_loss,
    draw_samples,
    side_by_side,
    smooth,
)
from runners.training.metrics import Display, Metrics, check_wandb, read_metrics, warned

Micro = Callable[..., TrainConfig]
ROW = {"step": 3, "loss": 1.5, "lr": 0.1, "grad_norm": 2.0, "tokens_per_s": 1e4, "mfu": 0.5}


def test_rows_go_to_the_file_and_to_tensorboard(micro: Micro, tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, micro(tensorboard=True).run)
    metrics.write(ROW)
    metrics.write({"step": 4, "val_loss": 1.25})
    metrics.close()
    assert read_metrics(tmp_path) == [ROW, {"step": 4, "val_loss": 1.25}]
    (events,) = tmp_path.glob("events.out.tfevents*")
    assert b"val_loss" in events.read_bytes()
    assert b"tokens_per_s" in events.read_bytes()


def test_a_full_disk_at_a_row_is_a_warning(
    micro: Micro, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole rows or nothing; those that did not fit are written when there is room again."""
    metrics = Metrics(tmp_path, micro().run)
    metrics.write(ROW)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 9, hard)
    )
    try:
        for step in (4, 5):
            metrics.write(ROW | {"step": step})
            assert read_metrics(tmp_path) == [ROW]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (said,) = caplog.messages
    assert "metrics.jsonl: rows wait until they can be written: " in said
    metrics.write(ROW | {"step": 6})
    metrics.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [3, 4, 5, 6]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4


def test_boards_and_figures_that_cannot_be_written_are_warnings(
    micro: Micro, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("runners.training.metrics._board", full)
    metrics = Metrics(tmp_path, micro(tensorboard=True).run)
    metrics.write(ROW)
    metrics.write(ROW | {"step": 4})
    metrics.close()
    assert len(read_metrics(tmp_path)) == 2
    monkeypatch.setattr(os, "fsync", full)
    with warned("loss.png"):
        draw_loss(tmp_path / "loss.png", [ROW])
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}
    assert ["TensorBoard" in said or "loss.png" in said for said in caplog.messages] == [True] * 2
    assert all("No space left on device" in said for said in caplog.messages)


def test_a_reader_that_left_ends_no_run(capfd: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        display = Display(10, console=Console(file=gone))
        for step in range(3):
            display.show(ROW | {"step": step}, 10, 75.4)
    assert capfd.readouterr().err.count("the run goes on") == 1


def test_a_resumed_run_drops_later_rows(micro: Micro, tmp_path: Path) -> None:
    rows = "".join(json.dumps(ROW | {"step": step}) + "\n" for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 4, "lo')
    metrics = Metrics(tmp_path, micro().run, after=2)
    metrics.write(ROW | {"loss": 9.0})
    metrics.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [
        (1, 1.5),
        (2, 1.5),
        (3, 9.0),
    ]


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = StringIO()
    display = Display(10, console=Console(file=out, width=40))
    with display, display.logging("some.module"):
        logging.getLogger("some.module.inner").info("packed [100%]")
        logging.getLogger("some.module").warning("careful")
        display.advance(3)
        display.show(ROW, 10, 75.4)
    assert out.getvalue() == (
        "packed [100%]\nwarning: careful\n"
        "step 3/10  loss 1.5000  lr 1.00e-01  grad 2.00  10,000 tok/s  MFU 50.0%  ETA 0:01:15\n"
    )
    logging.getLogger("some.module").warning("afterwards, unheard")
    assert "unheard" not in out.getvalue()


def test_a_live_bar_in_a_terminal() -> None:
    out = StringIO()
    display = Display(10, start=2, console=Console(file=out, width=140, force_terminal=True))
    with display:
        display.advance(3)
        display.show(ROW | {"mfu": None}, 10, 75.4)
        display.say("a line that stays")
    shown = out.getvalue()
    assert "step 3/10" in shown
    assert "loss 1.5000" in shown
    assert "MFU -" in shown
    assert "a line that stays" in shown


def test_wandb_must_be_there(micro: Micro, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_wandb(micro().run)
    with pytest.raises(UserError, match="pip install wandb"):
        check_wandb(micro(wandb=True).run)


def _has(picture: Path, colour: str) -> bool:
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((pixels == wanted).all(1).any())


def test_the_loss_curve(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": 3.0 / i} for i in range(1, 50)]
    draw_loss(tmp_path / "train.png", rows)
    assert _has(tmp_path / "train.png", "#1d4ed8")
    assert not _has(tmp_path / "train.png", "#ea580c")
    draw_loss(tmp_path / "both.png", [*rows, {"step": 20, "val_loss": 1.0}])
    assert _has(tmp_path / "both.png", "#ea580c")
    draw_loss(tmp_path / "none.png", [])


def test_the_samples_show_what_was_right(tmp_path: Path) -> None:
    picture = np.full((8, 8, 3), (10, 200, 250), np.uint8)
    good = Sample((picture,), "What costs $5 or $6?", "red", " red ")
    bad = Sample((picture, picture[:4]), "Où? 日本", "left", "")
    draw_samples(tmp_path / "good.png", [good])
    assert _has(tmp_path / "good.png", "#0ac8fa")
    assert _has(tmp_path / "good.png", RIGHT)
    assert not _has(tmp_path / "good.png", WRONG)
    draw_samples(tmp_path / "both.png", [good, bad] * 3)
    assert _has(tmp_path / "both.png", WRONG)
    draw_samples(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()


def test_pictures_side_by_side() -> None:
    wide = side_by_side([np.zeros((2, 3, 3), np.uint8), np.zeros((4, 1, 3), np.uint8)])
    assert wide.shape == (4, 4, 3)
    assert wide[3, 0, 0] == 255
    assert wide[3, 3, 0] == 0


def test_smoothing_follows_and_keeps_constants() -> None:
    assert smooth([]) == []
    steps = smooth([0.0] * 50 + [1.0] * 50, share=0.1)
    assert steps[49] == 0
    assert 0 < steps[50] < steps[60] < steps[99] < 1
