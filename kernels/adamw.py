"""One step of AdamW over many leaves, in place: fp32 or bf16 states, gradients of any dtype.

On a GPU one launch a group of like dtypes (`kernels.adamw_triton`). It multiplies gradients by the
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

from kernels.adamw_triton import Plan, adamw_launch, make_plan, step_table
from kernels.dispatch import choose

_STATES = (torch.float32, torch.bfloat16)
_GRADS = (torch.float32, torch.bfloat16, torch.float16)
_KEPT = 16  # plans: a training run has one a group
_plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()


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
    """A step of AdamW (arXiv 1711.05101), in place, computed in fp32.

    Args:
        params: leaves of any shape, contiguous, fp32 or bf16, all on one device.
        grads: of the same shapes, fp32, bf16 or fp16, whatever the params are; one that is not
            contiguous is copied first.
        exp_avgs, exp_avg_sqs: the moments, contiguous, fp32 or bf16, both of a leaf alike.
        step: counted from 1, for the bias correction.
        weight_decay: decoupled; one for all, or one a leaf.
        scale: fp32 scalar tensor on that device that multiplies all gradients; nothing waits for
            it.
        copies: bf16 twins of fp32 leaves, or None, that get the new params, rounded to the nearest.
        seed: of the stochastic rounding of bf16 params and moments: a hash of seed, step, leaf and
            place, the same on every device.

    Raises:
        ValueError: lists of different lengths, shapes or dtypes or devices that do not fit, a leaf
            that is not contiguous, a step below 1.

    >>> import torch
    >>> p, g, m, v = torch.ones(2), torch.tensor([1.0, -1.0]), torch.zeros(2), torch.zeros(2)
    >>> adamw_([p], [g], [m], [v], step=1, lr=0.5, weight_decay=0.0)
    >>> p.tolist()
    [0.5, 1.5]
    """
    if not params:
        return
    twins = [None] * len(params) if copies is None else list(copies)
    decays = (
        [float(weight_decay)] * len(params)
        if isinstance(weight_decay, int | float)
        else list(weight_decay)
    )
    _check(params, grads, exp_avgs, exp_avg_sqs, twins, decays, scale, step)
    numbers = (lr, 1 / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step))
    key = _key(seed, step)
    triton = choose("adamw", str(params[0].device), torch.float32) == "triton"
    groups: dict[tuple[torch.dtype, torch.dtype, torch.dtype, bool], list[int]] = {}
    for i, (leaf, g, mean, c) in enumerate(zip(params, grads, exp_avgs, twins, strict=True)):
        if leaf.numel():
            kind = (leaf.dtype, g.dtype, mean.dtype, c is not None)
            groups.setdefault(kind, []).append(i)
    for number, ((param, grad, moment, copy), chosen) in enumerate(groups.items()):
        p, m, v = ([leaves[i] for i in chosen] for leaves in (params, exp_avgs, exp_avg_sqs))
        theirs = [twins[i] for i in chosen]
        given = [grads[i].contiguous() for i in chosen]
        of_group = [decays[i] for i in chosen]
        own = key + number * 0x01000193 & _LOW  # leaves are counted anew in every group
        if not triton:
            if param == moment == torch.float32:
                _step_fused(p, m, v, given, of_group, scale, step, lr, beta1, beta2, eps)
                for leaf, twin in zip(p, theirs, strict=True):
                    if twin is not None:
                        twin.copy_(leaf)
            else:
                _step_torch(
                    p, m, v, given, theirs, of_group, scale, numbers, beta1, beta2, eps, own
                )
            continue
        adamw_launch(
            _plan(p, m, v, theirs, of_group), step_table(given, numbers, own), scale,
            beta1=beta1, beta2=beta2, eps=eps, param=param, grad=grad, moment=moment, copy=copy,
            aligned=all(g.data_ptr() % 16 == 0 for g in given),
        )  # fmt: skip


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together: an fp32 scalar on their device, summed in fp32 whatever
    they are, in the order given. That of none is 0, on the CPU.

    >>> import torch
    >>> grad_norm([torch.tensor([3.0]), torch.tensor([[4.0]], dtype=torch.bfloat16)]).item()
    5.0
    """
    if not grads:
        return torch.zeros(())
    norms = torch._foreach_norm(list(grads), 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


# Plans


def _plan(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor | None],
    decays: list[float],
) -> Plan:
    """The tables of these leaves. All that a plan is made of is in its key, so that memory which
    was freed and taken for something else gets tables of its own."""
    key = (
        params[0].device,
        tuple(p.data_ptr() for p in params),
        tuple(p.numel() for p in params),
        tuple(m.data_ptr() for m in exp_avgs),
        tuple(v.data_ptr() for v in exp_avg_sqs),
        tuple(0 if c is None else c.data_ptr() for c in copies),
        tuple(decays),
    )
    if key not in _plans:
        _plans[key] = make_plan(params, exp_avgs, exp_avg_sqs, copies, decays)
        if len(_plans) > _KEPT:
            _plans.popitem(last=False)
    _plans.move_to_end(key)
    return _plans[key]


# Torch: its own fused step where all states are fp32, else the same arithmetic leaf by leaf


def _step_fused(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    decays: list[float],
    scale: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    wide = [g.float() for g in grads]
    if scale is not None:
        wide = list(torch._foreach_mul(wide, scale))
    number = torch.tensor(float(step), device=params[0].device)
    for decay in dict.fromkeys(decays):
        chosen = [i for i, own in enumerate(decays) if own == decay]
        p, g, m, v = (
            [leaves[i] for i in chosen] for leaves in (params, wide, exp_avgs, exp_avg_sqs)
        )
        torch._fused_adamw_(
            p, g, m, v, [], [number] * len(p), lr=lr, beta1=beta1, beta2=beta2,
            weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip


def _step_torch(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    copies: list[Tensor | None],
    decays: list[float],
    scale: Tensor | None,
    numbers: tuple[float, float, float],
    beta1: float,
    beta2: float,
    eps: float,
    key: int,
) -> None:
    rate, first, second = numbers
    for leaf, (p, m, v, g, copy, decay) in enumerate(
        zip(params, exp_avgs, exp_avg_sqs, grads, copies, decays, strict=True)
    ):
        g = g.float() if scale is None else g.float() * scale
        wide_m = (
            m.float().lerp_(g, 1 - beta1) if m.dtype != torch.float32 else m.lerp_(g, 1 - beta1)
        )
        wide_v = v.float() if v.dtype != torch.float32 else v
        wide_v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        wide_p = p.float() if p.dtype != torch.float32 else p
        wide_p.mul_(1 - rate * decay)
        wide_p.addcdiv_(wide_m, (wide_v.sqrt() * second).add_(eps), value=-rate * first)
        if torch.bfloat16 in (p.dtype, m.dtype):
            one, two = _noise(p.numel(), leaf, key, p.device)
            for narrow, wide, noise in (
                (p, wide_p, one & 0xFFFF), (m, wide_m, one >> 16), (v, wide_v, two & 0xFFFF),
            ):  # fmt: skip
                if narrow.dtype == torch.bfloat16:
                    narrow.copy_(_stochastic(wide, noise.view(p.shape)))
        if copy is not None:
            copy.copy_(wide_p)


# Stochastic rounding

_LOW = 0xFFFFFFFF


def _key(seed: int, step: int) -> int:
    """32 bits of a seed and a step."""
    mixed = _mix(torch.tensor([seed & _LOW, step & _LOW]))
    return int(_mix(mixed[0] * 31 + mixed[1] & _LOW))


def _mix(h: Tensor) -> Tensor:
    """lowbias32 (Wellons 2018, https://nullprogram.com/blog/2018/07/31/), of int64 below 2^32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D & _LOW
    h = (h ^ (h >> 15)) * 0x846CA68B & _LOW
    return h ^ (h >> 16)


def _noise(elements: int, leaf: int, key: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two words of 32 random bits an element, int64."""
    at = torch.arange(elements, device=device)
    here = _mix(_mix(torch.tensor(key + leaf & _LOW, device=device)) + (at >> 32) & _LOW)
    one = _mix((at & _LOW) ^ here)
    return one, _mix(one + 0x9E3779B9 & _LOW)


def _stochastic(x: Tensor, noise: Tensor) -> Tensor:
    """fp32 x to bf16: up with the probability of what is cut off; noise: 16 random bits each."""
    bits = x.view(torch.int32).long() & _LOW
    bits = torch.where(x.isnan(), bits, bits + noise)
    high = (bits >> 16) & 0xFFFF
    return torch.where(high >= 2**15, high - 2**16, high).to(torch.int16).view(torch.bfloat16)


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
