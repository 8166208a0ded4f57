"""What makes the model fast: one file a kernel, one dispatch."""

from kernels.attention import attention
from kernels.cross_entropy import cross_entropy
from kernels.dispatch import choose, override, report
from kernels.int8_linear import int8_linear
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.rms_norm import layer_norm, rms_norm
from kernels.rope import rope
from kernels.swiglu import swiglu

__all__ = [
    "attention",
    "choose",
    "cross_entropy",
    "int8_linear",
    "layer_norm",
    "linear_cross_entropy",
    "override",
    "report",
    "rms_norm",
    "rope",
    "swiglu",
]
