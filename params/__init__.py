"""Parameter pytrees: initialization, formats of weights, and safetensors files."""

from params import paths, tree
from params.formats import is_scale
from params.init import init_params
from params.int8 import dequantize_weight, quantize_weight
from params.io import load_metadata, load_params, save_params
from params.sizes import Size, estimate_size
from params.spec import Leaf, Spec, count_leaves
from params.tree import (
    Tree,
    count,
    flatten,
    map_leaves,
    map_with_path,
    merge,
    num_bytes,
    partition,
    select,
    unflatten,
)

__all__ = [
    "Leaf",
    "Size",
    "Spec",
    "Tree",
    "count",
    "count_leaves",
    "dequantize_weight",
    "estimate_size",
    "flatten",
    "init_params",
    "is_scale",
    "load_metadata",
    "load_params",
    "map_leaves",
    "map_with_path",
    "merge",
    "num_bytes",
    "partition",
    "paths",
    "quantize_weight",
    "save_params",
    "select",
    "tree",
    "unflatten",
]
