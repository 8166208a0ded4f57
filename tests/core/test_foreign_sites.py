"""What from_module finds in models of all makes, and that nothing of theirs changes by it."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from core import Forward, Rule, from_module
from core.foreign import bridge
from core.foreign.found import is_norm, norm_form
from core.foreign.rotary import is_rotary
from core.sites import NormForm
from params.int8 import dequantize_weight, quantize_weight
from params.tree import Tree, flatten, map_leaves, unflatten
from tests.models import EYES, SIZES, language
from transforms import checkpoint, fake_quant, fuse_kernels, quantize_int8, value_and_grad

pytestmark = pytest.mark.filterwarnings(
    # torch's attention on a CPU has no batching rule
    "ignore:There is a performance drop:UserWarning"
)

# -- the odd one ----------------------------------------------------------------------------------


class Magnitude(nn.Module):
    """A norm with other names than usual."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.tiny = nn.Parameter(torch.randn(8)), 1e-3

    def forward(self, v: Tensor) -> Tensor:
        return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + self.tiny) * (1 + self.g)


class Wide(nn.Module):
    """x @ weight, without a bias."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(i, o) / 4)

    def forward(self, v: Tensor) -> Tensor:
        return v @ self.weight


class Mixer(nn.Module):
    """Attention through a helper method and a name of its own for the call."""

    def __init__(self) -> None:
        super().__init__()
        self.three, self.back = Wide(8, 24), nn.Linear(8, 8)

    def heads(self, v: Tensor) -> tuple[Tensor, ...]:
        return self.three(v).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)

    def mix(self, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*self.heads(v), None, 0.0, True)

    def forward(self, v: Tensor) -> Tensor:
        return self.back(self.mix(v).transpose(1, 2).flatten(2))


class Gate(nn.Module):
    """A gated MLP whose gate is the second half of one product, with an activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(8, 20), nn.Linear(10, 8)

    def forward(self, v: Tensor) -> Tensor:
        linear, gate = self.both(v).split(10, -1)
        return self.out(linear * F.relu(gate).square())


class Left(nn.Module):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.n, self.mixer, self.shared = Magnitude(), Mixer(), shared

    def forward(self, v: Tensor) -> Tensor:
        return v + self.shared(self.mixer(self.n(v)))


class Right(nn.Module):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.gate, self.n, self.shared = Gate(), nn.LayerNorm(8), shared

    def forward(self, *, stream: Tensor) -> Tensor:
        return stream + self.shared(self.gate(self.n(stream)))


class Odd(nn.Module):
    """Odd names, a shared layer, nested Sequentials, mixed blocks, a hook on one layer."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(8, 8)
        self.first = nn.Embedding(40, 8)
        pair = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()) for _ in range(2)]
        self.stem = nn.Sequential(nn.Sequential(*pair), nn.Tanh())
        self.body = nn.ModuleList([Left(shared), Right(shared), Left(shared)])
        self.last = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 40))
        self.body[2].mixer.back.register_forward_hook(lambda m, args, out: out * 2)

    def forward(self, ids: Tensor) -> Tensor:
        v = self.stem(self.first(ids))
        for layer in self.body:
            v = layer(stream=v) if isinstance(layer, Right) else layer(v)
        return self.last(v)


# -- makes of model -------------------------------------------------------------------------------

DECODER = {"embed": 1, "block": 2, "norm": 5, "rope": 2, "attention": 2, "glu": 2, "head": 1}
KINDS: dict[str, dict[str, int]] = {
    "llama": {**DECODER, "linear": 14},
    "qwen3": {**DECODER, "norm": 9, "linear": 14},
    # its attention is capped, so not torch's
    "gemma2": {k: n for k, n in DECODER.items() if k != "attention"} | {"norm": 9, "linear": 14},
    "gpt2": {"embed": 2, "block": 2, "norm": 5, "attention": 2, "linear": 8, "head": 1},
    "phi3": {**DECODER, "linear": 8},
    "vit": {"block": 3, "norm": 7, "attention": 3, "linear": 19},
    "llava": {**DECODER, "embed": 2, "block": 5, "norm": 13, "attention": 5, "linear": 34},
    # two of the stem, three of the body; the hooked linear is none, but its weight is
    "odd": {"embed": 1, "block": 5, "norm": 5, "attention": 2, "linear": 10, "glu": 1, "weight": 1},
}


LANGUAGE = {"llama": "Llama", "qwen3": "Qwen3", "gemma2": "Gemma2", "gpt2": "GPT2", "phi3": "Phi3"}


def make(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A module in fp32 and a batch for it."""
    ids = torch.randint(3, 39, (2, 9))
    if name == "odd":
        return Odd().eval(), {"ids": ids}
    hf = pytest.importorskip("transformers")
    pixels = torch.randn(2, 3, 16, 16)
    if name == "vit":
        return hf.ViTModel(hf.ViTConfig(**EYES)).eval(), {"pixel_values": pixels}
    if name == "llava":
        ids[:, 1:5] = 39
        config = hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**EYES),
            text_config=hf.LlamaConfig(**SIZES),
            image_token_id=39,
            image_seq_length=4,
        )
        model = hf.LlavaForConditionalGeneration(config)
        return model.eval(), {"input_ids": ids, "pixel_values": pixels}
    return language(LANGUAGE[name]), {"input_ids": ids}


def tensor_of(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    return out.logits if "logits" in out else out.last_hidden_state


def of(module: nn.Module) -> tuple[Forward, Tree]:
    hf = "config" in vars(module)

    def call(run: Any, batch: Any) -> Tensor:
        return tensor_of(
            run(**batch, **({"use_cache": False} if hf and "input_ids" in batch else {}))
        )

    return from_module(module, call=call)


def plain(module: nn.Module, params: Tree, batch: dict[str, Tensor]) -> Tensor:
    """The module itself; a copy, for functional_call leaves tensors in a layer with two names."""
    more = {"use_cache": False} if "input_ids" in batch else {}
    return tensor_of(functional_call(copy.deepcopy(module), flatten(params), (), {**batch, **more}))


def each_kind(forward: Forward, wrap: Any) -> Forward:
    for kind in sorted({s.kind for s in forward.sites}):
        forward = forward.with_rule(Rule(kind, wrap))
    return forward


def loss_of(run: Any) -> Any:
    return lambda p, b: run(p, b).square().mean()


@pytest.mark.parametrize("name", KINDS)
def test_sites_are_found_and_reached(name: str) -> None:
    """All of them give what they gave; the module and its attributes stay as they were."""
    module, batch = make(name)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    attributes = {n: sorted(vars(m)) for n, m in module.named_modules()}
    forward, params = of(module)
    assert Counter(s.kind for s in forward.sites) == KINDS[name]
    reached = []

    def wrap(f, path):
        return lambda p, *args: reached.append(path) or f(p, *args)

    with torch.no_grad():
        watched = each_kind(forward, wrap)(params, batch)
    assert torch.equal(watched, plain(module, params, batch))
    unreached = {s.path for s in forward.sites} - set(reached)
    # LLaVA reads the last but one layer of its eyes
    assert all(".layers.2" in p or "post_layernorm" in p for p in unreached) or not unreached
    other = map_leaves(lambda t: t * 1.1, params)
    assert torch.equal(forward(other, batch), plain(module, other, batch))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    hf = {"_output_capturing_hooks_installed"}  # its own doing, when it ran
    assert attributes == {n: sorted(vars(m).keys() - hf) for n, m in module.named_modules()}


def test_gradients_are_the_modules_by_every_driver(assert_same) -> None:
    """Of the odd one under a rule of every kind. Others: tests/transforms, tests/foreign."""
    module, batch = make("odd")
    forward, params = of(module)
    identity = each_kind(forward, lambda f, path: lambda p, *args: f(p, *args))
    each = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)]
    want = [
        value_and_grad(loss_of(lambda p, b: plain(module, p, b)))(params, one)[1] for one in each
    ]
    for run in (forward, identity, checkpoint(identity)):
        assert_same(value_and_grad(loss_of(run))(params, each[0])[1], want[0])
    assert_same(grad(loss_of(checkpoint(identity)))(params, each[0]), want[0])
    stacked = {k: v[:, None] for k, v in batch.items()}
    got = vmap(grad(loss_of(checkpoint(identity))), (None, 0))(params, stacked)
    for i in range(2):
        assert_same(map_leaves(lambda g, i=i: g[i], got), want[i])


def test_rules_inside_compile(assert_same) -> None:
    """Other models compiled, bare and under transforms: tests/transforms/table.py."""
    module, batch = make("odd")
    forward, params = of(module)
    ruled = each_kind(forward, lambda f, path: lambda p, *args: f(p, *args))
    for kind in ("attention", "glu"):
        ruled = ruled.with_rule(Rule(kind, lambda f, path: lambda p, *args: f(p, *args) * 0.5))
    ruled = checkpoint(ruled)
    want = value_and_grad(loss_of(ruled))(params, batch)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(loss_of(ruled), fullgraph=True, backend="aot_eager")
        value, grads = value_and_grad(compiled)(params, batch)
    assert_same(value, want[0])
    assert_same(grads, want[1])


# -- each kind ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["glu", "attention", "rope"])
def test_without_a_rule_nothing_is_rewritten(kind: str, monkeypatch) -> None:
    rewritten = []
    for name in ("rewrite_glu", "rewrite_calls"):
        rewrite = getattr(bridge, name)
        spy = lambda *args, r=rewrite, n=name: rewritten.append(n) or r(*args)  # noqa: E731
        monkeypatch.setattr(bridge, name, spy)
    forward, _ = of(make("llama")[0])
    checkpoint(forward)
    assert rewritten == []
    forward.with_rule(Rule(kind, lambda f, path: f))
    assert rewritten == 2 * ["rewrite_glu" if kind == "glu" else "rewrite_calls"]


def plain_rotary(q, k, cos, sin, unsqueeze_dim=1):
    halves = [torch.cat((-x[..., 4:], x[..., :4]), -1) for x in (q, k)]
    c, s = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * c + halves[0] * s, k * c + halves[1] * s


def clamped_rotary(q, k, cos, sin):
    return tuple(x.clamp(-100, 100) for x in plain_rotary(q, k, cos, sin))


def pairwise_rotary(q, k, cos, sin):
    turned = [torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) for x in (q, k)]
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * c + turned[0] * s, k * c + turned[1] * s


def with_a_mask_rotary(q, k, cos, sin, mask):
    return plain_rotary(q, k, cos * mask, sin * mask)


def test_rotary_positions_are_found_by_what_they_compute() -> None:
    assert is_rotary(plain_rotary)
    others = (clamped_rotary, pairwise_rotary, with_a_mask_rotary, F.linear, torch.add, None)
    assert not any(is_rotary(other) for other in others)


class Rotated(nn.Module):
    """Rotary positions with frequencies that learn, or with an option of the call."""

    def __init__(self, learns: bool = False, **options: Any) -> None:
        super().__init__()
        self.line, self.options, self.learns = nn.Linear(8, 8), options, learns
        self.frequencies = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:  # [B, heads, T, 8]
        frequencies = self.frequencies if self.learns else self.frequencies.detach()
        angles = torch.arange(x.shape[-2]).outer(torch.cat((frequencies, frequencies)))[None]
        q = self.line(x)
        q, k = plain_rotary(q, q[:, :1], angles.cos(), angles.sin(), **self.options)
        return q * k


@pytest.mark.parametrize("learns", [False, True])
def test_tables_that_are_differentiated_stay_the_modules(learns: bool, assert_same) -> None:
    module, x = Rotated(learns).double(), torch.randn(2, 3, 5, 8).double()
    forward, params = from_module(module)
    assert [s.kind for s in forward.sites if s.kind == "rope"] == ["rope"]
    loss = lambda f: lambda p: f(p, {"x": x}).square().mean()  # noqa: E731
    fused = fuse_kernels(forward)
    assert_same(grad(loss(fused))(params), grad(loss(forward))(params))
    moved = (map_leaves(torch.cos, params),)
    got, want = (jvp(loss(f), (params,), moved)[1] for f in (fused, forward))
    assert_same(got, want)
    assert (grad(loss(forward))(params)["frequencies"].abs().max() > 0) == learns


def test_options_of_a_call_are_the_modules(assert_same) -> None:
    module, x = Rotated(unsqueeze_dim=1), torch.randn(2, 3, 5, 8)
    forward, params = from_module(module)
    assert_same(fuse_kernels(forward)(params, {"x": x}), module(x).detach())


def test_attention_is_torchs_with_its_options() -> None:
    module, batch = make("odd")
    forward, params = of(module)
    seen = []

    def wrap(f, path):
        def run(p, q, k, v, options):
            seen.append((path, q.shape, options["is_causal"]))
            return torch.zeros_like(f(p, q, k, v, options))

        return run

    out = forward.with_rule(Rule("attention", wrap))(params, batch)
    assert seen == [(f"body.{i}.mixer", (2, 2, 9, 4), True) for i in (0, 2)]
    for i in (0, 2):
        module.body[i].mixer.mix = lambda v: v.new_zeros(2, 2, 9, 4)
    assert torch.equal(out, module(batch["ids"]))


def test_a_gated_mlp_is_told_by_what_it_does() -> None:
    class Mlp(nn.Module):
        def __init__(self, act: Any, swap: bool = False, drop: float = 0.0) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.act, self.swap, self.drop = act, swap, nn.Dropout(drop)

        def forward(self, v: Tensor) -> Tensor:
            a, b = (self.b(v), self.a(v)) if self.swap else (self.a(v), self.b(v))
            return self.c(self.drop(self.act(a) * b))

    class Sum(Mlp):
        def forward(self, v: Tensor) -> Tensor:
            return self.c(self.act(self.a(v)) + self.b(v))

    class Residual(Mlp):
        def forward(self, v: Tensor) -> Tensor:
            return v + super().forward(v)

    class Softmax(Mlp):
        def forward(self, v: Tensor) -> Tensor:
            return self.c(self.a(v).softmax(-1) * self.b(v))

    class Chain(Mlp):
        def forward(self, v: Tensor) -> Tensor:
            return self.c(self.act(self.a(v)) * self.b(self.a(v)))

    class Limited(Mlp):
        """Values of gate, of up and of their product, no further than this."""

        def __init__(self, *limits: float) -> None:
            super().__init__(F.silu)
            self.limits = limits

        def forward(self, v: Tensor) -> Tensor:
            gate, up, both = self.limits
            h = F.silu(self.a(v).clamp(max=gate)) * self.b(v).clamp(-up, up)
            return self.c(h.clamp(max=both))

    class Half(Mlp):
        """A limit in half precision alone."""

        def forward(self, v: Tensor) -> Tensor:
            a = self.a(v)
            return self.c(F.silu(a.clamp(max=1e4) if a.dtype == torch.float16 else a) * self.b(v))

    inf = math.inf
    tanh = nn.GELU(approximate="tanh")
    own = lambda t: t * torch.sigmoid(1.7 * t)  # noqa: E731
    hooked = Mlp(F.silu)
    hooked.b.register_forward_hook(lambda m, args, out: out + 1)
    cases: list[tuple[nn.Module, list[str | None]]] = [
        (Mlp(F.silu), ["silu"]),
        (Mlp(F.silu, swap=True), ["silu"]),
        (Mlp(nn.GELU()), ["gelu"]),
        (Mlp(tanh), ["gelu_tanh"]),
        (Mlp(own), [None]),
        (Mlp(F.relu), [None]),
        (Mlp(F.silu, drop=0.3).eval(), ["silu"]),
        (Mlp(F.silu, drop=0.3), []),
        (Sum(F.silu), []),
        (Residual(F.silu), []),
        (Softmax(F.silu), []),
        (Chain(F.silu), []),
        (hooked, []),
        (Limited(inf, inf, inf), ["silu"]),
        (Half(F.silu), [None]),
        *(
            (Limited(*(limit if i == j else inf for j in range(3))), [None])
            for i in range(3)
            for limit in (30.0, 6e4, 1e30)
        ),
        (Mlp(lambda t: F.silu(t).clamp(min=-0.25)), [None]),
        (Mlp(lambda t: F.gelu(t, approximate="tanh").clamp(max=1e12)), [None]),
    ]
    why = {
        Sum: "not compute act(gate)",
        Softmax: "not compute act(gate)",
        Residual: "not that of the",
        Chain: "does not call each of the first ones",
    }
    x = torch.randn(3, 6)
    for module, want in cases:
        state = torch.get_rng_state()
        forward, params = from_module(module, call=lambda run, b: run(b))
        assert torch.equal(torch.get_rng_state(), state)
        assert [s.activation for s in forward.sites if s.kind == "glu"] == want
        reason = "hooks" if module is hooked else why.get(type(module), "as with dropout")
        assert want or reason in forward.explain(), forward.explain()
        if want:
            ruled = forward.with_rule(Rule("glu", lambda f, path: lambda p, g, u: f(p, g, u)))
            assert torch.equal(ruled(params, x), module(x))
            silent = forward.with_rule(Rule("glu", lambda f, path: lambda p, g, u: 0 * u))
            assert torch.equal(silent(params, x), module.c.bias.expand(3, 6))


def test_linears_with_the_weight_the_other_way_round(assert_same) -> None:
    module, batch = make("gpt2")
    forward, params = of(module)
    turned = {s.path for s in forward.sites if s.transposed}
    assert len(turned) == 8
    shapes = {}

    def wrap(f, path):
        return lambda p, x: shapes.update({path: tuple(p["weight"].shape)}) or f(p, x)

    forward.with_rule(Rule("linear", wrap))(params, batch)
    assert shapes["transformer.h.0.attn.c_attn"] == (48, 16)
    assert params["transformer"]["h"]["0"]["attn"]["c_attn"]["weight"].shape == (16, 48)
    int8 = quantize_int8(forward)
    prepared = int8.prepare(params)
    leaf = prepared["transformer"]["h"]["0"]["mlp"]["c_fc"]
    assert leaf["weight_int8"].shape == (64, 16)
    assert leaf["weight_scale"].shape == (64, 1)
    want = fake_quant(forward)(params, batch)
    assert_same(int8(prepared, batch), want)
    assert not torch.equal(want, forward(params, batch))
    assert_same(checkpoint(int8)(prepared, batch), want)


def test_a_weight_used_both_ways_is_not_quantised() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), Wide(4, 4))
    module[1].weight = module[0].weight
    forward, params = from_module(module, call=lambda run, b: run(b))
    x = torch.randn(3, 4)
    assert torch.equal(forward(params, x), module(x))
    for transform in (quantize_int8, fake_quant):
        with pytest.raises(ValueError, match=r"0\.weight is used both as it is and transposed"):
            transform(forward, skip=())


def test_square_weights_are_told_apart() -> None:
    class Rows(Wide):
        def forward(self, v: Tensor) -> Tensor:
            return v @ self.weight.t()

    class Other(Wide):
        def forward(self, v: Tensor) -> Tensor:
            return v @ self.weight * 2

    module = nn.Sequential(Wide(4, 4), Rows(4, 4), Other(4, 4))
    forward, params = from_module(module, call=lambda run, b: run(b))
    sites = [(s.kind, s.path, s.transposed) for s in forward.sites]
    assert sites == [("linear", "0", True), ("linear", "1", False), ("weight", "2.weight", False)]
    x = torch.randn(3, 4)
    assert torch.equal(forward(params, x), module(x))


def test_layers_with_a_limit_are_no_plain_layers() -> None:
    class Line(nn.Linear):
        def forward(self, v: Tensor) -> Tensor:
            return super().forward(v).clamp(-1e4, 1e4)

    class Clipped(nn.Linear):
        def forward(self, v: Tensor) -> Tensor:
            return super().forward(v.clamp(max=1e20))

    class Table(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).clamp(-1e4, 1e4)

    for module in (Line(4, 4), Clipped(4, 4), Table(4, 4)):
        sites = from_module(nn.Sequential(module, nn.Linear(4, 4)))[0].sites
        assert [s.path for s in sites if s.kind in ("linear", "embed")] == ["1"]


def test_layers_of_known_numbers_and_other_gradients_are_not_what_they_look_like(
    assert_same: Any,
) -> None:
    """What detaches a factor, or scales a gradient, has gradients of its own under every rule."""

    class Shrunk(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            rows = super().forward(ids)
            return rows.detach() + (rows - rows.detach()) * 0.1

    class Still(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = nn.Parameter(torch.ones(8))

        def forward(self, v: Tensor) -> Tensor:
            return v * torch.rsqrt(v.detach().pow(2).mean(-1, keepdim=True) + 1e-6) * self.g

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, v: Tensor) -> Tensor:
            return self.c(F.silu(self.a(v)).detach() * self.b(v))

    module = nn.Sequential(Shrunk(9, 8), Still(), Gate(), nn.LayerNorm(8))
    forward, params = from_module(module)
    batch = {"input": torch.arange(9).view(3, 3)}
    module(**batch).cos().sum().backward()
    want = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()
    }
    with pytest.warns(UserWarning, match="leaves as they are: glu 2, norm 1"):
        fused = fuse_kernels(forward)
    assert not [s for s in forward.sites if s.kind == "embed"]
    for f in (forward, fused):
        grads = value_and_grad(lambda p, b, f=f: f(p, b).cos().sum())(params, batch)[1]
        assert_same(unflatten(want), grads)


@pytest.mark.parametrize("index", [0, 2, 50, -1])
def test_a_table_with_padding_is_looked_up_in(index: int) -> None:
    module = nn.Sequential(nn.Embedding(60, 4, padding_idx=index), nn.Linear(4, 2))
    forward, params = from_module(module)
    assert [(s.kind, s.path) for s in forward.sites] == [("embed", "0"), ("linear", "1")]
    batch = {"input": torch.arange(60)}
    module(**batch).sum().backward()
    grads = value_and_grad(lambda p, b: forward(p, b).sum())(params, batch)[1]
    assert torch.equal(grads["0"]["weight"], module[0].weight.grad)


def test_the_form_of_a_norm() -> None:
    hf = pytest.importorskip("transformers")
    gemma = hf.models.gemma2.modeling_gemma2.Gemma2RMSNorm

    class Hidden(Magnitude):
        """Its eps is nowhere to be seen."""

        def forward(self, v: Tensor) -> Tensor:
            return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 0.0123) * self.g

    class Clamped(nn.LayerNorm):
        """A limit of what goes in, or of what comes out."""

        def __init__(self, after: bool) -> None:
            super().__init__(8)
            self.after = after

        def forward(self, v: Tensor) -> Tensor:
            v = super().forward(v if self.after else v.clamp(-1e5, 1e5))
            return v.clamp(-1e5, 1e5) if self.after else v

    cases = [
        (nn.LayerNorm(8, eps=3e-4), NormForm("layer", 3e-4, 0.0, "weight", "bias")),
        (nn.LayerNorm(8, bias=False), NormForm("layer", 1e-5, 0.0, "weight", None)),
        (nn.RMSNorm(8, eps=1e-6), NormForm("rms", 1e-6, 0.0, "weight", None)),
        (gemma(8, eps=1e-6), NormForm("rms", 1e-6, 1.0, "weight", None)),
        (Magnitude(), NormForm("rms", 1e-3, 1.0, "g", None)),
        (Hidden(), None),
        (Clamped(False), None),
        (Clamped(True), None),
        (nn.RMSNorm(8), None),  # eps depends on the dtype
    ]
    for module, form in cases:
        assert is_norm(module)
        assert norm_form(module) == form


def test_a_shared_layer_is_ruled_wherever_it_stands(assert_same) -> None:
    module, batch = make("odd")
    forward, params = of(module)
    assert "shared" not in params["body"]["1"]
    int8 = quantize_int8(forward, skip=())
    want = fake_quant(forward, skip=())(params, batch)
    assert_same(int8(int8.prepare(params), batch), want)
    # one leaf, so that rounding it alone is rounding it in all three blocks
    others = {s.path for s in forward.select(("linear", "embed", "weight"))} - {"body.0.shared"}
    only = fake_quant(forward, skip=sorted(others))
    rounded = copy.deepcopy(params)
    leaf = rounded["body"]["0"]["shared"]
    leaf["weight"] = dequantize_weight(*quantize_weight(leaf["weight"]))
    assert_same(only(params, batch), forward(rounded, batch))


def test_hooks_of_a_block_run_once_and_outside() -> None:
    """Not again while a block is recomputed."""
    module, batch = make("odd")
    calls = []
    module.body[0].register_forward_hook(lambda m, args, out: calls.append(type(m).__name__))
    forward, params = of(module)
    value_and_grad(loss_of(checkpoint(forward)))(params, batch)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["odd", "llama"])
def test_a_part_of_a_model_is_a_model(name: str) -> None:
    parts = {"odd": "body.0.mixer", "llama": "model.layers.0.mlp"}
    part = make(name)[0].get_submodule(parts[name])
    x = torch.randn(2, 9, 8 if name == "odd" else 16)
    forward, params = from_module(part, call=lambda run, b: run(b))
    assert torch.equal(forward(params, x), part(x))
    kind = {"odd": "attention", "llama": "glu"}[name]
    assert [s.path for s in forward.sites if s.kind == kind] == [""]
    seen = []
    wrap = lambda f, path: lambda p, *args: seen.append(path) or f(p, *args)  # noqa: E731
    assert torch.equal(forward.with_rule(Rule(kind, wrap))(params, x), part(x))
    assert seen == [""]


def test_a_single_layer_is_a_model(assert_same) -> None:
    for layer in (nn.Linear(4, 3), Wide(4, 3), nn.LayerNorm(4)):
        forward, params = from_module(layer, call=lambda run, b: run(b))
        x = torch.randn(2, 4)
        assert torch.equal(forward(params, x), layer(x))
        assert len(forward.sites) == 1


def test_a_weight_that_is_read_outside_of_layers_is_ruled_there_too(assert_same) -> None:
    """A table whose rows are changed is no embed, its tied head is one."""

    class Squared(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) ** 2

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = Squared(7, 4), nn.Linear(4, 7, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.table(ids))

    forward, params = from_module(Tied(), head="out")
    ids = {"ids": torch.tensor([[0, 1]])}
    int8 = quantize_int8(forward, skip=())
    weight = dequantize_weight(*quantize_weight(params["table"]["weight"]))
    want = forward({"table": {"weight": weight}}, ids)
    assert_same(int8(int8.prepare(params), ids), want)
    assert_same(fake_quant(forward, skip=())(params, ids), want)


def test_tables_are_told_by_what_they_do() -> None:
    class Table(nn.Embedding):
        pass

    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 4

    class Squared(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) ** 2

    module = nn.ModuleDict({"a": Table(5, 4, padding_idx=0), "b": Scaled(5, 4), "c": Squared(5, 4)})
    forward, _ = from_module(module)
    sites = [(s.kind, s.path, s.scale) for s in forward.sites]
    assert sites == [("embed", "a", None), ("embed", "b", 4.0), ("weight", "c.weight", None)]
    assert "c (Squared): it does not return the table's rows" in forward.explain()


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-5)])
def test_norms_of_torch_take_another_dtype_than_their_weights(norm: nn.Module) -> None:
    forward, params = from_module(norm, call=lambda run, b: run(b))
    params = map_leaves(lambda t: t + 0.1 * torch.randn(8), params)
    x = torch.randn(3, 8)
    wide = forward(map_leaves(Tensor.double, params), x.double())
    assert torch.equal(forward(params, x.double()), wide)
    assert torch.equal(
        forward(params, x.bfloat16()), forward(params, x.bfloat16().float()).bfloat16()
    )


def test_leaves_that_nobody_asks_for_are_refused() -> None:
    forward, params = from_module(nn.Sequential(nn.Linear(3, 2)), call=lambda run, x: run(x))
    with pytest.raises(ValueError, match=r"hold \['0.gain'\], for which"):
        forward({"0": params["0"] | {"gain": torch.ones(2)}}, torch.ones(1, 3))
