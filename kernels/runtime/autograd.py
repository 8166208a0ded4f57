"""The pair of autograd Functions that every non-linear kernel runs through.

A kernel gives three things (an `Op`): a fast `forward`, a fast first-order `backward`, and a
`formula` of plain torch operations. This file makes of them something that is right under every
driver: autograd, `torch.func` grad / vjp / jvp / vmap in any nesting, grad of grad, and
`torch.compile`.

Why two Functions: eager `torch.func.grad` runs a backward with `create_graph=True`, and would
record (and keep) every intermediate of a backward written inline. As a Function of its own the
backward's work is one node, whose own derivatives come from the formula only when asked for.

Why `allow_in_graph`: under `torch.compile(torch.func.grad(f))` Dynamo inlines a Function's
`forward` and differentiates that, ignoring our backward without a word. Each kernel file therefore
calls `run` from one module-level function marked with `kernels.runtime.dynamo.allow_in_graph`.
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

    `formula(*tensors, **static) -> out`: plain torch, differentiable to any order, and vmappable.
    `forward(*tensors, **static) -> (out, residuals)`: the fast path; nothing is recorded in it.
        Residuals are extra tensors that `backward` wants.
    `backward(grad, needs, tensors, residuals, **static) -> grads`: one entry a tensor; those that
        `needs` does not ask for may be None.
    `outputs`: how many; with more than one, `out` and `grad` are tuples of that many tensors.

    A vmap level makes one call an example, right for any kernel, unless the op says better:
    `fold(batch_size, in_dims, tensors)` gives the tensors of one call over all examples, with a
        leading batch dimension in them and in what comes back; or None if there is no such call.
    `fold_backward(batch_size, needs, in_dims, saved)`: the same for `backward`, of what it is given
        (*grads, *tensors, *residuals). Gradients come back an example each: None where a gradient
        that `needs` asks for sums over what the examples share.
    `vmappable`: `backward` is plain out-of-place torch and may itself be vmapped.
    """

    name: str
    formula: Callable[..., Any]
    forward: Callable[..., tuple[Any, tuple[Tensor, ...]]]
    backward: Callable[..., Sequence[Tensor | None]]
    outputs: int = 1
    fold: Callable[[int, Dims, Tensors], Tensors | None] | None = None
    fold_backward: Callable[[int, tuple[bool, ...], Dims, Tensors], Tensors | None] | None = None
    vmappable: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    """An op with its static arguments bound; `eq=False` keeps it an opaque pytree leaf."""

    op: Op
    static: Mapping[str, Any]

    def formula(self, *tensors: Tensor | None) -> Any:
        return self.op.formula(*tensors, **self.static)

    def pack(self, tensors: Sequence[Tensor]) -> Any:
        """Outputs, or their gradients, in the form that the op's functions speak."""
        return tensors[0] if self.op.outputs == 1 else tuple(tensors)

    def unpack(self, out: Any) -> tuple[Tensor, ...]:
        return (out,) if self.op.outputs == 1 else out


def run(op: Op, *tensors: Tensor | None, **static: Any) -> Any:
    """`op.formula(*tensors, **static)`, computed and differentiated by the op's fast paths."""
    check_hidden()
    if nested_forward_mode():
        return op.formula(*tensors, **static)
    call = Call(op, static)
    return call.pack(ForwardFunction.apply(call, *tensors)[: op.outputs])


def run_of_sum(
    op: Op, x: Tensor, residual: Tensor | None, *leaves: Tensor | None, **static: Any
) -> Any:
    """`op.formula(x + residual, *leaves, **static)`, whose last output is that sum; None adds 0.

    Of such an op `forward` takes x and residual, `formula` and `backward` their sum.
    """
    check_hidden()
    if nested_forward_mode():
        return op.formula(x if residual is None else x + residual, *leaves, **static)
    call = Call(op, static)
    return call.pack(SumFunction.apply(call, x, residual, *leaves)[: op.outputs])


def nested_forward_mode() -> bool:
    """Whether two or more `torch.func.jvp` levels are active (a jvp of a jvp, jacfwd of jacfwd).

    PyTorch runs a Function's `jvp` with forward mode switched off, so the outer level's tangent
    would be dropped there without a word. Plain operations are right.
    """
    if not torch._C._are_functorch_transforms_active():
        return False
    jvp = torch._C._functorch.TransformType.Jvp
    return sum(level.key() == jvp for level in func_levels()) >= 2


def func_levels() -> list[Any]:
    """The `torch.func` transforms that are active, outermost first: each has a key and a level."""
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
    """x itself, or contiguous if it is expanded: ``torch.func.jvp`` writes beside its primals, and
    refuses one in which a place stands for several numbers."""
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
    """`fn` (returning a tuple of tensors) once an example; the outputs stacked on dimension 0."""
    outs = []
    for i in range(batch_size):
        pairs = zip(tensors, in_dims, strict=True)
        outs.append(fn(*(t if t is None or d is None else t.select(d, i) for t, d in pairs)))
    return tuple(torch.stack(column) for column in zip(*outs, strict=True))


def batch_first(x: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """x with its batch dimension in front, repeated there (as a view) if it has none."""
    return x.expand(batch_size, *x.shape) if dim is None else x.movedim(dim, 0)


def fold_all(batch_size: int, in_dims: Dims, tensors: Tensors) -> Tensors:
    """The `fold` of an op that takes all its tensors with the examples' dimension in front."""
    pairs = zip(tensors, in_dims, strict=True)
    return tuple(t if t is None else batch_first(t, dim, batch_size) for t, dim in pairs)


def fold_rows(inputs: int, batch_size: int, dims: Dims, tensors: Tensors) -> Tensors | None:
    """Examples are more rows of the first tensors, if they share all others (weights, biases)."""
    if any(dim is not None for dim in dims[inputs:]):
        return None
    return fold_all(batch_size, dims[:inputs], tensors[:inputs]) + tensors[inputs:]


def fold_all_backward(
    batch_size: int, needs: tuple[bool, ...], in_dims: Dims, saved: Tensors
) -> Tensors:
    """The `fold_backward` of such an op."""
    return fold_all(batch_size, in_dims, saved)


def with_signature(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Writes the signature of `forward` down, which `apply` else derives anew: 20 us a call."""
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
    return function


def _materialized(
    cotangents: Sequence[Tensor | None],
    outs: Sequence[tuple[torch.Size, torch.dtype, torch.device]],
) -> list[Tensor] | None:
    """Zeros for the outputs that have no gradient; None if none has one."""
    given = cotangents[: len(outs)]
    if all(cotangent is None for cotangent in given):
        return None
    return [
        torch.zeros(shape, dtype=dtype, device=device) if cotangent is None else cotangent
        for cotangent, (shape, dtype, device) in zip(given, outs, strict=True)
    ]


@with_signature
class ForwardFunction(torch.autograd.Function):
    """(call, *tensors) -> (*outs, *residuals)."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        out, residuals = call.op.forward(*tensors, **call.static)
        return (*call.unpack(out), *residuals)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, tensors = inputs[0], inputs[1:]
        outs, residuals = output[: ctx.call.op.outputs], output[ctx.call.op.outputs :]
        ctx.count = len(tensors)
        ctx.outs = [(x.shape, x.dtype, x.device) for x in outs]
        ctx.save_for_backward(*tensors, *residuals)
        ctx.save_for_forward(*tensors, *residuals)
        ctx.mark_non_differentiable(*residuals)
        ctx.set_materialize_grads(False)  # residuals never get a gradient: make no zeros for them

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = tuple(ctx.needs_input_grad[1:])
        full = _materialized(cotangents, ctx.outs)
        if full is None or not any(needs):
            return (None,) * (1 + ctx.count)
        grads = iter(BackwardFunction.apply(ctx.call, needs, *full, *ctx.saved_tensors))
        return (None, *(next(grads) if need else None for need in needs))

    @staticmethod
    def jvp(ctx: Any, _call: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        out = push(ctx.call.formula, saved[: ctx.count], tangents)
        return (*ctx.call.unpack(out), *(None for _ in saved[ctx.count :]))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], call: Call, *tensors: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims = in_dims[1:]
        folded = call.op.fold and call.op.fold(info.batch_size, dims, tensors)
        if folded:
            outs = ForwardFunction.apply(call, *folded)
        else:
            outs = each_example(
                lambda *example: ForwardFunction.apply(call, *example),
                info.batch_size,
                dims,
                tensors,
            )
        return outs, (0,) * len(outs)


@with_signature
class SumFunction(torch.autograd.Function):
    """(call, x, residual, *leaves) -> (*outs, total, *statistics) with total = x + residual.

    Derivatives depend on x and residual through total alone: the op's formula and backward are of
    (total, *leaves), and total is kept where `ForwardFunction` would keep x and residual. Without
    a residual total is x, handed on: a gradient of it is then one that backward adds to that of x.
    """

    @staticmethod
    def forward(
        call: Call, x: Tensor, residual: Tensor | None, *leaves: Tensor | None
    ) -> tuple[Tensor, ...]:
        outs, statistics = call.op.forward(x, residual, *leaves, **call.static)
        return (*outs, *statistics)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, x, residual, *leaves = inputs
        outs, statistics = output[: ctx.call.op.outputs], output[ctx.call.op.outputs :]
        total = x if residual is None else outs[-1]
        ctx.count = len(leaves)
        ctx.outs = [(out.shape, out.dtype, out.device) for out in outs]
        ctx.save_for_backward(total, *leaves, *statistics)
        ctx.save_for_forward(total, *leaves, *statistics)
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        of_x, of_residual, *of_leaves = ctx.needs_input_grad[1:]
        needs = (of_x or of_residual, *of_leaves)
        full = _materialized(cotangents, ctx.outs)
        if full is None or not any(needs):
            return (None,) * (3 + ctx.count)
        grads = iter(BackwardFunction.apply(ctx.call, needs, *full, *ctx.saved_tensors))
        of_total, *rest = (next(grads) if need else None for need in needs)
        return (None, of_total if of_x else None, of_total if of_residual else None, *rest)

    @staticmethod
    def jvp(
        ctx: Any,
        _call: None,
        dx: Tensor | None,
        dresidual: Tensor | None,
        *dleaves: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        moves = [t for t in (dx, dresidual) if t is not None]
        dtotal = None if not moves else moves[0] if len(moves) == 1 else moves[0] + moves[1]
        primals = ctx.saved_tensors[: 1 + ctx.count]
        outs = push(ctx.call.formula, primals, (dtotal, *dleaves))
        return (*outs, *(None for _ in ctx.saved_tensors[1 + ctx.count :]))

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        call: Call,
        x: Tensor,
        residual: Tensor | None,
        *leaves: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims, size, tensors = in_dims[1:], info.batch_size, (x, residual, *leaves)
        if all(dim is None for dim in dims[2:]):  # examples are more rows
            pair = fold_all(size, dims[:2], tensors[:2])
            outs = SumFunction.apply(call, *pair, *leaves)
        else:
            outs = each_example(
                lambda *example: SumFunction.apply(call, *example), size, dims, tensors
            )
        return outs, (0,) * len(outs)


def _gradient(call: Call, needs: tuple[bool, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """What `BackwardFunction` computes, as a differentiable function of (*grads, *tensors)."""
    wanted = [i for i, need in enumerate(needs) if need]
    outputs = call.op.outputs

    def gradient(*primals: Any) -> tuple[Tensor, ...]:
        grad = call.pack(primals[:outputs])
        return tuple(pull(call.formula, primals[outputs:], wanted, grad))

    return gradient


def _first_order(call: Call, needs: tuple[bool, ...], *saved: Any) -> tuple[Tensor, ...]:
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
    """(call, needs, *grads, *tensors, *residuals) -> the gradients that are needed."""

    @staticmethod
    def forward(call: Call, needs: tuple[bool, ...], *saved: Tensor | None) -> tuple[Tensor, ...]:
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
        call: Call,
        needs: tuple[bool, ...],
        *saved: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims = in_dims[2:]
        fold = call.op.fold_backward
        folded = fold and fold(info.batch_size, needs, dims, saved)
        if folded:
            outs = BackwardFunction.apply(call, needs, *folded)
        elif call.op.vmappable:
            # The fast backward takes residuals for constants: wrong where an outer level
            # differentiates (torch.func.hessian, jacrev of jacrev).
            if differentiated(saved):
                primals = call.op.outputs + len(needs)

                def one(*example: Any) -> tuple[Tensor, ...]:
                    return _gradient(call, needs)(*example[:primals])
            else:

                def one(*example: Any) -> tuple[Tensor, ...]:
                    return _first_order(call, needs, *example)

            outs = torch.func.vmap(one, in_dims=dims, randomness=info.randomness)(*saved)
        else:
            outs = each_example(
                lambda *example: BackwardFunction.apply(call, needs, *example),
                info.batch_size,
                dims,
                saved,
            )
        return outs, (0,) * len(outs)


_TRACING_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
    torch._C._TorchDispatchModeKey.PROXY,
)


def can_read(tensor: Tensor) -> bool:
    """Whether Python may look at the values: a real CPU tensor, not traced and not wrapped.

    On an accelerator reading would stall the stream, so the answer there is no.
    """
    return (
        not torch.compiler.is_compiling()  # first: Dynamo then sees none of what follows
        and tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)  # not fake, not functional, no subclass
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not any(torch._C._get_dispatch_mode(mode) for mode in _TRACING_MODES)
    )


def shaped(y: Tensor, *shape: int) -> Tensor:
    """y in this shape, in the same memory, yet no view: autograd lets nobody change a view that
    came out of a Function in place, and models do change what a layer gave them."""
    return torch.ops.aten._unsafe_view(y, shape)


def rows_of(x: Tensor) -> Tensor:
    """[..., D] as [rows, D]; the number of rows is said, since D may be 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics are kept in: fp32, or fp64 for fp64."""
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
    """ValueError unless two tensors live on one device."""
    if a.device != b.device:
        raise ValueError(
            f"{where}: {first} is on {a.device} but {second} is on {b.device}; "
            "move them to one device."
        )
