"""Gradients of a pytree, with the memory of plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from core.forward import Forward
from params.formats import is_adapter, is_scale
from params.tree import Tree, flatten, merge, partition, unflatten
from transforms.checkpoint import naming_what_differs

Loss = Callable[[Tree, Any], Tensor]


def value_and_grad(
    loss_fn: Loss, select: Sequence[str] | None = None
) -> Callable[[Tree, Any], tuple[Any, Tree]]:
    """``(params, batch) -> (loss, grads)``; ``grads`` is the nested dict of the trained leaves.

    Frozen leaves are absent from ``grads``; a trained leaf on which the loss does not depend gets
    zeros. Unlike ``torch.func.grad``, the backward runs without create_graph, which holds 2.8 times
    the memory.

    Args:
        loss_fn: ``(params, batch) -> loss``, or ``-> (loss, buffers)`` (a Forward with ``aux``),
            for which the result is ``((loss, buffers), grads)``. It may be compiled.
        select: path patterns of the leaves to train. Default: the adapters, if there are any
            (``lora``), else every floating-point or complex leaf except the scales of quantised
            weights. The constants of a Forward (``forward.constant``: a foreign module's buffers,
            and its parameters that did not require gradients) are never trained.

    Raises ValueError if a pattern matches nothing or no leaf that can be trained, or if the loss
    depends on no trained leaf; RuntimeError inside of ``torch.func`` transforms.

    Example::

        loss, grads = value_and_grad(fuse_loss(forward), select=["projector"])(params, batch)
    """

    constant = loss_fn.constant if isinstance(loss_fn, Forward) else frozenset[str]()

    def run(params: Tree, batch: Any) -> tuple[Any, Tree]:
        if torch._C._functorch.maybe_current_level() is not None:
            raise RuntimeError(
                "value_and_grad uses autograd, which torch.func does not differentiate: inside of "
                "vmap, grad or jvp use torch.func.grad_and_value(loss_fn), which returns (grads, "
                "loss); for per-example gradients, vmap(grad_and_value(loss_fn), in_dims=(None, 0))"
            )
        learning, frozen = trainable(params, select, constant)
        leaves = {path: leaf.detach().requires_grad_() for path, leaf in flatten(learning).items()}
        out: Any = loss_fn(merge(unflatten(leaves), frozen), batch)
        loss, *aux = out if isinstance(out, tuple) else (out,)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"the loss is a {type(loss).__name__}: loss_fn must return one tensor, or a tuple "
                "of one and the buffers"
            )
        if not loss.requires_grad:
            raise ValueError(
                f"the loss depends on none of the leaves that learn ({', '.join([*leaves][:4])}): "
                "they are frozen, or it is computed under torch.no_grad() or from detached tensors"
            )
        with naming_what_differs():
            grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        value = (loss.detach(), *aux) if aux else loss.detach()
        return value, unflatten(dict(zip(leaves, grads, strict=True)))

    return run


def trainable(
    params: Tree, select: Sequence[str] | None = None, constant: Collection[str] = ()
) -> tuple[Tree, Tree]:
    """``(trained, frozen)``: params split as :func:`value_and_grad` splits them.

    constant: paths of leaves that are never trained (``forward.constant``).
    """
    if select is None:
        flat = flatten(params)
        learns = {path: leaf for path, leaf in flat.items() if is_adapter(path)}
        learns = learns or {
            path: leaf for path, leaf in flat.items() if _can_learn(path, flat, constant)
        }
        if not learns:
            layers = ", ".join([*dict.fromkeys(path.rpartition(".")[0] for path in flat)][:3])
            raise ValueError(
                f"no leaf of params can learn ({layers}, ...): {_dtypes(flat)}. Quantised weights "
                "are frozen; lora(forward) puts adapters beside them that learn"
            )
        return unflatten(learns), unflatten({p: t for p, t in flat.items() if p not in learns})
    flat = flatten(params)
    learning, frozen = partition(params, select)
    stuck = {p: t for p, t in flatten(learning).items() if not _can_learn(p, flat, constant)}
    if len(stuck) == len(flatten(learning)):
        held = " (requires_grad is False in the module)" if {*stuck} & {*constant} else ""
        have = sorted(stuck)[:4]
        raise ValueError(f"nothing that {tuple(select)} names can learn: {have}{held}")
    free = {p: t for p, t in flatten(learning).items() if p not in stuck}
    return unflatten(free), merge(frozen, unflatten(stuck))


def _dtypes(flat: dict[str, Tensor]) -> str:
    names = sorted({str(leaf.dtype).removeprefix("torch.") for leaf in flat.values()})
    return f"they are {', '.join(names)}" if names else "params are empty"


def _can_learn(path: str, flat: dict[str, Tensor], constant: Collection[str]) -> bool:
    real = flat[path].is_floating_point() or flat[path].is_complex()
    return real and not is_scale(path, flat) and path not in constant
