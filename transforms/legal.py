"""The pairs of transforms that raise. All others compose in any order."""

from __future__ import annotations

from core.forward import Forward

ILLEGAL: dict[tuple[str, str], str] = {
    ("fuse_loss", "fuse_loss"): "the forward already ends in a loss",
    ("fuse_loss", "unfused_loss"): "the forward already ends in a loss",
    ("unfused_loss", "unfused_loss"): "the forward already ends in a loss",
    ("fuse_loss", "token_logprobs"): "the forward already ends in a loss",
    ("unfused_loss", "token_logprobs"): "the forward already ends in a loss",
    ("token_logprobs", "token_logprobs"): "the forward already ends in log-probabilities",
    ("quantize_int8", "quantize_int8"): "its weights are int8 already: merge the two skip= lists",
    ("fake_quant", "fake_quant"): "its weights are rounded already: merge the two skip= lists",
    ("fake_quant", "quantize_int8"): (
        "fake_quant trains float weights and quantize_int8 replaces them: "
        "apply quantize_int8 to the bare forward once training is done"
    ),
    ("fp8", "fp8"): "its products are float8 already: merge the two skip= lists",
    ("fp8", "quantize_int8"): (
        "fp8 rounds float weights that train and quantize_int8 replaces them: "
        "apply quantize_int8 to the bare forward once training is done"
    ),
    ("fp8", "fake_quant"): (
        "weights would be rounded twice, to float8 of int8, "
        "which is neither what trains nor what quantize_int8 gives: choose one"
    ),
    ("mixed_precision", "mixed_precision"): "it would cast twice",
    ("lora", "lora"): "it has adapters already: merge_lora first",
    ("compile", "compile"): "it is compiled already",
}


def check_legal(forward: Forward, name: str) -> None:
    """Raises ValueError if ``name`` may not be applied to this forward, with the reason."""
    for other in forward.applied:
        reason = ILLEGAL.get((other, name)) or ILLEGAL.get((name, other))
        if reason:
            raise ValueError(f"{name} cannot be applied after {other}: {reason}")
