"""Linear layer whose three matrix products run in float8, for training.

y = x W^T, dx = dy W and dW = dy^T x, with x and W rounded to e4m3 and dy to e5m2 ("FP8 Formats for
Deep Learning", arXiv 2209.05433): gradients need range more than precision. Each tensor has a scale
that is made of its own largest entry at every call, with no history, so that the layer is a pure
function. Sums are fp32.

On a GPU the kernels of `fp8_triton` round and torch._scaled_mm multiplies. Elsewhere torch
rounds, and float8 numbers are multiplied as fp32 ones.

What is kept of x for backward is its transposed float8 copy, a byte an entry, and the scale. Three
layers that share one x round it three times; a compiler sees three equal calls of an operator
without side effects, and makes one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.quantised import fp8_triton
from kernels.runtime import launch
from kernels.runtime.autograd import (
    accumulation_dtype,
    batch_first,
    check_floating,
    differentiated,
    each_example,
    func_levels,
    nested_forward_mode,
    pull,
    push,
    rows_of,
    shaped,
    with_signature,
)
from kernels.runtime.dispatch import TORCH, Backend, CallInfo, choose, declare
from kernels.runtime.dynamo import allow_in_graph, check_hidden
from kernels.runtime.operators import operator


def _why_not(call: CallInfo) -> str | None:
    device = torch.device(call.device)
    if device.type == "cuda" and (has := torch.cuda.get_device_capability(device)) < (9, 0):
        return f"needs compute capability 9.0, this GPU has {has[0]}.{has[1]}"
    return launch.why_not(call.device, call.dtype)


def _order(call: CallInfo) -> tuple[str, ...]:
    """torch only imitates float8, slower than bf16: a GPU takes it where it is asked for alone."""
    return ("triton",) if torch.device(call.device).type == "cuda" else ("triton", "torch")


declare("fp8_linear", Backend("triton", _why_not), TORCH, order=_order)


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALINGS = ("tensor", "row")
SMALLEST = 2.0**-126  # a scale: its reciprocal is finite
Triple = tuple[Tensor, Tensor, Tensor]

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
    return x + (_widen(_round(still, scale, E4M3), scale, x.dtype) - still)


def scale_of(x: Tensor, dtype: torch.dtype, dims: int | None) -> Tensor:
    """fp32: the largest magnitude of x / the largest number of dtype, or 1 if all is zero; over
    everything (dims None), or over one dimension, which is kept."""
    size = x.detach().abs().float()
    amax = size.amax() if dims is None else size.amax(dims, keepdim=True)
    # By a tensor: by a number, a GPU multiplies by its reciprocal, and a scale that is off by its
    # last bit rounds ties the other way (5.25 / 448 has two bits: there ties are frequent).
    scale = amax / amax.new_full((), fp8_triton.LARGEST[dtype])
    scale = torch.where(scale < SMALLEST, SMALLEST, scale)  # NaN is not less
    return torch.where(amax == 0, 1.0, scale)


def _round(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.float() * scale.reciprocal()).to(dtype)


def _widen(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = accumulation_dtype(dtype)
    return (codes.to(wide) * scale.to(wide)).to(dtype)


# Rounding, a custom op: what a compiler may merge. Outputs that are not asked for are empty.


def _quantize_fake(x: Tensor, scaling: str, turned: bool, **_: Any) -> Triple:
    rows, cols = x.shape
    across = (cols, _up16(rows)) if turned else (0, 0)
    scale = x.new_empty(() if scaling == "tensor" else (rows, 1), dtype=torch.float32)
    return _codes(x, rows, cols), _codes(x, *across), scale


@operator("fp8_quantize", fake=_quantize_fake)
def _quantize_op(x: Tensor, scaling: str, turned: bool, triton: bool) -> Triple:
    """x [R, C] in e4m3: codes [R, C], the transposed ones [C, R up to a multiple of 16], scale."""
    return _quantize(x, E4M3, scaling, True, turned, None, triton)


def _quantize_backward_fake(
    grad: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    scaling: str,
    needs_input: bool,
    needs_weight: bool,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, outs), inner = grad.shape, weight.shape[1]
    tensor = scaling == "tensor"
    straight = (rows, outs) if needs_input else (0, 0)
    across = (outs, _up16(rows)) if needs_weight and tensor else (0, 0)
    weights = (inner, outs) if needs_input else (0, 0)
    scales = (1, inner) if needs_input and not tensor else (0,)
    return (
        _codes(grad, *straight, dtype=E5M2),
        _codes(grad, *across, dtype=E5M2),
        grad.new_empty(() if tensor else (rows, 1), dtype=torch.float32),
        _codes(weight, *weights),
        weight_scale.new_empty(scales),
    )


@operator("fp8_quantize_backward", fake=_quantize_backward_fake)
def _quantize_backward_op(
    grad: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    scaling: str,
    needs_input: bool,
    needs_weight: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient [R, O] in e5m2 both ways, its scale; the transposed weight [I, O] in e4m3, its
    scales (empty for "tensor": the given one holds).

    One operator, so that the weight's copy hangs on the gradient: else a compiler could make it in
    forward, and keep it.
    """
    turned = needs_weight and scaling == "tensor"
    codes, across, scale = _quantize(grad, E5M2, scaling, needs_input, turned, None, triton)
    weights, weight_scales = _codes(weight, 0, 0), weight_scale.new_empty(0)
    if needs_input and scaling == "tensor":
        _, weights, _ = _quantize(weight, E4M3, "tensor", False, True, weight_scale, triton)
    elif needs_input:
        _, weights, weight_scales = _quantize(weight, E4M3, "column", False, True, None, triton)
    return codes, across, scale, weights, weight_scales


def _codes(x: Tensor, *shape: int, dtype: torch.dtype = E4M3) -> Tensor:
    return x.new_empty(shape, dtype=dtype)


def _up16(n: int) -> int:
    return -(-n // 16) * 16


def _quantize(
    x: Tensor,
    dtype: torch.dtype,
    scaling: str,
    straight: bool,
    turned: bool,
    given: Tensor | None,
    triton: bool,
) -> Triple:
    """scaling: "tensor", "row" (straight codes only) or "column" (transposed ones only)."""
    x = x.contiguous()
    quantize = _quantize_triton if triton and x.numel() else _quantize_torch
    codes, across, scale = quantize(x, dtype, scaling, straight, turned, given)
    return (
        _codes(x, 0, 0, dtype=dtype) if codes is None else codes,
        _codes(x, 0, 0, dtype=dtype) if across is None else across,
        x.new_empty(0, dtype=torch.float32) if scale is None else scale,
    )


Codes = tuple[Tensor | None, Tensor | None, Tensor | None]


def _quantize_triton(
    x: Tensor,
    dtype: torch.dtype,
    scaling: str,
    straight: bool,
    turned: bool,
    given: Tensor | None,
) -> Codes:
    if scaling == "tensor":
        return fp8_triton.quantize(x, dtype, straight, turned, given)
    if scaling == "column":
        return None, *fp8_triton.quantize_columns(x, dtype)
    codes, scale = fp8_triton.quantize_rows(x, dtype)
    return codes, None, scale


def _quantize_torch(
    x: Tensor,
    dtype: torch.dtype,
    scaling: str,
    straight: bool,
    turned: bool,
    given: Tensor | None,
) -> Codes:
    dims = {"tensor": None, "row": 1, "column": 0}[scaling]
    scale = given
    if scale is None:
        shape = [1 if dims is not None and i == dims else n for i, n in enumerate(x.shape)]
        empty = torch.ones([] if dims is None else shape, device=x.device)
        scale = scale_of(x, dtype, dims) if x.numel() else empty
    codes, across = _round(x, scale, dtype), None
    if turned:  # of bytes, since few operations know float8
        padding = (0, _up16(x.shape[0]) - x.shape[0])
        across = F.pad(codes.view(torch.uint8).t(), padding).contiguous().view(dtype)
    return codes if straight else None, across, scale if given is None else None


# Products


def _product(
    a: Tensor,  # [M, K] float8
    b: Tensor,  # [N, K] float8: torch._scaled_mm wants the summed dimension contiguous in both
    a_scale: Tensor,  # scalar, or [M, 1]
    b_scale: Tensor,  # scalar, or [1, N]
    dtype: torch.dtype,
    fast: bool,
    triton: bool,
    bias: Tensor | None = None,  # [N]
) -> Tensor:
    """a b^T + bias [M, N] in dtype. torch 2.11 asks for K and N that 16 divides; M is free.

    fast: sums stay in the accumulators of the tensor cores, which keep about 14 bits of mantissa on
    Hopper (arXiv 2412.19437), instead of moving to fp32 registers every few instructions. Forward
    can take that: e4m3 keeps 4 bits. Gradients are summed over thousands of outputs or tokens, with
    cancellation, and their errors add up in the weights.
    """
    if triton and a.is_cuda and 0 not in (*a.shape, *b.shape):
        fused = bias is not None and dtype != torch.float32  # what cuBLAS adds
        y = torch._scaled_mm(
            a,
            b.t(),
            scale_a=a_scale,
            scale_b=b_scale,
            bias=bias.to(dtype) if bias is not None and fused else None,
            out_dtype=dtype,
            use_fast_accum=fast,
        )
        return y if bias is None or fused else y + bias.to(dtype)
    wide = accumulation_dtype(dtype)
    y = (a.to(wide) @ b.to(wide).t()) * a_scale * b_scale
    return (y if bias is None else y + bias.to(wide)).to(dtype)


# Autograd


@dataclass(frozen=True, eq=False)  # an opaque leaf of pytrees
class Call:
    """keep: the weight may want a gradient, so that x is kept."""

    scaling: str
    triton: bool
    keep: bool


@with_signature
class _Shadow(torch.autograd.Function):
    """x -> zeros of its shape that take one number of memory, with the derivative of x.

    Backward keeps no x, yet a second derivative has to find its way to x: along this.
    dense: in memory of their own, which forward mode wants, as it lays tangents out like values.
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
class _Linear(torch.autograd.Function):
    """(call, x, shadow, weight, bias) -> y and what backward wants of x and weight: codes of x
    transposed, their scale, the weight's scale. x gets its gradient through its shadow."""

    @staticmethod
    def forward(
        call: Call, x: Tensor, shadow: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        turned = call.keep and call.scaling == "tensor"
        codes, across, scale = _quantize_op(rows_of(x), call.scaling, turned, call.triton)
        weights, _, weight_scale = _quantize_op(weight, call.scaling, False, call.triton)
        y = _product(codes, weights, scale, weight_scale.t(), x.dtype, True, call.triton, bias)
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
            grads = iter(_Backward.apply(ctx.call, needs, grad, shadow, weight, *kept))
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
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Call, *tensors: Any) -> Any:
        batch, dims = info.batch_size, in_dims[1:]
        if any(dim is not None for dim in dims[2:]):
            outs = each_example(lambda *one: _Linear.apply(call, *one), batch, dims, tensors)
            return outs, (0,) * len(outs)
        x, shadow = (batch_first(t, dim, batch) for t, dim in zip(tensors, dims[:2], strict=False))
        y, across, scale, weight_scale = _Linear.apply(call, x, shadow, *tensors[2:])
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
    """[I, batch * rows up to a multiple of 16] -> [batch, I, rows up to one], zeros behind."""
    raw = codes.view(torch.uint8)[:, : batch * rows]
    raw = raw.reshape(codes.shape[0], batch, rows).movedim(1, 0)
    return F.pad(raw, (0, _up16(rows) - rows)).contiguous().view(codes.dtype)


def _seen(call: Call, shadow: Tensor, kept: Tensor, scale: Tensor) -> Tensor:
    """x as the products saw it, with the derivative of x. x [..., I], which `kept` holds."""
    if call.scaling == "row":
        x = kept.detach()
        return shadow + _widen(
            _round(x, scale_of(x, E4M3, -1), E4M3), scale_of(x, E4M3, -1), x.dtype
        )
    rows = math.prod(shadow.shape[:-1])
    x = _widen(kept.mT[:rows], scale, shadow.dtype).reshape(shadow.shape)
    return shadow + x


@with_signature
class _Backward(torch.autograd.Function):
    """(call, needs, grad, shadow, weight, kept, scale, weight_scale) -> the gradients of x and of
    weight that are needed. Its own derivatives are those of the formula, with grad not rounded."""

    @staticmethod
    def forward(call: Call, needs: tuple[bool, bool], *saved: Tensor) -> tuple[Tensor, ...]:
        grad, shadow, weight, kept, scale, weight_scale = saved
        rows = rows_of(grad)
        for_weight = needs[1] and call.scaling == "tensor"
        codes, across, grad_scale, weights, weight_scales = _quantize_backward_op(
            rows, weight, weight_scale, call.scaling, needs[0], for_weight, call.triton
        )
        out = []
        if needs[0]:
            other = weight_scale if call.scaling == "tensor" else weight_scales
            dx = _product(codes, weights, grad_scale, other, grad.dtype, False, call.triton)
            out.append(dx.view(shadow.shape))
        if for_weight:
            out.append(_product(across, kept, grad_scale, scale, weight.dtype, False, call.triton))
        elif needs[1]:
            # its sums run over the rows, whose scales differ: no product of float8 can know them
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
        info: Any, in_dims: tuple[Any, ...], call: Call, needs: tuple[bool, bool], *saved: Tensor
    ) -> Any:
        batch, dims = info.batch_size, in_dims[2:]
        if not needs[1] and dims[2] is None and dims[5] is None:  # examples are just more rows
            grad, shadow = (batch_first(saved[i], dims[i], batch) for i in (0, 1))
            outs = _Backward.apply(call, needs, grad, shadow, *saved[2:])
        else:
            outs = each_example(lambda *one: _Backward.apply(call, needs, *one), batch, dims, saved)
        return outs, (0,) * len(outs)


def _gradient(
    call: Call, needs: tuple[bool, bool], kept: Tensor, scale: Tensor
) -> Callable[..., tuple[Tensor, ...]]:
    """What `_Backward` computes but for the rounding of grad, as plain torch."""

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
    call = Call(scaling, triton, keep)
    return _Linear.apply(call, x.detach(), _Shadow.apply(x, _forward_mode()), weight, bias)[0]


# Public


def fp8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, scaling: str = "tensor"
) -> Tensor:
    """x @ weight.T + bias with float8 products, forward and backward (arXiv 2209.05433).

    x and weight are rounded to e4m3 (448 at most, 4 bits of mantissa), the gradient of the output
    to e5m2 (57344 at most, 3 bits), after division by a scale: the largest magnitude / the largest
    number. The gradients are those of a linear layer with these operands, dx = dy8 W8 and
    dW = dy8^T x8: straight through the rounding. NaN gives NaN. Second derivatives are those of
    x8 W8^T in x.dtype.

    Args:
        x: [..., I]: bf16, fp16 or fp32, on a CPU also fp64. Under `vmap` with a shared weight the
            examples are rows of one tensor, and share its scale.
        weight: [O, I], floating point; O and I are multiples of 16. It is rounded in forward and
            again in backward: no copy of it is kept.
        bias: [O] or None, floating point; added in fp32, rounded once with the sum.
        scaling: "tensor": one scale a tensor. "row": one a row of either operand, which large
            entries of other rows do not coarsen; the gradient of the weight is then computed in
            x.dtype from x, which is kept (its sums run over rows), and a GPU takes bf16 alone.

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
