"""Linear layers that keep what their input was made from, and make the input again in backward.

`glu_linear` is the end of an MLP, `norm_linears` the start of an MLP or an attention. The GLU's and
the norm's output are each cheap to make and as large as what they are made from; a linear layer
keeps its input for its weight's gradient, and so both would be kept. Here they are not: backward
needs one pass over gate, up or x, which it reads in any case.

Each forward is plain operations: the activation or the norm, and one aten.mm or aten.addmm a
weight, which checkpointing policies and compilers see. Each backward is one operator, because

- what forward computed as well must be hidden: a compiler that sees the same norm twice computes
  it once, and keeps the result, which is what these functions exist to avoid;
- its buffers are its own: the GLU's kernel overwrites the gradient that it reads, and the gradients
  of several linear layers are added up by the matmuls themselves. Among visible operations a
  compiler would have to make copies for both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.linear.linear import bias_gradient, linear_reference, sums_biases
from kernels.mlp import glu_triton
from kernels.mlp.glu import GEGLU, GEGLU_TRITON, SWIGLU, SWIGLU_TRITON
from kernels.norm import rms_norm_triton
from kernels.norm.rms_norm import ADD_RMS_NORM, ADD_RMS_NORM_TRITON, RMS_NORM, RMS_NORM_TRITON
from kernels.runtime.autograd import (
    Dims,
    Op,
    Tensors,
    check_floating,
    fold_all,
    fold_rows,
    rows_of,
    run,
    run_of_sum,
)
from kernels.runtime.dispatch import choose
from kernels.runtime.dynamo import allow_in_graph
from kernels.runtime.operators import empty, operator

Shape = Sequence[int]

# GLU, then a linear layer: y = h W^T + b with h = act(gate) up

_GATED = {
    ("swiglu", False): SWIGLU,
    ("swiglu", True): SWIGLU_TRITON,
    ("geglu", False): GEGLU,
    ("geglu", True): GEGLU_TRITON,
}


def glu_linear_reference(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    triton: bool,
    **_: Any,
) -> Tensor:
    """What `glu_linear` computes; plain torch, differentiable to any order."""
    return linear_reference(_GATED[activation, triton].formula(gate, up), weight, bias)


def _glu_linear_forward(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    triton: bool,
    **_: Any,
) -> tuple[Tensor, tuple[()]]:
    h = _GATED[activation, triton].forward(gate, up)[0]
    return linear_reference(h, weight, bias), ()


def _glu_linear_gradients(
    grad: Tensor,  # [..., O]
    gate: Tensor,  # [..., F]
    up: Tensor,  # [..., F]
    weight: Tensor,  # [O, F]
    activation: str,
    triton: bool,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate, up and weight (empty where not asked for).

    [..., F] is allocated three times: for dh, which becomes the gradient of up, for the gradient of
    gate, and for h, which is gone at the end.
    """
    d_gate, d_up, h = empty(gate), empty(up), None
    if needs_input:
        dh = torch.mm(rows_of(grad), weight).view(gate.shape)
        d_gate, d_up, h = glu_gradients(dh, gate, up, activation, triton, needs_weight)
        del dh
    if not needs_weight:
        return d_gate, d_up, empty(weight)
    if h is None:
        h = glu(gate, up, activation, triton)
    return d_gate, d_up, torch.mm(rows_of(grad).t(), rows_of(h).to(weight.dtype))


def glu(gate: Tensor, up: Tensor, activation: str, triton: bool) -> Tensor:
    """act(gate) * up; nothing is recorded."""
    return _GATED[activation, triton].forward(gate, up)[0]


def glu_gradients(
    grad: Tensor,  # of what the GLU gave; its memory may become a gradient
    gate: Tensor,
    up: Tensor,
    activation: str,
    triton: bool,
    needs_value: bool,  # what the GLU gave as well, where that costs no pass: in Triton
    overwrite: bool = False,  # gate's and up's memory may become those
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of gate and up, and perhaps what the GLU gave."""
    if triton:
        return glu_triton.glu_backward_(grad, gate, up, activation, needs_value, overwrite)
    d_gate, d_up = _GATED[activation, False].backward(grad, (True, True), (gate, up), ())
    assert d_gate is not None
    assert d_up is not None
    return d_gate.to(gate.dtype), d_up.to(up.dtype), None


def _glu_linear_fake(
    gate: Tensor, up: Tensor, weight: Tensor, needs_input: bool, needs_weight: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty(gate, needs_input), empty(up, needs_input), empty(weight, needs_weight)


def _glu_linear_flops(
    gate: Shape, weight: Shape, needs_input: bool, needs_weight: bool, **_: Any
) -> int:
    return 2 * math.prod(gate) * weight[0] * (needs_input + needs_weight)


_glu_linear_op = operator("glu_linear_backward", fake=_glu_linear_fake, flops=_glu_linear_flops)(
    _glu_linear_gradients
)


def _glu_linear_backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    _: tuple[()],
    *,
    activation: str,
    triton: bool,
    sums: bool,
) -> tuple[Tensor | None, ...]:
    gate, up, weight, bias = tensors
    of_gate, of_up, of_weight, of_bias = needs
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if of_gate or of_up or of_weight:
        grads = _glu_linear_op(
            grad, gate, up, weight, activation, triton, of_gate or of_up, of_weight
        )
    d_bias = bias_gradient(grad, bias, sums) if of_bias and bias is not None else None
    return (*(g if need else None for g, need in zip(grads, needs[:3], strict=True)), d_bias)


def _glu_linear_fold(batch_size: int, dims: Dims, tensors: Tensors) -> Tensors | None:
    return fold_rows(2, batch_size, dims, tensors)


def _glu_linear_fold_backward(
    batch_size: int, needs: tuple[bool, ...], dims: Dims, saved: Tensors
) -> Tensors | None:
    """A weight's gradient is one an example, where one call would give their sum."""
    return None if any(needs[2:]) else fold_rows(3, batch_size, dims, saved)


GLU_LINEAR = Op(
    "glu_linear",
    glu_linear_reference,
    _glu_linear_forward,
    _glu_linear_backward,
    fold=_glu_linear_fold,
    fold_backward=_glu_linear_fold_backward,
)


@allow_in_graph
def _apply_glu_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    triton: bool,
    sums: bool,
) -> Tensor:
    return run(GLU_LINEAR, gate, up, weight, bias, activation=activation, triton=triton, sums=sums)


# RMSNorm, then linear layers: y_i = h W_i^T + b_i with h = x r w, r = (mean x^2 + eps)^-1/2
#
# The tensors of the op are x, w, all W_i, all b_i; with one linear layer its output is a tensor,
# with more a tuple of them. The op of a sum gives the sum as well, behind the others.


def _linears(h: Tensor, leaves: Sequence[Any]) -> list[Tensor]:
    count = len(leaves) // 2
    pairs = zip(leaves[:count], leaves[count:], strict=True)
    return [linear_reference(h, weight, bias) for weight, bias in pairs]


def _outputs(outs: list[Tensor]) -> Any:
    return outs[0] if len(outs) == 1 else tuple(outs)


def norm_linears_reference(
    x: Tensor, norm_weight: Tensor, *leaves: Tensor | None, eps: float, triton: bool, **_: Any
) -> Any:
    """What `norm_linears` computes; plain torch, differentiable to any order."""
    return _outputs(_linears(RMS_NORM.formula(x, norm_weight, eps=eps), leaves))


def add_norm_linears_reference(
    total: Tensor, norm_weight: Tensor, *leaves: Tensor | None, eps: float, triton: bool, **_: Any
) -> tuple[Tensor, ...]:
    """What `add_norm_linears` computes of the sum."""
    return (*_linears(RMS_NORM.formula(total, norm_weight, eps=eps), leaves), total)


def _norm_linears_forward(
    x: Tensor, norm_weight: Tensor, *leaves: Tensor | None, eps: float, triton: bool, **_: Any
) -> tuple[Any, tuple[Tensor, ...]]:
    h, (r,) = (RMS_NORM_TRITON if triton else RMS_NORM).forward(x, norm_weight, eps=eps)
    return _outputs(_linears(h, leaves)), (r,)


def _add_norm_linears_forward(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    *leaves: Tensor | None,
    eps: float,
    triton: bool,
    **_: Any,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    h, total, r = add_norm(x, residual, norm_weight, eps, triton)
    return (*_linears(h, leaves), total), (r,)


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x + residual, the sum, and r: the forward of an op of a sum."""
    if residual is None:
        h, (r,) = (RMS_NORM_TRITON if triton else RMS_NORM).forward(x, weight, eps=eps)
        return h, x.view_as(x), r  # a view: PyTorch refuses to keep an input handed on as it is
    norm = ADD_RMS_NORM_TRITON if triton else ADD_RMS_NORM
    (h, total), (r,) = norm.forward(x, residual, weight, eps=eps)
    return h, total, r


def norm_again(x: Tensor, weight: Tensor, eps: float, triton: bool) -> Tensor:
    """What forward's norm gave."""
    if triton:
        return rms_norm_triton.rms_norm_forward(x, None, weight, eps)[0]
    return RMS_NORM.forward(x, weight, eps=eps)[0]


def norm_gradients(
    grad: Tensor,  # [..., D]: of what the norm gave; its memory may become that of x's gradient
    grad_total: Tensor | None,  # [..., D]: to be added to the gradient of x
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    eps: float,
    triton: bool,
    needs_weight: bool,
    needs_value: bool,  # what the norm gave as well, where that costs no pass: in Triton
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x and weight, and perhaps what the norm gave."""
    if triton:
        return rms_norm_triton.rms_norm_backward_(
            grad, grad_total, x, weight, r, needs_weight, needs_value
        )
    needs, tensors = (True, needs_weight), (x, weight)
    if grad_total is None:
        dx, dw = RMS_NORM.backward(grad, needs, tensors, (r,), eps=eps)
    else:
        dx, dw = ADD_RMS_NORM.backward((grad, grad_total), needs, tensors, (r,), eps=eps)
    return dx, dw, None


def _groups(weights: Sequence[Tensor]) -> list[list[int]]:
    """The layers that share a product in backward: neighbours that are narrow.

    On an H200, 16,384 rows of 1,536: with 256 outputs each k and v took 40.6 us for the gradient
    of h and 30 to 37 us for that of the weight, half of the speed of q.
    """
    groups: list[list[int]] = []
    before = False
    for i, weight in enumerate(weights):
        narrow = 2 * weight.shape[0] <= weight.shape[1]
        if narrow and before:
            groups[-1].append(i)
        else:
            groups.append([i])
        before = narrow
    return groups


def _join(tensors: Sequence[Tensor], group: Sequence[int], dim: int) -> Tensor:
    """A copy, unless there is nothing to join."""
    return tensors[group[0]] if len(group) == 1 else torch.cat([tensors[i] for i in group], dim)


def _weight_gradients(
    groups: Sequence[Sequence[int]],
    joined: Sequence[Tensor],  # a group: [rows, the sum of its O_i]
    grads: Sequence[Tensor],  # [rows, O_i]
    h: Tensor,  # [rows, D]
    needs: Sequence[bool],
    out: list[Tensor],
) -> None:
    for group, together in zip(groups, joined, strict=True):
        if len(group) > 1 and all(needs[i] for i in group):
            sizes = [grads[i].shape[1] for i in group]
            parts = torch.mm(together.t(), h).split(sizes)
            for i, part in zip(group, parts, strict=True):
                out[i] = part.clone()  # what an operator gives must not share memory
            continue
        for i in group:
            if needs[i]:
                out[i] = torch.mm(grads[i].t(), h)


def _norm_linears_gradients(
    grads: Sequence[Tensor],  # n times [..., O_i]
    grad_total: Tensor | None,  # [..., D]: to be added to the gradient of x
    x: Tensor,  # [..., D]
    norm_weight: Tensor,  # [D]
    weights: Sequence[Tensor],  # n times [O_i, D]
    r: Tensor,  # [..., 1]
    eps: float,
    triton: bool,
    needs_input: bool,
    needs: Sequence[bool],  # of norm_weight, of the weights
) -> list[Tensor]:
    """The gradients of x, norm_weight and the weights (empty where not asked for).

    Beside the gradients of narrow layers, joined, [..., D] is allocated twice at most. In Triton
    that is the gradient of h, which becomes that of x, and h, which the same kernel writes (more,
    where x and the weights differ in dtype). Else h is made by a forward pass, and gone before the
    norm's backward begins.
    """
    flat, groups = [rows_of(grad) for grad in grads], _groups(weights)
    joined = [_join(flat, group, 1) for group in groups]
    of_weights = [empty(weight) for weight in weights]
    back, forth = needs_input or needs[0], any(needs[1:])

    def learn(h: Tensor) -> None:
        h = rows_of(h).to(weights[0].dtype)
        _weight_gradients(groups, joined, flat, h, needs[1:], of_weights)

    dx: Tensor | None = None
    dw: Tensor | None = None
    if forth and not (back and triton):
        learn(norm_again(x, norm_weight, eps, triton))
    if back:
        dh = torch.mm(joined[0], _join(weights, groups[0], 0))
        for grad, group in zip(joined[1:], groups[1:], strict=True):
            dh.addmm_(grad, _join(weights, group, 0))  # added where the product is made, in fp32
        dh = dh.view(x.shape)
        dx, dw, h = norm_gradients(dh, grad_total, x, norm_weight, r, eps, triton, needs[0], forth)
        del dh
        if h is not None:
            learn(h)
    of_norm = (empty(t) if g is None else g for t, g in ((x, dx), (norm_weight, dw)))
    return [*of_norm, *of_weights]


def _norm_linears_fake(
    x: Tensor,
    norm_weight: Tensor,
    weights: Sequence[Tensor],
    needs_input: bool,
    needs: Sequence[bool],
    **_: Any,
) -> list[Tensor]:
    leaves = zip((norm_weight, *weights), needs, strict=True)
    return [empty(x, needs_input or needs[0]), *(empty(leaf, need) for leaf, need in leaves)]


def _norm_linears_flops(
    x: Shape, weights: Sequence[Shape], needs_input: bool, needs: Sequence[bool], **_: Any
) -> int:
    back = needs_input or needs[0]
    pairs = zip(weights, needs[1:], strict=True)
    return sum(2 * math.prod(x) * weight[0] * (back + need) for weight, need in pairs)


_norm_linears_op = operator(
    "norm_linears_backward", fake=_norm_linears_fake, flops=_norm_linears_flops
)(_norm_linears_gradients)


def _norm_linears_backward(
    grads: Any,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, ...],
    residuals: tuple[Tensor, ...],
    *,
    eps: float,
    triton: bool,
    sums: bool,
) -> tuple[Tensor | None, ...]:
    (x, norm_weight, *leaves), (r,) = tensors, residuals
    count = len(leaves) // 2
    given = (grads,) if isinstance(grads, Tensor) else tuple(grads)
    each, total = list(given[:count]), given[count] if len(given) > count else None
    weights, biases = leaves[:count], leaves[count:]
    made: list[Tensor | None] = [None] * (2 + count)
    of_input, of_leaves, of_biases = needs[0], needs[1 : 2 + count], needs[2 + count :]
    if of_input or any(of_leaves):
        made = _norm_linears_op(
            each, total, x, norm_weight, weights, r, eps, triton, of_input, list(of_leaves)
        )
    d_biases = (
        bias_gradient(grad, bias, sums) if need else None
        for grad, bias, need in zip(each, biases, of_biases, strict=True)
    )
    return (*(g if need else None for g, need in zip(made, needs, strict=False)), *d_biases)


def _norm_linears_fold(batch_size: int, dims: Dims, tensors: Tensors) -> Tensors | None:
    return fold_rows(1, batch_size, dims, tensors)


def _norm_linears_fold_backward(
    batch_size: int, needs: tuple[bool, ...], dims: Dims, saved: Tensors
) -> Tensors | None:
    """A leaf's gradient is one an example, where one call would give their sum."""
    inputs = len(dims) - len(needs)  # the gradients and x; the others are leaves and r
    if any(needs[1:]) or any(dim is not None for dim in dims[inputs:-1]):
        return None
    folded = fold_all(batch_size, dims[:inputs], saved[:inputs])
    return folded + saved[inputs:-1] + fold_all(batch_size, dims[-1:], saved[-1:])


NORM_LINEARS = Op(
    "norm_linears",
    norm_linears_reference,
    _norm_linears_forward,
    _norm_linears_backward,
    fold=_norm_linears_fold,
    fold_backward=_norm_linears_fold_backward,
)

ADD_NORM_LINEARS = Op(
    "add_norm_linears",
    add_norm_linears_reference,
    _add_norm_linears_forward,
    _norm_linears_backward,
    fold_backward=_norm_linears_fold_backward,
)


@functools.cache
def _with_outputs(op: Op, count: int) -> Op:
    return replace(op, outputs=count)


@allow_in_graph
def _apply_norm_linears(
    x: Tensor, norm_weight: Tensor, eps: float, triton: bool, sums: bool, *leaves: Tensor | None
) -> Any:
    op = _with_outputs(NORM_LINEARS, len(leaves) // 2)
    return run(op, x, norm_weight, *leaves, eps=eps, triton=triton, sums=sums)


@allow_in_graph
def _apply_add_norm_linears(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    triton: bool,
    sums: bool,
    *leaves: Tensor | None,
) -> tuple[Tensor, ...]:
    op = _with_outputs(ADD_NORM_LINEARS, len(leaves) // 2 + 1)
    return run_of_sum(op, x, residual, norm_weight, *leaves, eps=eps, triton=triton, sums=sums)


# Public


def glu_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """linear(act(gate) * up): the GLU of arXiv 2002.05202 and the projection after it.

    Kept for backward are the arguments alone: the GLU's output is made again, by the pass that
    reads gate and up for their gradients (as arXiv 2410.10989 does for the GLU, and as
    activation checkpointing, arXiv 1604.06174, would for both). That costs one write of [..., F]
    where a checkpoint would cost two reads more.

    Args:
        gate, up: same shape [..., F], same floating dtype. On a GPU halves of one projection
            [..., 2 F] are read where they lie, without a copy.
        weight: [O, F]; the GLU's output is brought to its dtype.
        bias: [O] or None, any floating dtype; its gradient is summed in fp32.
        activation: "swiglu" or "geglu", as the functions of these names.

    Returns:
        [..., O] in weight.dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation.

    >>> import torch
    >>> glu_linear(torch.tensor([100.0, 0.0]), torch.tensor([5.0, 5.0]), torch.eye(2)).tolist()
    [500.0, 0.0]
    """
    if activation not in ("swiglu", "geglu"):
        raise ValueError(f'glu_linear: activation must be "swiglu" or "geglu", got {activation!r}.')
    check_floating("glu_linear", gate=gate, up=up, weight=weight, bias=bias)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"glu_linear: gate is {gate.dtype} {tuple(gate.shape)} but up is {up.dtype} "
            f"{tuple(up.shape)}; they must be alike."
        )
    _check_linear("glu_linear", "gate", gate, "weight", weight, "bias", bias)
    triton = choose(activation, str(gate.device), gate.dtype) == "triton"
    return _apply_glu_linear(gate, up, weight, bias, activation, triton, sums_biases(weight))


def norm_linears(
    x: Tensor,
    norm_weight: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, ...]:
    """linear(rms_norm(x, norm_weight, eps), weight, bias) for each weight: q, k and v, gate and up.

    RMSNorm is that of arXiv 1910.07467. Kept for backward are the arguments and one fp32 number a
    row: the norm's output is made again, for the weights' gradients. The gradients that the linear
    layers have for it are added up by their matmuls, in fp32, and rounded after each; neighbours
    of at most D / 2 outputs share a matmul.

    Args:
        x: [..., D], any floating dtype; the norm is rounded to it.
        norm_weight: [D], any floating dtype (fp32 beside a bf16 x is fine).
        weights: one or more [O_i, D] of one dtype; the norm's output is brought to it.
        biases: as many [O_i] or None, any floating dtype; their gradients are summed in fp32. None
            is none at all.

    Returns:
        As many [..., O_i] in the weights' dtype.

    Raises:
        ValueError: no weights, not as many biases, weights of several dtypes; shapes or devices
            that do not fit, dtypes that are not floating point.

    >>> import torch
    >>> weights = [torch.eye(2), torch.ones(1, 2)]
    >>> y, z = norm_linears(torch.tensor([3.0, 3.0]), torch.ones(2), weights)
    >>> y.round().tolist(), z.round().tolist()
    ([1.0, 1.0], [2.0])
    """
    weights = tuple(weights)
    biases = (None,) * len(weights) if biases is None else tuple(biases)
    check_norm_linears("norm_linears", x, norm_weight, weights, biases, eps)
    triton = choose("rms_norm", str(x.device), x.dtype) == "triton"
    sums = sums_biases(weights[0])
    out = _apply_norm_linears(x, norm_weight, eps, triton, sums, *weights, *biases)
    return (out,) if len(weights) == 1 else out


def add_norm_linears(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    eps: float = 1e-6,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """`norm_linears` of a residual stream and what is added to it, and the sum: (outputs, total).

    As in `add_rms_norm` the sum is rounded once, to x.dtype, and the rounded sum is what is normed.
    It is kept for backward in the place of x, and the residual is not. The gradient of total is
    added inside the norm's backward: a branch that goes on from total, not from x, needs no
    addition of its own.

    Args:
        x: [..., D], any floating dtype.
        residual: as x; or None, which adds nothing: total is x then, without a copy.
        norm_weight, weights, biases: as in `norm_linears`.

    Returns:
        As many [..., O_i] in the weights' dtype, and [..., D] in x.dtype.

    Raises:
        ValueError: as `norm_linears`; x and residual that differ in shape or dtype.

    >>> import torch
    >>> x, one = torch.tensor([1.0, 2.0]), torch.ones(2)
    >>> (y,), total = add_norm_linears(x, torch.tensor([2.0, 1.0]), one, [torch.eye(2)])
    >>> y.round().tolist(), total.tolist()
    ([1.0, 1.0], [3.0, 3.0])
    """
    weights = tuple(weights)
    biases = (None,) * len(weights) if biases is None else tuple(biases)
    where = "add_norm_linears"
    check_norm_linears(where, x, norm_weight, weights, biases, eps)
    check_floating(where, x=x, residual=residual)
    check_residual(where, x, residual)
    triton = choose("rms_norm", str(x.device), x.dtype) == "triton"
    sums = sums_biases(weights[0])
    *outs, total = _apply_add_norm_linears(
        x, residual, norm_weight, eps, triton, sums, *weights, *biases
    )
    return tuple(outs), total


def check_norm_linears(
    where: str,
    x: Tensor,
    norm_weight: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    eps: float,
) -> None:
    if not weights or len(biases) != len(weights):
        raise ValueError(
            f"{where}: needs a weight at least, and a bias (or None) for each; "
            f"got {len(weights)} weights and {len(biases)} biases."
        )
    check_floating(where, x=x, norm_weight=norm_weight)
    if eps < 0.0:
        raise ValueError(f"{where}: eps must be >= 0, got {eps}.")
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        names = f"weights[{i}]", f"biases[{i}]"
        check_floating(where, **{"x": x, names[0]: weight, names[1]: bias})
        _check_linear(where, "x", x, names[0], weight, names[1], bias)
        if weight.dtype != weights[0].dtype:
            raise ValueError(
                f"{where}: weights must have one dtype, got {weights[0].dtype} and {weight.dtype}."
            )
    if tuple(norm_weight.shape) != (x.shape[-1],):
        raise ValueError(
            f"{where}: norm_weight must have shape [{x.shape[-1]}] to match x {tuple(x.shape)}, "
            f"got {tuple(norm_weight.shape)}."
        )


def check_residual(where: str, x: Tensor, residual: Tensor | None) -> None:
    """ValueError unless the two may be added without a cast."""
    if residual is not None and (x.shape != residual.shape or x.dtype != residual.dtype):
        raise ValueError(
            f"{where}: x is {tuple(x.shape)} {x.dtype} but residual is "
            f"{tuple(residual.shape)} {residual.dtype}; they must be alike."
        )


def _check_linear(
    where: str,
    x_name: str,
    x: Tensor,
    weight_name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
) -> None:
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{where}: {weight_name} must be [O, I] for {x_name} [..., I], "
            f"got {tuple(weight.shape)} and {tuple(x.shape)}."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{where}: {bias_name} must have shape [{weight.shape[0]}], got {tuple(bias.shape)}."
        )
