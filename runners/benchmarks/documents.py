"""The documents of a measured step: drawn at random, or those of a file; packed and padded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import torch

from core import Batch, Bounds, VLMConfig, make_batch
from runners.benchmarks.pictures import MARK, Pictures
from runners.data.encode.images import ImageSpec
from runners.data.packing.collate import collate
from runners.data.packing.plan import WINDOW, PackSpec, choose_row, plan_spec
from runners.data.sources.open import open_sources
from runners.data.types import (
    NO_LABEL,
    Conversation,
    Document,
    Source,
    Turn,
    without_pictures,
)
from runners.training.config import TrainConfig
from runners.training.flops import Load
from runners.training.setup import (
    SAMPLE,
    bounds_of,
    build_encoder,
    choose_vocabulary,
    plan,
    sample_documents,
    whole_pictures,
)

PAD = 0  # the token that fills rows of drawn documents up; they have none of it
MULTIPLE = 8  # padded rows are as long as the longest document, up to a multiple of this


@dataclass(frozen=True)
class Documents:
    """The documents of a step by their lengths, in the rows where they lie when packed.

    pictures: what each begins with, its tokens counted in the lengths, when they are drawn; given:
    the documents themselves, when they are not, row by row; spec: what packed rows then have room
    for, with pictures or given documents.
    """

    rows: tuple[tuple[int, ...], ...]
    row_len: int
    pictures: Pictures | None = None
    spec: PackSpec | None = None
    given: tuple[tuple[Document, ...], ...] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(length for row in self.rows for length in row)

    @property
    def tokens(self) -> int:
        """Real ones: padding is none."""
        return sum(self.lengths)

    @property
    def full(self) -> bool:
        """Every document is drawn text and fills a row."""
        return self.spec is None and all(row == (self.row_len,) for row in self.rows)

    @property
    def images(self) -> ImageSpec | None:
        """How the model takes the pictures, if it does."""
        return None if self.spec is None else self.spec.images

    @property
    def patches(self) -> tuple[int, ...]:
        """Of each picture of the step."""
        if self.given is not None:
            return tuple(count for row in self.given for d in row for count in d.patch_counts)
        if self.pictures is None:
            return ()
        each = self.pictures.images.square_patches
        return (each,) * (len(self.lengths) * self.pictures.count)

    @property
    def load(self) -> Load:
        return Load(torch.tensor(self.lengths), torch.tensor(self.patches, dtype=torch.int64))

    @property
    def shown(self) -> int:
        """Pictures of the step."""
        return len(self.patches)

    def padded_len(self) -> int:
        """Of a row when each has one document: the longest, rounded up."""
        return min(self.row_len, -(-max(self.lengths) // MULTIPLE) * MULTIPLE)

    def rows_at_once(self, packed: int, is_packed: bool) -> int:
        """Rows of a device batch, where it has ``packed`` packed ones: of padded rows, which are
        shorter, as many as take no more tokens, shared evenly among batches. With few short rows a
        GPU would wait for launches instead of computing the padding. One row stays one row."""
        if is_packed or packed == 1:
            return packed
        count = len(self.lengths)
        most = max(packed, packed * self.row_len // self.padded_len())
        return -(-count // -(-count // most))


def draw_documents(
    rows: int, row_len: int, sigma: float, seed: int = 0, pictures: Pictures | None = None
) -> Documents:
    """Documents for ``rows`` rows. sigma 0: each fills a row; else their lengths are log-normal of
    mean a quarter of a row and this sigma (of the logarithm), at most a row. With pictures it is
    the text behind them whose length is drawn, in the mean as many tokens as the pictures take, and
    rows have room for as many pictures as the trainer would plan for such documents."""
    if sigma == 0 and pictures is None:
        return Documents(((row_len,),) * rows, row_len)
    if pictures is None:
        bare, spec = _bare, PackSpec(row_len, rows, max_docs=row_len)
        stream = _lengths(row_len / 4, 2, row_len, sigma, seed)
    else:
        bare, shown = pictures.bare, pictures.tokens
        texts = partial(_lengths, shown, 1, row_len - shown, sigma, seed)
        stream = (shown + length for length in texts())
        sample = [bare(shown + length) for length in islice(texts(), WINDOW)]
        spec = whole_pictures(
            plan_spec(sample, row_len=row_len, rows=rows, images=pictures.images, pad_token=PAD)
        )
    packed = pack((bare(length) for length in stream), spec)
    return Documents(lengths_of(packed), row_len, pictures, None if pictures is None else spec)


def pack(stream: Iterator[Document], spec: PackSpec) -> list[list[Document]]:
    """The rows of a batch, packed as the loader packs: from a window of waiting documents."""
    waiting = list(islice(stream, WINDOW))
    rows: list[list[Document]] = []
    for _ in range(spec.rows):
        chosen = choose_row([document.cost for document in waiting], spec.budget(rows))
        rows.append([waiting[i] for i in chosen])
        for i in reversed(chosen):
            del waiting[i]
        waiting += islice(stream, WINDOW - len(waiting))
    return rows


def lengths_of(rows: Sequence[Sequence[Document]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(len(document.tokens) for document in row) for row in rows)


def _lengths(mean: float, least: int, most: int, sigma: float, seed: int) -> Iterator[int]:
    generator = np.random.default_rng(seed)
    middle = math.log(mean) - sigma**2 / 2  # so that it is the mean
    while True:
        yield min(most, max(least, round(generator.lognormal(middle, sigma))))


def _bare(length: int) -> Document:
    return document_of(np.zeros(length, np.int64))


def document_of(tokens: np.ndarray) -> Document:
    """Text to learn whole."""
    labels = np.append(tokens[1:], NO_LABEL)
    nothing = np.zeros(0, np.int64)
    return Document(
        "", tokens, labels, nothing, np.zeros((0, 0), np.uint8), np.zeros((0, 2), np.int64)
    )


def batches_of(
    documents: Documents, vocab: int, at_once: int, packed: bool, seed: int = 0
) -> tuple[list[Batch], Bounds]:
    """The step's batches of ``at_once`` rows, on the CPU, and what the model may rely on. The same
    tokens and pictures (random ones unless given), packed or padded: one document a row, filled up
    to the longest of the step."""
    generator = np.random.default_rng(seed)
    if documents.full:
        size = (len(documents.rows), documents.row_len)
        tokens = torch.from_numpy(generator.integers(1, vocab, size))
        return [make_batch(some) for some in tokens.split(at_once)], Bounds(documents.row_len)
    pictures = documents.pictures

    def drawn(length: int) -> Document:
        if pictures is None:
            return document_of(generator.integers(1, vocab, length))
        return pictures.document(
            generator.integers(MARK + 1, vocab, length - pictures.tokens), generator
        )

    rows: list[list[Document]]
    if documents.given is not None:
        rows = [list(row) for row in documents.given]
    else:
        rows = [[drawn(length) for length in row] for row in documents.rows]
    length = documents.row_len
    if not packed:
        rows, length = [[document] for row in rows for document in row], documents.padded_len()
    planned, images = documents.spec, documents.images
    pad = PAD if planned is None else planned.pad_token
    spec = PackSpec(length, at_once, max_docs=max(map(len, rows)), pad_token=pad)
    some = [rows[i : i + at_once] for i in range(0, len(rows), at_once)]
    if planned is not None and images is not None:
        most = max(sum(document.cost.images for row in group for document in row) for group in some)
        room = planned.max_images if packed and len(some) == 1 else max(1, most)
        spec = whole_pictures(
            replace(spec, images=images, max_images=room, max_patches=images.merge**2)
        )
    return [collate(group, spec) for group in some], bounds_of(spec)


# -- documents of a file --------------------------------------------------------------------------


@dataclass(frozen=True)
class WithoutPictures:
    """A source's words alone."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Conversation:
        return Conversation(str(index), self.turns(index))  # no picture is decoded for it

    def turns(self, index: int) -> tuple[Turn, ...]:
        return _unmarked(self.source.turns(index))


def _unmarked(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    return tuple(
        turn._replace(text=without_pictures(turn.text).strip()) if turn.role == "user" else turn
        for turn in turns
    )


def read_documents(config: TrainConfig, model: VLMConfig, rows: int) -> tuple[Documents, VLMConfig]:
    """Documents of ``--data`` for ``rows`` rows, encoded and packed as training does, from all
    over the data (again from the start where there are too few), and the model: with more words
    where the tokenizer has more. A model without a vision tower is given the words of records with
    pictures. Raises UserError where the data cannot be read or used."""
    sources = open_sources(config, model)
    tokenizer, fitted = choose_vocabulary(config.model, sources, None)
    if fitted.text.vocab_size > model.text.vocab_size:
        model = fitted  # a preset's unused words stay: their rows of the head cost time
    source = sources.train if model.vision is not None else WithoutPictures(sources.train)
    encoder = build_encoder(config.data, model, tokenizer)
    sample = list(sample_documents(source, encoder, SAMPLE))
    spec = plan(encoder, sample, rows, model)
    mean = sum(len(document.tokens) for document in sample) / len(sample)
    needed = 2 * math.ceil(rows * config.data.sequence_len / mean) + WINDOW

    def stream() -> Iterator[Document]:
        while True:
            for document in sample_documents(source, encoder, needed):
                if spec.fits(document.cost):
                    yield document

    packed = pack(stream(), spec)
    given = tuple(map(tuple, packed))
    return Documents(lengths_of(packed), config.data.sequence_len, spec=spec, given=given), model
