"""int8 weights with one scale per output channel, and quantisation-aware training for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernels
from core.forward import Forward, Rule
from core.model.layers import Logits
from core.sites import WEIGHTED, SiteInfo
from kernels.runtime.autograd import nested_forward_mode
from kernels.runtime.dynamo import allow_in_graph, check_hidden
from params.formats import INT8, Format, beside, dtype_of
from params.int8 import dequantize_weight, quantize_weight
from params.tree import Tree, flatten, unflatten
from transforms.legal import check_legal

ACTIVATIONS = (None, "dynamic")


def quantize_int8(
    forward: Forward, *, skip: Sequence[str] | None = None, activations: str | None = None
) -> Forward:
    """Runs linears, embeddings and the head on int8 weights, which ``prepare`` makes.

    ``weight [O, I]`` becomes ``weight_int8 [O, I]``, ``weight_scale [O, 1]`` in fp32, symmetric per
    output channel, and the empty ``weight_dtype``, whose dtype is the weight's. The ``[I, O]``
    weight of a transposed site is transposed first. A matrix that a foreign module's own code reads
    (also experts ``[E, O, I]``) is stored likewise, and dequantised where that code runs. Quantised
    weights are frozen; gradients flow to inputs, biases and adapters (QLoRA-style).

    Args:
        forward: any Forward.
        skip: path patterns of sites to leave out (``lm_head``, ``vision``, ``blocks.0``,
            ``blocks.-1``). Default: the head, if there is one. Skipping a tied head keeps the
            embedding too.
        activations: None, or "dynamic" for int8 x int8 matmuls with a scale per row of the input.

    Raises ValueError if a pattern matches nothing, or nothing is left to quantise.
    """
    check_legal(forward, "quantize_int8")
    product = partial(kernels.int8_linear, activations=activations)
    paths = targets(forward, skip, activations)
    return quantize(forward, paths, INT8, product).with_step("quantize_int8")


def quantize(
    forward: Forward, paths: frozenset[str], format: Format, product: Callable[..., Tensor]
) -> Forward:
    """Runs the weights at these paths in a format; ``prepare`` makes its leaves.

    product: ``(x, *leaves, bias) -> y``.
    """
    turned = {site.weight for site in forward.sites if site.transposed}

    def prepare(params: Tree, seed: int) -> Tree:
        flat = flatten(params)
        for path in sorted(paths):
            weight = flat.pop(path, None)
            if weight is None:
                raise ValueError(f"params have no leaf {path} to quantise")
            stored = format.store(weight.t().contiguous() if path in turned else weight)
            flat |= {beside(path, name): leaf for name, leaf in stored.items()}
        return unflatten(flat)

    out = _with_rules(forward, paths, _wraps(format, product), f"quantize_{format.name}")
    return replace(out, preparations=(*out.preparations, prepare))


def fake_quant(
    forward: Forward, *, skip: Sequence[str] | None = None, activations: str | None = None
) -> Forward:
    """Quantisation-aware training: float weights, rounded as :func:`quantize_int8` rounds them.

    Weights (and inputs, with "dynamic") are rounded in the forward pass; gradients pass straight
    through the rounding (https://arxiv.org/abs/1308.3432). Arguments and errors are those of
    :func:`quantize_int8`.
    """
    check_legal(forward, "fake_quant")
    paths = targets(forward, skip, activations)
    in_group = _round_weight if activations is None else None
    out = _with_rules(forward, paths, _fake_wraps(activations), "fake_quant", in_group)
    return out.with_step("fake_quant")


def targets(
    forward: Forward, skip: Sequence[str] | None, activations: str | None
) -> frozenset[str]:
    """Paths of the weights to quantise, without the weights of skipped sites (a tied head)."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations is None or 'dynamic', not {activations!r}")
    if skip is None:
        skip = ("lm_head",) if forward.select(("head",)) else ()
    skipped = {site.weight for site in forward.select(WEIGHTED, skip)}
    paths = frozenset(site.weight for site in forward.select(WEIGHTED)) - skipped
    if not paths:
        raise ValueError(f"skip={tuple(skip)} leaves nothing to quantise")
    layouts = {(site.weight, site.transposed) for site in forward.select(WEIGHTED)}
    if both := sorted(path for path in paths if {(path, True), (path, False)} <= layouts):
        raise ValueError(f"{both[0]} is used both as it is and transposed: skip it")
    return paths


def _with_rules(
    forward: Forward,
    paths: frozenset[str],
    wraps: dict[str, Any],
    name: str,
    in_group: Callable[[Tree, str], tuple[Tree, None]] | None = None,
) -> Forward:
    def chosen(site: SiteInfo) -> bool:
        return site.weight in paths

    for kind, wrap in wraps.items():
        rule = Rule(kind, wrap, chosen, name, "quantise", in_group)
        if any(True for site in forward.sites for _ in rule.keys(site)):
            forward = forward.with_rule(rule)
    return forward


# -- quantised ----------------------------------------------------------------------------------


def _wraps(format: Format, product: Callable[..., Tensor]) -> dict[str, Any]:
    def project(p: Tree, x: Tensor) -> Tensor:
        return product(x, *format.tensors(p), p.get("bias"))

    def linear(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        return project

    def embed(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def gather(p: Tree, ids: Tensor) -> Tensor:
            rows = (leaf[ids] for leaf in format.tensors(p))
            return format.dequantize(*rows, dtype_of(p))

        return gather

    def head(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def lazy(p: Tree, x: Tensor) -> Logits:
            return replace(f(p, x), project=project, weight_from=format.load)

        return lazy

    def read(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def dequantized(p: Tree) -> Tensor:
            return format.load(p, dtype_of(p))

        return dequantized

    return {"linear": linear, "embed": embed, "head": head, "weight": read}


# -- fake -----------------------------------------------------------------------------------------


def _fake_wraps(activations: str | None) -> dict[str, Any]:
    def weights(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def rounded(p: Tree, *x: Tensor) -> Any:
            return f({**p, "weight": straight_through(p["weight"])}, *x)

        return rounded

    def both(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def rounded(p: Tree, x: Tensor) -> Any:
            return f({**p, "weight": straight_through(p["weight"])}, straight_through(x))

        return rounded

    inner = both if activations == "dynamic" else weights
    return {"linear": inner, "embed": weights, "head": inner, "weight": weights}


def _round_weight(p: Tree, path: str = "") -> tuple[Tree, None]:
    return {**p, "weight": straight_through(p["weight"])}, None


def straight_through(w: Tensor) -> Tensor:
    """Rounds the rows of ``w [..., I]`` to int8 and back; its gradient is the identity."""
    return _rounded(w)


def _round_trip(w: Tensor) -> Tensor:
    q, scale = quantize_weight(w.flatten(0, -2))
    return dequantize_weight(q, scale, w.dtype).view_as(w)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(w: Tensor) -> Tensor:
        return _round_trip(w)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: Any, w: Tensor) -> Any:
        return _rounded(w.movedim(in_dims[0], 0)), 0


# Without allow_in_graph, compile(func.grad(f)) silently differentiates the rounding itself
# (gradient 0).
@allow_in_graph
def _rounded(w: Tensor) -> Tensor:
    check_hidden()
    if nested_forward_mode():  # here a Function's jvp would drop the outer tangent
        return _round_trip(w.detach()) + (w - w.detach())
    return _StraightThrough.apply(w)
