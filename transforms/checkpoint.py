"""Activation checkpointing as a rule on blocks: keep a block's inputs, recompute its inside.

"Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174.

Two mechanisms, one meaning. Under plain autograd and ``torch.compile``,
``torch.utils.checkpoint`` (non-reentrant), whose tags the compiler's partitioner honours. Under
``torch.func`` transforms, where saved-tensor hooks are refused, a functional one of our own, made
of *two* autograd Functions: the backward's work sits in the forward of the second, one functorch
level down, so that the recomputation is itself not recorded (``torch.func.grad`` runs its backward
with create_graph; a single Function saves nothing there: 16,640 KB against 16,432 without, two
save 13,000 of them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from core.forward import Forward, Rule, SiteInfo
from kernels.functions import nested_forward_mode
from transforms.legal import check_legal


def checkpoint(forward: Forward, *, every: int = 1) -> Forward:
    """Recomputes every k-th block in the backward pass instead of keeping its activations.

    The gradients are those of the bare forward, bit for bit where the kernels are deterministic:
    under autograd, ``torch.func.grad / vjp / vmap / jvp``, nested, and ``torch.compile(loss)``.
    Raises ValueError if ``every`` is not positive or the forward has no blocks.
    """
    if every < 1:
        raise ValueError(f"every must be 1 or more, not {every}")
    check_legal(forward, "checkpoint")

    def chosen(site: SiteInfo) -> bool:
        index = site.path.rpartition(".")[2]
        return not index.isdigit() or int(index) % every == 0

    def wrap(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        return rematerialize(f)

    return forward.with_rule(Rule("block", wrap, chosen, "checkpoint")).with_step("checkpoint")


def rematerialize(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` with the same value and gradients, which keeps its arguments and forgets the rest.

    Every tensor that is to be differentiated must be an argument (in any nesting of dicts, lists
    and tuples), not captured by closure. Random numbers drawn inside are drawn again.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        functorch = torch._C._are_functorch_transforms_active()
        if torch.compiler.is_compiling() and functorch:
            raise RuntimeError(
                "torch.compile(torch.func.grad(...)) with checkpoint is not supported by PyTorch: "
                "use transforms.value_and_grad(torch.compile(loss_fn))"
            )
        if functorch and nested_forward_mode():
            return f(*args, **kwargs)  # forward mode keeps nothing: there is nothing to save
        if functorch:
            return _functional(f)(*args, **kwargs)
        return torch_checkpoint(f, *args, use_reentrant=False, **kwargs)

    return run


# -- the functional mechanism -----------------------------------------------------------------


def _functional(f: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        out_form: list[Any] = []  # what comes out, tensors left blank: the Function passes these

        def flat(*tensors: Tensor) -> tuple[Any, ...]:
            full = list(rest)
            for i, tensor in zip(where, tensors, strict=True):
                full[i] = tensor
            call_args, call_kwargs = pytree.tree_unflatten(full, spec)
            out, out_spec = pytree.tree_flatten(f(*call_args, **call_kwargs))
            out_form[:] = [[_BLANK if isinstance(o, Tensor) else o for o in out], out_spec]
            kept = [o for o in out if isinstance(o, Tensor)]
            # an output that is an input would be returned unwrapped by the Function
            return tuple(o.view_as(o) if any(o is t for t in tensors) else o for o in kept)

        given = iter(_Checkpoint.apply(flat, _Rng(), *(leaves[i] for i in where)))
        out, out_spec = out_form
        return pytree.tree_unflatten([next(given) if o is _BLANK else o for o in out], out_spec)

    return run


_BLANK = object()


class _Rng:
    """The random state at the first run, to draw the same numbers at the second."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    @contextmanager
    def again(self) -> Iterator[None]:
        devices = [] if self.cuda is None else [torch.cuda.current_device()]
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda)
            yield


def _is_float(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _of(f: Callable[..., Any], flat: tuple[Any, ...], index: tuple[int, ...]) -> Callable[..., Any]:
    """``f`` as a function of ``flat[index]`` alone, giving its floating-point outputs alone."""

    def g(*chosen: Tensor) -> tuple[Any, ...]:
        full = list(flat)
        for i, tensor in zip(index, chosen, strict=True):
            full[i] = tensor
        return tuple(o for o in f(*full) if _is_float(o))

    return g


def _pull(
    f: Callable[..., Any],
    rng: _Rng | None,
    index: tuple[int, ...],
    flat: tuple[Any, ...],
    cotangents: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Gradients with respect to ``flat[index]``, by running ``f`` again."""
    with nullcontext() if rng is None else rng.again():
        pull = vjp(_of(f, flat, index), *(flat[i] for i in index))[1]
    return pull(cotangents)


def _pull_inside(
    f: Callable[..., Any],
    index: tuple[int, ...],
    flat: tuple[Any, ...],
    cotangents: tuple[Any, ...],
) -> tuple[Any, ...]:
    """:func:`_pull` as the gradient of an inner product, which stays inside its functorch level.

    vjp's pull runs after its level has ended. When it is differentiated again, an inner Function
    whose gradient is zero (a norm's, twice by its weight) then fails on a tensor of that level:
    "level.has_value() ... INTERNAL ASSERT FAILED" (torch 2.13). Keeps the graph: second order only.
    """
    g = _of(f, flat, index)

    def inner(*chosen: Tensor) -> Tensor:
        products = [(o * c).sum() for o, c in zip(g(*chosen), cotangents, strict=True)]
        return torch.stack([p.to(products[0].dtype) for p in products]).sum()

    return grad(inner, argnums=tuple(range(len(index))))(*(flat[i] for i in index))


class _Checkpoint(torch.autograd.Function):
    """Forward: ``f(*tensors)``. Backward: hands over to the second Function."""

    @staticmethod
    def forward(f: Any, rng: Any, *flat: Any) -> Any:
        return f(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.f, ctx.rng, *flat = inputs
        ctx.save_for_backward(*flat)
        ctx.save_for_forward(*flat)
        ctx.is_float = [_is_float(o) for o in output]
        ctx.mark_non_differentiable(*(o for o in output if not _is_float(o)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        flat = ctx.saved_tensors
        index = tuple(i for i in range(len(flat)) if ctx.needs_input_grad[2 + i])
        floats = [c for c, is_float in zip(cotangents, ctx.is_float, strict=True) if is_float]
        grads = _Recompute.apply(ctx.f, ctx.rng, index, len(flat), *flat, *floats)
        by_index = dict(zip(index, grads, strict=True))
        return (None, None, *(by_index.get(i) for i in range(len(flat))))

    @staticmethod
    def jvp(ctx: Any, _f: Any, _rng: Any, *tangents: Any) -> Any:
        flat = ctx.saved_tensors
        index = tuple(i for i, t in enumerate(tangents) if t is not None)
        primals = tuple(flat[i] for i in index)
        with ctx.rng.again():
            out = jvp(_of(ctx.f, flat, index), primals, tuple(tangents[i] for i in index))[1]
        given = iter(out)
        return tuple(next(given) if is_float else None for is_float in ctx.is_float)

    @staticmethod
    def vmap(info: Any, in_dims: Any, f: Any, rng: Any, *flat: Any) -> Any:
        batched = vmap(f, in_dims=in_dims[2:], randomness=info.randomness)
        out = _Checkpoint.apply(batched, rng, *flat)
        return out, (0,) * len(out)


class _Recompute(torch.autograd.Function):
    """Forward: the recomputation and its vjp. Its own derivatives are those of that computation."""

    @staticmethod
    def forward(f: Any, rng: Any, index: Any, n: int, *flat_and_cotangents: Any) -> Any:
        return _pull(f, rng, index, flat_and_cotangents[:n], flat_and_cotangents[n:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.head = inputs[:4]
        ctx.save_for_backward(*inputs[4:])
        ctx.save_for_forward(*inputs[4:])

    @staticmethod
    def as_function(head: Any) -> Callable[..., Any]:
        f, rng, index, n = head
        return lambda *a: _pull(f, rng, index, a[:n], a[n:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        flat = ctx.saved_tensors
        need = tuple(i for i in range(len(flat)) if ctx.needs_input_grad[4 + i])
        grads = _pull_inside(_Recompute.as_function(ctx.head), need, flat, cotangents)
        by_index = dict(zip(need, grads, strict=True))
        return (None,) * 4 + tuple(by_index.get(i) for i in range(len(flat)))

    @staticmethod
    def jvp(ctx: Any, _f: Any, _rng: Any, _index: Any, _n: Any, *tangents: Any) -> Any:
        flat = ctx.saved_tensors
        index = tuple(i for i, t in enumerate(tangents) if t is not None)
        f = _of(_Recompute.as_function(ctx.head), flat, index)
        return jvp(f, tuple(flat[i] for i in index), tuple(tangents[i] for i in index))[1]

    @staticmethod
    def vmap(info: Any, in_dims: Any, f: Any, rng: Any, index: Any, n: int, *rest: Any) -> Any:
        function = _Recompute.as_function((f, rng, index, n))
        out = vmap(function, in_dims=in_dims[4:], randomness=info.randomness)(*rest)
        return out, (0,) * len(out)
