"""Everything a training run can be told, as one flat frozen dataclass.

The docstring under each field is its ``--help``. The command line is parsed by ``shell.cli``.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from core import PRESETS, VLMConfig, config_from_dict
from core.ranges import Range, shown
from runners.shell import cli
from runners.shell.cli import UsageError, given, nearest, parse
from runners.shell.errors import UserError
from runners.shell.jsonfile import Fields, read_object

Policy = Literal["nothing", "dots", "attention", "dots+attention", "offload"]
# Counts reach far above any use, and stay small enough for what is computed from them.
Count = Annotated[int, Range(0, 2**40)]
Positive = Annotated[int, Range(1, 2**40)]
Size = Annotated[int, Range(1, 2**30)]
Share = Annotated[float, Range(0, 1)]
Memory = Annotated[float, Range(0, below=1)]
Weight = Annotated[float, Range(0)]
LONGEST_NAME = 200  # bytes: file systems take 255, and others are made of it


@dataclass(frozen=True)
class TrainConfig:
    """Trains a vision-language GPT. With no arguments: a tiny one on drawn shapes, in minutes."""

    name: str | None = None
    """Name of the run's folder. Default: data-preset, numbered where that is taken."""
    runs_dir: str = "runs"
    """Where runs are kept."""
    resume: str | None = None
    """Continue a run: its folder, whose flags are then the defaults of all others; or 'auto' (the
    newest state of this name, by the flags given; a fresh start if there is none)."""
    config: str | None = None
    """Take the flags of a run, its config.json, as defaults: the same run again."""
    init_from: str | None = None
    """Start from the weights of another run (its folder) or of a safetensors file."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Drives initial weights, data order, augmentation and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""

    preset: str = "tiny"
    """The model's shape, by size: tiny, mini, small, vlm_1.5b or text_8b."""
    override: tuple[str, ...] = ()
    """Changes to the preset, such as text.layers=6 projector.kind=resampler, or vision=none."""
    stage: Literal["pretrain", "align", "sft"] = "sft"
    """pretrain and sft: everything the data reaches learns; align: only the projector."""
    trainable: tuple[str, ...] = ()
    """Path patterns of what learns, such as projector text.blocks.-1. Default: the stage's."""
    lora_rank: Annotated[int, Range(0, 2**16)] = 0
    """Train low-rank adapters of this rank beside frozen linears (of --trainable; default: all).
    The weights are those of --init_from; the run keeps its adapters alone. 0: none."""
    lora_alpha: Annotated[float, Range(above=0)] | None = None
    """Adapters count by lora_alpha / lora_rank. Default: the rank, so that they count by 1."""
    quantize: Literal["int8"] | None = None
    """int8: hold the frozen weights beside adapters in 8 bits (QLoRA)."""
    fake_quant: bool = False
    """Quantisation-aware training: compute with weights rounded to int8, train them in full."""
    merge: bool = False
    """With --lora_rank: at the end write RUN/merged, a run's folder of whole weights with the
    adapters added in. With --resume also for a run that has ended."""

    data: str = "shapes"
    """'shapes' (drawn on the fly), a LLaVA-format .json, or text: a file, a folder or a glob."""
    image_root: str | None = None
    """Folder of the pictures of a LLaVA-format file. Default: the file's own."""
    val_fraction: Memory = 0.05
    """Share of the records of --data that is held out; 0: none. Records with an equal picture are
    on one side; of text the share is of its bytes, by whole documents."""
    val_data: tuple[str, ...] = ()
    """Held-out files of the same kind as --data, of which nothing is held out then."""
    val_seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Which records --val_fraction holds out: the same whatever --seed is, so that runs compare and
    --init_from leaks none."""
    data_changed: bool = False
    """Continue although the data is not what the run began with; it is read from its start."""
    turns: Literal["all", "single"] = "all"
    """LLaVA: 'all' turns of a record in one document, or each question with its answer alone."""
    documents: Literal["file", "paragraph"] = "file"
    """Text: what a document is; blank lines part paragraphs."""
    kinds: tuple[str, ...] = ("colour", "shape", "count", "where")
    """shapes: what is asked: colour, shape, count, where, left_right, caption."""
    max_objects: Size = 2
    """shapes: objects a picture, at most."""
    colours: Annotated[int, Range(2, 10)] = 6
    """shapes: colours there are, 2 to 10."""
    shapes: Annotated[int, Range(1, 6)] = 4
    """shapes: forms there are, 1 to 6."""
    questions: Size = 1
    """shapes: questions a picture."""
    ramp: Count = 60_000
    """shapes: training begins with one object a scene; --max_objects is reached after so many."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json. Default: a byte-level BPE trained on the data."""
    vocab_size: Annotated[int, Range(1, 2**24)] | None = None
    """Entries of a tokenizer trained on the data, at most. Default: the preset's vocabulary."""
    augment: bool = False
    """Flip, crop and recolour training pictures (they then no longer show left and right)."""
    workers: Count | None = None
    """Processes that prepare batches; 0: none beside the main one. Default: by the machine."""

    sequence_len: Annotated[int, Range(8, 2**30)] = 512
    """Tokens in a packed row."""
    device_batch_size: Size = 2
    """Rows that are computed at once."""
    grad_accum_steps: Size = 1
    """Batches whose gradients make one step, weighted by their labelled tokens."""

    steps: Positive = 3600
    """Optimizer steps in all. With --resume more of them extend a run whose --schedule is constant
    or wsd."""
    lr: Annotated[float, Range(above=0)] = 1.2e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: a half cosine, warm-up-stable-decay, or nothing."""
    warmup_steps: Count = 100
    """Steps of linear warm-up."""
    decay_fraction: Share = 0.2
    """wsd: the share of all steps at the end in which the rate falls."""
    final_lr: Share = 0.0
    """Learning rate of the last step, as a share of the peak."""
    ends: tuple[Positive, ...] = ()
    """Steps at which the run ended before it was extended: it is validated there, and under wsd the
    rate falls before each and rises again. Extending a run adds to them by itself."""
    weight_decay: Weight = 0.1
    """Decoupled weight decay of what no_decay does not name."""
    no_decay: tuple[str, ...] = ("*norm", "bias", "positions", "queries")
    """Path patterns without weight decay."""
    lr_scale: tuple[str, ...] = ()
    """Learning rates of their own: path pattern and factor, such as vision=0.1 text.embed=0.5. Of
    several that name a leaf the last one holds."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw8bit: moments of 8 bits (pip install bitsandbytes). muon: for the matrices of blocks and
    of the projector, AdamW for the rest; its steps are as long as AdamW's at the same rate."""
    momentum: Memory = 0.95
    """Muon: memory of the gradient."""
    beta1: Memory = 0.9
    """AdamW: memory of the gradient's mean."""
    beta2: Memory = 0.99
    """AdamW: memory of the gradient's square."""
    grad_clip: Weight = 1.0
    """Largest norm of the whole gradient; 0: not clipped."""
    z_loss: Weight = 0.0
    """Weight of logsumexp(logits)^2 in the loss."""
    label_smoothing: Memory = 0.0
    """Probability mass spread over the whole vocabulary."""

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Of matmuls and activations. auto: bf16 where the processor has it."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """What matrices and their moments are kept in. bf16: half the memory, rounded stochastically,
    so that small steps are not lost."""
    use_fp8: bool = False
    """Matrix products of linears in 8-bit floats, save those of first and last blocks."""
    use_gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations."""
    checkpoint_every: Positive = 1
    """With gradient checkpointing: recompute every k-th block."""
    checkpoint_policy: Policy = "nothing"
    """What a recomputed block keeps beside its inputs: nothing, outputs of matrix products, of
    attention; or its inputs too wait in host memory (offload, with --compile=0)."""
    checkpoint_between: Literal["everything", "dots", "attention", "dots+attention"] = "everything"
    """With --checkpoint_every above 1: what the blocks in between keep."""
    use_fused_loss: bool = True
    """Compute the loss together with the output head, without the logits."""
    use_flash_attn: bool = True
    """The fastest attention there is, instead of plain matmul and softmax."""
    use_fused_kernels: bool = True
    """Fused norms, activations and rotary embedding, instead of PyTorch's operators."""
    use_fused_adamw: bool = True
    """One kernel for the whole update, instead of PyTorch's loop over the leaves."""
    compile: bool | None = None
    """torch.compile. Default: on a GPU, with checkpointing, with fp8 or without --cuda_graph."""
    compile_scope: Literal["blocks", "whole"] = "blocks"
    """What is compiled: one block that serves all layers, or the whole loss at once, which takes
    four times as long to start."""
    cuda_graph: bool | None = None
    """Record the gradients of a batch once and start them by one call from then on, which frees
    small models from Python's pace. Default: on a GPU."""

    profile: bool = False
    """Write trace.json (for chrome://tracing, Perfetto) and profile.txt of three steps."""
    log_every: Positive = 10
    """Steps between lines of the log."""
    val_every: Count = 600
    """Steps between validations; the weights of the best one are kept. 0: only at the end."""
    keep: Literal["best", "last"] = "best"
    """Which weights the run ends with: of the lowest validation loss, or the last. Small data is
    learnt by heart: its answers can go on improving while the loss of free text rises."""
    val_batches: Positive = 8
    """Size of a validation, in whole steps: so many times --device_batch_size x --grad_accum_steps
    rows."""
    save_every: Count = 0
    """Steps between resumable states. 0: as often as validations."""
    keep_states: Positive = 2
    """Resumable states that are kept: the newest ones."""
    stop_at: Positive | None = None
    """Stop after this step as if interrupted: saved, to be continued with --resume."""
    max_minutes: Annotated[float, Range(above=0)] | None = None
    """Stop after so long, counted from the start of this command: saved, to be continued."""
    eval_examples: Count = 512
    """Questions asked of each held-out split at the end; 0: none."""
    ask: Literal["trained", "alone"] = "trained"
    """How held-out questions are asked at the end: as they are trained, each after the true turns
    before it; or each alone, after its pictures."""
    samples: Annotated[int, Range(0, 1000)] = 12
    """Held-out questions drawn in samples.png; 0: none."""
    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""
    wandb: bool = False
    """Log to Weights & Biases as well (pip install wandb)."""
    wandb_project: str = "nanovision"
    """Weights & Biases: the project that the run is logged to."""

    @property
    def chat(self) -> bool:
        """Whether the data is questions and answers, perhaps about pictures, or plain text."""
        return is_chat(self.data)


def is_chat(data: str) -> bool:
    """Whether ``--data`` names conversations; otherwise it is plain text."""
    return data == "shapes" or data.lower().endswith((".json", ".jsonl"))


# What may differ between a run and its continuation: it changes no number of the training.
FREE_FIELDS = frozenset((
    "name", "runs_dir", "resume", "config", "init_from", "workers", "stop_at", "max_minutes",
    "data_changed", "merge",
    "profile", "log_every", "val_every", "val_batches", "save_every", "keep_states",
    "eval_examples", "ask", "samples", "tensorboard", "wandb", "wandb_project",
))  # fmt: skip
# What may differ as long as no step that is done would have had another rate (resume.py).
OF_THE_SCHEDULE = frozenset(("steps", "ends"))
# What one command does, and not what its run is: never taken over from a run that is there.
OF_ONE_COMMAND = ("name", "resume", "config", "stop_at", "max_minutes", "data_changed")
CONFIG = "config.json"  # of a run's folder

# The flags of --help, the most used first.
GROUPS: dict[str, tuple[str, ...]] = {
    "most used": (
        "data", "preset", "name", "steps", "lr", "device_batch_size", "sequence_len", "resume",
        "init_from", "device",
    ),
    "the run": ("runs_dir", "config", "seed", "stop_at", "max_minutes"),
    "the model": (
        "override", "stage", "trainable", "lora_rank", "lora_alpha", "quantize", "fake_quant",
        "merge", "tokenizer", "vocab_size",
    ),
    "data": (
        "image_root", "val_fraction", "val_data", "val_seed", "data_changed", "turns",
        "documents", "augment", "workers", "kinds", "max_objects", "colours", "shapes", "questions",
        "ramp",
    ),
    "the optimizer": (
        "grad_accum_steps", "schedule", "warmup_steps", "decay_fraction", "final_lr", "ends",
        "weight_decay", "no_decay", "lr_scale", "optimizer", "momentum", "beta1", "beta2",
        "grad_clip", "z_loss", "label_smoothing",
    ),
    "memory and speed": (
        "dtype", "state_dtype", "use_fp8", "use_gradient_checkpointing", "checkpoint_every",
        "checkpoint_policy", "checkpoint_between", "use_fused_loss", "use_flash_attn",
        "use_fused_kernels", "use_fused_adamw", "compile", "compile_scope", "cuda_graph", "profile",
    ),
    "measuring and saving": (
        "log_every", "val_every", "val_batches", "keep", "save_every", "keep_states",
        "eval_examples", "ask", "samples", "tensorboard", "wandb", "wandb_project",
    ),
}  # fmt: skip


# Where a GPU computes, the defaults are these: a 25M model, harder scenes, all kinds of questions.
ON_GPU: dict[str, Any] = {
    "preset": "mini",
    "kinds": ("colour", "shape", "count", "where", "left_right", "caption"),
    "colours": 10,
    "shapes": 6,
    "max_objects": 4,
    "questions": 3,
    "ramp": 100_000,
    "sequence_len": 2048,
    "device_batch_size": 8,
    "steps": 2500,
    "lr": 1e-3,
    "beta2": 0.95,
    "warmup_steps": 200,
    "val_every": 500,
    "eval_examples": 2048,
}


def parse_config(argv: Sequence[str] | None = None, *, gpu: bool = False) -> TrainConfig:
    """The command line as a checked config. Raises UsageError, one sentence, for a bad one.

    ``--resume FOLDER`` and ``--config`` take their defaults from a run's config.json. Otherwise
    gpu: whether there is one; unless --device says otherwise, defaults are then those of ON_GPU.
    """
    words = given(TrainConfig, argv)
    source = saved_config(words)
    if source is not None:
        fresh = {name: getattr(TrainConfig, name) for name in OF_ONE_COMMAND}
        defaults = dataclasses.replace(read_config(source), **fresh)
    elif gpu and words.get("device") != ["cpu"]:
        defaults = dataclasses.replace(TrainConfig(), **ON_GPU)
    else:
        defaults = TrainConfig()
    config = parse(
        TrainConfig, argv, prog="python -m runners.train", defaults=defaults, groups=GROUPS
    )
    check(config)
    if resumes_folder(config):
        for name in ("name", "config", "init_from", "runs_dir"):
            if getattr(config, name) != getattr(defaults, name):
                raise UsageError(
                    f"--{name} does nothing beside --resume {config.resume}: leave it out"
                )
    return config


def resumes_folder(config: TrainConfig) -> bool:
    """Whether a run is continued that is named by its folder."""
    return config.resume not in (None, "auto")


def saved_config(words: Mapping[str, Sequence[str]]) -> Path | None:
    """The config.json that a command line (as :func:`cli.given` gives it) takes defaults from."""
    for flag in ("resume", "config"):
        for word in words.get(flag, ()):
            if word.lower() in (*cli.NONE, "auto"):
                continue
            path = Path(word)
            if flag == "resume" and path.parent.name == "state":
                path = path.parent.parent
            path = path if path.name.endswith(".json") else path / CONFIG
            if not path.exists():
                raise UsageError(f"--{flag} {word}: {path.parent} holds no run: no {path.name}")
            return path
    return None


def read_config(path: Path) -> TrainConfig:
    """The flags that a run's config.json holds. Raises UserError naming what is damaged in it."""
    return saved_flags(read_object(path).object("train"))


def saved_flags(fields: Fields) -> TrainConfig:
    """Flags that a file of a run holds. Raises UserError naming the file and the field."""
    try:
        config = from_dict(fields.values)
        check(config)
    except UserError as error:
        fields.fail(str(error).removeprefix("--"))
    return config


def check(config: TrainConfig) -> None:
    """Raises UsageError naming the flag for a value that cannot be meant."""
    cli.check(config)
    if "" in (config.data, config.runs_dir, *config.val_data):  # a variable that is not set
        raise UsageError("--data, --val_data or --runs_dir is empty: leave it out, or name one")
    if config.data == "shapes" and (config.val_data or config.turns == "single"):
        flag = "--val_data" if config.val_data else "--turns=single"
        raise UsageError(
            f"{flag} is for files: --data shapes draws held-out scenes of its own, and asks "
            "--questions of each"
        )
    if config.val_data and config.val_fraction not in (0, TrainConfig.val_fraction):
        raise UsageError("--val_data is held out instead of a --val_fraction of --data: give one")
    check_preset(config.preset)
    model_config(config)
    check_adapters(config)
    lr_scales(config)
    if config.state_dtype == "bf16" and (config.optimizer != "adamw" or not config.use_fused_adamw):
        # the others round to the nearest, and small steps would be lost without a word
        raise UsageError("--state_dtype bf16 needs --optimizer adamw with --use_fused_adamw=1")
    if list(config.ends) != sorted({end for end in config.ends if end < config.steps}):
        raise UsageError(f"--ends must rise and lie below --steps, not {shown(config.ends)}")
    if config.name is not None:
        check_name(config.name)


def check_adapters(config: TrainConfig) -> None:
    """Raises UsageError for flags of adapters and rounding that do not go together."""
    if config.quantize is not None and config.fake_quant:
        raise UsageError("--fake_quant trains the weights that --quantize freezes: give one")
    if config.lora_rank and config.init_from is None:
        raise UsageError("--lora_rank adapts weights that are there: name them with --init_from")
    if config.quantize is not None and not config.lora_rank:
        raise UsageError(
            "--quantize freezes the weights: --lora_rank=16 puts adapters beside them that learn; "
            "--fake_quant=1 trains weights that are to be quantised afterwards"
        )
    if not config.lora_rank and (config.merge or config.lora_alpha is not None):
        flag = "--merge" if config.merge else "--lora_alpha"
        raise UsageError(f"{flag} is of adapters, and --lora_rank=0 makes none")


def check_name(name: str) -> None:
    """Raises UsageError for what is not the name of a folder inside of another."""
    if not name or name in (".", "..") or set(name) & set("/\\") or name.startswith("-"):
        problem = "must be the name of a folder, not a path or a flag"
    elif not name.isprintable() or len(os.fsencode(name)) > LONGEST_NAME:
        problem = f"must be at most {LONGEST_NAME} bytes without control characters"
    else:
        return
    raise UsageError(f"--name {problem}: {shown(name)}")


def folder_name(text: str) -> str:
    """What may be part of a folder's name of what a file is called.

    >>> folder_name("*"), folder_name("../my data"), folder_name("")
    ('data', 'my-data', 'data')
    """
    return re.sub(r"[^\w.-]+", "-", text)[:60].strip("-.") or "data"


def check_preset(name: str) -> None:
    """Raises UsageError with the nearest name for a preset that there is not."""
    if name not in PRESETS:
        hint = nearest(name, list(PRESETS))
        raise UsageError(f"no preset {name!r}{hint} (presets: {', '.join(PRESETS)})")


def lr_scales(config: TrainConfig) -> dict[str, float]:
    """``--lr_scale`` as path pattern -> factor. Raises UsageError for one that is neither."""
    scales = {}
    for entry in config.lr_scale:
        pattern, equals, word = entry.rpartition("=")
        factor = _number(word)
        number = not isinstance(factor, bool | str | None) and 0 <= factor < math.inf
        if not equals or not pattern or not number:
            raise UsageError(f"--lr_scale {entry}: wanted is PATTERN=FACTOR, such as vision=0.1")
        scales[pattern] = float(word)
    return scales


def model_config(config: TrainConfig) -> VLMConfig:
    """The preset with the overrides. Raises UsageError naming the override that does not fit."""
    data = PRESETS[config.preset].to_dict()
    for change in config.override:
        path, equals, word = change.partition("=")
        part, _, name = path.partition(".")
        if path == "vision" and word.lower() == "none":
            data["vision"] = data["projector"] = None
            continue
        fields = data.get(part)
        known = [f"{p}.{f}" for p, values in data.items() if values for f in values]
        if not equals or not isinstance(fields, dict) or name not in fields:
            hint = nearest(path, known)
            raise UsageError(f"--override {change} names no field of the model{hint}")
        fields[name] = _number(word)
    try:
        return config_from_dict(data)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--override {' '.join(config.override)}: {error}") from error


def differing_fields(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Where a config differs from the run it is to continue, as ``--flag old -> new``."""
    then, now = as_dict(old), as_dict(new)
    names = [name for name in now if name not in FREE_FIELDS | OF_THE_SCHEDULE]
    return [f"--{n} {then[n]} -> {now[n]}" for n in names if then[n] != now[n]]


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """For JSON: tuples become lists."""
    values = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The inverse of :func:`as_dict`; fields it does not know are those of another version."""
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    kept: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known
    }
    return TrainConfig(**kept)


def _number(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(word.lower(), word)
