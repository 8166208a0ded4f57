"""The one place where transforms are put in order, with the reason beside each line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import kernels
from core import Bounds, Forward, VLMConfig, vlm
from core.explain import open_groups
from core.model.vlm import ANY
from runners.shell.cli import explained
from runners.shell.errors import UserError
from runners.training.backends import report_backends
from runners.training.config import TrainConfig
from runners.training.settings import ModelSettings, RunSettings, SpeedSettings
from transforms import (
    checkpoint,
    compile,
    cuda_graph,
    fake_quant,
    fp8,
    fuse_loss,
    lora,
    mixed_precision,
    quantize_int8,
    unfused_loss,
    value_and_grad,
)


@dataclass(frozen=True)
class Composed:
    """What a run computes: logits for decoding, the loss for training, and why it is so.

    All three take params whose matrices are of ``matrices`` (``transforms.cast_matrices``).
    """

    forward: Forward  # (params, batch) -> logits [N, V]
    loss_fn: Forward  # (params, batch) -> fp32 scalar
    eval_loss: Forward  # the same without smoothing, z-loss and recomputation: for validation
    dtype: torch.dtype  # of matmuls and activations
    matrices: torch.dtype  # what they take matrices in
    graphed: bool  # gradients are a CUDA graph
    report: tuple[str, ...]  # a line for every optimisation, on or off
    backends: Mapping[str, str]  # what kernels.override takes, around every call

    def gradients(self, select: Sequence[str] | None = None) -> Callable[..., Any]:
        """``(params, batch) -> (loss, grads)``, valid until the next call."""
        grad_fn = value_and_grad(self.loss_fn, select)
        # Outermost: it records whatever is launched inside.
        return cuda_graph(grad_fn) if self.graphed else grad_fn


def compose(
    config: TrainConfig,
    model: VLMConfig,
    device: torch.device,
    bounds: Bounds = ANY,
) -> Composed:
    """The forward of a model and the loss of a training run, from its config.

    Order matters to speed and memory, not to the numbers. Raises UserError naming the flag that
    the device cannot serve.
    """
    dtype, why = compute_dtype(config.speed, device)
    graphed = is_graphed(config.speed, device)
    compiled = is_compiled(config.speed, device)
    if config.speed.state_dtype == "bf16" and dtype != torch.bfloat16:
        raise UserError(f"--state_dtype bf16 computes in bf16, and here it is fp32: {why}")
    weights = {"fp32": "fp32 weights", "bf16": "bf16 weights, rounded stochastically"}
    report = [f"Using {_short(dtype)} compute over {weights[config.speed.state_dtype]}: {why}"]
    bare = adapted(config, model, dtype, bounds)
    report += _adapted_lines(config.model)
    forward = bare
    if config.speed.use_fp8:
        # Before checkpoint: a block then rounds again when it is recomputed.
        with explained("--use_fp8"):
            forward = fp8(forward, skip=_wide(model))
        report.append("Using fp8 matrix products, but for the head and first and last blocks")
    if config.speed.use_gradient_checkpointing:
        # Inside the loss, which needs no recomputation of its own.
        forward, line = _checkpointed(forward, config.speed, compiled)
        report.append(line)
    else:
        report.append("Gradient checkpointing off: --use_gradient_checkpointing=1 saves memory")
    # Last, because it turns logits into the loss: nothing can follow it but the compiler.
    ending = fuse_loss if config.speed.use_fused_loss else unfused_loss
    if config.speed.use_fused_loss and config.speed.state_dtype == "bf16":
        # What is kept in bf16 gains nothing by a wider sum of its gradient; 1.6 ms of 290, 1.5B.
        ending = partial(fuse_loss, accumulate="bf16")
    loss_fn = ending(
        forward, z_loss=config.optim.z_loss, label_smoothing=config.optim.label_smoothing
    )
    report += [f"Group {line}" for line in open_groups(loss_fn.sites, loss_fn.rules)]
    eval_loss = ending(bare)
    if compiled:
        # Around everything, the gradients outside: torch.compile(torch.func.grad(f)) would
        # silently drop the backward of custom kernels.
        blocks = config.speed.compile_scope == "blocks"
        loss_fn, eval_loss = (compile(f, blocks=blocks) for f in (loss_fn, eval_loss))
        scope = "blocks: one program for all that are alike" if blocks else "the whole loss"
        report.append(f"Using torch.compile on {scope}; the first step takes longer")
    else:
        why = "the CUDA graph makes up for it" if graphed else "on a CPU it is --compile=1"
        why = "--compile=0" if config.speed.compile is False else why
        report.append(f"torch.compile off: {why}")
    if graphed:
        report.append("Using a CUDA graph: gradients are recorded in the third step")
    elif device.type == "cuda":
        why = (
            "--cuda_graph=0"
            if config.speed.cuda_graph is False
            else "offloading cannot be recorded"
        )
        report.append(f"CUDA graph off: {why}")
    backends = choose_backends(config.speed, device)
    with kernels.override(**backends):
        report += report_backends(
            str(device),
            dtype,
            _attentions(model, bounds),
            _operations(model),
            fused_loss=config.speed.use_fused_loss,
            flash_attention=config.speed.use_flash_attn,
            fused_kernels=config.speed.use_fused_kernels,
            compiling=compiled,
        )
    matrices = matrix_dtype(config, dtype)
    return Composed(bare, loss_fn, eval_loss, dtype, matrices, graphed, tuple(report), backends)


def adapted(
    config: TrainConfig, model: VLMConfig, dtype: torch.dtype, bounds: Bounds = ANY
) -> Forward:
    """The forward to logits of a run's model: with its adapters and rounded weights, which are part
    of the function that is trained, evaluated and saved. Its ``prepare`` makes what they need.
    """
    forward = vlm(model, bounds=bounds)
    with explained("--quantize, --fake_quant, --lora_rank"):
        if config.model.quantize == "int8":
            forward = quantize_int8(forward)
        if config.model.fake_quant:
            forward = fake_quant(forward)
            # It rounds what is trained, so the cast follows it at every use. Elsewhere no rule
            # casts: matrices come in the compute dtype, cast once a step by the optimizer.
            if matrix_dtype(config, dtype) != dtype:
                forward = mixed_precision(forward, dtype)
        if config.model.lora_rank:
            forward = lora(
                forward, rank=config.model.lora_rank, alpha=config.model.lora_alpha,
                select=choose_select(config, model),
            )  # fmt: skip
    return forward


def matrix_dtype(config: TrainConfig, dtype: torch.dtype) -> torch.dtype:
    """What :func:`adapted` takes matrices in: the compute dtype; under fake_quant their own."""
    if config.model.fake_quant:
        return torch.bfloat16 if config.speed.state_dtype == "bf16" else torch.float32
    return dtype


def _adapted_lines(config: ModelSettings) -> list[str]:
    lines = []
    if config.quantize is not None:
        lines.append(f"Using {config.quantize} weights, frozen; the head stays as it is")
    if config.fake_quant:
        lines.append("Using quantisation-aware training: weights are rounded to int8, but the head")
    if config.lora_rank:
        names = " ".join(config.trainable) or "all linears"
        lines.append(
            f"Using adapters of rank {config.lora_rank} beside {names}; the run keeps them alone, "
            f"their base is {config.init_from}"
        )
    return lines


def choose_select(config: TrainConfig, model: VLMConfig) -> tuple[str, ...] | None:
    """Path patterns of what learns: ``--trainable``, or what the stage says. None: everything."""
    if config.model.trainable:
        return config.model.trainable
    if config.model.stage == "align":
        if model.projector is None or not config.data.chat:
            raise UserError(
                "--stage align trains the projector: it needs a preset and data with pictures"
            )
        return ("projector",)
    # Without pictures no gradient reaches the vision tower: weight decay alone would spoil it.
    return None if config.data.chat or model.vision is None else ("text",)


def _checkpointed(forward: Forward, config: SpeedSettings, compiled: bool) -> tuple[Forward, str]:
    """The forward with gradient checkpointing, and what the report says of it."""
    policy, between = config.checkpoint_policy, config.checkpoint_between
    if policy == "offload" and compiled:
        raise UserError("--checkpoint_policy=offload needs --compile=0")
    forward = checkpoint(
        forward,
        every=config.checkpoint_every,
        policy=_policy(policy),
        between=None if between == "everything" else _policy(between),
    )
    share = "every block" if config.checkpoint_every == 1 else f"1 in {config.checkpoint_every}"
    keeping = {
        "nothing": "",
        "offload": ", inputs wait in host memory",
    }.get(policy, f" save {policy.replace('+', ' and ')}")
    if config.checkpoint_every > 1 and between != "everything":
        keeping += f"; the others save {between.replace('+', ' and ')}"
    line = f"Using gradient checkpointing: {share} is recomputed in the backward pass{keeping}"
    return forward, line


def _wide(model: VLMConfig) -> tuple[str, ...]:
    """What fp8 leaves alone: the head, first and last blocks, and the eye's first layer, whose
    inputs (3 x 14 x 14, say) are seldom a multiple of 16."""
    first_and_last = ("lm_head", "blocks.0", "blocks.-1")
    return (*first_and_last, "patch_embed") if model.vision is not None else first_and_last


def _policy(name: str) -> str | tuple[str, ...]:
    names = tuple(name.split("+"))
    return names[0] if len(names) == 1 else names


def is_compiled(config: SpeedSettings, device: torch.device) -> bool:
    """Whether torch.compile is used: what --compile says, else on a GPU where launching from Python
    costs time, or where it saves work. fp8 rounds an input once for all its products. A block that
    is recomputed leaves out what no gradient needs, its last product above all: of a 1.5B decoder
    at 16,384 tokens 28 products of 0.66 ms on an H200, where a checkpointed step took 372 ms eager
    (the bench) and some 350 compiled (12 steps in a row, right afterwards)."""
    if config.compile is not None:
        return config.compile
    saves = config.use_fp8 or config.use_gradient_checkpointing
    return device.type == "cuda" and (saves or not is_graphed(config, device))


def is_graphed(config: SpeedSettings, device: torch.device) -> bool:
    """Whether gradients become a CUDA graph: on a GPU, unless --cuda_graph says otherwise. Raises
    UserError where they are to and cannot."""
    offloading = config.use_gradient_checkpointing and config.checkpoint_policy == "offload"
    if config.cuda_graph and (offloading or device.type != "cuda"):
        why = "--checkpoint_policy=offload cannot be recorded" if offloading else "needs a GPU"
        raise UserError(f"--cuda_graph: {why}")
    return device.type == "cuda" and not offloading and config.cuda_graph is not False


def _attentions(model: VLMConfig, bounds: Bounds) -> dict[str, dict[str, Any]]:
    """What decides which kernel computes each attention of a model."""
    text, vision = model.text, model.vision
    known: dict[str, dict[str, Any]] = {
        "text": {
            "head_dim": text.head_size,
            "group": text.heads // text.kv_heads,
            "max_seqlen": bounds.max_seqlen,
        }
    }
    if vision is not None:
        known["vision"] = {
            "head_dim": vision.dim // vision.heads,
            "max_seqlen": bounds.max_patches,
            "length": bounds.max_patches if bounds.equal_pictures else None,
        }
    return known


def _operations(model: VLMConfig) -> tuple[str, ...]:
    """The fused kernels that a step of a model can use, as `report_backends` takes them."""
    norms = ("rms_norm", "layer_norm") if model.vision is not None else ("rms_norm",)
    return (*norms, "swiglu", "rope")


def choose_backends(config: SpeedSettings, device: torch.device) -> dict[str, str]:
    """The kernels that flags turn off, as ``kernels.override`` takes them."""
    chosen = {}
    if not config.use_flash_attn and device.type == "cuda":
        chosen["attention"] = "plain"
    if not config.use_fused_kernels:
        ops = ("linear", "rms_norm", "layer_norm", "swiglu", "rope")
        chosen |= dict.fromkeys(ops, "torch")
    return chosen


def choose_device(config: RunSettings) -> torch.device:
    """The GPU if there is one, unless told otherwise. Raises UserError for one that is missing."""
    have = torch.cuda.is_available()
    if config.device == "cuda" and not have:
        raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu or auto")
    return torch.device("cuda" if have and config.device != "cpu" else "cpu")


def compute_dtype(config: SpeedSettings, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of matmuls, and the reason."""
    if config.dtype != "auto":
        named = {"bf16": torch.bfloat16, "fp32": torch.float32}
        return named[config.dtype], f"--dtype {config.dtype}"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has it"
        return torch.float32, "the GPU has no bf16"
    features: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if features.get("avx512_bf16") or features.get("amx_bf16"):
        return torch.bfloat16, "the CPU has bf16 instructions"
    return torch.float32, "the CPU has no bf16 instructions"


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
