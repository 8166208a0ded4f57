"""The MLP of a decoder block as one function, from the residual stream on.

It keeps gate's and up's outputs, and recomputes the norm's and the activation's in passes that
backward makes in any case.

Forward is plain operations, the matrix products among them, so that a compiler that recomputes a
block can leave out the last product, which no gradient needs. Backward is one operator, as in
`glu_linear`. Where nothing else needs gate's and up's outputs, gradients reuse their memory: twice
[N, F], most of what the backward of a block holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.linear.glu_linear import glu, glu_gradients
from kernels.linear.linear import add_product, linear_reference
from kernels.linear.norm_linears import (
    add_norm,
    check_norm_linears,
    norm_again,
    norm_gradients,
)
from kernels.mlp.glu import SWIGLU
from kernels.norm.rms_norm import RMS_NORM, check_residual
from kernels.runtime.autograd import (
    Dims,
    Op,
    Tensors,
    check_floating,
    fold_all,
    fold_rows,
    is_last_backward,
    rows_of,
    run,
)
from kernels.runtime.dispatch import choose
from kernels.runtime.dynamo import allow_in_graph
from kernels.runtime.operators import empty, operator

_CHUNK_BYTES = 2**30  # for the three tensors of a recomputed chunk


def _outside_func() -> bool:
    """Whether no torch.func transform is active, which may run a backward several times."""
    return not torch._C._are_functorch_transforms_active()


# RMSNorm, gate and up, SwiGLU, down, of x + residual


def gated_reference(
    total: Tensor,
    norm_weight: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    eps: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """What `add_norm_gated_mlp` computes from the sum; plain torch, differentiable to any order."""
    h = RMS_NORM.formula(total, norm_weight, eps=eps)
    act = SWIGLU.formula(linear_reference(h, gate, None), linear_reference(h, up, None))
    return linear_reference(act, down, None), total


def _chunks(rows: int, width: int, size: int) -> Iterator[slice]:
    """Slices of rows for a recomputed MLP, so that its three [rows, F] stay small."""
    most = max(128, _CHUNK_BYTES // (3 * width * size) // 128 * 128)
    for start in range(0, max(1, rows), most):
        yield slice(start, start + most)


def _gated_forward(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    eps: float,
    norm_triton: bool,
    glu_triton: bool,
    keep: bool,
    **_: Any,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    dtype = gate.dtype
    h, total, r = add_norm(x, residual, norm_weight, eps, norm_triton)
    if keep:
        a, b = (linear_reference(h.to(dtype), w, None) for w in (gate, up))
        return (linear_reference(glu(a, b, "swiglu", glu_triton), down, None), total), (r, a, b)
    h = rows_of(h)
    parts = []
    for here in _chunks(len(h), len(gate), gate.element_size()):
        a, b = (linear_reference(h[here].to(dtype), w, None) for w in (gate, up))
        parts.append(linear_reference(glu(a, b, "swiglu", glu_triton), down, None))
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (y.view(*x.shape[:-1], down.shape[0]), total), (r,)


def _gated_gradients(
    grad: Tensor,  # [..., O]
    grad_total: Tensor,  # [..., D], added to the gradient of x
    x: Tensor,  # [..., D]
    norm_weight: Tensor,  # [D]
    gate: Tensor,  # [F, D]
    up: Tensor,  # [F, D]
    down: Tensor,  # [O, F]
    r: Tensor,  # [..., 1]
    a: Tensor | None,  # [..., F], gate's output; None: recomputed, some rows at a time
    b: Tensor | None,  # [..., F], up's output
    eps: float,
    norm_triton: bool,
    glu_triton: bool,
    needs_input: bool,
    needs: Sequence[bool],  # of norm_weight, gate, up, down
    overwrite: bool,
) -> list[Tensor]:
    """The gradients of x, norm_weight, gate, up and down (empty where not needed).

    overwrite: gradients may reuse the memory of a and b (in Triton). Then it allocates [..., F]
    once, otherwise three times; other allocations wait until these are freed.
    """
    dy, dtype = rows_of(grad), gate.dtype
    back, forth = needs_input or needs[0], needs[1] or needs[2]
    later = back and norm_triton  # the norm's backward writes h as well
    chunks = [slice(None)] if a is not None else [*_chunks(len(dy), len(gate), gate.element_size())]
    h: Tensor | None = None
    if a is None or (forth and not later):
        h = rows_of(norm_again(x, norm_weight, eps, norm_triton)).to(dtype)
    # sums over chunks are in fp32, as inside a single product
    wide = dtype if len(chunks) == 1 else torch.promote_types(dtype, torch.float32)
    weight_grads: dict[str, Tensor] = {}

    def add(name: str, need: bool, grad: Tensor, given: Tensor) -> None:
        """Adds the gradient that a chunk's rows give to the weight's."""
        if need:
            first = name not in weight_grads
            if first:
                weight_grads[name] = grad.new_empty(grad.shape[1], given.shape[1], dtype=wide)
            add_product(weight_grads[name], grad.t(), given, first)

    dh: Tensor | None = None
    da = db = act = None
    for here in chunks:
        del da, db, act  # free the last chunk's
        if a is not None and b is not None:
            of_gate, of_up = rows_of(a), rows_of(b)
        else:
            assert h is not None
            of_gate, of_up = (torch.mm(h[here], w.t()) for w in (gate, up))
            if later and len(chunks) == 1:
                h = None
        act = None if glu_triton or not needs[3] else glu(of_gate, of_up, "swiglu", False)
        spend = overwrite or a is None
        da, db, value = glu_gradients(
            torch.mm(dy[here], down), of_gate, of_up, "swiglu", glu_triton, needs[3], spend
        )
        act = value if act is None else act
        del of_gate, of_up, value
        if act is not None:
            add("down", needs[3], dy[here], act.to(dtype))
            act = None
        if back:
            dh = dy.new_empty(len(dy), gate.shape[1]) if dh is None else dh
            torch.mm(da, gate, out=dh[here])
            dh[here].addmm_(db, up)  # accumulated in fp32, inside the matmul
        if h is not None:
            add("gate", needs[1], da, h[here])
            add("up", needs[2], db, h[here])
    dx: Tensor | None = None
    dw: Tensor | None = None
    if dh is not None:
        norm = (x, norm_weight, r, eps, norm_triton)
        need_h = forth and h is None
        dx, dw, made = norm_gradients(dh.view(x.shape), grad_total, *norm, needs[0], need_h)
        if made is not None:
            assert da is not None
            assert db is not None
            made = rows_of(made).to(dtype)
            add("gate", needs[1], da, made)
            add("up", needs[2], db, made)
    weights = {"gate": gate, "up": up, "down": down}
    return [
        empty(x) if dx is None else dx,
        empty(norm_weight) if dw is None else dw,
        *(weight_grads[n].to(dtype) if n in weight_grads else empty(w) for n, w in weights.items()),
    ]


def _gated_fake(
    x: Tensor,
    norm_weight: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    needs_input: bool,
    needs: Sequence[bool],
    **_: Any,
) -> list[Tensor]:
    leaves = zip((norm_weight, gate, up, down), needs, strict=True)
    return [empty(x, needs_input or needs[0]), *(empty(leaf, need) for leaf, need in leaves)]


def _gated_flops(
    grad: Sequence[int],
    gate: Sequence[int],
    down: Sequence[int],
    a: Sequence[int] | None,
    needs_input: bool,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    (width, dim), out = gate, down[0]
    products = out * (1 + needs[3])
    products += dim * (2 * (needs_input or needs[0]) + needs[1] + needs[2] + 2 * (a is None))
    return 2 * math.prod(grad[:-1]) * width * products


_gated_op = operator(
    "gated_mlp_backward", fake=_gated_fake, flops=_gated_flops, overwrites=("a", "b")
)(_gated_gradients)
_last_gated_op = torch.ops.nanovision.gated_mlp_backward_.default


def _gated_backward(
    grads: tuple[Tensor, Tensor],
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, ...],
    kept: tuple[Tensor, ...],
    *,
    eps: float,
    norm_triton: bool,
    glu_triton: bool,
    keep: bool,
    outside_func: bool,
) -> tuple[Tensor | None, ...]:
    r, a, b = kept if keep else (kept[0], None, None)
    last = outside_func and keep and is_last_backward(grads[0])
    op = _last_gated_op if last else _gated_op
    made = op(*grads, *tensors, r, a, b, eps, norm_triton, glu_triton, needs[0], list(needs[1:]))
    return tuple(g if need else None for g, need in zip(made, needs, strict=True))


def _gated_fold_backward(
    batch_size: int, needs: tuple[bool, ...], dims: Dims, saved: Tensors
) -> Tensors | None:
    """Each example has leaf gradients of its own, where one call would return their sum."""
    leaves = slice(3, 3 + len(needs) - 1)  # after two gradients and x
    if any(needs[1:]) or any(dim is not None for dim in dims[leaves]):
        return None
    front = fold_all(batch_size, dims[:3], saved[:3])
    kept = fold_all(batch_size, dims[leaves.stop :], saved[leaves.stop :])
    return front + saved[leaves] + kept


GATED_MLP = Op(
    "gated_mlp",
    gated_reference,
    _gated_forward,
    _gated_backward,
    outputs=2,
    of_sum=True,
    fold=partial(fold_rows, 2),
    fold_backward=_gated_fold_backward,
)


@allow_in_graph
def _apply_gated(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
    norm_triton: bool,
    glu_triton: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    tensors = (x, residual, norm_weight, gate, up, down)
    static = {"eps": eps, "norm_triton": norm_triton, "glu_triton": glu_triton, "keep": keep}
    return run(GATED_MLP, *tensors, **static, outside_func=_outside_func())


# Public


def add_norm_gated_mlp(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float = 1e-6,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """The MLP of a decoder block, and the residual stream that it starts from: (y, total).

    total = x + residual; h = rms_norm(total, norm_weight, eps); y = (silu(h Wg') * h Wu') Wd'
    (arXiv 2002.05202). Forward and backward equal, to the bit, `add_norm_linears` of gate and up
    followed by `glu_linear` of down, in less memory.

    Args:
        x: [..., D], any floating dtype.
        residual: like x; or None, then total is x, without a copy.
        norm_weight: [D], any floating dtype.
        gate, up: [F, D].
        down: [O, F], of their dtype.
        keep: whether backward keeps the outputs of gate and up, twice [..., F]. Otherwise it keeps
            only total and recomputes them, some rows at a time, so that long inputs never need a
            tensor of [N, F]. In a compiled block that is recomputed anyway this costs nothing.

    Returns:
        y [..., O] in the weights' dtype, total [..., D] in x.dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    >>> import torch
    >>> x, one, eye = torch.tensor([1.0, 2.0]), torch.ones(2), torch.eye(2)
    >>> y, total = add_norm_gated_mlp(x, torch.tensor([2.0, 1.0]), one, 9 * eye, eye, eye)
    >>> y.round().tolist(), total.tolist()
    ([9.0, 9.0], [3.0, 3.0])
    """
    where = "add_norm_gated_mlp"
    check_floating(where, x=x, residual=residual, down=down)
    check_norm_linears(where, x, norm_weight, (gate, up), (None, None), eps)
    fits = down.ndim == 2 and down.shape[1] == len(gate) and down.dtype == gate.dtype
    if gate.shape != up.shape or not fits:
        raise ValueError(
            f"{where}: gate and up must be alike, [F, D], and down [O, F] of their dtype; got "
            f"{gate.dtype} {tuple(gate.shape)}, {tuple(up.shape)} and {down.dtype} "
            f"{tuple(down.shape)}."
        )
    check_residual(where, x, residual)
    norm_triton, glu_triton = (
        choose(op, str(x.device), dtype) == "triton"
        for op, dtype in (("rms_norm", x.dtype), ("swiglu", gate.dtype))
    )
    return _apply_gated(
        x, residual, norm_weight, gate, up, down, eps, norm_triton, glu_triton, keep
    )
