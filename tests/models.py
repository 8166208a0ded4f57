"""Small models of transformers with random weights, for tests of what ``from_module`` gives."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EYES = {
    "num_hidden_layers": 3,
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
}


def language(name: str, **changes: Any) -> nn.Module:
    """Llama, Qwen3, Gemma2, Phi3 or GPT2, with a head and in eval; changes: of its config."""
    hf = pytest.importorskip("transformers")
    if name == "GPT2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
        sizes |= {k: SIZES[k] for k in ("vocab_size", "initializer_range")}
        config = hf.GPT2Config(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **changes})
        return hf.GPT2LMHeadModel(config).eval()
    more = {"head_dim": 8} if name in ("Qwen3", "Gemma2") else {}
    config = getattr(hf, f"{name}Config")(**{**SIZES, **more, **changes})
    return getattr(hf, f"{name}ForCausalLM")(config).eval()
