"""The one place where transforms are put in order, with the reason beside each line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernels
from core import Forward, Longest, VLMConfig, vlm
from core.vlm import ANY
from params.tree import Tree
from runners.config import TrainConfig
from runners.errors import UserError
from transforms import checkpoint, fuse_loss, mixed_precision, unfused_loss

Loss = Callable[[Tree, Any], Tensor]


@dataclass(frozen=True)
class Composed:
    """What a run computes: logits for decoding, the loss for training, and why it is so."""

    forward: Forward  # (params, batch) -> logits [N, V], in the compute dtype
    loss_fn: Loss  # (params, batch) -> fp32 scalar
    eval_loss: Loss  # the same without smoothing, z-loss and recomputation: for validation
    dtype: torch.dtype  # of matmuls and activations
    report: tuple[str, ...]  # a line for every optimisation, on or off
    backends: Mapping[str, str]  # what kernels.override takes, around every call


def compose(
    config: TrainConfig, model: VLMConfig, device: torch.device, longest: Longest = ANY
) -> Composed:
    """The forward of a model and the loss of a training run, from its config.

    Order matters to speed and memory, not to the numbers. Raises UserError naming the flag that
    the device cannot serve.
    """
    dtype, why = compute_dtype(config, device)
    report = [f"Using {_short(dtype)} compute over fp32 weights: {why}"]
    forward = vlm(model, longest=longest)
    if dtype != torch.float32:
        # First, so that everything later sees the cast as part of the block: a checkpointed
        # block keeps its fp32 params, which exist anyway, and casts again when it is recomputed.
        forward = mixed_precision(forward, dtype)
    bare = forward
    if config.use_gradient_checkpointing:
        # Outside the cast (above), inside the loss, which needs no recomputation of its own.
        policy = config.checkpoint_policy.split("+")
        if policy == ["offload"] and is_compiled(config, device):
            raise UserError("--checkpoint_policy=offload needs --compile=0")
        forward = checkpoint(
            forward, every=config.checkpoint_every, policy=policy[0] if len(policy) == 1 else policy
        )
        share = "every block" if config.checkpoint_every == 1 else f"1 in {config.checkpoint_every}"
        keeping = {
            "nothing": "",
            "offload": ", inputs wait in host memory",
        }.get(config.checkpoint_policy, f" save {' and '.join(policy)}")
        report.append(
            f"Using gradient checkpointing: {share} is recomputed in the backward pass{keeping}"
        )
    else:
        report.append("Gradient checkpointing off: --use_gradient_checkpointing=1 saves memory")
    # Last, because it turns logits into the loss: nothing can follow it but the compiler.
    ending = fuse_loss if config.use_fused_loss else unfused_loss
    loss_fn: Loss = ending(forward, z_loss=config.z_loss, label_smoothing=config.label_smoothing)
    eval_loss: Loss = ending(bare)
    if is_compiled(config, device):
        # Around everything, the gradients outside: torch.compile(torch.func.grad(f)) would
        # silently drop the backward of custom kernels.
        loss_fn = torch.compile(loss_fn, fullgraph=True)
        eval_loss = torch.compile(eval_loss, fullgraph=True)
        report.append("Using torch.compile on the loss: the first step takes longer")
    else:
        why = "--compile=0" if config.compile is False else "on a CPU it is --compile=1"
        report.append(f"torch.compile off: {why}")
    backends = choose_backends(config, device)
    with kernels.override(**backends):
        report += kernels.report(
            device=str(device),
            dtype=dtype,
            attentions=_attentions(model, longest),
            fused_loss=config.use_fused_loss,
            flash_attention=config.use_flash_attn,
            fused_kernels=config.use_fused_kernels,
            compiling=is_compiled(config, device),
        )
    return Composed(bare, loss_fn, eval_loss, dtype, tuple(report), backends)


def is_compiled(config: TrainConfig, device: torch.device) -> bool:
    """Whether the loss goes through torch.compile: on a GPU, unless --compile says otherwise."""
    return device.type == "cuda" if config.compile is None else config.compile


def _attentions(model: VLMConfig, longest: Longest) -> dict[str, dict[str, Any]]:
    """What decides which kernel computes each attention of a model."""
    text, vision = model.text, model.vision
    known: dict[str, dict[str, Any]] = {
        "text": {
            "head_dim": text.head_size,
            "group": text.heads // text.kv_heads,
            "max_seqlen": longest.document,
        }
    }
    if vision is not None:
        known["vision"] = {
            "head_dim": vision.dim // vision.heads,
            "max_seqlen": longest.picture,
            "length": longest.picture if longest.equal_pictures else None,
        }
    return known


def choose_backends(config: TrainConfig, device: torch.device) -> dict[str, str]:
    """The kernels that flags turn off, as ``kernels.override`` takes them."""
    chosen = {}
    if not config.use_flash_attn and device.type == "cuda":
        chosen["attention"] = "plain"
    if not config.use_fused_kernels:
        chosen |= dict.fromkeys(("rms_norm", "layer_norm", "swiglu", "rope"), "torch")
    return chosen


def choose_device(config: TrainConfig) -> torch.device:
    """The GPU if there is one, unless told otherwise. Raises UserError for one that is missing."""
    have = torch.cuda.is_available()
    if config.device == "cuda" and not have:
        raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu or auto")
    return torch.device("cuda" if have and config.device != "cpu" else "cpu")


def compute_dtype(config: TrainConfig, device: torch.device) -> tuple[torch.dtype, str]:
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
