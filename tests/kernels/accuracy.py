"""How near a kernel's results are to exact ones, which are computed in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def outputs_and_gradients(
    f: Callable[..., Any], cotangents: Tensor | Sequence[Tensor], *leaves: Tensor
) -> list[Tensor]:
    """What f gives, and then the gradients of its leaves for these cotangents."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    out = f(*leaves)
    outs = [out] if isinstance(out, Tensor) else list(out)
    cotangents = [cotangents] if isinstance(cotangents, Tensor) else cotangents
    given = [c.to(o.dtype) for c, o in zip(cotangents, outs, strict=True)]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, given)]


def within(
    got: Tensor,
    wanted: Tensor,
    scale: Tensor | float,
    device: str = "exact",
    roundings: float = 1.001,
) -> None:
    """So many roundings to got's dtype, relative to each entry, and fp32 arithmetic of size
    `scale`: a few operations on numbers of that size, 16 eps. NaN never passes.

    device: where it was computed. The interpreter ("cpu") cuts fp32 off where it should round it
    to bf16: twice the error.
    """
    cut = device == "cpu" and got.dtype == torch.bfloat16
    unit = torch.finfo(got.dtype).eps / (1 if cut else 2)
    slack = 16 * torch.finfo(torch.float32).eps * scale + torch.finfo(got.dtype).tiny
    if got.dtype == torch.float16:
        slack = slack + torch.finfo(torch.float16).smallest_normal * 2**-10  # subnormal spacing
    error = (got.double() - wanted).abs()
    assert (error <= roundings * unit * wanted.abs() + slack).all(), float(error.max())


def distance(got: Tensor, exact: Tensor) -> float:
    """Relative, of all entries together."""
    assert got.isfinite().all()
    return float((got.double() - exact).norm() / exact.norm())
