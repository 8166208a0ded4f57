"""attention: backends against each other and fp64, packing, isolation, memory, adapters, errors."""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import attention

module = importlib.import_module("kernels.attention")


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
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (6, 6), (6, 1), (6, 3)])
@pytest.mark.parametrize("length", [20, 300])
def test_heads_share_keys_in_groups(heads: int, key_heads: int, length: int) -> None:
    cu = boundaries(length, 7, length - 1, 3)
    leaves = tensors(int(cu[-1]), heads, key_heads, dim=4)
    wanted = outputs_and_gradients(lambda *x: by_documents(*x, cu, True, None), *leaves)
    got = outputs_and_gradients(lambda *x: attention(*x, cu), *leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


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
    torch.testing.assert_close(packed[here], alone, rtol=1e-5, atol=2e-6)


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
    module._make_plan.cache_clear()
    module._band.cache_clear()
    leaves, cu = tensors(31), boundaries(4, 9, 2, 16)
    with torch.inference_mode():
        attention(*leaves, cu, window=3)
    wanted = outputs_and_gradients(lambda *x: by_documents(*x, cu, True, 3), *leaves)
    got = outputs_and_gradients(lambda *x: attention(*x, cu, window=3), *leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
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
    own = {x.untyped_storage()._cdata for x in leaves}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = attention(*leaves, cu)
    assert out.requires_grad
    assert sum(saved.values()) == int(cu[-1]) * 4 * kept_per_token_and_head * 2


def test_buckets_waste_little() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(30, 90, (100,), generator=generator).tolist()
    plan = module._make_plan(tuple(boundaries(*lengths).tolist()))
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
            torch.testing.assert_close(batched[i], one, rtol=1e-12, atol=1e-13)

    def loss(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return attention(q, k, v, cu).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(*examples, cu)
    for i in range(3):
        one = torch.func.grad(loss, (0, 1, 2))(*(x[i] for x in examples), cu[i])
        for a, b in zip(grads, one, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-12, atol=1e-13)


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


# CUDA backends: their adapters against stand-ins that have the libraries' signatures


def stand_in(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, left: int, right: int, scale: float
) -> Tensor:
    causal = right == 0
    assert causal or left == right
    window = None if left < 0 else left + 1
    return module.attention_reference(q, k, v, cu, causal=causal, window=window, scale=scale)


def varlen_2_13(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert max_q == max_k == 6
    assert scale is not None
    return stand_in(query, key, value, cu_seq_q, *window_size, scale)


def varlen_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    assert query.shape[1] == key.shape[1]
    assert scale is not None
    return stand_in(query, key, value, cu_seq_q, *window_size, scale)


def varlen_2_10(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
) -> Tensor:
    assert query.shape[1] == key.shape[1]
    right = 0 if is_causal else -1
    return stand_in(query, key, value, cu_seq_q, -1, right, query.shape[-1] ** -0.5)


def flash_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    assert softmax_scale is not None
    assert dropout_p == 0.0
    left, right = window_size
    return stand_in(q, k, v, cu_seqlens_q, left, 0 if causal else right, softmax_scale)


def flash_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
) -> tuple[Tensor, None]:
    assert cu_seqlens_q is not None
    assert softmax_scale is not None
    left, right = (-1 if side is None else side for side in window_size)
    right = 0 if causal else right
    return stand_in(q, k, v, cu_seqlens_q, left, right, softmax_scale), None


ADAPTERS = [
    ("torch-varlen", "varlen_attn", varlen_2_13),
    ("torch-varlen", "varlen_attn", varlen_2_11),
    ("torch-varlen", "varlen_attn", varlen_2_10),
    ("flash-attn", "flash_attn_varlen_func", flash_2),
    ("flash-attn-4", "flash_attn_varlen_func", flash_4),
]


module_of = {
    "torch-varlen": "torch.nn.attention.varlen",
    "flash-attn": "flash_attn.flash_attn_interface",
    "flash-attn-4": "flash_attn.cute",
}


def pretend(monkeypatch: pytest.MonkeyPatch, backend: str, name: str, function: Any) -> None:
    library = types.ModuleType("stand_in")
    setattr(library, name, function)
    monkeypatch.setitem(sys.modules, module_of[backend], library)
    monkeypatch.setattr(module, "choose", lambda *_: backend)


@pytest.mark.parametrize(
    ("backend", "name", "function"), ADAPTERS, ids=lambda x: getattr(x, "__name__", None)
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_adapters_say_what_is_meant(
    backend: str,
    name: str,
    function: Any,
    causal: bool,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaves, cu = tensors(10), boundaries(4, 6, 0)
    wanted = outputs_and_gradients(
        lambda *x: module.attention_reference(*x, cu, causal=causal, window=window, scale=0.2),
        *leaves,
    )
    pretend(monkeypatch, backend, name, function)

    def call(*x: Tensor) -> Tensor:
        return attention(*x, cu, causal=causal, window=window, scale=0.2, max_seqlen=6)

    if function is varlen_2_10 and window is not None:
        with pytest.raises(RuntimeError, match="takes no window"):
            call(*leaves)
        return
    torch.testing.assert_close(outputs_and_gradients(call, *leaves), wanted, rtol=1e-10, atol=1e-12)


def test_the_installed_varlen_attn_takes_what_we_pass() -> None:
    from torch.nn.attention.varlen import varlen_attn

    names = set(inspect.signature(varlen_attn).parameters)
    assert {"scale", "window_size"} <= names
    assert list(inspect.signature(varlen_attn).parameters)[:7] == [
        "query",
        "key",
        "value",
        "cu_seq_q",
        "cu_seq_k",
        "max_q",
        "max_k",
    ]


class Disconnected(torch.autograd.Function):
    """Like flash-attn-4: its backward fills fresh tensors that autograd knows nothing of."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return q * k * v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (x.detach() for x in ctx.saved_tensors)
        grad = grad.detach()
        return grad * k * v, grad * q * v, grad * q * k


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_second_derivative_through_a_library_raises(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, cu = list(tensors(10, 2, 2)), boundaries(10)
    leaves[which].requires_grad_()
    pretend(
        monkeypatch,
        "flash-attn-4",
        "flash_attn_varlen_func",
        lambda q, k, v, **_: (Disconnected.apply(q, k, v), None),
    )
    out = attention(*leaves, cu)
    (first,) = torch.autograd.grad(out.square().sum(), leaves[which], create_graph=True)
    with pytest.raises(RuntimeError, match="flash-attn-4 has no second derivative"):
        torch.autograd.grad(first.sum(), leaves[which])


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
