# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""The Triton kernels of flash attention over packed documents: see `attention_triton`.

A program computes one block of rows of one document for one head. It finds its document and block
on the device, from `cu_seqlens` alone: see `_place`. No kernel adds atomically, so that two runs
give the same bits: one kernel computes dq by query block (and the row sums that both need), a
second dk and dv by key block, each over all blocks that its own block sees.
"""

from __future__ import annotations

from kernels.runtime.launch import LOG2E, constant, dot, jit, tl

LN2 = constant(0.6931471805599453)
_SEARCH = constant(256)  # documents per step of the search

# Pieces


@jit
def _place(cu_ptr, documents, tokens, slot, BLOCK: tl.constexpr):
    """First row and length of the document of a slot, and which of its blocks the slot is.

    Document s owns the slots from cu[s] // BLOCK + s on, which are enough for its blocks, without
    a prefix sum. A slot without a block gets one past the end of its document.
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
    """As `_place`, with slots ordered by the number of blocks left in the document, most first.

    A document of at least k blocks has exactly one block with k left (itself among them).
    """
    index = tl.arange(0, RANKED)
    known = index < documents
    begin = tl.load(cu_ptr + index, mask=known, other=0)
    blocks = tl.cdiv(tl.load(cu_ptr + index + 1, mask=known, other=0) - begin, BLOCK)
    low = 0  # more than `slot` slots have at least `low` blocks left; fewer have `high`
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
    # a thread reads rows STEP apart: in this form their offsets are constants
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
    """first + columns, for the columns of a product. A thread holds two in eight of them, and adds
    constants for the rest instead of keeping all in registers."""
    return first + columns % 8 + columns // 8 * 8


@jit
def _seen(query, key, length, window, CAUSAL: tl.constexpr):
    """Whether a query (by its position in the document) sees a key; they broadcast."""
    # comparisons only: the compiler would keep every entry of a difference over the whole loop
    if CAUSAL:
        seen = key <= query  # which implies key < length for every query inside the document
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
    """Whether the mask hides some key of a block from some query of a block."""
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
    head = tl.program_id(0) % HEADS  # heads that share keys run together
    slot = tl.program_id(0) // HEADS
    start, length, block = _place(cu_ptr, documents, tokens, slot, BLOCK_M)
    if block * BLOCK_M >= length:
        return
    if CAUSAL:
        block = tl.cdiv(length, BLOCK_M) - 1 - block  # the longest first
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
        if window is not None:  # a row may have seen nothing so far: avoid inf - inf
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
    # past the end, zero weight
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

    Scores are computed as [keys, queries], so that they stay in registers for their products with
    q and grad.
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
        # delta starts the sum: a later subtraction would take more registers
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
