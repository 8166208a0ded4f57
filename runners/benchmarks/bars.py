"""Pictures of ladders: a row a rung, a panel a quantity, bars coloured by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

BAR = 0.27  # inches a row
WIDE, NARROW = 3.6, 2.5  # inches a panel, where there are two at most, or more
# Okabe and Ito's colours, which differ to colour-blind readers too.
COLOURS = ("#6b7280", "#56b4e9", "#009e73", "#0072b2", "#e69f00", "#cc79a7", "#d55e00")


@dataclass(frozen=True)
class Bar:
    """One row: its name, its group (a colour), and for each panel a value and what is written
    beside it. None: no bar; the text says why."""

    label: str
    group: str
    values: tuple[float | None, ...]
    texts: tuple[str, ...]


def draw_bars(
    path: Path,
    title: str,
    panels: Sequence[str],
    bars: Sequence[Bar],
    *,
    sections: Sequence[str] = (),
) -> bool:
    """Writes a PNG. sections: of each bar; where it changes, its name stands above, and groups
    need no legend. False: no figures."""
    if not any(value is not None for bar in bars for value in bar.values):
        return False
    places, heads, bottom = _places(bars, sections)
    longest = max(len(bar.label) for bar in bars)
    panel = WIDE if len(panels) <= 2 else NARROW
    size = (panel * len(panels) + 0.075 * longest + 0.3, BAR * bottom + 1.3)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    groups = list(dict.fromkeys(bar.group for bar in bars))
    colours = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(groups)}
    for number, (one, name) in enumerate(zip(axes, panels, strict=True)):
        _panel(one, number, bars, places, colours)
        one.set_title(name, fontsize=9, loc="left")
    for place, name in heads:
        axes[0].annotate(
            name, (0.0, place), (4, 0), textcoords="offset points", fontsize=8, fontweight="bold",
            va="center",
        )  # fmt: skip
    axes[0].set_yticks(places, [bar.label for bar in bars], fontsize=8)
    axes[0].set_ylim(bottom, -0.8)
    handles = [
        Patch(facecolor=colours[group], edgecolor="black", linewidth=0.4, label=group)
        for group in groups
    ]
    if len(groups) > 1 and not sections:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(groups), 6), fontsize=8
        )
    FigureCanvasAgg(figure).print_png(str(path))
    return True


def _places(
    bars: Sequence[Bar], sections: Sequence[str]
) -> tuple[list[float], list[tuple[float, str]], float]:
    """Where bars and headings go, from the top, and where it ends."""
    places, heads, y, before = [], [], 0.0, None
    for i in range(len(bars)):
        if sections and sections[i] != before:
            before = sections[i]
            heads.append((y, before))
            y += 1
        places.append(y)
        y += 1
    return places, heads, y


def _panel(
    axes: Axes,
    number: int,
    bars: Sequence[Bar],
    places: Sequence[float],
    colours: Mapping[str, str],
) -> None:
    top = max((bar.values[number] or 0.0 for bar in bars), default=0.0) or 1.0
    for bar, y in zip(bars, places, strict=True):
        value = bar.values[number]
        if value is not None:
            axes.barh(y, value, 0.8, color=colours[bar.group], edgecolor="black", linewidth=0.4)
        axes.text(
            (value or 0.0) + 0.01 * top, y, bar.texts[number], fontsize=7, va="center",
            color="black" if value is not None else "#a00000",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
        )  # fmt: skip
    axes.set_xlim(0, 1.32 * top)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
