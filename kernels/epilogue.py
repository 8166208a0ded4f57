"""Matrix products that compute an activation before they are written.

An MLP's activation stands between two products. As kernels of its own it reads what one product has
just written, and writes what the next one reads. Inside the products it costs no pass of its own,
forward and backward. Of a 1.5B decoder's MLP (16,384 tokens, 1,536 to 8,960, an H200 at its power
limit, 2026-11-27) forward and backward take 6.30 ms instead of 6.76.

Backends: `quack` (quack-kernels, https://github.com/Dao-AILab/quack: CuTe DSL, Hopper), and
`torch`, the same in plain operations, for tests.

Gate and up are one product here, with their outputs next to each other: gate 0, up 0, gate 1, ...
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import dynamo
from kernels.functions import accumulation_dtype
from kernels.glu import SWIGLU
from kernels.operators import fake, operator

# Of quack: rows and columns of a tile, whether two tiles take turns, the cluster. The fastest of
# 14, each run for 0.2 s at the card's power limit; several are within 1% of these.
# Gated, 16,384 x 1,536 x 17,920: 1.344 ms (two cuBLAS products and SwiGLU: 1.576), backward of
# 16,384 x 1,536 x 8,960: 0.907 (1.061). GELU, 33,792 x 1,152 x 4,304: 0.523 (0.727) and 0.665
# (0.774).
_TILES = {
    "gated": (256, 128, False, 2, 1),
    "gated_backward": (128, 192, True, 2, 1),
    "gelu": (128, 192, True, 2, 1),
    "gelu_backward": (256, 128, False, 2, 1),
}
MULTIPLE = 8  # of all widths: 16 bytes


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Weights [F, D] of gate and up as one of [2 F, D], a row of each in turn: a copy."""
    return torch.stack([gate, up], 1).view(-1, gate.shape[1])


def apart(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `interleaved`: copies."""
    gate, up = weight.view(-1, 2, weight.shape[1]).unbind(1)
    return gate.contiguous(), up.contiguous()


def _halves(pre: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = pre.view(*pre.shape[:-1], -1, 2).unbind(-1)
    return gate, up


def _act(pre: Tensor, activation: str) -> Tensor:
    """In plain operations, as is what follows."""
    if activation == "gelu":
        return F.gelu(pre, approximate="tanh")
    return SWIGLU.forward(*_halves(pre))[0]


def _act_backward(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, pre, approximate="tanh")
    both = SWIGLU.backward(grad, (True, True), _halves(pre), ())
    return torch.stack([g for g in both if g is not None], -1).view(pre.shape)


_NAMES = {"gated": "swiglu", "gelu": "gelu_tanh_approx"}  # of quack


@functools.cache
def _config(name: str) -> Any:
    config = importlib.import_module("quack.gemm_config").GemmConfig
    rows, columns, pingpong, cluster_m, cluster_n = _TILES[name]
    return config(
        tile_m=rows, tile_n=columns, pingpong=pingpong, cluster_m=cluster_m, cluster_n=cluster_n,
        swap_ab=False, is_dynamic_persistent=False, device_capacity=9,
    )  # fmt: skip


@functools.cache
def _quack(function: str) -> Any:
    with dynamo.not_yet():
        return getattr(importlib.import_module("quack.gemm_interface"), function)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    """pre = x W^T + b [N, O], and act(pre) [N, O / 2] if gated, else [N, O]; 2-D, contiguous.

    quack makes the second of fp32 numbers, before they are rounded to the first.
    """
    if backend == "torch":
        pre = F.linear(x, weight, bias)
        wide = pre.to(accumulation_dtype(pre.dtype))
        return pre, _act(wide, activation).to(pre.dtype)
    with torch.cuda.device_of(x):
        return _quack("gemm_act")(
            x, weight.t(), bias=bias, activation=_NAMES[activation], tuned=False,
            config=_config(activation),
        )  # fmt: skip


def _backward(
    grad: Tensor, weight: Tensor, pre: Tensor, activation: str, backend: str, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of pre, and act(pre), where grad [N, O] is that of y = act(pre) W^T.

    out: where to write the first; pre itself may be that.
    """
    if backend == "torch":
        wide = pre.to(accumulation_dtype(pre.dtype))
        d_pre = _act_backward(torch.mm(grad, weight).to(wide.dtype), wide, activation)
        d_pre, act = d_pre.to(pre.dtype), _act(wide, activation).to(pre.dtype)
        return (d_pre if out is None else out.copy_(d_pre)), act
    with torch.cuda.device_of(pre):
        return _quack("gemm_dact")(
            grad, weight, pre, activation=_NAMES[activation], dx_out=out, tuned=False,
            dynamic_scheduler=False, config=_config(f"{activation}_backward"),
        )  # fmt: skip


@operator("linear_act")
def _linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    return _forward(x, weight, bias, activation, backend)


@fake("linear_act")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    pre = x.new_empty(x.shape[0], weight.shape[0])
    return pre, x.new_empty(x.shape[0], weight.shape[0] // (2 if activation == "gated" else 1))


@register_flop_formula(torch.ops.nanovision.linear_act)
def _linear_act_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    """pre = x W^T + b, and act(pre): x [N, I], weight [O, I], bias [O] or None, one dtype.

    activation: "gated" (SwiGLU of neighbours; act(pre) is [N, O / 2]) or "gelu" (tanh, [N, O]).
    backend: "quack" or "torch". One operator, which compilers and policies see.
    """
    x, weight = x.contiguous(), weight.contiguous()
    return _linear_act(x, weight, bias, activation, backend)


def linear_act_backward(
    grad: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: str,
    backend: str,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Of y = act(pre) W^T with the gradient grad [N, O]: that of pre, and act(pre) again.

    overwrite: the first is written over pre. For the inside of operators: nothing sees it.
    """
    out = pre if overwrite else None
    return _backward(grad.contiguous(), weight.contiguous(), pre, activation, backend, out)
