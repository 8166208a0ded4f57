"""AdamW's kernel, in the interpreter and on a GPU, against the torch path: the same rounding."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.optimizer import adamw, adamw_triton
from kernels.optimizer.adamw import adamw_
from kernels.optimizer.adamw_triton import AdamWPlan, make_plan
from kernels.runtime import dispatch
from tests.kernels.test_adamw import BF16, BF16_MAX, DECAYS, FP16, FP32, leaves, zeros


def shifted(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers, at an address that is no multiple of 16."""
    return [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in tensors]


def steps(
    backend: str,
    device: str,
    state: torch.dtype,
    moment: torch.dtype,
    grad: torch.dtype,
    move: str = "",
    bad: bool = False,
) -> list[Tensor]:
    """All tensors that three steps over leaves of several sizes change.

    move: which of the five lists are shifted; bad: two gradients are NaN and infinite.
    """
    params = [p.to(device) for p in leaves(state, 0)]
    copies = [p.to(BF16) if i % 3 and state == FP32 else None for i, p in enumerate(params)]
    first, second = ([x.to(device) for x in zeros(moment)] for _ in range(2))
    if "p" in move:
        params = shifted(params)
    if "m" in move:
        first = shifted(first)
    if "v" in move:
        second = shifted(second)
    if "c" in move:
        copies = [None if c is None else shifted([c])[0] for c in copies]
    for t in (1, 2, 3):
        grads = [g.to(device) for g in leaves(grad, t)]
        if bad:
            grads[6][1, 2], grads[6][63, 32] = math.nan, math.inf
        if "g" in move:
            grads = shifted(grads)
        with dispatch.override(adamw=backend):
            adamw_(
                params,
                grads,
                first,
                second,
                step=t,
                lr=0.01,
                weight_decay=DECAYS,
                seed=5,
                scale=torch.tensor(0.7, device=device) if t > 1 else None,
                copies=copies,
            )
    for p, copy in zip(params, copies, strict=True):
        assert copy is None or torch.equal(copy.cpu().nan_to_num(7), p.cpu().to(BF16).nan_to_num(7))
    return [x.cpu() for x in (*params, *first, *second)]


known = functools.cache(steps)  # what a test compares with


def same(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The fraction of entries that are equal, NaN included."""
    pairs = list(zip(got, wanted, strict=True))
    assert all(a.dtype == b.dtype for a, b in pairs)
    equal = torch.cat([((a == b) | (a.isnan() & b.isnan())).flatten() for a, b in pairs])
    return equal.double().mean().item()


@pytest.mark.parametrize("grad", [FP32, BF16, FP16])
def test_fp32_states(grad: torch.dtype, kernel_device: str) -> None:
    """Three steps of some ten fp32 roundings, of numbers of up to 4 (v: 16)."""
    got = steps("triton", kernel_device, FP32, FP32, grad)
    for a, b in zip(got, known("torch", "cpu", FP32, FP32, grad), strict=True):
        assert ((a - b).abs() <= 3 * 10 * 2.0**-24 * b.abs() + 1e-7).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of NaN
@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize(("state", "moment"), [(BF16, BF16), (FP32, BF16), (BF16, FP32)])
def test_rounding_is_by_the_same_bits(
    state: torch.dtype, moment: torch.dtype, bad: bool, kernel_device: str
) -> None:
    """In the interpreter all bits equal torch's. A GPU fuses a * b + c, which changes the last bits
    of fp32 numbers and a few stochastic roundings."""
    got = steps("triton", kernel_device, state, moment, BF16, bad=bad)
    wanted = steps("torch", "cpu", state, moment, BF16, bad=bad)
    if kernel_device == "cpu":
        assert same(got, wanted) == 1
    narrow = [[x for x in leaves if x.dtype == BF16] for leaves in (got, wanted)]
    assert same(*narrow) > 0.998
    # both in p and in m, where infinity leads to inf - inf; v keeps the infinity
    assert sum(int(x.isnan().sum()) for x in got) == (2 + 2 + 1 if bad else 0)


@pytest.mark.parametrize(
    ("state", "move"), [(FP32, "p"), (FP32, "mv"), (FP32, "c"), (FP32, "g"), (BF16, "pg")]
)
def test_leaves_may_begin_anywhere(state: torch.dtype, move: str, kernel_device: str) -> None:
    wanted = known("triton", kernel_device, state, state, BF16)
    assert same(steps("triton", kernel_device, state, state, BF16, move), wanted) == 1


@pytest.mark.parametrize(("block", "warps"), [(256, 2), (4096, 8)])
def test_the_grid_is_of_no_importance(
    block: int, warps: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = known("triton", kernel_device, BF16, BF16, BF16)
    blocks = set()

    def launch(plan: AdamWPlan, *args: Any, **numbers: Any) -> None:
        blocks.add(plan.block)
        adamw_triton.adamw_launch(plan, *args, **numbers, num_warps=warps)

    monkeypatch.setattr(adamw, "adamw_launch", launch)
    monkeypatch.setattr(adamw, "make_plan", functools.partial(adamw_triton.make_plan, block=block))
    got = steps("triton", kernel_device, BF16, BF16, BF16)
    assert blocks == {block}
    assert same(got, wanted) == 1


@pytest.mark.parametrize("state", [FP32, BF16])
def test_one_launch_a_group_and_one_program_for_all_steps(
    state: torch.dtype, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that changes from step to step is in tensors: nothing compiles again."""
    launches: list[tuple[Any, dict[str, Any]]] = []

    def noted(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        launches.append(([type(x) for x in args], constants))
        assert grid[0] == sum(-(-p.numel() // adamw_triton.BLOCK) for p in leaves(state, 0))

    monkeypatch.setattr(adamw_triton, "launch", noted)
    params, first, second = ([x.to(kernel_device) for x in zeros(state)] for _ in range(3))
    scale = torch.ones((), device=kernel_device)
    for t in (1, 2, 16, 17):
        grads = [g.to(kernel_device) for g in leaves(BF16, t)]
        with dispatch.override(adamw="triton"):
            adamw_(params, grads, first, second, step=t, lr=0.1 / t, scale=scale, seed=t)
    assert len(launches) == 4
    assert all(launch == launches[0] for launch in launches)
    assert set(launches[0][0]) == {Tensor}


def test_nothing_is_written_beside_a_leaf(kernel_device: str) -> None:
    for length in (1, 33, 2048, 2080):
        store = torch.full((5, length + 16), 7.0, device=kernel_device)
        p, g, m, v = (store[i, 8 : 8 + length] for i in range(4))
        copy = store[4].to(BF16)
        for leaf in (p, m, v):
            leaf.zero_()
        g.fill_(1.0)
        with dispatch.override(adamw="triton"):
            adamw_([p], [g], [m], [v], step=1, lr=0.1, copies=[copy[8 : 8 + length]])
        for row in (*store[:4], copy):
            assert (row[:8] == 7).all()
            assert (row[8 + length :] == 7).all()
            assert (row[8 : 8 + length] != 7).all()


def test_what_is_finite_to_the_nearest_stays_finite(kernel_device: str) -> None:
    """A quarter of a unit above the largest bf16 stays finite for any noise; three quarters do
    not."""
    unit = 2.0**120
    for share, wanted in ((0.25, BF16_MAX), (0.75, math.inf)):
        p = torch.full((4000,), BF16_MAX, dtype=BF16, device=kernel_device)
        m, v = (torch.zeros(4000, device=kernel_device) for _ in range(2))
        with dispatch.override(adamw="triton"):
            adamw_([p], [-torch.ones_like(p)], [m], [v], step=1, lr=share * unit, weight_decay=0.0)
        assert (p == wanted).all()


def test_plans_follow_the_memory(kernel_device: str) -> None:
    """Other leaves, decays or copies get other tables, of which a bounded number is kept."""
    make_plan.cache_clear()
    with dispatch.override(adamw="triton"):
        for turn in range(20):
            p, m, v = (torch.zeros(5 + turn, device=kernel_device) for _ in range(3))
            for t in (1, 2):
                adamw_([p], [torch.ones_like(p)], [m], [v], step=t, lr=0.1)
            assert (m > 0.18).all()
        before = p.clone()
        zero, copy = torch.zeros_like(p), torch.zeros_like(p, dtype=BF16)
        for decay in (0.5, 0.25):
            p.copy_(before)
            adamw_([p], [zero], [zero.clone()], [zero.clone()], step=1, lr=1.0, weight_decay=decay)
            torch.testing.assert_close(p, before * (1 - decay))
        adamw_([p], [zero], [m], [v], step=3, lr=0.0, copies=[copy])
        assert torch.equal(copy, p.to(BF16))
    kept = make_plan.cache_info()
    assert kept.misses == 20 + 3
    assert kept.currsize == kept.maxsize == 16


# Real sizes, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("state", [FP32, BF16])
@pytest.mark.usefixtures("whole_gpu")
def test_more_than_2_31_numbers(state: torch.dtype) -> None:
    """The end of a long leaf equals a short leaf; with bf16 states, to a unit."""
    size, tail = 2**31 + 5003, 5003
    p, g, m, v = (torch.ones(size, dtype=dtype, device="cuda") for dtype in (state, BF16) * 2)
    m, v = m.to(BF16), v.to(BF16)
    g[-tail:] = torch.randn(tail, device="cuda")
    short = [x[-tail:].clone() for x in (p, g, m, v)]
    for leaf in ((p, g, m, v), tuple(short)):
        adamw_(*([x] for x in leaf), step=3, lr=0.01, scale=torch.tensor(0.5, device="cuda"))
    for a, b in zip((p, m, v), (short[0], short[2], short[3]), strict=True):
        unit = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a[-tail:], b, rtol=unit, atol=unit / 8)
        assert a.isfinite().all()
