"""add_norm_gated_mlp: derivatives under every driver, saved tensors and reused memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import add_norm_gated_mlp
from kernels.runtime import dispatch
from tests.kernels.drivers import (
    EVERY_FIRST,
    EVERY_HIGHER,
    Case,
    Driver,
    broken,
    by_autograd,
    by_jvp,
    error,
    joined,
    name_of,
    random,
)
from tests.kernels.test_fused_linear import parameters
from tests.rounding import ulps

fused = importlib.import_module("kernels.mlp.fused_mlp")
BF16, FP32 = torch.bfloat16, torch.float32
ROWS, DIM, INNER, OUT, EPS = 5, 7, 6, 3, 1e-3


def gated(
    x: Tensor, residual: Tensor | None, *leaves: Tensor, keep: bool = True
) -> tuple[Tensor, Tensor]:
    return add_norm_gated_mlp(x, residual, *leaves, eps=EPS, keep=keep)


def exact_gated(x: Tensor, residual: Tensor | None, *leaves: Tensor) -> tuple[Tensor, Tensor]:
    norm, gate, up, down = leaves
    total = x * 1.0 if residual is None else x + residual
    h = total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * norm
    return F.linear(F.silu(h @ gate.t()) * (h @ up.t()), down), total


GATED_SHAPES = ((ROWS, DIM), (ROWS, DIM), (DIM,), (INNER, DIM), (INNER, DIM), (OUT, INNER))
OP = (fused, "GATED_MLP")
CASES = {
    "gated": Case(
        lambda *ts: joined(gated(*ts)), lambda *ts: joined(exact_gated(*ts)), GATED_SHAPES, *OP
    ),
    "gated, recomputed": Case(
        lambda *ts: joined(gated(*ts, keep=False)),
        lambda *ts: joined(exact_gated(*ts)),
        GATED_SHAPES,
        *OP,
    ),
    "gated, no residual": Case(
        lambda x, *ts: joined(gated(x, None, *ts)),
        lambda x, *ts: joined(exact_gated(x, None, *ts)),
        ((2, ROWS, DIM), *GATED_SHAPES[2:]),
        *OP,
    ),
}


@pytest.mark.parametrize("driver", [*EVERY_FIRST, *EVERY_HIGHER], ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_under_driver(name: str, driver: Driver) -> None:
    # fp64: sums of a few dozen terms of order 1
    assert error(CASES[name], driver) < ulps(torch.float64, 4000)


@pytest.mark.parametrize(("part", "driver"), [("backward", by_autograd), ("formula", by_jvp)])
def test_what_is_wrong_shows(part: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two drivers suffice: test_drivers.py covers all of them."""
    broken(CASES["gated"], part, monkeypatch)
    assert error(CASES["gated"], driver) > 0.1


# Memory


def bf16_inputs(rows: int = 64) -> list[Tensor]:
    return parameters((rows, 32), (rows, 32), (32,), (48, 32), (48, 32), (32, 48))


@pytest.mark.parametrize(("keep", "wide"), [(True, 2 * 48 * 2), (False, 0)])
def test_what_is_kept(keep: bool, wide: int) -> None:
    """Besides the arguments: the sum, one fp32 number per row, and the outputs of gate and up."""
    tensors = bf16_inputs()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, total = gated(*tensors, keep=keep)
    own = {t.data_ptr() for t in (*tensors, total)}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in own) == 64 * (4 + wide)


def last_backwards(f: Callable[[], Tensor], leaves: Sequence[Tensor]) -> list[list[Tensor]]:
    """Gradients of a backward that retains the graph, and of the next, which does not."""
    loss = f()
    return [list(torch.autograd.grad(loss, leaves, retain_graph=keep)) for keep in (True, False)]


def watch(name: str, of: int, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a function's first output has the memory of its argument `of`."""
    seen: list[bool] = []
    right = getattr(fused, name)

    def watched(*args: Any) -> Any:
        given = args[of].data_ptr()
        outs = right(*args)
        seen.append(outs[0].data_ptr() == given)
        return outs

    monkeypatch.setattr(fused, name, watched)
    return seen


def test_the_last_backward_overwrites_gate_and_up(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = [t.detach().to(kernel_device).requires_grad_() for t in bf16_inputs()]
    seen = watch("glu_gradients", 1, monkeypatch)
    with dispatch.override(rms_norm="triton", swiglu="triton"):
        first, second = last_backwards(lambda: gated(*leaves)[0].float().square().sum(), leaves)
        again = torch.autograd.grad(gated(*leaves, keep=False)[0].float().square().sum(), leaves)
    assert seen == [False, True, True]
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("rows", [1, 128, 300])
def test_rows_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks equal a single pass: sums over chunks are in fp32 and rounded once."""
    leaves = bf16_inputs(rows)

    def gradients() -> list[Tensor]:
        y, total = gated(*leaves, keep=False)
        loss = joined([y, total]).float().square().sum()
        return [y, *torch.autograd.grad(loss, leaves)]

    whole = gradients()
    pieces: list[int] = []
    forward, backward = fused.linear_reference, torch.mm

    def in_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight is leaves[3]:
            pieces.append(len(x))
        return forward(x, weight, bias)

    def in_backward(x: Tensor, weight: Tensor, **out: Tensor) -> Tensor:
        if weight.data_ptr() == leaves[3].data_ptr() and not weight.is_contiguous():  # gate.t()
            pieces.append(len(x))
        return backward(x, weight, **out)

    monkeypatch.setattr(fused, "linear_reference", in_forward)
    monkeypatch.setattr(torch, "mm", in_backward)
    monkeypatch.setattr(fused, "_CHUNK_BYTES", 1)
    cut = gradients()
    assert pieces == [n for _ in range(2) for n in (128,) * (rows // 128) + (rows % 128,) if n]
    for a, b in zip(whole, cut, strict=True):
        # roundings to bf16 of two sums that differ in fp32's last bits
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(BF16).eps, atol=0)


@pytest.mark.parametrize("keep", [True, False])
def test_no_rows(keep: bool) -> None:
    leaves = bf16_inputs(0)
    y, total = gated(*leaves, keep=keep)
    grads = torch.autograd.grad(y.sum() + total.sum(), leaves)
    assert y.shape == total.shape == (0, 32)
    assert all(g.shape == leaf.shape and not g.any() for g, leaf in zip(grads, leaves, strict=True))


@pytest.mark.parametrize("keep", [True, False])
def test_what_lives_at_the_worst_moment(
    keep: bool, allocations_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the activation's backward only its gradient lives besides gate's and up's outputs, not h,
    its gradient or a weight's. At the norm's backward only its inputs live."""
    rows, inner = 4096, 48
    x, _, norm, *weights = (t.detach() for t in bf16_inputs(rows))
    h, total, r = fused.add_norm(x, None, norm, EPS, False)
    made = tuple(F.linear(h, weight) for weight in weights[:2]) if keep else (None, None)
    inputs = (torch.ones_like(x), torch.ones_like(x), total, norm, *weights, r)
    living: list[int] = []

    def watched(name: str, outs: Callable[..., Any]) -> None:
        def look(*args: Any) -> Any:
            living.append(allocations.living())
            return outs(*args)

        monkeypatch.setattr(fused, name, look)

    # in place, as the kernels do, with arbitrary numbers
    watched("glu_gradients", lambda grad, gate, up, *_: (gate, grad, up))
    watched("norm_gradients", lambda grad, *_: (grad, norm, grad))
    right = fused.norm_again
    monkeypatch.setattr(fused, "norm_again", lambda *args: right(*args[:-1], False))
    given = (t for t in (*inputs, *made) if t is not None)
    with torch.no_grad(), allocations_in(*given) as allocations:
        fused._gated_gradients(*inputs, *made, EPS, True, True, True, [True] * 4, True)
    wide, of_h, of_down = (2 * rows * inner, 2 * rows * 32, weights[2].nbytes)
    assert living == [(1 if keep else 3) * wide, (1 if keep else 2) * wide + of_h + of_down]


LEARN = ["100000", "001000", "000100", "000010", "000001", "111111", "110000", "000101"]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("learn", LEARN)
def test_gradients_of_some(learn: str, keep: bool) -> None:
    tensors = [
        random(*s, seed=i).requires_grad_(c == "1")
        for i, (s, c) in enumerate(zip(GATED_SHAPES, learn, strict=True))
    ]
    some = [t for t in tensors if t.requires_grad]
    got, wanted = (
        torch.autograd.grad(joined(f(*tensors)).sin().sum(), some)
        for f in (partial(gated, keep=keep), exact_gated)
    )
    torch.testing.assert_close(
        got, wanted, rtol=ulps(torch.float64, 1000), atol=ulps(torch.float64, 1000)
    )


# Backends


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("triton", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_gated_is_its_parts_to_the_bit(triton: str, keep: bool) -> None:
    leaves = bf16_inputs()

    def parts(x: Tensor, residual: Tensor, norm: Tensor, *more: Tensor) -> list[Tensor]:
        (a, b), total = kernels.add_norm_linears(x, residual, norm, more[:2], eps=EPS)
        return [kernels.glu_linear(a, b, more[2]), total]

    with dispatch.override(rms_norm=triton, swiglu=triton):
        got, wanted = (
            [*outs, *torch.autograd.grad(joined(outs).float().sin().sum(), leaves)]
            for outs in (gated(*leaves, keep=keep), parts(*leaves))
        )
    assert all(map(torch.equal, got, wanted))


def test_wrong_arguments() -> None:
    x, residual, norm, gate, up, down = (t.detach() for t in bf16_inputs())
    with pytest.raises(ValueError, match="gate and up must be alike"):
        add_norm_gated_mlp(x, residual, norm, gate, up[:40], down)
    with pytest.raises(ValueError, match="they must be alike"):
        add_norm_gated_mlp(x, residual.float(), norm, gate, up, down)
    with pytest.raises(ValueError, match=r"down \[O, F\]"):
        add_norm_gated_mlp(x, residual, norm, gate, up, down.t())


@pytest.mark.parametrize("retain", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_flops_are_those_of_the_products(keep: bool, retain: bool) -> None:
    """3 forward, 6 backward, 2 recomputed. The operator that overwrites runs unless the graph is
    retained."""
    x, *leaves = parameters((ROWS, DIM), *GATED_SHAPES[2:])
    with FlopCounterMode(display=False) as counter:
        y, total = gated(x, None, *leaves, keep=keep)
        (y.sum() + total.sum()).backward(retain_graph=retain)
    name = f"gated_mlp_backward{'_' if keep and not retain else ''}"
    assert getattr(torch.ops.nanovision, name) in counter.get_flop_counts()["Global"]
    product = 2 * ROWS * INNER
    assert counter.get_total_flops() == product * (3 * (2 * DIM + OUT) + (not keep) * 2 * DIM)
