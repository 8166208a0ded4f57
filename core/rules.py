"""Rules: what transforms add to a forward, and the order in which they apply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from core.sites import WEIGHTED, SiteInfo
from params.tree import Tree

SiteFn = Callable[..., Any]
Wrap = Callable[[SiteFn, str], SiteFn]
Select = Sequence[str] | Callable[[SiteInfo], bool] | None

# The order of the rules at one site, innermost first. Rules of one stage stand as applied.
STAGES = (
    "kernel",  # replaces the site's function: the other rules see its inputs and its output
    "cast",  # casts params to the dtype they compute in: the rules outside see their own dtype
    "quantise",  # rounds or replaces a weight
    "call",  # anything else: a cache, a probe
    "adapt",  # adds to a linear's output what no other rule may round or replace
    "recompute",  # drops activations: everything inside runs again in backward
    "gather",  # fetches params: everything inside uses the fetched ones
    "outside",  # casts inputs and outputs to the dtypes that the code around the site expects
)


class Branch(NamedTuple):
    """A low-rank linear beside a linear of a group: ``y`` becomes ``join(y, x @ weight.T)``."""

    weight: Tensor  # [R, I]
    join: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Rule:
    """At each selected site of ``kind``, replaces the site's function ``f`` by ``wrap(f, path)``.

    Args:
        kind: a kind of site (``core.sites``), or ``gather``: every *outermost* site that owns
            params. Each leaf passes exactly one of those (a tied unembedding two), so that is the
            place to cast, unshard or load params.
        wrap: ``(f, path) -> f``. It must treat blocks of equal key alike: it may read what follows
            the block in a path, but not the block's number.
        select: path patterns, or a predicate of sites; None is every site of the kind.
        name: what ``explain`` calls it.
        stage: its place among the rules of one site, out of ``STAGES``.
        in_group: ``(p, path) -> (p, branch)``: the rule on a linear as a change of its params and
            perhaps a :class:`Branch`. A fused group then stays fused around the linear; a rule
            without it opens the group.
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
        """The calls that the rule meets at this site: the site itself, reads of its weight."""
        if self.applies(site):
            yield site.kind, site.path
        read = self.kind == "weight" or (self.kind == "gather" and site.outermost)
        if read and site.foreign and site.kind in WEIGHTED and self._selects(site):
            yield "weight", site.weight

    def _selects(self, site: SiteInfo) -> bool:
        if self.select is None or callable(self.select):
            return self.select is None or self.select(site)
        return any(site.matches(pattern) for pattern in self.select)
