"""Linear layer whose three matrix products run in float8, for training.

y = x W^T, dx = dy W and dW = dy^T x, with x and W rounded to e4m3 and dy to e5m2 ("FP8 Formats for
Deep Learning", arXiv 2209.05433): gradients need range more than precision. The scale of a
tensor comes from its own largest entry at every call, with no history, so that the layer is a pure
function. Sums are fp32.

`fp8_products` rounds and multiplies; this file differentiates. For backward the layer keeps the
transposed float8 copy of x, a byte per entry, and its scale. Three layers that share one x round it
three times; a compiler merges the three equal calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.quantised.fp8_products import (
    E4M3,
    product,
    quantize,
    quantize_backward,
    round_to,
    scale_of,
    up16,
    widen,
)
from kernels.runtime import launch
from kernels.runtime.autograd import (
    accumulation_dtype,
    batch_first,
    check_floating,
    differentiated,
    each_example,
    fold_all,
    func_levels,
    nested_forward_mode,
    pull,
    push,
    rows_of,
    shaped,
    vmap_rule,
    with_signature,
)
from kernels.runtime.dispatch import TORCH, Backend, CallInfo, choose, declare
from kernels.runtime.dynamo import allow_in_graph, check_hidden


def _why_not(call: CallInfo) -> str | None:
    device = torch.device(call.device)
    if device.type == "cuda" and (has := torch.cuda.get_device_capability(device)) < (9, 0):
        return f"needs compute capability 9.0, this GPU has {has[0]}.{has[1]}"
    return launch.why_not(call.device, call.dtype)


def _order(call: CallInfo) -> tuple[str, ...]:
    """On a GPU torch imitates float8, slower than bf16: it only runs on request."""
    return ("triton",) if torch.device(call.device).type == "cuda" else ("triton", "torch")


declare("fp8_linear", Backend("triton", _why_not), TORCH, order=_order)

SCALINGS = ("tensor", "row")

# Reference: plain torch, differentiable to any order


def fp8_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, scaling: str = "tensor"
) -> Tensor:
    """What `fp8_linear` computes; the gradient passes straight through the rounding of x and
    weight. (`fp8_linear` also rounds the gradient of the output.)"""
    dims = None if scaling == "tensor" else -1
    return _plain(_straight_through(x, dims), weight, bias, scaling).to(x.dtype)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, scaling: str) -> Tensor:
    dims = None if scaling == "tensor" else -1
    y = x @ _straight_through(weight, dims).to(x.dtype).mT
    return y if bias is None else y + bias.to(y.dtype)


def _straight_through(x: Tensor, dims: int | None) -> Tensor:
    """x rounded to e4m3 and back, with the derivatives of x."""
    still = x.detach()
    scale = scale_of(still, E4M3, dims)
    return x + (widen(round_to(still, scale, E4M3), scale, x.dtype) - still)


# Autograd


@dataclass(frozen=True, eq=False)  # an opaque leaf of pytrees
class Fp8Call:
    """What the Functions are called with besides tensors."""

    scaling: str
    triton: bool
    keep: bool  # x for backward, since the weight may want a gradient


@with_signature
class _Shadow(torch.autograd.Function):
    """x -> zeros of its shape in the memory of one number, with the derivative of x.

    The backward keeps no x, but second derivatives need a path to x: this one. dense: the zeros
    have memory of their own, since forward mode lays tangents out like values.
    """

    @staticmethod
    def forward(x: Tensor, dense: bool) -> Tensor:
        return x.new_zeros(x.shape) if dense else x.new_zeros(()).expand(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.view_as(grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, dense: bool) -> tuple[Tensor, int]:
        return _Shadow.apply(x.movedim(in_dims[0], 0), dense), 0


def _forward_mode() -> bool:
    jvp = torch._C._functorch.TransformType.Jvp
    plain = torch.autograd.forward_ad._current_level >= 0
    return plain or any(level.key() == jvp for level in func_levels())


@with_signature
class _Fp8Linear(torch.autograd.Function):
    """(call, x, shadow, weight, bias) -> y, transposed codes of x, their scale, the weight's scale.

    x gets its gradient through its shadow. Not an `Op`, which would save x for backward.
    """

    @staticmethod
    def forward(
        call: Fp8Call, x: Tensor, shadow: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        turned = call.keep and call.scaling == "tensor"
        codes, across, scale = quantize(rows_of(x), call.scaling, turned, call.triton)
        weights, _, weight_scale = quantize(weight, call.scaling, False, call.triton)
        y = product(codes, weights, scale, weight_scale.t(), x.dtype, True, call.triton, bias)
        return shaped(y, *x.shape[:-1], weight.shape[0]), across, scale, weight_scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, x, shadow, weight, bias = inputs
        _, across, scale, weight_scale = output
        ctx.call, ctx.bias = call, None if bias is None else bias.dtype
        if call.scaling == "row":
            across = x if call.keep else x.new_empty(0)
        ctx.save_for_backward(shadow, weight, bias, across, scale, weight_scale)
        ctx.save_for_forward(shadow, weight, bias, across, scale, weight_scale)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        _, _, for_x, for_weight, for_bias = ctx.needs_input_grad
        dx = dw = db = None
        if grad is not None and (for_x or for_weight):
            shadow, weight, _, *kept = ctx.saved_tensors
            needs = (for_x, for_weight)
            grads = iter(_Fp8Backward.apply(ctx.call, needs, grad, shadow, weight, *kept))
            dx = next(grads) if for_x else None
            dw = next(grads) if for_weight else None
        if grad is not None and for_bias:
            db = rows_of(grad).sum(0, dtype=accumulation_dtype(grad.dtype)).to(ctx.bias)
        return None, None, dx, dw, db

    @staticmethod
    def jvp(ctx: Any, _call: None, _x: None, *tangents: Tensor | None) -> Any:
        shadow, weight, bias, *kept = ctx.saved_tensors

        def formula(shadow: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            x = _seen(ctx.call, shadow, *kept[:2])
            return _plain(x, weight, bias, ctx.call.scaling)

        return push(formula, (shadow, weight, bias), tangents), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Fp8Call, *tensors: Any) -> Any:
        batch, dims = info.batch_size, in_dims[1:]
        if any(dim is not None for dim in dims[2:]):
            outs = each_example(lambda *one: _Fp8Linear.apply(call, *one), batch, dims, tensors)
            return outs, (0,) * len(outs)
        x, shadow = (batch_first(t, dim, batch) for t, dim in zip(tensors, dims[:2], strict=False))
        y, across, scale, weight_scale = _Fp8Linear.apply(call, x, shadow, *tensors[2:])
        if across.numel():
            across = _of_each(across, batch, math.prod(x.shape[1:-1]))
        else:
            across = across.expand(batch, *across.shape)
        if call.scaling == "row":
            scale = scale.view(batch, -1, 1)
        else:
            scale = scale.expand(batch)
        return (y, across, scale, weight_scale), (0, 0, 0, None)


def _of_each(codes: Tensor, batch: int, rows: int) -> Tensor:
    """[I, batch * rows up to a multiple of 16] -> [batch, I, rows up to one], padded with zeros."""
    raw = codes.view(torch.uint8)[:, : batch * rows]
    raw = raw.reshape(codes.shape[0], batch, rows).movedim(1, 0)
    return F.pad(raw, (0, up16(rows) - rows)).contiguous().view(codes.dtype)


def _seen(call: Fp8Call, shadow: Tensor, kept: Tensor, scale: Tensor) -> Tensor:
    """x [..., I] as the products saw it, from `kept`, with the derivative of x."""
    if call.scaling == "row":
        x = kept.detach()
        scale = scale_of(x, E4M3, -1)
        return shadow + widen(round_to(x, scale, E4M3), scale, x.dtype)
    rows = math.prod(shadow.shape[:-1])
    x = widen(kept.mT[:rows], scale, shadow.dtype).reshape(shadow.shape)
    return shadow + x


@with_signature
class _Fp8Backward(torch.autograd.Function):
    """(call, needs, grad, shadow, weight, kept, scale, weight_scale) -> the needed gradients, of x
    and of weight. Its own derivatives are those of the formula, without rounding grad.
    """

    @staticmethod
    def forward(call: Fp8Call, needs: tuple[bool, bool], *saved: Tensor) -> tuple[Tensor, ...]:
        grad, shadow, weight, kept, scale, weight_scale = saved
        rows = rows_of(grad)
        for_weight = needs[1] and call.scaling == "tensor"
        codes, across, grad_scale, weights, weight_scales = quantize_backward(
            rows, weight, weight_scale, call.scaling, needs[0], for_weight, call.triton
        )
        out = []
        if needs[0]:
            other = weight_scale if call.scaling == "tensor" else weight_scales
            dx = product(codes, weights, grad_scale, other, grad.dtype, False, call.triton)
            out.append(dx.view(shadow.shape))
        if for_weight:
            out.append(product(across, kept, grad_scale, scale, weight.dtype, False, call.triton))
        elif needs[1]:
            # a sum over rows with different scales, which a float8 product cannot apply
            out.append((rows.t() @ rows_of(kept).to(grad.dtype)).to(weight.dtype))
        return tuple(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, ctx.needs = inputs[:2]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        primals, kept = ctx.saved_tensors[:3], ctx.saved_tensors[3:5]
        wanted = [i for i in range(3) if ctx.needs_input_grad[2 + i]]
        grads: list[Tensor | None] = [None] * 3
        gradient = _gradient(ctx.call, ctx.needs, *kept)
        for i, g in zip(wanted, pull(gradient, primals, wanted, cotangents), strict=True):
            grads[i] = g
        return (None, None, *grads, None, None, None)

    @staticmethod
    def jvp(ctx: Any, _call: None, _needs: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        primals, kept = ctx.saved_tensors[:3], ctx.saved_tensors[3:5]
        return push(_gradient(ctx.call, ctx.needs, *kept), primals, tangents[:3])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], call: Fp8Call, needs: tuple[bool, bool], *saved: Tensor
    ) -> Any:
        dims, folded = in_dims[2:], None
        if not needs[1] and dims[2] is None and dims[5] is None:  # examples are more rows
            folded = fold_all(info.batch_size, dims[:2], saved[:2]) + saved[2:]
        return vmap_rule(_Fp8Backward, (call, needs), folded, info, dims, saved)


def _gradient(
    call: Fp8Call, needs: tuple[bool, bool], kept: Tensor, scale: Tensor
) -> Callable[..., tuple[Tensor, ...]]:
    """`_Fp8Backward` without the rounding of grad, in plain torch."""

    def gradient(grad: Tensor, shadow: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        out = []
        if needs[0]:
            dims = None if call.scaling == "tensor" else -1
            out.append(grad @ _straight_through(weight, dims).to(grad.dtype))
        if needs[1]:
            x = _seen(call, shadow, kept, scale)
            out.append((rows_of(grad).mT @ rows_of(x)).to(weight.dtype))
        return tuple(out)

    return gradient


@allow_in_graph
def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, scaling: str, triton: bool) -> Tensor:
    check_hidden()
    if nested_forward_mode():
        return fp8_linear_reference(x, weight, bias, scaling=scaling)
    keep = differentiated((weight,)) and (torch.is_grad_enabled() or bool(func_levels()))
    call = Fp8Call(scaling, triton, keep)
    return _Fp8Linear.apply(call, x.detach(), _Shadow.apply(x, _forward_mode()), weight, bias)[0]


# Public


def fp8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, scaling: str = "tensor"
) -> Tensor:
    """x @ weight.T + bias with float8 products, forward and backward (arXiv 2209.05433).

    x and weight are rounded to e4m3 (448 at most, 4 bits of mantissa), the gradient of the output
    to e5m2 (57344 at most, 3 bits), after division by a scale: the largest magnitude / the largest
    number of the format. The gradients are those of a linear layer with these operands, straight
    through the rounding: dx = dy8 W8 and dW = dy8^T x8. NaN gives NaN. Second derivatives are those
    of x8 W8^T in x.dtype.

    Args:
        x: [..., I]: bf16, fp16 or fp32, on a CPU also fp64. Under `vmap` with a shared weight the
            examples are rows of one tensor, and share its scale.
        weight: [O, I], floating point; O and I are multiples of 16. It is rounded in forward and
            again in backward, without keeping a copy.
        bias: [O] or None, floating point; added in fp32, rounded once with the sum.
        scaling: "tensor": one scale per tensor. "row": one per row of each operand, so that large
            entries do not coarsen other rows. The gradient of the weight, a sum over rows, is then
            computed in x.dtype from x, which backward keeps; a GPU takes bf16 only.

    Returns:
        [..., O] in x.dtype.

    Raises:
        ValueError: wrong shapes, dtypes or devices, an unknown `scaling`.
        RuntimeError: a GPU without float8 tensor cores (before compute capability 9.0).

    >>> import torch
    >>> x, weight = torch.full((1, 16), 0.5), torch.full((16, 16), 3.0)
    >>> round(fp8_linear(x, weight)[0, 0].item(), 3)
    24.0
    """
    _check(x, weight, bias, scaling)
    triton = choose("fp8_linear", str(x.device), x.dtype) == "triton"
    if triton and scaling == "row" and x.is_cuda and x.dtype != torch.bfloat16:
        raise ValueError(f'fp8_linear: scaling="row" takes bfloat16 on a GPU, not {x.dtype}.')
    return _apply(x, weight, bias, scaling, triton)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, scaling: str) -> None:
    check_floating("fp8_linear", x=x, weight=weight, bias=bias)
    if weight.ndim != 2 or weight.shape[0] % 16 or weight.shape[1] % 16:
        raise ValueError(
            "fp8_linear: weight must be [O, I] with multiples of 16, which float8 products need, "
            f"got {tuple(weight.shape)}."
        )
    out, inner = weight.shape
    if x.ndim == 0 or x.shape[-1] != inner:
        raise ValueError(
            f"fp8_linear: x must be [..., {inner}] to match weight {tuple(weight.shape)}, "
            f"got {tuple(x.shape)}."
        )
    if bias is not None and tuple(bias.shape) != (out,):
        raise ValueError(f"fp8_linear: bias must have shape [{out}], got {tuple(bias.shape)}.")
    if scaling not in SCALINGS:
        raise ValueError(f'fp8_linear: scaling must be "tensor" or "row", got {scaling!r}.')
