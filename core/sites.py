"""The kinds of site, and what is known of each site.

==========  ==================================================  =============================
kind        function                                            site's path
==========  ==================================================  =============================
embed       ``f(p, ids) -> rows``                               of the table
block       ``f(p, x, *tensors) -> x``                          ``text.blocks.3``
linear      ``f(p, x) -> x @ weight.T + bias``                  of its weight
norm        ``f(p, x) -> x``                                    of its weight
rope        ``f(p, q, k, cos, sin, rows) -> (q, k)``            of the attention it sits in
attention   ``f({}, q, k, v, cu_seqlens) -> o``                 of the attention it sits in
glu         ``f({}, gate, up) -> h``                            of the MLP it sits in
head        ``f(p, x) -> Logits``                               of the unembedding; also ``lm_head``
weight      ``f(p) -> tensor``                                  of the weight itself
group       ``f({}, *tensors) -> tensors``                      ``text.blocks.3.mlp``
==========  ==================================================  =============================

``p`` is a dict of the site's own params. A group computes several neighbouring sites, its
*members*, by one function unless a rule opens it (``core.model.groups``).

In a foreign module (``from_module``) attention is ``f({}, q, k, v, options) -> o``:
``F.scaled_dot_product_attention`` with its keyword arguments in a dict; rope is ``f({}, q, k, cos,
sin) -> (q, k)``, q and k ``[B, heads, T, Dh]``, cos and sin ``[B, T, Dh]``. There alone are sites
of kind ``weight``: matrices that model code reads itself (experts held as one 3-D parameter, the
projections of ``nn.MultiheadAttention``). A rule of that kind also meets each read of the weight of
a linear, an embed or a head by other code (``x @ table.weight.T``).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch

from params.formats import beside
from params.paths import matches

KINDS = ("embed", "block", "linear", "norm", "rope", "attention", "glu", "head", "weight", "group")
WEIGHTED = ("linear", "head", "embed", "weight")  # kinds of site that own a matrix


@dataclass(frozen=True)
class NormForm:
    """What a norm computes over the last dim: ``normalised(x, eps) * (offset + weight) + bias``.

    kind: "rms" or "layer"; offset: 0, or 1 where the weight is stored as its distance from 1
    (Gemma); weight, bias: the names of the leaves, ``bias`` None if there is none.
    """

    kind: str
    eps: float
    offset: float
    weight: str
    bias: str | None


@dataclass(frozen=True)
class SiteInfo:
    """One call of the model that rules can reach: its kind, its path, whether it is outermost.

    key: of a native block, everything its function depends on beside params and tensors. Blocks of
        equal key and rules compute the same function; a block of key None equals no other.
    members: of a group, the ``(kind, path)`` of the sites it computes.

    ``from_module`` fills in the rest for a ``foreign`` module.
    transposed: the leaf ``weight`` of a linear is ``[I, O]``; the site shows it as ``[O, I]``.
    norm: a norm's formula; None if unknown.
    scale: a factor on the rows of an embed, after the site; None is 1. scale_cast: the factor is
        cast to the rows' dtype first.
    activation: of a glu: "silu", "gelu", "gelu_tanh", or None for any other.
    leaf: path of the leaf that holds the weight, if not ``{path}.weight``.
    shape, dtype: the weight's, in the module.
    computed: model code uses a weight that is computed from this leaf and others
        (``torch.nn.utils.parametrize``).
    """

    kind: str
    path: str
    outermost: bool
    foreign: bool = False
    transposed: bool = False
    norm: NormForm | None = None
    activation: str | None = None
    scale: float | None = None
    scale_cast: bool = True
    leaf: str | None = None
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    computed: bool = False
    members: tuple[tuple[str, str], ...] = ()
    key: Hashable = field(default=None, compare=False)
    aliases: Mapping[int, str] = field(default_factory=dict, compare=False)

    @property
    def weight(self) -> str:
        """Path of the leaf that holds the weight."""
        return self.leaf or (f"{self.path}.weight" if self.path else "weight")

    def beside(self, name: str) -> str:
        """Path of a leaf that lies beside the weight or in its place (``params.formats``)."""
        return beside(self.weight, name)

    def matches(self, pattern: str) -> bool:
        """Whether a path pattern names this site; every head also answers to ``lm_head``."""
        return (self.kind == "head" and matches(pattern, "lm_head")) or matches(
            pattern, self.path, self.aliases
        )
