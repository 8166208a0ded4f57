"""SwiGLU: silu(gate) * up.

No Triton kernel yet: forward and backward use torch's own fused silu kernels, one rounding each.
Backward keeps gate and up alone; silu(gate) is computed again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import allow_in_graph

from kernels.functions import Dims, Op, Tensors, batch_first, check_floating, run


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """What `swiglu` computes: plain torch, differentiable to any order."""
    return gate * torch.sigmoid(gate) * up


def _forward(gate: Tensor, up: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return F.silu(gate).mul_(up), ()


def _backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor],
    residuals: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    gate, up = tensors
    d_gate = torch.ops.aten.silu_backward(grad * up, gate) if needs[0] else None
    return d_gate, (grad * F.silu(gate) if needs[1] else None)


def _fold(batch_size: int, dims: Dims, tensors: Tensors) -> Tensors:
    pairs = zip(tensors, dims, strict=True)
    return tuple(batch_first(t, dim, batch_size) for t, dim in pairs if t is not None)


OP = Op("swiglu", swiglu_reference, _forward, _backward, fold=_fold, vmappable=True)


@allow_in_graph
def _apply(gate: Tensor, up: Tensor) -> Tensor:
    return run(OP, gate, up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(z) = z * sigmoid(z) (arXiv 2002.05202).

    Args:
        gate, up: same shape [...], same floating dtype.

    Returns:
        [...] in that dtype.

    Raises:
        ValueError: shapes, dtypes or devices that differ.

    >>> import torch
    >>> swiglu(torch.tensor([0.0, 100.0]), torch.tensor([5.0, 5.0])).tolist()
    [0.0, 500.0]
    """
    check_floating("swiglu", gate=gate, up=up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: gate is {gate.dtype} {tuple(gate.shape)} but up is {up.dtype} "
            f"{tuple(up.shape)}; they must be alike."
        )
    return _apply(gate, up)
