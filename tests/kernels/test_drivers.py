"""Every kernel under every driver, values and derivatives, in fp64 against its plain formula.

fp64 makes the check sharp: right answers agree to about 1e-13, wrong ones do not come near. The
last tests break each backward (and each formula) on purpose: every driver must then disagree.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import attention, cross_entropy, int8_linear, linear_cross_entropy, rms_norm, rope
from kernels.loss.cross_entropy_torch import LossOptions
from tests.kernels.drivers import (
    EVERY_FIRST,
    EVERY_HIGHER,
    Case,
    Driver,
    broken,
    by_compile,
    by_compiled_grad,
    by_double_backward,
    by_grad_grad,
    by_grad_jvp,
    by_hvp_of_many,
    by_jacrev_jacrev,
    by_jvp_jvp,
    by_third_order,
    by_value,
    by_vmap,
    by_vmap_hvp,
    error,
    joined,
    name_of,
    random,
    spoilt,
)
from tests.rounding import ulps

N, VOCAB, DIM = 12, 11, 6
TOLERANCE = ulps(torch.float64, 4000)  # fp64; sums here have at most a few hundred terms of order 1


def module(name: str) -> Any:
    """The module, which the public function of the same name hides as an attribute."""
    return importlib.import_module(f"kernels.{name}")


def make_cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, VOCAB, (N,), generator=generator)
    labels[torch.tensor([0, 5, 11])] = -100
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}
    everything = LossOptions(**options)
    positions = torch.randint(0, 9, (N,), generator=generator)
    angles = random(9, 2, seed=5)
    cos, sin = angles.cos(), angles.sin()
    weight = torch.randint(-127, 128, (5, DIM), generator=generator, dtype=torch.int8)
    scale = random(5, 1, seed=6).abs()
    ragged = torch.tensor([0, 3, 3, 8, 10, 12, 12, 12], dtype=torch.int32)
    uniform = torch.tensor([0, 4, 8, 12, 12], dtype=torch.int32)
    ln, rn = (
        module("norm.layer_norm").layer_norm_reference,
        module("norm.rms_norm").rms_norm_reference,
    )
    ce = module("loss.cross_entropy")
    plain_attention = module("attention.attention").attention_reference

    def attention_case(cu: Tensor, causal: bool, window: int | None) -> Case:
        def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, cu, causal=causal, window=window)

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return plain_attention(q, k, v, cu, causal=causal, window=window, scale=0.5)

        shapes = ((N, 4, 4), (N, 2, 4), (N, 2, 4))
        return Case(fast, plain, shapes, module("attention.attention_padded"), "PADDED")

    return {
        "cross_entropy": Case(
            lambda z: cross_entropy(z, labels, **options),
            lambda z: ce.cross_entropy_reference(z, labels, everything),
            ((N, VOCAB),),
            module("loss.cross_entropy"),
            "OP",
        ),
        "linear_cross_entropy": Case(
            lambda h, w, b: linear_cross_entropy(
                h, w, labels, bias=b, scale=0.7, chunk=4, **options
            ),
            lambda h, w, b: ce.cross_entropy_reference(
                (h @ w.mT + b) * 0.7, labels, options=everything
            ),
            ((N, DIM), (VOCAB, DIM), (VOCAB,)),
            module("loss.linear_cross_entropy"),
            "OP",
        ),
        "token_logprobs": Case(
            lambda h, w, b: kernels.token_logprobs(
                h, w, labels, bias=b, scale=0.7, softcap=3.0, chunk=4
            ),
            lambda h, w, b: (
                (3.0 * ((h @ w.mT + b) * 0.7 / 3.0).tanh())
                .log_softmax(-1)
                .gather(-1, labels.clamp(min=0)[:, None])[:, 0]
                .where(labels >= 0, 0.0)
            ),
            ((N, DIM), (VOCAB, DIM), (VOCAB,)),
            module("loss.token_logprobs"),
            "OP",
        ),
        "rms_norm": Case(
            lambda x, w: rms_norm(x, w, 1e-3),
            lambda x, w: rn(x, w, eps=1e-3),
            ((N, DIM), (DIM,)),
            module("norm.rms_norm"),
            "RMS_NORM",
        ),
        "rms_norm without weight": Case(
            lambda x: rms_norm(x, None, 1e-3),
            lambda x: rn(x, None, eps=1e-3),
            ((3, 4, DIM),),
            module("norm.rms_norm"),
            "RMS_NORM",
        ),
        "layer_norm": Case(
            lambda x, w, b: kernels.layer_norm(x, w, b, 1e-3),
            lambda x, w, b: ln(x, w, b, eps=1e-3),
            ((3, 4, DIM), (DIM,), (DIM,)),
            module("norm.layer_norm"),
            "LAYER_NORM",
        ),
        "layer_norm without leaves": Case(
            lambda x: kernels.layer_norm(x, None, None, 1e-3),
            lambda x: ln(x, None, None, eps=1e-3),
            ((N, DIM),),
            module("norm.layer_norm"),
            "LAYER_NORM",
        ),
        "swiglu": Case(
            kernels.swiglu,
            module("mlp.glu").swiglu_reference,
            ((N, DIM), (N, DIM)),
            module("mlp.glu"),
            "SWIGLU",
        ),
        "geglu": Case(
            kernels.geglu,
            module("mlp.glu").geglu_reference,
            ((N, DIM), (N, DIM)),
            module("mlp.glu"),
            "GEGLU",
        ),
        "relu2": Case(
            kernels.relu2,
            module("mlp.glu").relu2_reference,
            ((N, DIM),),
            module("mlp.glu"),
            "RELU2",
        ),
        "rope": Case(
            lambda q, k: joined(rope(q, k, cos, sin, positions)),
            lambda q, k: joined(module("rope.rope").rope_reference(q, k, cos, sin, positions)),
            ((N, 4, 4), (N, 2, 4)),
            module("rope.rope"),
            "_Rotate",
        ),
        "rope with norms": Case(
            lambda q, k, a, b: joined(
                rope(q, k, cos, sin, positions, q_weight=a, k_weight=b, eps=1e-3)
            ),
            lambda q, k, a, b: joined(
                module("rope.rope").rope_qk_norm_reference(
                    q, k, a, b, cos, sin, positions, eps=1e-3
                )
            ),
            ((N, 4, 4), (N, 2, 4), (4,), (4,)),
            module("rope.rope"),
            "QK_NORM",
        ),
        "int8_linear": Case(
            lambda x, b: int8_linear(x, weight, scale, b),
            lambda x, b: (
                module("quantised.int8_linear").int8_linear_reference(x, weight, scale) + b
            ),
            ((2, 3, DIM), (5,)),
            module("quantised.int8_linear"),
            "_Int8Linear",
        ),
        "attention ragged causal": attention_case(ragged, True, None),
        "attention ragged full": attention_case(ragged, False, None),
        "attention ragged window": attention_case(ragged, True, 2),
        "attention ragged full window": attention_case(ragged, False, 2),
        "attention uniform": attention_case(uniform, False, None),
    }


CASES = make_cases()
ATTENTION = "attention ragged causal"
# one case an Op or Function for the deliberately wrong backwards
BROKEN = [
    "cross_entropy",
    "linear_cross_entropy",
    "token_logprobs",
    "rms_norm",
    "layer_norm",
    "swiglu",
    "geglu",
    "relu2",
    "rope with norms",
    ATTENTION,
]
FUNCTIONS = ["rope", "int8_linear"]  # self-adjoint: of autograd's own kind, not an Op


def pairs() -> list[Any]:
    """(case, driver): all of them, but other kinds of attention skip what is slow and the same."""
    slow = [by_compile, by_compiled_grad, by_vmap_hvp, by_hvp_of_many, by_grad_jvp]
    slow += [by_third_order, by_jvp_jvp]
    out = []
    for name in CASES:
        for driver in [by_value, by_vmap, *EVERY_FIRST, *EVERY_HIGHER]:
            if name == ATTENTION or not name.startswith("attention") or driver not in slow:
                out.append(pytest.param(name, driver, id=f"{name}-{name_of(driver)}"))
    return out


@pytest.mark.parametrize(("name", "driver"), pairs())
def test_kernel_under_driver(name: str, driver: Driver) -> None:
    assert error(CASES[name], driver) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "driver"), [*spoilt(BROKEN, EVERY_FIRST), *spoilt(FUNCTIONS, EVERY_FIRST)]
)
def test_a_wrong_backward_shows(name: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(CASES[name], "backward", monkeypatch)
    assert error(CASES[name], driver) > 0.1


# A Function's jvp is not used by reverse twice, nor (by choice) by jvp of jvp
NO_JVP = [by_double_backward, by_grad_grad, by_jacrev_jacrev, by_third_order, by_jvp_jvp]
OF_JVP = [driver for driver in EVERY_HIGHER if driver not in NO_JVP]


@pytest.mark.parametrize(
    ("name", "driver"), [*spoilt(BROKEN, EVERY_HIGHER), *spoilt(FUNCTIONS, OF_JVP)]
)
def test_a_wrong_formula_shows(name: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(CASES[name], "formula", monkeypatch)
    assert error(CASES[name], driver) > 0.1
