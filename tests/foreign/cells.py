"""The columns of the matrix: each is one use of the library on a foreign module, and its check."""

from __future__ import annotations

import inspect
import itertools
import random
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from core import Forward, from_module
from params import num_bytes
from params.tree import Tree, flatten, map_leaves, merge, unflatten
from tests.foreign.families import Batch, Family
from tests.foreign.oracle import Named, Oracle, WrongError, compare, compare_grads, loss_of
from transforms import (
    accumulate,
    checkpoint,
    fake_quant,
    fp8,
    fuse_kernels,
    fuse_loss,
    lora,
    mixed_precision,
    quantize_int8,
    trainable,
    value_and_grad,
)
from transforms.mixed_precision import cast_matrices

RANK, ALPHA = 2, 3.0
OURS = ("core", "params", "transforms", "kernels")
ROOT = Path(__file__).resolve().parents[2]


class NothingThereError(Exception):
    """The column asks for something that this kind of module does not have."""


@dataclass
class Bench:
    """A family, the library's forwards of it, and its oracle."""

    family: Family
    oracle: Oracle
    made: dict[Any, tuple[Forward, Tree]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)  # warnings

    @property
    def dtype(self) -> torch.dtype:
        return self.oracle.dtype

    def forward(
        self, dtype: torch.dtype | None = None, *, train: bool = False, attn: str | None = None
    ) -> tuple[Forward, Tree]:
        key = (dtype or self.dtype, train, attn)
        if key not in self.made:
            module = self.family.fresh(key[0], train=train, attn=attn)
            self.made[key] = from_module(module, call=self.family.call, head=self.family.head)
        return self.made[key]

    def batch(self, dtype: torch.dtype | None = None, seed: int = 0) -> Batch:
        return self.family.batch(seed, dtype or self.dtype)

    @property
    def labelled(self) -> bool:
        return "labels" in self.family.batch()

    def matrices(self) -> dict[str, str]:
        """Name of every weight that int8 should reach -> "embed", "linear", or "other"."""
        module = self.family.fresh()
        found = {}
        for prefix, m in module.named_modules():
            kind = _weighs(m)
            for leaf, p in m._parameters.items() if kind else ():
                if p is not None and p.ndim >= 2:
                    found[f"{prefix}.{leaf}" if prefix else leaf] = kind
        held = dict(module.named_parameters())
        return {n: k for n, k in found.items() if n in held}

    # -- checks --

    def check(
        self,
        forward: Forward | Callable[[Tree, Batch], Tensor],
        params: Tree,
        *,
        batch: Batch | None = None,
        rtol: float = 2e-6,
        noise_of: torch.dtype | None = None,
        finished: bool = False,
        **of: Any,
    ) -> None:
        """Output (or loss), and gradients by value_and_grad, against the oracle's."""
        given = self.batch(noise_of or of.get("dtype")) if batch is None else batch
        where = {k: v for k, v in of.items() if k in ("train", "attn", "dtype")}
        want = self.oracle.result(batch=batch, **of)
        noise = self.oracle.noise(**{**where, **({"dtype": noise_of} if noise_of else {})})
        if not finished:
            torch.manual_seed(7)
            out = forward(params, given)
            compare("output", out, want.out, noise.out, rtol)
        torch.manual_seed(7)
        loss, grads = value_and_grad(self.loss(forward, finished))(params, given)
        compare("loss", loss, want.loss, noise.loss, rtol, 1e-2)
        compare_grads(flatten(grads), self.wanted(params, want.grads), noise.grads, rtol)

    def loss(self, forward: Any, finished: bool = False) -> Callable[[Tree, Batch], Tensor]:
        if finished:
            return forward
        return lambda p, b: loss_of(forward(p, b), b)

    def wanted(self, params: Tree, grads: Named) -> Named:
        """Gradients of what learns: of adapters where there are any, by the chain rule."""
        flat = flatten(params)
        if not any("lora" in path for path in flat):
            return {n: g for n, g in grads.items() if n in flat}
        out = {}
        for path in {p.rpartition(".")[0] for p in flat if p.endswith("lora_a")}:
            a, b = flat[f"{path}.lora_a"].double(), flat[f"{path}.lora_b"].double()
            g = grads[f"{path}.weight"].double()
            g = g.T if self.turned(path) else g
            out[f"{path}.lora_a"] = ALPHA / RANK * b.T @ g
            out[f"{path}.lora_b"] = ALPHA / RANK * g @ a.T
        return out

    def turned(self, path: str) -> bool:
        forward, _ = self.forward()
        return any(s.transposed and s.path == path for s in forward.sites)

    def named_as_left(self, forward: Forward, params: Tree, name: str) -> bool:
        """Whether the library says that it leaves a weight as it is."""
        holder = name.rpartition(".")[0]
        sited = {s.path for s in forward.sites}
        text = forward.explain(params) + "\n" + "\n".join(self.said)
        told = any(word.strip("',:()[]") in (name, holder) for word in text.split())
        return told and holder not in sited


def _weighs(m: nn.Module) -> str:
    """What kind of weights a module's matrices are, "" for none that is multiplied with."""
    if isinstance(m, nn.Embedding):
        return "embed"
    if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D":
        return "linear"
    others = isinstance(m, nn.MultiheadAttention | nn.RNNBase) or "Expert" in type(m).__name__
    return "other" if others else ""


# -- weights that transforms give -----------------------------------------------------------------


def rounded(weight: Tensor, *, by_column: bool = False) -> Tensor:
    """Symmetric int8 with a scale per output channel, and back; codes are made in fp32."""
    w = weight.float().mT if by_column else weight.float()
    scale = w.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    out = (w / scale).round().clamp(-127, 127) * scale
    out = out.to(torch.promote_types(weight.dtype, torch.float32))
    return out.mT if by_column else out


def int8_weights(bench: Bench, before: Tree, after: Tree) -> Named:
    """The rounded weights that int8 leaves stand for, each held against the formula."""
    old, new, out = flatten(before), flatten(after), {}
    for path, q in new.items():
        if not path.endswith("_int8"):
            continue
        name = path.removesuffix("_int8")
        turned = q.shape != old[name].shape or bench.turned(name.rpartition(".")[0])
        want = rounded(old[name], by_column=turned)
        codes = q.float() * new[f"{name}_scale"].float()
        codes = codes.mT if turned else codes
        compare(f"int8 {name}", codes, want.float(), 0.0, 2e-7)
        out[name] = want
    return out


def adapted(bench: Bench, params: Tree, weights: Mapping[str, Tensor] | None = None) -> Named:
    """Weights with adapters added in."""
    flat = flatten(params)
    own = flatten(bench.forward()[1]) | dict(weights or {})
    out = dict(weights or {})
    for path in {p.rpartition(".")[0] for p in flat if p.endswith("lora_a")}:
        change = ALPHA / RANK * flat[f"{path}.lora_b"].double() @ flat[f"{path}.lora_a"].double()
        weight = own[f"{path}.weight"].double()
        out[f"{path}.weight"] = weight + (change.T if bench.turned(path) else change)
    return out


def shaken(params: Tree) -> Tree:
    """Adapters begin as nothing: here they do something."""

    def shake(path: str, leaf: Tensor) -> Tensor:
        if "lora" not in path:
            return leaf
        generator = torch.Generator().manual_seed(len(path))
        return leaf + 0.1 * torch.randn(leaf.shape, generator=generator).to(leaf)

    return unflatten({path: shake(path, leaf) for path, leaf in flatten(params).items()})


# -- columns --------------------------------------------------------------------------------------


def same(bench: Bench) -> None:
    """from_module leaves the module as it was, and forward is the module, to the bit."""
    module = bench.family.fresh(bench.dtype)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    batch = bench.batch()
    forward, params = from_module(module, call=bench.family.call, head=bench.family.head)
    with torch.no_grad():
        out = forward(params, batch)
        want = bench.family.run(module, batch)
    # fused functions of torch's that serve without gradients add in another order
    compare("output", out, want, 0.0, 1e-12 if bench.dtype == torch.float64 else 1e-6)
    for name, tensor in module.state_dict().items():
        if not torch.equal(tensor, before[name]):
            raise WrongError(f"{name} of the module has changed")


def train(bench: Bench) -> None:
    bench.check(*bench.forward(train=True), train=True)
    forward, params = bench.forward(train=True)
    if blocks(forward):
        bench.check(checkpoint(forward), params, train=True)


def padded(bench: Bench) -> None:
    """Rows of different lengths, and positions given where the module takes them."""
    names = inspect.signature(bench.family.fresh().forward).parameters
    batch = bench.batch()
    if "input_ids" not in batch or "attention_mask" not in names or "attention_mask" in batch:
        raise NothingThereError
    mask = torch.ones_like(batch["input_ids"])
    mask[1, -3:] = 0
    batch |= {"attention_mask": mask}
    if "labels" in batch and batch["labels"].shape == mask.shape:
        batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    forward, params = bench.forward()
    for f in (forward, *chained(forward)):
        bench.check(f, params, batch=batch, key="padded")


def embeds(bench: Bench) -> None:
    """Embeddings given instead of tokens."""
    module = bench.family.fresh()
    batch = bench.batch()
    names = inspect.signature(module.forward).parameters
    if "inputs_embeds" not in names or set(batch) - {"input_ids", "labels"}:
        raise NothingThereError
    width = module.get_input_embeddings().embedding_dim
    x = torch.randn(
        *batch.pop("input_ids").shape, width, generator=torch.Generator().manual_seed(3)
    )
    batch["inputs_embeds"] = x.to(bench.dtype)
    try:
        bench.oracle.result("embeds", batch=batch)
    except Exception as error:
        raise NothingThereError from error
    forward, params = bench.forward()
    for f in (forward, *chained(forward)):
        bench.check(f, params, batch=batch, key="embeds")


def gradients(bench: Bench) -> None:
    bench.check(*bench.forward())


def fused(bench: Bench) -> None:
    if not bench.labelled:
        raise NothingThereError
    forward, params = bench.forward()
    bench.check(fuse_loss(forward), params, finished=True)


def checkpointed(bench: Bench) -> None:
    forward, params = bench.forward()
    bench.check(checkpoint(forward), params)
    bench.check(checkpoint(forward, policy="dots"), params)


def kernels(bench: Bench) -> None:
    forward, params = bench.forward()
    bench.check(fuse_kernels(forward), params)


def chain(bench: Bench) -> None:
    """fuse_loss(checkpoint(fuse_kernels(forward))), in fp64 or fp32."""
    forward, params = bench.forward()
    (f,) = chained(forward)
    bench.check(f, params)
    if bench.labelled:
        bench.check(fuse_loss(f), params, finished=True)


def blocks(forward: Forward) -> bool:
    return any(s.kind == "block" for s in forward.sites)


def chained(forward: Forward) -> list[Forward]:
    """Kernels and checkpointing, where there is something for them."""
    if any(s.kind == "norm" and s.norm is not None for s in forward.sites):
        forward = fuse_kernels(forward)
    return [checkpoint(forward) if blocks(forward) else forward]


def half_precision(bench: Bench, f: Any, params: Tree, batch: Batch) -> None:
    """Near the exact result, as near as PyTorch's own ways of bf16, and not the fp32 one."""
    exact = bench.oracle.result()
    peers = [bench.oracle.result(dtype=torch.bfloat16)]
    if (autocast := bench.oracle.autocast()) is not None:
        peers.append(autocast)
    out = f(params, batch)
    size = float(exact.out.abs().max())
    error, *errors = (
        float((o.double() - exact.out.double()).abs().max())
        for o in (out, *(peer.out for peer in peers))
    )
    if not error <= 4 * max(errors) + 2.0**-8 * size:
        raise WrongError(f"output off by {error:.3g}; bf16 and autocast by {errors}")
    if error <= 1e-6 * size:
        raise WrongError(f"output off by {error:.3g} of {size:.3g}: nothing was computed in bf16")
    _, grads = value_and_grad(bench.loss(f))(params, batch)
    flat = flatten(grads)
    largest = max(float(g.abs().max()) for g in exact.grads.values())
    for name, g in exact.grads.items():
        if flat[name].dtype != flatten(params)[name].dtype:
            raise WrongError(f"the gradient of {name} is {flat[name].dtype}")
        error = float((flat[name].double() - g.double()).norm())
        theirs = max(float((t.grads[name].double() - g).norm()) for t in peers)
        slack = 2.0**-6 * max(float(g.norm()), 1e-2 * largest * g.numel() ** 0.5)
        if not error <= 4 * theirs + slack:
            raise WrongError(
                f"gradient of {name} off by {error:.3g}; bf16's and autocast's by {theirs:.3g}"
            )


def bf16(bench: Bench) -> None:
    """mixed_precision over fp32 weights."""
    forward, params = bench.forward(torch.float32)
    half_precision(bench, mixed_precision(forward), params, bench.batch(torch.float32))


def cast(bench: Bench) -> None:
    """cast_matrices once, then the bare forward."""
    forward, params = bench.forward(torch.float32)
    half_precision(
        bench, forward, cast_matrices(params, torch.bfloat16), bench.batch(torch.bfloat16)
    )


def fp64(bench: Bench) -> None:
    """mixed_precision upwards, where the comparison is sharp."""
    if bench.dtype != torch.float64:
        raise NothingThereError
    forward, params = bench.forward(torch.float32)
    up = mixed_precision(forward, torch.float64)
    bench.check(up, params, rtol=1e-5, noise_of=torch.float32)


def typical(got: Tensor, want: Tensor) -> float:
    """The median error of a row: a router in half precision sends some rows elsewhere."""
    errors = (got.double() - want.double()).flatten(0, -2).norm(dim=-1)
    return float(errors.median() if bool(errors.isfinite().all()) else torch.inf)


def half(bench: Bench) -> None:
    """A bf16 model and an fp16 one, with kernels and checkpointing."""
    exact = bench.oracle.result()
    for dtype in (torch.bfloat16, torch.float16):
        try:
            own = bench.oracle.result(dtype=dtype)
        except RuntimeError:
            continue
        if not own.out.isfinite().all():
            continue
        forward, params = bench.forward(dtype)
        (f,) = chained(forward)
        batch = bench.batch(dtype)
        out = f(params, batch)
        if out.dtype != own.out.dtype:
            raise WrongError(f"a {dtype} model answers in {out.dtype} instead of {own.out.dtype}")
        error, theirs, size = (typical(o, exact.out) for o in (out, own.out, 0 * own.out))
        slack = 2.0**-9 * size
        if not error <= 2 * theirs + slack:
            raise WrongError(
                f"{dtype}: output off by {error:.3g}, the bare module's by {theirs:.3g}"
            )
        value_and_grad(bench.loss(f))(params, batch)


def complete(bench: Bench, forward: Forward, params: Tree, done: set[str], kinds: str) -> None:
    """Every weight of a kind is reached, or said to be left as it is."""
    missed = [
        name
        for name, kind in bench.matrices().items()
        if name not in done
        and (kind == "linear" or "embed" in kinds)
        and not bench.named_as_left(forward, params, name)
    ]
    if missed:
        raise WrongError(f"passed over without a word: {missed[:4]} ({len(missed)})")


def int8(bench: Bench) -> None:
    forward, params = bench.forward(torch.float32)
    f = quantize_int8(forward, skip=())
    ready = f.prepare(params)
    weights = int8_weights(bench, params, ready)
    # the embedding's and linears' rows are fp32 whatever the module computes in
    bench.check(f, ready, key="int8", weights=weights, rtol=1e-5, noise_of=torch.float32)
    flat = flatten(params)
    want = num_bytes(params) - sum(3 * flat[n].numel() - 4 * _channels(ready, n) for n in weights)
    if num_bytes(ready) != want:
        raise WrongError(f"{num_bytes(ready)} bytes, not {want}")
    complete(bench, f, params, set(weights), "linear embed")


def _channels(ready: Tree, name: str) -> int:
    return flatten(ready)[f"{name}_scale"].numel()


def int8_of_bf16(bench: Bench) -> None:
    own = bench.oracle.result(dtype=torch.bfloat16)
    forward, params = bench.forward(torch.bfloat16)
    f = quantize_int8(forward, skip=())
    ready = f.prepare(params)
    weights = int8_weights(bench, params, ready)
    batch = bench.batch(torch.bfloat16)
    out = f(ready, batch)
    if out.dtype != own.out.dtype:
        raise WrongError(f"int8 of a bf16 model answers in {out.dtype}, not {own.out.dtype}")
    # in the exact module, the weights that codes and scales stand for
    exact = bench.oracle.result("int8b", {n: w.to(bench.dtype) for n, w in weights.items()})
    bare = bench.oracle.result()
    error, size = typical(out, exact.out), typical(0 * out, exact.out)
    theirs = typical(own.out, bare.out)
    if not error <= 4 * theirs + 2.0**-8 * size:
        raise WrongError(f"output off by {error:.3g}; the bare bf16 module's by {theirs:.3g}")
    value_and_grad(bench.loss(f))(ready, batch)


def fake(bench: Bench) -> None:
    forward, params = bench.forward()
    f = fake_quant(forward, skip=())
    weights = as_int8(bench, params)
    bench.check(f, params, key="fake", weights=weights)
    complete(bench, f, params, set(weights), "linear embed")


def as_int8(bench: Bench, params: Tree) -> Named:
    """What fake_quant should round: what quantize_int8 rounds."""
    forward, _ = bench.forward()
    return int8_weights(bench, params, quantize_int8(forward, skip=()).prepare(params))


def low_rank(bench: Bench) -> None:
    forward, params = bench.forward()
    f = lora(forward, rank=RANK, alpha=ALPHA)
    ready = shaken(f.prepare(params))
    weights = adapted(bench, ready)
    bench.check(f, ready, key="lora", weights=weights)
    head = {s.path + ".weight" for s in forward.sites if s.kind == "head"}
    complete(bench, f, params, set(weights) | head, "linear")


def qlora(bench: Bench) -> None:
    forward, params = bench.forward(torch.float32)
    skip = ("lm_head",) if any(s.kind == "head" for s in forward.sites) else ()
    f = lora(quantize_int8(forward, skip=skip), rank=RANK, alpha=ALPHA)
    ready = f.prepare(params)
    weights = int8_weights(bench, params, ready)
    ready = shaken(ready)
    bench.check(
        f,
        ready,
        key="qlora",
        weights=adapted(bench, ready, weights),
        rtol=1e-5,
        noise_of=torch.float32,
    )


def float8(bench: Bench) -> None:
    """Every linear whose sizes 16 divides, held against a module whose linears round by hand."""
    forward, params = bench.forward()
    linears = {s.path for s in forward.sites if s.kind == "linear"}
    flat = flatten(params)
    odd = sorted(p for p in linears if any(size % 16 for size in flat[f"{p}.weight"].shape))
    if linears and len(odd) == len(linears):
        raise NothingThereError
    f = fp8(forward, skip=tuple(odd))
    out = f(f.prepare(params), bench.batch())
    module = bench.family.fresh(bench.dtype)
    chosen = {flat[f"{p}.weight"].data_ptr() for p in linears - set(odd)}
    names = {n for n, t in flat.items() if t.data_ptr() in chosen}
    for name, m in module.named_modules():
        weight = m._parameters.get("weight")
        if weight is not None and f"{name}.weight" in names:
            vars(m)["forward"] = _rounding_forward(m, bench.turned(name))
    with torch.no_grad():
        want = bench.family.run(module, bench.batch())
    plain = bench.oracle.result().out
    error, effect = (float((o.double() - want.double()).norm()) for o in (out, plain))
    # one number that falls to the other side of a tie moves the result by far less than all do
    if not error <= 0.05 * effect:
        raise WrongError(f"fp8 is off by {error:.3g}, all its rounding is {effect:.3g}")
    value_and_grad(bench.loss(f))(f.prepare(params), bench.batch())


def _rounding_forward(m: nn.Module, turned: bool) -> Callable[[Tensor], Tensor]:
    def e4m3(x: Tensor) -> Tensor:
        scale = x.abs().amax().float() / torch.tensor(448.0)
        scale = torch.where(scale == 0, 1.0, scale)
        return ((x.float() * scale.reciprocal()).to(torch.float8_e4m3fn).to(x.dtype)) * scale.to(
            x.dtype
        )

    def forward(x: Tensor) -> Tensor:
        weight: Any = m.weight
        y = e4m3(x) @ e4m3(weight if turned else weight.T)
        bias: Any = m.bias
        return y if bias is None else y + bias

    return forward


def accumulated(bench: Bench) -> None:
    if not bench.labelled:
        raise NothingThereError
    forward, params = bench.forward()
    batches = [bench.batch(seed=0), bench.batch(seed=1)]
    batches[1]["labels"] = batches[1]["labels"].clone()
    batches[1]["labels"][0] = -100
    results = [bench.oracle.result(f"acc {i}", batch=b) for i, b in enumerate(batches)]
    counts = [int((b["labels"] != -100).sum()) for b in batches]
    shares = [c / sum(counts) for c in counts]
    noise = bench.oracle.noise()
    loss_fn = bench.loss(chained(forward)[0])
    loss, grads = value_and_grad(accumulate(loss_fn, 2))(params, batches)
    want = sum(s * float(r.loss) for s, r in zip(shares, results, strict=True))
    compare("loss", loss, torch.tensor(want), noise.loss)
    total = {
        n: sum(s * r.grads[n] for s, r in zip(shares, results, strict=True))  # type: ignore[misc]
        for n in results[0].grads
    }
    compare_grads(flatten(grads), total, noise.grads)


STEPS: dict[str, Callable[[Forward], Forward]] = {
    "fuse_kernels": fuse_kernels,
    "checkpoint": checkpoint,
    "fake_quant": lambda f: fake_quant(f, skip=()),
    "lora": lambda f: lora(f, rank=RANK, alpha=ALPHA),
    "fuse_loss": fuse_loss,
}


def steps(bench: Bench) -> list[str]:
    """Which of the steps there is something for."""
    forward, _ = bench.forward()
    kinds = {s.kind for s in forward.sites}
    known = any(s.kind == "norm" and s.norm is not None for s in forward.sites)
    return [
        *(["fuse_kernels"] if known else []),
        *(["checkpoint"] if "block" in kinds else []),
        *(["fake_quant"] if kinds & {"linear", "embed", "head"} else []),
        *(["lora"] if "linear" in kinds else []),
        *(["fuse_loss"] if bench.labelled and "head" in kinds else []),
    ]


def composed(bench: Bench, order: list[str]) -> tuple[Forward, Tree, bool, dict[str, Any]]:
    """A chain, its params, whether it ends in a loss, and what the oracle is to hold."""
    forward, params = bench.forward()
    for name in order:
        forward = STEPS[name](forward)
    ready = shaken(forward.prepare(params))
    weights = as_int8(bench, params) if "fake_quant" in order else {}
    key = " ".join(sorted({"fake_quant", "lora"} & set(order))) or "plain"
    return (
        forward,
        ready,
        "fuse_loss" in order,
        {"key": key, "weights": adapted(bench, ready, weights)},
    )


def long(bench: Bench) -> None:
    """All of it at once."""
    names = steps(bench)
    if len(names) < 2:
        raise NothingThereError
    forward, ready, finished, of = composed(bench, names)
    bench.check(forward, ready, finished=finished, **of)


def orders(bench: Bench) -> None:
    """The same in other orders."""
    names = steps(bench)
    if len(names) < 2:
        raise NothingThereError
    every = [list(o) for o in itertools.permutations(names)]
    for order in random.Random(0).sample(every, min(3, len(every))):
        forward, ready, finished, of = composed(bench, order)
        bench.check(forward, ready, finished=finished, **of)


def other_attention(bench: Bench) -> None:
    """Attention (and experts) as plain arithmetic."""
    if not bench.family.other_attention:
        raise NothingThereError
    forward, params = bench.forward(attn="eager")
    bench.check(forward, params, attn="eager")
    for f in chained(forward):
        bench.check(f, params, attn="eager")


# -- drivers --------------------------------------------------------------------------------------


def drive(bench: Bench, run: Callable[[Any, Tree, Named, Named | None], None]) -> None:
    """A driver over two chains: checkpoint alone, and all steps at once."""
    forward, params = bench.forward()
    want = bench.oracle.result()
    f = checkpoint(forward) if blocks(forward) else forward
    run(bench.loss(f), params, want.grads, None)


def by_grad(bench: Bench) -> None:
    noise = bench.oracle.noise().grads

    def run(loss: Any, params: Tree, want: Named, _: Any) -> None:
        free, frozen = trainable(params)
        got = grad(lambda p: loss(merge(p, frozen), bench.batch()))(free)
        compare_grads(flatten(got), want, noise)

    drive(bench, run)
    names = steps(bench)
    if len(names) > 1:
        forward, ready, finished, of = composed(bench, names)
        want = bench.oracle.result(of["key"], of["weights"])
        free, frozen = trainable(ready)
        loss = bench.loss(forward, finished)
        got = grad(lambda p: loss(merge(p, frozen), bench.batch()))(free)
        compare_grads(flatten(got), bench.wanted(ready, want.grads), noise)


def by_vmap(bench: Bench) -> None:
    noise = bench.oracle.noise().grads
    forward, params = bench.forward()
    f = checkpoint(forward) if blocks(forward) else forward
    free, frozen = trainable(params)
    loss = bench.loss(f)
    got = vmap(grad(lambda p, b: loss(merge(p, frozen), b)), (None, 0))(
        free, bench.oracle.stacked()
    )
    for seed in (0, 1):
        want = bench.oracle.result(seed=seed).grads
        compare_grads({n: g[seed] for n, g in flatten(got).items()}, want, noise)


def by_hvp(bench: Bench) -> None:
    attn = "eager" if bench.family.other_attention else None  # torch's own has no jvp
    forward, params = bench.forward(attn=attn)
    f = checkpoint(forward) if blocks(forward) else forward
    free, frozen = trainable(params)
    loss, batch = bench.loss(f), bench.batch()
    along = map_leaves(torch.cos, free)
    got = jvp(lambda p: grad(lambda q: loss(merge(q, frozen), batch))(p), (free,), (along,))[1]
    want = bench.oracle.hvp(attn)
    rough = bench.oracle.known["hvp error"]
    scale = 1e-5 if bench.dtype == torch.float64 else 1e-3
    compare_grads(flatten(got), want, dict.fromkeys(want, 0.0), min(scale * rough, 2e-2), "Hv of")


def by_compile(bench: Bench) -> None:
    forward, params = bench.forward()
    f = checkpoint(forward) if blocks(forward) else forward
    torch._dynamo.reset()
    loss = torch.compile(bench.loss(f), backend="aot_eager")
    _, grads = value_and_grad(loss)(params, bench.batch())
    compare_grads(flatten(grads), bench.oracle.result().grads, bench.oracle.noise().grads)


COLUMNS: dict[str, tuple[Callable[[Bench], None], str]] = {
    "same": (same, "the bare forward is the module which is left as it was"),
    "vg": (gradients, "`value_and_grad` of the bare forward"),
    "train": (train, "in training mode, also under `checkpoint`"),
    "pad": (padded, "padded rows with their `attention_mask`"),
    "emb": (embeds, "`inputs_embeds` instead of tokens"),
    "fuse": (fused, "`fuse_loss`"),
    "ckpt": (checkpointed, "`checkpoint`"),
    "kern": (kernels, "`fuse_kernels`"),
    "chain": (chain, "`fuse_loss(checkpoint(fuse_kernels(forward)))`"),
    "bf16": (bf16, "`mixed_precision` over fp32 weights"),
    "cast": (cast, "`cast_matrices` to bf16"),
    "fp64": (fp64, "`mixed_precision` to fp64 over fp32 weights"),
    "half": (half, "a bf16 and an fp16 model with `checkpoint(fuse_kernels(forward))`"),
    "int8": (int8, "`quantize_int8`"),
    "int8b": (int8_of_bf16, "`quantize_int8` of a bf16 model"),
    "fake": (fake, "`fake_quant`"),
    "lora": (low_rank, "`lora`, its adapters away from zero"),
    "qlora": (qlora, "`lora(quantize_int8(forward))`"),
    "fp8": (float8, "`fp8` of all linears whose sizes 16 divides"),
    "acc": (accumulated, "`accumulate` over batches with different numbers of labels"),
    "long": (long, "kernels, checkpoint, fake_quant, lora and the fused loss at once"),
    "ord": (orders, "the same in three other orders"),
    "eager": (other_attention, "attention as plain arithmetic: bare, and the chain"),
    "grad": (by_grad, "`torch.func.grad` over checkpoint, and over all at once"),
    "vmap": (by_vmap, "`vmap(grad)` over checkpoint"),
    "hvp": (by_hvp, "`jvp(grad)` over checkpoint"),
    "comp": (by_compile, "`torch.compile(loss)` over checkpoint"),
}
DRIVERS = {"grad": "grad", "vmap": "vmap", "hvp": "hvp", "comp": "compile"}


# -- a cell ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """glyph: R right, c a clear error, b the bare module fails too, - nothing to do there; W wrong,
    U an unclear error. said: the reason."""

    glyph: str
    said: str = ""

    @property
    def good(self) -> bool:
        return self.glyph in "Rcb-"


def cell(bench: Bench, column: str) -> Cell:
    """Runs one cell."""
    check, _ = COLUMNS[column]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                check(bench)
            finally:
                bench.said += [str(w.message) for w in caught]
    except NothingThereError:
        return Cell("-")
    except WrongError as wrong:
        return Cell("W", str(wrong))
    except Exception as error:
        return _failed(bench, column, error)
    return Cell("R")


def _failed(bench: Bench, column: str, error: Exception) -> Cell:
    said = f"{type(error).__name__}: {error}"
    if is_clear(bench, error):
        return Cell("c", said)
    if column in DRIVERS and (theirs := bench.oracle.bare(DRIVERS[column])):
        return Cell("b", theirs)
    if column in BARE and (theirs := bare_in(bench, *BARE[column])):
        return Cell("b", theirs)
    frames = traceback.extract_tb(error.__traceback__)
    at = next((f for f in reversed(frames) if _ours(f.filename)), frames[-1])
    return Cell("U", f"{said} ({Path(at.filename).name}:{at.lineno})")


# where what the bare module cannot do in that dtype, or in that mode, excuses a cell
BARE: dict[str, tuple[torch.dtype, bool]] = {
    "int8b": (torch.bfloat16, False),
    "train": (torch.float64, True),
    "bf16": (torch.bfloat16, False),
    "cast": (torch.bfloat16, False),
}


def bare_in(bench: Bench, dtype: torch.dtype, train: bool) -> str:
    """What the bare module says in another dtype or in training mode; "" if it can."""
    try:
        if dtype == torch.bfloat16 and bench.oracle.autocast() is None:
            return "torch.autocast fails too"
        bench.oracle.result(dtype=dtype if dtype != torch.float64 else None, train=train)
    except Exception as error:  # whatever the module says
        return f"{type(error).__name__}: {error}"
    return ""


def is_clear(bench: Bench, error: Exception) -> bool:
    """An error of ours that names a module, a weight or the argument that remedies it."""
    if not isinstance(error, ValueError | TypeError | NotImplementedError):
        return False
    if not _ours(traceback.extract_tb(error.__traceback__)[-1].filename):
        return False
    module = bench.family.fresh()
    names = {n for n, _ in module.named_modules()} | {n for n, _ in module.named_parameters()}
    names |= {type(m).__name__ for m in module.modules()}
    words = {w.strip("'\",:;()[]{}.`") for w in str(error).replace("=", " ").split()}
    return bool(words & (names | {"head", "call", "skip"} - {""})) and len(str(error)) > 30


def _ours(filename: str) -> bool:
    path = Path(filename)
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS


def row(family: Family, columns: list[str] | None = None) -> dict[str, Cell]:
    """All cells of a family."""
    bench = Bench(family, Oracle(family))
    return {column: cell(bench, column) for column in columns or COLUMNS}
