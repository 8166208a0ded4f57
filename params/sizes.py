"""The size of a model, in its own and in other formats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from params.formats import INT8, part_of
from params.tree import flatten, leaf_bytes, ties

MB = 1e6  # bytes


@dataclass(frozen=True)
class Size:
    """Sizes of a tree of params, in MB (10^6 bytes). ``dict(size)`` and ``size["mb_now"]`` work.

    compression_ratio: bytes in fp16 divided by bytes now; 1 for a bf16 model, about 2 for int8.
    """

    parameters: int
    mb_now: float
    mb_fp32: float
    mb_fp16: float
    mb_int8: float
    compression_ratio: float

    def keys(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self)]

    def __getitem__(self, name: str) -> float:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    def __str__(self) -> str:
        ratio = self.compression_ratio
        times, than = (ratio, "smaller") if ratio >= 1 else (1 / ratio, "larger")
        held = "as in fp16" if f"{times:.2f}" == "1.00" else f"{times:.2f}x {than} than fp16"
        return (
            f"{self.parameters:,} parameters, {self.mb_now:,.1f} MB ({held}); "
            f"in fp32 {self.mb_fp32:,.1f}, in fp16 {self.mb_fp16:,.1f}, "
            f"in int8 {self.mb_int8:,.1f} MB"
        )


def estimate_size(params: Mapping[str, Any]) -> Size:
    """The size of a tree of params, which may be on the meta device.

    Parameters are the elements of floating-point leaves and of quantised weights, without their
    scales. ``mb_now`` counts all leaves in their present dtypes. ``mb_fp32`` and ``mb_fp16`` hold
    every parameter in that dtype. ``mb_int8`` holds every matrix in one byte per element and an
    fp32 scale per row, all other parameters in fp16. Integer leaves are in all four sizes. Memory
    shared by several leaves counts once.

    >>> import torch
    >>> print(estimate_size({"weight": torch.zeros(1000, 1000)}))
    1,000,000 parameters, 4.0 MB (2.00x larger than fp16); in fp32 4.0, in fp16 2.0, in int8 1.0 MB
    """
    flat = flatten(params)
    for path in ties(params):
        del flat[path]
    parameters = now = fp16 = fp32 = int8 = 0
    for path, leaf in flat.items():
        here = leaf_bytes(leaf)
        now += here
        format, name = part_of(path, flat) or (None, "")
        if format is not None and name != format.codes:
            continue  # a scale: absent in float formats, counted with its weight in int8
        if format is None and not leaf.is_floating_point():
            fp32, fp16, int8 = fp32 + here, fp16 + here, int8 + here
            continue
        rows = leaf.flatten(1) if leaf.ndim > 1 else leaf  # a convolution has a scale per filter
        shape = rows.shape if format is None else format.shape(leaf)
        count = math.prod(shape)
        parameters += count
        fp32 += 4 * count
        fp16 += 2 * count
        int8 += INT8.nbytes(shape) if len(shape) > 1 else 2 * count
    ratio = fp16 / now if now else 1.0
    return Size(parameters, now / MB, fp32 / MB, fp16 / MB, int8 / MB, ratio)
