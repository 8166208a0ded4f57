"""`bench kernels`: our kernels beside torch and whichever other libraries are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from runners.benchmarks import attention, elementwise, int8, layers, losses, optimizers
from runners.benchmarks.clock import (
    Ceiling,
    Clock,
    CudaClock,
    DeviceLostError,
    free,
    measure_ceilings,
    quick_collection,
)
from runners.benchmarks.harness import Case, Row, Settings, measure
from runners.benchmarks.providers import PEERS, version
from runners.benchmarks.records import CEILINGS, UNITS, Environment, environment, write_lines
from runners.benchmarks.report import Bar, Line, Page, Panel, Table, console, teller
from runners.benchmarks.steps import check_counts, check_known
from runners.shell.cli import UsageError
from runners.shell.errors import UserError

HEADERS = (
    "shape",
    "provider",
    "ms",
    "p20 - p80",
    "rate",
    "of ceiling",
    "speed",
    "peak MiB",
    "error",
    "by",
)
LEGEND = (
    "ms: median of one call. rate: the bytes or operations that the case needs at the least, over "
    "the time. of ceiling: the least time by what the device reached in this run, as a share of "
    "the time. speed: the time of the case's first provider over this one's. peak: memory above "
    "inputs, results and gradients. error: the worst |x - y| / |y| of results and gradients "
    "against the first provider's. by: a CUDA graph, or eager calls timed by events."
)


@dataclass(frozen=True)
class KernelsConfig:
    """Measures our kernels on the GPU, beside torch, as shares of ceilings of the same run."""

    peers: bool = False
    """Measure other libraries too: whichever are installed of Liger, quack, and so on."""
    only: tuple[str, ...] = ()
    """Kernels to measure, such as cross_entropy,rms_norm. Default: all."""
    without: tuple[str, ...] = ()
    """Providers to leave out, such as quack,bitsandbytes."""
    out: str = "runs/bench"
    """Folder for kernels.jsonl, kernels.md and kernels.png; what is there is replaced."""
    repeats: int = 5
    """Rounds in which the providers of a case take turns."""
    seconds: float = 0.3
    """Measuring time of a provider at one size, over all rounds."""


@dataclass(frozen=True)
class Cases:
    """A benchmark of cases. name: of its files; chart: what its bars show, "share" of the ceiling
    or "speed"."""

    name: str = "kernels"
    title: str = "Kernels"
    legend: str = LEGEND
    chart: str = "share"


def all_cases() -> list[Case]:
    return [
        *losses.cases(),
        *elementwise.cases(),
        *attention.cases(),
        *layers.cases(),
        *int8.cases(),
        *optimizers.cases(),
    ]


def choose_cases(config: KernelsConfig, cases: Sequence[Case]) -> list[Case]:
    """Those that the flags leave. Raises UsageError for a kernel or provider that is not known."""
    providers = tuple(dict.fromkeys(p.name for case in cases for p in case.providers))
    check_known("only", config.only, list(dict.fromkeys(case.kernel for case in cases)))
    check_known("without", config.without, providers)

    def kept(case: Case) -> Case:
        some = (p for p in case.providers if config.peers or p.peer is None)
        return replace(case, providers=tuple(p for p in some if p.name not in config.without))

    return [kept(case) for case in cases if not config.only or case.kernel in config.only]


def run_kernels(config: KernelsConfig, command: str) -> int:
    """Raises UserError where there is no GPU."""
    check_counts(config, "repeats")
    if config.seconds <= 0:
        raise UsageError(f"--seconds must be more than 0, not {config.seconds}")
    cases = choose_cases(config, all_cases())
    if not torch.cuda.is_available():
        raise UserError("bench kernels measures a GPU, and PyTorch sees none here")
    settings = Settings(config.repeats, config.seconds)
    return bench(cases, CudaClock(), settings, Path(config.out), command, console())


def bench(
    cases: Sequence[Case],
    clock: Clock,
    settings: Settings,
    folder: Path,
    command: str,
    output: Console,
    ceilings: Callable[[Clock], dict[Ceiling, float]] = measure_ceilings,
    what: Cases = Cases(),
) -> int:
    """Measures the cases and writes everything into the folder, figures after every case, so that
    what ends a run early takes nothing along. Raises UserError if the device was lost."""
    folder.mkdir(parents=True, exist_ok=True)
    say, path = teller(output), folder / f"{what.name}.jsonl"
    rows: list[Row] = []
    lost: str | None = None
    with clock.session(), quick_collection():
        before = ceilings(clock)
        where = environment(clock.device, command, before)
        for line in where.lines():
            say(line)
        clock.free()
        for i, case in enumerate(cases, start=1):
            say(f"[{i}/{len(cases)}] {case.kernel} {case.shape}, {case.mode}")
            try:
                measured = measure(case, clock, before, settings, say)
            except DeviceLostError as error:
                lost = f"{case.kernel} {case.shape}: the device was lost ({error})"
                break
            rows += measured
            for row in measured:
                say(f"  {describe(row)}")
            write_lines(path, map(as_record, rows), where)
            torch._dynamo.reset()  # a case has functions and sizes of its own
            free(clock)
        if lost is None:
            where = replace(where, ceilings_after={str(k): v for k, v in ceilings(clock).items()})
    write_lines(path, map(as_record, rows), where)
    page_of(rows, [where], what).write(folder, output)
    if lost is not None:
        raise UserError(f"{lost}; what was measured before it is written")
    return 0


def describe(row: Row) -> str:
    if not row.samples:
        return f"{row.provider}: {row.status}: {row.reason}"
    reached = f", {row.rate:,.0f} {UNITS[row.ceiling]}, {row.share:.1%}" if row.work else ""
    return f"{row.provider}: {row.ms:.4f} ms{reached} ({row.timing}, {len(row.samples)} samples)"


def as_record(row: Row) -> dict[str, Any]:
    """Everything known of a row, for a line of JSON."""
    known: dict[str, Any] = asdict(row) | {"unit": UNITS[row.ceiling]}
    if row.samples:
        known |= {
            "ms": row.ms,
            "p20": row.quantile(0.2),
            "p80": row.quantile(0.8),
            "rate": row.rate,
            "share": row.share,
        }
    return known | {"version": version(PEERS[row.peer][1]) if row.peer else None}


# -- the page -------------------------------------------------------------------------------------


def page_of(rows: Sequence[Row], environments: Sequence[Environment], what: Cases) -> Page:
    tables, panels = [], []
    for title, table in grouped(rows):
        tables.append(Table(title, HEADERS, list(lines_of(table)), words=2))
        panels.append(panel_of(title, table, what.chart))
    return Page(what.name, what.title, environments, tables, [what.legend], failures(rows), panels)


def grouped(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Tables: a kernel and direction, in the order of their first appearance; missing ones left
    out."""
    shown = [row for row in rows if row.status != "missing"]
    place = {key: i for i, key in enumerate(dict.fromkeys((r.kernel, r.mode) for r in shown))}
    ordered = sorted(shown, key=lambda row: place[row.kernel, row.mode])
    for title, table in groupby(ordered, key=lambda row: f"{row.kernel}, {row.mode}"):
        yield title, list(table)


def lines_of(table: Sequence[Row]) -> Iterator[Line]:
    for shape, group in groupby(table, key=lambda row: row.shape):
        some = list(group)
        first = best(some)
        for row in some:
            words = (shape if row is some[0] else "", row.provider)
            figures = cells(row) if row.samples else (row.status, *[""] * 7)
            yield Line((*words, *figures), row is first, not row.samples, row is some[-1])


def best(rows: Sequence[Row]) -> Row | None:
    """The fastest of the rows of one shape."""
    return min((row for row in rows if row.samples), key=lambda row: row.ms, default=None)


def cells(row: Row) -> tuple[str, ...]:
    """The columns after the provider's name, for a row with figures."""
    return (
        f"{row.ms:.3f}" if row.ms >= 0.1 else f"{row.ms:.4f}",
        f"{row.quantile(0.2):.3f} - {row.quantile(0.8):.3f}",
        f"{row.rate:,.0f} {UNITS[row.ceiling]}" if row.work else "",
        f"{row.share:.0%}" if row.work else "",
        "" if row.speedup is None else f"{row.speedup:.2f}x",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.1f}",
        "" if row.error is None else f"{row.error:.1e}",
        row.timing or "",
    )


def panel_of(title: str, table: Sequence[Row], chart: str) -> Panel:
    bars = []
    for row in table:
        if row.samples and row.charted:
            value = row.share if chart == "share" else row.speedup or 0.0
            text = f"{value:.0%}" if chart == "share" else f"{value:.2f}x, {row.ms:.3g} ms"
            bars.append(Bar(row.provider, value, text, family(row.provider), row.shape))
    bounds = dict.fromkeys(CEILINGS[row.ceiling] for row in table)
    of = f"share of {' and '.join(bounds)}" if chart == "share" else "over the first"
    return Panel(f"{title}: {of}", bars, 1.0)


def family(provider: str) -> str:
    """Whose it is, as the legend names it.

    >>> family("ours, in place"), family("torch rms_norm"), family("bf16 matmul")
    ('ours', 'torch', 'torch')
    """
    if provider == "torch.compile":
        return provider
    name = provider.partition(",")[0]
    return "torch" if name.startswith(("torch ", "bf16")) else name


def failures(rows: Sequence[Row]) -> list[str]:
    raised = [
        f"- {row.provider} ({row.kernel} {row.shape}, {row.mode}): {row.reason}"
        for row in rows
        if row.status not in ("ok", "missing")
    ]
    absent = [f"- {line}" for line in missing(rows)]
    return [
        *(["Errors:", "", *raised, ""] if raised else []),
        *(["Not measured:", "", *absent, ""] if absent else []),
    ]


def missing(rows: Sequence[Row]) -> list[str]:
    """A line for every provider that was not there, with the reason, and where if not always."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.status == "missing":
            cases = found.setdefault((row.provider, row.reason or ""), [])
            if row.kernel not in cases:
                cases.append(row.kernel)
    return [
        f"{provider} ({', '.join(cases)}): {reason}" for (provider, reason), cases in found.items()
    ]
