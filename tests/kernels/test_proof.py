"""Backends from outside are tried before they are chosen: what fails is passed over, aloud."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels.attention import attention_flash, backends
from kernels.attention.backends import AttentionCall
from kernels.runtime import dispatch, proof

attention = importlib.import_module("kernels.attention.attention")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_found", {})
    monkeypatch.setattr(proof, "_warned", set())


def problem(case: Callable[[], None], key: str = "key") -> str | None:
    return proof.proof_problem(("torch", "no-such-library"), case, key, "cpu")


def fails(error: BaseException) -> Callable[[], None]:
    def case() -> None:
        raise error

    return case


def test_a_case_runs_once() -> None:
    runs: list[int] = []
    assert problem(lambda: runs.append(1)) is None
    assert problem(lambda: runs.append(2)) is None
    assert problem(lambda: runs.append(3), "another") is None
    assert runs == [1, 3]


@pytest.mark.parametrize(
    "error", [TypeError("epilogue fn\ndepends"), OSError("no"), SystemExit(1), AssertionError()]
)
def test_what_raises_is_passed_over_aloud(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        said = problem(fails(error))
        assert problem(lambda: None) == said  # not tried again
    assert said is not None
    assert said.startswith(f"failed its proof: {type(error).__name__}: ")
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith(f"torch {torch.__version__} with no-such-library of unknown version is")
    assert said in line
    assert "\n" not in line


def test_no_memory_says_nothing_of_a_library() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        problem(fails(torch.OutOfMemoryError("full")))
    assert problem(lambda: None) is None


def test_what_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "PATIENCE", 0.01)
    end = proof.threading.Event()
    assert "TimeoutError" in str(problem(lambda: end.wait(5) and None))
    end.set()


def test_a_library_s_warnings_are_no_failure() -> None:
    assert problem(lambda: warnings.warn("old", DeprecationWarning, stacklevel=1)) is None


@pytest.mark.parametrize(
    ("got", "said"),
    [
        ([1.0, 2.0], None),
        ([1.0, 2.1], "off by 0.1"),
        ([1.0, float("nan")], "off by nan"),
        ([1.0], r"is \[1\] instead of \[2\]"),
    ],
)
def test_numbers_are_compared(got: list[float], said: str | None) -> None:
    wrong = contextlib.nullcontext() if said is None else pytest.raises(ArithmeticError, match=said)
    with wrong:
        proof.check_close("x", torch.tensor(got), torch.tensor([1.0, 2.0]), 1e-3)


# Where a caller may stand when something is chosen for the first time


def real_arithmetic() -> None:
    """Fails where it is recorded, faked, batched or cast."""
    x = torch.full((2, 2), 3.0, requires_grad=True)
    y = x @ x
    assert y.dtype == torch.float32
    assert y.tolist() == [[18.0, 18.0], [18.0, 18.0]]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[12.0, 12.0], [12.0, 12.0]]


def choosing(x: Tensor) -> Tensor:
    assert problem(real_arithmetic) is None
    return x.sin()


@dispatch.dynamo.constant_result
def told() -> str:
    return problem(real_arithmetic) or "right"


def compiled() -> None:
    def f(x: Tensor) -> Tensor:
        return x.sin() if told() == "right" else x

    assert torch.equal(torch.compile(f, backend="eager", fullgraph=True)(ONE), ONE.sin())


ONE = torch.ones(3)


def inside(context: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        with context():
            choosing(torch.ones(3))

    return run


PLACES: dict[str, Callable[[], object]] = {
    "vmap": lambda: torch.func.vmap(choosing)(ONE),
    "grad": lambda: torch.func.vmap(torch.func.grad(choosing))(ONE),
    "no_grad": inside(torch.no_grad),
    "inference": inside(torch.inference_mode),
    "autocast": inside(lambda: torch.autocast("cpu", BF16)),
    "fake": inside(FakeTensorMode),
    "meta": inside(lambda: torch.device("meta")),
    "compile": compiled,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_case_is_tried_for_itself(place: str) -> None:
    PLACES[place]()
    assert proof._found == {"key": None}


def test_nothing_is_tried_while_a_graph_is_recorded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2):
        said = proof.proof_problem(("torch",), fails(AssertionError()), "key", "cuda")
        assert said == "cannot be proved while a CUDA graph is recorded; call it once before"
    assert len(caplog.records) == 1
    assert problem(lambda: None) is None  # later it is tried


# Attention


def plain(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, how: Any) -> tuple[Tensor, Tensor]:
    dense = cu is None
    xs = [x.flatten(0, 1) if dense else x for x in (q, k, v)]
    out = attention.attention_reference(
        xs[0].double(),
        xs[1].double(),
        xs[2].double(),
        cu,
        causal=how.causal,
        window=how.window,
        scale=how.scale,
        length=how.max_seqlen if dense else None,
    ).to(q.dtype)
    return out.view(q.shape), torch.zeros(())


def plain_backward(grad: Tensor, saved: attention_flash.Saved, how: Any) -> tuple[Tensor, ...]:
    q, k, v, _, _, cu = saved
    xs = [x.double().requires_grad_() for x in (q, k, v)]
    y = plain(xs[0], xs[1], xs[2], cu, how)[0]
    return tuple(g.to(q.dtype) for g in torch.autograd.grad(y, xs, grad.double()))


def spoilt(index: int, spoil: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """A library one of whose results (out, dq, dk, dv) is not right."""

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        out, lse = plain(*args)
        return (spoil(out) if index == 0 else out), lse

    def backward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(
            spoil(g) if i == index else g for i, g in enumerate(plain_backward(*args), start=1)
        )

    return forward, backward


KINDS: dict[str, dict[str, Any]] = {
    "packed": {},
    "packed, not causal, a window": {"causal": False, "window": 20, "group": 6},
    "short": {"max_seqlen": 100, "many": True},
    "equal": {"length": 256, "causal": False},
    "equal and short": {"length": 16, "group": 3, "window": 5, "dtype": torch.float16},
}


def prove(kind: str) -> str | None:
    facts = AttentionCall(**{"device": "cpu", "dtype": BF16, "head_dim": 32, **KINDS[kind]})
    return problem(lambda: backends.prove_attention("cudnn", facts), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_attention_is_proved(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_flash._LIBRARIES, "cudnn", (plain, plain_backward))
    assert prove(kind) is None


@pytest.mark.parametrize("kind", [{"max_seqlen": 1}, {"length": 1}])
def test_gradients_that_are_0_are_right_to_fp32(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document of one token: q's gradient is a difference of two equal sums of Dh products."""

    def backward(*args: Any) -> tuple[Tensor, ...]:
        q, k = args[1][:2]
        dq, dk, dv = plain_backward(*args)
        slip = torch.finfo(torch.float32).eps * q.shape[-1] ** 0.5
        return dq + (slip * k).to(dq).repeat_interleave(q.shape[-2] // k.shape[-2], -2), dk, dv

    monkeypatch.setitem(attention_flash._LIBRARIES, "cudnn", (plain, backward))
    monkeypatch.setitem(KINDS, "one", kind)
    assert prove("one") is None
    monkeypatch.setitem(attention_flash._LIBRARIES, "cudnn", spoilt(1, lambda x: x + 1e-3))
    proof._found.clear()
    assert "gradient of q" in str(prove("one"))


def one_row_off(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 7, :, :] *= 1.5
    return x


@pytest.mark.parametrize("kind", ["packed", "equal"])
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize(
    "spoil", [one_row_off, lambda x: x * 1.02, torch.zeros_like, lambda x: x / 0]
)
def test_a_wrong_attention_is_not(
    kind: str,
    index: int,
    spoil: Callable[[Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(attention_flash._LIBRARIES, "cudnn", spoilt(index, spoil))
    said = prove(kind)
    assert said is not None
    assert ("its output" if index == 0 else f"its gradient of {'qkv'[index - 1]}") in said


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Pretends to an H200 with every library; what is proved there is noted, and right unless
    `broken` is set."""
    tried: dict[str, list[Any]] = {"broken": []}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(backends, "import_problem", lambda module, remedy: None)
    monkeypatch.setattr(dispatch.launch, "triton", object())
    monkeypatch.setattr(proof, "_run", lambda case, device: proved(case))

    def proved(case: Callable[[], None]) -> BaseException | None:
        try:
            case()
        except BaseException as error:
            return error
        return None

    def trying(backend: str) -> Callable[[AttentionCall], None]:
        def case(facts: AttentionCall) -> None:
            tried.setdefault(backend, []).append(facts)
            if backend in tried["broken"]:
                raise TypeError("epilogue fn depends on <ContextVar>")

        return case

    table = dispatch.OPERATIONS["attention"].backends
    for name, backend in table.items():
        if backend.proof is not None:
            trial = backend._replace(proof=backend.proof._replace(case=trying(name)))
            monkeypatch.setitem(table, name, trial)
    return tried


def test_a_library_that_fails_gives_way_to_the_next(
    hopper: Any, caplog: pytest.LogCaptureFixture
) -> None:
    hopper["broken"] += ["flash-attn-4", "cudnn"]
    for _ in range(2):
        assert dispatch.choose("attention", "cuda", BF16) == "triton"
        assert dispatch.choose("attention", "cuda", BF16, length=256) == "triton"
    assert len(hopper["flash-attn-4"]) == 2  # packed and dense
    assert len(hopper["cudnn"]) == 1
    assert "flash-attn-4 " in caplog.text
    assert "nvidia-cutlass-dsl" in caplog.text
    assert "TypeError: epilogue fn depends on <ContextVar>" in caplog.text
    with (
        kernels.override(attention="flash-attn-4"),
        pytest.raises(RuntimeError, match=r"flash-attn-4 requested .* failed its proof: TypeErr"),
    ):
        dispatch.choose("attention", "cuda", BF16)


def test_each_kind_of_call_is_proved(hopper: Any) -> None:
    def kinds(**facts: Any) -> int:
        assert dispatch.choose("attention", "cuda:0", BF16, **facts) == "flash-attn-4"
        return len(hopper["flash-attn-4"])

    assert kinds() == 1
    assert kinds(max_seqlen=4096) == kinds(max_seqlen=2048) == 1
    assert kinds(head_dim=128) == 2
    assert kinds(causal=False) == 3
    assert kinds(window=4096) == kinds(window=2048) == 4
    assert kinds(group=4) == 5
    assert kinds(length=1024) == 6
    assert kinds(many=True) == 7
    torch.use_deterministic_algorithms(True)
    try:
        assert kinds() == 8
    finally:
        torch.use_deterministic_algorithms(False)


def test_why_not_tries_nothing(hopper: Any) -> None:
    assert dispatch.why_not("attention", "flash-attn-4", "cuda", BF16) is None
    assert set(hopper) == {"broken"}


def test_exactly_the_backends_from_outside_have_a_proof() -> None:
    ours = {"triton", "torch", "plain", "padded"}
    for operation in dispatch.OPERATIONS.values():
        for name, backend in operation.backends.items():
            assert (backend.proof is None) == (name in ours)


def test_broken_imports_say_so(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, text in {
        "broken_symbol": "raise ImportError('no such symbol')",
        "broken_part": "import no_such_part",
        "broken_otherwise": "raise TypeError('versions')",
        "only_warns": "import warnings; warnings.warn('old', DeprecationWarning)",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert proof.import_problem("only_warns", "install it") is None
    assert proof.import_problem("not_a_module.at_all", "install it") == "install it"
    assert not caplog.records
    for name, said in {
        "broken_symbol": "ImportError: no such symbol",
        "broken_part": "ModuleNotFoundError: No module named 'no_such_part'",
        "broken_otherwise": "TypeError: versions",
    }.items():
        problem = f"install it ({name} does not import: {said})"
        assert proof.import_problem(name, "install it") == problem
        assert problem in caplog.text
