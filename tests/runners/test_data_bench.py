"""`bench train --data`, on a CPU: the documents of a file, packed and padded, shown or not."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from core import check_batch
from core.batch import IGNORE
from runners.benchmarks.clock import CpuClock
from runners.benchmarks.documents import Documents, batches_of
from runners.benchmarks.steps import bench
from runners.benchmarks.training import TrainBenchConfig
from runners.data.encode.tokenizer import ChatTokenizer, sample_texts, train_tokenizer
from runners.data.feeding.loader import Loader
from runners.data.sources.open import open_sources
from runners.data.types import Document
from runners.shell.cli import UsageError
from runners.shell.errors import UserError
from runners.training.config import model_config
from runners.training.flops import measure_load, training_flops
from runners.training.setup import build_encoder

MICRO = (
    "text.dim=32",
    "text.layers=2",
    "text.heads=4",
    "text.kv_heads=2",
    "text.mlp_dim=48",
    "vision.dim=32",
    "vision.layers=1",
    "vision.heads=2",
    "vision.mlp_dim=48",
    "vision.image_size=16",
    "projector.hidden=32",
)
NUMBER = 70


@pytest.fixture
def config(tmp_path: Path) -> TrainBenchConfig:
    """Records about a picture each, the first question about it, but every fifth without one."""
    (tmp_path / "pictures").mkdir()
    records = []
    for i in range(NUMBER):
        Image.fromarray(np.full((20, 12, 3), 2 * i + 30, np.uint8)).save(
            tmp_path / "pictures" / f"{i}.png"
        )
        mark = "<image>\n" if i % 5 else ""
        turns = [
            {"from": "human", "value": f"{mark}What is it?"},
            {"from": "gpt", "value": f"thing number {i}" + " of many" * (i % 4)},
        ]
        picture = {"image": f"{i}.png"} if mark else {}
        records.append({"id": str(i), **picture, "conversations": turns})
    (tmp_path / "clips.json").write_text(json.dumps(records))
    return TrainBenchConfig(
        preset="tiny",
        override=MICRO,
        rows=3,
        length=96,
        steps=1,
        warmup=1,
        rounds=1,
        loaded=0.0,
        data=str(tmp_path / "clips.json"),
        image_root=str(tmp_path / "pictures"),
        out=str(tmp_path / "bench"),
    )


def tokenizer_of(config: TrainBenchConfig) -> ChatTokenizer:
    data = config.start.changed(data=config.data, image_root=config.image_root, val_fraction=0.0)
    model = model_config(data.model)
    return train_tokenizer(
        sample_texts(open_sources(data, model).train), model.text.vocab_size
    )  # as training does: the same one


def all_of(documents: Documents) -> list[Document]:
    assert documents.given is not None
    return [document for row in documents.given for document in row]


def test_words_alone_are_the_records_without_their_marks(config: TrainBenchConfig) -> None:
    documents, model = config.step
    assert model.vision is None
    assert model.text.vocab_size == 512  # the preset's, which has room
    assert (documents.shown, documents.images, documents.full) == (0, None, False)
    tokenizer = tokenizer_of(config)
    found = [tokenizer.decode(document.tokens.tolist()) for document in all_of(documents)]
    assert all("What is it?" in text and "thing number" in text for text in found)
    assert not any("image" in text for text in found)
    assert len(set(documents.lengths)) > 1
    assert documents.tokens > 0.9 * 3 * 96


def test_rows_are_as_training_packs_them(config: TrainBenchConfig) -> None:
    """The loader on the same records in the same order fills rows with the same documents."""
    documents, model = replace(config, pictures=1).step
    assert documents.spec is not None
    data = replace(config, pictures=1).start.changed(
        data=config.data,
        image_root=config.image_root,
        val_fraction=0.0,
    )
    encoder = build_encoder(data.data, model, tokenizer_of(replace(config, pictures=1)))
    source = open_sources(data, model).train
    (first,) = islice(Loader(source, encoder, documents.spec, shuffle=False), 1)
    (batch,), _ = batches_of(documents, model.text.vocab_size, 3, True)
    assert torch.equal(batch["tokens"], first["tokens"])
    assert torch.equal(batch["labels"], first["labels"])
    assert torch.equal(batch["patches"], first["patches"])


@pytest.mark.parametrize("pictures", [0, 1])
@pytest.mark.parametrize("at_once", [1, 3])
def test_packed_and_padded_hold_the_same_documents(
    config: TrainBenchConfig, pictures: int, at_once: int
) -> None:
    config = replace(config, pictures=pictures)
    documents, model = config.step
    assert documents.spec is not None
    pad, found = documents.spec.pad_token, []
    assert documents.shown == sum(len(d.patch_counts) for d in all_of(documents))
    assert (documents.shown > 0) == (pictures > 0)
    assert documents.shown < len(documents.lengths)
    whole = training_flops(model, documents.load, {"text", "vision", "projector"})
    for packed in (True, False):
        batches, bounds = batches_of(documents, model.text.vocab_size, at_once, packed)
        for batch in batches:
            check_batch(batch, model)
        tokens = torch.cat([batch["tokens"] for batch in batches])
        labels = torch.cat([batch["labels"] for batch in batches])
        real = int((tokens != pad).sum())
        assert real == documents.tokens
        learnt = sum(int((d.labels != IGNORE).sum()) for d in all_of(documents))
        assert int((labels != IGNORE).sum()) == learnt
        assert bounds.max_seqlen == (96 if packed else documents.padded_len())
        loads = [measure_load(model, batch, pad) for batch in batches]
        lengths = sorted(int(length) for load in loads for length in load.documents)
        assert lengths == sorted(documents.lengths)
        assert sum(len(load.pictures) for load in loads) == documents.shown
        found.append(tokens[tokens != pad])
    assert torch.equal(*found)
    assert whole > 0
    assert documents.padded_len() < 96  # lengths vary little: padding to the longest costs less


def test_too_few_documents_come_again(config: TrainBenchConfig) -> None:
    documents, _ = replace(config, rows=40).step
    assert len(documents.rows) == 40
    names = [document.id for document in all_of(documents)]
    assert len(set(names)) == NUMBER < len(names)


def test_a_larger_tokenizer_gives_the_model_more_words(
    config: TrainBenchConfig, tmp_path: Path
) -> None:
    tokenizer_of(config).save(tmp_path / "tokenizer.json")
    small = replace(
        config, override=(*MICRO, "text.vocab_size=64"), tokenizer=str(tmp_path / "tokenizer.json")
    )
    documents, model = small.step
    assert model.text.vocab_size > max(int(d.tokens.max()) for d in all_of(documents)) >= 64


@pytest.mark.parametrize("pictures", [0, 1])
def test_packed_against_padded_is_measured(
    config: TrainBenchConfig, pictures: int, uncompiled: None
) -> None:
    config = replace(config, pictures=pictures, only=("blocks", "padded"))
    config.check()
    ceilings = {"copy": 1e12, "bf16": 1e14, "int8": 1e14}
    quiet = Console(quiet=True)
    assert bench(config, CpuClock(), "bench train", quiet, lambda _: dict(ceilings)) == 0
    rows = [
        json.loads(line) for line in (Path(config.out) / "train.jsonl").read_text().splitlines()
    ]
    assert [row["key"] for row in rows] == ["blocks", "padded"]
    assert {row["status"] for row in rows} == {"ok"}, rows
    documents, _ = config.step
    assert {row["tokens"] for row in rows} == {documents.tokens}  # real ones, of either
    assert {row["pictures"] for row in rows} == {documents.shown}
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=2**-6)  # bf16
    page = (Path(config.out) / "train.md").read_text()
    count, longest = len(documents.lengths), max(documents.lengths)
    assert f"in {count} documents (mean " in page
    assert (
        f" to {longest}), 3 rows of 96 packed, {count} of {documents.padded_len()} padded (" in page
    )
    assert ("pictures of 16 px" in page) == (pictures > 0)


def test_bad_flags(config: TrainBenchConfig) -> None:
    for change, message in (
        ({"pictures": 2}, "--data has pictures of its own"),
        ({"lengths": 0.5}, "--data has lengths of its own"),
        ({"peers": True}, "--peers measures full rows: leave --data out"),
        ({"data": None}, "--image_root goes with --data"),
        ({"data": "shapes"}, "give --pictures 1"),
        ({"only": ("packd",)}, "--only packd: .*did you mean packing"),
    ):
        with pytest.raises(UsageError, match=message):
            replace(config, **change).check()
    with pytest.raises(UserError, match=r"absent\.json"):
        _ = replace(config, data="absent.json").step
    with pytest.raises(UserError, match="none of the records can be used"):
        _ = replace(config, length=2).step
