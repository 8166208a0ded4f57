"""Low-precision compute over high-precision params: a cast where each part of params enters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.forward import Forward, Rule
from params.int8 import is_scale
from params.tree import Tree, flatten, map_with_path
from transforms.legal import check_legal


def mixed_precision(forward: Forward, dtype: torch.dtype = torch.bfloat16) -> Forward:
    """Matmuls and activations in ``dtype``, params, gradients and reductions as they are.

    Matrices are cast where they enter (block, embedding, head, ...), so their gradients arrive in
    the params' own dtype. Vectors stay: norms compute in fp32 anyway, and a bias takes the dtype
    of its matmul. The loss is fp32 (Micikevicius et al. 2017, https://arxiv.org/abs/1710.03740).
    """
    check_legal(forward, "mixed_precision")

    def wrap(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def run(p: Tree, x: Any, *args: Any) -> Any:
            flat = flatten(p)

            def cast(path: str, leaf: Tensor) -> Tensor:
                if not leaf.is_floating_point() or leaf.ndim < 2 or is_scale(path, flat):
                    return leaf
                return leaf.to(dtype)

            # float weights bring x to their dtype; int8 ones take it as it comes
            x = x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            return f(map_with_path(cast, p), x, *args)

        return run

    rule = Rule("gather", wrap, name=f"cast to {str(dtype).removeprefix('torch.')}")
    return forward.with_rule(rule).with_step("mixed_precision")
