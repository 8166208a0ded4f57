"""Schedules, rates, clipping, AdamW and Muon against their formulas."""

from __future__ import annotations

import itertools
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from core import preset
from kernels.runtime import proof
from params import flatten, init_params
from runners.shell.errors import UserError
from runners.training.config import TrainConfig, check
from runners.training.optim import (
    build_optimizer,
    choose_rates,
    clipping,
    cosine,
    learning_rate,
    uses_muon,
    wsd,
)
from runners.training.optimizers import Muon, Optimizer, Rates, newton_schulz, stacks_of


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
    config = TrainConfig.of(schedule=schedule, lr=0.5, steps=20, warmup_steps=4, final_lr=0.2)  # type: ignore[arg-type]
    assert learning_rate(config.optim, 0) == 0.125
    assert learning_rate(config.optim, 3) == 0.5
    if schedule == "constant":
        assert learning_rate(config.optim, 19) == 0.5
    else:
        assert 0.1 < learning_rate(config.optim, 19) < 0.5


def _params() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "text.blocks.0.mlp.up.weight": torch.randn(4, 3),
        "text.blocks.0.mlp_norm.weight": torch.randn(3),
        "vision.positions.weight": torch.randn(5, 3),
        "projector.up.bias": torch.randn(4),
    }


def _grads(params: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator) for k, v in params.items()}


def test_decay_goes_to_matrices_only() -> None:
    rates = choose_rates(_params(), TrainConfig().optim)
    matrix = "text.blocks.0.mlp.up.weight"
    assert rates.pop(matrix) == Rates(0.1)
    assert set(rates.values()) == {Rates(0.0)}
    everything = choose_rates(_params(), TrainConfig.of(no_decay=()).optim)
    assert set(everything.values()) == {Rates(0.1)}


def test_rates_of_their_own_by_path_pattern() -> None:
    config = TrainConfig.of(no_decay=(), lr_scale=("text=0.5", "mlp.up=0.1", "projector=0"))
    rates = {path: rate.scale for path, rate in choose_rates(_params(), config.optim).items()}
    assert rates == {
        "text.blocks.0.mlp.up.weight": 0.1,  # the last that names it
        "text.blocks.0.mlp_norm.weight": 0.5,
        "vision.positions.weight": 1.0,
        "projector.up.bias": 0.0,
    }
    with pytest.raises(
        UserError, match=r"--lr_scale: pattern 'visoin' matches nothing; did you mean 'vision'"
    ):
        choose_rates(_params(), TrainConfig.of(lr_scale=("visoin=0.5",)).optim)
    with pytest.raises(UserError, match="--no_decay: pattern 'visoin' matches nothing"):
        choose_rates(_params(), TrainConfig.of(no_decay=("*norm", "visoin")).optim)


@pytest.mark.parametrize(
    "entry", ["vision", "=0.5", "vision=", "vision=x", "vision=-1", "vision=nan", "vision=inf"]
)
def test_a_rate_that_is_none_is_refused(entry: str) -> None:
    with pytest.raises(UserError, match=f"--lr_scale {entry}: wanted is PATTERN=FACTOR"):
        check(TrainConfig.of(lr_scale=(entry,)))


OPTIMIZERS = {
    "adamw": TrainConfig(),
    "adamw in a loop": TrainConfig.of(use_fused_adamw=False),
    "muon": TrainConfig.of(optimizer="muon"),
    "muon, adamw in a loop": TrainConfig.of(optimizer="muon", use_fused_adamw=False),
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "loop"])
def test_two_steps_equal_adamw_written_out(fused: bool) -> None:
    config = TrainConfig.of(
        weight_decay=0.5, beta1=0.8, beta2=0.9, use_fused_adamw=fused, lr_scale=("vision=0.5",)
    )
    params = _params()
    copies = {"vision.positions.weight": params["vision.positions.weight"].bfloat16()}
    expected = {k: v.double() for k, v in params.items()}
    optimizer = build_optimizer(params, copies, config.optim)
    moments = {k: (torch.zeros_like(v), torch.zeros_like(v)) for k, v in expected.items()}
    factor = torch.tensor(0.5)
    for t, rate in enumerate((0.1, 0.03), start=1):
        grads = _grads(params, t)
        optimizer.step(grads, number=t, lr=rate, factor=factor)
        for k, p in expected.items():
            lr = 0.5 * rate if k.startswith("vision") else rate
            m, v = moments[k]
            g = 0.5 * grads[k].double()
            m.mul_(0.8).add_(g, alpha=0.2)
            v.mul_(0.9).addcmul_(g, g, value=0.1)
            if k == "text.blocks.0.mlp.up.weight":
                p.mul_(1 - lr * 0.5)
            p -= lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
    for k, p in params.items():
        # Two updates of a few roundings each on values of order 1.
        torch.testing.assert_close(p.double(), expected[k], rtol=0, atol=16 * 2**-23)
        assert p.grad is None
    for k, copy in copies.items():
        assert torch.equal(copy, params[k].bfloat16())


def test_clipping_brings_down_to_the_norm_and_reports_the_old_one() -> None:
    grads = [torch.full((3,), 2.0), torch.full((1, 1), 2.0)]
    norm, factor = clipping(grads, 1.0)
    assert float(norm) == 4.0
    assert factor is not None
    assert float(factor) == pytest.approx(0.25, rel=1e-5)
    _, factor = clipping(grads, 5.0)
    assert factor is not None
    assert float(factor) == 1.0
    norm, factor = clipping([torch.full((2,), 3.0)], 0.0)
    assert float(norm) == pytest.approx(math.sqrt(18))
    assert factor is None


LACKING = {
    "adamw": r"lacks exp_avg\.projector\.up\.bias",
    "adamw in a loop": r"has nothing for projector\.up\.bias",
    "muon": r"lacks exp_avg\.projector\.up\.bias",
    "muon, adamw in a loop": r"has nothing for projector\.up\.bias",
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_come_back_and_go_on_as_before(name: str) -> None:
    def step(optimizer: Optimizer, params: dict[str, Tensor], number: int) -> None:
        optimizer.step(_grads(params, number), number=number, lr=0.1, factor=None)

    config = OPTIMIZERS[name]
    params = _params()
    optimizer = build_optimizer(params, {}, config.optim)
    step(optimizer, params, 1)
    saved = {k: v.clone() for k, v in optimizer.state().items()}
    twins = {k: v.clone() for k, v in params.items()}
    step(optimizer, params, 2)
    again = build_optimizer(twins, {}, config.optim)
    again.load(saved)
    step(again, twins, 2)
    assert all(torch.equal(params[k], twins[k]) for k in params)
    lacking = {k: v for k, v in saved.items() if not k.endswith(".projector.up.bias")}
    with pytest.raises(ValueError, match=LACKING[name]):
        again.load(lacking)


def test_muon_takes_matrices_of_features_alone() -> None:
    params = init_params(preset("tiny"), device="meta")
    turned = {path for path, leaf in flatten(params).items() if uses_muon(path, leaf)}
    assert "text.blocks.0.mlp.up.weight" in turned
    assert "vision.blocks.1.attn.q.weight" in turned
    assert any(path.startswith("projector.") for path in turned)
    assert not any(flatten(params)[path].ndim != 2 for path in turned)
    others = ("text.embed.weight", "vision.patch_embed.weight", "text.blocks.0.mlp_norm.weight")
    assert turned.isdisjoint(others)


def test_muon_is_torchs_in_batches() -> None:
    """Against torch.optim.Muon, a matrix at a time: its updates, of 0.2 * lr on average, come from
    bf16 products (2**-8) that may be added up in another order."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (48, 32), "b": (32, 48), "c": (48, 32), "d": (32, 32)}
    params = {
        f"text.blocks.0.{n}.weight": torch.randn(s, generator=generator) for n, s in shapes.items()
    }
    theirs = [p.clone().requires_grad_() for p in params.values()]
    config = TrainConfig.of(optimizer="muon", weight_decay=0.1, momentum=0.9)
    optimizer = build_optimizer(params, {}, config.optim)
    peer = torch.optim.Muon(
        theirs, lr=0.1, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for t in (1, 2, 3):
        grads = _grads(params, t)
        optimizer.step(grads, number=t, lr=0.1, factor=None)
        for p, g in zip(theirs, grads.values(), strict=True):
            p.grad = g
        peer.step()
    for mine, other in zip(params.values(), theirs, strict=True):
        difference = (mine - other.detach()).square().mean().sqrt()
        assert difference < 3 * 0.1 * 0.2 * 2**-8
    stacks = stacks_of(params)
    assert sorted(map(len, stacks)) == [1, 1, 2]


def test_every_combination_is_what_was_asked_for() -> None:
    def kinds(**flags: Any) -> list[str]:
        optimizer = build_optimizer(_params(), {}, TrainConfig.of(**flags).optim)
        rest = [optimizer.rest] if isinstance(optimizer, Muon) else []
        return [type(one).__name__ for one in (optimizer, *rest)]

    assert kinds() == ["AdamW"]
    assert kinds(use_fused_adamw=False) == ["TorchAdamW"]
    assert kinds(optimizer="muon") == ["Muon", "AdamW"]
    assert kinds(optimizer="muon", use_fused_adamw=False) == ["Muon", "TorchAdamW"]
    for flags in ({"optimizer": "muon"}, {"optimizer": "adamw8bit"}, {"use_fused_adamw": False}):
        with pytest.raises(UserError, match="--state_dtype bf16 needs --optimizer adamw"):
            check(TrainConfig.of(state_dtype="bf16", **flags))
    check(TrainConfig.of(state_dtype="bf16"))


class Eighth(torch.optim.AdamW):
    """Stands for bitsandbytes' AdamW of 8 bits."""


class Stuck(Eighth):
    def step(self, closure: Any = None) -> None:
        pass


class Old(Eighth):
    def step(self, closure: Any = None) -> None:
        raise AttributeError("module has no attribute cadam8bit")


@pytest.mark.parametrize(
    ("library", "said"),
    [
        (Eighth, None),
        (Stuck, "failed its proof: ArithmeticError: what two steps change is off by"),
        (Old, "failed its proof: AttributeError: module has no attribute"),
        (None, "install bitsandbytes"),
    ],
)
def test_bitsandbytes_is_tried_before_it_is_used(
    library: Any, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "_found", {})
    proof.import_problem.cache_clear()
    module = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=library)) if library else None
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    config = TrainConfig.of(optimizer="adamw8bit")
    try:
        if said is None:
            assert isinstance(build_optimizer(_params(), {}, config.optim).optimizer, Eighth)
        else:
            with pytest.raises(UserError, match=f"bitsandbytes: {said}"):
                build_optimizer(_params(), {}, config.optim)
    finally:
        proof.import_problem.cache_clear()


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 24)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = newton_schulz(g)
    values = torch.linalg.svdvals(turned)
    assert values.min() > 0.5  # the iteration's fixed band is about 0.68 to 1.13
    assert values.max() < 1.3
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    inside = u.mT @ turned @ vt.mT  # diagonal: the singular vectors have stayed
    off = inside - torch.diag_embed(torch.diagonal(inside, dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-10
    assert not newton_schulz(torch.zeros(1, 4, 4)).any()
