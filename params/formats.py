"""Quantised formats of weights, and the names of all leaves that transforms put beside a weight.

A format replaces a leaf ``weight [..., O, I]`` by its own leaves and an empty ``weight_dtype [0]``,
whose dtype is the weight's. Low-rank adapters lie beside a weight of any format. A weight named
``w`` (experts ``[E, O, I]``) has ``w_int8``, ``w_lora_a`` and so on.

Only this module knows these names. A new format is an entry in :data:`FORMATS` and a transform
that calls ``transforms.quantize_int8.quantize`` with the format and the product of its linears.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from params.int8 import dequantize_weight, quantize_weight
from params.tree import Tree

DTYPE = "weight_dtype"  # an empty tensor that has the weight's dtype
ADAPTERS = ("lora_a", "lora_b")


@dataclass(frozen=True)
class Format:
    """A quantised format of a weight ``w [..., O, I]``.

    name: its public name.
    leaves: names in a site's params, ``weight_...``; the first are the codes, then the scales.
    quantize: ``w`` -> a tensor for each of ``leaves``. Each keeps all dims of w but the last.
    dequantize: ``(*tensors, dtype) -> w`` in that dtype; also for a selection of rows.
    nbytes: shape of w -> bytes of its leaves.
    packed: number of neighbours in a row of w that share one code.
    """

    name: str
    leaves: tuple[str, ...]
    quantize: Callable[[Tensor], tuple[Tensor, ...]]
    dequantize: Callable[..., Tensor]
    nbytes: Callable[[Sequence[int]], int]
    packed: int = 1

    @property
    def codes(self) -> str:
        """Name of the leaf that holds the codes."""
        return self.leaves[0]

    def store(self, weight: Tensor) -> dict[str, Tensor]:
        """The leaves that replace the weight, by name."""
        stored = dict(zip(self.leaves, self.quantize(weight), strict=True))
        return {**stored, DTYPE: weight.new_empty(0)}

    def tensors(self, p: Tree) -> tuple[Tensor, ...]:
        """The leaves of the format in a site's params. Raises KeyError if they are missing."""
        if self.codes not in p:
            raise KeyError(
                f"this site holds a float weight but the forward expects {self.name}: "
                "params = forward.prepare(params) comes first"
            )
        return tuple(p[name] for name in self.leaves)

    def load(self, p: Tree, dtype: torch.dtype) -> Tensor:
        """The dequantised weight of a site's params."""
        return self.dequantize(*self.tensors(p), dtype)

    def shape(self, codes: Tensor) -> tuple[int, ...]:
        """The weight's shape."""
        return (*codes.shape[:-1], codes.shape[-1] * self.packed)


def _int8_bytes(shape: Sequence[int]) -> int:
    return math.prod(shape) + 4 * math.prod(shape[:-1])


INT8 = Format(
    "int8", ("weight_int8", "weight_scale"), quantize_weight, dequantize_weight, _int8_bytes
)
FORMATS = {format.name: format for format in (INT8,)}


# -- a site's params -----------------------------------------------------------------------------


def shape_of(p: Tree) -> tuple[int, ...]:
    """Shape of the weight in a site's params, in any format. Raises KeyError without a weight."""
    for format in FORMATS.values():
        if format.codes in p:
            return format.shape(p[format.codes])
    return tuple(p["weight"].shape)


def dtype_of(p: Tree) -> torch.dtype:
    """Dtype of the weight in a site's params, before quantisation. Raises KeyError without one."""
    if DTYPE in p:
        return p[DTYPE].dtype
    for format in FORMATS.values():
        if format.codes in p:  # params saved by an older version have no weight_dtype
            return p[format.leaves[1]].dtype
    return p["weight"].dtype


# -- paths ---------------------------------------------------------------------------------------


def added() -> tuple[str, ...]:
    """Names in a site's params that transforms put beside a weight or in its place."""
    leaves = [name for format in FORMATS.values() for name in format.leaves]
    return (*dict.fromkeys(leaves), DTYPE, *ADAPTERS)


def beside(weight: str, name: str) -> str:
    """Path of the leaf ``name``, one of :func:`added`, that belongs to the weight at this path.

    >>> beside("mlp.down.weight", "weight_int8"), beside("experts.down_proj", "weight_int8")
    ('mlp.down.weight_int8', 'experts.down_proj_int8')
    """
    owner, dot, leaf = weight.rpartition(".")
    own = name if leaf == "weight" else f"{leaf}_{name.removeprefix('weight_')}"
    return f"{owner}{dot}{own}"


def held_at(flat: Mapping[str, Any], weight: str) -> dict[str, Any]:
    """The leaves of the weight at this path in a flat tree, by their names in a site's params."""
    paths = {"weight": weight, **{name: beside(weight, name) for name in added()}}
    return {name: flat[path] for name, path in paths.items() if path in flat}


def part_of(path: str, paths: Container[str]) -> tuple[Format, str] | None:
    """The format that the leaf at ``path`` belongs to, and its name there; None for other leaves.

    >>> path = "mlp.up.weight_scale"
    >>> part_of(path, {path, "mlp.up.weight_int8"})[1], part_of(path, {path})
    ('weight_scale', None)
    """
    for format in FORMATS.values():
        for name in (*format.leaves, DTYPE):
            weight = path.removesuffix(_suffix(name))
            if weight != path and all(weight + _suffix(leaf) in paths for leaf in format.leaves):
                return format, name
    return None


def is_scale(path: str, paths: Container[str]) -> bool:
    """Whether the leaf at ``path`` is the scale or dtype mark of a quantised weight.

    Both are never trained and are no parameters; a scale is never cast.
    """
    found = part_of(path, paths)
    return found is not None and found[1] != found[0].codes


def is_mark(path: str, paths: Container[str]) -> bool:
    """Whether the leaf at ``path`` is a ``weight_dtype``, which is cast as the weight would be."""
    found = part_of(path, paths)
    return found is not None and found[1] == DTYPE


def _suffix(name: str) -> str:
    return name.removeprefix("weight")


def is_adapter(path: str) -> bool:
    """Whether the leaf at ``path`` is a matrix of a low-rank adapter."""
    return path.endswith(ADAPTERS)
