"""Attention's backends: which calls each can serve, which one is fastest, and their proofs.

`kernels.attention.attention` declares them with the functions that run them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch

from kernels.attention import attention_flash
from kernels.attention.formula import attention_reference
from kernels.runtime import launch
from kernels.runtime.dispatch import Backend, Proof
from kernels.runtime.proof import check_close, import_problem

# Head sizes whose output and gradients were tested against fp64 on an H200, causal or not, with
# windows, shared key heads, ragged and empty documents (tests/kernels/test_attention_gpu.py).
# Others are refused: at 72, flash-attn 4.0.0b36 gives a wrong gradient of q without an error.
# flash-attn 2 was not tested there: its proof alone decides.
TESTED: dict[str, tuple[int, ...]] = {
    "flash-attn-4": (64, 128),
    "cudnn": (64, 128),
    "torch-varlen": tuple(range(8, 257, 8)),
    "flash-attn": tuple(range(8, 257, 8)),
    "triton": (16, 32, 64, 72, 80, 96, 128, 256),
}


class AttentionCall(NamedTuple):
    """What is known of a call of `attention` before its backend is chosen."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    readable: bool = True  # Python can read the document boundaries
    compiling: bool = False  # inside torch.compile
    group: int = 1  # query heads that share a key head
    window: int | None = None
    max_seqlen: int | None = None
    length: int | None = None
    large: bool = False  # `attention_flash.is_large`
    causal: bool = True
    many: bool = False  # more than 256 documents

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"


def library(
    name: str,
    run: Callable[..., Any],
    distributions: Sequence[str] = ("torch",),
    module: str | None = None,
    capability: tuple[int, int] = (8, 0),
) -> Backend:
    """A library's flash attention: on a GPU, in half precision, at head sizes that were tested.

    Args:
        distributions: the packages whose versions decide, its own first.
        module: what must import; None for a part of torch.
        capability: the least compute capability.
    """

    def why_not(call: AttentionCall) -> str | None:
        if not call.on_gpu:
            return "needs a CUDA GPU"
        has = torch.cuda.get_device_capability(call.device)
        if has < capability:
            least = ".".join(map(str, capability))
            return f"needs compute capability {least}, this GPU has {has[0]}.{has[1]}"
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"takes bfloat16 or float16, not {call.dtype}"
        if name == "cudnn" and call.length is None:
            return "takes documents of equal length only, said by attention(..., length=)"
        if name == "cudnn" and call.window is not None:
            return "has no sliding window"
        if name == "cudnn" and not torch.backends.cudnn.is_available():
            return "needs a torch with cuDNN"
        if call.large and name in attention_flash.SMALL:
            return "counts the entries of q's gradient in 32 bits"
        return _untested(name, call) or (
            import_problem(module, f"install {distributions[0]}") if module else None
        )

    case = functools.partial(prove_attention, name)
    return Backend(name, why_not, run, Proof(distributions, case, _kind))


def triton_why_not(call: AttentionCall) -> str | None:
    return launch.why_not(call.device, call.dtype) or _untested("triton", call)


def padded_why_not(call: AttentionCall) -> str | None:
    if torch.device(call.device).type != "cpu":
        return "runs on CPU only"
    if call.compiling or not call.readable:
        return "has to read cu_seqlens, which cannot be read here (compiled, vmapped or meta)"
    return None


def _untested(name: str, call: AttentionCall) -> str | None:
    tested = call.head_dim in TESTED[name]
    return None if tested else f"is not tested for head size {call.head_dim}"


def order(call: AttentionCall) -> tuple[str, ...]:
    """Attention's backends, the fastest first, as measured on an H200 (docs/log.md, 2026-11-23).

    Triton wins where a document sees at most 512 keys (1,024 where 4 query heads or more share a
    key head), cuDNN for dense batches of up to 256 tokens, flash-attn 4 elsewhere.
    """
    known = ("flash-attn-4", "cudnn", "flash-attn", "torch-varlen", "triton", "padded", "plain")
    if not call.on_gpu or torch.cuda.get_device_capability(call.device) < (9, 0):
        return known  # not measured: the libraries first
    short = 512 if call.group < 4 else 1024
    if call.length is not None:
        few = call.length <= 64
    else:
        few = call.max_seqlen is not None and call.max_seqlen <= short
    if few or (call.window is not None and 2 * call.window <= short):
        return ("triton", *(name for name in known if name != "triton"))
    first, second = "flash-attn-4", "cudnn"
    if call.length is not None and call.length <= 256:
        first, second = second, first
    return (first, second, "triton", "flash-attn", "torch-varlen", "plain")


# Proofs: a library runs a call of the same kind on a few short documents. What it compiles for the
# proof, the call itself needs too.


def _kind(call: AttentionCall) -> Hashable:
    return (
        call.dtype,
        call.head_dim,
        call.group,
        call.window is None,
        call.length is None,
        call.causal,
        call.many,
        _proof_length(call) <= 128,  # within one tile
        torch.are_deterministic_algorithms_enabled(),
    )


def _proof_length(call: AttentionCall) -> int:
    """The most tokens of a document in a proof."""
    return min(call.length or call.max_seqlen or 512, 512)


def prove_attention(backend: str, call: AttentionCall) -> None:
    """Raises whatever is wrong with a library's forward and backward of such a call, by fp64."""
    longest = _proof_length(call)
    length = None if call.length is None else longest
    lengths = [length, length] if length else [min(n, longest) for n in (70, 0, 160, 1, 40)]
    ends = [*itertools.accumulate(lengths, initial=0)]
    cu = torch.tensor(ends + ends[-1:] * (257 if call.many else 0), dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    kv_heads = 2 if call.group <= 4 else 1
    heads = kv_heads * call.group
    q, k, v, grad = (
        torch.randn(ends[-1], n, call.head_dim, generator=generator, dtype=torch.float32).to(
            call.dtype
        )
        for n in (heads, kv_heads, kv_heads, heads)
    )
    static: dict[str, Any] = {
        "length": length,
        "causal": call.causal,
        "window": None if call.window is None else min(call.window, 48),
        "scale": call.head_dim**-0.5,
    }
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    exact = attention_reference(wide[0], wide[1], wide[2], cu, **static)
    exact_grads = torch.autograd.grad(exact, wide, grad.double())
    q, k, v, grad, cu = (x.to(call.device) for x in (q, k, v, grad, cu))
    known = cu if length is None else None
    static |= {"backend": backend, "longest": longest}
    out, lse = attention_flash.flash_forward(q, k, v, known, **static)
    deterministic = torch.are_deterministic_algorithms_enabled()
    grads = attention_flash.flash_backward(
        grad, q, k, v, out, lse, known, **static, deterministic=deterministic
    )
    # weights, their gradients and results are rounded once each: less than an ulp in the mean
    allowed = torch.finfo(call.dtype).eps
    # the gradients of q and k of a document of one token are 0: differences of sums of Dh products,
    # in fp32, times a row of norm sqrt(Dh)
    slack = 8 * torch.finfo(torch.float32).eps * call.head_dim * static["scale"]
    check_close("its output", out, exact.detach(), allowed)
    for name, got, right in zip("qkv", grads, exact_grads, strict=True):
        check_close(f"its gradient of {name}", got, right, allowed, slack)
