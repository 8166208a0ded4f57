"""Activation checkpointing: keeps a block's inputs, and recomputes the block in backward.

"Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174. Policies that
keep more: "Reducing Activation Recomputation in Large Transformer Models",
https://arxiv.org/abs/2205.05198.

Plain autograd and ``torch.compile`` use the non-reentrant ``torch.utils.checkpoint``, whose tags
the compiler's partitioner honours. ``torch.func`` transforms use ``transforms.recompute``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from core.forward import Forward, Rule
from core.sites import SiteInfo
from kernels.runtime.autograd import nested_forward_mode
from kernels.runtime.operators import kind_of
from transforms.kept import Keep, contexts, operation
from transforms.legal import check_legal
from transforms.offload import offloaded
from transforms.recompute import functional, unchanging

Policy = str | Sequence[str] | Keep

# PyTorch's operations; the library's own are registered with their kind (`kind_of`)
MATMULS = {"aten.mm", "aten.addmm", "aten._int_mm", "aten._scaled_mm"}
ATTENTIONS = {
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._flash_attention_forward",
}


def _is_matmul(name: str) -> bool:
    """A product with a weight. Batched ones (bmm) are plain attention's: they would keep
    ``[H, T, T]``."""
    return name in MATMULS or kind_of(name) == "matmul"


def _is_attention(name: str) -> bool:
    """Flash attention: slow to recompute, with small outputs and statistics."""
    return name in ATTENTIONS or kind_of(name) == "attention"


POLICIES: dict[str, Keep | None] = {
    "nothing": None,
    "dots": _is_matmul,
    "attention": _is_attention,
    "offload": None,
}


def checkpoint(
    forward: Forward,
    *,
    every: int = 1,
    policy: Policy = "nothing",
    between: Policy | None = None,
) -> Forward:
    """Recomputes blocks in the backward pass instead of keeping their activations.

    Works under autograd, ``torch.func.grad / vjp / vmap / jvp``, nested, and
    ``torch.compile(loss)``. Gradients equal those of the bare forward, bit for bit if the kernels
    are deterministic.

    Args:
        forward: with blocks.
        every: recompute every k-th block.
        policy: what to keep of a block beside its inputs: "nothing"; "dots", the outputs of matrix
            products with a weight; "attention", the outputs and statistics of flash attention;
            both, ``("dots", "attention")``; or a function of an operation's name (``aten.mm``) that
            says whether to keep its outputs. "offload" keeps nothing, and moves the inputs to
            pinned host memory (eager autograd on a GPU).
        between: the policy of the other blocks; None: they keep everything.

    Raises ValueError if ``every`` is not positive, the policy is unknown, or the forward has no
    blocks; RuntimeError for a block that changes a tensor argument in place. Under ``torch.func``
    and with "offload", gradients pass only through a block's arguments and result: a differentiated
    tensor that the block captures by closure, or hands on by an attribute or a mutable argument,
    raises RuntimeError.
    """
    if every < 1:
        raise ValueError(f"every must be 1 or more, not {every}")
    check_legal(forward, "checkpoint")
    native = not any(site.foreign for site in forward.sites)

    def chosen(site: SiteInfo) -> bool:
        index = site.path.rpartition(".")[2]
        return not index.isdigit() or int(index) % every == 0

    def with_policy(forward: Forward, policy: Policy, chosen: Callable[..., bool]) -> Forward:
        # made here: Dynamo (2.11) refuses functions made while it traces
        keep = keeper(policy)
        ready: Policy = policy if keep is None else keep

        def wrap(f: Callable[..., Any], path: str) -> Callable[..., Any]:
            return rematerialize(f, ready, to_the_end=native, name=f"the block {path}")

        forward = forward.with_rule(Rule("block", wrap, chosen, "checkpoint", "recompute"))
        again = keep is None or not keep("aten.mm")
        return _computed_again(forward, chosen) if again else forward

    out = with_policy(forward, policy, chosen)
    if between is not None and every > 1:
        out = with_policy(out, between, lambda site: not chosen(site))
    return out.with_step("checkpoint")


def _computed_again(forward: Forward, chosen: Callable[[SiteInfo], bool]) -> Forward:
    """Compiled MLPs of recomputed blocks save no intermediates: their backward may recompute gate
    and up for some rows at a time, at no cost."""
    blocks = tuple(f"{site.path}." for site in forward.select(("block",), chosen))

    def mlps(site: SiteInfo) -> bool:
        return site.path.startswith(blocks) and any(kind == "glu" for kind, _ in site.members)

    def wrap(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        return lambda *args: f(*args, keep=not torch.compiler.is_compiling())

    if not forward.select(("group",), mlps):
        return forward
    return forward.with_rule(Rule("group", wrap, mlps, "checkpoint", "recompute"))


def keeper(policy: Policy) -> Keep | None:
    """A policy as a function of an operation's name: whether to keep its outputs. None: keep none.

    >>> keeper(("dots", "attention"))("aten.mm"), keeper("attention")("aten.mm"), keeper("nothing")
    (True, False, None)
    """
    if callable(policy):
        return policy
    names = (policy,) if isinstance(policy, str) else tuple(policy)
    for name in names:
        if name not in POLICIES:
            raise ValueError(f"no policy {name!r}: there are {', '.join(POLICIES)}")
    if len(names) > 1 and not {"dots", "attention"}.issuperset(names):
        raise ValueError(f"only dots and attention go together, not {' and '.join(names)}")
    keeps = [keep for keep in map(POLICIES.get, names) if keep is not None]
    return (lambda op: any(keep(op) for keep in keeps)) if keeps else None


@contextmanager
def naming_what_differs() -> Iterator[None]:
    """Wraps a backward pass, and explains PyTorch's error for a block whose second run differs."""
    try:
        yield
    except CheckpointError as error:
        raise RuntimeError(
            "a block that checkpoint recomputes in backward gives other tensors there: a module in "
            "it keeps a state from call to call, such as a cache (Hugging Face: use_cache=False, "
            "in call= or in the config). Switch the state off, or leave checkpoint out "
            f"({str(error).splitlines()[0]})"
        ) from error


def rematerialize(
    f: Callable[..., Any],
    policy: Policy = "nothing",
    *,
    to_the_end: bool = False,
    name: str = "a function",
) -> Callable[..., Any]:
    """``f`` with the same value and gradients, but only its arguments are kept for backward.

    Every differentiated tensor must be an argument (in any nesting of dicts, lists and tuples), not
    captured by closure. The second run draws the same random numbers.

    Args:
        f: any function of tensors.
        policy: as in :func:`checkpoint`.
        to_the_end: under eager autograd, run all of ``f`` again. Otherwise PyTorch stops by an
            exception after the last tensor that backward needs. Inside an autograd Function that
            keeps its own output (a native block's MLP) the exception leaves a reference cycle,
            which holds the block's tensors until the next garbage collection.
        name: of ``f``, in errors.
    """
    keep = keeper(policy)
    offload = policy == "offload"

    def run(*args: Any, **kwargs: Any) -> Any:
        functorch = torch._C._are_functorch_transforms_active()
        compiling = torch.compiler.is_compiling()
        if compiling and functorch:
            raise RuntimeError(
                "torch.compile(torch.func.grad(...)) with checkpoint is not supported by PyTorch: "
                "use transforms.value_and_grad(torch.compile(loss_fn))"
            )
        if offload and (compiling or functorch):
            raise RuntimeError(
                "policy='offload' is for eager autograd: hooks move saved tensors, which "
                f"{'torch.compile' if compiling else 'torch.func'} does not take; "
                "use policy='nothing'"
            )
        if functorch and nested_forward_mode():
            return f(*args, **kwargs)  # forward mode keeps no activations
        if functorch:
            return functional(f, keep, name)(*args, **kwargs)
        if offload:
            return offloaded(functional(f, name=name))(*args, **kwargs)
        inner = f if to_the_end or compiling else unchanging(f, name)
        again = partial(torch_checkpoint, inner, use_reentrant=False)
        if keep is not None:
            tagged = partial(create_selective_checkpoint_contexts, partial(_decide, keep))
            # the compiler's partitioner reads PyTorch's own tags
            again = partial(again, context_fn=tagged if compiling else partial(contexts, keep))
        if compiling or not to_the_end:
            return again(*args, **kwargs)
        with set_checkpoint_early_stop(False):
            return again(*args, **kwargs)

    return run


def _decide(keep: Keep, _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    named = isinstance(op, torch._ops.OpOverload)
    kept = named and keep(operation(op))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
