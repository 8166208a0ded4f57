"""`bench components`, on a CPU: every part and rung computes, and the right thing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import kernels
from core import PRESETS, VLMConfig, make_batch, vlm
from core.config import TextConfig
from params import init_params
from runners.bench import run
from runners.benchmarks import components
from runners.benchmarks.clock import CpuClock
from runners.benchmarks.components import (
    PARTS,
    ComponentsConfig,
    Row,
    Variant,
    Work,
    bench,
    check,
    measure,
    parts_of,
    pulled,
)
from runners.shell.cli import UsageError
from runners.shell.errors import UserError
from transforms import cast_matrices, fuse_loss, value_and_grad

NANO = VLMConfig(
    TextConfig(vocab_size=128, dim=32, layers=2, heads=4, kv_heads=2, mlp_dim=48, qkv_bias=True)
)
SMALL = ComponentsConfig(preset="nano", rows=2, length=24, rounds=1)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nano(monkeypatch) -> Iterator[None]:
    monkeypatch.setitem(PRESETS, "nano", NANO)
    monkeypatch.setattr(components, "compile", lambda forward, **_: forward)
    return


def no_ceilings(clock: object) -> dict:
    return {"copy": 1e12, "bf16": 1e14, "int8": 1e14}


def test_every_part_is_measured_and_agrees_with_fp32(tmp_path: Path) -> None:
    config = replace(SMALL, out=str(tmp_path))
    assert bench(config, CpuClock(), "bench components", Console(quiet=True), no_ceilings) == 0
    lines = (tmp_path / "components.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(PARTS)
    for row in rows:
        assert row["status"] == "ok", row["reason"]
        first = row["rung"].startswith("baseline")
        assert (row["times_baseline"] == 1) == first
        if row["part"] != "optimizer" and not first:
            # bf16 rounds to 2^-9, and a part is a handful of roundings deep
            assert 0 < row["error"] < 8 * 2**-9, row
    page = (tmp_path / "components.md").read_text()
    assert "| attention | ours |" in page
    assert "What each part must do" in page
    assert (tmp_path / "components.png").read_bytes().startswith(b"\x89PNG")


def test_parts_compute_what_a_block_of_the_model_does() -> None:
    """The parts of one layer, put together, are the model: they cannot drift apart."""
    model = replace(NANO, text=replace(NANO.text, layers=1))
    found = {part.name: part for part in parts_of(NANO, 2, 24, CPU, PARTS)}
    params = cast_matrices(init_params(model)["text"], torch.bfloat16)
    drawn = torch.Generator().manual_seed(0)
    batch = make_batch(torch.randint(128, (2, 24), generator=drawn))

    def through(name: str, kind: str, **given: torch.Tensor) -> torch.Tensor:
        part = found[name]
        return getattr(part, kind)(part.params | given, part.batch)

    for kind in ("plain", "ours"):
        with torch.no_grad(), kernels.override(rms_norm="torch"):
            x = params["embed"]["weight"][batch["tokens"]]
            o = through("attention", kind, x=through("norms", kind, x=x))
            x = through("mlp", kind, x=x, residual=o)
            loss = through("loss", kind, x=through("norms", kind, x=x))
            expected = fuse_loss(vlm(model))({"text": params}, batch)
        # norms of fresh params are all ones, so one part serves for three; rounding to 2^-9
        assert float(loss) == pytest.approx(float(expected), rel=2**-9), kind


def test_gradients_are_those_of_the_part() -> None:
    (part,) = parts_of(NANO, 2, 24, CPU, ("loss",))
    out, *grads = pulled(part, part.ours, False, {})()
    loss, expected = value_and_grad(part.ours)(part.params, part.batch)
    assert float(out) == float(loss)
    for grad, leaf in zip(grads, (expected["embed"]["weight"], expected["x"]), strict=True):
        assert torch.equal(grad, leaf)


def test_work_of_the_parts_adds_up_to_that_of_the_model() -> None:
    parts = {part.name: part.work for part in parts_of(NANO, 2, 24, CPU, PARTS)}
    linears = 2 * (parts["attention"].operations + parts["mlp"].operations)
    scores = 2 * 7 * 2 * 32 * 2 * (24 * 25 // 2)
    products = linears - scores + parts["loss"].operations
    assert products == NANO.flops_per_token(0) * 48


def test_a_variant_that_fails_leaves_the_others(monkeypatch) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("full\nof it")

    def broken() -> None:
        raise ValueError("no")

    fine = Variant("fine", lambda: lambda: (torch.ones(2),))
    late = iter([None] * 3)  # fails once it is timed

    def fading() -> tuple[torch.Tensor]:
        next(late)
        return (torch.ones(2),)

    given = [Variant("a", full), Variant("b", broken), fine, Variant("c", lambda: fading)]
    rows = measure("part", Work("part"), given, CpuClock(), 2)
    assert [row.status for row in rows] == ["out of memory", "error", "ok", "error"]
    assert (rows[0].reason, rows[1].reason) == ("full", "ValueError: no")
    assert [len(row.samples) for row in rows] == [0, 0, 2 * components.SAMPLES, 0]


def test_a_time_is_of_one_call_and_errors_are_against_the_first() -> None:
    def make(value: float) -> Variant:
        return Variant(str(value), lambda: lambda: (torch.full((4,), value),), calls=4)

    clock = CpuClock()
    clock.sample = lambda run, before, count: [8.0] * count  # type: ignore[method-assign]
    exact, off = measure("part", Work("part"), [make(2.0), make(2.5)], clock, 1)
    assert (exact.ms, off.ms) == (2.0, 2.0)
    assert (exact.error, off.error) == (None, pytest.approx(0.25))


def test_a_baseline_that_failed_is_no_yardstick() -> None:
    rows = [
        Row("mlp", "baseline: fp32", Work("mlp"), status="out of memory", reason="full"),
        Row("mlp", "ours", Work("mlp", 1e9), samples=[2.0]),
    ]
    output = Console(record=True, width=160)
    components.show(rows, no_ceilings(None), output)
    assert "out of memory" in output.export_text()
    assert components.times(rows[1], components.baseline_of(rows, "mlp")) is None


def test_bad_flags(monkeypatch) -> None:
    with pytest.raises(UsageError, match=r"--only atention: .*did you mean attention"):
        check(replace(SMALL, only=("atention",)))
    with pytest.raises(UsageError, match="--rounds must be 1 or more, not 0"):
        check(replace(SMALL, rounds=0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch sees none here"):
        run(["components"])
