"""`bench overhead`: what it costs that a model is a pure function with sites, and not a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import kernels
from core import TextConfig, VLMConfig, from_module, make_batch, vlm
from core.model.text import rope_angles
from params import init_params
from params.tree import flatten
from runners.benchmarks.clock import Clock, CpuClock, CudaClock, measured_ceilings
from runners.benchmarks.harness import Case, Settings
from runners.benchmarks.kernels import Cases
from runners.benchmarks.kernels import bench as measure_cases
from runners.benchmarks.providers import Forward, Inputs, MissingError, Provider
from runners.benchmarks.report import console
from runners.shell.cli import UsageError

Run = Callable[[], Tensor]
TURNS = 20  # of a round
LEGEND = (
    "ms: median of one forward without gradients. speed: the module's time over this one's. error: "
    "the worst |x - y| / |y| against the module's results."
)


@dataclass(frozen=True)
class OverheadConfig:
    """Times forwards beside the same models as modules, eager and through torch.compile: a Hugging
    Face Llama through from_module, and the native decoder beside one written as a module. On the
    CPU, and on a GPU where there is one."""

    tokens: tuple[int, ...] = (16, 128, 1024)
    """Sizes, in tokens of one document."""
    layers: int = 8
    width: int = 256
    compiled: bool = True
    """Measure through torch.compile too."""
    rounds: int = 15
    """How often all take turns."""
    seconds: float = 0.1
    """Measuring time in a round, for each that takes turns."""
    out: str = "runs/bench"
    """Folder for overhead.jsonl, .md and .png, of a GPU overhead_cuda; replaced if there."""


# -- the native decoder as an ordinary module ---------------------------------------------------


class Norm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.size = config.head_size
        q, kv = config.heads * self.size, config.kv_heads * self.size
        self.q, self.k, self.v = (nn.Linear(config.dim, n, bias=False) for n in (q, kv, kv))
        self.o = nn.Linear(q, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        q, k, v = (f(x).view(len(x), -1, self.size) for f in (self.q, self.k, self.v))
        q, k = kernels.rope(q, k, cos, sin, rows)
        return self.o(kernels.attention(q, k, v, ends, causal=True).flatten(1))


class Mlp(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(config.dim, config.mlp_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(config.mlp_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(kernels.swiglu(self.gate(x), self.up(x)))


class Block(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attn_norm, self.attn = Norm(config.dim, config.norm_eps), Attention(config)
        self.mlp_norm, self.mlp = Norm(config.dim, config.norm_eps), Mlp(config)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), *context)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """The text model of ``core.vlm`` (tied, no biases), with the same names and kernels."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = Norm(config.dim, config.norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        cos, sin = rope_angles(positions, self.config.head_size, self.config.rope_theta)
        rows = torch.arange(len(tokens), device=tokens.device)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, rows, cu_seqlens)
        return nn.functional.linear(self.norm(x), self.embed.weight)


# -- the pairs ------------------------------------------------------------------------------------


def native_pair(config: OverheadConfig, tokens: int, device: torch.device) -> tuple[Run, Run]:
    """(the module, the pure forward), on the same weights and tokens."""
    text = TextConfig(
        1024, config.width, config.layers, config.width // 64, config.width // 64, 3 * config.width
    )
    model = VLMConfig(text)
    params = init_params(model, device=device, dtype=_dtype(device))
    module = Decoder(text).to(device, _dtype(device)).eval()
    module.load_state_dict(flatten(params["text"]))
    batch = make_batch(torch.randint(text.vocab_size, (1, tokens)).to(device))
    inputs = {name: batch[name] for name in ("tokens", "positions", "cu_seqlens")}
    return partial(module, **inputs), partial(vlm(model), params, batch)


def llama_pair(config: OverheadConfig, tokens: int, device: torch.device) -> tuple[Run, Run]:
    """The same for a module of Hugging Face's. Raises MissingError where there is none."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MissingError("not installed (pip install transformers)") from None

    module: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=config.width,
            intermediate_size=3 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.width // 64,
            num_key_value_heads=config.width // 64,
        )
    )
    module = module.to(device, _dtype(device)).eval()
    forward, params = from_module(module)
    batch = {"input_ids": torch.randint(1024, (1, tokens)).to(device)}

    def direct() -> Tensor:
        return module(**batch, use_cache=False).logits

    return direct, partial(forward, params, batch)


PAIRS = {"from_module": llama_pair, "native": native_pair}


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# -- measuring ----------------------------------------------------------------------------------


def cases(config: OverheadConfig, device: torch.device) -> list[Case]:
    """Each model at each size, by the two ways to run it."""
    ways = ("eager", "compiled") if config.compiled else ("eager",)
    return [
        case(config, device, model, tokens, by)
        for model in PAIRS
        for tokens in config.tokens
        for by in ways
    ]


def case(config: OverheadConfig, device: torch.device, model: str, tokens: int, by: str) -> Case:
    pair: list[Run] = []  # made once, for both

    def one(which: int) -> Callable[[Sequence[Inputs]], Forward]:
        def build(sets: Sequence[Inputs]) -> Forward:
            if not pair:
                torch.manual_seed(0)
                pair.extend(PAIRS[model](config, tokens, device))
            run = pair[which]
            return lambda i: run()

        return build

    kind: dict[str, Any] = {"compiled": by == "compiled", "graph": False}
    names = (f"{model}'s module", model)
    return Case(
        model, f"{tokens:,} tokens", 0.0, "bf16", lambda device, generator: {},
        tuple(Provider(name, one(i), **kind) for i, name in enumerate(names)),
        sets=1, reference=names[0], direction=f"{by}, {device.type.upper()}",
    )  # fmt: skip


def run_overhead(config: OverheadConfig, command: str) -> int:
    """Raises UsageError for sizes that make no model."""
    if config.width < 64 or config.width % 64:
        raise UsageError(f"--width must be a multiple of 64, not {config.width}")
    for name in ("layers", "rounds", "seconds"):
        if getattr(config, name) <= 0:
            raise UsageError(f"--{name} must be more than 0, not {getattr(config, name)}")
    if not config.tokens or min(config.tokens) < 1:
        raise UsageError(f"--tokens must be 1 or more, not {config.tokens}")
    clocks: list[Clock] = [CpuClock(), *([CudaClock()] if torch.cuda.is_available() else [])]
    for clock in clocks:
        bench(config, clock, command, console())
    return 0


def bench(
    config: OverheadConfig, clock: Clock, command: str, output: Console, backend: str = "inductor"
) -> int:
    """Writes overhead.* of the CPU, overhead_cuda.* of a GPU."""
    name = "overhead" if clock.device.type == "cpu" else "overhead_cuda"
    size = f"Models of {config.layers} layers, {config.width} wide; fp32 on a CPU, bf16 on a GPU."
    what = Cases(name, "Overhead", f"{LEGEND} {size}", "speed")
    # A turn is a call or two, so that what else the machine does hits all.
    settings = Settings(TURNS * config.rounds, config.seconds * config.rounds, backend)
    return measure_cases(
        cases(config, clock.device), clock, settings, Path(config.out), command, output,
        measured_ceilings, what,
    )  # fmt: skip
