"""The figures of a run: its loss curve, and its answers about held-out pictures."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from params.disk import writing
from runners.training.metrics import Row

# matplotlib is imported where it draws, because the import takes 0.5 s
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG = "#15803d", "#b91c1c"


@dataclass(frozen=True)
class Sample:
    """One question about held-out pictures (uint8 [H, W, 3] each), and two answers."""

    images: tuple[np.ndarray, ...]
    question: str
    answer: str
    prediction: str


def draw_loss(path: Path, rows: Sequence[Row]) -> None:
    """``loss.png`` from the rows of ``metrics.jsonl``: training loss, smoothed, and validation."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    train = _series(rows, "loss")
    val = _series(rows, "val_loss")
    with _drawing(path, (7.0, 4.0)) as figure:
        axes = figure.subplots()
        axes.plot(*train, color="#93c5fd", linewidth=1)
        axes.plot(train[0], smooth(train[1]), color="#1d4ed8", label="training (smoothed)")
        if val[0]:
            axes.plot(*val, color="#ea580c", marker="o", markersize=3, label="validation")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats a token)")
        if min(train[1] + val[1], default=0) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # more would overlap
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
        axes.legend()


def draw_samples(path: Path, samples: Sequence[Sample], columns: int = 4) -> None:
    """``samples.png``: pictures with question, true answer, and the model's, green if right."""
    if not samples:
        return
    rows = math.ceil(len(samples) / columns)
    with _drawing(path, (2.6 * columns, 3.6 * rows)) as figure:
        heights = [2.6, 1.0] * rows  # pictures, words, pictures, words, ...
        grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=heights)
        for axes in grid.ravel():
            axes.axis("off")
        for i, sample in enumerate(samples):
            row, column = divmod(i, columns)
            if sample.images:
                picture = side_by_side(sample.images)
                grid[2 * row, column].imshow(picture, interpolation="nearest")
            _write(grid[2 * row + 1, column], sample)


def _write(axes: Axes, sample: Sample) -> None:
    right = sample.prediction.strip() == sample.answer.strip()
    mark, colour = ("✓", RIGHT) if right else ("✗", WRONG)
    texts = [(sample.question, "black"), (f"answer: {sample.answer}", "#6b7280")]
    y = 1.0
    for text, shade in [*texts, (f"{mark} model: {sample.prediction}", colour)]:
        lines = textwrap.wrap(text, 36, max_lines=3, placeholder=" ...")
        words = "\n".join(lines)
        axes.text(0, y, words, color=shade, fontsize=8, va="top", parse_math=False)
        y -= 0.135 * len(lines) + 0.05


def side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """Several pictures as one, on white, aligned at the top."""
    height = max(len(image) for image in images)
    padded = [
        np.pad(image, ((0, height - len(image)), (0, 0), (0, 0)), constant_values=255)
        for image in images
    ]
    return np.concatenate(padded, axis=1)


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Exponential moving average over about ``share`` of the values, unbiased at the start.

    >>> smooth([1.0, 1.0, 1.0])
    [1.0, 1.0, 1.0]
    """
    out, mean, weight = [], 0.0, 0.0
    memory = max(0.0, 1 - 1 / max(1.0, share * len(values)))
    for value in values:
        mean = memory * mean + (1 - memory) * value
        weight = memory * weight + (1 - memory)
        out.append(mean / weight)
    return out


def _series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), float)]
    return [float(step) for step, _ in found], [float(value) for _, value in found]  # type: ignore[arg-type]


@contextmanager
def _drawing(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of ``size`` inches, written to a PNG without a window or global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, layout="constrained")
    yield figure
    with warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        with writing(path) as file:
            FigureCanvasAgg(figure).print_png(file)
