"""Plain torch modules, of the kinds that people write themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from tests.foreign.families import VOCAB, Batch, Family, register

D = 16


def ids(generator: torch.Generator) -> Batch:
    tokens = torch.randint(1, VOCAB, (2, 7), generator=generator)
    return {"ids": tokens, "labels": tokens.roll(-1, 1)}


def rows(generator: torch.Generator) -> Batch:
    return {"x": torch.randn(2, 5, D, generator=generator)}


def rows_in(generator: torch.Generator) -> Batch:
    """As nn.Sequential calls its argument."""
    return {"input": rows(generator)["x"]}


def images(generator: torch.Generator) -> Batch:
    return {
        "input": torch.randn(4, 3, 12, 12, generator=generator),
        "labels": torch.randint(5, (4,), generator=generator),
    }


def plain(
    name: str, inputs: Callable[[torch.Generator], Batch], head: str | None = None
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def decorate(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        register(Family(name, "plain torch", lambda attn: make(), inputs, head))
        return make

    return decorate


class LanguageModel(nn.Module):
    """Words, a body, a head."""

    def __init__(self, body: nn.Module, *, tied: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(VOCAB, D), body
        self.out = nn.Linear(D, VOCAB, bias=not tied)
        if tied:
            self.out.weight = self.words.weight
        self.causal = causal

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1]).to(x)
            return self.out(self.body(x, mask=mask, is_causal=True))
        out = self.body(x)
        return self.out(out[0] if isinstance(out, tuple) else out)


def encoder(layers: int = 2, **more: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 4, 24, 0.1, batch_first=True, **more)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


@plain("nn.TransformerEncoder", ids, "out")
def transformer_encoder() -> nn.Module:
    return LanguageModel(encoder(), causal=True)


@plain("nn.TransformerEncoder, norm first, no mask", ids, "out")
def transformer_encoder_norm_first() -> nn.Module:
    return LanguageModel(encoder(norm_first=True, bias=False), tied=True)


@plain("nn.Transformer", lambda g: {"src": rows(g)["x"], "tgt": rows(g)["x"]})
def transformer() -> nn.Module:
    return nn.Transformer(D, 4, 2, 2, 24, batch_first=True)


class SelfAttention(nn.Module):
    def __init__(self, **more: int) -> None:
        super().__init__()
        self.norm, self.attention = (
            nn.LayerNorm(D),
            nn.MultiheadAttention(D, 4, batch_first=True, **more),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attention(h, h, h, need_weights=False)[0]


@plain("nn.MultiheadAttention", rows_in)
def multihead_attention() -> nn.Module:
    return nn.Sequential(*(SelfAttention() for _ in range(2)))


class CrossAttention(nn.Module):
    """Keys and values of other widths than the queries: three projections of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, kdim=8, vdim=12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., :8], x[..., :12])[0]


@plain("nn.MultiheadAttention, other widths", rows)
def cross_attention() -> nn.Module:
    return CrossAttention()


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell = kind(D, D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


@plain("LSTM", ids, "out")
def lstm() -> nn.Module:
    return LanguageModel(Recurrent(nn.LSTM))


@plain("GRU", ids, "out")
def gru() -> nn.Module:
    return LanguageModel(Recurrent(nn.GRU))


class ListedMLP(nn.Module):
    """Lists of linears and of norms, walked together."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, 24)
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(layer(norm(x)))
        return x


@plain("MLP in lists", rows)
def listed_mlp() -> nn.Module:
    return ListedMLP()


class Nested(nn.Module):
    """``for attn, ff in self.layers``, as vit-pytorch writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    SelfAttention(),
                    nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 24), nn.GELU(), nn.Linear(24, D)),
                ]
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed in self.layers:
            x = attention(x)
            x = feed(x) + x
        return x


@plain("lists of lists", rows)
def nested() -> nn.Module:
    return Nested()


class Indexed(nn.Module):
    """Sequentials taken apart, and a dict of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh()) for _ in range(3)
        )
        self.ends = nn.ModuleDict({"a": nn.Linear(D, D), "b": nn.Linear(D, D)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer[1](layer[0](x))
            for part in layer:
                x = part(x)
        return self.ends["a"](x) * self.ends["b"](x)


@plain("sequentials taken apart", rows)
def indexed() -> nn.Module:
    return Indexed()


@plain("convolutions with BatchNorm", images, "9")
def batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1)
        self.norm, self.group = nn.BatchNorm2d(8), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.group(self.norm(self.a(x)))))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.stages = nn.ModuleList(Residual() for _ in range(2))
        self.classifier = nn.Linear(8, 5)

    def forward(self, input: Tensor) -> Tensor:
        x = self.stem(input)
        for stage in self.stages:
            x = stage(x)
        return self.classifier(x.mean((2, 3)))


@plain("ResNet, plain", images, "classifier")
def resnet() -> nn.Module:
    return ResNet()


class Shared(nn.Module):
    """One layer used twice, two layers of one weight, a table that is multiplied with by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, D)
        self.twice = nn.Linear(D, D)
        self.one, self.two = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.two.weight = self.one.weight
        self.norm = nn.LayerNorm(D)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.twice(F.relu(self.twice(x)))
        x = self.norm(x + self.two(F.silu(self.one(x))))
        return x @ self.words.weight.T


@plain("shared weights", lambda g: {"ids": ids(g)["ids"]})
def shared() -> nn.Module:
    return Shared()


class GatedMLP(nn.Module):
    def __init__(self, limit: float | None = None, one: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.into = nn.ModuleList([nn.Linear(D, 48)] if one else [nn.Linear(D, 24) for _ in "gu"])
        self.out, self.limit = nn.Linear(24, D, bias=False), limit

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x) * 8
        gate, up = (
            self.into[0](h).chunk(2, -1) if len(self.into) == 1 else [m(h) for m in self.into]
        )
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return x + self.out(F.silu(gate) * up)


@plain("gated MLPs", ids, "out")
def gated() -> nn.Module:
    return LanguageModel(nn.Sequential(GatedMLP(), GatedMLP(one=True)))


class Clamped(nn.Module):
    """A gated MLP that is nothing else, with a limit that most numbers never reach."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, 24), nn.Linear(D, 24)
        self.down = nn.Linear(24, D)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x * 40).clamp(max=10.0)
        return self.down(F.silu(gate) * self.up(x * 40).clamp(-10.0, 10.0))


@plain("clamped gated MLPs", rows_in)
def clamped() -> nn.Module:
    return nn.Sequential(Clamped(), nn.LayerNorm(D), Clamped(), nn.LayerNorm(D))


@plain("weight_norm", rows_in)
def weight_normed() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(D, 24)), nn.GELU(), nn.Linear(24, D), nn.LayerNorm(D)
    )


@plain("weight_norm, old", rows_in)
def weight_normed_by_hooks() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(D, 24)), nn.GELU(), nn.Linear(24, D))


@plain("orthogonal", rows_in)
def orthogonal() -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), parametrizations.orthogonal(nn.Linear(D, D)))


class Aux(nn.Module):
    """Leaves a loss of its own behind as an attribute, as routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.line, self.aux = nn.LayerNorm(D), nn.Linear(D, D), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        h = self.line(self.norm(x))
        self.aux = h.square().mean()
        return x + h.tanh()


class WithAux(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Aux() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x + torch.stack([layer.aux for layer in self.layers]).sum()


@plain("auxiliary loss", rows)
def auxiliary() -> nn.Module:
    return WithAux()


class Cache(dict[str, Tensor]):
    pass


class Handing(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.norm, self.kv, self.first = nn.LayerNorm(D), nn.Linear(D, D), first

    def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        if self.first:
            shared["kv"] = self.kv(self.norm(x))
        return x + self.kv(self.norm(x)) * shared["kv"]


class HandingOn(nn.Module):
    def __init__(self, kind: type[dict[str, Tensor]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Handing(i == 0) for i in range(3))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        shared = self.kind()
        for layer in self.layers:
            x = layer(x, shared=shared)
        return x


@plain("blocks that hand on by an object", rows)
def handing_on() -> nn.Module:
    return HandingOn(Cache)


@plain("blocks that hand on by a dict", rows)
def handing_on_by_a_dict() -> nn.Module:
    return HandingOn(dict)


class AdaptiveNorm(nn.Module):
    """DiT's: a norm without weights, scaled and shifted by what a linear makes of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D, elementwise_affine=False)
        self.made = nn.Sequential(nn.SiLU(), nn.Linear(D, 3 * D))
        self.feed = nn.Sequential(nn.Linear(D, 24), nn.GELU(approximate="tanh"), nn.Linear(24, D))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate = self.made(time)[:, None].chunk(3, -1)
        return x + gate * self.feed(self.norm(x) * (1 + scale) + shift)


class DiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AdaptiveNorm() for _ in range(2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, time)
        return x


@plain("DiT", lambda g: rows(g) | {"time": torch.randn(2, D, generator=g)})
def dit() -> nn.Module:
    return DiT()


class ByHand(nn.Module):
    """Reads a layer's weight itself, for its dtype, its device and its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.a.weight.device, self.a.weight.dtype)
        h = F.linear(x, self.a.weight, self.a.bias) + self.b(self.norm(x))
        return h + self.a(h)


@plain("weights read by hand", rows)
def by_hand() -> nn.Module:
    return ByHand()
