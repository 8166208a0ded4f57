"""Muon's step apart from its matrix products: each number is moved once.

Before the products a step moves 12 bytes per entry (fp32 momentum read and written, bf16 gradient
read, bf16 stack written), after them 12 more (fp32 param read and written, bf16 update read, bf16
copy written). The clipping factor, Nesterov's method, the weight decay and the copy for the next
forward cost no pass of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.optimizer.adamw import GRADS, check_leaf
from kernels.optimizer.muon_triton import gather_launch, move_launch
from kernels.runtime.dispatch import TORCH, TRITON, choose, declare

declare("muon", TRITON, TORCH)


@torch.no_grad()
def gather_momenta(
    momenta: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    momentum: float,
    scale: Tensor | None = None,
) -> Tensor:
    """Advances momenta in place and returns the directions of Nesterov's method.

    m' = momentum m + (1 - momentum) g; direction = momentum m' + (1 - momentum) g

    Args:
        momenta: fp32, contiguous, all of one shape.
        grads: of that shape; fp32, bf16 or fp16.
        scale: fp32 scalar on their device that multiplies the gradients, without a sync.

    Returns:
        The directions, bf16 [number of leaves, *shape].

    Raises:
        ValueError: lists of different lengths; shapes, dtypes or devices that do not match.

    >>> import torch
    >>> m = torch.zeros(1, 2)
    >>> gather_momenta([m], [torch.tensor([[1.0, -2.0]])], momentum=0.5)
    tensor([[[ 0.7500, -1.5000]]], dtype=torch.bfloat16)
    >>> m
    tensor([[ 0.5000, -1.0000]])
    """
    first = momenta[0]
    _check("momenta", momenta, first.shape, (torch.float32,), first.device)
    _check("grads", grads, first.shape, GRADS, first.device, len(momenta))
    stack = first.new_empty((len(momenta), *first.shape), dtype=torch.bfloat16)
    if choose("muon", str(first.device), first.dtype) == "triton":
        equal = len({g.dtype for g in grads}) == 1
        given = [(g if equal else g.float()).contiguous() for g in grads]  # alive until the launch
        gather_launch(momenta, given, stack, momentum, scale)
        return stack
    for m, grad, x in zip(momenta, grads, stack, strict=True):
        g = grad.float() if scale is None else grad.float() * scale
        m.lerp_(g, 1 - momentum)
        x.copy_(torch.lerp(g, m, momentum))
    return stack


@torch.no_grad()
def move_(
    params: Sequence[Tensor],
    stack: Tensor,
    *,
    keeps: Sequence[float],
    lengths: Sequence[float],
    copies: Sequence[Tensor] | None = None,
) -> None:
    """Sets p to keep p - length x, in place.

    Args:
        params: fp32, contiguous, all of one shape.
        stack: the x, bf16 [number of leaves, *shape].
        keeps, lengths: one number per leaf.
        copies: bf16 copies that receive the new params, rounded to the nearest.

    Raises:
        ValueError: lists of different lengths; shapes, dtypes or devices that do not match.

    >>> import torch
    >>> p = torch.ones(1, 2)
    >>> x = torch.tensor([[[1.0, -1.0]]], dtype=torch.bfloat16)
    >>> move_([p], x, keeps=[0.5], lengths=[0.25])
    >>> p
    tensor([[0.2500, 0.7500]])
    """
    first = params[0]
    _check("params", params, first.shape, (torch.float32,), first.device)
    _check("stack", stack, first.shape, (torch.bfloat16,), first.device, len(params))
    if copies is not None:
        _check("copies", copies, first.shape, (torch.bfloat16,), first.device, len(params))
    if choose("muon", str(first.device), first.dtype) == "triton":
        move_launch(params, stack.contiguous(), keeps, lengths, copies)
        return
    for i, (p, x) in enumerate(zip(params, stack, strict=True)):
        p.mul_(keeps[i]).add_(x, alpha=-lengths[i])
        if copies is not None:
            copies[i].copy_(p)


def _check(
    name: str,
    leaves: Sequence[Tensor] | Tensor,
    shape: torch.Size,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    count: int | None = None,
) -> None:
    if count is not None and len(leaves) != count:
        raise ValueError(f"muon: {count} leaves but {len(leaves)} in {name}.")
    for i, leaf in enumerate(leaves):
        strided = name in ("grads", "stack")
        check_leaf(f"muon: {name}", i, leaf, shape, dtypes, device, strided)
