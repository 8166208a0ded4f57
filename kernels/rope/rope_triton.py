# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""The Triton kernels of `rope`, with and without an RMS norm of each head before it (QK-norm).

A program takes TOKENS tokens and goes over all heads of q, then of k, GROUP heads at a time. Each
half of a head is a tile of its own, [TOKENS, GROUP, HALF], so that the two entries that turn
together lie in one thread, and a token's row of cos and sin is read once for all its heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.norm.rows_triton import sums
from kernels.runtime.launch import jit, launch, processors, tl, triton

# Pieces


@jit
def _angles(
    cos_ptr,
    sin_ptr,
    positions_ptr,
    token,
    tokens,
    table,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """cos and sin for the first half of a head, then for the second: each [TOKENS, 1, BLOCK], fp32;
    NaN for a position that the tables do not have. WIDTH: of a table's row, HALF or 2 HALF."""
    position = tl.load(positions_ptr + token, mask=token < tokens, other=0)[:, None, None]
    col = tl.arange(0, BLOCK)[None, None, :]
    known = (position >= 0) & (position < table)
    at = position * WIDTH + col
    inside = known & (col < HALF)
    c = tl.load(cos_ptr + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin_ptr + at, mask=inside, other=0.0).to(tl.float32)
    c = tl.where(known, c, float("nan"))
    c2 = c
    s2 = s
    if WIDTH != HALF:
        c2 = tl.load(cos_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
        s2 = tl.load(sin_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
        c2 = tl.where(known, c2, float("nan"))
    if INVERSE:
        return c, -s2, c2, -s
    return c, s, c2, s2


@jit
def _inside(
    token,
    tokens,
    first,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which entries of a tile of half heads exist."""
    inside = (token < tokens)[:, None, None]
    if HEADS % GROUP != 0:
        inside &= (first + tl.arange(0, GROUP) < HEADS)[None, :, None]
    if HALF != BLOCK:
        inside &= (tl.arange(0, BLOCK) < HALF)[None, None, :]
    return inside


@jit
def _read(
    ptr,
    token,
    first,
    inside,
    TOKEN: tl.constexpr,
    HEAD: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both halves of heads first .. first + GROUP, in fp32; 0 outside. TOKEN, HEAD: strides."""
    head = (first + tl.arange(0, GROUP))[None, :, None]
    at = ptr + (token * TOKEN)[:, None, None] + head * HEAD + tl.arange(0, BLOCK)[None, None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    return a, b


@jit
def _write(
    ptr,
    token,
    first,
    inside,
    a,
    b,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = (first + tl.arange(0, GROUP))[None, :, None]
    col = tl.arange(0, BLOCK)[None, None, :]
    at = ptr + (token * (HEADS * 2 * HALF))[:, None, None] + head * (2 * HALF) + col
    tl.store(at, a.to(ptr.dtype.element_ty), mask=inside)
    tl.store(at + HALF, b.to(ptr.dtype.element_ty), mask=inside)


@jit
def _weights(ptr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)[None, None, :]
    a = tl.load(ptr + col, mask=col < HALF, other=0.0).to(tl.float32)
    b = tl.load(ptr + HALF + col, mask=col < HALF, other=0.0).to(tl.float32)
    return a, b


@jit
def _scale(a, b, eps, HALF: tl.constexpr):
    """(mean x^2 + eps)^-1/2 of each head."""
    return tl.rsqrt(tl.sum(a * a + b * b, 2, keep_dims=True) * (0.5 / HALF) + eps)


@jit
def _turn_heads(
    x_ptr,
    weight_ptr,
    y_ptr,
    token,
    tokens,
    c,
    s,
    c2,
    s2,
    eps,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKEN: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    if weight_ptr is not None:
        wa, wb = _weights(weight_ptr, HALF, BLOCK)
    for first in tl.range(0, HEADS, GROUP, num_stages=STAGES):
        inside = _inside(token, tokens, first, HEADS, GROUP, HALF, BLOCK)
        a, b = _read(x_ptr, token, first, inside, TOKEN, HEAD, GROUP, HALF, BLOCK)
        if weight_ptr is not None:
            r = _scale(a, b, eps, HALF)
            a *= r * wa
            b *= r * wb
        _write(
            y_ptr, token, first, inside, a * c - b * s, b * c2 + a * s2, HEADS, GROUP, HALF, BLOCK
        )


@jit
def _turn_heads_back(
    grad_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    da,
    db,
    token,
    tokens,
    c,
    s,
    c2,
    s2,
    eps,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GRAD_TOKEN: tl.constexpr,
    GRAD_HEAD: tl.constexpr,
    TOKEN: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """da, db: sums of the weight's gradient so far, which come back with this tile's in them."""
    wa, wb = _weights(weight_ptr, HALF, BLOCK)
    for first in tl.range(0, HEADS, GROUP, num_stages=STAGES):
        inside = _inside(token, tokens, first, HEADS, GROUP, HALF, BLOCK)
        a, b = _read(x_ptr, token, first, inside, TOKEN, HEAD, GROUP, HALF, BLOCK)
        ga, gb = _read(grad_ptr, token, first, inside, GRAD_TOKEN, GRAD_HEAD, GROUP, HALF, BLOCK)
        r = _scale(a, b, eps, HALF)
        ua, ub = a * r, b * r
        ta, tb = ga * c - gb * s, gb * c2 + ga * s2
        va, vb = ta * wa, tb * wb
        mean = tl.sum(ua * va + ub * vb, 2, keep_dims=True) * (0.5 / HALF)
        xa, xb = (va - ua * mean) * r, (vb - ub * mean) * r
        _write(dx_ptr, token, first, inside, xa, xb, HEADS, GROUP, HALF, BLOCK)
        da += ta * ua
        db += tb * ub
    return da, db


@jit
def _share(ptr, a, b, leaf, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Leaves this program's sums in its own row of the partial sums [2, programs, 2 HALF]."""
    col = tl.arange(0, BLOCK)
    row = (leaf * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    at = ptr + row * (2 * HALF) + col
    tl.store(at, tl.sum(tl.sum(a, 0), 0), mask=col < HALF)
    tl.store(at + HALF, tl.sum(tl.sum(b, 0), 0), mask=col < HALF)


# Kernels


@jit
def rope_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_out_ptr,
    k_out_ptr,
    tokens,
    table,
    eps,
    Q_TOKEN: tl.constexpr,
    Q_HEAD: tl.constexpr,
    K_TOKEN: tl.constexpr,
    K_HEAD: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K_GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """(a, b) -> (a c - b s, b c2 + a s2); with weights x is first x r w, r = (mean x^2 + eps)^-1/2.

    The inverse (the transposed map, no weights) is the backward of the plain form.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c, s, c2, s2 = _angles(
        cos_ptr, sin_ptr, positions_ptr, token, tokens, table, HALF, BLOCK, WIDTH, INVERSE
    )
    _turn_heads(
        q_ptr, q_weight_ptr, q_out_ptr, token, tokens, c, s, c2, s2, eps,
        Q_HEADS, Q_GROUP, Q_TOKEN, Q_HEAD, HALF, BLOCK, STAGES,
    )  # fmt: skip
    _turn_heads(
        k_ptr, k_weight_ptr, k_out_ptr, token, tokens, c, s, c2, s2, eps,
        K_HEADS, K_GROUP, K_TOKEN, K_HEAD, HALF, BLOCK, STAGES,
    )  # fmt: skip


@jit
def rope_qk_norm_backward_kernel(
    q_grad_ptr,
    k_grad_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    dq_ptr,
    dk_ptr,
    partials_ptr,
    tokens,
    table,
    eps,
    Q_GRAD_TOKEN: tl.constexpr,
    Q_GRAD_HEAD: tl.constexpr,
    K_GRAD_TOKEN: tl.constexpr,
    K_GRAD_HEAD: tl.constexpr,
    Q_TOKEN: tl.constexpr,
    Q_HEAD: tl.constexpr,
    K_TOKEN: tl.constexpr,
    K_HEAD: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K_GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """With t = g turned back, u = x r and v = t w: dx = r (v - u mean(v u)), dw = sum t u.

    r is computed again. partials_ptr: sums of t u, [2, programs, 2 HALF], q's first; or None.
    """
    qa = tl.zeros([TOKENS, Q_GROUP, BLOCK], tl.float32)
    qb = tl.zeros([TOKENS, Q_GROUP, BLOCK], tl.float32)
    ka = tl.zeros([TOKENS, K_GROUP, BLOCK], tl.float32)
    kb = tl.zeros([TOKENS, K_GROUP, BLOCK], tl.float32)
    turns = tl.cdiv(tl.cdiv(tokens, TOKENS) - tl.program_id(0), tl.num_programs(0))
    for turn in range(turns):
        tile = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
        token = tile * TOKENS + tl.arange(0, TOKENS)
        c, s, c2, s2 = _angles(
            cos_ptr, sin_ptr, positions_ptr, token, tokens, table, HALF, BLOCK, WIDTH, True
        )
        qa, qb = _turn_heads_back(
            q_grad_ptr, q_ptr, q_weight_ptr, dq_ptr, qa, qb, token, tokens, c, s, c2, s2, eps,
            Q_HEADS, Q_GROUP, Q_GRAD_TOKEN, Q_GRAD_HEAD, Q_TOKEN, Q_HEAD, HALF, BLOCK, STAGES,
        )  # fmt: skip
        ka, kb = _turn_heads_back(
            k_grad_ptr, k_ptr, k_weight_ptr, dk_ptr, ka, kb, token, tokens, c, s, c2, s2, eps,
            K_HEADS, K_GROUP, K_GRAD_TOKEN, K_GRAD_HEAD, K_TOKEN, K_HEAD, HALF, BLOCK, STAGES,
        )  # fmt: skip
    if partials_ptr is not None:
        _share(partials_ptr, qa, qb, 0, HALF, BLOCK)
        _share(partials_ptr, ka, kb, 1, HALF, BLOCK)


# Host


@dataclass(frozen=True)
class Config:
    """tokens, group: of a tile, with all of a head; group: heads; warps: a program; stages: of the
    pipeline over groups (1 is none); programs: an SM, each taking tiles in turn (0: one a tile).
    """

    tokens: int
    group: int
    warps: int
    stages: int = 1
    programs: int = 0


def forward_config(q: Tensor, normed: bool) -> Config:
    """q [tokens, H, Dh].

    16,384 tokens in bf16 on an H200, heads of 128: plain 3,990 GB/s (16 / 16 heads), 3,750 (12 / 2)
    with a token at a time, 3,670 and 3,590 with a head at a time of 8; normed 3,890 and 3,020,
    against 3,745 and 3,580.
    """
    if normed and q.shape[0] >= 16 * processors(q.device):  # fewer: decoding, latency counts
        return _of_tokens(q, 2)
    tile = _entries(q, 4)
    group = min(tile, triton.next_power_of_2(q.shape[1]))
    return Config(tile // group, group, 4)


def backward_config(q: Tensor) -> Config:
    """As above: 3,600 and 3,150 GB/s with the weights' gradients; without the pipeline 3,090 and
    2,830, a token at a time 3,630 and 2,220.
    """
    return _of_tokens(q, 4, 3, 3)


def _of_tokens(q: Tensor, warps: int, stages: int = 1, programs: int = 0) -> Config:
    """A head at a time of some tokens."""
    return Config(min(32, _entries(q, warps)), 1, warps, stages, programs)


def _entries(q: Tensor, warps: int) -> int:
    """Half heads of a tile in which each thread holds 16 bytes."""
    return max(1, 1024 * warps // (q.element_size() * triton.next_power_of_2(q.shape[2])))


def _tokens(x: Tensor) -> Tensor:
    """[..., N, H, Dh] as [tokens, H, Dh] with contiguous heads; copied only if it has to be."""
    x = x.flatten(0, -3)
    return x if x.stride(-1) == 1 else x.contiguous()


def _constants(q: Tensor, k: Tensor, cos: Tensor, config: Config) -> dict[str, Any]:
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
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k turned; normed before it if there are weights."""
    outs = q.new_empty(q.shape), k.new_empty(k.shape)
    flat_q, flat_k = _tokens(q), _tokens(k)
    config = config or forward_config(flat_q, q_weight is not None)
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
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k and, if they are needed, of the two weights."""
    outs = q.new_empty(q.shape), k.new_empty(k.shape)
    flat_q, flat_k, grads_q, grads_k = (_tokens(x) for x in (q, k, q_grad, k_grad))
    config = config or backward_config(flat_q)
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
        return *outs, None, None
    dq_weight, dk_weight = sums(partials, q_weight, k_weight)
    return *outs, dq_weight, dk_weight


def _dense(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()
