"""A linear layer; `column_sums` computes the gradient of its bias."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear.column_sums import column_sums
from kernels.runtime.autograd import Dims, Op, Tensors, accumulation_dtype, fold_rows, rows_of, run
from kernels.runtime.dispatch import TORCH, TRITON, choose, declare
from kernels.runtime.dynamo import allow_in_graph

declare("linear", TRITON, TORCH)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `linear` computes; plain torch, differentiable to any order."""
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def bias_gradient(grad: Tensor, bias: Tensor, triton: bool) -> Tensor:
    """The sum of grad [..., O] over its rows, in fp32 or wider, rounded once to bias's dtype."""
    wide = accumulation_dtype(grad.dtype)
    if triton and wide == torch.float32:
        return column_sums(rows_of(grad), bias.dtype)
    return rows_of(grad).sum(0, dtype=wide).to(bias.dtype)


def sums_biases(weight: Tensor) -> bool:
    """Whether the kernel sums the gradients of biases. Layers without a bias ask too, so that a
    request for a kernel that cannot run raises there as well."""
    return choose("linear", str(weight.device), weight.dtype) == "triton"


def _even(x: Tensor) -> Tensor:
    """x [..., I], in 16 bits padded with zeros to a multiple of 8, so that rows are aligned.

    cuBLAS is up to 40 times slower on unaligned rows, such as those of a patch embedding (588).
    """
    rest = -x.shape[-1] % 8
    return F.pad(x, (0, rest)) if rest and x.element_size() == 2 else x


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a @ b or total += a @ b; never rounds an fp32 total of bf16 factors to bf16."""
    if total.dtype == a.dtype:
        if first:
            torch.mm(a, b, out=total)
        else:
            torch.addmm(total, a, b, out=total)
    elif total.device.type == "cuda":
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # only CUDA has a matmul with an output dtype
        product = torch.mm(a.to(total.dtype), b.to(total.dtype))
        total.copy_(product if first else total + product)


def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[()]]:
    return linear_reference(_even(x.to(weight.dtype)), _even(weight), bias), ()


def _backward(
    grad: Tensor,  # [..., O]
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor, Tensor],
    _: tuple[()],
) -> tuple[Tensor | None, ...]:
    (x, weight, bias), rows = tensors, rows_of(grad)
    return (
        torch.mm(rows, weight).view(x.shape).to(x.dtype) if needs[0] else None,
        _weight_gradient(rows, rows_of(x).to(weight.dtype)) if needs[1] else None,
        bias_gradient(grad, bias, True) if needs[2] else None,
    )


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [rows, O], x [rows, I] -> [O, I]."""
    return torch.mm(grad.t(), _even(x))[:, : x.shape[1]].contiguous()


def _fold_backward(
    batch_size: int, needs: tuple[bool, ...], dims: Dims, saved: Tensors
) -> Tensors | None:
    """Each example has a weight gradient of its own, where one call would return their sum."""
    return None if any(needs[1:]) else fold_rows(2, batch_size, dims, saved)


LINEAR = Op(
    "linear",
    linear_reference,
    _forward,
    _backward,
    fold=functools.partial(fold_rows, 1),
    fold_backward=_fold_backward,
)


@allow_in_graph
def _apply(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return run(LINEAR, x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, in the weight's dtype.

    Like F.linear, but on a GPU a kernel sums the bias's gradient at the speed of memory
    (`column_sums`), in fp32, and rounds it once to the bias's dtype.

    Args:
        x: [..., I], any floating dtype; it is cast to the weight's.
        weight: [O, I].
        bias: [O] or None, any floating dtype (fp32 with bf16 weights is fine).

    Returns:
        [..., O] in weight.dtype.

    >>> import torch
    >>> linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([0.5])).tolist()
    [[3.5]]
    """
    if not sums_biases(weight) or bias is None:
        return linear_reference(x, weight, bias)
    return _apply(x, weight, bias)


def check_linear(
    where: str,
    x_name: str,
    x: Tensor,
    weight_name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
) -> None:
    """ValueError unless weight and bias are those of a linear layer that takes x."""
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{where}: {weight_name} must be [O, I] for {x_name} [..., I], "
            f"got {tuple(weight.shape)} and {tuple(x.shape)}."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{where}: {bias_name} must have shape [{weight.shape[0]}], got {tuple(bias.shape)}."
        )
