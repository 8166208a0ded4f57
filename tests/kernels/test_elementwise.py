"""rms_norm, layer_norm, swiglu, rope: saved tensors, torch.compile, meta tensors, errors.

The tests of their Triton kernels, such as test_triton_rms_norm.py, test their rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import geglu, layer_norm, rms_norm, rope, swiglu
from tests.kernels import accuracy
from tests.kernels.drivers import random, saved_bytes
from tests.rounding import ulps


def outputs_and_gradients(
    f: Callable[..., Tensor], cotangent: Tensor, *leaves: Tensor
) -> tuple[Tensor, list[Tensor]]:
    out, *grads = accuracy.outputs_and_gradients(f, cotangent, *leaves)
    return out, grads


def exact_rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w


def tables(positions: int, dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 100.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return angles.cos(), angles.sin()


def test_rope_backward_is_the_opposite_rotation() -> None:
    cos, sin = tables(50, 8)
    positions = torch.randint(0, 50, (9,))
    q, k = random(9, 4, 8), random(9, 2, 8, seed=1)
    turned = rope(q, k, cos, sin, positions)
    _, (back,) = outputs_and_gradients(
        lambda x: rope(x, k, cos, sin, positions)[0], turned[0], torch.zeros_like(q)
    )
    torch.testing.assert_close(
        back, q, rtol=ulps(torch.float64, 64), atol=ulps(torch.float64, 64)
    )  # the adjoint of a rotation is its inverse


def test_rope_depends_on_distance_alone() -> None:
    cos, sin = tables(50, 8)
    q, k = random(1, 1, 8), random(1, 1, 8, seed=1)

    def score(i: int, j: int) -> Tensor:
        a, _ = rope(q, k, cos, sin, torch.tensor([i]))
        _, b = rope(q, k, cos, sin, torch.tensor([j]))
        return (a * b).sum()

    torch.testing.assert_close(score(40, 33), score(7, 0), rtol=ulps(torch.float64, 1000), atol=0)


def test_rope_serves_per_example_positions() -> None:
    cos, sin = tables(50, 8)
    q, k = random(3, 9, 4, 8), random(3, 9, 2, 8, seed=1)
    positions = torch.randint(0, 50, (3, 9))
    got = torch.func.vmap(rope, in_dims=(0, 0, None, None, 0))(q, k, cos, sin, positions)
    per_example_tables = torch.func.vmap(rope)(
        q, k, cos.expand(3, -1, -1), sin.expand(3, -1, -1), positions
    )
    for i in range(3):
        wanted = rope(q[i], k[i], cos, sin, positions[i])
        for a, b, c in zip(got, per_example_tables, wanted, strict=True):
            torch.testing.assert_close(a[i], c)
            torch.testing.assert_close(b[i], c)


# Saved tensors


def test_backwards_keep_inputs_and_row_statistics_only() -> None:
    x = random(64, 32, dtype=torch.bfloat16).requires_grad_()
    up = random(64, 32, dtype=torch.bfloat16, seed=1).requires_grad_()
    w = random(32, dtype=torch.float32, seed=2).requires_grad_()
    row = 64 * 4  # one fp32 number per row
    assert saved_bytes(lambda: rms_norm(x, w), x, w) == row
    assert saved_bytes(lambda: layer_norm(x, w, w), x, w) == 2 * row
    assert saved_bytes(lambda: swiglu(x, up), x, up) == 0
    # the plain formula saves several fp32 copies of x: the test can fail
    plain = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True))
    assert plain.requires_grad
    assert saved_bytes(lambda: exact_rms_norm(x.float(), w, 1e-6), x, w) > 2 * x.numel() * 4


def test_rope_keeps_the_shared_tables_only() -> None:
    cos, sin = (t.float() for t in tables(50, 8))
    positions = torch.arange(9)
    q = random(9, 4, 8, dtype=torch.bfloat16).requires_grad_()
    k = random(9, 2, 8, dtype=torch.bfloat16, seed=1).requires_grad_()
    assert saved_bytes(lambda: rope(q, k, cos, sin, positions), cos, sin, positions) == 0


def test_nothing_extra_lives_after_a_forward(allocations_in: Any) -> None:
    """save_for_forward and the Function's context keep nothing else alive."""
    cos, sin = (t.float() for t in tables(50, 8))
    q = random(9, 4, 8, dtype=torch.bfloat16).requires_grad_()
    k = random(9, 2, 8, dtype=torch.bfloat16, seed=1).requires_grad_()
    positions = torch.arange(9)
    with allocations_in(q, k, cos, sin, positions) as allocations:
        first, second = q * 1, k * 1
        out = rope(first, second, cos, sin, positions)
        del first, second
        assert allocations.living() == sum(t.untyped_storage().nbytes() for t in out)


# Compiled, meta, errors


def test_dtype_and_shape_on_meta() -> None:
    x = torch.empty(4, 6, dtype=torch.bfloat16, device="meta", requires_grad=True)
    w = torch.empty(6, device="meta", requires_grad=True)
    for out in (rms_norm(x, w), layer_norm(x, w, w), swiglu(x, x)):
        assert (out.shape, out.dtype, out.device.type) == (x.shape, x.dtype, "meta")
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
    q = torch.empty(4, 2, 8, device="meta", dtype=torch.bfloat16)
    table = torch.empty(9, 4, device="meta")
    positions = torch.empty(4, dtype=torch.int64, device="meta")
    assert rope(q, q, table, table, positions)[0].shape == q.shape


def test_compiled_bf16_matches_eager() -> None:
    torch._dynamo.reset()
    cos, sin = (t.float() for t in tables(16, 8))
    positions = torch.arange(16)

    def block(x: Tensor, w: Tensor) -> Tensor:
        y = rms_norm(x, w)
        y = layer_norm(y, w, w) + swiglu(y, x)
        q, k = rope(y.view(16, 4, 8), y.view(16, 4, 8), cos, sin, positions)
        return (q * k).float().sum()

    x, w = random(16, 32, dtype=torch.bfloat16), random(32, dtype=torch.float32, seed=1)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    got = outputs_and_gradients(compiled, torch.ones(()), x, w)
    wanted = outputs_and_gradients(block, torch.ones(()), x, w)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_empty_batches_pass() -> None:
    x = torch.zeros(0, 6, requires_grad=True)
    w = torch.ones(6, requires_grad=True)
    for out in (rms_norm(x, w), layer_norm(x, w, w), swiglu(x, x)):
        assert out.shape == (0, 6)
        torch.autograd.grad(out.sum(), x)
    q = torch.zeros(0, 2, 8)
    table = torch.zeros(9, 4)
    assert rope(q, q, table, table, torch.zeros(0, dtype=torch.int64))[0].shape == (0, 2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rms_norm(x, torch.ones(5)), r"rms_norm: weight must have shape \[6\]"),
        (lambda x: layer_norm(x, None, torch.ones(5)), r"bias must have shape \[6\]"),
        (lambda x: rms_norm(x.long()), "x must be floating point, got torch.int64"),
        (lambda x: rms_norm(x, torch.ones(6, device="meta")), "weight is on meta"),
        (lambda x: rms_norm(x, None, -1.0), "eps must be >= 0"),
        (lambda x: rms_norm(x.sum()), "at least one dimension"),
        (lambda x: swiglu(x, x[:2]), "they must be alike"),
        (lambda x: swiglu(x, x.bfloat16()), "they must be alike"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4, 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(4, 16)}, r"q must be \[N, heads, head size\]"),
        ({"q": torch.ones(4, 2, 7)}, "head size must be even"),
        ({"k": torch.ones(3, 2, 8)}, r"k must have shape \[4, Hk, 8\]"),
        ({"cos": torch.ones(9, 8)}, r"cos and sin must have shape \[T, 4\]"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "positions must be int64"),
        ({"positions": torch.zeros(4, dtype=torch.int32)}, "positions must be int64"),
        ({"positions": torch.tensor([0, 9, 1, 2])}, "position 9 is outside the tables of 9"),
        ({"positions": torch.tensor([0, -1, 1, 2])}, "position -1 is outside"),
        ({"cos": torch.ones(9, 4, requires_grad=True)}, "constants"),
    ],
)
def test_bad_rope_arguments_are_named(changes: dict[str, Tensor], message: str) -> None:
    arguments = {
        "q": torch.ones(4, 2, 8),
        "k": torch.ones(4, 1, 8),
        "cos": torch.ones(9, 4),
        "sin": torch.ones(9, 4),
        "positions": torch.arange(4),
    }
    arguments.update(changes)
    with pytest.raises(ValueError, match=message):
        rope(**arguments)


def test_strides_are_those_of_torchs_own() -> None:
    """Norms return contiguous tensors, elementwise functions keep x's memory order."""
    x, weight = torch.randn(2, 8, 5).transpose(1, 2), torch.ones(8)
    assert rms_norm(x, weight).stride() == F.rms_norm(x, (8,), weight).stride()
    assert layer_norm(x, weight, weight).stride() == F.layer_norm(x, (8,), weight).stride()
    pair = torch.randn(2, 5, 16)
    for gate, up in ((x, x), pair.chunk(2, -1)):
        assert swiglu(gate, up).stride() == (F.silu(gate) * up).stride()
        assert geglu(gate, up).stride() == (F.gelu(gate, approximate="tanh") * up).stride()
