"""Cases: linear layers over int8 weights, with few rows (decoding) and with many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runners.benchmarks.harness import Case
from runners.benchmarks.providers import Forward, Inputs, Provider, ours, simple

WEIGHTS = 12  # used in turn, so that no weight is in the cache


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


def _case(m: int, k: int, n: int, dynamic: bool, providers: Sequence[Provider]) -> Case:
    return Case(
        "int8_linear",
        f"M={m} K={k} N={n}",
        float(2 * m * k * n if dynamic else k * n),
        "int8" if dynamic else "copy",
        _inputs(m, k, n),
        tuple(providers),
        sets=4 if dynamic else WEIGHTS,
        reference="bf16 matmul",
        direction="dynamic" if dynamic else "weight-only",
    )


def _providers(dynamic: bool) -> list[Provider]:
    def own(sets: Sequence[Inputs]) -> Forward:
        options: dict[str, Any] = {"activations": "dynamic"} if dynamic else {}
        function = ours("int8_linear", *options)
        return lambda i: function(i["x"], i["weight"], i["scale"], **options)

    def torchao(sets: Sequence[Inputs]) -> Forward:
        from torchao import quantization

        kind = "DynamicActivationInt8Weight" if dynamic else "WeightOnly"
        return _torchao(getattr(quantization, f"Int8{kind}Config")(set_inductor_config=False), sets)

    return [
        simple("bf16 matmul", lambda i: F.linear(i["x"], i["bf16"])),
        Provider("ours", own),
        Provider("torchao", torchao, peer="torchao"),
        Provider("bitsandbytes", _bitsandbytes, peer="bitsandbytes"),
    ]


def weight_only(m: int, k: int, n: int) -> Case:
    """The int8 weight is read once. The bf16 product is held to the same bytes, and reads twice as
    many."""

    def dequantised(i: Inputs) -> Tensor:
        return (F.linear(i["x"], i["weight"].to(i["x"].dtype)) * i["scale"]).to(i["x"].dtype)

    providers = _providers(dynamic=False)
    if m in (1, 16):  # one small and one that no library is made for: each compiles for seconds
        providers.insert(1, simple("torch.compile", dequantised, compiled=True))
    return _case(m, k, n, False, providers)


def dynamic(m: int, k: int, n: int) -> Case:
    """int8 x int8, rounding the activations included."""
    return _case(m, k, n, True, _providers(dynamic=True))


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
