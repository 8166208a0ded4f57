"""Both ways between a Forward and torch.nn.Module, through ``torch.func.functional_call``.

``from_module`` works on a *private* copy of the module tree: parameters on the meta device, real
buffers. Repeated blocks, linears, embeddings, norms and the output head of the copy are replaced by
wrappers that keep every name and route the call through a site, with the params as explicit
arguments. So whatever recomputes a block (checkpointing) uses the weights it was given, which
``torch.utils.checkpoint`` around a module inside ``functional_call`` does not. The user's own
module is never changed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from core.forward import Forward, Site, SiteInfo
from core.layers import Logits, embed, head, linear
from params.int8 import is_scale
from params.paths import alias_table
from params.tree import Tree, flatten, unflatten

Call = Callable[[Callable[..., Any], Any], Any]


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
    name. A layer with hooks or a patched ``forward`` is left as it is: no site, but the same
    numbers. Raises ValueError if ``head`` names no linear layer.
    """
    if isinstance(module, _TreeModule):
        return module.forward_fn, module.params()
    head = _find_head(module, head)
    params = unflatten({name: p.detach() for name, p in module.named_parameters()})
    names = {id(p): name.rpartition(".")[0] for name, p in reversed([*module.named_parameters()])}
    plan = list(_plan(module, head, names))
    aliases = alias_table([site.path for _, site in plan])
    sites = tuple(replace(site, aliases=aliases[site.path]) for _, site in plan)
    caller = call or partial(_default_call, frozenset(inspect.signature(module.forward).parameters))
    blank = _skeleton(module)
    # a site says itself what it misses; a transform may have replaced its weight
    needed = set(flatten(params)) - {f"{site.path}.weight" for site in sites}

    def build(site: Site) -> Callable[[Tree, Any], Any]:
        body = _wrap(copy.deepcopy(blank), plan, site)

        def run(params: Tree, batch: Any) -> Any:
            flat = flatten(params)
            if lacking := sorted(needed - flat.keys()):
                raise ValueError(f"params lack {lacking[:4]}, which the module has")
            return caller(lambda *args, **kwargs: functional_call(body, flat, args, kwargs), batch)

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


# -- from_module: what is where ---------------------------------------------------------------


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


def _plan(
    module: nn.Module, head: str | None, names: Mapping[int, str]
) -> Iterator[tuple[str, SiteInfo]]:
    """(module name, site) for every module that gets a wrapper, outer ones first."""
    blocks: list[str] = []
    for name, m in module.named_modules():
        inner = any(name.startswith(f"{block}.") for block in blocks)
        # tied weights: where params hold them (reading a parametrized one would compute it)
        path = names.get(id(m._parameters.get("weight")), name)
        if (
            isinstance(m, nn.ModuleList)
            and len(m) > 1
            and len({type(c) for c in m}) == 1
            and not inner
        ):
            blocks += [f"{name}.{i}" for i in range(len(m))]
        elif name in blocks:
            yield name, SiteInfo("block", name, outermost=True)
        elif not _is_plain(m):
            continue
        elif name == head:
            yield name, SiteInfo("head", path, outermost=not inner)
        elif type(m) is nn.Linear:
            yield name, SiteInfo("linear", path, outermost=not inner)
        elif type(m) is nn.Embedding and not (m.max_norm or m.sparse or m.scale_grad_by_freq):
            yield name, SiteInfo("embed", path, outermost=not inner)
        elif _is_norm(m):
            yield name, SiteInfo("norm", path, outermost=not inner)


def _is_plain(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's ``forward``: no hooks, nothing patched in."""
    state = vars(module)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in state and not any(state[name] for name in hooks)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module normalises its last dim: it has vectors only, and is blind to scale."""
    params = list(module.parameters())
    holds_more = [*module.children(), *module.buffers()]
    if not 1 <= len(params) <= 2 or any(p.ndim != 1 for p in params) or holds_more:
        return False
    probe = {name: torch.ones(p.shape) for name, p in module.named_parameters()}
    x = torch.linspace(-1, 2, 2 * params[0].shape[0]).reshape(1, 2, -1)
    body = copy.deepcopy(module)  # a forward may count its calls
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            small, large = (functional_call(body, probe, (x * c,)) for c in (8.0, 64.0))
        except Exception:  # foreign code, given what it may not take: any error means no norm
            return False
    return (
        isinstance(small, Tensor)
        and small.shape == x.shape
        and torch.allclose(small, large, atol=1e-3)
    )


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy of the module tree with parameters on the meta device: it costs no memory."""
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


def _wrap(body: nn.Module, plan: list[tuple[str, SiteInfo]], site: Site) -> nn.Module:
    for name, info in reversed(plan):  # inner ones first, so that an outer one holds the wrapped
        parent, _, leaf = name.rpartition(".")
        owner = body.get_submodule(parent)
        setattr(owner, leaf, _AtSite(owner.get_submodule(leaf), site, info))
    for name, info in plan:
        if info.kind != "block" and info.path != name:
            vars(body.get_submodule(name))["owner"] = body.get_submodule(info.path)
    return body


class _AtSite(nn.Module):
    """Stands where a module stood, under its name, and makes its call through a site."""

    def __init__(self, inner: nn.Module, site: Site, info: SiteInfo) -> None:
        super().__init__()
        # owner: where params hold a tied weight, and whatever a transform put in its place
        self.__dict__.update(inner=inner, site=site, info=info, owner=None)
        self._parameters = inner._parameters
        self._buffers = inner._buffers
        self._modules = inner._modules
        self.training = inner.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what model code reads off a layer: .weight, .attention_type, ...
            return getattr(self.__dict__["inner"], name)

    def own_params(self) -> dict[str, Tensor]:
        """The leaves in place now, given ones only: what params lack is still on meta."""
        flat = {}
        for prefix, m in self.named_modules():
            places = (vars(m).get("owner"), m) if isinstance(m, _AtSite) else (m,)
            given = {k: v for place in places if place is not None for k, v in vars(place).items()}
            extra = {k: v for k, v in given.items() if isinstance(v, Tensor)}
            for name, tensor in (*m._parameters.items(), *extra.items()):
                if tensor is not None and not (name in m._parameters and tensor.is_meta):
                    flat[f"{prefix}.{name}" if prefix else name] = tensor
        return flat

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kind, path = self.info.kind, self.info.path
        p = self.own_params()
        if kind == "head":
            out = self.site("head", head, p, *args, at=path)
            return out if self.site.lazy else out.dense()
        if kind == "linear":
            return self.site("linear", linear, p, *args, at=path)
        if kind == "embed":
            look_up = partial(embed, padding_idx=self.inner.padding_idx)
            return self.site("embed", look_up, p, *args, at=path)
        if kind == "norm":
            return self.site("norm", self._call, p, *args, at=path)
        x, *rest = args
        return self.site("block", self._call, unflatten(p), x, tuple(rest), kwargs, at=path)

    def _call(
        self, p: Tree, x: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return functional_call(self.inner, flatten(p), (x, *args), kwargs or {})


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
