"""Transforms: functions from Forward to Forward, one per file."""

from transforms.accumulate import accumulate, accumulate_grads
from transforms.checkpoint import checkpoint, rematerialize
from transforms.compile import compile
from transforms.cuda_graph import cuda_graph
from transforms.fp8 import fp8
from transforms.fuse_kernels import fuse_kernels
from transforms.fuse_loss import fuse_loss, token_logprobs, unfused_loss
from transforms.lora import lora, merge_lora
from transforms.mixed_precision import cast_matrices, mixed_precision
from transforms.quantize_int8 import fake_quant, quantize_int8
from transforms.value_and_grad import trainable, value_and_grad

__all__ = [
    "accumulate",
    "accumulate_grads",
    "cast_matrices",
    "checkpoint",
    "compile",
    "cuda_graph",
    "fake_quant",
    "fp8",
    "fuse_kernels",
    "fuse_loss",
    "lora",
    "merge_lora",
    "mixed_precision",
    "quantize_int8",
    "rematerialize",
    "token_logprobs",
    "trainable",
    "unfused_loss",
    "value_and_grad",
]
