"""What modules do to logits after their head, done to logits that do not exist yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from core.layers import Logits

CHAINS: dict[str, Callable[[Any], Any]] = {
    "Gemma-2": lambda x: torch.tanh(x / 30.0) * 30.0,
    "Cohere": lambda x: x * 0.0625,
    "Granite": lambda x: x / 8.0,
    "as floats": lambda x: x.float(),
    "in another order": lambda x: 3.0 * (0.5 * x).tanh() / 4,
    "turned round": lambda x: torch.tanh(x * -2) * -1.5,
    "a cap, then a scale": lambda x: torch.tanh(x / 5.0) * 5.0 / 7.0,
}


@pytest.mark.parametrize("name", CHAINS)
def test_scales_and_caps(name: str) -> None:
    hidden, weight = torch.randn(5, 4).double(), 3 * torch.randn(7, 4).double()
    lazy = CHAINS[name](Logits(hidden, {"weight": weight}))
    assert isinstance(lazy, Logits)
    dense = CHAINS[name]((hidden @ weight.T).double())
    torch.testing.assert_close(lazy.dense(), dense.double(), rtol=1e-6, atol=1e-7)
    if name != "as floats":
        torch.testing.assert_close(lazy.dense(), dense, rtol=1e-12, atol=1e-13)
    assert lazy.softcap is None or lazy.softcap > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.tanh().tanh(), "a second tanh"),
        (lambda x: torch.softmax(x, -1), "softmax of its logits after the head"),
        (lambda x: torch.sigmoid(x), "sigmoid"),
    ],
)
def test_anything_else_is_an_error(change: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        change(Logits(torch.zeros(1, 2), {"weight": torch.zeros(3, 2)}))
    with pytest.raises(TypeError):
        Logits(torch.zeros(1, 2), {"weight": torch.zeros(3, 2)}) * torch.ones(())
