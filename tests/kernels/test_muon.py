"""Muon apart from its products: the torch path against the formula, the kernels against torch."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from kernels.optimizer.muon import gather_momenta, move_
from kernels.optimizer.muon_triton import gather_launch, move_launch
from kernels.runtime import dispatch
from kernels.runtime import resources as compiled
from kernels.runtime.launch import recording
from tests.rounding import ulps

BF16, FP32 = torch.bfloat16, torch.float32
# less than a block, unaligned; a whole block; blocks and a remainder
SHAPES = [(3, 5), (32, 64), (70, 66)]


def made(shape: tuple[int, int], seed: int, dtype: torch.dtype = FP32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def shifted(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers, at an address that is no multiple of 16."""
    return [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in tensors]


def steps(
    backend: str, device: str, shape: tuple[int, int], grad: torch.dtype, odd: bool, copied: bool
) -> list[Tensor]:
    """All tensors that two steps change, with negation in place of the products."""
    momenta, params = ([x.to(device) for x in made(shape, seed)] for seed in (0, 1))
    if odd:
        momenta, params = shifted(momenta), shifted(params)
    copies = [p.to(BF16) for p in params] if copied else None
    stacks = []
    for t in (2, 3):
        grads = [g.to(device) for g in made(shape, t, grad)]
        scale = torch.tensor(0.7, device=device) if t == 3 else None
        with dispatch.override(muon=backend):
            stacks.append(gather_momenta(momenta, grads, momentum=0.95, scale=scale))
            move_(
                params, -stacks[-1], keeps=[0.9, 1.0, 0.99], lengths=[0.1, 0.2, 0.3], copies=copies
            )
    for p, copy in zip(params, copies or [], strict=copied):
        assert torch.equal(copy, p.to(BF16))
    return [x.cpu().float() for x in (*momenta, *params, *stacks)]


known = functools.cache(steps)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("grad", [FP32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_path_is_the_formula(shape: tuple[int, int], grad: torch.dtype, copied: bool) -> None:
    momenta, params = ([x.double() for x in made(shape, seed)] for seed in (0, 1))
    for t in (2, 3):
        for i, g in enumerate(made(shape, t, grad)):
            g = g.double() * (0.7 if t == 3 else 1.0)
            momenta[i] = 0.95 * momenta[i] + 0.05 * g
            ahead = (0.95 * momenta[i] + 0.05 * g).float().to(BF16).double()
            params[i] = (0.9, 1.0, 0.99)[i] * params[i] + (0.1, 0.2, 0.3)[i] * ahead
    got = known("torch", "cpu", shape, grad, False, copied)
    for mine, wanted in zip(got[:6], [*momenta, *params], strict=True):
        # a few fp32 roundings of numbers up to 4; one bf16 bit of "ahead" may differ
        torch.testing.assert_close(mine.double(), wanted, rtol=0, atol=0.3 * 4 * 2**-8)
        assert ((mine.double() - wanted).abs() > 1e-5).double().mean() < 0.01


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("grad", [FP32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_the_torch_path(
    shape: tuple[int, int], grad: torch.dtype, odd: bool, kernel_device: str
) -> None:
    """Bit for bit in the interpreter. A GPU fuses a * b + c, so that a few entries of the stack
    round to bf16 the other way."""
    got = steps("triton", kernel_device, shape, grad, odd, odd)
    wanted = known("torch", "cpu", shape, grad, odd, odd)
    for a, b in zip(got, wanted, strict=True):
        off = (a - b).abs()
        assert off.max() <= 4 * 2**-8
        assert (off > 1e-5).double().mean() < 0.01
    if kernel_device == "cpu":
        assert all(
            torch.allclose(a, b, rtol=0, atol=ulps(torch.float32, 16))
            for a, b in zip(got[:3], wanted[:3], strict=True)
        )


def test_what_does_not_fit_is_refused() -> None:
    momenta, grads = made((4, 6), 0), made((4, 6), 1)
    with pytest.raises(ValueError, match="3 leaves but 2 in grads"):
        gather_momenta(momenta, grads[:2], momentum=0.9)
    with pytest.raises(ValueError, match=r"grads\[1\] must be float32 or bfloat16 or float16"):
        gather_momenta(momenta, [grads[0], grads[1].double(), grads[2]], momentum=0.9)
    with pytest.raises(ValueError, match=r"momenta\[0\] must be float32 \(6, 4\).*contiguous"):
        gather_momenta([m.mT for m in momenta], [g.mT for g in grads], momentum=0.9)
    with pytest.raises(ValueError, match=r"stack\[0\] must be bfloat16"):
        move_(momenta, torch.stack(grads), keeps=[1.0] * 3, lengths=[1.0] * 3)


@pytest.mark.compiles
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("grad", [FP32, BF16])
def test_nothing_spills(grad: torch.dtype, arch: int) -> None:
    like = {"dtype": FP32, "device": "meta"}
    stack = torch.empty(2, 1536, 8960, dtype=BF16, device="meta")
    leaves = [torch.empty(1536, 8960, **like) for _ in range(2)]  # type: ignore[call-overload]
    with recording(divmod(arch, 10), 132) as launches:
        gather_launch(leaves, [x.to(grad) for x in leaves], stack, 0.95, torch.empty((), **like))  # type: ignore[call-overload]
        move_launch(leaves, stack, [1.0, 1.0], [0.1, 0.1], [x.to(BF16) for x in leaves])
    assert [one.grid for one in launches] == [(6720, 2), (6720, 2)]
    for one in launches:
        used = compiled.resources(one, arch)
        assert used.local == 0, used
        assert used.registers <= 80, used
        assert used.shared == 0, used
