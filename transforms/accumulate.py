"""Gradient accumulation: several batches as if they were one, at the memory of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from core.batch import IGNORE
from params.tree import Tree, flatten
from transforms.checkpoint import naming_what_differs, rematerialize

Loss = Callable[[Tree, Any], Tensor]
GradFn = Callable[[Tree, Any], tuple[Tensor, Tree]]


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
        shares = token_shares(each)
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


class Accumulated(NamedTuple):
    """Loss and gradients of several batches."""

    loss: Tensor  # fp32 scalar: the mean over the labelled tokens of all batches
    losses: list[Tensor]  # of each batch
    grads: dict[str, Tensor]  # by path


def accumulate_grads(
    grad_fn: GradFn, params: Tree, batches: Sequence[Any], device: torch.device | None = None
) -> Accumulated:
    """Gradients of several batches as those of one: :func:`accumulate` for a training loop.

    grad_fn is called once a batch, so it may be compiled or recorded as a CUDA graph, which
    ``accumulate`` inside of it cannot be: results may be overwritten by its next call. The sum is
    fp32; the gradients of a single batch are returned as they are.

    Args:
        grad_fn: ``(params, batch) -> (loss, grads)``, as of :func:`value_and_grad`.
        batches: on the CPU, where counting their labels waits for nothing.
        device: where grad_fn wants them; each is copied when its turn comes. Default: the CPU.
    """
    shares = token_shares(batches)
    losses: list[Tensor] = []
    total: dict[str, Tensor] = {}
    for batch, share in zip(batches, shares.tolist(), strict=True):
        loss, tree = grad_fn(params, batch if device is None else to_device(batch, device))
        losses.append(loss.clone())  # a CUDA graph writes the next one in its place
        grads = flatten(tree)
        if len(batches) == 1:
            return Accumulated(loss, losses, grads)
        if not total:
            # fp32: in bf16 the eighth batch would add three bits to the sum
            total = {p: torch.zeros_like(g, dtype=torch.float32) for p, g in grads.items()}
        torch._foreach_add_(list(total.values()), [grads[p] for p in total], alpha=share)
    each = torch.stack(losses)
    return Accumulated((each * shares.to(each.device)).sum(), losses, total)


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A CPU batch on the device, without waiting for the copy."""
    if device.type == "cpu":
        return dict(batch)
    return {name: t.pin_memory().to(device, non_blocking=True) for name, t in batch.items()}


def token_shares(batches: Sequence[Any]) -> Tensor:
    """``[len(batches)]`` fp32, on their device: the share of all labelled tokens in each."""
    counts = labelled_tokens(batches).float()
    return counts / counts.sum().clamp(min=1)


def labelled_tokens(batches: Sequence[Any]) -> Tensor:
    """``[len(batches)]`` int64, on their device: how many labels of each count in its loss."""
    counts = [(batch["labels"] != IGNORE).sum() for batch in batches]
    return torch.stack(counts) if counts else torch.zeros(0, dtype=torch.int64)


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
            inputs = [fresh[i] for i in wanted]
            with naming_what_differs():
                grads = torch.autograd.grad(loss, inputs, materialize_grads=True)
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
