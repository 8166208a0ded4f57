"""Cases: one step of AdamW over fp32 parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch

from runners.benchmarks.harness import Case
from runners.benchmarks.providers import Forward, Inputs, Provider
from runners.training.config import TrainConfig
from runners.training.optim import build_optimizer

BYTES = 28  # a parameter: itself, its gradient and two moments are read, all but one are written


def cases() -> list[Case]:
    return [adamw(10**9, 100)]


def adamw(parameters: int, leaves: int) -> Case:
    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        params = []
        for _ in range(leaves):
            leaf = torch.randn(parameters // leaves, generator=generator, device=device)
            leaf.grad = torch.randn(leaf.shape, generator=generator, device=device)
            params.append(leaf)
        return {"params": params}

    providers = (
        Provider("torch foreach", _torch, graph=False),
        Provider("ours", _ours, graph=False),
        Provider("bitsandbytes, 8 bits", _bitsandbytes, peer="bitsandbytes", graph=False),
    )
    shape = f"{parameters:.0e} parameters".replace("e+0", "e")
    return Case(
        "adamw",
        shape,
        float(BYTES) * parameters,
        "copy",
        inputs,
        providers,
        sets=1,
        reference="torch foreach",
        direction="step",
    )


def _ours(sets: Sequence[Inputs]) -> Forward:
    params = {str(i): leaf for i, leaf in enumerate(sets[0]["params"])}
    grads = {path: leaf.grad for path, leaf in params.items()}
    optimizer, numbers = build_optimizer(params, {}, TrainConfig().optim), count(1)

    def step(i: Inputs) -> tuple[()]:
        optimizer.step(grads, number=next(numbers), lr=1e-5, factor=None)
        return ()

    return step


def _torch(sets: Sequence[Inputs]) -> Forward:
    return _stepping(torch.optim.AdamW(sets[0]["params"], lr=1e-5, foreach=True))


def _bitsandbytes(sets: Sequence[Inputs]) -> Forward:
    import bitsandbytes

    return _stepping(bitsandbytes.optim.AdamW8bit(sets[0]["params"], lr=1e-5))


def _stepping(optimizer: Any) -> Forward:
    def step(i: Inputs) -> tuple[()]:
        optimizer.step()
        return ()

    return step
