"""The functions that sites call: linear, embed, norms, glu, head; and dropout as a pure function.

Each takes its own params first, a dict, so that a rule sees exactly what the site owns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.hashing import LOW, lowbias32
from params.tree import Tree


def weight_of(p: Tree) -> Tensor:
    """The dense weight of a site; a quantised one without its rule is an error, not a guess."""
    if "weight" not in p:
        raise KeyError(
            f"this site has leaves {sorted(p)} but no 'weight': the params were prepared by a "
            "transform that this forward does not have (quantize_int8(forward)?)"
        )
    return p["weight"]


def dense_weight(p: Tree, dtype: torch.dtype) -> Tensor:
    """The weight in the dtype it will be multiplied in."""
    return weight_of(p).to(dtype)


def linear(p: Tree, x: Tensor) -> Tensor:
    """``x [..., I] @ weight[O, I].T + bias[O]``, in the weight's dtype."""
    return kernels.linear(x, weight_of(p), p.get("bias"))


def embed(p: Tree, ids: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """Rows of the table ``weight [V, D]``: ids ``[...]`` -> ``[..., D]``.

    padding_idx: a row that gets no gradient, as in ``nn.Embedding``.
    """
    return F.embedding(ids, weight_of(p), padding_idx)


def rms_norm(p: Tree, x: Tensor, *, eps: float) -> Tensor:
    """Root-mean-square norm over the last dim; statistics in fp32, result in x's dtype."""
    return kernels.rms_norm(x, p["weight"], eps)


def rope(
    p: Tree, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """Turns q ``[N, H, Dh]`` and k ``[N, Hk, Dh]`` by rows of the tables ``[T, Dh/2]``.

    Where p has ``q_norm`` and ``k_norm``, each head is RMS-normed first (QK-norm: Qwen3, Gemma-3).
    """
    if not p:
        return kernels.rope(q, k, cos, sin, rows)
    weights = {"q_weight": p["q_norm"]["weight"], "k_weight": p["k_norm"]["weight"]}
    return kernels.rope(q, k, cos, sin, rows, **weights, eps=eps)


def layer_norm(p: Tree, x: Tensor, *, eps: float) -> Tensor:
    """Layer norm over the last dim; statistics in fp32, result in x's dtype."""
    return kernels.layer_norm(x, p["weight"], p["bias"], eps)


def swiglu(p: Tree, gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer 2020, https://arxiv.org/abs/2002.05202). Owns no params."""
    return kernels.swiglu(gate, up)


@dataclass(frozen=True)
class Logits:
    """Logits that have not been computed: ``softcap(scale * (hidden @ weight.T + bias))``.

    hidden: ``[..., D]``; unembed: the head's params (``weight [V, D]``, optional ``bias [V]``);
    project: how params and hidden become raw logits, and weight_from: how params and a dtype become
    the weight ``[V, D]`` (a quantised head brings its own two);
    scale: multiplies the raw logits; softcap c: ``c * tanh(logits / c)`` afterwards (Gemma-2).

    What modules do to logits after their head becomes scale and softcap: products and quotients
    with a number, one tanh. Anything else raises TypeError.
    """

    hidden: Tensor
    unembed: Tree
    project: Callable[[Tree, Tensor], Tensor] = linear
    weight_from: Callable[[Tree, torch.dtype], Tensor] = dense_weight
    scale: float | None = None
    softcap: float | None = None

    def dense(self) -> Tensor:
        """The logits ``[..., V]``."""
        logits = self.project(self.unembed, self.hidden)
        if self.scale is not None:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def weight(self) -> Tensor:
        """The unembedding ``[V, D]`` in hidden's dtype."""
        return self.weight_from(self.unembed, self.hidden.dtype)

    def __mul__(self, factor: float) -> Logits:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        # f c tanh(s x / c) = |f| c tanh(f s x / (|f| c))
        softcap = None if self.softcap is None else abs(factor) * self.softcap
        scale = factor * (1.0 if self.scale is None else self.scale)
        return replace(self, scale=scale, softcap=softcap)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Logits:
        return self * (1 / divisor)

    def tanh(self) -> Logits:
        if self.softcap is not None:
            raise TypeError("a second tanh of logits: a loss cannot be fused with that")
        return replace(self, softcap=1.0)

    def float(self) -> Logits:
        """The same: a loss computes in fp32."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        name = getattr(func, "__name__", func)
        raise TypeError(
            f"the model computes {name} of its logits after the head: no loss can be fused with it"
        )

    def at(self, rows: Tensor) -> Logits:
        """The same for some rows of ``hidden [N, D]``."""
        return replace(self, hidden=self.hidden[rows])


def head(p: Tree, x: Tensor, *, softcap: float | None = None) -> Logits:
    """The output head: lazy logits over the hidden states ``x [..., D]``."""
    return Logits(x, p, softcap=softcap)


def dropout(x: Tensor, rate: float, seed: Tensor | None, salt: int | Tensor) -> Tensor:
    """Inverted dropout whose mask is a hash of (seed, salt, position): no RNG state is touched.

    Being a pure function of its arguments, it needs no bookkeeping to be recomputed under a
    checkpoint, mapped by ``vmap`` or compiled. x: any shape, under 2**32 elements; seed: integer
    scalar tensor, or None for no dropout; salt: a number, or an integer scalar tensor, that tells
    apart the calls that share a seed.
    The mixing is ``kernels.hashing.lowbias32``.
    """
    if rate == 0.0 or seed is None:
        return x
    index = torch.arange(x.numel(), device=x.device).reshape(x.shape)
    bits = lowbias32(index ^ lowbias32(lowbias32(seed.to(torch.int64) & LOW) + (salt & LOW) & LOW))
    keep = bits >= int(rate * 2**32)
    return torch.where(keep, x / (1 - rate), torch.zeros((), dtype=x.dtype, device=x.device))
