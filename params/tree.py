"""Params are nested dicts of tensors; these are the verbs for them.

Keys are strings, layers included ("0", "1", ...), so that a dotted path names a leaf without doubt
and is its name in a safetensors file. Order of keys carries no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from params.paths import select_paths

Tree = dict[str, Any]  # of tensors, or of further trees


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to ``{dotted path: leaf}``."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping):
            flat |= flatten(value, path)
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of :func:`flatten`. Raises ValueError if one path runs through another's leaf."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *above, name = path.split(".")
        node = tree
        for segment in above:
            node = node.setdefault(segment, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path} runs through a leaf at {segment!r}")
        if name in node:
            raise ValueError(f"{path} is both a leaf and a branch, or is there twice")
        node[name] = leaf
    return tree


def map_leaves(fn: Callable[..., Any], tree: Mapping[str, Any], *others: Mapping[str, Any]) -> Tree:
    """``fn`` of corresponding leaves. Raises ValueError where the trees' keys differ."""
    for other in others:
        if other.keys() != tree.keys():
            raise ValueError(f"trees differ in {sorted(other.keys() ^ tree.keys())[:4]}")
    return {
        name: map_leaves(fn, value, *(other[name] for other in others))
        if isinstance(value, Mapping)
        else fn(value, *(other[name] for other in others))
        for name, value in tree.items()
    }


def map_with_path(fn: Callable[[str, Any], Any], tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """``fn(path, leaf)`` of every leaf."""
    out: Tree = {}
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else name
        out[name] = map_with_path(fn, value, path) if isinstance(value, Mapping) else fn(path, value)
    return out


def select(tree: Tree, patterns: Sequence[str]) -> Tree:
    """The part of the tree that the patterns name; ValueError if one of them names nothing."""
    return partition(tree, patterns)[0]


def partition(tree: Tree, patterns: Sequence[str]) -> tuple[Tree, Tree]:
    """``(what the patterns name, the rest)``; :func:`merge` is the way back."""
    flat = flatten(tree)
    chosen = set(select_paths(patterns, flat))
    named = {path: leaf for path, leaf in flat.items() if path in chosen}
    rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(named), unflatten(rest)


def merge(*trees: Tree) -> Tree:
    """One tree of all leaves. Raises ValueError if a path occurs twice."""
    flat: dict[str, Any] = {}
    for tree in trees:
        part = flatten(tree)
        if clash := flat.keys() & part.keys():
            raise ValueError(f"leaves given twice: {sorted(clash)[:4]}")
        flat |= part
    return unflatten(flat)


def leaves(tree: Mapping[str, Any]) -> Iterable[Tensor]:
    return flatten(tree).values()


def count(tree: Mapping[str, Any]) -> int:
    """Parameters: elements of all leaves, the scales of quantised weights not counted."""
    return sum(t.numel() for path, t in flatten(tree).items() if not path.endswith("weight_scale"))


def num_bytes(tree: Mapping[str, Any]) -> int:
    """Bytes of all leaves, scales included."""
    return sum(t.numel() * t.element_size() for t in leaves(tree))
