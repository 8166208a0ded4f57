"""Named model configs."""

from __future__ import annotations

import difflib

from core.config import ProjectorConfig, TextConfig, VisionConfig, VLMConfig

# From mini up, head sizes of 64 and 128: the ones every fast attention kernel serves.
PRESETS: dict[str, VLMConfig] = {
    "tiny": VLMConfig(
        TextConfig(
            vocab_size=512, dim=128, layers=3, heads=4, kv_heads=2, mlp_dim=384, qk_norm=True
        ),
        VisionConfig(
            dim=128,
            layers=2,
            heads=4,
            mlp_dim=384,
            patch_size=8,
            image_size=32,
            merge=1,
            positions="sincos2d",
        ),
        ProjectorConfig(hidden=128),
    ),
    "mini": VLMConfig(
        TextConfig(
            vocab_size=1024, dim=384, layers=6, heads=6, kv_heads=6, mlp_dim=1024, qk_norm=True
        ),
        VisionConfig(dim=384, layers=6, heads=6, mlp_dim=1536, patch_size=8, image_size=64),
        ProjectorConfig(),
    ),
    # SmolLM2-135M's decoder (https://huggingface.co/HuggingFaceTB/SmolLM2-135M) with a ViT-S/16.
    "small": VLMConfig(
        TextConfig(
            vocab_size=49_152,
            dim=576,
            layers=30,
            heads=9,
            kv_heads=3,
            mlp_dim=1536,
            rope_theta=100_000.0,
            norm_eps=1e-5,
        ),
        VisionConfig(dim=384, layers=12, heads=6, mlp_dim=1536, patch_size=16, image_size=128),
        ProjectorConfig(),
    ),
    # Qwen2-1.5B's decoder (https://arxiv.org/abs/2407.10671, table 1) with a ViT of SigLIP-so400m's
    # size (1152 wide, 27 layers, MLP 4304), its 16 heads of 72 made 9 of 128:
    # 128 is a size that every fast attention kernel serves.
    "vlm_1.5b": VLMConfig(
        TextConfig(
            vocab_size=151_936,
            dim=1536,
            layers=28,
            heads=12,
            kv_heads=2,
            mlp_dim=8960,
            rope_theta=1_000_000.0,
            qkv_bias=True,
        ),
        VisionConfig(dim=1152, layers=27, heads=9, mlp_dim=4304, patch_size=14, image_size=448),
        ProjectorConfig(),
    ),
    # Llama-3.1-8B's decoder (https://arxiv.org/abs/2407.21783, table 3).
    "text_8b": VLMConfig(
        TextConfig(
            vocab_size=128_256,
            dim=4096,
            layers=32,
            heads=32,
            kv_heads=8,
            mlp_dim=14_336,
            rope_theta=500_000.0,
            norm_eps=1e-5,
            tied=False,
        ),
    ),
}


def preset(name: str) -> VLMConfig:
    """A named config. Raises ValueError, with the nearest name, for an unknown one."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no preset {name!r}{hint} (presets: {', '.join(PRESETS)})")
