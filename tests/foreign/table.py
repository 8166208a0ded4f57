"""The matrix as a page: ``python -m tests.foreign.table docs/foreign-modules.md``.

Takes hours on one core; ``--only mixtral`` selects families by a part of their name.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import platform
import sys
from collections import Counter
from pathlib import Path

import torch

from tests.foreign.cells import COLUMNS, Cell, row
from tests.foreign.families import REGISTRY, Family

GROUPS = ("text", "experts", "recurrent", "encoders", "vision", "multimodal", "plain")
LEGEND = {
    "R": "right: output, loss and gradients equal those of the bare module under plain autograd",
    "c": "refused by an error that names the module, the weight or the argument, and the remedy",
    "b": "the bare module itself fails (under that driver, in that dtype, in that mode)",
    "-": "not applicable: no labels, no attention mask, no second implementation, ...",
    "W": "**wrong**",
    "U": "**an unclear error**",
}


def families() -> dict[str, Family]:
    """Every family, by name."""
    for group in GROUPS:
        importlib.import_module(f"tests.foreign.{group}")
    return REGISTRY


def page(rows: dict[str, dict[str, Cell]]) -> str:
    """Markdown: what was run, the counts, the legend, a table per group, and the errors."""
    counts = Counter(cell.glyph for cells in rows.values() for cell in cells.values())
    total = sum(counts.values())
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")
    )
    lines = [
        "# Foreign modules",
        "",
        "`from_module` and the transforms on model families of other libraries, with tiny random",
        "configs, on a CPU. `python -m tests.foreign.table` wrote this page",
        f"({datetime.date.today()}, Python {platform.python_version()}, {versions}). Each row is",
        "also a test: `python -m pytest -m slow tests/foreign -k mixtral`.",
        "",
        f"{len(rows)} families, {total} cells: "
        + ", ".join(f"{counts[g]} {g}" for g in LEGEND if counts[g] or g in "WU")
        + ".",
        "",
        "| cell | |",
        "|---|---|",
        *(f"| {glyph} | {text} |" for glyph, text in LEGEND.items()),
        "",
        "| column | |",
        "|---|---|",
        *(f"| {name} | {text} |" for name, (_, text) in COLUMNS.items()),
    ]
    registry = families()
    for group in dict.fromkeys(registry[name].group for name in rows):
        members = [name for name in rows if registry[name].group == group]
        lines += ["", f"## {group[0].upper()}{group[1:]}", ""]
        lines += [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        for name in members:
            glyphs = " | ".join(rows[name][c].glyph if c in rows[name] else " " for c in COLUMNS)
            lines.append(f"| {name} | {glyphs} |")
    for glyph, title in (("c", "What is refused"), ("b", "What the bare module cannot do")):
        told: dict[str, list[str]] = {}
        for name, cells in rows.items():
            for column, cell in cells.items():
                if cell.glyph == glyph:
                    said = cell.said.splitlines()[0][:200].replace("|", "/")
                    told.setdefault(said, []).append(f"{name} ({column})")
        if told:
            lines += ["", f"## {title}", ""]
            lines += [f"- {', '.join(where)}: `{said}`" for said, where in told.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--only", default="", help="part of a family's name")
    parser.add_argument("--columns", nargs="*", choices=COLUMNS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name, family in families().items():
        if given.only.lower() in name.lower():
            rows[name] = row(family, given.columns)
            glyphs = " ".join(f"{c}:{cell.glyph}" for c, cell in rows[name].items())
            print(f"{name}: {glyphs}", file=sys.stderr, flush=True)
            for column, cell in rows[name].items():
                if cell.glyph in "WUc":
                    print(
                        f"    {column} {cell.glyph} {cell.said[:300]}", file=sys.stderr, flush=True
                    )
    if given.out:
        given.out.write_text(page(rows))


if __name__ == "__main__":
    main()
