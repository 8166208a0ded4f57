"""The activations' and the rotary embedding's Triton kernels under autograd, torch.func and
torch.compile, each also with a deliberately wrong backward.

test_triton_glu.py and test_triton_rope.py test values, gradients and edge cases; test_drivers.py
tests the torch paths.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from kernels import geglu, relu2, rope, swiglu
from kernels.runtime import dispatch
from tests.kernels.drivers import (
    FIRST_ORDER,
    HIGHER_ORDER,
    Case,
    Driver,
    broken,
    by_double_backward,
    by_hvp,
    disagreement,
    joined,
    name_of,
    placed,
    random,
    spoilt,
)
from tests.rounding import ulps

glu = importlib.import_module("kernels.mlp.glu")
ropes = importlib.import_module("kernels.rope.rope")
TOLERANCE = ulps(
    torch.float32, 800
)  # fp32: a few consecutive sums of a few hundred numbers of order 1
ROWS, WIDTH = 5, 24

TABLE = random(9, 4, seed=8)
POSITIONS = torch.tensor([0, 8, 3, 3, 1])


def angles(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    cos, sin = TABLE.cos().float(), TABLE.sin().float()
    return cos.to(like.device), sin.to(like.device), POSITIONS.to(like.device)


HEADS = ((ROWS, 3, 8), (ROWS, 2, 8))
CASES = {
    "swiglu": Case(
        swiglu, glu.swiglu_reference, ((ROWS, WIDTH), (ROWS, WIDTH)), glu, "SWIGLU_TRITON"
    ),
    "geglu": Case(geglu, glu.geglu_reference, ((ROWS, WIDTH), (ROWS, WIDTH)), glu, "GEGLU_TRITON"),
    "relu2": Case(relu2, glu.relu2_reference, ((ROWS, WIDTH),), glu, "RELU2_TRITON"),
    "rope": Case(
        lambda q, k: joined(rope(q, k, *angles(q))),
        lambda q, k: joined(ropes.rope_reference(q, k, *angles(q))),
        HEADS,
        ropes,
        "_Rotate",
    ),
    "rope with norms": Case(
        lambda q, k, a, b: joined(rope(q, k, *angles(q), q_weight=a, k_weight=b, eps=1e-3)),
        lambda q, k, a, b: joined(ropes.rope_qk_norm_reference(q, k, a, b, *angles(q), eps=1e-3)),
        (*HEADS, (8,), (8,)),
        ropes,
        "QK_NORM_TRITON",
    ),
}


# Drivers


def error(case: Case, driver: Driver, device: str) -> float:
    floats = tuple(random(*s, seed=i).to(device, torch.float32) for i, s in enumerate(case.shapes))
    with dispatch.override(swiglu="triton", geglu="triton", relu2="triton", rope="triton"):
        return disagreement(driver, case.fast, case.plain, floats)


@pytest.mark.parametrize(
    ("name", "driver", "kernel_device"), placed(CASES, [*FIRST_ORDER, *HIGHER_ORDER])
)
def test_under_driver(name: str, driver: Driver, kernel_device: str) -> None:
    assert error(CASES[name], driver, kernel_device) < TOLERANCE


@pytest.mark.parametrize(("name", "driver"), spoilt(CASES, FIRST_ORDER))
def test_a_wrong_backward_shows(
    name: str, driver: Driver, interpreter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(CASES[name], "backward", monkeypatch)
    assert error(CASES[name], driver, interpreter) > 0.1


@pytest.mark.parametrize("driver", [by_hvp, by_double_backward], ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_a_wrong_derivative_of_backward_shows(
    name: str, driver: Driver, interpreter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An Op uses its formula, the self-adjoint Function its own jvp and backward."""
    own = "jvp" if driver is by_hvp else "backward"
    broken(CASES[name], own if name == "rope" else "formula", monkeypatch)
    assert error(CASES[name], driver, interpreter) > 0.1
