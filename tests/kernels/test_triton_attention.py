"""Our flash attention against fp64: values and gradients, ragged, windows, shared heads, NaN."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import attention_triton
from tests.rounding import attention_bounds, ulps

# numpy warns of entries that masks remove later: rows past a document's end, later keys
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
attention_module = importlib.import_module("kernels.attention.attention")
Leaves = tuple[Tensor, Tensor, Tensor]


def leaves(
    n: int, heads: int, key_heads: int, dim: int, dtype: torch.dtype, device: str
) -> tuple[Leaves, Tensor]:
    generator = torch.Generator().manual_seed(n + dim)
    shapes = ((n, heads, dim), (n, key_heads, dim), (n, key_heads, dim), (n, heads, dim))
    q, k, v, g = (torch.randn(*s, generator=generator).to(device, dtype) for s in shapes)
    return (q, k, v), g


def ours(x: Leaves, g: Tensor, cu: Tensor, **options: Any) -> list[Tensor]:
    out, lse = attention_triton.flash_forward(*x, cu, **options)
    grads = attention_triton.flash_backward(g, *x, out, lse, cu, **options)
    return [out, *grads]


def reference(x: Leaves, g: Tensor, cu: Tensor, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    wide = tuple(t.to(dtype).detach().requires_grad_() for t in x)
    out = attention_module.attention_reference(*wide, cu, **options)
    return [out.detach(), *torch.autograd.grad(out, wide, g.to(dtype))]


def boundaries(lengths: list[int], device: str) -> Tensor:
    ends = [0, *itertools.accumulate(lengths)]
    return torch.tensor(ends, dtype=torch.int32, device=device)


CASES = {
    "causal": ([5, 1, 33, 0, 70], 2, 1, 24, True, None),
    "all": ([20, 64], 2, 2, 16, False, None),
    "causal window": ([3, 75], 2, 1, 16, True, 9),
    "window": ([66, 12], 2, 2, 16, False, 20),
    "one token": ([1], 2, 1, 16, True, None),
    "empty at the end": ([40, 0, 0], 1, 1, 24, True, None),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES),
        *((case, torch.bfloat16) for case in ("causal", "window", "one token")),
        ("causal window", torch.float16),
    ],
    ids=str,
)
def test_values_and_gradients(
    case: str, dtype: torch.dtype, interpreter: str, poisoned: None
) -> None:
    """On a GPU: test_attention_gpu.py."""
    lengths, heads, key_heads, dim, causal, window = CASES[case]
    x, g = leaves(sum(lengths), heads, key_heads, dim, dtype, interpreter)
    cu = boundaries(lengths, interpreter)
    options: dict[str, Any] = {"causal": causal, "window": window, "scale": dim**-0.5}
    exact = reference(x, g, cu, torch.float64, **options)
    # weights and their gradients are rounded to dtype before the products, the results once more:
    # a few ulps of the largest entry (twice as many where the interpreter truncates)
    ulp = torch.finfo(dtype).eps
    # fp32: exp2, log and sums of up to 75 terms, each accurate to an ulp
    allowed = 16 * ulp if dtype == torch.float32 else (4 if interpreter == "cpu" else 2) * ulp
    for got, want in zip(ours(x, g, cu, **options), exact, strict=True):
        assert got.dtype == dtype
        assert not got.isnan().any()
        bound = allowed * float(want.abs().max().clamp(min=1.0))
        assert float((got.double() - want).abs().max()) <= bound


def test_a_document_with_nan_keeps_it(kernel_device: str) -> None:
    lengths = [30, 25, 20]
    x, g = leaves(75, 2, 1, 16, torch.float32, kernel_device)
    cu = boundaries(lengths, kernel_device)
    options: dict[str, Any] = {"causal": True, "window": None, "scale": 0.25}
    clean = ours(x, g, cu, **options)
    for t in (*x, g):
        t[30:55] = float("nan")
    for got, want in zip(ours(x, g, cu, **options), clean, strict=True):
        assert torch.equal(got[:30], want[:30])
        assert torch.equal(got[55:], want[55:])
        assert got[30:55].isnan().all()


def test_a_wrong_backward_would_show(interpreter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_triton.backward_dkdv

    def wrong(*args: Any, **options: Any) -> Any:
        dk, dv = right(*args, **options)
        return dk * 1.05, dv

    monkeypatch.setattr(attention_triton, "backward_dkdv", wrong)
    with pytest.raises(AssertionError):
        test_values_and_gradients("causal window", torch.float32, interpreter, None)


def extreme(device: str) -> tuple[Leaves, Tensor]:
    """Integer scores up to 1e4, exact in fp32 in any order of summation, with keys in equal pairs:
    the softmax is 1/2 for two keys, and nothing overflows."""
    (q, k, v), g = leaves(40, 2, 1, 16, torch.float32, device)
    k = (10 * k[::2]).round().repeat_interleave(2, 0)
    return ((100 * q).round(), k, v), g


def check_extreme(x: Leaves, g: Tensor, device: str, spoil: int | None = None) -> None:
    options: dict[str, Any] = {"causal": True, "window": None, "scale": 1.0}
    cu = boundaries([40], device)
    exact = reference(x, g, cu, torch.float64, **options)
    # a score is multiplied by log2(e), 1.44, and the log-sum-exp subtracted
    off = 1.45 * ulps(torch.float32, 2)
    bounds = attention_bounds(*x, g, True, off)
    for i, (got, want, bound) in enumerate(
        zip(ours(x, g, cu, **options), exact, bounds, strict=True)
    ):
        wrong = 1.05 * got if i == spoil else got
        assert ((wrong.double() - want).abs() <= bound).all()


def test_extreme_scores(kernel_device: str) -> None:
    check_extreme(*extreme(kernel_device), kernel_device)


@pytest.mark.parametrize("index", range(4))
def test_a_wrong_extreme_would_show(index: int, interpreter: str) -> None:
    with pytest.raises(AssertionError):
        check_extreme(*extreme(interpreter), interpreter, spoil=index)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_real_sizes_on_a_gpu(dim: int) -> None:
    lengths = [380, 1, 700, 0, 512, 64, 2000]
    x, g = leaves(sum(lengths), 12, 2, dim, torch.bfloat16, "cuda")
    cu = boundaries(lengths, "cuda")
    options: dict[str, Any] = {"causal": True, "window": None, "scale": dim**-0.5}
    exact = reference(x, g, cu, torch.float64, **options)
    for got, want in zip(ours(x, g, cu, **options), exact, strict=True):
        assert float((got.double() - want).norm() / want.norm()) <= 2**-8
