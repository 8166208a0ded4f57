"""The benchmark's harness on a CPU, with providers that work, are missing, raise, or lie."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from runners import bench as command_line
from runners.benchmarks import (
    attention,
    elementwise,
    harness,
    int8,
    layers,
    losses,
    optimizers,
    providers,
    trace,
)
from runners.benchmarks.clock import (
    Ceiling,
    CpuClock,
    CudaClock,
    DeviceLostError,
    NotCapturableError,
    Run,
    measure_ceilings,
)
from runners.benchmarks.harness import Case, Row, Settings, difference, measure
from runners.benchmarks.kernels import (
    Cases,
    KernelsConfig,
    all_cases,
    bench,
    best,
    choose_cases,
    missing,
    page_of,
)
from runners.benchmarks.providers import Inputs, MissingError, Provider, simple, timed
from runners.benchmarks.report import Bar, Panel, draw
from runners.shell.cli import UsageError
from runners.shell.errors import UserError
from runners.training.config import TrainConfig

LIMITS: dict[Ceiling, float] = {"copy": 4e12, "bf16": 700e12, "int8": 900e12}
QUICK = Settings(rounds=2, seconds=1e-4, backend="eager")


def square(i: Inputs) -> Tensor:
    return i["x"].square()


def two(device: torch.device, generator: torch.Generator) -> Inputs:
    x = torch.randn(8, 4, generator=generator, device=device)
    return {"x": x.requires_grad_(), "dy": torch.ones(8, 4, device=device)}


def case_of(*some: Provider, **changes: Any) -> Case:
    plain = Case(
        "square",
        "8 x 4",
        1e9,
        "copy",
        two,
        (simple("torch eager", square), *some),
        wrt=("x",),
        seeds=("dy",),
    )
    return replace(plain, **changes)


def raising(sets: Sequence[Inputs]) -> Any:
    raise ZeroDivisionError("first line\nsecond line")


def absent(sets: Sequence[Inputs]) -> Any:
    raise MissingError("not today")


class SetClock(CpuClock):
    """Every provider takes the time that it is told here, in ms a pass; runs are written down."""

    def __init__(self, ms: dict[str, Sequence[float]], graphs: bool = True) -> None:
        super().__init__()
        self.ms, self.graphs = {name: iter(times) for name, times in ms.items()}, graphs
        self.current, self.order = "", []  # type: tuple[str, list[str]]

    def capture(self, run: Run) -> Run:
        if not self.graphs:
            raise NotCapturableError("it waits")
        return run

    def sample(self, run: Run, before: Run | None, count: int) -> list[float]:
        run()
        self.order.append(self.current)
        return [next(self.ms[self.current]) for _ in range(count)]


def named(clock: SetClock, name: str) -> Provider:
    def forward(i: Inputs) -> Tensor:
        clock.current = name
        return square(i)

    return simple(name, forward)


def rows_of(case: Case, clock: Any = None, settings: Settings = QUICK) -> dict[str, Row]:
    return {row.provider: row for row in measure(case, clock or CpuClock(), LIMITS, settings)}


def test_who_is_missing_or_raises_is_listed_and_the_others_go_on() -> None:
    def late(i: Inputs) -> Tensor:
        raise RuntimeError("in the call")

    rows = rows_of(
        case_of(
            Provider("absent", absent),
            Provider("raising", raising),
            simple("late", late),
            simple("last", square),
        )
    )
    assert (rows["absent"].status, rows["absent"].reason) == ("missing", "not today")
    assert rows["raising"].status == "error"
    assert rows["raising"].reason == "ZeroDivisionError: first line"
    assert rows["late"].reason == "RuntimeError: in the call"
    for name in ("torch eager", "last"):
        assert rows[name].status == "ok"
        assert rows[name].timing == "eager"
        assert min(rows[name].samples) > 0
        assert rows[name].speedup


def test_a_peer_that_is_not_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = {
        "here": ("json", "json"),
        "gone": ("no_such_module", "no-such-package"),
        "part": ("json.no_such_part", "no-such-part"),
    }
    monkeypatch.setattr(providers, "PEERS", peers)
    rows = rows_of(case_of(*(simple(name, square, peer=name) for name in peers)))
    assert rows["here"].status == "ok"
    assert rows["gone"].reason == "not installed (pip install no-such-package)"
    assert rows["part"].reason == "not installed (pip install no-such-part)"


def test_a_function_of_ours_that_does_not_exist_is_missing() -> None:
    with pytest.raises(MissingError, match="no_such does not exist"):
        providers.ours("no_such")
    with pytest.raises(MissingError, match="takes no nonsense="):
        providers.ours("swiglu", "nonsense")


def test_providers_take_turns() -> None:
    clock = SetClock({name: iter([2.0] * 99) for name in ("torch eager", "b", "c")})  # type: ignore[misc]
    case = case_of()
    trio = tuple(named(clock, name) for name in ("torch eager", "b", "c"))
    rows_of(replace(case, providers=trio), clock, Settings(3, 1e-9))
    assert clock.order[-9:] == ["torch eager", "b", "c"] * 3


def test_statistics_follow_from_the_samples() -> None:
    slow, fast = [8.0] * 5, [4.0] * 5  # of getting ready
    clock = SetClock({"torch eager": slow + [8.0] * 5, "ours": [*fast, 2.0, 3.0, 4.0, 5.0, 600.0]})
    case = case_of(sets=2)
    pair = (named(clock, "torch eager"), named(clock, "ours"))
    rows = rows_of(replace(case, providers=pair), clock, Settings(5, 1e-9))
    ours = rows["ours"]
    assert ours.samples == [1.0, 1.5, 2.0, 2.5, 300.0]  # a run goes through two sets
    assert ours.ms == 2.0
    assert ours.quantile(0.2) == pytest.approx(1.4)
    assert ours.quantile(0.8) == pytest.approx(62.0)
    assert ours.rate == pytest.approx(500.0)  # 1e9 bytes in 2 ms: 500 GB/s
    assert ours.share == pytest.approx(0.125)
    assert ours.speedup == 2.0
    assert ours.timing == "graph"
    assert best(list(rows.values())) is ours


def test_what_cannot_be_captured_is_timed_eagerly_and_says_why() -> None:
    clock = SetClock({"torch eager": [2.0] * 99}, graphs=False)
    row = rows_of(case_of(providers=(named(clock, "torch eager"),)), clock)["torch eager"]
    assert (row.timing, row.reason) == ("eager", "it waits")


def test_short_runs_are_repeated_within_a_sample() -> None:
    clock = SetClock({"torch eager": [0.25] * 5 + [1.0] * 5})
    calls = 0

    def forward(i: Inputs) -> Tensor:
        nonlocal calls
        calls += 1
        clock.current = "torch eager"
        return square(i)

    case = case_of(providers=(simple("torch eager", forward),), sets=1)
    row = rows_of(case, clock, Settings(1, 1e-9))["torch eager"]
    assert row.samples == [1.0 / 4]  # four calls, of 0.25 ms each
    assert calls > 8


def test_inputs_that_a_provider_overwrites_are_put_back() -> None:
    def spoil(i: Inputs) -> Tensor:
        assert i["x"].detach().ne(0).all()
        out = square(i)
        with torch.no_grad():
            i["dy"].zero_()
        return out

    def check(i: Inputs) -> Tensor:
        assert i["dy"].eq(1).all()
        return square(i)

    rows = rows_of(case_of(simple("spoils", spoil), simple("checks", check), restore=("dy",)))
    assert rows["checks"].status == "ok", rows["checks"].reason
    rows = rows_of(case_of(simple("spoils", spoil), simple("checks", check)))
    assert rows["checks"].status == "error"  # so the test would see it


def test_wrong_results_show() -> None:
    rows = rows_of(
        case_of(
            simple("right", lambda i: i["x"] * i["x"]),
            simple("wrong", lambda i: 2 * i["x"].square()),
            simple("nan", lambda i: i["x"].square() * float("nan")),
            simple("shape", square, direct=True),
        )
    )
    assert rows["right"].error == pytest.approx(0, abs=1e-6)
    assert rows["wrong"].error == pytest.approx(1.0)
    assert rows["nan"].error != rows["nan"].error
    assert rows["shape"].status == "error"
    assert "shapes" in str(rows["shape"].reason)


def test_difference_takes_the_worst() -> None:
    one = torch.ones(3)
    assert harness.difference([one, 1.5 * one], [one, one]) == pytest.approx(0.5)
    worst = harness.difference([one * float("nan"), one], [one, one])
    assert worst != worst


def test_a_call_gives_results_and_gradients() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    inputs = {"x": x, "dy": torch.tensor([1.0, 10.0])}
    call = providers.timed(simple("a", square), square, ("x",), ("dy",))
    out, grad = call(inputs)
    assert not out.requires_grad
    assert grad.tolist() == [2.0, 40.0]
    (out,) = providers.timed(simple("a", square), square, (), ())(inputs)
    assert not out.requires_grad


@pytest.fixture
def console() -> Console:
    return Console(width=150, record=True, file=io.StringIO())


def tiny(clock: Any) -> dict[Ceiling, float]:
    return measure_ceilings(clock, copied=2**12, side=32, rounds=1)


def test_a_run_writes_table_lines_page_and_picture(tmp_path: Path, console: Console) -> None:
    cases = [
        case_of(simple("ours", square), Provider("absent", absent), Provider("raising", raising)),
        case_of(simple("ours | nan", lambda i: i["x"] * float("nan")), shape="nan"),
    ]
    assert bench(cases, CpuClock(), QUICK, tmp_path, "the command", console, tiny) == 0
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert [row["provider"] for row in rows] == [
        "torch eager",
        "ours",
        "absent",
        "raising",
        "torch eager",
        "ours | nan",
    ]
    ours = rows[1]
    assert ours["samples"]
    assert ours["p20"] <= ours["ms"] <= ours["p80"]
    assert ours["unit"] == "GB/s"
    assert ours["command"] == "the command"
    assert ours["versions"]["torch"] == torch.__version__
    assert set(ours["ceilings"]) == set(ours["ceilings_after"]) == {"copy", "bf16", "int8"}
    assert rows[-1]["error"] == "nan"  # JSON knows no NaN
    page = (tmp_path / "kernels.md").read_text()
    assert "## square, forward + backward" in page
    assert "- absent (square): not today" in page
    assert "ZeroDivisionError: first line" in page
    assert "`the command`" in page
    assert "(kernels.png)" in page
    with Image.open(tmp_path / "kernels.png") as picture:
        assert min(picture.size) > 200
    said = console.export_text()
    assert "[1/2] square 8 x 4" in said
    assert "second line" not in said


def test_what_was_measured_before_the_device_was_lost_is_kept(
    tmp_path: Path, console: Console
) -> None:
    class Fragile(CpuClock):
        lost = False

        def settle(self) -> None:
            if self.lost:
                raise DeviceLostError("illegal access")

    clock = Fragile()

    def kill(i: Inputs) -> Tensor:
        clock.lost = True
        raise RuntimeError("launch failed")

    cases = [case_of(), case_of(simple("kills", kill), shape="second"), case_of(shape="third")]
    with pytest.raises(UserError, match="square second: the device was lost"):
        bench(cases, clock, QUICK, tmp_path, "command", console, tiny)
    lines = (tmp_path / "kernels.jsonl").read_text().splitlines()
    assert [json.loads(line)["shape"] for line in lines] == ["8 x 4"]
    assert "8 x 4" in (tmp_path / "kernels.md").read_text()


def test_missing_ones_are_named_once() -> None:
    row = Row("a", "1", "forward", "X", None, True, status="missing", reason="why")
    rows = [row, replace(row, shape="2"), replace(row, kernel="b")]
    assert missing(rows) == ["X (a, b): why"]


def test_no_figures_no_picture(tmp_path: Path) -> None:
    bars = [Bar("X", None, "why", "ours")]
    assert not draw(tmp_path / "a.png", "title", [Panel("a", bars)])
    assert not (tmp_path / "a.png").exists()


# The cases themselves

TINY = [
    losses.cross_entropy(24, 100),
    losses.linear_cross_entropy(24, 16, 100),
    elementwise.rms_norm(24, 64),
    elementwise.add_rms_norm(24, 64),
    elementwise.gated("swiglu", 24, 64),
    elementwise.gated("geglu", 24, 64),
    elementwise.relu2(24, 64),
    elementwise.rope(2, 12, 4, 2, 16),
    elementwise.rope(2, 12, 4, 2, 16, normed=True),
    int8.weight_only(2, 64, 32),
    int8.dynamic(24, 64, 32),
    optimizers.adamw(1000, 2),
]


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.kernel}-{case.mode}")
def test_ours_and_torch_compute_the_same(case: Case) -> None:
    mine = tuple(p for p in case.providers if p.peer is None)
    rows = rows_of(replace(case, providers=mine, sets=1))
    assert rows[case.reference].status == "ok"
    assert sum(row.status == "ok" for row in rows.values()) >= 2
    for row in rows.values():
        assert row.status != "error", f"{row.provider}: {row.reason}"
        if row.status == "ok" and row.error is not None:
            # bf16 twice over (2^-8 each), more for int8 activations and one rounding a chunk
            assert row.error < 2e-2, f"{row.provider}: {row.error}"


@pytest.mark.parametrize(
    ("lengths", "window", "causal"),
    [([16] * 4, None, True), ([10, 54], None, True), ([64], 9, True), ([16] * 4, None, False)],
)
def test_our_attentions_agree(lengths: list[int], window: int | None, causal: bool) -> None:
    case = attention.attention("tiny", lengths, (4, 2), 16, causal, window)
    mine = tuple(p for p in case.providers if p.name in ("ours", "ours by plain"))
    rows = rows_of(replace(case, providers=mine, sets=1, reference="ours"))
    assert {row.status for row in rows.values()} == {"ok"}, rows
    assert rows["ours by plain"].error < 2e-2  # type: ignore[operator]


def test_backends_of_ours_that_cannot_serve_are_missing() -> None:
    case = attention.attention("tiny", [16], (4, 2), 16)
    flash = [p for p in case.providers if p.name == "ours by torch-varlen"]
    (row,) = rows_of(replace(case, providers=tuple(flash))).values()
    assert (row.status, row.reason) == ("missing", "needs a CUDA GPU")


def test_work_is_counted_as_the_kernels_need_it() -> None:
    work = {(case.kernel, case.shape, case.mode): case.work for case in all_cases()}
    both = "forward + backward"
    n, v = 16384, 75968
    assert work["cross_entropy", f"N={n} V={v}", both] == 3 * n * v * 2
    assert work["linear_cross_entropy", f"N={n} D=2048 V=131072", both] == 6 * n * 2048 * 131072
    assert work["rms_norm", f"N={n} D=8192", both] == 5 * n * 8192 * 2
    assert work["swiglu", f"N={n} F=8960", both] == 8 * n * 8960 * 2
    assert work["int8_linear", "M=1 K=2048 N=8192", "weight-only"] == 2048 * 8192
    assert work["adamw", "1e9 parameters", "step"] == 28e9
    flops = 3.5 * 4 * 128 * 16 * 8 * (2048 * 2049 // 2)
    assert work["attention", "8 x 2048, heads 16/16, D=128", both] == flops


@pytest.mark.parametrize("window", [None, 1, 3, 99])
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_are_those_of_the_mask(window: int | None, causal: bool) -> None:
    gap = torch.arange(7)[:, None] - torch.arange(7)
    seen = gap >= 0 if causal else gap == gap
    if window is not None:
        seen &= gap.abs() < window
    assert attention.pairs(7, causal, window) == int(seen.sum())


def test_ragged_lengths_are_the_same_each_time() -> None:
    lengths = attention.ragged_lengths(16384, 41)
    assert lengths == attention.ragged_lengths(16384, 41)
    assert (len(lengths), sum(lengths)) == (41, 16384)
    assert 40 < min(lengths) < max(lengths) < 1000


# The command line


def test_cases_are_chosen_by_kernel_and_provider() -> None:
    cases = all_cases()
    config = KernelsConfig(only=("rms_norm", "adamw"), without=("torch.compile",))
    chosen = choose_cases(config, cases)
    assert {case.kernel for case in chosen} == {"rms_norm", "adamw"}
    names = {p.name for case in chosen for p in case.providers}
    assert "ours" in names
    assert not names & {"torch.compile", "Liger", "quack"}
    everyone = choose_cases(replace(config, peers=True), cases)
    assert {"Liger", "quack"} <= {p.name for case in everyone for p in case.providers}
    with pytest.raises(UsageError, match="did you mean rms_norm"):
        choose_cases(KernelsConfig(only=("rmsnorm",)), cases)
    with pytest.raises(UsageError, match="--without quak"):
        choose_cases(KernelsConfig(without=("quak",)), cases)


def test_every_case_has_its_reference_first_or_early() -> None:
    for case in all_cases():
        assert case.providers[0].name == case.reference


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["kernels", "--peers"], 1, "PyTorch sees none here"),
        (["trace"], 1, "PyTorch sees none here"),
        (["kernels", "--only", "swigloo"], 2, "did you mean swiglu"),
        (["kernels", "--repeats", "0"], 2, "--repeats must be 1 or more"),
        (["kernls"], 2, "did you mean kernels"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_sentence(
    argv: list[str],
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command_line.main(argv) == code
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


# The trace


REPORT = (
    "Using bf16 compute over fp32 weights: the GPU has it",
    "Using fused cross-entropy (triton)",
    "Using flash attention (flash-attn 4) for head size 64",
    "Using fused kernels (triton): rms_norm, swiglu, rope",
)
STEP = (
    "cross_entropy_overwrite_kernel",
    "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90",
    "add_rms_norm_forward_kernel",
    "glu_forward_kernel",
    "rope_kernel",
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT",
)


def test_promises_are_read_from_the_report() -> None:
    assert trace.promised(REPORT) == ["cross_entropy", "attention", "rms_norm", "swiglu", "rope"]
    off = ("Using fused cross-entropy (torch, in chunks)", "Fused kernels off")
    assert trace.promised(off) == []


def test_a_broken_promise_is_named() -> None:
    assert trace.broken_promises(REPORT, STEP) == []
    for i, op in enumerate(trace.promised(REPORT)):
        assert trace.broken_promises(REPORT, STEP[:i] + STEP[i + 1 :]) == [op]
    assert trace.broken_promises(REPORT[3:], ["sum_partials_kernel", *STEP[3:]]) == ["rms_norm"]


def test_our_kernels_are_known_by_name() -> None:
    names = trace.our_kernels()
    assert {"cross_entropy_forward_kernel", "rms_norm_backward_kernel"} <= names
    assert not any(name.startswith("_") for name in names)


def test_a_training_step_is_profiled(micro: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = trace.TraceConfig(warmup=1, out=str(tmp_path), chrome=True)
    said = Console(file=io.StringIO(), width=120)
    assert trace.trace(config, micro(), "the command", said) == 0
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert any(line["calls"] > 1 and line["us"] > 0 for line in lines)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_step_without_a_promised_kernel_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed = []
    job = SimpleNamespace(
        composed=SimpleNamespace(report=REPORT),
        device=torch.device("cpu"),
        data=SimpleNamespace(loader=SimpleNamespace(close=lambda: closed.append(True))),
    )
    monkeypatch.setattr(trace, "prepare", lambda config: job)
    monkeypatch.setattr(trace, "profile_step", lambda job, warmup: None)
    seen = [trace.Seen(name, True, 1, 2.0) for name in STEP[:-2]]
    monkeypatch.setattr(trace, "kernels_of", lambda record, device: seen)
    config = trace.TraceConfig(out=str(tmp_path))
    with pytest.raises(UserError, match="promises rope, but"):
        trace.trace(config, TrainConfig(), "command", Console(file=io.StringIO()))
    assert closed
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == len(seen)


@pytest.mark.parametrize(
    "case",
    [layers.attention_layer(2, 16, 256), layers.mlp_layer(32, 64, 96)],
    ids=lambda case: case.kernel,
)
def test_a_layer_s_providers_compute_the_same(case: Case) -> None:
    inputs = case.inputs(torch.device("cpu"), torch.Generator().manual_seed(0))
    plain, ours = (
        timed(provider, provider.build([inputs]), case.wrt, case.seeds)(inputs)
        for provider in (case.providers[0], case.providers[2])
    )
    assert len(plain) == 1 + len(case.wrt)
    # bf16 rounds to 2^-9, and a layer is a handful of roundings deep
    assert difference(ours, plain) < 8 * 2**-9


# On a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@on_gpu
def test_a_call_that_waits_does_not_spoil_the_captures_after_it() -> None:
    clock = CudaClock()
    x = torch.ones(1024, device=clock.device)

    def waits() -> float:
        return float(x.sum())

    def stalls() -> None:  # not seen beforehand: it fails in the capture itself
        x.add(1)
        torch.cuda.synchronize()

    with clock.session():
        for bad in (waits, stalls):
            with pytest.raises(NotCapturableError):
                clock.capture(bad)
            torch.cuda.empty_cache()
            out = torch.zeros_like(x)
            replay = clock.capture(lambda out=out: out.add_(1))  # type: ignore[misc]
            out.zero_()
            times = clock.sample(replay, None, 5)
            assert out[0] == 5
            assert min(times) > 0


@pytest.mark.gpu
@on_gpu
def test_peak_memory_leaves_out_results() -> None:
    clock = CudaClock()
    x = torch.ones(2**20, device=clock.device)

    def call() -> int:
        wide = x.double()  # 8 MiB
        return (wide * 2).float().nbytes  # 8 MiB more at the worst

    with clock.session():
        peak = clock.peak(call)
    assert peak is not None
    assert 12 * 2**20 <= peak <= 20 * 2**20


@pytest.mark.gpu
@on_gpu
def test_a_graph_keeps_what_only_its_call_holds() -> None:
    """A library's own copy of a weight, say: freed, the graph would read another's memory."""
    clock = CudaClock()
    x = torch.ones(2**22, device=clock.device)
    out = torch.zeros_like(x)

    def build() -> Callable[[], Tensor]:
        weight = torch.full_like(x, 3.0)
        return lambda: out.copy_(x * weight)

    with clock.session():
        replay = clock.capture(build())
        clock.free()
        others = [torch.full_like(x, 7.0) for _ in range(8)]
        out.zero_()
        replay()
        clock.settle()
    assert len(others) == 8
    assert bool((out == 3.0).all())


@pytest.mark.gpu
@on_gpu
def test_a_small_run_on_the_gpu(tmp_path: Path, console: Console) -> None:
    cases = [losses.cross_entropy(512, 1000), elementwise.rms_norm(512, 256)]
    mine = choose_cases(KernelsConfig(without=("torch.compile",)), cases)
    assert bench(mine, CudaClock(), QUICK, tmp_path, "command", console) == 0
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["timing"] for row in rows} == {"graph"}
    assert all(row["error"] is None or row["error"] < 2e-2 for row in rows)
    assert all(row["peak_bytes"] is not None for row in rows)


def test_the_page_is_markdown(tmp_path: Path) -> None:
    row = Row(
        "a",
        "1",
        "forward",
        "X",
        None,
        True,
        timing="graph",
        samples=[1.0, 2.0, 3.0],
        work=4e9,
        floor=1.0,
        peak_bytes=2**20,
        error=1e-3,
        speedup=2.0,
    )
    where = SimpleNamespace(date="2026-01-02T03:04", command="c", lines=lambda: ["Here."])
    page = page_of([row], [where], Cases())  # type: ignore[list-item]
    lines = page.markdown(False).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert table[-1].split(" | ")[2:6] == ["**2.000**", "1.400 - 2.600", "2,000 GB/s", "50%"]
