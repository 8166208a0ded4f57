"""Cases: cross-entropy of given logits, and together with the output head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runners.benchmarks.elementwise import liger, mine, peer
from runners.benchmarks.harness import Case
from runners.benchmarks.providers import Forward, Inputs, Provider, ours, torch_and_compiled

BUDGET = 256 * 2**20  # bytes of logits at a time, where a provider can be told


def cases() -> list[Case]:
    return [
        *(cross_entropy(16384, vocab) for vocab in (75968, 32768, 131072)),
        linear_cross_entropy(16384, 2048, 131072),
        linear_cross_entropy(16384, 1536, 50304),
    ]


def _of(*names: str) -> Any:
    """A function of these inputs as a forward."""

    def bind(function: Any, **options: Any) -> Forward:
        return lambda i: function(*(i[name] for name in names), **options)

    return bind


def cross_entropy(n: int, vocab: int) -> Case:
    """Logits are read twice and the gradient is written once, unless someone knows better."""
    call = _of("logits", "labels")

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        kind: Any = {"generator": generator, "device": device}
        logits = torch.randn(n, vocab, dtype=torch.bfloat16, **kind)
        return {"logits": logits.requires_grad_(), "labels": torch.randint(vocab, (n,), **kind)}

    def quack(**options: Any) -> Forward:
        from quack import cross_entropy

        return call(cross_entropy, **options)

    in_place = Provider("quack, in place", lambda s: quack(inplace_backward=True), peer="quack")
    providers = (
        *torch_and_compiled(lambda i: F.cross_entropy(i["logits"].float(), i["labels"])),
        mine(lambda: call(ours("cross_entropy"))),
        Provider("ours, in place", _in_place, direct=True),
        peer("Liger", lambda: call(liger("cross_entropy"))),
        peer("quack", quack),
        in_place,
    )
    return Case(
        "cross_entropy",
        f"N={n} V={vocab}",
        3.0 * n * vocab * 2,
        "copy",
        inputs,
        providers,
        wrt=("logits",),
        restore=("logits",),
    )


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


def linear_cross_entropy(n: int, dim: int, vocab: int) -> Case:
    """Three matmuls of 2 N D V operations: logits, and the gradients of hidden and unembedding."""
    call = _of("hidden", "unembed", "labels")

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

    def own(name: str, **options: Any) -> Provider:
        return mine(lambda: call(ours("linear_cross_entropy", *options), **options), name)

    def cut() -> Forward:
        from cut_cross_entropy import linear_cross_entropy as cut

        return call(cut)

    def quack() -> Forward:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as chunked

        return call(chunked)

    providers = (
        *torch_and_compiled(eager),
        own("ours"),
        own("ours, bf16 sum", accumulate="bf16"),
        own("ours, 1 GiB", memory=2**30),
        own("ours, 256 MiB", memory=BUDGET),
        own("ours, 256 MiB, bf16 sum", memory=BUDGET, accumulate="bf16"),
        peer("Liger", lambda: call(liger("fused_linear_cross_entropy"))),
        peer("cut-cross-entropy", cut),
        peer("quack", quack),
    )
    return Case(
        "linear_cross_entropy",
        f"N={n} D={dim} V={vocab}",
        6.0 * n * dim * vocab,
        "bf16",
        inputs,
        providers,
        wrt=("hidden", "unembed"),
    )
