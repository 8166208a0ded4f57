"""One picture of a benchmark: how near each provider comes to the ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from runners.benchmarks.harness import Row
from runners.benchmarks.records import CEILINGS, groups

# Okabe and Ito's colours, which differ to colour-blind readers too; hatches where they run out.
STYLES: dict[str, tuple[str, str]] = {
    "ours": ("#0072b2", ""),
    "torch": ("#bdbdbd", ""),
    "torch.compile": ("#6b7280", ""),
    "Liger": ("#e69f00", ""),
    "quack": ("#009e73", ""),
    "cut-cross-entropy": ("#cc79a7", ""),
    "torchao": ("#d55e00", ""),
    "bitsandbytes": ("#f0e442", ""),
    "flash-attn-4": ("#56b4e9", "//"),
    "cuDNN": ("#b7d7a8", "//"),
}
OTHER = ("#ffffff", "..")
BAR = 0.17  # inches
COLUMNS = 3


def family(provider: str) -> str:
    """Whose it is, as the legend names it.

    >>> family("ours, in place"), family("torch rms_norm"), family("bf16 matmul")
    ('ours', 'torch', 'torch')
    """
    if provider == "torch.compile":
        return provider
    name = provider.partition(",")[0]
    return "torch" if name.startswith(("torch ", "bf16")) else name


def draw_chart(path: Path, rows: Sequence[Row], title: str) -> bool:
    """A panel a kernel and direction, a group of bars a shape, on one scale. False: no figures."""
    charted = [row for row in rows if row.samples and row.charted]
    panels = list(groups(charted))
    if not panels:
        return False
    heights = [sum(len(some) + 1.2 for _, some in shapes) + 1.5 for _, shapes in panels]
    columns: list[list[int]] = [[] for _ in range(min(COLUMNS, len(panels)))]
    for i in sorted(range(len(panels)), key=lambda i: -heights[i]):  # the tall ones first
        min(columns, key=lambda column: sum(heights[j] for j in column)).append(i)
    columns = sorted(sorted(column) for column in columns)
    tall = max(sum(heights[i] for i in column) for column in columns)
    figure = Figure(figsize=(6.4 * len(columns), BAR * tall + 1.6), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11)
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    top = 1.05 * max(1.0, *(row.share for row in charted))
    for part, column in zip(parts, columns, strict=True):
        sizes = [heights[i] for i in column]
        filler = tall - sum(sizes)
        if filler > 1:
            sizes.append(filler)
        axes = part.subplots(len(sizes), 1, squeeze=False, height_ratios=sizes)[:, 0]
        for one, i in zip(axes, column, strict=False):
            _panel(one, *panels[i], top)
        for one in axes[len(column) :]:
            one.axis("off")
    seen = list(dict.fromkeys(family(row.provider) for row in charted))
    order = [name for name in STYLES if name in seen] + [n for n in seen if n not in STYLES]
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="black", linewidth=0.4, label=name)
        for name in order
        for colour, hatch in [STYLES.get(name, OTHER)]
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=9
    )
    FigureCanvasAgg(figure).print_png(str(path))
    return True


def _panel(axes: Axes, title: str, shapes: Sequence[tuple[str, list[Row]]], top: float) -> None:
    y, ticks, labels = 0.0, [], []
    for shape, some in shapes:
        axes.text(0.0, y, shape, fontsize=8, fontweight="bold", va="center")
        y += 1
        for row in some:
            colour, hatch = STYLES.get(family(row.provider), OTHER)
            axes.barh(
                y, row.share, 0.86, color=colour, hatch=hatch, edgecolor="black", linewidth=0.4
            )
            mine = family(row.provider) == "ours"
            axes.text(
                row.share + 0.01, y, f"{row.share:.0%}", fontsize=7, va="center",
                fontweight="bold" if mine else "normal",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            )  # fmt: skip
            ticks.append(y)
            labels.append(row.provider)
            y += 1
        y += 0.2
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylim(y - 0.3, -0.8)
    axes.set_xlim(0, top + 0.06)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    bounds = [name for name, _ in groupby(CEILINGS[some[0].ceiling] for _, some in shapes)]
    axes.set_title(f"{title}: share of {' and '.join(bounds)}", fontsize=9, loc="left")
