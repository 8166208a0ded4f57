"""The pair of autograd Functions that every nonlinear kernel runs through.

A kernel provides three functions (an `Op`): a fast `forward`, a fast first-order `backward`, and a
`formula` of plain torch operations. From these, this file makes a function that is correct under
autograd, `torch.func` grad / vjp / jvp / vmap in any nesting, double backward and `torch.compile`.

Why two Functions: eager `torch.func.grad` runs a backward with `create_graph=True`. It would record
and keep every intermediate of a backward written inline. As a Function of its own the backward is
one node, whose derivatives come from the formula, and only on demand.

Why `allow_in_graph`: under `torch.compile(torch.func.grad(f))` Dynamo inlines a Function's
`forward` and differentiates it, silently ignoring the Function's backward. Each kernel file
therefore calls `run` from one module-level function marked with
`kernels.runtime.dynamo.allow_in_graph`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.runtime.dynamo import check_hidden

Tensors = tuple[Tensor | None, ...]
Dims = tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Op:
    """A differentiable kernel.

    formula: `(*tensors, **static) -> out`: plain torch, differentiable to any order, and vmappable.
    forward: `(*tensors, **static) -> (out, residuals)`: the fast path, which autograd does not
        record. Residuals are further tensors that `backward` needs.
    backward: `(grad, needs, tensors, residuals, **static) -> grads`: one entry per tensor, which
        may be None where `needs` is False.
    outputs: their number. With more than one, `out` and `grad` are tuples of that many tensors.
    of_sum: `forward` takes `(x, residual, *leaves)`, of which the residual may be None. `formula`
        and `backward` take `(x + residual, *leaves)` instead, and the last output is that sum. The
        derivatives depend on x and the residual only through it, so backward keeps the sum alone.
    fold: by default vmap calls the kernel once per example. `fold(batch_size, in_dims, tensors)`
        returns the tensors of one call for all examples, where every tensor that the call returns
        has a leading batch dimension; or None if there is no such call.
    fold_backward: `(batch_size, needs, in_dims, saved)`: the same for `backward` and its arguments
        (*grads, *tensors, *residuals). The call must return a gradient per example: None where it
        would return a sum over the examples.
    vmappable: `backward` is plain out-of-place torch, and vmap may differentiate it as it is.
    """

    name: str
    formula: Callable[..., Any]
    forward: Callable[..., tuple[Any, tuple[Tensor, ...]]]
    backward: Callable[..., Sequence[Tensor | None]]
    outputs: int = 1
    of_sum: bool = False
    fold: Callable[[int, Dims, Tensors], Tensors | None] | None = None
    fold_backward: Callable[[int, tuple[bool, ...], Dims, Tensors], Tensors | None] | None = None
    vmappable: bool = False


@dataclass(frozen=True, eq=False)
class BoundOp:
    """An op with its static arguments; `eq=False` keeps it an opaque pytree leaf."""

    op: Op
    static: Mapping[str, Any]

    def formula(self, *tensors: Tensor | None) -> Any:
        return self.op.formula(*tensors, **self.static)

    def pack(self, tensors: Sequence[Tensor]) -> Any:
        """Outputs or their gradients in the form that the op's functions use."""
        return tensors[0] if self.op.outputs == 1 else tuple(tensors)

    def unpack(self, out: Any) -> tuple[Tensor, ...]:
        return (out,) if self.op.outputs == 1 else out


def run(op: Op, *tensors: Tensor | None, **static: Any) -> Any:
    """`op.formula(*tensors, **static)`, computed and differentiated by the op's fast paths."""
    check_hidden()
    if nested_forward_mode():
        if op.of_sum:
            tensors = (_sum(*tensors[:2]), *tensors[2:])
        return op.formula(*tensors, **static)
    call = BoundOp(op, static)
    return call.pack(ForwardFunction.apply(call, *tensors)[: op.outputs])


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is zero."""
    return b if a is None else a if b is None else a + b


def nested_forward_mode() -> bool:
    """Whether two or more `torch.func.jvp` levels are active (a jvp of a jvp, jacfwd of jacfwd).

    PyTorch runs a Function's `jvp` with forward mode switched off, so the outer level's tangent
    would silently be lost there. Plain operations are correct.
    """
    if not torch._C._are_functorch_transforms_active():
        return False
    jvp = torch._C._functorch.TransformType.Jvp
    return sum(level.key() == jvp for level in func_levels()) >= 2


def func_levels() -> list[Any]:
    """The active `torch.func` transforms, outermost first; each has a key and a level."""
    return torch._C._functorch.get_interpreter_stack() or []


def differentiated(tensors: Tensors) -> bool:
    """Whether plain autograd or an active `torch.func` level differentiates here."""
    vmap = torch._C._functorch.TransformType.Vmap
    return any(level.key() != vmap for level in func_levels()) or any(
        t is not None and t.requires_grad for t in tensors
    )


def pull(
    fn: Callable[..., Any], primals: Tensors, wanted: Sequence[int], cotangents: Any
) -> Sequence[Tensor]:
    """Gradients of `fn(*primals)` with respect to `primals[i] for i in wanted`."""

    def partial(*chosen: Tensor) -> Any:
        return fn(*_replaced(primals, wanted, chosen))

    chosen = [primals[i] for i in wanted]
    return torch.func.vjp(partial, *chosen)[1](cotangents)


def push(fn: Callable[..., Any], primals: Tensors, tangents: Tensors) -> Any:
    """The tangent of `fn(*primals)`; a tangent of None means zero."""
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def partial(*chosen: Tensor) -> Any:
        return fn(*_replaced(primals, moving, chosen))

    chosen = tuple(unexpanded(x) for i in moving if (x := primals[i]) is not None)
    return torch.func.jvp(partial, chosen, tuple(tangents[i] for i in moving))[1]


def unexpanded(x: Tensor) -> Tensor:
    """x, or a contiguous copy if it is expanded: ``torch.func.jvp`` refuses primals of which
    several elements share memory."""
    expanded = any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True))
    return x.contiguous() if expanded else x


def _replaced(values: Tensors, indices: Sequence[int], new: Sequence[Tensor]) -> list[Any]:
    out = list(values)
    for i, tensor in zip(indices, new, strict=True):
        out[i] = tensor
    return out


def each_example(
    fn: Callable[..., Any], batch_size: int, in_dims: Dims, tensors: Tensors
) -> tuple[Tensor, ...]:
    """Calls `fn`, which returns a tuple of tensors, per example and stacks the outputs."""
    outs = []
    for i in range(batch_size):
        pairs = zip(tensors, in_dims, strict=True)
        outs.append(fn(*(t if t is None or d is None else t.select(d, i) for t, d in pairs)))
    return tuple(torch.stack(column) for column in zip(*outs, strict=True))


def batch_first(x: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """x with its batch dimension first; if it has none, expanded (as a view)."""
    return x.expand(batch_size, *x.shape) if dim is None else x.movedim(dim, 0)


def fold_all(batch_size: int, in_dims: Dims, tensors: Tensors) -> Tensors:
    """The `fold` of an op that takes all its tensors with a leading batch dimension."""
    pairs = zip(tensors, in_dims, strict=True)
    return tuple(t if t is None else batch_first(t, dim, batch_size) for t, dim in pairs)


def fold_rows(inputs: int, batch_size: int, dims: Dims, tensors: Tensors) -> Tensors | None:
    """Examples become further rows of the first tensors if they share the others (weights)."""
    if any(dim is not None for dim in dims[inputs:]):
        return None
    return fold_all(batch_size, dims[:inputs], tensors[:inputs]) + tensors[inputs:]


def fold_all_backward(
    batch_size: int, needs: tuple[bool, ...], in_dims: Dims, saved: Tensors
) -> Tensors:
    """The `fold_backward` of such an op."""
    return fold_all(batch_size, in_dims, saved)


def with_signature(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Caches the signature of `forward`, which `apply` otherwise derives in each call (20 us)."""
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
    return function


def _materialized(
    cotangents: Sequence[Tensor | None],
    outs: Sequence[tuple[torch.Size, torch.dtype, torch.device]],
) -> list[Tensor] | None:
    """The outputs' gradients, with zeros where there is none; None if no output has a gradient."""
    given = cotangents[: len(outs)]
    if all(cotangent is None for cotangent in given):
        return None
    return [
        torch.zeros(shape, dtype=dtype, device=device) if cotangent is None else cotangent
        for cotangent, (shape, dtype, device) in zip(given, outs, strict=True)
    ]


def vmap_rule(
    function: Any,
    head: tuple[Any, ...],
    folded: Tensors | None,
    info: Any,
    dims: Dims,
    tensors: Tensors,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The vmap rule of a Function of (*head, *tensors): one call if they fold, else one each."""
    if folded is not None:
        outs = function.apply(*head, *folded)
    else:

        def one(*example: Tensor | None) -> Any:
            return function.apply(*head, *example)

        outs = each_example(one, info.batch_size, dims, tensors)
    return outs, (0,) * len(outs)


@with_signature
class ForwardFunction(torch.autograd.Function):
    """(call, *tensors) -> (*outs, *residuals).

    It saves the formula's arguments and the residuals. For an op of a sum without a residual the
    sum is x itself, and backward adds the gradient of the last output to that of x.
    """

    @staticmethod
    def forward(call: BoundOp, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        out, residuals = call.op.forward(*tensors, **call.static)
        return (*call.unpack(out), *residuals)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *primals = inputs
        op = ctx.call.op
        outs, residuals = output[: op.outputs], output[op.outputs :]
        if op.of_sum:
            x, residual, *leaves = primals
            primals = [x if residual is None else outs[-1], *leaves]
        ctx.count = len(primals)
        ctx.outs = [(out.shape, out.dtype, out.device) for out in outs]
        ctx.save_for_backward(*primals, *residuals)
        ctx.save_for_forward(*primals, *residuals)
        ctx.mark_non_differentiable(*residuals)
        ctx.set_materialize_grads(False)  # residuals have no gradient: allocate no zeros for them

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        asked = needs = tuple(ctx.needs_input_grad[1:])
        of_sum = ctx.call.op.of_sum
        if of_sum:
            needs = (asked[0] or asked[1], *asked[2:])
        full = _materialized(cotangents, ctx.outs)
        if full is None or not any(needs):
            return (None,) * (1 + len(asked))
        made = iter(BackwardFunction.apply(ctx.call, needs, *full, *ctx.saved_tensors))
        grads = [next(made) if need else None for need in needs]
        if of_sum:
            grads.insert(0, grads[0])
        return (None, *(g if need else None for g, need in zip(grads, asked, strict=True)))

    @staticmethod
    def jvp(ctx: Any, _call: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if ctx.call.op.of_sum:
            tangents = (_sum(*tangents[:2]), *tangents[2:])
        out = push(ctx.call.formula, saved[: ctx.count], tangents)
        return (*ctx.call.unpack(out), *(None for _ in saved[ctx.count :]))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], call: BoundOp, *tensors: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims = in_dims[1:]
        folded = call.op.fold(info.batch_size, dims, tensors) if call.op.fold else None
        return vmap_rule(ForwardFunction, (call,), folded, info, dims, tensors)


def _gradient(call: BoundOp, needs: tuple[bool, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients as a differentiable function of (*grads, *tensors), by the formula."""
    wanted = [i for i, need in enumerate(needs) if need]
    outputs = call.op.outputs

    def gradient(*primals: Any) -> tuple[Tensor, ...]:
        grad = call.pack(primals[:outputs])
        return tuple(pull(call.formula, primals[outputs:], wanted, grad))

    return gradient


def _first_order(call: BoundOp, needs: tuple[bool, ...], *saved: Any) -> tuple[Tensor, ...]:
    outputs = call.op.outputs
    residuals = outputs + len(needs)
    grads = call.op.backward(
        call.pack(saved[:outputs]),
        needs,
        saved[outputs:residuals],
        saved[residuals:],
        **call.static,
    )
    wanted = []
    for g, need in zip(grads, needs, strict=True):
        if need:
            assert g is not None, f"{call.op.name}: backward left out a gradient that is needed"
            wanted.append(g)
    return tuple(wanted)


@with_signature
class BackwardFunction(torch.autograd.Function):
    """(call, needs, *grads, *tensors, *residuals) -> the gradients that `needs` asks for."""

    @staticmethod
    def forward(
        call: BoundOp, needs: tuple[bool, ...], *saved: Tensor | None
    ) -> tuple[Tensor, ...]:
        return _first_order(call, needs, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, ctx.needs = inputs[:2]
        # grads and tensors; the formula needs no residuals
        primals = inputs[2 : 2 + ctx.call.op.outputs + len(ctx.needs)]
        ctx.unused = len(inputs) - 2 - len(primals)
        ctx.save_for_backward(*primals)
        ctx.save_for_forward(*primals)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        primals = ctx.saved_tensors
        wanted = [i for i in range(len(primals)) if ctx.needs_input_grad[2 + i]]
        gradient = _gradient(ctx.call, ctx.needs)
        grads: list[Tensor | None] = [None] * len(primals)
        for i, g in zip(wanted, pull(gradient, primals, wanted, cotangents), strict=True):
            grads[i] = g
        return (None, None, *grads, *(None,) * ctx.unused)

    @staticmethod
    def jvp(ctx: Any, _call: None, _needs: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        primals = ctx.saved_tensors
        return push(_gradient(ctx.call, ctx.needs), primals, tangents[: len(primals)])

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        call: BoundOp,
        needs: tuple[bool, ...],
        *saved: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims, fold = in_dims[2:], call.op.fold_backward
        folded = fold(info.batch_size, needs, dims, saved) if fold else None
        if folded is not None or not call.op.vmappable:
            return vmap_rule(BackwardFunction, (call, needs), folded, info, dims, saved)
        primals = call.op.outputs + len(needs)
        # The fast backward takes the residuals as constants, which is wrong where an outer level
        # differentiates (torch.func.hessian, jacrev of jacrev).
        exact = differentiated(saved)

        def one(*example: Any) -> tuple[Tensor, ...]:
            if exact:
                return _gradient(call, needs)(*example[:primals])
            return _first_order(call, needs, *example)

        outs = torch.func.vmap(one, in_dims=dims, randomness=info.randomness)(*saved)
        return outs, (0,) * len(outs)


_TRACING_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
    torch._C._TorchDispatchModeKey.PROXY,
)


def can_read(tensor: Tensor) -> bool:
    """Whether Python may read the values: of a CPU tensor that is neither traced nor wrapped.

    On an accelerator the answer is no, because a read would stall the stream.
    """
    return (
        not torch.compiler.is_compiling()  # first, so that Dynamo does not trace the rest
        and tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)  # not fake, not functional, no subclass
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not any(torch._C._get_dispatch_mode(mode) for mode in _TRACING_MODES)
    )


def is_batched(x: Tensor) -> bool:
    """Whether x stands for many tensors: under `torch.func`, or with `is_grads_batched`."""
    legacy: bool = torch._C._functorch.is_legacy_batchedtensor(x)
    return legacy or torch._C._are_functorch_transforms_active()


def is_last_backward(grad: Tensor) -> bool:
    """In the backward of a Function: whether autograd will not ask for its saved tensors again."""
    return (
        is_eager(grad)  # a compiler plans memory itself
        and not is_batched(grad)
        and not torch.is_grad_enabled()
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    )


def is_eager(x: Tensor) -> bool:
    """Whether x has values, and is no tensor that a compiler traces with."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def shaped(y: Tensor, *shape: int) -> Tensor:
    """y in this shape and the same memory, but not as a view: autograd forbids in-place changes of
    a view that a Function returned, and models do change a layer's output in place."""
    return torch.ops.aten._unsafe_view(y, shape)


def rows_of(x: Tensor) -> Tensor:
    """[..., D] as [rows, D]; also for D = 0, where reshape cannot infer the rows."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_floating(where: str, **tensors: Tensor | None) -> None:
    """ValueError unless all given tensors are floating point and on one device."""
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{where}: {name} must be floating point, got {tensor.dtype}.")
        first = first or (name, tensor)
        check_device(where, first[0], first[1], name, tensor)


def check_device(where: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    """ValueError unless two tensors are on one device."""
    if a.device != b.device:
        raise ValueError(
            f"{where}: {first} is on {a.device} but {second} is on {b.device}; "
            "move them to one device."
        )
