"""cross_entropy and linear_cross_entropy: values, dtypes, ignored rows, memory, errors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from kernels import cross_entropy, linear_cross_entropy
from tests.rounding import ulps

lce = importlib.import_module("kernels.loss.linear_cross_entropy")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(
    n: int, dim: int, vocab: int, dtype: torch.dtype = torch.float64, labelled: float = 0.7
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + dim + vocab)
    hidden = torch.randn(n, dim, generator=generator, dtype=torch.float64).to(dtype)
    unembed = torch.randn(vocab, dim, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, vocab, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) > labelled] = -100
    return hidden, unembed, labels


def gradients(loss: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    value = loss(*leaves)
    return value.detach(), list(torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing: float) -> None:
    hidden, unembed, labels = problem(37, 5, 13)
    logits = hidden @ unembed.mT
    got = gradients(lambda z: cross_entropy(z, labels, label_smoothing=smoothing), logits)
    wanted = gradients(lambda z: F.cross_entropy(z, labels, label_smoothing=smoothing), logits)
    torch.testing.assert_close(
        got, wanted, rtol=ulps(torch.float64, 1000), atol=ulps(torch.float64, 64)
    )


def test_options_do_what_the_docstring_says() -> None:
    hidden, unembed, labels = problem(20, 5, 13)
    z = 4.0 * torch.tanh(0.5 * (hidden @ unembed.mT + 0.25) / 4.0)
    lse = z.logsumexp(-1)
    keep = labels != -100
    nll = lse - z[torch.arange(20), labels.clamp(min=0)]
    uniform = lse - z.mean(-1)
    per_token = 0.8 * nll + 0.2 * uniform + 0.3 * lse**2
    options = {"label_smoothing": 0.2, "z_loss": 0.3, "softcap": 4.0}
    bias = torch.full((13,), 0.25, dtype=torch.float64)
    fused = linear_cross_entropy(hidden, unembed, labels, scale=0.5, bias=bias, **options)
    dense = cross_entropy(0.5 * (hidden @ unembed.mT + 0.25), labels, **options)
    torch.testing.assert_close(
        dense, per_token[keep].mean(), rtol=ulps(torch.float64, 1000), atol=0
    )
    torch.testing.assert_close(
        fused, per_token[keep].mean(), rtol=ulps(torch.float64, 1000), atol=0
    )


def test_ignore_index_is_free_to_choose() -> None:
    hidden, unembed, labels = problem(20, 5, 13)
    other = labels.masked_fill(labels == -100, 7)  # now 7 means: no loss
    wanted = F.cross_entropy((hidden @ unembed.mT), other, ignore_index=7)
    got = linear_cross_entropy(hidden, unembed, other, ignore_index=7)
    torch.testing.assert_close(got, wanted, rtol=ulps(torch.float64, 1000), atol=0)


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000, None])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_change_nothing(
    chunk: int | None, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, unembed, labels = problem(37, 5, 13)
    wanted = gradients(lambda h, w: F.cross_entropy(h @ w.mT, labels), hidden, unembed)
    if masked:
        monkeypatch.setattr(lce, "_takes_labelled_rows", lambda device: False)
    got = gradients(lambda h, w: linear_cross_entropy(h, w, labels, chunk=chunk), hidden, unembed)
    torch.testing.assert_close(
        got, wanted, rtol=ulps(torch.float64, 1000), atol=ulps(torch.float64, 64)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "dim", "vocab"), [(1, 8, 1), (5, 123, 123), (64, 32, 200)])
def test_no_worse_than_torch_in_the_same_dtype(
    dtype: torch.dtype, n: int, dim: int, vocab: int
) -> None:
    """Against fp64 on the same inputs: the dense torch form's error plus one rounding at most."""
    hidden, unembed, labels = problem(n, dim, vocab, dtype, labelled=1.1)
    hidden = hidden * dim**-0.5

    def dense(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((h @ w.mT).to(torch.promote_types(h.dtype, torch.float32)), labels)

    exact_value, exact = gradients(dense, hidden.double(), unembed.double())
    torch_value, torch_grads = gradients(dense, hidden, unembed)
    value, grads = gradients(lambda h, w: linear_cross_entropy(h, w, labels), hidden, unembed)
    assert value.dtype == torch.float32
    # the same rounded logits; the mean itself is fp32
    floor = 4 * torch.finfo(torch.float32).eps * float(exact_value.abs() + 1)
    assert abs(value - exact_value) <= abs(torch_value - exact_value) + floor
    for grad, torch_grad, wanted in zip(grads, torch_grads, exact, strict=True):
        assert grad.dtype == dtype
        worst = (torch_grad.double() - wanted).abs().max()
        rounding = torch.finfo(dtype).eps * wanted.abs().max() + torch.finfo(dtype).tiny
        assert (grad.double() - wanted).abs().max() <= worst + rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dense_gradient_is_rounded_once(dtype: torch.dtype) -> None:
    hidden, unembed, labels = problem(40, 16, 50)
    logits = (hidden @ unembed.mT).to(dtype)
    value, (grad,) = gradients(lambda z: cross_entropy(z, labels), logits)
    exact_value, (exact,) = gradients(lambda z: F.cross_entropy(z, labels), logits.double())
    working = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    if dtype == torch.float64:
        working = torch.finfo(dtype).eps
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    fp32 = torch.finfo(value.dtype).eps
    # exp(z - lse) carries the absolute error of z - lse, some ulps of |z| < 32
    torch.testing.assert_close(
        grad.double(), exact, rtol=working / 2 + 64 * fp32, atol=4 * fp32 / 40
    )
    torch.testing.assert_close(value.double(), exact_value, rtol=32 * fp32, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_ignored_rows_never_matter(
    poison: float, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, unembed, labels = problem(16, 5, 13)
    ignored = labels == -100
    assert ignored.any()
    clean = gradients(lambda h, w: linear_cross_entropy(h, w, labels), hidden, unembed)
    poisoned = hidden.clone()
    poisoned[ignored] = poison
    if masked:
        monkeypatch.setattr(lce, "_takes_labelled_rows", lambda device: False)
    value, (d_hidden, d_unembed) = gradients(
        lambda h, w: linear_cross_entropy(h, w, labels, chunk=4), poisoned, unembed
    )
    torch.testing.assert_close(
        (value, [d_hidden, d_unembed]),
        clean,
        rtol=ulps(torch.float64, 1000),
        atol=ulps(torch.float64, 64),
    )
    assert (d_hidden[ignored] == 0).all()

    logits = hidden @ unembed.mT
    clean = gradients(lambda z: cross_entropy(z, labels), logits)
    logits[ignored] = poison
    value, (d_logits,) = gradients(lambda z: cross_entropy(z, labels), logits)
    assert value == clean[0]
    assert torch.equal(d_logits, clean[1][0])

    def hessian_row_sums(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.func.jvp(torch.func.grad(loss), (x,), (torch.ones_like(x),))[1]

    for loss, x in (
        (lambda z: cross_entropy(z, labels, z_loss=0.1), logits),
        (lambda h: linear_cross_entropy(h, unembed, labels, z_loss=0.1, chunk=3), poisoned),
    ):
        second = hessian_row_sums(loss, x)
        assert second.isfinite().all()
        assert (second[ignored] == 0).all()
        assert second[~ignored].abs().max() > 0


@pytest.mark.parametrize("n", [0, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_labelled_is_zero(n: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if masked:
        monkeypatch.setattr(lce, "_takes_labelled_rows", lambda device: False)
    labels = torch.full((n,), -100)
    hidden, unembed = torch.randn(n, 4), torch.randn(9, 4)
    for value, grads in (
        gradients(lambda h, w: linear_cross_entropy(h, w, labels), hidden, unembed),
        gradients(lambda z: cross_entropy(z, labels), hidden @ unembed.mT),
    ):
        assert value == 0
        assert value.dtype == torch.float32
        assert all((g == 0).all() for g in grads)


def test_value_is_the_same_bits_with_and_without_gradients() -> None:
    hidden, unembed, labels = problem(64, 16, 100, torch.bfloat16)
    with torch.no_grad():
        alone = linear_cross_entropy(hidden, unembed, labels)
    value, _ = gradients(lambda h, w: linear_cross_entropy(h, w, labels), hidden, unembed)
    assert torch.equal(alone, value)


def test_runs_repeat_bit_for_bit() -> None:
    hidden, unembed, labels = problem(300, 16, 100, torch.bfloat16)
    runs = [
        gradients(lambda h, w: linear_cross_entropy(h, w, labels, chunk=64), hidden, unembed)
        for _ in range(3)
    ]
    for value, grads in runs[1:]:
        assert torch.equal(value, runs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0][1], strict=True))


def test_fp16_gradients_are_scaled_before_they_are_rounded() -> None:
    """1 / count times a probability underflows in fp16; loss scaling must be able to prevent it."""
    n = 4096
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 4, generator=generator).half()
    unembed = (torch.randn(40, 4, generator=generator) * 1e-3).half()
    labels = torch.zeros(n, dtype=torch.int64)

    def scaled(loss: Callable[..., Tensor]) -> Tensor:
        return gradients(lambda h: loss(h) * 65536.0, hidden)[1][0].double()

    got = scaled(lambda h: linear_cross_entropy(h, unembed, labels))
    exact = gradients(
        lambda h: F.cross_entropy(h @ unembed.double().mT, labels) * 65536.0, hidden.double()
    )[1][0]
    assert exact.abs().max() / 65536 < torch.finfo(torch.float16).smallest_normal
    torch.testing.assert_close(got, exact, rtol=0.01, atol=float(exact.abs().max()) * 0.01)


# Memory, as counted


N, DIM, VOCAB, CHUNK = 128, 8, 512, 8
DENSE = N * VOCAB * 4


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("driver", ["autograd", "func.grad"])
def test_no_tensor_of_logits_size(
    driver: str, masked: bool, monkeypatch: pytest.MonkeyPatch, allocations_in: Any
) -> None:
    hidden, unembed, labels = problem(N, DIM, VOCAB, torch.float32)
    if masked:
        monkeypatch.setattr(lce, "_takes_labelled_rows", lambda device: False)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, labels, chunk=CHUNK, softcap=5.0, z_loss=0.1)

    with allocations_in() as allocations:
        if driver == "autograd":
            gradients(loss, hidden, unembed)
        else:
            torch.func.grad(loss, (0, 1))(hidden, unembed)
    allowed = max(CHUNK * VOCAB, N * DIM, VOCAB * DIM) * 4
    assert allowed < DENSE / 8
    assert allocations.largest()[0] <= allowed, allocations.largest()
    # the counter sees one in the dense form
    with allocations_in() as dense:
        gradients(lambda h, w: F.cross_entropy(h @ w.mT, labels), hidden, unembed)
    assert dense.largest()[0] >= DENSE


def test_what_lives_after_the_forward_is_gradients_not_logits(allocations_in: Any) -> None:
    hidden, unembed, labels = problem(N, DIM, VOCAB, torch.float32)
    hidden.requires_grad_()
    unembed.requires_grad_()
    with allocations_in(hidden, unembed, labels) as allocations:
        loss = linear_cross_entropy(hidden, unembed, labels, chunk=CHUNK)
        after = allocations.living()
    gradients_bytes = 4 * (hidden.numel() + unembed.numel())
    assert gradients_bytes <= after < 1.1 * gradients_bytes
    loss.backward()
    assert hidden.grad is not None


def test_value_only_calls_do_not_pay_for_gradients(allocations_in: Any) -> None:
    hidden, unembed, labels = problem(N, DIM, VOCAB, torch.float32, labelled=1.1)
    hidden.requires_grad_()

    def matmuls(loss: Callable[[], Tensor]) -> int:
        with allocations_in() as allocations:
            loss()
        return sum("aten.mm" in op for op in allocations.ops)

    def value() -> Tensor:
        with torch.no_grad():
            return linear_cross_entropy(hidden, unembed, labels, chunk=CHUNK)

    assert matmuls(value) == N // CHUNK
    # a frozen unembedding costs nothing: logits and the gradient of hidden
    assert matmuls(lambda: linear_cross_entropy(hidden, unembed, labels, chunk=CHUNK)) == (
        2 * N // CHUNK
    )


def test_only_labelled_tokens_are_multiplied_on_cpu(allocations_in: Any) -> None:
    hidden, unembed, labels = problem(N, DIM, VOCAB, torch.float32)
    labels[64:] = -100
    labels[:64] = 1
    with allocations_in() as allocations, torch.no_grad():
        linear_cross_entropy(hidden, unembed, labels)
    assert allocations.largest()[0] <= 64 * VOCAB * 4


def test_dense_backward_keeps_only_its_inputs(allocations_in: Any) -> None:
    logits = torch.randn(256, 300, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 300, (256,))
    with allocations_in(logits, labels) as allocations:
        loss = cross_entropy(logits, labels)
        after = allocations.living()
    assert after < 4 * 256
    loss.backward()


# Compiled, meta, batched labels


def test_compiled_loss_is_one_node() -> None:
    hidden, unembed, labels = problem(64, 8, 32, torch.float32)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def keep(inner: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(inner)
            return make_boxed_func(inner)

        return aot_autograd(fw_compiler=keep)(graph, inputs)

    torch._dynamo.reset()
    loss = torch.compile(
        lambda h, w: linear_cross_entropy(h, w, labels, chunk=1), backend=backend, fullgraph=True
    )
    got = gradients(loss, hidden, unembed)
    wanted = gradients(lambda h, w: linear_cross_entropy(h, w, labels), hidden, unembed)
    torch.testing.assert_close(got, wanted)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert targets.count("nanovision.linear_cross_entropy.default") == 1
    assert not any("aten.mm" in target for target in targets)


def test_meta_tensors_have_the_right_shapes() -> None:
    with torch.device("meta"):
        hidden = torch.empty(7, 4, dtype=torch.bfloat16, requires_grad=True)
        unembed = torch.empty(9, 4, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(7, dtype=torch.int64)
    fused = linear_cross_entropy(hidden, unembed, labels)
    dense = cross_entropy(hidden @ unembed.mT, labels)
    for loss in (fused, dense):
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        d_hidden, d_unembed = torch.autograd.grad(loss, (hidden, unembed))
        assert d_hidden.shape == (7, 4)
        assert d_unembed.shape == (9, 4)
        assert d_unembed.dtype == torch.bfloat16


def test_labels_may_be_batched() -> None:
    hidden, unembed, _ = problem(6, 5, 13)
    labels = torch.tensor([[1, 2, -100, 4, 5, 6], [-100, -100, -100, 12, 0, 1], [-100] * 6])
    for loss in (
        lambda y: linear_cross_entropy(hidden, unembed, y),
        lambda y: cross_entropy(hidden @ unembed.mT, y),
    ):
        got = torch.func.vmap(loss)(labels)
        torch.testing.assert_close(got, torch.stack([loss(y) for y in labels]))


# Errors


def call(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(4, 3),
        "unembed": torch.zeros(5, 3),
        "labels": torch.tensor([0, 1, -100, 4]),
    }
    arguments.update(changes)
    return linear_cross_entropy(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 1, 5, 4])}, "label 5 at position 2 .* vocabulary of 5 tokens"),
        ({"labels": torch.tensor([0, 1, -1, 4])}, "label -1 at position 2"),
        ({"labels": torch.tensor([0, 1])}, r"labels must have shape \[4\]"),
        ({"labels": torch.zeros(4)}, "labels must be int64, got torch.float32"),
        ({"hidden": torch.zeros(2, 2, 3)}, "hidden must be 2-D"),
        ({"hidden": torch.zeros(4, 3, dtype=torch.int64)}, "hidden must be floating point"),
        ({"unembed": torch.zeros(5, 2)}, r"unembed must have shape \[V, 3\]"),
        ({"unembed": torch.zeros(5, 3).bfloat16()}, "unembed is torch.bfloat16; cast one"),
        ({"unembed": torch.zeros(5, 3, device="meta")}, "unembed is on meta; move them"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \[5\]"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"z_loss": -1.0}, "z_loss must be >= 0"),
        ({"softcap": 0.0}, "softcap must be > 0"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_dense_errors() -> None:
    logits, labels = torch.zeros(2, 5), torch.tensor([0, 5])
    with pytest.raises(ValueError, match="cross_entropy: label 5 at position 1"):
        cross_entropy(logits, labels)
    with pytest.raises(ValueError, match=r"labels must have shape \[2\]"):
        cross_entropy(logits, labels[:1])
    with pytest.raises(ValueError, match="softcap"):
        cross_entropy(logits, labels, softcap=-1.0)


def test_labels_are_not_read_where_they_cannot_be() -> None:
    """Under vmap, compile and on meta tensors labels are not checked."""
    logits = torch.zeros(2, 5)
    good = torch.tensor([[0, 4], [1, 2]])
    torch.func.vmap(lambda y: cross_entropy(logits, y))(good)
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, good[0]), cross_entropy(logits, good[0]))
    cross_entropy(logits.to("meta"), good[0].to("meta"))
