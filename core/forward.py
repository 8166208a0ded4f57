"""The protocol: a forward is a pure function whose named calls (sites) accept rules.

A model is written as plain functions. Wherever a transform may want to step in (a linear layer, a
block, the output head, ...) the model makes the call through a :class:`Site`::

    y = site("linear", linear, p["down"], x, at="down")      # instead of linear(p["down"], x)

A :class:`Forward` holds the model and an immutable tuple of rules. A transform is a function from
Forward to Forward: it adds rules, prepares params, or finishes the output. ``core.sites`` lists the
kinds of site and their functions.

A rule of the pseudo-kind ``gather`` meets every *outermost* site that owns params: each leaf of
params passes exactly one of them (a tied unembedding passes two), so that is the place to cast,
unshard or load params.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import explain
from core.sites import KINDS, WEIGHTED, SiteInfo
from core.twins import once_for_all_alike
from params.paths import alias_table, no_match
from params.tree import Tree

SiteFn = Callable[..., Any]
Wrap = Callable[[SiteFn, str], SiteFn]
Select = Sequence[str] | Callable[[SiteInfo], bool] | None

# Where a rule stands among those of one site, innermost first. Within a stage: as applied.
STAGES = (
    "kernel",  # computes in place of the site's function: all others see its inputs and output
    "cast",  # params to the dtype they are used in: what is done to a weight is done in its own
    "quantise",  # rounds or replaces a weight
    "call",  # whatever else: a cache, a probe
    "adapt",  # adds to a linear what no other rule may round or replace
    "recompute",  # forgets what is inside
    "gather",  # fetches params: whatever is inside uses them as they are then
    "outside",  # the dtypes that code around the site expects
)


class Branch(NamedTuple):
    """A thin linear beside a linear of a group: ``y`` becomes ``join(y, x @ weight.T)``."""

    weight: Tensor  # [R, I]
    join: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Rule:
    """At each selected site of ``kind``, ``f`` becomes ``wrap(f, path)``; ``stage`` orders rules.

    Inside a block, ``wrap`` must do the same to every block of equal key: it may look at what
    follows the block in a path, not at its number.

    in_group: what the rule does to a linear where that can be said without the call: ``p`` becomes
    other params, and perhaps a :class:`Branch` joins. A group then stays fused around the linear.
    """

    kind: str
    wrap: Wrap
    select: Select = None
    name: str = "rule"
    stage: str = "call"
    in_group: Callable[[Tree, str], tuple[Tree, Branch | None]] | None = None

    def applies(self, site: SiteInfo) -> bool:
        kinds = self.kind == site.kind or (self.kind == "gather" and site.outermost)
        return kinds and self._selects(site)

    def keys(self, site: SiteInfo) -> Iterator[tuple[str, str]]:
        """Where calls meet the rule because of this site: at it, at reads of its weight."""
        if self.applies(site):
            yield site.kind, site.path
        read = self.kind == "weight" or (self.kind == "gather" and site.outermost)
        if read and site.foreign and site.kind in WEIGHTED and self._selects(site):
            yield "weight", site.weight

    def _selects(self, site: SiteInfo) -> bool:
        if self.select is None or callable(self.select):
            return self.select is None or self.select(site)
        return any(site.matches(pattern) for pattern in self.select)


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: Dynamo asks for a hash early
class Site:
    """A place in the model. Calling it makes one call, through the rules that match it.

    lazy: the head's Logits stay unevaluated, because a loss consumes them.
    """

    table: Mapping[tuple[str, str], tuple[Rule, ...]]
    path: str = ""
    lazy: bool = False

    def at(self, name: str) -> Site:
        """The same rules, one level deeper."""
        return replace(self, path=self._path(name))

    def bound(self, kind: str, path: str) -> bool:
        """Whether any rule matches here: only then need a foreign module be rewritten."""
        return (kind, path) in self.table

    def rules_at(self, kind: str, at: str) -> tuple[Rule, ...]:
        """The rules at a member of a group, innermost first."""
        return self.table.get((kind, self._path(at)), ())

    def open(self, kind: str, at: str) -> bool:
        """Whether a rule stands at this member of a group that has to be called there."""
        return any(rule.in_group is None for rule in self.rules_at(kind, at))

    def in_group(self, p: Tree, at: str) -> tuple[Tree, list[Branch]]:
        """What rules make of the params of a linear of a group that is not open, and what joins."""
        path, branches = self._path(at), []
        for rule in reversed(self.rules_at("linear", at)):
            p, branch = rule.in_group(p, path)  # type: ignore[misc]  # there, or it were open
            branches += [] if branch is None else [branch]
        return p, branches[::-1]

    def _path(self, at: str) -> str:
        return f"{self.path}.{at}" if self.path and at else self.path or at

    def __call__(
        self,
        kind: str,
        f: SiteFn,
        p: Tree,
        *args: Any,
        at: str = "",
        key: Hashable = None,
        members: tuple[tuple[str, str], ...] = (),
    ) -> Any:
        """``f(p, *args)`` under the rules. key, members: as in SiteInfo, paths relative."""
        path = self._path(at)
        for rule in self.table.get((kind, path), ()):
            f = rule.wrap(f, path)
        return f(p, *args)


@dataclass(frozen=True, eq=False)
class Recorder(Site):
    """A site without rules that writes down each call. Its groups call every member."""

    found: list[SiteInfo] = field(default_factory=list)

    def rules_at(self, kind: str, at: str) -> tuple[Rule, ...]:
        return (Rule(kind, lambda f, path: f),)

    def __call__(
        self,
        kind: str,
        f: SiteFn,
        p: Tree,
        *args: Any,
        at: str = "",
        key: Hashable = None,
        members: tuple[tuple[str, str], ...] = (),
    ) -> Any:
        path = self._path(at)
        inside = any(s.kind == "block" and path.startswith(f"{s.path}.") for s in self.found)
        paths = tuple((each, self._path(name)) for each, name in members)
        self.found.append(SiteInfo(kind, path, bool(p) and not inside, members=paths, key=key))
        return f(p, *args)


def record_sites(
    build: Callable[[Site], Callable[[Tree, Any], Any]], params: Tree, batch: Any
) -> tuple[SiteInfo, ...]:
    """Every site that one call reaches, in order. Run it on the smallest tensors that there are:
    meta tensors compute their shapes in Python, 10 times as slow, and import Dynamo for that."""
    recorder = Recorder({})
    build(recorder)(params, batch)
    aliases = alias_table([site.path for site in recorder.found])
    return tuple(replace(s, aliases=aliases[s.path]) for s in dict.fromkeys(recorder.found))


@dataclass(frozen=True, eq=False)
class Forward:
    """A pure function ``(params, batch) -> logits [N, V]`` (or loss) and the rules applied to it.

    ``build(site)`` gives the function with its sites bound; it runs once, here, not per call.
    ``sites`` lists what the function reaches, so that a rule that would do nothing raises now.
    ``around`` wraps the whole call, ``finish`` included, whatever is applied later (a compiler);
    ``around_block`` each block with all its rules, once for all blocks that are alike.

    Of a foreign module: ``frozen``, paths of params that did not require gradients there;
    ``buffers``, what it keeps beside params; ``aux``, whether a call returns them too, ``(out,
    buffers)``; ``modes``, whether its layers are in training mode; ``remade``, which makes the bare
    forward of the module changed by a function; ``unfound``, what is no site.
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
        table: dict[tuple[str, str], tuple[Rule, ...]] = {}
        for rule in self.rules:
            # several layers that share a weight are one place: a rule meets it once
            for key in dict.fromkeys(key for site in self.sites for key in rule.keys(site)):
                table[key] = (*table.get(key, ()), rule)
        if self.around_block is not None:
            rule = Rule("block", once_for_all_alike(self.around_block, self.sites, table))
            for path in dict.fromkeys(site.path for site in self.sites if site.kind == "block"):
                table["block", path] = (*table.get(("block", path), ()), rule)
        run = self.build(Site(table, lazy=self.finish is not None and not self.dense))
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

    def with_rule(self, rule: Rule) -> Forward:
        """Adds a rule, outside those of its stage. Raises ValueError, listing what there is, if it
        would match nothing."""
        if rule.kind not in (*KINDS, "gather"):
            raise ValueError(f"no site has kind {rule.kind!r}; kinds: {', '.join(KINDS)}, gather")
        if rule.stage not in STAGES:
            raise ValueError(f"no stage is {rule.stage!r}; stages: {', '.join(STAGES)}")
        if not any(True for site in self.sites for _ in rule.keys(site)):
            if rule.kind == "block" and not any(s.kind == "block" for s in self.sites):
                raise ValueError(
                    f"{rule.name}: this forward has no block: "
                    "from_module(..., blocks=('path.of.one',)) says which modules are blocks"
                )
            have = sorted({f"{s.kind} {s.path}" for s in self.sites})
            named = () if rule.select is None or callable(rule.select) else rule.select
            raise no_match(" ".join((rule.kind, *named)), have, what="sites")
        rules = sorted((*self.rules, rule), key=lambda r: STAGES.index(r.stage))
        return replace(self, rules=tuple(rules))

    def with_step(self, name: str, **changes: Any) -> Forward:
        """Records the transform's name, and whatever other fields it changes."""
        return replace(self, applied=(*self.applied, name), **changes)

    @property
    def constant(self) -> frozenset[str]:
        """Paths of leaves that get no gradient: frozen ones, and buffers."""
        return self.frozen | self.buffers.keys()

    def with_mode(self, training: bool) -> Forward:
        """The same with a foreign module's layers in training mode, or not; a native forward has no
        mode. What is no site in the other mode (a gated MLP with dropout) meets no rule there."""
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
        """A table of every site: kind, path, shapes of its params, and the rules that apply; for a
        group, whether it is fused. Below it, what in a foreign module looked like a site and is
        none, with the reason."""
        return explain.table(self.sites, self.rules, self.applied, self.unfound, params)
