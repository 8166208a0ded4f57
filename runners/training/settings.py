"""Every flag of training, in five frozen dataclasses: each builder takes the part that it needs.

A field's name is its flag, unique among all parts; the docstring under it is its ``--help``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from core.ranges import Range

Policy = Literal["nothing", "dots", "attention", "dots+attention", "offload"]
# Counts reach far above any use, and stay small enough for what is computed from them.
Count = Annotated[int, Range(0, 2**40)]
Positive = Annotated[int, Range(1, 2**40)]
Size = Annotated[int, Range(1, 2**30)]
Share = Annotated[float, Range(0, 1)]
Memory = Annotated[float, Range(0, below=1)]
Weight = Annotated[float, Range(0)]


@dataclass(frozen=True)
class RunSettings:
    """The run: where it is kept, how it is measured and logged."""

    name: str | None = None
    """Name of the run's folder. Default: data-preset, numbered where that is taken."""
    runs_dir: str = "runs"
    """Where runs are kept."""
    resume: str | None = None
    """Continue a run: its folder, whose flags are then the defaults of all others; or 'auto' (the
    newest state of this name, by the flags given; a fresh start if there is none)."""
    config: str | None = None
    """Take the flags of a run, its config.json, as defaults: the same run again."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Drives initial weights, data order, augmentation and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    stop_at: Positive | None = None
    """Stop after this step as if interrupted: saved, to be continued with --resume."""
    max_minutes: Annotated[float, Range(above=0)] | None = None
    """Stop after so long, counted from the start of this command: saved, to be continued."""
    log_every: Positive = 10
    """Steps between lines of the log."""
    val_every: Count = 600
    """Steps between validations; the weights of the best one are kept. 0: only at the end."""
    val_batches: Positive = 8
    """Size of a validation, in whole steps: so many times --device_batch_size x --grad_accum_steps
    rows."""
    keep: Literal["best", "last"] = "best"
    """Which weights the run ends with: of the lowest validation loss, or the last. Small data is
    learnt by heart: its answers can go on improving while the loss of free text rises."""
    save_every: Count = 0
    """Steps between resumable states. 0: as often as validations."""
    keep_states: Positive = 2
    """Resumable states that are kept: the newest ones."""
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
    profile: bool = False
    """Write trace.json (for chrome://tracing, Perfetto) and profile.txt of three steps."""


@dataclass(frozen=True)
class ModelSettings:
    """The model."""

    preset: str = "tiny"
    """The model's shape, by size: tiny, mini, small, vlm_1.5b or text_8b."""
    override: tuple[str, ...] = ()
    """Changes to the preset, such as text.layers=6 projector.kind=resampler, or vision=none."""
    stage: Literal["pretrain", "align", "sft"] = "sft"
    """pretrain and sft: everything the data reaches learns; align: only the projector."""
    trainable: tuple[str, ...] = ()
    """Path patterns of what learns, such as projector text.blocks.-1. Default: the stage's."""
    init_from: str | None = None
    """Start from the weights of another run (its folder) or of a safetensors file."""
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
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json. Default: a byte-level BPE trained on the data."""
    vocab_size: Annotated[int, Range(1, 2**24)] | None = None
    """Entries of a tokenizer trained on the data, at most. Default: the preset's vocabulary."""


@dataclass(frozen=True)
class DataSettings:
    """The data."""

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
    sequence_len: Annotated[int, Range(8, 2**30)] = 512
    """Tokens in a packed row."""
    device_batch_size: Size = 2
    """Rows that are computed at once."""
    augment: bool = False
    """Flip, crop and recolour training pictures (they then no longer show left and right)."""
    workers: Count | None = None
    """Processes that prepare batches; 0: none beside the main one. Default: by the machine."""
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

    @property
    def chat(self) -> bool:
        """Whether the data is questions and answers, perhaps about pictures, or plain text."""
        return is_chat(self.data)


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer and the loss."""

    steps: Positive = 3600
    """Optimizer steps in all. With --resume more of them extend a run whose --schedule is constant
    or wsd."""
    lr: Annotated[float, Range(above=0)] = 1.2e-3
    """Peak learning rate."""
    grad_accum_steps: Size = 1
    """Batches whose gradients make one step, weighted by their labelled tokens."""
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
    use_fused_adamw: bool = True
    """One kernel for the whole update, instead of PyTorch's loop over the leaves."""
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


@dataclass(frozen=True)
class SpeedSettings:
    """Memory and speed."""

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
    compile: bool | None = None
    """torch.compile. Default: on a GPU, with checkpointing, with fp8 or without --cuda_graph."""
    compile_scope: Literal["blocks", "whole"] = "blocks"
    """What is compiled: one block that serves all layers, or the whole loss at once, which takes
    four times as long to start."""
    cuda_graph: bool | None = None
    """Record the gradients of a batch once and start them by one call from then on, which frees
    small models from Python's pace. Default: on a GPU."""


def is_chat(data: str) -> bool:
    """Whether ``--data`` names conversations; otherwise it is plain text."""
    return data == "shapes" or data.lower().endswith((".json", ".jsonl"))
