"""Linear layer over an int8 weight with one scale per output channel.

On a GPU the kernels of `int8_few` and `int8_matmul` run: few rows read the weight as int8 and widen
it in registers, int8 activations are multiplied as int8, and many rows of a float x meet a copy of
the weight that lives for one matmul. Elsewhere torch makes such a copy always. The layer is linear
in x, and its transpose is the same Function, so that derivatives of any order save only the int8
weight and the scale.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.quantised import int8_few, int8_matmul
from kernels.runtime.autograd import (
    accumulation_dtype,
    check_device,
    fold_rows,
    nested_forward_mode,
    shaped,
    vmap_rule,
    with_signature,
)
from kernels.runtime.dispatch import TORCH, TRITON, choose, declare
from kernels.runtime.dynamo import allow_in_graph, check_hidden
from kernels.runtime.operators import operator

declare("int8_linear", TRITON, TORCH)

# Reference: plain torch


def int8_linear_reference(
    x: Tensor, weight: Tensor, scale: Tensor, *, activations: str | None = None
) -> Tensor:
    """x @ (weight * scale).T in the accumulation dtype; "dynamic" rounds x to int8 first."""
    dtype = accumulation_dtype(x.dtype)
    wide = x.to(dtype)
    if activations == "dynamic":
        step = row_scale(x)
        wide = (wide / step).round() * step
    return (wide @ (weight.to(dtype) * scale.reshape(-1, 1).to(dtype)).mT).to(x.dtype)


def row_scale(x: Tensor) -> Tensor:
    """Symmetric int8 step of each row of x: amax / 127, or 1 for a row of zeros. [..., 1]."""
    amax = x.abs().amax(-1, keepdim=True).to(accumulation_dtype(x.dtype))
    return torch.where(amax == 0, 1.0, amax / 127.0)


# torch: weight-only, and int8 x int8. Both return the product in the accumulation dtype: in fp16 it
# could overflow before it is scaled.


def _weight_only(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    wide = accumulation_dtype(x.dtype)
    return (x.to(wide) @ weight.to(wide).mT) * scale


def _int8_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    step = row_scale(rows)
    # no clamp: |x| <= amax, so |x / step| rounds to 127 at most
    q = (rows.to(step.dtype) / step).round().to(torch.int8)
    y = _int_matmul(q, weight).to(step.dtype) * step * scale
    return shaped(y, *x.shape[:-1], weight.shape[0])


def _int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """[M, K] int8 @ [O, K].T int8 -> int32."""
    m, k = a.shape
    o = b.shape[0]
    if a.device.type == "cuda":
        # cuBLAS takes M > 16 and K, O in multiples of 8; zeros add nothing to an integer sum
        a = torch.nn.functional.pad(a, (0, -k % 8, 0, max(0, 17 - m)))
        b = torch.nn.functional.pad(b, (0, -k % 8, 0, -o % 8))
    return torch._int_mm(a, b.t())[:m, :o]


# Triton: one operator per direction, so that a compiler sees one node each


def _forward_kernel(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dynamic: bool
) -> Tensor:
    """[..., I] -> [..., O]. The number of rows alone decides what runs."""
    rows = _as_rows(x)
    weight, scale = weight.contiguous(), scale.contiguous()
    if rows.numel() == 0 or weight.numel() == 0:
        y = rows.new_zeros(rows.shape[0], weight.shape[0])
        y = y if bias is None else y + bias.to(y.dtype)
    elif dynamic:
        q, step = int8_matmul.quantize_rows(rows)
        y = int8_matmul.matmul_rows(q, step, weight, scale, bias, x.dtype)
    elif int8_few.is_few(rows.shape[0], rows.shape[1], x.dtype):
        y = int8_few.few(rows, weight, scale, bias)
    else:
        wide = int8_matmul.widen(weight, scale, x.dtype).t()
        y = rows @ wide if bias is None else torch.addmm(bias.to(x.dtype), rows, wide)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _transposed_kernel(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """[..., O] -> [..., I]."""
    rows = _as_rows(grad)
    if weight.numel() == 0:
        return grad.new_zeros(*grad.shape[:-1], weight.shape[1])
    wide = int8_matmul.widen(weight.contiguous(), scale.contiguous(), grad.dtype)
    return (rows @ wide).reshape(*grad.shape[:-1], weight.shape[1])


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


_forward_op = operator(
    "int8_linear_forward",
    fake=lambda x, weight, **_: x.new_empty(*x.shape[:-1], weight.shape[0]),
    kind="matmul",
)(_forward_kernel)
_transposed_op = operator(
    "int8_linear_transposed",
    fake=lambda grad, weight, **_: grad.new_empty(*grad.shape[:-1], weight.shape[1]),
)(_transposed_kernel)


# Autograd


@with_signature
class _Int8Linear(torch.autograd.Function):
    """x [..., I] -> [..., O], or transposed x [..., O] -> [..., I]: each is the other's adjoint.

    Passes straight through the rounding of x to int8 (arXiv 1308.3432). Not an `Op`, which would
    save x for backward.
    """

    @staticmethod
    def forward(
        activations: str | None,
        triton: bool,
        transposed: bool,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor]:
        if transposed:
            if triton:
                return (_transposed_op(x, weight, scale),)
            wide = accumulation_dtype(x.dtype)
            return (((x.to(wide) * scale) @ weight.to(wide)).to(x.dtype),)
        if triton:
            return (_forward_op(x, weight, scale, bias, activations == "dynamic"),)
        multiply = _weight_only if activations is None else _int8_int8
        y = multiply(x, weight, scale)
        return ((y if bias is None else y + bias.to(y.dtype)).to(x.dtype),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        _, ctx.triton, ctx.transposed, _, weight, scale, bias = inputs
        ctx.bias = None if bias is None else bias.dtype
        ctx.save_for_backward(weight, scale)
        ctx.save_for_forward(weight, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx = db = None
        if ctx.needs_input_grad[3]:
            other = (None, ctx.triton, not ctx.transposed)
            (dx,) = _Int8Linear.apply(*other, grad, *ctx.saved_tensors, None)
        if ctx.needs_input_grad[6]:
            rows = grad.reshape(-1, grad.shape[-1])
            db = rows.sum(0, dtype=accumulation_dtype(grad.dtype)).to(ctx.bias)
        return None, None, None, dx, None, None, db

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor]:
        *_, dx, _, _, db = tangents
        return _Int8Linear.apply(None, ctx.triton, ctx.transposed, dx, *ctx.saved_tensors, db)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims, tensors = in_dims[3:], args[3:]
        folded = fold_rows(1, info.batch_size, dims, tensors)
        return vmap_rule(_Int8Linear, args[:3], folded, info, dims, tensors)


@allow_in_graph
def _apply(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activations: str | None,
    triton: bool,
) -> Tensor:
    check_hidden()
    if not nested_forward_mode():
        return _Int8Linear.apply(activations, triton, False, x, weight, scale, bias)[0]
    y = _weight_only(x, weight, scale)
    if activations is not None:
        # straight through: the value of the rounded product with the derivatives of the other
        y = y + (_int8_int8(x.detach(), weight, scale) - y.detach())
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


# Public


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    activations: str | None = None,
) -> Tensor:
    """x @ (weight * scale).T + bias with an int8 weight.

    Gradients flow to x and bias, so that adapters and inputs can learn through a frozen int8 layer
    (QLoRA, arXiv 2305.14314); weight and scale get none. Only these two are saved for backward.

    Args:
        x: [..., I], any floating dtype.
        weight: [O, I] int8; copied at every call if it is not contiguous.
        scale: [O] or [O, 1], floating point: value = weight * scale.
        bias: [O] or None, floating point.
        activations: None multiplies in x.dtype; "dynamic" also rounds each row of x to int8 (step
            amax / 127) and multiplies int8 x int8 with int32 sums; its gradient is straight
            through.

    Returns:
        [..., O] in x.dtype.

    Raises:
        ValueError: wrong shapes, dtypes or devices, an unknown `activations`, a scale that
            requires a gradient.

    >>> import torch
    >>> weight, scale = torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([0.5])
    >>> int8_linear(torch.tensor([[4.0, 6.0]]), weight, scale).tolist()
    [[8.0]]
    """
    _check(x, weight, scale, bias, activations)
    triton = choose("int8_linear", str(x.device), x.dtype) == "triton"
    return _apply(x, weight, scale.reshape(-1), bias, activations, triton)


def _check(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activations: str | None
) -> None:
    if weight.dtype != torch.int8 or weight.ndim != 2:
        raise ValueError(
            f"int8_linear: weight must be int8 [O, I], got {weight.dtype} {tuple(weight.shape)}."
        )
    out, inner = weight.shape
    if not x.dtype.is_floating_point or x.ndim == 0 or x.shape[-1] != inner:
        raise ValueError(
            f"int8_linear: x must be floating point [..., {inner}] to match weight "
            f"{tuple(weight.shape)}, got {x.dtype} {tuple(x.shape)}."
        )
    if not scale.dtype.is_floating_point or tuple(scale.shape) not in ((out,), (out, 1)):
        raise ValueError(
            f"int8_linear: scale must be floating point [{out}] or [{out}, 1], "
            f"got {scale.dtype} {tuple(scale.shape)}."
        )
    if bias is not None and tuple(bias.shape) != (out,):
        raise ValueError(f"int8_linear: bias must have shape [{out}], got {tuple(bias.shape)}.")
    for name, tensor in (("weight", weight), ("scale", scale), ("bias", bias)):
        if tensor is not None:
            check_device("int8_linear", "x", x, name, tensor)
    if scale.requires_grad:
        raise ValueError(
            "int8_linear: scale requires a gradient, but int8 weights and their scales do not "
            "learn; select other leaves, or train with fake quantisation."
        )
    if activations not in (None, "dynamic"):
        raise ValueError(
            f'int8_linear: activations must be None or "dynamic", got {activations!r}.'
        )
