"""dispatch: what is chosen, overrides, loud refusals."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kernels
from kernels.attention import backends
from kernels.optimizer import muon
from kernels.runtime import dispatch, launch, proof

attention_module = importlib.import_module("kernels.attention.attention")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends to a GPU: `gpu(capability, missing modules)`."""

    def pretend(capability: tuple[int, int] = (9, 0), missing: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(
            backends, "import_problem", lambda name, remedy: remedy if name in missing else None
        )
        monkeypatch.setattr(dispatch, "proof_problem", lambda *_: None)  # test_proof.py
        if "triton" in missing:
            monkeypatch.setattr(launch, "triton", None)

    return pretend


FLASH_4, FLASH_2 = "flash_attn.cute", "flash_attn.flash_attn_interface"
OWN_RULES = ("attention", "fp8_linear")


@pytest.mark.parametrize(
    ("capability", "missing", "facts", "chosen"),
    [
        ((9, 0), (), {}, "flash-attn-4"),
        ((10, 0), (), {"head_dim": 128}, "flash-attn-4"),
        ((9, 0), (), {"head_dim": 72}, "triton"),  # not tested for flash-attn 4
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
    proof._warned.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            attention_module._choose("cuda", torch.float64)
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
        ({"loss": "torch"}, "unknown operation 'loss'; there are adamw, attention, cross_entropy"),
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
    others = [op for op in dispatch.OPERATIONS if op not in OWN_RULES]
    assert {dispatch.choose(op, "cuda", dtype) for op in others} == {chosen}


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


# A backend that was asked for and cannot serve: every operation, backend and public function

CU = torch.tensor([0, 4], dtype=torch.int32)


def hidden(dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(4, 16, dtype=dtype)


def square(dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(16, 16, dtype=dtype)


Call = Callable[[torch.Tensor, torch.Tensor], object]  # x [4, 16], weight [16, 16]
LABELS = torch.zeros(4, dtype=torch.long)
EIGHTS = torch.ones(16, 16, dtype=torch.int8)
CALLS: dict[str, dict[str, Call]] = {
    "attention": {
        "attention": lambda x, _: kernels.attention(*[x.view(4, 1, 16)] * 3, CU),
        "attention, length": lambda x, _: kernels.attention(*[x.view(4, 1, 16)] * 3, CU, length=4),
        "attention, none": lambda x, _: kernels.attention(*[x.view(4, 1, 16)[:0]] * 3, CU * 0),
    },
    "cross_entropy": {"cross_entropy": lambda x, _: kernels.cross_entropy(x, LABELS)},
    "linear_cross_entropy": {
        "linear_cross_entropy": lambda x, w: kernels.linear_cross_entropy(x, w, LABELS),
        "linear_cross_entropy, none": lambda x, w: kernels.linear_cross_entropy(
            x[:0], w, LABELS[:0]
        ),
    },
    "rms_norm": {
        "rms_norm": lambda x, _: kernels.rms_norm(x),
        "rms_norm, none": lambda x, _: kernels.rms_norm(x[:0]),
        "add_rms_norm": lambda x, _: kernels.add_rms_norm(x, x),
        "norm_linears": lambda x, w: kernels.norm_linears(x, w[0], [w]),
        "add_norm_linears": lambda x, w: kernels.add_norm_linears(x, None, w[0], [w]),
        "add_norm_gated_mlp": lambda x, w: kernels.add_norm_gated_mlp(x, None, w[0], w, w, w),
    },
    "layer_norm": {"layer_norm": lambda x, _: kernels.layer_norm(x)},
    "linear": {
        "linear": lambda x, w: kernels.linear(x, w, w[0]),
        "linear, no bias": lambda x, w: kernels.linear(x, w),
        "linear, none": lambda x, w: kernels.linear(x[:0], w),
        "glu_linear": lambda x, w: kernels.glu_linear(x, x, w),
        "norm_linears": lambda x, w: kernels.norm_linears(x, w[0], [w], [w[0]]),
        "add_norm_linears": lambda x, w: kernels.add_norm_linears(x, x, w[0], [w]),
    },
    "swiglu": {
        "swiglu": lambda x, _: kernels.swiglu(x, x),
        "glu_linear": lambda x, w: kernels.glu_linear(x, x, w),
        "add_norm_gated_mlp": lambda x, w: kernels.add_norm_gated_mlp(x, None, w[0], w, w, w),
    },
    "geglu": {
        "geglu": lambda x, _: kernels.geglu(x, x),
        "glu_linear": lambda x, w: kernels.glu_linear(x, x, w, activation="geglu"),
    },
    "relu2": {"relu2": lambda x, _: kernels.relu2(x)},
    "rope": {
        "rope": lambda x, w: kernels.rope(
            x.view(4, 1, 16), x.view(4, 1, 16), w[:, :8], w[:, :8], LABELS
        ),
        "rope, QK-norm": lambda x, w: kernels.rope(
            x.view(4, 1, 16),
            x.view(4, 1, 16),
            w[:, :8],
            w[:, :8],
            LABELS,
            q_weight=w[0],
            k_weight=w[0],
        ),
    },
    "int8_linear": {
        "int8_linear": lambda x, w: kernels.int8_linear(x, EIGHTS, w[0].float()),
        "int8_linear, dynamic": lambda x, w: kernels.int8_linear(
            x, EIGHTS, w[0].float(), activations="dynamic"
        ),
    },
    "adamw": {
        "adamw": lambda x, _: kernels.adamw_([x], [x], [x.clone()], [x.clone()], step=1, lr=0.1),
    },
    "muon": {
        "gather": lambda x, _: muon.gather_momenta([x.float()], [x.float()], momentum=0.9),
        "move": lambda x, _: muon.move_(
            [x.float()], x.bfloat16()[None], keeps=[1.0], lengths=[0.1]
        ),
    },
    "fp8_linear": {"fp8_linear": lambda x, w: kernels.fp8_linear(x, w)},
}


def unserved() -> Iterator[Any]:
    for op, calls in CALLS.items():
        for backend in dispatch.OPERATIONS[op].backends:
            if backend not in ("torch", "plain", "padded"):
                for name, call in calls.items():
                    yield pytest.param(op, backend, call, id=f"{backend}-{name}")


def test_every_operation_is_called() -> None:
    assert set(CALLS) == set(dispatch.OPERATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "backend", "call"), [*unserved()])
def test_what_cannot_serve_raises(
    op: str, backend: str, call: Call, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    call(hidden(dtype), square(dtype))  # it is a call that torch serves
    with (
        kernels.override(**{op: backend}),
        pytest.raises(RuntimeError, match=f"{op} backend {backend} requested .* a CUDA GPU"),
    ):
        call(hidden(dtype), square(dtype))
