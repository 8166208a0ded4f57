"""RMSNorm and LayerNorm over the last dimension.

No Triton kernel yet: forward and backward are torch, with fp32 statistics, in few passes over
memory. Backward keeps x and one statistic (two for LayerNorm) a row, never an fp32 copy of x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dynamo import allow_in_graph

from kernels.functions import Op, accumulation_dtype, check_floating, run

# References: plain torch, differentiable to any order


def rms_norm_reference(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    """What `rms_norm` computes."""
    dtype = accumulation_dtype(x.dtype)
    wide = x.to(dtype)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(dtype)
    return y.to(x.dtype)


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


# RMSNorm: y = x r w with r = (mean x^2 + eps)^-1/2


def _rms_forward(
    x: Tensor, weight: Tensor | None, *, eps: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    wide = x.to(accumulation_dtype(x.dtype))
    r = torch.rsqrt(torch.linalg.vecdot(wide, wide).unsqueeze(-1) / x.shape[-1] + eps)
    y = wide * r
    if weight is not None:
        y = y * weight
    return y.to(x.dtype), (r,)


def _rms_backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor | None],
    residuals: tuple[Tensor, ...],
    *,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """dx = r g w - x r^3 mean(g w x), dw = sum over rows of g x r."""
    (x, weight), (r,) = tensors, residuals
    wide = x.to(r.dtype)
    gx = grad * wide
    if weight is None:
        dot, scaled = gx.sum(-1, keepdim=True), grad * r
    else:
        weight = weight.to(r.dtype)
        dot, scaled = (gx @ weight).unsqueeze(-1), grad * weight * r
    dx = torch.addcmul(scaled, wide, r.pow(3) * dot, value=-1.0 / x.shape[-1])
    dw = None
    if weight is not None and needs[1]:
        rows = gx.reshape(-1, x.shape[-1])
        dw = (rows.t() @ r.reshape(-1)).to(tensors[1].dtype)  # type: ignore[union-attr]
    return dx.to(x.dtype), dw


RMS_NORM = Op("rms_norm", rms_norm_reference, _rms_forward, _rms_backward)


@allow_in_graph
def _apply_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return run(RMS_NORM, x, weight, eps=eps)


# LayerNorm: y = c r w + b with c = x - mean x, r = (mean c^2 + eps)^-1/2


def _layer_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    wide = x.to(accumulation_dtype(x.dtype))
    var, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    r = torch.rsqrt(var + eps)
    y = (wide - mean) * r
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
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
    u = (x.to(r.dtype) - mean) * r
    wide_grad = grad.to(r.dtype)
    v = wide_grad if weight is None else wide_grad * weight
    shared = torch.addcmul(
        v - v.mean(-1, keepdim=True), u, (v * u).mean(-1, keepdim=True), value=-1
    )
    dim = x.shape[-1]
    dw = db = None
    if weight is not None and needs[1]:
        dw = (wide_grad * u).reshape(-1, dim).sum(0).to(weight.dtype)
    if bias is not None and needs[2]:
        db = wide_grad.reshape(-1, dim).sum(0).to(bias.dtype)
    return (shared * r).to(x.dtype), dw, db


LAYER_NORM = Op("layer_norm", layer_norm_reference, _layer_forward, _layer_backward)


@allow_in_graph
def _apply_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return run(LAYER_NORM, x, weight, bias, eps=eps)


# Public


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension (arXiv 1910.07467).

    Statistics and arithmetic are fp32 (fp64 for fp64 x), rounded once at the end.

    Args:
        x: [..., D], any floating dtype.
        weight: [D], any floating dtype (fp32 beside a bf16 x is fine), or None for 1.

    Returns:
        [..., D] in x.dtype.

    Raises:
        ValueError: a weight that is not [D], a dtype that is not floating point, two devices.

    >>> import torch
    >>> rms_norm(torch.tensor([3.0, 4.0]), eps=0.0).square().mean().item()
    1.0
    """
    _check("rms_norm", x, eps, weight=weight)
    return _apply_rms_norm(x, weight, eps)


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
    _check("layer_norm", x, eps, weight=weight, bias=bias)
    return _apply_layer_norm(x, weight, bias, eps)


def _check(where: str, x: Tensor, eps: float, **leaves: Tensor | None) -> None:
    check_floating(where, x=x, **leaves)
    if x.ndim == 0:
        raise ValueError(f"{where}: x must have at least one dimension, got a scalar.")
    if eps < 0.0:
        raise ValueError(f"{where}: eps must be >= 0, got {eps}.")
    for name, leaf in leaves.items():
        if leaf is not None and tuple(leaf.shape) != (x.shape[-1],):
            raise ValueError(
                f"{where}: {name} must have shape [{x.shape[-1]}] to match x {tuple(x.shape)}, "
                f"got {tuple(leaf.shape)}."
            )
