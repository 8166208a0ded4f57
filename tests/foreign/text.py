"""Decoders of text."""

from __future__ import annotations

from tests.foreign.families import VOCAB, hugging_face

GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "n_inner": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def text(name: str, model: str | None = None, **more: object) -> None:
    hugging_face(name, "text", model or f"{name}ForCausalLM", **more)  # type: ignore[arg-type]


text("Llama")
text("Llama, tied", "LlamaForCausalLM", tie_word_embeddings=True)
text(
    "Llama, one layer, biases",
    "LlamaForCausalLM",
    num_hidden_layers=1,
    attention_bias=True,
    mlp_bias=True,
    num_key_value_heads=1,
    intermediate_size=40,
)
text("Mistral", sliding_window=4)
text("Qwen2", use_sliding_window=False)
text("Qwen3", head_dim=8, tie_word_embeddings=True)
text("Gemma", head_dim=8)
text("Gemma2", head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0, sliding_window=4)
text(
    "Gemma3",
    "Gemma3ForCausalLM",
    config="Gemma3TextConfig",
    head_dim=8,
    sliding_window=4,
    query_pre_attn_scalar=8,
    layer_types=["sliding_attention", "full_attention"],
)
text(
    "Gemma3n",
    "Gemma3nForCausalLM",
    config="Gemma3nTextConfig",
    head_dim=8,
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    laurel_rank=4,
    altup_num_inputs=2,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=VOCAB,
    sliding_window=4,
    intermediate_size=[48] * 4,
    layer_types=["sliding_attention", "full_attention"] * 2,
    activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
)
text("Phi", partial_rotary_factor=0.5)
text("Phi3", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
text("OLMo", "OlmoForCausalLM", clip_qkv=2.0)
text("OLMo2", "Olmo2ForCausalLM")
text("OLMo3", "Olmo3ForCausalLM", sliding_window=4)
text("Cohere", logit_scale=0.25)
text("Cohere2", sliding_window=4)
text("GPT-2", "GPT2LMHeadModel", sizes=GPT2)
text("GPT-BigCode", "GPTBigCodeForCausalLM", sizes=GPT2)
text("GPT-J", "GPTJForCausalLM", sizes=GPT2, rotary_dim=4)
text(
    "GPT-Neo",
    "GPTNeoForCausalLM",
    attention_types=[[["global", "local"], 1]],
    num_layers=2,
    num_heads=4,
    window_size=4,
    max_position_embeddings=32,
    num_attention_heads="absent",
    num_hidden_layers="absent",
)
text("GPT-NeoX", "GPTNeoXForCausalLM")
text("CodeGen", "CodeGenForCausalLM", sizes=GPT2, rotary_dim=4)
text("Bloom", n_layer=2, n_head=4, num_hidden_layers="absent", num_attention_heads="absent")
text(
    "MPT",
    "MptForCausalLM",
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=32,
    sizes={"vocab_size": VOCAB, "initializer_range": 0.2},
)
text("Falcon", new_decoder_architecture=False, multi_query=True, parallel_attn=True, bias=True)
text("Falcon, new", "FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2)
text("OPT", "OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=32)
text("StableLM", "StableLmForCausalLM", qk_layernorm=True)
text("Starcoder2", "Starcoder2ForCausalLM")
text("Nemotron")
text("Granite", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5)
text("SmolLM3", "SmolLM3ForCausalLM", no_rope_layers=[1, 0])
text("GLM4", "Glm4ForCausalLM", head_dim=8)
text("Exaone4", "Exaone4ForCausalLM", sliding_window=4)
text("Apertus")
text("DiffLlama")
text("Nanochat", "NanoChatForCausalLM")
text("BioGPT", "BioGptForCausalLM", max_position_embeddings=32)
text(
    "XGLM",
    "XGLMForCausalLM",
    d_model=32,
    ffn_dim=48,
    num_layers=2,
    attention_heads=4,
    max_position_embeddings=32,
    hidden_size="absent",
    num_hidden_layers="absent",
    num_attention_heads="absent",
)
text(
    "MiniCPM3",
    "MiniCPM3ForCausalLM",
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
    head_dim=8,
    num_key_value_heads=4,
)
text(
    "ModernBERT-decoder",
    "ModernBertDecoderForCausalLM",
    local_attention=4,
    cls_token_id=1,
    sep_token_id=2,
)
text(
    "CTRL",
    "CTRLLMHeadModel",
    config="CTRLConfig",
    sizes={k: v for k, v in GPT2.items() if k != "n_inner"} | {"dff": 48},
    eager=False,
)
