"""A forward's sites and rules in words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from core.rules import Rule
from core.sites import SiteInfo
from params.tree import Tree, flatten


def table(
    sites: Sequence[SiteInfo],
    rules: Sequence[Rule],
    applied: Sequence[str],
    unfound: Sequence[str],
    params: Tree | None,
) -> str:
    """The text of ``Forward.explain``."""
    leaves = {} if params is None else flatten(params)
    shapes: dict[str, list[str]] = {}
    for path, leaf in leaves.items():
        owner, _, name = path.rpartition(".")
        shapes.setdefault(owner, []).append(f"{name} {list(leaf.shape)}")
        shapes[path] = [str(list(leaf.shape))]
    rows = []
    for s in sites:
        names = [rule.name for rule in rules if rule.applies(s)]
        if s.kind == "group":
            names = [_state(s, sites, rules), *names]
        held = () if s.kind == "group" else shapes.get(s.path, ())
        rows.append((s.kind, s.path, ", ".join(held), " > ".join(names)))
    rows = [("kind", "path", "params", "rules, innermost first"), *dict.fromkeys(rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]
    first = f"transforms, innermost first: {', '.join(applied) or 'none'}"
    return "\n".join([first, *lines, *_grouped(unfound)])


def open_groups(sites: Sequence[SiteInfo], rules: Sequence[Rule]) -> list[str]:
    """The groups that rules open, a line each: ``mlp: open for fp8 (linear) (28 times)``. Fused
    groups are not listed."""
    found: Counter[str] = Counter()
    for site in sites:
        if site.kind == "group" and (state := _state(site, sites, rules)) != "fused":
            found[f"{site.path.rpartition('.')[2]}: {state}"] += 1
    return [line if n == 1 else f"{line} ({n} times)" for line, n in found.items()]


def _state(group: SiteInfo, sites: Sequence[SiteInfo], rules: Sequence[Rule]) -> str:
    """Whether a group is fused, or which rules open it, and at which kinds of member."""
    members = [s for s in sites if (s.kind, s.path) in group.members]
    opening: dict[str, list[str]] = {}
    partly: dict[str, None] = {}
    for rule in rules:
        for kind in dict.fromkeys(s.kind for s in members if rule.applies(s)):
            if rule.in_group is None:
                opening.setdefault(rule.name, []).append(kind)
            else:
                partly[rule.name] = None
    if opening:
        said = (f"{name} ({', '.join(kinds)})" for name, kinds in opening.items())
        return f"open for {', '.join(said)}"
    return f"fused with {', '.join(partly)}" if partly else "fused"


def _grouped(lines: Sequence[str]) -> list[str]:
    """Joins lines that differ in a layer's number alone, with their count."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=[. ])|^\d+(?=[. ])", "*", line) for line in lines)
    rows = [line if n == 1 else f"{line} ({n} times)" for line, n in counts.items()]
    return ["no sites:", *(f"  {row}" for row in rows)] if rows else []
