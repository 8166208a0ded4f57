"""Pytrees of params: nested dicts with str keys; leaves are tensors, or anything but dicts.

A leaf's dotted path is its name in a safetensors file. Keys contain no dots; the layers of a list
are keyed ``"0"``, ``"1"``, ... The order of keys never matters, and flattening drops empty dicts.
All functions return new dicts around the same leaves. The ones without patterns trace under
``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from params.paths import select_paths

Tree = dict[str, Any]  # str -> Tree | Tensor


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a": {"b": x}} -> {"a.b": x}``. Raises ValueError for a key that is not a dotless str."""
    flat: dict[str, Any] = {}
    _flatten_into(flat, "", tree)
    return flat


def _flatten_into(flat: dict[str, Any], prefix: str, tree: Mapping[str, Any]) -> None:
    for key, value in tree.items():
        if not isinstance(key, str) or "." in key or not key:
            raise ValueError(f"key {key!r} under {prefix!r} is not a name: a str without dots")
        if isinstance(value, Mapping):
            _flatten_into(flat, f"{prefix}{key}.", value)
        else:
            flat[prefix + key] = value


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of :func:`flatten`. Raises ValueError if a path is both a leaf and a branch."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *branches, name = path.split(".")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path} lies under {branch!r}, which is a leaf")
        if name in node:
            raise ValueError(f"{path} is a leaf and a branch at once")
        node[name] = leaf
    return tree


def map_leaves(fn: Callable[..., Any], tree: Mapping[str, Any], *rest: Mapping[str, Any]) -> Tree:
    """``fn(leaf, *leaves at the same path of the other trees)`` at every leaf.

    Raises ValueError, naming the path, if the trees differ in structure.
    """
    return _map(lambda path, *leaves: fn(*leaves), "", tree, *rest)


def map_with_path(fn: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> Tree:
    """``fn(path, leaf)`` at every leaf."""
    return _map(fn, "", tree)


def _map(
    fn: Callable[..., Any], prefix: str, tree: Mapping[str, Any], *rest: Mapping[str, Any]
) -> Tree:
    for other in rest:
        if not isinstance(other, Mapping) or other.keys() != tree.keys():
            raise ValueError(f"the trees differ under {prefix.rstrip('.') or 'their root'!r}")
    out: Tree = {}
    for key, value in tree.items():
        others = [other[key] for other in rest]
        if isinstance(value, Mapping):
            out[key] = _map(fn, f"{prefix}{key}.", value, *others)
        elif any(isinstance(other, Mapping) for other in others):
            raise ValueError(
                f"the trees differ: {prefix}{key} is a leaf in one, a branch in another"
            )
        else:
            out[key] = fn(prefix + key, value, *others)
    return out


def select(tree: Mapping[str, Any], patterns: Sequence[str] | str) -> Tree:
    """The leaves that path patterns match. Raises ValueError if a pattern matches nothing."""
    return partition(tree, patterns)[0]


def partition(tree: Mapping[str, Any], patterns: Sequence[str] | str) -> tuple[Tree, Tree]:
    """``(selected, rest)``, without empty branches. :func:`merge` is the inverse.

    >>> partition({"vision": {"w": 1}, "text": {"w": 2, "b": 3}}, ["vision", "text.b"])
    ({'vision': {'w': 1}, 'text': {'b': 3}}, {'text': {'w': 2}})

    Raises ValueError if a pattern matches nothing.
    """
    flat = flatten(tree)
    chosen = set(select_paths(patterns, flat))
    selected = {path: leaf for path, leaf in flat.items() if path in chosen}
    return unflatten(selected), unflatten({p: x for p, x in flat.items() if p not in chosen})


def merge(*trees: Mapping[str, Any]) -> Tree:
    """One tree with the leaves of all. Raises ValueError if two have a leaf at the same path."""
    flat: dict[str, Any] = {}
    for tree in trees:
        part = flatten(tree)
        for path in part:
            if path in flat:
                raise ValueError(f"{path} is in more than one of the trees to merge")
        flat.update(part)
    return unflatten(flat)


def count(tree: Mapping[str, Any]) -> int:
    """Elements of all leaves. ``sizes.estimate_size`` skips scales and counts ties once."""
    return sum(leaf.numel() for leaf in flatten(tree).values())


def num_bytes(tree: Mapping[str, Any]) -> int:
    """Bytes of all leaves; shared memory counts once per leaf."""
    return sum(map(leaf_bytes, flatten(tree).values()))


def leaf_bytes(leaf: Tensor) -> int:
    """Bytes of one tensor, as if contiguous."""
    return leaf.numel() * leaf.element_size()


def ties(tree: Mapping[str, Any]) -> dict[str, str]:
    """Paths whose leaf has the same memory as an alphabetically earlier one -> that path."""
    first: dict[Any, str] = {}
    tied = {}
    for path, leaf in sorted(flatten(tree).items()):
        storage = leaf.untyped_storage()._cdata  # its identity, on the meta device too
        view = (leaf.storage_offset(), tuple(leaf.shape), leaf.stride(), leaf.dtype)
        if (owner := first.setdefault((storage, view), path)) != path:
            tied[path] = owner
    return tied
