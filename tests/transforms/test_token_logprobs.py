"""Log-probabilities per token: those of dense logits under every transform, without logits."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from core import Forward, from_module, make_batch, stack_examples, vlm
from params import init_params
from params.tree import flatten, map_leaves
from tests.models import language
from tests.rounding import FP32, FP64
from transforms import (
    checkpoint,
    compile,
    fuse_loss,
    lora,
    quantize_int8,
    token_logprobs,
    value_and_grad,
)

kernel = importlib.import_module("kernels.loss.token_logprobs")
WAYS: dict[str, Callable[[Forward], Forward]] = {
    "bare": token_logprobs,
    "checkpoint": lambda f: token_logprobs(checkpoint(f)),
    "checkpoint outside": lambda f: checkpoint(token_logprobs(f)),
    "compile": lambda f: compile(token_logprobs(f), backend="eager"),
    "compile by blocks": lambda f: compile(token_logprobs(f), blocks=True, backend="eager"),
}
ROW = torch.tensor([0.3, -1.0, 0.7, 0.0, 2.0, 1.0, -0.2]).double()


def dense(forward: Forward, params: Any, batch: Any) -> Tensor:
    """By the formula, from dense logits."""
    labels = batch["labels"].flatten()
    found = forward(params, batch).flatten(0, -2).log_softmax(-1)
    return found.gather(-1, labels.clamp(min=0)[:, None])[:, 0].where(labels >= 0, 0.0)


@pytest.fixture(params=["text", "untied"])
def given(micro: Any, request: pytest.FixtureRequest) -> tuple[Forward, Any, Any]:
    config = micro[request.param]
    params = map_leaves(lambda leaf: leaf.double(), init_params(config, seed=1))
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(torch.randint(config.text.vocab_size, (3, 7), generator=generator))
    return vlm(config), params, batch


def weighted(logprobs: Callable[..., Tensor], batch: Any) -> Callable[[Any], Tensor]:
    """A loss that treats each token differently, as policy gradients do."""
    return lambda params: (logprobs(params, batch) * ROW.repeat(3)).sum()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo looks at it
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_of_dense_logits(given: Any, way: str) -> None:
    forward, params, batch = given
    got, want = WAYS[way](forward), lambda params, batch: dense(forward, params, batch)
    torch.testing.assert_close(got(params, batch), want(params, batch), rtol=FP64, atol=FP64)
    loss = lambda params, batch: weighted(got, batch)(params)  # noqa: E731
    _, found = value_and_grad(loss)(params, batch)
    exact = flatten(grad(weighted(want, batch))(params))
    for path, leaf in flatten(found).items():
        torch.testing.assert_close(leaf, exact[path], rtol=FP64, atol=FP64)


def test_per_example_gradients_and_second_derivatives(given: Any) -> None:
    forward, params, _ = given
    got = token_logprobs(forward)
    examples = [make_batch(torch.arange(i, i + 7)[None] % 61) for i in range(3)]
    batch = stack_examples(examples)

    def loss(f: Callable[..., Tensor], params: Any, batch: Any) -> Tensor:
        return (f(params, batch) * ROW).sum()

    def by(f: Callable[..., Tensor]) -> Any:
        return vmap(grad(lambda p, b: loss(f, p, b)), in_dims=(None, 0))(params, batch)

    def hvp(f: Callable[..., Tensor]) -> Any:
        gradient = grad(lambda p: loss(f, p, examples[0]))
        return jvp(gradient, (params,), (map_leaves(torch.ones_like, params),))[1]

    def exact(params: Any, batch: Any) -> Tensor:
        return dense(forward, params, batch)

    for mine, theirs in ((by(got), by(exact)), (hvp(got), hvp(exact))):
        for path, leaf in flatten(mine).items():
            want = flatten(theirs)[path]
            torch.testing.assert_close(leaf, want, rtol=100 * FP64, atol=100 * FP64)


def test_int8_with_adapters_and_a_foreign_module() -> None:
    llama, weights = from_module(language("Llama", vocab_size=61, attn_implementation="sdpa"))
    forward = lora(quantize_int8(llama), rank=2)
    params = forward.prepare(weights)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    got = token_logprobs(forward)(params, batch)
    assert got.shape == (18,)
    torch.testing.assert_close(got, dense(forward, params, batch), rtol=FP32, atol=FP32)
    mean = fuse_loss(forward)(params, batch)
    torch.testing.assert_close(-got.mean(), mean, rtol=FP32, atol=FP32)


def test_ignored_rows_may_hold_anything() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, unembed = (torch.randn(n, 8, generator=generator) for n in (5, 11))
    labels = torch.tensor([3, -100, 0, -100, 10])
    hidden[1], hidden[3] = float("nan"), float("inf")
    leaves = [hidden.requires_grad_(), unembed.requires_grad_()]
    out = kernel.token_logprobs(*leaves, labels, chunk=2)
    grads = torch.autograd.grad((out * torch.arange(1.0, 6.0)).sum(), leaves)
    clean = [leaves[0].detach()[[0, 2, 4]].requires_grad_(), unembed]
    exact = (clean[0] @ unembed.T).log_softmax(-1).gather(-1, labels[[0, 2, 4]][:, None])[:, 0]
    want = torch.autograd.grad((exact * torch.tensor([1.0, 3.0, 5.0])).sum(), clean)
    assert out[[1, 3]].tolist() == [0.0, 0.0]
    assert not grads[0][[1, 3]].any()
    torch.testing.assert_close(out[[0, 2, 4]], exact, rtol=FP32, atol=FP32)
    torch.testing.assert_close(grads[0][[0, 2, 4]], want[0], rtol=FP32, atol=FP32)
    torch.testing.assert_close(grads[1], want[1], rtol=FP32, atol=FP32)


def test_no_tensor_of_all_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    right = kernel._losses

    def noted(h: Tensor, *args: Any, **options: Any) -> Any:
        rows.append(len(h))
        return right(h, *args, **options)

    monkeypatch.setattr(kernel, "_losses", noted)
    hidden, unembed = torch.randn(100, 4).requires_grad_(), torch.randn(50, 4)
    out = kernel.token_logprobs(hidden, unembed, torch.arange(100) % 50, memory=16 * 50 * 4)
    out.sum().backward()
    assert max(rows) == 16
    assert sum(rows) == 200  # once forward, once backward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([9])}, "token_logprobs: label 9 at position 0"),
        ({"unembed": torch.zeros(4, 3)}, "token_logprobs: unembed must have shape"),
        ({"softcap": 0.0}, "token_logprobs: softcap must be > 0"),
        ({"chunk": 0}, "token_logprobs: chunk must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    plain = {"hidden": torch.zeros(1, 2), "unembed": torch.zeros(4, 2), "labels": torch.tensor([0])}
    with pytest.raises(ValueError, match=message):
        kernel.token_logprobs(**(plain | change))
