"""Formats of weights: their leaves, their sizes, and what a new one costs: one entry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from params import estimate_size, formats, load_params, num_bytes, save_params
from params.formats import INT8, Format, beside, dtype_of, held_at, part_of, shape_of
from params.tree import flatten, unflatten
from transforms import trainable


def nibbles(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``w [..., O, I]`` -> two codes of 0 to 15 a byte, a step and a least number a row."""
    low, high = w.float().amin(-1, keepdim=True), w.float().amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-30)
    codes = ((w.float() - low) / step).round().to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, step, low


def from_nibbles(codes: Tensor, step: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    both = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return (both * step + low).to(dtype)


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


def test_a_format_that_is_unknown_is_no_format() -> None:
    flat = {f"a.{name}": leaf for name, leaf in NIBBLES.store(torch.ones(2, 4)).items()}
    assert not any(part_of(path, flat) for path in flat)


def test_int8_params_without_the_dtype_of_their_weights() -> None:
    p = INT8.store(torch.ones(2, 4, dtype=torch.bfloat16))
    del p["weight_dtype"]
    assert dtype_of(p) == torch.float32  # their scales'
