"""AdamW over many leaves against torch's own in fp64; stochastic rounding; the gradient's norm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.optimizer.adamw import _noise, _stochastic, adamw_, grad_norm
from tests.rounding import ulps

SHAPES = ((3, 5), (1,), (7,), (1023,), (2, 0), (1025,), (64, 33))
DECAYS = (0.1, 0.0, 0.3, 0.1, 0.1, 0.0, 0.2)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BF16_MAX = torch.finfo(BF16).max


def leaves(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def zeros(dtype: torch.dtype) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in SHAPES]


def by_torch(
    params: list[Tensor], steps: list[list[Tensor]], factor: float
) -> tuple[list[Tensor], ...]:
    """torch.optim.AdamW in fp64: params and moments."""
    wide = [p.double().requires_grad_() for p in params]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(wide, DECAYS, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.95), eps=1e-6)
    for grads in steps:
        for p, g in zip(wide, grads, strict=True):
            p.grad = g.double() * factor
        optimizer.step()
    moments = ([optimizer.state[p][name] for p in wide] for name in ("exp_avg", "exp_avg_sq"))
    return [p.detach() for p in wide], *moments


@pytest.mark.parametrize("grad", [FP32, BF16, FP16])
@pytest.mark.parametrize("turned", [False, True])
def test_is_torchs_adamw(grad: torch.dtype, turned: bool) -> None:
    """Four steps of up to ten fp32 roundings each, of numbers of up to 4 (v: 16)."""
    params, steps = leaves(FP32, 0), [leaves(grad, t) for t in range(1, 5)]
    wanted = by_torch(params, steps, 0.3)
    moments, copies = (zeros(FP32), zeros(FP32)), [p.to(BF16) for p in params]
    some: list[Tensor | None] = [*copies]
    some[1] = None
    for p in params:
        p.requires_grad_()
    for t, grads in enumerate(steps, start=1):
        if turned:  # the same numbers, the last dimension not the densest
            grads = [g.t().contiguous().t() if g.ndim == 2 else g for g in grads]
        adamw_(
            params,
            grads,
            *moments,
            step=t,
            lr=0.1,
            beta1=0.8,
            beta2=0.95,
            eps=1e-6,
            weight_decay=DECAYS,
            scale=torch.tensor(0.3),
            copies=some,
        )
    for got, exact, largest in zip((params, *moments), wanted, (4, 4, 16), strict=True):
        error = torch.cat([(a - b).abs().flatten() for a, b in zip(got, exact, strict=True)])
        assert (error < 4 * 10 * largest * 2.0**-24).all(), float(error.max())
    for p, copy in zip(params, some, strict=True):
        assert copy is None or torch.equal(copy, p.to(BF16))
    assert all(torch.equal(g, same) for g, same in zip(steps[-1], leaves(grad, 4), strict=True))
    assert params[0]._version >= 4  # autograd sees that it was written


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_bad_gradient_stays_where_it_is(dtype: torch.dtype) -> None:
    clean, bad = leaves(dtype, 0), leaves(dtype, 0)
    grads, spoilt = leaves(BF16, 1), leaves(BF16, 1)
    spoilt[3][5], spoilt[3][1000] = math.nan, math.inf
    adamw_(clean, grads, zeros(dtype), zeros(dtype), step=1, lr=0.1)
    m, v = zeros(dtype), zeros(dtype)
    adamw_(bad, spoilt, m, v, step=1, lr=0.1)
    assert (m[3][1000], v[3][1000]) == (math.inf, math.inf)
    for i, (p, q) in enumerate(zip(bad, clean, strict=True)):
        touched = torch.zeros(p.shape, dtype=torch.bool)
        if i == 3:
            touched[5] = touched[1000] = True
            assert p[touched].isnan().all()  # inf / sqrt(inf) is none either
        assert torch.equal(p[~touched], q[~touched])


def test_stochastic_rounding_is_right_on_average() -> None:
    """x at a fraction s between two neighbours is rounded up with probability s, within four
    standard errors and the resolution of 16 bits."""
    n = 2**16
    noise = torch.randint(2**16, (n,), generator=torch.Generator().manual_seed(0))
    for share in (0.001, 0.25, 0.5, 0.9):
        for sign in (1.0, -1.0):
            rounded = _stochastic(torch.full((n,), sign * (1 + share * 2**-7)), noise)
            assert set(rounded.float().unique().tolist()) <= {sign, sign * (1 + 2**-7)}
            up = (rounded.float().abs() > 1).double().mean().item()
            assert abs(up - share) < 4 * math.sqrt(share * (1 - share) / n) + 2**-16


def test_stochastic_rounding_keeps_what_it_must() -> None:
    """Numbers of bf16, signs, infinities and NaN; and a number stays finite if rounding it to the
    nearest would keep it finite."""
    exact = torch.tensor([0.0, -0.0, 1.5, -3.0, math.inf, -math.inf, 2.0**-130, -BF16_MAX])
    top = BF16_MAX * (1 + torch.tensor([0.25, -0.25, 0.75]).double() * 2**-8).float()
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(FP32)
    for most in (0, 2**16 - 1):
        rounded = _stochastic(exact, torch.full((8,), most)).float()
        assert torch.equal(rounded, exact)
        assert torch.equal(rounded.signbit(), exact.signbit())
        assert _stochastic(nan, torch.full((4,), most)).isnan().all()
        near = _stochastic(top, torch.full((3,), most))
        assert near[0] == BF16_MAX
        assert near[1].isfinite()
        assert near[2] == math.inf
        assert near[2] == top[2].to(BF16)


def rounded_once(seed: int, step: int, count: int = 2**15) -> list[Tensor]:
    """Which entries one step rounds up (1) of two bf16 leaves whose new params and moments all lie
    about half-way between neighbours: param, exp_avg, exp_avg_sq, then those of the next leaf."""
    full = [torch.full((count,), x, dtype=BF16) for x in (1.0, 1 + 2**-7, 1.0, 1 - 2**-7)]
    p, g, m, v = ([x, x.clone()] for x in full)
    adamw_(
        p,
        g,
        m,
        v,
        step=step,
        lr=2**-9 / 1.3,
        beta1=0.5,
        beta2=0.5,
        weight_decay=0.0,
        seed=seed,
    )
    ups = [(x > x.min()).double() for pair in zip(p, m, v, strict=True) for x in pair]
    return [ups[i] for i in (0, 2, 4, 1, 3, 5)]


def test_noise_differs_by_seed_step_leaf_and_stream_and_by_nothing_else() -> None:
    """Independent bits have correlation 0, within four standard errors."""
    first = rounded_once(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, rounded_once(0, 1), strict=True))
    coins = [*first, rounded_once(1, 1)[1], rounded_once(0, 2)[1], rounded_once(2**32, 1)[1]]
    coins += [first[1].roll(1), first[1].roll(256)]
    for i, a in enumerate(coins):
        assert 0.3 < a.mean() < 0.7
        for b in coins[:i]:
            correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
            assert abs(float(correlation)) < 4 / math.sqrt(len(a)), i


def test_noise_is_uniform_over_seeds_and_places() -> None:
    """Each bit is fair within four standard errors: at one position over seeds, and for one seed
    over positions."""
    over_seeds = torch.stack(
        [torch.stack(_noise(torch.Size([1]), key, torch.device("cpu"))) for key in range(4000)]
    ).flatten(1)
    over_places = torch.stack(_noise(torch.Size([4000]), 7, torch.device("cpu")), 1)
    for words in (over_seeds, over_places):
        bits = (words[..., None] >> torch.arange(32)) & 1
        assert ((bits.double().mean(0) - 0.5).abs() < 4 * 0.5 / math.sqrt(4000)).all()


def test_small_steps_are_kept_on_average() -> None:
    """Steps of a thousandth of a unit in the last place, taken with that probability, within four
    standard errors. Rounding to the nearest would not move."""
    count, steps, unit = 2**16, 10, 2.0**-8
    lr = unit / 1000
    p = torch.full((count,), 0.75, dtype=BF16)
    m, v = torch.zeros(count), torch.zeros(count)
    for t in range(1, steps + 1):
        adamw_([p], [torch.ones(count, dtype=BF16)], [m], [v], step=t, lr=lr, weight_decay=0.0)
    moved = 0.75 - p.double().mean().item()
    error = 4 * unit * math.sqrt(steps * 0.001 / count)
    assert steps * lr > 5 * error  # what is told apart from not moving
    assert abs(moved - steps * lr) < error
    assert (torch.tensor(0.75) - lr).to(BF16) == 0.75


def train(dtype: torch.dtype, stochastic: bool) -> float:
    """The mean loss of the end of a linear regression, whose optimum is far from the start."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 16, generator=generator)
    w_true = torch.randn(16, generator=generator)
    w, m, v = (torch.zeros(16).to(dtype) for _ in range(3))
    losses = []
    for t in range(1, 801):
        error = x @ (w.float() - w_true)
        losses.append(error.square().mean().item())
        grad = 2 * x.T @ error / len(x)
        if stochastic:
            adamw_([w], [grad], [m], [v], step=t, lr=2e-3, weight_decay=0.0)
        else:
            wide = [t.float() for t in (w, m, v)]
            adamw_([wide[0]], [grad], [wide[1]], [wide[2]], step=t, lr=2e-3, weight_decay=0.0)
            w, m, v = (t.to(dtype) for t in wide)
    return sum(losses[-50:]) / 50


def test_bf16_weights_learn_what_fp32_ones_do() -> None:
    fp32, bf16, nearest = train(FP32, True), train(BF16, True), train(BF16, False)
    assert bf16 < fp32 + 16 * (2**-8) ** 2 * 4  # an error of about a unit in each weight
    assert nearest > 4 * bf16


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_traces(dtype: torch.dtype) -> None:
    """A compiled step, with no break in its graph, writes what an eager one writes."""

    def state() -> tuple[list[Tensor], ...]:
        copies = [p.to(BF16) for p in leaves(FP32, 0)]
        return leaves(dtype, 0), leaves(BF16, 1), zeros(dtype), zeros(dtype), copies

    def step(p: Any, g: Any, m: Any, v: Any, copies: Any) -> None:
        twins = [c if i % 2 else None for i, c in enumerate(copies)] if dtype == FP32 else None
        adamw_(p, [2 * x for x in g], m, v, step=3, lr=0.1, weight_decay=DECAYS, copies=twins)

    eager, compiled = state(), state()
    step(*eager)
    torch._dynamo.reset()
    torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled)
    for a, b in zip(eager, compiled, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_norm_is_over_all_leaves_and_in_fp32() -> None:
    grads = [*leaves(FP32, 0), *leaves(BF16, 1), *leaves(FP16, 2)]
    wanted = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    norm = grad_norm(grads)
    assert (norm.dtype, norm.shape) == (FP32, ())
    assert float(norm) == pytest.approx(wanted, rel=ulps(torch.float32, 16))
    assert float(grad_norm([])) == 0
    assert grad_norm([torch.tensor([1.0]), torch.tensor([math.nan])]).isnan()
    many = torch.full((3, 1_000_001), 300.0, dtype=FP16)  # squares are no fp16; sums of them, fp32
    assert float(grad_norm([many.mT])) == pytest.approx(
        300 * math.sqrt(3_000_003), rel=ulps(torch.float32, 24)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": 0}, "step counts from 1"),
        ({"grads": []}, "1 params but 0 in grads"),
        ({"grads": [torch.zeros(3, dtype=torch.int32)]}, r"grads\[0\] must be float32 or bfloat16"),
        ({"grads": [torch.zeros(4)]}, r"grads\[0\] must be .* \(3,\)"),
        ({"params": [torch.zeros(3, dtype=torch.float64)]}, r"params\[0\] must be float32 or bf"),
        ({"params": [torch.zeros(3, 2).T]}, r"params\[0\] must be .* contiguous"),
        ({"exp_avg_sqs": [torch.zeros(3, dtype=BF16)]}, r"exp_avg_sqs\[0\] must be float32 \(3,\)"),
        ({"copies": [torch.zeros(3)]}, r"copies\[0\] must be bfloat16"),
        ({"scale": torch.zeros(1)}, "scale must be an fp32 scalar"),
        ({"weight_decay": [0.1, 0.2]}, "2 in weight_decay"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    shape = change["params"][0].shape if "params" in change else (3,)
    given: dict[str, Any] = {name: [torch.zeros(shape)] for name in names}
    given |= {"step": 1, "lr": 0.1}
    with pytest.raises(ValueError, match=said):
        adamw_(**given | change)
