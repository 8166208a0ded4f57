"""One step of AdamW over many leaves, in place: fp32 or bf16 states, gradients of any dtype.

On a GPU each group of leaves with equal dtypes takes one launch (`adamw_triton`). It multiplies
gradients by the clipping factor as it reads them, and writes the bf16 copy of fp32 weights for the
next forward: clipping and casting cost no pass of their own. A step moves 28 bytes per parameter
with fp32 states and a bf16 gradient and copy, 14 with bf16 states.

Weights and moments of bf16 are rounded stochastically: up with the probability of the fraction that
is cut off. Rounding to the nearest would lose every step smaller than half a unit in the last
place, 2^-9 of the weight, and with it most of training; stochastic rounding keeps such steps on
average ("Revisiting BFloat16 Training", arXiv 2010.06192).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.optimizer.adamw_triton import LeafTypes, adamw_launch, make_plan, step_table
from kernels.runtime.dispatch import TORCH, TRITON, choose, declare
from kernels.runtime.hashing import LOW, lowbias32
from kernels.runtime.operators import operator

declare("adamw", TRITON, TORCH)

STATES = (torch.float32, torch.bfloat16)
GRADS = (torch.float32, torch.bfloat16, torch.float16)


class AdamWStep(NamedTuple):
    """The numbers of a step, in the order in which the operator takes them."""

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float

    def rates(self) -> tuple[float, float, float]:
        """The learning rate, and the factors that correct the bias of m and of sqrt(v)."""
        first = 1 / (1 - self.beta1**self.step)
        return self.lr, first, 1 / math.sqrt(1 - self.beta2**self.step)


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
            at a multiple of 16 bytes are fastest; only views may not.
        grads: of the same shapes, fp32, bf16 or fp16, whatever the dtype of params; a gradient that
            is not contiguous is copied first.
        exp_avgs, exp_avg_sqs: the moments, contiguous, fp32 or bf16, the same for both of a leaf.
        step: counted from 1, for the bias correction.
        weight_decay: decoupled; one for all leaves, or one per leaf.
        scale: fp32 scalar tensor on that device that multiplies all gradients, without a sync.
        copies: bf16 copies of fp32 leaves, or None, which receive the new params, rounded to the
            nearest.
        seed: of the stochastic rounding of bf16 params and moments. The noise is a hash of the
            seed, the step, the index of the leaf and the position in it: the same on every device.

    Raises:
        ValueError: lists of different lengths; shapes, dtypes or devices that do not match; a leaf
            that is not contiguous; a step below 1.

    >>> import torch
    >>> p, g, m, v = torch.ones(2), torch.tensor([1.0, -1.0]), torch.zeros(2), torch.zeros(2)
    >>> adamw_([p], [g], [m], [v], step=1, lr=0.5, weight_decay=0.0)
    >>> [round(x, 6) for x in p.tolist()]
    [0.5, 1.5]
    """
    if not params:
        return
    copies = [None] * len(params) if copies is None else copies
    decays = (
        [float(weight_decay)] * len(params)
        if isinstance(weight_decay, int | float)
        else [float(decay) for decay in weight_decay]
    )
    _check(params, grads, exp_avgs, exp_avg_sqs, copies, decays, scale, step)
    given = [c for c in copies if c is not None]
    copied = [i for i, c in enumerate(copies) if c is not None]
    leaves = [list(each) for each in (params, grads, exp_avgs, exp_avg_sqs)]
    _op(*leaves, given, copied, decays, scale, step, lr, beta1, beta2, eps, seed)


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
    """`adamw_` with checked arguments; copies: of the leaves in `copied`."""
    copy_of = dict(zip(copied, copies, strict=True))
    triton = choose("adamw", str(params[0].device), params[0].dtype) == "triton"
    key = _key(seed, step)
    now = AdamWStep(step, lr, beta1, beta2, eps)
    groups: dict[LeafTypes, list[int]] = {}
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        if not p.numel():
            continue
        if triton:
            groups.setdefault(LeafTypes(p.dtype, g.dtype, m.dtype, i in copy_of), []).append(i)
        else:
            _step_torch(p, g, m, v, copy_of.get(i), decays[i], scale, now, key + i)
    for types, chosen in groups.items():
        rows = tuple(
            (
                params[i].data_ptr(),
                exp_avgs[i].data_ptr(),
                exp_avg_sqs[i].data_ptr(),
                copy_of[i].data_ptr() if i in copy_of else 0,
                params[i].numel(),
                i,
            )
            for i in chosen
        )
        plan = make_plan(rows, tuple(decays[i] for i in chosen), params[0].device)
        given = [grads[i].contiguous() for i in chosen]  # alive until the launch
        table = step_table(given, now.rates(), key)
        adamw_launch(plan, table, scale, types, beta1=beta1, beta2=beta2, eps=eps)


_op = operator(
    "adamw_",
    fake=lambda **_: None,
    mutates=("params", "exp_avgs", "exp_avg_sqs", "copies"),
)(_adamw)


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, an fp32 scalar on their device.

    Sums are fp32, over leaves in the order given. Without gradients the norm is 0, on the CPU.

    >>> import torch
    >>> grad_norm([torch.tensor([3.0]), torch.tensor([[4.0]], dtype=torch.bfloat16)]).item()
    5.0
    """
    if not grads:
        return torch.zeros(())
    if grads[0].device.type == "cpu":
        return torch.linalg.vector_norm(torch.stack([_norm_in_rows(grad) for grad in grads]))
    by_dtype: dict[torch.dtype, list[int]] = {}  # one launch per dtype
    for i, grad in enumerate(grads):
        by_dtype.setdefault(grad.dtype, []).append(i)
    norms = dict[int, Tensor]()
    for chosen in by_dtype.values():
        found = torch._foreach_norm([grads[i] for i in chosen], 2, dtype=torch.float32)
        norms.update(zip(chosen, found, strict=True))
    return torch.linalg.vector_norm(torch.stack([norms[i] for i in range(len(grads))]))


_ROW = 1024


def _norm_in_rows(x: Tensor) -> Tensor:
    """The norm of rows, then the norm of their norms, and so on.

    On a CPU, PyTorch adds the squares of a tensor one after the other, an error of 2e-3 in the norm
    of 3e7 normal numbers. On a GPU it adds in a tree, as here.
    """
    x = x.flatten()
    while x.numel() > _ROW:
        rows, rest = x[: x.numel() // _ROW * _ROW].view(-1, _ROW), x[x.numel() // _ROW * _ROW :]
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        x = torch.cat([norms, rest.float()])
    return torch.linalg.vector_norm(x, dtype=torch.float32)


# Torch, leaf by leaf


def _step_torch(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    copy: Tensor | None,
    decay: float,
    scale: Tensor | None,
    now: AdamWStep,
    key: int,
) -> None:
    """One leaf: PyTorch's fused AdamW if it is all fp32, else the kernel's arithmetic in its order,
    which gives the same bits."""
    g = g.float().contiguous()
    if scale is not None:
        g = g * scale
    if p.dtype == m.dtype == torch.float32:
        options = now._asdict() | {"weight_decay": decay, "amsgrad": False, "maximize": False}
        count = torch.tensor(float(options.pop("step")), device=p.device)
        torch._fused_adamw_([p], [g], [m], [v], [], [count], **options)
    else:
        numbers = [*now.rates(), decay]
        rate, first, second, shrink = torch.tensor(numbers, dtype=torch.float32, device=p.device)
        x, mean, square = p.float(), m.float(), v.float()
        mean = mean + (1 - now.beta1) * (g - mean)
        square = now.beta2 * square + (1 - now.beta2) * g * g
        x = x - rate * shrink * x
        root = square.double().sqrt().float()  # PyTorch's fp32 root may be off by the last bit
        x = x - rate * first * mean / (root * second + now.eps)
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
    """Two words of 32 random bits per element, int64; key: of seed and step, plus the leaf's
    index."""
    at = torch.arange(shape.numel(), device=device).view(shape)
    here = lowbias32(lowbias32(key & LOW) + (at >> 32) & LOW)
    one = lowbias32((at & LOW) ^ here)
    return one, one * 0x9E3779B1 & LOW


def _round_into(leaf: Tensor, x: Tensor, noise: Tensor) -> None:
    leaf.copy_(_stochastic(x, noise) if leaf.dtype == torch.bfloat16 else x)


def _stochastic(x: Tensor, noise: Tensor) -> Tensor:
    """fp32 x to bf16: up with the probability of the fraction cut off; noise: 16 random bits each.

    From the largest bf16 on, and for NaN, to the nearest, so that x stays finite.
    """
    bits = x.view(torch.int32).long() + noise  # grows in magnitude only, which keeps the sign bit
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
    given = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "copies": copies}
    for name, leaves in (given | {"weight_decay": decays}).items():
        if len(leaves) != len(params):
            raise ValueError(f"adamw_: {len(params)} params but {len(leaves)} in {name}.")
    if step < 1:
        raise ValueError(f"adamw_: step counts from 1, got {step}.")
    device = params[0].device
    if scale is not None and (
        scale.shape or scale.dtype != torch.float32 or scale.device != device
    ):
        raise ValueError(f"adamw_: scale must be an fp32 scalar on {device}.")
    bf16 = (torch.bfloat16,)
    for i, (p, g, m, v, copy) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, copies, strict=True)
    ):
        check_leaf("adamw_: params", i, p, p.shape, STATES, device)
        check_leaf("adamw_: grads", i, g, p.shape, GRADS, device, strided=True)
        check_leaf("adamw_: exp_avgs", i, m, p.shape, STATES, device)
        check_leaf("adamw_: exp_avg_sqs", i, v, p.shape, (m.dtype,), device)
        if copy is None:
            continue
        if p.dtype == torch.bfloat16:
            raise ValueError(f"adamw_: params[{i}] is bf16 itself: it needs no copy.")
        check_leaf("adamw_: copies", i, copy, p.shape, bf16, device)


def check_leaf(
    name: str,
    index: int,
    leaf: Tensor,
    shape: torch.Size,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    strided: bool = False,
) -> None:
    """Raises ValueError for a leaf that a kernel would read or write wrongly; strided: it need not
    be contiguous."""
    fits = leaf.shape == shape and leaf.dtype in dtypes and leaf.device == device
    if not fits or not (strided or leaf.is_contiguous()):
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}[{index}] must be {wanted} {tuple(shape)} on {device}, contiguous, got "
            f"{leaf.dtype} {tuple(leaf.shape)} on {leaf.device}."
        )
