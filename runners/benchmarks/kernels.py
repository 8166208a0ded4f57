"""`bench kernels`: our kernels beside torch and whichever other libraries are installed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from runners.benchmarks import attention, elementwise, int8, losses, optimizers
from runners.benchmarks.ceilings import measure_ceilings
from runners.benchmarks.clock import Clock, CudaClock, DeviceLostError
from runners.benchmarks.harness import UNITS, Case, Ceiling, Row, Settings, measure
from runners.benchmarks.records import environment, plain, read_jsonl, write_jsonl
from runners.benchmarks.report import console, teller, write_report
from runners.shell.cli import UsageError, nearest
from runners.shell.errors import UserError


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
class TableConfig:
    """Draws up the page and the picture of figures that were written before, of one run or more."""

    files: tuple[str, ...]
    """kernels.jsonl of each run. A run that was cut short has one too."""
    out: str = "runs/bench"
    """Folder for kernels.md and kernels.png."""


def all_cases() -> list[Case]:
    return [
        *losses.cases(),
        *elementwise.cases(),
        *attention.cases(),
        *int8.cases(),
        *optimizers.cases(),
    ]


def choose_cases(config: KernelsConfig, cases: Sequence[Case]) -> list[Case]:
    """Those that the flags leave. Raises UsageError for a kernel or provider that is not known."""
    kernels = tuple(dict.fromkeys(case.kernel for case in cases))
    providers = tuple(dict.fromkeys(p.name for case in cases for p in case.providers))
    for flag, names, known in (
        ("--only", config.only, kernels),
        ("--without", config.without, providers),
    ):
        for name in names:
            if name not in known:
                raise UsageError(
                    f"{flag} {name}: there are {', '.join(known)}{nearest(name, known)}"
                )
    return [
        replace(
            case,
            providers=tuple(
                p
                for p in case.providers
                if p.name not in config.without and (config.peers or p.peer is None)
            ),
        )
        for case in cases
        if not config.only or case.kernel in config.only
    ]


def check(config: KernelsConfig) -> None:
    if config.repeats < 1:
        raise UsageError(f"--repeats must be 1 or more, not {config.repeats}")
    if config.seconds <= 0:
        raise UsageError(f"--seconds must be more than 0, not {config.seconds}")


def run_kernels(config: KernelsConfig, command: str) -> int:
    """Raises UserError where there is no GPU."""
    check(config)
    cases = choose_cases(config, all_cases())
    if not torch.cuda.is_available():
        raise UserError("bench kernels measures a GPU, and PyTorch sees none here")
    settings = Settings(config.repeats, config.seconds)
    folder = Path(config.out)
    return bench(cases, CudaClock(), settings, folder, command, console())


def run_table(config: TableConfig, command: str) -> int:
    """Raises UserError for a file that cannot be read."""
    runs = [read_jsonl(Path(file)) for file in config.files]
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for some, _ in runs for row in some]
    write_report(folder, rows, [environment for _, environment in runs], console())
    return 0


def bench(
    cases: Sequence[Case],
    clock: Clock,
    settings: Settings,
    folder: Path,
    command: str,
    output: Console,
    ceilings: Callable[[Clock], dict[Ceiling, float]] = measure_ceilings,
) -> int:
    """Measures the cases and writes everything into the folder, figures after every case, so that
    what ends a run early takes nothing along. 1 if the device was lost on the way."""
    folder.mkdir(parents=True, exist_ok=True)
    say = teller(output)
    rows: list[Row] = []
    lost: str | None = None
    gc.collect()
    gc.freeze()  # what is imported stays: no need to look through it after every case
    with clock.session():
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
            write_jsonl(folder / "kernels.jsonl", rows, where)
            torch._dynamo.reset()  # a case has functions and sizes of its own
            gc.collect()
            clock.free()
        if lost is None:
            where = replace(where, ceilings_after=plain(ceilings(clock)))
    gc.unfreeze()
    write_jsonl(folder / "kernels.jsonl", rows, where)
    write_report(folder, rows, [where], output)
    if lost is not None:
        raise UserError(f"{lost}; what was measured before it is written")
    return 0


def describe(row: Row) -> str:
    if not row.samples:
        return f"{row.provider}: {row.status}: {row.reason}"
    return (
        f"{row.provider}: {row.ms:.4f} ms, {row.rate:,.0f} {UNITS[row.ceiling]}, "
        f"{row.share:.1%} ({row.timing}, {len(row.samples)} samples)"
    )
