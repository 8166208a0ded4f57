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
from runners.benchmarks.clock import CpuClock
from runners.benchmarks.components import (
    BASELINE,
    MAKE,
    PARTS,
    ComponentsConfig,
    bench,
    check,
    part,
    weights_of,
)
from runners.shell.cli import UsageError
from runners.shell.errors import UserError
from transforms import cast_matrices, fuse_loss

NANO = VLMConfig(
    TextConfig(vocab_size=128, dim=32, layers=2, heads=4, kv_heads=2, mlp_dim=48, qkv_bias=True)
)
SMALL = ComponentsConfig(preset="nano", rows=2, length=24, rounds=1)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nano(monkeypatch) -> Iterator[None]:
    monkeypatch.setitem(PRESETS, "nano", NANO)
    return


def no_ceilings(clock: object) -> dict:
    return {"copy": 1e12, "bf16": 1e14, "int8": 1e14}


def test_every_part_is_measured_and_agrees_with_fp32(tmp_path: Path) -> None:
    config = replace(SMALL, out=str(tmp_path))
    quiet = Console(quiet=True)
    assert bench(config, CpuClock(), "bench components", quiet, no_ceilings, "eager") == 0
    lines = (tmp_path / "components.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert list(dict.fromkeys(row["kernel"] for row in rows)) == list(PARTS)
    for row in rows:
        assert row["status"] == "ok", row["reason"]
        first = row["provider"] == BASELINE
        assert (row["speedup"] == 1) == first
        if row["kernel"] != "optimizer" and not first:
            # bf16 rounds to 2^-9, and a part is a handful of roundings deep
            assert 0 < row["error"] < 8 * 2**-9, row
    page = (tmp_path / "components.md").read_text()
    assert "## attention, forward + backward" in page
    assert (tmp_path / "components.png").read_bytes().startswith(b"\x89PNG")


def test_parts_compute_what_a_block_of_the_model_does() -> None:
    """The parts of one layer, put together, are the model: they cannot drift apart."""
    model = replace(NANO, text=replace(NANO.text, layers=1))
    params = cast_matrices(init_params(model)["text"], torch.bfloat16)
    drawn = torch.Generator().manual_seed(0)
    batch = make_batch(torch.randint(128, (2, 24), generator=drawn))
    generator = torch.Generator().manual_seed(0)
    known = {name: part(NANO, 2, 24, name).inputs(CPU, generator) for name in MAKE}

    def through(name: str, kind: int, **given: torch.Tensor) -> torch.Tensor:
        return MAKE[name][kind](NANO, 24, known[name] | given)

    for kind in (0, 1):  # plain, ours
        with torch.no_grad(), kernels.override(rms_norm="torch"):
            x = params["embed"]["weight"][batch["tokens"]]
            o = through("attention", kind, x=through("norms", kind, x=x))
            x = through("mlp", kind, x=x, residual=o)
            loss = through("loss", kind, x=through("norms", kind, x=x))
            expected = fuse_loss(vlm(model))({"text": params}, batch)
        # norms of fresh params are all ones, so one part serves for three; rounding to 2^-9
        assert float(loss) == pytest.approx(float(expected), rel=2**-9), kind


def test_gradients_are_asked_of_all_weights_of_a_part() -> None:
    assert set(part(NANO, 2, 24, "attention").wrt) == {
        "x", *(path for path in weights_of(NANO, CPU) if path.startswith("attn."))
    }  # fmt: skip
    assert part(NANO, 2, 24, "loss").wrt == ("x", "head")
    assert part(NANO, 2, 24, "mlp").wrt[:2] == ("x", "residual")


def test_work_of_the_parts_adds_up_to_that_of_the_model() -> None:
    work = {name: part(NANO, 2, 24, name).work for name in MAKE}
    linears = 2 * (work["attention"] + work["mlp"])
    scores = 2 * 7 * 2 * 32 * 2 * (24 * 25 // 2)
    assert linears - scores + work["loss"] == NANO.flops_per_token(0) * 48


def test_bad_flags(monkeypatch) -> None:
    with pytest.raises(UsageError, match=r"--only atention: .*did you mean attention"):
        check(replace(SMALL, only=("atention",)))
    with pytest.raises(UsageError, match="--rounds must be 1 or more, not 0"):
        check(replace(SMALL, rounds=0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch sees none here"):
        run(["components"])
