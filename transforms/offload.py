"""Moves saved activations to pinned host memory until the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_copiers: dict[torch.device, torch.cuda.Stream] = {}


def offloaded(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` whose saved activations lie on the host between forward and backward.

    Leaves (params, tensors made without gradients) stay on the GPU. Copies overlap with the
    computation, on their own stream. CPU tensors are not moved.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(_to_host, _to_device):
            return f(*args, **kwargs)

    return run


def _to_host(x: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    if x.device.type != "cuda" or x.is_leaf:
        return x
    copier = _copiers.setdefault(x.device, torch.cuda.Stream(x.device))
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    copier.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(copier):
        host.copy_(x, non_blocking=True)
    x.record_stream(copier)  # its memory is not reused before the copy has ended
    return x.device, host


def _to_device(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    device, host = kept
    copier = _copiers[device]
    with torch.cuda.stream(copier):  # after the copy to the host; overlaps with the backward
        x = host.to(device, non_blocking=True)
    current = torch.cuda.current_stream(device)
    current.wait_stream(copier)
    x.record_stream(current)
    return x
