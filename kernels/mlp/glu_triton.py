# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""The Triton kernels of `swiglu`, `geglu` and `relu2`, which read each number once.

A program takes one tile [ROWS, COLS]. Contiguous tensors are treated as one long row.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from kernels.runtime.launch import jit, launch, tl, triton

# Pieces


@jit
def _tile(rows, cols, OUT_STRIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows [ROWS, 1] and columns [1, COLS] of this program, in int64, and their mask."""
    col = tl.arange(0, COLS)[None, :]
    if OUT_STRIDE == 0:  # one long row: saves short programs a division
        row = tl.zeros([1, 1], tl.int64)
        col += tl.program_id(0).to(tl.int64) * COLS
        return row, col, col < cols
    tiles = tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col += (tl.program_id(0) % tiles).to(tl.int64) * COLS
    return row, col, (row < rows) & (col < cols)


@jit
def _read(ptr, row, col, inside, STRIDE: tl.constexpr):
    return tl.load(ptr + row * STRIDE + col, mask=inside, other=0.0).to(tl.float32)


@jit
def _write(ptr, row, col, inside, x, STRIDE: tl.constexpr):
    tl.store(ptr + row * STRIDE + col, x.to(ptr.dtype.element_ty), mask=inside)


@jit
def _activation(x, NAME: tl.constexpr):
    """Value and slope of silu or gelu: x s and s + x s (1 - s) z', with s = sigmoid(z).

    For silu z = x. For gelu (1 + tanh(z / 2)) / 2 = sigmoid(z) with z = 2 sqrt(2 / pi)
    (x + 0.044715 x^3).
    """
    if NAME == "swiglu":
        s = tl.sigmoid(x)
        y = x * s
        slope = s + y * (1 - s)
    else:
        tl.static_assert(NAME == "geglu")
        near = tl.minimum(tl.maximum(x, -30.0), 30.0)  # s is 0 or 1 beyond; z' would overflow
        square = near * near
        s = tl.sigmoid(1.5957691216057308 * near * (1 + 0.044715 * square))
        y = x * s
        slope = s + y * (1 - s) * (1.5957691216057308 * (1 + 0.134145 * square))
    return y, slope


# Kernels


@jit
def glu_forward_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    rows,
    cols,
    NAME: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    UP_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, col, inside = _tile(rows, cols, OUT_STRIDE, ROWS, COLS)
    gate = _read(gate_ptr, row, col, inside, GATE_STRIDE)
    up = _read(up_ptr, row, col, inside, UP_STRIDE)
    value, _ = _activation(gate, NAME)
    _write(out_ptr, row, col, inside, value * up, OUT_STRIDE)


@jit
def glu_backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    value_ptr,
    rows,
    cols,
    NAME: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    UP_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, col, inside = _tile(rows, cols, OUT_STRIDE, ROWS, COLS)
    gate = _read(gate_ptr, row, col, inside, GATE_STRIDE)
    up = _read(up_ptr, row, col, inside, UP_STRIDE)
    grad = _read(grad_ptr, row, col, inside, GRAD_STRIDE)
    value, slope = _activation(gate, NAME)
    _write(d_gate_ptr, row, col, inside, grad * up * slope, OUT_STRIDE)
    _write(d_up_ptr, row, col, inside, grad * value, OUT_STRIDE)
    if value_ptr is not None:
        _write(value_ptr, row, col, inside, value * up, OUT_STRIDE)


@jit
def relu2_forward_kernel(
    x_ptr,
    out_ptr,
    rows,
    cols,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, col, inside = _tile(rows, cols, OUT_STRIDE, ROWS, COLS)
    x = _read(x_ptr, row, col, inside, X_STRIDE)
    _write(out_ptr, row, col, inside, tl.where(x < 0, 0.0, x * x), OUT_STRIDE)  # NaN stays


@jit
def relu2_backward_kernel(
    grad_ptr,
    x_ptr,
    dx_ptr,
    rows,
    cols,
    GRAD_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, col, inside = _tile(rows, cols, OUT_STRIDE, ROWS, COLS)
    x = _read(x_ptr, row, col, inside, X_STRIDE)
    grad = _read(grad_ptr, row, col, inside, GRAD_STRIDE)
    _write(dx_ptr, row, col, inside, tl.where(x < 0, 0.0, 2 * x * grad), OUT_STRIDE)


# Host


FORWARD = {"entries": 2048, "num_warps": 8}  # entries: of a program's tile
BACKWARD = {"entries": 1024, "num_warps": 4}


def _start(
    kernel: Any,
    inputs: dict[str, Tensor],
    outputs: tuple[Tensor | None, ...],
    *,
    entries: int,
    **options: Any,
) -> None:
    """Launches over inputs, named after their strides, and contiguous outputs of the same shape."""
    shape = next(iter(inputs.values())).shape
    if all(x.is_contiguous() for x in inputs.values()):
        size, tile = (1, math.prod(shape)), (1, entries)
        strides: dict[str, Any] = dict.fromkeys((*inputs, "OUT"), 0)
    else:
        size = (math.prod(shape[:-1]), shape[-1])
        inputs = {name: _rows(x, size) for name, x in inputs.items()}
        strides = {name: x.stride(0) for name, x in inputs.items()} | {"OUT": size[1]}
        cols = min(1024, triton.next_power_of_2(size[1]))
        tile = (entries // cols, cols)
    launch(
        kernel,
        (triton.cdiv(size[0], tile[0]) * triton.cdiv(size[1], tile[1]),),
        *inputs.values(),
        *outputs,
        *size,
        **{f"{name}_STRIDE": stride for name, stride in strides.items()},
        ROWS=tile[0],
        COLS=tile[1],
        **options,
    )


def _rows(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x as [rows, columns] with contiguous rows; a copy only where necessary."""
    x = x.reshape(size)
    return x if x.stride(-1) == 1 else x.contiguous()


def glu_forward(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """act(gate) * up; name: "swiglu" or "geglu"."""
    out = gate.new_empty(gate.shape)
    _start(glu_forward_kernel, {"GATE": gate, "UP": up}, (out,), NAME=name, **FORWARD)
    return out


def glu_backward(grad: Tensor, gate: Tensor, up: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    outs = gate.new_empty(gate.shape), up.new_empty(up.shape)
    inputs = {"GRAD": grad, "GATE": gate, "UP": up}
    _start(glu_backward_kernel, inputs, (*outs, None), NAME=name, **BACKWARD)
    return outs


def glu_backward_(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    name: str,
    needs_value: bool = True,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of gate and up, and with `needs_value` forward's output, in one pass.

    The gradient of up takes grad's memory if grad is contiguous and of up's dtype. overwrite: the
    gradient of gate takes gate's memory and the output up's, if both are contiguous. This is safe
    because a thread writes only where it has read.
    """
    own = overwrite and gate.is_contiguous() and up.is_contiguous()
    value = (up if own else gate.new_empty(gate.shape)) if needs_value else None
    d_gate = gate if own else gate.new_empty(gate.shape)
    own = grad.is_contiguous() and grad.dtype == up.dtype
    d_up = grad if own else up.new_empty(up.shape)
    inputs = {"GRAD": grad, "GATE": gate, "UP": up}
    _start(glu_backward_kernel, inputs, (d_gate, d_up, value), NAME=name, **BACKWARD)
    return d_gate, d_up, value


def relu2_forward(x: Tensor) -> Tensor:
    """relu(x)^2."""
    out = x.new_empty(x.shape)
    _start(relu2_forward_kernel, {"X": x}, (out,), **FORWARD)
    return out


def relu2_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x."""
    dx = x.new_empty(x.shape)
    _start(relu2_backward_kernel, {"GRAD": grad, "X": x}, (dx,), **BACKWARD)
    return dx
