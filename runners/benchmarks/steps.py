"""Tables of training steps, measured in turns: time, memory, warm-up. A failure is a result."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from runners.benchmarks.clock import (
    Ceiling,
    Clock,
    DeviceLostError,
    choose_clock,
    free,
    measured_ceilings,
    quick_collection,
)
from runners.benchmarks.providers import failing
from runners.benchmarks.records import Environment, environment, write_lines
from runners.benchmarks.report import Bar, Line, Page, Panel, Table, console, teller
from runners.shell.cli import UsageError, nearest
from runners.shell.errors import UserError
from runners.training.config import check_preset
from runners.training.flops import peak_flops

Step = Callable[[], Tensor]  # one whole step; what it returns begins with the loss
LONGEST = 4.0  # seconds of a round of steps, so that a slow rung takes fewer
WITHIN = 1.05  # of the median: a step at full speed


class Ready(NamedTuple):
    """A row's step. extra: more figures by column, computed after the steps are timed."""

    step: Step
    extra: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class StepPace:
    """The number of steps. warmup: untimed steps of a round; 0: every step is timed. loaded: the
    least seconds of those, so that a card's clock has fallen to what it can sustain."""

    steps: int
    warmup: int
    loaded: float = 0.0


@dataclass(frozen=True)
class Entry:
    """A row to measure.

    start: builds it, gives its step, and frees it at the end.
    changed: the settings that it changes, for the page.
    shared: the row whose compiled programs it runs; its own warm-up is then not a figure.
    once: it takes its steps in the first round alone, since it would compile again in each.
    pace: its own pace. shape: programs compiled for another shape are dropped when it begins.
    """

    key: str
    label: str
    phase: str
    changed: str
    start: Callable[[], AbstractContextManager[Ready]]
    tokens: int  # real ones, of a step
    operations: float  # of a step, by training_flops
    pictures: int = 0  # of a step
    shared: str | None = None
    once: bool = False
    pace: StepPace | None = None
    shape: int = 0


@dataclass
class Measured:
    """The figures of an entry. status: ok, missing, out of memory, error, or not begun."""

    key: str
    label: str
    phase: str
    changed: str
    tokens: int
    operations: float
    pictures: int = 0
    status: str = "ok"
    reason: str | None = None
    samples: list[float] = field(default_factory=list)  # ms, all rounds
    walls: list[float] = field(default_factory=list)  # seconds of the steps before them
    warm_up: float | None = None  # seconds from building to the end of the first step
    peak_bytes: int | None = None
    left_bytes: int | None = None  # held before it began, by what came earlier
    loss: float | None = None  # of the first step: all rungs begin at the same params
    extra: dict[str, Any] = field(default_factory=dict)  # other columns of its table

    @staticmethod
    def of(entry: Entry) -> Measured:
        """With no figures yet."""
        return Measured(
            entry.key,
            entry.label,
            entry.phase,
            entry.changed,
            entry.tokens,
            entry.operations,
            entry.pictures,
        )

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
        """The number of steps until one is within 5% of the median.

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


def measure_round(entry: Entry, measured: Measured, clock: Clock, pace: StepPace) -> None:
    """Builds an entry, takes its steps, frees it, and fills in ``measured``, errors too. Raises
    DeviceLostError."""
    if measured.status != "ok" or (entry.once and measured.samples):
        return
    with failing(measured):
        _round(entry, measured, clock, entry.pace or pace)
    free(clock)


def _round(entry: Entry, measured: Measured, clock: Clock, pace: StepPace) -> None:
    cuda = clock.device.type == "cuda"
    first = not measured.samples
    if first and cuda:
        measured.left_bytes = torch.cuda.memory_allocated()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = before = time.perf_counter()
    last = 0.0
    with entry.start() as (step, extra):
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
        if first:
            taken.clear()
            measured.extra |= extra()


def first_loss(values: Tensor) -> float:
    """The loss of a step; reading it waits for the device."""
    return float(values.flatten()[0])


def times(measured: Measured, baseline: Measured | None) -> float | None:
    """Its tokens a second over the baseline's."""
    if baseline is None or not baseline.samples or not measured.samples:
        return None
    return measured.tokens_per_second / baseline.tokens_per_second


def find(rows: Sequence[Measured], key: str) -> Measured | None:
    return next((row for row in rows if row.key == key), None)


def check_counts(config: Any, *names: str) -> None:
    """Raises UsageError for flags below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise UsageError(f"--{name} must be 1 or more, not {getattr(config, name)}")


def check_known(flag: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Raises UsageError for an unknown word."""
    for word in given:
        if word not in known:
            raise UsageError(f"--{flag} {word}: there are {', '.join(known)}{nearest(word, known)}")


# -- tables ---------------------------------------------------------------------------------------


@contextmanager
def strict_fp32() -> Iterator[None]:
    """fp32 means fp32: no TF32 in matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Steps:
    """A table of training steps. name: of its files; headers: of its columns, the labels' first;
    changes: the introduction of the list of flags; about: what a step is; baseline: the row that
    others are multiples of."""

    name: str
    title: str
    headers: tuple[str, ...]
    legend: str
    changes: str
    about: str = ""
    baseline: str = "baseline"


@dataclass(frozen=True)
class StepBench:
    """A benchmark of training steps: flags that all of them have, and what each defines."""

    preset: str = "vlm_1.5b"
    override: tuple[str, ...] = ()
    """Changes to the preset, such as text.layers=6. The vision tower is left out."""
    only: tuple[str, ...] = ()
    """Rows of the table to measure, by the keys that --list prints. Default: all."""
    list: bool = False
    """Print the keys and measure nothing."""
    steps: int = 5
    """Timed steps of a round, at most; a slow row takes fewer."""
    warmup: int = 2
    """Steps before those, in each round, at least."""
    loaded: float = 0.0
    """Seconds of steps before those, in each round, at least: a card's clock falls under load."""
    rounds: int = 1
    """Rounds over all rows: a GPU's clock changes from minute to minute."""
    minutes: float = 8.0
    """No row begins after this time."""
    out: str = "runs/bench"
    """Folder for the results: NAME.jsonl, NAME.md and NAME.png; what is there is replaced."""

    def keys(self) -> Mapping[str, str]:
        """The rows' keys, each with its label."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises UsageError for a flag out of its range."""
        check_preset(self.preset)
        check_counts(self, "steps", "rounds")
        if self.loaded < 0:
            raise UsageError(f"--loaded is in seconds, 0 or more, not {self.loaded}")
        check_known("only", self.only, [*self.keys()])

    def table(self) -> Steps:
        raise NotImplementedError

    def entries(self, device: torch.device) -> Sequence[Entry]:
        """The rows that --only leaves."""
        raise NotImplementedError


def run_step_bench(config: StepBench, command: str) -> int:
    """Raises UserError where there is no GPU for a preset that needs one, UsageError for a flag out
    of its range."""
    config.check()
    output = console()
    if config.list:
        for key, label in config.keys().items():
            output.print(escape(f"{key:20} {label}"), highlight=False)
        return 0
    clock = choose_clock(config.preset, config.table().name)
    return bench(config, clock, command, output)


def bench(
    config: StepBench,
    clock: Clock,
    command: str,
    output: Console,
    ceilings: Callable[[Clock], dict[Ceiling, float]] = measured_ceilings,
) -> int:
    """Measures the rows in turns, and writes the figures after each, so that an early end loses
    none. Raises UserError if the device is lost."""
    table, entries = config.table(), config.entries(clock.device)
    pace = StepPace(config.steps, config.warmup, config.loaded)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    say, started = teller(output), time.perf_counter()
    rows = [Measured.of(entry) for entry in entries]
    lost: str | None = None
    with clock.session(), strict_fp32(), quick_collection():
        where = environment(clock.device, command, ceilings(clock))
        for line in (*where.lines(), table.about):
            say(line)
        clock.free()
        peak = peak_flops(clock.device, torch.bfloat16)
        lines, shape = folder / f"{table.name}.jsonl", 0
        for turn, (entry, row) in itertools.product(
            range(config.rounds), list(zip(entries, rows, strict=True))
        ):
            if time.perf_counter() - started > 60 * config.minutes:
                if turn == 0:
                    row.status, row.reason = "not begun", f"{config.minutes:g} minutes were over"
                continue
            if entry.shape != shape:
                shape = entry.shape
                torch._dynamo.reset()
                free(clock)
            before = row.status
            try:
                measure_round(entry, row, clock, pace)
            except DeviceLostError as error:
                lost = str(error)
                break
            done = [r for r in rows if r.samples or r.status != "ok"]
            write_lines(lines, [as_record(r, peak, table, rows) for r in done], where)
            if turn == 0 or row.status != before:
                say(describe(row, peak))
    for row in rows:
        if lost is not None and row.status == "ok" and not row.samples:
            row.status, row.reason = "not begun", "the device was lost"
    write_lines(lines, [as_record(row, peak, table, rows) for row in rows], where)
    page_of(table, rows, where, peak).write(folder, output)
    if lost is not None:
        raise UserError(f"the device was lost ({lost}); what was measured before it is written")
    return 0


def describe(row: Measured, peak: float | None) -> str:
    if not row.samples:
        return f"{row.label}: {row.status}: {row.reason}"
    mfu, first, held = row.mfu(peak), row.warm_up, row.left_bytes or 0
    return (
        f"{row.label}: {row.tokens_per_second:,.0f} tokens/s, {row.ms:,.1f} ms"
        + (f", {row.pictures_per_second:,.1f} pictures/s" if row.pictures else "")
        + (f", {mfu:.1%} MFU" if mfu else "")
        + (f", peak {row.peak_bytes / 2**30:.1f} GiB" if row.peak_bytes else "")
        + (f", first step {first:.0f} s" if first else "")
        + f", loss {row.loss:.4f}"
        + "".join(f", {name} {_word(value)}" for name, value in row.extra.items())
        + (f" ({held / 2**30:.1f} GiB were left by those before)" if held > 2**30 else "")
    )


def as_record(
    row: Measured, peak: float | None, table: Steps, rows: Sequence[Measured]
) -> dict[str, Any]:
    """A row as a record of JSON."""
    known: dict[str, Any] = dict(vars(row))
    if row.samples:
        known |= {
            "ms": row.ms,
            "min": min(row.samples),
            "max": max(row.samples),
            "tokens_per_second": row.tokens_per_second,
            "mfu": row.mfu(peak),
            "pictures_per_second": row.pictures_per_second,
            "warm_steps": row.warm_steps,
            "times_baseline": times(row, find(rows, table.baseline)),
        }
    return known


def cells(
    row: Measured, table: Steps, rows: Sequence[Measured], peak: float | None
) -> tuple[str, ...]:
    """The columns after the label; without figures, the status."""
    if not row.samples:
        return (row.status, *[""] * (len(table.headers) - 2))
    factor, mfu = times(row, find(rows, table.baseline)), row.mfu(peak)
    known = {
        "tok/s": f"{row.tokens_per_second:,.0f}",
        "pictures/s": f"{row.pictures_per_second:,.1f}" if row.pictures else "",
        "x baseline": f"{factor:.2f}x" if factor else "",
        "cost": f"{1 - factor:.1%}" if factor else "",
        "MFU": f"{mfu:.1%}" if mfu else "",
        "ms": f"{row.ms:,.1f}",
        "min - max": f"{min(row.samples):,.1f} - {max(row.samples):,.1f}",
        "peak GiB": f"{row.peak_bytes / 2**30:.1f}" if row.peak_bytes else "",
        "first step s": "-" if row.warm_up is None else f"{row.warm_up:.1f}",
        "steps": str(row.warm_steps),
        "timed": str(len(row.samples)),
        "loss": f"{row.loss:.4f}",
    }
    return tuple(
        known[header] if header in known else _word(row.extra.get(header))
        for header in table.headers[1:]
    )


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def page_of(
    table: Steps,
    rows: Sequence[Measured],
    where: Environment,
    peak: float | None,
) -> Page:
    lines = []
    for i, row in enumerate(rows):
        phase = row.phase if i == 0 or rows[i - 1].phase != row.phase else ""
        ends = i + 1 < len(rows) and rows[i + 1].phase != row.phase
        words = (phase, row.label, *cells(row, table, rows, peak))
        lines.append(Line(words, failed=not row.samples, ends=ends))
    absent = [f"- {row.label}: {row.status}: {row.reason}" for row in rows if not row.samples]
    closing = [
        table.changes,
        "",
        *(f"- {row.label}: `{row.changed}`" for row in rows),
        "",
        *(("Not measured:", "", *absent, "") if absent else ()),
    ]
    drawn = Table(table.title.lower(), ("phase", *table.headers), lines, words=2)
    panels = panels_of(table, rows)
    about = (f"{table.about}.", table.legend)
    return Page(table.name, table.title, [where], [drawn], about, closing, panels, len(panels))


def panels_of(table: Steps, rows: Sequence[Measured]) -> list[Panel]:
    """Panels of speed and memory. Rows without figures show the status."""
    baseline = find(rows, table.baseline)
    speeds, peaks = [], []
    for row in rows:
        rate = row.tokens_per_second if row.samples else None
        factor = times(row, baseline)
        text = row.status if rate is None else f"{rate:,.0f}"
        speeds.append(
            Bar(row.label, rate, text + (f" ({factor:.1f}x)" if factor else ""), row.phase)
        )
        gib = row.peak_bytes / 2**30 if row.peak_bytes else None
        peaks.append(Bar(row.label, gib, "" if gib is None else f"{gib:.1f}", row.phase))
    return [Panel("tokens a second", speeds), Panel("peak memory, GiB", peaks)]
