"""Flash attention in Triton over packed documents, fastest for short ones (arXiv 2307.08691).

The kernels are in `attention_triton_kernels`; this file tunes and launches them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention.attention_triton_kernels import (
    flash_backward_dkdv_kernel,
    flash_backward_dq_kernel,
    flash_forward_kernel,
)
from kernels.runtime.launch import capability, launch, triton

_RANKED = 1024  # documents that `_place_heaviest` can hold


@dataclass(frozen=True)
class FlashConfig:
    """Queries and keys per block, warps per program, depth of the pipeline."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2
    registers: int = 255  # the hardware's limit: without any, some kernels spill for occupancy


def _config(kind: str, q: Tensor) -> FlashConfig:
    """Launch settings, measured on an H200; `kind` is forward, dq or dkdv."""
    dim = _padded(q.shape[2])
    if q.dtype == torch.float32:  # multiplied without tensor cores, since tf32 is too coarse
        small = FlashConfig(16, 16, 8, 1)
        return FlashConfig(32, 32, 4 if dim <= 32 else 8, 1) if dim <= 64 else small
    if dim == 256:
        return FlashConfig(64, 32, 8)
    if 0 < capability(q.device)[0] < 9:  # less shared memory, smaller matrix instructions
        if kind == "dkdv" and dim == 64:
            return FlashConfig(32, 64)
        return FlashConfig(64, 64, 8 if dim == 128 else 4)
    if kind == "forward":
        return FlashConfig(64, 64, stages=3)
    if kind == "dq":
        return FlashConfig(64, 64) if dim == 128 else FlashConfig(64, 32, stages=3)
    return FlashConfig(32, 64, stages=3) if dim == 64 else FlashConfig(64, 64)


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _rows(x: Tensor) -> Tensor:
    """x [N, H, Dh], copied unless the entries of a row are adjacent."""
    inner = (x.shape[2], 1)
    return x if x.stride()[1:] == inner or x.shape[0] == 0 else x.contiguous()


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """(q, scale, sign) with a positive scale: the largest product then has the largest score."""
    if scale > 0:
        return q, scale, 1.0
    sign = -1.0 if scale < 0 else 0.0
    return q * sign, -scale if scale < 0 else 1.0, sign


def _launch(
    kernel: Any,
    pointers: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    config: FlashConfig,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    by_keys: bool = False,
    **constants: Any,
) -> None:
    """Starts a kernel with one program per block of queries or keys, and head of such."""
    (n, heads, dim), documents = q.shape, cu_seqlens.shape[0] - 1
    block, across = (config.keys, k.shape[1]) if by_keys else (config.queries, heads)
    launch(
        kernel,
        ((n // block + documents) * across if n else 0,),
        *pointers,
        cu_seqlens,
        n,
        documents,
        scale,
        None if window is None or window >= n else window,
        Q_STRIDE=q.stride(0),
        K_STRIDE=k.stride(0),
        V_STRIDE=v.stride(0),
        HEADS=heads,
        KEY_HEADS=k.shape[1],
        DIM=dim,
        BLOCK_D=_padded(dim),
        CAUSAL=causal,
        BLOCK_M=config.queries,
        BLOCK_N=config.keys,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        # distance of the rows that one thread reads, 16 bytes of each
        STEP=max(1, config.warps * 512 // (q.element_size() * _padded(dim))),
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
        **constants,
    )


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    config: FlashConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """out [N, H, Dh] in q's dtype, contiguous, and the scores' log-sum-exp [H, N] in fp32.

    q [N, H, Dh], k and v [N, Hk, Dh], cu_seqlens [S + 1] int32: as `kernels.attention` takes them,
    unchecked. No bound on a document's length is needed.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    q, scale, _ = _positive(q, scale)
    n, heads, dim = q.shape
    config = config or _config("forward", q)
    out = q.new_empty(n, heads, dim)
    lse = q.new_empty(heads, n, dtype=torch.float32)
    options: dict[str, Any] = {"causal": causal, "window": window, "scale": scale}
    _launch(flash_forward_kernel, (q, k, v, out, lse), q, k, v, cu_seqlens, config, **options)
    return out, lse


def backward_dq(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    config: FlashConfig | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """dq, and delta = rowsum(out * grad) [H, N]; options: causal, window, scale."""
    config = config or _config("dq", q)
    dq, delta = q.new_empty(q.shape), torch.empty_like(lse)
    pointers = (grad, q, k, v, out, lse, delta, dq)
    _launch(flash_backward_dq_kernel, pointers, q, k, v, cu_seqlens, config, **options)
    return dq, delta


def backward_dkdv(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    cu_seqlens: Tensor,
    config: FlashConfig | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """dk and dv; options: causal, window, scale."""
    config = config or _config("dkdv", q)
    dk, dv = k.new_empty(k.shape), k.new_empty(k.shape)
    # causal: the blocks with the most work first, over all documents
    ranked = _RANKED if options["causal"] and cu_seqlens.shape[0] - 1 <= _RANKED else 0
    pointers, kernel = (grad, q, k, v, lse, delta, dk, dv), flash_backward_dkdv_kernel
    options |= {"by_keys": True, "RANKED": ranked}
    _launch(kernel, pointers, q, k, v, cu_seqlens, config, **options)
    return dk, dv


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    configs: tuple[FlashConfig | None, FlashConfig | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, from the arguments and results of `flash_forward`; the same bits each
    time."""
    grad, out = grad.contiguous(), out.contiguous()
    q, k, v = _rows(q), _rows(k), _rows(v)
    q, scale, sign = _positive(q, scale)
    options: dict[str, Any] = {"causal": causal, "window": window, "scale": scale}
    dq, delta = backward_dq(grad, q, k, v, out, lse, cu_seqlens, configs[0], **options)
    dk, dv = backward_dkdv(grad, q, k, v, lse, delta, cu_seqlens, configs[1], **options)
    return dq if sign == 1.0 else dq * sign, dk, dv
