"""Columns of several transforms at once, in several orders, and of the drivers of torch.func."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch.func import grad, jvp, vmap

from core import Forward
from params.tree import Tree, flatten, map_leaves, merge
from tests.foreign.bench import ALPHA, RANK, Bench, NothingThereError, adapted, shaken
from tests.foreign.columns import as_int8, blocks, chained
from tests.foreign.oracle import Named, compare_grads
from transforms import (
    checkpoint,
    fake_quant,
    fuse_kernels,
    fuse_loss,
    lora,
    trainable,
    value_and_grad,
)

STEPS: dict[str, Callable[[Forward], Forward]] = {
    "fuse_kernels": fuse_kernels,
    "checkpoint": checkpoint,
    "fake_quant": lambda f: fake_quant(f, skip=()),
    "lora": lambda f: lora(f, rank=RANK, alpha=ALPHA),
    "fuse_loss": fuse_loss,
}


def steps(bench: Bench) -> list[str]:
    """Which of the steps there is something for."""
    forward, _ = bench.forward()
    kinds = {s.kind for s in forward.sites}
    known = any(s.kind == "norm" and s.norm is not None for s in forward.sites)
    return [
        *(["fuse_kernels"] if known else []),
        *(["checkpoint"] if "block" in kinds else []),
        *(["fake_quant"] if kinds & {"linear", "embed", "head"} else []),
        *(["lora"] if "linear" in kinds else []),
        *(["fuse_loss"] if bench.labelled and "head" in kinds else []),
    ]


def composed(bench: Bench, order: list[str]) -> tuple[Forward, Tree, bool, dict[str, Any]]:
    """A chain, its params, whether it ends in a loss, and what the oracle is to hold."""
    forward, params = bench.forward()
    for name in order:
        forward = STEPS[name](forward)
    ready = shaken(forward.prepare(params))
    weights = as_int8(bench, params) if "fake_quant" in order else {}
    key = " ".join(sorted({"fake_quant", "lora"} & set(order))) or "plain"
    return (
        forward,
        ready,
        "fuse_loss" in order,
        {"key": key, "weights": adapted(bench, ready, weights)},
    )


def long(bench: Bench) -> None:
    """All of it at once."""
    names = steps(bench)
    if len(names) < 2:
        raise NothingThereError
    forward, ready, finished, of = composed(bench, names)
    bench.check(forward, ready, finished=finished, **of)


def orders(bench: Bench) -> None:
    """The same in other orders."""
    names = steps(bench)
    if len(names) < 2:
        raise NothingThereError
    every = [list(o) for o in itertools.permutations(names)]
    for order in random.Random(0).sample(every, min(3, len(every))):
        forward, ready, finished, of = composed(bench, order)
        bench.check(forward, ready, finished=finished, **of)


def other_attention(bench: Bench) -> None:
    """Attention (and experts) as plain arithmetic."""
    if not bench.family.other_attention:
        raise NothingThereError
    forward, params = bench.forward(attn="eager")
    bench.check(forward, params, attn="eager")
    for f in chained(forward):
        bench.check(f, params, attn="eager")


# -- drivers --------------------------------------------------------------------------------------


def drive(bench: Bench, run: Callable[[Any, Tree, Named, Named | None], None]) -> None:
    """A driver over two chains: checkpoint alone, and all steps at once."""
    forward, params = bench.forward()
    want = bench.oracle.result()
    f = checkpoint(forward) if blocks(forward) else forward
    run(bench.loss(f), params, want.grads, None)


def by_grad(bench: Bench) -> None:
    noise = bench.oracle.noise().grads

    def run(loss: Any, params: Tree, want: Named, _: Any) -> None:
        free, frozen = trainable(params)
        got = grad(lambda p: loss(merge(p, frozen), bench.batch()))(free)
        compare_grads(flatten(got), want, noise)

    drive(bench, run)
    names = steps(bench)
    if len(names) > 1:
        forward, ready, finished, of = composed(bench, names)
        want = bench.oracle.result(of["key"], of["weights"])
        free, frozen = trainable(ready)
        loss = bench.loss(forward, finished)
        got = grad(lambda p: loss(merge(p, frozen), bench.batch()))(free)
        compare_grads(flatten(got), bench.wanted(ready, want), noise)


def by_vmap(bench: Bench) -> None:
    noise = bench.oracle.noise().grads
    forward, params = bench.forward()
    f = checkpoint(forward) if blocks(forward) else forward
    free, frozen = trainable(params)
    loss = bench.loss(f)
    got = vmap(grad(lambda p, b: loss(merge(p, frozen), b)), (None, 0))(
        free, bench.oracle.stacked()
    )
    for seed in (0, 1):
        want = bench.oracle.result(seed=seed).grads
        compare_grads({n: g[seed] for n, g in flatten(got).items()}, want, noise)


def by_hvp(bench: Bench) -> None:
    attn = "eager" if bench.family.other_attention else None  # torch's own has no jvp
    forward, params = bench.forward(attn=attn)
    f = checkpoint(forward) if blocks(forward) else forward
    free, frozen = trainable(params)
    loss, batch = bench.loss(f), bench.batch()
    along = map_leaves(torch.cos, free)
    got = jvp(lambda p: grad(lambda q: loss(merge(q, frozen), batch))(p), (free,), (along,))[1]
    want = bench.oracle.hvp(attn)
    rough = bench.oracle.known["hvp error"]
    scale = 1e-5 if bench.dtype == torch.float64 else 1e-3
    compare_grads(flatten(got), want, dict.fromkeys(want, 0.0), min(scale * rough, 2e-2), "Hv of")


# Seconds each: one of every kind of model.
COMPILED = (
    "Llama",
    "Qwen3",
    "Gemma2",
    "GPT-2",
    "Falcon",
    "Mixtral",
    "gpt-oss",
    "Mamba2",
    "Bamba",
    "BERT",
    "ModernBERT",
    "T5",
    "BART",
    "Whisper",
    "ViT",
    "Swin",
    "ResNet",
    "SigLIP vision",
    "nn.TransformerEncoder",
    "nn.MultiheadAttention",
    "MLP in lists",
    "lists of lists",
    "gated MLPs",
    "shared weights",
    "weights read by hand",
    "convolutions with BatchNorm",
    "DiT",
)


def by_compile(bench: Bench) -> None:
    if bench.family.name not in COMPILED:
        raise NothingThereError
    forward, params = bench.forward()
    f = checkpoint(forward) if blocks(forward) else forward
    torch._dynamo.reset()
    loss = torch.compile(bench.loss(f), backend="aot_eager")
    _, grads = value_and_grad(loss)(params, bench.batch())
    compare_grads(flatten(grads), bench.oracle.result().grads, bench.oracle.noise().grads)
