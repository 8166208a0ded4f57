"""Encoders of text, and encoder-decoders of text and sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.foreign.families import VOCAB, Batch, hugging_face, ids_only, masked_tokens, two_sides


def encoder(name: str, model: str | None = None, **more: Any) -> None:
    given = {"inputs": masked_tokens, "max_position_embeddings": 40} | more
    hugging_face(name, "encoders", model or f"{name}ForMaskedLM", **given)


def last_hidden(run: Any, batch: Batch) -> Tensor:
    """Of a model without a head."""
    return run(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state


encoder("BERT", "BertForMaskedLM")
encoder("BERT without a head", "BertModel", inputs=ids_only, call=last_hidden)
encoder("RoBERTa", "RobertaForMaskedLM")
encoder(
    "DistilBERT",
    "DistilBertForMaskedLM",
    dim=32,
    hidden_dim=48,
    n_layers=2,
    n_heads=4,
    hidden_size="absent",
    num_hidden_layers="absent",
    num_attention_heads="absent",
)
encoder("ALBERT", "AlbertForMaskedLM", embedding_size=16)
encoder("ELECTRA", "ElectraForMaskedLM", embedding_size=16)
encoder("DeBERTa", "DebertaForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"])
encoder(
    "DeBERTa-v2",
    "DebertaV2ForMaskedLM",
    relative_attention=True,
    position_buckets=8,
    pos_att_type=["c2p", "p2c"],
    norm_rel_ebd="layer_norm",
    share_att_key=True,
)
encoder("ModernBERT", "ModernBertForMaskedLM", local_attention=4, cls_token_id=1, sep_token_id=2)
encoder("MPNet", "MPNetForMaskedLM")
encoder("FNet", "FNetForMaskedLM", eager=False)
encoder("ESM", "EsmForMaskedLM", mask_token_id=4, token_dropout=False)
encoder("RoFormer", "RoFormerForMaskedLM", embedding_size=32)
encoder("NomicBERT", "NomicBertForMaskedLM")
encoder(
    "MobileBERT",
    "MobileBertForMaskedLM",
    embedding_size=16,
    intra_bottleneck_size=16,
    num_feedforward_networks=2,
    true_hidden_size=16,
    eager=False,
)
encoder(
    "XLNet",
    "XLNetLMHeadModel",
    d_model=32,
    n_layer=2,
    n_head=4,
    d_inner=48,
    inputs=masked_tokens,
    eager=False,
    max_position_embeddings="absent",
)
encoder("I-BERT", "IBertForMaskedLM", eager=False)
encoder(
    "XLM",
    "XLMWithLMHeadModel",
    config="XLMConfig",
    emb_dim=32,
    n_layers=2,
    n_heads=4,
    n_words=VOCAB,
    eager=False,
)
encoder(
    "BERT, a classifier",
    "BertForSequenceClassification",
    config="BertConfig",
    num_labels=5,
    inputs=lambda g: ids_only(g) | {"labels": torch.tensor([1, 3])},
    head="classifier",
)


def seq2seq(name: str, model: str | None = None, **more: Any) -> None:
    given = {"inputs": two_sides, "decoder_start_token_id": 1} | more
    model = model or f"{name}ForConditionalGeneration"
    hugging_face(name, "encoder-decoders", model, **given)


T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "relative_attention_num_buckets": 8,
    "tie_word_embeddings": True,
}
BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "init_std": 0.2,
}


def sound(generator: torch.Generator) -> Batch:
    batch = two_sides(generator)
    del batch["input_ids"]
    return batch | {"input_features": torch.randn(2, 8, 32, generator=generator)}


seq2seq("T5", sizes=T5)
seq2seq(
    "T5, gated",
    "T5ForConditionalGeneration",
    feed_forward_proj="gated-gelu",
    sizes=T5 | {"tie_word_embeddings": False},
)
seq2seq("UMT5", "UMT5ForConditionalGeneration", feed_forward_proj="gated-gelu", sizes=T5)
seq2seq(
    "LongT5",
    "LongT5ForConditionalGeneration",
    encoder_attention_type="local",
    local_radius=3,
    sizes=T5,
    eager=False,
)
seq2seq("BART", "BartForConditionalGeneration", sizes=BART)
seq2seq("BART, scaled", "BartForConditionalGeneration", scale_embedding=True, sizes=BART)
seq2seq(
    "Marian",
    "MarianMTModel",
    config="MarianConfig",
    sizes=BART | {"scale_embedding": True, "vocab_size": VOCAB},
)
seq2seq("Pegasus", sizes=BART | {"forced_eos_token_id": 2})
seq2seq("M2M-100", "M2M100ForConditionalGeneration", sizes=BART | {"scale_embedding": True})
seq2seq(
    "SwitchTransformers",
    "SwitchTransformersForConditionalGeneration",
    num_experts=2,
    sizes=T5,
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
    eager=False,
)
seq2seq(
    "Whisper",
    inputs=sound,
    num_mel_bins=8,
    max_source_positions=16,
    max_target_positions=32,
    sizes={k: v for k, v in BART.items() if k != "max_position_embeddings"},
)
seq2seq(
    "Speech2Text",
    "Speech2TextForConditionalGeneration",
    inputs=lambda g: sound(g) | {"input_features": torch.randn(2, 32, 8, generator=g)},
    input_feat_per_channel=8,
    input_channels=1,
    conv_channels=16,
    max_source_positions=32,
    max_target_positions=32,
    eager=False,
    sizes={k: v for k, v in BART.items() if k != "max_position_embeddings"},
)
seq2seq(
    "T5Gemma",
    "T5GemmaForConditionalGeneration",
    sizes={},
    vocab_size=VOCAB,
    **{
        side: {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        for side in ("encoder", "decoder")
    },
)
