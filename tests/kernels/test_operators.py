"""How operators are declared, and what Inductor is told of them."""

from __future__ import annotations

import logging

import pytest
import torch

from kernels import linear_cross_entropy
from kernels.runtime.operators import NAMES, kind_of


def test_every_operator_has_a_fake() -> None:
    ops = {
        schema.name.removeprefix("nanovision::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("nanovision::")
    }
    assert ops == {*NAMES, "padded_attention"}  # which reads its boundaries: never compiled
    assert len(set(NAMES)) == len(NAMES) > 15


def test_an_operator_that_may_overwrite_is_two() -> None:
    """Alike but for what they mutate: autograd's version counters and compilers rely on that."""
    ops = torch.ops.nanovision
    kept, reused = ops.gated_mlp_backward.default, ops.gated_mlp_backward_.default
    written = [a.name for a in reused._schema.arguments if a.alias_info is not None]
    assert written == ["a", "b"]
    assert not kept._schema.is_mutable
    assert [a.name for a in kept._schema.arguments] == [a.name for a in reused._schema.arguments]
    assert "overwrite" not in str(kept._schema)


def test_kinds_of_operators() -> None:
    assert kind_of("nanovision.int8_linear_forward") == "matmul"
    for name in ("flash_attention", "padded_attention"):
        assert kind_of(f"nanovision.{name}") == "attention"
    assert kind_of("nanovision.flash_attention_backward") is None


def test_inductor_is_told_before_it_asks(caplog: pytest.LogCaptureFixture) -> None:
    """It writes a line for each operator that it does not know, and in that line, up to torch 2.12,
    everything that its arguments were computed from: minutes for a deep model."""
    torch._dynamo.reset()
    hidden, unembed = torch.randn(6, 8, requires_grad=True), torch.randn(10, 8)
    labels = torch.arange(6)
    log = logging.getLogger("torch._inductor.graph")
    with caplog.at_level(logging.INFO, logger=log.name):
        log.addHandler(caplog.handler)
        try:
            torch.compile(lambda h: linear_cross_entropy(h, unembed, labels))(hidden).backward()
        finally:
            log.removeHandler(caplog.handler)
    assert hidden.grad is not None
    assert "implicit fallback" not in caplog.text
    from torch._inductor.lowering import lowerings

    assert all(getattr(torch.ops.nanovision, name).default in lowerings for name in NAMES)
