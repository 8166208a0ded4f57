"""Norms and gated MLPs of a module of someone else's, on this library's kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

import kernels
from core.forward import Forward, NormForm, Rule, SiteInfo
from params.tree import Tree
from transforms.legal import check_legal

GLUS: dict[str | None, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": kernels.swiglu,
    "gelu_tanh": kernels.geglu,  # gelu by its error function has no kernel
}


def fuse_kernels(forward: Forward, *, skip: Sequence[str] = ()) -> Forward:
    """The same numbers, up to rounding, with one kernel for a norm and for ``act(gate) * up``.

    It goes inside whatever else is done at those sites, applied before or after. Attention stays as
    it is: torch's ``scaled_dot_product_attention`` is a flash attention already. The forwards of
    ``core.vlm`` call the kernels anyway: theirs is returned with the step on record.

    skip: path patterns of sites to leave alone. A norm or glu of unknown form is left alone too,
    with a warning that names it. Raises ValueError if a pattern names nothing, or if a module of
    someone else's has nothing to fuse.
    """
    check_legal(forward, "fuse_kernels")
    skipped = set(forward.select(("norm", "glu"), tuple(skip)))
    sites = [s for s in forward.sites if s.foreign and s.kind in ("norm", "glu")]
    wanted = [s for s in sites if s not in skipped]
    table = _replacements(wanted)
    if not table and any(s.foreign for s in forward.sites):
        have = ", ".join(sorted({f"{s.kind} {s.path}" for s in forward.sites})[:20])
        raise ValueError(f"fuse_kernels finds no norm or glu that it knows to fuse, among: {have}")
    if left := sorted({f"{s.kind} {s.path}" for s in wanted if (s.kind, s.path) not in table}):
        warnings.warn(f"fuse_kernels leaves as they are: {', '.join(left)}", stacklevel=2)

    def wrap(kind: str, f: Callable[..., Any], path: str) -> Callable[..., Any]:
        return table[kind, path]

    def chosen(site: SiteInfo) -> bool:
        return (site.kind, site.path) in table

    for kind in sorted({kind for kind, _ in table}):
        rule = Rule(kind, partial(wrap, kind), chosen, "fuse_kernels")
        forward = forward.with_rule(rule, innermost=True)
    return forward.with_step("fuse_kernels")


def _replacements(sites: Sequence[SiteInfo]) -> dict[tuple[str, str], Callable[..., Any]]:
    """What to call at each site that has a kernel."""
    table: dict[tuple[str, str], Callable[..., Any]] = {}
    for site in sites:
        key = (site.kind, site.path)
        if site.kind == "glu" and site.activation in GLUS:
            table[key] = partial(_glu, GLUS[site.activation])
        # layers that share a weight have one path: fused if they are alike in all else
        alike = {s.norm for s in sites if (s.kind, s.path) == key} == {site.norm}
        if site.norm is not None and alike:
            table[key] = partial(_norm, site.norm)
    return table


def _glu(kernel: Callable[[Tensor, Tensor], Tensor], p: Tree, gate: Tensor, up: Tensor) -> Tensor:
    return kernel(gate, up)


def _norm(form: NormForm, p: Tree, x: Tensor) -> Tensor:
    weight = p[form.weight]
    if form.offset:
        # in fp32: bf16 has no room for a small weight beside 1
        weight = form.offset + (weight if weight.itemsize >= 4 else weight.float())
    if form.kind == "rms":
        out = kernels.rms_norm(x, weight, form.eps)
        return out if form.bias is None else out + p[form.bias]
    return kernels.layer_norm(x, weight, None if form.bias is None else p[form.bias], form.eps)
