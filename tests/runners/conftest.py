"""A run small enough to be trained many times in a test."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

import runners.training.compose
import runners.training.setup
from runners.data.encode.tokenizer import ChatTokenizer, train_tokenizer
from runners.train import train
from runners.training.config import TrainConfig
from runners.training.metrics import Display

OVERRIDE = (
    *("text.dim=32", "text.layers=2", "text.heads=4", "text.kv_heads=2", "text.mlp_dim=48"),
    *("vision.dim=32", "vision.layers=1", "vision.heads=2", "vision.mlp_dim=48"),
    *("vision.image_size=16", "projector.hidden=32"),
)


BASE = TrainConfig.of(
    name="micro",
    override=OVERRIDE,
    device="cpu",
    dtype="fp32",
    sequence_len=96,
    device_batch_size=2,
    steps=6,
    warmup_steps=2,
    log_every=1,
    val_every=0,
    val_batches=1,
    eval_examples=0,
    samples=0,
    tensorboard=False,
    workers=0,
)


@functools.cache
def vocabulary(texts: tuple[str, ...], size: int) -> ChatTokenizer:
    return train_tokenizer(texts, size)


@pytest.fixture(autouse=True)
def _each_vocabulary_is_trained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes as long as the steps of a micro run, and the same texts give the same one."""
    monkeypatch.setattr(
        runners.training.setup, "train_tokenizer", lambda texts, size: vocabulary((*texts,), size)
    )


@pytest.fixture
def micro(tmp_path: Path) -> Callable[..., TrainConfig]:
    """``micro(steps=3, ...)``: a config of a 30,000-parameter model, logging every step."""
    return partial(BASE.changed, runs_dir=str(tmp_path / "the runs"))


@pytest.fixture
def quiet() -> Callable[[], Display]:
    """A display that keeps its lines to itself."""
    return lambda: Display(1, console=Console(quiet=True))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes seconds a program: here forwards stay as they are."""
    monkeypatch.setattr(runners.training.compose, "compile", lambda forward, **_: forward)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, not to be changed, that has learnt to count to one, and that answers are colours."""
    config = BASE.changed(
        runs_dir=str(tmp_path_factory.mktemp("runs")),
        steps=40,
        lr=0.01,
        kinds=("colour", "count"),
        max_objects=1,
        sequence_len=128,
        schedule="constant",
        device_batch_size=4,
    )
    folder = train(config, Display(1, console=Console(quiet=True)))
    assert folder is not None
    return folder
