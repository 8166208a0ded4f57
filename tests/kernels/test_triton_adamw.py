"""AdamW's kernel, interpreted, against the torch path: the same rounding, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import adamw, dispatch
from kernels.adamw import adamw_
from tests.kernels.test_adamw import BF16, DECAYS, FP16, FP32, leaves, zeros

pytestmark = pytest.mark.interpreter


def steps(
    backend: str, state: torch.dtype, grad: torch.dtype, unaligned: bool = False
) -> list[Tensor]:
    """Three steps over leaves of several sizes; all that they leave behind."""
    params = leaves(state, 0)
    copies = [p.to(BF16) if i % 3 and state == FP32 else None for i, p in enumerate(params)]
    first, second = zeros(state), zeros(state)
    for t in (1, 2, 3):
        grads = leaves(grad, t)
        if unaligned:
            grads = [torch.cat([g.flatten()[:1], g.flatten()])[1:].view(g.shape) for g in grads]
        with dispatch.override(adamw=backend):
            adamw_(
                params, grads, first, second, step=t, lr=0.01, weight_decay=DECAYS, seed=5,
                scale=torch.tensor(0.7) if t > 1 else None, copies=copies,
            )  # fmt: skip
    return [*params, *first, *second, *(c for c in copies if c is not None)]


@pytest.mark.parametrize(("state", "grad"), [(FP32, BF16), (FP32, FP32), (FP32, FP16)])
@pytest.mark.parametrize("unaligned", [False, True])
def test_fp32_states(state: torch.dtype, grad: torch.dtype, unaligned: bool) -> None:
    ours = steps("triton", state, grad, unaligned)
    for a, b in zip(ours, steps("torch", state, grad), strict=True):
        # three steps of some ten roundings; torch fuses none of them
        torch.testing.assert_close(a, b, rtol=2.0**-18 if a.dtype == FP32 else 2.0**-7, atol=1e-7)


def test_bf16_states_are_rounded_by_the_same_bits() -> None:
    """Where the two paths differ in the last bit of fp32, a coin may fall the other way: rarely."""
    ours, theirs = steps("triton", BF16, BF16), steps("torch", BF16, BF16)
    same = torch.cat([(a == b).flatten() for a, b in zip(ours, theirs, strict=True)])
    assert same.double().mean() > 0.995
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-6, atol=1e-6)


def test_the_grid_is_of_no_importance(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = steps("triton", BF16, BF16)
    monkeypatch.setattr("kernels.adamw_triton.adamw_launch.__kwdefaults__", {
        **adamw.adamw_launch.__kwdefaults__, "block": 256, "num_warps": 2,
    })  # fmt: skip
    monkeypatch.setattr("kernels.adamw_triton.make_plan.__defaults__", (256,))
    adamw._plans.clear()
    for a, b in zip(steps("triton", BF16, BF16), wanted, strict=True):
        assert torch.equal(a, b)
    adamw._plans.clear()


def test_nothing_is_written_beside_a_leaf() -> None:
    store = torch.full((4, 40), 7.0)
    p, g, m, v = (store[i, 4:37] for i in range(4))
    for leaf in (p, g, m, v):
        leaf.zero_()
    g.fill_(1.0)
    with dispatch.override(adamw="triton"):
        adamw_([p], [g], [m], [v], step=1, lr=0.1)
    assert (store[:, :4] == 7).all()
    assert (store[:, 37:] == 7).all()
    assert (p != 0).all()


def test_plans_follow_the_memory() -> None:
    adamw._plans.clear()
    with dispatch.override(adamw="triton"):
        for turn in range(20):
            p = torch.zeros(5 + turn)
            for t in (1, 2):
                adamw_([p], [torch.ones_like(p)], [m := torch.zeros_like(p)],
                       [torch.zeros_like(p)], step=t, lr=0.1)  # fmt: skip
            assert (m != 0).all()
    assert len(adamw._plans) <= adamw._KEPT
