"""Learning-rate schedules, the choice of an optimizer with each leaf's rates, and clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from kernels.optimizer.adamw import grad_norm
from params.paths import matches, select_paths
from runners.shell.cli import explained
from runners.shell.errors import UserError
from runners.training.config import lr_scales
from runners.training.optimizers import (
    AdamW,
    AdamW8bit,
    Muon,
    Optimizer,
    Rates,
    TorchAdamW,
    adamw8bit_problem,
)
from runners.training.settings import OptimSettings


def warmup(step: int, warmup_steps: int) -> float:
    """1/w, 2/w, ... 1: the rate of step 0 is not 0."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine(step: int, *, steps: int, warmup_steps: int, final: float = 0.0) -> float:
    """Warm-up, then half a cosine that reaches ``final`` one step after the last.

    SGDR without restarts, https://arxiv.org/abs/1608.03983.

    >>> [round(cosine(s, steps=6, warmup_steps=2), 2) for s in range(6)]
    [0.5, 1.0, 0.9, 0.65, 0.35, 0.1]
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    done = (step - warmup_steps + 1) / (steps - warmup_steps + 1)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def wsd(
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    decay: float,
    final: float = 0.0,
    ends: Sequence[int] = (),
) -> float:
    """Warm-up, stable, then ``1 - sqrt`` over the last ``decay`` share of the steps.

    MiniCPM, https://arxiv.org/abs/2404.06395; the decay's shape is from
    https://arxiv.org/abs/2405.18392. ends: earlier steps before which the rate also decays and
    then rises again (WSD-S, https://arxiv.org/abs/2410.05192); the share is of the steps between.

    >>> [round(wsd(s, steps=7, warmup_steps=2, decay=0.43), 2) for s in range(7)]
    [0.5, 1.0, 1.0, 1.0, 0.5, 0.29, 0.13]
    """
    since = max((end for end in ends if end <= step), default=0)
    until = min((end for end in ends if end > step), default=steps)
    length, left = round(decay * (until - since)), until - step
    if left > length:
        return warmup(step, warmup_steps)
    falling = final + (1 - final) * (1 - math.sqrt(1 - left / (length + 1)))
    return min(warmup(step, warmup_steps), falling)


def learning_rate(config: OptimSettings, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    steps, warm, final = config.steps, config.warmup_steps, config.final_lr
    if config.schedule == "cosine":
        return config.lr * cosine(step, steps=steps, warmup_steps=warm, final=final)
    if config.schedule == "wsd":
        decay, ends = config.decay_fraction, config.ends
        return config.lr * wsd(
            step, steps=steps, warmup_steps=warm, decay=decay, final=final, ends=ends
        )
    return config.lr * warmup(step, warm)


def build_optimizer(
    params: Mapping[str, Tensor], copies: Mapping[str, Tensor], config: OptimSettings, seed: int = 0
) -> Optimizer:
    """The optimizer of a config, over ``{path: tensor}``; copies: bf16 copies of some.

    Raises UserError if it is not available.
    """
    rates = choose_rates(params, config)
    betas = {"beta1": config.beta1, "beta2": config.beta2}
    if config.optimizer == "adamw8bit":
        problem = adamw8bit_problem(next(iter(params.values())).device)
        if problem is not None:
            raise UserError(f"--optimizer adamw8bit is done by bitsandbytes: {problem}")
        return AdamW8bit(params, copies, rates, **betas)

    def adamw(some: Mapping[str, Tensor]) -> Optimizer:
        theirs = {path: copy for path, copy in copies.items() if path in some}
        if config.use_fused_adamw:
            return AdamW(some, theirs, rates, **betas, seed=seed)
        return TorchAdamW(some, theirs, rates, **betas)

    if config.optimizer == "adamw":
        return adamw(params)
    matrices = {path: leaf for path, leaf in params.items() if uses_muon(path, leaf)}
    rest = {path: leaf for path, leaf in params.items() if path not in matrices}
    return Muon(matrices, copies, rates, adamw(rest), momentum=config.momentum)


def choose_rates(params: Mapping[str, Tensor], config: OptimSettings) -> dict[str, Rates]:
    """The rates of each leaf, by the path patterns of ``--no_decay`` and ``--lr_scale``. Raises
    UserError for a pattern, other than a default one, that names no leaf."""
    scales: dict[str, float] = {}
    with explained("--lr_scale"):
        for pattern, factor in lr_scales(config).items():
            scales |= dict.fromkeys(select_paths(pattern, params), factor)
    with explained("--no_decay"):
        for pattern in set(config.no_decay).difference(OptimSettings.no_decay):
            select_paths(pattern, params)
    spared = {path for path in params if any(matches(p, path) for p in config.no_decay)}
    return {
        path: Rates(0.0 if path in spared else config.weight_decay, scales.get(path, 1.0))
        for path in params
    }


FEATURES = ("text.blocks", "vision.blocks", "projector")
TABLES = ("positions", "queries")


def uses_muon(path: str, leaf: Tensor) -> bool:
    """Whether Muon trains this leaf: a matrix that maps features to features. Tables, the head and
    the patch embedding are not."""
    inside = any(matches(pattern, path) for pattern in FEATURES)
    return leaf.ndim == 2 and inside and not any(matches(pattern, path) for pattern in TABLES)


def clipping(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor | None]:
    """``(norm, factor)``: the gradient's norm, and the factor that limits it to ``max_norm`` (None
    if that is 0), https://arxiv.org/abs/1211.5063. fp32 scalars on the gradients' device, so that
    the host does not wait.
    """
    norm = grad_norm(grads)
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else None
