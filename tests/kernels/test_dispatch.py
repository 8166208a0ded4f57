"""dispatch: what is chosen, overrides, loud refusals, the report."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest
import torch

import kernels
from kernels import cublas_lt, dispatch, launch

attention_module = importlib.import_module("kernels.attention")


def no_library() -> None:
    raise OSError("none here")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends to a GPU: `gpu(capability, missing modules)`."""

    def pretend(capability: tuple[int, int] = (9, 0), missing: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(cublas_lt, "library", no_library)  # tests are alike with any torch
        monkeypatch.setattr(
            dispatch, "import_problem", lambda name, remedy: remedy if name in missing else None
        )
        if "triton" in missing:
            monkeypatch.setattr(launch, "triton", None)

    return pretend


FLASH_4, FLASH_2 = "flash_attn.cute", "flash_attn.flash_attn_interface"
OWN_RULES = ("attention", "fp8_linear", "gelu_mlp", "product")
QUACK = "quack.epilogue"


@pytest.mark.parametrize(
    ("capability", "missing", "facts", "chosen"),
    [
        ((9, 0), (), {}, "flash-attn-4"),
        ((10, 0), (), {"head_dim": 128}, "flash-attn-4"),
        ((9, 0), (), {"head_dim": 72}, "triton"),  # unproved for flash-attn 4
        ((9, 0), (FLASH_4,), {}, "triton"),
        ((9, 0), (FLASH_4, "triton"), {}, "flash-attn"),
        ((9, 0), (FLASH_4, FLASH_2, "triton"), {}, "torch-varlen"),
        ((9, 0), (), {"max_seqlen": 512}, "triton"),
        ((9, 0), (), {"max_seqlen": 1024}, "flash-attn-4"),
        ((9, 0), (), {"max_seqlen": 1024, "group": 6}, "triton"),
        ((9, 0), (), {"length": 64, "max_seqlen": 64}, "triton"),
        ((9, 0), (), {"length": 256, "max_seqlen": 256}, "cudnn"),
        ((9, 0), (), {"length": 512, "max_seqlen": 512}, "flash-attn-4"),
        ((9, 0), (), {"window": 256}, "triton"),
        ((9, 0), (), {"window": 512}, "flash-attn-4"),
        ((9, 0), (), {"window": 512, "group": 6}, "triton"),
        ((8, 0), (FLASH_2,), {}, "torch-varlen"),
        ((8, 0), (FLASH_2,), {"large": True}, "triton"),
        ((8, 0), (), {}, "flash-attn"),
        ((9, 0), (), {"compiling": True}, "flash-attn-4"),
        ((9, 0), (FLASH_4,), {"length": 256}, "cudnn"),
        ((9, 0), (FLASH_4,), {"length": 256, "window": 9}, "triton"),
        ((8, 0), (), {"max_seqlen": 64}, "flash-attn"),
        ((9, 0), (), {"dtype": torch.float32}, "triton"),
        ((9, 0), (), {"dtype": torch.float64}, "plain"),
        ((9, 0), (), {"head_dim": 320}, "plain"),
        ((9, 0), (), {"head_dim": 20}, "plain"),
        ((7, 5), (), {}, "plain"),
    ],
)
def test_attention_on_a_gpu(
    capability: tuple[int, int],
    missing: tuple[str, ...],
    facts: dict[str, Any],
    chosen: str,
    gpu: Any,
) -> None:
    gpu(capability, missing)
    facts = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64, **facts}
    assert dispatch.choose("attention", **facts) == chosen


def test_attention_on_a_cpu() -> None:
    assert dispatch.choose("attention") == "padded"
    assert dispatch.choose("attention", readable=False) == "plain"
    assert dispatch.choose("attention", compiling=True) == "plain"
    assert dispatch.choose("attention", "meta") == "plain"


def test_a_slow_choice_on_a_gpu_is_said_once(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    gpu()
    dispatch._warned.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            dispatch.choose("attention", "cuda", torch.float64)
    assert len(caplog.records) == 1
    assert "O(N^2) in memory" in caplog.text
    assert "takes bfloat16 or float16, not torch.float64" in caplog.text


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    for name in ("padded_attention", "attention_reference"):
        right = getattr(attention_module, name)

        def spy(*args: Any, _name: str = name, _right: Any = right, **static: Any) -> Any:
            seen.append(_name)
            return _right(*args, **static)

        monkeypatch.setattr(attention_module, name, spy)
    return seen


def run_attention() -> torch.Tensor:
    x = torch.ones(4, 1, 8)
    return kernels.attention(x, x, x, torch.tensor([0, 4], dtype=torch.int32))


def test_overrides_decide_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    run_attention()
    with kernels.override(attention="plain"):
        run_attention()
        with kernels.override(attention="padded"):
            run_attention()
        run_attention()
    run_attention()
    names = [{"padded_attention": "padded"}.get(name, "plain") for name in seen]
    assert names == ["padded", "plain", "padded", "plain", "padded"]


def test_an_override_ends_with_an_error() -> None:
    with pytest.raises(KeyError), kernels.override(attention="plain"):
        raise KeyError
    assert dispatch.requested("attention") is None


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    monkeypatch.setenv(dispatch.ENV, "rms_norm=torch, attention=plain")
    run_attention()
    assert seen == ["attention_reference"]
    with kernels.override(attention="padded"):  # closer to the code than the environment
        run_attention()
    assert seen[1] == "padded_attention"


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("flash-attn-4", "needs a CUDA GPU"),
        ("flash-attn", "needs a CUDA GPU"),
        ("torch-varlen", "needs a CUDA GPU"),
    ],
)
def test_asking_for_what_is_not_there_raises(backend: str, reason: str) -> None:
    with (
        kernels.override(attention=backend),
        pytest.raises(RuntimeError, match=f"{backend} requested but not available: {reason}"),
    ):
        run_attention()


def test_refusals_name_the_remedy(gpu: Any) -> None:
    gpu(missing=(FLASH_4,))
    with kernels.override(attention="flash-attn-4"), pytest.raises(RuntimeError) as error:
        dispatch.choose("attention", "cuda", torch.bfloat16)
    assert str(error.value) == (
        "attention backend flash-attn-4 requested but not available: install flash-attn-4"
    )


def test_padded_asked_for_where_boundaries_cannot_be_read() -> None:
    x = torch.ones(2, 4, 1, 8)
    cu = torch.tensor([[0, 4], [0, 4]], dtype=torch.int32)
    with kernels.override(attention="padded"), pytest.raises(RuntimeError, match="cannot be read"):
        torch.func.vmap(kernels.attention)(x, x, x, cu)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"attention": "fast"}, "unknown backend 'fast' for attention; there are flash-attn-4"),
        ({"loss": "torch"}, "unknown operation 'loss'; there are attention, cross_entropy"),
    ],
)
def test_unknown_names_are_refused(
    names: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=message), kernels.override(**names):
        pass
    monkeypatch.setenv(dispatch.ENV, ",".join(f"{op}={backend}" for op, backend in names.items()))
    with pytest.raises(ValueError, match=f"{dispatch.ENV}: {message}"):
        run_attention()


def test_unknown_operation() -> None:
    with pytest.raises(ValueError, match="unknown operation 'attn'"):
        dispatch.choose("attn")


def test_broken_imports_say_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_library.py").write_text("raise ImportError('no such symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    assert dispatch.import_problem("json", "install json") is None
    assert dispatch.import_problem("not_a_module_at_all", "install it") == "install it"
    assert dispatch.import_problem("broken_library", "install it") == (
        "install it (broken_library does not import: no such symbol)"
    )


@pytest.mark.parametrize(
    ("capability", "dtype", "chosen"),
    [
        ((9, 0), torch.bfloat16, "triton"),
        ((8, 0), torch.float32, "triton"),
        ((9, 0), torch.float64, "torch"),
        ((7, 5), torch.float16, "torch"),
    ],
)
def test_fused_kernels_on_a_gpu(
    capability: tuple[int, int], dtype: torch.dtype, chosen: str, gpu: Any
) -> None:
    gpu(capability)
    # float8 has no torch to fall back to: test_fp8_linear.py
    others = [op for op in dispatch.BACKENDS if op not in OWN_RULES]
    assert {dispatch.choose(op, "cuda", dtype) for op in others} == {chosen}


@pytest.mark.parametrize(
    ("capability", "dtype", "missing", "problem"),
    [
        ((9, 0), torch.bfloat16, (), None),
        ((9, 0), torch.float32, (), "takes bfloat16, not torch.float32"),
        ((10, 0), torch.bfloat16, (), "is proved for compute capability 9.0, this GPU has 10.0"),
        ((9, 0), torch.bfloat16, (QUACK,), "install quack-kernels 0.6.5 or newer"),
    ],
)
def test_gelus_inside_products(
    capability: tuple[int, int],
    dtype: torch.dtype,
    missing: tuple[str, ...],
    problem: str | None,
    gpu: Any,
) -> None:
    gpu(capability, missing)
    assert dispatch.why_not("gelu_mlp", "quack", "cuda", dtype) == problem
    chosen = dispatch.choose("gelu_mlp", "cuda", dtype)
    assert chosen == ("torch" if problem else "quack")
    line = dispatch.report(device="cuda", dtype=dtype, gelus=True)[2]
    if problem:
        assert line == f"GELUs are passes of their own: {problem}"
    else:
        assert line == "Using matrix products that compute GELUs (quack)"
        with kernels.override(gelu_mlp="torch"):
            line = dispatch.report(device="cuda", dtype=dtype, gelus=True)[2]
        assert line == "GELUs are passes of their own: torch was asked for"


def test_triton_on_a_cpu_is_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert dispatch.choose("rms_norm") == "torch"
    with (
        kernels.override(rms_norm="triton"),
        pytest.raises(RuntimeError, match=r"needs a CUDA GPU \(or TRITON_INTERPRET=1"),
    ):
        kernels.rms_norm(torch.ones(2, 4))
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert dispatch.choose("rms_norm") == "triton"
    assert dispatch.choose("rms_norm", "meta") == "torch"


def test_report_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    loss, attention, fused = dispatch.report()
    assert loss == "Using fused cross-entropy (torch, in chunks)"
    assert attention == (
        "Flash attention requested but not available: needs a CUDA GPU; "
        "using padded attention (torch)"
    )
    assert fused.startswith("Fused kernels requested but not available: needs a CUDA GPU")


def test_report_says_what_is_off() -> None:
    lines = dispatch.report(fused_loss=False, flash_attention=False, fused_kernels=False)
    assert lines == [
        "Fused loss off",
        "Flash attention off; using padded attention (torch)",
        "Fused kernels off",
    ]


def test_report_on_a_gpu(gpu: Any) -> None:
    gpu(missing=(FLASH_4, FLASH_2))
    lines = dispatch.report(device="cuda", dtype=torch.bfloat16)
    assert lines == [
        "Using fused cross-entropy (triton)",
        "Using flash attention (triton)",
        "Using fused kernels (triton): rms_norm, layer_norm, swiglu, rope",
    ]
    with kernels.override(rope="torch"):
        assert dispatch.report(device="cuda", dtype=torch.bfloat16)[2:] == [
            "Using fused kernels (triton): rms_norm, layer_norm, swiglu",
            "Fused kernels requested but not available: torch was asked for (rope); using torch, "
            "with backwards that recompute: rope",
        ]
    gpu(missing=(FLASH_2, "triton"))
    attentions = {"text": {"head_dim": 64}, "vision": {"head_dim": 72}, "other": {"head_dim": 128}}
    lines = dispatch.report(device="cuda", dtype=torch.bfloat16, attentions=attentions)
    assert lines[1:3] == [
        "Using flash attention (flash-attn 4) for text, other",
        "Using flash attention (torch varlen) for vision",
    ]
    assert lines[3].startswith("Fused kernels requested but not available: install triton")
    with kernels.override(attention="plain"):
        assert dispatch.report(device="cuda", dtype=torch.bfloat16)[1] == (
            "Flash attention requested but not available: plain was asked for; "
            "using plain attention (torch)"
        )
