"""Activation checkpointing under ``torch.func``, which refuses saved-tensor hooks.

``torch.func.grad`` runs its backward with create_graph. A single autograd Function would therefore
record its recomputation and save no memory. With *two*, the forward of the second recomputes, one
functorch level down, where nothing is recorded.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from kernels.runtime.autograd import func_levels, unexpanded
from transforms.kept import Keep, Kept, RecordOutputs, ReplayOutputs


def functional(
    f: Callable[..., Any], keep: Keep | None = None, name: str = "a function"
) -> Callable[..., Any]:
    """``f`` that keeps only its arguments, and the outputs of operations that ``keep`` selects.

    Kept outputs serve the first derivative; higher ones recompute everything. Only the result of
    ``f`` carries gradients: a tensor that ``f`` hands on by an attribute or a mutable argument
    raises RuntimeError where it is used. ``name`` is that of ``f`` in errors.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        memo = _Memo(keep)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        out_form: list[Any] = []  # leaves of the output without its tensors, and its treespec
        places: dict[int, int] = {}  # id of a tensor made inside -> its index among the results
        moving = [_moves(leaves[i], memo.forward_mode) for i in where]

        def flat(*tensors: Tensor) -> tuple[Any, ...]:
            full = list(rest)
            for i, tensor in zip(where, tensors, strict=True):
                full[i] = tensor
            given = pytree.tree_unflatten(full, spec)
            phase = memo.phase
            closed = _Closed(name, memo.forward_mode, itertools.compress(tensors, moving))
            # torch's fused attention has no forward-mode derivative
            plain = sdpa_kernel([SDPBackend.MATH]) if memo.forward_mode else nullcontext()
            checked = tensors if phase == "recorded" else ()
            with closed, memo.watching(), memo.autocast(), plain, _unmodified(checked, name):
                out, out_spec = pytree.tree_flatten(f(*given[0], **given[1]))
            out_form[:] = [[_BLANK if isinstance(o, Tensor) else o for o in out], out_spec]
            kept = [o for o in out if isinstance(o, Tensor)]
            places.update({id(o): i for i, o in enumerate(kept)} if phase == "recorded" else {})
            if phase == "recorded":
                _carry_back((args, kwargs), given, dict(zip(map(id, full), leaves, strict=True)))
            # views: the Function would return an input unwrapped, and a result that f also handed
            # on must differ from the Function's own output
            results = tuple(o.view_as(o) for o in kept)
            if phase == "recorded" or (phase == "pushed" and memo.beside):
                memo.beside = closed.forbid(except_for=tensors)
            return results

        if not any(moving):
            return f(*args, **kwargs)
        results = _Checkpoint.apply(flat, memo, *(leaves[i] for i in where))
        _carry_back((args, kwargs), (args, kwargs), {at: results[i] for at, i in places.items()})
        given = iter(results)
        out, out_spec = out_form
        return pytree.tree_unflatten([next(given) if o is _BLANK else o for o in out], out_spec)

    return run


def unchanging(f: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``f`` whose second run gets the dicts and lists as they were before the first.

    Raises RuntimeError if ``f`` changes a tensor argument in place: tensors are kept uncopied.
    """
    before: list[Any] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if before:
            args, kwargs = _copied(before[0])
            return f(*args, **kwargs)
        before.append(_copied((args, kwargs)))
        leaves = pytree.tree_leaves((args, kwargs)) if torch.is_grad_enabled() else ()
        given = [x for x in leaves if isinstance(x, Tensor)]
        with _unmodified(given, name):
            return f(*args, **kwargs)

    return run


def _copied(value: Any) -> Any:
    """The same tensors in new containers."""
    if type(value) is tuple:
        return tuple(map(_copied, value))
    if not isinstance(value, dict | list | set | deque):
        return value
    out: Any = copy.copy(value)
    for key, each in [] if isinstance(out, set) else _entries(out):
        if (new := _copied(each)) is not each:
            out[key] = new
    return out


def _entries(value: Any) -> list[tuple[Any, Any]]:
    return [*(value.items() if isinstance(value, dict) else enumerate(value))]


@contextmanager
def _unmodified(tensors: Sequence[Tensor], name: str) -> Iterator[None]:
    """Raises RuntimeError if a tensor was changed in place."""
    versions = [*map(_version, tensors)]
    yield
    changed = [x for x, v in zip(tensors, versions, strict=True) if _version(x) != v]
    if changed:
        raise RuntimeError(
            f"checkpoint: {name} changes a tensor {list(changed[0].shape)} of its arguments in "
            "place, and would be recomputed from the changed one. Make it return a new tensor, or "
            "leave checkpoint out"
        )


def _version(x: Tensor) -> int:
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x._version


_BLANK = object()
_Levels = torch._C._functorch.TransformType


class _Closed(TorchFunctionMode):
    """Checks that differentiated tensors enter a function as arguments and leave it as results.

    A captured tensor is a constant one functorch level down, as is, one level up, a tensor made
    here that is no result: their gradients would be silent zeros. The first raises where it is
    used, the second is turned into one that does (:meth:`forbid`).

    forward_mode: levels of jvp. Any captured tensor of theirs raises: its tangent is not visible.
    moving: the differentiated arguments, and all that is computed from them.
    """

    def __init__(self, name: str, forward_mode: frozenset[int], moving: Iterable[Tensor]) -> None:
        super().__init__()
        self.name = name
        self.forward_mode = forward_mode
        self.moving = {id(x): weakref.ref(x) for x in moving}
        self.constant = False  # inside torch.no_grad()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        level = torch._C._functorch.maybe_current_level() or 0
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in tensors:
            if (of := torch._C._functorch.maybe_get_level(x)) > level and (
                of in self.forward_mode or x.requires_grad
            ):
                raise RuntimeError(
                    f"checkpoint: {self.name} uses a differentiated tensor {list(x.shape)} that is "
                    "not among its arguments (captured by closure, or made in another block): its "
                    "gradient would be lost. Make it an argument, or leave checkpoint out"
                )
        out = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            self.constant = not args[0] and not self.forward_mode  # tangents pass through no_grad
        elif not self.constant and func not in _CONSTANT and any(map(self.moves, tensors)):
            for x in pytree.tree_leaves(out):
                if isinstance(x, Tensor) and _is_float(x):
                    self.moving[id(x)] = weakref.ref(x)
        return out

    def moves(self, x: Tensor) -> bool:
        ref = self.moving.get(id(x))
        return ref is not None and ref() is x

    def forbid(self, except_for: Sequence[Tensor]) -> bool:
        """Makes every other differentiated tensor that is still alive raise at its next use.

        Returns whether there is one. The first run records no graph that would keep tensors alive.
        """
        spared = {id(x) for x in except_for}
        alive = [x for ref in self.moving.values() if (x := ref()) is not None]
        for x in (escaped := [x for x in alive if id(x) not in spared]):
            vars(x)["name"] = self.name
            x.__class__ = _Escaped
        return bool(escaped)


class _Escaped(Tensor):
    """A tensor that left a checkpointed function otherwise than as its result."""

    __repr__ = object.__repr__  # type: ignore[assignment]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        tensors = pytree.tree_leaves((args, kwargs))
        name = next(vars(x)["name"] for x in tensors if isinstance(x, _Escaped))
        raise RuntimeError(
            f"checkpoint: {name} hands a tensor on beside its result (by an attribute, or in a "
            "mutable argument), and its gradient would be lost here. Use transforms.value_and_grad "
            "in place of torch.func, without policy='offload', or leave checkpoint out"
        )


_CONSTANT = (Tensor.detach, torch.detach, vars(torch._C.TensorBase)["data"].__get__)


def _moves(x: Tensor, forward_mode: frozenset[int]) -> bool:
    """Whether a tensor is differentiated, by plain autograd or at any level of ``torch.func``."""
    if not _is_float(x):
        return False
    while not x.requires_grad and torch._C._functorch.maybe_get_level(x) not in forward_mode:
        if not torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return True


def _carry_back(old: Any, new: Any, given: Mapping[int, Any]) -> None:
    """Copies a function's changes of its dict and list arguments to the caller's.

    Unflattened pytrees are copies. given: id of a leaf of a copy -> the caller's leaf.
    """

    if isinstance(old, tuple):
        for a, b in zip(old, new, strict=True):
            _carry_back(a, b, given)
    elif type(old) in (dict, list) and type(new) is type(old):
        entries = dict(old) if isinstance(old, dict) else dict(enumerate(old))
        changed = dict(new) if isinstance(new, dict) else dict(enumerate(new))
        for key, value in changed.items():
            before = entries.get(key, _BLANK)
            if type(value) in (dict, list, tuple) and type(value) is type(before):
                _carry_back(before, value, given)
                changed[key] = before
            else:
                changed[key] = given.get(id(value), value)
        if isinstance(old, dict):
            old.clear()
            old.update(changed)
        else:
            old[:] = changed.values()


# -- kept outputs and random state -------------------------------------------------------------


class _Memo:
    """One run's random state, autocast state and kept outputs.

    phase: whether results are being "recorded" or "replayed", or tangents "pushed".
    beside: whether a tensor left the function otherwise than as a result.
    """

    def __init__(self, keep: Keep | None) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        self.casts = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ]
        self.keep = keep
        self.forward_mode = frozenset(i.level() for i in func_levels() if i.key() == _Levels.Jvp)
        self.phase: str | None = None
        self.beside = False
        self.levels: Counter[Any] = Counter()  # functorch's, while recording
        self.kept = Kept()

    @contextmanager
    def again(self) -> Iterator[None]:
        devices = [] if self.cuda is None else [torch.cuda.current_device()]
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda)
            yield

    @contextmanager
    def during(self, phase: str | None) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """``torch.autocast`` as in the first run."""
        with ExitStack() as stack:
            for device, enabled, dtype in self.casts:
                if enabled or torch.is_autocast_enabled(device):
                    stack.enter_context(
                        torch.autocast(device, dtype, enabled=enabled, cache_enabled=False)
                    )
            yield

    def watching(self) -> Any:
        """Records or replays kept outputs. Operations come in the same order, without tangents,
        only under the recording's levels and one of vjp; under others nothing is replayed."""
        if self.keep is None or self.phase in (None, "pushed"):
            return nullcontext()
        levels = Counter(i.key() for i in func_levels())
        if self.phase == "recorded":
            self.levels = levels
            self.kept = Kept()
            return RecordOutputs(self.keep, self.kept)
        same = levels == self.levels + Counter([_Levels.Grad])
        return ReplayOutputs(self.keep, self.kept) if same else nullcontext()


# -- the two Functions ------------------------------------------------------------------------


def _is_float(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _of(f: Callable[..., Any], flat: tuple[Any, ...], index: tuple[int, ...]) -> Callable[..., Any]:
    """``f`` as a function of ``flat[index]``, returning its floating-point outputs."""

    def g(*chosen: Tensor) -> tuple[Any, ...]:
        full = list(flat)
        for i, tensor in zip(index, chosen, strict=True):
            full[i] = tensor
        return tuple(o for o in f(*full) if _is_float(o))

    return g


def _pull(
    f: Callable[..., Any],
    memo: _Memo,
    index: tuple[int, ...],
    flat: tuple[Any, ...],
    cotangents: tuple[Any, ...],
    phase: str | None = None,
) -> tuple[Any, ...]:
    """Gradients with respect to ``flat[index]``, by running ``f`` again."""
    with memo.again(), memo.during(phase):
        pull = vjp(_of(f, flat, index), *(flat[i] for i in index))[1]
    return pull(cotangents)


def _pull_inside(
    f: Callable[..., Any],
    index: tuple[int, ...],
    flat: tuple[Any, ...],
    cotangents: tuple[Any, ...],
) -> tuple[Any, ...]:
    """:func:`_pull` as the gradient of an inner product, which stays inside its functorch level.

    The pull of vjp runs after its level has ended. Differentiated again, an inner Function with a
    zero gradient (a norm's, twice by its weight) then fails on a tensor of that level:
    "level.has_value() ... INTERNAL ASSERT FAILED" (torch 2.13). Keeps the graph: second order only.
    """
    g = _of(f, flat, index)

    def inner(*chosen: Tensor) -> Tensor:
        products = [(o * c).sum() for o, c in zip(g(*chosen), cotangents, strict=True)]
        return torch.stack([p.to(products[0].dtype) for p in products]).sum()

    return grad(inner, argnums=tuple(range(len(index))))(*(flat[i] for i in index))


class _Checkpoint(torch.autograd.Function):
    """Forward: ``f(*tensors)``. Backward: calls the second Function."""

    @staticmethod
    def forward(f: Any, memo: Any, *flat: Any) -> Any:
        with memo.during("recorded"):
            return f(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.f, ctx.memo, *flat = inputs
        ctx.save_for_backward(*flat)
        ctx.save_for_forward(*flat)
        ctx.is_float = [_is_float(o) for o in output]
        ctx.mark_non_differentiable(*(o for o in output if not _is_float(o)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        flat = ctx.saved_tensors
        index = tuple(i for i in range(len(flat)) if ctx.needs_input_grad[2 + i])
        floats = [c for c, is_float in zip(cotangents, ctx.is_float, strict=True) if is_float]
        grads = _Recompute.apply(ctx.f, ctx.memo, index, len(flat), *flat, *floats)
        by_index = dict(zip(index, grads, strict=True))
        return (None, None, *(by_index.get(i) for i in range(len(flat))))

    @staticmethod
    def jvp(ctx: Any, _f: Any, _memo: Any, *tangents: Any) -> Any:
        flat = ctx.saved_tensors
        index = tuple(i for i, t in enumerate(tangents) if t is not None)
        primals = tuple(unexpanded(flat[i]) for i in index)
        if not any(ctx.is_float):
            return (None,) * len(ctx.is_float)
        with ctx.memo.again(), ctx.memo.during("pushed"):
            out = jvp(_of(ctx.f, flat, index), primals, tuple(tangents[i] for i in index))[1]
        given = iter(out)
        return tuple(next(given) if is_float else None for is_float in ctx.is_float)

    @staticmethod
    def vmap(info: Any, in_dims: Any, f: Any, memo: Any, *flat: Any) -> Any:
        batched = vmap(f, in_dims=in_dims[2:], randomness=info.randomness)
        out = _Checkpoint.apply(batched, memo, *flat)
        return out, (0,) * len(out)


class _Recompute(torch.autograd.Function):
    """Forward: the recomputation and its vjp, which its own derivatives differentiate."""

    @staticmethod
    def forward(f: Any, memo: Any, index: Any, n: int, *flat_and_cotangents: Any) -> Any:
        flat, cotangents = flat_and_cotangents[:n], flat_and_cotangents[n:]
        return _pull(f, memo, index, flat, cotangents, "replayed")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.head = inputs[:4]
        ctx.save_for_backward(*inputs[4:])
        ctx.save_for_forward(*inputs[4:])

    @staticmethod
    def as_function(head: Any, phase: str | None = None) -> Callable[..., Any]:
        f, memo, index, n = head
        return lambda *a: _pull(f, memo, index, a[:n], a[n:], phase)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        flat = ctx.saved_tensors
        need = tuple(i for i in range(len(flat)) if ctx.needs_input_grad[4 + i])
        grads = _pull_inside(_Recompute.as_function(ctx.head), need, flat, cotangents)
        by_index = dict(zip(need, grads, strict=True))
        return (None,) * 4 + tuple(by_index.get(i) for i in range(len(flat)))

    @staticmethod
    def jvp(ctx: Any, _f: Any, _memo: Any, _index: Any, _n: Any, *tangents: Any) -> Any:
        flat = ctx.saved_tensors
        index = tuple(i for i, t in enumerate(tangents) if t is not None)
        f = _of(_Recompute.as_function(ctx.head), flat, index)
        primals = tuple(unexpanded(flat[i]) for i in index)
        return jvp(f, primals, tuple(tangents[i] for i in index))[1]

    @staticmethod
    def vmap(info: Any, in_dims: Any, f: Any, memo: Any, index: Any, n: int, *rest: Any) -> Any:
        function = _Recompute.as_function((f, memo, index, n), "replayed")
        out = vmap(function, in_dims=in_dims[4:], randomness=info.randomness)(*rest)
        return out, (0,) * len(out)
