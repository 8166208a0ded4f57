"""`bench train --pictures`, on a CPU: what lies in its batches, and what is counted of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from core import PRESETS, Bounds, check_batch
from core.batch import IGNORE
from core.config import ProjectorConfig, TextConfig, VisionConfig, VLMConfig
from runners.benchmarks import training
from runners.benchmarks.clock import CpuClock
from runners.benchmarks.documents import PAD, Documents, batches_of, draw_documents
from runners.benchmarks.pictures import MARK, pictures_of
from runners.benchmarks.steps import bench
from runners.benchmarks.training import TrainBenchConfig
from runners.shell.cli import UsageError
from runners.shell.errors import UserError
from runners.training.config import model_config
from runners.training.flops import measure_load, training_flops

MICRO = (
    "text.dim=32",
    "text.layers=2",
    "text.heads=4",
    "text.kv_heads=2",
    "text.mlp_dim=48",
    "text.vocab_size=128",
    "vision.dim=32",
    "vision.layers=1",
    "vision.heads=2",
    "vision.mlp_dim=48",
    "vision.image_size=16",
    "projector.hidden=32",
)
SMALL = TrainBenchConfig(
    preset="tiny",
    override=MICRO,
    rows=2,
    length=48,
    lengths=0.6,
    pictures=2,
    steps=1,
    warmup=1,
    rounds=1,
)
MODEL = model_config(SMALL.start.model)  # a picture: 4 patches, 4 tokens


def drawn(rows: int = 3, length: int = 96, count: int = 2, sigma: float = 0.6) -> Documents:
    return draw_documents(rows, length, sigma, pictures=pictures_of(MODEL, count))


def test_a_picture_of_the_large_preset() -> None:
    pictures = pictures_of(PRESETS["vlm_1.5b"], 1)
    assert pictures is not None
    assert (pictures.images.image_size, pictures.patches, pictures.tokens) == (448, 1024, 256)


@pytest.mark.parametrize(("packed", "at_once"), [(True, 1), (True, 3), (False, 1), (False, 3)])
def test_every_picture_and_every_text_lies_in_a_batch(packed: bool, at_once: int) -> None:
    documents = drawn()
    batches, bounds = batches_of(documents, 97, at_once, packed)
    text = patches = 0
    for batch in batches:
        check_batch(batch, MODEL)
        tokens, n = batch["tokens"], len(batch["tokens"])
        slots = batch["image_slots"][batch["image_slots"] < n]
        assert torch.equal(slots.sort().values, (tokens == MARK).nonzero().flatten())
        assert batch["labels"].ne(MARK).all()
        # the first word behind a picture is learnt, and the last of a document has none to learn
        learnt = batch["labels"][batch["labels"] != IGNORE]
        assert torch.equal(learnt, tokens[tokens > MARK])
        text += int((tokens > MARK).sum())
        sizes = batch["image_cu_seqlens"].diff()
        assert set(sizes.tolist()) <= {0, bounds.max_patches}
        used = len(slots)  # as many patches as tokens: merge is 1
        assert batch["patches"].dtype == torch.uint8
        assert not batch["patches"][used:].any()
        assert (batch["patches"][:used].float().std(dim=1) > 40).all()  # of 0..255: about 74
        patches += used
    assert documents.shown == 2 * len(documents.lengths)
    assert patches == 4 * documents.shown
    assert text == sum(documents.lengths) - 4 * documents.shown
    loads = [measure_load(MODEL, batch, PAD) for batch in batches]
    assert sorted(int(x) for load in loads for x in load.documents) == sorted(documents.lengths)
    assert [int(x) for load in loads for x in load.pictures] == [4] * documents.shown
    row = documents.row_len if packed else documents.padded_len()
    assert bounds == Bounds(row, 4, equal_pictures=True)


def test_padded_and_packed_hold_the_same_words_and_pixels() -> None:
    found = []
    for packed in (False, True):
        batches, _ = batches_of(drawn(), 97, 2, packed)
        tokens = torch.cat([batch["tokens"] for batch in batches])
        used = [int((b["image_slots"] < len(b["tokens"])).sum()) for b in batches]
        pixels = [b["patches"][:k] for b, k in zip(batches, used, strict=True)]
        found.append((tokens[tokens != PAD], torch.cat(pixels)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert len(found[0][1].unique(dim=0)) == len(found[0][1])


def test_rows_are_nearly_full_and_texts_as_long_as_pictures() -> None:
    documents = draw_documents(8, 2048, 0.7, pictures=pictures_of(PRESETS["vlm_1.5b"], 1))
    assert documents.tokens / (8 * 2048) > 0.98
    assert min(documents.lengths) > 256
    # a packer of full rows prefers no length: about 35 draws, each with a deviation of 0.8 mean
    assert 0.6 < documents.tokens / len(documents.lengths) / 512 < 1.4
    assert documents.spec is not None
    assert documents.shown <= documents.spec.max_images <= 1.1 * documents.shown
    alike = draw_documents(8, 2048, 0.0, pictures=pictures_of(PRESETS["vlm_1.5b"], 1))
    assert alike.rows == ((512,) * 4,) * 8


# -- what is counted ------------------------------------------------------------------------------


def micro_model() -> VLMConfig:
    return VLMConfig(
        TextConfig(vocab_size=10, dim=4, layers=2, heads=2, kv_heads=1, mlp_dim=6),
        VisionConfig(dim=8, layers=3, heads=2, mlp_dim=12, patch_size=2, image_size=8, merge=2),
        ProjectorConfig(hidden=5),
    )


def test_operations_equal_a_count_by_hand() -> None:
    model = micro_model()  # a picture: 16 patches, 4 tokens
    documents = draw_documents(2, 64, 0.5, pictures=pictures_of(model, 1))
    one, other = documents.rows
    documents = replace(documents, rows=(one, other[:-1]))  # a place and part of a row stay empty
    shown, lengths = documents.shown, documents.lengths
    # forward, each 2 operations a weight; attention: scores and weighted sums, 2 a query, key and
    # feature each
    a_patch = 2 * (3 * 2 * 2 * 8 + 3 * (4 * 8 * 8 + 2 * 8 * 12))
    a_patch_sees = 3 * 2 * 2 * 8 * 16
    an_image_token = 2 * (4 * 8 * 5 + 5 * 4)
    tower = shown * (16 * (a_patch + a_patch_sees) + 4 * an_image_token)
    a_token = 2 * (2 * (4 * 4 + 2 * 2 * 4 + 4 * 4 + 3 * 4 * 6) + 10 * 4)
    context = sum(length**2 for length in lengths) / sum(lengths)
    seen = 2 * 2 * 2 * 4 * round(context) / 2
    text = sum(lengths) * (a_token + seen)
    found = training_flops(model, documents.load, {"text", "vision", "projector"})
    assert found == pytest.approx(3 * (tower + text), rel=1e-12)  # both gradients cost as much
    # padding is none of it: the batch has room for more patches, and its last row is not full
    batches, _ = batches_of(documents, 10, 2, True)
    assert len(batches[0]["patches"]) > 16 * shown
    assert documents.tokens < 128
    loads = [measure_load(model, batch, PAD) for batch in batches]
    counted = [training_flops(model, load, {"text", "vision", "projector"}) for load in loads]
    assert sum(counted) == pytest.approx(found, rel=1e-12)


# -- whole steps ----------------------------------------------------------------------------------


def test_rungs_train_the_whole_model(tmp_path: Path, uncompiled: None, monkeypatch) -> None:
    """Of each kind one: what every rung is made of, the bench of text alone shows."""
    learning: list[set[str]] = []

    class Noted(training.Learner):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            learning.append({path.partition(".")[0] for path in self.learning})

    monkeypatch.setattr(training, "Learner", Noted)
    only = ("bf16", "packing", "loss", "blocks", "padded", "checkpoint")
    config = replace(SMALL, out=str(tmp_path), only=only)
    assert bench(config, CpuClock(), "bench train", Console(quiet=True), no_ceilings) == 0
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == list(only)
    documents = drawn(2, 48)
    everything = training_flops(MODEL, documents.load, {"text", "vision", "projector"})
    for row in rows:
        assert row["status"] == "ok", row["reason"]
        assert (row["tokens"], row["pictures"]) == (documents.tokens, documents.shown)
        assert row["operations"] == pytest.approx(everything, rel=1e-12)
        assert row["pictures_per_second"] == pytest.approx(1e3 * documents.shown / row["ms"])
    # the same function of the same weights, words and pixels: bf16 rounds to 2^-9
    losses = [row["loss"] for row in rows]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=2**-6)
    assert all(parts == {"text", "vision", "projector"} for parts in learning)
    page = (tmp_path / "train.md").read_text()
    assert "pictures/s" in page
    assert f"{documents.shown} pictures of 16 px (4 patches, 4 tokens), packed rows" in page


def no_ceilings(clock: object) -> dict:
    return {"copy": 1e12, "bf16": 1e14, "int8": 1e14}


def test_a_resampler_trains(tmp_path: Path, uncompiled: None) -> None:
    override = (*MICRO, "projector.kind=resampler", "projector.queries=3", "projector.heads=2")
    config = replace(SMALL, override=override, only=("eager", "blocks"), out=str(tmp_path))
    assert bench(config, CpuClock(), "bench train", Console(quiet=True), no_ceilings) == 0
    page = (tmp_path / "train.md").read_text()
    assert "(4 patches, 3 tokens)" in page


def test_bad_flags() -> None:
    for change, message in (
        ({"pictures": -1}, "--pictures must be 0 or more, not -1"),
        ({"pictures": 12}, "--pictures 12 take 48 tokens, .* more than 48"),
        ({"peers": True, "lengths": 0.0}, "--peers measures text alone"),
    ):
        with pytest.raises(UsageError, match=message):
            replace(SMALL, **change).check()
    with pytest.raises(UserError, match="--preset text_8b: this model has no vision tower"):
        replace(SMALL, preset="text_8b", override=()).check()
