"""Dotted paths, and patterns that match them.

A path names a leaf or a site: ``text.blocks.3.mlp.down.weight``. A pattern is a sequence of
segments, each an fnmatch pattern. It matches every path that contains such a sequence anywhere:
``vision``, ``blocks.0``, ``mlp.*``, ``attn.[qk].weight``. A negative segment counts from the end
of a list of layers: ``blocks.-1`` is the last block.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

LISTED = 12  # paths that an error message shows


def matches(pattern: str, path: str, aliases: Mapping[int, str] | None = None) -> bool:
    """Whether ``pattern`` matches ``path``.

    aliases: segment index -> that segment counted from the end (``{2: "-1"}``), from
    :func:`segment_aliases` or :func:`alias_table`. Only pattern segments that start with a minus
    are compared with it, so ``[!0]`` never means the first layer.

    >>> matches("mlp.*", "text.blocks.3.mlp.down.weight"), matches("mlp.*", "text.blocks.3.mlp")
    (True, False)
    >>> matches("blocks.-1", "text.blocks.3.mlp", {2: "-1"})
    True
    """
    wanted = pattern.split(".")
    have = [(s, aliases.get(i) if aliases else None) for i, s in enumerate(path.split("."))]
    runs = (have[start : start + len(wanted)] for start in range(len(have) - len(wanted) + 1))
    return any(all(map(_fits, wanted, run)) for run in runs)


def _fits(want: str, have: tuple[str, str | None]) -> bool:
    name, alias = have
    from_the_end = alias is not None and want.startswith("-") and fnmatchcase(alias, want)
    return from_the_end or fnmatchcase(name, want)


def segment_aliases(tree: Mapping[str, Any], path: str) -> dict[int, str]:
    """Segment index -> negative index, for one path of a tree of params.

    A list is a branch whose keys are exactly ``"0" ... "n-1"``.

    >>> segment_aliases({"blocks": {"0": {"w": 1}, "1": {"w": 2}}}, "blocks.1.w")
    {1: '-1'}
    """
    aliases, node = {}, tree
    for i, segment in enumerate(path.split(".")):
        if _is_list(node):
            aliases[i] = str(int(segment) - len(node))
        node = node[segment]
    return aliases


def alias_table(paths: Iterable[str]) -> dict[str, dict[int, str]]:
    """:func:`segment_aliases` of every path, in the tree that the paths span."""
    split = {path: path.split(".") for path in paths}
    children: dict[tuple[str, ...], set[str]] = {}
    for segments in split.values():
        for i, segment in enumerate(segments):
            children.setdefault(tuple(segments[:i]), set()).add(segment)
    lists = {parent: len(names) for parent, names in children.items() if _is_list(names)}
    table: dict[str, dict[int, str]] = {path: {} for path in split}
    for path, segments in split.items():
        for i, segment in enumerate(segments):
            if (length := lists.get(tuple(segments[:i]))) is not None:
                table[path][i] = str(int(segment) - length)
    return table


def select_paths(
    patterns: Sequence[str] | str, paths: Iterable[str], *, what: str = "params"
) -> list[str]:
    """The paths that any of the patterns matches, in the order of ``paths``.

    Raises ValueError, listing the paths, if a pattern matches none.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    aliases = alias_table(paths := list(paths))
    chosen: set[str] = set()
    for pattern in patterns:
        named = {path for path in paths if matches(pattern, path, aliases[path])}
        if not named:
            raise no_match(pattern, paths, what=what)
        chosen |= named
    return [path for path in paths if path in chosen]


def no_match(pattern: str, paths: Iterable[str], *, what: str = "params") -> ValueError:
    """The error for a pattern without a match: it suggests the nearest and lists the paths."""
    paths = list(paths)
    near = difflib.get_close_matches(pattern, _runs(pattern.split("."), paths), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    kinds = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", path) for path in paths))
    more = f", ... ({len(kinds) - LISTED} more)" if len(kinds) > LISTED else ""
    have = ", ".join(kinds[:LISTED]) + more if kinds else "none at all"
    return ValueError(f"pattern {pattern!r} matches nothing{hint} There are these {what}: {have}")


def _runs(wanted: Sequence[str], paths: Iterable[str]) -> list[str]:
    """Every run of ``len(wanted)`` segments, with the wildcards of ``wanted`` in their places."""
    keep = {i for i, s in enumerate(wanted) if any(c in s for c in "*?[")}
    runs: dict[str, None] = {}
    for path in paths:
        have = path.split(".")
        for start in range(len(have) - len(wanted) + 1):
            run = have[start : start + len(wanted)]
            runs[".".join(wanted[i] if i in keep else s for i, s in enumerate(run))] = None
    return list(runs)


def _is_list(names: Collection[str]) -> bool:
    return set(names) == {str(i) for i in range(len(names))}
