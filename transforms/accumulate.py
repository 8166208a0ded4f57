"""Gradient accumulation: several batches as if they were one, at the memory of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from core.batch import IGNORE
from params.tree import Tree
from transforms.checkpoint import rematerialize

Loss = Callable[[Tree, Any], Tensor]


def accumulate(loss_fn: Loss, microbatches: int) -> Loss:
    """``(params, batches) -> loss``: the mean over the labelled tokens of all microbatches.

    batches: a sequence of ``microbatches`` batches, or one dict whose tensors have them along a
    leading axis (``stack_examples``). Each weighs as many as its labels that are not -100, so the
    loss and its gradient are those of one batch of all their tokens, however the labels are spread.

    Under autograd each microbatch's gradient is computed as its loss is, and its activations are
    gone before the next begins; the gradient's sum is fp32 at least. Under ``torch.func`` and
    ``torch.compile`` a microbatch is computed again in the backward pass instead. Works around
    ``torch.compile(loss_fn)``. Raises ValueError if the number of batches is not ``microbatches``.
    """
    if microbatches < 1:
        raise ValueError(f"microbatches must be 1 or more, not {microbatches}")

    def run(params: Tree, batches: Any) -> Tensor:
        each = _split(batches, microbatches)
        shares = _shares(each)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return _summed(rematerialize(loss_fn), params, each, shares)
        leaves, spec = pytree.tree_flatten(params)

        def part(leaves: Sequence[Tensor], i: int) -> Tensor:
            loss = loss_fn(pytree.tree_unflatten(leaves, spec), each[i])
            return shares[i].to(loss.dtype) * loss

        if not torch.is_grad_enabled() or not any(leaf.requires_grad for leaf in leaves):
            return torch.stack([part(leaves, i) for i in range(microbatches)]).sum()
        return _Accumulated.apply(part, microbatches, *leaves)

    return run


def _split(batches: Any, count: int) -> list[Any]:
    if isinstance(batches, Mapping):
        lengths = {tensor.shape[0] for tensor in batches.values()}
        if lengths != {count}:
            raise ValueError(f"the batch holds {sorted(lengths)} microbatches, not {count}")
        return [{name: tensor[i] for name, tensor in batches.items()} for i in range(count)]
    if len(batches) != count:
        raise ValueError(f"there are {len(batches)} batches, not {count} microbatches")
    return list(batches)


def _shares(batches: Sequence[Any]) -> Tensor:
    """[microbatches] fp32: the share of all labelled tokens. On the device: nothing waits."""
    counts = torch.stack([(batch["labels"] != IGNORE).sum() for batch in batches]).float()
    return counts / counts.sum().clamp(min=1)


def _summed(loss_fn: Loss, params: Tree, batches: Sequence[Any], shares: Tensor) -> Tensor:
    parts = [loss_fn(params, batch) for batch in batches]
    return torch.stack([s.to(p.dtype) * p for s, p in zip(shares, parts, strict=True)]).sum()


class _Accumulated(torch.autograd.Function):
    """(part, count, *leaves) -> the sum of ``part(leaves, i)``, its gradient ready beforehand."""

    @staticmethod
    def forward(ctx: Any, part: Any, count: int, *leaves: Tensor) -> Tensor:
        ctx.part, ctx.count = part, count
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[2:]) if need]
        total: list[Tensor] = []
        losses = []
        for k in range(count):
            fresh = [leaf.detach() for leaf in leaves]
            for i in wanted:
                fresh[i].requires_grad_()
            with torch.enable_grad():
                loss = part(fresh, k)
            grads = torch.autograd.grad(loss, [fresh[i] for i in wanted], materialize_grads=True)
            losses.append(loss.detach())
            if not total:
                total = [g if count == 1 else g.to(_wide(g.dtype), copy=True) for g in grads]
            else:
                torch._foreach_add_(total, list(grads))
        # plain results, no part of a graph: save_for_backward is for the inputs
        ctx.grads = {i: g.to(leaves[i].dtype) for i, g in zip(wanted, total, strict=True)}
        ctx.save_for_backward(*leaves)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        grads: Mapping[int, Tensor] = ctx.grads
        leaves = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a gradient that can be differentiated again
            loss = torch.stack([ctx.part(leaves, k) for k in range(ctx.count)]).sum()
            wanted = list(grads)
            found = torch.autograd.grad(
                loss, [leaves[i] for i in wanted], create_graph=True, materialize_grads=True
            )
            grads = dict(zip(wanted, found, strict=True))
        full = (grads.get(i) for i in range(len(leaves)))
        return (None, None, *(None if g is None else g * cotangent.to(g.dtype) for g in full))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
