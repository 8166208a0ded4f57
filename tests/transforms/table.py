"""The table of the algebra: transforms x orders x forwards x drivers, each cell against a formula.

The reference is written down anew: dequantised weights, adapters added in, the bare model's dense
logits and torch's cross-entropy, differentiated by plain autograd. A new transform costs one line
in STEPS, and one in `reference` if it changes numbers.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from core import (
    ProjectorConfig,
    TextConfig,
    VisionConfig,
    VLMConfig,
    as_module,
    from_module,
    make_batch,
    vlm,
)
from core.forward import Forward
from core.sites import WEIGHTED
from params import init_params
from params.int8 import dequantize_weight, quantize_weight
from params.tree import Tree, flatten, map_leaves, merge, unflatten
from tests.models import language
from tests.rounding import FP32, FP64
from transforms import (
    checkpoint,
    compile,
    fake_quant,
    fuse_kernels,
    fuse_loss,
    lora,
    mixed_precision,
    quantize_int8,
    trainable,
    unfused_loss,
    value_and_grad,
)
from transforms.legal import ILLEGAL

RANK, ALPHA = 2, 3.0
Batch = dict[str, Tensor]

STEPS: dict[str, Callable[[Forward], Forward]] = {
    "checkpoint": checkpoint,
    "fuse_loss": fuse_loss,
    "quantize_int8": lambda f: quantize_int8(f, skip=()),
    "fake_quant": lambda f: fake_quant(f, skip=()),
    "lora": lambda f: lora(f, rank=RANK, alpha=ALPHA),
    "fuse_kernels": fuse_kernels,
    # Dynamo alone, which is what composes; "compiled loss" goes through AOTAutograd, twice as long
    "compile": lambda f: compile(f, backend="eager"),
    # up, not down: fp32 params computed in fp64 keep the comparison sharp
    "mixed_precision": lambda f: mixed_precision(f, torch.float64),
}


def legal(names: tuple[str, ...]) -> bool:
    return not any(pair in ILLEGAL for pair in itertools.permutations(names, 2))


def orders(length: int) -> list[tuple[str, ...]]:
    """Every legal order of so many transforms."""
    return [names for names in itertools.permutations(STEPS, length) if legal(names)]


# -- forwards -----------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model, its params and two batches; ``without``: drivers that the bare model cannot take,
    and what it says."""

    forward: Forward
    params: Tree
    batches: list[Batch]
    without: dict[str, str] = field(default_factory=dict)
    fp32: bool = False  # norms or softmax of the model are computed in fp32, whatever it is given
    known: dict[Any, Any] = field(default_factory=dict)  # references that were computed before

    def __post_init__(self) -> None:
        batches = self.batches
        self.stacked = {k: torch.stack([b[k] for b in batches]) for k in batches[0]}

    def given(self, names: tuple[str, ...]) -> Tree:
        """The params, before any preparation."""
        return map_leaves(Tensor.float, self.params) if "mixed_precision" in names else self.params

    def apply(self, names: tuple[str, ...]) -> tuple[Forward, Tree]:
        """The loss with these transforms, innermost first, and its params, adapters shaken."""
        forward = self.forward
        for name in names:
            forward = STEPS[name](forward)
        if "fuse_loss" not in names:
            forward = unfused_loss(forward)
        return forward, _shaken(forward.prepare(self.given(names)))


def _shaken(params: Tree) -> Tree:
    """Adapters begin as nothing: here they do something."""

    def shake(path: str, leaf: Tensor) -> Tensor:
        if "lora" not in path:
            return leaf
        noise = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(len(path)))
        return leaf + 0.1 * noise.to(leaf)

    return unflatten({path: shake(path, leaf) for path, leaf in flatten(params).items()})


def _rough(params: Tree, amount: float = 0.1) -> Tree:
    generator = torch.Generator().manual_seed(0)
    return map_leaves(
        lambda t: t.double() + amount * torch.randn(t.shape, generator=generator).double(), params
    )


def native_text() -> Subject:
    config = VLMConfig(TextConfig(61, 12, 2, 2, 1, 16, qk_norm=True))
    params = _rough(init_params(config))
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(2, 61, (2, 1, 8), generator=generator)
    return Subject(vlm(config), params, [make_batch(row) for row in rows])


def native_vision() -> Subject:
    config = VLMConfig(
        TextConfig(61, 12, 2, 2, 1, 16, tied=False, qkv_bias=True),
        VisionConfig(8, 1, 2, 8, patch_size=4, image_size=8, merge=1),
        ProjectorConfig(hidden=8),
    )
    batches = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(2, 61, (1, 9), generator=generator)
        tokens[:, :4] = 1
        image = torch.randint(0, 256, (3, 8, 8), generator=generator, dtype=torch.uint8)
        batches.append(make_batch(tokens, config=config, images=[image], image_token=1))
    return Subject(vlm(config), _rough(init_params(config)), batches)


SMALL = {
    "vocab_size": 61,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attn_implementation": "eager",
    "initializer_range": 0.2,
    "pad_token_id": None,  # a padding row has tangents, but no gradient
}


def _language(name: str, **changes: Any) -> Subject:
    torch.manual_seed(0)
    forward, params = from_module(language(name, **{**SMALL, **changes}).double())
    batches = []
    for seed in (0, 1):
        ids = torch.randint(0, 61, (1, 7), generator=torch.Generator().manual_seed(seed))
        labels = ids.roll(-1, 1).index_fill(1, torch.tensor(6), -100)
        batches.append({"input_ids": ids, "labels": labels})
    return Subject(forward, _rough(params), batches, fp32=True)


def llama() -> Subject:
    return _language("Llama", tie_word_embeddings=True)


def qwen3() -> Subject:
    return _language("Qwen3", head_dim=6, tie_word_embeddings=False)


def gemma2() -> Subject:
    return _language(
        "Gemma2",
        head_dim=6,
        query_pre_attn_scalar=6,
        final_logit_softcapping=2.0,
        sliding_window=4,
    )


def gpt2() -> Subject:
    return _language("GPT2", n_inner=16, n_positions=16, bos_token_id=0, eos_token_id=0)


def llava() -> Subject:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            attn_implementation="eager",
        ),
        text_config=transformers.LlamaConfig(**SMALL),
        image_token_index=60,
        vision_feature_layer=-1,
        attn_implementation="eager",
    )
    module = transformers.LlavaForConditionalGeneration(config).double().eval()
    forward, params = from_module(module)
    batches = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 60, (1, 9), generator=generator)
        ids[:, :4] = 60
        pixels = torch.randn(1, 3, 8, 8, generator=generator).double()
        labels = ids.roll(-1, 1).index_fill(1, torch.tensor([0, 1, 2, 8]), -100)
        batches.append({"input_ids": ids, "pixel_values": pixels, "labels": labels})
    without = {
        "vmap of grad": "data-dependent control flow",  # it counts image tokens
        "hvp": "Trying to set a forward gradient",  # of masked_scatter
        "compiled loss": "mapping proxy",  # of transformers' output capturing
    }
    return Subject(forward, _rough(params), batches, without, fp32=True)


def vit() -> Subject:
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=7,
        attn_implementation="eager",
        initializer_range=0.2,
    )
    module = transformers.ViTForImageClassification(config).double().eval()
    forward, params = from_module(module, head="classifier")
    batches = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(3, 3, 8, 8, generator=generator).double()
        labels = torch.randint(0, 7, (3,), generator=generator)
        batches.append({"pixel_values": pixels, "labels": labels})
    return Subject(forward, _rough(params), batches, fp32=True)


class Mixer(nn.Module):
    """A block of odd names: a sequential of its own, a norm, a layer that another block shares."""

    def __init__(self, shared: nn.Linear, width: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.stuff = nn.Sequential(
            nn.Linear(width, 16), nn.Sequential(nn.GELU(), nn.Linear(16, width))
        )
        self.common = shared

    def forward(self, h: Tensor) -> Tensor:
        return h + self.common(self.stuff(self.before(h)))


class Gater(nn.Module):
    """Another class of block, with a gated MLP of odd names and a layer that has a hook."""

    def __init__(self, shared: nn.Linear, width: int) -> None:
        super().__init__()
        self.scale = nn.RMSNorm(width, eps=1e-5)
        self.a, self.b = nn.Linear(width, 16, bias=False), nn.Linear(width, 16, bias=False)
        self.c = nn.Linear(16, width)
        self.common = shared
        self.watched = nn.Linear(width, width)
        self.watched.register_forward_hook(lambda module, args, out: out.tanh())

    def forward(self, h: Tensor) -> Tensor:
        z = self.scale(h)
        z = self.c(F.silu(self.a(z)) * self.b(z))
        return h + self.common(self.watched(z))


class Odd(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.words = nn.Embedding(61, width)
        shared = nn.Linear(width, width)
        self.tower = nn.ModuleList(
            [Mixer(shared, width), Gater(shared, width), Mixer(shared, width)]
        )
        self.register_buffer("shift", torch.linspace(-1, 1, width))
        self.verdict = nn.Linear(width, 61, bias=True)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids) + self.shift
        for block in self.tower:
            h = block(h)
        return self.verdict(h)


def odd() -> Subject:
    torch.manual_seed(0)
    forward, params = from_module(Odd().double(), head="verdict")
    batches = []
    for seed in (0, 1):
        ids = torch.randint(0, 61, (1, 7), generator=torch.Generator().manual_seed(seed))
        batches.append({"ids": ids, "labels": ids.roll(-1, 1)})
    return Subject(forward, _rough(params), batches)


FORWARDS: dict[str, Callable[[], Subject]] = {
    "native text": native_text,
    "native vision-language": native_vision,
    "Llama": llama,
    "Qwen3": qwen3,
    "Gemma-2": gemma2,
    "GPT-2": gpt2,
    "LLaVA": llava,
    "ViT": vit,
    "odd": odd,
}


@functools.cache
def subject(name: str) -> Subject:
    return FORWARDS[name]()


# -- the reference ------------------------------------------------------------------------------


def reference(of: Subject, names: tuple[str, ...]) -> Callable[[Tree, Batch], Tensor]:
    """The loss as a formula of prepared params (float leaves; int8 ones made floats beforehand)."""
    sites = {site.weight: site for site in of.forward.select(WEIGHTED)}
    rounded = {"fake_quant", "quantize_int8"} & set(names)

    def loss(leaves: dict[str, Tensor], batch: Batch) -> Tensor:
        flat = {path: leaf for path, leaf in leaves.items() if "lora" not in path}
        for name, site in sites.items():
            weight = flat[name]
            if rounded:
                # straight through: rounded numbers, the gradient of the others
                weight = weight + (_round(weight.detach(), site.transposed) - weight).detach()
            a, b = (leaves.get(site.beside(half)) for half in ("lora_a", "lora_b"))
            if a is not None:
                change = ALPHA / RANK * b @ a
                weight = weight + (change.T if site.transposed else change)
            flat[name] = weight
        logits = of.forward(unflatten(flat), batch).flatten(0, -2)
        return F.cross_entropy(logits, batch["labels"].flatten())

    return loss  # type: ignore[return-value]


def _round(weight: Tensor, transposed: bool) -> Tensor:
    w = weight.T if transposed else weight
    w = dequantize_weight(*quantize_weight(w), w.dtype)
    return w.T if transposed else w


def wanted(of: Subject, names: tuple[str, ...], learned: list[str], ready: Tree) -> dict[str, Any]:
    """Value, gradients, gradients of each batch and a Hessian-vector product, by plain autograd."""
    effect = frozenset(names) & {"fake_quant", "quantize_int8", "lora"}
    key = (effect, "mixed_precision" in names, tuple(learned))
    if key in of.known:
        return of.known[key]
    loss = reference(of, names)
    base = flatten(of.given(names)) | {p: t for p, t in flatten(ready).items() if "lora" in p}

    def leaves() -> dict[str, Tensor]:
        out = {p: t.detach().double() for p, t in base.items()}
        return out | {p: out[p].clone().requires_grad_() for p in learned}

    def first(batch: Batch, **options: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        at = leaves()
        value = loss(at, batch)
        flat = [at[p] for p in learned]
        grads = torch.autograd.grad(value, flat, materialize_grads=True, **options)
        return value, dict(zip(learned, grads, strict=True)), at

    each = [first(batch) for batch in of.batches]
    _, grads, at = first(of.batches[0], create_graph=True)
    slope = torch.stack([(g * torch.cos(at[p].detach())).sum() for p, g in grads.items()]).sum()
    second = torch.autograd.grad(slope, [at[p] for p in learned], materialize_grads=True)
    out = {
        "value": each[0][0].detach(),
        "each": [{p: g.detach() for p, g in grads.items()} for _, grads, _ in each],
        "hvp": dict(zip(learned, second, strict=True)),
    }
    of.known[key] = out
    return out


# -- drivers ------------------------------------------------------------------------------------


def _learned(loss: Forward, ready: Tree) -> tuple[Callable[[Tree, Batch], Tensor], Tree]:
    """The loss of what learns alone, for torch.func, which differentiates every leaf."""
    free, frozen = trainable(ready)
    return lambda p, batch: loss(merge(p, frozen), batch), free


def by_value_and_grad(of: Subject, loss: Forward, ready: Tree) -> Any:
    value, grads = value_and_grad(loss)(ready, of.batches[0])
    return {"value": value, "grads": flatten(grads)}


def by_backward(of: Subject, loss: Forward, ready: Tree) -> Any:
    """As a module, the way torch.optim would have it."""
    module = as_module(loss, ready)
    value = module(of.batches[0])
    value.backward()
    learned = flatten(trainable(ready)[0])
    grads = {n: p.grad for n, p in module.named_parameters() if n in learned}
    zeros = {n: torch.zeros_like(learned[n]) for n, g in grads.items() if g is None}
    return {"value": value.detach(), "grads": grads | zeros}


def by_grad(of: Subject, loss: Forward, ready: Tree) -> Any:
    inner, free = _learned(loss, ready)
    return {"grads": flatten(grad(inner)(free, of.batches[0]))}


def by_vmap_of_grad(of: Subject, loss: Forward, ready: Tree) -> Any:
    inner, free = _learned(loss, ready)
    return {"each": flatten(vmap(grad(inner), (None, 0))(free, of.stacked))}


def by_hvp(of: Subject, loss: Forward, ready: Tree) -> Any:
    inner, free = _learned(loss, ready)
    along = map_leaves(torch.cos, free)
    return {"hvp": flatten(jvp(lambda p: grad(inner)(p, of.batches[0]), (free,), (along,))[1])}


def by_compiled_loss(of: Subject, loss: Forward, ready: Tree) -> Any:
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value, grads = value_and_grad(compiled)(ready, of.batches[0])
    return {"value": value, "grads": flatten(grads)}


DRIVERS: dict[str, Callable[[Subject, Forward, Tree], Any]] = {
    "value_and_grad": by_value_and_grad,
    "backward": by_backward,
    "grad": by_grad,
    "vmap of grad": by_vmap_of_grad,
    "hvp": by_hvp,
    "compiled loss": by_compiled_loss,
}

# What does not go together beside transforms.legal: (transform, driver) -> what the error says.
REFUSED = {
    ("compile", driver): "transforms do not go through torch.compile"
    for driver in ("grad", "vmap of grad", "hvp")
}


def tolerance(of: Subject, names: tuple[str, ...], driver: str) -> float:
    """fp64 throughout. Gradients that arrive in fp32, and dequantised weights, are fp32.

    An int8 embedding gives fp32 rows, and the rest of the model computes in fp32 from there.
    """
    rtol = FP64
    if of.fp32 or {"mixed_precision", "fake_quant", "lora", "quantize_int8"} & set(names):
        rtol = FP32
    return 10 * rtol if driver == "hvp" else rtol


def close(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float, what: str) -> None:
    """Each tensor within rtol of its largest entry, and of 1% of the largest of all."""
    assert got.keys() == want.keys(), what
    sizes = {path: float(t.abs().max()) for path, t in want.items()}
    floor = 1e-2 * max(sizes.values())
    for path, t in want.items():
        error = float((got[path].double() - t.double()).abs().max())
        limit = rtol * max(sizes[path], floor)
        assert error <= limit, f"{what} {path}: off by {error:.3g}, allowed {limit:.3g}"


def check(forward: str, names: tuple[str, ...], drivers: tuple[str, ...] = tuple(DRIVERS)) -> int:
    """Runs the cells of a row of the table; how many. AssertionError where one is wrong."""
    of = subject(forward)
    loss, ready = of.apply(names)
    assert loss.applied[: len(names)] == names
    learned = list(flatten(trainable(ready)[0]))
    want = wanted(of, names, learned, ready)
    cells = 0
    for driver in drivers:
        what = f"{forward}: {' '.join(names)} by {driver}:"
        reasons = [REFUSED[name, driver] for name in names if (name, driver) in REFUSED]
        reasons += [of.without[driver]] if driver in of.without else []
        if "compile" in names and "compiled loss" in of.without:
            reasons.append(of.without["compiled loss"])
        if reasons:
            with pytest.raises(Exception, match="|".join(map(re.escape, reasons))):
                DRIVERS[driver](of, loss, ready)
            cells += 1
            continue
        if driver == "compiled loss" or "compile" in names:
            torch._dynamo.reset()
        got = DRIVERS[driver](of, loss, ready)
        rtol = tolerance(of, names, driver)
        if "value" in got:
            error = abs(float(got["value"]) - float(want["value"]))
            assert error <= FP32 * abs(float(want["value"])), what
        if "grads" in got:
            close(got["grads"], want["each"][0], rtol, what)
        for i in range(len(of.batches)) if "each" in got else ():
            close({p: g[i] for p, g in got["each"].items()}, want["each"][i], rtol, what)
        if "hvp" in got:
            close(got["hvp"], want["hvp"], rtol, what)
        cells += 1
    return cells
