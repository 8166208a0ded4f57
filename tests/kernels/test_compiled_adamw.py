"""AdamW's kernel at real sizes, compiled without a GPU: nothing spills, loads are wide."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.optimizer.adamw_triton import COLUMNS, HEADER, AdamWPlan, LeafTypes, adamw_launch
from kernels.optimizer.leaves_triton import BLOCK, WARPS
from kernels.runtime import resources as compiled
from kernels.runtime.launch import Launch, recording, triton

pytestmark = pytest.mark.compiles

BF16, FP32 = torch.bfloat16, torch.float32
# params, moments, gradient, with copies; bytes read and written per element
CASES = [
    (FP32, FP32, BF16, True, 14, 14),
    (FP32, FP32, FP32, False, 16, 12),
    (BF16, BF16, BF16, False, 8, 6),
    (FP32, BF16, BF16, True, 10, 10),
]


def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launched(
    arch: int, param: torch.dtype, moment: torch.dtype, grad: torch.dtype, copy: bool
) -> Launch:
    plan = AdamWPlan(
        meta(340, int(COLUMNS)),
        meta(340, dtype=FP32),
        meta(750_000, 2, dtype=torch.int32),
        BLOCK,
    )
    with recording(divmod(arch, 10), 132) as launches:
        table, scale = meta(340 + int(HEADER)), meta(1, dtype=FP32)[0]
        types = LeafTypes(param, grad, moment, copy)
        adamw_launch(plan, table, scale, types, beta1=0.9, beta2=0.95, eps=1e-8)
    return launches[0]


def moved(ptx: str, kind: str) -> int:
    """Bytes that a thread moves in vectors of 8 bytes or more."""
    found = re.findall(rf"\b{kind}\.global(?:\.\w+(?:::\w+)*)*?\.v(\d)\.b(\d+)", ptx)
    return sum(int(n) * int(bits) // 8 for n, bits in found if int(n) * int(bits) >= 64)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("param", "moment", "grad", "copy", "read", "written"), CASES)
def test_nothing_spills_and_vectors_are_wide(
    param: torch.dtype,
    moment: torch.dtype,
    grad: torch.dtype,
    copy: bool,
    read: int,
    written: int,
    arch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """fp32 moves by 16 bytes; bf16 by 8 beside fp32 (the same elements), otherwise by 16."""
    programs: list[Any] = []
    real = triton.compile

    def kept(*args: Any, **options: Any) -> Any:
        programs.append(real(*args, **options))
        return programs[-1]

    monkeypatch.setattr(triton, "compile", kept)
    compiled._compile.cache_clear()
    used = compiled.resources(launched(arch, param, moment, grad, copy), arch)
    assert used.local == 0, used
    assert used.registers <= 80, used  # three programs a processor, 24 warps
    assert used.shared == 0, used  # nothing changes hands between threads
    elements = BLOCK // (32 * WARPS)
    ptx = programs[-1].asm["ptx"]
    assert (moved(ptx, "ld"), moved(ptx, "st")) == (elements * read, elements * written)
