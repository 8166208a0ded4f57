# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""The Triton kernels of `rope`, with and without an RMS norm of each head before it (QK-norm).

A program takes TOKENS tokens and goes over all heads of q, then of k, GROUP heads at a time. Each
half of a head is a tile of its own, [TOKENS, GROUP, BLOCK], so that one thread holds the two
entries of a rotated pair. A program reads a token's row of cos and sin once for all its heads.
"""

from __future__ import annotations

from kernels.runtime.launch import jit, tl

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
    """cos and sin of a head's first half, then of its second, each [TOKENS, 1, BLOCK] in fp32.

    cos is NaN for a position outside the tables. WIDTH: of a table's row, HALF or 2 HALF.
    """
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
    """Mask of the entries of a tile of half heads that exist."""
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
    """Both halves of GROUP heads in fp32, with 0 outside the mask. TOKEN, HEAD: strides."""
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
    angles,
    eps,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKEN: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    c, s, c2, s2 = angles
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
    angles,
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
    """Returns da and db, the sums of the weight's gradient, with these tokens added."""
    c, s, c2, s2 = angles
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
    """Stores this program's sums in its own row of the partial sums [2, programs, 2 HALF]."""
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
    """(a, b) -> (a c - b s, b c2 + a s2), after x r w with r = (mean x^2 + eps)^-1/2 given weights.

    INVERSE: the transposed map, which is the backward of the form without weights.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    angles = _angles(
        cos_ptr, sin_ptr, positions_ptr, token, tokens, table, HALF, BLOCK, WIDTH, INVERSE
    )
    _turn_heads(
        q_ptr,
        q_weight_ptr,
        q_out_ptr,
        token,
        tokens,
        angles,
        eps,
        Q_HEADS,
        Q_GROUP,
        Q_TOKEN,
        Q_HEAD,
        HALF,
        BLOCK,
        STAGES,
    )
    _turn_heads(
        k_ptr,
        k_weight_ptr,
        k_out_ptr,
        token,
        tokens,
        angles,
        eps,
        K_HEADS,
        K_GROUP,
        K_TOKEN,
        K_HEAD,
        HALF,
        BLOCK,
        STAGES,
    )


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
    """With t = g rotated back, u = x r and v = t w: dx = r (v - u mean(v u)), dw = sum t u.

    It recomputes r. partials_ptr: sums of t u, [2, programs, 2 HALF], q's first; or None.
    """
    qa = tl.zeros([TOKENS, Q_GROUP, BLOCK], tl.float32)
    qb = tl.zeros([TOKENS, Q_GROUP, BLOCK], tl.float32)
    ka = tl.zeros([TOKENS, K_GROUP, BLOCK], tl.float32)
    kb = tl.zeros([TOKENS, K_GROUP, BLOCK], tl.float32)
    turns = tl.cdiv(tl.cdiv(tokens, TOKENS) - tl.program_id(0), tl.num_programs(0))
    for turn in range(turns):
        tile = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
        token = tile * TOKENS + tl.arange(0, TOKENS)
        angles = _angles(
            cos_ptr, sin_ptr, positions_ptr, token, tokens, table, HALF, BLOCK, WIDTH, True
        )
        qa, qb = _turn_heads_back(
            q_grad_ptr,
            q_ptr,
            q_weight_ptr,
            dq_ptr,
            qa,
            qb,
            token,
            tokens,
            angles,
            eps,
            Q_HEADS,
            Q_GROUP,
            Q_GRAD_TOKEN,
            Q_GRAD_HEAD,
            Q_TOKEN,
            Q_HEAD,
            HALF,
            BLOCK,
            STAGES,
        )
        ka, kb = _turn_heads_back(
            k_grad_ptr,
            k_ptr,
            k_weight_ptr,
            dk_ptr,
            ka,
            kb,
            token,
            tokens,
            angles,
            eps,
            K_HEADS,
            K_GROUP,
            K_GRAD_TOKEN,
            K_GRAD_HEAD,
            K_TOKEN,
            K_HEAD,
            HALF,
            BLOCK,
            STAGES,
        )
    if partials_ptr is not None:
        _share(partials_ptr, qa, qb, 0, HALF, BLOCK)
        _share(partials_ptr, ka, kb, 1, HALF, BLOCK)
