"""A benchmark's output: a page of Markdown, a picture, tables in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich import table as rich_table
from rich.console import Console
from rich.markup import escape

from runners.benchmarks.records import Environment

BAR = 0.2  # inches
# Okabe and Ito's colours, which differ to colour-blind readers too.
COLOURS = (
    "#6b7280",
    "#56b4e9",
    "#009e73",
    "#e69f00",
    "#cc79a7",
    "#d55e00",
    "#f0e442",
    "#bdbdbd",
)
OURS = "#0072b2"


class Line(NamedTuple):
    """A table's line. best: of its section; ends: a section."""

    cells: Sequence[str]
    best: bool = False
    failed: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Table:
    """words: how many columns, from the left, hold no figures."""

    title: str
    headers: Sequence[str]
    lines: Sequence[Line]
    words: int = 1

    def show(self, output: Console) -> None:
        shown = rich_table.Table(title=self.title, title_justify="left", title_style="bold")
        for i, header in enumerate(self.headers):
            shown.add_column(header, justify="left" if i < self.words else "right")
        for line in self.lines:
            style = "red" if line.failed else "bold" if line.best else None
            shown.add_row(*map(escape, line.cells), style=style, end_section=line.ends)
        output.print(shown)

    def markdown(self) -> list[str]:
        rules = ["---" if i < self.words else "---:" for i in range(len(self.headers))]
        return [markdown_row(row) for row in (self.headers, rules, *map(self._marked, self.lines))]

    def _marked(self, line: Line) -> Sequence[str]:
        cells = list(line.cells)
        if line.best:
            cells[self.words] = f"**{cells[self.words]}**"
        return cells


def markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


class Bar(NamedTuple):
    """group: its colour; section: what stands above the first bar of several. No value, no bar: the
    text says why."""

    label: str
    value: float | None
    text: str
    group: str
    section: str = ""


class Panel(NamedTuple):
    """limit: where a dashed line stands."""

    title: str
    bars: Sequence[Bar]
    limit: float | None = None


@dataclass(frozen=True)
class Page:
    """The output of a benchmark. name: of its files; about: paragraphs before the tables; closing:
    lines after them."""

    name: str
    title: str
    environments: Sequence[Environment]
    tables: Sequence[Table]
    about: Sequence[str]
    closing: Sequence[str] = ()
    panels: Sequence[Panel] = field(default=(), repr=False)
    columns: int = 3  # of the picture's panels

    def markdown(self, picture: bool) -> str:
        out = [f"# {self.title}, {self.environments[-1].date[:10]}", ""]
        for where in self.environments:
            out += [f"`{where.command}`", "", *where.lines(), ""]
        for paragraph in self.about:
            out += [paragraph, ""]
        if picture:
            out += [f"![{self.title}: {self.panels[0].title}]({self.name}.png)", ""]
        for table in self.tables:
            own = table.title.lower() != self.title.lower()
            out += [f"## {table.title}", ""] if own else []
            out += [*table.markdown(), ""]
        return "\n".join([*out, *self.closing]).rstrip() + "\n"

    def write(self, folder: Path, output: Console) -> None:
        """NAME.md and NAME.png into a folder, and the tables into the terminal."""
        last = self.environments[-1]
        title = f"{self.title.lower()}, {last.device}, {last.date[:10]}"
        drawn = draw(folder / f"{self.name}.png", title, self.panels, self.columns)
        (folder / f"{self.name}.md").write_text(self.markdown(drawn))
        for table in self.tables:
            table.show(output)
        for line in filter(None, self.closing):
            output.print(escape(line), highlight=False, soft_wrap=True)
        written = ", ".join(sorted(p.name for p in folder.glob(f"{self.name}.*")))
        output.print(escape(f"In {folder}: {written}"), highlight=False)


def console() -> Console:
    """As wide as the terminal, or as the tables if there is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=150)


def teller(output: Console) -> Callable[[str], None]:
    """A function that prints lines with the seconds since its creation."""
    started = time.perf_counter()

    def say(line: str) -> None:
        line = f"{time.perf_counter() - started:6.1f} s  {line}"
        output.print(escape(line), highlight=False, soft_wrap=True)

    return say


def draw(path: Path, title: str, panels: Sequence[Panel], columns: int = 3) -> bool:
    """Writes a PNG with panels of bars in columns. False if there are no figures."""
    panels = [p for p in panels if any(bar.value is not None for bar in p.bars)]
    if not panels:
        return False
    bars = [bar for panel in panels for bar in panel.bars]
    heights = [len(p.bars) + len({bar.section for bar in p.bars}) + 3.0 for p in panels]
    stacks: list[list[int]] = [[] for _ in range(min(columns, len(panels)))]
    for i in sorted(range(len(panels)), key=lambda i: -heights[i]):  # the tall ones first
        min(stacks, key=lambda stack: sum(heights[j] for j in stack)).append(i)
    stacks = sorted(sorted(stack) for stack in stacks)
    tall = max(sum(heights[i] for i in stack) for stack in stacks)
    wide = 3.6 + 0.075 * max(len(bar.label) for bar in bars)
    figure = Figure(figsize=(wide * len(stacks), BAR * tall + 1.2), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=10)
    colours = colours_of(bars)
    parts = figure.subfigures(1, len(stacks), squeeze=False)[0]
    for part, stack in zip(parts, stacks, strict=True):
        sizes = [heights[i] for i in stack]
        filler = [tall - sum(sizes)] if tall - sum(sizes) > 1 else []
        rows = len(stack) + len(filler)
        axes = part.subplots(rows, 1, squeeze=False, height_ratios=[*sizes, *filler])[:, 0]
        for one, i in zip(axes, stack, strict=False):
            _panel(one, panels[i], colours)
        if filler:
            axes[-1].axis("off")
    if len(colours) > 1 and set(colours) != {bar.label for bar in bars}:
        handles = [Patch(facecolor=colours[group], label=group) for group in colours]
        figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))
    return True


def colours_of(bars: Sequence[Bar]) -> dict[str, str]:
    others = [group for group in dict.fromkeys(bar.group for bar in bars) if group != "ours"]
    colours = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(others)}
    return colours | ({"ours": OURS} if any(bar.group == "ours" for bar in bars) else {})


def _panel(axes: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    top = max([panel.limit or 0.0, *(bar.value or 0.0 for bar in panel.bars)]) or 1.0
    y, places, section = 0.0, [], ""
    for bar in panel.bars:
        if bar.section != section:
            section = bar.section
            axes.text(0.0, y, section, fontsize=8, fontweight="bold", va="center")
            y += 1
        if bar.value is not None:
            axes.barh(y, bar.value, 0.8, color=colours[bar.group], edgecolor="black", lw=0.4)
        axes.text(
            (bar.value or 0.0) + 0.01 * top,
            y,
            bar.text,
            fontsize=7,
            va="center",
            color="black" if bar.value is not None else "#a00000",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
        )
        places.append(y)
        y += 1
    axes.set_yticks(places, [bar.label for bar in panel.bars], fontsize=7)
    axes.set_ylim(y, -0.8)
    axes.set_xlim(0, 1.32 * top)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    if panel.limit is not None:
        axes.axvline(panel.limit, color="black", linewidth=0.8, linestyle="--")
    axes.set_title(panel.title, fontsize=9, loc="left")
