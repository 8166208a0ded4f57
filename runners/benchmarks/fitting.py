"""How much fits into how much memory: limits for the allocator, and a search."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def limited(gib: float, device: torch.device) -> Iterator[None]:
    """PyTorch gets so much of a GPU's memory at most; what is more is torch.OutOfMemoryError."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def free(device: torch.device) -> None:
    """Gives back what nobody holds any more, cycles of frames and errors included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def largest(
    fits: Callable[[int], bool],
    *,
    smallest: int,
    most: int,
    grid: int,
    guess: int | None = None,
) -> int:
    """The largest size that fits, to 1/16 of it or to the grid, ``most`` at most; 0: none does.

    From the smallest it is doubled until one does not fit, then halved in between. guess: where to
    begin instead, in steps of 1/16 that double: a good guess is confirmed by two or three trials.
    """
    smallest = min(smallest, most)
    size = step = smallest
    if guess is not None:
        size = min(most, max(smallest, guess // grid * grid))
        step = max(size // 16, 1)
    good, bad = 0, most + 1  # all below good fit, none from bad on
    while good < most:
        if fits(size):
            good = size
        else:
            bad = size
        if bad == smallest:
            return 0
        if good and bad <= most:
            break
        size = min(most, size + step) if good else max(smallest, size - step)
        step *= 2
    while bad - good > max(good // 16, grid):
        middle = (good + bad) // 2
        rounded = middle // grid * grid
        middle = rounded if rounded > good else middle
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good
