"""Whole training steps, measured in turns: time, memory, warm-up; what fails is a result."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from runners.benchmarks.clock import Clock, DeviceLostError, first_line
from runners.benchmarks.providers import MissingError
from runners.shell.errors import UserError

Step = Callable[[], Tensor]  # one whole step; what it returns begins with the loss
LONGEST = 4.0  # seconds of a round of steps, so that a slow rung takes fewer
WITHIN = 1.05  # of the median: a step at full speed


@dataclass(frozen=True)
class Entry:
    """One rung or peer. start: builds it, gives its step, and frees all of it at the end."""

    key: str
    label: str
    phase: str
    changed: str  # what is changed, as the report says it
    start: Callable[[], AbstractContextManager[Step]]
    shared: str | None = None  # the rung whose compiled programs it runs: its warm-up is no figure
    once: bool = False  # would compile again in each round: takes its steps in the first alone


@dataclass
class Measured:
    """An entry's figures. status: ok, missing, out of memory, error, or not begun."""

    key: str
    label: str
    phase: str
    changed: str
    tokens: int  # real ones, of a step
    operations: float  # of a step, by training_flops
    status: str = "ok"
    reason: str | None = None
    samples: list[float] = field(default_factory=list)  # ms, all rounds
    walls: list[float] = field(default_factory=list)  # seconds of the steps before them
    warm_up: float | None = None  # seconds from building to the end of the first step
    peak_bytes: int | None = None
    left_bytes: int | None = None  # held before it began, by what came earlier
    loss: float | None = None  # of the first step: all rungs begin at the same params
    pictures: int = 0  # of a step

    @property
    def ms(self) -> float:
        return statistics.median(self.samples)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / (1e-3 * self.ms)

    @property
    def pictures_per_second(self) -> float:
        return self.pictures / (1e-3 * self.ms)

    @property
    def warm_steps(self) -> int:
        """How many steps it took to come within 5% of the median.

        >>> m = Measured("", "", "", "", 1, 1.0, samples=[10.0, 10.0], walls=[3.0, 0.02, 0.0104])
        >>> m.warm_steps
        3
        """
        steps = [*(1e3 * wall for wall in self.walls), *self.samples]
        limit = WITHIN * self.ms
        return next((i for i, ms in enumerate(steps, 1) if ms <= limit), len(steps))

    def mfu(self, peak: float | None) -> float | None:
        """Of the data sheet's bf16 figure."""
        return self.operations / (1e-3 * self.ms) / peak if peak else None


@dataclass(frozen=True)
class Pace:
    """How often. warmup: steps of a round before those that are timed; 0: none, and every step is
    timed, however slow. loaded: seconds that they take at least, so that a card's clock has come
    down to what it can keep."""

    steps: int
    warmup: int
    loaded: float = 0.0


def measure_round(entry: Entry, measured: Measured, clock: Clock, pace: Pace) -> None:
    """Builds an entry, takes its steps, and frees it. Fills in ``measured``, errors as well. Raises
    DeviceLostError."""
    if measured.status != "ok" or (entry.once and measured.samples):
        return
    try:
        _round(entry, measured, clock, pace)
    except DeviceLostError:
        raise
    except torch.OutOfMemoryError as error:
        measured.status, measured.reason = "out of memory", first_line(error)
    except (MissingError, ImportError, UserError) as error:
        measured.status, measured.reason = "missing", first_line(error)
    except Exception as error:  # a ladder goes on without the rung that raises
        measured.status = "error"
        measured.reason = f"{type(error).__name__}: {first_line(error)}"
    if measured.status != "ok":
        measured.samples.clear()
    free(clock)


def _round(entry: Entry, measured: Measured, clock: Clock, pace: Pace) -> None:
    cuda = clock.device.type == "cuda"
    first = not measured.samples
    if first and cuda:
        measured.left_bytes = torch.cuda.memory_allocated()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = before = time.perf_counter()
    last = 0.0
    with entry.start() as step:
        busy = 0.0  # without the first step, which compiles
        for i in itertools.count():
            if i >= pace.warmup and busy >= pace.loaded:
                break
            loss = first_loss(step())
            clock.settle()
            now = time.perf_counter()
            if first:
                measured.walls.append(now - before)
            if first and i == 0:
                measured.warm_up = None if entry.shared else now - start
                measured.loss = loss
            last, before = now - before, now
            busy += last if i else 0.0
            if i == 0 and cuda:
                # From the second step on, not the timed ones alone: a CUDA graph allocates nothing
                # any more when it runs.
                torch.cuda.reset_peak_memory_stats()
        count = max(1, min(pace.steps, round(LONGEST / max(last, 1e-9))))
        taken: list[Tensor] = []
        measured.samples += clock.sample(lambda: taken.append(step()), None, count)
        if measured.loss is None:
            measured.loss = first_loss(taken[0])
        if cuda:
            measured.peak_bytes = torch.cuda.max_memory_allocated()


def first_loss(values: Tensor) -> float:
    """Of what a step returns: reading waits for the device."""
    return float(values.flatten()[0])


@contextmanager
def quick_collection() -> Iterator[None]:
    """What is imported stays: no need to look through it after every rung, at 0.2 s each."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def free(clock: Clock) -> None:
    """Gives back what nobody holds any more, cycles of frames and errors included."""
    gc.collect()
    clock.free()


def as_record(measured: Measured, peak: float | None, baseline: Measured | None) -> dict[str, Any]:
    """Everything known of a row, for a line of JSON."""
    known: dict[str, Any] = dict(vars(measured))
    if measured.samples:
        known |= {
            "ms": measured.ms, "min": min(measured.samples), "max": max(measured.samples),
            "tokens_per_second": measured.tokens_per_second, "mfu": measured.mfu(peak),
            "pictures_per_second": measured.pictures_per_second,
            "warm_steps": measured.warm_steps, "times_baseline": times(measured, baseline),
        }  # fmt: skip
    return known


def times(measured: Measured, baseline: Measured | None) -> float | None:
    """Its tokens a second over the baseline's."""
    if baseline is None or not baseline.samples or not measured.samples:
        return None
    return measured.tokens_per_second / baseline.tokens_per_second


def find(rows: Sequence[Measured], key: str) -> Measured | None:
    return next((row for row in rows if row.key == key), None)
