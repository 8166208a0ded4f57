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
from runners.benchmarks.fitting import Search, Try, largest, limited
from runners.benchmarks.memory import WAYS, MemoryConfig, bench, check, model_bytes, trained_by
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
        with trained_by(way, NANO, 2, CPU) as trained:
            learner = trained.learner
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
    with trained_by(WAYS["int8_checkpoint"], NANO, 2, CPU) as trained:
        learner, grad_fn = trained.learner, trained.gradients(16)
        before = {path: leaf.clone() for path, leaf in flatten(learner.params).items()}
        for _ in range(2):  # the gradient of lora_a is zero until lora_b has moved
            learner.train_step(grad_fn, batches)
        for path, leaf in flatten(learner.params).items():
            assert torch.equal(leaf, before[path]) == (".lora_" not in path), path


def test_running_out_of_memory_is_a_row(tmp_path: Path, monkeypatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("full\nof it")

    for name in ("step", "trained_by"):  # its steps, and already its weights
        monkeypatch.setattr(memory, name, full)
        bench(replace(SMALL, out=str(tmp_path), only=("fp32",)), CPU, "", Console(quiet=True))
        (row,) = map(json.loads, (tmp_path / "memory.jsonl").read_text().splitlines())
        assert (row["status"], row["reason"]) == ("out of memory", "full")
        assert (row["model_bytes"] is None) == (name == "trained_by")
        page = (tmp_path / "memory.md").read_text()
        assert "| out of memory |" in page
        assert "- fp32: out of memory: full" in page


def test_one_learner_takes_steps_of_any_length(monkeypatch) -> None:
    made = []
    for name in ("build_params", "half_precision"):
        monkeypatch.setattr(memory, name, _counted(getattr(memory, name), made))
    for key in ("fp32", "bf16_checkpoint", "int8"):
        made.clear()
        with trained_by(WAYS[key], NANO, 2, CPU) as trained:
            for rows, length in ((2, 16), (1, 8), (1, 64)):
                used = memory.step(trained, rows, length)
                assert used.size == rows * length
                assert used.seconds > 0
        assert len(made) == 1


def _counted(function, calls: list):
    def counted(*args):
        calls.append(function)
        return function(*args)

    return counted


def test_operations_are_no_fewer_than_counted() -> None:
    full = 3 * 64 * NANO.flops_per_token(64)
    assert full < memory.work(NANO, 3, 64) < 2 * full
    assert memory.work(NANO, 1, 128) > 2 * memory.work(NANO, 2, 32)


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


# -- the search -----------------------------------------------------------------------------------


class Card:
    """A device of which a step of some size needs `held(size)` bytes, a twentieth more with
    fragments, and `seconds(size)`."""

    def __init__(self, held, seconds=lambda size: 1e-6 * size) -> None:
        self.held, self.seconds = held, seconds
        self.tried: list[int] = []
        self.slowest = 0.0

    def attempt(self, size: int, limit: int) -> Try | None:
        self.tried.append(size)
        self.slowest = max(self.slowest, self.seconds(size))
        needed = self.held(size)
        if 1.05 * needed > limit:
            return None
        return Try(size, int(needed), int(1.05 * needed), self.seconds(size))

    def fits(self, limit: int, size: int) -> bool:
        return 1.05 * self.held(size) <= limit

    def search(self, **options) -> Search:
        usual = {
            "smallest": 1024, "most": 200_000, "grid": 128, "work": lambda size: size + size**2,
            "slowest": lambda: 60.0,
        }  # fmt: skip
        return Search(self.attempt, **(usual | options))


@pytest.mark.parametrize(
    "held",
    [
        lambda size: 1000 * size,
        lambda size: 10**7 + 700 * size,
        lambda size: max(25 * 10**6, 2 * 10**7 + 300 * size),  # the optimizer holds the most first
        lambda size: 10**7 + 100 * size + 0.01 * size**2,
        lambda size: 10**6 + 4e5 * size**0.5,
    ],
)
@pytest.mark.parametrize("hint", [True, False])
def test_every_limit_is_answered_to_a_sixteenth(held, hint: bool) -> None:
    card = Card(held)
    peaks = [(16_384, held(16_384))] if hint else []
    search = card.search(peaks=peaks)
    search.attempt_at(8192 if hint else 1024, 10**9)
    for limit in (10**6, 24 * 10**6, 27 * 10**6, 48 * 10**6, 80 * 10**6, 10**9):
        found = search.largest(limit)
        assert found is not None
        if found.size:
            assert card.fits(limit, found.size)
        if found.end == "most":
            assert found.size == 200_000
        else:
            assert found.end == "full"
            assert not card.fits(limit, max(1024, found.size + max(found.size // 16, 128)))
    assert len(card.tried) <= 24, card.tried


def test_a_line_needs_two_tries_a_limit() -> None:
    card = Card(lambda size: 10**7 + 1000 * size)
    search = card.search(peaks=[(16_384, card.held(16_384))])
    search.attempt_at(8192, 10**9)
    for i, limit in enumerate((24 * 10**6, 48 * 10**6, 80 * 10**6)):
        found = search.largest(limit)
        assert found is not None
        assert len(card.tried) <= 4 + 2 * i


def test_a_try_answers_the_other_limits() -> None:
    card = Card(lambda size: 1000 * size)
    search = card.search()
    search.attempt_at(50_000, 10**9)
    assert search.known(10**9) == (50_000, None)
    assert search.known(53 * 10**6) == (50_000, None)  # fragments and all
    assert search.known(51 * 10**6) == (0, None)  # perhaps
    assert search.known(49 * 10**6) == (0, 50_000)
    search.attempt_at(100_000, 90 * 10**6)
    assert search.known(80 * 10**6) == (50_000, 100_000)
    assert search.known(95 * 10**6) == (50_000, None)


def test_what_would_take_too_long_is_not_tried() -> None:
    card = Card(lambda size: 10**7 + 10 * size, lambda size: 1e-4 * size + 1e-8 * size**2)
    search = card.search(
        slowest=lambda: 20.0, peaks=[(16_384, card.held(16_384))],
        pace=1.2e-4, work=lambda size: size + 2e-4 * size**2,
    )  # fmt: skip
    search.attempt_at(8192, 10**9)
    found = search.largest(10**9)
    assert found is not None
    assert found.end == "time"
    assert card.slowest <= 20.0 * (17 / 16) ** 2
    assert card.seconds(found.size) > 20.0 / 2
    assert len(card.tried) <= 4
    again = search.largest(2 * 10**9)  # what is known already costs nothing
    assert again == found
    assert len(card.tried) <= 4


def test_no_time_is_no_answer() -> None:
    card = Card(lambda size: 10 * size)
    search = card.search(slowest=lambda: 0.0, pace=1.0)
    assert search.largest(10**9) is None
    assert not card.tried


def longest_rows_of(monkeypatch, config: MemoryConfig, seconds=lambda tokens: 1e-5 * tokens):
    """On a card of 64 GiB, by a memory model of 2 GiB and 1 MiB a token."""

    class Properties:
        total_memory = 64 * 2**30

    share = [1.0]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda s, device: share.__setitem__(0, s)
    )
    tried = []

    def step(trained, rows, tokens):
        needed = 2 * 2**30 + tokens * 2**20
        tried.append(tokens)
        if needed > share[0] * Properties.total_memory:
            raise torch.OutOfMemoryError
        return Try(tokens, needed, needed, seconds(tokens))

    monkeypatch.setattr(memory, "step", step)
    monkeypatch.setattr(memory, "free", lambda device: None)
    said: list[str] = []
    measured = 2 * 2**30 + 2 * 8192 * 2**20
    rate = 2 * 8192 / (2 * seconds(8192))
    row = memory.Row("bf16", WAYS["bf16"].label, 2**30, measured, rate)
    with trained_by(WAYS["bf16"], NANO, 2, CPU) as trained:
        memory.longest_rows(config, row, trained, said.append, lambda: 100.0)
    assert share == [1.0]
    return row, tried, said


def test_the_longest_rows_of_a_way(monkeypatch) -> None:
    config = replace(SMALL, rows=2, length=8192, limits=(0.0, 1.0, 10.0), most=30_000)
    row, tried, said = longest_rows_of(monkeypatch, config)
    found = row.longest
    assert found["1 GiB"] == 0
    assert 8 * 1024 * 15 / 16 <= found["10 GiB"] <= 8 * 1024
    assert found["the card"] == 30_000
    assert len(tried) < 8
    assert said[-1].endswith("the longest row in the card: 30,000 (more was not tried)")
    assert memory.cells(row, config)[-3:] == ("30,000 or more", "0", f"{found['10 GiB']:,}")


def test_rows_that_take_too_long_are_at_least_so_long(monkeypatch, tmp_path: Path) -> None:
    config = replace(SMALL, rows=2, length=8192, limits=(10.0, 0.0), most=131_072, slowest=5.0)
    row, tried, said = longest_rows_of(
        monkeypatch, config, lambda tokens: 1.5e-4 * tokens + 5e-9 * tokens**2
    )
    assert 8 * 1024 * 15 / 16 <= row.longest["10 GiB"] <= 8 * 1024
    assert row.untried == ["the card"]
    assert 10_000 < row.longest["the card"] < 30_000
    assert max(tried) < 35_000
    assert said[-1].endswith(" or more (time)")
    cell = f"at least {row.longest['the card']:,} (time)"
    assert memory.cells(row, config)[-1] == cell
    assert memory.draw(tmp_path / "x.png", "title", [row], config)


def test_bad_flags(monkeypatch) -> None:
    with pytest.raises(UsageError, match="--only int4: there are fp32"):
        check(replace(SMALL, only=("int4",)))
    with pytest.raises(UsageError, match="--slowest is in seconds"):
        check(replace(SMALL, slowest=0.0))
    with pytest.raises(UsageError, match="--limits are GiB"):
        check(replace(SMALL, limits=(-1.0,)))
    with pytest.raises(UsageError, match="--rank must be 1 or more"):
        check(replace(SMALL, rank=0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch sees none here"):
        run(["memory"])
