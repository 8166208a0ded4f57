"""Linear layer over an int8 weight with one scale an output channel.

No Triton kernel yet: the weight is converted for the length of one matmul. The layer is linear in
x, and its transpose is a Function of the same kind, so derivatives of any order keep the int8
weight and the scale alone; a float weight is never saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo import allow_in_graph

from kernels.functions import (
    accumulation_dtype,
    check_device,
    each_example,
    nested_forward_mode,
    with_signature,
)

# Reference: plain torch


def int8_linear_reference(
    x: Tensor, weight: Tensor, scale: Tensor, *, activations: str | None = None
) -> Tensor:
    """x @ (weight * scale).T in the accumulation dtype, x rounded to int8 first if dynamic."""
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


# Kernels: weight-only, and int8 x int8


def _weight_only(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return ((x @ weight.to(x.dtype).mT) * scale).to(x.dtype)


def _int8_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    step = row_scale(rows)
    # no clamp: |x| <= amax, so |x / step| rounds to 127 at most
    q = (rows.to(step.dtype) / step).round().to(torch.int8)
    y = _int_matmul(q, weight).to(step.dtype) * step * scale
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """[M, K] int8 @ [O, K].T int8 -> int32."""
    m, k = a.shape
    o = b.shape[0]
    if a.device.type == "cuda":
        # cuBLAS takes M > 16 and K, O in multiples of 8; zeros add nothing to an integer sum
        a = torch.nn.functional.pad(a, (0, -k % 8, 0, max(0, 17 - m)))
        b = torch.nn.functional.pad(b, (0, -k % 8, 0, -o % 8))
    return torch._int_mm(a, b.t())[:m, :o]


# Autograd


@with_signature
class _Linear(torch.autograd.Function):
    """x [..., I] -> [..., O]. Rounding x to int8 is passed straight through (arXiv 1308.3432)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor, activations: str | None) -> Tensor:
        if activations == "dynamic":
            return _int8_int8(x, weight, scale)
        return _weight_only(x, weight, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.save_for_forward(*inputs[1:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Transposed.apply(grad, *ctx.saved_tensors), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _Linear.apply(tangent, *ctx.saved_tensors, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        *tensors, activations = args
        return _vmap(_Linear, (activations,), info, in_dims[:3], *tensors), 0


@with_signature
class _Transposed(torch.autograd.Function):
    """g [..., O] -> [..., I]: the adjoint of `_Linear`, whose adjoint it is in turn."""

    @staticmethod
    def forward(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return (grad * scale).to(grad.dtype) @ weight.to(grad.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Linear.apply(grad, *ctx.saved_tensors, None), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _Transposed.apply(tangent, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, int]:
        return _vmap(_Transposed, (), info, in_dims, *tensors), 0


def _vmap(
    function: type[torch.autograd.Function],
    static: tuple[Any, ...],
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
) -> Tensor:
    if in_dims[1] is None and in_dims[2] is None:  # examples are just more rows
        return function.apply(x.movedim(in_dims[0], 0), weight, scale, *static)

    def one(*example: Tensor) -> tuple[Tensor]:
        return (function.apply(*example, *static),)

    return each_example(one, info.batch_size, in_dims, (x, weight, scale))[0]


@allow_in_graph
def _apply(x: Tensor, weight: Tensor, scale: Tensor, activations: str | None) -> Tensor:
    if nested_forward_mode():
        exact = _weight_only(x, weight, scale)
        if activations is None:
            return exact
        # the value of one with the derivatives of the other: straight through
        return exact + (_int8_int8(x.detach(), weight, scale) - exact.detach())
    return _Linear.apply(x, weight, scale, activations)


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

    Gradients flow to x (and bias), so adapters and inputs can learn through a frozen int8 layer
    (QLoRA, arXiv 2305.14314); there is none for weight and scale. Only these two are saved.

    Args:
        x: [..., I], any floating dtype.
        weight: [O, I] int8.
        scale: [O] or [O, 1], floating point: value = weight * scale.
        bias: [O] or None.
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
    y = _apply(x, weight, scale.reshape(-1), activations)
    return y if bias is None else y + bias.to(y.dtype)


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
