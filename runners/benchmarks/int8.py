"""Cases: linear layers over int8 weights, with few rows (decoding) and with many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runners.benchmarks.harness import Case
from runners.benchmarks.providers import Forward, Inputs, Provider, ours, simple

WEIGHTS = 12  # in turn, so that none is in the cache


def cases() -> list[Case]:
    return [
        *(weight_only(m, 2048, 8192) for m in (1, 2, 4, 8, 16, 32, 64)),
        *(dynamic(m, 2048, 8192) for m in (1024, 4096, 16384)),
    ]


def _inputs(m: int, k: int, n: int) -> Any:
    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        kind: Any = {"generator": generator, "device": device}
        # normal, as trained weights are, and rounded before: quantising the bf16 weight gives these
        # very numbers
        normal = torch.randn(n, k, **kind)
        largest = normal.abs().amax(1, keepdim=True)
        weight = (normal * (127 / largest)).round().to(torch.int8)
        scale = (0.5 + torch.rand(n, **kind)) * k**-0.5 / 64
        return {
            "x": torch.randn(m, k, dtype=torch.bfloat16, **kind),
            "weight": weight,
            "scale": scale,
            "bf16": (weight * scale[:, None]).to(torch.bfloat16),
        }

    return inputs


def _dense(i: Inputs) -> Tensor:
    return F.linear(i["x"], i["bf16"])


def weight_only(m: int, k: int, n: int) -> Case:
    """The int8 weight is read once. The bf16 product is held to the same bytes, and reads twice as
    many."""

    def mine(sets: Sequence[Inputs]) -> Forward:
        function = ours("int8_linear")
        return lambda i: function(i["x"], i["weight"], i["scale"])

    def dequantised(i: Inputs) -> Tensor:
        return (F.linear(i["x"], i["weight"].to(i["x"].dtype)) * i["scale"]).to(i["x"].dtype)

    def torchao(sets: Sequence[Inputs]) -> Forward:
        from torchao.quantization import Int8WeightOnlyConfig

        return _torchao(Int8WeightOnlyConfig(set_inductor_config=False), sets)

    providers = [
        simple("bf16 matmul", _dense),
        Provider("ours", mine),
        Provider("torchao", torchao, peer="torchao"),
        Provider("bitsandbytes", _bitsandbytes, peer="bitsandbytes"),
    ]
    if m in (1, 16):  # one small and one that no library is made for: each compiles for seconds
        providers.insert(1, simple("torch.compile", dequantised, compiled=True))
    return Case(
        "int8_linear",
        f"M={m} K={k} N={n}",
        float(k * n),
        "copy",
        _inputs(m, k, n),
        tuple(providers),
        sets=WEIGHTS,
        reference="bf16 matmul",
        direction="weight-only",
    )


def dynamic(m: int, k: int, n: int) -> Case:
    """int8 x int8, rounding the activations included."""

    def mine(sets: Sequence[Inputs]) -> Forward:
        function = ours("int8_linear", "activations")
        return lambda i: function(i["x"], i["weight"], i["scale"], activations="dynamic")

    def torchao(sets: Sequence[Inputs]) -> Forward:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return _torchao(Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), sets)

    return Case(
        "int8_linear",
        f"M={m} K={k} N={n}",
        2.0 * m * k * n,
        "int8",
        _inputs(m, k, n),
        (
            simple("bf16 matmul", _dense),
            Provider("ours", mine),
            Provider("torchao", torchao, peer="torchao"),
            Provider("bitsandbytes", _bitsandbytes, peer="bitsandbytes"),
        ),
        sets=4,
        reference="bf16 matmul",
        direction="dynamic",
    )


def _torchao(config: Any, sets: Sequence[Inputs]) -> Forward:
    """quantize_ on a linear layer and torch.compile, as its documentation has it."""
    from torch._inductor import config as inductor
    from torchao.quantization import quantize_

    layers = {}
    for i in sets:
        out, inner = i["bf16"].shape
        layer = torch.nn.Linear(inner, out, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(i["bf16"].clone(), requires_grad=False)
        quantize_(layer, config)
        layers[id(i)] = layer.weight
    linear = torch.compile(F.linear, fullgraph=True, dynamic=False)
    # What it sets itself if one lets it, for the whole process and for good.
    wished = ("coordinate_descent_tuning", "coordinate_descent_check_all_directions")
    settings = dict.fromkeys((*wished, "force_fuse_int_mm_with_mul"), True)
    with inductor.patch(settings), torch.no_grad():
        linear(sets[0]["x"], layers[id(sets[0])])
    return lambda i: linear(i["x"], layers[id(i)])


def _bitsandbytes(sets: Sequence[Inputs]) -> Forward:
    """Its int8 layer, in the fp16 that it computes in. Activations are rounded to int8 too."""
    import bitsandbytes

    layers, rows = {}, {}
    for i in sets:
        out, inner = i["bf16"].shape
        layer = bitsandbytes.nn.Linear8bitLt(inner, out, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(
            i["bf16"].half().cpu(), requires_grad=False, has_fp16_weights=False
        )
        layers[id(i)] = layer.to(i["x"].device)  # quantised on the way
        rows[id(i)] = i["x"].half()
    return lambda i: layers[id(i)](rows[id(i)])
