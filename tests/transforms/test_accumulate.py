"""Accumulation: several batches give what one batch of all their tokens gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

from core import make_batch, vlm
from core.batch import stack_examples
from params.tree import flatten, map_leaves, unflatten
from tests.rounding import FP32
from tests.transforms.test_checkpoint import Live
from transforms import accumulate, checkpoint, compile, fuse_loss, value_and_grad

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

# each batch counts by its share of the labels, in fp32: a few roundings
WEIGHTS = (4, torch.float32)


@pytest.fixture
def subject(micro, rough):
    """A loss, params, three batches whose numbers of labels differ, and one of all of them."""
    config = micro["text"]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 61, (3, 8), generator=generator)
    labels = torch.where(torch.arange(8) < torch.tensor([[7], [2], [0]]), rows.roll(-1, 1), -100)
    each = [
        {**make_batch(row[None]), "labels": label} for row, label in zip(rows, labels, strict=True)
    ]
    whole = {**make_batch(rows), "labels": labels.flatten()}
    return fuse_loss(vlm(config)), rough(config), each, whole


def forms(each):
    return {"list": each, "stacked": stack_examples(each)}


@pytest.mark.parametrize("form", ["list", "stacked"])
def test_it_is_one_batch_of_all_tokens(subject, assert_same, form: str) -> None:
    loss, params, each, whole = subject
    want, want_grads = value_and_grad(loss)(params, whole)
    batches = forms(each)[form]
    total = accumulate(loss, 3)
    value, grads = value_and_grad(total)(params, batches)
    assert_same(value.double(), want.double(), *WEIGHTS)
    assert_same(grads, want_grads, *WEIGHTS)
    with torch.no_grad():
        assert_same(total(params, batches).double(), want.double(), *WEIGHTS)
    assert_same(grad(total)(params, batches), want_grads, *WEIGHTS)
    # dividing each batch's mean by their number would be another thing
    mean = torch.stack([loss(params, batch) for batch in each]).mean()
    assert abs(float(mean - want)) > 0.1


def test_without_labels_there_is_no_gradient(subject) -> None:
    loss, params, each, _ = subject
    value, grads = value_and_grad(accumulate(loss, 2))(params, [each[2], each[2]])
    assert value == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in flatten(grads).values())


def test_other_drivers(subject, assert_same) -> None:
    loss, params, each, whole = subject
    total, batches = accumulate(loss, 3), stack_examples(each)
    along = map_leaves(torch.cos, params)
    assert_same(
        jvp(lambda p: grad(total)(p, batches), (params,), (along,))[1],
        jvp(lambda p: grad(loss)(p, whole), (params,), (along,))[1],
        *WEIGHTS,
    )
    pair = {name: torch.stack([t, t.flip(0)]) for name, t in batches.items()}
    each_grad = vmap(grad(total), (None, 0))(params, pair)
    want = grad(loss)(params, whole)
    for i in range(2):
        assert_same(map_leaves(lambda g, i=i: g[i], each_grad), want, *WEIGHTS)
    norm = {**params["text"]["norm"]}

    def of_norm(f, batch):
        return lambda w: f({**params, "text": {**params["text"], "norm": {"weight": w}}}, batch)

    assert_same(
        {"h": hessian(of_norm(total, batches))(norm["weight"])},
        {"h": hessian(of_norm(loss, whole))(norm["weight"])},
        *WEIGHTS,
    )


def test_double_backward(subject, assert_same) -> None:
    loss, params, each, whole = subject

    def twice(f, batch):
        leaves = {p: t.clone().requires_grad_() for p, t in flatten(params).items()}
        flat = list(leaves.values())
        g = torch.autograd.grad(f(unflatten(leaves), batch), flat, create_graph=True)
        norm = torch.stack([x.square().sum() for x in g]).sum()
        return dict(zip(leaves, torch.autograd.grad(norm, flat), strict=True))

    got, want = twice(accumulate(loss, 3), each), twice(loss, whole)
    for path, g in want.items():
        torch.testing.assert_close(got[path], g, rtol=FP32, atol=FP32)


def test_compiled_inside_and_outside(subject, assert_same) -> None:
    torch._dynamo.reset()
    loss, params, each, whole = subject
    _, want = value_and_grad(loss)(params, whole)
    inside = accumulate(compile(loss, backend="eager"), 3)
    assert_same(value_and_grad(inside)(params, each)[1], want, *WEIGHTS)
    torch._dynamo.reset()
    outside = torch.compile(accumulate(loss, 3), backend="eager", fullgraph=True)
    assert_same(value_and_grad(outside)(params, stack_examples(each))[1], want, *WEIGHTS)


def test_half_precision_gradients_are_summed_in_fp32(subject) -> None:
    loss, params, each, _ = subject
    params = map_leaves(Tensor.bfloat16, params)
    batches = [each[0]] * 64
    one = value_and_grad(loss)(params, each[0])[1]
    many = value_and_grad(accumulate(loss, 64))(params, batches)[1]
    for path, g in flatten(one).items():  # 1/64 is a power of two: the same but for one rounding
        torch.testing.assert_close(flatten(many)[path], g, rtol=2**-8, atol=0)


def test_memory_is_that_of_one_microbatch(micro, rough) -> None:
    config = micro["text"]
    params = rough(config, dtype=torch.float32)
    loss = fuse_loss(vlm(config))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 61, (8, 64), generator=generator)
    whole, each = make_batch(rows), [make_batch(row[None]) for row in rows]
    peaks = {}
    runs = {
        "whole": (value_and_grad, loss, whole),
        "in parts": (value_and_grad, accumulate(loss, 8), each),
        "in parts, grad": (grad, accumulate(loss, 8), each),
        "in parts, checkpointed": (value_and_grad, accumulate(checkpoint(loss), 8), each),
    }
    for name, (driver, f, batch) in runs.items():
        with Live() as live:
            driver(f)(params, batch)
        peaks[name] = live.peak
    assert peaks["in parts"] < 0.4 * peaks["whole"]  # params' gradients, twice, stay
    assert peaks["in parts, grad"] < 0.5 * peaks["whole"]
    assert peaks["in parts, checkpointed"] < peaks["in parts"]


def test_wrong_counts_are_refused(subject) -> None:
    loss, params, each, _ = subject
    with pytest.raises(ValueError, match="there are 3 batches, not 2 microbatches"):
        accumulate(loss, 2)(params, each)
    with pytest.raises(ValueError, match=r"the batch holds \[3\] microbatches, not 4"):
        accumulate(loss, 4)(params, stack_examples(each))
    with pytest.raises(ValueError, match="microbatches must be 1 or more, not 0"):
        accumulate(loss, 0)
