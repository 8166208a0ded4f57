"""The algebra: every legal ordered pair of transforms, under every driver, on two models.

The reference is written down anew: dequantised weights, a cast, the bare model's dense logits and
torch's cross-entropy, differentiated by plain autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap

from core import Forward, ProjectorConfig, TextConfig, VisionConfig, VLMConfig, from_module, vlm
from params import dequantize_weight, quantize_weight
from params.tree import Tree, flatten, map_leaves, merge, num_bytes, unflatten
from transforms import (
    checkpoint,
    fake_quant,
    fuse_loss,
    mixed_precision,
    quantize_int8,
    trainable,
    unfused_loss,
    value_and_grad,
)
from transforms.legal import ILLEGAL

# torch.func.jvp scripts its decompositions when first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

Step = Callable[[Forward], Forward]
STEPS: dict[str, Step] = {
    "checkpoint": checkpoint,
    "fuse_loss": fuse_loss,
    "unfused_loss": unfused_loss,
    # up, not down: fp32 params computed in fp64 keep the comparison sharp
    "mixed_precision": lambda f: mixed_precision(f, torch.float64),
    "fake_quant": lambda f: fake_quant(f, skip=()),
    "quantize_int8": lambda f: quantize_int8(f, skip=()),
}
LOSSES = ("fuse_loss", "unfused_loss")


def is_legal(*names: str) -> bool:
    pairs = itertools.permutations(names, 2)
    return not any(pair in ILLEGAL for pair in pairs)


PAIRS = [
    (a, b)
    for a, b in itertools.permutations(STEPS, 2)
    if is_legal(a, b) and "unfused_loss" not in (a, b)
]


class Subject:
    """A model, params, two batches and the second of them as an example of its own."""

    def __init__(self, forward: Forward, params: Tree, batches: list[dict[str, Tensor]]) -> None:
        self.bare, self.params, self.batches = forward, params, batches
        self.stacked = {k: torch.stack([b[k] for b in batches]) for k in batches[0]}

    def apply(self, *names: str) -> tuple[Forward, Tree]:
        """The loss with these transforms, innermost first, and its params."""
        forward = self.bare
        for name in names:
            forward = STEPS[name](forward)
        if not any(name in LOSSES for name in names):
            forward = unfused_loss(forward)
        params = self.params
        if "mixed_precision" in names:
            params = map_leaves(Tensor.float, params)
        return forward, forward.prepare(params)

    def reference(self, *names: str) -> Callable[[Tree, dict[str, Tensor]], tuple[Tensor, Tree]]:
        weighted = {f"{s.path}.weight" for s in self.bare.select(("linear", "embed", "head"))}
        quantised = weighted if {"fake_quant", "quantize_int8"} & set(names) else set()

        def run(params: Tree, batch: dict[str, Tensor]) -> tuple[Tensor, Tree]:
            leaves = {}
            for path, leaf in flatten(params).items():
                if path in quantised:
                    leaf = dequantize_weight(*quantize_weight(leaf), leaf.dtype)
                leaves[path] = leaf.detach().double().requires_grad_()
            logits = self.bare(unflatten(leaves), batch).flatten(0, -2)
            loss = F.cross_entropy(logits, batch["labels"].flatten())
            grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            dtype = torch.float32 if "mixed_precision" in names else torch.float64
            kept = {
                path: g.to(dtype)
                for path, g in zip(leaves, grads, strict=True)
                if not ("quantize_int8" in names and path in quantised)
            }
            return loss.detach(), unflatten(kept)

        return run


@pytest.fixture(scope="module")
def native(rough, example) -> Subject:
    config = VLMConfig(
        TextConfig(61, 12, 2, 2, 1, 16, tied=False, qkv_bias=True),
        VisionConfig(8, 1, 2, 8, patch_size=4, image_size=8, merge=1),
        ProjectorConfig(hidden=8),
    )
    batches = [example(config, rows=1, length=8, seed=seed, side=8) for seed in (0, 1)]
    return Subject(vlm(config), rough(config), batches)


@pytest.fixture(scope="module")
def foreign() -> Subject:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=12, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        attn_implementation="eager", initializer_range=0.2,
    )  # fmt: skip
    forward, params = from_module(transformers.LlamaForCausalLM(config).double().eval())
    params = map_leaves(lambda t: t + 0.1 * torch.randn_like(t), params)
    batches = []
    for _ in range(2):
        ids = torch.randint(0, 61, (1, 7))
        batches.append(
            {"input_ids": ids, "labels": ids.roll(-1, 1).index_fill(1, torch.tensor(6), -100)}
        )
    return Subject(forward, params, batches)


@pytest.fixture(params=["native", "foreign"])
def subject(request) -> Subject:
    return request.getfixturevalue(request.param)


def tolerance(*names: str) -> float:
    """fp64 throughout: 1e-9. Gradients that arrive in fp32, and dequantised weights, are fp32.

    An int8 embedding gives fp32 rows, and the rest of the model computes in fp32 from there.
    """
    if "quantize_int8" in names:
        return 1e-5
    return 3e-6 if {"mixed_precision", "fake_quant"} & set(names) else 1e-9


def learned(loss: Forward, params: Tree) -> tuple[Callable[[Tree, Any], Tensor], Tree]:
    """The loss of what learns alone, for torch.func.grad, which differentiates every leaf."""
    free, frozen = trainable(params)
    return lambda p, batch: loss(merge(p, frozen), batch), free


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_every_ordered_pair_has_the_gradients_of_the_formula(
    subject: Subject, names: tuple[str, ...], assert_same
) -> None:
    loss, params = subject.apply(*names)
    reference, rtol = subject.reference(*names), tolerance(*names)
    if "input_ids" in subject.batches[0]:
        rtol = max(rtol, 1e-6)  # Hugging Face's norms and softmax are fp32
    wants = [reference(subject_params(subject, names), b) for b in subject.batches]

    batch, (want, want_grads) = subject.batches[0], wants[0]
    value, grads = value_and_grad(loss)(params, batch)
    assert_same(value.double(), want, rtol)
    assert_same(grads, want_grads, rtol)
    inner, free = learned(loss, params)
    assert_same(grad(inner)(free, batch), want_grads, rtol)
    each = vmap(grad(inner), (None, 0))(free, subject.stacked)
    for i, (_, expected) in enumerate(wants):
        assert_same(map_leaves(lambda g, i=i: g[i], each), expected, rtol)


def subject_params(subject: Subject, names: tuple[str, ...]) -> Tree:
    """What the transforms are given, before any preparation."""
    return (
        map_leaves(Tensor.float, subject.params) if "mixed_precision" in names else subject.params
    )


LONG = [
    ("checkpoint", "fake_quant", "mixed_precision", "fuse_loss"),
    ("fuse_loss", "mixed_precision", "fake_quant", "checkpoint"),
    ("quantize_int8", "mixed_precision", "checkpoint", "fuse_loss"),
    ("fuse_loss", "checkpoint", "mixed_precision", "quantize_int8"),
]


@pytest.mark.parametrize("names", LONG, ids="-".join)
def test_whole_chains_in_either_order(subject: Subject, names, assert_same) -> None:
    loss, params = subject.apply(*names)
    assert loss.applied == names
    want, want_grads = subject.reference(*names)(subject_params(subject, names), subject.batches[0])
    value, grads = value_and_grad(loss)(params, subject.batches[0])
    assert_same(value.double(), want, tolerance(*names))
    assert_same(grads, want_grads, tolerance(*names))


@pytest.mark.parametrize(("kind", "names"), [("native", LONG[0]), ("foreign", LONG[3])])
def test_compiled_chains(request, kind: str, names: tuple[str, ...], assert_same) -> None:
    torch._dynamo.reset()
    subject: Subject = request.getfixturevalue(kind)
    loss, params = subject.apply(*names)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for batch in subject.batches:
        want, want_grads = subject.reference(*names)(subject_params(subject, names), batch)
        value, grads = value_and_grad(compiled)(params, batch)
        assert_same(value.double(), want, tolerance(*names))
        assert_same(grads, want_grads, tolerance(*names))


@pytest.mark.parametrize(
    "names",
    [("checkpoint",), ("fuse_loss",), ("checkpoint", "fuse_loss"), ("fuse_loss", "checkpoint")],
    ids="-".join,
)
def test_second_derivatives(subject: Subject, names: tuple[str, ...], assert_same) -> None:
    """Hessian-vector products three ways, against plain autograd's double backward."""
    loss, params = subject.apply(*names)
    batch = subject.batches[0]
    generator = torch.Generator().manual_seed(3)
    along = map_leaves(lambda t: torch.randn(t.shape, generator=generator).to(t), params)

    leaves = {path: t.clone().requires_grad_() for path, t in flatten(params).items()}
    logits = subject.bare(unflatten(leaves), batch).flatten(0, -2)
    dense = F.cross_entropy(logits, batch["labels"].flatten())
    first = torch.autograd.grad(dense, list(leaves.values()), create_graph=True)
    slope = sum((g * v).sum() for g, v in zip(first, flatten(along).values(), strict=True))
    second = torch.autograd.grad(slope, list(leaves.values()), materialize_grads=True)
    want = unflatten(dict(zip(leaves, second, strict=True)))

    def directional(p: Tree) -> Tensor:
        g = grad(loss)(p, batch)
        pairs = zip(flatten(g).values(), flatten(along).values(), strict=True)
        return sum(((a * b).sum() for a, b in pairs), torch.zeros((), dtype=torch.float64))

    def twice(p: Tree) -> Tree:
        flat = {path: t.clone().requires_grad_() for path, t in flatten(p).items()}
        value = loss(unflatten(flat), batch)
        g = torch.autograd.grad(value, list(flat.values()), create_graph=True)
        s = sum((a * b).sum() for a, b in zip(g, flatten(along).values(), strict=True))
        return unflatten(dict(zip(flat, torch.autograd.grad(s, list(flat.values())), strict=True)))

    rtol = 1e-5 if "input_ids" in batch else 1e-9
    assert_same(grad(directional)(params), want, rtol)
    assert_same(jvp(lambda p: grad(loss)(p, batch), (params,), (along,))[1], want, rtol)
    assert_same(twice(params), want, rtol)
    assert_same(jvp(lambda p: loss(p, batch), (params,), (along,))[1], directional(params), rtol)


@pytest.mark.parametrize("names", [("quantize_int8",), ("fake_quant",), ("mixed_precision",)])
def test_single_transforms_have_the_values_of_the_formula(subject, names, assert_same) -> None:
    loss, params = subject.apply(*names)
    want, _ = subject.reference(*names)(subject_params(subject, names), subject.batches[0])
    assert_same(loss(params, subject.batches[0]).double(), want, 3e-6)


def test_transforms_change_no_params_and_leave_the_forward_alone(subject: Subject) -> None:
    before = {path: t.clone() for path, t in flatten(subject.params).items()}
    rules = subject.bare.rules
    for a, b in PAIRS:
        loss, params = subject.apply(a, b)
        value_and_grad(loss)(params, subject.batches[0])
    assert subject.bare.rules is rules
    for path, t in flatten(subject.params).items():
        assert torch.equal(t, before[path])
        assert not t.requires_grad


def test_prepared_params_are_smaller(subject: Subject) -> None:
    _, params = subject.apply("quantize_int8")
    assert num_bytes(params) < num_bytes(subject.params) / 2  # fp64 to int8, tiny rows
