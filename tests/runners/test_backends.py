"""The start-up report: which kernels a run will use, and why not others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kernels
from kernels.attention import backends
from kernels.runtime import dispatch, launch
from runners.training.backends import report_backends

FLASH_4, FLASH_2 = "flash_attn.cute", "flash_attn.flash_attn_interface"
TEXT: dict[str, dict[str, Any]] = {"text": {}}
FUSED = ("rms_norm", "layer_norm", "swiglu", "rope")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends to an H200: `gpu(missing modules)`."""

    def pretend(missing: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(
            backends, "import_problem", lambda name, remedy: remedy if name in missing else None
        )
        monkeypatch.setattr(dispatch, "proof_problem", pytest.fail)  # a report tries nothing
        if "triton" in missing:
            monkeypatch.setattr(launch, "triton", None)

    return pretend


def on_gpu(attentions: dict[str, dict[str, Any]] = TEXT) -> list[str]:
    return report_backends("cuda", torch.bfloat16, attentions, FUSED)


def test_report_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    why = "needs a CUDA GPU (or TRITON_INTERPRET=1, which is for tests)"
    assert report_backends("cpu", torch.float32, TEXT, ("rms_norm", "rope")) == [
        "Using fused cross-entropy (torch, in chunks)",
        "Flash attention off: needs a CUDA GPU; using padded attention (torch)",
        f"No fused kernels: {why}; using torch, with backwards that recompute: rms_norm, rope",
    ]


def test_report_says_what_is_off() -> None:
    lines = report_backends(
        "cpu", torch.float32, TEXT, (), fused_loss=False, flash_attention=False, fused_kernels=False
    )
    assert lines == [
        "Fused loss off",
        "Flash attention off; using padded attention (torch)",
        "Fused kernels off",
    ]


def test_report_on_a_gpu(gpu: Any) -> None:
    gpu((FLASH_4, FLASH_2))
    lines = on_gpu()
    assert lines == [
        "Using fused cross-entropy (triton)",
        "Using flash attention (triton)",
        "Using fused kernels (triton): rms_norm, layer_norm, swiglu, rope",
    ]
    with kernels.override(rope="torch"):
        assert on_gpu()[2:] == [
            "Using fused kernels (triton): rms_norm, layer_norm, swiglu",
            "Fused kernels off, torch was asked for: rope",
        ]
    gpu((FLASH_2, "triton"))
    attentions = {"text": {"head_dim": 64}, "vision": {"head_dim": 72}, "other": {"head_dim": 128}}
    lines = on_gpu(attentions)
    assert lines[1:3] == [
        "Using flash attention (flash-attn 4) for text, other",
        "Using flash attention (torch varlen) for vision",
    ]
    assert lines[3].startswith("No fused kernels: install triton; using torch")
    with kernels.override(attention="plain"):
        assert on_gpu()[1] == (
            "Flash attention off: plain was asked for; using plain attention (torch)"
        )
