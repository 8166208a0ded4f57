"""The page, the lines and the picture of measured training steps, and the floor beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from core import VLMConfig
from runners.benchmarks.bars import Bar, draw_bars
from runners.benchmarks.documents import Documents
from runners.benchmarks.entries import Measured, as_record, find, times
from runners.benchmarks.harness import Ceiling
from runners.benchmarks.ladder import TOPS
from runners.benchmarks.records import Environment
from runners.benchmarks.report import markdown_row
from runners.benchmarks.roofline import Work, training_step

LEGEND = (
    "tok/s: real tokens over the median time of a whole step (forward, backward, clipping, "
    "optimizer), rounds over all rungs taking turns, everything of a rung freed before the next "
    "but its compiled programs; peers that compile take their steps in one round. With "
    "--device_batch_size=1 rows are computed one after the other and their gradients added up. "
    "MFU: 6 operations a weight and token and those of attention, recomputation not counted, over "
    "the data sheet's bf16 figure. peak: memory held at the worst moment from the second step on. "
    "first step: from building to its end, with whatever the rungs before left in the compilers' "
    "caches; -: it runs the programs of a rung before it. steps: until one came within 5% of the "
    "median. loss: of the first step, from the same weights and tokens."
)


@dataclass(frozen=True)
class Layout:
    """How figures are laid out. name: of the files; headers: of the columns, the first being that
    of the labels; changes: what the list of each row's flags is introduced by."""

    name: str
    title: str
    headers: tuple[str, ...]
    legend: str
    changes: str


RUNGS = Layout(
    "train", "Training steps",
    ("rung", "tok/s", "x baseline", "MFU", "ms", "min - max", "peak GiB", "first step s", "steps",
     "loss"),
    LEGEND, "What each rung changes of the one before, or of the one it branches off:",
)  # fmt: skip

PICTURED = replace(
    RUNGS,
    headers=("rung", "tok/s", "pictures/s", *RUNGS.headers[2:]),
    legend=(
        f"{LEGEND} Tokens are those that the decoder computes, pictures' included; MFU counts the "
        "vision tower and the projector on the patches of real pictures, forward and both "
        "gradients, each patch seeing all of its picture."
    ),
)


def describe(row: Measured, peak: float | None) -> str:
    if not row.samples:
        return f"{row.label}: {row.status}: {row.reason}"
    mfu, first, held = row.mfu(peak), row.warm_up, row.left_bytes or 0
    return (
        f"{row.label}: {row.tokens_per_second:,.0f} tokens/s, {row.ms:,.1f} ms"
        + (f", {row.pictures_per_second:,.1f} pictures/s" if row.pictures else "")
        + (f", {mfu:.1%} MFU" if mfu else "")
        + (f", peak {row.peak_bytes / 2**30:.1f} GiB" if row.peak_bytes else "")
        + (f", first step {first:.0f} s" if first else "")
        + f", loss {row.loss:.4f}"
        + (f" ({held / 2**30:.1f} GiB were left by those before)" if held > 2**30 else "")
    )


def report_floor(
    model: VLMConfig,
    documents: Documents,
    rows: Sequence[Measured],
    where: Environment,
) -> list[str]:
    """The least time of the top rung's step by this run's ceilings, and the share reached."""
    there = (row for key in TOPS if (row := find(rows, key)) is not None and row.samples)
    if (top := next(there, None)) is None:
        return []
    ceilings: Mapping[Ceiling, float] = where.ceilings  # type: ignore[assignment]
    if model.projector is not None and model.projector.kind == "resampler":
        return ["No floor: the work of a resampler is not counted by parts."]
    works = training_step(model, documents.lengths, documents.load.pictures.tolist())
    floor = sum(work.floor(ceilings) for work in works)
    parts = [floor_line(work, ceilings) for work in works]
    return [
        f"The floor of '{top.label}', by the ceilings of this run:",
        *parts,
        f"- together {floor:.1f} ms; measured {top.ms:.1f} ms: {floor / top.ms:.0%} of the way",
    ]


def floor_line(work: Work, ceilings: Mapping[Ceiling, float]) -> str:
    amounts = [
        *([f"{work.operations / 1e12:,.3g} TFLOP"] if work.operations else []),
        *([f"{work.moved / 1e9:,.3g} GB"] if work.moved else []),
    ]
    return f"- {work.part}: {', '.join(amounts)}, {work.floor(ceilings):.3g} ms"


class Report:
    """Writes what is measured."""

    def __init__(
        self,
        folder: Path,
        rows: Sequence[Measured],
        where: Environment,
        peak: float | None,
        output: Console,
        layout: Layout = RUNGS,
    ) -> None:
        self.folder, self.rows, self.where = folder, rows, where
        self.peak, self.output, self.layout = peak, output, layout
        self.path = folder / f"{layout.name}.jsonl"
        self.path.write_text("")

    def json(self, row: Measured) -> str:
        known = as_record(row, self.peak, find(self.rows, "baseline"))
        return json.dumps(known | vars(self.where)) + "\n"

    def line(self, row: Measured) -> None:
        """What is known so far; `finish` replaces these lines."""
        with self.path.open("a") as lines:
            lines.write(self.json(row))

    def cells(self, row: Measured) -> tuple[str, ...]:
        """The columns after the name, for a row with figures."""
        factor, mfu = times(row, find(self.rows, "baseline")), row.mfu(self.peak)
        known = {
            "tok/s": f"{row.tokens_per_second:,.0f}",
            "pictures/s": f"{row.pictures_per_second:,.1f}" if row.pictures else "",
            "x baseline": f"{factor:.2f}x" if factor else "",
            "MFU": f"{mfu:.1%}" if mfu else "",
            "ms": f"{row.ms:,.1f}",
            "min - max": f"{min(row.samples):,.1f} - {max(row.samples):,.1f}",
            "peak GiB": f"{row.peak_bytes / 2**30:.1f}" if row.peak_bytes else "",
            "first step s": "-" if row.warm_up is None else f"{row.warm_up:.1f}",
            "steps": str(row.warm_steps),
            "timed": str(len(row.samples)),
            "loss": f"{row.loss:.4f}",
        }
        return tuple(known[header] for header in self.layout.headers[1:])

    def finish(self, what: str, closing: Sequence[str], starts: Sequence[Any]) -> None:
        """The lines, the page and the picture, and the table in the terminal."""
        records = [self.json(row) for row in self.rows]
        records += [json.dumps(vars(start) | vars(self.where)) + "\n" for start in starts]
        self.path.write_text("".join(records))
        name = self.layout.name
        title = f"{self.layout.title.lower()}, {self.where.device}, {self.where.date[:10]}"
        drawn = self.draw(title)
        page = self.markdown(what, closing, f"{name}.png" if drawn else None)
        (self.folder / f"{name}.md").write_text(page)
        self.show()
        for line in closing:
            self.output.print(escape(line), highlight=False, soft_wrap=True)
        written = ", ".join(sorted(p.name for p in self.folder.glob(f"{name}.*")))
        self.output.print(escape(f"In {self.folder}: {written}"), highlight=False)

    def show(self) -> None:
        table = Table(title=self.layout.title.lower(), title_justify="left", title_style="bold")
        for i, header in enumerate(self.layout.headers):
            table.add_column(header, justify="right" if i else "left")
        phase = None
        for row in self.rows:
            if phase is not None and row.phase != phase:
                table.add_section()
            phase = row.phase
            if row.samples:
                table.add_row(escape(row.label), *self.cells(row))
            else:
                table.add_row(escape(row.label), row.status, style="red")
        self.output.print(table)
        for row in self.rows:
            if not row.samples:
                line = f"{row.label}: {row.status}: {row.reason}"
                self.output.print(escape(line), highlight=False, soft_wrap=True)

    def markdown(self, what: str, closing: Sequence[str], picture: str | None) -> str:
        out = [
            f"# {self.layout.title}, {self.where.date[:10]}", "", f"`{self.where.command}`", "",
            *self.where.lines(), "", f"{what}.", "", self.layout.legend, "",
        ]  # fmt: skip
        if picture is not None:
            out += [f"![tokens a second and memory, by {self.layout.headers[0]}]({picture})", ""]
        headers = self.layout.headers
        out += [
            markdown_row(("phase", *headers)),
            markdown_row(["---"] * 2 + ["---:"] * (len(headers) - 1)),
        ]
        for i, row in enumerate(self.rows):
            phase = row.phase if i == 0 or self.rows[i - 1].phase != row.phase else ""
            cells = self.cells(row) if row.samples else (row.status, *[""] * (len(headers) - 2))
            out.append(markdown_row([phase, row.label, *cells]))
        out += ["", self.layout.changes, ""]
        out += [f"- {row.label}: `{row.changed}`" for row in self.rows]
        absent = [f"- {r.label}: {r.status}: {r.reason}" for r in self.rows if not r.samples]
        out += ["", "Not measured:", "", *absent] if absent else []
        out += ["", *closing] if closing else []
        return "\n".join(out).rstrip() + "\n"

    def draw(self, title: str) -> bool:
        baseline = find(self.rows, "baseline")
        bars = []
        for row in self.rows:
            if not row.samples:
                bars.append(Bar(row.label, row.phase, (None, None), (row.status, "")))
                continue
            factor = times(row, baseline)
            speed = f"{row.tokens_per_second:,.0f}" + (f" ({factor:.1f}x)" if factor else "")
            gib = None if row.peak_bytes is None else row.peak_bytes / 2**30
            memory = "" if gib is None else f"{gib:.1f}"
            bars.append(Bar(row.label, row.phase, (row.tokens_per_second, gib), (speed, memory)))
        with_memory = any(bar.values[1] is not None for bar in bars)
        panels = ("tokens a second", "peak memory, GiB") if with_memory else ("tokens a second",)
        if not with_memory:
            bars = [replace(bar, values=bar.values[:1], texts=bar.texts[:1]) for bar in bars]
        return draw_bars(self.folder / f"{self.layout.name}.png", title, panels, bars)
