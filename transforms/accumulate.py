"""Gradient accumulation: one step over several batches, with the memory of one."""

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

    ``batches`` is a sequence of ``microbatches`` batches, or one dict whose tensors stack them
    along a leading axis (``stack_examples``). Each microbatch is weighted by its number of labels
    other than -100, so the loss and its gradient are those of one batch with all the tokens.

    Under autograd, the forward computes each microbatch's gradient and frees its activations before
    the next one; gradients are summed in fp32 or wider. Under ``torch.func`` and ``torch.compile``,
    microbatches are recomputed in the backward pass. ``loss_fn`` may be compiled. Raises ValueError
    if the number of batches is not ``microbatches``.
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
    losses: list[Tensor]  # one per batch
    grads: dict[str, Tensor]  # by path


def accumulate_grads(
    grad_fn: GradFn, params: Tree, batches: Sequence[Any], device: torch.device | None = None
) -> Accumulated:
    """Accumulated gradients for a training loop: :func:`accumulate` outside of ``grad_fn``.

    ``grad_fn`` is called once per batch, so it may be compiled or a CUDA graph whose next call
    overwrites its results. Gradients are summed in fp32; those of a single batch are returned as
    they are.

    Args:
        grad_fn: ``(params, batch) -> (loss, grads)``, as from :func:`value_and_grad`.
        params: nested dict of tensors.
        batches: on the CPU, where their labels are counted without waiting for a GPU.
        device: of the batches that grad_fn gets; each is copied just before its call. Default: CPU.
    """
    shares = token_shares(batches)
    losses: list[Tensor] = []
    total: dict[str, Tensor] = {}
    for batch, share in zip(batches, shares.tolist(), strict=True):
        loss, tree = grad_fn(params, batch if device is None else to_device(batch, device))
        losses.append(loss.clone())  # a CUDA graph overwrites it in the next call
        grads = flatten(tree)
        if len(batches) == 1:
            return Accumulated(loss, losses, grads)
        if not total:
            # fp32: a bf16 sum would lose most bits of the later batches
            total = {p: torch.zeros_like(g, dtype=torch.float32) for p, g in grads.items()}
        torch._foreach_add_(list(total.values()), [grads[p] for p in total], alpha=share)
    each = torch.stack(losses)
    return Accumulated((each * shares.to(each.device)).sum(), losses, total)


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A CPU batch on the device; the copy is asynchronous."""
    if device.type == "cpu":
        return dict(batch)
    return {name: t.pin_memory().to(device, non_blocking=True) for name, t in batch.items()}


def token_shares(batches: Sequence[Any]) -> Tensor:
    """``[len(batches)]`` fp32, on their device: each batch's share of all labelled tokens."""
    counts = labelled_tokens(batches).float()
    return counts / counts.sum().clamp(min=1)


def labelled_tokens(batches: Sequence[Any]) -> Tensor:
    """``[len(batches)]`` int64, on their device: the number of labelled tokens of each batch."""
    counts = [(batch["labels"] != IGNORE).sum() for batch in batches]
    return torch.stack(counts) if counts else torch.zeros(0, dtype=torch.int64)


def _summed(loss_fn: Loss, params: Tree, batches: Sequence[Any], shares: Tensor) -> Tensor:
    parts = [loss_fn(params, batch) for batch in batches]
    return torch.stack([s.to(p.dtype) * p for s, p in zip(shares, parts, strict=True)]).sum()


class _Accumulated(torch.autograd.Function):
    """(part, count, *leaves) -> the sum of ``part(leaves, i)``; forward computes the gradient."""

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
        # gradients are outside of any graph: save_for_backward is for inputs
        ctx.grads = {i: g.to(leaves[i].dtype) for i, g in zip(wanted, total, strict=True)}
        ctx.save_for_backward(*leaves)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        grads: Mapping[int, Tensor] = ctx.grads
        leaves = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient is differentiated again
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
