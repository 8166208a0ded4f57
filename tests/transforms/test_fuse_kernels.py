"""fuse_kernels: the module's numbers from other kernels, inside whatever else is applied."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

import kernels
from core import Forward, Rule, from_module, vlm
from params.tree import Tree, map_leaves, merge
from tests.models import language
from tests.rounding import FP32
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
from transforms.fuse_kernels import fuse_kernels

pytest.importorskip("transformers")

SDPA = {"attn_implementation": "sdpa"}
OPTIONS = {"Gemma2": {"final_logit_softcapping": None, "attn_implementation": "eager"}}
MAKES = ["Llama", "Qwen3", "Gemma2", "GPT2"]


def subject(name: str) -> tuple[Forward, Tree, dict[str, Tensor]]:
    forward, params = from_module(language(name, **OPTIONS.get(name, SDPA)))
    params = map_leaves(lambda t: t + 0.1 * torch.randn_like(t), params)
    ids = torch.randint(3, 40, (2, 7))
    return forward, params, {"input_ids": ids, "labels": ids.roll(-1, 1)}


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which kernels have been called."""
    record: list[str] = []
    for name in ("rms_norm", "layer_norm", "attention", "rope"):
        f = getattr(kernels, name)
        spy = lambda *args, n=name, f=f, **kw: record.append(n) or f(*args, **kw)  # noqa: E731
        monkeypatch.setattr(kernels, name, spy)
    table = sys.modules[fuse_kernels.__module__].GLUS  # the function has the name of its file
    for key, f in list(table.items()):
        spy = lambda gate, up, n=f.__name__, f=f: record.append(n) or f(gate, up)  # noqa: E731
        monkeypatch.setitem(table, key, spy)
    return record


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Llama", {"rms_norm": 5, "swiglu": 2, "attention": 2, "rope": 2}),
        ("Qwen3", {"rms_norm": 9, "swiglu": 2, "attention": 2, "rope": 2}),
        ("Gemma2", {"rms_norm": 9, "geglu": 2, "rope": 2}),
        ("GPT2", {"layer_norm": 5, "attention": 2}),
    ],
)
def test_numbers_are_the_modules(name: str, count, calls, assert_same) -> None:
    forward, params, batch = subject(name)
    fused = fuse_kernels(forward)
    want, want_grads = value_and_grad(unfused_loss(forward))(params, batch)
    assert calls == []
    value, grads = value_and_grad(unfused_loss(fused))(params, batch)
    assert {n: calls.count(n) for n in set(calls)} == count
    assert_same(value, want)
    assert_same(grads, want_grads)
    assert_same(grad(unfused_loss(fused))(params, batch), want_grads)
    assert_same(fused(params, batch), forward(params, batch))
    assert fused.applied == ("fuse_kernels",)


STEPS: dict[str, Any] = {
    "checkpoint": checkpoint,
    "fuse_loss": fuse_loss,
    "mixed_precision": lambda f: mixed_precision(f, torch.float64),
    "fake_quant": fake_quant,
    "quantize_int8": quantize_int8,
}
# all of them in every order on Llama: table.py
CHAINS = [
    ("mixed_precision", "fuse_kernels", "fuse_loss"),
    ("fuse_kernels", "fake_quant", "checkpoint", "fuse_loss"),
    ("quantize_int8", "checkpoint", "fuse_kernels", "fuse_loss"),
]


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
@pytest.mark.parametrize("name", ["Gemma2", "GPT2"])
def test_it_composes_in_any_order(name: str, chain, assert_same) -> None:
    bare, params, batch = subject(name)
    losses, preparations = [], []
    for steps in (chain, [step for step in chain if step != "fuse_kernels"]):
        forward = bare
        for step in steps:
            forward = fuse_kernels(forward) if step == "fuse_kernels" else STEPS[step](forward)
        losses.append(forward)
        preparations.append(forward.prepare(params))
    got, want = (value_and_grad(f)(p, batch) for f, p in zip(losses, preparations, strict=True))
    assert_same(got[0], want[0], dtype=torch.float32)  # norms compute in it
    assert_same(got[1], want[1])
    free, frozen = trainable(preparations[0])
    inner = lambda p, b: losses[0](merge(p, frozen), b)  # noqa: E731
    assert_same(grad(inner)(free, batch), want[1])
    stacked = {k: v[:, None] for k, v in batch.items()}
    each = vmap(grad(inner), (None, 0))(free, stacked)
    total = map_leaves(lambda g: g.mean(0), each)
    assert_same(total, want[1])


def test_rules_of_others_stay_around_it(calls) -> None:
    forward, params, batch = subject("Llama")
    double = Rule("glu", lambda f, path: lambda p, g, u: 2 * f(p, g, u))
    before, after = fuse_kernels(forward.with_rule(double)), fuse_kernels(forward).with_rule(double)
    want = forward.with_rule(double)(params, batch)
    for fused in (before, after):
        calls.clear()
        torch.testing.assert_close(fused(params, batch), want, rtol=FP32, atol=FP32)
        assert calls.count("swiglu") == 2


def test_skip_names_sites(calls) -> None:
    forward, params, batch = subject("Llama")
    fuse_kernels(forward, skip=("layers.0", "model.norm"))(params, batch)
    assert sorted(calls) == ["attention", "rms_norm", "rms_norm", "rope", "swiglu"]
    with pytest.raises(ValueError, match="'nrom' matches nothing"):
        fuse_kernels(forward, skip=("nrom",))


class Odd(nn.Module):
    """One norm whose eps is in its code alone, and a gate that no kernel computes."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + 0.0123).rsqrt() * self.g

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.gelu(self.a(x)) * self.b(x))

    def __init__(self, known: bool) -> None:
        super().__init__()
        self.norm, self.mlp = Odd.Norm(), Odd.Mlp()
        self.last = nn.LayerNorm(8) if known else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mlp(self.norm(x)))


def test_what_it_does_not_know_is_left_and_named(assert_same) -> None:
    x = {"x": torch.randn(3, 8)}
    module = Odd(known=True)
    forward, params = from_module(module)
    with pytest.warns(UserWarning, match="leaves as they are: glu mlp, norm norm$"):
        fused = fuse_kernels(forward)
    assert_same(fused(params, x), module(**x).detach())
    fuse_kernels(forward, skip=("mlp", "norm"))  # no warning
    with pytest.warns(UserWarning, match="leaves as they are: glu mlp, norm norm$"):
        fuse_kernels(from_module(Odd(known=False))[0])  # nothing but what it does not know
    with pytest.raises(ValueError, match=r"no norm, glu, .* to fuse, among: linear 0"):
        fuse_kernels(from_module(nn.Sequential(nn.Linear(2, 2)))[0])


class Attention(nn.Module):
    """Attention with the options of a call."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm, self.options = nn.LayerNorm(8), options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.norm(q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


@pytest.mark.parametrize(
    ("options", "keys", "ours"),
    [
        ({}, (2, 2, 5, 8), True),
        ({"is_causal": True, "scale": 0.3}, (2, 2, 5, 8), True),
        ({"is_causal": True, "enable_gqa": True}, (2, 1, 5, 8), True),
        ({}, (2, 2, 7, 8), False),
        ({}, (1, 2, 5, 8), False),
        ({"dropout_p": 0.5}, (2, 2, 5, 8), False),
    ],
)
def test_attention_that_the_kernel_serves(options, keys, ours, calls, assert_same) -> None:
    module = Attention(**options)
    batch = {"q": torch.randn(2, 2, 5, 8), "k": torch.randn(keys), "v": torch.randn(keys)}
    forward, params = from_module(module)
    fused = fuse_kernels(forward)
    torch.manual_seed(0)
    want = module(**batch).detach()
    torch.manual_seed(0)
    assert_same(fused(params, batch).detach(), want)
    assert ("attention" in calls) == ours
    calls.clear()
    mask = torch.ones(5, keys[2], dtype=torch.bool).tril()
    if not options.get("is_causal"):  # torch refuses both
        fused(params, batch | {"mask": mask})
        assert "attention" not in calls


def test_native_forwards_call_kernels_anyway(micro, rough, example) -> None:
    config = micro["mlp"]
    forward, params, batch = vlm(config), rough(config), example(config)
    fused = fuse_kernels(forward)
    assert fused.applied == ("fuse_kernels",)
    assert fused.rules == ()
    assert torch.equal(fused(params, batch), forward(params, batch))


@pytest.mark.parametrize("name", MAKES)
def test_bf16_is_no_further_from_the_truth_than_the_module(name: str) -> None:
    errors = torch.zeros(2)
    for seed in range(8):
        torch.manual_seed(seed)
        forward, params, batch = subject(name)
        low = map_leaves(Tensor.bfloat16, params)
        truth = forward(map_leaves(Tensor.float, low), batch)
        outs = [f(low, batch) for f in (fuse_kernels(forward), forward)]
        assert outs[0].dtype == outs[1].dtype == torch.bfloat16
        errors += torch.stack([(out.float() - truth).square().mean() for out in outs])
    # The ratio of one batch is within a factor of 2.5, about two standard deviations of its
    # logarithm, so that of the sum of eight has one of log(2.5) / 2 / sqrt(8) = 0.16.
    assert errors[0] < math.exp(4 * 0.16) * errors[1]
