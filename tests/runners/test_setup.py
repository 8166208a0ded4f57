"""How a config becomes tokenizer, model, data and batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core import check_batch
from runners.data.encode.tokenizer import train_tokenizer
from runners.data.sources.open import open_sources
from runners.shell.errors import UserError
from runners.training.budget import check_memory, memory_of
from runners.training.config import TrainConfig, model_config
from runners.training.setup import choose_select, choose_workers, image_spec, prepare

Micro = Callable[..., TrainConfig]


def test_a_job_fits_together(micro: Micro) -> None:
    job = prepare(micro(val_batches=2))
    assert job.model.text.vocab_size % 64 == 0
    assert job.model.text.vocab_size >= job.data.tokenizer.vocab_size
    assert len(job.data.validation) == 2
    for batch in [*job.data.validation, next(iter(job.data.loader))]:
        check_batch(batch, job.model)
        assert batch["tokens"].shape == (2 * 96,)
    assert job.learns == {"text", "vision", "projector"}
    assert not Path(job.config.run.runs_dir).exists()


@pytest.mark.parametrize("val_batches", [2, 50])  # a part of the rows there are, all
def test_validation_does_not_depend_on_how_a_step_is_cut(
    micro: Micro, tmp_path: Path, val_batches: int
) -> None:
    sizes = np.random.default_rng(0).integers(1, 40, 900)
    texts = (f"text {i}: " + "a few words " * n for i, n in enumerate(sizes))
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    found = []
    for rows, times in ((8, 1), (4, 2), (2, 4), (1, 8)):
        job = prepare(
            micro(
                data=str(tmp_path / "text.txt"),
                documents="paragraph",
                val_fraction=0.2,
                val_batches=val_batches,
                device_batch_size=rows,
                grad_accum_steps=times,
            )
        )
        assert {len(batch["tokens"]) for batch in job.data.validation} == {rows * 96}
        kinds = ("tokens", "labels", "positions")
        whole = [torch.cat([batch[kind] for batch in job.data.validation]) for kind in kinds]
        used = whole[0].view(-1, 96).ne(job.data.pad).any(1)  # the last batch may have empty rows
        found.append([kind.view(-1, 96)[used] for kind in whole])
    assert len(found[0][0]) == 16 if val_batches == 2 else len(found[0][0]) > 30
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_validations_with_pictures_have_as_many_rows(micro: Micro) -> None:
    sizes = set()
    for rows, times in ((4, 1), (2, 2), (1, 4)):
        job = prepare(micro(val_batches=3, device_batch_size=rows, grad_accum_steps=times))
        sizes.add(sum(len(batch["tokens"]) for batch in job.data.validation))
    assert sizes == {3 * 4 * 96}


def test_batches_have_one_shape(micro: Micro) -> None:
    job = prepare(micro())
    batches = iter(job.data.loader)
    shapes = [{k: v.shape for k, v in next(batches).items()} for _ in range(5)]
    assert all(shape == shapes[0] for shape in shapes)


def test_batches_made_beside_the_training_are_the_same(micro: Micro) -> None:
    here, beside = (prepare(micro(val_batches=2, workers=workers)) for workers in (0, 1))
    try:
        assert len(beside.data.validation) == len(here.data.validation) == 2
        for one, other in zip(here.data.validation, beside.data.validation, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
        assert beside.data.validation is beside.data.validation
    finally:
        beside.data.loader.close()


def test_held_out_data_that_cannot_be_used_is_said_when_asked_for(
    micro: Micro, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no batch of ours")

    monkeypatch.setattr("runners.training.setup.check_batch", refuse)
    with pytest.raises(UserError, match="no batch of ours"):
        prepare(micro(workers=0))
    beside = prepare(micro(workers=1))
    try:
        with pytest.raises(UserError, match="no batch of ours"):
            _ = beside.data.validation
    finally:
        beside.data.loader.close()


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    records = []
    for i in range(40):
        Image.fromarray(np.full((20, 12, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": f"thing {i}"},
        ]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (tmp_path / "train.json").write_text(json.dumps(records))
    return tmp_path / "train.json"


def test_llava_files_are_parted_by_record(micro: Micro, llava: Path) -> None:
    config = micro(data=str(llava), val_fraction=0.3)
    sources = open_sources(config, model_config(config.model))
    train = {sources.train[i].id for i in range(len(sources.train))}
    val = {sources.held_out["val"][i].id for i in range(len(sources.held_out["val"]))}
    assert (len(train), len(val)) == (28, 12)
    assert not train & val
    assert sources.summary == (
        "Held out: 12 of 40 records, 12 pictures; 0 of 12 held-out answers occur in training; "
        "each is asked after the true turns before it"
    )
    for changes, how in (
        ({"turns": "single"}, "each is asked alone (--turns=single)"),
        ({"ask": "alone"}, "alone (--ask=alone), which is not how it is trained"),
    ):
        assert open_sources(config.changed(**changes), model_config(config.model)).summary.endswith(
            how
        )
    other_seed = open_sources(config.changed(seed=1), model_config(config.model)).held_out["val"]
    assert {other_seed[i].id for i in range(12)} == val
    everything = open_sources(micro(data=str(llava), val_fraction=0.0), model_config(config.model))
    assert len(everything.train) == 40
    assert not everything.held_out
    job = prepare(micro(data=str(llava), val_fraction=0.0))
    assert job.data.validation == []
    assert "patches" in next(iter(job.data.loader))


def test_files_of_their_own_are_held_out(micro: Micro, llava: Path, tmp_path: Path) -> None:
    records = json.loads(llava.read_text())
    for name, part in (("a.json", records[:3]), ("b.json", records[30:])):
        (tmp_path / name).write_text(json.dumps(part))
    (tmp_path / "train.json").write_text(json.dumps(records[:32]))
    files = tuple(str(tmp_path / name) for name in ("a.json", "b.json"))
    config = micro(data=str(llava), val_data=files)
    sources = open_sources(config, model_config(config.model))
    val = sources.held_out["val"]
    assert len(sources.train) == 32
    assert {val[i].id for i in range(len(val))} == {*map(str, (0, 1, 2)), *map(str, range(30, 40))}
    assert [val.turns(i) for i in range(13)] == [val[i].turns for i in range(13)]
    assert sources.summary == (
        f"Held out: {files[0]}, {files[1]}: 13 records (5 of them in --data too), 13 pictures "
        "(5 of them in --data too); 5 of 13 held-out answers occur in training; "
        "each is asked after the true turns before it"
    )
    assert len(prepare(config).data.validation) == 1
    text = tmp_path / "text.txt"
    text.write_text("one\n\ntwo\n\nthree")
    with pytest.raises(UserError, match=r"text\.txt: --data .* is conversations"):
        open_sources(config.changed(val_data=(str(text),)), model_config(config.model))
    words = micro(data=str(text), val_data=(str(text),), documents="paragraph")
    assert open_sources(words, model_config(words.model)).summary == (
        f"Held out: {text}: 3 documents (3 of them in --data too)"
    )


def test_pictures_for_a_model_without_eyes_are_refused(micro: Micro, llava: Path) -> None:
    with pytest.raises(UserError, match="no vision part"):
        prepare(micro(data=str(llava), override=("vision=none",)))


def test_text_comes_from_files_folders_and_globs(micro: Micro, tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"text number {i} " * 20)
    model = model_config(micro().model)
    sizes = []
    for data in (str(tmp_path), str(tmp_path / "*.txt"), str(tmp_path / "1?.txt")):
        sources = open_sources(micro(data=data, val_fraction=0.3), model)
        sizes.append(len(sources.train) + len(sources.held_out["val"]))
    assert sizes == [30, 30, 10]
    job = prepare(micro(data=str(tmp_path), val_fraction=0.3))
    assert "patches" not in next(iter(job.data.loader))
    assert job.learns == {"text"}


def test_vocabularies(micro: Micro, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = train_tokenizer(["colour shape count"], 270)
    tokenizer.save(path)
    job = prepare(micro(tokenizer=str(path)))
    assert job.data.tokenizer.vocab_size == tokenizer.vocab_size
    assert job.model.text.vocab_size == 512  # the preset's: it has room
    small = prepare(
        micro(tokenizer=str(path), override=(*micro().model.override, "text.vocab_size=64"))
    )
    assert small.model.text.vocab_size == 320
    own = prepare(micro(vocab_size=280))
    assert own.data.tokenizer.vocab_size <= 280
    assert own.model.text.vocab_size == 320


def test_what_learns(micro: Micro) -> None:
    model = model_config(micro().model)
    assert choose_select(micro(), model) is None
    assert choose_select(micro(stage="pretrain"), model) is None
    assert choose_select(micro(stage="align"), model) == ("projector",)
    assert choose_select(micro(stage="align", trainable=("vision",)), model) == ("vision",)
    assert choose_select(micro(data="x.txt"), model) == ("text",)
    blind = micro(override=("vision=none",), data="x.txt")
    assert choose_select(blind, model_config(blind.model)) is None
    with pytest.raises(UserError, match="--stage align"):
        choose_select(micro(stage="align", data="x.txt"), model)
    with pytest.raises(UserError, match="--stage align"):
        choose_select(micro(stage="align"), model_config(blind.model))


def test_image_specs_follow_the_model(micro: Micro) -> None:
    spec = image_spec(model_config(micro().model))
    assert spec is not None
    assert (spec.patch_size, spec.image_size, spec.tokens(4)) == (8, 16, 4)
    override = (*micro().model.override, "projector.kind=resampler", "projector.queries=3")
    spec = image_spec(model_config(micro(override=override).model))
    assert spec is not None
    assert spec.tokens(4) == 3
    assert image_spec(model_config(micro(override=("vision=none",)).model)) is None


def test_workers(micro: Micro) -> None:
    assert choose_workers(micro(workers=None).data, torch.device("cpu")) == 0
    assert 1 <= choose_workers(micro(workers=None).data, torch.device("cuda")) <= 8
    assert choose_workers(micro(workers=3).data, torch.device("cpu")) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"override": ("text.layers=10000",)}, "parameters (--preset, --override) take at least"),
        ({"override": ("vision.dim=1048576",)}, "parameters (--preset, --override) take at least"),
        ({"sequence_len": 2**29}, "536,870,912 tokens at once (--device_batch_size, --sequence_"),
        ({"device_batch_size": 2**30}, "more than can be counted in 32 bits"),
        ({"override": ("vision.image_size=16384",)}, "more than --sequence_len 96"),
        ({"preset": "text_8b", "data": "x.txt"}, "this machine has 4.0 GiB: choose a smaller run"),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_made(
    micro: Micro, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("runners.training.budget.memory_of", lambda device: 2**32)
    config = micro(**{"override": (), "device_batch_size": 1, **changes})
    with pytest.raises(UserError) as caught:
        prepare(config)
    assert said in str(caught.value)


def test_a_run_that_fits_is_let_through(micro: Micro) -> None:
    memory = memory_of(torch.device("cpu"))
    assert memory is not None
    assert 2**28 < memory < 2**50
    for preset in ("tiny", "mini", "small"):
        config = micro(preset=preset, override=())
        check_memory(config, model_config(config.model), torch.device("cpu"))


def test_imports_start_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest", "--nonsense"])
    for name in ("train", "eval", "generate"):
        importlib.import_module(f"runners.{name}")
    assert not list(tmp_path.iterdir())
