"""`bench components`: the parts of a step, each by itself, from plain fp32 to our kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import kernels
from core import PRESETS, VLMConfig, make_batch
from core.model.text import rope_angles
from params import init_params
from params.tree import flatten
from runners.benchmarks.clock import Ceiling, Clock, choose_clock, measured_ceilings
from runners.benchmarks.harness import Case, Settings
from runners.benchmarks.kernels import LEGEND, Cases
from runners.benchmarks.kernels import bench as measure_cases
from runners.benchmarks.providers import Forward, Inputs, Provider
from runners.benchmarks.report import console
from runners.benchmarks.steps import check_counts, check_known, strict_fp32
from runners.training.config import TrainConfig, check_preset
from runners.training.optim import build_optimizer, clipping
from transforms import cast_matrices

PARTS = ("attention", "mlp", "norms", "loss", "optimizer")
PLAIN = {"attention": "plain"} | dict.fromkeys(("linear", "rms_norm", "swiglu", "rope"), "torch")
BASELINE = "baseline: fp32"
SETS = 8  # inputs that a norm goes through in turn, more than the L2 cache holds
WHAT = Cases(
    "components", "Parts of a training step",
    f"{LEGEND} A part is one forward and backward pass: of one layer attention with its four "
    "linears, the MLP with the norm before it and both additions, one norm; of the whole model "
    "head and loss, and a step of AdamW with clipping.",
    "speed",
)  # fmt: skip


@dataclass(frozen=True)
class ComponentsConfig:
    """Measures the parts of a training step each by itself, forward and backward: plain fp32, bf16
    in eager PyTorch, compiled, and as the trainer computes it."""

    preset: str = "vlm_1.5b"
    rows: int = 8
    """Documents of a batch."""
    length: int = 2048
    """Tokens of each."""
    only: tuple[str, ...] = ()
    """Parts to measure: attention, mlp, norms, loss, optimizer. Default: all."""
    rounds: int = 3
    """Rounds in which the rungs of a part take turns."""
    out: str = "runs/bench"
    """Folder for components.jsonl, components.md and components.png; what is there is replaced."""


def run_components(config: ComponentsConfig, command: str) -> int:
    """Raises UserError where there is no GPU, UsageError for a flag out of its range."""
    check(config)
    return bench(config, choose_clock(config.preset, "components"), command, console())


def check(config: ComponentsConfig) -> None:
    check_preset(config.preset)
    check_counts(config, "rows", "length", "rounds")
    check_known("only", config.only, PARTS)


def bench(
    config: ComponentsConfig,
    clock: Clock,
    command: str,
    output: Console,
    ceilings: Callable[[Clock], dict[Ceiling, float]] = measured_ceilings,
    backend: str = "inductor",
) -> int:
    model = VLMConfig(PRESETS[config.preset].text)
    wanted = config.only or PARTS
    parts = [part(model, config.rows, config.length, name) for name in wanted if name in MAKE]
    if "optimizer" in wanted:
        parts.append(optimizer(model))
    settings = Settings(config.rounds, 0.3 * config.rounds, backend)
    with strict_fp32():
        return measure_cases(
            parts, clock, settings, Path(config.out), command, output, ceilings, WHAT
        )


# -- a part as a function of its inputs: weights by their paths in a layer, and x -----------------


def attention(model: VLMConfig, length: int, i: Inputs, dense: int | None = None) -> Tensor:
    """x ``[N, D]`` through the linears of q, k and v, RoPE, attention and the linear of o.

    dense: the length of all rows, for scores of ``[rows, H, length, length]``, as naive code has.
    """
    size = model.text.head_size
    q, k, v = (
        kernels.linear(i["x"], i[f"attn.{n}.weight"], i.get(f"attn.{n}.bias")).unflatten(
            -1, (-1, size)
        )
        for n in "qkv"
    )
    norms = {
        f"{n}_weight": i[f"attn.{n}_norm.weight"] for n in "qk" if f"attn.{n}_norm.weight" in i
    }
    q, k = kernels.rope(q, k, i["cos"], i["sin"], i["rows"], eps=model.text.norm_eps, **norms)
    o = kernels.attention(q, k, v, i["cu_seqlens"], causal=True, max_seqlen=length, length=dense)
    return kernels.linear(o.flatten(1), i["attn.o.weight"], i.get("attn.o.bias"))


def plain_attention(model: VLMConfig, length: int, i: Inputs) -> Tensor:
    return attention(model, length, i, dense=length)


def mlp(model: VLMConfig, length: int, i: Inputs) -> Tensor:
    """The residual stream's sum and norm, then SwiGLU between three linears: ``[N, D]``, as a
    block begins its MLP."""
    gate, up, down = (i[f"mlp.{name}.weight"] for name in ("gate", "up", "down"))
    y, total = kernels.add_norm_gated_mlp(
        i["x"], i["residual"], i["mlp_norm.weight"], gate, up, down, model.text.norm_eps
    )
    return total + y


def plain_mlp(model: VLMConfig, length: int, i: Inputs) -> Tensor:
    gate, up, down = (i[f"mlp.{name}.weight"] for name in ("gate", "up", "down"))
    total = i["x"] + i["residual"]
    h = kernels.rms_norm(total, i["mlp_norm.weight"], model.text.norm_eps)
    return total + F.linear(kernels.swiglu(F.linear(h, gate), F.linear(h, up)), down)


def norms(model: VLMConfig, length: int, i: Inputs) -> Tensor:
    return kernels.rms_norm(i["x"], i["norm.weight"], model.text.norm_eps)


def loss(model: VLMConfig, length: int, i: Inputs) -> Tensor:
    return kernels.linear_cross_entropy(i["x"], i["head"], i["labels"], softcap=model.text.softcap)


def plain_loss(model: VLMConfig, length: int, i: Inputs) -> Tensor:
    logits = F.linear(i["x"], i["head"]).float()
    if (cap := model.text.softcap) is not None:
        logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits, i["labels"])


Compute = Callable[[VLMConfig, int, Inputs], Tensor]
# Of each part: as naive code has it, as the model computes it, and the weights that it takes.
MAKE: dict[str, tuple[Compute, Compute, tuple[str, ...]]] = {
    "attention": (plain_attention, attention, ("attn.",)),
    "mlp": (plain_mlp, mlp, ("mlp.", "mlp_norm.")),
    "norms": (norms, norms, ("norm.",)),
    "loss": (plain_loss, loss, ("head",)),
}


def bytes_of(name: str, model: VLMConfig, tokens: int) -> float:
    """The least that must pass between the chip and its memory, if each operation that is one
    kernel reads its bf16 inputs once and writes its outputs once, forward and backward. Products
    are bound by arithmetic, and count nothing."""
    text = model.text
    norm = 5 * tokens * text.dim  # read, written; gradient and input read, a gradient written
    numbers = {
        "attention": 4 * tokens * (text.heads + text.kv_heads) * text.head_size,
        # the two additions of a layer read and write 7 times beside their norms; SwiGLU 8 times
        "mlp": norm + 7 * tokens * text.dim + 8 * tokens * text.mlp_dim,
        "norms": norm,
        "loss": 3 * tokens * text.vocab_size,  # logits read twice, their gradient written
        # fp32 param and moments read and written, a bf16 gradient read twice, a bf16 copy written
        "optimizer": 15 * model.num_params(),
    }
    return 2.0 * numbers[name]


def part(model: VLMConfig, rows: int, length: int, name: str) -> Case:
    """A part as a case: baseline, bf16 eager, compiled, ours, ours compiled."""
    plain, own, prefixes = MAKE[name]
    text, tokens = model.text, rows * length
    shapes = weights_of(model, torch.device("meta"))
    weights = [path for path in shapes if path.startswith(prefixes)]
    wrt = ("x", *(("residual",) if name == "mlp" else ()), *weights)
    seeds = () if name == "loss" else ("dy",)
    operations = (
        6.0 * tokens * sum(shapes[path].numel() for path in weights if shapes[path].ndim > 1)
    )
    if name == "attention":  # two products forward, five backward, over what a causal mask leaves
        operations += 7.0 * rows * length * (length + 1) * text.heads * text.head_size
    moved = bytes_of(name, model, tokens)
    naive, fast = partial(plain, model, length), partial(own, model, length)
    graph = name != "loss"  # large, and slow enough to be timed by events

    def made(provider: str, forward: Forward, **options: Any) -> Provider:
        return Provider(provider, lambda sets: forward, graph=graph, **options)

    def baseline(sets: Sequence[Inputs]) -> Forward:
        return widened(naive, sets, wrt, seeds)

    return Case(
        name,
        f"{rows} x {length:,}",
        operations or moved,
        "bf16" if operations else "copy",
        inputs_of(model, rows, length, name),
        (
            Provider(BASELINE, baseline, direct=True, graph=graph, backends=PLAIN),
            made("bf16 eager", naive, backends=PLAIN),
            made("compiled", naive, backends=PLAIN, compiled=True),
            made("ours", fast),
            made("ours, compiled", fast, compiled=True),
        ),
        wrt=wrt,
        seeds=seeds,
        sets=SETS if name == "norms" else 1,
        reference=BASELINE,
        moved=moved if operations else 0.0,
    )


def weights_of(model: VLMConfig, device: torch.device) -> dict[str, Tensor]:
    """Of one layer, the last norm and the head, bf16, by their paths."""
    one = replace(model, text=replace(model.text, layers=1))
    text = cast_matrices(init_params(one, device=device)["text"], torch.bfloat16)
    head = text["embed" if model.text.tied else "lm_head"]["weight"]
    return flatten(text["blocks"]["0"]) | {"norm.weight": text["norm"]["weight"], "head": head}


def inputs_of(
    model: VLMConfig, rows: int, length: int, name: str
) -> Callable[[torch.device, torch.Generator], Inputs]:
    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        text, tokens = model.text, rows * length
        drawn = torch.Generator().manual_seed(0)
        ids = torch.randint(text.vocab_size, (rows, length), generator=drawn)
        batch = {key: tensor.to(device) for key, tensor in make_batch(ids).items()}
        cos, sin = rope_angles(batch["positions"], text.head_size, text.rope_theta)
        made: Inputs = {
            "cos": cos, "sin": sin, "rows": torch.arange(tokens, device=device),
            "cu_seqlens": batch["cu_seqlens"], "labels": batch["labels"],
        }  # fmt: skip
        weights = weights_of(model, device)
        made |= {
            path: leaf.detach().requires_grad_()
            for path, leaf in weights.items()
            if path.startswith(MAKE[name][2])
        }
        for key in ("x", "residual", "dy"):
            x = torch.randn(tokens, text.dim, generator=generator, device=device).bfloat16()
            made[key] = x.requires_grad_(key != "dy")
        return made

    return inputs


def widened(
    forward: Forward, sets: Sequence[Inputs], wrt: Sequence[str], seeds: Sequence[str]
) -> Forward:
    """The same in fp32: results and gradients."""
    wide = {
        id(i): i
        | {name: i[name].detach().float().requires_grad_() for name in wrt}
        | {name: i[name].float() for name in seeds}
        for i in sets
    }

    def run(i: Inputs) -> tuple[Tensor, ...]:
        given = wide[id(i)]
        out = forward(given)
        grads = torch.autograd.grad(out, [given[n] for n in wrt], [given[n] for n in seeds] or None)
        return (out.detach(), *grads)

    return run


def optimizer(model: VLMConfig) -> Case:
    """AdamW with clipping over all of the model's params."""

    def made(name: str, wide: bool, **flags: Any) -> Provider:
        config = TrainConfig.of(**flags)

        def build(sets: Sequence[Inputs]) -> Forward:
            device = sets[0]["here"].device
            kept = torch.bfloat16 if "state_dtype" in flags else torch.float32
            params = cast_matrices(init_params(model, device=device), kept)
            flat = flatten(params)
            working = flat if wide else flatten(cast_matrices(params, torch.bfloat16))
            generator = torch.Generator(device).manual_seed(0)
            grads = {
                path: torch.empty_like(leaf).normal_(generator=generator)
                for path, leaf in working.items()
            }
            copies = {p: leaf for p, leaf in working.items() if leaf is not flat[p]}
            adamw, number = build_optimizer(flat, copies, config.optim), 0

            def step(i: Inputs) -> tuple[()]:
                nonlocal number
                number += 1
                _, factor = clipping(list(grads.values()), 1.0)
                adamw.step(grads, number=number, lr=1e-4, factor=factor)
                return ()

            return step

        return Provider(name, build, direct=True, graph=False)

    return Case(
        "optimizer", f"{model.num_params():,} parameters",
        bytes_of("optimizer", model, 0), "copy",
        lambda device, generator: {"here": torch.zeros(1, device=device)},
        (
            made(BASELINE, True, use_fused_adamw=False),
            made("bf16 eager", False, use_fused_adamw=False),
            made("ours", False),
            made("ours, bf16 states", False, state_dtype="bf16"),
        ),
        sets=1, reference=BASELINE, direction="step",
    )  # fmt: skip
