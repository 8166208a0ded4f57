"""Cases: cross-entropy of given logits, and together with the output head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runners.benchmarks.harness import Case
from runners.benchmarks.providers import (
    Forward,
    Inputs,
    Provider,
    ours,
    torch_and_compiled,
)

BUDGET = 256 * 2**20  # bytes of logits at a time, where a provider can be told


def cases() -> list[Case]:
    return [
        *(cross_entropy(16384, vocab) for vocab in (75968, 32768, 131072)),
        linear_cross_entropy(16384, 2048, 131072),
        linear_cross_entropy(16384, 1536, 50304),
    ]


def cross_entropy(n: int, vocab: int) -> Case:
    """Logits are read twice and the gradient is written once, unless someone knows better."""

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        kind: Any = {"generator": generator, "device": device}
        logits = torch.randn(n, vocab, dtype=torch.bfloat16, **kind)
        return {
            "logits": logits.requires_grad_(),
            "labels": torch.randint(vocab, (n,), **kind),
        }

    return Case(
        "cross_entropy",
        f"N={n} V={vocab}",
        3.0 * n * vocab * 2,
        "copy",
        inputs,
        (
            *torch_and_compiled(lambda i: F.cross_entropy(i["logits"].float(), i["labels"])),
            Provider("ours", lambda sets: _of_logits(ours("cross_entropy"))),
            Provider("ours, in place", _in_place, direct=True),
            Provider("Liger", lambda sets: _of_logits(_liger("cross_entropy")), peer="Liger"),
            Provider("quack", lambda sets: _of_logits(_quack()), peer="quack"),
            Provider(
                "quack, in place",
                lambda sets: _of_logits(_quack(), inplace_backward=True),
                peer="quack",
            ),
        ),
        wrt=("logits",),
        restore=("logits",),
    )


def _of_logits(function: Any, **options: Any) -> Forward:
    return lambda i: function(i["logits"], i["labels"], **options)


class _Given(torch.autograd.Function):
    """The values of a tensor as if some operation had just made them, without a pass over them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, values: Tensor) -> Tensor:
        made = values.new_empty(0)
        return made.set_(values.untyped_storage(), 0, values.shape, values.stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(()), None


def _in_place(sets: Sequence[Inputs]) -> Forward:
    """Ours, the gradient written over the logits: which may not be a leaf then, as the logits of a
    model are not."""
    function = ours("cross_entropy", "overwrite")

    def run(i: Inputs) -> tuple[Tensor, ...]:
        anchor = i["logits"].new_zeros((), requires_grad=True)
        logits = _Given.apply(anchor, i["logits"].detach())
        edge = torch.autograd.graph.get_gradient_edge(logits)
        loss = function(logits, i["labels"], overwrite=True)
        return (loss.detach(), *torch.autograd.grad(loss, edge))

    return run


def _liger(name: str) -> Any:
    from liger_kernel.transformers import functional

    return getattr(functional, f"liger_{name}")


def _quack() -> Any:
    from quack import cross_entropy

    return cross_entropy


def linear_cross_entropy(n: int, dim: int, vocab: int) -> Case:
    """Three matmuls of 2 N D V operations: logits, and the gradients of hidden and unembedding."""

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        kind: Any = {"generator": generator, "device": device}
        hidden = torch.randn(n, dim, dtype=torch.bfloat16, **kind)
        unembed = torch.randn(vocab, dim, dtype=torch.bfloat16, **kind) * dim**-0.5
        return {
            "hidden": hidden.requires_grad_(),
            "unembed": unembed.requires_grad_(),
            "labels": torch.randint(vocab, (n,), **kind),
        }

    def eager(i: Inputs) -> Tensor:
        return F.cross_entropy((i["hidden"] @ i["unembed"].t()).float(), i["labels"])

    def mine(**options: Any) -> Any:
        function = "linear_cross_entropy"
        return lambda sets: _of_hidden(ours(function, *options), **options)

    return Case(
        "linear_cross_entropy",
        f"N={n} D={dim} V={vocab}",
        6.0 * n * dim * vocab,
        "bf16",
        inputs,
        (
            *torch_and_compiled(eager),
            Provider("ours", mine()),
            Provider("ours, bf16 sum", mine(accumulate="bf16")),
            Provider("ours, 1 GiB", mine(memory=2**30)),
            Provider("ours, 256 MiB", mine(memory=BUDGET)),
            Provider("ours, 256 MiB, bf16 sum", mine(memory=BUDGET, accumulate="bf16")),
            Provider("Liger", _liger_linear, peer="Liger"),
            Provider("cut-cross-entropy", _cut, peer="cut-cross-entropy"),
            Provider("quack", _quack_linear, peer="quack"),
        ),
        wrt=("hidden", "unembed"),
    )


def _of_hidden(function: Any, **options: Any) -> Forward:
    return lambda i: function(i["hidden"], i["unembed"], i["labels"], **options)


def _liger_linear(sets: Sequence[Inputs]) -> Forward:
    return _of_hidden(_liger("fused_linear_cross_entropy"))


def _cut(sets: Sequence[Inputs]) -> Forward:
    from cut_cross_entropy import linear_cross_entropy as cut

    return _of_hidden(cut)


def _quack_linear(sets: Sequence[Inputs]) -> Forward:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as chunked

    return _of_hidden(chunked)
