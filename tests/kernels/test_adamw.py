"""AdamW over many leaves against torch's own in fp64; stochastic rounding; the gradient's norm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.adamw import _stochastic, adamw_, grad_norm

SHAPES = ((3, 5), (1,), (7,), (1023,), (2, 0), (1025,), (64, 33))
DECAYS = (0.1, 0.0, 0.3, 0.1, 0.1, 0.0, 0.2)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = {FP32: 2.0**-24, BF16: 2.0**-9}


def leaves(dtype: torch.dtype, seed: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(size * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]


def zeros(dtype: torch.dtype) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in SHAPES]


def by_torch(params: list[Tensor], steps: list[list[Tensor]], factor: float) -> list[Tensor]:
    """torch.optim.AdamW in fp64."""
    wide = [p.double().requires_grad_() for p in params]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(wide, DECAYS, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.95), eps=1e-6)
    for grads in steps:
        for p, g in zip(wide, grads, strict=True):
            p.grad = g.double() * factor
        optimizer.step()
    return [p.detach() for p in wide]


@pytest.mark.parametrize("grad", [FP32, BF16, FP16])
def test_is_torchs_adamw(grad: torch.dtype) -> None:
    """Four steps of some ten fp32 roundings each, of params of up to 4 and updates of about 0.1."""
    params, steps = leaves(FP32, 0), [leaves(grad, t) for t in range(1, 5)]
    wanted = by_torch(params, steps, 0.5)
    moments, copies = (zeros(FP32), zeros(FP32)), [p.to(BF16) for p in params]
    copies_or_none: list[Tensor | None] = [*copies]
    copies_or_none[1] = None
    for t, grads in enumerate(steps, start=1):
        adamw_(
            params, grads, *moments, step=t, lr=0.1, beta1=0.8, beta2=0.95, eps=1e-6,
            weight_decay=DECAYS, scale=torch.tensor(0.5), copies=copies_or_none,
        )  # fmt: skip
    for p, copy, want in zip(params, copies_or_none, wanted, strict=True):
        assert float((p - want).abs().max()) < 4 * 10 * 4 * 2**-24 if p.numel() else True
        assert copy is None or torch.equal(copy, p.to(BF16))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_bad_gradient_stays_where_it_is(dtype: torch.dtype) -> None:
    params, grads = leaves(dtype, 0), leaves(BF16, 1)
    clean = [p.clone() for p in params]
    one, other = (zeros(dtype), zeros(dtype)), (zeros(dtype), zeros(dtype))
    adamw_(clean, [g.clone() for g in grads], *one, step=1, lr=0.1)
    grads[3][5], grads[3][1000] = math.nan, math.inf
    adamw_(params, grads, *other, step=1, lr=0.1)
    for i, (p, q) in enumerate(zip(params, clean, strict=True)):
        bad = torch.zeros(p.shape, dtype=torch.bool)
        if i == 3:
            bad[5] = bad[1000] = True
            assert p[bad].isnan().all()  # inf / sqrt(inf) is none either
        assert torch.equal(p[~bad], q[~bad])


def test_stochastic_rounding_is_right_on_average() -> None:
    """x lies at a share s between two neighbours: it goes up with probability s, within four
    standard errors; numbers of bf16 stay, and so do NaN, infinities and the sign."""
    n = 2**16
    noise = torch.randint(2**16, (n,), generator=torch.Generator().manual_seed(0))
    for share in (0.001, 0.25, 0.5, 0.9):
        for sign in (1.0, -1.0):
            x = torch.full((n,), sign * (1 + share * 2**-7))
            rounded = _stochastic(x, noise)
            up = (rounded.float().abs() > 1).double().mean().item()
            assert set(rounded.float().abs().unique().tolist()) <= {1.0, 1 + 2**-7}
            assert abs(up - share) < 4 * math.sqrt(share * (1 - share) / n) + 2**-16
    exact = torch.tensor([0.0, -0.0, 1.5, -3.0, math.inf, -math.inf, 2.0**-130])
    for most in (0, 2**16 - 1):
        rounded = _stochastic(exact, torch.full((7,), most)).float()
        assert torch.equal(rounded, exact)
        assert torch.equal(rounded.signbit(), exact.signbit())
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(FP32)
    assert _stochastic(nan, torch.full((2,), 2**16 - 1)).isnan().all()


def rounded_once(seed: int, step: int, count: int = 2**15) -> list[Tensor]:
    """What one step makes of a bf16 leaf whose param and moments all fall between neighbours."""
    p, m, v = (torch.ones(count, dtype=BF16) for _ in range(3))
    g = torch.full((count,), 1.0 + 2**-7, dtype=BF16)
    # v becomes 1 + 2**-7 + 2**-15, m 1 + 2**-8, and p about 1 - 2**-9 after either bias correction
    adamw_(
        [p], [g], [m], [v], step=step, lr=2.0**-10, beta1=0.5, beta2=0.6, weight_decay=0.0,
        seed=seed,
    )  # fmt: skip
    return [p, m, v]


def test_noise_differs_by_seed_step_and_stream_and_by_nothing_else() -> None:
    """Two fair coins agree half of the time: within four standard errors. The same ones, always."""
    streams = rounded_once(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(streams, rounded_once(0, 1), strict=True))
    others = (rounded_once(1, 1)[1], rounded_once(0, 2)[1])
    ups = [(s.float() > s.float().min()).double() for s in (*streams, *others)]
    for i, a in enumerate(ups):
        assert 0.1 < a.mean() < 0.9
        for b in ups[:i]:
            correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
            assert abs(float(correlation)) < 4 / math.sqrt(len(a))
    neighbours = torch.corrcoef(torch.stack([ups[0][1:], ups[0][:-1]]))[0, 1]
    assert abs(float(neighbours)) < 4 / math.sqrt(len(ups[0]))


def test_small_steps_are_kept_on_average() -> None:
    """Steps of a hundredth of a unit in the last place: nearest rounding would lose all of them."""
    count, steps, lr = 4096, 40, 2.0**-8 / 100
    p, m, v = torch.ones(count, dtype=BF16), torch.zeros(count), torch.zeros(count)
    m, v = m.to(BF16), v.to(BF16)
    for t in range(1, steps + 1):
        adamw_([p], [torch.ones(count, dtype=BF16)], [m], [v], step=t, lr=lr, weight_decay=0.0)
    moved = 1 - p.double().mean().item()
    # below 1 the unit is 2**-8: a coin a step of probability 1/100, and the moments' own noise
    error = 4 * 2**-8 * math.sqrt(steps * 0.01 / count)
    assert abs(moved - steps * lr) < error + 0.05 * steps * lr
    nearest = torch.ones((), dtype=BF16)
    for _ in range(steps):
        nearest -= torch.tensor(lr, dtype=BF16)
    assert nearest == 1


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


def test_norm_is_over_all_leaves_and_in_fp32() -> None:
    grads = [*leaves(FP32, 0), *leaves(BF16, 1), *leaves(FP16, 2)]
    wanted = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    norm = grad_norm(grads)
    assert norm.dtype == FP32
    assert float(norm) == pytest.approx(wanted, rel=1e-6)
    assert float(grad_norm([])) == 0
    assert grad_norm([torch.tensor([math.nan])]).isnan()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": 0}, "step counts from 1"),
        ({"grads": []}, "1 params but 0 in grads"),
        ({"grads": [torch.zeros(3, dtype=torch.int32)]}, r"grads\[0\] must be float32 or bfloat16"),
        ({"params": [torch.zeros(3, 2).T]}, r"params\[0\] must be .* contiguous"),
        ({"exp_avg_sqs": [torch.zeros(3, dtype=BF16)]}, r"exp_avg_sqs\[0\] must be float32 \(3,\)"),
        ({"copies": [torch.zeros(3)]}, r"copies\[0\] must be bfloat16"),
        ({"scale": torch.zeros(1)}, "scale must be an fp32 scalar"),
        ({"weight_decay": [0.1, 0.2]}, "2 in weight_decay"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, said: str) -> None:
    given = {name: [torch.zeros(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")} | {
        "step": 1,
        "lr": 0.1,
    }
    if "params" in change:
        shape = change["params"][0].shape
        given |= {n: [torch.zeros(shape)] for n in ("grads", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(ValueError, match=said):
        adamw_(**given | change)
