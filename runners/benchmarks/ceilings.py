"""What the device reaches at its best, measured in the same run as everything else."""

from __future__ import annotations

import statistics
import time

import torch

from runners.benchmarks.clock import Clock
from runners.benchmarks.harness import Ceiling

ROUNDS, SAMPLES = 3, 10


def measure_ceilings(
    clock: Clock,
    *,
    copied: int = 2**32,
    side: int = 8192,
    rounds: int = ROUNDS,
    loaded: float = 0.0,
) -> dict[Ceiling, float]:
    """Bytes a second of a copy (read + written), bf16 FLOP/s and int8 OP/s of a square product.

    Random data: on zeros a matmul draws less power and runs faster than any real one.
    copied: bytes of the tensor that is copied; side: of the matrices. loaded: seconds of the same
    work right before it is timed. A card that has been idle starts at clocks that its power does
    not allow for long: one H200 gave 789 TFLOP/s in the first 16 ms, and 677 after 0.1 s.
    """
    device = clock.device
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    def int8(*shape: int) -> torch.Tensor:
        kind = {"generator": generator, "device": device, "dtype": torch.int8}
        return torch.randint(-127, 128, shape, **kind)  # type: ignore[call-overload]

    source = normal(copied // 2)
    target = torch.empty_like(source)
    a, b = normal(side, side), normal(side, side)
    product = torch.empty_like(a)
    a8, b8 = int8(side, side), int8(side, side).t()
    runs = {
        "copy": lambda: target.copy_(source),
        "bf16": lambda: torch.mm(a, b, out=product),
        "int8": lambda: torch._int_mm(a8, b8),
    }
    work = {"copy": 2.0 * source.nbytes, "bf16": 2.0 * side**3, "int8": 2.0 * side**3}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        clock.sample(run, None, 3)
    for _ in range(rounds):
        for name, run in runs.items():
            until = time.perf_counter() + loaded
            while time.perf_counter() < until:
                clock.sample(run, None, SAMPLES)
            times[name] += clock.sample(run, None, SAMPLES if rounds > 1 else 1)
    limits: dict[Ceiling, float] = {}
    for name in ("copy", "bf16", "int8"):
        limits[name] = work[name] / (1e-3 * statistics.median(times[name]))  # type: ignore[index]
    return limits
