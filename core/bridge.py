"""Both ways between a Forward and torch.nn.Module, through ``torch.func.functional_call``.

``from_module`` works on a *private* copy of the module tree: parameters on the meta device, real
buffers. Repeated blocks, linears, embeddings, norms and the output head of the copy are replaced by
wrappers that keep every name and route the call through a site, with the params as explicit
arguments. So whatever recomputes a block (checkpointing) uses the weights it was given, which
``torch.utils.checkpoint`` around a module inside ``functional_call`` does not. Gated MLPs and
attention own no params: theirs are calls inside a ``forward``, rewritten where a rule is bound.
The user's own module is never changed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, reduce
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from core.forward import Forward, Site, SiteInfo
from core.found import Found, find_sites
from core.gated import Gated, product
from core.layers import Logits, embed, head, linear, weight_of
from core.probes import put, skeleton
from core.reroute import reroute
from params.int8 import is_scale
from params.paths import alias_table
from params.tree import Tree, flatten, unflatten

Call = Callable[[Callable[..., Any], Any], Any]
# leaves that transforms put beside a weight or in its place
ADDED = ("weight_int8", "weight_scale", "lora_a", "lora_b")


def from_module(
    module: nn.Module, *, call: Call | None = None, head: str | None = None
) -> tuple[Forward, Tree]:
    """Any ``nn.Module`` as ``(forward, params)``; ``forward(params, batch)`` equals the module.

    call: ``call(run, batch)`` turns a batch, in the module's own form, into
    ``run(*args, **kwargs)`` and its result into logits. The default passes the entries of
    ``batch`` that the module's signature names (``labels`` never; ``use_cache=False`` where it is
    a parameter, because a cache that outlives the call is not pure) and returns ``.logits``, or
    the output itself.
    head: the path of the output head. The default asks ``module.get_output_embeddings()``
    (Hugging Face); without either there is no head site, and ``fuse_loss`` says so.

    params share memory with the module's parameters. A tied parameter appears once, under its first
    name. Sites are found by what modules do, on made-up numbers; a gated MLP that drops out while
    training is none. A layer with hooks or a patched ``forward`` is left as it is: no site, but the
    same numbers (hooks of a block or of attention stay around its site). Raises ValueError if
    ``head`` names no linear layer.
    """
    if isinstance(module, _TreeModule):
        return module.forward_fn, module.params()
    head = _find_head(module, head)
    params = unflatten({name: p.detach() for name, p in module.named_parameters()})
    names = {id(p): name.rpartition(".")[0] for name, p in reversed([*module.named_parameters()])}
    plan = list(find_sites(module, head, names))
    aliases = alias_table([found.site.path for found in plan])
    sites = tuple(replace(f.site, aliases=aliases[f.site.path]) for f in plan)
    same, ties = _same_modules(module), _ties(module)
    caller = call or partial(_default_call, frozenset(inspect.signature(module.forward).parameters))
    blank = _without_cache(skeleton(module))
    needed = sorted(_needed(module, plan, ties))
    known = {*needed, *ties, *dict(module.named_parameters()), *dict(module.named_buffers())}

    def build(site: Site) -> Callable[[Tree, Any], Any]:
        body = _wrap(blank, plan, same, site)

        def run(params: Tree, batch: Any) -> Any:
            flat = flatten(params)
            if lacking := [name for name in needed if name not in flat]:
                raise ValueError(f"params lack {lacking[:4]}, which the module has")
            others = [name for name in flat if name not in known]
            if strange := [name for name in others if name.rpartition(".")[2] not in ADDED]:
                raise ValueError(f"params hold {strange[:4]}, for which the module has no place")
            flat |= {name: flat[held] for name, held in ties.items() if held in flat}
            return caller(lambda *args, **kwargs: _given(body, flat, args, kwargs), batch)

        return run

    return Forward(build, sites), params


def as_module(forward: Forward, params: Tree) -> nn.Module:
    """A module whose ``module(batch)`` is ``forward(params, batch)``.

    Its state-dict names are the dotted paths of ``params``; floating-point leaves become parameters
    (sharing memory), others buffers, as do the scales of quantised weights. It works with
    ``torch.optim``, ``.to``, ``state_dict`` and ``functional_call(module, flat_params, (batch,))``,
    and ``from_module`` gives the same forward back.
    """
    root = _TreeModule(params)
    root.forward_fn = forward
    return root


class _TreeModule(nn.Module):
    """A pytree of tensors held as a tree of modules."""

    forward_fn: Forward

    def __init__(self, tree: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in tree.items():
            if isinstance(value, Mapping):
                self.add_module(name, _TreeModule(value))
            elif value.is_floating_point() and not is_scale(name, tree):
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def params(self) -> Tree:
        """The leaves that are in place now: under ``functional_call``, the ones it was given."""
        own: Tree = {**self._parameters, **self._buffers}
        return own | {k: m.params() for k, m in self._modules.items() if isinstance(m, _TreeModule)}

    def forward(self, batch: Any) -> Any:
        return self.forward_fn(self.params(), batch)


# -- from_module: sites in the private copy -----------------------------------------------------


def _find_head(module: nn.Module, path: str | None) -> str | None:
    modules = dict(module.named_modules())
    if path is None:
        getter = getattr(module, "get_output_embeddings", None)
        found = None if getter is None else getter()
        path = next((name for name, m in modules.items() if m is found), None)
        return path if path is not None and isinstance(found, nn.Linear) else None
    if not isinstance(modules.get(path), nn.Linear):
        linears = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
        raise ValueError(f"head={path!r} names no linear layer; linear layers: {linears[-8:]}")
    return path


def _without_cache(body: nn.Module) -> nn.Module:
    """A copy's configs say no cache: one that grows when a block is recomputed is not pure."""
    for m in body.modules():
        config = getattr(m, "config", None)
        if config is not None and hasattr(config, "use_cache"):
            config.use_cache = False
    return body


def _same_modules(module: nn.Module) -> dict[str, list[str]]:
    """The first name of every module -> all its names: a shared layer has several."""
    names: dict[int, list[str]] = {}
    for name, m in module.named_modules(remove_duplicate=False):
        names.setdefault(id(m), []).append(name)
    return {first: [first, *others] for first, *others in names.values()}


def _ties(module: nn.Module) -> dict[str, str]:
    """Name of a tied parameter -> the name that params hold it under."""
    held: dict[int, str] = {}
    ties = {}
    for prefix, m in module.named_modules():
        for leaf, p in m._parameters.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if p is not None and (first := held.setdefault(id(p), name)) != name:
                ties[name] = first
    return ties


def _needed(module: nn.Module, plan: list[Found], ties: Mapping[str, str]) -> set[str]:
    """Leaves that a call cannot do without: all but the weights of sites.

    A site says itself what it misses, and a transform may have replaced its weight.
    """
    sites = {f"{f.name}.weight" for f in plan if f.site.kind in ("linear", "norm", "embed", "head")}
    names = (
        f"{prefix}.{leaf}" if prefix else leaf
        for prefix, m in module.named_modules()
        for leaf, p in m._parameters.items()
        if p is not None and f"{prefix}.{leaf}" not in sites
    )
    return {ties.get(name, name) for name in names}


def _given(module: nn.Module, flat: Tree, args: Any, kwargs: Any) -> Any:
    """``functional_call``, which would leave the tensors in a layer that has two names."""
    return functional_call(module, flat, args, kwargs, tie_weights=False)


def _wrap(
    blank: nn.Module, plan: list[Found], same: Mapping[str, list[str]], site: Site
) -> nn.Module:
    """A copy of ``blank`` whose calls go through sites."""
    body = copy.deepcopy(blank)
    for found in reversed(plan):  # inner ones first, so that an outer one holds the wrapped
        name, info = found.name, found.site
        module = body.get_submodule(name)
        if info.kind in ("glu", "attention"):
            if not site.bound(info.kind, info.path):
                continue
            if found.gated is None:
                _rewrite_attention(module, site, info.path)
            else:
                plain = copy.deepcopy(blank.get_submodule(name))
                _rewrite_glu(module, plain, found.gated, site, info.path)
            continue
        wrapper = _AtSite(module, site, info)
        if not name:
            body = wrapper
        for each in filter(None, same[name]):
            put(body, each, wrapper)
    for found in plan:
        if found.site.kind in ("linear", "norm", "embed", "head") and found.site.path != found.name:
            owner = body.get_submodule(found.site.path)
            owner._parameters.update(dict.fromkeys(ADDED))
            vars(body.get_submodule(found.name))["owner"] = owner
    for at_site in body.modules():
        if type(at_site) is _AtSite:
            vars(at_site)["places"] = [
                (f"{prefix}." if prefix else "", m, vars(m).get("owner"))
                for prefix, m in at_site.named_modules()
            ]
    return body


def _rewrite_attention(module: nn.Module, site: Site, path: str) -> None:
    """Sends a module's calls of ``F.scaled_dot_product_attention`` through the site."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **others: Any,
    ) -> Any:
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, **others}
        return site("attention", _attend, {}, query, key, value, options, at=path)

    for name, method in reroute(module, attention).items():
        vars(module)[name] = MethodType(method, module)


def _attend(p: Tree, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


def _rewrite_glu(module: nn.Module, plain: nn.Module, gated: Gated, site: Site, path: str) -> None:
    """Sends what a gated MLP does between its linears through the site; ``plain``: a copy of it."""
    compute = product(plain, gated)

    def between(p: Tree, gate: Tensor, up: Tensor) -> Tensor:
        return compute(gate, up)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        (x,) = (*args, *kwargs.values())
        gate, up = gated.split([self.get_submodule(name)(x) for name in gated.into])
        h = site("glu", between, {}, gate, up, at=path)
        return self.get_submodule(gated.down)(h)

    vars(module)["forward"] = MethodType(forward, module)


class _AtSite(nn.Module):
    """Stands where a module stood, under its name, and makes its call through a site."""

    def __init__(self, inner: nn.Module, site: Site, info: SiteInfo) -> None:
        super().__init__()
        # owner: where params hold a tied weight, and whatever a transform put in its place
        # places: prefix, module and owner of all that is inside, so that a call need not walk
        self.__dict__.update(inner=inner, site=site, info=info, owner=None, places=[])
        self._parameters = inner._parameters
        if info.kind in ("linear", "embed", "head"):
            # places for functional_call to put them: as plain attributes they would have to be
            # searched for at every call, which costs time and which torch.compile cannot follow
            self._parameters.update(dict.fromkeys(ADDED))
        self._buffers = inner._buffers
        self._modules = inner._modules
        self.training = inner.training
        self._is_full_backward_hook = inner._is_full_backward_hook
        for name, hooks in vars(inner).items():
            if "_hooks" in name and isinstance(hooks, dict):
                # around the site, not inside: a block that is recomputed calls them once
                vars(self)[name], vars(inner)[name] = hooks, type(hooks)()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # foreign code may look for its layers by isinstance
        return type(self.__dict__["inner"])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what model code reads off a layer: .weight, .attention_type, ...
            return getattr(self.__dict__["inner"], name)

    def own_params(self) -> dict[str, Tensor]:
        """The leaves in place now, given ones only: what params lack is still on meta."""
        flat = {}
        for prefix, m, owner in self.places:
            for name, tensor in m._parameters.items():
                if tensor is not None and not tensor.is_meta:
                    flat[prefix + name] = tensor
            if owner is not None:
                for name in ADDED:
                    if (added := owner._parameters[name]) is not None:
                        flat[prefix + name] = added
        return flat

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kind, path = self.info.kind, self.info.path
        p = self.own_params()
        if kind == "block":
            named = "" if args else next(iter(kwargs))  # x, where it is given by name
            x, *rest = args or (kwargs.pop(named),)
            call = partial(self._call, named=named)
            return self.site("block", call, unflatten(p), x, tuple(rest), kwargs, at=path)
        (x,) = (*args, *kwargs.values())
        if kind == "head":
            out = self.site("head", head, p, x, at=path)
            return out if self.site.lazy else out.dense()
        out = self.site(kind, self._function(), _turned(p, self.info), x, at=path)
        if self.info.scale is None:
            return out
        return out * torch.full((), self.info.scale, dtype=out.dtype, device=out.device)

    def _function(self) -> Callable[..., Any]:
        if self.info.kind == "embed":
            return partial(embed, padding_idx=getattr(self.inner, "padding_idx", None))
        if self.info.kind == "norm":
            torchs = (
                isinstance(self.inner, nn.LayerNorm | nn.RMSNorm) and self.inner.eps is not None
            )
            return self._torch_norm if torchs else self._call
        return linear if type(self.inner) is nn.Linear else self._linear

    def _linear(self, p: Tree, x: Tensor) -> Tensor:
        """A linear that is no nn.Linear, with the weight ``[O, I]``, in the weight's dtype."""
        weight = weight_of(p)
        p = {name: leaf.to(weight.dtype) for name, leaf in p.items()}
        return self._call(_turned(p, self.info), x.to(weight.dtype))

    def _torch_norm(self, p: Tree, x: Tensor) -> Tensor:
        """torch's norms want x and weights of one dtype; others are normed in the wider, as x's.

        Where torch takes them as they are (bf16 and fp32 on a CPU), this is the same to the bit.
        """
        if all(leaf.dtype == x.dtype for leaf in p.values()):
            return self._call(p, x)
        wide = reduce(torch.promote_types, (leaf.dtype for leaf in p.values()), x.dtype)
        return self._call({k: v.to(wide) for k, v in p.items()}, x.to(wide)).to(x.dtype)

    def _call(
        self,
        p: Tree,
        x: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        named: str = "",
    ) -> Any:
        kwargs = dict(kwargs or {})
        if named:
            return _given(self.inner, flatten(p), args, {named: x, **kwargs})
        return _given(self.inner, flatten(p), (x, *args), kwargs)


def _turned(p: dict[str, Tensor], site: SiteInfo) -> dict[str, Tensor]:
    """A transposed linear's leaves with ``weight`` the other way round."""
    if not site.transposed or "weight" not in p:
        return p
    return {**p, "weight": p["weight"].t()}


def _default_call(names: frozenset[str], run: Callable[..., Any], batch: Mapping[str, Any]) -> Any:
    kwargs = {k: v for k, v in batch.items() if k in names and k != "labels"}
    if not kwargs:
        raise ValueError(
            f"the batch has {sorted(batch)}, none of which the module's forward takes "
            f"({sorted(names)}): rename them, or pass call="
        )
    if "use_cache" in names:
        kwargs.setdefault("use_cache", False)
    out = run(**kwargs)
    return out if isinstance(out, Tensor | Logits) else out.logits
