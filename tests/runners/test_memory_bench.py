"""`bench memory`, on a CPU: every way trains, sizes are right, the search finds what fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from core import PRESETS, VLMConfig
from core.config import TextConfig
from params import count
from params.tree import flatten
from runners.bench import run
from runners.benchmarks import memory
from runners.benchmarks.fitting import largest, limited
from runners.benchmarks.memory import WAYS, MemoryConfig, bench, check, learner_of, model_bytes
from runners.cli import UsageError
from runners.errors import UserError

CPU = torch.device("cpu")
NANO = VLMConfig(
    TextConfig(vocab_size=128, dim=32, layers=2, heads=4, kv_heads=2, mlp_dim=48, qkv_bias=True)
)
SMALL = MemoryConfig(preset="nano", rows=2, length=16, rank=2)


@pytest.fixture(autouse=True)
def nano(monkeypatch) -> None:
    monkeypatch.setitem(PRESETS, "nano", NANO)


def test_every_way_trains_and_is_written(tmp_path: Path) -> None:
    config = replace(SMALL, out=str(tmp_path))
    assert bench(config, CPU, "bench memory", Console(quiet=True)) == 0
    rows = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == list(WAYS)
    assert all(row["status"] == "ok" and row["model_bytes"] > 0 for row in rows), rows
    page = (tmp_path / "memory.md").read_text()
    assert all(f"| {way.label} |" in page for way in WAYS.values())
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_model_bytes_of_each_way() -> None:
    sizes = {}
    for key, way in WAYS.items():
        with learner_of(way, NANO, 2, 16, CPU) as (learner, _):
            sizes[key] = model_bytes(learner)
            assert sizes[key] == sizes[key.removesuffix("_checkpoint")]
            if way.int8:
                assert all(".lora_" in path for path in learner.learning)
                codes = [t for t in flatten(learner.working).values() if t.dtype == torch.int8]
                assert len(codes) == 2 * 7  # the linears; the tied head keeps its floats
    matrices = sum(leaf.numel() for leaf in flatten(_fresh()).values() if leaf.ndim > 1)
    vectors = count(_fresh()) - matrices
    assert sizes["fp32"] == 4 * (matrices + vectors)
    assert sizes["mixed"] == 4 * (matrices + vectors) + 2 * matrices  # and the copies
    assert sizes["bf16"] == 2 * matrices + 4 * vectors
    assert sizes["int8"] < sizes["mixed"]


def _fresh() -> dict:
    return memory.init_params(NANO)


def test_a_way_trains_what_it_says() -> None:
    """Adapters move, int8 codes and everything else frozen do not."""
    (batches, _) = memory.batches_of(memory.draw_documents(2, 16, 0.0), 128, 2, True)
    with learner_of(WAYS["int8_checkpoint"], NANO, 2, 16, CPU) as (learner, grad_fn):
        before = {path: leaf.clone() for path, leaf in flatten(learner.params).items()}
        for _ in range(2):  # the gradient of lora_a is zero until lora_b has moved
            learner.train_step(grad_fn, batches)
        for path, leaf in flatten(learner.params).items():
            assert torch.equal(leaf, before[path]) == (".lora_" not in path), path


def test_running_out_of_memory_is_a_row(tmp_path: Path, monkeypatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("full\nof it")

    monkeypatch.setattr(memory, "steps", full)
    bench(replace(SMALL, out=str(tmp_path), only=("fp32",)), CPU, "", Console(quiet=True))
    (row,) = map(json.loads, (tmp_path / "memory.jsonl").read_text().splitlines())
    assert (row["status"], row["reason"], row["model_bytes"]) == ("out of memory", "full", None)
    assert "- fp32: out of memory: full" in (tmp_path / "memory.md").read_text()


@pytest.mark.parametrize("guess", [None, 100, 2900, 3100, 90_000, 10**7])
@pytest.mark.parametrize("limit", [200, 1024, 3000, 100_000, 300_000])
def test_the_search_ends_within_a_sixteenth(limit: int, guess: int | None) -> None:
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    found = largest(fits, smallest=1024, most=200_000, grid=128, guess=guess)
    reached = min(limit, 200_000)
    if limit < 1024:
        assert found == 0
    else:
        assert found <= reached
        assert found == 200_000 or reached - found <= max(found // 16, 128)
    assert len(tried) == len(set(tried)) <= 24


def test_a_good_guess_takes_few_trials() -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= 25_000

    for guess in (24_250, 26_000):
        tried.clear()
        largest(fits, smallest=1024, most=131_072, grid=128, guess=guess)
        assert len(tried) <= 3


def test_limits_are_given_back(monkeypatch) -> None:
    class Properties:
        total_memory = 100 * 2**30

    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share)
    )

    def overflow() -> None:
        with limited(25.0, CPU):
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        overflow()
    with limited(500.0, CPU):
        pass
    assert shares == [0.25, 1.0, 1.0, 1.0]


def test_the_longest_rows_of_a_way(monkeypatch) -> None:
    """With a memory model of 2 GiB and 1 MiB a token."""

    class Properties:
        total_memory = 64 * 2**30

    share = [1.0]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda s, device: share.__setitem__(0, s)
    )
    tried = []

    def steps(way, model, rank, rows, tokens, device):
        needed = 2 * 2**30 + tokens * 2**20
        tried.append(tokens)
        if needed > share[0] * Properties.total_memory:
            raise torch.OutOfMemoryError
        return 2**30, needed, 1.0

    monkeypatch.setattr(memory, "steps", steps)
    monkeypatch.setattr(memory, "free", lambda device: None)
    config = replace(SMALL, limits=(1.0, 10.0, 0.0), most=30_000)
    said: list[str] = []
    way = WAYS["bf16"]
    found = memory.longest_rows(config, way, NANO, CPU, said.append, lambda: False)
    assert found["1 GiB"] == 0
    assert 8 * 1024 * 15 / 16 <= found["10 GiB"] <= 8 * 1024
    assert found["the card"] == 30_000
    assert len(tried) < 14
    assert said[-1].endswith("the longest row in the card: 30,000 (more was not tried)")
    row = memory.Row("bf16", way.label, 2**30, 2**31, 1.0, longest=found)
    assert memory.cells(row, config)[-1] == "30,000 or more"


def test_bad_flags(monkeypatch) -> None:
    with pytest.raises(UsageError, match="--only int4: there are fp32"):
        check(replace(SMALL, only=("int4",)))
    with pytest.raises(UsageError, match="--limits are GiB"):
        check(replace(SMALL, limits=(-1.0,)))
    with pytest.raises(UsageError, match="--rank must be 1 or more"):
        check(replace(SMALL, rank=0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch sees none here"):
        run(["memory"])
