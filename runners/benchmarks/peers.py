"""Hugging Face transformers on the same shape: plain, compiled, and with Liger's kernels."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from core import VLMConfig
from runners.benchmarks.clock import first_line
from runners.benchmarks.providers import MissingError
from runners.benchmarks.steps import Entry, Ready


@dataclass(frozen=True)
class Peer:
    """One way to run it. liger: its kernels, over bf16 weights and states; without it autocast to
    bf16 over fp32 weights, as its users do."""

    label: str
    compiled: bool = False
    liger: bool = False
    checkpointing: bool = False

    def describe(self) -> str:
        how = "bf16 weights and states, Liger" if self.liger else "autocast bf16, fp32 weights"
        return ", ".join(
            (
                f"Qwen2ForCausalLM, {how}, SDPA, fused torch AdamW",
                *(["torch.compile"] if self.compiled else []),
                *(["gradient checkpointing"] if self.checkpointing else []),
            )
        )


def _both(key: str, label: str, **options: bool) -> dict[str, Peer]:
    return {
        key: Peer(label, **options),
        f"{key}_checkpoint": Peer(f"{label}, checkpointing", checkpointing=True, **options),
    }


PEERS: dict[str, Peer] = (
    _both("hf", "Hugging Face")
    | _both("hf_compile", "Hugging Face, torch.compile", compiled=True)
    | _both("hf_liger", "Hugging Face, Liger, bf16 weights", liger=True)
)
MODULE = "transformers.models.qwen2.modeling_qwen2"


def need(package: str) -> Any:
    """Imports a package. Raises MissingError with what to do, or what its import said."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        absent = error.name or package
        raise MissingError(f"{absent.partition('.')[0]} is not installed") from None
    except Exception as error:  # other people's import-time code raises anything
        raise MissingError(f"{package} does not import: {first_line(error)}") from error


def build_model(model: VLMConfig, device: torch.device, longest: int) -> Any:
    """Qwen2 with a decoder's numbers and random weights, fp32. Raises MissingError for a decoder
    that it has no place for, and for a transformers that cannot be had."""
    transformers = need("transformers")
    text = model.text
    if not text.qkv_bias or text.qk_norm or text.window or text.softcap or text.head_dim:
        raise MissingError("Qwen2 has biases on q, k, v and no QK-norm, window or soft cap")
    config = transformers.Qwen2Config(
        vocab_size=text.vocab_size,
        hidden_size=text.dim,
        intermediate_size=text.mlp_dim,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        num_key_value_heads=text.kv_heads,
        max_position_embeddings=max(longest, 2),
        rope_theta=text.rope_theta,
        rms_norm_eps=text.norm_eps,
        tie_word_embeddings=text.tied,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device):
        built = transformers.Qwen2ForCausalLM(config)
    count = sum(p.numel() for p in built.parameters())
    if count != model.num_params():
        raise MissingError(f"it has {count:,} parameters, ours {model.num_params():,}")
    return built.train()


def recompute(built: Any) -> None:
    """Gradient checkpointing of every layer, as transformers does it (5.23 renamed its method)."""
    name = "activation_checkpointing_enable"
    enable = getattr(built, name, None) or built.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def entries(
    keys: Sequence[str], model: VLMConfig, rows: Tensor, device: torch.device, flops: float
) -> list[Entry]:
    """Rows of a table; compiled peers take their steps in one round."""
    return [
        Entry(
            key,
            PEERS[key].label,
            "peers",
            PEERS[key].describe(),
            partial(training, PEERS[key], model, rows, device),
            rows.numel(),
            flops,
            once=PEERS[key].compiled,
        )
        for key in keys
    ]


@contextmanager
def training(peer: Peer, model: VLMConfig, rows: Tensor, device: torch.device) -> Iterator[Ready]:
    """Its step: forward, backward, clipping to a norm of 1, AdamW. rows: ``[B, T]`` tokens."""
    need("transformers")
    with _unpatched():
        if peer.liger:
            need("liger_kernel")
            liger = need("liger_kernel.transformers")
            liger.apply_liger_kernel_to_qwen2()  # before building: it replaces classes
        built = build_model(model, device, rows.shape[1])
        if peer.liger:
            built.to(torch.bfloat16)
        if peer.checkpointing:
            recompute(built)
        run = torch.compile(built, dynamic=False) if peer.compiled else built
        cuda = device.type == "cuda"
        optimizer = torch.optim.AdamW(
            built.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1, fused=cuda
        )
        tokens = rows.to(device)

        def step() -> Tensor:
            autocast = nullcontext() if peer.liger else torch.autocast(device.type, torch.bfloat16)
            with autocast:
                loss = run(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(built.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        yield Ready(step)


@contextmanager
def _unpatched() -> Iterator[None]:
    """Puts back what Liger replaces in transformers: other peers run in the same process."""
    module = need(MODULE)
    before = dict(vars(module))
    forwards = {
        name: value.__dict__["forward"]
        for name, value in before.items()
        if isinstance(value, type) and "forward" in value.__dict__
    }
    try:
        yield
    finally:
        vars(sys.modules[MODULE]).update(before)
        for name, forward in forwards.items():
            before[name].forward = forward
