"""Blocks that compute the same function, so that one compiled block serves all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from core.sites import SiteInfo

Fn = Callable[..., Any]
Table = Mapping[tuple[str, str], tuple[Any, ...]]


def twins(sites: Sequence[SiteInfo], table: Table) -> dict[str, str]:
    """Each block's path -> the path of the first block of equal key and rules."""
    inside: dict[str, dict[tuple[str, str], tuple[int, ...]]] = {
        site.path: {} for site in sites if site.kind == "block"
    }
    for (kind, path), rules in table.items():
        for block in inside:
            if path == block or path.startswith(f"{block}."):
                inside[block][kind, path[len(block) :]] = tuple(map(id, rules))
    first: dict[Hashable, str] = {}
    found = {}
    for site in sites:
        if site.kind == "block":
            same_rules = frozenset(inside[site.path].items())
            key = site.path if site.key is None else (site.key, same_rules)
            found[site.path] = first.setdefault(key, site.path)
    return found


def once_for_all_alike(
    around: Callable[[Fn], Fn], sites: Sequence[SiteInfo], table: Table
) -> Callable[[Fn, str], Fn]:
    """A wrap that calls ``around`` once for equal blocks: params and tensors are arguments, so one
    result serves all."""
    same = twins(sites, table)
    made: dict[str, Fn] = {}

    def wrap(f: Fn, path: str) -> Fn:
        path = same[path]
        if path not in made:
            made[path] = around(f)
        return made[path]

    return wrap
