"""`bench memory`, on a CPU: every way trains, sizes are right, the search finds what fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from core import PRESETS, VLMConfig
from core.config import TextConfig
from params import count, init_params
from params.tree import flatten
from runners.bench import run
from runners.benchmarks import fitting
from runners.benchmarks.clock import CpuClock
from runners.benchmarks.documents import draw_documents
from runners.benchmarks.fitting import foretold, largest, limited, longest_rows
from runners.benchmarks.ladder import rung_configs
from runners.benchmarks.ladders import KEPT, MemoryConfig, model_bytes
from runners.benchmarks.steps import bench
from runners.benchmarks.training import Programs, Trained, plain_config, training
from runners.shell.cli import UsageError
from runners.shell.errors import UserError

CPU = torch.device("cpu")
NANO = VLMConfig(
    TextConfig(vocab_size=128, dim=32, layers=2, heads=4, kv_heads=2, mlp_dim=48, qkv_bias=True)
)
SMALL = MemoryConfig(preset="nano", rows=2, length=16, rank=2)


@pytest.fixture(autouse=True)
def nano(monkeypatch) -> None:
    monkeypatch.setitem(PRESETS, "nano", NANO)


def trained_by(key: str, look: Callable[[Trained], object]) -> None:
    """Two steps of a way, and a look at what it trains."""
    plan = rung_configs(SMALL.rungs(), plain_config("nano", (), 16))[key]
    documents = draw_documents(2, 16, 0.0)

    def figures(trained: Trained) -> dict:
        look(trained)
        return {}

    with training(plan, documents, Programs(NANO, CPU), figures) as (step, extra):
        step()
        step()
        extra()


def test_every_way_trains_and_is_written(tmp_path: Path) -> None:
    config = replace(SMALL, out=str(tmp_path))
    assert bench(config, CpuClock(), "bench memory", Console(quiet=True)) == 0
    rows = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == [rung.key for rung in SMALL.rungs()]
    assert all(row["status"] == "ok" and row["extra"]["model GiB"] > 0 for row in rows), rows
    page = (tmp_path / "memory.md").read_text()
    assert all(f"| {rung.label} |" in page for rung in SMALL.rungs())
    assert "longest row in 24 GiB" in page
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_model_bytes_of_each_way() -> None:
    sizes: dict[str, int] = {}
    for key in KEPT:
        trained_by(key, lambda trained, key=key: sizes.update({key: model_bytes(trained.learner)}))
    fresh = init_params(NANO)
    matrices = sum(leaf.numel() for leaf in flatten(fresh).values() if leaf.ndim > 1)
    vectors = count(fresh) - matrices
    assert sizes["fp32"] == 4 * (matrices + vectors)
    assert sizes["mixed"] == 4 * (matrices + vectors) + 2 * matrices  # and the copies
    assert sizes["bf16"] == 2 * matrices + 4 * vectors
    assert sizes["int8"] < sizes["mixed"]


def test_adapters_alone_train_over_int8_weights() -> None:
    def look(trained: Trained) -> None:
        learner = trained.learner
        assert all(".lora_" in path for path in learner.learning)
        codes = [t for t in flatten(learner.working).values() if t.dtype == torch.int8]
        assert len(codes) == 2 * 7  # the linears; the tied head keeps its floats
        moved = [t for path, t in learner.learning.items() if path.endswith("lora_b")]
        assert moved
        assert all(t.count_nonzero() for t in moved)  # they begin at 0

    trained_by("int8_checkpoint", look)


# -- the longest row ------------------------------------------------------------------------------


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


def test_one_learner_takes_steps_of_any_length() -> None:
    def look(trained: Trained) -> None:
        for length in (8, 64):
            held, seconds = fitting.row_step(trained, length)
            assert (held, seconds > 0) == (0, True)

    for key in ("fp32", "bf16_checkpoint", "int8"):
        trained_by(key, look)


def test_a_line_through_peaks_says_where_to_begin() -> None:
    assert foretold({}, 10) is None
    assert foretold({100: 5, 200: 5}, 10) is None
    assert foretold({100: 1, 1000: 5000, 2000: 6000}, 10_000) == 6000


class Card:
    """A card of 64 GiB, on which a row needs 2 GiB and 1 MiB a token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds=lambda tokens: 1e-5 * tokens):
        class Properties:
            total_memory = 64 * 2**30

        self.share, self.tried, self.seconds = 1.0, list[int](), seconds
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.limit)
        monkeypatch.setattr(fitting, "row_step", self.step)

    def limit(self, share: float, device: torch.device) -> None:
        self.share = share

    def step(self, trained: Trained, tokens: int) -> tuple[int, float]:
        self.tried.append(tokens)
        needed = 2 * 2**30 + tokens * 2**20
        if needed > self.share * 64 * 2**30:
            raise torch.OutOfMemoryError
        return needed, self.seconds(tokens)


def search(card: Card, limits: tuple[float, ...], most: int, allowed: float) -> dict[str, str]:
    found = {}
    trained_by(
        "bf16", lambda trained: found.update(longest_rows(trained, limits, most, lambda: allowed))
    )
    assert card.share == 1.0
    return found


def test_the_longest_rows_of_a_way(monkeypatch) -> None:
    card = Card(monkeypatch)
    found = search(card, (0.0, 1.0, 10.0, 20.0), 30_000, 60.0)
    assert list(found) == [fitting.limit_name(gib) for gib in (0.0, 1.0, 10.0, 20.0)]
    assert found["longest row in 1 GiB"] == "0"
    assert found["longest row in the card"] == "30,000 or more"
    for gib in (10, 20):
        room = (gib - 2) * 1024
        assert room * 15 / 16 <= int(found[f"longest row in {gib} GiB"].replace(",", "")) <= room
    assert len(card.tried) <= 16  # the line through the first peaks leads to the others


def test_rows_that_take_too_long_are_at_least_so_long(monkeypatch) -> None:
    card = Card(monkeypatch, lambda tokens: 1.5e-4 * tokens + 5e-9 * tokens**2)
    found = search(card, (10.0, 0.0), 131_072, 5.0)["longest row in the card"]
    assert found.startswith("at least ")
    assert found.endswith(" (time)")
    assert max(card.tried) < 35_000


def test_bad_flags(monkeypatch) -> None:
    with pytest.raises(UsageError, match="--only int4: there are mixed"):
        replace(SMALL, only=("int4",)).check()
    with pytest.raises(UsageError, match="--slowest is in seconds"):
        replace(SMALL, slowest=0.0).check()
    with pytest.raises(UsageError, match="--limits are GiB"):
        replace(SMALL, limits=(-1.0,)).check()
    with pytest.raises(UsageError, match="--rank must be 1 or more"):
        replace(SMALL, rank=0).check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch sees none here"):
        run(["memory"])
