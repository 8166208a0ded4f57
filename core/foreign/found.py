"""The sites of a foreign module, found by what its modules compute, never by their names.

A probe calls a copy of a module on a few random numbers, with random weights, and compares the
output with a formula. The user's own modules are never called.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from core.foreign.gated import Gated, find_gated
from core.foreign.probes import (
    close,
    failed,
    failures,
    is_plain,
    noise,
    probe,
    same_slopes,
    skeleton,
    takes_one,
)
from core.foreign.reroute import attention_to, names_of, reroute
from core.foreign.rotary import rotary_to
from core.sites import NormForm, SiteInfo
from params.paths import select_paths

# factors on the rows of random inputs: a clamp shows at the large ones
SIZES = torch.tensor([[1.0], [1e4], [1e30]])
USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)  # without an eps, a row of zeros divides by 0


LAYERS = ("linear", "transposed", "embed", "norm")  # traits of layers that are sites themselves


@dataclass(frozen=True)
class Found:
    """A module that is a site, or one of its weights.

    name: the module's; leaf: the weight's, in the module; gated: the linears of a gated MLP.
    """

    name: str
    site: SiteInfo
    leaf: str = ""
    gated: Gated | None = None


def find_sites(
    module: nn.Module,
    head: str | None = None,
    blocks: Sequence[str] | None = None,
) -> tuple[list[Found], list[str]]:
    """Every site of a module, outer ones first; and for what looks like one but is none, a line.

    blocks: path patterns of the blocks; default: the members of lists that repeat.
    """
    # the name under which params hold it: a tied weight's site has that name
    names = {id(p): name for name, p in reversed([*module.named_parameters()])}
    traits, reasons = _traits(module)
    named = _blocks(module, traits) if blocks is None else _named_blocks(module, blocks)
    found = list(_find(module, head, names, traits, named))
    return found, list(_not_found(module, found, reasons))


def _find(
    module: nn.Module,
    head: str | None,
    names: Mapping[int, str],
    traits: Mapping[str, Any],
    blocks: Sequence[str],
) -> Iterator[Found]:
    for name, m in module.named_modules():
        inner = any(inside(name, block) for block in blocks if block != name)
        site = partial(_site, m, name, names, outermost=not inner)
        trait: Any = traits.get(name)
        if name in blocks:
            yield Found(name, SiteInfo("block", name, outermost=True, foreign=True))
        if isinstance(trait, Gated):
            info = SiteInfo("glu", name, False, foreign=True, activation=trait.activation)
            yield Found(name, info, gated=trait)
        elif trait == "attention":
            yield Found(name, SiteInfo("attention", name, False, foreign=True))
        if "forward" not in vars(m) and reroute(m, rotary_to(_nothing)):
            yield Found(name, SiteInfo("rope", name, False, foreign=True))
        if name not in blocks and _is_layer(trait):
            if name == head:
                yield site("head")
            elif trait == "norm" or isinstance(trait, NormForm):
                yield site("norm", norm=None if trait == "norm" else trait)
            elif trait == "embed":
                scale, cast = row_scale(m) or (1.0, True)
                yield site("embed", scale=None if scale == 1.0 else scale, scale_cast=cast)
            else:
                yield site("linear", transposed=trait == "transposed")
            continue
        for key, p in m._parameters.items():
            if p is not None and is_matrix(m, p):
                inner = any(inside(name, block) for block in blocks)
                leaf = f"{name}.{key}" if name else key
                held = names.get(id(p), leaf)
                info = SiteInfo("weight", held, not inner, foreign=True, leaf=held)
                about: Any = {
                    "shape": tuple(p.shape),
                    "dtype": p.dtype,
                    "computed": _computes_from(m),
                }
                yield Found(name, replace(info, **about), leaf)


def _site(m: nn.Module, name: str, names: Mapping[int, str], kind: str, **more: Any) -> Found:
    """The site of a layer, at the path under which params hold its weight."""
    # reading a parametrized weight would compute it
    weight = m._parameters.get("weight")
    leaf = f"{name}.weight" if name else "weight"
    if weight is None:  # a norm's, by another name
        return Found(name, SiteInfo(kind, name, foreign=True, **more), leaf)
    held = names.get(id(weight), leaf)
    owner, _, key = held.rpartition(".")
    where: Any = {"path": owner} if key == "weight" else {"path": name, "leaf": held}
    shape = tuple(weight.shape)
    info = SiteInfo(kind, foreign=True, shape=shape, dtype=weight.dtype, **where, **more)
    return Found(name, info, leaf)


def is_matrix(owner: nn.Module, p: Tensor) -> bool:
    """Whether a parameter outside of layers is a site of its own, since code may multiply by it or
    look rows up in it. A convolution's is not."""
    conv = isinstance(owner, nn.modules.conv._ConvNd)
    return p.is_floating_point() and p.ndim >= 2 and min(p.shape) > 1 and not conv


def _computes_from(owner: nn.Module) -> bool:
    """Whether a module's weight is computed from its parameters before each use."""
    made = any(isinstance(value, Tensor) for value in vars(owner).values())  # by a hook
    by_hook = made and bool(owner._forward_pre_hooks)
    return isinstance(owner, parametrize.ParametrizationList) or by_hook


def inside(path: str, name: str) -> bool:
    """Whether a path lies in the module of this name, or is its own."""
    return not name or path == name or path.startswith(f"{name}.")


def _is_layer(trait: Any) -> bool:
    return isinstance(trait, NormForm) or (isinstance(trait, str) and trait in LAYERS)


def _not_found(module: nn.Module, found: list[Found], reasons: Mapping[str, str]) -> Iterator[str]:
    """A line for every module that looks like a site, or holds a matrix, and is no site."""
    served = {f.name for f in found if f.site.kind in ("linear", "norm", "embed", "head")}
    served |= {f.leaf for f in found if f.site.kind == "weight"}
    for name, m in module.named_modules():
        if name in served:
            continue
        for key, p in m._parameters.items():
            leaf = f"{name}.{key}" if name else key
            if p is not None and p.ndim >= 2 and leaf not in served:
                yield f"{leaf} {list(p.shape)} of {type(m).__name__}: {_why(m, p)}"
        if name in reasons:
            yield f"{name or 'the module'} ({type(m).__name__}): {reasons[name]}"


def _why(m: nn.Module, p: Tensor) -> str:
    if isinstance(m, nn.modules.conv._ConvNd):
        return "a convolution is not a site"
    if not p.is_floating_point():
        return f"no rule at a weight knows the dtype {p.dtype}"
    return "a dimension of 1: a table or a vector, not a matrix"


# -- one module -----------------------------------------------------------------------------------


def _traits(module: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """Name -> what the module is: a kind of site, "transposed", or a Gated.

    And name -> reason, for modules that look like a site and are none.
    """
    traits: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    known: dict[Any, tuple[Any, str]] = {}  # of modules that need one probe
    owned = {id(c) for m in module.modules() for c in m.children() if _reads_weights(m)}
    for name, m in module.named_modules():
        if "forward" in vars(m):
            reasons[name] = "its forward was patched in"
            continue
        if reroute(m, attention_to(_nothing)):
            traits[name] = "attention"  # its hooks stay around it
        elif id(m) in owned:
            reasons[name] = "its owner reads its weight instead of calling it"
        elif not is_plain(m):
            reasons[name] = "it has hooks, which would see another call"
        else:
            key = _key(m)
            if key not in known:
                with failures() as why:
                    known[key] = _leaf_trait(m), "; ".join(dict.fromkeys(why))
            trait, reason = known[key]
            if trait is not None:
                traits[name] = trait
            elif reason:
                reasons[name] = reason
            elif isinstance(m, nn.MultiheadAttention):
                reasons[name] = "torch's own attention: its weights are sites, the module is not"
            elif _computes_softmax(m):
                reasons[name] = ATTENTION
    for name, m in module.named_modules():
        if name not in traits:
            with failures() as why:
                gated = find_gated(m, name, traits)
            if gated:
                traits[name] = gated
            elif why:
                reasons.setdefault(name, "; ".join(dict.fromkeys(why)))
    return traits, {name: reason for name, reason in reasons.items() if name not in traits}


def _leaf_trait(module: nn.Module) -> Any:
    """A layer's trait; a norm's is its NormForm, or "norm" if that is unknown."""
    if type(module) is nn.Linear:
        return "linear"
    if isinstance(module, nn.Embedding):
        odd = module.max_norm or module.sparse or module.scale_grad_by_freq
        if odd:
            failed("max_norm, sparse or scale_grad_by_freq do more than look rows up")
            return None
        return "embed" if row_scale(module) is not None else None
    if layout := _layout(module):
        return layout
    if not is_norm(module):
        return None
    # one that takes more than x may compute more than its form
    return (norm_form(module) if takes_one(module) else None) or "norm"


def _key(module: nn.Module) -> Any:
    """Equal keys: one probe serves both modules."""
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


ATTENTION = (
    "attention written out (softmax): no attention site. One that calls "
    "F.scaled_dot_product_attention has one (Hugging Face: attn_implementation='sdpa')"
)


def _computes_softmax(module: nn.Module) -> bool:
    """Whether a module's code, or a function it calls, names a softmax and a product."""
    names = names_of(module)
    return "softmax" in names and bool({"matmul", "bmm", "einsum", "baddbmm"} & names)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _reads_weights(module: nn.Module) -> bool:
    """Whether a module multiplies by its child's weight itself, without calling the child."""
    return isinstance(module, nn.MultiheadAttention)


def row_scale(module: nn.Module) -> tuple[float, bool] | None:
    """The factor on an embedding's rows (Gemma's; 1.0 for most), and whether it is cast to their
    dtype first. None unless it reproduces the module to the bit.
    """
    if [*module._parameters] != ["weight"] or not takes_one(module, more=True):
        return None
    width = next(module.parameters()).shape[1]
    module = skeleton(module)
    if getattr(module, "padding_idx", None) is not None:
        vars(module)["padding_idx"] = None  # the probe's table is shorter than that
    ids = torch.tensor([[0, 2, 1]])
    made = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        table = (noise(3, width) * SIZES).to(dtype)
        rows = probe(module, {"weight": table}, ids)
        if rows is None:
            return None
        if rows.shape != table[ids].shape or rows.dtype != dtype:
            failed(f"it returns {rows.dtype} {list(rows.shape)} for rows of a {dtype} table")
            return None
        made.append((rows, table[ids]))
    rows, taken = made[0]
    ratio = (rows / taken).median()
    steps = (ratio.float(), ratio, ratio.nextafter(ratio + 1), ratio.nextafter(ratio - 1))

    def looked_up(table: Tensor) -> Any:
        return functional_call(module, {"weight": table}, (ids,))

    def rows_of(scale: float, cast: bool, table: Tensor) -> Tensor:
        return scaled(table[ids], scale, cast)

    for scale, cast in itertools.product(map(float, steps), (True, False)):
        if all(torch.equal(r, scaled(t, scale, cast)) for r, t in made):
            if same_slopes(looked_up, partial(rows_of, scale, cast), table.float()):
                return scale, cast
            failed("the gradient of its table is not that of a lookup")
            return None
    failed("it does not return the table's rows times one number")
    return None


def scaled(rows: Tensor, scale: float, cast: bool) -> Tensor:
    """Rows times a number. cast: to their dtype first."""
    return rows * (torch.full((), scale, dtype=rows.dtype, device=rows.device) if cast else scale)


def _layout(module: nn.Module) -> str | None:
    """ "linear" for ``x @ weight.T + bias``, "transposed" for ``x @ weight + bias``, else None."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    fits = shapes.keys() in ({"weight"}, {"weight", "bias"}) and len(shapes["weight"]) == 2
    if not fits or any(True for _ in module.children()):
        return None
    if any(True for _ in module.buffers()):
        failed("it looks like a linear, but has buffers")
        return None
    if not takes_one(module, more=True):
        failed("it looks like a linear, but takes more than one argument")
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
    failed("it looks like a linear, but computes something else")
    return None


# -- norms ----------------------------------------------------------------------------------------


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises its last dim: its params are vectors, and scale has no effect."""
    params = list(module.parameters())
    holds_more = [*module.children(), *module.buffers()]
    if not 1 <= len(params) <= 2 or any(p.ndim != 1 for p in params) or holds_more:
        return False
    if not takes_one(module, more=True):
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
    """What a norm computes, with an eps out of its attributes or the usual ones; None if unknown.

    Each candidate is compared with the module on inputs so small that eps decides the result.
    """
    own = [v for v in vars(module).values() if isinstance(v, float) and 0 < v < 0.1]
    names = [name for name, _ in module.named_parameters()]
    dim = next(module.parameters()).shape[0]
    body = skeleton(module)

    def called(*values: Tensor) -> Any:
        return functional_call(body, dict(zip(names, values, strict=False)), values[-1:])

    def formula(form: NormForm, *values: Tensor) -> Tensor:
        return normalise(form, dict(zip(names, values, strict=False)), values[-1])

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
            if same_slopes(
                called, partial(formula, form), *leaves.values(), noise(1, 2, dim, seed=5)
            ):
                return form
            failed("its outputs are those of a norm, its gradients are not")
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
    """The formula of a norm."""
    x = x - x.mean(-1, keepdim=True) if form.kind == "layer" else x
    y = (
        x
        * (x.square().mean(-1, keepdim=True) + form.eps).rsqrt()
        * (form.offset + leaves[form.weight])
    )
    return y if form.bias is None else y + leaves[form.bias]


# -- blocks ---------------------------------------------------------------------------------------


def _blocks(module: nn.Module, traits: Mapping[str, Any]) -> list[str]:
    """The members of every outermost list of layers that repeat, or that are built like blocks.

    Layers that are sites themselves are no blocks, nor are lists of lists, which nothing calls.
    """
    blocks: list[str] = []
    for name, m in module.named_modules():
        if any(inside(name, block) for block in blocks):
            continue
        if not isinstance(m, nn.ModuleList) and type(m) is not nn.Sequential:
            continue
        members = {f"{name}.{n}" if name else n: c for n, c in m.named_children()}
        if not members or not all(_is_called(c, traits.get(n)) for n, c in members.items()):
            continue
        rich = all(_is_rich(n, traits) for n in members)
        alike = len({type(c) for c in members.values()}) == 1
        if isinstance(m, nn.ModuleList):
            listed = rich or (alike and len(m) > 1)
        elif any(type(c).__module__.startswith("torch.") for c in members.values()):
            listed = rich and len({_structure(c) for c in members.values()}) == 1
        else:
            listed = alike and (rich or len(m) > 1)
        if listed:
            blocks += members
    return blocks


def _is_called(member: nn.Module, trait: Any) -> bool:
    """Whether a member of a list can be called, and is more than one layer."""
    if _is_layer(trait) or type(member).forward is nn.Module.forward:
        return False
    plain = not any(True for _ in member.children())
    return not (plain and type(member).__module__.startswith("torch."))


def _named_blocks(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The outermost modules that match. Raises ValueError for a pattern without a module."""
    names = [name for name, _ in module.named_modules() if name]
    blocks: list[str] = []
    for name in select_paths(patterns, names, what="modules") if patterns else ():
        if any(inside(name, block) for block in blocks):
            continue
        if type(m := module.get_submodule(name)).forward is nn.Module.forward:
            raise ValueError(f"{name} is not a block: {type(m).__name__} cannot be called")
        blocks.append(name)
    return blocks


def _is_rich(name: str, traits: Mapping[str, Any]) -> bool:
    """Whether a module has linears and another kind of site, as a block does."""
    inside = {t for n, t in traits.items() if n == name or n.startswith(f"{name}.")}
    kinds = {"linear" if t == "transposed" else str(t) for t in inside if t is not None}
    return "linear" in kinds and len(kinds) > 1


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """The class and the shapes of params, which equal layers share."""
    return type(module), tuple((n, tuple(p.shape)) for n, p in module.named_parameters())
