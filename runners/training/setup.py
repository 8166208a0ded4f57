"""From a config to everything that a run needs, validated, before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from core import Batch, Bounds, VLMConfig, check_batch
from params import flatten
from params.tree import Tree
from runners.data.encode.encoder import Encoder
from runners.data.encode.images import Augment, ImageSpec
from runners.data.encode.tokenizer import (
    ChatTokenizer,
    load_tokenizer,
    sample_texts,
    train_tokenizer,
)
from runners.data.feeding.loader import Loader
from runners.data.feeding.workers import check_workers, cores
from runners.data.packing.plan import PackSpec, plan_spec
from runners.data.sources import digests
from runners.data.sources.digests import TOKENIZER
from runners.data.sources.open import Sources, open_sources
from runners.data.types import BadRecordError, Document, Source, spread
from runners.shell.cli import explained
from runners.shell.errors import UserError
from runners.shell.kernel_cache import keep_compiled
from runners.training.budget import check_memory
from runners.training.checkpoints import Run, open_run
from runners.training.compose import Composed, choose_device, choose_select, compose
from runners.training.config import TrainConfig, model_config
from runners.training.settings import DataSettings
from runners.training.states import State, run_folder
from runners.training.weights import build_params
from transforms import trainable

SAMPLE = 256  # documents looked at to size the batches


@dataclass(frozen=True)
class Job:
    """A run that can start."""

    config: TrainConfig
    model: VLMConfig
    device: torch.device
    composed: Composed
    sources: Sources
    tokenizer: ChatTokenizer
    encoder: Encoder
    spec: PackSpec
    loader: Loader
    held_out: Callable[[], list[Batch]]
    params: Tree
    state: State | None  # to resume from
    select: tuple[str, ...] | None  # path patterns of what learns; None: everything
    learns: frozenset[str]  # which of text, vision and projector do

    @property
    def validation(self) -> list[Batch]:
        """The batches that measure training, the same ones each time; none if nothing is held out.
        Raises UserError for data that cannot be used, where they are made beside the training."""
        return self.held_out()

    @property
    def pad(self) -> int:
        return self.tokenizer.pad


def prepare(config: TrainConfig, state_path: Path | None = None) -> Job:
    """Opens the data, builds tokenizer, model, loader, params. Raises UserError; writes nothing."""
    device = choose_device(config.run)
    keep_compiled(device)
    with ExitStack() as unfinished:
        job = _prepare(config, state_path, device, unfinished)
        unfinished.pop_all()
    return job


def _prepare(
    config: TrainConfig, state_path: Path | None, device: torch.device, unfinished: ExitStack
) -> Job:
    """unfinished: closes what was begun, if the rest fails."""
    workers = choose_workers(config.data, device)  # first: the wrong number costs no time
    shape = model_config(config.model)
    check_memory(
        config,
        shape,
        device,
        everything=not config.model.trainable and config.model.stage != "align",
    )
    sources = open_sources(config, shape)
    if state_path is not None:
        digests.check(run_folder(state_path), sources.digests, allowed=config.data.data_changed)
    elif config.run.config is not None:  # a run of its own, which may be meant to be of other data
        again = Path(config.run.config)
        folder = again if again.is_dir() else again.parent
        if (folder / digests.DATA).is_file():
            digests.check(folder, sources.digests, allowed=True)
    tokenizer, model = choose_vocabulary(config, sources, state_path)
    # adapters alone learn where there are any: the patterns choose where they are
    select = None if config.model.lora_rank else choose_select(config, model)
    encoder = build_encoder(config.data, model, tokenizer, training=True)
    sample = list(sample_documents(sources.train, encoder, SAMPLE))
    spec = plan(encoder, sample, config.data.device_batch_size, model)
    loader = Loader(
        sources.train, encoder, spec,
        seed=config.run.seed, shuffle=not sources.ordered, augment=config.data.augment,
        workers=workers, data=digests.together("--data", sources.digests),
    )  # fmt: skip
    unfinished.callback(loader.close)
    if state_path is None:
        loader.start()
    composed = compose(config, model, device, bounds_of(spec))
    params, state = build_params(config, model, device, state_path)
    with explained("--trainable"):
        learning = flatten(trainable(params, select)[0])
    held_out = begin_validation(config, model, encoder, spec, sources, workers)
    if state is not None:
        if loader.same_data(state.loader):  # else its place in the data means nothing
            loader.load_state_dict(state.loader)
        loader.start()
    return Job(
        config, model, device, composed, sources, tokenizer, encoder, spec, loader, held_out,
        params, state, select, frozenset(path.partition(".")[0] for path in learning),
    )  # fmt: skip


def choose_vocabulary(
    config: TrainConfig, sources: Sources, state_path: Path | None
) -> tuple[ChatTokenizer, VLMConfig]:
    """The tokenizer and the model that has a row for each of its tokens.

    A run that is continued, or begun from another's weights, keeps that one's. A tokenizer that is
    given is matched by the preset, or by more rows where the preset has too few. Otherwise one is
    trained on the data, and the model gets as many rows as it has tokens, up to a multiple of 64
    (so that matmuls with the embedding have a shape the hardware likes).
    """
    model = model_config(config.model)
    if state_path is not None:
        run = open_run(run_folder(state_path))
        return run_tokenizer(run), run.model
    if (
        config.model.tokenizer is None
        and config.model.init_from
        and (run_folder(Path(config.model.init_from)) / TOKENIZER).exists()
    ):
        run = open_run(run_folder(Path(config.model.init_from)))
        return run_tokenizer(run), _with_vocab(model, run.model.text.vocab_size)
    if config.model.tokenizer is not None:
        tokenizer = load_tokenizer(config.model.tokenizer)
        needed = _up_to_64(tokenizer.vocab_size)
        return tokenizer, _with_vocab(model, max(needed, model.text.vocab_size))
    size = config.model.vocab_size or model.text.vocab_size
    tokenizer = train_tokenizer(sample_texts(sources.train), size)
    return tokenizer, _with_vocab(model, _up_to_64(tokenizer.vocab_size))


def run_tokenizer(run: Run) -> ChatTokenizer:
    """The tokenizer that a run was trained with. Raises UserError where it cannot be."""
    tokenizer = load_tokenizer(run.tokenizer, complete=True)
    try:
        tokenizer.check_vocabulary(run.model.text.vocab_size)
    except UserError as error:
        raise UserError(f"{run.tokenizer}: {error}") from error
    return tokenizer


def image_spec(model: VLMConfig) -> ImageSpec | None:
    """How the model takes pictures, or None if it does not."""
    vision, projector = model.vision, model.projector
    if vision is None or projector is None:
        return None
    resampler = projector.kind == "resampler"
    return ImageSpec(
        vision.patch_size, vision.image_size, vision.merge,
        projector=projector.kind, queries=projector.queries if resampler else 0,
    )  # fmt: skip


def build_encoder(
    config: DataSettings, model: VLMConfig, tokenizer: ChatTokenizer, *, training: bool = False
) -> Encoder:
    """From conversations to documents of at most a row. Only training pictures are changed."""
    images = image_spec(model) if config.chat else None
    augment = Augment(flip=0.5, crop=0.15, colour=0.15) if config.augment and training else None
    return Encoder(tokenizer, images, max_tokens=config.sequence_len, augment=augment)


def plan(encoder: Encoder, documents: Sequence[Document], rows: int, model: VLMConfig) -> PackSpec:
    """The static shapes of batches of so many rows, sized on a sample of documents."""
    if not documents:
        raise UserError("none of the records can be used: check the data and --sequence_len")
    spec = plan_spec(
        documents,
        row_len=encoder.max_tokens,
        rows=rows,
        images=encoder.images,
        pad_token=encoder.tokenizer.pad,
        vocab_size=model.text.vocab_size,
    )
    return whole_pictures(spec)


def whole_pictures(spec: PackSpec) -> PackSpec:
    """The spec with room for as many patches as its pictures have, where all are of one size."""
    if spec.images is None or spec.images.fit != "square":
        return spec
    # All pictures are of one size: then no run of unused patches is longer than a picture either.
    each = spec.images.square_patches
    return dataclasses.replace(
        spec, max_patches=spec.max_images * each, kept_patches=spec.kept_images * each
    )


def bounds_of(spec: PackSpec) -> Bounds:
    """What the model may rely on: how long documents and pictures get."""
    images = spec.images
    if images is None or images.fit != "square":
        return Bounds(spec.row_len)
    picture = images.square_patches
    return Bounds(spec.row_len, picture, equal_pictures=spec.max_patches % picture == 0)


def sample_documents(source: Source, encoder: Encoder, limit: int) -> Iterable[Document]:
    """Documents of up to ``limit`` items spread evenly over a source; bad records are passed over
    (the loader counts them)."""
    for index in spread(len(source), limit):
        try:
            yield from encoder(source[index])
        except BadRecordError:
            continue


def begin_validation(
    config: TrainConfig,
    model: VLMConfig,
    encoder: Encoder,
    spec: PackSpec,
    sources: Sources,
    workers: int,
) -> Callable[[], list[Batch]]:
    """What gives the first rows of the held-out data, the same ones each time, in batches.

    They are as many as ``val_batches`` whole steps have, however a step is cut into batches, and so
    is what lies in them if it is text: rows are filled one after the other. Pictures share the room
    of a batch, whose rows then may hold other documents where batches are cut otherwise: the first
    of the same stream, about as many.

    With workers they are made beside the first steps, which need none: of vlm_1.5b on shapes 1.7 of
    2.8 s of preparing (a slow core).
    """
    source = sources.held_out.get("val")
    if source is None:
        return list
    few = min(workers, 2)
    loader = Loader(source, encoder, spec, repeat=False, shuffle=False, workers=few)

    def build() -> list[Batch]:
        try:
            batches = list(islice(loader, config.run.val_batches * config.optim.grad_accum_steps))
        finally:
            loader.close()
        for batch in batches[:1]:
            with explained(config.data.data):
                check_batch(batch, model)
        return batches

    if not few:
        batches = build()
        return lambda: batches
    pool = ThreadPoolExecutor(1, "validation")
    made = pool.submit(build)
    pool.shutdown(wait=False)  # it takes no more
    return made.result


def choose_workers(config: DataSettings, device: torch.device) -> int:
    """As told; else up to 12 beside a GPU, and none beside a CPU that computes with every core."""
    if config.workers is not None:
        check_workers(config.workers)
        return config.workers
    return min(12, max(1, cores() - 2)) if device.type == "cuda" else 0


def _with_vocab(model: VLMConfig, size: int) -> VLMConfig:
    return dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=size))


def _up_to_64(size: int) -> int:
    return -(-size // 64) * 64
