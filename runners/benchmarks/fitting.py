"""How much fits into how much memory: limits for the allocator, and a search."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

NEAR = 16  # an answer is short of what fits by this part of it at most
FAR = 8  # times the largest size known: further a line is not trusted
WORTH = 4  # by how large a part longer a size must be that only time stands against
MARGIN = 0.97  # of what a line foretells: fragments take some


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


@dataclass(frozen=True)
class Try:
    """A step of some size that came to its end. needed: bytes held at its worst moment; taken:
    bytes that the allocator had of the device by then, fragments included."""

    size: int
    needed: int
    taken: int
    seconds: float


@dataclass(frozen=True)
class Found:
    """The largest size known to fit. end: why not more: the next larger one did not fit, there is
    none, or it would have taken too long."""

    size: int
    end: Literal["full", "most", "time"]


class Search:
    """The largest sizes that fit into several amounts of memory, to 1/16 or to the grid.

    What one try tells is told to every limit: with `taken` bytes it comes through, with less than
    `needed` it does not. Each next size is where the line through known peaks reaches the limit,
    and only a try within a limit, or a peak above it, says that a size does not fit.

    Args:
        attempt: (size, limit in bytes) -> the try, or None where it ran out of memory.
        work: of a step of some size, in any unit, growing with it; never less than it is next to
            that of a smaller size.
        slowest: seconds that the next try may take; sizes that would take longer are left out.
        peaks: (size, bytes) known beforehand, to guess from; pace: seconds a unit of work.
    """

    def __init__(
        self,
        attempt: Callable[[int, int], Try | None],
        *,
        smallest: int,
        most: int,
        grid: int,
        work: Callable[[int], float],
        slowest: Callable[[], float],
        peaks: Sequence[tuple[int, int]] = (),
        pace: float | None = None,
    ) -> None:
        self.attempt, self.work, self.slowest = attempt, work, slowest
        self.smallest, self.most, self.grid = min(smallest, most), most, grid
        self.peaks, self.pace = list(peaks), pace
        self.fitting: list[tuple[Try, int]] = []  # and the limit that it was made within
        self.failing: list[tuple[int, int]] = []  # size, limit

    def attempt_at(self, size: int, limit: int) -> None:
        """Makes a try and keeps what it tells."""
        made = self.attempt(size, limit)
        if made is None:
            self.failing.append((size, limit))
        else:
            self.fitting.append((made, limit))

    def largest(self, limit: int) -> Found | None:
        """For so many bytes; size 0: not even the smallest fits. None: time did not allow to say.
        Smaller limits are best asked for first: their tries are quick, and help the others."""
        while True:
            good, bad = self.known(limit)
            if bad is not None and bad <= self.smallest:
                return Found(0, "full")
            if good >= self.most:
                return Found(good, "most")
            near = max(good // NEAR, self.grid)
            if good and bad is not None and bad - good <= near:
                return Found(good, "full")
            size = self._next(limit, good, bad)
            quick = self._quick(size)
            if quick < size - size // NEAR:
                if quick < max(self.smallest, good + max(good // WORTH, self.grid)):
                    return Found(good, "time") if good else None
                size = quick
            self.attempt_at(size, limit)

    def known(self, limit: int) -> tuple[int, int | None]:
        """The largest size known to fit (0: none) and the smallest known not to (None)."""
        good = [t.size for t, at in self.fitting if t.taken <= limit or at <= limit]
        bad = [t.size for t, _ in self.fitting if t.needed > limit]
        bad += [size for size, at in self.failing if at >= limit]
        smallest = min(bad, default=None)
        return max((g for g in good if smallest is None or g < smallest), default=0), smallest

    def foretold(self, size: int) -> float:
        """Seconds of a try, at most: by the amount of work, and by the square of the size, faster
        than which no step grows."""
        squares = [t.seconds * max(1.0, (size / t.size) ** 2) for t, _ in self.fitting]
        paces = [] if self.pace is None else [self.pace * self.work(size)]
        return min((*squares, *paces), default=0.0)

    def _next(self, limit: int, good: int, bad: int | None) -> int:
        guess = self._guess(limit)
        if guess is None:
            size = 2 * good or self.smallest
        elif not good or guess > good + max(good // NEAR, self.grid):
            size = self._round(guess)
        else:  # as much as was foretold fits: the next larger one is to show that it is the end
            size = self._round(good + max(good // NEAR, self.grid))
        if bad is not None and size >= bad:
            # Just below, further each time; the middle is the furthest.
            missed = sum(at == limit for _, at in self.failing)
            step = max(bad // (NEAR + 1), self.grid) * 2 ** max(0, missed - 1)
            below = -(-(bad - step) // self.grid) * self.grid
            size = max(below, self._round((good + bad) // 2), self.smallest)
            if not good < size < bad:
                size = (good + bad) // 2
        return max(self.smallest, min(self.most, size))

    def _guess(self, limit: int) -> int | None:
        """Where the line through two peaks, of sizes apart enough, reaches the limit."""
        points = sorted({*self.peaks, *((t.size, t.needed) for t, _ in self.fitting)})
        allowed = MARGIN * limit
        above = next((i for i, (_, held) in enumerate(points) if held > allowed), len(points) - 1)
        for long in points[max(above, 1) :]:
            short = [p for p in points if p[0] < 0.9 * long[0]]
            if short:
                size = foretold(short[-1], long, allowed)
                return min(size, FAR * points[-1][0], self.most)
        return None

    def _quick(self, size: int) -> int:
        """The largest size up to this one that is foretold to be done in time."""
        allowed = self.slowest()
        if self.foretold(size) <= allowed:
            return size
        low, high = 0, size
        while high - low > self.grid:
            middle = (low + high) // 2
            low, high = (middle, high) if self.foretold(middle) <= allowed else (low, middle)
        return self._round(low)

    def _round(self, size: int) -> int:
        return size // self.grid * self.grid


def foretold(short: tuple[int, int], long: tuple[int, int], limit: float) -> int:
    """The size at which bytes reach a limit, on the line through two (size, bytes); 0 at least.

    >>> foretold((1000, 5_000), (2000, 6_000), 10_000)
    6000
    """
    slope = max((long[1] - short[1]) / (long[0] - short[0]), 1e-9)
    return max(0, int(long[0] + (limit - long[1]) / slope))
