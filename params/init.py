"""Initial params of a config. Each leaf has its own random stream."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import torch
from torch import Tensor

from params.spec import Leaf
from params.tree import Tree, map_with_path


class HasParamSpec(Protocol):
    """A config that declares its parameters."""

    def param_spec(self) -> dict[str, Any]:
        """Nested dict of Leaf."""
        ...


def init_params(
    config: HasParamSpec,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tree:
    """New params: a nested dict of tensors with the shapes and inits of ``config.param_spec()``.

    A leaf's values depend on ``(seed, path)`` alone, not on other leaves or the global generator.
    They are drawn in fp32 on ``device`` (CPU and CUDA draw different numbers) and then cast, so
    bf16 params are the rounded fp32 ones. On ``device="meta"`` leaves have shapes only.
    Raises ValueError if ``dtype`` is not floating-point.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"initial params are floating-point: dtype cannot be {dtype}")
    device = torch.device(device)

    def make(path: str, leaf: Leaf) -> Tensor:
        if leaf.init != "normal" or device.type == "meta":
            fill = 1.0 if leaf.init == "ones" else 0.0
            return torch.full(leaf.shape, fill, dtype=dtype, device=device)
        generator = torch.Generator(device).manual_seed(leaf_seed(seed, path))
        drawn = torch.empty(leaf.shape, dtype=torch.float32, device=device)
        return drawn.normal_(0.0, leaf.std, generator=generator).to(dtype)

    return map_with_path(make, config.param_spec())


def leaf_seed(seed: int, path: str) -> int:
    """A 63-bit seed for a leaf. ``hash()`` is salted per process, and 32 bits would collide."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
