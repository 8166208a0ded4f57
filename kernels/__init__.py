"""What makes the model fast: one file a kernel, one dispatch."""

from kernels.attention.attention import attention
from kernels.linear.glu_linear import glu_linear
from kernels.linear.linear import linear
from kernels.linear.norm_linears import add_norm_linears, norm_linears
from kernels.loss.cross_entropy import cross_entropy
from kernels.loss.linear_cross_entropy import linear_cross_entropy
from kernels.loss.token_logprobs import token_logprobs
from kernels.mlp.fused_mlp import add_norm_gated_mlp
from kernels.mlp.glu import geglu, relu2, swiglu
from kernels.norm.layer_norm import layer_norm
from kernels.norm.rms_norm import add_rms_norm, rms_norm
from kernels.optimizer.adamw import adamw_
from kernels.quantised.fp8_linear import fp8_linear
from kernels.quantised.int8_linear import int8_linear
from kernels.rope.rope import rope
from kernels.runtime.dispatch import choose, override, why_not

__all__ = [
    "adamw_",
    "add_norm_gated_mlp",
    "add_norm_linears",
    "add_rms_norm",
    "attention",
    "choose",
    "cross_entropy",
    "fp8_linear",
    "geglu",
    "glu_linear",
    "int8_linear",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "norm_linears",
    "override",
    "relu2",
    "rms_norm",
    "rope",
    "swiglu",
    "token_logprobs",
    "why_not",
]
