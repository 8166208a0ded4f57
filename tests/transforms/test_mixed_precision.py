"""A cast where params enter: the numbers of a low-precision model, the gradients of its params."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.utils import parametrizations

from core import Rule, TextConfig, VLMConfig, from_module, make_batch, vlm
from params import init_params
from params.tree import flatten, map_leaves, unflatten
from tests.models import language
from transforms import (
    cast_matrices,
    checkpoint,
    fake_quant,
    fuse_loss,
    mixed_precision,
    quantize_int8,
    rematerialize,
    unfused_loss,
    value_and_grad,
)


def matrices_to(params, dtype: torch.dtype):
    return map_leaves(lambda t: t.to(dtype) if t.ndim >= 2 else t, params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["untied", "mlp", "resampler"])
def test_is_the_model_with_cast_matrices(
    micro, rough, example, assert_same, name: str, dtype: torch.dtype
) -> None:
    config = micro[name]
    params, batch, bare = rough(config, dtype=torch.float32), example(config), vlm(config)
    forward = mixed_precision(bare, dtype)
    want = bare(matrices_to(params, dtype), batch)
    got = forward(params, batch)
    assert got.dtype == want.dtype == dtype
    assert torch.equal(got, want)

    low = matrices_to(params, dtype)
    want_loss, want_grads = value_and_grad(fuse_loss(bare))(low, batch)
    for loss in (
        fuse_loss(forward),
        checkpoint(fuse_loss(forward)),
        fuse_loss(checkpoint(forward)),
    ):
        value, grads = value_and_grad(loss)(params, batch)
        assert value.dtype == torch.float32
        assert torch.equal(value, want_loss)
        assert {g.dtype for g in flatten(grads).values()} == {torch.float32}
        # a tied weight's two gradients meet in fp32 here, in the low dtype there
        tied = {"text.embed.weight"} if config.text.tied else set()
        for path, g in flatten(grads).items():
            want_g = flatten(want_grads)[path].float()
            assert_same(g, want_g, int(path in tied), torch.bfloat16)

    # Site by site, the gradients of an activation that goes several ways are added up in another
    # order: up to two roundings a block, of which there are two. (That of a key's bias is 0 but for
    # roundings: softmax does not see it.)
    singly = bare.with_rule(Rule("linear", lambda f, path: f))
    value, grads = value_and_grad(fuse_loss(singly))(low, batch)
    assert torch.equal(value, want_loss)
    got, want = (
        {path: g.float() for path, g in flatten(tree).items() if ".k.bias" not in path}
        for tree in (grads, want_grads)
    )
    assert_same(unflatten(got), unflatten(want), 8, dtype)


def test_gradients_are_those_of_fp32_to_low_precision(micro, rough, example) -> None:
    config = micro["mlp"]
    params, batch = rough(config, dtype=torch.float32), example(config)
    want = flatten(value_and_grad(unfused_loss(vlm(config)))(params, batch)[1])
    got = flatten(value_and_grad(fuse_loss(mixed_precision(vlm(config))))(params, batch)[1])
    overlap = sum((want[p] * got[p]).sum() for p in want)
    sizes = [sum(g[p].square().sum() for p in want).sqrt() for g in (want, got)]
    assert overlap / (sizes[0] * sizes[1]) > 0.99


def test_norms_and_biases_stay(micro, rough, example) -> None:
    """A norm's weight of 1 + 2 ** -10, which bf16 would round away, still counts."""
    config = micro["untied"]
    params, batch = rough(config, dtype=torch.float32), example(config)
    forward = mixed_precision(vlm(config), torch.bfloat16)
    params["text"]["norm"]["weight"] = torch.ones(16)
    seen = []

    def watch(f, path):
        return lambda p, x: seen.append(p["weight"]) or f(p, x)

    forward = mixed_precision(vlm(config).with_rule(Rule("norm", watch, ("text.norm",))))
    forward(params, batch)
    assert seen[0].dtype == torch.float32


def test_hugging_face(assert_same) -> None:
    model = language("Llama", attn_implementation="eager")
    forward, params = from_module(model)
    ids = torch.randint(0, 31, (2, 5))
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    got = mixed_precision(forward)(params, batch)
    assert got.dtype == torch.bfloat16
    want = model.to(torch.bfloat16)(input_ids=ids).logits  # every norm's weight is 1: bf16 holds it
    assert_same(got.float(), want.detach().float(), 2, torch.bfloat16)
    value, grads = value_and_grad(fuse_loss(checkpoint(mixed_precision(forward))))(params, batch)
    assert value.dtype == torch.float32
    assert {g.dtype for g in flatten(grads).values()} == {torch.float32}


@pytest.mark.parametrize("first", ["fake", "mixed"])
def test_training_sees_the_weights_that_will_be_deployed(first: str) -> None:
    """fake_quant in bf16 is as near to the int8 model as bf16 is, not as far as no rounding is."""
    config = VLMConfig(TextConfig(64, 64, 2, 2, 1, 128, tied=False))
    params, batch = init_params(config), make_batch(torch.randint(0, 64, (2, 32)))
    bare = vlm(config)
    deployed = quantize_int8(bare, skip=())
    want = deployed(deployed.prepare(params), batch)
    steps = [lambda f: fake_quant(f, skip=()), mixed_precision]
    forward = bare
    for step in steps if first == "fake" else reversed(steps):
        forward = step(forward)

    def noise(logits: torch.Tensor, reference: torch.Tensor) -> float:
        return float((logits.float() - reference).square().mean() / reference.square().mean())

    in_bf16 = noise(mixed_precision(bare)(params, batch), bare(params, batch))
    assert noise(forward(params, batch), want) < 1.5 * in_bf16


class RmsNorm(nn.Module):
    """Hugging Face's: an fp32 weight makes an fp32 result of bf16 x."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Mixer(nn.Module):
    """What is no site: attention of normed q and k and plain v, a router, a convolution, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.of_q = RmsNorm(8), RmsNorm(8)
        self.q, self.v, self.out = (nn.Linear(8, 8) for _ in range(3))
        self.router, self.gate = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.ones(8))
        self.conv = nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, v = self.of_q(self.q(h)), self.v(h)
        h = F.scaled_dot_product_attention(q[:, None], q[:, None], v[:, None])[:, 0]
        h = h + (q @ v.mT).softmax(-1) @ v * self.gate
        h = h + F.linear(h, self.router).softmax(-1).amax(-1, keepdim=True)
        return x + self.out(self.conv(h.mT).mT)


class Mixed(nn.Module):
    def __init__(self, rnn: bool) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(9, 8), nn.Parameter(0.1 * torch.randn(5, 8))
        self.layers = nn.ModuleList(Mixer() for _ in range(2))
        self.norm = RmsNorm(8)
        self.rnn = nn.GRU(8, 8, batch_first=True) if rnn else None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.places
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        x = x if self.rnn is None else self.rnn(x)[0]
        return x @ self.table.weight.T


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("rnn", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_modules_whose_code_brings_dtypes_together(
    assert_same, dtype: torch.dtype, rnn: bool
) -> None:
    """As under torch.autocast, or wider, by every driver, checkpointed or not."""
    forward, params = from_module(Mixed(rnn), call=lambda run, batch: run(batch["ids"]))
    batch = {"ids": torch.randint(0, 9, (2, 5))}

    def loss(f, p, b):
        return f(p, b).float().square().mean()

    want, want_grads = value_and_grad(lambda p, b: loss(forward, p, b))(params, batch)
    tolerance = (4, torch.bfloat16) if dtype == torch.bfloat16 else (64, torch.float32)
    mixed = mixed_precision(forward, dtype)
    assert mixed(params, batch).dtype == dtype
    for f in (mixed, checkpoint(mixed), mixed_precision(checkpoint(forward), dtype)):
        value, grads = value_and_grad(lambda p, b, f=f: loss(f, p, b))(params, batch)
        assert_same(value, want, *tolerance)
        assert_same(grads, want_grads, *tolerance)
        assert {g.dtype for g in flatten(grads).values()} == {torch.float32}
        assert_same(grad(lambda p, f=f: loss(f, p, batch))(params), grads, *tolerance)
        if rnn:
            continue  # torch's vmap does not take a GRU
        rows = {"ids": batch["ids"][:, None]}
        each = vmap(lambda b, f=f: grad(lambda p: loss(f, p, b))(params))(rows)
        assert_same(map_leaves(lambda g: g.mean(0), each), grads, *tolerance)
    assert_same(
        mixed(cast_matrices(params, dtype), batch).float(), forward(params, batch), *tolerance
    )


def test_the_second_run_of_a_block_is_under_the_autocast_of_the_first() -> None:
    seen = []

    def product(x: Tensor) -> Tensor:
        y = x @ x
        seen.append(y.dtype)
        return y

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return rematerialize(product)(x).float().sum()

    grad(loss)(torch.ones(2, 2))
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_dtypes_that_meet_nevertheless_are_named() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(2, 4).masked_scatter(
                torch.ones(2, 4, dtype=torch.bool), self.line(x)
            )

    forward, params = from_module(Fixed())
    with pytest.raises(RuntimeError, match="mixed_precision: the module's own code, Fixed, brings"):
        mixed_precision(forward)(params, {"x": torch.randn(2, 4)})


class Convolved(nn.Module):
    """A convolution, which is no site, before a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.line = nn.Conv1d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self.conv(x).mT)


def test_two_dtypes_in_foreign_code_are_named_with_the_remedy() -> None:
    forward, params = from_module(Convolved())
    batch = {"x": torch.randn(2, 4, 5)}
    low = cast_matrices(params, torch.bfloat16)
    with pytest.raises(TypeError, match=r"Conv1d of Convolved.* is torch\.bfloat16.*mixed_"):
        forward(low, batch)
    assert mixed_precision(forward)(low, batch).dtype == torch.bfloat16


class Counted(nn.Module):
    """Convolutions and running statistics; a matrix that is no parameter and is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.line = parametrizations.orthogonal(nn.Linear(4, 4))
        self.register_buffer("mix", torch.randn(4, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self.norm(self.conv(x)).mT) @ self.mix


@pytest.mark.filterwarnings("ignore:a call changes the buffers")
@pytest.mark.parametrize("buffers", [False, True])
def test_a_wider_dtype_takes_buffers_too(buffers: bool, assert_same) -> None:
    module, x = Counted(), torch.randn(2, 4, 5)
    forward, params = from_module(module, buffers=buffers)
    want = copy.deepcopy(module).double()
    out = mixed_precision(forward, torch.float64)(params, {"x": x})
    assert_same(out[0] if buffers else out, want(x.double()))
    if buffers:
        held = dict(module.named_buffers())  # they come back in the dtypes that they came in
        kept = {name: leaf.to(held[name].dtype) for name, leaf in want.named_buffers()}
        assert_same(out[1], unflatten(kept), 0)
    with torch.no_grad():
        still = mixed_precision(forward, torch.float64).with_mode(False)(params, {"x": x})
    before = copy.deepcopy(module).double().eval()
    assert_same(still[0] if buffers else still, before(x.double()))


def test_a_weight_that_is_computed_is_computed_in_its_own_dtype() -> None:
    """Householder's products end in NaN in bf16; autocast leaves what they are made of alone."""
    torch.manual_seed(0)
    forward, params = from_module(
        nn.Sequential(nn.Linear(16, 16), nn.Tanh(), parametrizations.orthogonal(nn.Linear(16, 16)))
    )
    low = mixed_precision(forward)
    x = {"input": torch.randn(3, 16)}
    _, grads = value_and_grad(lambda p, b: low(p, b).float().square().mean())(params, x)
    _, want = value_and_grad(lambda p, b: forward(p, b).square().mean())(params, x)
    for path, g in flatten(want).items():
        assert (flatten(grads)[path] - g).norm() <= 0.05 * g.norm() + 1e-4, path


def test_another_mode_is_in_low_precision_too() -> None:
    forward, params = from_module(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)))
    low = mixed_precision(forward)
    assert low(params, {"input": torch.ones(2, 4)}).dtype == torch.bfloat16
    still = low.with_mode(False)
    assert still(params, {"input": torch.ones(2, 4)}).dtype == torch.bfloat16
