"""The losses' kernels, compiled without a GPU: nothing spills, shared memory fits."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.loss import cross_entropy_in_place as in_place
from kernels.loss import cross_entropy_triton
from kernels.loss.cross_entropy_torch import LossOptions
from kernels.loss.scale_triton import scale_rows
from kernels.runtime.launch import Launch, recording, triton
from kernels.runtime.resources import resources
from tests.kernels.archs import compiled_for

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(triton is None, reason="triton is not installed"),
]

ce = importlib.import_module("kernels.loss.cross_entropy")
lce = importlib.import_module("kernels.loss.linear_cross_entropy")

ARCHS = {80: ((8, 0), 108, 163), 90: ((9, 0), 132, 227), 100: ((10, 0), 148, 227)}  # KB a program
PLAIN = (-100, 0.0, 0.0, None)
EVERYTHING = (-100, 0.1, 1e-4, 30.0)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def labels(n: int) -> Tensor:
    return meta(n, dtype=torch.int64)


def dense(
    vocab: int, dtype: torch.dtype, options: tuple[Any, ...], stride: int | None = None
) -> None:
    """Both directions, and the in-place form with its scaling."""
    logits = meta(16384, stride or vocab, dtype=dtype)[:, :vocab]
    loss, count, top, total = ce._forward_kernel(logits, labels(16384), *options)
    assert loss.shape == count.shape == ()
    grad = ce._backward_kernel(logits, labels(16384), loss / count, top, total, *options)
    assert (grad.shape, grad.dtype) == (logits.shape, dtype)
    in_place._overwrite(logits, labels(16384), True, *options)
    scale_rows(logits, loss)


def linear(vocab: int, dim: int, options: tuple[Any, ...], bias: bool, gradients: bool) -> None:
    """A chunk of the default size, and a shorter last one."""
    hidden, unembed = meta(16384, dim), meta(vocab, dim)
    chunk = lce.chunk_within(None, vocab, hidden, True)
    added, scale = (meta(vocab), 0.5) if bias else (None, None)
    needs = (gradients, gradients, gradients and bias)
    settings = lce.LinearLossSettings(*options, scale, chunk, False, True)
    lce._fused(hidden, unembed, added, labels(16384), None, settings, needs)


WORK: dict[str, tuple[Any, ...]] = {
    "V=32768": (dense, 32768, torch.bfloat16, PLAIN),
    "V=75968": (dense, 75968, torch.bfloat16, PLAIN),
    "V=131072": (dense, 131072, torch.bfloat16, PLAIN),
    "V=50304 everything": (dense, 50304, torch.bfloat16, EVERYTHING),
    "V=50257 rows apart": (dense, 50257, torch.bfloat16, PLAIN, 50304),
    "V=50257 packed": (dense, 50257, torch.bfloat16, EVERYTHING),
    "V=1000": (dense, 1000, torch.bfloat16, PLAIN),
    "V=100": (dense, 100, torch.bfloat16, EVERYTHING),
    "V=75968 fp32": (dense, 75968, torch.float32, EVERYTHING),
    "V=75968 fp16": (dense, 75968, torch.float16, PLAIN),
    "linear V=131072": (linear, 131072, 2048, PLAIN, False, True),
    "linear V=50257": (linear, 50257, 1536, EVERYTHING, True, True),
    "linear V=50257 value": (linear, 50257, 1536, EVERYTHING, True, False),
}


@pytest.mark.parametrize(("work", "arch"), compiled_for(WORK, ("V=75968", "linear V=50257")))
def test_no_spills(work: str, arch: int) -> None:
    capability, processors, shared = ARCHS[arch]
    function, *arguments = WORK[work]
    with recording(capability, processors) as launches:
        function(*arguments)
    names = {launch.kernel.__name__ for launch in launches}
    assert names >= (
        {"cross_entropy_forward_kernel"}
        if work.endswith("value")
        else {"cross_entropy_overwrite_kernel"}
    )
    for launch in distinct(launches):
        used = resources(launch, arch)
        assert used.local == 0, (launch.kernel.__name__, launch.constants, used)
        assert used.shared <= shared * 1024, (launch.kernel.__name__, launch.constants, used)


def distinct(launches: list[Launch]) -> list[Launch]:
    return list(
        {(x.kernel.__name__, str(x.constants), str(x.options)): x for x in launches}.values()
    )


def test_a_launch_is_one_program_a_row() -> None:
    with recording() as launches:
        dense(75968, torch.bfloat16, PLAIN)
    grids = {launch.kernel.__name__: launch.grid[0] for launch in launches}
    assert 0 < grids["cross_entropy_overwrite_kernel"] <= 16384
    assert grids["cross_entropy_scale_kernel"] == 132 * 8
    config = cross_entropy_triton.LossConfig(8, 2)
    tiles = -(-75968 // (8 * 32 * 8 * 2))
    with recording() as launches:
        cross_entropy_triton.backward_rows(
            meta(16384, 75968), labels(16384), *[meta(1)] * 3, LossOptions(), config=config
        )
    assert launches[0].grid == (16384 * tiles,)
