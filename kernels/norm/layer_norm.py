"""LayerNorm over the last dimension.

On a GPU the kernels of `layer_norm_triton` run, elsewhere torch, in few passes over memory.
Statistics are fp32. Backward keeps x and two statistics per row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.norm import layer_norm_triton
from kernels.norm.rms_norm import check_norm, fake_leaf, fake_statistic, fold_norm
from kernels.runtime import launch
from kernels.runtime.autograd import Op, accumulation_dtype, run
from kernels.runtime.dispatch import TORCH, Backend, choose, declare
from kernels.runtime.dynamo import allow_in_graph
from kernels.runtime.operators import empty, operator


class _LayerNormCall(NamedTuple):
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    width: int = 64  # of a row


def _layer_norm_why_not(call: _LayerNormCall) -> str | None:
    most = layer_norm_triton.MAX_DIM
    if call.width > most:
        return f"keeps rows in registers, of up to {most} entries, not {call.width}"
    return launch.why_not(call.device, call.dtype)


declare("layer_norm", Backend("triton", _layer_norm_why_not), TORCH, call=_LayerNormCall)


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> Tensor:
    """What `layer_norm` computes."""
    dtype = accumulation_dtype(x.dtype)
    wide = x.to(dtype)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)


# LayerNorm: y = c r w + b with c = x - mean x, r = (mean c^2 + eps)^-1/2


def _layer_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    wide = x.to(accumulation_dtype(x.dtype)).contiguous()
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    r = torch.rsqrt(torch.linalg.vecdot(centred, centred).unsqueeze(-1) / x.shape[-1] + eps)
    y = centred.mul_(r)
    if weight is not None:
        y *= weight.to(y.dtype)
    if bias is not None:
        y += bias.to(y.dtype)
    return y.to(x.dtype), (mean, r)


def _layer_backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    residuals: tuple[Tensor, ...],
    *,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """With u = c r and v = g w: dx = r (v - mean v - u mean(v u)), dw = sum g u, db = sum g."""
    (x, weight, bias), (mean, r) = tensors, residuals
    dim = x.shape[-1]
    u = (x.to(r.dtype) - mean) * r
    g = grad.to(r.dtype)
    gu = g * u
    if weight is None:
        v, mean_v, mean_vu = g, g.mean(-1, keepdim=True), gu.mean(-1, keepdim=True)
    else:
        w = weight.to(r.dtype)
        v, mean_v, mean_vu = g * w, (g @ w).unsqueeze(-1) / dim, (gu @ w).unsqueeze(-1) / dim
    dx = torch.addcmul(v - mean_v, u, mean_vu, value=-1.0) * r
    dw = db = None
    if weight is not None and needs[1]:
        dw = gu.reshape(-1, dim).sum(0).to(weight.dtype)
    if bias is not None and needs[2]:
        db = g.reshape(-1, dim).sum(0).to(bias.dtype)
    return dx.to(x.dtype), dw, db


def _layer_fake(x: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty(x, True), fake_statistic(x), fake_statistic(x)


def _layer_backward_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    needs_weight: bool,
    needs_bias: bool,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dw, db = fake_leaf(x, weight, needs_weight), fake_leaf(x, bias, needs_bias)
    return empty(x, True), dw, db


_layer_op = operator("layer_norm", fake=_layer_fake)(layer_norm_triton.layer_norm_forward)
_layer_backward_op = operator("layer_norm_backward", fake=_layer_backward_fake)(
    layer_norm_triton.layer_norm_backward
)


def _layer_forward_triton(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    y, mean, r = _layer_op(x, weight, bias, eps)
    return y, (mean, r)


def _layer_backward_triton(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    residuals: tuple[Tensor, ...],
    *,
    eps: float,
) -> tuple[Tensor | None, ...]:
    return _layer_backward_op(grad, *tensors, *residuals, *needs[1:])


LAYER_NORM = Op(
    "layer_norm",
    layer_norm_reference,
    _layer_forward,
    _layer_backward,
    fold=fold_norm,
    vmappable=True,
)
LAYER_NORM_TRITON = Op(
    "layer_norm",
    layer_norm_reference,
    _layer_forward_triton,
    _layer_backward_triton,
    fold=fold_norm,
)


@allow_in_graph
def _apply_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, triton: bool
) -> Tensor:
    return run(LAYER_NORM_TRITON if triton else LAYER_NORM, x, weight, bias, eps=eps)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension.

    As arXiv 1607.06450, with the biased variance. Statistics and arithmetic are fp32 (fp64 for
    fp64 x), rounded once at the end.

    Args:
        x: [..., D], any floating dtype.
        weight, bias: [D], any floating dtype, or None for 1 and 0.

    Returns:
        [..., D] in x.dtype.

    Raises:
        ValueError: a weight or bias that is not [D], a dtype that is not floating point, two
            devices.
    """
    check_norm("layer_norm", x, eps, weight=weight, bias=bias)
    triton = choose("layer_norm", str(x.device), x.dtype, x.shape[-1]) == "triton"
    return _apply_layer_norm(x, weight, bias, eps, triton)
