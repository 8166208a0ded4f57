"""The activations' and the rotary embedding's Triton kernels under every driver, and a deliberately
wrong backward under each: autograd, torch.func, torch.compile.

Values, gradients and traps are in test_triton_glu.py and test_triton_rope.py; the torch paths under
drivers in test_drivers.py.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch, geglu, relu2, rope, swiglu
from tests.kernels.drivers import (
    Driver,
    Loss,
    by_autograd,
    by_autograd_of_vmap,
    by_compile,
    by_compiled_grad,
    by_double_backward,
    by_func_grad,
    by_hvp,
    by_jvp,
    by_jvp_jvp,
    by_one_leaf,
    by_vmap_grad,
    by_vmap_grad_shared,
    by_vmap_hvp,
    by_vmap_twice,
    disagreement,
    name_of,
    random,
)

# torch.func.jvp scripts its decompositions when first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

glu = importlib.import_module("kernels.glu")
ropes = importlib.import_module("kernels.rope")
TOLERANCE = 1e-4  # fp32: sums of a few hundred numbers of order 1, a few times over
ROWS, WIDTH = 5, 24

TABLE = random(9, 4, seed=8)
POSITIONS = torch.tensor([0, 8, 3, 3, 1])


def angles(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    cos, sin = TABLE.cos().float(), TABLE.sin().float()
    return cos.to(like.device), sin.to(like.device), POSITIONS.to(like.device)


def joined(pair: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in pair])


@dataclass(frozen=True)
class Case:
    """`fast` against `plain`, of tensors of these shapes; `op`: the attribute of the module."""

    fast: Loss
    plain: Loss
    shapes: tuple[tuple[int, ...], ...]
    module: Any
    op: str


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

FIRST: list[Driver] = [
    by_autograd,
    by_one_leaf,
    by_func_grad,
    by_vmap_grad,
    by_vmap_grad_shared,
    by_vmap_twice,
    by_autograd_of_vmap,
    by_compile,
    by_compiled_grad,
]
HIGHER: list[Driver] = [by_jvp, by_double_backward, by_hvp, by_vmap_hvp, by_jvp_jvp]


def error(case: Case, driver: Driver, device: str) -> float:
    floats = tuple(random(*s, seed=i).to(device, torch.float32) for i, s in enumerate(case.shapes))
    with dispatch.override(swiglu="triton", geglu="triton", relu2="triton", rope="triton"):
        return disagreement(driver, case.fast, case.plain, floats)


@pytest.mark.parametrize("driver", [*FIRST, *HIGHER], ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_under_driver(name: str, driver: Driver, kernel_device: str) -> None:
    assert error(CASES[name], driver, kernel_device) < TOLERANCE


def broken(case: Case, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a function of the case's Op, or of its Function, wrong by a factor of 3."""
    owner = getattr(case.module, case.op)
    right = getattr(owner, hook)

    def wrong(*args: Any, **static: Any) -> Any:
        out = right(*args, **static)
        if isinstance(out, Tensor):
            return 3.0 * out
        return tuple(3.0 * t if isinstance(t, Tensor) else t for t in out)

    if isinstance(owner, type):
        monkeypatch.setattr(owner, hook, staticmethod(wrong))
    else:
        monkeypatch.setattr(case.module, case.op, dataclasses.replace(owner, **{hook: wrong}))


@pytest.mark.parametrize("driver", FIRST, ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_a_wrong_backward_shows(
    name: str, driver: Driver, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(CASES[name], "backward", monkeypatch)
    assert error(CASES[name], driver, kernel_device) > 0.1


@pytest.mark.parametrize("driver", [by_hvp, by_double_backward], ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_a_wrong_derivative_of_backward_shows(
    name: str, driver: Driver, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An Op takes it from its formula, the self-adjoint Function from its own jvp and backward."""
    own = "jvp" if driver is by_hvp else "backward"
    broken(CASES[name], own if name == "rope" else "formula", monkeypatch)
    assert error(CASES[name], driver, kernel_device) > 0.1
