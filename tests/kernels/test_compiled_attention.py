"""Our flash attention, compiled without a GPU: nothing spills, shared memory fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import attention_triton
from kernels.runtime.launch import recording, triton
from kernels.runtime.resources import resources
from tests.kernels.archs import SHARED, compiled_for

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(triton is None, reason="triton is not installed"),
]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def check(
    arch: int,
    dim: int,
    causal: bool,
    window: int | None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    tokens: int = 16384,
    documents: int = 41,
) -> None:
    q, k = meta(tokens, 12, dim, dtype=dtype), meta(tokens, 2, dim, dtype=dtype)
    boundaries = meta(documents + 1, dtype=torch.int32)
    options: dict[str, Any] = {"causal": causal, "window": window, "scale": 0.1}
    with recording(divmod(arch, 10)) as launches:
        out, lse = attention_triton.flash_forward(q, k, k, boundaries, **options)
        grads = attention_triton.flash_backward(out, q, k, k, out, lse, boundaries, **options)
    assert out.shape == q.shape
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
    assert len(launches) == 3
    for launch in launches:
        used = resources(launch, arch)
        assert used.local == 0, (launch.kernel.fn.__name__, used)
        assert used.shared <= SHARED[arch], (launch.kernel.fn.__name__, used)


@pytest.mark.parametrize(("dim", "arch"), compiled_for((64, 128), (64,)))
def test_the_usual_head_sizes(dim: int, arch: int) -> None:
    check(arch, dim, True, None)


@pytest.mark.parametrize("dim", [pytest.param(16, marks=pytest.mark.slow), 80, 256])
def test_other_head_sizes(dim: int) -> None:
    check(90, dim, True, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_token(dtype: torch.dtype) -> None:
    """Triton specialises sizes of 1 into other programs, which must not spill either."""
    check(90, 64, True, None, dtype, tokens=1, documents=1)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, 256), (False, 64)])
def test_other_masks(causal: bool, window: int | None) -> None:
    check(90, 64, causal, window)


def test_fp16() -> None:
    check(90, 128, True, None, torch.float16)
