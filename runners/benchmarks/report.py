"""What is shown of a benchmark: tables in the terminal, a page of Markdown, a picture."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from runners.benchmarks.chart import draw_chart
from runners.benchmarks.harness import UNITS, Row
from runners.benchmarks.records import Environment, groups

HEADERS = (
    "shape", "provider", "ms", "p20 - p80", "rate", "of ceiling", "speed", "peak MiB", "error", "by"
)  # fmt: skip
LEGEND = (
    "ms: median of one call. rate: the bytes or operations that the case needs at the least, over "
    "the time. of ceiling: the same as a share of what the device reached in this run. speed: the "
    "time of the case's first provider over this one's. peak: memory above inputs, results and "
    "gradients. error: the worst |x - y| / |y| of results and gradients against the first "
    "provider's. by: a CUDA graph, or eager calls timed by events."
)


def console() -> Console:
    """As wide as the terminal, or as the tables where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=150)


def teller(output: Console) -> Callable[[str], None]:
    """Prints lines as they come, each behind the seconds since it was made."""
    started = time.perf_counter()

    def say(line: str) -> None:
        line = f"{time.perf_counter() - started:6.1f} s  {line}"
        output.print(escape(line), highlight=False, soft_wrap=True)

    return say


def write_report(
    folder: Path, rows: Sequence[Row], environments: Sequence[Environment], output: Console
) -> None:
    """kernels.md and kernels.png, and the tables in the terminal."""
    last = environments[-1]
    drawn = draw_chart(folder / "kernels.png", rows, f"{last.device}, {last.date[:10]}")
    page = markdown(rows, environments, "kernels.png" if drawn else None)
    (folder / "kernels.md").write_text(page)
    show(rows, environments, output)
    written = ", ".join(sorted(p.name for p in folder.glob("kernels.*")))
    output.print(escape(f"In {folder}: {written}"), highlight=False)


def cells(row: Row) -> tuple[str, ...]:
    """The columns after the provider's name, for a row with figures."""
    return (
        f"{row.ms:.3f}" if row.ms >= 0.1 else f"{row.ms:.4f}",
        f"{row.quantile(0.2):.3f} - {row.quantile(0.8):.3f}",
        f"{row.rate:,.0f} {UNITS[row.ceiling]}",
        f"{row.share:.0%}",
        "" if row.speedup is None else f"{row.speedup:.2f}x",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.1f}",
        "" if row.error is None else f"{row.error:.1e}",
        row.timing or "",
    )


def missing(rows: Sequence[Row]) -> list[str]:
    """A line for every provider that was not there, with the reason, and where if not always."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.status == "missing":
            cases = found.setdefault((row.provider, row.reason or ""), [])
            if row.kernel not in cases:
                cases.append(row.kernel)
    return [
        f"{provider} ({', '.join(cases)}): {reason}" for (provider, reason), cases in found.items()
    ]


def best(rows: Sequence[Row]) -> Row | None:
    """The fastest of the rows of one shape."""
    return min((row for row in rows if row.samples), key=lambda row: row.ms, default=None)


def show(rows: Sequence[Row], environments: Sequence[Environment], output: Console) -> None:
    """Prints the tables, and where they come from: one run, or several."""
    for title, shapes in groups(rows):
        table = Table(title=title, title_justify="left", title_style="bold")
        for header in HEADERS:
            table.add_column(header, justify="left" if header in HEADERS[:2] else "right")
        for shape, some in shapes:
            first = best(some)
            for row in some:
                name = escape(row.provider)
                if row.samples:
                    style = "bold" if row is first else None
                    table.add_row(shape if row is some[0] else "", name, *cells(row), style=style)
                else:
                    table.add_row(shape if row is some[0] else "", name, row.status, style="red")
            table.add_section()
        output.print(table)
    sources = [line for environment in environments for line in environment.lines()]
    for line in (*filter(None, _closing(rows)), *sources):
        output.print(escape(line), highlight=False, soft_wrap=True)


def _closing(rows: Sequence[Row]) -> list[str]:
    raised = [
        f"- {row.provider} ({row.kernel} {row.shape}, {row.mode}): {row.reason}"
        for row in rows
        if row.status == "error"
    ]
    absent = [f"- {line}" for line in missing(rows)]
    return [
        *(["Errors:", "", *raised, ""] if raised else []),
        *(["Not measured:", "", *absent, ""] if absent else []),
    ]


def markdown(
    rows: Sequence[Row], environments: Sequence[Environment], picture: str | None = None
) -> str:
    """A page for docs/benchmarks, of one run or several."""
    out = [f"# Kernels, {environments[-1].date[:10]}", ""]
    for environment in environments:
        out += [f"`{environment.command}`", "", *environment.lines(), ""]
    out += [LEGEND, ""]
    if picture is not None:
        out += [f"![share of the ceiling, by kernel and provider]({picture})", ""]
    for title, shapes in groups(rows):
        out += [f"## {title}", "", markdown_row(HEADERS), markdown_row(["---"] * 2 + ["---:"] * 8)]
        for shape, some in shapes:
            first = best(some)
            for row in some:
                if row.samples:
                    values = list(cells(row))
                    if row is first:
                        values[0] = f"**{values[0]}**"
                else:
                    values = [row.status, *[""] * 7]
                out.append(markdown_row([shape if row is some[0] else "", row.provider, *values]))
        out.append("")
    out += _closing(rows)
    return "\n".join(out).rstrip() + "\n"


def markdown_row(values: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(values)} |"
