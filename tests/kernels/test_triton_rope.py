"""The rotary embedding's Triton kernels, in the interpreter and on a GPU, with and without QK-norm.

test_triton_elementwise.py tests them under autograd, torch.func and torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from kernels import rope
from kernels.rope import rope_triton
from kernels.runtime import dispatch
from tests.kernels import accuracy
from tests.kernels.accuracy import distance, within
from tests.kernels.drivers import random, saved_by
from tests.rounding import ulps

EPS = 1e-5
EPS32 = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# tokens, heads, key heads, head size: one of each; odd numbers of heads; no powers of two; more
# tokens than a program takes and more than all programs take at a time (4 SMs in the interpreter)
SHAPES = [(1, 1, 1, 2), (5, 3, 1, 6), (9, 4, 2, 80), (7, 5, 5, 64), (70, 2, 2, 16)]


def triton() -> Any:
    return dispatch.override(rope="triton")


def tables(positions: int, dim: int, device: str) -> tuple[Tensor, Tensor]:
    frequencies = 100.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)


def some(count: int, positions: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, positions, (count,), generator=generator).to(device)


def exact_turn(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    (a, b), half = x.chunk(2, -1), x.shape[-1] // 2
    c, s = (t.double()[positions][:, None] for t in (cos, sin))
    return torch.cat(
        (a * c[..., :half] - b * s[..., :half], b * c[..., -half:] + a * s[..., -half:]), -1
    )


def exact_norm(x: Tensor, w: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w


def exact_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *weights: Tensor
) -> tuple[Tensor, Tensor]:
    if weights:
        q, k = exact_norm(q, weights[0]), exact_norm(k, weights[1])
    return exact_turn(q, cos, sin, positions), exact_turn(k, cos, sin, positions)


def our_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *weights: Tensor
) -> tuple[Tensor, Tensor]:
    named = dict(zip(("q_weight", "k_weight"), weights, strict=False))
    return rope(q, k, cos, sin, positions, **named, eps=EPS)


def outputs_and_gradients(
    f: Callable[..., tuple[Tensor, ...]],
    cotangents: tuple[Tensor, ...],
    constants: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    *weights: Tensor,
) -> list[Tensor]:
    return accuracy.outputs_and_gradients(
        lambda q, k, *weights: f(q, k, *constants, *weights), cotangents, q, k, *weights
    )


def check(got: list[Tensor], exact: list[Tensor], leaves: tuple[Tensor, ...], device: str) -> None:
    """The bounds: sums of two products; with a norm also sums over a head, and over all tokens for
    its weights' gradients; the norm's gradient is a difference of terms of size |g w r|."""
    q, k, *weights = leaves
    dtypes = [x.dtype for x in (q, k, *leaves)]
    assert [t.dtype for t in got] == dtypes
    length = 1.0
    if weights:
        r = max(float((x.double().square().mean(-1) + EPS).rsqrt().max()) for x in (q, k))
        length = max(1.0, r) * max(float(w.abs().max()) for w in weights) * q.shape[-1] ** 0.5
    for i, (one, right) in enumerate(zip(got, exact, strict=True)):
        size = max(float(right.abs().max()), 4.0) * length
        within(one, right, size if i < 4 else size * q[..., 0].numel() ** 0.5, device)


def case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, weight_dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(q, k, and their weights), (cos, sin, positions), gradients of the outputs."""
    n, heads, key_heads, dim = shape
    q, g_q = (random(n, heads, dim, seed=i, dtype=dtype).to(device) for i in (0, 1))
    k, g_k = (random(n, key_heads, dim, seed=i, dtype=dtype).to(device) for i in (2, 3))
    weights = (random(dim, seed=i, dtype=weight_dtype).to(device) for i in (4, 5))
    constants = (*tables(50, dim, device), some(n, 50, device))
    return (q, k, *weights), constants, (g_q, g_k)


# Parity


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_each_half_may_have_a_table_of_its_own(shape, normed, backend, kernel_device) -> None:
    leaves, (cos, sin, positions), grads = case(shape, torch.float32, kernel_device, torch.float32)
    leaves = leaves if normed else leaves[:2]
    cos, sin = (torch.cat((t, t.roll(1, 0)), -1) for t in (cos, sin))
    with dispatch.override(rope=backend):
        got = outputs_and_gradients(our_rope, grads, (cos, sin, positions), *leaves)
    wide = tuple(x.double() for x in leaves)
    exact = outputs_and_gradients(exact_rope, grads, (cos, sin, positions), *wide)
    check(got, exact, leaves, kernel_device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounded_once(
    shape: tuple[int, int, int, int],
    weight_dtype: torch.dtype | None,
    dtype: torch.dtype,
    kernel_device: str,
) -> None:
    leaves, constants, grads = case(shape, dtype, kernel_device, weight_dtype or torch.float32)
    leaves = leaves if weight_dtype else leaves[:2]
    with triton():
        got = outputs_and_gradients(our_rope, grads, constants, *leaves)
    wide = tuple(x.double() for x in leaves)
    exact = outputs_and_gradients(exact_rope, grads, constants, *wide)
    check(got, exact, leaves, kernel_device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_rounds_once_too(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        leaves, constants, grads = case(shape, dtype, "cpu", torch.float32)
        with dispatch.override(rope="torch"):
            got = outputs_and_gradients(our_rope, grads, constants, *leaves)
        wide = tuple(x.double() for x in leaves)
        exact = outputs_and_gradients(exact_rope, grads, constants, *wide)
        check(got, exact, leaves, "exact")


def test_each_in_its_own_dtype(kernel_device: str) -> None:
    (q, k, a, b), constants, grads = case((5, 3, 2, 8), torch.float32, kernel_device, torch.float16)
    leaves = (q, k.bfloat16(), a, b.bfloat16())
    with triton():
        got = outputs_and_gradients(our_rope, grads, constants, *leaves)
    assert [t.dtype for t in got] == [q.dtype, torch.bfloat16, *(x.dtype for x in leaves)]
    wide = tuple(x.double() for x in leaves)
    exact = outputs_and_gradients(exact_rope, (grads[0], grads[1].bfloat16()), constants, *wide)
    for one, right in zip(got, exact, strict=True):
        within(one, right, 100.0, kernel_device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tables_of_another_dtype(dtype: torch.dtype, kernel_device: str) -> None:
    leaves, (cos, sin, positions), grads = case(
        (5, 3, 2, 8), torch.float32, kernel_device, torch.float32
    )
    constants = (cos.to(dtype), sin.to(dtype), positions)
    with triton():
        got = outputs_and_gradients(our_rope, grads, constants, *leaves)
    exact = outputs_and_gradients(exact_rope, grads, constants, *(x.double() for x in leaves))
    check(got, exact, leaves, kernel_device)


def test_fp64_goes_to_torch(kernel_device: str) -> None:
    leaves, constants, _ = case((5, 3, 2, 8), torch.float32, kernel_device, torch.float32)
    with triton(), pytest.raises(RuntimeError, match="takes bfloat16, float16 or float32"):
        rope(leaves[0], leaves[1].double(), *constants)
    assert rope(leaves[0], leaves[1].double(), *constants)[1].dtype == torch.float64


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("normed", [False, True])
def test_slices_of_one_projection(normed: bool, kernel_device: str) -> None:
    """Strided tokens and heads with NaN between them give the same bits as contiguous ones."""
    leaves, constants, grads = case((9, 4, 2, 16), torch.float32, kernel_device, torch.float32)
    leaves = leaves if normed else leaves[:2]
    fused = torch.full((9, 8, 24), float("nan"), device=kernel_device)
    q, k = fused[:, :4, :16], fused[:, 4:6, 8:]
    g_q, g_k = (x.expand_as(x) for x in grads)
    apart = torch.full((9, 16, 4), float("nan"), device=kernel_device).permute(0, 2, 1)
    for x, y in zip((q, k, apart), (*leaves[:2], grads[0]), strict=True):
        x.copy_(y)
    with triton():
        wanted = outputs_and_gradients(our_rope, grads, constants, *leaves)
        for some_grads in ((g_q, g_k), (apart, g_k)):
            got = outputs_and_gradients(our_rope, some_grads, constants, q, k, *leaves[2:])
            for a, b in zip(got, wanted, strict=True):
                assert torch.equal(a, b)


def test_slices_are_not_copied(monkeypatch: pytest.MonkeyPatch, kernel_device: str) -> None:
    given: list[Any] = []
    monkeypatch.setattr(rope_triton, "launch", lambda kernel, grid, *a, **rest: given.extend(a))
    fused = torch.zeros(9, 8, 16, device=kernel_device)
    constants = (*tables(50, 16, kernel_device), some(9, 50, kernel_device))
    q, k, _ = fused.split((4, 2, 2), 1)
    rope_triton.rope_turn(q, k, None, None, *constants, 0.0, False)
    assert [x.data_ptr() for x in given[:2]] == [q.data_ptr(), k.data_ptr()]


def test_a_constant_gradient(kernel_device: str) -> None:
    """The gradient of `.sum()` is one expanded number."""
    leaves, constants, grads = case((5, 3, 2, 8), torch.float32, kernel_device, torch.float32)
    one = torch.ones((), device=kernel_device)
    with triton():
        for some_leaves in (leaves, leaves[:2]):
            got = outputs_and_gradients(
                our_rope, tuple(one.expand(g.shape) for g in grads), constants, *some_leaves
            )
            wanted = outputs_and_gradients(
                our_rope, tuple(torch.ones_like(g) for g in grads), constants, *some_leaves
            )
            for a, b in zip(got, wanted, strict=True):
                assert torch.equal(a, b)


def test_a_token_of_nan_stays_alone(kernel_device: str) -> None:
    (q, k, a, b), constants, grads = case(
        (9, 4, 2, 16), torch.float32, kernel_device, torch.float32
    )
    q[3] = k[3] = float("nan")
    others = torch.arange(9) != 3
    with triton():
        for f in (our_rope, lambda *args: our_rope(*args, a, b)):
            for t in outputs_and_gradients(f, grads, constants, q, k):
                assert t[others].isfinite().all()
            assert f(q, k, *constants)[0][3].isnan().all()


def test_an_unknown_position_is_nan(kernel_device: str) -> None:
    """The public function checks positions on a CPU; on a GPU it cannot read them."""
    leaves, (cos, sin, positions), _ = case(
        (9, 4, 2, 6), torch.float32, kernel_device, torch.float32
    )
    positions[2], positions[5] = 50, -1
    bad = torch.zeros(9, dtype=torch.bool, device=kernel_device)
    bad[2] = bad[5] = True
    for weights in ((None, None), leaves[2:]):
        for out in rope_triton.rope_turn(*leaves[:2], *weights, cos, sin, positions, EPS, False):
            assert out[bad].isnan().all()
            assert out[~bad].isfinite().all()


def test_same_bits_each_time(kernel_device: str) -> None:
    leaves, constants, grads = case((70, 2, 2, 16), torch.float32, kernel_device, torch.float32)
    with triton():
        runs = [outputs_and_gradients(our_rope, grads, constants, *leaves) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("poisoned")
def test_no_tokens(kernel_device: str) -> None:
    leaves, constants, grads = case((0, 4, 2, 16), torch.float32, kernel_device, torch.float32)
    with triton():
        *rest, dq_weight, dk_weight = outputs_and_gradients(our_rope, grads, constants, *leaves)
        assert outputs_and_gradients(our_rope, grads, constants, *leaves[:2])[0].shape == (0, 4, 16)
    assert [x.shape[0] for x in rest] == [0, 0, 0, 0]
    assert not dq_weight.any()
    assert not dk_weight.any()


# Saved tensors and launches


@pytest.mark.parametrize("normed", [False, True])
def test_backward_keeps_what_it_is_given_alone(normed: bool, kernel_device: str) -> None:
    leaves, constants, _ = case((9, 4, 2, 16), torch.bfloat16, kernel_device, torch.float32)
    leaves = tuple(x.requires_grad_() for x in (leaves if normed else leaves[:2]))
    own = {x.untyped_storage()._cdata for x in (*leaves, *constants)}
    with triton():
        saved = saved_by(lambda: our_rope(*leaves[:2], *constants, *leaves[2:]))
    kept = {x.untyped_storage()._cdata for x in saved}
    assert kept <= own
    assert len(kept) == (7 if normed else 3)


def test_one_launch_serves_all_examples(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain, and with norms of frozen weights: gradients of weights are one sum per example."""
    (q, k, a, b), (cos, sin, _), _ = case((6, 4, 2, 8), torch.float32, kernel_device, torch.float32)
    q, k = q.unflatten(0, (2, 3)), k.unflatten(0, (2, 3))
    positions = some(6, 50, kernel_device).view(2, 3)
    launched: list[str] = []
    real = rope_triton.launch

    def noted(kernel: Any, *args: Any, **options: Any) -> None:
        launched.append(kernel.fn.__name__)
        real(kernel, *args, **options)

    monkeypatch.setattr(rope_triton, "launch", noted)

    def loss(q: Tensor, k: Tensor, positions: Tensor, *weights: Tensor) -> Tensor:
        return sum(x.sin().square().sum() for x in our_rope(q, k, cos, sin, positions, *weights))

    def exact(q: Tensor, k: Tensor, *weights: Tensor) -> Tensor:
        outs = exact_rope(q, k, cos, sin, positions.flatten(), *weights)
        return sum(x.sin().square().sum() for x in outs)

    for weights, backward in (
        ((), "rope_kernel"),
        ((a, b), "rope_qk_norm_backward_kernel"),
    ):
        launched.clear()
        dims = (0, 0, 0, *(None for _ in weights))
        with triton():
            got = vmap(grad(loss, (0, 1)), dims)(q, k, positions, *weights)
        assert launched == ["rope_kernel", backward]
        wide = [x.flatten(0, 1).double().requires_grad_() for x in (q, k)]
        wanted = torch.autograd.grad(exact(*wide, *(w.double() for w in weights)), wide)
        for one, right in zip(got, wanted, strict=True):
            torch.testing.assert_close(
                one.flatten(0, 1).double(),
                right,
                rtol=ulps(torch.float32, 800),
                atol=ulps(torch.float32, 80),
            )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_output_may_go_unused(backend: str, kernel_device: str) -> None:
    leaves, constants, _ = case((5, 3, 2, 8), torch.float32, kernel_device, torch.float32)
    for some_leaves in (leaves, leaves[:2]):
        for which in (0, 1):
            xs = [x.clone().requires_grad_() for x in some_leaves]
            ys = [x.double().requires_grad_() for x in some_leaves]
            with dispatch.override(rope=backend):
                out = our_rope(*xs[:2], *constants, *xs[2:])[which]
                got = torch.autograd.grad(out.sin().sum(), xs, allow_unused=True)
            out = exact_rope(*ys[:2], *constants, *ys[2:])[which]
            wanted = torch.autograd.grad(out.sin().sum(), ys, allow_unused=True)
            for x, one, right in zip(xs, got, wanted, strict=True):
                one = torch.zeros_like(x) if one is None else one
                right = torch.zeros_like(x).double() if right is None else right
                torch.testing.assert_close(
                    one.double(), right, rtol=ulps(torch.float32, 800), atol=ulps(torch.float32, 80)
                )


# Bad arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_weight": torch.ones(8)}, "k_weight is missing; QK-norm takes two"),
        ({"k_weight": torch.ones(8)}, "q_weight is missing; QK-norm takes two"),
        ({"q_weight": torch.ones(7), "k_weight": torch.ones(8)}, r"q_weight must have shape \[8\]"),
        ({"q_weight": torch.ones(8), "k_weight": torch.ones(1, 8)}, r"k_weight must have shape"),
        (
            {"q_weight": torch.ones(8).long(), "k_weight": torch.ones(8)},
            "q_weight must be floating",
        ),
        (
            {"q_weight": torch.ones(8, device="meta"), "k_weight": torch.ones(8)},
            "q_weight is on meta",
        ),
        ({"eps": -1.0}, "eps must be >= 0"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    q, k = torch.ones(4, 2, 8), torch.ones(4, 1, 8)
    with pytest.raises(ValueError, match=message):
        rope(q, k, torch.ones(9, 4), torch.ones(9, 4), torch.arange(4), **changes)


# Real sizes, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", [(16384, 12, 2, 128), (1000, 32, 8, 80)], ids=str)
def test_no_worse_than_torch_at_real_size(
    shape: tuple[int, int, int, int], normed: bool, dtype: torch.dtype
) -> None:
    leaves, constants, grads = case(shape, dtype, "cuda", dtype)
    leaves = leaves if normed else leaves[:2]
    with triton():
        got = outputs_and_gradients(our_rope, grads, constants, *leaves)
    with dispatch.override(rope="torch"):
        plain = outputs_and_gradients(our_rope, grads, constants, *leaves)
    exact = outputs_and_gradients(exact_rope, grads, constants, *(x.double() for x in leaves))
    for a, b, c in zip(got, plain, exact, strict=True):
        assert distance(a, c) <= 1.01 * distance(b, c) + 32 * EPS32


@pytest.mark.gpu
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.usefixtures("whole_gpu")
def test_more_than_2_31_numbers(normed: bool) -> None:
    """At the last tokens a 32-bit offset would overflow."""
    heads, dim, tail = 16, 128, 77
    n = 2**31 // (heads * dim) + 1000
    q = torch.zeros(n, heads, dim, device="cuda", dtype=torch.bfloat16)
    q[-tail:] = torch.randn(tail, heads, dim, device="cuda")
    constants = (*tables(50, dim, "cuda"), some(n, 50, "cuda"))
    weights = [torch.randn(dim, device="cuda") for _ in range(2)] if normed else []
    short = (*constants[:2], constants[2][-tail:])
    with triton():
        got = outputs_and_gradients(our_rope, (q, q), constants, q, q, *weights)
        last = q[-tail:].clone()
        wanted = outputs_and_gradients(our_rope, (last, last), short, last, last, *weights)
    for a, b in zip(got[:4], wanted[:4], strict=True):
        assert torch.equal(a[-tail:], b)
        assert not a[:-tail].any()
    for a, b in zip(got[4:], wanted[4:], strict=True):
        assert distance(a, b.double()) < ulps(torch.float32, 80)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    (q, k, a, b), constants, (g_q, g_k) = case(
        (512, 4, 2, 128), torch.bfloat16, "cuda", torch.float32
    )

    def step() -> tuple[Any, ...]:
        turned = rope_triton.rope_turn(q, k, a, b, *constants, EPS, False)
        back = rope_triton.rope_qk_norm_backward(g_q, g_k, q, k, a, b, *constants, EPS, True)
        return *turned, *back

    wanted = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    for one, right in zip(got, wanted, strict=True):
        assert torch.equal(one, right)
