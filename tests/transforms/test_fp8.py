"""fp8 as a transform: which sites it takes, what composes, errors, and a model that trains."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from core import TextConfig, VLMConfig, from_module, make_batch, vlm
from params import init_params
from params.tree import flatten, map_leaves
from tests.rounding import FP32
from transforms import (
    cast_matrices,
    checkpoint,
    compile,
    fp8,
    fuse_kernels,
    fuse_loss,
    lora,
    mixed_precision,
    unfused_loss,
    value_and_grad,
)

TEXT = TextConfig(vocab_size=61, dim=32, layers=4, heads=2, kv_heads=1, mlp_dim=48)
CONFIG = VLMConfig(TEXT)
LINEARS = {
    f"text.blocks.{i}.{name}"
    for i in range(4)
    for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
}


def converted(forward) -> set[str]:
    return {
        site.path
        for rule in forward.rules
        for site in forward.sites
        if rule.name == "fp8" and rule.applies(site)
    }


def test_the_first_and_the_last_block_stay() -> None:
    default = converted(fp8(vlm(CONFIG)))
    assert default == {p for p in LINEARS if p.split(".")[2] in "12"}
    assert converted(fp8(vlm(CONFIG), skip=())) == LINEARS
    some = converted(fp8(vlm(CONFIG), skip=("attn", "blocks.-1")))
    assert some == {p for p in LINEARS if "mlp" in p and ".3." not in p}


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_the_numbers_of_the_kernel_at_those_sites(
    example, assert_same, scaling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything else is as it was: with exact products in its place, so are all numbers."""
    params, batch = init_params(CONFIG), example(CONFIG)
    loss = unfused_loss(fp8(vlm(CONFIG), scaling=scaling))
    bare = unfused_loss(vlm(CONFIG))
    value, grads = value_and_grad(loss)(loss.prepare(params), batch)
    exact, wanted = value_and_grad(bare)(params, batch)
    assert 0 < abs(float(value - exact)) < 2**-4 * float(exact)
    for path, g in flatten(wanted).items():
        got = flatten(grads)[path]
        assert got.dtype == g.dtype
        # e5m2 gradients through 14 rounded layers of 2 blocks
        assert (got - g).norm() <= 0.25 * g.norm() + 1e-6, path
    given: list[tuple[str, torch.dtype]] = []

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None, *, scaling: str) -> Tensor:
        given.append((scaling, x.dtype))
        return F.linear(x, weight, bias)

    monkeypatch.setattr(kernels, "fp8_linear", plain)
    value, grads = value_and_grad(loss)(params, batch)
    assert given == [(scaling, torch.float32)] * 14
    torch.testing.assert_close(value, exact, rtol=FP32, atol=0)
    assert_same(grads, wanted)  # fp32; without rules, neighbours are one function


def loss_of(*steps):
    forward = vlm(CONFIG)
    for step in steps:
        forward = step(forward)
    return forward if "fuse_loss" in forward.applied else unfused_loss(forward)


def test_any_order(example, assert_same) -> None:
    """With each of the other transforms, before or after it: the same numbers."""
    batch = example(CONFIG)

    def adapted(forward):
        return lora(forward, rank=2)

    for other in (mixed_precision, checkpoint, fuse_loss, fuse_kernels, adapted):
        before, after = loss_of(other, fp8), loss_of(fp8, other)
        out = []
        for loss in (before, after):
            params = loss.prepare(init_params(CONFIG))
            params = map_leaves(lambda t: t + 0.1 if t.shape[-1] == 2 else t, params)
            out.append(value_and_grad(loss)(params, batch))
        assert torch.equal(out[0][0], out[1][0])
        assert_same(out[0][1], out[1][1], 0)


def test_mixed_precision_gives_the_kernel_16_bits(example, monkeypatch) -> None:
    """And the same numbers as matrices that were cast once."""
    batch, params = example(CONFIG), init_params(CONFIG)
    seen = set()
    real = kernels.fp8_linear

    def look(x: Tensor, weight: Tensor, bias: Tensor | None, *, scaling: str) -> Tensor:
        seen.add((x.dtype, weight.dtype))
        return real(x, weight, bias, scaling=scaling)

    monkeypatch.setattr(kernels, "fp8_linear", look)
    for steps in ((fp8, mixed_precision), (mixed_precision, fp8)):
        loss = loss_of(*steps)
        value, grads = value_and_grad(loss)(params, batch)
        assert seen == {(torch.bfloat16, torch.bfloat16)}
        assert {g.dtype for g in flatten(grads).values()} == {torch.float32}
    cast = loss_of(fp8)(cast_matrices(params, torch.bfloat16), batch)
    torch.testing.assert_close(cast, value, rtol=2**-8, atol=0)


def test_adapters_are_not_rounded(example, assert_same) -> None:
    """They alone learn, outside the layers that are rounded."""
    batch = example(CONFIG)
    loss = loss_of(fp8, lambda f: lora(f, rank=2))
    assert [rule.name for rule in loss.rules if rule.kind == "linear"] == ["fp8", "lora"]
    params = loss.prepare(init_params(CONFIG))
    value, grads = value_and_grad(loss)(params, batch)
    assert {path.rpartition(".")[2] for path in flatten(grads)} == {"lora_a", "lora_b"}
    assert torch.equal(value, loss_of(fp8)(init_params(CONFIG), batch))  # they begin as nothing


def test_compiled_it_is_the_same(example, assert_same) -> None:
    config = VLMConfig(replace(TEXT, layers=1))
    batch, params = example(config), init_params(config)
    torch._dynamo.reset()
    bare = unfused_loss(fp8(vlm(config), skip=()))
    eager = value_and_grad(bare)(params, batch)
    compiled = value_and_grad(compile(bare, backend="aot_eager"))
    value, grads = compiled(params, batch)
    torch.testing.assert_close(value, eager[0], rtol=FP32, atol=0)
    assert_same(grads, eager[1])


def test_what_it_says() -> None:
    forward = vlm(CONFIG)
    with pytest.raises(ValueError, match="'tensor' or 'row', not 'block'"):
        fp8(forward, scaling="block")
    with pytest.raises(ValueError, match="nope"):
        fp8(forward, skip=("nope",))
    with pytest.raises(ValueError, match="leaves no linear to compute in float8"):
        fp8(forward, skip=("blocks",))
    odd = VLMConfig(replace(TEXT, mlp_dim=40))
    loss = unfused_loss(fp8(vlm(odd)))
    text = r"text.blocks.1.mlp.\w+.weight is \[\d+, \d+\], and .* multiples of 16: skip="
    with pytest.raises(ValueError, match=text):
        loss.prepare(init_params(odd))


def test_explain_shows_which_matrices_stay() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.up = nn.Linear(16, 16), nn.Parameter(torch.randn(2, 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,eio->bo", self.router(x), self.up)

    forward, params = from_module(Experts())
    rows = {line.split()[1]: line for line in fp8(forward).explain(params).splitlines()[1:]}
    assert rows["router"].endswith("fp8")
    assert rows["up"].startswith("weight")
    assert "fp8" not in rows["up"]


def test_an_odd_layer_is_named_at_the_call(example) -> None:
    odd = VLMConfig(replace(TEXT, mlp_dim=40))
    with pytest.raises(ValueError, match=r"text.blocks.1.mlp.gate.weight is \[40, 32\]"):
        fp8(vlm(odd))(init_params(odd), example(odd))
    assert fp8(vlm(odd), skip=("mlp", "blocks.0"))(init_params(odd), example(odd)).isfinite().all()


@functools.cache
def losses(scaling: str | None, seed: int = 0, steps: int = 110) -> Tensor:
    """Of plain Adam on sequences of which each token tells the next but for noise. scaling: of fp8
    in every block, or None for fp32; seed: of the params, the data are the same."""
    generator = torch.Generator().manual_seed(0)
    config = VLMConfig(replace(TEXT, layers=2))
    forward = vlm(config) if scaling is None else fp8(vlm(config), skip=(), scaling=scaling)
    loss = unfused_loss(forward)
    params = map_leaves(lambda t: t.clone().requires_grad_(), init_params(config, seed))
    adam = torch.optim.Adam(flatten(params).values(), lr=3e-3)
    out = []
    for _ in range(steps):
        tokens = [torch.randint(2, 61, (8, 1), generator=generator)]
        for _ in range(12):
            surprise = torch.rand(8, 1, generator=generator) < 0.2
            other = torch.randint(2, 61, (8, 1), generator=generator)
            tokens.append(torch.where(surprise, other, 2 + (tokens[-1] * 7 + 3) % 59))
        value = loss(params, make_batch(torch.cat(tokens, 1)))
        adam.zero_grad()
        value.backward()
        adam.step()
        out.append(value.detach())
    return torch.stack(out)


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_a_model_learns_as_well(scaling: str) -> None:
    """Its loss stays nearer to that of fp32 than the loss of fp32 from other params does."""
    plain, other, low = losses(None), losses(None, seed=1), losses(scaling)
    last = slice(-30, None)
    assert plain[last].mean() < 0.5 * plain[:5].mean()  # there was something to learn
    noise = (plain[last] - other[last]).square().mean().sqrt()
    assert (low[last] - plain[last]).square().mean().sqrt() <= noise
    assert not torch.equal(low, plain)


def test_defaults_serve_a_foreign_module_and_its_changes_in_place() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(self.norm(x))
            h += self.b(x)
            return x + h

    class Tower(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.stages = nn.ModuleList(Block() for _ in range(count))

        def forward(self, x: Tensor) -> Tensor:
            for stage in self.stages:
                x = stage(x)
            return x

    for count, want in ((4, {"stages.1", "stages.2"}), (2, {"stages.0", "stages.1"})):
        forward, params = from_module(Tower(count))
        converted = fp8(forward)
        rule = next(rule for rule in converted.rules if rule.name == "fp8")
        inside = {s.path.rpartition(".")[0] for s in converted.sites if rule.applies(s)}
        assert inside == want
        loss = lambda p, b: converted(p, b).square().mean()  # noqa: B023, E731
        value_and_grad(loss)(params, {"x": torch.randn(2, 3, 16)})
