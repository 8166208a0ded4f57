"""Models of pictures and of sound, and towers that see and read at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.foreign.families import SIZES, VOCAB, Batch, hugging_face, pictures, tokens

EYES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}


def last_hidden(run: Any, batch: Batch) -> Tensor:
    return run(**batch).last_hidden_state


def vision(name: str, model: str | None = None, **more: Any) -> None:
    """A classifier of five classes."""
    model = model or f"{name}ForImageClassification"
    given = {"inputs": pictures(classes=5), "head": "classifier", "num_labels": 5, "sizes": EYES}
    hugging_face(name, "vision", model, **given | more)


def tower(name: str, model: str, **more: Any) -> None:
    given = {"inputs": pictures(), "call": last_hidden, "sizes": EYES}
    hugging_face(name, "vision", model, **given | more)


STAGES: dict[str, Any] = {"initializer_range": 0.2}
vision("ViT")
vision("DeiT", "DeiTForImageClassification")
vision(
    "BEiT",
    "BeitForImageClassification",
    use_relative_position_bias=True,
    use_absolute_position_embeddings=False,
    use_mean_pooling=True,
    vocab_size=VOCAB,
    layer_scale_init_value=0.5,
)
WINDOWS: dict[str, Any] = {
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [2, 2],
    "window_size": 2,
    "image_size": 16,
    "patch_size": 2,
    "sizes": STAGES,
}
vision("Swin", **WINDOWS)
vision("Swinv2", "Swinv2ForImageClassification", **WINDOWS, eager=False)
vision("DINOv2", "Dinov2ForImageClassification", use_swiglu_ffn=True)
vision(
    "ConvNeXt",
    "ConvNextForImageClassification",
    hidden_sizes=[8, 16],
    depths=[1, 2],
    num_stages=2,
    patch_size=4,
    sizes=STAGES,
    eager=False,
)
vision(
    "ResNet",
    embedding_size=8,
    hidden_sizes=[8, 16],
    depths=[1, 2],
    head="classifier.1",
    layer_type="bottleneck",
    sizes={},
    inputs=pictures(24, classes=5),
    eager=False,
)
PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [2, 4],
    "sr_ratios": [2, 1],
    "mlp_ratios": [2, 2],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "sizes": STAGES,
    "inputs": pictures(32, classes=5),
    "eager": False,
}
vision("PVTv2", "PvtV2ForImageClassification", **PYRAMID)
vision("SegFormer", "SegformerForImageClassification", **PYRAMID)
vision(
    "Hiera",
    "HieraForImageClassification",
    embed_dim=16,
    image_size=[32, 32],
    patch_size=[7, 7],
    patch_stride=[4, 4],
    patch_padding=[3, 3],
    depths=[1, 1],
    num_heads=[1, 2],
    query_stride=[2, 2],
    masked_unit_size=[4, 4],
    num_query_pool=1,
    masked_unit_attention=[True, False],
    sizes=STAGES,
    inputs=pictures(32, classes=5),
    eager=False,
)
vision(
    "MobileViT",
    "MobileViTForImageClassification",
    hidden_sizes=[16, 16, 16],
    neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
    num_attention_heads=2,
    expand_ratio=2.0,
    image_size=32,
    patch_size=2,
    sizes=STAGES,
    inputs=pictures(32, classes=5),
    eager=False,
)
vision(
    "LeViT",
    "LevitForImageClassification",
    head="classifier.linear",
    image_size=32,
    hidden_sizes=[16, 24, 32],
    num_attention_heads=[2, 2, 2],
    depths=[1, 1, 1],
    key_dim=[8, 8, 8],
    patch_size=16,
    mlp_ratio=[2, 2, 2],
    attention_ratio=[2, 2, 2],
    sizes=STAGES,
    inputs=pictures(32, classes=5),
    eager=False,
)
vision(
    "Data2Vec vision",
    "Data2VecVisionForImageClassification",
    use_relative_position_bias=True,
    eager=False,
)
tower("DINOv3", "DINOv3ViTModel", num_register_tokens=2, config="DINOv3ViTConfig")
tower("SigLIP vision", "SiglipVisionModel", config="SiglipVisionConfig")
tower("CLIP vision", "CLIPVisionModel", config="CLIPVisionConfig")
tower(
    "YOLOS",
    "YolosForObjectDetection",
    config="YolosConfig",
    image_size=[16, 16],
    num_detection_tokens=3,
    num_labels=5,
    call=lambda run, b: torch.cat([(o := run(**b)).logits, o.pred_boxes], -1),
)


def siglip2_patches(g: torch.Generator) -> Batch:
    return {
        "pixel_values": torch.randn(2, 12, 48, generator=g),
        "pixel_attention_mask": torch.ones(2, 12, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[3, 4], [4, 3]]),
    }


tower(
    "SigLIP2 vision",
    "Siglip2VisionModel",
    config="Siglip2VisionConfig",
    inputs=siglip2_patches,
    num_patches=16,
    patch_size=4,
    image_size="absent",
)


def wave(g: torch.Generator) -> Batch:
    return {"input_values": torch.randn(2, 200, generator=g)}


WAVES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": [8, 8],
    "conv_stride": [4, 2],
    "conv_kernel": [8, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "initializer_range": 0.2,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
for name, model in (
    ("Wav2Vec2", "Wav2Vec2Model"),
    ("HuBERT", "HubertModel"),
    ("WavLM", "WavLMModel"),
):
    hugging_face(
        name, "audio", model, inputs=wave, call=last_hidden, sizes=WAVES, eager=name != "WavLM"
    )
hugging_face(
    "Wav2Vec2-BERT",
    "audio",
    "Wav2Vec2BertModel",
    inputs=lambda g: {"input_features": torch.randn(2, 12, 16, generator=g)},
    call=last_hidden,
    feature_projection_input_dim=16,
    conv_depthwise_kernel_size=3,
    sizes={k: v for k, v in EYES.items() if k not in ("image_size", "patch_size")},
    eager=False,
)
hugging_face(
    "Audio Spectrogram Transformer",
    "audio",
    "ASTForAudioClassification",
    config="ASTConfig",
    head="classifier.dense",
    num_labels=5,
    inputs=lambda g: {
        "input_values": torch.randn(2, 16, 8, generator=g),
        "labels": torch.tensor([1, 4]),
    },
    sizes={k: v for k, v in EYES.items() if k != "image_size"}
    | {"max_length": 16, "num_mel_bins": 8, "frequency_stride": 4, "time_stride": 4},
)
hugging_face(
    "CLIP",
    "vision",
    "CLIPModel",
    sizes={},
    text_config={**SIZES, "max_position_embeddings": 16},
    vision_config=EYES,
    projection_dim=16,
    call=lambda run, b: run(**b).logits_per_image,
    inputs=lambda g: {"input_ids": tokens(g)["input_ids"], **pictures()(g)},
)
hugging_face(
    "SigLIP",
    "vision",
    "SiglipModel",
    sizes={},
    text_config={**SIZES, "max_position_embeddings": 9},
    vision_config=EYES,
    call=lambda run, b: run(**b).logits_per_image,
    inputs=lambda g: {"input_ids": tokens(g)["input_ids"], **pictures()(g)},
)
