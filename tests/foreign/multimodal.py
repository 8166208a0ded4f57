"""Models that see and speak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.foreign.families import SIZES, VOCAB, Batch, hugging_face, tokens
from tests.foreign.vision import EYES

IMAGE = VOCAB - 1
TEXT = {**SIZES, "max_position_embeddings": 64}


def seen(
    count: int, pixels: Callable[[torch.Generator], Batch]
) -> Callable[[torch.Generator], Batch]:
    """Rows of text with so many tokens of a picture each, and what goes with them."""

    def inputs(generator: torch.Generator) -> Batch:
        batch = tokens(generator, count + 6)
        batch["input_ids"][:, 1 : 1 + count] = IMAGE
        batch["labels"] = batch["labels"].clone()
        batch["labels"][:, :count] = -100
        batch |= pixels(generator)
        if "image_grid_thw" in batch:
            batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
        return batch

    return inputs


def picture(side: int = 16, **more: Any) -> Callable[[torch.Generator], Batch]:
    return lambda g: {"pixel_values": torch.randn(2, 3, side, side, generator=g)} | more


def speaking(name: str, model: str, inputs: Any, **more: Any) -> None:
    hugging_face(name, "vision-language", model, inputs=inputs, sizes={}, **more)


def llama(**more: Any) -> dict[str, Any]:
    return {"model_type": "llama", **TEXT, **more}


speaking(
    "LLaVA",
    "LlavaForConditionalGeneration",
    seen(16, picture()),
    text_config=llama(),
    vision_config={"model_type": "clip_vision_model", **EYES},
    image_token_id=IMAGE,
    vision_feature_layer=-1,
)
speaking(
    "PaliGemma",
    "PaliGemmaForConditionalGeneration",
    seen(16, picture()),
    text_config={"model_type": "gemma", **TEXT, "head_dim": 8},
    projection_dim=32,
    vision_config={"model_type": "siglip_vision_model", **EYES},
    image_token_id=IMAGE,
)
speaking(
    "Gemma3, seeing",
    "Gemma3ForConditionalGeneration",
    seen(4, picture()),
    text_config={"model_type": "gemma3_text", **TEXT, "head_dim": 8, "sliding_window": 4},
    vision_config={"model_type": "siglip_vision_model", **EYES},
    image_token_id=IMAGE,
    image_token_index=IMAGE,
    mm_tokens_per_image=4,
)
speaking(
    "InternVL",
    "InternVLForConditionalGeneration",
    seen(4, picture()),
    text_config=llama(),
    vision_config={**EYES, "image_size": [16, 16], "patch_size": [4, 4]},
    image_token_id=IMAGE,
)
speaking(
    "AyaVision",
    "AyaVisionForConditionalGeneration",
    seen(4, picture()),
    text_config={"model_type": "cohere2", **TEXT, "head_dim": 8, "sliding_window": 4},
    vision_config={"model_type": "siglip_vision_model", **EYES},
    image_token_id=IMAGE,
    downsample_factor=2,
    alignment_intermediate_size=32,
)
for name, model in (
    ("Idefics3", "Idefics3ForConditionalGeneration"),
    ("SmolVLM", "SmolVLMForConditionalGeneration"),
):
    speaking(
        name,
        model,
        seen(4, lambda g: {"pixel_values": torch.randn(2, 1, 3, 16, 16, generator=g)}),
        text_config=llama(),
        vision_config=EYES,
        image_token_id=IMAGE,
        scale_factor=2,
    )
speaking(
    "BLIP-2",
    "Blip2ForConditionalGeneration",
    seen(3, picture()),
    config="Blip2Config",
    num_query_tokens=3,
    image_token_index=IMAGE,
    image_token_id=IMAGE,
    text_config={
        "model_type": "opt",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    },
    vision_config=EYES,
    qformer_config={
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "encoder_hidden_size": 32,
    },
)


def qwen_patches(width: int) -> Callable[[torch.Generator], Batch]:
    """Two pictures of 4 x 4 patches, merged by twos."""
    return lambda g: {
        "pixel_values": torch.randn(32, width, generator=g),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
PATCHES = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "in_channels": 3}
PATCHES |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
WIDE = {"out_hidden_size": 32, "intermediate_size": 48}


def qwen(name: str, model: str, vision: dict[str, Any], **text: Any) -> None:
    speaking(
        name,
        model,
        seen(4, qwen_patches(96)),
        text_config={**TEXT, "rope_parameters": ROPE, **text},
        image_token_id=IMAGE,
        video_token_id=IMAGE - 1,
        vision_start_token_id=3,
        vision_config=PATCHES | vision,
    )


qwen("Qwen2-VL", "Qwen2VLForConditionalGeneration", {"embed_dim": 32, "mlp_ratio": 2})
qwen(
    "Qwen2.5-VL",
    "Qwen2_5_VLForConditionalGeneration",
    WIDE | {"window_size": 16, "fullatt_block_indexes": [1]},
)
qwen(
    "Qwen3-VL",
    "Qwen3VLForConditionalGeneration",
    WIDE | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    head_dim=8,
)
