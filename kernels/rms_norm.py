"""RMSNorm and LayerNorm over the last dimension.

No Triton kernel yet: forward and backward are torch, with fp32 statistics, in few passes over
memory. Backward keeps x and one statistic (two for LayerNorm) a row, never an fp32 copy of x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dynamo import allow_in_graph

from kernels.functions import Dims, Op, Tensors, accumulation_dtype, check_floating, run

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
        y *= weight.to(y.dtype)
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
    wide, g = x.to(r.dtype), grad.to(r.dtype)
    gx = g * wide
    if weight is None:
        dot, scaled = gx.sum(-1, keepdim=True), g * r
    else:
        w = weight.to(r.dtype)
        dot, scaled = (gx @ w).unsqueeze(-1), g * w * r
    dx = torch.addcmul(scaled, wide, r.pow(3) * dot, value=-1.0 / x.shape[-1])
    dw = None
    if weight is not None and needs[1]:
        rows = gx.reshape(-1, x.shape[-1])
        dw = (rows.t() @ r.reshape(-1)).to(weight.dtype)
    return dx.to(x.dtype), dw


def _fold(batch_size: int, dims: Dims, tensors: Tensors) -> Tensors | None:
    """Examples are more rows, if they share weight and bias."""
    (x, *leaves), (dim, *others) = tensors, dims
    if x is None or dim is None or any(other is not None for other in others):
        return None
    return (x.movedim(dim, 0), *leaves)


RMS_NORM = Op(
    "rms_norm", rms_norm_reference, _rms_forward, _rms_backward, fold=_fold, vmappable=True
)


@allow_in_graph
def _apply_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return run(RMS_NORM, x, weight, eps=eps)


# LayerNorm: y = c r w + b with c = x - mean x, r = (mean c^2 + eps)^-1/2


def _layer_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    wide = x.to(accumulation_dtype(x.dtype))
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


LAYER_NORM = Op(
    "layer_norm",
    layer_norm_reference,
    _layer_forward,
    _layer_backward,
    fold=_fold,
    vmappable=True,
)


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
