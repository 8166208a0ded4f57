"""Measures the providers of a case in turns.

All of them are prepared first (imported, compiled, warmed up, captured). Then they take turns in
rounds, so that drifting clocks affect all alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from runners.benchmarks.clock import Ceiling, Clock, NotCapturableError, first_line, free
from runners.benchmarks.providers import Inputs, Provider, failing, need, timed
from runners.benchmarks.records import SCALE

SPREAD = 2**30  # bytes of inputs used in turn: many times the L2 cache
MOST_SETS = 16
SHORTEST = 1.0  # ms of a sample at least: an event costs 2 or 3 us
MOST_SAMPLES = 40  # a provider and round
WARMUPS = 3


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    work: the least bytes (ceiling "copy") or operations, by which providers are judged. 0: none.
    moved: the least bytes beside operations.
    inputs: makes one set of inputs on a device, from a generator there.
    wrt: inputs whose gradients are asked for; none: forward alone.
    seeds: inputs that are the outputs' gradients; none for a scalar loss.
    restore: inputs that some provider overwrites; they are restored before every sample.
    sets: the number of sets of inputs used in turn; by default by their size.
    reference: the provider that the others' results and times are compared with. It comes before
        them, and overwrites nothing.
    direction: the table's words for what is done; by default from `wrt`.
    """

    kernel: str
    shape: str
    work: float
    ceiling: Ceiling
    inputs: Callable[[torch.device, torch.Generator], Inputs]
    providers: tuple[Provider, ...]
    wrt: tuple[str, ...] = ()
    seeds: tuple[str, ...] = ()
    restore: tuple[str, ...] = ()
    sets: int | None = None
    reference: str = "torch eager"
    direction: str | None = None
    moved: float = 0.0

    @property
    def mode(self) -> str:
        return self.direction or ("forward + backward" if self.wrt else "forward")

    def floor(self, limits: Mapping[Ceiling, float]) -> float:
        """The least milliseconds by a device's ceilings."""
        return 1e3 * (self.work / limits[self.ceiling] + self.moved / limits["copy"])


@dataclass(frozen=True)
class Settings:
    rounds: int = 5
    seconds: float = 0.3  # of measuring, a provider and case
    backend: str = "inductor"  # of torch.compile


@dataclass
class Row:
    """A provider's figures for a case, or the reason for their absence."""

    kernel: str
    shape: str
    mode: str
    provider: str
    peer: str | None
    charted: bool
    status: Literal["ok", "missing", "out of memory", "error"] = "ok"
    reason: str | None = None  # of a status, or of not being a graph
    timing: Literal["graph", "eager"] | None = None
    samples: list[float] = field(default_factory=list)  # ms a call
    work: float = 0.0
    ceiling: Ceiling = "copy"
    floor: float = 0.0  # ms, by the ceilings of this run
    peak_bytes: int | None = None  # above inputs, results and gradients
    error: float | None = None  # |results - reference's| / |reference's|, the worst of them
    speedup: float | None = None  # the reference's time over this

    def quantile(self, share: float) -> float:
        """Of the samples, in ms."""
        return float(np.quantile(self.samples, share))

    @property
    def ms(self) -> float:
        return statistics.median(self.samples)

    @property
    def rate(self) -> float:
        """In UNITS of the ceiling."""
        return self.work / (1e-3 * self.ms) / SCALE[self.ceiling]

    @property
    def share(self) -> float:
        """Of the ceiling."""
        return self.floor / self.ms


@dataclass
class _Ready:
    """A prepared provider."""

    row: Row
    run: Callable[[], object]
    calls: int  # in one run
    ms: float  # about what a run takes, restoring included


def measure(
    case: Case,
    clock: Clock,
    limits: dict[Ceiling, float],
    settings: Settings,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """One row per provider, in order. Providers' errors become rows; DeviceLostError is raised."""
    inputs = _make_inputs(case, clock.device)
    kept = [{name: s[name].detach().clone() for name in case.restore} for s in inputs]

    def restore() -> None:
        with torch.no_grad():
            for used, first in zip(inputs, kept, strict=True):
                for name, tensor in first.items():
                    used[name].copy_(tensor)

    before = restore if case.restore else None
    rows, ready = [], []
    truth: tuple[Tensor, ...] | None = None
    for provider in case.providers:
        started = time.perf_counter()
        row = Row(
            case.kernel,
            case.shape,
            case.mode,
            provider.name,
            provider.peer,
            provider.charted,
            work=case.work,
            ceiling=case.ceiling,
            floor=case.floor(limits),
        )
        rows.append(row)
        with failing(row):
            one, results = _prepare(case, provider, clock, settings, inputs, before, row, truth)
            if provider.name == case.reference:
                truth = results
            ready.append(one)
        clock.settle()
        free(clock)
        how = f"ready, {row.timing}" if row.timing != "eager" else f"ready, eager: {row.reason}"
        said = how if row.status == "ok" else row.reason
        say(f"    {provider.name}: {said} ({time.perf_counter() - started:.1f} s)")
    del truth
    clock.free()
    _take_turns(ready, clock, settings, before)
    reference = next((r for r in rows if r.provider == case.reference and r.samples), None)
    for row in rows:
        if row.samples and reference is not None:
            row.speedup = reference.ms / row.ms
    return rows


def _make_inputs(case: Case, device: torch.device) -> list[Inputs]:
    generator = torch.Generator(device).manual_seed(0)
    first = case.inputs(device, generator)
    size = sum(x.nbytes for x in first.values() if isinstance(x, Tensor))
    count = case.sets or max(1, min(MOST_SETS, -(-SPREAD // max(1, size))))
    if device.type == "cpu" and case.sets is None:
        count = 2  # no cache worth avoiding, and no time
    return [first, *(case.inputs(device, generator) for _ in range(count - 1))]


def _prepare(
    case: Case,
    provider: Provider,
    clock: Clock,
    settings: Settings,
    inputs: list[Inputs],
    before: Callable[[], None] | None,
    row: Row,
    truth: tuple[Tensor, ...] | None,
) -> tuple[_Ready, tuple[Tensor, ...]]:
    """Builds, warms up, checks and captures a provider, and fills in its row."""
    if provider.peer is not None:
        need(provider.peer)
    forward = provider.build(inputs)
    if provider.compiled:
        forward = torch.compile(forward, fullgraph=True, dynamic=False, backend=settings.backend)
    call = timed(provider, forward, case.wrt, case.seeds)
    put_back = before or (lambda: None)

    for _ in range(WARMUPS):
        put_back()
        for one in inputs:  # each once: some libraries convert a weight at its first use
            call(one)
        clock.settle()
    put_back()
    results = call(inputs[0])
    if truth is not None:
        row.error = difference(results, truth)
    if provider.name != case.reference:
        results = ()
    put_back()
    row.peak_bytes = clock.peak(lambda: _bytes(call(inputs[0]), inputs[0]))
    clock.free()

    def through(times: int) -> Callable[[], None]:
        def run() -> None:
            # Results are held to the end, so that no call writes where the one before it did.
            held = [call(one) for one in inputs]
            for _ in range(times - 1):
                for one in inputs:
                    call(one)
            del held

        return run

    run: Callable[[], object] = through(1)
    times = 1
    try:
        if not provider.graph:
            raise NotCapturableError("not tried")
        put_back()
        run = clock.capture(run)
        row.timing = "graph"
    except NotCapturableError as error:
        row.timing, row.reason = "eager", first_line(error)
    ms = statistics.median(clock.sample(run, before, 3))
    if ms < SHORTEST and before is None:
        times = math.ceil(SHORTEST / max(ms, 1e-3))
        run = through(times)
        if row.timing == "graph":
            run = clock.capture(run)
        ms *= times
    started = time.perf_counter()
    clock.sample(run, before, 2)
    wall = 1e3 * (time.perf_counter() - started) / 2
    return _Ready(row, run, times * len(inputs), max(ms, wall)), results


def _take_turns(
    ready: Sequence[_Ready], clock: Clock, settings: Settings, before: Callable[[], None] | None
) -> None:
    budget = 1e3 * settings.seconds / settings.rounds
    for _ in range(settings.rounds):
        for one in ready:
            if one.row.status == "ok":
                count = max(1, min(MOST_SAMPLES, round(budget / one.ms)))
                with failing(one.row):
                    samples = clock.sample(one.run, before, count)
                    one.row.samples += [ms / one.calls for ms in samples]


@torch.no_grad()
def difference(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest |a - b| / |b| of pairs of tensors, in fp32 and in pieces; NaN where one is.

    >>> import torch
    >>> difference([torch.tensor([1.0, 2.2])], [torch.tensor([1.0, 2.0])]) < 0.1
    True
    """
    if [x.shape for x in results] != [x.shape for x in truth]:
        raise ValueError(
            f"its results have shapes {[tuple(x.shape) for x in results]}, "
            f"not {[tuple(x.shape) for x in truth]}"
        )
    worst = 0.0
    for a, b in zip(results, truth, strict=True):
        off = size = 0.0
        pairs = zip(a.reshape(-1).split(2**28), b.reshape(-1).split(2**28), strict=True)
        for left, right in pairs:
            wide = right.float()
            off += float((left.float() - wide).square().sum(dtype=torch.float64))
            size += float(wide.square().sum(dtype=torch.float64))
        error = math.sqrt(off / size) if size else math.sqrt(off)
        worst = error if math.isnan(error) or error > worst else worst
        if math.isnan(worst):
            break
    return worst


def _bytes(results: Sequence[Tensor], inputs: dict[str, Any]) -> int:
    """Of the storages of some results, those of the inputs not counted."""
    known = {x.untyped_storage().data_ptr() for x in inputs.values() if isinstance(x, torch.Tensor)}
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in results}
    return sum(size for pointer, size in sizes.items() if pointer not in known)
