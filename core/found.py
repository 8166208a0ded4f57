"""What a module of someone else's is made of, found by what its modules do, never by their names.

Modules are called on a few made-up numbers, with made-up weights, and what they return is held
against a formula. Nothing of the user's is called: every probe runs in a copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.forward import NormForm, SiteInfo
from core.gated import Gated, find_gated
from core.probes import close, is_plain, noise, probe, takes_one
from core.reroute import reroute

# of the rows of made-up numbers: a limit that a layer sets shows at large ones
SIZES = torch.tensor([[1.0], [1e4], [1e30]])
USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)  # none at all divides by 0 where a row is 0


@dataclass(frozen=True)
class Found:
    """A module that is a site: its name, the site, and which layers a gated MLP has."""

    name: str
    site: SiteInfo
    gated: Gated | None = None


def find_sites(
    module: nn.Module, head: str | None, names: Mapping[int, str] | None = None
) -> Iterator[Found]:
    """Every site of a module, outer ones first.

    names: id of a parameter -> name of the module under which params hold it: a tied weight's site
    is there.
    """
    names = names or {}
    traits = _traits(module)
    blocks = _blocks(module, traits)
    for name, m in module.named_modules():
        inner = any(name.startswith(f"{block}.") for block in blocks)
        site = partial(SiteInfo, outermost=not inner, foreign=True)
        # where params hold it (reading a parametrized weight would compute it)
        path = names.get(id(m._parameters.get("weight")), name)
        trait: Any = traits.get(name)
        if name in blocks:
            yield Found(name, SiteInfo("block", name, outermost=True, foreign=True))
        if trait is None:
            continue
        if isinstance(trait, Gated):
            info = SiteInfo("glu", name, False, foreign=True, activation=trait.activation)
            yield Found(name, info, trait)
        elif trait == "attention":
            yield Found(name, SiteInfo("attention", name, False, foreign=True))
        elif name not in blocks:
            if name == head:
                yield Found(name, site("head", path))
            elif trait == "norm" or isinstance(trait, NormForm):
                yield Found(name, site("norm", path, norm=None if trait == "norm" else trait))
            elif trait in ("linear", "transposed"):
                yield Found(name, site("linear", path, transposed=trait == "transposed"))
            elif trait == "embed":
                scale = row_scale(m)
                yield Found(name, site("embed", path, scale=None if scale == 1.0 else scale))


# -- one module -----------------------------------------------------------------------------------


def _traits(module: nn.Module) -> dict[str, Any]:
    """Name -> what the module of that name is: a kind of site, "transposed", or a Gated."""
    traits: dict[str, Any] = {}
    known: dict[Any, Any] = {}  # equal modules are probed once
    owned = {id(c) for m in module.modules() for c in m.children() if _reads_weights(m)}
    for name, m in module.named_modules():
        if "forward" in vars(m):
            continue
        if reroute(m, _nothing):
            traits[name] = "attention"  # its hooks stay around it
        elif is_plain(m) and id(m) not in owned:
            key = _key(m)
            if key not in known:
                known[key] = _leaf_trait(m)
            if known[key] is not None:
                traits[name] = known[key]
    for name, m in module.named_modules():
        if name not in traits and (gated := find_gated(m, name, traits)):
            traits[name] = gated
    return traits


def _leaf_trait(module: nn.Module) -> Any:
    """What a layer is; a norm is its NormForm, or "norm" if that is not known."""
    if type(module) is nn.Linear:
        return "linear"
    if isinstance(module, nn.Embedding):
        odd = module.max_norm or module.sparse or module.scale_grad_by_freq
        return "embed" if not odd and row_scale(module) is not None else None
    return _layout(module) or ((norm_form(module) or "norm") if is_norm(module) else None)


def _key(module: nn.Module) -> Any:
    """Equal for modules of which one can stand for the other in a probe."""
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return id(module)
    shapes = [(n, None if p is None else p.shape) for n, p in module._parameters.items()]
    plain = (bool, int, float, str, type(None))
    state = [(k, v) for k, v in vars(module).items() if isinstance(v, plain)]
    others = [
        (k, id(v))
        for k, v in vars(module).items()
        if not k.startswith("_") and not isinstance(v, plain)
    ]
    return (type(module), *shapes, *state, *others)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _reads_weights(module: nn.Module) -> bool:
    """Whether a module multiplies by its child's weight itself, without calling the child."""
    return isinstance(module, nn.MultiheadAttention)


def row_scale(module: nn.Module) -> float | None:
    """The number that a table's rows come out multiplied with (Gemma's), 1.0 for most; else None.

    The number is cast to the rows' dtype first: bit for bit as the module does it.
    """
    if [*module._parameters] != ["weight"] or not takes_one(module):
        return None
    ids = torch.tensor([[0, 2, 1]])
    scale = None
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        # large tables need not be made up
        table = (noise(3, next(module.parameters()).shape[1]) * SIZES).to(dtype)
        rows = probe(module, {"weight": table}, ids)
        if rows is None or rows.shape != table[ids].shape:
            return None
        if scale is None:
            scale = float((rows / table[ids]).flatten()[0].float())
        if not torch.equal(rows, table[ids] * torch.tensor(scale).to(dtype)):
            return None
    return scale


def _layout(module: nn.Module) -> str | None:
    """ "linear" for ``x @ weight.T + bias``, "transposed" for ``x @ weight + bias``, else None."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    fits = shapes.keys() in ({"weight"}, {"weight", "bias"}) and len(shapes["weight"]) == 2
    if not fits or any([*module.children(), *module.buffers()]) or not takes_one(module):
        return None
    weight = noise(*shapes["weight"], seed=1)
    for layout, matrix in (("linear", weight), ("transposed", weight.t())):
        bias = noise(matrix.shape[0], seed=2)
        if shapes.get("bias", bias.shape) != bias.shape:
            continue
        given = {"weight": weight, "bias": bias} if "bias" in shapes else {"weight": weight}
        x = noise(1, 3, matrix.shape[1]) * SIZES
        out = probe(module, given, x)
        want = F.linear(x, matrix, given.get("bias")) / SIZES
        if out is not None and close(out / SIZES, want, 1e-4 * float(want.abs().max())):
            return layout
    return None


# -- norms ----------------------------------------------------------------------------------------


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises its last dim: it has vectors only, and is blind to scale."""
    params = list(module.parameters())
    holds_more = [*module.children(), *module.buffers()]
    if not 1 <= len(params) <= 2 or any(p.ndim != 1 for p in params) or holds_more:
        return False
    if not takes_one(module):
        return False
    given = {name: torch.ones(p.shape) for name, p in module.named_parameters()}
    x = torch.linspace(-1, 2, 2 * params[0].shape[0]).reshape(1, 2, -1)
    small, large = (probe(module, given, x * c) for c in (8.0, 64.0))
    return (
        small is not None
        and large is not None
        and small.shape == x.shape
        and torch.allclose(small, large, atol=1e-3)
    )


def norm_form(module: nn.Module) -> NormForm | None:
    """What a norm computes, its eps among its own numbers or the usual ones; None if unknown.

    Each candidate is held against the module at inputs so small that eps decides the result.
    """
    own = [v for v in vars(module).values() if isinstance(v, float) and 0 < v < 0.1]
    names = [name for name, _ in module.named_parameters()]
    dim = next(module.parameters()).shape[0]
    for eps, kind, offset, order in itertools.product(
        dict.fromkeys((*own, *USUAL_EPS)), ("rms", "layer"), (0.0, 1.0), (names, names[::-1])
    ):
        form = NormForm(kind, eps, offset, order[0], order[1] if len(order) > 1 else None)
        leaves = {name: noise(dim, seed=i + 1) for i, name in enumerate(names)}
        sizes = ((1.0, 1.0), (eps**0.5, 1.0), (1e15, 1e6))  # of x, of the leaves
        if all(
            _computes(module, form, leaves, noise(1, 2, dim) * size, of_leaves, dtype)
            for size, of_leaves in sizes
            for dtype in (torch.float32, torch.float64)
        ):
            return form
    return None


def _computes(
    module: nn.Module,
    form: NormForm,
    leaves: dict[str, Tensor],
    x: Tensor,
    size: float,
    dtype: torch.dtype,
) -> bool:
    x, leaves = x.to(dtype), {name: size * leaf.to(dtype) for name, leaf in leaves.items()}
    out = probe(module, leaves, x)
    return out is not None and close(out, normalise(form, leaves, x), 3e-5 * size)


def normalise(form: NormForm, leaves: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The norm of this form, by its formula."""
    x = x - x.mean(-1, keepdim=True) if form.kind == "layer" else x
    y = (
        x
        * (x.square().mean(-1, keepdim=True) + form.eps).rsqrt()
        * (form.offset + leaves[form.weight])
    )
    return y if form.bias is None else y + leaves[form.bias]


# -- blocks ---------------------------------------------------------------------------------------


def _blocks(module: nn.Module, traits: Mapping[str, Any]) -> list[str]:
    """The members of every outermost list of layers that repeats, or that mixes kinds of block."""
    blocks: list[str] = []
    for name, m in module.named_modules():
        if any(name == block or name.startswith(f"{block}.") for block in blocks):
            continue
        if not (isinstance(m, nn.ModuleList) or type(m) is nn.Sequential) or len(m) < 2:
            continue
        names = [f"{name}.{n}" if name else n for n, _ in m.named_children()]
        if isinstance(m, nn.ModuleList):
            alike = len({type(c) for c in m}) == 1
            listed = alike or all(_is_rich(n, traits) for n in names)
        else:
            alike = len({_structure(c) for c in m}) == 1
            listed = alike and all(_is_rich(n, traits) for n in names)
        if listed:
            blocks += names
    return blocks


def _is_rich(name: str, traits: Mapping[str, Any]) -> bool:
    """Whether a layer is built like a block: linears, and at least one other kind of site."""
    inside = {t for n, t in traits.items() if n == name or n.startswith(f"{name}.")}
    kinds = {"linear" if t == "transposed" else str(t) for t in inside if t is not None}
    return "linear" in kinds and len(kinds) > 1


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """What two layers of one make have in common: class, and the shapes of their params."""
    return type(module), tuple((n, tuple(p.shape)) for n, p in module.named_parameters())
