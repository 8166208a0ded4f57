"""Activations of an MLP: SwiGLU, GeGLU, squared ReLU.

On a GPU each direction is one kernel of `kernels.mlp.glu_triton`; elsewhere torch's own fused
activations run. Backward keeps the inputs alone and recomputes the activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.mlp import glu_triton
from kernels.runtime.autograd import Op, check_floating, fold_all, fold_all_backward, run
from kernels.runtime.dispatch import TORCH, TRITON, choose, declare
from kernels.runtime.dynamo import allow_in_graph
from kernels.runtime.operators import empty, operator

for _activation in ("swiglu", "geglu", "relu2"):
    declare(_activation, TRITON, TORCH)

# References: plain torch, differentiable to any order


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """What `swiglu` computes."""
    return gate * torch.sigmoid(gate) * up


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """What `geglu` computes."""
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def relu2_reference(x: Tensor) -> Tensor:
    """What `relu2` computes."""
    return torch.relu(x).square()


_glu_op = operator("glu", fake=lambda gate, **_: empty(gate, True))(glu_triton.glu_forward)
_glu_backward_op = operator(
    "glu_backward", fake=lambda gate, up, **_: (empty(gate, True), empty(up, True))
)(glu_triton.glu_backward)
_relu2_op = operator("relu2", fake=lambda x: empty(x, True))(glu_triton.relu2_forward)
_relu2_backward_op = operator("relu2_backward", fake=lambda x, **_: empty(x, True))(
    glu_triton.relu2_backward
)


# Ops

Needs = tuple[bool, ...]
Grads = tuple[Tensor | None, ...]
Pair = tuple[Tensor, Tensor]
Nothing = tuple[()]  # no residuals


def _swiglu_forward(gate: Tensor, up: Tensor) -> tuple[Tensor, Nothing]:
    return F.silu(gate).mul_(up), ()


def _swiglu_backward(grad: Tensor, needs: Needs, tensors: Pair, _: Nothing) -> Grads:
    gate, up = tensors
    d_gate = torch.ops.aten.silu_backward(grad * up, gate) if needs[0] else None
    return d_gate, (grad * F.silu(gate) if needs[1] else None)


def _geglu_forward(gate: Tensor, up: Tensor) -> tuple[Tensor, Nothing]:
    return F.gelu(gate, approximate="tanh").mul_(up), ()


def _geglu_backward(grad: Tensor, needs: Needs, tensors: Pair, _: Nothing) -> Grads:
    gate, up = tensors
    d_gate = None
    if needs[0]:
        d_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
    return d_gate, (grad * F.gelu(gate, approximate="tanh") if needs[1] else None)


def _relu2_forward(x: Tensor) -> tuple[Tensor, Nothing]:
    return torch.relu(x).square_(), ()


def _relu2_backward(grad: Tensor, needs: Needs, tensors: tuple[Tensor], _: Nothing) -> Grads:
    return (2 * torch.relu(tensors[0]) * grad,)


def _glu_forward_triton(name: str, gate: Tensor, up: Tensor) -> tuple[Tensor, Nothing]:
    return _glu_op(gate, up, name), ()


def _glu_backward_triton(name: str, grad: Tensor, needs: Needs, tensors: Pair, _: Nothing) -> Grads:
    return _glu_backward_op(grad, *tensors, name)


def _relu2_forward_triton(x: Tensor) -> tuple[Tensor, Nothing]:
    return _relu2_op(x), ()


def _relu2_backward_triton(grad: Tensor, needs: Needs, tensors: tuple[Tensor], _: Nothing) -> Grads:
    return (_relu2_backward_op(grad, *tensors),)


_op = partial(Op, fold=fold_all, fold_backward=fold_all_backward)
SWIGLU = _op("swiglu", swiglu_reference, _swiglu_forward, _swiglu_backward)
SWIGLU_TRITON = _op(
    "swiglu",
    swiglu_reference,
    partial(_glu_forward_triton, "swiglu"),
    partial(_glu_backward_triton, "swiglu"),
)
GEGLU = _op("geglu", geglu_reference, _geglu_forward, _geglu_backward)
GEGLU_TRITON = _op(
    "geglu",
    geglu_reference,
    partial(_glu_forward_triton, "geglu"),
    partial(_glu_backward_triton, "geglu"),
)
RELU2 = _op("relu2", relu2_reference, _relu2_forward, _relu2_backward)
RELU2_TRITON = _op("relu2", relu2_reference, _relu2_forward_triton, _relu2_backward_triton)


@allow_in_graph
def _apply_swiglu(gate: Tensor, up: Tensor, triton: bool) -> Tensor:
    return run(SWIGLU_TRITON if triton else SWIGLU, gate, up)


@allow_in_graph
def _apply_geglu(gate: Tensor, up: Tensor, triton: bool) -> Tensor:
    return run(GEGLU_TRITON if triton else GEGLU, gate, up)


@allow_in_graph
def _apply_relu2(x: Tensor, triton: bool) -> Tensor:
    return run(RELU2_TRITON if triton else RELU2, x)


# Public


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(z) = z * sigmoid(z) (arXiv 2002.05202).

    Args:
        gate, up: same shape [...], same floating dtype. On a GPU the kernel reads halves of one
            projection [..., 2 F] in place, without a copy.

    Returns:
        [...] in that dtype.

    Raises:
        ValueError: shapes, dtypes or devices that differ.

    >>> import torch
    >>> swiglu(torch.tensor([0.0, 100.0]), torch.tensor([5.0, 5.0])).tolist()
    [0.0, 500.0]
    """
    _check("swiglu", gate, up)
    return _as_they_lie(_apply_swiglu, "swiglu", gate, up)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up (arXiv 2002.05202), with the tanh approximation of gelu, as in Gemma.

    gelu(z) = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3))). Arguments, result and errors
    are those of `swiglu`.

    >>> import torch
    >>> geglu(torch.tensor([0.0, 100.0]), torch.tensor([5.0, 5.0])).tolist()
    [0.0, 500.0]
    """
    _check("geglu", gate, up)
    return _as_they_lie(_apply_geglu, "geglu", gate, up)


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2: the squared ReLU of Primer (arXiv 2109.08668).

    Args:
        x: [...], any floating dtype.

    Returns:
        [...] in that dtype.

    Raises:
        ValueError: a dtype that is not floating point.

    >>> import torch
    >>> relu2(torch.tensor([-2.0, 3.0])).tolist()
    [0.0, 9.0]
    """
    check_floating("relu2", x=x)
    return _as_they_lie(_apply_relu2, "relu2", x)


def _as_they_lie(apply: Callable[..., Tensor], name: str, *tensors: Tensor) -> Tensor:
    """The result with the tensors' own order of dimensions in memory, like torch's elementwise
    operations; the kernels themselves write rows."""
    x = tensors[0]
    triton = choose(name, str(x.device), x.dtype) == "triton"
    steps = x.stride()
    order = sorted(range(x.ndim), key=lambda dim: -steps[dim])
    alike = all(other.stride() == steps for other in tensors)
    if not triton or not alike or order == list(range(x.ndim)):
        return apply(*tensors, triton)
    back = sorted(range(x.ndim), key=order.__getitem__)
    return apply(*(t.permute(order) for t in tensors), triton).permute(back)


def _check(name: str, gate: Tensor, up: Tensor) -> None:
    check_floating(name, gate=gate, up=up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"{name}: gate is {gate.dtype} {tuple(gate.shape)} but up is {up.dtype} "
            f"{tuple(up.shape)}; they must be alike."
        )
