"""Seconds from the start of `python -m runners.train` to full speed, stage by stage."""

from __future__ import annotations

import itertools
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runners.data.encode.tokenizer import train_tokenizer
from runners.shell import kernel_cache

STEPS = 14  # lines of the log that are waited for
STEADY = 8  # the last of them, which say what the trainer reaches
PATIENCE = 300.0  # seconds: then something hangs
BEGUN, STEP = re.compile(r"^Run "), re.compile(r"^step (\d+)")
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    kernel_cache.FOLDER: "flash",
    kernel_cache.QUACK_FOLDER: "quack",
}


@dataclass(frozen=True)
class Start:
    """Seconds of one start. A line of the log comes when the next step has been handed to the
    device, so the last stages are late by that."""

    caches: str  # of the compilers: cold or warm
    prepared: float  # Python, modules, data, tokenizer, params, optimizer: up to the report
    first_step: float
    later_steps: tuple[float, ...]
    tokens: int  # of a step
    error: str | None = None


def measure(preset: str, override: Sequence[str], rows: int, length: int) -> list[Start]:
    """Two starts of a text run on random words, in a folder that is gone afterwards: the compilers'
    caches are empty for the first."""
    with tempfile.TemporaryDirectory(prefix="cold_start_") as name:
        folder = Path(name)
        data, tokenizer = make_data(folder, 40 * rows * length)
        caches = {variable: str(folder / cache) for variable, cache in CACHES.items()}
        environment = os.environ | caches | {"PYTHONUNBUFFERED": "1"}
        flags = [
            "--preset", preset, "--override", *override, "vision=none", "--data", str(data),
            "--tokenizer", str(tokenizer), "--runs_dir", str(folder / "runs"),
            "--sequence_len", str(length), "--device_batch_size", str(rows), "--steps", "1000",
            "--log_every", "1", "--val_fraction", "0", "--val_every", "0", "--tensorboard", "0",
        ]  # fmt: skip
        return [
            _start(caches, [*flags, "--name", caches], environment, rows * length)
            for caches in ("cold", "warm")
        ]


def make_data(folder: Path, size: int) -> tuple[Path, Path]:
    """A text of so many characters, and a tokenizer for it."""
    generator = random.Random(0)
    letters = "etaoinshrdlu"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(2000)]
    text = " ".join(generator.choices(words, k=size // 6))
    data, tokenizer = folder / "words.txt", folder / "tokenizer.json"
    data.write_text(text)
    train_tokenizer([text[:100_000]], 512).save(tokenizer)
    return data, tokenizer


def _start(caches: str, flags: Sequence[str], environment: dict[str, str], tokens: int) -> Start:
    """Reads the program's output line by line, and ends it once it has shown what is wanted: it
    would go on to write a state."""
    started, marks, last = time.perf_counter(), list[float](), ""
    process = subprocess.Popen(
        [sys.executable, "-m", "runners.train", *flags], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    watch = threading.Timer(PATIENCE, process.kill)
    watch.start()
    try:
        for line in process.stdout:
            last = line.strip()
            if (BEGUN if not marks else STEP).match(last):
                marks.append(time.perf_counter())
            if len(marks) > STEPS:
                break
    finally:
        watch.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
    if len(marks) <= STEPS:
        return Start(caches, 0.0, 0.0, (), tokens, f"it ended early: {last}")
    first, *later = (b - a for a, b in itertools.pairwise(marks))
    return Start(caches, marks[0] - started, first, tuple(later), tokens)


def describe(start: Start) -> str:
    if start.error is not None:
        return f"- start with {start.caches} caches: {start.error}"
    total = start.prepared + start.first_step + start.later_steps[0]
    rate = start.tokens / statistics.median(start.later_steps[-STEADY:])
    return (
        f"- start with {start.caches} caches: data and params {start.prepared:.1f} s, first step "
        f"{start.first_step:.1f} s; {total:.1f} s to the end of the second step; then {rate:,.0f} "
        "tokens/s"
    )
