"""attention: backends against each other and fp64, packing, isolation, memory, adapters, errors."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import attention
from tests.kernels.drivers import (
    FIRST_ORDER,
    Case,
    Driver,
    broken,
    by_autograd,
    by_double_backward,
    by_hvp,
    by_jvp,
    by_vmap_grad,
    disagreement,
    error,
    name_of,
    saved_bytes,
    scalar,
)
from tests.rounding import ulps

module = importlib.import_module("kernels.attention.attention")
padded = importlib.import_module("kernels.attention.attention_padded")
flash = importlib.import_module("kernels.attention.attention_flash")


def boundaries(*lengths: int) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def tensors(
    n: int,
    heads: int = 4,
    key_heads: int = 2,
    dim: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, heads, dim), (n, key_heads, dim), (n, key_heads, dim))
    return tuple(  # type: ignore[return-value]
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )


def outputs_and_gradients(f: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    out = f(*leaves)
    generator = torch.Generator().manual_seed(9)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def by_documents(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, causal: bool, window: int | None
) -> Tensor:
    """Torch's own attention, one document at a time."""
    outs = []
    for start, end in itertools.pairwise(cu.tolist()):
        if start == end:
            continue
        gap = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = gap >= 0 if causal else torch.ones_like(gap, dtype=torch.bool)
        if window is not None:
            seen = seen & (gap.abs() < window)
        parts = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(*parts, attn_mask=seen, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


LAYOUTS = {
    "one": (12,),
    "uniform": (16, 16, 16, 16),
    "uniform and padding": (16, 16, 16, 5, 0, 0),
    "ragged": (3, 0, 17, 1, 9, 30, 2, 2, 8, 0),
    "spread": (70, 5, 64, 6, 200, 7),
    "longer than kept": (130, 9, 131, 140, 3),
    "through the flash kernel": (260, 9, 300, 300, 3, 257),
    "flash, uniform": (270, 270, 0),
    "empty ends": (0, 0, 7, 8, 0, 9, 0, 0),
}


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backends_agree_with_torch(layout: str, causal: bool, window: int | None) -> None:
    cu = boundaries(*LAYOUTS[layout])
    leaves = tensors(int(cu[-1]))
    wanted = outputs_and_gradients(lambda *x: by_documents(*x, cu, causal, window), *leaves)
    for backend in ("padded", "plain"):
        with kernels.override(attention=backend):
            got = outputs_and_gradients(
                lambda *x: attention(*x, cu, causal=causal, window=window), *leaves
            )
        torch.testing.assert_close(
            got, wanted, rtol=ulps(torch.float64, 4000), atol=ulps(torch.float64, 1000)
        )


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (6, 6), (6, 1), (6, 3)])
@pytest.mark.parametrize("length", [20, 300])
def test_heads_share_keys_in_groups(heads: int, key_heads: int, length: int) -> None:
    cu = boundaries(length, 7, length - 1, 3)
    leaves = tensors(int(cu[-1]), heads, key_heads, dim=4)
    wanted = outputs_and_gradients(lambda *x: by_documents(*x, cu, True, None), *leaves)
    got = outputs_and_gradients(lambda *x: attention(*x, cu), *leaves)
    torch.testing.assert_close(
        got, wanted, rtol=ulps(torch.float64, 4000), atol=ulps(torch.float64, 1000)
    )


def test_scale_is_used() -> None:
    q, k, v = tensors(10)
    cu = boundaries(6, 4)
    for backend in ("padded", "plain"):
        with kernels.override(attention=backend):
            torch.testing.assert_close(
                attention(q, k, v, cu, scale=0.3), attention(q * 0.3 * 8**0.5, k, v, cu)
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["uniform", "ragged", "longer than kept", "flash, uniform"])
def test_no_worse_than_torch_in_the_same_dtype(layout: str, dtype: torch.dtype) -> None:
    cu = boundaries(*LAYOUTS[layout])
    leaves = tensors(int(cu[-1]), dtype=dtype)
    exact = outputs_and_gradients(
        lambda *x: by_documents(*x, cu, True, None), *(x.double() for x in leaves)
    )
    torchs = outputs_and_gradients(lambda *x: by_documents(*x, cu, True, None), *leaves)
    got = outputs_and_gradients(lambda *x: attention(*x, cu), *leaves)
    for mine, theirs, right in zip(got, torchs, exact, strict=True):
        assert mine.dtype == dtype
        # weights, outputs and their gradients are each rounded to dtype: a few ulps of the largest
        bound = 4 * torch.finfo(dtype).eps * right.abs().max()
        error = (mine.double() - right).abs().max()
        assert error <= (theirs.double() - right).abs().max() + bound


def test_scores_keep_fp32_in_bf16() -> None:
    """Large scores with small differences: rounding them to bf16 would change the weights."""
    q = torch.full((2, 1, 8), 8.0, dtype=torch.bfloat16)
    k = torch.full((2, 1, 8), 8.0, dtype=torch.bfloat16)
    k[1, 0, 0] = 8.0625  # scores 512 and 512.5 before the scale: one number in bf16
    v = torch.tensor([[[0.0]], [[1.0]]], dtype=torch.bfloat16).expand(2, 1, 8)
    wanted = torch.softmax(torch.tensor([512.0, 512.5]), 0)[1]
    for backend in ("padded", "plain"):
        with kernels.override(attention=backend):
            out = attention(q, k, v, boundaries(2), causal=False, scale=1.0)
        torch.testing.assert_close(out.float(), wanted.expand(2, 1, 8), rtol=2**-8, atol=0)


# Packing


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [11, 300])
def test_a_document_is_the_same_alone_and_packed(length: int, causal: bool) -> None:
    others = (9, 40, 40, 3, 1, 300)
    q, k, v = tensors(length + sum(others), dtype=torch.float32)
    packed = attention(q, k, v, boundaries(*others[:3], length, *others[3:]), causal=causal)
    here = slice(sum(others[:3]), sum(others[:3]) + length)
    alone = attention(q[here], k[here], v[here], boundaries(length), causal=causal)
    # fp32: weights in (0, 1) summing to 1, over at most 300 keys
    torch.testing.assert_close(
        packed[here], alone, rtol=ulps(torch.float32, 80), atol=ulps(torch.float32, 16)
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [11, 300])
def test_documents_cannot_touch_each_other(length: int, causal: bool) -> None:
    """NaN in one document, in all of its q, k and v: nothing of it reaches the others."""
    lengths = (9, length, 40, 3, length, 12, 0, 0)
    cu = boundaries(*lengths)
    leaves = tensors(int(cu[-1]), dtype=torch.float32)
    poisoned = slice(9, 9 + length)
    for x in leaves:
        x[poisoned] = float("nan")
    for tensor in outputs_and_gradients(lambda *x: attention(*x, cu, causal=causal), *leaves):
        bad = ~tensor.isfinite().flatten(1).all(1)
        assert bad[poisoned].any()
        bad[poisoned] = False
        assert not bad.any()


@pytest.mark.parametrize("backend", ["padded", "plain"])
def test_no_tokens_at_all(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(0))
    with kernels.override(attention=backend) if backend == "plain" else kernels.override():
        out = attention(q, k, v, torch.zeros(3, dtype=torch.int32))
    assert out.shape == q.shape
    assert all(g.numel() == 0 for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_runs_repeat_bit_for_bit() -> None:
    cu = boundaries(*LAYOUTS["through the flash kernel"])
    leaves = tensors(int(cu[-1]), dtype=torch.bfloat16)
    first = outputs_and_gradients(lambda *x: attention(*x, cu), *leaves)
    for _ in range(2):
        again = outputs_and_gradients(lambda *x: attention(*x, cu), *leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_boundaries_are_read_anew_each_call() -> None:
    """The cached plan belongs to the boundaries' values, not to the tensor that held them."""
    q, k, v = tensors(10)
    cu = boundaries(5, 5)
    before = attention(q, k, v, cu)
    cu.numpy()[1] = 3  # a loader reusing its buffer: no version counter sees this
    after = attention(q, k, v, cu)
    torch.testing.assert_close(after, attention(q, k, v, boundaries(3, 7)))
    assert not torch.equal(before, after)


def test_plans_made_in_inference_mode_serve_training() -> None:
    padded._make_plan.cache_clear()
    padded._band.cache_clear()
    leaves, cu = tensors(31), boundaries(4, 9, 2, 16)
    with torch.inference_mode():
        attention(*leaves, cu, window=3)
    wanted = outputs_and_gradients(lambda *x: by_documents(*x, cu, True, 3), *leaves)
    got = outputs_and_gradients(lambda *x: attention(*x, cu, window=3), *leaves)
    torch.testing.assert_close(
        got, wanted, rtol=ulps(torch.float64, 4000), atol=ulps(torch.float64, 1000)
    )
    xs = [x.requires_grad_() for x in leaves]
    first = torch.autograd.grad(attention(*xs, cu, window=3).square().sum(), xs, create_graph=True)
    torch.autograd.grad(sum(g.sum() for g in first), xs)


# What it costs


def operations(allocations: Any) -> list[str]:
    return [op.removesuffix(".default") for op in allocations.ops]


@pytest.mark.parametrize("lengths", [(16,) * 8, (16,) * 8 + (5, 0)])
def test_uniform_documents_are_not_gathered(lengths: tuple[int, ...], allocations_in: Any) -> None:
    cu = boundaries(*lengths)
    leaves = tensors(int(cu[-1]))
    with allocations_in() as allocations:
        outputs_and_gradients(lambda *x: attention(*x, cu, causal=False), *leaves)
    assert not [op for op in operations(allocations) if "index" in op or "gather" in op]
    with allocations_in() as allocations:  # and the count can tell
        ragged = (
            boundaries(3, *lengths[:-1], lengths[-1] - 3)
            if lengths[-1] > 3
            else boundaries(3, 4, int(cu[-1]) - 7)
        )
        outputs_and_gradients(lambda *x: attention(*x, ragged, causal=False), *leaves)
    assert [op for op in operations(allocations) if "index" in op]


def test_memory_does_not_grow_with_the_square(allocations_in: Any) -> None:
    cu = boundaries(*(20, 30, 40) * 8, 300)
    n = int(cu[-1])
    leaves = tensors(n, dtype=torch.float32)
    with allocations_in() as allocations:
        outputs_and_gradients(lambda *x: attention(*x, cu), *leaves)
    # the largest thing made: fp32 weights of a bucket, at most 40 keys for each (token, head)
    assert allocations.largest()[0] <= n * 4 * 40 * 4, allocations.largest()
    with kernels.override(attention="plain"), allocations_in() as allocations:
        outputs_and_gradients(lambda *x: attention(*x, cu), *leaves)
    assert allocations.largest()[0] == 4 * n * n * 4


@pytest.mark.parametrize(
    ("lengths", "kept_per_token_and_head"),
    [
        ((64,) * 4, 64),  # short: the weights
        ((144,) * 2, 0),  # middle: nothing, they are computed again
        ((272,) * 2, 8 + 2),  # long: the output, and the lse in fp32 (two bf16)
    ],
)
def test_what_is_saved(lengths: tuple[int, ...], kept_per_token_and_head: int) -> None:
    cu = boundaries(*lengths)
    leaves = [x.requires_grad_() for x in tensors(int(cu[-1]), dtype=torch.bfloat16)]
    saved = saved_bytes(lambda: attention(*leaves, cu), *leaves)
    assert saved == int(cu[-1]) * 4 * kept_per_token_and_head * 2


def test_buckets_waste_little() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(30, 90, (100,), generator=generator).tolist()
    plan = padded._make_plan(tuple(boundaries(*lengths).tolist()))
    computed = sum(bucket.count * bucket.length**2 for bucket in plan.buckets)
    assert sum(bucket.count for bucket in plan.buckets) == 100
    assert computed < 1.35 * sum(n * n for n in lengths)
    assert len(plan.buckets) < 9


# Transforms beyond those of test_drivers


def test_boundaries_may_be_batched() -> None:
    cu = torch.tensor([[0, 4, 10, 10], [0, 1, 2, 10], [0, 10, 10, 10]], dtype=torch.int32)
    examples = [
        torch.stack(column) for column in zip(*(tensors(10, seed=s) for s in range(3)), strict=True)
    ]
    for batched in (torch.func.vmap(attention)(*examples, cu),):
        for i in range(3):
            one = attention(*(x[i] for x in examples), cu[i])
            torch.testing.assert_close(
                batched[i], one, rtol=ulps(torch.float64, 1000), atol=ulps(torch.float64, 64)
            )

    def loss(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return attention(q, k, v, cu).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(*examples, cu)
    for i in range(3):
        one = torch.func.grad(loss, (0, 1, 2))(*(x[i] for x in examples), cu[i])
        for a, b in zip(grads, one, strict=True):
            torch.testing.assert_close(
                a[i], b, rtol=ulps(torch.float64, 1000), atol=ulps(torch.float64, 64)
            )


def test_meta_and_compiled() -> None:
    q, k, v = tensors(10, dtype=torch.bfloat16)
    cu = boundaries(4, 6, 0)
    out = attention(*(x.to("meta") for x in (q, k, v)), cu.to("meta"))
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "meta")
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    q, k, v = tensors(10)
    torch.testing.assert_close(compiled(q, k, v, cu), attention(q, k, v, cu))
    # other boundaries, the same compiled code
    other = boundaries(1, 2, 7)
    torch.testing.assert_close(compiled(q, k, v, other), attention(q, k, v, other))


# Documents of one length, said so


@pytest.mark.parametrize("backend", ["padded", "plain"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3, 6, 7])
def test_length_is_as_the_boundaries(backend: str, causal: bool, window: int | None) -> None:
    leaves, cu = tensors(24), boundaries(6, 6, 0, 6, 6, 0)
    with kernels.override(attention=backend):
        wanted = outputs_and_gradients(
            lambda *x: attention(*x, cu, causal=causal, window=window), *leaves
        )
        got = outputs_and_gradients(
            lambda *x: attention(*x, cu, causal=causal, window=window, length=6), *leaves
        )
    torch.testing.assert_close(
        got, wanted, rtol=ulps(torch.float64, 1000), atol=ulps(torch.float64, 64)
    )


def test_with_a_length_boundaries_are_not_read() -> None:
    """Traced or vmapped, where nobody can look at them, they may be nonsense."""
    leaves = tensors(24)
    wanted = attention(*leaves, boundaries(8, 8, 8), length=8)
    nonsense = torch.full((3,), 7, dtype=torch.int32)
    examples = [x.expand(2, *x.shape) for x in leaves]
    batched = torch.func.vmap(lambda *x: attention(*x, length=8))(*examples, nonsense.expand(2, 3))
    torch.testing.assert_close(batched[1], wanted)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (24, 32):
        xs = tensors(n)
        wanted = attention(*xs, boundaries(*(8,) * (n // 8)), length=8, max_seqlen=8)
        got = compiled(*xs, nonsense, length=8, max_seqlen=8)
        torch.testing.assert_close(got, wanted)


def test_plain_with_a_length_takes_less_memory(allocations_in: Any) -> None:
    leaves, cu = tensors(64), boundaries(*(8,) * 8)
    with kernels.override(attention="plain"), allocations_in() as allocations:
        outputs_and_gradients(lambda *x: attention(*x, cu, length=8), *leaves)
    assert allocations.largest()[0] <= 64 * 4 * 8 * 8  # [8, H, 8, 8] scores, as large as q


# Libraries' flash attention, with stand-ins that speak the libraries' own language, in fp64


def pieces(
    q: Tensor, k: Tensor, cu: Tensor | None, left: int, right: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Weights [H, N, N] of packed or dense tensors, and k with a head for each of q's."""
    length = q.shape[1] if cu is None else None
    n = q.shape[:-2].numel()
    ends = torch.arange(length, n + 1, length) if cu is None else cu[1:]
    row = torch.arange(n)
    document = (ends <= row[:, None]).sum(-1)
    gap = row[:, None] - row
    seen = document[:, None] == document
    seen &= (gap <= left) if left >= 0 else torch.ones_like(seen)
    seen &= (-gap <= right) if right >= 0 else torch.ones_like(seen)
    q, k = q.reshape(n, *q.shape[-2:]), k.reshape(n, *k.shape[-2:])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return scores.masked_fill(~seen, -torch.inf).softmax(-1), k


def statistics(q: Tensor) -> Tensor:
    """What stands for the log-sum-exp: told apart by every row and head, in the right layout."""
    return q.sum(-1).movedim(-1, -2).float()  # [H, N] or [B, H, T]


def right_forward(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, left: int, right: int, scale: float
) -> tuple[Tensor, Tensor]:
    weights, _ = pieces(q, k, cu, left, right, scale)
    v = v.reshape(-1, *v.shape[-2:]).repeat_interleave(q.shape[-2] // v.shape[-2], 1)
    return torch.einsum("hqk,khd->qhd", weights, v).reshape(q.shape), statistics(q)


def right_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Tensor | None,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """dV = P' g, dS = P * (g V' - rowsum), dQ = scale dS K, dK = scale dS' Q."""
    torch.testing.assert_close(out, right_forward(q, k, v, cu, left, right, scale)[0])
    torch.testing.assert_close(lse, statistics(q))
    assert grad.is_contiguous()
    weights, keys = pieces(q, k, cu, left, right, scale)
    groups, shapes = q.shape[-2] // k.shape[-2], (q.shape, k.shape, v.shape)
    q, v, grad = (x.reshape(-1, *x.shape[-2:]) for x in (q, v, grad))
    d_weights = torch.einsum("qhd,khd->hqk", grad, v.repeat_interleave(groups, 1))
    ds = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True))
    dq = torch.einsum("hqk,khd->qhd", ds, keys) * scale
    dk = torch.einsum("hqk,qhd->khd", ds, q) * scale
    dv = torch.einsum("hqk,qhd->khd", weights, grad)
    grads = (dq, *(x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv)))
    return tuple(g.reshape(shape) for g, shape in zip(grads, shapes, strict=True))


def flash_4_sides(
    causal: bool, left: int | None, right: int | None, cu: tuple[Tensor | None, Tensor | None]
) -> tuple[int, int]:
    assert cu[0] is cu[1]
    assert not (causal and left is not None), "flash-attn-4 would drop causal here"
    sides = tuple(-1 if side is None else side for side in (left, right))
    return (sides[0], 0) if causal else sides  # type: ignore[return-value]


def flash_4_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None, None, None, None]:
    assert softmax_scale is not None
    assert max_seqlen_q == max_seqlen_k
    left, right = flash_4_sides(
        causal, window_size_left, window_size_right, (cu_seqlens_q, cu_seqlens_k)
    )
    out, lse = right_forward(q, k, v, cu_seqlens_q, left, right, softmax_scale)
    return out, lse if return_lse else None, None, None, None


def flash_4_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, ...]:
    assert softmax_scale is not None
    left, right = flash_4_sides(
        causal, window_size_left, window_size_right, (cu_seqlens_q, cu_seqlens_k)
    )
    return right_backward(dout, q, k, v, out, lse, cu_seqlens_q, left, right, softmax_scale)


def flash_2_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, ...]:
    assert dropout_p == 0.0
    right = 0 if causal else window_size_right
    out, lse = right_forward(q, k, v, cu_seqlens_q, window_size_left, right, softmax_scale)
    return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


def flash_2_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    assert dropout_p == softcap == 0.0
    right = 0 if causal else window_size_right
    cu, left = cu_seqlens_q, window_size_left
    grads = right_backward(dout, q, k, v, out, softmax_lse, cu, left, right, softmax_scale)
    for given, grad in zip((dq, dk, dv), grads, strict=True):
        given.copy_(grad)
    return softmax_lse


def torch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, ...]:
    assert dropout_p == 0.0
    right = 0 if is_causal else window_size_right
    out, lse = right_forward(q, k, v, cum_seq_q, window_size_left, right, scale)
    return out, lse, lse, lse, lse


def torch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, ...]:
    right = 0 if is_causal else window_size_right
    return right_backward(grad, q, k, v, out, lse, cum_seq_q, window_size_left, right, scale)


def swapped(*xs: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in xs]  # [B, T, H, Dh] <-> [B, H, T, Dh]


def cudnn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: None,
    compute_log_sumexp: bool,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
) -> tuple[Any, ...]:
    assert compute_log_sumexp
    assert dropout_p == 0.0
    out, lse = right_forward(*swapped(q, k, v), None, -1, 0 if is_causal else -1, scale)
    return out.transpose(1, 2), lse[..., None], None, None, 1, 1, None, None, None


def cudnn_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    attn_bias: None,
    cum_seq_q: None,
    cum_seq_k: None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float,
) -> tuple[Tensor, ...]:
    assert max_q == max_k == q.shape[2]
    assert lse.ndim == 4
    right = 0 if is_causal else -1
    grads = right_backward(*swapped(grad, q, k, v, out), lse[..., 0], None, -1, right, scale)
    return tuple(swapped(*grads))


def triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    reach = -1 if window is None else window - 1
    return right_forward(q, k, v, cu_seqlens, reach, 0 if causal else reach, scale)


def triton_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, ...]:
    reach = -1 if window is None else window - 1
    right = 0 if causal else reach
    return right_backward(grad, q, k, v, out, lse, cu_seqlens, reach, right, scale)


STAND_INS = {
    "_flash_attn_fwd": flash_4_forward,
    "_flash_attn_bwd": flash_4_backward,
    "_flash_attn_varlen_forward": flash_2_forward,
    "_flash_attn_varlen_backward": flash_2_backward,
}
LIBRARIES = ("flash-attn-4", "flash-attn", "torch-varlen", "cudnn", "triton")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`pretend(backend)`: it is installed, and chosen."""
    monkeypatch.setattr(flash, "_function", lambda _, name: STAND_INS[name])
    monkeypatch.setattr(flash.attention_triton, "flash_forward", triton_forward)
    monkeypatch.setattr(flash.attention_triton, "flash_backward", triton_backward)
    operators = {
        "_flash_attention_forward": torch_forward,
        "_flash_attention_backward": torch_backward,
        "_scaled_dot_product_cudnn_attention": cudnn_forward,
        "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
    }

    def choose(backend: str) -> None:
        monkeypatch.setattr(
            module, "choose", torch.compiler.assume_constant_result(lambda *_: backend)
        )
        if backend in ("torch-varlen", "cudnn"):
            for name, stand_in in operators.items():
                monkeypatch.setattr(torch.ops.aten, name, stand_in)

    return choose


@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("length", [None, 6])
def test_libraries_are_told_what_is_meant(
    backend: str,
    causal: bool,
    window: int | None,
    length: int | None,
    pretend: Callable[[str], None],
) -> None:
    leaves, cu = tensors(12), boundaries(6, 6, 0) if length else boundaries(0, 5, 6, 1, 0)
    wanted = outputs_and_gradients(
        lambda *x: module.attention_reference(*x, cu, causal=causal, window=window, scale=0.2),
        *leaves,
    )
    if backend == "cudnn" and (length is None or window is not None):
        return  # refused by the dispatch
    pretend(backend)

    def call(*x: Tensor) -> Tensor:
        return attention(
            *x, cu, causal=causal, window=window, scale=0.2, max_seqlen=6, length=length
        )

    torch.testing.assert_close(
        outputs_and_gradients(call, *leaves),
        wanted,
        rtol=ulps(torch.float64, 4000),
        atol=ulps(torch.float64, 1000),
    )


MORE = [by_double_backward, by_hvp, by_jvp]


def case(length: int | None = None) -> Case:
    cu = boundaries(0, 5, 6, 1, 0) if length is None else boundaries(6, 6)
    return Case(
        lambda q, k, v: attention(q, k, v, cu.to(q.device), window=4, length=length),
        lambda q, k, v: module.attention_reference(
            q, k, v, cu.to(q.device), causal=True, window=4, scale=q.shape[-1] ** -0.5
        ),
        ((12, 4, 4), (12, 2, 4), (12, 2, 4)),
        module,
        "FLASH",
    )


@pytest.mark.parametrize("driver", [*FIRST_ORDER, *MORE], ids=name_of)
@pytest.mark.parametrize(
    ("backend", "length"), [("flash-attn-4", None), ("flash-attn-4", 6), ("flash-attn", 6)]
)
def test_libraries_under_every_driver(
    driver: Driver, backend: str, length: int | None, pretend: Callable[[str], None]
) -> None:
    pretend(backend)
    assert error(case(length), driver) < ulps(torch.float64, 4000)


@pytest.mark.parametrize(
    ("part", "driver"),
    [*(("backward", driver) for driver in FIRST_ORDER), *(("formula", driver) for driver in MORE)],
)
def test_what_is_wrong_shows(
    part: str, driver: Driver, pretend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend("flash-attn-4")
    broken(case(), part, monkeypatch)
    assert error(case(), driver) > 0.1


@pytest.mark.parametrize("length", [None, 6])
def test_examples_of_a_vmap_are_one_call(
    length: int | None, pretend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
        right = STAND_INS[name]
        monkeypatch.setitem(
            STAND_INS, name, lambda q, *args, _f=right, **o: (seen.append(q), _f(q, *args, **o))[1]
        )
    pretend("flash-attn-4")
    by_vmap_grad(scalar(case(length).fast), tensors(12, dim=4))
    assert [x.shape[:-2].numel() for x in seen] == [24, 24]


@pytest.mark.parametrize(("driver", "length"), [(by_autograd, None), (by_vmap_grad, 43)])
def test_triton_through_the_public_function(
    driver: Driver, length: int | None, kernel_device: str
) -> None:
    cu = (boundaries(43) if length else boundaries(0, 9, 33, 1, 0)).to(kernel_device)
    xs = tuple(x.to(kernel_device) for x in tensors(43, 2, 1, 64, torch.float32))

    def fast(*xs: Tensor) -> Tensor:
        return attention(*xs, cu, window=4, length=length)

    def plain(*xs: Tensor) -> Tensor:
        return module.attention_reference(*xs, cu, causal=True, window=4, scale=1 / 8)

    with kernels.override(attention="triton"):
        # fp32: at most 43 weights, and sums of 64 products, of order 1
        assert disagreement(driver, fast, plain, xs) < ulps(torch.float32, 800)


@pytest.mark.parametrize("backend", LIBRARIES)
def test_no_tokens_reach_no_library(backend: str, pretend: Callable[[str], None]) -> None:
    pretend(backend)
    q, k, v = (x.requires_grad_() for x in tensors(0))
    for length in (None, 5):
        out = attention(q, k, v, torch.zeros(3, dtype=torch.int32), length=length)
        assert out.shape == q.shape
        assert all(g.numel() == 0 for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_rows_in_any_layout(pretend: Callable[[str], None]) -> None:
    """Views of one projection, heads in front, no last stride of 1: values, contiguous results."""
    n, cu = 12, boundaries(5, 7)
    fused = torch.randn(n, 8 * 4, dtype=torch.float64)
    views = fused.split((16, 8, 8), 1)
    q, k, v = (x.unflatten(1, (-1, 4)) for x in views)
    layouts = [
        (q, k, v),
        tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)),
        tuple(x.mT.contiguous().mT for x in (q, k, v)),
    ]
    wanted = outputs_and_gradients(lambda *x: by_documents(*x, cu, True, None), q, k, v)
    for backend in LIBRARIES[:3]:
        pretend(backend)
        for xs in layouts:
            leaves = [x.detach().requires_grad_() for x in xs]
            out = attention(*leaves, cu)
            generator = torch.Generator().manual_seed(9)
            cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            got = [out, *torch.autograd.grad(out, leaves, cotangent)]
            torch.testing.assert_close(
                got, wanted, rtol=ulps(torch.float64, 4000), atol=ulps(torch.float64, 1000)
            )
            assert all(x.is_contiguous() for x in got)


def test_fakes_are_as_the_ops(pretend: Callable[[str], None]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = tensors(12)
    for backend in LIBRARIES:
        pretend(backend)
        for length in (None, 4):
            if backend == "cudnn" and length is None:
                continue
            cu = boundaries(4, 4, 4) if length is None else None
            static = (backend, 12, length, True, None, 0.3)
            out, lse = torch.ops.nanovision.flash_attention(q, k, v, cu, *static)
            grads = torch.ops.nanovision.flash_attention_backward(
                out, q, k, v, out, lse, cu, *static, False
            )
            with FakeTensorMode() as mode:
                fq, fk, fv, fcu = (x if x is None else mode.from_tensor(x) for x in (q, k, v, cu))
                fakes = torch.ops.nanovision.flash_attention(fq, fk, fv, fcu, *static)
                fake_grads = torch.ops.nanovision.flash_attention_backward(
                    fakes[0], fq, fk, fv, *fakes, fcu, *static, False
                )
            for fake, real in zip((*fakes, *fake_grads), (out, lse, *grads), strict=True):
                assert (fake.shape, fake.stride(), fake.dtype) == (
                    real.shape,
                    real.stride(),
                    real.dtype,
                )


@pytest.mark.parametrize("length", [None, 4])
def test_torchs_own_operators_take_what_we_pass(length: int | None) -> None:
    """On meta tensors: the arguments go through the operators' real schemas."""
    shapes = ((12, 4, 8), (12, 2, 8), (12, 2, 8))
    q, k, v = (torch.empty(s, device="meta", dtype=torch.bfloat16) for s in shapes)
    cu = torch.empty(4, device="meta", dtype=torch.int32) if length is None else None
    for backend in ("torch-varlen", "cudnn") if length else ("torch-varlen",):
        static = (backend, 12, length, True, None, 0.3)
        out, lse = flash.flash_forward(q, k, v, cu, *static)
        assert (out.shape, lse.shape) == (q.shape, (3, 4, 4) if length else (4, 12))
        grads = flash.flash_backward(out, q, k, v, out, lse, cu, *static, False)
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_higher_derivatives_that_do_not_fit_are_refused(
    pretend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_SCORES", 12 * 4 * 12 - 1)
    pretend("flash-attn-4")
    xs = [x.requires_grad_() for x in tensors(12)]
    first = torch.autograd.grad(attention(*xs, boundaries(12)).sum(), xs, create_graph=True)
    with pytest.raises(RuntimeError, match="flash-attn-4 has no second derivative"):
        torch.autograd.grad(first[0].sum(), xs)
    with pytest.raises(RuntimeError, match=r'override\(attention="plain"\)'):
        torch.func.jvp(lambda q: attention(q, *xs[1:], boundaries(12)), (xs[0],), (xs[0],))


def test_a_deterministic_mode_is_passed_on(
    pretend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def backward(*args: Any, deterministic: bool, **options: Any) -> tuple[Tensor, ...]:
        asked.append(deterministic)
        return flash_4_backward(*args, **options)

    monkeypatch.setitem(STAND_INS, "_flash_attn_bwd", backward)
    pretend("flash-attn-4")
    outputs_and_gradients(lambda *x: attention(*x, boundaries(12)), *tensors(12))
    torch.use_deterministic_algorithms(True)
    try:
        outputs_and_gradients(lambda *x: attention(*x, boundaries(12)), *tensors(12))
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": boundaries(4, 5)}, "end at the number of tokens, 10 .* ends at 9"),
        ({"cu_seqlens": torch.tensor([1, 10], dtype=torch.int32)}, "it starts at 1"),
        ({"cu_seqlens": torch.tensor([0, 7, 5, 10], dtype=torch.int32)}, "entry 2 is 5 after 7"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "cu_seqlens must be int32"),
        ({"cu_seqlens": torch.tensor([10], dtype=torch.int32)}, "cu_seqlens must be int32"),
        ({"q": torch.ones(10, 32)}, r"q must be \[N, heads, head size\]"),
        ({"k": torch.ones(9, 2, 8)}, r"k and v must have shape \[10, Hk, 8\]"),
        ({"v": torch.ones(10, 1, 8)}, r"k and v must have shape \[10, Hk, 8\]"),
        ({"q": torch.ones(10, 3, 8)}, "3 query heads are not a multiple of 2 key heads"),
        ({"q": torch.ones(10, 4, 8).bfloat16()}, "cast them to one dtype"),
        ({"q": torch.ones(10, 4, 8, dtype=torch.int64)}, "q must be floating point"),
        ({"k": torch.ones(10, 2, 8, device="meta")}, "k is on meta; move them"),
        ({"window": 0}, "window must be at least 1"),
        ({"max_seqlen": 0}, "max_seqlen must be at least 1"),
        ({"length": 0}, "length must be at least 1 and divide the number of tokens, 10, got 0"),
        ({"length": 4}, "length must be at least 1 and divide the number of tokens, 10, got 4"),
        ({"length": 5}, "every document has 5 tokens, but document 0 has 4"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.ones(10, 4, 8),
        "k": torch.ones(10, 2, 8),
        "v": torch.ones(10, 2, 8),
        "cu_seqlens": boundaries(4, 6),
    }
    arguments.update(changes)
    with pytest.raises(ValueError, match=message):
        attention(**arguments)
