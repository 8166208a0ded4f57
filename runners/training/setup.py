"""From a config to everything that a run needs, validated before anything is written."""

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
from runners.training.settings import DataSettings, ModelSettings
from runners.training.states import TrainState, run_folder
from runners.training.weights import build_params
from transforms import trainable

SAMPLE = 256  # documents from which the size of batches is estimated


@dataclass(frozen=True)
class RunData:
    """The data of a run, and how it becomes batches."""

    sources: Sources
    tokenizer: ChatTokenizer
    encoder: Encoder
    spec: PackSpec
    loader: Loader
    held_out: Callable[[], list[Batch]]

    @property
    def validation(self) -> list[Batch]:
        """The validation batches, always the same; empty if nothing is held out. Raises UserError
        for unusable data if worker processes made them."""
        return self.held_out()

    @property
    def pad(self) -> int:
        return self.tokenizer.pad


@dataclass(frozen=True)
class Job:
    """A run that can start."""

    config: TrainConfig
    model: VLMConfig
    device: torch.device
    composed: Composed
    data: RunData
    params: Tree
    state: TrainState | None  # to resume from
    select: tuple[str, ...] | None  # path patterns of the trained params; None: all
    learns: frozenset[str]  # the parts that are trained, of text, vision and projector


def prepare(config: TrainConfig, state_path: Path | None = None) -> Job:
    """Opens the data and builds tokenizer, model, loader and params. Writes nothing.

    state_path: the state to resume from. Raises UserError.
    """
    device = choose_device(config.run)
    keep_compiled(device)
    workers = choose_workers(config.data, device)  # first, so that a wrong number costs no time
    shape = model_config(config.model)
    check_memory(config, shape, device)
    sources = open_sources(config, shape)
    if state_path is not None:
        digests.check(run_folder(state_path), sources.digests, allowed=config.data.data_changed)
    elif config.run.config is not None:  # a new run, whose data may differ on purpose
        again = Path(config.run.config)
        folder = again if again.is_dir() else again.parent
        if (folder / digests.DATA).is_file():
            digests.check(folder, sources.digests, allowed=True)
    tokenizer, model = choose_vocabulary(config.model, sources, state_path)
    # with --lora_rank the patterns say where adapters stand, and only adapters are trained
    select = None if config.model.lora_rank else choose_select(config, model)
    encoder = build_encoder(config.data, model, tokenizer, training=True)
    sample = list(sample_documents(sources.train, encoder, SAMPLE))
    spec = plan(encoder, sample, config.data.device_batch_size, model)
    loader = Loader(
        sources.train,
        encoder,
        spec,
        seed=config.run.seed,
        shuffle=not sources.ordered,
        augment=config.data.augment,
        workers=workers,
        data=digests.together("--data", sources.digests),
    )
    with ExitStack() as on_error:
        on_error.callback(loader.close)
        if state_path is None:
            loader.start()
        composed = compose(config, model, device, bounds_of(spec))
        params, state = build_params(config, model, device, state_path)
        with explained("--trainable"):
            learning = flatten(trainable(params, select)[0])
        held_out = begin_validation(config, model, encoder, spec, sources, workers)
        if state is not None:
            if loader.same_data(state.loader):  # otherwise its position means nothing
                loader.load_state_dict(state.loader)
            loader.start()
        on_error.pop_all()
    data = RunData(sources, tokenizer, encoder, spec, loader, held_out)
    learns = frozenset(path.partition(".")[0] for path in learning)
    return Job(config, model, device, composed, data, params, state, select, learns)


def choose_vocabulary(
    config: ModelSettings, sources: Sources, state_path: Path | None
) -> tuple[ChatTokenizer, VLMConfig]:
    """The tokenizer, and the model with an embedding row for each of its tokens.

    A resumed run keeps its tokenizer. ``--tokenizer`` adds rows if the preset has too few. A run
    that starts from another's weights keeps that run's tokenizer. Otherwise a tokenizer is trained
    on the data, and the vocabulary is rounded up to a multiple of 64 for faster products.
    """
    model = model_config(config)
    if state_path is not None:
        run = open_run(run_folder(state_path))
        return run_tokenizer(run), run.model
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        needed = _up_to_64(tokenizer.vocab_size)
        return tokenizer, _with_vocab(model, max(needed, model.text.vocab_size))
    if config.init_from:
        folder = run_folder(Path(config.init_from))
        if (folder / TOKENIZER).exists():
            run = open_run(folder)
            return run_tokenizer(run), _with_vocab(model, run.model.text.vocab_size)
    size = config.vocab_size or model.text.vocab_size
    tokenizer = train_tokenizer(sample_texts(sources.train), size)
    return tokenizer, _with_vocab(model, _up_to_64(tokenizer.vocab_size))


def run_tokenizer(run: Run) -> ChatTokenizer:
    """The tokenizer that a run was trained with. Raises UserError if it does not fit the model."""
    tokenizer = load_tokenizer(run.tokenizer, complete=True)
    try:
        tokenizer.check_vocabulary(run.model.text.vocab_size)
    except UserError as error:
        raise UserError(f"{run.tokenizer}: {error}") from error
    return tokenizer


def image_spec(model: VLMConfig) -> ImageSpec | None:
    """The form in which the model takes pictures; None without a vision tower."""
    vision, projector = model.vision, model.projector
    if vision is None or projector is None:
        return None
    resampler = projector.kind == "resampler"
    return ImageSpec(
        vision.patch_size,
        vision.image_size,
        vision.merge,
        projector=projector.kind,
        queries=projector.queries if resampler else 0,
    )


def build_encoder(
    config: DataSettings, model: VLMConfig, tokenizer: ChatTokenizer, *, training: bool = False
) -> Encoder:
    """The encoder of conversations into documents of at most a row. Only training pictures are
    augmented."""
    images = image_spec(model) if config.chat else None
    augment = Augment(flip=0.5, crop=0.15, colour=0.15) if config.augment and training else None
    return Encoder(tokenizer, images, max_tokens=config.sequence_len, augment=augment)


def plan(encoder: Encoder, documents: Sequence[Document], rows: int, model: VLMConfig) -> PackSpec:
    """The static shapes of batches of ``rows`` rows, estimated from a sample of documents."""
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
    """The spec with room for a whole number of pictures, if all have the same size."""
    if spec.images is None or spec.images.fit != "square":
        return spec
    # then no run of padding patches is longer than a picture either
    each = spec.images.square_patches
    return dataclasses.replace(
        spec, max_patches=spec.max_images * each, kept_patches=spec.kept_images * each
    )


def bounds_of(spec: PackSpec) -> Bounds:
    """The bounds on lengths in batches of a spec."""
    images = spec.images
    if images is None or images.fit != "square":
        return Bounds(spec.row_len)
    picture = images.square_patches
    return Bounds(spec.row_len, picture, equal_pictures=spec.max_patches % picture == 0)


def sample_documents(source: Source, encoder: Encoder, limit: int) -> Iterable[Document]:
    """The documents of up to ``limit`` items spread evenly over a source. Bad records are skipped:
    the loader counts them."""
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
    """A function that returns the first batches of the held-out data.

    They hold the rows of ``val_batches`` steps, so that the loss of text does not depend on how a
    step is split into batches. Rows with pictures share a batch's room for pictures and may differ.

    With workers, the batches are made during the first steps.
    """
    source = sources.held_out.get("val")
    if source is None:
        return list
    workers = min(workers, 2)
    loader = Loader(source, encoder, spec, repeat=False, shuffle=False, workers=workers)

    def build() -> list[Batch]:
        try:
            batches = list(islice(loader, config.run.val_batches * config.optim.grad_accum_steps))
        finally:
            loader.close()
        for batch in batches[:1]:
            with explained(config.data.data):
                check_batch(batch, model)
        return batches

    if not workers:
        batches = build()
        return lambda: batches
    pool = ThreadPoolExecutor(1, "validation")
    made = pool.submit(build)
    pool.shutdown(wait=False)  # no further task
    return made.result


def choose_workers(config: DataSettings, device: torch.device) -> int:
    """``--workers``; by default up to 12 with a GPU, and 0 on a CPU, whose cores all train."""
    if config.workers is not None:
        check_workers(config.workers)
        return config.workers
    return min(12, max(1, cores() - 2)) if device.type == "cuda" else 0


def _with_vocab(model: VLMConfig, size: int) -> VLMConfig:
    return dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=size))


def _up_to_64(size: int) -> int:
    return -(-size // 64) * 64
