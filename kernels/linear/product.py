"""Matrix products without gradients of their own, for the inside of fused functions.

`cublas-lt` has wide products computed by more economical kernels than cuBLAS would choose, with the
same numbers (`kernels.linear.cublas_lt`); `torch` is torch.mm, and what other products take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.linear import cublas_lt
from kernels.linear.linear import linear_reference
from kernels.runtime.autograd import rows_of
from kernels.runtime.dispatch import Proof, choose, proved_by, refuse, requested
from kernels.runtime.operators import fake, operator

proved_by(
    "product",
    "cublas-lt",
    Proof(("torch",), lambda facts: cublas_lt.prove(facts.device), lambda facts: None),
)


def _may_choose(x: Tensor, wide: int) -> bool:
    """Whether x [rows, inner] @ [inner, wide] is of a kind that a kernel is chosen for. x may be
    fake. Raises RuntimeError where that was asked for and it is not."""
    rows, inner = x.shape
    fits, asked = cublas_lt.is_wide(rows, inner, wide), requested("product") == "cublas-lt"
    chosen = (fits or asked) and choose("product", str(x.device), x.dtype) == "cublas-lt"
    if chosen and not fits:
        refuse(
            "product",
            "cublas-lt",
            f"is for [{cublas_lt.LEAST_ROWS} or more, up to {cublas_lt.LONGEST_INNER}] times "
            f"[.., {cublas_lt.LEAST_WIDE} or more], not for [{rows}, {inner}] times [.., {wide}]",
        )
    return chosen


def check_request(x: Tensor) -> None:
    """For functions that may go without `product`: raises RuntimeError where a backend was asked
    for that cannot serve tensors like x."""
    if requested("product") is not None:
        choose("product", str(x.device), x.dtype)


def product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x @ weight, as torch.mm: x [rows, inner], weight [inner, wide], out [rows, wide].

    Called inside of operators: no compiler or policy sees it.
    """
    if _may_choose(x, weight.shape[1]):
        result = x.new_empty(x.shape[0], weight.shape[1]) if out is None else out
        plan = cublas_lt.plan_of(x, weight, result)
        if plan is not None:
            cublas_lt.multiply(plan, x, weight, result)
            return result
        if requested("product") == "cublas-lt":
            refuse("product", "cublas-lt", "keeps cuBLAS's first choice for these matrices")
    return torch.mm(x, weight) if out is None else torch.mm(x, weight, out=out)


@operator("wide_linear")
def _wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    return product(x, weight.t())


@fake("wide_linear")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@register_flop_formula(torch.ops.nanovision.wide_linear)
def _wide_linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T [..., O], in the weight's dtype: x [..., I], weight [O, I].

    Called where nothing is recorded. An operator where a kernel may be chosen, which policies of
    checkpointing see as aten.mm, and F.linear elsewhere.
    """
    rows = rows_of(x).to(weight.dtype)
    if not _may_choose(rows, weight.shape[0]):
        return linear_reference(rows.view(x.shape), weight, None)
    return _wide_linear(rows.contiguous(), weight).view(*x.shape[:-1], weight.shape[0])
