"""Matrix products that compute a GELU before they are written.

An MLP's GELU stands between two products. As a kernel of its own it reads what one product has just
written, and writes what the next one reads. Inside the products it costs no pass of its own. On an
H200, 33,792 patches, 1,152 to 4,304: 0.52 ms instead of 0.73 forward, 0.67 instead of 0.77
backward, each for 0.2 s; of a training step with pictures, whose speed the card's power limits,
1.1%: 492 ms instead of 497, both on one card (2026-11-27).

SwiGLU is not done so. It was: 1.34 ms instead of 1.58 and 0.91 instead of 1.06 for 0.2 s, but in a
step at the power limit 301.0 instead of 301.6 ms, for 15 s of compiling (docs/log.md).

Backends: `quack` (quack-kernels, https://github.com/Dao-AILab/quack: CuTe DSL, Hopper), and
`torch`, the same in plain operations, for tests.
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
from kernels.operators import fake, operator

# Of quack: rows and columns of a tile, whether two tiles take turns. The fastest of 14; the next
# ones are within 1%.
_FORWARD, _BACKWARD = (128, 192, True), (256, 128, False)
MULTIPLE = 8  # of all widths: 16 bytes


@functools.cache
def _config(rows: int, columns: int, turns: bool) -> Any:
    config = importlib.import_module("quack.gemm_config").GemmConfig
    return config(
        tile_m=rows, tile_n=columns, pingpong=turns, cluster_m=2, cluster_n=1, swap_ab=False,
        is_dynamic_persistent=False, device_capacity=9,
    )  # fmt: skip


@functools.cache
def _quack(function: str) -> Any:
    with dynamo.not_yet():
        return getattr(importlib.import_module("quack.gemm_interface"), function)


@operator("linear_gelu")
def _linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "torch":
        pre = F.linear(x, weight, bias)
        return pre, _gelu(pre.to(accumulation_dtype(pre.dtype))).to(pre.dtype)
    with torch.cuda.device_of(x):
        return _quack("gemm_act")(
            x, weight.t(), bias=bias, activation="gelu_tanh_approx", tuned=False,
            config=_config(*_FORWARD),
        )  # fmt: skip


@fake("linear_gelu")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    pre = x.new_empty(x.shape[0], weight.shape[0])
    return pre, torch.empty_like(pre)


@register_flop_formula(torch.ops.nanovision.linear_gelu)
def _linear_gelu_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """pre = x W^T + b, and gelu(pre), both [N, O]: x [N, I], weight [O, I], bias [O] or None.

    All of one dtype. One operator, which compilers and policies see. quack makes the second of fp32
    numbers, before they are rounded to the first.
    """
    return _linear_gelu(x.contiguous(), weight.contiguous(), bias, backend)


def linear_gelu_backward(
    grad: Tensor, weight: Tensor, pre: Tensor, backend: str, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Of y = gelu(pre) W^T with the gradient grad [N, O]: that of pre, and gelu(pre) again.

    overwrite: the first is written over pre. For the inside of operators: nothing sees it.
    """
    out = pre if overwrite else None
    if backend == "torch":
        wide = pre.to(accumulation_dtype(pre.dtype))
        d_act = torch.mm(grad, weight).to(wide.dtype)
        d_pre = torch.ops.aten.gelu_backward(d_act, wide, approximate="tanh").to(pre.dtype)
        act = _gelu(wide).to(pre.dtype)
        return (d_pre if out is None else out.copy_(d_pre)), act
    with torch.cuda.device_of(pre):
        return _quack("gemm_dact")(
            grad.contiguous(), weight.contiguous(), pre, activation="gelu_tanh_approx", dx_out=out,
            tuned=False, dynamic_scheduler=False, config=_config(*_BACKWARD),
        )  # fmt: skip
