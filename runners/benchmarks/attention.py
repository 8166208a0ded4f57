"""Cases: attention over packed documents."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels.runtime.dispatch import OPERATIONS
from runners.benchmarks.elementwise import peer
from runners.benchmarks.harness import Case
from runners.benchmarks.providers import Forward, Inputs, MissingError, Provider, simple

MOST_PLAIN = 4096  # tokens; beyond it plain attention's [heads, N, N] would fill the device
NOT_THERE = "requested but not available: "


def cases() -> list[Case]:
    n, ragged = 16384, ragged_lengths(16384, 41)
    shapes: list[dict[str, Any]] = [
        {"shape": "8 x 2048, heads 16/16, D=128", "lengths": [2048] * 8, "heads": (16, 16)},
        {"shape": "1 x 16384, heads 16/16, D=128", "lengths": [n], "heads": (16, 16)},
        {"shape": "8 x 2048, heads 12/2, D=128", "lengths": [2048] * 8, "heads": (12, 2)},
        {"shape": "41 ragged documents, heads 12/2, D=128", "lengths": ragged, "heads": (12, 2)},
        {
            "shape": "1 x 16384, window 256, heads 12/2, D=128",
            "lengths": [n],
            "heads": (12, 2),
            "window": 256,
        },
        {
            "shape": "64 x 256 not causal, heads 16/16, D=64",
            "lengths": [256] * 64,
            "heads": (16, 16),
            "dim": 64,
            "causal": False,
        },
    ]
    return [attention(**shape, training=training) for shape in shapes for training in (False, True)]


def ragged_lengths(total: int, documents: int, seed: int = 0) -> list[int]:
    """Lengths between a sixth and twice their mean, the same ones each time.

    >>> sum(ragged_lengths(16384, 41))
    16384
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(documents, generator=generator, dtype=torch.float64) * (11 / 6) + 1 / 6
    ends = (sizes.cumsum(0) / sizes.sum() * total).round().long().tolist()
    return [b - a for a, b in itertools.pairwise([0, *ends])]


def pairs(length: int, causal: bool, window: int | None) -> int:
    """Queries times the keys that each sees, in one document.

    >>> pairs(4, True, None), pairs(4, False, None), pairs(4, True, 2)
    (10, 16, 7)
    """
    if not causal:
        if window is None:
            return length**2
        return sum(min(i + 1, window) + min(length - i, window) - 1 for i in range(length))
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def attention(
    shape: str,
    lengths: Sequence[int],
    heads: tuple[int, int],
    dim: int = 128,
    causal: bool = True,
    window: int | None = None,
    training: bool = True,
) -> Case:
    """Two matmuls forward, five backward, over the scores that the mask leaves."""
    n, longest = sum(lengths), max(lengths)
    uniform = longest if len(set(lengths)) == 1 else None
    scores = heads[0] * sum(pairs(length, causal, window) for length in lengths)

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        made: Inputs = {"cu": torch.tensor([0, *itertools.accumulate(lengths)]).int().to(device)}
        for name, count in (("q", heads[0]), ("k", heads[1]), ("v", heads[1]), ("do", heads[0])):
            x = torch.randn(n, count, dim, generator=generator, device=device, dtype=torch.bfloat16)
            made[name] = x.requires_grad_(training and name != "do")
        return made

    options: dict[str, Any] = {"causal": causal, "window": window, "max_seqlen": longest}
    if uniform is not None:
        options["length"] = uniform  # as the model says it of rows and of pictures

    def forward(i: Inputs) -> Any:
        return kernels.attention(i["q"], i["k"], i["v"], i["cu"], **options)

    own = [
        simple("ours", forward),
        # in training, which is where a step compiles it
        *([simple("ours, compiled", forward, compiled=True, charted=False)] if training else []),
        *(
            Provider(f"ours by {name}", _by(name, forward), charted=False)
            for name in OPERATIONS["attention"].backends
        ),
    ]
    dense = uniform is not None and window is None
    providers = (
        Provider("torch varlen", lambda sets: _torch_varlen(longest, causal, window)),
        *own,
        peer("flash-attn-4", lambda: _flash(longest, causal, window)),
        *([Provider("cuDNN", lambda sets: _cudnn(max(lengths), causal))] if dense else []),
    )
    work = 2.0 * dim * scores * (7 if training else 2)
    return Case(
        "attention",
        shape,
        work,
        "bf16",
        inputs,
        providers,
        wrt=("q", "k", "v") if training else (),
        seeds=("do",) if training else (),
        reference="torch varlen",
    )


def _by(backend: str, forward: Forward) -> Any:
    """Ours, told which backend to take."""

    def build(sets: Sequence[Inputs]) -> Forward:
        n = sets[0]["q"].shape[0]
        if backend == "plain" and n > MOST_PLAIN:
            raise MissingError(f"not tried: its scores would be [heads, {n}, {n}]")

        def run(i: Inputs) -> Any:
            with kernels.override(attention=backend):
                return forward(i)

        try:
            run(sets[0])
        except RuntimeError as error:
            if NOT_THERE in str(error):
                raise MissingError(str(error).partition(NOT_THERE)[2]) from None
            raise
        return run

    return build


def _torch_varlen(longest: int, causal: bool, window: int | None) -> Forward:
    """The flash attention inside torch, whose parameters differ between 2.11 and 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    reach = -1 if window is None else window - 1
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (reach, 0 if causal else reach)
    elif window is None:
        options["is_causal"] = causal
    else:
        raise MissingError(f"varlen_attn of torch {torch.__version__} takes no window")

    def forward(i: Inputs) -> Any:
        q, k, v, cu = i["q"], i["k"], i["v"], i["cu"]
        groups = q.shape[1] // k.shape[1]
        if groups > 1 and "enable_gqa" not in known:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        elif groups > 1:
            return varlen_attn(q, k, v, cu, cu, longest, longest, enable_gqa=True, **options)
        return varlen_attn(q, k, v, cu, cu, longest, longest, **options)

    return forward


def _flash(longest: int, causal: bool, window: int | None) -> Forward:
    """flash-attn-4's own function, as its README calls it."""
    from flash_attn.cute import flash_attn_varlen_func

    reach = None if window is None else window - 1
    sides = (reach, 0 if causal and window is not None else reach)

    def forward(i: Inputs) -> Any:
        out = flash_attn_varlen_func(
            i["q"],
            i["k"],
            i["v"],
            cu_seqlens_q=i["cu"],
            cu_seqlens_k=i["cu"],
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=causal and window is None,
            window_size=sides,
        )
        return out[0] if isinstance(out, tuple) else out

    return forward


def _cudnn(length: int, causal: bool) -> Forward:
    """Dense rows through torch's scaled_dot_product_attention, which may take nothing but cuDNN."""

    def forward(i: Inputs) -> Tensor:
        q, k, v = (i[name].unflatten(0, (-1, length)).transpose(1, 2) for name in ("q", "k", "v"))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )
        return out.transpose(1, 2).flatten(0, 1)

    return forward
