"""Dotted paths and the patterns that name them, the same for leaves and for sites.

A pattern is one or more dotted segments, each with shell wildcards, that match a run of the path's
segments anywhere: ``vision``, ``blocks.0``, ``mlp.*``, ``text.blocks.-1``. A negative index counts
from the end: the last block of each tower is ``blocks.-1``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

Aliases = Mapping[int, str]  # segment index -> its other spelling, such as {2: "-1"}


def matches(pattern: str, path: str, aliases: Aliases | None = None) -> bool:
    """Whether ``pattern`` names ``path``, or something above it.

    >>> matches("blocks.*.mlp", "text.blocks.3.mlp.down.weight")
    True
    >>> matches("blocks.-1", "text.blocks.3.mlp", {2: "-1"}), matches("lock", "text.blocks.3")
    (True, False)
    """
    wanted, have, also = pattern.split("."), path.split("."), aliases or {}
    for start in range(len(have) - len(wanted) + 1):
        if all(
            fnmatchcase(have[start + i], segment) or also.get(start + i) == segment
            for i, segment in enumerate(wanted)
        ):
            return True
    return False


def alias_table(paths: Iterable[str]) -> dict[str, Aliases]:
    """For each path, the negative spelling of its indices.

    Siblings that are exactly "0" to "n-1" are a list: "k" is also "k-n".
    """
    split = {path: path.split(".") for path in paths}
    siblings: dict[tuple[str, ...], set[str]] = {}
    for segments in split.values():
        for i, segment in enumerate(segments):
            siblings.setdefault(tuple(segments[:i]), set()).add(segment)
    lengths = {
        parent: len(names)
        for parent, names in siblings.items()
        if names == {str(i) for i in range(len(names))}
    }
    return {
        path: {
            i: str(int(segment) - lengths[parent])
            for i, segment in enumerate(segments)
            if (parent := tuple(segments[:i])) in lengths
        }
        for path, segments in split.items()
    }


def select_paths(patterns: Sequence[str], paths: Iterable[str], what: str = "leaves") -> list[str]:
    """The paths that any pattern names, in order. Raises ValueError if a pattern names none."""
    have = list(paths)
    aliases = alias_table(have)
    chosen: set[str] = set()
    for pattern in patterns:
        named = {path for path in have if matches(pattern, path, aliases[path])}
        if not named:
            raise no_match(pattern, have, what)
        chosen |= named
    return [path for path in have if path in chosen]


def no_match(pattern: str, have: Sequence[str], what: str = "leaves") -> ValueError:
    """The error for a pattern that names nothing: it says what there is, and what is near."""
    parts = {".".join(p.split(".")[i:j]) for p in have for i in range(9) for j in range(i + 1, 9)}
    near = difflib.get_close_matches(pattern, sorted(parts - {""}), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(have[:12]) + (f", ... ({len(have)} in all)" if len(have) > 12 else "")
    return ValueError(f"{pattern!r} matches none of the {what}{hint} There are: {shown}")
