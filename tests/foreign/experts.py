"""Mixtures of experts."""

from __future__ import annotations

from tests.foreign.families import VOCAB, hugging_face

MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


def moe(name: str, model: str | None = None, **more: object) -> None:
    hugging_face(name, "experts", model or f"{name}ForCausalLM", **more)  # type: ignore[arg-type]


moe("Mixtral", num_experts_per_tok=2, num_local_experts=4)
moe(
    "Qwen2-MoE",
    "Qwen2MoeForCausalLM",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
)
moe(
    "Qwen3-MoE",
    "Qwen3MoeForCausalLM",
    num_experts=4,
    num_experts_per_tok=2,
    head_dim=8,
    moe_intermediate_size=16,
    norm_topk_prob=True,
)
moe(
    "Qwen3-Next",
    "Qwen3NextForCausalLM",
    num_experts=4,
    num_experts_per_tok=2,
    head_dim=8,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)
moe("OLMoE", "OlmoeForCausalLM", num_experts=4, num_experts_per_tok=2)
moe(
    "gpt-oss",
    "GptOssForCausalLM",
    num_experts_per_tok=2,
    num_local_experts=4,
    head_dim=8,
    sliding_window=4,
)
moe("GraniteMoE", "GraniteMoeForCausalLM", num_local_experts=4, num_experts_per_tok=2)
moe(
    "DBRX",
    "DbrxForCausalLM",
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=32,
    attn_config={"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 1e4},
    ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    sizes={"vocab_size": VOCAB, "initializer_range": 0.2},
)
moe("Phi-MoE", "PhimoeForCausalLM", num_local_experts=4, num_experts_per_tok=2, sliding_window=4)
moe(
    "DeepSeek-V2",
    "DeepseekV2ForCausalLM",
    **MLA,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
    head_dim=4,
)
moe(
    "DeepSeek-V3",
    "DeepseekV3ForCausalLM",
    **MLA,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
    head_dim=4,
)
moe(
    "GLM4-MoE",
    "Glm4MoeForCausalLM",
    n_routed_experts=4,
    n_shared_experts=1,
    head_dim=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    use_qk_norm=True,
)
moe("JetMoE", "JetMoeForCausalLM", num_local_experts=4, num_experts_per_tok=2, kv_channels=8)
moe(
    "Llama4",
    "Llama4ForCausalLM",
    config="Llama4TextConfig",
    intermediate_size_mlp=40,
    num_local_experts=4,
    head_dim=8,
    num_experts_per_tok=1,
    attention_chunk_size=8,
    interleave_moe_layer_step=2,
)
moe(
    "Ernie4.5-MoE",
    "Ernie4_5_MoeForCausalLM",
    moe_num_experts=4,
    moe_k=2,
    moe_num_shared_experts=1,
    moe_intermediate_size=16,
    moe_layer_start_index=1,
)
