"""One step of AdamW over many leaves, in place: fp32 or bf16 states, gradients of any dtype.

On a GPU one launch a group of like dtypes (`adamw_triton`). It multiplies gradients by the
clipping factor as it reads them, and writes the bf16 copy of fp32 weights that the next forward
uses: neither clipping nor casting costs a pass of its own. Per parameter 28 bytes are moved with
fp32 states and a bf16 gradient and copy, 14 with bf16 states.

Weights and moments of bf16 are rounded stochastically: up with the probability of what is cut off.
Rounding to the nearest would lose every step smaller than half a unit in the last place, 2^-9 of
the weight, and with it most of training; rounded so, they are kept on average ("Revisiting BFloat16
Training", arXiv 2010.06192).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.optimizer.adamw_triton import Plan, adamw_launch, make_plan, step_table
from kernels.runtime.dispatch import TORCH, TRITON, choose, declare
from kernels.runtime.hashing import LOW, lowbias32
from kernels.runtime.operators import operator

declare("adamw", TRITON, TORCH)

_STATES = (torch.float32, torch.bfloat16)
_GRADS = (torch.float32, torch.bfloat16, torch.float16)
_KEPT = 16  # plans: a training run has one a group
_plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.01,
    scale: Tensor | None = None,
    copies: Sequence[Tensor | None] | None = None,
    seed: int = 0,
) -> None:
    """A step of AdamW (arXiv 1711.05101), in place, computed in fp32, not differentiable.

    m' = beta1 m + (1 - beta1) g; v' = beta2 v + (1 - beta2) g^2;
    p' = p - lr (weight_decay p + m' / (1 - beta1^step) / (sqrt(v' / (1 - beta2^step)) + eps))

    Args:
        params: leaves of any shape, contiguous, fp32 or bf16, all on one device. Leaves that begin
            at a multiple of 16 bytes are the fast case, as all are that are not views.
        grads: of the same shapes, fp32, bf16 or fp16, whatever the params are; one that is not
            contiguous is copied first.
        exp_avgs, exp_avg_sqs: the moments, contiguous, fp32 or bf16, both of a leaf alike.
        step: counted from 1, for the bias correction.
        weight_decay: decoupled; one for all, or one a leaf.
        scale: fp32 scalar tensor on that device that multiplies all gradients; nothing waits for
            it.
        copies: bf16 twins of fp32 leaves, or None, that get the new params, rounded to the nearest.
        seed: of the stochastic rounding of bf16 params and moments: a hash of seed, step, number of
            the leaf in the list and place in the leaf, the same on every device.

    Raises:
        ValueError: lists of different lengths, shapes or dtypes or devices that do not fit, a leaf
            that is not contiguous, a step below 1.

    >>> import torch
    >>> p, g, m, v = torch.ones(2), torch.tensor([1.0, -1.0]), torch.zeros(2), torch.zeros(2)
    >>> adamw_([p], [g], [m], [v], step=1, lr=0.5, weight_decay=0.0)
    >>> [round(x, 6) for x in p.tolist()]
    [0.5, 1.5]
    """
    if not params:
        return
    twins = [None] * len(params) if copies is None else list(copies)
    decays = (
        [float(weight_decay)] * len(params)
        if isinstance(weight_decay, int | float)
        else [float(decay) for decay in weight_decay]
    )
    _check(params, grads, exp_avgs, exp_avg_sqs, twins, decays, scale, step)
    given = [c for c in twins if c is not None]
    copied = [i for i, c in enumerate(twins) if c is not None]
    _op(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), given, copied, decays, scale,
        step, lr, beta1, beta2, eps, seed,
    )  # fmt: skip


def _adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    copied: Sequence[int],
    decays: Sequence[float],
    scale: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    seed: int,
) -> None:
    """`adamw_`, of arguments that fit; copies: those of the leaves in `copied`."""
    twins = dict(zip(copied, copies, strict=True))
    triton = choose("adamw", str(params[0].device), params[0].dtype) == "triton"
    key = _key(seed, step)
    groups: dict[tuple[torch.dtype, torch.dtype, torch.dtype, bool], list[int]] = {}
    for i, (p, g, m) in enumerate(zip(params, grads, exp_avgs, strict=True)):
        if not p.numel():
            continue
        if triton:
            groups.setdefault((p.dtype, g.dtype, m.dtype, i in twins), []).append(i)
        else:
            _step_torch(
                p, g, m, exp_avg_sqs[i], twins.get(i), decays[i], scale, step, lr, beta1, beta2,
                eps, key + i,
            )  # fmt: skip
    numbers = _numbers(step, lr, beta1, beta2)
    for (param, grad, moment, copy), chosen in groups.items():
        plan = _plan(params, exp_avgs, exp_avg_sqs, twins, decays, chosen)
        given = [grads[i].contiguous() for i in chosen]  # alive until the launch
        adamw_launch(
            plan, step_table(given, numbers, key), scale,
            beta1=beta1, beta2=beta2, eps=eps, param=param, grad=grad, moment=moment, copy=copy,
        )  # fmt: skip


_op = operator(
    "adamw_",
    fake=lambda **_: None,
    mutates=("params", "exp_avgs", "exp_avg_sqs", "copies"),
)(_adamw)


def _numbers(step: int, lr: float, beta1: float, beta2: float) -> tuple[float, float, float]:
    """The rate, and what corrects the bias of m and of sqrt(v)."""
    return lr, 1 / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together: an fp32 scalar on their device, summed in fp32 whatever
    they are, in the order given. That of none is 0, on the CPU.

    >>> import torch
    >>> grad_norm([torch.tensor([3.0]), torch.tensor([[4.0]], dtype=torch.bfloat16)]).item()
    5.0
    """
    if not grads:
        return torch.zeros(())
    if grads[0].device.type == "cpu":
        return torch.linalg.vector_norm(torch.stack([_norm_in_rows(grad) for grad in grads]))
    by_dtype: dict[torch.dtype, list[int]] = {}  # few launches for many leaves, if they are alike
    for i, grad in enumerate(grads):
        by_dtype.setdefault(grad.dtype, []).append(i)
    norms = dict[int, Tensor]()
    for chosen in by_dtype.values():
        alike = torch._foreach_norm([grads[i] for i in chosen], 2, dtype=torch.float32)
        norms.update(zip(chosen, alike, strict=True))
    return torch.linalg.vector_norm(torch.stack([norms[i] for i in range(len(grads))]))


_ROW = 1024


def _norm_in_rows(x: Tensor) -> Tensor:
    """The norm of rows, the norm of their norms, and so on.

    On a CPU, PyTorch adds the squares of a tensor one after the other: of 3e7 normal numbers the
    norm is off by 2e-3. On a GPU it adds in a tree, as here.
    """
    x = x.flatten()
    while x.numel() > _ROW:
        rows, rest = x[: x.numel() // _ROW * _ROW].view(-1, _ROW), x[x.numel() // _ROW * _ROW :]
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        x = torch.cat([norms, rest.float()])
    return torch.linalg.vector_norm(x, dtype=torch.float32)


# Plans


def _plan(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    twins: dict[int, Tensor],
    decays: Sequence[float],
    chosen: list[int],
) -> Plan:
    """The tables of the chosen leaves. All that a plan is made of is in its key, so that memory
    which was freed and taken for something else gets tables of its own."""
    key = (
        params[0].device,
        *chosen,
        *(params[i].data_ptr() for i in chosen),
        *(params[i].numel() for i in chosen),
        *(exp_avgs[i].data_ptr() for i in chosen),
        *(exp_avg_sqs[i].data_ptr() for i in chosen),
        *(twins[i].data_ptr() for i in chosen if i in twins),  # of a group: all or none
        *(decays[i] for i in chosen),
    )
    if key not in _plans:
        _plans[key] = make_plan(
            [params[i] for i in chosen],
            [exp_avgs[i] for i in chosen],
            [exp_avg_sqs[i] for i in chosen],
            [twins.get(i) for i in chosen],
            [decays[i] for i in chosen],
            chosen,
        )
        if len(_plans) > _KEPT:
            _plans.popitem(last=False)
    _plans.move_to_end(key)
    return _plans[key]


# Torch, leaf by leaf


def _step_torch(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    copy: Tensor | None,
    decay: float,
    scale: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    key: int,
) -> None:
    """One leaf: PyTorch's fused AdamW if all is fp32, else the kernel's arithmetic, in its order,
    so that the same bits come out."""
    g = g.float().contiguous()
    if scale is not None:
        g = g * scale
    if p.dtype == m.dtype == torch.float32:
        count = torch.tensor(float(step), device=p.device)
        torch._fused_adamw_(
            [p], [g], [m], [v], [], [count],
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False,
            maximize=False,
        )  # fmt: skip
    else:
        numbers = [*_numbers(step, lr, beta1, beta2), decay]
        rate, first, second, shrink = torch.tensor(numbers, dtype=torch.float32, device=p.device)
        x, mean, square = p.float(), m.float(), v.float()
        mean = mean + (1 - beta1) * (g - mean)
        square = beta2 * square + (1 - beta2) * g * g
        x = x - rate * shrink * x
        root = square.double().sqrt().float()  # PyTorch's fp32 root may be off by the last bit
        x = x - rate * first * mean / (root * second + eps)
        one, two = _noise(p.shape, key, p.device)
        _round_into(p, x, one & 0xFFFF)
        _round_into(m, mean, one >> 16)
        _round_into(v, square, two >> 16)
    if copy is not None:
        copy.copy_(p)


# Stochastic rounding


def _key(seed: int, step: int) -> int:
    """32 bits of a seed and a step."""
    return lowbias32(lowbias32(lowbias32(seed & LOW) + (seed >> 32 & LOW) & LOW) + step & LOW)


def _noise(shape: torch.Size, key: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two words of 32 random bits an element, int64; key: of seed and step, and the leaf's number
    added."""
    at = torch.arange(shape.numel(), device=device).view(shape)
    here = lowbias32(lowbias32(key & LOW) + (at >> 32) & LOW)
    one = lowbias32((at & LOW) ^ here)
    return one, one * 0x9E3779B1 & LOW


def _round_into(leaf: Tensor, x: Tensor, noise: Tensor) -> None:
    leaf.copy_(_stochastic(x, noise) if leaf.dtype == torch.bfloat16 else x)


def _stochastic(x: Tensor, noise: Tensor) -> Tensor:
    """fp32 x to bf16: up with the probability of what is cut off; noise: 16 random bits each.

    From the largest number of bf16 on, and for NaN, to the nearest: what is finite there stays so.
    """
    bits = x.view(torch.int32).long() + noise  # a sign bit is kept: it only grows in magnitude
    drawn = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.abs() < torch.finfo(torch.bfloat16).max, drawn, x.to(torch.bfloat16))


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    decays: Sequence[float],
    scale: Tensor | None,
    step: int,
) -> None:
    given = {
        "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "copies": copies,
        "weight_decay": decays,
    }  # fmt: skip
    for name, leaves in given.items():
        if len(leaves) != len(params):
            raise ValueError(f"adamw_: {len(params)} params but {len(leaves)} in {name}.")
    if step < 1:
        raise ValueError(f"adamw_: step counts from 1, got {step}.")
    device = params[0].device
    if scale is not None and (
        scale.shape or scale.dtype != torch.float32 or scale.device != device
    ):
        raise ValueError(f"adamw_: scale must be an fp32 scalar on {device}.")
    for i, (p, g, m, v, c) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, copies, strict=True)
    ):
        for name, leaf, dtypes in (
            ("params", p, _STATES), ("grads", g, _GRADS), ("exp_avgs", m, _STATES),
            ("exp_avg_sqs", v, (m.dtype,)), ("copies", c, (torch.bfloat16,)),
        ):  # fmt: skip
            if leaf is None:
                continue
            if name == "copies" and p.dtype == torch.bfloat16:
                raise ValueError(f"adamw_: params[{i}] is bf16 itself: it needs no copy.")
            fits = leaf.shape == p.shape and leaf.dtype in dtypes and leaf.device == device
            if not fits or not (name == "grads" or leaf.is_contiguous()):
                wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise ValueError(
                    f"adamw_: {name}[{i}] must be {wanted} {tuple(p.shape)} on {device}, "
                    f"contiguous, got {leaf.dtype} {tuple(leaf.shape)} on {leaf.device}."
                )
