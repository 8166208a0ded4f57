"""From the start of `python -m runners.train` to full speed, with cold and warm compiler caches."""

from __future__ import annotations

import itertools
import os
import queue
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runners.data.tokenizer import train_tokenizer
from runners.shell import kernel_cache

# `python -m runners.train` that says when its modules are there
IMPORTED = "imported"
PROGRAM = f"import runners.train as t; print({IMPORTED!r}, flush=True); raise SystemExit(t.main())"
STEPS = 14  # lines of the log that are waited for
STEADY = 8  # the last of them, which say what the trainer reaches
PATIENCE = 300.0  # seconds without a line: something hangs
BEGUN, STEP = re.compile(r"^Run "), re.compile(r"^step (\d+)")


@dataclass(frozen=True)
class Start:
    """Seconds of one start, stage by stage. A line of the log comes when the next step has been
    handed to the device, so the last stages are late by that."""

    caches: str  # cold or warm
    imports: float  # Python and the program's modules
    prepared: float  # data, tokenizer, params, optimizer: up to the report
    first_step: float
    later_steps: tuple[float, ...]
    tokens: int = 0  # of a step
    error: str | None = None

    @property
    def total(self) -> float:
        return self.imports + self.prepared + self.first_step + sum(self.later_steps[:1])

    @property
    def tokens_per_second(self) -> float:
        """Once it runs: by the median of the last steps."""
        return self.tokens / statistics.median(self.later_steps[-STEADY:])


def measure(
    preset: str,
    override: Sequence[str],
    rows: int,
    length: int,
    say: Callable[[str], None],
    extra: Sequence[str] = (),
) -> list[Start]:
    """Two starts of a text run on random words, in a folder that is gone afterwards: the compilers'
    caches are empty for the first. extra: more flags."""
    starts = []
    with tempfile.TemporaryDirectory(prefix="cold_start_") as name:
        folder = Path(name)
        data, tokenizer = make_data(folder, 40 * rows * length)
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
            "TRITON_CACHE_DIR": "triton",
            kernel_cache.FOLDER: "flash",
            kernel_cache.QUACK_FOLDER: "quack",
        }
        environment = os.environ | {k: str(folder / v) for k, v in caches.items()}
        environment["PYTHONUNBUFFERED"] = "1"
        for caches_are in ("cold", "warm"):
            flags = [
                "--preset", preset, "--override", *override, "vision=none", "--data", str(data),
                "--tokenizer", str(tokenizer), "--runs_dir", str(folder / "runs"),
                "--name", caches_are, "--sequence_len", str(length),
                "--device_batch_size", str(rows), "--steps", "1000", "--log_every", "1",
                "--val_fraction", "0", "--val_every", "0", "--tensorboard", "0", *extra,
            ]  # fmt: skip
            starts.append(_start(caches_are, flags, environment, rows * length))
            say(describe(starts[-1]))
    return starts


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
    command = [sys.executable, "-c", PROGRAM, *flags]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: queue.Queue[tuple[float, str] | None] = queue.Queue()
    assert process.stdout is not None
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    imported: float | None = None
    begun: float | None = None
    steps: list[float] = []
    last = ""
    try:
        while len(steps) < STEPS:
            try:
                found = lines.get(timeout=PATIENCE)
            except queue.Empty:
                last = f"no line of output for {PATIENCE:.0f} s"
                break
            if found is None:
                break
            at, last = found
            if last == IMPORTED:
                imported = at
            elif begun is None and BEGUN.match(last):
                begun = at
            elif STEP.match(last):
                steps.append(at)
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
    if imported is None or begun is None or len(steps) < STEPS:
        return Start(caches, 0.0, 0.0, 0.0, (), tokens, f"it ended early: {last}")
    later = tuple(b - a for a, b in itertools.pairwise(steps))
    return Start(caches, imported - started, begun - imported, steps[0] - begun, later, tokens)


def _read(stream: object, lines: queue.Queue[tuple[float, str] | None]) -> None:
    for line in stream:  # type: ignore[attr-defined]
        lines.put((time.perf_counter(), line.strip()))
    lines.put(None)


def describe(start: Start) -> str:
    if start.error is not None:
        return f"start with {start.caches} caches: {start.error}"
    later = ", ".join(f"{seconds:.2f}" for seconds in start.later_steps[:3])
    return (
        f"start with {start.caches} caches: imports {start.imports:.1f} s, data and params "
        f"{start.prepared:.1f} s, first step {start.first_step:.1f} s, the next {later} s; "
        f"{start.total:.1f} s to the end of the second step; then {start.tokens_per_second:,.0f} "
        "tokens/s"
    )


def lines(starts: Sequence[Start]) -> list[str]:
    return [f"- {describe(start)}" for start in starts]
