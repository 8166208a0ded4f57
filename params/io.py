"""Saves and loads params as safetensors files. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from params.disk import CHECKSUM, make_folder
from params.files import NAME, SUFFIX, check_room, locate, named_errors, open_leaves, replace_files
from params.formats import is_scale
from params.tree import Tree, flatten, leaf_bytes, ties, unflatten

TIED = "nanovision.tied"  # metadata: JSON object, path of a tied leaf -> path it is stored under
RESERVED = ("format", "total_size", TIED, CHECKSUM)  # keys of metadata that users may not set
SHOWN = 4  # leaves of a kind that an error message lists

StrPath = str | os.PathLike[str]


def save_params(
    params: Mapping[str, Any],
    path: StrPath,
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = 4 * 2**30,
) -> Path:
    """Writes params, and returns the file written: ``path``, or its index if there are shards.

    An existing checkpoint is replaced atomically. Files have checksums and are flushed to the disk
    before this returns. Dtypes are kept bit for bit. Leaves that share all their memory are stored
    once and are loaded as one tensor.

    Args:
        params: nested dict of tensors.
        path: ``NAME.safetensors``, or an existing folder, which gets ``model.safetensors``.
            ``load_params`` takes the same path.
        metadata: strings for :func:`load_metadata`.
        max_shard_bytes: larger params become ``NAME-00001-of-0000n.safetensors`` and
            ``NAME.safetensors.index.json``.

    Raises ValueError for a path, metadata or leaves that cannot be saved; OSError if there is too
    little room, before anything is written, or no permission.
    """
    target = Path(path) / NAME if Path(path).is_dir() else Path(path)
    if target.suffix != SUFFIX:
        raise ValueError(f"{target}: name a {SUFFIX} file, or a folder that exists")
    own = _checked(metadata or {})
    leaves = flatten(params)
    for name, leaf in leaves.items():
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
            raise ValueError(f"{name} is not a dense tensor ({type(leaf).__name__}): leave it out")
        if leaf.is_meta:
            raise ValueError(f"{name} is on the meta device: it has no values to save")
    if tied := ties(params):
        own[TIED] = json.dumps(tied)
    stored = {name: leaf.detach() for name, leaf in sorted(leaves.items()) if name not in tied}
    with named_errors(f"cannot write {target}"):
        check_room(target, sum(map(leaf_bytes, stored.values())))
        make_folder(target.parent)
        return replace_files(target, _split(stored, max_shard_bytes), own)


def load_params(
    path: StrPath,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    like: Mapping[str, Any] | None = None,
    verify: bool = True,
) -> Tree:
    """Reads params: a nested dict of tensors on ``device``, cast to ``dtype`` if one is given.

    Files are memory-mapped and read tensor by tensor, without a second copy of the model. The
    tensors own their memory, so the file may change afterwards.

    Args:
        path: a safetensors file, an index of shards, or the folder of either.
        dtype: of the floating-point leaves, except the scales of quantised weights.
        device: of all tensors.
        like: a tree of tensors (on any device, meta too) or of ``Leaf``. The file must have its
            paths and shapes, which is checked before tensors are read.
        verify: compare each file with its checksum, which reads it once more.

    Raises FileNotFoundError for a missing file or shard; ValueError for a truncated or damaged
    file, one that is not safetensors, and params that differ from ``like``.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"params are loaded as floating-point numbers: dtype cannot be {dtype}")
    found = locate(Path(path))
    with ExitStack() as stack:
        where, metadata = open_leaves(found, stack, verify=verify)
        tied = _read_ties(found, metadata, where)
        if like is not None:
            shapes = {n: tuple(f.get_slice(n).get_shape()) for n, f in where.items()}
            shapes |= {name: shapes[owner] for name, owner in tied.items()}
            _check_like(found, shapes, {n: tuple(x.shape) for n, x in flatten(like).items()})
        flat = {}
        for name, file in where.items():
            leaf: Tensor = file.get_tensor(name)
            cast = dtype if leaf.is_floating_point() and not is_scale(name, where) else None
            flat[name] = leaf.to(device=device, dtype=cast or leaf.dtype, copy=True)
    return _tree(found, flat | {name: flat[owner] for name, owner in tied.items()})


def load_metadata(path: StrPath) -> dict[str, str]:
    """The metadata passed to ``save_params``. Raises as :func:`load_params` does."""
    with ExitStack() as stack:
        metadata = open_leaves(locate(Path(path)), stack)[1]
    return {k: v for k, v in metadata.items() if k not in RESERVED and isinstance(v, str)}


def _checked(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata maps str to str: {key!r} is {value!r}")
        if key in RESERVED:
            raise ValueError(f"metadata {key!r} is reserved ({', '.join(RESERVED)}): rename it")
    return dict(metadata)


def _split(leaves: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Shards of consecutive leaves, each as large as fits but of one leaf at least."""
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, leaf in leaves.items():
        if shards[-1] and leaf_bytes(leaf) > room:
            shards.append({})
            room = limit
        shards[-1][name] = leaf
        room -= leaf_bytes(leaf)
    return shards


def _read_ties(found: Path, metadata: dict[str, Any], where: Mapping[str, Any]) -> dict[str, str]:
    try:
        tied = json.loads(metadata.get(TIED, "{}"))
        if not all(owner in where and name not in where for name, owner in tied.items()):
            raise ValueError("it names leaves that are not there")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{found} has broken metadata {TIED} ({error}): save it again") from error
    return tied


def _tree(found: Path, flat: Mapping[str, Tensor]) -> Tree:
    try:
        tree = unflatten(flat)
        flatten(tree)  # raises for invalid names
    except ValueError as error:
        raise ValueError(f"{found} holds no tree of params: {error}") from error
    return tree


def _check_like(found: Path, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    wrong = {
        "missing": [n for n in want if n not in have],
        "unexpected": [n for n in have if n not in want],
        "of another shape": [
            f"{n} {list(have[n])} (not {list(want[n])})"
            for n in want
            if n in have and have[n] != want[n]
        ],
    }
    parts = [f"{kind}: {_some(names)}" for kind, names in wrong.items() if names]
    if parts:
        raise ValueError(f"{found} holds other params than this model's; {'; '.join(parts)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
