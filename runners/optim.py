"""AdamW over a flat dict of params, its learning-rate schedules, and clipping without a sync."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from params.paths import matches
from runners.config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def warmup(step: int, warmup_steps: int) -> float:
    """1/w, 2/w, ... 1: step 0 already learns."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine(step: int, *, steps: int, warmup_steps: int, final: float = 0.0) -> float:
    """Warm-up, then half a cosine towards ``final``, where the step after the last would be.

    SGDR without restarts, https://arxiv.org/abs/1608.03983.

    >>> [round(cosine(s, steps=6, warmup_steps=2), 2) for s in range(6)]
    [0.5, 1.0, 0.9, 0.65, 0.35, 0.1]
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    done = (step - warmup_steps + 1) / (steps - warmup_steps + 1)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def wsd(step: int, *, steps: int, warmup_steps: int, decay: float, final: float = 0.0) -> float:
    """Warm-up, stable, then ``1 - sqrt`` over the last ``decay`` share of the steps.

    MiniCPM, https://arxiv.org/abs/2404.06395; the decay's shape is from
    https://arxiv.org/abs/2405.18392.

    >>> [round(wsd(s, steps=7, warmup_steps=2, decay=0.43), 2) for s in range(7)]
    [0.5, 1.0, 1.0, 1.0, 0.5, 0.29, 0.13]
    """
    length = round(decay * steps)
    left = steps - step
    if left > length:
        return warmup(step, warmup_steps)
    falling = final + (1 - final) * (1 - math.sqrt(1 - left / (length + 1)))
    return min(warmup(step, warmup_steps), falling)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step, counted from 0."""
    steps, warm, final = config.steps, config.warmup_steps, config.final_lr
    if config.schedule == "cosine":
        return config.lr * cosine(step, steps=steps, warmup_steps=warm, final=final)
    if config.schedule == "wsd":
        decay = config.decay_fraction
        return config.lr * wsd(step, steps=steps, warmup_steps=warm, decay=decay, final=final)
    return config.lr * warmup(step, warm)


def build_optimizer(params: Mapping[str, Tensor], config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW over ``{path: tensor}``, in two groups: with weight decay and without.

    Decoupled decay: https://arxiv.org/abs/1711.05101.
    """
    spared = {path for path in params if any(matches(p, path) for p in config.no_decay)}
    groups: list[dict[str, Any]] = [
        {"params": [t for p, t in params.items() if p not in spared]},
        {"params": [t for p, t in params.items() if p in spared], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def clip(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scales grads in place to a total norm of ``max_norm`` at most (0: leaves them).

    Returns the norm they had, fp32 scalar, on their device: nothing waits for it
    (https://arxiv.org/abs/1211.5063).
    """
    norm = torch.nn.utils.get_total_norm(grads)
    if max_norm:
        torch._foreach_mul_(list(grads), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def apply_gradients(
    optimizer: torch.optim.AdamW,
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    lr: float,
) -> None:
    """One step, in place on ``params``."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    for path, param in params.items():
        param.grad = grads[path]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizer_state(
    optimizer: torch.optim.AdamW, params: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The moments by name: ``{"exp_avg.text.embed.weight": tensor, ...}``."""
    return {
        f"{name}.{path}": optimizer.state[param][name]
        for path, param in params.items()
        for name in MOMENTS
        if param in optimizer.state
    }


def load_optimizer_state(
    optimizer: torch.optim.AdamW, params: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    """The inverse of :func:`optimizer_state`. Raises ValueError if moments are missing."""
    if not state:
        return  # saved before the first step
    for path, param in params.items():
        for name in MOMENTS:
            if f"{name}.{path}" not in state:
                raise ValueError(f"the optimizer state lacks {name}.{path}")
            optimizer.state[param][name] = state[f"{name}.{path}"].to(param.device)
