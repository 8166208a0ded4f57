"""Composes the transforms of a run, in one order, with the reason for each place."""

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
    """The functions that a run computes. All take params with matrices of dtype ``matrices``
    (``transforms.cast_matrices``)."""

    forward: Forward  # (params, batch) -> logits [N, V]
    loss_fn: Forward  # (params, batch) -> fp32 scalar
    eval_loss: Forward  # the same without smoothing, z-loss and recomputation: for validation
    dtype: torch.dtype  # of matrix products and activations
    matrices: torch.dtype  # of the params' matrices
    graphed: bool  # gradients are a CUDA graph
    report: tuple[str, ...]  # a line for each optimisation, on or off
    backends: Mapping[str, str]  # for kernels.override, around every call

    def gradients(self, select: Sequence[str] | None = None) -> Callable[..., Any]:
        """``(params, batch) -> (loss, grads)``, valid until the next call."""
        grad_fn = value_and_grad(self.loss_fn, select)
        # Outermost: it records all launches inside.
        return cuda_graph(grad_fn) if self.graphed else grad_fn


def compose(
    config: TrainConfig,
    model: VLMConfig,
    device: torch.device,
    bounds: Bounds = ANY,
) -> Composed:
    """The forward of a model and the losses of a training run.

    The order of transforms changes speed and memory, not the numbers. Raises UserError naming a
    flag that the device does not support.
    """
    dtype, why = compute_dtype(config.speed, device)
    graphed = is_graphed(config.speed, device)
    compiled = is_compiled(config.speed, device)
    if config.speed.state_dtype == "bf16" and dtype != torch.bfloat16:
        raise UserError(f"--state_dtype bf16 computes in bf16, and here it is fp32: {why}")
    weights = {"fp32": "fp32 weights", "bf16": "bf16 weights, rounded stochastically"}
    report = [f"Using {_dtype_name(dtype)} compute over {weights[config.speed.state_dtype]}: {why}"]
    bare = adapted(config, model, dtype, bounds)
    report += _adapted_lines(config.model)
    forward = bare
    if config.speed.use_fp8:
        # Before checkpoint: a block then rounds again when it is recomputed.
        with explained("--use_fp8"):
            forward = fp8(forward, skip=_fp8_skips(model))
        report.append("Using fp8 matrix products, but for the head and first and last blocks")
    if config.speed.use_gradient_checkpointing:
        # Inside the loss, which needs no recomputation.
        forward, line = _checkpointed(forward, config.speed, compiled)
        report.append(line)
    else:
        report.append("Gradient checkpointing off: --use_gradient_checkpointing=1 saves memory")
    # Last, because it turns logits into the loss: only the compiler can follow.
    ending = fuse_loss if config.speed.use_fused_loss else unfused_loss
    if config.speed.use_fused_loss and config.speed.state_dtype == "bf16":
        # A bf16 head gains nothing from a gradient summed in fp32.
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
        off = config.speed.cuda_graph is False
        why = "--cuda_graph=0" if off else "offloading cannot be recorded"
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
    """The forward to logits of a run's model, with its adapters and rounded weights, which are part
    of the function that is trained, evaluated and saved. Its ``prepare`` adds their params.
    """
    forward = vlm(model, bounds=bounds)
    with explained("--quantize, --fake_quant, --lora_rank"):
        if config.model.quantize == "int8":
            forward = quantize_int8(forward)
        if config.model.fake_quant:
            forward = fake_quant(forward)
            # It rounds the trained weights, so each use casts the rounded ones. Without it no rule
            # casts: the optimizer casts matrices to the compute dtype once per step.
            if matrix_dtype(config, dtype) != dtype:
                forward = mixed_precision(forward, dtype)
        if config.model.lora_rank:
            select = choose_select(config, model)
            rank, alpha = config.model.lora_rank, config.model.lora_alpha
            forward = lora(forward, rank=rank, alpha=alpha, select=select)
    return forward


def matrix_dtype(config: TrainConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype of matrices for :func:`adapted`: of the compute; with fake_quant their own."""
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
    """Path patterns of the trained params, by ``--trainable`` or the stage. None: all."""
    if config.model.trainable:
        return config.model.trainable
    if config.model.stage == "align":
        if model.projector is None or not config.data.chat:
            raise UserError(
                "--stage align trains the projector: it needs a preset and data with pictures"
            )
        return ("projector",)
    # Without pictures the vision tower has no gradient: weight decay alone would change it.
    return None if config.data.chat or model.vision is None else ("text",)


def _checkpointed(forward: Forward, config: SpeedSettings, compiled: bool) -> tuple[Forward, str]:
    """The forward with gradient checkpointing, and its line of the report."""
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


def _fp8_skips(model: VLMConfig) -> tuple[str, ...]:
    """Linears that stay out of fp8: the head, first and last blocks, and the patch embedding, whose
    inputs (such as 3 x 14 x 14) are seldom a multiple of 16."""
    first_and_last = ("lm_head", "blocks.0", "blocks.-1")
    return (*first_and_last, "patch_embed") if model.vision is not None else first_and_last


def _policy(name: str) -> str | tuple[str, ...]:
    names = tuple(name.split("+"))
    return names[0] if len(names) == 1 else names


def is_compiled(config: SpeedSettings, device: torch.device) -> bool:
    """Whether torch.compile is used: ``--compile``, or on a GPU without a CUDA graph or where it
    saves work. With fp8 it rounds an input once for all its products. Of a recomputed block it
    leaves out what no gradient needs, above all the last product."""
    if config.compile is not None:
        return config.compile
    saves = config.use_fp8 or config.use_gradient_checkpointing
    return device.type == "cuda" and (saves or not is_graphed(config, device))


def is_graphed(config: SpeedSettings, device: torch.device) -> bool:
    """Whether gradients are a CUDA graph: on a GPU, unless --cuda_graph or offloading forbids it.
    Raises UserError if --cuda_graph asks for one that cannot be recorded."""
    offloading = config.use_gradient_checkpointing and config.checkpoint_policy == "offload"
    if config.cuda_graph and (offloading or device.type != "cuda"):
        why = "--checkpoint_policy=offload cannot be recorded" if offloading else "needs a GPU"
        raise UserError(f"--cuda_graph: {why}")
    return device.type == "cuda" and not offloading and config.cuda_graph is not False


def _attentions(model: VLMConfig, bounds: Bounds) -> dict[str, dict[str, Any]]:
    """For each attention of a model the fields that choose its kernel."""
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
    """The fused kernels that a model's step can use, for ``report_backends``."""
    norms = ("rms_norm", "layer_norm") if model.vision is not None else ("rms_norm",)
    return (*norms, "swiglu", "rope")


def choose_backends(config: SpeedSettings, device: torch.device) -> dict[str, str]:
    """The plain backends that flags ask for, for ``kernels.override``."""
    chosen = {}
    if not config.use_flash_attn and device.type == "cuda":
        chosen["attention"] = "plain"
    if not config.use_fused_kernels:
        ops = ("linear", "rms_norm", "layer_norm", "swiglu", "rope")
        chosen |= dict.fromkeys(ops, "torch")
    return chosen


def choose_device(config: RunSettings) -> torch.device:
    """``--device``; by default the GPU if there is one. Raises UserError if it is missing."""
    have = torch.cuda.is_available()
    if config.device == "cuda" and not have:
        raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu or auto")
    return torch.device("cuda" if have and config.device != "cpu" else "cpu")


def compute_dtype(config: SpeedSettings, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of matrix products, and the reason."""
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


def _dtype_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
