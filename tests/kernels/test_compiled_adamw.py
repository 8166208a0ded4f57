"""AdamW's kernel compiled as for real sizes, with no GPU: nothing spills."""

from __future__ import annotations

import pytest
import torch

from kernels.adamw_triton import Plan, adamw_launch
from kernels.compiled import resources
from kernels.launch import recording

pytestmark = pytest.mark.compiles

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("aligned", [True, False])
def test_nothing_spills(arch: int, aligned: bool) -> None:
    def table(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    chunks = table(750_000, 2, dtype=torch.int32)
    plan = Plan(table(340, 5), table(340, dtype=FP32), chunks, aligned)
    with recording(divmod(arch, 10), 132) as launches:
        for state, grad, copy in ((FP32, BF16, True), (FP32, FP32, False), (BF16, BF16, False)):
            adamw_launch(
                plan, table(344), table(1, dtype=FP32)[0], beta1=0.9, beta2=0.95, eps=1e-8,
                param=state, grad=grad, moment=state, copy=copy, aligned=True,
            )  # fmt: skip
    assert len(launches) == 3
    for launch in launches:
        used = resources(launch, arch)
        assert used.local == 0, (arch, used)
        assert used.registers <= 128, (arch, used)
