"""Initial values, each leaf drawn on its own."""

from __future__ import annotations

import zlib
from typing import Protocol

import torch
from torch import Tensor

from params.spec import Leaf, Spec
from params.tree import Tree, map_with_path


class HasParamSpec(Protocol):
    """Whatever can say what its parameters are: every model config."""

    def param_spec(self) -> Spec: ...


def init_params(
    config: HasParamSpec,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tree:
    """Fresh params for a config, drawn directly on the device.

    Every leaf has a generator of its own, seeded by (seed, path): a leaf's values do not change
    when others are added or removed. CPU and CUDA draw different numbers from one seed. Values are
    drawn in fp32 and then cast to ``dtype``.
    """

    def draw(path: str, leaf: Leaf) -> Tensor:
        if leaf.init != "normal":
            fill = 1.0 if leaf.init == "ones" else 0.0
            return torch.full(leaf.shape, fill, dtype=dtype, device=device)
        generator = torch.Generator(device)
        generator.manual_seed((seed << 32) + zlib.crc32(path.encode()))
        values = torch.randn(leaf.shape, generator=generator, device=device)
        return values.mul_(leaf.std).to(dtype)

    return map_with_path(draw, config.param_spec())
