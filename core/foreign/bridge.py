"""Both ways between a Forward and torch.nn.Module, through ``torch.func.functional_call``.

``from_module`` works on a *private* copy of the module tree: parameters on the meta device, real
buffers. Repeated blocks, linears, embeddings, norms and the output head of the copy are replaced by
wrappers (at_site.py) that keep every name and route the call through a site, with the params as
explicit arguments. So whatever recomputes a block (checkpointing) uses the weights it was given,
which ``torch.utils.checkpoint`` around a module inside ``functional_call`` does not. Gated MLPs and
attention own no params: theirs are calls inside a ``forward``, rewritten where a rule is bound. And
a matrix that model code reads itself is put through its site before that code runs.
The user's own module is never changed.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.foreign.at_site import (
    Read,
    SiteWrapper,
    at_site,
    given,
    hand_out_parameters,
    leave_fast_paths,
    place_of,
    rewrite_calls,
    rewrite_glu,
)
from core.foreign.found import Found, find_sites, inside
from core.foreign.probes import copied, put, redirect, skeleton
from core.foreign.reroute import written
from core.foreign.watch import ModuleMemory, Watch
from core.forward import Forward, ModuleState, Site
from core.model.layers import Logits
from core.sites import WEIGHTED
from params.formats import FORMATS, added, beside, is_scale
from params.paths import alias_table
from params.tree import Tree, flatten, unflatten

Call = Callable[[Callable[..., Any], Any], Any]


def from_module(
    module: nn.Module,
    *,
    call: Call | None = None,
    head: str | None = None,
    blocks: Sequence[str] | None = None,
    buffers: bool = False,
) -> tuple[Forward, Tree]:
    """Turns any ``nn.Module`` into ``(forward, params)``, with ``forward(params, batch)`` equal to
    the module's output. The module itself is never changed.

    Args:
        module: the module. Its layers keep the mode, training or not, that they are in now;
            ``forward.with_mode(False)`` is the forward in the other.
        call: ``(run, batch) -> logits``: calls ``run(*args, **kwargs)`` on a batch of any form. The
            default passes the entries of ``batch`` by name, all of which the module's signature
            must have (never ``labels``; ``use_cache=False`` where it is a parameter, since a cache
            that outlives the call is not pure), and returns ``.logits``, or the output itself.
            Several documents are given to Hugging Face's models as ``position_ids`` that restart,
            without a mask.
        head: path of the output head. Default: ``module.get_output_embeddings()`` (Hugging Face).
            Without either there is no head site, and ``fuse_loss`` says so.
        blocks: path patterns of the modules that are blocks; ``()`` for none. Default: the members
            of lists of layers.
        buffers: params hold the module's buffers too (running statistics), and
            ``forward(params, batch)`` returns ``(out, buffers)``, as they are afterwards; merge
            them into the next params (``params.merge(learning, buffers)``). Without it, a call's
            changes of buffers are lost, with a warning.

    Returns:
        The forward, and params, which share memory with the module's parameters. A tied parameter
        appears once, under its first name. Parameters that do not require gradients are constants
        (``forward.constant``): their gradients are 0, and ``value_and_grad`` leaves them out. If
        none requires gradients, all learn.

    Raises:
        ValueError: ``head`` names no linear layer, a pattern of ``blocks`` matches no module, or
            the module is a wrapper that cannot be copied.

    Sites are found by what modules compute on made-up numbers, not by their names. A layer with
    hooks or a patched ``forward`` is no site and computes as before; hooks of a block or of
    attention stay around its site. ``forward.explain()`` lists what is no site, and why.

    >>> module = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> forward, params = from_module(module)
    >>> x = torch.ones(2, 4)
    >>> torch.equal(forward(params, {"input": x}), module(x))
    True
    """
    if isinstance(module, _TreeModule):
        return module.forward_fn, module.params()
    module = _unwrapped(module)
    head = _find_head(module, head)
    params = {name: p.detach() for name, p in module.named_parameters()}
    blank = _pure(skeleton(module))
    caller = call or partial(_default_call, frozenset(inspect.signature(module.forward).parameters))
    forward = _forward(blank, caller, head, blocks, buffers)
    return forward, unflatten(params | (dict(blank.named_buffers()) if buffers else {}))


def _forward(
    blank: nn.Module, caller: Call, head: str | None, blocks: Sequence[str] | None, buffers: bool
) -> Forward:
    """The forward of a module whose parameters are on the meta device."""
    params = dict(blank.named_parameters())
    if taken := [name for name in params if name.rpartition(".")[2] in added()]:
        raise ValueError(
            f"the module calls parameters of its own {taken[:3]}: {', '.join(added())} are names "
            "of what transforms put beside weights. Rename them before from_module"
        )
    frozen = frozenset(name for name, p in params.items() if not p.requires_grad)
    frozen = frozen if len(frozen) < len(params) else frozenset()
    plan, unfound = find_sites(blank, head, blocks)
    aliases = alias_table([found.site.path for found in plan])
    sites = tuple(replace(f.site, aliases=aliases[f.site.path]) for f in plan)
    same, ties = _same_modules(blank), _ties(blank)
    kept = dict(blank.named_buffers())
    saved = blank.state_dict()
    stored = {name: leaf for name, leaf in kept.items() if buffers or name in saved}
    weights = {s.weight for s in sites if s.kind in WEIGHTED}
    places = {beside(weight, name) for weight in weights for name in added()}
    known = {*params, *kept, *ties, *places}
    watch = Watch(written(blank, params))

    def build(site: Site) -> Callable[[Tree, Any], Any]:
        body, reads = _wrap(blank, plan, same, site)
        bound = {w for w in weights if site.bound("weight", w) or _at_a_layer(plan, w)}
        codes = [format.codes for format in FORMATS.values()]
        needed = {n: [beside(n, each) for each in codes] if n in bound else [] for n in params}
        own = dict(body.named_buffers())
        state = ModuleMemory(body)

        def run(params: Tree, batch: Any) -> Any:
            flat = flatten(params)
            absent = [name for name in needed if name not in flat]
            lacking = [name for name in absent if not any(n in flat for n in needed[name])]
            twice = [name for name, held in ties.items() if name in flat]
            if twice and (at := ties[twice[0]]) and flat.get(at) is not flat[twice[0]]:
                raise ValueError(
                    f"params hold {twice[0]}, which the module ties to {at}: hold it there alone"
                )
            if lacking:
                raise ValueError(f"params lack {lacking[:4]}, which the module has")
            if strange := [name for name in flat if name not in known]:
                raise ValueError(f"params hold {strange[:4]}, for which the module has no place")
            for name in frozen & flat.keys():
                flat[name] = flat[name].detach()
            theirs = {name: flat[name] for name in kept if name in flat}
            # changes must not stay in the copy; the first call shows which buffers change
            spare = (
                [*kept] if buffers else watch.lost if watch.done else [*kept.keys() - theirs.keys()]
            )
            # detached: buffers have no gradient, whatever differentiates the params
            flat |= {name: flat.get(name, own[name]).detach().clone() for name in spare}
            flat |= {name: flat[held] for name, held in ties.items() if held in flat}
            if reads:
                raw = dict(flat)
                for read in reads:
                    read.into(raw, flat, site)

            def call(batch: Any) -> Any:
                return caller(lambda *args, **kwargs: given(body, flat, args, kwargs), batch)

            try:
                spared = {} if buffers else {name: flat[name] for name in spare}
                out = watch.call(call, batch, flat, needed, spared, state)
            except RuntimeError as error:
                named = {name: leaf for name, leaf in (own | flat).items() if name not in ties}
                if (said := _two_dtypes(error, named)) is None:
                    raise
                raise TypeError(said) from error
            if buffers:
                return out, unflatten({name: flat[name] for name in kept})
            for name, leaf in theirs.items():  # replaced by a new tensor instead of written
                if (new := flat[name]) is not leaf and new.shape == leaf.shape:
                    leaf.copy_(new.detach())
            return out

        return run

    def remade(change: Callable[[nn.Module], Any]) -> Forward:
        other = copied(blank)
        change(other)
        return _forward(other, caller, head, blocks, buffers)

    modes = frozenset(m.training for m in blank.modules())
    module = ModuleState(frozen, stored, buffers, modes, remade, tuple(unfound))
    return Forward(build, sites, module=module)


def _two_dtypes(error: RuntimeError, leaves: Mapping[str, Tensor]) -> str | None:
    """The remedy for torch's error about two dtypes; None for any other error."""
    held = {leaf.dtype: name for name, leaf in leaves.items() if leaf.is_floating_point()}
    words = str(error)
    if len(held) < 2 or "type" not in words:
        return None
    where = " and ".join(f"{name} is {dtype}" for dtype, name in held.items())
    return (
        f"two dtypes meet in the module's own code, in {place_of(error)}, which takes one only: "
        f"{where} ({words.splitlines()[0]}). mixed_precision(forward, dtype) casts where they "
        "meet; or from_module(module.to(dtype)) has all params and buffers in one"
    )


def _at_a_layer(plan: list[Found], weight: str) -> bool:
    """Whether only layers use a weight; they raise themselves if it is missing."""
    return all(f.site.kind != "weight" for f in plan if f.site.weight == weight)


def as_module(forward: Forward, params: Tree) -> nn.Module:
    """A module with ``module(batch) == forward(params, batch)``.

    Names in its state dict are the dotted paths of ``params``. Floating-point leaves are parameters
    that share memory with ``params``; constants do not require gradients. Other leaves and the
    scales of quantised weights are buffers, as are the buffers of a module that ``from_module``
    took, which a call changes as it did there. ``torch.optim``, ``.to``, ``state_dict`` and
    ``functional_call(module, flat_params, (batch,))`` work. ``train`` and ``eval`` act on the
    layers that ``from_module`` took, and ``from_module`` returns the same forward.
    """
    flat = flatten(params)
    buffers = {name: leaf for name, leaf in forward.module.buffers.items() if name not in flat}
    kept = {*forward.module.buffers, *(name for name in flat if _is_buffer(name, flat))}
    root = _TreeModule(unflatten({**flat, **buffers}), kept, forward.module.frozen)
    root.forward_fn = forward
    root.training = forward.module.modes != {False}
    return root


def _is_buffer(name: str, flat: Tree) -> bool:
    leaf = flat[name]
    return not (leaf.is_floating_point() or leaf.is_complex()) or is_scale(name, flat)


class _TreeModule(nn.Module):
    """A pytree of tensors as a tree of modules.

    buffers, frozen: full paths of the leaves that are buffers, or do not require gradients.
    """

    forward_fn: Forward

    def __init__(
        self, tree: Mapping[str, Any], buffers: set[str], frozen: frozenset[str], at: str = ""
    ) -> None:
        super().__init__()
        for name, value in tree.items():
            path = f"{at}.{name}" if at else name
            if isinstance(value, Mapping):
                self.add_module(name, _TreeModule(value, buffers, frozen, path))
            elif path in buffers:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value, path not in frozen))

    def params(self) -> Tree:
        """The current leaves: under ``functional_call``, its arguments."""
        own: Tree = {**self._parameters, **self._buffers}
        own = {name: leaf for name, leaf in own.items() if leaf is not None}
        return own | {k: m.params() for k, m in self._modules.items() if isinstance(m, _TreeModule)}

    def train(self, mode: bool = True) -> Any:
        forward = vars(self).get("forward_fn")
        if forward is not None:
            self.forward_fn = forward.with_mode(mode)
        return super().train(mode)

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


def _pure(body: nn.Module) -> nn.Module:
    """Switches caches off (one that grows when a block is recomputed is not pure), and the module's
    own checkpoints (they would recompute after the params are gone)."""
    own = []
    for name, m in body.named_modules():
        config = getattr(m, "config", None)
        if config is not None and hasattr(config, "use_cache"):
            config.use_cache = False
        for flag in ("gradient_checkpointing", "grad_checkpointing"):
            if vars(m).get(flag) is True:
                setattr(m, flag, False)
                own.append(name)
    if own:
        warnings.warn(
            f"the module checkpoints itself (at {own[0] or 'its root'!r}): not in this forward, "
            "where transforms.checkpoint does it",
            stacklevel=3,
        )
    return body


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper. Raises ValueError for other wrappers."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            "a TorchScript module has no Python code to find sites in: from_module takes the "
            "module that it was made from"
        )
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"from_module takes what {type(module).__name__} wraps: module.module")
    if any(nn.parameter.is_lazy(p) for p in (*module.parameters(), *module.buffers())):
        raise ValueError("the module has lazy parameters: call it once before from_module")
    own = module._modules.get("_orig_mod")
    return module if own is None else own


def _same_modules(module: nn.Module) -> dict[str, list[str]]:
    """Each module's first name -> all its names: a shared layer has several."""
    names: dict[int, list[str]] = {}
    for name, m in module.named_modules(remove_duplicate=False):
        names.setdefault(id(m), []).append(name)
    return {first: [first, *others] for first, *others in names.values()}


def _ties(module: nn.Module) -> dict[str, str]:
    """A tied parameter's name -> the name under which params hold it."""
    held: dict[int, str] = {}
    ties = {}
    for prefix, m in module.named_modules():
        for leaf, p in m._parameters.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if p is not None and (first := held.setdefault(id(p), name)) != name:
                ties[name] = first
    return ties


def _wrap(
    blank: nn.Module, plan: list[Found], same: Mapping[str, list[str]], site: Site
) -> tuple[nn.Module, list[Read]]:
    """A copy of ``blank`` whose calls go through sites, and the reads of weights outside blocks."""
    body = copied(blank)
    for found in plan:
        if found.site.kind in (*WEIGHTED, "norm"):
            _make_room(body, found, site)
    for found in reversed(plan):  # inner ones first: outer ones hold the wrappers
        name, info = found.name, found.site
        module = body.get_submodule(name)
        if info.kind in ("glu", "attention", "rope"):
            if not site.bound(info.kind, info.path):
                continue
            if found.gated is None:
                rewrite_calls(module, site, info.path)
            else:
                plain = copied(blank.get_submodule(name))
                rewrite_glu(module, plain, found.gated, site, info.path)
        elif info.kind != "weight":
            wrapper = at_site(module, site, info)
            if not name:
                body = wrapper
            for each in filter(None, same[name]):
                put(body, each, wrapper)
    _tell_leaves(body, plan)
    places = {id(vars(m)["inner"]): m for m in body.modules() if issubclass(type(m), SiteWrapper)}
    for m in body.modules():  # references outside the tree: layers in a plain list, a parent
        redirect(vars(m).get("inner", m), lambda value: places.get(id(value), value))
    hand_out_parameters(body, _ties(blank))
    leave_fast_paths(body, lambda name: _is_bound(plan, site, name))
    return body, _tell_reads(body, plan, site)


def _make_room(body: nn.Module, found: Found, site: Site) -> None:
    """Adds empty buffers for what transforms put beside a weight, and empties the weight itself.

    ``functional_call`` fills them. They are buffers, not attributes, so that no call searches for
    them and torch.compile can follow, and not parameters, whose dtypes model code asks for. An
    absent weight is None, so that no code reads the copy's.
    """
    for leaf in (found.leaf, found.site.weight) if found.site.kind in WEIGHTED else ():
        owner, _, key = leaf.rpartition(".")
        module = body.get_submodule(owner)
        for name in added():
            module._buffers.setdefault(beside(key, name), None)
    if found.site.kind != "weight":
        module = body.get_submodule(found.name)
        module._parameters.update(dict.fromkeys(module._parameters))
    elif site.bound("weight", found.site.path):
        owner, _, key = found.leaf.rpartition(".")
        body.get_submodule(owner)._parameters[key] = None


def _tell_leaves(body: nn.Module, plan: list[Found]) -> None:
    """Gives every wrapper the list of the leaves inside it."""
    weights = {found.leaf: found.site.weight for found in plan if found.site.kind in WEIGHTED}
    names = {id(m): name for name, m in body.named_modules()}
    wrapper: Any
    for wrapper in body.modules():
        if not issubclass(type(wrapper), SiteWrapper):
            continue
        for at, m in wrapper.named_modules():
            for key in m._parameters:
                wrapper.leaves.append((_join(at, key), m, key))
                leaf = _join(names[id(m)], key)
                # under the name that params hold a tied weight by, or its own
                for held in dict.fromkeys((weights[leaf], leaf) if leaf in weights else ()):
                    owner, _, own = held.rpartition(".")
                    wrapper.added += [
                        (_join(at, beside(key, a)), body.get_submodule(owner), beside(own, a))
                        for a in added()
                    ]


def _tell_reads(body: nn.Module, plan: list[Found], site: Site) -> list[Read]:
    """Gives every block its reads of weights with rules; returns the reads outside of blocks."""
    blocks = [found.name for found in plan if found.site.kind == "block"]
    outside = []
    for found in plan:
        if found.site.kind != "weight" or not site.bound("weight", found.site.path):
            continue
        block = next((block for block in blocks if inside(found.leaf, block)), None)
        if block is None:
            outside.append(Read(found.leaf, found.site.path, found.site.path))
            continue
        name = found.leaf.removeprefix(f"{block}.")
        wrapper: Any = body.get_submodule(block)
        wrapper.reads.append(Read(name, name, found.site.path))
    return outside


def _is_bound(plan: list[Found], site: Site, name: str) -> bool:
    """Whether a rule acts inside the module of this name, other than on a whole block."""
    return any(
        inside(f.name, name) and (site.bound(kind, path) or site.bound("weight", f.site.weight))
        for f in plan
        for kind, path in [(f.site.kind, f.site.path)]
        if kind != "block"
    )


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _default_call(names: frozenset[str], run: Callable[..., Any], batch: Mapping[str, Any]) -> Any:
    kwargs = {k: v for k, v in batch.items() if k in names and k != "labels"}
    if not kwargs:
        raise ValueError(
            f"the batch has {sorted(batch)}, none of which the module's forward takes "
            f"({sorted(names)}): rename them, or pass call="
        )
    if strange := sorted(batch.keys() - names - {"labels"}):
        raise ValueError(
            f"the batch has {strange}, which the module's forward does not take ({sorted(names)}): "
            "leave them out, or pass call="
        )
    if "use_cache" in names:
        kwargs.setdefault("use_cache", False)
    out = run(**kwargs)
    if isinstance(out, Tensor | Logits):
        return out
    if isinstance(logits := getattr(out, "logits", None), Tensor | Logits):
        return logits
    parts = list(out) if isinstance(out, Mapping) else f"{len(out)} parts" if out else "nothing"
    raise TypeError(
        f"the module returned {type(out).__name__} ({parts}), no tensor and no logits: say which "
        "is meant, call=lambda run, batch: run(batch['...'])[0] or .last_hidden_state"
    )
