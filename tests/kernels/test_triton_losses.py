"""The Triton kernels of both losses, in the interpreter and on a GPU: values, gradients, misuse.

`overwrite` is tested here for the torch path too: its hazards come from autograd, not the kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cross_entropy, linear_cross_entropy, token_logprobs
from kernels.loss import cross_entropy_in_place as in_place
from kernels.loss import cross_entropy_triton
from kernels.loss.cross_entropy_torch import LossOptions
from kernels.loss.cross_entropy_triton import LossConfig
from kernels.loss.scale_triton import scale_rows
from kernels.runtime import dispatch
from kernels.runtime.launch import recording
from tests.kernels.drivers import (
    Case,
    Driver,
    broken,
    by_autograd,
    by_compile,
    by_compiled_grad,
    by_func_grad,
    by_grad_grad,
    by_vmap_grad,
    error,
    placed,
    random,
    spoilt,
)
from tests.rounding import ulps

ce = importlib.import_module("kernels.loss.cross_entropy")
lce = importlib.import_module("kernels.loss.linear_cross_entropy")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS32 = torch.finfo(torch.float32).eps
FORMS = {"default": cross_entropy, "overwrite": partial(cross_entropy, overwrite=True)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "softcap": {"softcap": 5.0},
    "all": {"label_smoothing": 0.2, "z_loss": 0.003, "softcap": 3.0},
}


def labels_for(n: int, vocab: int, ignored: bool = True) -> Tensor:
    labels = torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(n + vocab))
    if ignored and n > 1:
        labels[n // 2] = -100
    return labels


def value_and_gradient(
    loss: Callable[..., Tensor], logits: Tensor, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The logits are the result of an operation, as `overwrite` requires, with these strides."""
    base = logits.detach().clone().requires_grad_()
    value = loss(Made.apply(base, logits)) * factor
    return value.detach() / factor, torch.autograd.grad(value, base)[0]


class Made(torch.autograd.Function):
    """The values of `base`, laid out like `like`."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, like: Tensor) -> Tensor:
        storage = torch.empty_strided(
            (like.untyped_storage().size() // like.element_size(),),
            (1,),
            dtype=like.dtype,
            device=like.device,
        )
        storage.fill_(float("nan"))  # between the rows too
        ctx.out = storage
        out = torch.empty(0, dtype=like.dtype, device=like.device)
        out.set_(storage.untyped_storage(), like.storage_offset(), like.shape, like.stride())
        return out.copy_(base)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clone(), None


def exact(logits: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Value and gradient in fp64, by the plain formula."""
    z = logits.double().requires_grad_()
    value = ce.cross_entropy_reference(z, labels, LossOptions(**options))
    return value.detach(), torch.autograd.grad(value, z)[0]


def assert_accurate(
    value: Tensor,
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    roundings: int = 1,
    **options: Any,
) -> None:
    """Bounds from the arithmetic: fp32, an exp within some ulps, one rounding of the result."""
    wanted_value, wanted = exact(logits, labels, **options)
    cap = options.get("softcap") or 0.0
    # exp(z - top): its own ulps, those of z - top (below 32 where the exp matters), and of a cap
    exponent = (64 + 4 * cap) * EPS32
    assert value.dtype == torch.float32
    assert abs(value - wanted_value) <= exponent + 4 * EPS32 * abs(wanted_value)
    rounding = roundings * torch.finfo(logits.dtype).eps / 2
    if logits.device.type == "cpu" and logits.dtype == torch.bfloat16:
        rounding *= 2  # the interpreter truncates to bf16, a GPU rounds to nearest
    weight = 1 / max(1, int((labels != options.get("ignore_index", -100)).sum()))
    # p - 1 at the label cancels, as does a softcap's 1 - tanh^2, and fp16 has denormals
    cancelled = exponent * weight
    if logits.dtype == torch.float16:
        cancelled += torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    assert grad.dtype == logits.dtype
    torch.testing.assert_close(grad.double(), wanted, rtol=rounding + exponent, atol=cancelled)


# Values and gradients


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "vocab", "option"),
    [
        (1, 1, "plain"),
        (1, 2, "all"),
        (3, 1000, "plain"),
        (3, 1000, "smoothing"),
        (4, 1000, "z_loss"),
        (4, 1000, "softcap"),
        (5, 123, "all"),
        (6, 4099, "plain"),
        (3, 4096, "all"),
    ],
)
def test_cross_entropy(
    form: str,
    n: int,
    vocab: int,
    option: str,
    dtype: torch.dtype,
    kernel_device: str,
    poisoned: None,
) -> None:
    logits = (3 * random(n, vocab)).to(dtype).to(kernel_device)
    labels = labels_for(n, vocab).to(kernel_device)
    loss = partial(FORMS[form], labels=labels, **OPTIONS[option])
    if dtype == torch.float16:  # what a loss scale is for; the form in place then has work to do
        value, grad = value_and_gradient(loss, logits, 1024.0)
        wanted = partial(assert_accurate, roundings=3 if form == "overwrite" else 2)
        wanted(value, (grad / 1024).to(dtype), logits, labels, **OPTIONS[option])
    else:
        value, grad = value_and_gradient(loss, logits)
        assert_accurate(value, grad, logits, labels, **OPTIONS[option])


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(1, 1),
        LossConfig(2, 2, programs=1),
        LossConfig(2, 1, programs=2),
        LossConfig(2, 4),
    ],
)
@pytest.mark.parametrize("option", ["plain", "all"])
def test_every_launch_setting(option: str, config: LossConfig, kernel_device: str) -> None:
    """Tiles and rows per program do not change the result."""
    logits = random(7, 1003, dtype=torch.float32).to(kernel_device)
    labels = labels_for(7, 1003).to(kernel_device)
    options = LossOptions(**OPTIONS[option])
    weight = torch.tensor(1 / 6, device=kernel_device)  # a label is ignored
    losses, top, total = (torch.full((7,), float("nan"), device=kernel_device) for _ in range(3))
    cross_entropy_triton.forward_rows(
        logits, labels, None, losses, top, total, options, config=config
    )
    assert_accurate(
        losses.sum() / 6,
        cross_entropy_triton.backward_rows(
            logits, labels, weight, top, total, options, config=config
        ),
        logits,
        labels,
        **OPTIONS[option],
    )
    again, written = torch.full_like(losses, float("nan")), logits.clone()
    cross_entropy_triton.overwrite_rows(
        written, labels, None, weight, again, options, config=config
    )
    assert_accurate(again.sum() / 6, written, logits, labels, **OPTIONS[option])


def test_loss_of_a_large_vocabulary(kernel_device: str) -> None:
    """Within 1e-6 of fp64 on the same rounded logits."""
    logits = (4 * random(2, 131072)).bfloat16().to(kernel_device)
    labels = torch.tensor([7, 131071], device=kernel_device)
    wanted = exact(logits, labels)[0]
    for form in FORMS.values():
        value, grad = value_and_gradient(partial(form, labels=labels), logits)
        assert abs(value - wanted) <= ulps(torch.float32, 16) * wanted
        assert_accurate(value, grad, logits, labels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_torch(form: str, dtype: torch.dtype, kernel_device: str) -> None:
    logits = (3 * random(8, 2000)).to(dtype).to(kernel_device)
    labels = labels_for(8, 2000).to(kernel_device)
    wanted_value, wanted = exact(logits, labels)
    torch_value, torch_grad = value_and_gradient(
        lambda z: F.cross_entropy(z.float(), labels), logits, 64.0
    )
    value, grad = value_and_gradient(partial(FORMS[form], labels=labels), logits, 64.0)
    wanted = 64 * wanted
    torch_error = (torch_grad.double() - wanted).abs().max()
    ulp = torch.finfo(dtype).eps * wanted.abs().max()
    truncated = kernel_device == "cpu" and dtype == torch.bfloat16
    assert (grad.double() - wanted).abs().max() <= torch_error + (ulp if truncated else ulp / 16)
    assert abs(value - wanted_value) <= abs(torch_value - wanted_value) + 8 * EPS32 * wanted_value


EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "large": lambda z: z * 1e4,
    "large and negative": lambda z: z - 1e4,
    "some -inf": lambda z: z.index_fill(1, torch.arange(0, z.shape[1] - 1, 3), -float("inf")),
    "all but one -inf": lambda z: torch.full_like(z, -float("inf")).index_fill_(
        1, torch.tensor([z.shape[1] - 1]), 2.0
    ),
    "the label is certain": lambda z: z.index_fill(1, torch.tensor([z.shape[1] - 1]), 200.0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_logits(form: str, extreme: str, dtype: torch.dtype, kernel_device: str) -> None:
    n, vocab = 4, 1003
    logits = EXTREMES[extreme](random(n, vocab)).to(dtype).to(kernel_device)
    labels = torch.full((n,), vocab - 1, device=kernel_device)
    labels[1] = -100
    for options in ({}, {"softcap": 30.0}):
        value, grad = value_and_gradient(partial(FORMS[form], labels=labels, **options), logits)
        assert value.isfinite()
        assert_accurate(value, grad, logits, labels, **options)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_shows_as_in_torch(form: str, kernel_device: str) -> None:
    logits = random(4, 300, dtype=torch.float32).to(kernel_device)
    logits[0] = -float("inf")
    logits[1, 7] = float("nan")
    logits[2, 7] = float("inf")
    logits[3, 2] = -float("inf")
    for row, label in ((0, 2), (1, 2), (2, 2), (3, 2)):
        labels = torch.full((4,), -100, device=kernel_device)
        labels[row] = label
        value, grad = value_and_gradient(partial(FORMS[form], labels=labels), logits)
        wanted = F.cross_entropy(logits, labels)
        assert torch.equal(value.isnan(), wanted.isnan())
        assert torch.equal(value.isinf(), wanted.isinf())
        assert (grad[labels == -100] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_ignored_rows_and_neighbours_never_matter(form: str, kernel_device: str) -> None:
    """NaN in rows without a label, and between rows; an ignore_index inside the vocabulary."""
    wide = torch.full((9, 1016), float("nan"))
    wide[:, 5:1005] = random(9, 1000, dtype=torch.float32)
    labels = labels_for(9, 1000)
    labels[0] = labels[8] = labels[4] = 7
    wide[[0, 4, 8]] = float("nan")
    logits, labels = wide.to(kernel_device)[:, 5:1005], labels.to(kernel_device)
    loss = partial(FORMS[form], labels=labels.masked_fill(labels == -100, 3), ignore_index=7)
    value, grad = value_and_gradient(loss, logits)
    assert (grad[labels == 7] == 0).all()
    keep = labels != 7
    assert_accurate(
        value, grad[keep], logits[keep], labels[keep].masked_fill(labels[keep] == -100, 3)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [0, 5])
def test_nothing_labelled_is_zero(form: str, n: int, kernel_device: str, poisoned: None) -> None:
    logits = torch.full((n, 70), float("nan"), device=kernel_device)
    labels = torch.full((n,), -100, device=kernel_device)
    value, grad = value_and_gradient(partial(FORMS[form], labels=labels), logits)
    assert value == 0
    assert (grad == 0).all()


def test_columns_that_lie_apart_are_copied(kernel_device: str) -> None:
    logits = random(500, 6, dtype=torch.float32).to(kernel_device).t()
    labels = labels_for(6, 500).to(kernel_device)
    value, grad = value_and_gradient(partial(cross_entropy, labels=labels), logits)
    assert_accurate(value, grad, logits, labels)


def test_a_label_out_of_range_costs_nan_and_no_other_row(kernel_device: str) -> None:
    """Unchecked labels (the default on a GPU): no stray write, and a NaN loss."""
    logits = random(3, 100, dtype=torch.float32).to(kernel_device)
    for bad in (100, -1, 2**40):
        labels = torch.tensor([3, bad, 99], device=kernel_device)
        options = LossOptions()
        over, losses = logits.clone(), torch.zeros(3, device=kernel_device)
        cross_entropy_triton.overwrite_rows(over, labels, None, None, losses, options)
        assert losses.isnan().tolist() == [False, True, False]
        good = torch.tensor([3, 5, 99], device=kernel_device)
        wanted = logits.clone()
        cross_entropy_triton.overwrite_rows(wanted, good, None, None, losses, options)
        assert torch.equal(over[[0, 2]], wanted[[0, 2]])
        assert ce._forward_op(logits, labels, *options)[0].isnan()


# In place: what it does to the logits, and how it can be misused


@pytest.fixture(
    params=[
        pytest.param(("torch", "cpu"), id="torch"),
        pytest.param(("triton", "cpu"), id="interpreter", marks=pytest.mark.interpreter),
        pytest.param(("triton", "cuda"), id="cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> Any:
    """The device of tensors, with the torch or the Triton path chosen."""
    backend, where = request.param
    with dispatch.override(cross_entropy=backend):
        yield where


N, DIM, VOCAB = 6, 3, 40


def head(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden = random(N, DIM, dtype=dtype).to(device)
    weight = random(DIM, VOCAB, seed=1, dtype=dtype).to(device).requires_grad_()
    return hidden, weight, labels_for(N, VOCAB).to(device)


def overwriting(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, overwrite=True, z_loss=0.01)


def plainly(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, z_loss=0.01)


def gradient_of_weight(
    device: str, use: Callable[[Tensor, Tensor, Callable[..., Tensor]], Tensor], loss: Any
) -> Tensor:
    """The weight's gradient of `use(logits, labels, loss)` with logits = hidden @ weight."""
    hidden, weight, labels = head(device)
    return torch.autograd.grad(use(hidden @ weight, labels, loss), weight)[0]


# correct uses
RIGHT: dict[str, Callable[[Tensor, Tensor, Callable[..., Tensor]], Tensor]] = {
    "alone": lambda z, y, loss: loss(z, y),
    "scaled": lambda z, y, loss: 3 * loss(z, y) / 7,
    "a view of all": lambda z, y, loss: loss(z.view(2, 3, VOCAB).flatten(0, 1), y),
    "a view of some columns": lambda z, y, loss: loss(z[:, : VOCAB - 8], y % (VOCAB - 8)),
    "used before, not saved": lambda z, y, loss: z.sum() + loss(z, y),
    "saved by the value of another": lambda z, y, loss: (z * 2).square().sum() + loss(z, y),
    "logits a part of it made": lambda z, y, loss: loss(z.relu() * 2, y),
}
# uses whose result would be wrong
WRONG: dict[str, tuple[Callable[[Tensor, Tensor, Callable[..., Tensor]], Tensor], str]] = {
    "saved before": (lambda z, y, loss: z.square().sum() + loss(z, y), "inplace operation"),
    "saved by who made them": (lambda z, y, loss: loss(z.exp(), y), "inplace operation"),
    "used afterwards": (lambda z, y, loss: loss(z, y) + z.sum(), "used again afterwards"),
    "base used afterwards": (
        lambda z, y, loss: loss(z.view(N, VOCAB), y) + z.sum(),
        "used again afterwards",
    ),
    "another view used afterwards": (
        lambda z, y, loss: loss(z[:, :30], y % 30) + z[:, 30:].sum(),
        "used again afterwards",
    ),
    "twice": (lambda z, y, loss: loss(z, y) + loss(z, y), "used again afterwards"),
    "one of several views": (
        lambda z, y, loss: loss(z.split(20, 1)[0], y % 20),
        "multiple views|inplace",
    ),
}


@pytest.mark.parametrize("use", RIGHT)
def test_overwriting_is_right(use: str, device: str) -> None:
    got = gradient_of_weight(device, RIGHT[use], overwriting)
    wanted = gradient_of_weight(device, RIGHT[use], plainly)
    torch.testing.assert_close(
        got, wanted, rtol=ulps(torch.float32, 80), atol=ulps(torch.float32, 16)
    )


@pytest.mark.parametrize("use", WRONG)
def test_overwriting_wrongly_is_an_error(use: str, device: str) -> None:
    function, message = WRONG[use]
    gradient_of_weight(device, function, plainly)  # without overwriting it is right
    with pytest.raises(RuntimeError, match=message):
        gradient_of_weight(device, function, overwriting)


def test_the_logits_hold_the_gradient_afterwards(device: str) -> None:
    hidden, weight, labels = head(device)
    logits = hidden @ weight
    wanted = exact(logits.detach(), labels, z_loss=0.01)[1]
    storage = logits.data_ptr()
    overwriting(logits, labels)
    assert logits.data_ptr() == storage
    torch.testing.assert_close(
        logits.detach().double(), wanted, rtol=ulps(torch.float32, 80), atol=ulps(torch.float32, 1)
    )


def test_the_gradient_is_that_memory(device: str) -> None:
    hidden, weight, labels = head(device)
    logits = hidden @ weight
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    overwriting(logits, labels).backward()
    assert seen == [logits.data_ptr()]


@pytest.mark.parametrize("why", ["no_grad", "detached"])
def test_without_a_gradient_nothing_is_overwritten(why: str, device: str) -> None:
    hidden, weight, labels = head(device)
    logits = hidden @ weight
    if why == "detached":
        logits = logits.detach()
    before = logits.detach().clone()
    with torch.set_grad_enabled(why != "no_grad"):
        loss = overwriting(logits, labels)
    assert torch.equal(logits, before)
    torch.testing.assert_close(loss, plainly(before, labels))


def test_backward_again_where_the_graph_is_kept(device: str) -> None:
    hidden, weight, labels = head(device)
    wanted = 3 * torch.autograd.grad(plainly(hidden @ weight, labels), weight)[0]
    loss = 3 * overwriting(hidden @ weight, labels)
    for keep in (True, True, False):
        (got,) = torch.autograd.grad(loss, weight, retain_graph=keep)
        torch.testing.assert_close(
            got, wanted, rtol=ulps(torch.float32, 80), atol=ulps(torch.float32, 16)
        )
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weight)


def test_batched_cotangents(device: str) -> None:
    """One backward for several gradients: no part of it may be in place."""
    hidden, weight, labels = head(device)
    factors = torch.tensor([1.0, 2.0, 5.0], device=device)
    for loss in (
        overwriting(hidden @ weight, labels),
        linear_cross_entropy(hidden, weight.t(), labels, z_loss=0.01),
    ):
        (got,) = torch.autograd.grad(loss, weight, factors, is_grads_batched=True)
        wanted = gradient_of_weight(device, RIGHT["alone"], plainly)
        torch.testing.assert_close(
            got,
            factors[:, None, None] * wanted,
            rtol=ulps(torch.float32, 80),
            atol=ulps(torch.float32, 16),
        )


def test_changing_the_logits_afterwards_is_an_error(device: str) -> None:
    hidden, weight, labels = head(device)
    logits = hidden @ weight
    loss = overwriting(logits, labels)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_second_derivatives_of_overwritten_logits_are_an_error(device: str) -> None:
    hidden, weight, labels = head(device)
    loss = overwriting(hidden @ weight, labels)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, weight, create_graph=True)


def test_forward_mode_of_overwritten_logits_is_an_error(device: str) -> None:
    hidden, weight, labels = head(device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(hidden @ weight, random(N, VOCAB).to(hidden))
        with pytest.raises(NotImplementedError, match="jvp"):
            overwriting(dual, labels)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (lambda z: z.detach().requires_grad_(), "leaf"),
        (lambda z: z.detach().requires_grad_().view(N, VOCAB), "leaf"),
        (lambda z: z.t().contiguous().t(), "contiguous and apart"),
        (lambda z: z[:1].expand(N, -1), "contiguous and apart"),
    ],
)
def test_what_cannot_be_overwritten_is_named(
    logits: Callable[[Tensor], Tensor], message: str, device: str
) -> None:
    hidden, weight, labels = head(device)
    given = logits(hidden @ weight)
    before = given.detach().clone()
    with pytest.raises(ValueError, match=message):
        overwriting(given, labels)
    assert torch.equal(given, before)


def test_under_func_transforms_nothing_is_overwritten(device: str) -> None:
    hidden, weight, labels = head(device)
    weight = weight.detach()

    def value(loss: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda w: loss(hidden @ w, labels)

    wanted = torch.func.grad(value(plainly))(weight)
    torch.testing.assert_close(torch.func.grad(value(overwriting))(weight), wanted)
    both = torch.stack([weight, weight])
    got = torch.func.vmap(torch.func.grad(value(overwriting)))(both)
    torch.testing.assert_close(got, torch.stack([wanted, wanted]))
    both.requires_grad_()
    (got,) = torch.autograd.grad(torch.func.vmap(value(overwriting))(both).sum(), both)
    torch.testing.assert_close(got, torch.stack([wanted, wanted]))
    _, pull = torch.func.vjp(value(overwriting), weight)
    for _ in range(2):  # and may be pulled back twice
        torch.testing.assert_close(pull(torch.tensor(3.0, device=device))[0], 3 * wanted)

    def curvature(loss: Callable[..., Tensor]) -> Tensor:
        first = torch.func.grad(value(loss))
        return torch.func.grad(lambda w: first(w).square().sum())(weight)

    torch.testing.assert_close(curvature(overwriting), curvature(plainly))


@pytest.mark.parametrize("reentrant", [True, False])
def test_overwriting_in_a_checkpoint(reentrant: bool, device: str) -> None:
    hidden, weight, labels = head(device)
    wanted = torch.autograd.grad(plainly(hidden @ weight, labels), weight)[0]
    loss = torch.utils.checkpoint.checkpoint(
        lambda w: overwriting(hidden @ w, labels), weight, use_reentrant=reentrant
    )
    loss.backward()
    torch.testing.assert_close(
        weight.grad, wanted, rtol=ulps(torch.float32, 80), atol=ulps(torch.float32, 16)
    )


def test_fp16_waits_for_the_loss_scale(device: str) -> None:
    """1 / count times a probability underflows in fp16; the scale comes before the rounding."""
    n = 24
    logits = torch.zeros(n, 1024, dtype=torch.float16, device=device)
    labels = torch.zeros(n, dtype=torch.int64, device=device)
    for form in FORMS.values():
        _, grad = value_and_gradient(partial(form, labels=labels), logits, 65536.0)
        wanted = exact(logits, labels)[1] * 65536
        assert wanted.abs().min() / 65536 < torch.finfo(torch.float16).smallest_normal
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo looks at it
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiled_nothing_is_overwritten(backend: str, device: str) -> None:
    """The same uses, inside and across the compiled function, where all are correct."""
    if backend == "inductor" and device == "cpu":
        pytest.skip("the interpreter's process does not build C++")
    hidden, weight, labels = head(device)
    uses = {**RIGHT, **{name: use for name, (use, _) in WRONG.items()}}
    for name in ("a view of all", "saved before", "used afterwards"):
        torch._dynamo.reset()
        use = uses[name]
        compiled = torch.compile(
            lambda w, use=use: use(hidden @ w, labels, overwriting), backend=backend, fullgraph=True
        )
        (got,) = torch.autograd.grad(compiled(weight), weight)
        torch.testing.assert_close(got, gradient_of_weight(device, use, plainly), msg=name)
    for logits in (hidden @ weight, (hidden @ weight).detach().requires_grad_()):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda z: 2 * overwriting(z.view(N, VOCAB), labels), backend=backend, fullgraph=True
        )
        before = logits.detach().clone()
        (got,) = torch.autograd.grad(compiled(logits), logits)
        torch.testing.assert_close(
            got, 2 * value_and_gradient(partial(plainly, labels=labels), before)[1]
        )
        assert torch.equal(logits, before)


def test_a_wrong_overwrite_shows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = gradient_of_weight(device, RIGHT["alone"], plainly)
    right = in_place.scaled
    monkeypatch.setattr(in_place, "scaled", lambda g, factor, *how: right(g, 3 * factor, *how))
    got = gradient_of_weight(device, RIGHT["alone"], overwriting)
    torch.testing.assert_close(
        got, 3 * wanted, rtol=ulps(torch.float32, 80), atol=ulps(torch.float32, 16)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["whole", "rows apart", "columns", "empty", "one row"])
def test_scaling_in_place(layout: str, dtype: torch.dtype, kernel_device: str) -> None:
    wide = random(5, 9000, dtype=dtype).to(kernel_device)
    x = {
        "whole": lambda: wide,
        "rows apart": lambda: wide[:, 3:8500],
        "columns": lambda: wide.t(),
        "empty": lambda: wide[:0],
        "one row": lambda: wide[0],
    }[layout]()
    before = wide.clone()
    values = x.clone()
    scale_rows(x, torch.tensor(1.0, device=kernel_device))
    assert torch.equal(wide, before)
    scale_rows(x, torch.tensor(1 / 3, device=kernel_device))
    # the interpreter truncates to bf16
    torch.testing.assert_close(
        x, (values.float() / 3).to(dtype), rtol=torch.finfo(dtype).eps, atol=ulps(torch.float32, 1)
    )
    if layout == "rows apart":
        assert torch.equal(wide[:, :3], before[:, :3])
        assert torch.equal(wide[:, 8500:], before[:, 8500:])


# Linear cross-entropy


def linear_problem(
    n: int, dim: int, vocab: int, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Tensor]:
    leaves = [
        random(n, dim) * dim**-0.5,
        random(vocab, dim, seed=1),
        random(vocab, seed=2),
    ]
    labels = labels_for(n, vocab)
    return [x.to(dtype).to(device) for x in leaves], labels.to(device)


def linear_gradients(
    loss: Callable[..., Tensor], leaves: list[Tensor], factor: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    value = loss(*leaves) * factor
    return value.detach() / factor, list(torch.autograd.grad(value, leaves))


def dense(labels: Tensor, scale: float = 1.0, **options: Any) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, unembed: Tensor, bias: Tensor) -> Tensor:
        logits = (hidden @ unembed.mT + bias) * scale
        return ce.cross_entropy_reference(logits, labels, LossOptions(**options))

    return loss


def largest_logit(leaves: list[Tensor], scale: float = 1.0, **options: Any) -> Tensor:
    hidden, unembed, bias = (x.double() for x in leaves)
    return ((hidden @ unembed.mT + bias) * scale).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "dim", "vocab", "chunk", "options"),
    [
        (1, 8, 1, None, {}),
        (1, 16, 100, None, {}),
        (5, 123, 123, 2, {"label_smoothing": 0.1}),
        (30, 32, 200, 16, {"scale": 0.5, "softcap": 4.0}),
        (20, 16, 1000, 16, {}),
        (20, 16, 1001, 16, {"scale": -0.7, "z_loss": 0.01, "label_smoothing": 0.2}),
    ],
)
def test_linear_cross_entropy_no_worse_than_torch(
    n: int,
    dim: int,
    vocab: int,
    chunk: int | None,
    options: dict[str, Any],
    dtype: torch.dtype,
    kernel_device: str,
    poisoned: None,
) -> None:
    """Against fp64 on the same inputs: the dense torch form's error, one rounding per matmul."""
    leaves, labels = linear_problem(n, dim, vocab, dtype, kernel_device)
    exact_value, exact_grads = linear_gradients(
        dense(labels, **options), [x.double() for x in leaves]
    )
    torch_value, torch_grads = linear_gradients(dense(labels, **options), leaves, 128.0)
    value, grads = linear_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, labels, bias=b, chunk=chunk, **options),
        leaves,
        128.0,
    )
    eps = torch.finfo(dtype).eps
    assert value.dtype == torch.float32
    floor = 32 * EPS32 * float(exact_value.abs() + 1)
    floor += eps * float(largest_logit(leaves, **options)) * n**-0.5  # a rounding of each logit
    assert abs(value - exact_value) <= abs(torch_value - exact_value) + floor
    for grad, torch_grad, wanted in zip(grads, torch_grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        wanted = 128 * wanted
        worst = (torch_grad.double() - wanted).abs().max()
        # logits, their gradients and sums are rounded once each (truncated in the interpreter)
        allowed = worst + (4 * eps + 64 * EPS32) * wanted.abs().max() + 1e-6
        assert (grad.double() - wanted).abs().max() <= allowed


def test_linear_sums_of_the_unembeddings_gradient(kernel_device: str) -> None:
    """fp32 sums depend on the chunks within fp32 rounding; bf16 sums round once per chunk."""
    n, dim, vocab = 24, 8, 32
    leaves, labels = linear_problem(n, dim, vocab, torch.bfloat16, kernel_device)

    def unembeddings(**how: Any) -> Tensor:
        loss = partial(linear_cross_entropy, labels=labels, **how)
        return linear_gradients(lambda h, w: loss(h, w), leaves[:2])[1][1].double()

    once = unembeddings(chunk=n)
    size = once.abs().max()
    fp32 = (unembeddings(chunk=6) - once).abs().max() / size
    bf16 = (unembeddings(chunk=6, accumulate="bf16") - once).abs().max() / size
    eps = torch.finfo(torch.bfloat16).eps
    assert fp32 <= eps / 2 + 1e-5  # the last rounding may fall the other way
    assert fp32 < bf16 <= 4 * eps / 2 + eps
    assert torch.equal(unembeddings(chunk=n, accumulate="bf16"), once)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_linear_ignored_rows_never_matter(poison: float, kernel_device: str) -> None:
    leaves, labels = linear_problem(12, 8, 100, torch.float32, kernel_device)
    labels[::3] = -100
    loss = partial(linear_cross_entropy, labels=labels, chunk=5)
    clean = linear_gradients(lambda h, w, b: loss(h, w, bias=b), leaves)
    leaves[0][::3] = poison
    got = linear_gradients(lambda h, w, b: loss(h, w, bias=b), leaves)
    torch.testing.assert_close(got, clean, rtol=0, atol=0)
    assert (got[1][0][::3] == 0).all()
    # also if only one gradient is wanted
    for i in range(3):
        alone = linear_gradients(
            lambda x, i=i: loss(
                *[x if j == i else leaves[j] for j in (0, 1)], bias=x if i == 2 else leaves[2]
            ),
            [leaves[i]],
        )
        torch.testing.assert_close(alone, (clean[0], [clean[1][i]]), rtol=0, atol=0)


@pytest.mark.parametrize("n", [0, 6])
def test_linear_nothing_labelled_is_zero(n: int, kernel_device: str, poisoned: None) -> None:
    leaves, _ = linear_problem(n, 4, 9, torch.bfloat16, kernel_device)
    labels = torch.full((n,), -100, device=kernel_device)
    value, grads = linear_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, labels, bias=b), leaves
    )
    assert value == 0
    assert all((g == 0).all() for g in grads)


def test_linear_value_alone_is_the_same_number(kernel_device: str) -> None:
    leaves, labels = linear_problem(20, 16, 100, torch.bfloat16, kernel_device)
    with torch.no_grad():
        alone = linear_cross_entropy(*leaves[:2], labels, chunk=16)
    value, _ = linear_gradients(
        lambda h, w: linear_cross_entropy(h, w, labels, chunk=16), leaves[:2]
    )
    torch.testing.assert_close(alone, value, rtol=8 * EPS32, atol=0)


def test_linear_backward_again_where_the_graph_is_kept(kernel_device: str) -> None:
    """Only the last backward scales in place the gradients that were computed with the loss."""
    (hidden, unembed, _), labels = linear_problem(20, 8, 30, torch.float32, kernel_device)
    hidden.requires_grad_()
    wanted = torch.autograd.grad(linear_cross_entropy(hidden, unembed, labels), hidden)[0]
    loss = 3 * linear_cross_entropy(hidden, unembed, labels)
    for keep in (True, True, False):
        (got,) = torch.autograd.grad(loss, hidden, retain_graph=keep)
        torch.testing.assert_close(got, 3 * wanted)
    _, pull = torch.func.vjp(lambda h: linear_cross_entropy(h, unembed, labels), hidden.detach())
    for factor in (3.0, 5.0):
        got = pull(torch.tensor(factor, device=kernel_device))[0]
        torch.testing.assert_close(got, factor * wanted)


def test_linear_unembedding_may_be_a_transpose(kernel_device: str) -> None:
    (hidden, unembed, _), labels = linear_problem(20, 8, 30, torch.float16, kernel_device)
    straight = linear_gradients(
        lambda h, w: linear_cross_entropy(h, w, labels), [hidden, unembed], 64.0
    )
    turned = linear_gradients(
        lambda h, w: linear_cross_entropy(h, w.t(), labels),
        [hidden, unembed.t().contiguous()],
        64.0,
    )
    turned[1][1] = turned[1][1].t()
    torch.testing.assert_close(turned, straight, rtol=2e-3, atol=ulps(torch.float32, 80))


# Memory and the arguments that bound it


def test_chunks_are_even_and_full() -> None:
    assert [lce._even_chunk(*x) for x in [(16384, 5000), (16384, 4096), (100, 5000), (0, 64)]] == [
        4096,
        4096,
        100,
        1,
    ]
    assert lce._even_chunk(1000, 300) == 256
    assert lce._even_chunk(1000, 100) == 100  # never more than was asked for


def test_memory_buys_tokens() -> None:
    hidden = torch.empty(16384, 8, dtype=torch.bfloat16, device="meta")
    bought = partial(lce.chunk_within, hidden=hidden, triton=True)
    assert bought(2**28, 131072) == 1024
    assert bought(2**28 - 1, 131072) == 896
    assert bought(2**31, 50304) == 21248
    assert bought(1_000_000, 131072) == 3  # too little for a full tile
    assert bought(None, 131072) * 131072 * 2 <= lce._CHUNK_BYTES
    with pytest.raises(ValueError, match="memory must hold the logits of one token, 262144 bytes"):
        bought(1000, 131072)
    assert lce.chunk_within(2**20, 1000, hidden, False) * 1000 * 4 <= 2**20


@pytest.mark.parametrize("narrow", [False, True])
def test_linear_allocates_a_chunk_and_the_gradients(
    narrow: bool, allocations_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On meta tensors, with recorded launches, and the sums as on CUDA."""
    n, dim, vocab, chunk = 1024, 16, 6400, 128
    products: list[tuple[torch.dtype, bool]] = []

    def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
        assert total.shape == (a.shape[0], b.shape[1])
        products.append((total.dtype, first))

    monkeypatch.setattr(lce, "add_product", add_product)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: out)
    with torch.device("meta"):
        hidden = torch.empty(n, dim, dtype=torch.bfloat16)
        unembed = torch.empty(vocab, dim, dtype=torch.bfloat16)
        labels = torch.empty(n, dtype=torch.int64)
    settings = lce.LinearLossSettings(*LossOptions(), None, chunk, narrow, True)
    with allocations_in(hidden, unembed, labels) as allocations, recording() as launches:
        _, d_hidden, d_unembed, _ = lce._fused(
            hidden, unembed, None, labels, None, settings, (True, True, False)
        )
    assert len(launches) == n // chunk
    assert d_hidden.dtype == d_unembed.dtype == torch.bfloat16
    summed = torch.bfloat16 if narrow else torch.float32
    assert products == [(summed, i == 0) for i in range(n // chunk)]
    made = sorted({ref.cdata: size for ref, size, _ in allocations.made}.values())
    logits, accumulator = chunk * vocab * 2, 4 * vocab * dim
    large = [hidden.nbytes, unembed.nbytes, logits, *([] if narrow else [accumulator])]
    assert made[-len(large) :] == sorted(large)
    assert made[-len(large) - 1] <= 8 * n


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk": 4, "memory": 2**20}, "chunk or memory, not both"),
        ({"memory": 8}, "memory must hold the logits of one token"),
        ({"accumulate": "fp16"}, "accumulate must be 'fp32' or 'bf16', got 'fp16'"),
        ({"accumulate": "bf16"}, "accumulate='bf16' is for bf16 weights, got torch.float32"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(
            torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2).long(), **arguments
        )


# Drivers, each also with a backward made wrong


LABELS = labels_for(7, 30)


def twice(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return lambda h, w: 2 * loss(h, w, LABELS.to(h.device), softcap=5.0, **options)


def by_formula(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return ce.cross_entropy_reference(logits, labels, LossOptions(**options))


def dense_of(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda h, w, *args, **options: loss(h @ w.mT, *args, **options)


EXACT = twice(dense_of(by_formula))
SIZES = ((7, 5), (30, 5))
LOSSES = {
    "cross_entropy": Case(twice(dense_of(cross_entropy)), EXACT, SIZES, ce, "OP"),
    "overwrite": Case(twice(dense_of(cross_entropy), overwrite=True), EXACT, SIZES, ce, "OP"),
    "linear_cross_entropy": Case(twice(linear_cross_entropy, chunk=4), EXACT, SIZES, lce, "OP"),
}
FIRST = [by_autograd, by_func_grad, by_vmap_grad, by_compile, by_compiled_grad]


@pytest.mark.parametrize(
    ("name", "driver", "kernel_device"), placed(LOSSES, [*FIRST, by_grad_grad])
)
def test_under_drivers(name: str, driver: Driver, kernel_device: str) -> None:
    # sums of at most 30 terms in fp32
    assert error(LOSSES[name], driver, kernel_device, torch.float32) < ulps(torch.float32, 80)


@pytest.mark.parametrize(("name", "driver"), spoilt(LOSSES, FIRST))
def test_a_wrong_backward_shows(
    name: str, driver: Driver, interpreter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = in_place.scaled
    broken(LOSSES[name], "backward", monkeypatch)
    if name == "overwrite" and driver is by_autograd:  # in place, it has a backward of its own
        monkeypatch.setattr(in_place, "scaled", lambda g, f, *how: right(g, 3 * f, *how))
    assert error(LOSSES[name], driver, interpreter, torch.float32) > 0.1


# Only on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [32768, 50257, 75968, 131072])
def test_real_sizes(vocab: int) -> None:
    logits = torch.randn(512, vocab, device="cuda", dtype=torch.bfloat16) * 3
    labels = labels_for(512, vocab).cuda()
    wanted = exact(logits, labels)[0]
    for form in FORMS.values():
        value, grad = value_and_gradient(partial(form, labels=labels), logits)
        assert abs(value - wanted) <= ulps(torch.float32, 16) * wanted
        assert_accurate(value, grad, logits, labels)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_than_two_to_the_31_elements() -> None:
    n, vocab = 16400, 131072
    assert n * vocab > 2**31
    torch.manual_seed(0)
    hidden = torch.randn(n, 16, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(16, vocab, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.full((n,), -100, device="cuda")
    labels[-3:] = torch.tensor([0, 77, vocab - 1])
    some = exact((hidden[-3:] @ weight.detach()), labels[-3:])
    for form in FORMS.values():
        logits = hidden @ weight
        seen: list[Tensor] = []
        logits.register_hook(seen.append)
        loss = form(logits, labels)
        loss.backward()
        torch.testing.assert_close(
            loss.detach().double(), some[0], rtol=ulps(torch.float32, 16), atol=0
        )
        torch.testing.assert_close(
            seen[0][-3:].double(), some[1], rtol=5e-3, atol=ulps(torch.float32, 16)
        )
        assert not seen[0][:-3].any()
        del logits, seen, loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_per_token(dtype: torch.dtype, kernel_device: str) -> None:
    n, dim, vocab = 9, 16, 40
    leaves = [random(*shape, seed=i) for i, shape in enumerate([(n, dim), (vocab, dim), (vocab,)])]
    labels, weights = labels_for(n, vocab), torch.arange(float(n))

    def by(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
        given = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]
        options = {"bias": given[2], "scale": 0.7, "softcap": 3.0, "chunk": 4}
        with dispatch.override(linear_cross_entropy=backend):
            out = token_logprobs(given[0], given[1], labels.to(device), **options)
        loss = (out * weights.to(out)).sum()
        return [out.detach(), *torch.autograd.grad(loss, given)]

    exact = by("torch", "cpu", torch.float64)
    # in bf16 logits and their gradients are rounded once each, twice as far in the interpreter
    allowed = 4 * torch.finfo(torch.bfloat16).eps if dtype == torch.bfloat16 else ulps(dtype, 256)
    for got, want in zip(by("triton", kernel_device, dtype), exact, strict=True):
        assert (got.cpu().double() - want).norm() <= allowed * want.norm()


@pytest.mark.gpu
def test_overwriting_takes_memory_for_rows_only() -> None:
    hidden = torch.randn(4096, 16, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(16, 50304, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = labels_for(4096, 50304).cuda()
    cross_entropy(hidden @ weight, labels, overwrite=True).backward()
    logits = hidden @ weight
    edge = torch.autograd.graph.get_gradient_edge(logits)  # no product, which may take a workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = cross_entropy(logits, labels, overwrite=True)
    (grad,) = torch.autograd.grad(loss, edge)
    assert torch.cuda.max_memory_allocated() - before < 64 * 4096
    assert grad.data_ptr() == logits.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", ["fp32", "bf16"])
def test_linear_memory_and_no_wait(accumulate: Any) -> None:
    n, dim, vocab, memory = 4096, 512, 50304, 2**26
    leaves, labels = linear_problem(n, dim, vocab, torch.bfloat16, "cuda")
    leaves = [x.requires_grad_() for x in leaves[:2]]

    def step() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(*leaves, labels, memory=memory, accumulate=accumulate)
        return torch.autograd.grad(loss, leaves)

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grads = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    peak = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)
    summed = 4 * dim * vocab if accumulate == "fp32" else 0
    assert peak <= memory + summed + 64 * n

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for g in captured:
        g.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(captured, grads, rtol=0, atol=0)


@pytest.mark.gpu
def test_labels_are_checked_on_a_gpu_where_asked_for() -> None:
    logits = torch.zeros(3, 5, device="cuda")
    labels = torch.tensor([1, 5, 2], device="cuda")
    with pytest.raises(ValueError, match="label 5 at position 1"):
        cross_entropy(logits, labels, check_labels=True)
    with pytest.raises(ValueError, match="label 5 at position 1"):
        linear_cross_entropy(logits, torch.zeros(5, 5, device="cuda"), labels, check_labels=True)
    assert cross_entropy(logits, labels).isnan()
