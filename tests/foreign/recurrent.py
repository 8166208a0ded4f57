"""State-space models, linear recurrences and hybrids of them with attention."""

from __future__ import annotations

from tests.foreign.families import hugging_face


def recurrent(name: str, model: str | None = None, **more: object) -> None:
    hugging_face(
        name,
        "recurrent",
        model or f"{name}ForCausalLM",
        eager=False,
        **more,  # type: ignore[arg-type]
    )


MAMBA = {
    "num_attention_heads": "absent",
    "num_key_value_heads": "absent",
    "intermediate_size": "absent",
}
SSD = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
    "mamba_expand": 2,
}

recurrent("Mamba", state_size=4, time_step_rank=4, **MAMBA)
recurrent("FalconMamba", state_size=4, time_step_rank=4, **MAMBA)
recurrent("Mamba2", state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=4, **MAMBA)
RWKV = {
    "attention_hidden_size": 32,
    "context_length": 16,
    "num_attention_heads": "absent",
    "num_key_value_heads": "absent",
}
recurrent("RWKV", "RwkvForCausalLM", **RWKV)  # changes its weights when it is first run
recurrent("RWKV, not rescaled", "RwkvForCausalLM", **RWKV, rescale_every=0)
recurrent(
    "Jamba",
    num_experts=2,
    num_experts_per_tok=1,
    mamba_d_state=4,
    mamba_dt_rank=4,
    use_mamba_kernels=False,
    attn_layer_period=2,
    attn_layer_offset=1,
    expert_layer_period=2,
    expert_layer_offset=1,
)
recurrent("Bamba", **SSD, attn_layer_indices=[1])
recurrent("FalconH1", **SSD, mamba_d_ssm=64, head_dim=8)
recurrent("LFM2", "Lfm2ForCausalLM", layer_types=["conv", "full_attention"])
recurrent(
    "RecurrentGemma",
    lru_width=32,
    block_types=["recurrent", "attention"],
    attention_window_size=4,
    head_dim=8,
)
recurrent(
    "Zamba2",
    num_hidden_layers=3,
    layers_block_type=["mamba", "hybrid", "hybrid"],
    mamba_d_state=8,
    mamba_headdim=8,
    mamba_ngroups=1,
    chunk_size=4,
    n_mamba_heads=8,
    num_mem_blocks=1,
    use_shared_attention_adapter=True,
    adapter_rank=4,
    attention_head_dim=16,
    num_key_value_heads=4,
)
recurrent(
    "GraniteMoE-hybrid",
    "GraniteMoeHybridForCausalLM",
    **SSD,
    num_local_experts=4,
    num_experts_per_tok=2,
    shared_intermediate_size=24,
    layer_types=["mamba", "attention"],
)
