"""The protocol: a forward is a pure function whose named calls (sites) accept rules.

A model is written as plain functions. Wherever something may want to step in (a linear layer, a
block, the output head, ...) it makes the call through a :class:`Site`::

    y = site("linear", linear, p["down"], x, at="down")      # instead of linear(p["down"], x)

A :class:`Forward` holds the model and an immutable tuple of rules. A transform is a function from
Forward to Forward that appends rules, says how params must be prepared, or finishes the output.

Kinds of site and what the wrapped function looks like (``p``: the site's own params, a dict):

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
==========  ==================================================  =============================

In a module of someone else's (``from_module``) attention is ``f({}, q, k, v, options) -> o``:
``F.scaled_dot_product_attention`` with its keyword arguments in a dict; rope is ``f({}, q, k, cos,
sin) -> (q, k)``, q and k ``[B, heads, T, Dh]``, cos and sin ``[B, T, Dh]``. There alone are sites
of kind ``weight``: matrices that model code reads itself (experts held as one 3-D parameter, the
projections of ``nn.MultiheadAttention``). A rule of that kind also meets each read of the weight of
a linear, an embed or a head by other code (``x @ table.weight.T``).

A rule of the pseudo-kind ``gather`` meets every *outermost* site that owns params: each leaf of
params passes exactly one of them (a tied unembedding passes two), so that is the place to cast,
unshard or load params.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from params.formats import beside
from params.paths import alias_table, matches, no_match
from params.tree import Tree, flatten

SiteFn = Callable[..., Any]
Wrap = Callable[[SiteFn, str], SiteFn]
Select = Sequence[str] | Callable[["SiteInfo"], bool] | None
KINDS = ("embed", "block", "linear", "norm", "rope", "attention", "glu", "head", "weight")
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

    The rest is what ``from_module`` learns of a module of someone else's (``foreign``).
    transposed: the leaf ``weight`` of a linear is ``[I, O]``; the site shows it as ``[O, I]``.
    norm: what a norm computes; None if that is not known.
    scale: what the rows of an embed are multiplied with, after the site; None is 1.
    scale_cast: whether that number is cast to the rows' dtype first.
    like: of a native block: all that its function was made of beside its site. Blocks of equal
    ``like`` compute the same function of their arguments, rules aside; None is like no other.
    activation: of a glu: "silu", "gelu", "gelu_tanh", or None for any other.
    leaf: path of the leaf that holds the weight, if that is not ``{path}.weight``.
    shape, dtype: of the weight, as it was in the module.
    computed: whether the weight that model code uses is computed from this leaf and others
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
    like: Hashable = field(default=None, compare=False)
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


@dataclass(frozen=True, eq=False)
class Rule:
    """At each selected site of ``kind``, ``f`` becomes ``wrap(f, path)``. Later rules are outer.

    What ``wrap`` does inside a block is the same whichever of its likes the block is
    (``SiteInfo.like``): it may look at what follows the block in a path, not at its number.
    level: rules of a higher one are outside those of a lower one, whichever came first.
    recomputes: what the sites compute inside, products too, is computed again in backward.
    """

    kind: str
    wrap: Wrap
    select: Select = None
    name: str = "rule"
    level: int = 0
    recomputes: bool = False

    def applies(self, site: SiteInfo) -> bool:
        return self._is_for(site) and self._selects(site)

    def keys(self, site: SiteInfo) -> Iterator[tuple[str, str]]:
        """Where calls meet the rule because of this site: at it, at reads of its weight."""
        if not self._selects(site):
            return
        if self._is_for(site):
            yield site.kind, site.path
        read = self.kind == "weight" or (self.kind == "gather" and site.outermost)
        if read and site.foreign and site.kind in WEIGHTED:
            yield "weight", site.weight

    def _is_for(self, site: SiteInfo) -> bool:
        return self.kind == site.kind or (self.kind == "gather" and site.outermost)

    def _selects(self, site: SiteInfo) -> bool:
        if self.select is None or callable(self.select):
            return self.select is None or self.select(site)
        return any(site.matches(pattern) for pattern in self.select)


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: Dynamo asks for a hash early
class Site:
    """A place in the model. Calling it makes one call, through the rules that match it."""

    table: Mapping[tuple[str, str], tuple[Wrap, ...]]
    path: str = ""
    inner: bool = False
    lazy: bool = False  # the head's Logits stay unevaluated, because a loss will consume them
    record: list[SiteInfo] | None = None
    again: frozenset[str] = frozenset()  # blocks that a rule computes again in backward

    def at(self, name: str, *, inner: bool = False) -> Site:
        """The same rules, one level deeper."""
        path = f"{self.path}.{name}" if self.path else name
        return replace(self, path=path, inner=self.inner or inner)

    def bound(self, kind: str, path: str) -> bool:
        """Whether any rule matches here: only then need a foreign module be rewritten."""
        return (kind, path) in self.table

    def free(self, *sites: tuple[str, str]) -> bool:
        """Whether no rule stands at any of these ``(kind, at)``: then one function may compute
        several of them at once. While sites are recorded, none is free."""
        return self.record is None and not any(
            (kind, self._path(at)) in self.table for kind, at in sites
        )

    @property
    def recomputed(self) -> bool:
        """Whether this is a block that is computed again in backward."""
        return self.path in self.again

    def _path(self, at: str) -> str:
        return f"{self.path}.{at}" if self.path and at else self.path or at

    def __call__(self, kind: str, f: SiteFn, p: Tree, *args: Any, at: str = "") -> Any:
        path = self._path(at)
        if self.record is not None:
            like = made_of(f) if kind == "block" else None
            outermost = bool(p) and not self.inner
            self.record.append(SiteInfo(kind, path, outermost, like=like))
        for wrap in self.table.get((kind, path), ()):
            f = wrap(f, path)
        return f(p, *args)


@dataclass(frozen=True, eq=False)
class Forward:
    """A pure function ``(params, batch) -> logits [N, V]`` (or loss) and the rules applied to it.

    ``build(site)`` gives the function with its sites bound; it runs once, here, not per call.
    ``sites`` lists what the function reaches, so that a rule that would do nothing raises now.
    ``around`` wraps the whole call, ``finish`` included, whatever is applied later (a compiler);
    ``around_block`` each block with all its rules, once for all blocks that are alike.

    Of a module of someone else's: ``frozen``, paths of params that did not require gradients there;
    ``buffers``, what it keeps beside params; ``aux``, whether a call returns them too, ``(out,
    buffers)``; ``modes``, whether its layers are in training mode; ``remade``, which makes the bare
    forward of the module after a change (``lambda m: m.train()``); ``unfound``, what is no site.
    """

    build: Callable[[Site], Callable[[Tree, Any], Any]]
    sites: tuple[SiteInfo, ...]
    rules: tuple[Rule, ...] = ()
    preparations: tuple[Callable[[Tree, int], Tree], ...] = ()
    finish: Callable[[Any, Any], Any] | None = None
    around: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    around_block: Callable[[SiteFn], SiteFn] | None = None
    dense: bool = False  # finish takes logits as a tensor, not lazy ones
    applied: tuple[str, ...] = ()  # names of the transforms, innermost first
    frozen: frozenset[str] = frozenset()
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    aux: bool = False
    modes: frozenset[bool] = frozenset()
    remade: Callable[[Callable[[Any], Any]], Forward] | None = None
    unfound: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        table: dict[tuple[str, str], tuple[Wrap, ...]] = {}
        for rule in self.rules:
            # several layers that share a weight are one place: a rule meets it once
            for key in dict.fromkeys(key for site in self.sites for key in rule.keys(site)):
                table[key] = (*table.get(key, ()), rule.wrap)
        if self.around_block is not None:
            wrap = _once_for_all_alike(self.around_block, _twins(self.sites, table))
            for path in dict.fromkeys(site.path for site in self.sites if site.kind == "block"):
                table["block", path] = (*table.get(("block", path), ()), wrap)
        again = frozenset(
            site.path
            for site in self.sites
            if site.kind == "block" and any(r.recomputes and r.applies(site) for r in self.rules)
        )
        run = self.build(Site(table, lazy=self.finish is not None and not self.dense, again=again))
        finish = self.finish

        def call(params: Tree, batch: Any) -> Any:
            out = run(params, batch)
            if not self.aux:
                return out if finish is None else finish(out, batch)
            out, aux = out
            return (out if finish is None else finish(out, batch)), aux

        object.__setattr__(self, "_call", call if self.around is None else self.around(call))

    def __call__(self, params: Tree, batch: Any) -> Any:
        return self._call(params, batch)  # type: ignore[attr-defined]

    def select(self, kinds: Sequence[str], patterns: Select = None) -> tuple[SiteInfo, ...]:
        """The sites of these kinds that ``patterns`` name. Raises ValueError if one names none."""
        found = tuple(s for s in self.sites if s.kind in kinds)
        if patterns is None or callable(patterns):
            return tuple(s for s in found if patterns is None or patterns(s))
        for pattern in patterns:
            if not any(site.matches(pattern) for site in self.sites):
                heads = ["lm_head"] if any(s.kind == "head" for s in self.sites) else []
                raise no_match(pattern, [s.path for s in self.sites] + heads, what="sites")
        return tuple(s for s in found if any(s.matches(pattern) for pattern in patterns))

    def with_rule(self, rule: Rule, *, innermost: bool = False) -> Forward:
        """Appends a rule (or puts it inside all others, whatever is applied before or after).

        Raises ValueError, listing what there is, if it would match nothing.
        """
        if rule.kind not in (*KINDS, "gather"):
            raise ValueError(f"no site has kind {rule.kind!r}; kinds: {', '.join(KINDS)}, gather")
        if not any(True for site in self.sites for _ in rule.keys(site)):
            if rule.kind == "block" and not any(s.kind == "block" for s in self.sites):
                raise ValueError(
                    f"{rule.name}: this forward has no block: "
                    "from_module(..., blocks=('path.of.one',)) says which modules are blocks"
                )
            have = sorted({f"{s.kind} {s.path}" for s in self.sites})
            named = () if rule.select is None or callable(rule.select) else rule.select
            raise no_match(" ".join((rule.kind, *named)), have, what="sites")
        rules = (rule, *self.rules) if innermost else (*self.rules, rule)
        return replace(self, rules=tuple(sorted(rules, key=lambda r: r.level)))

    def with_step(self, name: str, **changes: Any) -> Forward:
        """Records the transform's name, and whatever other fields it changes."""
        return replace(self, applied=(*self.applied, name), **changes)

    @property
    def constant(self) -> frozenset[str]:
        """Paths of leaves that get no gradient: frozen ones, and buffers."""
        return self.frozen | self.buffers.keys()

    def with_mode(self, training: bool) -> Forward:
        """The same with a foreign module's layers in training mode, or not; a native forward has
        no mode. A site that is none in the other mode (a gated MLP with dropout) meets no rule."""
        if self.remade is None or self.modes == {training}:
            return self
        bare = self.remade(lambda module: module.train(training))
        changes = {name: getattr(bare, name) for name in ("build", "sites", "modes", "unfound")}
        return replace(self, **changes)

    def prepare(self, params: Tree, seed: int = 0) -> Tree:
        """Params as this forward wants them: every transform's preparation, innermost first."""
        for preparation in self.preparations:
            params = preparation(params, seed)
        return params

    def explain(self, params: Tree | None = None) -> str:
        """A table of every site: kind, path, shapes of its params, and the rules that apply; below
        it, of a module of someone else's, what looked like a site and is none, with the reason."""
        leaves = {} if params is None else flatten(params)
        shapes: dict[str, list[str]] = {}
        for path, leaf in leaves.items():
            owner, _, name = path.rpartition(".")
            shapes.setdefault(owner, []).append(f"{name} {list(leaf.shape)}")
            shapes[path] = [str(list(leaf.shape))]
        rows = [
            (s.kind, s.path, ", ".join(shapes.get(s.path, ())), " > ".join(names))
            for s in self.sites
            for names in [[r.name for r in self.rules if r.applies(s)]]
        ]
        rows = [("kind", "path", "params", "rules, innermost first"), *dict.fromkeys(rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        table = "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        )
        first = f"transforms, innermost first: {', '.join(self.applied) or 'none'}"
        return "\n".join([first, table, *_grouped(self.unfound)])


def _grouped(lines: Sequence[str]) -> list[str]:
    """Lines that differ in numbers of layers alone, as one with their count."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=[. ])|^\d+(?=[. ])", "*", line) for line in lines)
    rows = [line if n == 1 else f"{line} ({n} times)" for line, n in counts.items()]
    return ["no sites:", *(f"  {row}" for row in rows)] if rows else []


def made_of(f: SiteFn) -> Hashable:
    """What a partial function was made of, its site left out; None if that cannot be told."""
    if not isinstance(f, partial):
        return None
    parts = tuple(part for part in f.args if not isinstance(part, Site))
    made = (f.func, parts, tuple(sorted(f.keywords.items())))
    try:
        hash(made)
    except TypeError:
        return None
    return made


def _twins(
    sites: Sequence[SiteInfo], table: Mapping[tuple[str, str], tuple[Wrap, ...]]
) -> dict[str, str]:
    """Each block's path -> the path of the first that is like it, with the same rules inside."""
    inside: dict[str, dict[tuple[str, str], tuple[int, ...]]] = {
        site.path: {} for site in sites if site.kind == "block"
    }
    for (kind, path), wraps in table.items():
        for block in inside:
            if path == block or path.startswith(f"{block}."):
                inside[block][kind, path[len(block) :]] = tuple(map(id, wraps))
    first: dict[Hashable, str] = {}
    twins = {}
    for site in sites:
        if site.kind == "block":
            rules = frozenset(inside[site.path].items())
            key = site.path if site.like is None else (site.like, rules)
            twins[site.path] = first.setdefault(key, site.path)
    return twins


def _once_for_all_alike(around: Callable[[SiteFn], SiteFn], twins: Mapping[str, str]) -> Wrap:
    """A wrap that calls ``around`` on the first of several blocks that are alike, and takes what
    that gives for all of them: params and tensors are arguments, so they compute the same."""
    made: dict[str, SiteFn] = {}

    def wrap(f: SiteFn, path: str) -> SiteFn:
        path = twins[path]
        if path not in made:
            made[path] = around(f)
        return made[path]

    return wrap


def record_sites(
    build: Callable[[Site], Callable[[Tree, Any], Any]], params: Tree, batch: Any
) -> tuple[SiteInfo, ...]:
    """Every site that one call reaches, in order. Run it on the smallest tensors that there are:
    meta tensors compute their shapes in Python, 10 times as slow, and import Dynamo for that."""
    record: list[SiteInfo] = []
    build(Site({}, record=record))(params, batch)
    aliases = alias_table([site.path for site in record])
    return tuple(replace(site, aliases=aliases[site.path]) for site in dict.fromkeys(record))
