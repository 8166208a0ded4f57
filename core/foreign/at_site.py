"""Wrappers of a foreign module's layers: the same names, with calls that go through sites.

They exist in the private copy that ``from_module`` makes.
"""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from core.foreign.found import scaled
from core.foreign.gated import Gated, product
from core.foreign.reroute import names_of, reroute
from core.foreign.rotary import is_rotary
from core.forward import Site
from core.model.layers import embed, head, linear, weight_of
from core.sites import SiteInfo
from params.formats import added, held_at
from params.tree import Tree, flatten, unflatten


def given(module: nn.Module, flat: Tree, args: Any, kwargs: Any) -> Any:
    """``functional_call`` that restores a layer with two names, too."""
    return functional_call(module, flat, args, kwargs, tie_weights=False)


def place_of(error: Exception) -> str:
    """Where in a foreign module an error arose: "Conv1d of Mixer in model.layers.0"."""
    within: list[str] = []
    path = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner: Any = frame.f_locals.get("self")
        if issubclass(type(owner), SiteWrapper):
            path = owner.info.path
        elif isinstance(owner, nn.Module):
            torchs = type(owner).__module__.startswith("torch.")
            within = [type(owner).__name__, *(within[-1:] if torchs else [])]
    where = " of ".join(within) or "the module"
    return f"{where} in {path}" if path else where


@dataclass(frozen=True)
class Read:
    """A weight that model code reads itself.

    name, source: the name it is read by and the one it is held under, in the params of the model or
    of its block; path: the site's.
    """

    name: str
    source: str
    path: str

    def into(self, held: Tree, flat: Tree, site: Site) -> None:
        """Puts the site's output for the weight, out of ``held``, where the code reads it."""
        flat[self.name] = site("weight", weight_of, held_at(held, self.source), at=self.path)


class SiteWrapper(nn.Module):
    """Replaces a module under its name, and makes its calls through a site."""

    def __init__(self, inner: nn.Module, site: Site, info: SiteInfo) -> None:
        super().__init__()
        # leaves, added: (name, module, key) of every tensor inside, so that no call walks the tree
        vars(self).update(inner=inner, site=site, info=info, leaves=[], added=[])
        vars(self)["free"] = not site.bound(info.kind, info.path)
        for name in ("_parameters", "_buffers", "_modules", "training", "_is_full_backward_hook"):
            vars(self)[name] = vars(inner)[name]
        for name, hooks in vars(inner).items():
            if "_hooks" in name and isinstance(hooks, dict):
                # moved outside of the site: recomputation of a block does not call them again
                vars(self)[name], vars(inner)[name] = hooks, type(hooks)()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # foreign code may test its layers by isinstance
        return type(self.__dict__["inner"])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # model code reads attributes of layers: .attention_type, ...
            return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["inner"], name, value)

    def own_params(self) -> dict[str, Tensor]:
        """The leaves that params hold now, by name."""
        flat = {}
        for name, module, key in self.added:
            if (leaf := module._buffers[key]) is not None:
                flat[name] = leaf
        for name, module, key in self.leaves:
            if (leaf := module._parameters[key]) is not None:
                flat[name] = leaf
        if not flat and self.leaves:
            raise RuntimeError(
                f"{self.info.path} was called outside of the forward, where it has no params: a "
                "module that checkpoints itself does so in backward (switch that off, "
                "gradient_checkpointing_disable(), and use transforms.checkpoint), and under "
                "checkpoint a block that calls a layer of another one (name blocks without such "
                "calls, from_module(..., blocks=...))"
            )
        return flat

    def as_it_is(self) -> bool:
        """Whether the module itself can be called: it has its tensors, and no rule is here."""
        if not self.free or not self.leaves:
            return False
        _, module, key = self.leaves[0]
        return module._parameters[key] is not None

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
            return given(self.inner, flatten(p), args, {named: x, **kwargs})
        return given(self.inner, flatten(p), (x, *args), kwargs)


class BlockWrapper(SiteWrapper):
    """A block. reads: the weights with rules that its own code reads."""

    def __init__(self, inner: nn.Module, site: Site, info: SiteInfo) -> None:
        super().__init__(inner, site, info)
        vars(self)["reads"] = []

    def __getattr__(self, name: str) -> Any:
        for read in self.__dict__["reads"]:
            if read.name == name:  # code outside of the block reads it
                flat: Tree = {}
                read.into(self.own_params(), flat, self.site)
                return flat[name]
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.reads and self.as_it_is():
            return self.inner(*args, **kwargs)
        named = "" if args else next(iter(kwargs))  # x may be passed by name
        x, *rest = args or (kwargs.pop(named),)
        call: Callable[..., Any] = partial(self._call, named=named)
        if any(map(_is_cache, (*rest, *kwargs.values()))):
            call = _with_the_first_cache(call)
        p = unflatten(self.own_params())
        return self.site("block", call, p, x, tuple(rest), kwargs, at=self.info.path)

    def _call(self, p: Tree, *args: Any, **kwargs: Any) -> Any:
        if self.reads:
            held = flatten(p)
            flat = dict(held)
            for read in self.reads:
                read.into(held, flat, self.site)
            p = unflatten(flat)
        return super()._call(p, *args, **kwargs)


def _is_cache(value: Any) -> bool:
    """Whether a value is a cache of keys and values, by Hugging Face's protocol."""
    return hasattr(type(value), "get_seq_length") and hasattr(type(value), "update")


def _with_the_first_cache(call: Callable[..., Any]) -> Callable[..., Any]:
    """A block's function that sees caches of the first call when it runs again: keys appended twice
    would be attended to twice."""
    before: list[dict[int, Any]] = []

    def run(p: Tree, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [each for each in (*args, *kwargs.values()) if _is_cache(each)]
        if torch.compiler.is_compiling():
            return call(p, x, args, kwargs)
        if not before:
            before.append({id(cache): _copied_cache(cache) for cache in given})
            return call(p, x, args, kwargs)
        held = {i: _copied_cache(cache) for i, cache in before[0].items()}
        args = tuple(held.get(id(each), each) for each in args)
        return call(p, x, args, {name: held.get(id(v), v) for name, v in kwargs.items()})

    return run


def _copied_cache(value: Any, module: str = "") -> Any:
    """A copy of a cache and of its layers, with the same tensors."""
    if isinstance(value, list | tuple):
        return type(value)(_copied_cache(each, module) for each in value)
    if isinstance(value, dict):
        return type(value)((key, _copied_cache(each, module)) for key, each in value.items())
    if module and type(value).__module__ != module:
        return value
    out = copy.copy(value)
    module = type(value).__module__
    vars(out).update({key: _copied_cache(each, module) for key, each in vars(value).items()})
    return out


class SequentialWrapper(BlockWrapper):
    """A block that is a Sequential, which the model may iterate instead of calling."""

    def _whole(self) -> Any:
        if self.site.bound("block", self.info.path):
            raise ValueError(
                f"the model takes the block {self.info.path} apart instead of calling it, so that "
                "no rule can act on it as a block: from_module(..., blocks=()) makes its layers "
                "sites of their own"
            )
        return self.inner

    def __iter__(self) -> Iterator[Any]:
        return iter(self._whole())

    def __getitem__(self, key: Any) -> Any:
        return self._whole()[key]

    def __len__(self) -> int:
        return len(self.inner)


class LayerWrapper(SiteWrapper):
    """A linear, an embed, a norm or the head."""

    def __init__(self, inner: nn.Module, site: Site, info: SiteInfo) -> None:
        super().__init__(inner, site, info)
        parameters = inspect.signature(inner.forward).parameters
        vars(self)["defaults"] = {name: each.default for name, each in parameters.items()}

    def __getattr__(self, name: str) -> Any:
        # not a property: torch.compile would evaluate it where there are no params
        if name == "weight" and name in self._parameters:
            return self._read()
        return super().__getattr__(name)

    def _read(self) -> Tensor:
        """The weight for code that reads it, through a site of kind ``weight``."""
        p = self.own_params()
        if "weight" in p and not self.site.bound("weight", self.info.weight):
            return p["weight"]
        out = self.site("weight", weight_of, _turned(p, self.info), at=self.info.weight)
        return out.t() if self.info.transposed else out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) + len(kwargs) != 1:
            args, kwargs = self._set(args, kwargs)
            if len(args) + len(kwargs) != 1:
                return self._with_more(args, kwargs)
        (x,) = (*args, *kwargs.values())
        kind, path = self.info.kind, self.info.path
        if (kind == "embed" and self.as_it_is()) or (kind == "norm" and self._norms_as_it_is(x)):
            return self.inner(x)
        p = self.own_params()
        if kind == "head":
            out = self.site("head", head, p, x, at=path)
            return out if self.site.lazy else out.dense()
        out = self.site(kind, self._function(), _turned(p, self.info), x, at=path)
        scale = self.info.scale
        return out if scale is None else scaled(out, scale, self.info.scale_cast)

    def _norms_as_it_is(self, x: Tensor) -> bool:
        own = self.inner._parameters.values()
        return self.as_it_is() and all(leaf is None or leaf.dtype == x.dtype for leaf in own)

    def _set(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments that differ from their defaults."""
        names = [*self.defaults]
        while 1 < len(args) <= len(names) and args[-1] is self.defaults[names[len(args) - 1]]:
            args = args[:-1]
        empty = inspect.Parameter.empty
        return args, {k: v for k, v in kwargs.items() if v is not self.defaults.get(k, empty)}

    def _with_more(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call with more than x, which rules at a linear or an embed do not know."""
        kind, path = self.info.kind, self.info.path
        if kind == "norm":
            named = "" if args else next(iter(kwargs))
            x, *rest = args or (kwargs.pop(named),)
            call = partial(self._call, args=tuple(rest), kwargs=kwargs, named=named)
            return self.site("norm", call, self.own_params(), x, at=path)
        if self.site.bound(kind, path) and not self.site.bound("weight", self.info.weight):
            raise ValueError(
                f"the model calls {path} with more than its input, which a rule at a {kind} does "
                "not see: leave it out of the rule (skip=, select=)"
            )
        p = {name: leaf for name, leaf in self.own_params().items() if name not in added()}
        return given(self.inner, {**p, "weight": self._read()}, args, kwargs)

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
        """A linear other than nn.Linear, with the weight as ``[O, I]``, in the weight's dtype."""
        weight = weight_of(p)
        p = {name: leaf.to(weight.dtype) for name, leaf in p.items()}
        return self._call(_turned(p, self.info), x.to(weight.dtype))

    def _torch_norm(self, p: Tree, x: Tensor) -> Tensor:
        """torch's norms take one dtype: two are promoted, and the result has that of x.

        Where torch takes mixed dtypes (bf16 and fp32 on a CPU), the result is equal to the bit.
        """
        if all(leaf.dtype == x.dtype for leaf in p.values()):
            return self._call(p, x)
        wide = reduce(torch.promote_types, (leaf.dtype for leaf in p.values()), x.dtype)
        return self._call({k: v.to(wide) for k, v in p.items()}, x.to(wide)).to(x.dtype)


def _turned(p: dict[str, Tensor], site: SiteInfo) -> dict[str, Tensor]:
    """The leaves, with a transposed linear's ``weight`` as ``[O, I]``, or back."""
    if not site.transposed or "weight" not in p:
        return p
    return {**p, "weight": p["weight"].t()}


def at_site(module: nn.Module, site: Site, info: SiteInfo) -> SiteWrapper:
    """The wrapper that replaces a module."""
    if info.kind != "block":
        return LayerWrapper(module, site, info)
    wrapper = SequentialWrapper if isinstance(module, nn.Sequential) else BlockWrapper
    return wrapper(module, site, info)


# -- calls inside a module, which owns no params of its own ---------------------------------------


def rewrite_calls(module: nn.Module, site: Site, path: str) -> None:
    """Sends a module's calls of attention and rotary embeddings through sites with rules."""

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

    def stand_in(value: Any) -> Any:
        if value is F.scaled_dot_product_attention:
            return attention if site.bound("attention", path) else None
        if site.bound("rope", path) and is_rotary(value):
            return partial(_turn, site, path, value)
        return None

    for name, method in reroute(module, stand_in).items():
        vars(module)[name] = MethodType(method, module)


def _turn(
    site: Site,
    path: str,
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    *rest: Any,
    **more: Any,
) -> Any:
    """A call of rotary embeddings. rest: cos, sin, and arguments beyond the defaults."""

    def turn(p: Tree, q: Tensor, k: Tensor, *rest: Any) -> Any:
        return function(q, k, *rest, **more)

    if more or len(rest) != 2:
        return turn({}, q, k, *rest)
    return site("rope", turn, {}, q, k, *rest, at=path)


def _attend(p: Tree, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


def rewrite_glu(module: nn.Module, plain: nn.Module, gated: Gated, site: Site, path: str) -> None:
    """Sends the product of gate and up through the site. plain: a copy of the module."""
    compute = product(plain, gated)

    def between(p: Tree, gate: Tensor, up: Tensor) -> Tensor:
        return compute(gate, up)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        (x,) = (*args, *kwargs.values())
        gate, up = gated.split([self.get_submodule(name)(x) for name in gated.into])
        h = site("glu", between, {}, gate, up, at=path)
        return self.get_submodule(gated.down)(h)

    vars(module)["forward"] = MethodType(forward, module)


def hand_out_parameters(body: nn.Module, ties: Mapping[str, str]) -> None:
    """Makes ``parameters()`` and its likes return the tensors that attribute reads return.

    ``functional_call`` replaces parameters by plain tensors, which torch's own methods omit, and a
    rule may act on one. ties: a tied parameter's name -> its first name, which alone is listed.
    """
    for at, m in body.named_modules():
        module = vars(m).get("inner", m)
        if {"parameters", "named_parameters", "get_parameter"} & names_of(module):
            above = f"{at}." if at else ""
            tied = {n.removeprefix(above) for n, first in ties.items() if first.startswith(above)}
            for f in _handing_out(tied):
                vars(module)[f.__name__] = MethodType(f, module)


def _handing_out(tied: Collection[str]) -> tuple[Callable[..., Any], ...]:

    def named_parameters(
        self: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        modules: Any = self.named_modules() if recurse else [("", self)]
        for at, m in modules:
            for key in m._parameters:
                name = f"{at}.{key}" if at else key
                p = None if remove_duplicate and name in tied else getattr(m, key)
                if p is not None:
                    yield f"{prefix}.{name}" if prefix else name, p

    def parameters(self: nn.Module, recurse: bool = True) -> Iterator[Tensor]:
        for _, p in named_parameters(self, recurse=recurse):
            yield p

    def get_parameter(self: nn.Module, target: str) -> Tensor:
        at, _, key = target.rpartition(".")
        return getattr(self.get_submodule(at), key)

    return named_parameters, parameters, get_parameter


def leave_fast_paths(body: nn.Module, bound: Callable[[str], bool]) -> None:
    """Turns off the fused paths of torch's transformer layers, which read their children's weights,
    where rules act inside.

    bound: whether a rule acts in the module of that name.
    """
    for name, module in body.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and bound(name):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and bound(name):
            module.use_nested_tensor = False
