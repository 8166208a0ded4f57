"""Columns of one transform each: a use of the library on a foreign module, and its check."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core import Forward, from_module
from params import num_bytes
from params.tree import Tree, flatten
from tests.foreign.bench import ALPHA, RANK, Bench, NothingThereError, adapted, int8_weights, shaken
from tests.foreign.families import Batch
from tests.foreign.oracle import (
    BareFailsError,
    Named,
    WrongError,
    compare,
    compare_grads,
    loss_of,
)
from tests.rounding import FP32, FP64
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
    value_and_grad,
)
from transforms.mixed_precision import cast_matrices


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
    compare("output", out, want, 0.0, FP64 if bench.dtype == torch.float64 else FP32)
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
    for side, gap in (("right", slice(-3, None)), ("left", slice(3))):
        mask = torch.ones_like(batch["input_ids"])
        mask[1, gap] = 0
        one = batch | {"attention_mask": mask}
        if "labels" in batch and batch["labels"].shape == mask.shape:
            one["labels"] = batch["labels"].masked_fill(mask == 0, -100)
        as_bare(bench, f"padded {side}", one)


def positions(bench: Bench) -> None:
    """Two documents in a row of tokens."""
    batch = bench.batch()
    names = inspect.signature(bench.family.fresh().forward).parameters
    if "input_ids" not in batch or "position_ids" not in names or "position_ids" in batch:
        raise NothingThereError
    length = batch["input_ids"].shape[1]
    order = torch.cat([torch.arange(length - 4), torch.arange(4)])
    as_bare(bench, "positions", batch | {"position_ids": order.expand_as(batch["input_ids"])})


def caching(bench: Bench) -> None:
    """The module is asked for its cache and for what its layers gave."""
    names = inspect.signature(bench.family.fresh().forward).parameters
    options = {"use_cache": True, "output_hidden_states": True}
    asked = {name: value for name, value in options.items() if name in names or "kwargs" in names}
    if not asked or bench.family.call is not None or "input_ids" not in names:
        raise NothingThereError
    module = bench.family.fresh(bench.dtype)

    def call(run: Any, batch: Batch) -> Tensor:
        out = run(**{k: v for k, v in batch.items() if k != "labels"}, **asked)
        return torch.cat([out.logits, *([h[-1]] if (h := out.get("hidden_states")) else [])], -1)

    batch = {k: v for k, v in bench.batch().items() if k != "labels"}
    learned = {n: p for n, p in module.named_parameters() if p.requires_grad}
    try:
        loss = loss_of(call(module, batch), batch)
        grads = torch.autograd.grad(loss, list(learned.values()), materialize_grads=True)
    except Exception as error:
        raise NothingThereError from error
    want = dict(zip(learned, grads, strict=True))
    forward, ready = from_module(module, call=call)
    for f in (forward, *chained(forward)):
        _, got = value_and_grad(lambda p, b, f=f: loss_of(f(p, b), b))(ready, batch)
        compare_grads(flatten(got), want, bench.oracle.noise().grads)


def partly(bench: Bench) -> None:
    """Every third parameter frozen: the others' gradients are what they were."""
    module = bench.family.fresh(bench.dtype)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    if len(names) < 3:
        raise NothingThereError
    still = {*names[::3]}
    for name, p in module.named_parameters():
        p.requires_grad_(p.requires_grad and name not in still)
    forward, params = from_module(module, call=bench.family.call, head=bench.family.head)
    result, noise = bench.oracle.result(), bench.oracle.noise().grads
    want = {name: g for name, g in result.grads.items() if name not in still}
    for f in (forward, *chained(forward)):
        _, grads = value_and_grad(bench.loss(f))(params, bench.batch())
        compare_grads(flatten(grads), want, noise)


def embeds(bench: Bench) -> None:
    """Embeddings given instead of tokens."""
    module = bench.family.fresh()
    batch = bench.batch()
    names = inspect.signature(module.forward).parameters
    if "inputs_embeds" not in names or set(batch) - {"input_ids", "labels"}:
        raise NothingThereError
    try:
        rows: Any = module.get_input_embeddings().weight
    except (AttributeError, NotImplementedError) as error:
        raise NothingThereError from error
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*batch.pop("input_ids").shape, rows.shape[1], generator=generator)
    batch["inputs_embeds"] = x.to(bench.dtype)
    as_bare(bench, "embeds", batch)


def as_bare(bench: Bench, key: str, batch: Batch) -> None:
    """A batch of another form, by the bare forward and by the chain, if the module takes it."""
    try:
        own = bench.oracle.result(key, batch={name: leaf.clone() for name, leaf in batch.items()})
    except Exception as error:
        raise NothingThereError from error
    if not own.out.isfinite().all():
        return  # rows that begin with padding, which some attention answers with NaN
    forward, params = bench.forward()
    for f in (forward, *chained(forward)):
        bench.check(f, params, batch=batch, key=key)


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


BATCHES = 8  # of which one may fall well or ill


@dataclass
class Errors:
    """Squares of the distances from the exact result, of ours and of each of PyTorch's own ways."""

    ours: float
    theirs: list[float]
    size: float

    def __add__(self, other: Errors) -> Errors:
        theirs = [a + b for a, b in zip(self.theirs, other.theirs, strict=True)]
        return Errors(self.ours + other.ours, theirs, self.size + other.size)

    def beyond(self, factor: float, slack: float) -> bool:
        """Whether ours is more than so many times as far off as the worst of PyTorch's ways."""
        return not self.ours**0.5 <= factor * max(self.theirs) ** 0.5 + slack * self.size**0.5

    def __str__(self) -> str:
        return f"{self.ours**0.5:.3g}; bf16's and autocast's by {max(self.theirs) ** 0.5:.3g}"


def half_precision(bench: Bench, f: Any, params: Tree, dtype: torch.dtype) -> None:
    """Near the exact result, as near as PyTorch's own ways of bf16, and not the fp32 one.

    Four times as far off are allowed. An error of one batch is one draw of a distribution with long
    tails, though: what is farther off there is judged by the root mean square over eight batches,
    of which twice PyTorch's is allowed. NaN where both of PyTorch's ways have it is the module's.
    """
    first = errors(bench, f, params, dtype, 0)
    far = {name for name, e in first.items() if e.beyond(4, 2.0**-6)}
    if not far:
        return
    total = {name: first[name] for name in far}
    for seed in range(1, BATCHES):
        more = errors(bench, f, params, dtype, seed)
        total = {name: total[name] + more[name] for name in far}
    for name, e in total.items():
        if e.beyond(2, 2.0**-6):
            raise WrongError(f"{name} off by {e}, in {BATCHES} batches")


def errors(bench: Bench, f: Any, params: Tree, dtype: torch.dtype, seed: int) -> dict[str, Errors]:
    exact = bench.oracle.result(seed=seed)
    peers = [bench.oracle.result(dtype=torch.bfloat16, seed=seed)]
    if (autocast := bench.oracle.autocast(seed)) is not None:
        peers.append(autocast)
    if not exact.out.isfinite().all():
        raise BareFailsError("the bare module's output is not finite")
    batch = bench.batch(dtype, seed)
    out = f(params, batch)
    outs = [(peer.out.double() - exact.out.double()).abs().max().item() for peer in peers]
    error, size = (float((o.double()).abs().max()) for o in (out - exact.out, exact.out))
    if not error <= 4 * max(outs) + 2.0**-8 * size:
        raise WrongError(f"output off by {error:.3g}; bf16 and autocast by {outs}")
    if error <= 1e-6 * size:
        raise WrongError(f"output off by {error:.3g} of {size:.3g}: nothing was computed in bf16")
    _, grads = value_and_grad(bench.loss(f))(params, batch)
    flat, held = flatten(grads), flatten(params)
    largest = max(float(g.abs().max()) for g in exact.grads.values())
    found = {}
    for name, g in exact.grads.items():
        if flat[name].dtype != held[name].dtype:
            raise WrongError(f"the gradient of {name} is {flat[name].dtype}")
        known = [p.grads[name] for p in peers if p.grads[name].isfinite().all()]
        if not known:
            raise BareFailsError(f"the bare module's gradient of {name} is not finite in bf16")
        ours, *theirs = (float((t.double() - g).norm()) ** 2 for t in (flat[name], *known))
        size = max(float(g.norm()), 1e-2 * largest * g.numel() ** 0.5)
        found[f"gradient of {name}"] = Errors(ours, theirs, size**2)
    return found


def bf16(bench: Bench) -> None:
    """mixed_precision over fp32 weights."""
    forward, params = bench.forward(torch.float32)
    half_precision(bench, mixed_precision(forward), params, torch.float32)


def cast(bench: Bench) -> None:
    """cast_matrices once, then the bare forward."""
    forward, params = bench.forward(torch.float32)
    half_precision(bench, forward, cast_matrices(params, torch.bfloat16), torch.bfloat16)


def fp64(bench: Bench) -> None:
    """mixed_precision upwards, where the comparison is sharp."""
    if bench.dtype != torch.float64:
        raise NothingThereError
    forward, params = bench.forward(torch.float32)
    up = mixed_precision(forward, torch.float64)
    bench.check(up, params, rtol=FP32, noise_of=torch.float32)


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
    bench.check(f, ready, key="int8", weights=weights, rtol=FP32, noise_of=torch.float32)
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
    head = {s.weight for s in forward.sites if s.kind == "head"}
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
        rtol=FP32,
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
    held = dict(module.named_parameters())
    chosen = {id(held[f"{p}.weight"]) for p in linears - set(odd)}
    for m in module.modules():
        if id(m._parameters.get("weight")) in chosen and not isinstance(m, nn.Embedding):
            turned = type(m).__name__ == "Conv1D"
            vars(m)["forward"] = _rounding_forward(m, turned)
    with torch.no_grad():
        want = bench.family.run(module, bench.batch())
    plain = bench.oracle.result().out
    if not want.isfinite().all():
        raise BareFailsError("the bare module's output is not finite")
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
