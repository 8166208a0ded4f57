"""The activations' and the rotary embedding's Triton kernels, compiled for real sizes without a
GPU: registers do not spill, shared memory suffices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.mlp import glu_triton
from kernels.rope import rope_triton
from kernels.runtime.launch import Launch, recording
from kernels.runtime.resources import resources

pytestmark = pytest.mark.compiles

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def check(launches: list[Launch], arch: int) -> None:
    for launch in launches:
        used = resources(launch, arch)
        assert used.local == 0, (launch.kernel.fn.__name__, arch, used)
        assert used.shared <= SHARED[arch], (launch.kernel.fn.__name__, arch, used)


def activations(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    for name in ("swiglu", "geglu"):
        glu_triton.glu_forward(gate, up, name)
        glu_triton.glu_backward(grad, gate, up, name)
        glu_triton.glu_backward_(grad, gate, up, name)
    glu_triton.relu2_forward(gate)
    glu_triton.relu2_backward(grad, gate)


@pytest.mark.parametrize(("dtype", "arch"), [(BF16, 80), (BF16, 90), (FP32, 90)])
def test_activations(dtype: torch.dtype, arch: int) -> None:
    """Contiguous, and as halves of one projection."""
    x, wide = meta(16384, 8960, dtype=dtype), meta(16384, 17920, dtype=dtype)
    with recording(divmod(arch, 10), 132) as launches:
        activations(x, x, x)
        activations(*wide.chunk(2, -1), x)
    assert len(launches) == 16
    check(launches, arch)


def test_activations_of_odd_widths() -> None:
    wide = meta(1000, 2060, dtype=FP16)
    with recording() as launches:
        activations(*wide.chunk(2, -1), meta(1000, 1030, dtype=FP16))
        activations(*(meta(999, 77, dtype=FP16) for _ in range(3)))
    check(launches, 90)


# heads, key heads, head size: of Qwen2-1.5B, Llama-3-8B, a small model; padded halves; one head
HEADS = [(12, 2, 128), (32, 8, 128), (9, 3, 64), (16, 16, 256), (8, 4, 80), (1, 1, 6)]


def turns(heads: int, key_heads: int, dim: int, dtype: torch.dtype) -> None:
    q, k = meta(16384, heads, dim, dtype=dtype), meta(16384, key_heads, dim, dtype=dtype)
    table, w = meta(16384, dim // 2, dtype=FP32), meta(dim, dtype=FP32)
    constants = (table, table, meta(16384, dtype=torch.int64))
    rope_triton.rope_turn(q, k, None, None, *constants, 0.0, False)
    rope_triton.rope_turn(q, k, None, None, *constants, 0.0, True)
    rope_triton.rope_turn(q, k, w, w, *constants, 1e-6, False)
    rope_triton.rope_qk_norm_backward(q, k, q, k, w, w, *constants, 1e-6, True)


@pytest.mark.parametrize(
    ("heads", "arch"), [(HEADS[0], 80), (HEADS[0], 100), *((heads, 90) for heads in HEADS)], ids=str
)
def test_rope(heads: tuple[int, int, int], arch: int) -> None:
    with recording(divmod(arch, 10), 132) as launches:
        turns(*heads, BF16)
    assert len(launches) == 5  # the last adds up the weights' gradients
    check(launches[:-1], arch)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_rope_in_other_dtypes(dtype: torch.dtype) -> None:
    with recording() as launches:
        turns(12, 2, 128, dtype)
    check(launches[:-1], 90)


def test_rope_of_few_tokens() -> None:
    q, k = meta(7, 12, 128, dtype=BF16), meta(7, 2, 128, dtype=BF16)
    table, w = meta(7, 64, dtype=FP32), meta(128, dtype=FP32)
    constants = (table, table, meta(7, dtype=torch.int64))
    with recording() as launches:
        rope_triton.rope_turn(q, k, None, None, *constants, 0.0, False)
        rope_triton.rope_turn(q, k, w, w, *constants, 1e-6, False)
    check(launches, 90)


def test_rope_of_slices_with_frozen_weights() -> None:
    fused, w = meta(16384, 16, 128, dtype=BF16), meta(128, dtype=BF16)
    q, k, _ = fused.split((12, 2, 2), 1)
    table = meta(2048, 64, dtype=FP32)
    constants = (table, table, meta(16384, dtype=torch.int64))
    with recording() as launches:
        rope_triton.rope_turn(q, k, w, w, *constants, 1e-6, False)
        rope_triton.rope_qk_norm_backward(
            *(x.contiguous() for x in (q, k)), q, k, w, w, *constants, 1e-6, False
        )
    assert len(launches) == 2
    check(launches, 90)
