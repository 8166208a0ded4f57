"""What modules do to logits after their head, done to logits that do not exist yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from core.model.layers import Logits
from tests.rounding import FP32, FP64

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
    torch.testing.assert_close(lazy.dense(), dense.double(), rtol=FP32, atol=FP32)
    if name != "as floats":
        torch.testing.assert_close(lazy.dense(), dense, rtol=FP64, atol=FP64)
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


SHAPES: dict[str, Callable[[Any], Any]] = {
    "Whisper": lambda x: x[:, -2:, :],
    "kept by tensor": lambda x: x[:, torch.tensor([0, 2]), :],
    "the last": lambda x: x[:, -1],
    "with dots": lambda x: x[..., :2, :],
    "dots last": lambda x: x[1, ...],
    "by a mask": lambda x: x[torch.tensor([[True, False, True], [False, True, True]])],
    "a slice of all": lambda x: x[:, :, 0:7],
    "a new dim": lambda x: x[None, :, 1:],
    "OPT": lambda x: x.contiguous().view(-1, x.size(-1)),
    "BART": lambda x: x + torch.arange(7.0).double().reshape(1, 7).to(x.device),
    "on the left": lambda x: torch.arange(7.0).double() + 2 * x - torch.ones(1, 7).double(),
    "scaled, then shifted": lambda x: torch.tanh((x / 4 + torch.arange(7.0).double()) / 3) * 3,
    "reshaped": lambda x: torch.reshape(x, (3, 2, -1)).transpose(0, 1).float().double(),
    "flat": lambda x: x.flatten(0, 1).clone().unsqueeze(0).squeeze(0),
    "permuted": lambda x: x.permute(1, 0, 2).to(torch.float64).type_as(x),
    "negated": lambda x: -x,
    "counted": lambda x: x[: len(x)],
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_positions_shapes_and_biases(name: str, biased: bool) -> None:
    """The lazy logits become what the dense ones become, the loss's bias included."""
    hidden, weight = torch.randn(2, 3, 4).double(), torch.randn(7, 4).double()
    p = {"weight": weight} | ({"bias": torch.randn(7).double()} if biased else {})
    lazy = SHAPES[name](Logits(hidden, p))
    dense = SHAPES[name](hidden @ weight.T + p.get("bias", 0))
    assert isinstance(lazy, Logits)
    assert (lazy.shape, lazy.ndim) == (dense.shape, dense.ndim)
    torch.testing.assert_close(lazy.dense(), dense, rtol=FP32, atol=FP32)  # float() rounds
    bias = lazy.bias()
    raw = lazy.hidden @ weight.T + (0 if bias is None else bias)
    raw = raw * (1.0 if lazy.scale is None else lazy.scale)
    raw = raw if lazy.softcap is None else lazy.softcap * (raw / lazy.softcap).tanh()
    torch.testing.assert_close(raw, dense, rtol=FP32, atol=FP32)


UNSERVED: dict[str, Callable[[Any], Any]] = {
    "masked_fill": lambda x: x.masked_fill(torch.ones(7, dtype=torch.bool), -1e9),
    "a choice from the vocabulary": lambda x: x[:, :, :5],
    "a choice from the vocabulary ": lambda x: x[..., 3],
    "a change in place": lambda x: x.__setitem__((slice(None), 0), 0.0),
    "log_softmax": lambda x: x.log_softmax(-1),
    "a view that splits the vocabulary": lambda x: x.view(-1),
    "a sum with": lambda x: x + torch.ones(2, 3, 7),
    "a product with": lambda x: x * torch.ones(7),
    "a quotient with": lambda x: x / torch.ones(()),
    "a cast to": lambda x: x.to(torch.bfloat16),
    "a transposition of the vocabulary": lambda x: x.transpose(1, 2),
    "pow": lambda x: x**2,
    "a comparison": lambda x: x > 0,
    "a sum with ": lambda x: 1 - x,
    "matmul": lambda x: x @ torch.ones(7, 2),
    "topk": lambda x: torch.topk(x, 2),
    "cat": lambda x: torch.cat([x, x]),
}


@pytest.mark.parametrize("what", UNSERVED)
def test_what_no_fused_loss_can_follow_is_named(what: str) -> None:
    with pytest.raises(TypeError, match=f"computes {what.strip()}.*: use unfused_loss"):
        UNSERVED[what](Logits(torch.zeros(2, 3, 2), {"weight": torch.zeros(7, 2)}))
