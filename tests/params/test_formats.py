"""Formats of weights: their leaves, their sizes, and what a new one costs: one entry."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import Forward, as_module, from_module, vlm
from params import estimate_size, formats, load_params, num_bytes, save_params
from params.formats import INT8, Format, beside, dtype_of, held_at, part_of, shape_of
from params.tree import flatten, unflatten
from transforms import (
    cast_matrices,
    fuse_loss,
    lora,
    merge_lora,
    mixed_precision,
    trainable,
    unfused_loss,
    value_and_grad,
)
from transforms.quantize_int8 import quantize, targets


def nibbles(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``w [..., O, I]`` -> two codes of 0 to 15 a byte, a step and a least number a row."""
    low, high = w.float().amin(-1, keepdim=True), w.float().amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-30)
    codes = ((w.float() - low) / step).round().to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, step, low


def from_nibbles(codes: Tensor, step: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    both = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return (both * step + low).to(dtype)


def product(x: Tensor, codes: Tensor, step: Tensor, low: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, from_nibbles(codes, step, low, x.dtype), bias)


NIBBLES = Format(
    "nibbles",
    ("weight_nibbles", "weight_step", "weight_low"),
    nibbles,
    from_nibbles,
    lambda shape: torch.Size(shape).numel() // 2 + 8 * torch.Size(shape[:-1]).numel(),
    packed=2,
)


@pytest.fixture(params=[INT8, NIBBLES], ids=lambda format: format.name)
def each(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Format:
    monkeypatch.setitem(formats.FORMATS, request.param.name, request.param)
    return request.param


@pytest.mark.parametrize("shape", [(6, 8), (3, 6, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_in_a_format(each: Format, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    p = each.store(w)
    assert set(p) == {*each.leaves, "weight_dtype"} <= {*formats.added()}
    assert num_bytes(p) == each.nbytes(shape)
    assert (shape_of(p), dtype_of(p)) == (shape, dtype)
    got = each.load(p, torch.float64)
    step = p[each.leaves[1]].double()
    # half of one, and fp32's rounding of the step, the quotient and what comes of them
    assert ((got - w.double()).abs() <= step * (0.5 + 4 * 127 * 2**-23)).all()
    rows = [leaf[..., 1:3, :] for leaf in each.tensors(p)]
    assert torch.equal(each.dequantize(*rows, torch.float64), got[..., 1:3, :])
    with pytest.raises(KeyError, match=rf"expects {each.name}: params = forward.prepare"):
        each.load({"weight": w}, dtype)
    assert (shape_of({"weight": w}), dtype_of({"weight": w})) == (shape, dtype)


@pytest.mark.parametrize("at", ["a.weight", "experts.down_proj", "weight"])
def test_who_knows_a_format_by_its_entry(each: Format, at: str, tmp_path) -> None:
    """Sizes, files and what trains."""
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    flat = {beside(at, name): leaf for name, leaf in each.store(w).items()}
    flat["logit_scale"] = torch.ones(3)  # nobody's scale
    assert held_at(flat, at).keys() == each.store(w).keys()
    parts = {name: (part_of(beside(at, name), flat) or (None, ""))[1] for name in each.store(w)}
    assert parts == {name: name for name in parts}
    assert part_of("logit_scale", flat) is None
    params = unflatten(flat)
    size = estimate_size(params)
    assert size.parameters == 24 + 3
    assert size.mb_now * 1e6 == each.nbytes((4, 6)) + 12
    assert size.mb_int8 * 1e6 == INT8.nbytes((4, 6)) + 6
    assert size.mb_fp16 * 1e6 == 2 * 27
    save_params(params, tmp_path)
    loaded = flatten(load_params(tmp_path, dtype=torch.float16))
    for name in each.leaves:
        assert torch.equal(loaded[beside(at, name)], flat[beside(at, name)])
        assert loaded[beside(at, name)].dtype == flat[beside(at, name)].dtype
    learns, _ = trainable(params)
    assert set(flatten(learns)) == {"logit_scale"}
    adapter = {beside(at, name): torch.ones(2, 2) for name in formats.ADAPTERS}
    learns, _ = trainable(unflatten(flat | adapter))
    assert set(flatten(learns)) == set(adapter)


def test_leaves_are_named_by_their_registry_alone() -> None:
    root = Path(formats.__file__).parents[1]
    files = [
        path for room in ("core", "params", "transforms") for path in (root / room).rglob("*.py")
    ]
    assert len(files) > 30
    for path in set(files) - {Path(formats.__file__)}:
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Constant) and node.value in formats.added()
            assert not named, f"{path.name} names {node.value!r}: params.formats does"


def test_a_format_that_is_unknown_is_no_format() -> None:
    flat = {f"a.{name}": leaf for name, leaf in NIBBLES.store(torch.ones(2, 4)).items()}
    assert not any(part_of(path, flat) for path in flat)


def test_int8_params_without_the_dtype_of_their_weights() -> None:
    p = INT8.store(torch.ones(2, 4, dtype=torch.bfloat16))
    del p["weight_dtype"]
    assert dtype_of(p) == torch.float32  # their scales'


class Reads(nn.Module):
    """A table that is also the head, a linear, and experts whose weight its code reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(61, 8), nn.Linear(8, 8)
        self.experts = nn.Parameter(torch.randn(2, 8, 8, dtype=torch.float64) / 3)
        self.head = nn.Linear(8, 61, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.linear(self.embed(ids)))
        return self.head(x + torch.einsum("btd,eod->bto", x, self.experts))


def _foreign() -> tuple[Forward, Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    forward, params = from_module(
        Reads().double(), head="head", call=lambda run, batch: run(batch["ids"])
    )
    ids = torch.randint(61, (2, 5))
    return forward, params, {"ids": ids, "labels": ids.roll(-1, 1)}


@pytest.mark.parametrize("name", ["native", "foreign"])
def test_a_new_format_goes_with_the_transforms(
    name: str, monkeypatch, micro, rough, example, assert_same
) -> None:
    """Every kind of site, tied ones too, beside adapters, casts and a fused loss."""
    monkeypatch.setitem(formats.FORMATS, NIBBLES.name, NIBBLES)
    if name == "native":
        forward, params, batch = vlm(micro["mlp"]), rough(micro["mlp"]), example(micro["mlp"])
        # pixels would be fp32, and quantised linears compute in the dtype of their input
        batch["patches"] = batch["patches"].double() / 127.5 - 1
    else:
        forward, params, batch = _foreign()
    paths = targets(forward, (), None)
    small = quantize(forward, paths, NIBBLES, product)
    ready = small.prepare(params)
    assert not paths & flatten(ready).keys()
    rounded = flatten(params)
    for path in paths:
        weight = rounded[path]
        rounded[path] = NIBBLES.load(NIBBLES.store(weight), weight.dtype)
    want = forward(unflatten(rounded), batch)
    assert not torch.allclose(want, forward(params, batch), rtol=1e-3)
    assert_same(small(ready, batch), want)
    lazy = small.with_step("shape", finish=lambda logits, batch: logits.shape)
    assert lazy(ready, batch) == want.shape
    module = as_module(small, ready)
    assert {p.rpartition(".")[2] for p, _ in module.named_buffers()} >= {"weight_nibbles"}
    assert_same(module(batch), want)

    # adapters over it, made from its shapes and dtype, and the loss of a quantised head
    tuned = fuse_loss(lora(small, rank=2))
    adapted = tuned.prepare(params)
    adapted = unflatten(
        {p: t + 0.1 if "lora" in p else t for p, t in flatten(adapted).items()}  # B begins at 0
    )
    linears = {p for p in flatten(adapted) if p.endswith("lora_a")}
    assert linears
    assert {flatten(adapted)[p].dtype for p in linears} == {torch.float64}
    merged = {p: t for p, t in flatten(adapted).items() if "lora" in p} | rounded
    merged = merge_lora(forward, unflatten(merged), dtype=torch.float64)
    loss, grads = value_and_grad(tuned)(adapted, batch)
    assert_same(loss, unfused_loss(forward)(merged, batch), dtype=torch.float32)  # merged so
    assert set(flatten(grads)) == {p for p in flatten(adapted) if "lora" in p}
    assert all(leaf.abs().max() > 0 for leaf in flatten(grads).values())
    with pytest.raises(ValueError, match="is quantised: merge the adapters into the float params"):
        merge_lora(forward, adapted)

    # casts: scales stay, the rest is what it is for a float weight
    cast = cast_matrices(ready, torch.float32)
    for path, leaf in flatten(ready).items():
        after = flatten(cast)[path].dtype
        if path.endswith(("_nibbles", "_step", "_low")):
            assert after == leaf.dtype
        elif path.endswith("_dtype"):
            assert after == torch.float32
    low = mixed_precision(small, torch.float32)
    assert_same(low(ready, batch).double(), want, dtype=torch.float32)
