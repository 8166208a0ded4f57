"""The functions that sites call: linear, embed, norms, glu, head; and dropout as a pure function.

The first argument is a dict of the site's own params, so that a rule sees exactly those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.runtime.hashing import LOW, lowbias32
from params.formats import shape_of
from params.tree import Tree


def weight_of(p: Tree) -> Tensor:
    """A site's dense weight. Raises KeyError for a quantised one whose rule is missing."""
    if "weight" not in p:
        raise KeyError(
            f"this site has leaves {sorted(p)} but no 'weight': the params were prepared by a "
            "transform that this forward does not have (quantize_int8(forward)?)"
        )
    return p["weight"]


def dense_weight(p: Tree, dtype: torch.dtype) -> Tensor:
    """The weight in the dtype of its product."""
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
    """Rotary embedding of q ``[N, H, Dh]`` and k ``[N, Hk, Dh]`` by rows of tables ``[T, Dh/2]``.

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
    """Lazy logits: ``softcap(scale * (hidden @ weight.T + bias))``, not yet computed.

    hidden: ``[..., D]``.
    unembed: the head's params (``weight [V, D]``, optional ``bias [V]``).
    project: ``(params, hidden) -> raw logits``; weight_from: ``(params, dtype) -> weight [V, D]``.
        A quantised head brings its own two.
    scale: multiplies the raw logits; softcap c: then ``c * tanh(logits / c)`` (Gemma-2).
    shift ``[V]``: added to the raw logits beside the bias (BART's ``final_logits_bias``).

    Operations that modules apply after their head, and that a fused loss can follow, stay lazy:
    products and quotients with a number, one tanh, a vector ``[V]`` added or subtracted, indexing,
    reshaping or transposing the leading dims, ``contiguous``, ``clone``, casts to a wider dtype.
    Any other raises TypeError, which names it.
    """

    hidden: Tensor
    unembed: Tree
    project: Callable[[Tree, Tensor], Tensor] = linear
    weight_from: Callable[[Tree, torch.dtype], Tensor] = dense_weight
    scale: float | None = None
    softcap: float | None = None
    shift: Tensor | None = None

    def dense(self) -> Tensor:
        """The logits ``[..., V]``."""
        logits = self.project(self.unembed, self.hidden)
        if self.shift is not None:
            logits = logits + self.shift
        if self.scale is not None:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def weight(self) -> Tensor:
        """The unembedding ``[V, D]`` in hidden's dtype."""
        return self.weight_from(self.unembed, self.hidden.dtype)

    def bias(self) -> Tensor | None:
        """Bias and shift ``[V]``, or None."""
        bias = self.unembed.get("bias")
        if self.shift is None or bias is None:
            return bias if self.shift is None else self.shift
        return bias + self.shift

    @property
    def vocabulary(self) -> int:
        return shape_of(self.unembed)[0]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.vocabulary))

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def dim(self) -> int:
        return self.hidden.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    # -- numbers and vectors

    def __mul__(self, factor: Any) -> Logits:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise _unserved("a product with other than a number")
        # f c tanh(s x / c) = |f| c tanh(f s x / (|f| c))
        softcap = None if self.softcap is None else abs(factor) * self.softcap
        scale = factor * (1.0 if self.scale is None else self.scale)
        return replace(self, scale=scale, softcap=softcap)

    __rmul__ = mul = multiply = __mul__

    def __truediv__(self, divisor: Any) -> Logits:
        if isinstance(divisor, bool) or not isinstance(divisor, int | float):
            raise _unserved("a quotient with other than a number")
        return self * (1 / divisor)

    div = divide = true_divide = __truediv__

    def __neg__(self) -> Logits:
        return self * -1.0

    def __add__(self, other: Any) -> Logits:
        if isinstance(other, int | float) and other == 0:
            return self
        fits = isinstance(other, Tensor) and other.shape[-1:] == (self.vocabulary,)
        if not fits or other.numel() != self.vocabulary or self.softcap or self.scale == 0:
            raise _unserved("a sum with other than a vector of the vocabulary's size")
        other = other.reshape(-1) if self.scale is None else other.reshape(-1) / self.scale
        return replace(self, shift=other if self.shift is None else self.shift + other)

    __radd__ = add = __add__

    def __sub__(self, other: Any) -> Logits:
        return self + (-other)

    def __rsub__(self, other: Any) -> Logits:
        return -self + other

    def tanh(self) -> Logits:
        if self.softcap is not None:
            raise _unserved("a second tanh")
        return replace(self, softcap=1.0)

    # -- the same numbers elsewhere

    def __getitem__(self, index: Any) -> Logits:
        """Positions chosen: ``logits[:, -1:, :]``, ``logits[0]``, ``logits[..., keep, :]``."""
        index = index if isinstance(index, tuple) else (index,)
        dots = [n for n, i in enumerate(index) if i is Ellipsis]
        taken = sum(
            i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else i is not None
            for i in index
            if i is not Ellipsis
        )
        if dots[0] < len(index) - 1 if dots else taken == self.ndim:
            # the last index selects from the vocabulary
            last, whole = index[-1], range(self.vocabulary)
            if not isinstance(last, slice) or whole[last] != whole:
                raise _unserved("a choice from the vocabulary")
            index = (*index[:-1], slice(None))
        return replace(self, hidden=self.hidden[index])

    def view(self, *shape: Any) -> Logits:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        lead = () if isinstance(sizes, torch.dtype) else tuple(sizes[:-1])
        rows = math.prod(self.hidden.shape[:-1])
        fits = -1 in lead or math.prod(lead) == rows
        if not lead or not fits or sizes[-1] not in (-1, self.vocabulary):
            raise _unserved("a view that splits the vocabulary")
        return replace(self, hidden=self.hidden.reshape(*lead, self.hidden.shape[-1]))

    reshape = view

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Logits:
        end = end_dim % self.ndim
        if end == self.ndim - 1 and start_dim % self.ndim != end:
            raise _unserved("flatten over the vocabulary")
        return replace(self, hidden=self.hidden.flatten(start_dim, end))

    def transpose(self, a: int, b: int) -> Logits:
        if a != b and self.ndim - 1 in (a % self.ndim, b % self.ndim):
            raise _unserved("a transposition of the vocabulary")
        return replace(self, hidden=self.hidden.transpose(a, b))

    def permute(self, *dims: Any) -> Logits:
        order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
        if order[-1] % self.ndim != self.ndim - 1:
            raise _unserved("a transposition of the vocabulary")
        return replace(self, hidden=self.hidden.permute(*order))

    def squeeze(self, dim: int | None = None) -> Logits:
        if dim is None or dim % self.ndim == self.ndim - 1:
            raise _unserved("squeeze without a dim before the vocabulary")
        return replace(self, hidden=self.hidden.squeeze(dim))

    def unsqueeze(self, dim: int) -> Logits:
        if dim in (-1, self.ndim):
            raise _unserved("a dim behind the vocabulary")
        return replace(self, hidden=self.hidden.unsqueeze(dim))

    def contiguous(self) -> Logits:
        return self

    clone = contiguous

    def float(self) -> Logits:
        """The same: the loss computes in fp32."""
        return self

    double = float

    def to(self, *args: Any, **kwargs: Any) -> Logits:
        """The same, if the device is theirs and the dtype no narrower."""
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor | Logits):
                self.to(x.dtype).to(x.device)
            elif isinstance(x, torch.dtype):
                if torch.promote_types(x, self.dtype) != x:
                    raise _unserved(f"a cast to {x}")
            elif isinstance(x, str | torch.device) and torch.device(x).type != self.device.type:
                raise _unserved(f"a move to {x}")
        return self

    def type_as(self, other: Any) -> Logits:
        return self.to(other.dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"'Logits' object has no attribute {name!r}")
        raise _unserved(name)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _unserved("a change in place")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if args and isinstance(args[0], Logits) and name in _SERVED:
            return getattr(args[0], name)(*args[1:], **(kwargs or {}))
        if name in ("add", "mul") and len(args) == 2 and not kwargs:  # a tensor on the left
            return getattr(args[1], name)(args[0])
        raise _unserved(name)

    def at(self, rows: Tensor) -> Logits:
        """The logits of some rows of ``hidden [N, D]``."""
        return replace(self, hidden=self.hidden[rows])


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: Logits, *others: Any) -> Any:
        raise _unserved(name)

    return refuse


for _name in ("pow", "rpow", "matmul", "rmatmul", "mod", "floordiv", "rtruediv", "abs"):
    setattr(Logits, f"__{_name}__", _refusing(_name))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Logits, f"__{_name}__", _refusing("a comparison"))

_SERVED = (
    *("tanh", "mul", "multiply", "div", "divide", "true_divide", "add", "reshape", "flatten"),
    *("transpose", "permute", "squeeze", "unsqueeze", "clone"),
)


def _unserved(what: str) -> TypeError:
    return TypeError(
        f"the model computes {what} of its logits after the head, which no fused loss can follow: "
        "use unfused_loss"
    )


def head(p: Tree, x: Tensor, *, softcap: float | None = None) -> Logits:
    """The output head: lazy logits over the hidden states ``x [..., D]``."""
    return Logits(x, p, softcap=softcap)


def dropout(x: Tensor, rate: float, seed: Tensor | None, salt: int | Tensor) -> Tensor:
    """Inverted dropout. The mask is a hash of (seed, salt, position): no RNG state is touched.

    As a pure function of its arguments it can be recomputed, mapped by ``vmap`` and compiled.

    x: any shape, under 2**32 elements; seed: integer scalar tensor, or None for no dropout; salt: a
    number or integer scalar tensor, different for each call with this seed. The hash is
    ``kernels.runtime.hashing.lowbias32``.
    """
    if rate == 0.0 or seed is None:
        return x
    index = torch.arange(x.numel(), device=x.device).reshape(x.shape)
    bits = lowbias32(index ^ lowbias32(lowbias32(seed.to(torch.int64) & LOW) + (salt & LOW) & LOW))
    keep = bits >= int(rate * 2**32)
    return torch.where(keep, x / (1 - rate), torch.zeros((), dtype=x.dtype, device=x.device))
