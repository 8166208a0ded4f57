"""The protocol: a forward is a pure function whose named calls (sites) accept rules.

A model is written as plain functions. Wherever a transform may want to step in (a linear layer, a
block, the output head, ...) the model makes the call through a :class:`Site`::

    y = site("linear", linear, p["down"], x, at="down")      # instead of linear(p["down"], x)

A :class:`Forward` holds the model and an immutable tuple of rules (``core.rules``). A transform is
a function from Forward to Forward: it adds rules, prepares params, or finishes the output.
``core.sites`` lists the kinds of site and their functions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from core import explain
from core.rules import STAGES, Branch, Rule, Select, SiteFn
from core.sites import KINDS, SiteInfo
from core.twins import once_for_all_alike
from params.paths import alias_table, no_match
from params.tree import Tree


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: Dynamo asks for a hash early
class Site:
    """A place in the model. Calling it calls a function through the rules that match there.

    table: the rules at each ``(kind, path)``, innermost first.
    lazy: the head's ``Logits`` stay unevaluated, since a loss consumes them.
    """

    table: Mapping[tuple[str, str], tuple[Rule, ...]]
    path: str = ""
    lazy: bool = False

    def at(self, name: str) -> Site:
        """The same rules, one level deeper."""
        return replace(self, path=self._path(name))

    def bound(self, kind: str, path: str) -> bool:
        """Whether any rule matches here. A foreign module is rewritten only where one does."""
        return (kind, path) in self.table

    def rules_at(self, kind: str, at: str) -> tuple[Rule, ...]:
        """The rules at a member of a group, innermost first."""
        return self.table.get((kind, self._path(at)), ())

    def open(self, kind: str, at: str) -> bool:
        """Whether a rule opens the group here: it has to be called at this member."""
        return any(rule.in_group is None for rule in self.rules_at(kind, at))

    def in_group(self, p: Tree, at: str) -> tuple[Tree, list[Branch]]:
        """The params of a linear of a closed group after its rules, and the branches they add."""
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
    """A site that records each call. Every group is open, so that its members are recorded."""

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
    """Every site that one call reaches, in order. Small CPU tensors are faster than meta tensors,
    whose shapes are computed in Python."""
    recorder = Recorder({})
    build(recorder)(params, batch)
    aliases = alias_table([site.path for site in recorder.found])
    return tuple(replace(s, aliases=aliases[s.path]) for s in dict.fromkeys(recorder.found))


@dataclass(frozen=True, eq=False)
class ModuleState:
    """What ``from_module`` knows of a module beside its function. A native forward has none of it.

    frozen: paths of params that did not require gradients.
    buffers: the module's buffers, by path.
    aux: a call returns ``(out, buffers)``.
    modes: the values of ``training`` among its layers.
    remade: makes the bare forward of the module after a change to it.
    unfound: what looks like a site and is none, a line each, for ``explain``.
    """

    frozen: frozenset[str] = frozenset()
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    aux: bool = False
    modes: frozenset[bool] = frozenset()
    remade: Callable[[Callable[[Any], Any]], Forward] | None = None
    unfound: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Forward:
    """A pure function ``(params, batch) -> logits [N, V]`` (or a loss) and the rules applied to it.

    build: ``site -> function``, with its sites bound. It runs once, here, not per call.
    sites: what the function reaches, so that a rule that would match nothing raises now.
    preparations: what transforms do to params beforehand, innermost first.
    finish: ``(logits, batch) -> out``, after the function.
    around: wraps the whole call, ``finish`` included (a compiler).
    around_block: wraps each block with all its rules, once for all equal blocks.
    dense: ``finish`` takes logits as a tensor, not lazy ones.
    applied: names of the transforms, innermost first.
    module: of a foreign module.
    """

    build: Callable[[Site], Callable[[Tree, Any], Any]]
    sites: tuple[SiteInfo, ...]
    rules: tuple[Rule, ...] = ()
    preparations: tuple[Callable[[Tree, int], Tree], ...] = ()
    finish: Callable[[Any, Any], Any] | None = None
    around: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    around_block: Callable[[SiteFn], SiteFn] | None = None
    dense: bool = False
    applied: tuple[str, ...] = ()
    module: ModuleState = ModuleState()

    def __post_init__(self) -> None:
        table: dict[tuple[str, str], tuple[Rule, ...]] = {}
        for rule in self.rules:
            # layers that share a weight are one place, which a rule meets once
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
            if not self.module.aux:
                return out if finish is None else finish(out, batch)
            out, aux = out
            return (out if finish is None else finish(out, batch)), aux

        object.__setattr__(self, "_call", call if self.around is None else self.around(call))

    def __call__(self, params: Tree, batch: Any) -> Any:
        return self._call(params, batch)  # type: ignore[attr-defined]

    def select(self, kinds: Sequence[str], patterns: Select = None) -> tuple[SiteInfo, ...]:
        """The sites of these kinds that match. Raises ValueError for a pattern without a site."""
        found = tuple(s for s in self.sites if s.kind in kinds)
        if patterns is None or callable(patterns):
            return tuple(s for s in found if patterns is None or patterns(s))
        for pattern in patterns:
            if not any(site.matches(pattern) for site in self.sites):
                heads = ["lm_head"] if any(s.kind == "head" for s in self.sites) else []
                raise no_match(pattern, [s.path for s in self.sites] + heads, what="sites")
        return tuple(s for s in found if any(s.matches(pattern) for pattern in patterns))

    def with_rule(self, rule: Rule) -> Forward:
        """Adds a rule, outside the earlier ones of its stage. Raises ValueError for an unknown kind
        or stage and, listing the sites, for a rule that matches none."""
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
        """Records a transform's name, and changes other fields."""
        return replace(self, applied=(*self.applied, name), **changes)

    @property
    def constant(self) -> frozenset[str]:
        """Paths of leaves without gradients: frozen params and buffers of a foreign module."""
        return self.module.frozen | self.module.buffers.keys()

    def with_mode(self, training: bool) -> Forward:
        """The same with a foreign module's layers in training mode, or not. A site that only the
        other mode has (a gated MLP with dropout) meets no rule. A native forward has no mode."""
        if self.module.remade is None or self.module.modes == {training}:
            return self
        bare = self.module.remade(lambda module: module.train(training))
        state = replace(self.module, modes=bare.module.modes, unfound=bare.module.unfound)
        return replace(self, build=bare.build, sites=bare.sites, module=state)

    def prepare(self, params: Tree, seed: int = 0) -> Tree:
        """The params that this forward takes: every transform's preparation, innermost first."""
        for preparation in self.preparations:
            params = preparation(params, seed)
        return params

    def explain(self, params: Tree | None = None) -> str:
        """A table of the sites and their rules, of open groups, and of what is no site, and why."""
        return explain.table(self.sites, self.rules, self.applied, self.module.unfound, params)
