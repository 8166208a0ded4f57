"""What makes the model fast: one file a kernel, one dispatch."""

from kernels.adamw import adamw_
from kernels.attention import attention
from kernels.cross_entropy import cross_entropy
from kernels.dispatch import choose, override, report
from kernels.fp8_linear import fp8_linear
from kernels.fused_linear import add_norm_linears, glu_linear, norm_linears
from kernels.fused_mlp import add_norm_gated_mlp
from kernels.glu import geglu, relu2, swiglu
from kernels.int8_linear import int8_linear
from kernels.linear import linear
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.rms_norm import add_rms_norm, layer_norm, rms_norm
from kernels.rope import rope

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
    "report",
    "rms_norm",
    "rope",
    "swiglu",
]
