"""Inductor calls our operators as declared ones, and does not find them out one by one."""

from __future__ import annotations

import logging

import pytest
import torch

from kernels import linear_cross_entropy
from kernels.runtime.operators import NAMES


def test_every_operator_has_a_fake() -> None:
    ops = {
        schema.name.removeprefix("nanovision::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("nanovision::")
    }
    assert ops == {*NAMES, "padded_attention"}  # which reads its boundaries: never compiled
    assert len(set(NAMES)) == len(NAMES) > 15


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
