"""Attention over packed documents, with grouped keys and values and sliding windows.

Backends (chosen in `kernels.runtime.dispatch`, by what was measured):

- `flash-attn-4`, `flash-attn`, `torch-varlen`, `triton`: flash attention on CUDA, fp16 and bf16
  (`triton` fp32 too); `cudnn`, for documents of equal length (`kernels.attention.attention_flash`).
- `padded`: eager CPU (`kernels.attention.attention_padded`).
- `plain`: one masked [N, N] softmax. O(N^2), and right everywhere: the reference.

In `padded`, documents cannot touch each other at all; in `plain` they are kept apart by weights of
exactly 0, so a NaN in one document reaches the others there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from kernels.attention import attention_flash
from kernels.attention.attention_padded import padded_attention
from kernels.runtime.autograd import (
    Op,
    accumulation_dtype,
    can_read,
    check_device,
    check_floating,
    fold_all,
    run,
)
from kernels.runtime.dispatch import Facts, Proof, choose, proved_by
from kernels.runtime.dynamo import allow_in_graph
from kernels.runtime.proof import check_close

# The most scores that a library's higher derivatives may hold at a time: 4 GiB in fp32, of which a
# second derivative keeps about six.
_MOST_SCORES = 2**30


def attention_reference(
    q: Tensor,  # [N, H, Dh]
    k: Tensor,  # [N, Hk, Dh]
    v: Tensor,  # [N, Hk, Dh]
    cu_seqlens: Tensor | None,  # [S + 1]; not read if there is a length
    *,
    causal: bool,
    window: int | None,
    scale: float,
    length: int | None = None,
) -> Tensor:
    """What `attention` computes, in the accumulation dtype: plain torch, any order.

    All tensors may have leading dimensions more, the same in each: examples.
    """
    if q.ndim > 3:

        def one(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
            return attention_reference(
                q, k, v, cu_seqlens, causal=causal, window=window, scale=scale, length=length
            )

        dims = (0, 0, 0, None if cu_seqlens is None else 0)
        return torch.func.vmap(one, dims)(q, k, v, cu_seqlens)
    n, heads = q.shape[:2]
    groups = heads // k.shape[1]
    dtype = accumulation_dtype(q.dtype)
    size = n if length is None else length
    index = torch.arange(size, device=q.device)
    gap = index[:, None] - index
    seen = gap >= 0 if causal else torch.ones_like(gap, dtype=torch.bool)
    if length is None:
        assert cu_seqlens is not None
        document = (cu_seqlens[1:] <= index[:, None]).sum(-1)
        seen = seen & (document[:, None] == document)
    if window is not None:
        seen = seen & (gap.abs() < window)
    rows = (1, n) if length is None else (n // length, length)
    q, k, v = (x.unflatten(0, rows) for x in (q, k, v))  # [B, T, heads, Dh]
    grouped = q.to(dtype).unflatten(2, (-1, groups))  # [B, T, Hk, G, Dh]
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, k.to(dtype)) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    out = torch.einsum("bhgqk,bkhd->bqhgd", weights, v.to(dtype))
    return out.flatten(2, 3).flatten(0, 1).to(q.dtype)


# Flash attention: the library's forward and backward; everything beyond them by the formula


def _flash_formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    *,
    backend: str,
    length: int | None,
    causal: bool,
    window: int | None,
    scale: float,
    **_: Any,
) -> Tensor:
    scores = q.shape[:-1].numel() * (q.shape[-3] if length is None else length)
    if scores > _MOST_SCORES:
        raise RuntimeError(
            f"attention backend {backend} has no second derivative or forward mode, and the plain "
            f"formula, which has, would need {scores / 2**28:.0f} GiB for each copy of its scores; "
            'use fewer tokens, or attention inside kernels.override(attention="plain") if you '
            "have that memory."
        )
    return attention_reference(
        q, k, v, cu_seqlens, causal=causal, window=window, scale=scale, length=length
    )


FLASH = Op(
    "flash attention",
    _flash_formula,
    attention_flash.forward,
    attention_flash.backward,
    fold=fold_all,
    vmappable=True,
)


# Libraries are proved by a call of the kind that is to be made, of a few short documents: what they
# compile for it is what the call needs in any case.
_PARTS = {
    "flash-attn-4": ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "torch"),
    "flash-attn": ("flash-attn", "torch"),
    "torch-varlen": ("torch",),
    "cudnn": ("torch",),
}


def _kind(facts: Facts) -> Hashable:
    return (
        facts.dtype,
        facts.head_dim,
        facts.group,
        facts.window is None,
        facts.length is None,
        facts.causal,
        facts.many,
        _longest(facts) <= 128,  # within one tile
        torch.are_deterministic_algorithms_enabled(),
    )


def _longest(facts: Facts) -> int:
    """An upper bound on the tokens of a proof's documents."""
    return min(facts.length or facts.max_seqlen or 512, 512)


def prove_attention(backend: str, facts: Facts) -> None:
    """Raises whatever is wrong with a library's forward and backward of such a call, by fp64."""
    longest = _longest(facts)
    length = None if facts.length is None else longest
    lengths = [length, length] if length else [min(n, longest) for n in (70, 0, 160, 1, 40)]
    ends = [*itertools.accumulate(lengths, initial=0)]
    cu = torch.tensor(ends + ends[-1:] * (257 if facts.many else 0), dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    kv_heads = 2 if facts.group <= 4 else 1
    heads = kv_heads * facts.group
    q, k, v, grad = (
        torch.randn(ends[-1], n, facts.head_dim, generator=generator, dtype=torch.float32).to(
            facts.dtype
        )
        for n in (heads, kv_heads, kv_heads, heads)
    )
    window = None if facts.window is None else min(facts.window, 48)
    static: dict[str, Any] = {
        "length": length,
        "causal": facts.causal,
        "window": window,
        "scale": facts.head_dim**-0.5,
    }
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    exact = attention_reference(wide[0], wide[1], wide[2], cu, **static)
    exact_grads = torch.autograd.grad(exact, wide, grad.double())
    q, k, v, grad, cu = (x.to(facts.device) for x in (q, k, v, grad, cu))
    known = cu if length is None else None
    static |= {"backend": backend, "longest": longest}
    out, lse = attention_flash.flash_forward(q, k, v, known, **static)
    grads = attention_flash.flash_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        known,
        **static,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    # weights, their gradients and results are rounded once each: less than an ulp in the mean
    allowed = torch.finfo(facts.dtype).eps
    # q's and k's gradients of a document of one token are 0: differences of sums of Dh products,
    # in fp32, times a row of norm sqrt(Dh)
    slack = 8 * torch.finfo(torch.float32).eps * facts.head_dim * static["scale"]
    check_close("its output", out, exact.detach(), allowed)
    for name, got, right in zip("qkv", grads, exact_grads, strict=True):
        check_close(f"its gradient of {name}", got, right, allowed, slack)


for _backend, _parts in _PARTS.items():
    proved_by(
        "attention", _backend, Proof(_parts, functools.partial(prove_attention, _backend), _kind)
    )


@allow_in_graph
def _apply_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    backend: str,
    longest: int,
    length: int | None,
    causal: bool,
    window: int | None,
    scale: float,
    deterministic: bool,
) -> Tensor:
    return run(
        FLASH, q, k, v, cu_seqlens, backend=backend, longest=longest, length=length,
        causal=causal, window=window, scale=scale, deterministic=deterministic,
    )  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    max_seqlen: int | None = None,
    length: int | None = None,
) -> Tensor:
    """softmax(scale * q k') v within each document of a packed batch (arXiv 1706.03762).

    Scores and softmax are fp32 (fp64 for fp64). Query heads share key heads in groups of H / Hk:
    query head h reads key head h // (H / Hk) (arXiv 2305.13245).

    On a GPU a library's flash attention may compute it; its second derivatives and its forward mode
    then go through the plain formula, O(N^2) in memory, and raise where that is too much. With
    flash-attn 4 a NaN reaches documents next to its own, since that multiplies their rows by 0.

    Args:
        q: [N, H, Dh], any floating dtype.
        k, v: [N, Hk, Dh], same dtype; H is a multiple of Hk.
        cu_seqlens: [S + 1] int32, document boundaries: starts at 0, never falls, ends at N.
            Documents may be empty.
        causal: a token sees itself and what comes before it in its document; else all of it.
        window: a token sees the keys fewer than `window` tokens away: with causal, itself and the
            window - 1 before it. None: no limit.
        scale: factor on the scores, 1 / sqrt(Dh) if None.
        max_seqlen: an upper bound on document length (the row length, say), so that CUDA backends
            need not allow for documents of N tokens. Ignored elsewhere.
        length: every document (that has tokens) has exactly this many, so N is a multiple of it
            and `cu_seqlens` is not read. Batches of equal rows or pictures are faster so.

    Returns:
        [N, H, Dh] in q.dtype.

    Raises:
        ValueError: wrong shapes, dtypes, devices or options; on CPU also boundaries that are not
            as above (unless they cannot be read: compiled, vmapped or meta).
        RuntimeError: an attention backend was asked for that cannot serve this call.

    >>> import torch
    >>> v = torch.tensor([[[1.0]], [[3.0]], [[10.0]]])  # documents of 2 tokens and 1 token
    >>> cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
    >>> attention(torch.zeros(3, 1, 1), torch.zeros(3, 1, 1), v, cu_seqlens).flatten().tolist()
    [1.0, 2.0, 10.0]
    """
    _check(q, k, v, cu_seqlens, window, max_seqlen, length)
    n, dim = q.shape[0], _constant(q.shape[2])
    length = None if length is None else _constant(length)
    max_seqlen = None if max_seqlen is None else _constant(max_seqlen)
    scale = dim**-0.5 if scale is None else float(scale)
    if window is not None and length is not None and window >= length:
        window = None  # it hides nothing, and some backends have none
    known = n > 0 and _is_concrete(q) and (length is not None or can_read(cu_seqlens))
    large = False
    if attention_flash.is_large(q, cu_seqlens.shape[0]):
        large = True  # decided here, where N may be a symbol: `choose` takes constants
    many = False
    if length is None and cu_seqlens.shape[0] > 257:
        many = True
    backend = choose(
        "attention",
        str(q.device),
        q.dtype,
        dim,
        known,
        torch.compiler.is_compiling(),
        _constant(q.shape[1]) // _constant(k.shape[1]),
        window,
        max_seqlen,
        length,
        large,
        causal,
        many,
    )
    bounds: tuple[int, ...] = ()
    if can_read(cu_seqlens):
        bounds = tuple(cu_seqlens.tolist())
        _check_bounds(bounds, n, length)
    if backend == "padded":
        if length is not None:
            bounds = tuple(range(0, n + 1, length))
        return padded_attention(q, k, v, bounds, causal, window, scale)
    if backend == "plain":
        return attention_reference(
            q, k, v, cu_seqlens, causal=causal, window=window, scale=scale, length=length
        )
    return _apply_flash(
        q,
        k,
        v,
        cu_seqlens if length is None else None,
        backend,
        length or max_seqlen or n,
        length,
        causal,
        window,
        scale,
        torch.are_deterministic_algorithms_enabled(),
    )


def _constant(n: int) -> int:
    """n; where torch.compile traces it as a symbol, it becomes a number here (`int` would not)."""
    return len(range(n))


def _is_concrete(x: Tensor) -> bool:
    """Not fake and not traced; wrapped by torch.func is fine."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return can_read(x)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int | None,
    max_seqlen: int | None,
    length: int | None,
) -> None:
    check_floating("attention", q=q, k=k, v=v)
    check_device("attention", "q", q, "cu_seqlens", cu_seqlens)
    if q.ndim != 3:
        raise ValueError(f"attention: q must be [N, heads, head size], got {tuple(q.shape)}.")
    n, heads, dim = q.shape
    if k.ndim != 3 or k.shape[0] != n or k.shape[2] != dim or k.shape != v.shape:
        raise ValueError(
            f"attention: k and v must have shape [{n}, Hk, {dim}] to match q {tuple(q.shape)}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"attention: {heads} query heads are not a multiple of {k.shape[1]} key heads."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q is {q.dtype}, k {k.dtype} and v {v.dtype}; cast them to one dtype."
        )
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            "attention: cu_seqlens must be int32 [S + 1] with S >= 1, "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}."
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1 key (or None), got {window}.")
    if max_seqlen is not None and max_seqlen < 1:
        raise ValueError(f"attention: max_seqlen must be at least 1, got {max_seqlen}.")
    if length is not None and (length < 1 or n % length):
        raise ValueError(
            f"attention: length must be at least 1 and divide the number of tokens, {n}, "
            f"got {length}."
        )


def _check_bounds(bounds: tuple[int, ...], n: int, length: int | None) -> None:
    if bounds[0] != 0 or bounds[-1] != n:
        raise ValueError(
            f"attention: cu_seqlens must start at 0 and end at the number of tokens, {n} (padding "
            f"is a document too); it starts at {bounds[0]} and ends at {bounds[-1]}."
        )
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        if b < a:
            raise ValueError(
                f"attention: cu_seqlens must never fall, but entry {i + 1} is {b} after {a}."
            )
        if length is not None and b - a not in (0, length):
            raise ValueError(
                f"attention: length says that every document has {length} tokens, but document {i} "
                f"has {b - a}."
            )
