"""`bench components`: the parts of a step, each by itself, from plain fp32 to our kernels."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import kernels
from core import PRESETS, Forward, VLMConfig, make_batch
from core.forward import Site, record_sites
from core.model.fused import normed_mlp
from core.model.layers import head, linear, rms_norm, rope, swiglu
from core.model.text import attend, rope_angles
from params import init_params
from params.tree import Tree, flatten, map_leaves, unflatten
from runners.benchmarks import roofline
from runners.benchmarks.bars import Bar, draw_bars
from runners.benchmarks.clock import (
    Clock,
    DeviceLostError,
    NotCapturableError,
    first_line,
)
from runners.benchmarks.entries import free, quick_collection
from runners.benchmarks.harness import Ceiling, difference
from runners.benchmarks.ladder import text_only
from runners.benchmarks.records import environment
from runners.benchmarks.report import console, markdown_row, teller
from runners.benchmarks.roofline import Work
from runners.benchmarks.training import choose_clock, measured_ceilings, strict_fp32
from runners.shell.cli import UsageError, nearest
from runners.training.config import TrainConfig, check_preset
from runners.training.optim import build_optimizer, clipping
from transforms import cast_matrices, compile, fuse_loss, unfused_loss

PARTS = ("attention", "mlp", "norms", "loss", "optimizer")
PLAIN = {
    "attention": "plain",
    **dict.fromkeys(("linear", "rms_norm", "swiglu", "rope"), "torch"),
}
SAMPLES = 10  # a rung and round
SETS = 8  # inputs that a norm goes through in turn, more than the L2 cache holds
LEGEND = (
    "ms: median of one forward and backward pass (of one layer: attention with its four linears, "
    "the MLP with the norm before it and both additions, one norm; of the whole model: head and "
    "loss, a step of AdamW with clipping). x: the baseline's time over this one's. floor: the "
    "least time by this run's ceilings. error: the "
    "worst |x - y| / |y| of results and gradients against the fp32 baseline. by: a CUDA graph, or "
    "eager calls timed by events."
)
HEADERS = ("part", "rung", "ms", "min - max", "x", "floor ms", "of floor", "error", "by")


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


@dataclass(frozen=True)
class Variant:
    """One way to compute a part. make: builds what is timed, a call that returns its results."""

    rung: str
    make: Callable[[], Callable[[], Sequence[Tensor]]]
    graph: bool = False
    calls: int = 1  # of the part in one run


@dataclass
class Row:
    part: str
    rung: str
    work: Work
    status: str = "ok"
    reason: str | None = None
    samples: list[float] = field(default_factory=list)  # ms of one call
    error: float | None = None
    by: str = "eager"

    @property
    def ms(self) -> float:
        return statistics.median(self.samples)


def run_components(config: ComponentsConfig, command: str) -> int:
    """Raises UserError where there is no GPU, UsageError for a flag out of its range."""
    check(config)
    return bench(config, choose_clock(config.preset, "components"), command, console())


def check(config: ComponentsConfig) -> None:
    check_preset(config.preset)
    for name in ("rows", "length", "rounds"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name} must be 1 or more, not {getattr(config, name)}")
    for part in config.only:
        if part not in PARTS:
            raise UsageError(f"--only {part}: there are {', '.join(PARTS)}{nearest(part, PARTS)}")


# -- the parts as forwards ------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A piece of the model as a forward of its own, with the params and the batch that it takes.

    params has, beside weights, the input ``x``, whose gradient is wanted too. plain: as naive code
    has it; ours: as the model computes it.
    """

    name: str
    plain: Forward
    ours: Forward
    params: Tree  # bf16
    batch: Mapping[str, Tensor]
    work: Work
    sets: int = 1


def attention_layer(
    site: Site, model: VLMConfig, length: int, plain: bool, params: Tree, batch: Any
) -> Tensor:
    """x ``[N, D]`` through the linears of q, k and v, RoPE, attention and the linear of o.

    plain: scores of ``[rows, H, length, length]``, as naive code has them.
    """
    p, x = params["attn"], params["x"]
    split = partial(rearrange, pattern="n (h d) -> n h d", d=model.text.head_size)
    q, k, v = (split(site("linear", linear, p[name], x, at=name)) for name in "qkv")
    turn = partial(rope, eps=model.text.norm_eps)
    tables = (batch["cos"], batch["sin"], batch["rows"])
    qk_norms = {name: p[name] for name in ("q_norm", "k_norm") if name in p}
    q, k = site("rope", turn, qk_norms, q, k, *tables)
    if plain:
        o = kernels.attention(q, k, v, batch["cu_seqlens"], causal=True, length=length)
    else:
        see = partial(attend, window=None, longest=length)
        o = site("attention", see, {}, q, k, v, batch["cu_seqlens"])
    return site("linear", linear, p["o"], rearrange(o, "n h d -> n (h d)"), at="o")


def mlp(site: Site, eps: float, plain: bool, params: Tree, batch: Any) -> Tensor:
    """The residual stream's sum and norm, then SwiGLU between three linears: ``[N, D]``, as a
    block begins its MLP."""
    p, x, residual = params["mlp"], params["x"], params["residual"]
    if not plain:
        y, total = normed_mlp(site, "norm", "mlp", params["norm"], p, x, residual, eps=eps)
        return total + y
    total = x + residual
    h = site("norm", partial(rms_norm, eps=eps), params["norm"], total, at="norm")
    gate, up = (site("linear", linear, p[name], h, at=f"mlp.{name}") for name in ("gate", "up"))
    h = site("glu", swiglu, {}, gate, up, at="mlp")
    return total + site("linear", linear, p["down"], h, at="mlp.down")


def norm(site: Site, eps: float, params: Tree, batch: Any) -> Tensor:
    return site("norm", partial(rms_norm, eps=eps), params["norm"], params["x"], at="norm")


def logits(site: Site, softcap: float | None, params: Tree, batch: Any) -> Any:
    out = site("head", partial(head, softcap=softcap), params["embed"], params["x"], at="embed")
    return out if site.lazy else out.dense()


def parts_of(
    model: VLMConfig, rows: int, length: int, device: torch.device, only: Sequence[str]
) -> Iterator[Part]:
    """One after the other, so that each is gone when the next is made."""
    text, tokens = model.text, rows * length
    one_layer = replace(model, text=replace(text, layers=1))
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(text.vocab_size, (rows, length), generator=drawn)
    batch = {name: tensor.to(device) for name, tensor in make_batch(ids).items()}
    cos, sin = rope_angles(batch["positions"], text.head_size, text.rope_theta)
    batch |= {"cos": cos, "sin": sin, "rows": torch.arange(tokens, device=device)}
    params = cast_matrices(init_params(one_layer, device=device)["text"], torch.bfloat16)
    layer = params["blocks"]["0"]
    generator = torch.Generator(device).manual_seed(0)

    def given(**weights: Tree) -> Tree:
        x = torch.randn(tokens, text.dim, generator=generator, device=device)
        return {"x": x.bfloat16(), **weights}

    def part(name: str, plain: Any, ours: Any, params: Tree, work: Work, sets: int = 1) -> Part:
        naive, own = (forward_of(build, params, batch) for build in (plain, ours))
        return Part(name, naive, own, params, batch, work, sets)

    def weights(tree: Tree) -> int:
        return sum(leaf.numel() for leaf in flatten(tree).values() if leaf.ndim > 1)

    if "attention" in only:
        plain, ours = (
            lambda site, p=p: partial(attention_layer, site, model, length, p)
            for p in (True, False)
        )
        operations = roofline.attention_operations(model, [length] * rows)
        operations += roofline.linear_operations(weights(layer["attn"]), tokens)
        work = Work("attention", operations, roofline.rope_bytes(model, tokens))
        yield part("attention", plain, ours, given(attn=layer["attn"]), work)
    if "mlp" in only:
        plain, ours = (
            lambda site, p=p: partial(mlp, site, text.norm_eps, p) for p in (True, False)
        )
        operations = roofline.linear_operations(weights(layer["mlp"]), tokens)
        moved = roofline.norm_bytes(tokens, text.dim) + roofline.residual_bytes(tokens, text.dim)
        moved += roofline.glu_bytes(tokens, text.mlp_dim)
        leaves = given(mlp=layer["mlp"], norm=layer["mlp_norm"]) | {"residual": given()["x"]}
        yield part("mlp", plain, ours, leaves, Work("mlp", operations, moved))
    if "norms" in only:
        build = lambda site: partial(norm, site, text.norm_eps)  # noqa: E731
        work = Work("norms", moved=roofline.norm_bytes(tokens, text.dim))
        yield part("norms", build, build, given(norm=params["norm"]), work, SETS)
    if "loss" in only:
        build = lambda site: partial(logits, site, text.softcap)  # noqa: E731
        table = params["embed" if text.tied else "lm_head"]
        operations = roofline.linear_operations(weights(table), tokens)
        work = Work("loss", operations, roofline.loss_bytes(tokens, text.vocab_size))
        made = part("loss", build, build, given(embed=table), work)
        yield replace(made, plain=unfused_loss(made.plain), ours=fuse_loss(made.ours))


def forward_of(build: Callable[[Site], Any], params: Tree, batch: Mapping[str, Tensor]) -> Forward:
    """A forward whose sites are found on meta tensors."""
    meta = map_leaves(lambda leaf: leaf.to("meta"), params)
    with kernels.override(attention="plain"):
        sites = record_sites(build, meta, {name: t.to("meta") for name, t in batch.items()})
    return Forward(build, sites)


# -- the rungs ------------------------------------------------------------------------------------


def variants(part: Part) -> list[Variant]:
    """Baseline, bf16 eager, compiled, ours, ours compiled."""
    graph = part.name != "loss"  # large, and slow enough to be timed by events
    kind: dict[str, Any] = {"graph": graph, "calls": part.sets}

    def made(forward: Forward, wide: bool, backends: Mapping[str, str]) -> Any:
        return partial(pulled, part, forward, wide, backends)

    return [
        Variant("baseline: fp32", made(part.plain, True, PLAIN), **kind),
        Variant("bf16 eager", made(part.plain, False, PLAIN), **kind),
        Variant("compiled", made(compile(part.plain, dynamic=False), False, PLAIN), **kind),
        Variant("ours", made(part.ours, False, {}), **kind),
        Variant("ours, compiled", made(compile(part.ours, dynamic=False), False, {}), **kind),
    ]


def pulled(
    part: Part, forward: Forward, wide: bool, backends: Mapping[str, str]
) -> Callable[[], Sequence[Tensor]]:
    """A call: the output and the gradients of all weights and of x, for every set of inputs."""
    dtype = torch.float32 if wide else torch.bfloat16
    flat = {
        path: leaf.to(dtype if leaf.ndim > 1 else leaf.dtype).detach().requires_grad_()
        for path, leaf in flatten(part.params).items()
    }
    inputs = [
        flat["x"],
        *(flat["x"].detach().clone().requires_grad_() for _ in range(part.sets - 1)),
    ]
    paths = sorted(flat)
    seed: Tensor | None = None

    def one(x: Tensor) -> Sequence[Tensor]:
        nonlocal seed
        leaves = flat | {"x": x}
        with kernels.override(**backends):
            out = forward(unflatten(leaves), part.batch)
            if out.ndim and seed is None:
                drawn = torch.Generator(out.device).manual_seed(1)
                seed = torch.randn(out.shape, generator=drawn, device=out.device)
                seed = seed.bfloat16().to(out.dtype)
            grads = torch.autograd.grad(
                out, [leaves[path] for path in paths], seed if out.ndim else None
            )
        return (out.detach(), *grads)

    def run() -> Sequence[Tensor]:
        results: Sequence[Tensor] = ()
        for x in reversed(inputs):
            results = one(x)
        return results

    return run


def optimizer_variants(model: VLMConfig, device: torch.device) -> list[Variant]:
    """AdamW with clipping over all of the model's params, with gradients of bf16."""

    def made(wide: bool, config: TrainConfig) -> Any:
        def make() -> Callable[[], Sequence[Tensor]]:
            states = torch.bfloat16 if config.state_dtype == "bf16" else torch.float32
            params = cast_matrices(init_params(model, device=device), states)
            flat = flatten(params)
            working = flat if wide else flatten(cast_matrices(params, torch.bfloat16))
            generator = torch.Generator(device).manual_seed(0)
            grads = {path: torch.empty_like(leaf) for path, leaf in working.items()}
            for grad in grads.values():
                grad.normal_(generator=generator)
            copies = {p: leaf for p, leaf in working.items() if leaf is not flat[p]}
            optimizer = build_optimizer(flat, copies, config)
            number = 0

            def run() -> Sequence[Tensor]:
                nonlocal number
                number += 1
                _, factor = clipping(list(grads.values()), 1.0)
                optimizer.step(grads, number=number, lr=1e-4, factor=factor)
                return ()

            return run

        return make

    loop, fused = TrainConfig(use_fused_adamw=False), TrainConfig()
    return [
        Variant("baseline: fp32", made(True, loop)),
        Variant("bf16 eager", made(False, loop)),
        Variant("ours", made(False, fused)),
        Variant("ours, bf16 states", made(False, replace(fused, state_dtype="bf16"))),
    ]


# -- measuring ------------------------------------------------------------------------------------


def measure(
    name: str, work: Mapping[str, Work] | Work, given: Sequence[Variant], clock: Clock, rounds: int
) -> list[Row]:
    """The variants of a part, ready one after the other, then timed in turns."""
    works = work if isinstance(work, Mapping) else {}
    default = work if isinstance(work, Work) else next(iter(works.values()))
    rows = [Row(name, one.rung, works.get(one.rung, default)) for one in given]
    ready: list[tuple[Row, Callable[[], object], int]] = []
    truth: Sequence[Tensor] | None = None
    for row, variant in zip(rows, given, strict=True):
        with noted(row):
            run = variant.make()
            for _ in range(2):
                run()
            results = run()
            clock.settle()
            if truth is None and results:
                truth = results
            elif truth is not None and results:
                row.error = difference(results, truth)
            del results
            timed: Callable[[], object] = partial(_drop, run)
            if variant.graph:
                with suppress(NotCapturableError):  # then by events: the column says so
                    timed, row.by = clock.capture(timed), "graph"
            ready.append((row, timed, variant.calls))
        free(clock)
    del truth
    for _ in range(rounds):
        for row, timed, calls in ready:
            with noted(row):
                row.samples += [ms / calls for ms in clock.sample(timed, None, SAMPLES)]
    return rows


def measure_alone(
    name: str, works: Mapping[str, Work], given: Sequence[Variant], clock: Clock, rounds: int
) -> list[Row]:
    """The same, but only one variant at a time lies in memory."""
    rows = [Row(name, one.rung, works[one.rung]) for one in given]
    for _ in range(max(1, rounds - 1)):
        for row, variant in zip(rows, given, strict=True):
            if row.status == "ok":
                with noted(row):
                    run = variant.make()
                    clock.sample(run, None, 2)
                    row.samples += clock.sample(run, None, SAMPLES // 2)
                    del run
                free(clock)
    return rows


@contextmanager
def noted(row: Row) -> Iterator[None]:
    """An error is this row's result. Raises DeviceLostError."""
    try:
        yield
    except DeviceLostError:
        raise
    except torch.OutOfMemoryError as error:
        row.status, row.reason = "out of memory", first_line(error)
    except Exception as error:  # the others go on
        row.status, row.reason = "error", f"{type(error).__name__}: {first_line(error)}"
    if row.status != "ok":
        row.samples.clear()


def _drop(run: Callable[[], Sequence[Tensor]]) -> None:
    run()


def bench(
    config: ComponentsConfig,
    clock: Clock,
    command: str,
    output: Console,
    ceilings: Callable[[Clock], dict[Ceiling, float]] = measured_ceilings,
) -> int:
    """Measures part by part, and writes what is known after each."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    only = config.only or PARTS
    model = text_only(PRESETS[config.preset])
    say = teller(output)
    rows: list[Row] = []
    with clock.session(), strict_fp32(), quick_collection():
        reached = ceilings(clock)
        where = environment(clock.device, command, reached)
        clock.free()
        with (folder / "components.jsonl").open("w") as lines:
            for found in _measured(config, model, clock, only):
                rows += found
                for row in found:
                    record = as_record(row, baseline_of(rows, row.part), reached) | vars(where)
                    print(json.dumps(record), file=lines, flush=True)
                    say(describe(row))
    title = f"parts of a training step, {where.device}, {where.date[:10]}"
    drawn = draw(folder / "components.png", title, rows)
    page = markdown(rows, reached, where.lines(), command, where.date[:10], drawn)
    (folder / "components.md").write_text(page)
    show(rows, reached, output)
    for line in where.lines():
        output.print(escape(line), highlight=False, soft_wrap=True)
    written = ", ".join(sorted(p.name for p in folder.glob("components.*")))
    output.print(escape(f"In {folder}: {written}"), highlight=False)
    return 0


def _measured(
    config: ComponentsConfig, model: VLMConfig, clock: Clock, only: Sequence[str]
) -> Iterator[list[Row]]:
    for part in parts_of(model, config.rows, config.length, clock.device, only):
        yield measure(part.name, part.work, variants(part), clock, config.rounds)
        del part
        torch._dynamo.reset()
        free(clock)
    if "optimizer" in only:
        given = optimizer_variants(model, clock.device)
        count = model.num_params()
        works = {
            v.rung: Work(
                "optimizer",
                moved=roofline.optimizer_bytes(count, bf16_states="bf16 states" in v.rung),
            )
            for v in given
        }
        yield measure_alone("optimizer", works, given, clock, config.rounds)


# -- what is shown --------------------------------------------------------------------------------


def baseline_of(rows: Sequence[Row], part: str) -> Row | None:
    return next((r for r in rows if r.part == part and r.rung.startswith("baseline")), None)


def times(row: Row, baseline: Row | None) -> float | None:
    if baseline is None or not baseline.samples or not row.samples:
        return None
    return baseline.ms / row.ms


def as_record(row: Row, baseline: Row | None, ceilings: Mapping[Ceiling, float]) -> dict[str, Any]:
    known = {**vars(row), "work": vars(row.work), "floor_ms": row.work.floor(ceilings)}
    if row.samples:
        known |= {"ms": row.ms, "times_baseline": times(row, baseline)}
    if row.error is not None and row.error != row.error:
        known["error"] = "nan"
    return known


def describe(row: Row) -> str:
    if not row.samples:
        return f"{row.part}, {row.rung}: {row.status}: {row.reason}"
    return f"{row.part}, {row.rung}: {row.ms:.3f} ms ({row.by}, {len(row.samples)} samples)"


def cells(row: Row, rows: Sequence[Row], ceilings: Mapping[Ceiling, float]) -> tuple[str, ...]:
    factor, floor = times(row, baseline_of(rows, row.part)), row.work.floor(ceilings)
    return (
        f"{row.ms:.3f}",
        f"{min(row.samples):.3f} - {max(row.samples):.3f}",
        f"{factor:.2f}" if factor else "",
        f"{floor:.3f}",
        f"{floor / row.ms:.0%}",
        "" if row.error is None else f"{row.error:.1e}",
        row.by,
    )


def show(rows: Sequence[Row], ceilings: Mapping[Ceiling, float], output: Console) -> None:
    table = Table(title="parts of a training step", title_justify="left", title_style="bold")
    for header in HEADERS:
        table.add_column(header, justify="left" if header in HEADERS[:2] else "right")
    for row, following in zip_longest(rows, rows[1:]):
        if row.samples:
            table.add_row(row.part, escape(row.rung), *cells(row, rows, ceilings))
        else:
            table.add_row(row.part, escape(row.rung), row.status, style="red")
        if following is None or following.part != row.part:
            table.add_section()
    output.print(table)


def markdown(
    rows: Sequence[Row],
    ceilings: Mapping[Ceiling, float],
    sources: Sequence[str],
    command: str,
    date: str,
    picture: bool,
) -> str:
    out = [f"# Parts of a training step, {date}", "", f"`{command}`", "", *sources, "", LEGEND, ""]
    if picture:
        out += ["![speed over the baseline, by part](components.png)", ""]
    out += [markdown_row(HEADERS), markdown_row(["---"] * 2 + ["---:"] * (len(HEADERS) - 2))]
    for row in rows:
        figures = cells(row, rows, ceilings) if row.samples else (row.status, *[""] * 6)
        out.append(markdown_row([row.part, row.rung, *figures]))
    seen = {row.part: row.work for row in rows}
    out += ["", "What each part must do:", ""]
    out += [
        f"- {part}: {work.operations / 1e12:.3g} TFLOP, {work.moved / 1e9:.3g} GB"
        for part, work in seen.items()
    ]
    absent = [f"- {r.part}, {r.rung}: {r.status}: {r.reason}" for r in rows if not r.samples]
    out += ["", "Not measured:", "", *absent] if absent else []
    return "\n".join(out).rstrip() + "\n"


def draw(path: Path, title: str, rows: Sequence[Row]) -> bool:
    bars = []
    for row in rows:
        factor = times(row, baseline_of(rows, row.part))
        text = f"{factor:.2f}x, {row.ms:.3g} ms" if factor else row.status
        bars.append(Bar(row.rung, row.rung, (factor,), (text,)))
    return draw_bars(
        path, title, ["speed, as a multiple of the baseline's"], bars,
        sections=[row.part for row in rows],
    )  # fmt: skip
