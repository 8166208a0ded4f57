"""`bench overhead`: what it costs that a model is a pure function with sites, and not a module."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kernels
from core import TextConfig, VLMConfig, from_module, make_batch, vlm
from core.model.text import rope_angles
from params import init_params
from params.tree import flatten
from runners.benchmarks.clock import Clock, CpuClock, CudaClock
from runners.benchmarks.providers import version
from runners.benchmarks.report import console
from runners.shell.cli import UsageError
from runners.shell.errors import UserError

Run = Callable[[], Tensor]
HEADERS = ("device", "tokens", "by", "forward", "ms", "p20 - p80", "over the module", "goal", "met")
LEGEND = (
    "ms: median of one forward without gradients. over the module: the time over that of the "
    "module beside it; median of the rounds' ratios, and their p20 - p80. met: whether the median "
    "is within the goal, or else the p20 ('noise')."
)
EAGER_GOAL = 1.3  # of from_module
NOISE = 1.05  # what "no slower" and "equal" allow


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
    """Folder for overhead.jsonl and overhead.md; what is there is replaced."""


@dataclass
class Row:
    """One way to compute a model, measured beside the module it should be as fast as."""

    device: str
    model: str  # "from_module" or "native"
    tokens: int
    by: str  # "eager" or "compiled"
    forward: str
    goal: float | None  # of the ratio; None for the module itself
    samples: list[list[float]] = field(default_factory=list)  # ms of a call, by round
    ratios: list[float] = field(default_factory=list)  # of the rounds' medians to the module's

    def quantile(self, share: float) -> float:
        """Of the samples, in ms."""
        return float(np.quantile([ms for some in self.samples for ms in some], share))

    def ratio(self, share: float = 0.5) -> float:
        return float(np.quantile(self.ratios, share))

    @property
    def met(self) -> str:
        if self.goal is None:
            return ""
        return (
            "yes"
            if self.ratio() <= self.goal
            else "noise"
            if self.ratio(0.2) <= self.goal
            else "no"
        )


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
    """The same for a module of Hugging Face's. Raises ImportError where there is none."""
    from transformers import LlamaConfig, LlamaForCausalLM

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


def measure(
    model: str, tokens: int, config: OverheadConfig, clock: Clock, backend: str = "inductor"
) -> list[Row]:
    """The rows of one model at one size. Raises UserError if the two do not agree."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # a size is compiled for itself, and counts no recompilation
    device = clock.device
    module, forward = PAIRS[model](config, tokens, device)
    goal = EAGER_GOAL if model == "from_module" else NOISE
    pairs = [("eager", module, forward, goal)]
    if config.compiled:
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        pairs.append(("compiled", compiled(module), compiled(forward), NOISE))
    rows, runs = [], []
    truth = module().float()
    for by, first, second, goal in pairs:
        for name, run in ((f"{model}'s module", first), (model, second)):
            error = (run().float() - truth).norm() / truth.norm()
            # the same operations, which a compiler may round otherwise
            if not error <= (1e-5 if truth.dtype == _dtype(device) else 2e-2):
                raise UserError(f"{name}, {by}, is not the module: off by {error:.1e}")
            rows.append(
                Row(_name(device), model, tokens, by, name, goal if run is second else None)
            )
            runs.append(run)
    take_turns(rows, runs, config, clock)
    for reference, row in zip(rows[::2], rows[1::2], strict=True):
        row.ratios = [
            statistics.median(a) / statistics.median(b)
            for a, b in zip(row.samples, reference.samples, strict=True)
        ]
    return rows


def take_turns(
    rows: Sequence[Row], runs: Sequence[Run], config: OverheadConfig, clock: Clock
) -> None:
    """Fills in the samples: call by call in turn, so that what else the machine does hits all."""
    ms = [statistics.median(clock.sample(run, None, 5)) for run in runs]
    calls = max(1, round(1e3 * config.seconds * len(runs) / sum(ms)))
    gc.collect()
    for _ in range(config.rounds):
        taken: list[list[float]] = [[] for _ in runs]
        for _ in range(calls):
            for run, times in zip(runs, taken, strict=True):
                times += clock.sample(run, None, 1)
        for row, times in zip(rows, taken, strict=True):
            row.samples.append(times)


def clocks() -> Iterator[Clock]:
    yield CpuClock()
    if torch.cuda.is_available():
        yield CudaClock()


def run_overhead(config: OverheadConfig, command: str) -> int:
    """Raises UsageError for sizes that make no model."""
    if config.width < 64 or config.width % 64:
        raise UsageError(f"--width must be a multiple of 64, not {config.width}")
    for name in ("layers", "rounds", "seconds"):
        if getattr(config, name) <= 0:
            raise UsageError(f"--{name} must be more than 0, not {getattr(config, name)}")
    if not config.tokens or min(config.tokens) < 1:
        raise UsageError(f"--tokens must be 1 or more, not {config.tokens}")
    return bench(config, clocks(), command, console())


def bench(
    config: OverheadConfig,
    clocks: Iterator[Clock],
    command: str,
    output: Console,
    backend: str = "inductor",
) -> int:
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    where, rows, started = environment(command), [], time.perf_counter()
    for clock in clocks:
        for model in PAIRS:
            if model == "from_module" and version("transformers") is None:
                output.print("from_module is left out: pip install transformers")
                continue
            for tokens in config.tokens:
                with clock.session(), torch.no_grad():
                    rows += measure(model, tokens, config, clock, backend)
                done = f"{model}, {tokens} tokens, {clock.device.type}"
                output.print(f"{time.perf_counter() - started:6.1f} s  {done}", highlight=False)
                lines = (json.dumps(asdict(row) | where) for row in rows)
                (folder / "overhead.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "overhead.md").write_text(markdown(rows, where, config))
    for model in dict.fromkeys(row.model for row in rows):
        table = Table(title=model, title_justify="left", title_style="bold")
        for header in HEADERS:
            table.add_column(header, justify="left" if header in HEADERS[:4] else "right")
        for row in rows:
            if row.model == model:
                table.add_row(*cells(row))
        output.print(table)
    output.print(f"In {folder}: overhead.jsonl, overhead.md", highlight=False, soft_wrap=True)
    return 0


# -- what is written ----------------------------------------------------------------------------


def cells(row: Row) -> tuple[str, ...]:
    ratio = f"{row.ratio():.2f}x ({row.ratio(0.2):.2f} - {row.ratio(0.8):.2f})" if row.goal else ""
    return (
        row.device, f"{row.tokens:,}", row.by, row.forward, f"{row.quantile(0.5):.3f}",
        f"{row.quantile(0.2):.3f} - {row.quantile(0.8):.3f}", ratio,
        f"{row.goal:.2f}x" if row.goal else "", row.met,
    )  # fmt: skip


def environment(command: str) -> dict[str, Any]:
    return {
        "command": command,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _name(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)


def markdown(rows: Sequence[Row], where: dict[str, Any], config: OverheadConfig) -> str:
    """The page: where it was measured, a table a model."""
    versions = f"torch {where['torch']}, transformers {where['transformers'] or 'not installed'}"
    lines = [
        f"# Overhead, {where['date'][:10]}",
        f"`{where['command']}`",
        f"CPU: {where['cpu']}, threads: {where['threads']}. Python {where['python']}, {versions}. "
        f"Models of {config.layers} layers, {config.width} wide; fp32 on a CPU, bf16 on a GPU.",
        LEGEND,
    ]
    for model in dict.fromkeys(row.model for row in rows):
        rules = ["---" if header in HEADERS[:4] else "---:" for header in HEADERS]
        body = [cells(row) for row in rows if row.model == model]
        table = "\n".join(f"| {' | '.join(line)} |" for line in (HEADERS, rules, *body))
        lines += [f"## {model}", table]
    return "\n\n".join(lines) + "\n"
