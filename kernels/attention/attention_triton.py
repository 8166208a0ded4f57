# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""Flash attention of our own over packed documents, best where they are short (arXiv 2307.08691).

A program computes one block of rows of one document for one head. Which document and which block
is found on the device, from `cu_seqlens` alone: see `_place`. Nothing is added atomically, so that
two runs give the same bits: one kernel computes dq by query block (and the row sums that both
need), a second dk and dv by key block, each running over all that its block touches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.runtime.launch import LOG2E, capability, constant, dot, jit, launch, tl, triton

LARGEST_HEAD = 256
LN2 = constant(0.6931471805599453)
_SEARCH = constant(256)  # documents looked at in one step
_RANKED = 1024  # documents that `_place_heaviest` can hold


# Pieces


@jit
def _place(cu_ptr, documents, tokens, slot, BLOCK: tl.constexpr):
    """First row and length of the document of a slot, and which of its blocks the slot is.

    Document s owns the slots from cu[s] // BLOCK + s on: enough for its blocks, and no prefix sum
    is needed. A slot without a block gets one that lies past its document's end.
    """
    before = tl.zeros([_SEARCH], tl.int32)
    for first in range(0, documents, _SEARCH):
        index = first + tl.arange(0, _SEARCH)
        begin = tl.load(cu_ptr + index, mask=index < documents, other=0)
        before += ((index < documents) & (begin // BLOCK + index <= slot)).to(tl.int32)
    document = tl.maximum(tl.sum(before, 0) - 1, 0)
    start = tl.load(cu_ptr + document)
    end = tl.minimum(tl.load(cu_ptr + document + 1), tokens)
    return start, end - start, slot - (start // BLOCK + document)


@jit
def _place_heaviest(cu_ptr, documents, tokens, slot, BLOCK: tl.constexpr, RANKED: tl.constexpr):
    """As `_place`, with the slots in order of how many blocks follow in the document, most first.

    Every document with at least k blocks has exactly one that k blocks (itself one of them) follow.
    """
    index = tl.arange(0, RANKED)
    known = index < documents
    begin = tl.load(cu_ptr + index, mask=known, other=0)
    blocks = tl.cdiv(tl.load(cu_ptr + index + 1, mask=known, other=0) - begin, BLOCK)
    low = 0  # more than `slot` slots have at least `low` blocks left; not so `high`
    high = tl.max(blocks, 0) + 1
    while high - low > 1:
        middle = (low + high) // 2
        enough = tl.sum(tl.maximum(blocks - middle + 1, 0), 0) > slot
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    rank = slot - tl.sum(tl.maximum(blocks - low, 0), 0)
    document = tl.sum((tl.cumsum((blocks >= low).to(tl.int32), 0) <= rank).to(tl.int32), 0)
    document = tl.minimum(document, documents - 1)
    start = tl.load(cu_ptr + document)
    length = tl.minimum(tl.load(cu_ptr + document + 1), tokens) - start
    return start, length, tl.where(low > 0, tl.cdiv(length, BLOCK) - low, length)


@jit
def _tile(
    base_ptr,
    row,
    rows,
    stride: tl.constexpr,
    length,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):
    """[rows, BLOCK_D] from row `row` of a document on; 0 past its end and past the head size."""
    dims = tl.arange(0, BLOCK_D)
    # a thread reads rows STEP apart: split so, what it adds for each of them is a constant
    pointers = base_ptr + ((rows % STEP)[:, None] * stride + dims[None, :])
    pointers += (rows // STEP)[:, None] * (STEP * stride)
    mask = (row + rows % STEP + rows // STEP * STEP < length)[:, None]
    if DIM != BLOCK_D:
        mask = mask & (dims < DIM)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@jit
def _write(
    base_ptr, x, row, rows, stride: tl.constexpr, length, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    dims = tl.arange(0, BLOCK_D)
    mask = (row + rows < length)[:, None]
    if DIM != BLOCK_D:
        mask = mask & (dims < DIM)[None, :]
    tl.store(base_ptr + rows[:, None] * stride + dims[None, :], x, mask=mask)


@jit
def _eights(first, columns):
    """first + columns, for the columns of a product: a thread has two in eight of them, and adds
    constants for the rest instead of keeping them all in registers."""
    return first + columns % 8 + columns // 8 * 8


@jit
def _seen(query, key, length, window, CAUSAL: tl.constexpr):
    """Whether a query (by its place in the document) sees a key; they broadcast."""
    # comparisons only: of a difference the compiler would keep every entry, over the whole loop
    if CAUSAL:
        seen = key <= query  # and so key < length, for every query that counts
    else:
        seen = key < length
        if window is not None:
            seen = seen & (key < query + window)
    if window is not None:
        seen = seen & (query < key + window)
    return seen


@jit
def _keys_of(
    row, length, window, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Keys [low, high) that the queries row .. row + BLOCK_M see; low is a multiple of BLOCK_N."""
    low = 0
    high = length
    if window is not None:
        low = tl.maximum(row - window + 1, 0) // BLOCK_N * BLOCK_N
        high = tl.minimum(length, row + BLOCK_M - 1 + window)
    if CAUSAL:
        high = tl.minimum(length, row + BLOCK_M)
    return low, high


@jit
def _is_partial(
    row, key, length, window, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Whether some query of a block does not see some key of a block."""
    if CAUSAL:
        partial = key + BLOCK_N - 1 > row
    else:
        partial = key + BLOCK_N > length
        if window is not None:
            partial = partial | (key + BLOCK_N - 1 - row >= window)
    if window is not None:
        partial = partial | (row + BLOCK_M - 1 - key >= window)
    return partial


# Kernels


@jit
def flash_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_ptr,
    tokens,
    documents,
    scale,
    window,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STEP: tl.constexpr,
):
    """out and lse (natural logarithm) of one block of queries."""
    head = tl.program_id(0) % HEADS  # heads that share keys run side by side
    slot = tl.program_id(0) // HEADS
    start, length, block = _place(cu_ptr, documents, tokens, slot, BLOCK_M)
    if block * BLOCK_M >= length:
        return
    if CAUSAL:
        block = tl.cdiv(length, BLOCK_M) - 1 - block  # the heavy ones first
    row = block * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    low, high = _keys_of(row, length, window, CAUSAL, BLOCK_M, BLOCK_N)

    key_head = head // (HEADS // KEY_HEADS)
    first = (start + row).to(tl.int64)
    q = _tile(
        q_ptr + first * Q_STRIDE + head * DIM, row, rows, Q_STRIDE, length, DIM, BLOCK_D, STEP
    )
    k_at = k_ptr + (start + low).to(tl.int64) * K_STRIDE + key_head * DIM
    v_at = v_ptr + (start + low).to(tl.int64) * V_STRIDE + key_head * DIM
    factor = scale * LOG2E
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in tl.range(low, high, BLOCK_N):
        k = _tile(k_at, key, cols, K_STRIDE, length, DIM, BLOCK_D, STEP)
        s = dot(q, tl.trans(k), None, PRECISION)
        if _is_partial(row, key, length, window, CAUSAL, BLOCK_M, BLOCK_N):
            seen = _seen(row + rows[:, None], _eights(key, cols)[None, :], length, window, CAUSAL)
            s = tl.where(seen, s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1) * factor)
        base = new
        if window is not None:  # a row may have seen nothing so far: no inf - inf
            base = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2(s * factor - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = _tile(v_at, key, cols, V_STRIDE, length, DIM, BLOCK_D, STEP)
        acc = dot(p.to(v.dtype), v, acc, PRECISION)
        top = new
        k_at += BLOCK_N * K_STRIDE
        v_at += BLOCK_N * V_STRIDE

    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    out_stride: tl.constexpr = HEADS * DIM
    _write(
        out_ptr + first * out_stride + head * DIM, out, row, rows, out_stride, length, DIM, BLOCK_D
    )
    lse_at = lse_ptr + head.to(tl.int64) * tokens + first
    tl.store(lse_at + rows, top * LN2 + tl.log(total), mask=row + rows < length)


@jit
def flash_backward_dq_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    cu_ptr,
    tokens,
    documents,
    scale,
    window,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STEP: tl.constexpr,
):
    """dq, and delta = rowsum(out * grad), of one block of queries."""
    head = tl.program_id(0) % HEADS
    slot = tl.program_id(0) // HEADS
    start, length, block = _place(cu_ptr, documents, tokens, slot, BLOCK_M)
    if block * BLOCK_M >= length:
        return
    if CAUSAL:
        block = tl.cdiv(length, BLOCK_M) - 1 - block
    row = block * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    low, high = _keys_of(row, length, window, CAUSAL, BLOCK_M, BLOCK_N)

    key_head = head // (HEADS // KEY_HEADS)
    first = (start + row).to(tl.int64)
    stride: tl.constexpr = HEADS * DIM  # of out, grad and dq
    at = first * stride + head * DIM
    grad = _tile(grad_ptr + at, row, rows, stride, length, DIM, BLOCK_D, STEP)
    out = _tile(out_ptr + at, row, rows, stride, length, DIM, BLOCK_D, STEP)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    statistics = head.to(tl.int64) * tokens + first + rows
    tl.store(delta_ptr + statistics, delta, mask=row + rows < length)
    # past the end: no weight at all
    lse = tl.load(lse_ptr + statistics, mask=row + rows < length, other=float("inf")) * LOG2E
    q = _tile(
        q_ptr + first * Q_STRIDE + head * DIM, row, rows, Q_STRIDE, length, DIM, BLOCK_D, STEP
    )

    k_at = k_ptr + (start + low).to(tl.int64) * K_STRIDE + key_head * DIM
    v_at = v_ptr + (start + low).to(tl.int64) * V_STRIDE + key_head * DIM
    factor = scale * LOG2E
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in tl.range(low, high, BLOCK_N):
        k = _tile(k_at, key, cols, K_STRIDE, length, DIM, BLOCK_D, STEP)
        v = _tile(v_at, key, cols, V_STRIDE, length, DIM, BLOCK_D, STEP)
        s = dot(q, tl.trans(k), None, PRECISION)
        dp = dot(grad, tl.trans(v), None, PRECISION)
        p = tl.exp2(s * factor - lse[:, None])
        if _is_partial(row, key, length, window, CAUSAL, BLOCK_M, BLOCK_N):
            seen = _seen(row + rows[:, None], _eights(key, cols)[None, :], length, window, CAUSAL)
            p = tl.where(seen, p, 0.0)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = dot(ds, k, dq, PRECISION)
        k_at += BLOCK_N * K_STRIDE
        v_at += BLOCK_N * V_STRIDE
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    _write(dq_ptr + at, dq, row, rows, stride, length, DIM, BLOCK_D)


@jit
def flash_backward_dkdv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    cu_ptr,
    tokens,
    documents,
    scale,
    window,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STEP: tl.constexpr,
    RANKED: tl.constexpr,
):
    """dk and dv of one block of keys: over all query blocks of all query heads that read it.

    Scores are computed as [keys, queries], so that their products with q and grad find them in
    registers.
    """
    key_head = tl.program_id(0) % KEY_HEADS
    slot = tl.program_id(0) // KEY_HEADS
    if RANKED:
        start, length, block = _place_heaviest(cu_ptr, documents, tokens, slot, BLOCK_N, RANKED)
    else:
        start, length, block = _place(cu_ptr, documents, tokens, slot, BLOCK_N)
    if block * BLOCK_N >= length:
        return
    key = block * BLOCK_N
    cols = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    low = 0
    high = length
    if window is not None:
        low = tl.maximum(key - window + 1, 0) // BLOCK_M * BLOCK_M
        high = tl.minimum(length, key + BLOCK_N - 1 + window)
    if CAUSAL:
        low = key // BLOCK_M * BLOCK_M

    group: tl.constexpr = HEADS // KEY_HEADS
    first = (start + key).to(tl.int64)
    k = _tile(
        k_ptr + first * K_STRIDE + key_head * DIM, key, cols, K_STRIDE, length, DIM, BLOCK_D, STEP
    )
    v = _tile(
        v_ptr + first * V_STRIDE + key_head * DIM, key, cols, V_STRIDE, length, DIM, BLOCK_D, STEP
    )
    stride: tl.constexpr = HEADS * DIM  # of grad
    begin = start.to(tl.int64)
    head = key_head * group
    row = low
    factor = scale * LOG2E
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # one loop over heads and blocks: its loads run ahead from one head into the next
    for _ in tl.range(0, group * tl.cdiv(high - low, BLOCK_M)):
        q_at = q_ptr + (begin + row) * Q_STRIDE + head * DIM
        q = _tile(q_at, row, rows, Q_STRIDE, length, DIM, BLOCK_D, STEP)
        statistics = head.to(tl.int64) * tokens + begin + row + rows
        inside = row + rows < length
        grad_at = grad_ptr + (begin + row) * stride + head * DIM
        grad = _tile(grad_at, row, rows, stride, length, DIM, BLOCK_D, STEP)
        s = dot(k, tl.trans(q), None, PRECISION)
        delta = tl.load(delta_ptr + statistics, mask=inside, other=0.0)
        # delta goes in as the start of the sum: subtracted later it would take more registers
        dp = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) - delta[None, :]
        dp = dot(v, tl.trans(grad), dp, PRECISION)
        lse = tl.load(lse_ptr + statistics, mask=inside, other=float("inf")) * LOG2E
        p = tl.exp2(s * factor - lse[None, :])
        if _is_partial(row, key, length, window, CAUSAL, BLOCK_M, BLOCK_N):
            seen = _seen(_eights(row, rows)[None, :], key + cols[:, None], length, window, CAUSAL)
            p = tl.where(seen, p, 0.0)
        dv = dot(p.to(grad.dtype), grad, dv, PRECISION)
        ds = (p * dp).to(q.dtype)
        dk = dot(ds, q, dk, PRECISION)
        row += BLOCK_M
        last = row >= high
        head = tl.where(last, head + 1, head)
        row = tl.where(last, low, row)
    key_stride: tl.constexpr = KEY_HEADS * DIM
    at = first * key_stride + key_head * DIM
    dk = (dk * scale).to(dk_ptr.dtype.element_ty)
    dv = dv.to(dv_ptr.dtype.element_ty)
    _write(dk_ptr + at, dk, key, cols, key_stride, length, DIM, BLOCK_D)
    _write(dv_ptr + at, dv, key, cols, key_stride, length, DIM, BLOCK_D)


# Launchers


@dataclass(frozen=True)
class Config:
    """Queries and keys a block, warps a program, depth of the pipeline."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2
    registers: int = (
        255  # a bound that binds nothing: without one, some kernels spill for occupancy
    )


def _config(kind: str, q: Tensor) -> Config:
    """Launch settings; `kind` is forward, dq or dkdv.

    On an H200, bf16, us of 16,384 tokens in 41 ragged documents (heads of 128, 12 on 2, causal)
    and in 64 pictures of 256 (heads of 64, 16 on 16). forward: 64 x 64 in three stages 100 and 66,
    in two 106 and 71, 128 x 64 with 8 warps 124 and 69. dq: 64 x 64 141 and 86, 64 x 32 140 and 82.
    dkdv: 64 x 64 149 and 168, in three stages 277 and 170, 32 x 64 in three stages 189 and 133
    (128 x 64: 122, but it spills).
    """
    dim = _padded(q.shape[2])
    if q.dtype == torch.float32:  # multiplied entry by entry, tf32 being too coarse
        return Config(32, 32, 4 if dim <= 32 else 8, 1) if dim <= 64 else Config(16, 16, 8, 1)
    if dim == 256:
        return Config(64, 32, 8)
    if 0 < capability(q.device)[0] < 9:  # less shared memory, smaller matrix instructions
        if kind == "dkdv" and dim == 64:
            return Config(32, 64)
        return Config(64, 64, 8 if dim == 128 else 4)
    if kind == "forward":
        return Config(64, 64, stages=3)
    if kind == "dq":
        return Config(64, 64) if dim == 128 else Config(64, 32, stages=3)
    return Config(32, 64, stages=3) if dim == 64 else Config(64, 64)


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _constants(q: Tensor, k: Tensor, v: Tensor, causal: bool, config: Config) -> dict[str, Any]:
    dim = q.shape[2]
    return {
        "Q_STRIDE": q.stride(0),
        "K_STRIDE": k.stride(0),
        "V_STRIDE": v.stride(0),
        "HEADS": q.shape[1],
        "KEY_HEADS": k.shape[1],
        "DIM": dim,
        "BLOCK_D": _padded(dim),
        "CAUSAL": causal,
        "BLOCK_M": config.queries,
        "BLOCK_N": config.keys,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        # rows between those that one thread reads, 16 bytes of each
        "STEP": max(1, config.warps * 512 // (q.element_size() * _padded(dim))),
        "num_warps": config.warps,
        "num_stages": config.stages,
        "maxnreg": config.registers,
    }


def _rows(x: Tensor) -> Tensor:
    """x [N, H, Dh], copied unless the entries of a row lie next to each other."""
    inner = (x.shape[2], 1)
    return x if x.stride()[1:] == inner or x.shape[0] == 0 else x.contiguous()


def _slots(q: Tensor, cu_seqlens: Tensor, block: int) -> int:
    return q.shape[0] // block + cu_seqlens.shape[0] - 1


def _window(window: int | None, tokens: int) -> int | None:
    return None if window is None or window >= tokens else window


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """(q, scale, sign) with the scale above 0: a maximum of scores is one of the products then."""
    if scale > 0:
        return q, scale, 1.0
    sign = -1.0 if scale < 0 else 0.0
    return q * sign, -scale if scale < 0 else 1.0, sign


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    config: Config | None = None,
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
    launch(
        flash_forward_kernel,
        (_slots(q, cu_seqlens, config.queries) * heads if n else 0,),
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens,
        n,
        cu_seqlens.shape[0] - 1,
        scale,
        _window(window, n),
        **_constants(q, k, v, causal, config),
    )
    return out, lse


def backward_dq(
    grad, q, k, v, out, lse, cu_seqlens, *, causal, window, scale, config=None
) -> tuple[Tensor, Tensor]:
    n, heads, dim = q.shape
    config = config or _config("dq", q)
    dq = q.new_empty(n, heads, dim)
    delta = torch.empty_like(lse)
    launch(
        flash_backward_dq_kernel,
        (_slots(q, cu_seqlens, config.queries) * heads if n else 0,),
        grad,
        q,
        k,
        v,
        out,
        lse,
        delta,
        dq,
        cu_seqlens,
        n,
        cu_seqlens.shape[0] - 1,
        scale,
        _window(window, n),
        **_constants(q, k, v, causal, config),
    )
    return dq, delta


def backward_dkdv(
    grad, q, k, v, lse, delta, cu_seqlens, *, causal, window, scale, config=None
) -> tuple[Tensor, Tensor]:
    n, _, dim = q.shape
    key_heads = k.shape[1]
    config = config or _config("dkdv", q)
    dk, dv = k.new_empty(n, key_heads, dim), k.new_empty(n, key_heads, dim)
    documents = cu_seqlens.shape[0] - 1
    ranked = _RANKED if causal and documents <= _RANKED else 0  # heavy blocks first, over all
    launch(
        flash_backward_dkdv_kernel,
        (_slots(q, cu_seqlens, config.keys) * key_heads if n else 0,),
        grad,
        q,
        k,
        v,
        lse,
        delta,
        dk,
        dv,
        cu_seqlens,
        n,
        documents,
        scale,
        _window(window, n),
        RANKED=ranked,
        **_constants(q, k, v, causal, config),
    )
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
    configs: tuple[Config | None, Config | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, from what `flash_forward` took and gave; the same bits each time."""
    grad, out = grad.contiguous(), out.contiguous()
    q, k, v = _rows(q), _rows(k), _rows(v)
    q, scale, sign = _positive(q, scale)
    options: dict[str, Any] = {"causal": causal, "window": window, "scale": scale}
    dq, delta = backward_dq(grad, q, k, v, out, lse, cu_seqlens, config=configs[0], **options)
    dk, dv = backward_dkdv(grad, q, k, v, lse, delta, cu_seqlens, config=configs[1], **options)
    return dq if sign == 1.0 else dq * sign, dk, dv
