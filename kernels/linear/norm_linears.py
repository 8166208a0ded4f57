"""RMSNorm and the linear layers after it, without keeping the norm's output.

Linear layers keep their input for their weights' gradients. The norm's output is as large as x,
from which it is cheap to recompute: backward reads x in any case, and the pass that computes its
gradient writes the norm's output again. Forward is plain operations and backward is one operator,
for the reasons that `glu_linear` gives; inside it the matmuls themselves add up the gradients of
several linear layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.linear.linear import bias_gradient, check_linear, linear_reference, sums_biases
from kernels.norm import rms_norm_triton
from kernels.norm.rms_norm import (
    ADD_RMS_NORM,
    ADD_RMS_NORM_TRITON,
    RMS_NORM,
    RMS_NORM_TRITON,
    check_residual,
)
from kernels.runtime.autograd import (
    Dims,
    Op,
    Tensors,
    check_floating,
    fold_all,
    fold_rows,
    rows_of,
    run,
)
from kernels.runtime.dispatch import choose
from kernels.runtime.dynamo import allow_in_graph
from kernels.runtime.operators import empty, operator

Shape = Sequence[int]

# RMSNorm, then linear layers: y_i = h W_i^T + b_i with h = x r w, r = (mean x^2 + eps)^-1/2
#
# The op's tensors are x, w, all W_i, all b_i. With one linear layer its output is a tensor, with
# more a tuple of them. `ADD_NORM_LINEARS` returns the sum as its last output.


def _linears(h: Tensor, leaves: Sequence[Any]) -> list[Tensor]:
    count = len(leaves) // 2
    pairs = zip(leaves[:count], leaves[count:], strict=True)
    return [linear_reference(h, weight, bias) for weight, bias in pairs]


def _outputs(outs: list[Tensor]) -> Any:
    return outs[0] if len(outs) == 1 else tuple(outs)


def norm_linears_reference(
    x: Tensor, norm_weight: Tensor, *leaves: Tensor | None, eps: float, **_: Any
) -> Any:
    """What `norm_linears` computes; plain torch, differentiable to any order."""
    return _outputs(_linears(RMS_NORM.formula(x, norm_weight, eps=eps), leaves))


def add_norm_linears_reference(
    total: Tensor, norm_weight: Tensor, *leaves: Tensor | None, eps: float, **_: Any
) -> tuple[Tensor, ...]:
    """What `add_norm_linears` computes from the sum."""
    return (*_linears(RMS_NORM.formula(total, norm_weight, eps=eps), leaves), total)


def _forward(
    x: Tensor, norm_weight: Tensor, *leaves: Tensor | None, eps: float, triton: bool, **_: Any
) -> tuple[Any, tuple[Tensor, ...]]:
    h, (r,) = (RMS_NORM_TRITON if triton else RMS_NORM).forward(x, norm_weight, eps=eps)
    return _outputs(_linears(h, leaves)), (r,)


def _add_forward(
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
    """The norm of x + residual, the sum, and r."""
    if residual is None:
        h, (r,) = (RMS_NORM_TRITON if triton else RMS_NORM).forward(x, weight, eps=eps)
        return h, x.view_as(x), r  # a view: PyTorch cannot save an input returned as it is
    norm = ADD_RMS_NORM_TRITON if triton else ADD_RMS_NORM
    (h, total), (r,) = norm.forward(x, residual, weight, eps=eps)
    return h, total, r


def norm_again(x: Tensor, weight: Tensor, eps: float, triton: bool) -> Tensor:
    """The norm's output, computed again."""
    if triton:
        return rms_norm_triton.rms_norm_forward(x, None, weight, eps)[0]
    return RMS_NORM.forward(x, weight, eps=eps)[0]


def norm_gradients(
    grad: Tensor,  # [..., D], of the norm's output; its memory may be reused for x's gradient
    grad_total: Tensor | None,  # [..., D], added to the gradient of x
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    eps: float,
    triton: bool,
    needs_weight: bool,
    needs_value: bool,  # the norm's output as well, where it costs no pass: in Triton
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x and weight, and the norm's output or None."""
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
    """The layers that share a product in backward: adjacent ones of at most D / 2 outputs.

    Alone, such layers (k and v of grouped-query attention) run at half the speed of wide ones.
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
                out[i] = part.clone()  # an operator's outputs must not share memory
            continue
        for i in group:
            if needs[i]:
                out[i] = torch.mm(grads[i].t(), h)


def norm_linears_gradients(
    grads: Sequence[Tensor],  # n times [..., O_i]
    grad_total: Tensor | None,  # [..., D], added to the gradient of x
    x: Tensor,  # [..., D]
    norm_weight: Tensor,  # [D]
    weights: Sequence[Tensor],  # n times [O_i, D]
    r: Tensor,  # [..., 1]
    eps: float,
    triton: bool,
    needs_input: bool,
    needs: Sequence[bool],  # of norm_weight, of the weights
) -> list[Tensor]:
    """The gradients of x, norm_weight and the weights (empty where not needed).

    Apart from the joined gradients of narrow layers, it allocates [..., D] at most twice. In Triton
    these are the gradient of h, whose memory becomes the gradient of x, and h, which the same
    kernel writes (more, if x and the weights differ in dtype). Otherwise a forward pass computes h,
    and frees it before the norm's backward begins.
    """
    flat, groups = [rows_of(grad) for grad in grads], _groups(weights)
    joined = [_join(flat, group, 1) for group in groups]
    of_weights = [empty(weight) for weight in weights]
    back, forth = needs_input or needs[0], any(needs[1:])

    def weight_gradients(h: Tensor) -> None:
        h = rows_of(h).to(weights[0].dtype)
        _weight_gradients(groups, joined, flat, h, needs[1:], of_weights)

    dx: Tensor | None = None
    dw: Tensor | None = None
    if forth and not (back and triton):
        weight_gradients(norm_again(x, norm_weight, eps, triton))
    if back:
        dh = torch.mm(joined[0], _join(weights, groups[0], 0))
        for grad, group in zip(joined[1:], groups[1:], strict=True):
            dh.addmm_(grad, _join(weights, group, 0))  # accumulated in fp32, inside the matmul
        dh = dh.view(x.shape)
        dx, dw, h = norm_gradients(dh, grad_total, x, norm_weight, r, eps, triton, needs[0], forth)
        del dh
        if h is not None:
            weight_gradients(h)
    of_norm = (empty(t) if g is None else g for t, g in ((x, dx), (norm_weight, dw)))
    return [*of_norm, *of_weights]


def _fake(
    x: Tensor,
    norm_weight: Tensor,
    weights: Sequence[Tensor],
    needs_input: bool,
    needs: Sequence[bool],
    **_: Any,
) -> list[Tensor]:
    leaves = zip((norm_weight, *weights), needs, strict=True)
    return [empty(x, needs_input or needs[0]), *(empty(leaf, need) for leaf, need in leaves)]


def _flops(
    x: Shape, weights: Sequence[Shape], needs_input: bool, needs: Sequence[bool], **_: Any
) -> int:
    back = needs_input or needs[0]
    pairs = zip(weights, needs[1:], strict=True)
    return sum(2 * math.prod(x) * weight[0] * (back + need) for weight, need in pairs)


_op = operator("norm_linears_backward", fake=_fake, flops=_flops)(norm_linears_gradients)


def _backward(
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
        made = _op(each, total, x, norm_weight, weights, r, eps, triton, of_input, list(of_leaves))
    d_biases = (
        bias_gradient(grad, bias, sums) if need else None
        for grad, bias, need in zip(each, biases, of_biases, strict=True)
    )
    return (*(g if need else None for g, need in zip(made, needs, strict=False)), *d_biases)


def _fold_backward(
    batch_size: int, needs: tuple[bool, ...], dims: Dims, saved: Tensors
) -> Tensors | None:
    """Each example has leaf gradients of its own, where one call would return their sum."""
    inputs = len(dims) - len(needs)  # the gradients and x, before the leaves and r
    if any(needs[1:]) or any(dim is not None for dim in dims[inputs:-1]):
        return None
    folded = fold_all(batch_size, dims[:inputs], saved[:inputs])
    return folded + saved[inputs:-1] + fold_all(batch_size, dims[-1:], saved[-1:])


NORM_LINEARS = Op(
    "norm_linears",
    norm_linears_reference,
    _forward,
    _backward,
    fold=functools.partial(fold_rows, 1),
    fold_backward=_fold_backward,
)

ADD_NORM_LINEARS = Op(
    "add_norm_linears",
    add_norm_linears_reference,
    _add_forward,
    _backward,
    of_sum=True,
    fold=functools.partial(fold_rows, 2),
    fold_backward=_fold_backward,
)


@functools.cache
def _with_outputs(op: Op, count: int) -> Op:
    return replace(op, outputs=count)


@allow_in_graph
def _apply(
    x: Tensor, norm_weight: Tensor, eps: float, triton: bool, sums: bool, *leaves: Tensor | None
) -> Any:
    op = _with_outputs(NORM_LINEARS, len(leaves) // 2)
    return run(op, x, norm_weight, *leaves, eps=eps, triton=triton, sums=sums)


@allow_in_graph
def _apply_add(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    triton: bool,
    sums: bool,
    *leaves: Tensor | None,
) -> tuple[Tensor, ...]:
    op = _with_outputs(ADD_NORM_LINEARS, len(leaves) // 2 + 1)
    return run(op, x, residual, norm_weight, *leaves, eps=eps, triton=triton, sums=sums)


# Public


def norm_linears(
    x: Tensor,
    norm_weight: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, ...]:
    """linear(rms_norm(x, norm_weight, eps), weight, bias) for each weight: q, k and v, gate and up.

    RMSNorm is that of arXiv 1910.07467. Backward keeps the arguments and one fp32 number per row,
    and recomputes the norm's output for the weights' gradients. The matmuls add up the linear
    layers' gradients of the norm's output in fp32, and round after each; adjacent layers of at most
    D / 2 outputs share a matmul.

    Args:
        x: [..., D], any floating dtype; the norm's output is rounded to it.
        norm_weight: [D], any floating dtype (fp32 with a bf16 x is fine).
        weights: one or more [O_i, D] of one dtype, to which the norm's output is cast.
        biases: for each weight [O_i] or None, any floating dtype, with gradients summed in fp32;
            or None for no biases.

    Returns:
        For each weight [..., O_i] in its dtype.

    Raises:
        ValueError: no weights, another number of biases, weights of several dtypes; shapes or
            devices that do not fit, dtypes that are not floating point.

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
    out = _apply(x, norm_weight, eps, triton, sums, *weights, *biases)
    return (out,) if len(weights) == 1 else out


def add_norm_linears(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    eps: float = 1e-6,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """`norm_linears` of x + residual, and the sum itself: (outputs, total).

    As in `add_rms_norm` the sum is rounded once, to x.dtype, before the norm. Backward keeps the
    sum instead of x and residual. The norm's backward adds the gradient of total: a branch that
    continues from total, not from x, needs no addition of its own.

    Args:
        x: [..., D], any floating dtype.
        residual: like x; or None, then total is x, without a copy.
        norm_weight, weights, biases: as in `norm_linears`.

    Returns:
        For each weight [..., O_i] in its dtype; and [..., D] in x.dtype.

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
    *outs, total = _apply_add(x, residual, norm_weight, eps, triton, sums, *weights, *biases)
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
            f"{where}: needs at least one weight, and a bias (or None) for each; "
            f"got {len(weights)} weights and {len(biases)} biases."
        )
    check_floating(where, x=x, norm_weight=norm_weight)
    if eps < 0.0:
        raise ValueError(f"{where}: eps must be >= 0, got {eps}.")
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        names = f"weights[{i}]", f"biases[{i}]"
        check_floating(where, **{"x": x, names[0]: weight, names[1]: bias})
        check_linear(where, "x", x, names[0], weight, names[1], bias)
        if weight.dtype != weights[0].dtype:
            raise ValueError(
                f"{where}: weights must have one dtype, got {weights[0].dtype} and {weight.dtype}."
            )
    if tuple(norm_weight.shape) != (x.shape[-1],):
        raise ValueError(
            f"{where}: norm_weight must have shape [{x.shape[-1]}] to match x {tuple(x.shape)}, "
            f"got {tuple(norm_weight.shape)}."
        )
