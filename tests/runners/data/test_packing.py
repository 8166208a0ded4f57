from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from runners.data.encode.encoder import Encoder
from runners.data.encode.images import ImageSpec
from runners.data.packing.collate import batch_documents, collate
from runners.data.packing.plan import Budget, PackSpec, choose_row, plan_spec
from runners.data.sources.shapes import Shapes
from runners.data.types import Cost, Document
from runners.shell.errors import UserError
from runners.training.setup import whole_pictures

CELLS = ImageSpec(patch_size=2, image_size=8, merge=2)
QUERIES = ImageSpec(patch_size=2, image_size=8, merge=2, projector="resampler", queries=3)


def document(number: int, length: int, pictures: int = 0, images: ImageSpec = CELLS) -> Document:
    """Tokens, patches and positions carry the number; pictures have 1, 2, 3, 1, ... cells."""
    counts = tuple(4 * (1 + i % 3) for i in range(pictures))
    num_slots = sum(images.tokens(count) for count in counts)
    assert num_slots <= length
    return Document(
        id=f"d{number}",
        tokens=np.full(length, number, np.int64),
        labels=np.full(length, number, np.int64),
        slots=np.arange(length - num_slots, length),
        patches=np.full((sum(counts), 12), number % 256, np.uint8),
        patch_positions=np.full((sum(counts), 2), number, np.int64),
        patch_counts=counts,
    )


def test_rows_are_as_full_as_any_choice_makes_them():
    rng = random.Random(0)
    spec = PackSpec(row_len=50, rows=1, max_docs=99)
    for _ in range(200):
        costs = [Cost(rng.randint(1, 40), 0, 0) for _ in range(rng.randint(1, 9))]
        chosen = choose_row(costs, spec.budget(()))
        assert chosen == sorted(set(chosen))
        assert chosen[0] == 0
        rest = range(1, len(costs))
        sums = [
            costs[0].tokens + sum(costs[i].tokens for i in others)
            for k in range(len(costs))
            for others in itertools.combinations(rest, k)
        ]
        assert sum(costs[i].tokens for i in chosen) == max(s for s in sums if s <= 50)


def test_the_oldest_are_preferred_among_equals():
    budget = PackSpec(row_len=10, rows=1, max_docs=9).budget(())
    assert choose_row([Cost(n, 0, 0) for n in (4, 3, 3, 6, 3)], budget) == [0, 1, 2]
    assert choose_row([Cost(n, 0, 0) for n in (4, 5, 6, 6)], budget) == [0, 2]
    assert choose_row([Cost(10, 0, 0), Cost(1, 0, 0)], budget) == [0]


def test_budgets_of_documents_and_pictures_hold():
    rng = random.Random(1)
    spec = PackSpec(row_len=60, rows=1, max_docs=4, max_images=3, max_patches=24, images=CELLS)
    for _ in range(200):
        costs = [
            Cost(rng.randint(1, 30), images := rng.randint(0, 2), 8 * images) for _ in range(20)
        ]
        chosen = choose_row(costs, spec.budget(()))
        assert chosen[0] == 0
        assert len(chosen) <= 4
        for field, limit in ((0, 60), (1, 3), (2, 24)):
            assert sum(costs[i][field] for i in chosen) <= limit


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_ragged_lengths_fill_rows(sigma: float):
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(0, sigma, 1500))
    lengths = (lengths / lengths.mean() * 300).clip(8, 2048).astype(int)
    waiting = [Cost(int(length), 0, 0) for length in lengths]
    spec = PackSpec(row_len=2048, rows=1, max_docs=999)
    rows = []
    while len(waiting) > 256:
        chosen = choose_row(waiting[:256], spec.budget(()))
        rows.append(sum(waiting[i].tokens for i in chosen))
        for i in reversed(chosen):
            del waiting[i]
    assert sum(rows) / len(rows) / 2048 > 0.99


def test_planned_budgets_are_tight_and_fill_shapes_rows(encoder: Encoder, images: ImageSpec):
    source = Shapes(size=32, kinds=("colour", "shape", "count", "where"))
    documents = [encoder(source[i])[0] for i in range(600)]
    spec = plan_spec(documents, row_len=2048, rows=2, images=images)
    batches, _ = batch_documents(documents, spec)
    learnt = [int((batch["cu_seqlens"] < 4096).sum()) for batch in batches[:-1]]
    assert min(learnt) > 0.85 * spec.max_docs * 2
    for batch in batches[:-1]:
        padding = sum(
            int(length)
            for start, length in zip(
                batch["cu_seqlens"][:-1], batch["cu_seqlens"].diff(), strict=True
            )
            if length and batch["tokens"][start] == spec.pad_token
        )
        assert padding <= 0.03 * 4096
    assert all(spec.fits(document.cost) for document in documents)
    with pytest.raises(ValueError, match="at least one document"):
        plan_spec([], row_len=8, rows=1)


@pytest.mark.parametrize("images", [CELLS, QUERIES])
def test_a_batch_holds_each_document_where_it_says(images: ImageSpec):
    spec = PackSpec(
        row_len=40,
        rows=3,
        max_docs=6,
        max_images=12,
        max_patches=120,
        images=images,
        pad_token=999,
        kept_images=2,
        kept_patches=24,
    )
    rng = random.Random(2)
    documents = [document(n, rng.randint(12, 30), rng.randint(0, 2), images) for n in range(1, 26)]
    batches, places = batch_documents(documents, spec)
    assert len(places) == len(documents)
    for batch in batches:
        assert batch["tokens"].shape == batch["labels"].shape == batch["positions"].shape == (120,)
        cu_seqlens = batch["cu_seqlens"]
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.shape == (3 * 7 + 1,)
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == 120
        assert (cu_seqlens.diff() >= 0).all()
        assert {40, 80} <= set(cu_seqlens.tolist())  # no document crosses a row
        for start, end in itertools.pairwise(cu_seqlens.tolist()):
            assert batch["positions"][start:end].tolist() == list(range(end - start))
            assert len(set(batch["tokens"][start:end].tolist())) <= 1
        padding = batch["tokens"] == 999
        assert (batch["labels"][padding] == -100).all()
        num_images = 12 + 1
        assert batch["patches"].shape == (120, 12)
        assert batch["patches"].dtype == torch.uint8
        assert batch["image_cu_seqlens"].shape == (num_images + 1,)
        assert batch["image_cu_seqlens"][-1] == 120
        slots = batch["image_slots"]
        assert slots.shape == ((3 * num_images,) if images is QUERIES else (30,))
        for k in torch.nonzero(slots < 120).flatten().tolist():
            patch = int(batch["image_cu_seqlens"][k // 3]) if images is QUERIES else 4 * k
            # The token and the picture it shows belong to the same document.
            assert batch["tokens"][slots[k]] == batch["patches"][patch, 0]
            assert batch["tokens"][slots[k]] == batch["patch_positions"][patch, 0]
    for doc, place in zip(documents, places, strict=True):
        batch = batches[place.batch]
        inside = slice(place.start, place.start + place.length)
        assert place.length == len(doc.tokens)
        assert np.array_equal(batch["tokens"][inside].numpy(), doc.tokens)
        assert np.array_equal(batch["labels"][inside].numpy(), doc.labels)
        assert {place.start, place.start + place.length} <= set(batch["cu_seqlens"].tolist())
        held = (batch["image_slots"] >= inside.start) & (batch["image_slots"] < inside.stop)
        assert (batch["image_slots"][held] - place.start).tolist() == doc.slots.tolist()
    total = sum(int((batch["tokens"] != 999).sum()) for batch in batches)
    assert total == sum(len(doc.tokens) for doc in documents)  # once each


def test_text_alone_has_no_image_fields():
    spec = PackSpec(row_len=8, rows=1, max_docs=2)
    (batch,), places = batch_documents([document(1, 3), document(2, 5)], spec)
    assert set(batch) == {"tokens", "labels", "positions", "cu_seqlens"}
    assert batch["cu_seqlens"].tolist() == [0, 3, 8, 8]
    assert [tuple(place) for place in places] == [(0, 0, 3), (0, 3, 5)]
    assert batch_documents([], spec) == ([], [])


def test_what_does_not_fit_raises():
    spec = PackSpec(row_len=8, rows=1, max_docs=1, vocab_size=5)
    with pytest.raises(ValueError, match=r"'d1'.*does not fit"):
        batch_documents([document(1, 9)], spec)
    with pytest.raises(ValueError, match="over the budget"):
        collate([[document(1, 2), document(2, 2)]], spec)
    with pytest.raises(ValueError, match="2 rows do not fit"):
        collate([[], []], spec)
    with pytest.raises(UserError, match="'d5' has token 5, outside the model's vocabulary of 5"):
        collate([[document(5, 2)]], spec)
    with pytest.raises(ValueError, match="pad_token 7"):
        collate([[document(1, 2)]], PackSpec(8, 1, 1, pad_token=7, vocab_size=5))
    few = PackSpec(row_len=40, rows=1, max_docs=1, max_images=1, max_patches=8, images=CELLS)
    with pytest.raises(ValueError, match="2 pictures of 12 patches"):
        collate([[document(1, 30, pictures=2)]], few)


def test_impossible_specs_are_refused():
    with pytest.raises(ValueError, match="rows must be at least 1"):
        PackSpec(8, 0, 1)
    with pytest.raises(ValueError, match="go together"):
        PackSpec(8, 1, 1, max_images=1)
    with pytest.raises(ValueError, match=r"max_patches \(6\)"):
        PackSpec(8, 1, 1, max_images=1, max_patches=6, images=CELLS)
    with pytest.raises(ValueError, match="3 rows keep 2 pictures and 4 patches each, of 5 and 16"):
        PackSpec(8, 4, 1, 5, 16, CELLS, kept_images=2, kept_patches=4)


@pytest.mark.parametrize("pictures", [0, 1, 5, 8])
def test_pictures_of_a_batch_are_equal_where_all_are_square(pictures: int):
    spec = PackSpec(
        row_len=40, rows=2, max_docs=8, max_images=8, max_patches=128, images=CELLS, pad_token=0
    )
    documents = [
        Document(
            id=f"d{n}",
            tokens=np.full(10, n, np.int64),
            labels=np.full(10, n, np.int64),
            slots=np.arange(4),
            patches=np.full((16, 12), n, np.uint8),  # 8 x 8 pixels in patches of 2 x 2
            patch_positions=np.full((16, 2), n, np.int64),
            patch_counts=(16,),
        )
        for n in range(1, pictures + 1)
    ]
    batches, _ = batch_documents([*documents, document(99, 5)], spec)
    for batch in batches:
        assert batch["image_cu_seqlens"][-1] == 128
        assert set(batch["image_cu_seqlens"].diff().tolist()) == {0, 16}


def test_rows_share_the_room_of_a_batch_and_none_is_left_without():
    """A document of more pictures than a row's share waits for the first row at most."""
    spec = PackSpec(60, 3, 9, 7, 56, CELLS, kept_images=2, kept_patches=16)
    large, small, text = Cost(30, 3, 24), Cost(20, 1, 8), Cost(10, 0, 0)
    assert spec.budget(()) == (60, 9, 3, 24)
    assert spec.fits(large)
    assert not spec.fits(Cost(30, 4, 24))
    first = [document(1, 30, pictures=1), document(2, 30, pictures=1)]  # a cell each
    assert spec.budget([first]) == (60, 9, 3, 56 - 8 - 16)
    assert spec.budget([first, first]) == (60, 9, 3, 56 - 16)
    assert choose_row([large, small, text], Budget(60, 9, 2, 24)) == [1, 2]
    assert choose_row([large, large], Budget(60, 9, 2, 24)) == []


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("sigma", [0.0, 0.7])
def test_planned_room_is_nearly_full_and_so_are_rows(sigma: float, rows: int):
    """Pictures of 256 tokens and as much text."""
    images = ImageSpec(patch_size=14, image_size=448, merge=2)
    rng = np.random.default_rng(0)
    texts = (256 * np.exp(sigma * rng.normal(size=3000) - sigma**2 / 2)).clip(1, 1792).astype(int)
    documents = [
        Document(
            "",
            np.zeros(256 + text, np.int64),
            np.zeros(0),
            np.zeros(0),
            np.zeros((1024, 0), np.uint8),
            np.zeros(0),
            (1024,),
        )
        for text in texts
    ]
    spec = plan_spec(documents[:256], row_len=2048, rows=rows, images=images)
    spec = whole_pictures(spec)
    assert spec.max_patches == 1024 * spec.max_images
    waiting, tokens, pictures, batches = list(documents), 0, 0, 0
    while len(waiting) > 256:
        batch: list[list[Document]] = []
        for _ in range(rows):
            chosen = choose_row([d.cost for d in waiting[:256]], spec.budget(batch))
            batch.append([waiting[i] for i in chosen])
            for i in reversed(chosen):
                del waiting[i]
        batches += 1
        tokens += sum(len(d.tokens) for row in batch for d in row)
        pictures += sum(map(len, batch))
    assert len(waiting) + pictures == len(documents)  # once each
    assert tokens / (2048 * rows * batches) > 0.99
    assert pictures / (spec.max_images * batches) > (0.95 if rows == 8 else 0.79)
