"""Schedules, groups, clipping and AdamW against their formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from runners.config import TrainConfig
from runners.optim import (
    apply_gradients,
    build_optimizer,
    clip,
    cosine,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    wsd,
)


def test_cosine_warms_up_peaks_and_falls() -> None:
    rates = [cosine(s, steps=100, warmup_steps=10, final=0.1) for s in range(100)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert max(rates) == rates[9] == 1
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 46 / 91))
    assert rates[55] == pytest.approx(middle)
    assert 0.1 < rates[-1] < 0.101


def test_wsd_is_stable_until_its_decay() -> None:
    rates = [wsd(s, steps=100, warmup_steps=10, decay=0.2) for s in range(100)]
    assert rates[10:80] == [1.0] * 70
    assert all(a > b for a, b in itertools.pairwise(rates[79:]))
    assert rates[90] == pytest.approx(1 - math.sqrt(11 / 21))
    assert rates[-1] > 0


def test_schedules_survive_their_extremes() -> None:
    for steps in (1, 2, 5):
        for warm in (0, 1, 5, 50):
            for decay in (0.0, 0.5, 1.0):
                for s in range(steps):
                    assert 0 < cosine(s, steps=steps, warmup_steps=warm) <= 1
                    assert 0 < wsd(s, steps=steps, warmup_steps=warm, decay=decay) <= 1


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_learning_rate_is_the_peak_times_the_schedule(schedule: str) -> None:
    config = TrainConfig(schedule=schedule, lr=0.5, steps=20, warmup_steps=4, final_lr=0.2)  # type: ignore[arg-type]
    assert learning_rate(config, 0) == 0.125
    assert learning_rate(config, 3) == 0.5
    if schedule == "constant":
        assert learning_rate(config, 19) == 0.5
    else:
        assert 0.1 < learning_rate(config, 19) < 0.5


def _params() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "text.blocks.0.mlp.up.weight": torch.randn(4, 3),
        "text.blocks.0.mlp_norm.weight": torch.randn(3),
        "vision.positions.weight": torch.randn(5, 3),
        "projector.up.bias": torch.randn(4),
    }


def test_decay_goes_to_matrices_only() -> None:
    params = _params()
    decayed, spared = build_optimizer(params, TrainConfig()).param_groups
    assert [id(p) for p in decayed["params"]] == [id(params["text.blocks.0.mlp.up.weight"])]
    assert decayed["weight_decay"] == 0.1
    assert len(spared["params"]) == 3
    assert spared["weight_decay"] == 0
    (everything,) = build_optimizer(params, TrainConfig(no_decay=())).param_groups
    assert everything["weight_decay"] == 0.1


def test_two_steps_equal_adamw_written_out() -> None:
    config = TrainConfig(weight_decay=0.5, beta1=0.8, beta2=0.9)
    params = _params()
    expected = {k: v.double() for k, v in params.items()}
    optimizer = build_optimizer(params, config)
    moments = {k: (torch.zeros_like(v), torch.zeros_like(v)) for k, v in expected.items()}
    for t, lr in enumerate((0.1, 0.03), start=1):
        grads = {k: torch.randn_like(v) for k, v in params.items()}
        apply_gradients(optimizer, params, grads, lr)
        for k, p in expected.items():
            m, v = moments[k]
            g = grads[k].double()
            m.mul_(0.8).add_(g, alpha=0.2)
            v.mul_(0.9).addcmul_(g, g, value=0.1)
            if k == "text.blocks.0.mlp.up.weight":
                p.mul_(1 - lr * 0.5)
            p -= lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
    for k, p in params.items():
        # Two updates of a few roundings each on values of order 1.
        torch.testing.assert_close(p.double(), expected[k], rtol=0, atol=16 * 2**-23)
        assert p.grad is None


def test_clip_scales_to_the_norm_and_reports_the_old_one() -> None:
    grads = [torch.full((3,), 2.0), torch.full((1, 1), 2.0)]
    norm = clip(grads, 1.0)
    assert float(norm) == 4.0
    total = float(sum(g.square().sum() for g in grads)) ** 0.5
    assert total == pytest.approx(1.0, rel=1e-5)
    before = [g.clone() for g in grads]
    assert float(clip(grads, 5.0)) == pytest.approx(1.0, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
    assert float(clip([torch.full((2,), 3.0)], 0.0)) == pytest.approx(math.sqrt(18))


def test_moments_come_back_and_go_on_as_before() -> None:
    def step(params: dict[str, Tensor], optimizer: torch.optim.AdamW, seed: int) -> None:
        torch.manual_seed(seed)
        apply_gradients(optimizer, params, {k: torch.randn_like(v) for k, v in params.items()}, 0.1)

    params = _params()
    optimizer = build_optimizer(params, TrainConfig())
    step(params, optimizer, 1)
    saved = {k: v.clone() for k, v in optimizer_state(optimizer, params).items()}
    copies = {k: v.clone() for k, v in params.items()}
    step(params, optimizer, 2)
    again = build_optimizer(copies, TrainConfig())
    load_optimizer_state(again, copies, saved)
    step(copies, again, 2)
    assert all(torch.equal(params[k], copies[k]) for k in params)
    del saved["exp_avg.projector.up.bias"]
    with pytest.raises(ValueError, match=r"lacks exp_avg\.projector\.up\.bias"):
        load_optimizer_state(again, copies, saved)
