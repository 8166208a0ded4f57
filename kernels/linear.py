"""A linear layer with a bias, whose gradient is summed by `column_sums`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import allow_in_graph

from kernels.column_sums import column_sums
from kernels.dispatch import choose
from kernels.functions import Dims, Op, Tensors, fold_all, run


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What `linear` computes; plain torch, differentiable to any order."""
    return F.linear(x.to(weight.dtype), weight, bias.to(weight.dtype))


def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[()]]:
    return linear_reference(x, weight, bias), ()


def _rows(x: Tensor) -> Tensor:
    """[..., D] as [rows, D]; the number of rows is said, since D may be 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _backward(
    grad: Tensor,  # [..., O]
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor, Tensor],
    _: tuple[()],
) -> tuple[Tensor | None, ...]:
    (x, weight, bias), rows = tensors, _rows(grad)
    return (
        torch.mm(rows, weight).view(x.shape).to(x.dtype) if needs[0] else None,
        torch.mm(rows.t(), _rows(x).to(weight.dtype)) if needs[1] else None,
        column_sums(rows, bias.dtype) if needs[2] else None,
    )


def _fold(batch_size: int, dims: Dims, tensors: Tensors) -> Tensors | None:
    """Examples are more rows, if they share weight and bias."""
    if any(dim is not None for dim in dims[-2:]):
        return None
    return fold_all(batch_size, dims[:-2], tensors[:-2]) + tensors[-2:]


def _fold_backward(
    batch_size: int, needs: tuple[bool, ...], dims: Dims, saved: Tensors
) -> Tensors | None:
    """Of grad, x, weight, bias. A weight's gradient is one an example, not their sum."""
    return None if any(needs[1:]) else _fold(batch_size, dims, saved)


LINEAR = Op(
    "linear", linear_reference, _forward, _backward, fold=_fold, fold_backward=_fold_backward
)


@allow_in_graph
def _apply(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return run(LINEAR, x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, in the weight's dtype.

    As F.linear, but on a GPU the bias's gradient is summed by a kernel at the speed of memory
    (`column_sums`), in fp32, and rounded once to the bias's dtype.

    Args:
        x: [..., I], any floating dtype; it is brought to the weight's.
        weight: [O, I].
        bias: [O] or None, any floating dtype (fp32 beside bf16 weights is fine).

    Returns:
        [..., O] in weight.dtype.

    >>> import torch
    >>> linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([0.5])).tolist()
    [[3.5]]
    """
    if bias is None:
        return F.linear(x.to(weight.dtype), weight)
    if choose("linear", str(x.device), weight.dtype) == "torch":
        return linear_reference(x, weight, bias)
    return _apply(x, weight, bias)
