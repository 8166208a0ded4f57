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
from runners.training.settings import DataSettings
from runners.training.states import TrainState, run_folder
from runners.training.weights import build_params
from transforms import trainable

SAMPLE = 256  # documents looked at to size the batches


@dataclass(frozen=True)
class RunData:
    """What a run reads, and how it becomes batches."""

    sources: Sources
    tokenizer: ChatTokenizer
    encoder: Encoder
    spec: PackSpec
    loader: Loader
    held_out: Callable[[], list[Batch]]

    @property
    def validation(self) -> list[Batch]:
        """The validation batches, the same ones each time; empty if nothing is held out. Raises
        UserError for unusable data where they are made beside the training."""
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
    select: tuple[str, ...] | None  # path patterns of the params that learn; None: all
    learns: frozenset[str]  # the parts that learn, of text, vision and projector


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
    """unfinished: closes what was opened if a later step fails."""
    workers = choose_workers(config.data, device)  # first, so that a wrong number costs no time
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
    elif config.run.config is not None:  # a new run, whose data may differ on purpose
        again = Path(config.run.config)
        folder = again if again.is_dir() else again.parent
        if (folder / digests.DATA).is_file():
            digests.check(folder, sources.digests, allowed=True)
    tokenizer, model = choose_vocabulary(config, sources, state_path)
    # with adapters the patterns choose where these are, and they alone learn
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
        if loader.same_data(state.loader):  # else its position in the data means nothing
            loader.load_state_dict(state.loader)
        loader.start()
    data = RunData(sources, tokenizer, encoder, spec, loader, held_out)
    learns = frozenset(path.partition(".")[0] for path in learning)
    return Job(config, model, device, composed, data, params, state, select, learns)


def choose_vocabulary(
    config: TrainConfig, sources: Sources, state_path: Path | None
) -> tuple[ChatTokenizer, VLMConfig]:
    """The tokenizer, and the model with a row of the embedding for each of its tokens.

    A resumed run, or one that starts from another's weights, keeps that run's tokenizer. A given
    tokenizer adds rows to the preset where it has too few. Otherwise a tokenizer is trained on the
    data, and the model has as many rows as tokens, rounded up to 64 for faster products.
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
    """The tokenizer that a run was trained with. Raises UserError if it does not fit the model."""
    tokenizer = load_tokenizer(run.tokenizer, complete=True)
    try:
        tokenizer.check_vocabulary(run.model.text.vocab_size)
    except UserError as error:
        raise UserError(f"{run.tokenizer}: {error}") from error
    return tokenizer


def image_spec(model: VLMConfig) -> ImageSpec | None:
    """How the model takes pictures; None for a model without a vision tower."""
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
    """From conversations to documents of at most a row. Only training pictures are augmented."""
    images = image_spec(model) if config.chat else None
    augment = Augment(flip=0.5, crop=0.15, colour=0.15) if config.augment and training else None
    return Encoder(tokenizer, images, max_tokens=config.sequence_len, augment=augment)


def plan(encoder: Encoder, documents: Sequence[Document], rows: int, model: VLMConfig) -> PackSpec:
    """The static shapes of batches of ``rows`` rows, sized on a sample of documents."""
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
    """The spec with room for whole pictures only, where all are of one size."""
    if spec.images is None or spec.images.fit != "square":
        return spec
    # then no run of unused patches is longer than a picture either
    each = spec.images.square_patches
    return dataclasses.replace(
        spec, max_patches=spec.max_images * each, kept_patches=spec.kept_images * each
    )


def bounds_of(spec: PackSpec) -> Bounds:
    """The bounds that batches of a spec keep to."""
    images = spec.images
    if images is None or images.fit != "square":
        return Bounds(spec.row_len)
    picture = images.square_patches
    return Bounds(spec.row_len, picture, equal_pictures=spec.max_patches % picture == 0)


def sample_documents(source: Source, encoder: Encoder, limit: int) -> Iterable[Document]:
    """Documents of up to ``limit`` items spread evenly over a source. Bad records are skipped; the
    loader counts them."""
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
    """Returns a function that gives the first batches of the held-out data, always the same ones.

    Their rows are those of ``val_batches`` steps, so that text does not depend on how a step is cut
    into batches. Rows with pictures share the room of a batch and may differ there.

    With workers, the batches are made beside the first steps.
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
    pool.shutdown(wait=False)  # no further task
    return made.result


def choose_workers(config: DataSettings, device: torch.device) -> int:
    """The flag; by default up to 12 beside a GPU, and none on a CPU, which trains on all cores."""
    if config.workers is not None:
        check_workers(config.workers)
        return config.workers
    return min(12, max(1, cores() - 2)) if device.type == "cuda" else 0


def _with_vocab(model: VLMConfig, size: int) -> VLMConfig:
    return dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=size))


def _up_to_64(size: int) -> int:
    return -(-size // 64) * 64
