"""Timing on a device: CUDA graphs and events on a GPU, a wall clock on a CPU; its ceilings."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, Protocol

import torch

from core import PRESETS, VLMConfig
from runners.shell.errors import UserError

Run = Callable[[], object]
Ceiling = Literal["copy", "bf16", "int8"]


class NotCapturableError(Exception):
    """The reason why a call cannot be captured as a CUDA graph."""


class DeviceLostError(Exception):
    """The device does not respond: an earlier kernel wrote out of bounds."""


class Clock(Protocol):
    """Runs and times calls on one device."""

    device: torch.device

    def session(self) -> AbstractContextManager[None]:
        """The context in which everything runs."""

    def capture(self, run: Run) -> Run:
        """The same work as a CUDA graph. Raises NotCapturableError."""

    def sample(self, run: Run, before: Run | None, count: int) -> list[float]:
        """Milliseconds of each of ``count`` runs; ``before()`` is not timed."""

    def peak(self, run: Callable[[], int]) -> int | None:
        """Peak bytes during ``run`` above those before it, less its results' bytes, which it
        returns. None on a CPU."""

    def settle(self) -> None:
        """Waits for the device. Raises DeviceLostError."""

    def free(self) -> None:
        """Returns cached memory to the device."""


class CpuClock:
    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def session(self) -> AbstractContextManager[None]:
        return nullcontext()

    def capture(self, run: Run) -> Run:
        raise NotCapturableError("a CPU has no CUDA graphs")

    def sample(self, run: Run, before: Run | None, count: int) -> list[float]:
        times = []
        for _ in range(count):
            if before is not None:
                before()
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return times

    def peak(self, run: Callable[[], int]) -> int | None:
        run()
        return None

    def settle(self) -> None:
        pass

    def free(self) -> None:
        pass


class CudaClock:
    """Runs everything on one side stream, so that graphs are captured on the stream of the warm-up:
    autograd remembers streams."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream()

    @contextmanager
    def session(self) -> Iterator[None]:
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            yield

    def capture(self, run: Run) -> Run:
        self.settle()
        torch.cuda.set_sync_debug_mode("error")  # a call that waits would spoil a capture
        try:
            run()
        except RuntimeError as error:
            raise NotCapturableError(f"it waits for the device: {first_line(error)}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                run()
        except RuntimeError as error:
            raise NotCapturableError(first_line(error)) from error
        graph.replay()
        self.settle()
        return partial(_replay, graph, run)

    def sample(self, run: Run, before: Run | None, count: int) -> list[float]:
        events = []
        for _ in range(count):
            if before is not None:
                before()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((start, end))
        self.settle()
        return [start.elapsed_time(end) for start, end in events]

    def peak(self, run: Callable[[], int]) -> int | None:
        self.settle()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = run()
        self.settle()
        return max(0, torch.cuda.max_memory_allocated() - before - results)

    def settle(self) -> None:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # AcceleratorError is one
            raise DeviceLostError(first_line(error)) from error

    def free(self) -> None:
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none.

    >>> first_line(ValueError("no such thing\\nat line 3"))
    'no such thing'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


def _replay(graph: torch.cuda.CUDAGraph, captured: Run) -> None:
    """Keeps `captured` alive with its graph, which reads the tensors it holds."""
    graph.replay()


def choose_clock(preset: str, name: str) -> Clock:
    """The GPU's clock, or a CPU's for small presets. Raises UserError."""
    if torch.cuda.is_available():
        return CudaClock()
    if VLMConfig(PRESETS[preset].text).num_params() > 2e8:
        raise UserError(
            f"bench {name} measures a GPU, and PyTorch sees none here (--preset tiny runs anywhere)"
        )
    return CpuClock()


@contextmanager
def quick_collection() -> Iterator[None]:
    """Exempts imported objects from garbage collection, which runs after every row."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def free(clock: Clock) -> None:
    """Frees unreferenced memory, in reference cycles of frames and errors too."""
    gc.collect()
    clock.free()


# -- the device's ceilings ------------------------------------------------------------------------


def measured_ceilings(clock: Clock) -> dict[Ceiling, float]:
    """The ceilings in this run; on a CPU at tiny sizes."""
    if clock.device.type == "cuda":
        return measure_ceilings(clock, loaded=0.5)
    return measure_ceilings(clock, copied=2**20, side=64, rounds=1)


def measure_ceilings(
    clock: Clock, *, copied: int = 2**32, side: int = 8192, rounds: int = 3, loaded: float = 0.0
) -> dict[Ceiling, float]:
    """Bytes per second of a copy (read + written), bf16 FLOP/s and int8 OP/s of a square product.

    The data is random: on zeros a product draws less power and runs faster.

    copied: bytes of the copied tensor; side: of the matrices; loaded: seconds of the same work
    before timing, since an idle card starts at clocks that its power limit does not sustain.
    """
    device = clock.device
    generator = torch.Generator(device).manual_seed(0)
    kind: Any = {"generator": generator, "device": device}
    source = torch.randn(copied // 2, dtype=torch.bfloat16, **kind)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, **kind) for _ in range(2))
    product = torch.empty_like(a)
    a8, b8 = (torch.randint(-127, 128, (side, side), dtype=torch.int8, **kind) for _ in range(2))
    runs: dict[Ceiling, tuple[float, Run]] = {
        "copy": (2.0 * source.nbytes, lambda: target.copy_(source)),
        "bf16": (2.0 * side**3, lambda: torch.mm(a, b, out=product)),
        "int8": (2.0 * side**3, lambda: torch._int_mm(a8, b8.t())),
    }
    times: dict[Ceiling, list[float]] = {name: [] for name in runs}
    for _, run in runs.values():
        clock.sample(run, None, 3)
    for _ in range(rounds):
        for name, (_, run) in runs.items():
            until = time.perf_counter() + loaded
            while time.perf_counter() < until:
                clock.sample(run, None, 10)
            times[name] += clock.sample(run, None, 10 if rounds > 1 else 1)
    return {
        name: work / (1e-3 * statistics.median(times[name])) for name, (work, _) in runs.items()
    }
