"""All flags of training, in five frozen dataclasses.

A field's name is its flag, unique among all parts; the docstring under it is its ``--help``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from core.ranges import Range

Policy = Literal["nothing", "dots", "attention", "dots+attention", "offload"]
# Upper bounds lie far above any use and only prevent overflow.
Count = Annotated[int, Range(0, 2**40)]
Positive = Annotated[int, Range(1, 2**40)]
Size = Annotated[int, Range(1, 2**30)]
Share = Annotated[float, Range(0, 1)]
Memory = Annotated[float, Range(0, below=1)]
Weight = Annotated[float, Range(0)]


@dataclass(frozen=True)
class RunSettings:
    """The run: its folder, validation and logging."""

    name: str | None = None
    """Name of the run's folder. Default: data-preset, with a number if that is taken."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    resume: str | None = None
    """Continue a run: its folder, whose flags become the defaults; or 'auto', which continues the
    newest state of this name with the given flags, or starts afresh if there is none."""
    config: str | None = None
    """Take defaults from a file: a run's folder or config.json, to repeat it, or a .toml or .json
    of flags."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Determines initial weights, data order, augmentation and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to train on."""
    stop_at: Positive | None = None
    """Save and stop after this step; --resume continues."""
    max_minutes: Annotated[float, Range(above=0)] | None = None
    """Save and stop this many minutes after the start of this command."""
    log_every: Positive = 10
    """Steps between lines of the log."""
    val_every: Count = 600
    """Steps between validations, of which the best weights are kept. 0: only at the end."""
    val_batches: Positive = 8
    """Size of a validation in steps, each of --device_batch_size x --grad_accum_steps rows."""
    keep: Literal["best", "last"] = "best"
    """Which weights the run ends with: those of the lowest validation loss, or the last. On small
    data answers may still improve while the loss of free text rises."""
    save_every: Count = 0
    """Steps between resumable states. 0: as often as validations."""
    keep_states: Positive = 2
    """How many of the newest states are kept."""
    eval_examples: Count = 512
    """Questions of each held-out split at the end; 0: none."""
    ask: Literal["trained", "alone"] = "trained"
    """How held-out questions are asked at the end: as in training, each after the true turns before
    it; or each alone, after its pictures."""
    samples: Annotated[int, Range(0, 1000)] = 12
    """Held-out questions drawn in samples.png; 0: none."""
    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""
    wandb: bool = False
    """Log to Weights & Biases as well (pip install wandb)."""
    wandb_project: str = "nanovision"
    """The project in Weights & Biases."""
    profile: bool = False
    """Profile three steps into trace.json (for Perfetto or chrome://tracing) and profile.txt."""


@dataclass(frozen=True)
class ModelSettings:
    """The model."""

    preset: str = "tiny"
    """The model's shape, by size: tiny, mini, small, vlm_1.5b or text_8b."""
    override: tuple[str, ...] = ()
    """Changes to the preset, such as text.layers=6 projector.kind=resampler, or vision=none."""
    stage: Literal["pretrain", "align", "sft"] = "sft"
    """pretrain, sft: train everything that the data reaches; align: only the projector."""
    trainable: tuple[str, ...] = ()
    """Path patterns of the trained params, such as projector text.blocks.-1. Default: by stage."""
    init_from: str | None = None
    """Start from the weights of another run (its folder) or of a safetensors file."""
    lora_rank: Annotated[int, Range(0, 2**16)] = 0
    """Train low-rank adapters of this rank beside the frozen linears that --trainable names
    (default: all) of --init_from. The run saves only the adapters. 0: none."""
    lora_alpha: Annotated[float, Range(above=0)] | None = None
    """Adapters are scaled by lora_alpha / lora_rank. Default: the rank, a scale of 1."""
    quantize: Literal["int8"] | None = None
    """int8: keep the frozen weights beside adapters in 8 bits (QLoRA)."""
    fake_quant: bool = False
    """Quantisation-aware training: compute with weights rounded to int8."""
    merge: bool = False
    """With --lora_rank: at the end write RUN/merged, a run's folder of whole weights with the
    adapters added. With --resume also for a finished run."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json. Default: a byte-level BPE trained on the data."""
    vocab_size: Annotated[int, Range(1, 2**24)] | None = None
    """Largest size of a tokenizer trained on the data. Default: the preset's vocabulary."""


@dataclass(frozen=True)
class DataSettings:
    """The data."""

    data: str = "shapes"
    """'shapes' (drawn on the fly), a LLaVA-format .json, or text: a file, a folder or a glob."""
    image_root: str | None = None
    """Folder of the pictures of a LLaVA-format file. Default: the file's own."""
    val_fraction: Memory = 0.05
    """Share of the records of --data that is held out; 0: none. Records with the same picture stay
    together; of text it is the share of bytes, in whole documents."""
    val_data: tuple[str, ...] = ()
    """Held-out files of the same kind, instead of a part of --data."""
    val_seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Which records --val_fraction holds out, independent of --seed, so that runs compare and
    --init_from leaks none."""
    data_changed: bool = False
    """Continue although the data has changed since the run began; it is read from its start."""
    turns: Literal["all", "single"] = "all"
    """LLaVA: 'all' turns of a record in one document, or a 'single' question and answer in each."""
    documents: Literal["file", "paragraph"] = "file"
    """Text: what a document is; blank lines separate paragraphs."""
    sequence_len: Annotated[int, Range(8, 2**30)] = 512
    """Tokens in a packed row."""
    device_batch_size: Size = 2
    """Rows in a batch."""
    augment: bool = False
    """Flip, crop and recolour training pictures (flips change left and right)."""
    workers: Count | None = None
    """Processes that prepare batches; 0: the main process. Default: by the machine."""
    kinds: tuple[str, ...] = ("colour", "shape", "count", "where")
    """shapes: kinds of questions: colour, shape, count, where, left_right, caption."""
    max_objects: Size = 2
    """shapes: most objects in a picture."""
    colours: Annotated[int, Range(2, 10)] = 6
    """shapes: number of colours."""
    shapes: Annotated[int, Range(1, 6)] = 4
    """shapes: number of forms."""
    questions: Size = 1
    """shapes: questions per picture."""
    ramp: Count = 60_000
    """shapes: scenes over which the number of objects grows from one to --max_objects."""

    @property
    def chat(self) -> bool:
        """Whether the data is conversations, perhaps about pictures, or plain text."""
        return is_chat(self.data)


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer and the loss."""

    steps: Positive = 3600
    """Optimizer steps in total. With --resume a larger number extends a run whose --schedule is
    constant or wsd."""
    lr: Annotated[float, Range(above=0)] = 1.2e-3
    """Peak learning rate."""
    grad_accum_steps: Size = 1
    """Batches in a step; their gradients are weighted by labelled tokens."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """The rate after the warm-up: half a cosine, stable and then decaying, or constant."""
    warmup_steps: Count = 100
    """Steps of linear warm-up."""
    decay_fraction: Share = 0.2
    """wsd: share of the steps, at the end, in which the rate decays."""
    final_lr: Share = 0.0
    """Learning rate of the last step, as a share of the peak."""
    ends: tuple[Positive, ...] = ()
    """Steps at which the run ended before it was extended. It is validated there, and with wsd the
    rate decays before each and rises again. Extending a run adds to them."""
    weight_decay: Weight = 0.1
    """Decoupled weight decay, except of leaves that --no_decay names."""
    no_decay: tuple[str, ...] = ("*norm", "bias", "positions", "queries")
    """Path patterns without weight decay."""
    lr_scale: tuple[str, ...] = ()
    """Factors of the learning rate by path pattern, such as vision=0.1 text.embed=0.5. The last
    pattern that names a leaf wins."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw8bit: 8-bit moments (pip install bitsandbytes). muon: for matrices of blocks and the
    projector, with updates as large as AdamW's at the same rate; AdamW for the rest."""
    use_fused_adamw: bool = True
    """One kernel for the whole update instead of PyTorch's loop over the leaves."""
    momentum: Memory = 0.95
    """Muon: decay of the gradient's mean."""
    beta1: Memory = 0.9
    """AdamW: decay of the gradient's mean."""
    beta2: Memory = 0.99
    """AdamW: decay of the squared gradient's mean."""
    grad_clip: Weight = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    z_loss: Weight = 0.0
    """Weight of logsumexp(logits)^2 in the loss."""
    label_smoothing: Memory = 0.0
    """Probability mass spread over the whole vocabulary."""


@dataclass(frozen=True)
class SpeedSettings:
    """Memory and speed."""

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Of matrix products and activations. auto: bf16 if the device supports it."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the trained matrices and their moments. bf16: half the memory, with stochastic rounding,
    so that small updates are not lost."""
    use_fp8: bool = False
    """Compute linears in 8-bit floats, except in the first and last blocks."""
    use_gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations."""
    checkpoint_every: Positive = 1
    """With gradient checkpointing: recompute every k-th block."""
    checkpoint_policy: Policy = "nothing"
    """What a recomputed block saves beside its inputs: nothing, or outputs of matrix products or
    attention. offload: its inputs are kept in host memory (with --compile=0)."""
    checkpoint_between: Literal["everything", "dots", "attention", "dots+attention"] = "everything"
    """With --checkpoint_every above 1: what the other blocks save."""
    use_fused_loss: bool = True
    """Compute the loss together with the output head, without storing the logits."""
    use_flash_attn: bool = True
    """Use the fastest available attention instead of plain matrix products and softmax."""
    use_fused_kernels: bool = True
    """Use fused norms, activations and rotary embedding instead of PyTorch's operators."""
    compile: bool | None = None
    """torch.compile. Default: on a GPU, with checkpointing, with fp8 or without --cuda_graph."""
    compile_scope: Literal["blocks", "whole"] = "blocks"
    """What is compiled: one block for all layers, or the whole loss, which takes four times as long
    to start."""
    cuda_graph: bool | None = None
    """Record the computation of gradients once and replay it with one call, which removes Python's
    overhead for small models. Default: on a GPU."""


def is_chat(data: str) -> bool:
    """Whether ``--data`` names conversations; otherwise it is plain text."""
    return data == "shapes" or data.lower().endswith((".json", ".jsonl"))
