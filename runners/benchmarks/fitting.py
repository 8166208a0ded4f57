"""The longest row that trains within so much memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from core import Bounds
from runners.benchmarks.documents import batches_of, draw_documents
from runners.benchmarks.steps import first_loss
from runners.benchmarks.training import Trained
from runners.training.compose import compose

NEAR = 16  # an answer is at most 1/16 short of what fits
SMALLEST, GRID = 1024, 128  # tokens: the shortest row that is tried, and the search's grid


class TooSlowError(Exception):
    """A step on a longer row would take too long."""


@contextmanager
def limited(gib: float, device: torch.device) -> Iterator[None]:
    """Limits PyTorch's share of a GPU's memory; beyond it is torch.OutOfMemoryError."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def largest(
    fits: Callable[[int], bool], *, smallest: int, most: int, grid: int, guess: int | None = None
) -> int:
    """The largest size that fits, to 1/16 of it or to the grid, ``most`` at most; 0: none does.

    From the smallest it is doubled until one does not fit, then halved in between. guess: where to
    begin instead, in steps of 1/16 that double: a good guess is confirmed by two or three trials.
    """
    smallest = min(smallest, most)
    size = step = smallest
    if guess is not None:
        size = min(most, max(smallest, guess // grid * grid))
        step = max(size // NEAR, 1)
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
    while bad - good > max(good // NEAR, grid):
        middle = (good + bad) // 2
        rounded = middle // grid * grid
        middle = rounded if rounded > good else middle
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def longest_rows(
    trained: Trained,
    limits: Sequence[float],
    most: int,
    allowed: Callable[[], float],
) -> dict[str, str]:
    """For each limit in GiB (0: the whole card), in words, the longest row whose whole step fits.

    Steps are eager. allowed: seconds that the next step may take; a row that would take longer, by
    the square of its length, ends the search. Smaller limits go first: their tries are quick, and
    the line through their peaks says where to begin with the next.
    """
    device = trained.programs.device
    peaks: dict[int, int] = {}
    seconds: dict[int, float] = {}
    best = 0

    def fits(tokens: int) -> bool:
        nonlocal best
        known = max(seconds, default=0)
        if known and seconds[known] * max(1.0, (tokens / known) ** 2) > allowed():
            raise TooSlowError
        gc.collect()
        torch.cuda.empty_cache()
        try:
            peaks[tokens], seconds[tokens] = row_step(trained, tokens)
        except torch.OutOfMemoryError:
            return False
        best = max(best, tokens)
        return True

    found: dict[str, str] = {}
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    for gib in sorted(limits, key=lambda gib: gib or total):
        best = 0
        with limited(gib or total, device):
            try:
                guess = foretold(peaks, 0.97 * (gib or total) * 2**30)
                size = largest(fits, smallest=SMALLEST, most=most, grid=GRID, guess=guess)
                word = f"{size:,}" + (" or more" if size == most else "")
            except TooSlowError:
                word = f"at least {best:,} (time)"
        found[limit_name(gib)] = word
    gc.collect()
    torch.cuda.empty_cache()
    return {limit_name(gib): found[limit_name(gib)] for gib in limits}


def limit_name(limit: float) -> str:
    return f"longest row in {limit:g} GiB" if limit else "longest row in the card"


def foretold(peaks: dict[int, int], limit: float) -> int | None:
    """The size at which bytes reach a limit, on the line through the largest two known.

    >>> foretold({1000: 5_000, 2000: 6_000}, 10_000)
    6000
    """
    known = sorted(peaks)[-2:]
    if len(known) < 2 or peaks[known[1]] <= peaks[known[0]]:
        return None
    slope = (peaks[known[1]] - peaks[known[0]]) / (known[1] - known[0])
    return max(0, int(known[1] + (limit - peaks[known[1]]) / slope))


def row_step(trained: Trained, tokens: int) -> tuple[int, float]:
    """A step on one row: the most bytes held, and its seconds. Raises torch.OutOfMemoryError, after
    which another can be taken."""
    programs, device = trained.programs, trained.programs.device
    config = trained.plan.config.changed(compile=False, cuda_graph=False)
    composed = compose(config, programs.model, device, Bounds(tokens))
    vocab = programs.model.text.vocab_size
    batches, _ = batches_of(draw_documents(1, tokens, 0.0), vocab, 1, True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    first_loss(trained.learner.train_step(composed.gradients(), batches))
    held = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return held, time.perf_counter() - started
