"""Attention over packed documents, with grouped keys and values and sliding windows.

Backends (declared below; `kernels.attention.backends` says which serves what, and which first):

- `flash-attn-4`, `flash-attn`, `torch-varlen`, `triton`: flash attention on CUDA, fp16 and bf16
  (`triton` fp32 too); `cudnn`, for documents of equal length (`kernels.attention.attention_flash`).
- `padded`: eager CPU (`kernels.attention.attention_padded`).
- `plain`: one masked [N, N] softmax. O(N^2), and right everywhere: the reference.

In `padded`, documents cannot touch each other at all; in `plain` they are kept apart by weights of
exactly 0, so a NaN in one document reaches the others there.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.attention import attention_flash, backends
from kernels.attention.attention_padded import padded_attention
from kernels.attention.backends import AttentionCall, library
from kernels.attention.formula import attention_reference
from kernels.runtime.autograd import (
    Op,
    can_read,
    check_device,
    check_floating,
    fold_all,
    run,
)
from kernels.runtime.dispatch import OPERATIONS, Backend, choose, declare, why_not
from kernels.runtime.dynamo import allow_in_graph, constant_result
from kernels.runtime.proof import warn_once

# The most scores that a library's higher derivatives may hold at a time: 4 GiB in fp32, of which a
# second derivative keeps about six.
_MOST_SCORES = 2**30


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
    static = {"backend": backend, "longest": longest, "length": length, "causal": causal}
    static |= {"window": window, "scale": scale, "deterministic": deterministic}
    return run(FLASH, q, k, v, cu_seqlens, **static)


# The backends: (q, k, v, cu_seqlens, options) -> out


class Options(NamedTuple):
    """The static arguments of a checked call."""

    backend: str
    bounds: tuple[int, ...]  # cu_seqlens in Python; () where it cannot be read
    causal: bool
    window: int | None
    scale: float
    max_seqlen: int | None
    length: int | None


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, options: Options) -> Tensor:
    return _apply_flash(
        q,
        k,
        v,
        cu_seqlens if options.length is None else None,
        options.backend,
        options.length or options.max_seqlen or q.shape[0],
        options.length,
        options.causal,
        options.window,
        options.scale,
        torch.are_deterministic_algorithms_enabled(),
    )


def _padded(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, options: Options) -> Tensor:
    bounds, length = options.bounds, options.length
    if length is not None:
        bounds = tuple(range(0, q.shape[0] + 1, length))
    return padded_attention(q, k, v, bounds, options.causal, options.window, options.scale)


def _plain(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, options: Options) -> Tensor:
    return attention_reference(
        q,
        k,
        v,
        cu_seqlens,
        causal=options.causal,
        window=options.window,
        scale=options.scale,
        length=options.length,
    )


_FLASH_4 = ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "torch")
_FLASH_2 = ("flash-attn", "torch")
declare(
    "attention",
    library("flash-attn-4", _flash, _FLASH_4, "flash_attn.cute", capability=(9, 0)),
    library("cudnn", _flash),
    library("flash-attn", _flash, _FLASH_2, "flash_attn.flash_attn_interface"),
    library("torch-varlen", _flash),
    Backend("triton", backends.triton_why_not, _flash),
    Backend("padded", backends.padded_why_not, _padded),
    Backend("plain", lambda call: None, _plain),
    call=AttentionCall,
    order=backends.order,
)


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
    backend = _choose(
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
    options = Options(backend, bounds, causal, window, scale, max_seqlen, length)
    run_backend = OPERATIONS["attention"].backends[backend].run
    assert run_backend is not None
    out: Tensor = run_backend(q, k, v, cu_seqlens, options)
    return out


@constant_result
def _choose(*facts: Any) -> str:
    """`choose`, with a warning where it takes the O(N^2) formula on a GPU."""
    chosen = choose("attention", *facts)
    if chosen == "plain" and AttentionCall(*facts).on_gpu:
        warn_once(
            "attention runs as plain masked arithmetic, O(N^2) in memory: "
            f"torch varlen {why_not('attention', 'torch-varlen', *facts)}"
        )
    return chosen


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
