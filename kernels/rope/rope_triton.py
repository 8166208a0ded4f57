"""Launches of the Triton kernels in `rope_triton_kernels`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.norm.rows_triton import sums
from kernels.rope.rope_triton_kernels import rope_kernel, rope_qk_norm_backward_kernel
from kernels.runtime.launch import launch, processors, triton
from kernels.runtime.operators import empty


@dataclass(frozen=True)
class RopeLaunch:
    """How a kernel is launched.

    tokens, group: the tokens and heads of a tile. warps: per program. stages: of the pipeline over
    groups of heads; 1 means no pipeline. programs: per multiprocessor, each taking tiles in turn;
    0 means one program per tile.
    """

    tokens: int
    group: int
    warps: int
    stages: int = 1
    programs: int = 0


def forward_config(q: Tensor, normed: bool) -> RopeLaunch:
    """For q [tokens, H, Dh]: all heads of a token at once; with a norm, one head of many tokens."""
    if normed and q.shape[0] >= 16 * processors(q.device):  # fewer tokens: decoding, for latency
        return _of_tokens(q, 2)
    tile = _entries(q, 4)
    group = min(tile, triton.next_power_of_2(q.shape[1]))
    return RopeLaunch(tile // group, group, 4)


def backward_config(q: Tensor) -> RopeLaunch:
    """One head of many tokens at a time, in a pipeline."""
    return _of_tokens(q, 4, 3, 3)


def _of_tokens(q: Tensor, warps: int, stages: int = 1, programs: int = 0) -> RopeLaunch:
    """One head of several tokens at a time."""
    return RopeLaunch(min(32, _entries(q, warps)), 1, warps, stages, programs)


def _entries(q: Tensor, warps: int) -> int:
    """The number of half heads of which each thread holds 16 bytes."""
    return max(1, 1024 * warps // (q.element_size() * triton.next_power_of_2(q.shape[2])))


def _tokens(x: Tensor) -> Tensor:
    """[..., N, H, Dh] as [tokens, H, Dh] with contiguous heads; a copy only where necessary."""
    x = x.flatten(0, -3)
    return x if x.stride(-1) == 1 else x.contiguous()


def _constants(q: Tensor, k: Tensor, cos: Tensor, config: RopeLaunch) -> dict[str, Any]:
    """q, k [tokens, heads, Dh]; cos [T, Dh/2] or [T, Dh]."""
    half = q.shape[2] // 2
    groups = [min(config.group, triton.next_power_of_2(x.shape[1])) for x in (q, k)]
    return {
        **_strides(Q=q, K=k),
        "Q_HEADS": q.shape[1],
        "K_HEADS": k.shape[1],
        "HALF": half,
        "BLOCK": triton.next_power_of_2(half),
        "WIDTH": cos.shape[1],
        "TOKENS": config.tokens,
        "Q_GROUP": groups[0],
        "K_GROUP": groups[1],
        "STAGES": config.stages,
        "num_warps": config.warps,
    }


def _strides(**tensors: Tensor) -> dict[str, Any]:
    named: dict[str, Any] = {f"{name}_TOKEN": x.stride(0) for name, x in tensors.items()}
    return named | {f"{name}_HEAD": x.stride(1) for name, x in tensors.items()}


def rope_turn(
    q: Tensor,  # [..., N, H, Dh]
    k: Tensor,  # [..., N, Hk, Dh]
    q_weight: Tensor | None,  # [Dh]
    k_weight: Tensor | None,
    cos: Tensor,  # [T, Dh/2] or [T, Dh]
    sin: Tensor,
    positions: Tensor,  # [..., N]
    eps: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """q and k rotated, after a norm if there are weights."""
    outs = q.new_empty(q.shape), k.new_empty(k.shape)
    flat_q, flat_k = _tokens(q), _tokens(k)
    config = forward_config(flat_q, q_weight is not None)
    launch(
        rope_kernel,
        (triton.cdiv(flat_q.shape[0], config.tokens),),
        *(flat_q, flat_k, _dense(q_weight), _dense(k_weight), cos.contiguous(), sin.contiguous()),
        *(positions.contiguous(), *outs, flat_q.shape[0], cos.shape[0], eps),
        INVERSE=inverse,
        **_constants(flat_q, flat_k, cos, config),
    )
    return outs


def rope_qk_norm_backward(
    q_grad: Tensor,  # [..., N, H, Dh]
    k_grad: Tensor,  # [..., N, Hk, Dh]
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,  # [Dh]
    k_weight: Tensor,
    cos: Tensor,  # [T, Dh/2] or [T, Dh]
    sin: Tensor,
    positions: Tensor,  # [..., N]
    eps: float,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q and k, and of the two weights (empty if not needed)."""
    outs = q.new_empty(q.shape), k.new_empty(k.shape)
    flat_q, flat_k, grads_q, grads_k = (_tokens(x) for x in (q, k, q_grad, k_grad))
    config = backward_config(flat_q)
    tiles = triton.cdiv(flat_q.shape[0], config.tokens)
    most = processors(q.device) * config.programs
    programs = min(tiles, most) if most else tiles
    partials = None
    if needs_weights:
        partials = q.new_empty((2, programs, q.shape[-1]), dtype=torch.float32)
    launch(
        rope_qk_norm_backward_kernel,
        (programs,),
        *(grads_q, grads_k, flat_q, flat_k, _dense(q_weight), _dense(k_weight)),
        *(cos.contiguous(), sin.contiguous(), positions.contiguous(), *outs, partials),
        *(flat_q.shape[0], cos.shape[0], eps),
        **_strides(Q_GRAD=grads_q, K_GRAD=grads_k),
        **_constants(flat_q, flat_k, cos, config),
    )
    if partials is None:
        return *outs, empty(q_weight), empty(k_weight)
    dq_weight, dk_weight = sums(partials, q_weight, k_weight)
    return *outs, dq_weight, dk_weight


def _dense(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()
