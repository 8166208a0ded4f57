"""A gated activation and the linear layer after it, without keeping the activation's output.

A linear layer keeps its input for its weight's gradient. The GLU's output is as large as gate and
up, from which it is cheap to recompute: backward reads them in any case, and the pass that computes
their gradients writes the GLU's output again.

Forward is plain operations, the GLU and one aten.mm or aten.addmm, so that checkpointing policies
and compilers see the product. Backward is one operator, for two reasons:

- A compiler that sees the same GLU in forward and backward computes it once and keeps the result,
  which is what this function avoids.
- The operator owns its buffers: the GLU's kernel overwrites the gradient that it reads. Between
  visible operations a compiler would have to copy it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.linear.linear import bias_gradient, check_linear, linear_reference, sums_biases
from kernels.mlp import glu_triton
from kernels.mlp.glu import GEGLU, GEGLU_TRITON, SWIGLU, SWIGLU_TRITON
from kernels.runtime.autograd import Dims, Op, Tensors, check_floating, fold_rows, rows_of, run
from kernels.runtime.dispatch import choose
from kernels.runtime.dynamo import allow_in_graph
from kernels.runtime.operators import empty, operator

# y = h W^T + b with h = act(gate) up

_GLUS = {
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
    **_: Any,
) -> Tensor:
    """What `glu_linear` computes; plain torch, differentiable to any order."""
    return linear_reference(_GLUS[activation, False].formula(gate, up), weight, bias)


def _forward(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    triton: bool,
    **_: Any,
) -> tuple[Tensor, tuple[()]]:
    return linear_reference(glu(gate, up, activation, triton), weight, bias), ()


def glu(gate: Tensor, up: Tensor, activation: str, triton: bool) -> Tensor:
    """act(gate) * up; autograd records nothing."""
    return _GLUS[activation, triton].forward(gate, up)[0]


def glu_gradients(
    grad: Tensor,  # of the GLU's output; its memory may be reused for a gradient
    gate: Tensor,
    up: Tensor,
    activation: str,
    triton: bool,
    needs_value: bool,  # the GLU's output as well, where it costs no pass: in Triton
    overwrite: bool = False,  # the memory of gate and up may be reused
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of gate and up, and the GLU's output or None."""
    if triton:
        return glu_triton.glu_backward_(grad, gate, up, activation, needs_value, overwrite)
    d_gate, d_up = _GLUS[activation, False].backward(grad, (True, True), (gate, up), ())
    assert d_gate is not None
    assert d_up is not None
    return d_gate.to(gate.dtype), d_up.to(up.dtype), None


def glu_linear_gradients(
    grad: Tensor,  # [..., O]
    gate: Tensor,  # [..., F]
    up: Tensor,  # [..., F]
    weight: Tensor,  # [O, F]
    activation: str,
    triton: bool,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate, up and weight (empty where not needed).

    It allocates [..., F] three times: for dh, whose memory becomes the gradient of up, for the
    gradient of gate, and for h, which is freed at the end.
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


def _fake(
    gate: Tensor, up: Tensor, weight: Tensor, needs_input: bool, needs_weight: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty(gate, needs_input), empty(up, needs_input), empty(weight, needs_weight)


def _flops(
    gate: Sequence[int], weight: Sequence[int], needs_input: bool, needs_weight: bool, **_: Any
) -> int:
    return 2 * math.prod(gate) * weight[0] * (needs_input + needs_weight)


_op = operator("glu_linear_backward", fake=_fake, flops=_flops)(glu_linear_gradients)


def _backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    _: tuple[()],
    *,
    activation: str,
    triton: bool,
    sums: bool,
) -> tuple[Tensor | None, ...]:
    *inputs, bias = tensors
    of_gate, of_up, of_weight, of_bias = needs
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if of_gate or of_up or of_weight:
        grads = _op(grad, *inputs, activation, triton, of_gate or of_up, of_weight)
    d_bias = bias_gradient(grad, bias, sums) if of_bias and bias is not None else None
    return (*(g if need else None for g, need in zip(grads, needs[:3], strict=True)), d_bias)


def _fold_backward(
    batch_size: int, needs: tuple[bool, ...], dims: Dims, saved: Tensors
) -> Tensors | None:
    """Each example has a weight gradient of its own, where one call would return their sum."""
    return None if any(needs[2:]) else fold_rows(3, batch_size, dims, saved)


GLU_LINEAR = Op(
    "glu_linear",
    glu_linear_reference,
    _forward,
    _backward,
    fold=functools.partial(fold_rows, 2),
    fold_backward=_fold_backward,
)


@allow_in_graph
def _apply(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    triton: bool,
    sums: bool,
) -> Tensor:
    return run(GLU_LINEAR, gate, up, weight, bias, activation=activation, triton=triton, sums=sums)


def glu_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """linear(act(gate) * up): the GLU of arXiv 2002.05202 and the projection after it.

    Backward keeps the arguments alone. It recomputes the GLU's output in the pass that reads gate
    and up for their gradients (as arXiv 2410.10989 does for the GLU, and as activation
    checkpointing, arXiv 1604.06174, would for both). That costs one write of [..., F], where a
    checkpoint would cost two more reads.

    Args:
        gate, up: same shape [..., F], same floating dtype. On a GPU the kernel reads halves of one
            projection [..., 2 F] in place, without a copy.
        weight: [O, F]; the GLU's output is cast to its dtype.
        bias: [O] or None, any floating dtype; its gradient is summed in fp32.
        activation: "swiglu" or "geglu", as in the functions of these names.

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
    check_linear("glu_linear", "gate", gate, "weight", weight, "bias", bias)
    triton = choose(activation, str(gate.device), gate.dtype) == "triton"
    return _apply(gate, up, weight, bias, activation, triton, sums_biases(weight))
