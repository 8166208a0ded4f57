"""Cases: norms, gated activations, rotary embedding. All of them should cost what memory costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runners.benchmarks.harness import Case
from runners.benchmarks.providers import Forward, Inputs, Provider, ours, torch_and_compiled

EPS = 1e-6
BF16 = 2  # bytes


def cases() -> list[Case]:
    return [
        *(rms_norm(16384, dim) for dim in (2048, 8192)),
        rms_norm(16384 * 16, 128),
        add_rms_norm(16384, 2048),
        *(gated(name, 16384, 8960) for name in ("swiglu", "geglu")),
        relu2(16384, 8960),
        *(rope(8, 2048, *heads, 128) for heads in ((16, 16), (12, 2))),
        *(rope(8, 2048, *heads, 128, normed=True) for heads in ((16, 16), (12, 2))),
    ]


def _normal(shape: tuple[int, ...], wrt: Sequence[str], *others: str, weights: int = 0) -> Any:
    """Makes tensors of one shape, and with ``weights`` their width a weight of it near 1."""

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        kind: Any = {"generator": generator, "device": device}
        made = {
            name: torch.randn(shape, dtype=torch.bfloat16, **kind).requires_grad_(name in wrt)
            for name in (*wrt, *others)
        }
        if weights:
            weight = (1 + 0.1 * torch.randn(weights, **kind)).bfloat16()
            made["weight"] = weight.requires_grad_()
        return made

    return inputs


def _case(
    kernel: str,
    shape: str,
    elements: float,
    inputs: Any,
    providers: Sequence[Provider],
    wrt: Sequence[str],
    seeds: Sequence[str],
    overwritten: Sequence[str] | None = None,
) -> Case:
    """elements: read or written at the least. overwritten: what Liger's gradients take the places
    of; else all that is no weight."""
    restore = overwritten or tuple(n for n in (*wrt, *seeds) if not n.endswith("weight"))
    return Case(
        kernel,
        shape,
        float(elements * BF16),
        "copy",
        inputs,
        tuple(providers),
        tuple(wrt),
        tuple(seeds),
        tuple(restore),
    )


def peer(name: str, make: Callable[[], Forward]) -> Provider:
    """Another library's forward; ``make`` imports it."""
    return Provider(name, lambda sets: make(), peer=name)


def mine(make: Callable[[], Forward], name: str = "ours") -> Provider:
    return Provider(name, lambda sets: make())


def liger(name: str) -> Callable[..., Any]:
    from liger_kernel.transformers import functional

    return getattr(functional, f"liger_{name}")


def _quack_norm() -> Callable[..., Any]:
    from quack import rmsnorm

    return rmsnorm


# RMSNorm


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As Hugging Face's Llama writes it."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return weight * y.to(x.dtype)


def rms_norm(n: int, dim: int) -> Case:
    """x and its gradient's source are read twice over, y and dx written: 5 passes."""

    def forward(function: Any, *rest: Any, **options: Any) -> Forward:
        return lambda i: function(i["x"], i["weight"], *rest, **options)

    providers = (
        *torch_and_compiled(forward(plain_rms_norm)),
        mine(lambda: lambda i: F.rms_norm(i["x"], (dim,), i["weight"], EPS), "torch rms_norm"),
        mine(lambda: forward(ours("rms_norm"), EPS)),
        peer("Liger", lambda: forward(liger("rms_norm"), EPS)),
        peer("quack", lambda: forward(_quack_norm(), eps=EPS)),
    )
    inputs = _normal((n, dim), ("x",), "dy", weights=dim)
    shape = f"N={n} D={dim}"
    return _case("rms_norm", shape, 5 * n * dim, inputs, providers, ("x", "weight"), ("dy",))


def add_rms_norm(n: int, dim: int) -> Case:
    """The stream s = x + branch and its norm: 4 passes forward, and 4 backward, since x and branch
    share one gradient."""

    def eager(i: Inputs) -> tuple[Tensor, Tensor]:
        total = i["x"] + i["branch"]
        return plain_rms_norm(total, i["weight"]), total

    def forward(function: Any) -> Forward:
        return lambda i: function(i["x"], i["branch"], i["weight"], EPS)

    def quack() -> Forward:
        norm = _quack_norm()
        return lambda i: norm(i["x"], i["weight"], residual=i["branch"], eps=EPS, prenorm=True)

    providers = (
        *torch_and_compiled(eager),
        mine(lambda: forward(ours("add_rms_norm"))),
        peer("Liger", lambda: forward(liger("fused_add_rms_norm"))),
        peer("quack", quack),
    )
    inputs = _normal((n, dim), ("x", "branch"), "dy", "ds", weights=dim)
    wrt = ("x", "branch", "weight")
    return _case(
        "add_rms_norm", f"N={n} D={dim}", 8 * n * dim, inputs, providers, wrt, ("dy", "ds")
    )


# Activations

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": lambda gate: F.gelu(gate, approximate="tanh"),
}


def gated(name: str, n: int, dim: int) -> Case:
    """3 passes forward (gate, up, out), 5 backward."""
    activation = _ACTIVATIONS[name]

    def forward(function: Any) -> Forward:
        return lambda i: function(i["gate"], i["up"])

    providers = (
        *torch_and_compiled(forward(lambda gate, up: activation(gate) * up)),
        mine(lambda: forward(ours(name))),
        peer("Liger", lambda: forward(liger(name))),
    )
    inputs = _normal((n, dim), ("gate", "up"), "dy")
    return _case(name, f"N={n} F={dim}", 8 * n * dim, inputs, providers, ("gate", "up"), ("dy",))


def relu2(n: int, dim: int) -> Case:
    """2 passes forward, 3 backward."""

    def forward(function: Any) -> Forward:
        return lambda i: function(i["x"])

    providers = (
        *torch_and_compiled(forward(lambda x: F.relu(x).square())),
        mine(lambda: forward(ours("relu2"))),
        peer("Liger", lambda: forward(liger("relu_squared"))),
    )
    inputs = _normal((n, dim), ("x",), "dy")
    return _case("relu2", f"N={n} F={dim}", 5 * n * dim, inputs, providers, ("x",), ("dy",))


# Rotary embedding


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rope(
    documents: int, length: int, heads: int, key_heads: int, dim: int, normed: bool = False
) -> Case:
    """q and k in one go: 2 passes over both forward, 2 backward; with a norm before it (QK-norm)
    3 backward, because its input is read too."""
    n = documents * length
    weights = ("q_weight", "k_weight") if normed else ()

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        made: Inputs = {}
        for name, count in (("q", heads), ("k", key_heads)):
            some = _normal((n, count, dim), (name,), f"d{name}", weights=dim)(device, generator)
            made[f"{name}_weight"] = some.pop("weight")
            made |= some
        frequency = 1e6 ** (-torch.arange(0, dim, 2, device=device) / dim)
        angle = torch.arange(length, device=device)[:, None] * frequency
        positions = torch.arange(n, device=device) % length
        return made | {
            "cos": angle.cos(),
            "sin": angle.sin(),
            "positions": positions,
            # the tables as other libraries want them: a row a token, both halves
            "cos_rows": angle.cos()[positions],
            "sin_rows": angle.sin()[positions],
        }

    def norms(norm: Callable[..., Tensor], **options: Any) -> Callable[[Inputs], Any]:
        if not normed:
            return lambda i: (i["q"], i["k"])
        return lambda i: tuple(norm(i[x], i[f"{x}_weight"], **options) for x in "qk")

    def tables(i: Inputs) -> list[Tensor]:
        return [torch.cat((i[name],) * 2, -1) for name in ("cos_rows", "sin_rows")]

    def eager(i: Inputs) -> tuple[Tensor, ...]:
        c, s = (table[:, None] for table in tables(i))
        prepared = norms(plain_rms_norm)(i)
        return tuple((x * c + rotate_half(x) * s).to(x.dtype) for x in prepared)

    def fused() -> Forward:
        function, options = ours("rope", *weights), {"eps": EPS} if normed else {}

        def forward(i: Inputs) -> Any:
            given = {name: i[name] for name in weights}
            return function(i["q"], i["k"], i["cos"], i["sin"], i["positions"], **given, **options)

        return forward

    def apart() -> Forward:
        function, prepare = ours("rope"), norms(ours("rms_norm"), eps=EPS)
        return lambda i: function(*prepare(i), i["cos"], i["sin"], i["positions"])

    def by_liger() -> Forward:
        function, norm = liger("rope"), liger("rms_norm")
        prepare = norms(lambda x, weight: norm(x, weight, EPS))

        def forward(i: Inputs) -> tuple[Tensor, ...]:
            q, k = (x.unsqueeze(0).transpose(1, 2) for x in prepare(i))  # [1, heads, N, D]
            c, s = (table[None] for table in tables(i))
            return tuple(x.transpose(1, 2).squeeze(0) for x in function(q, k, c, s))

        return forward

    def by_quack() -> Forward:
        from quack.rotary import apply_rotary_emb

        prepare = norms(_quack_norm(), eps=EPS)

        def forward(i: Inputs) -> tuple[Tensor, ...]:
            rows = (x.unflatten(0, (documents, length)) for x in prepare(i))
            return tuple(apply_rotary_emb(x, i["cos"], i["sin"]).flatten(0, 1) for x in rows)

        return forward

    providers = [
        *torch_and_compiled(eager),
        mine(fused),
        *([mine(apart, "ours, norms apart")] if normed else []),
        peer("Liger", by_liger),
        peer("quack", by_quack),
    ]
    return _case(
        "rope_qk_norm" if normed else "rope",
        f"N={n} heads {heads}/{key_heads} D={dim}",
        (5 if normed else 4) * n * (heads + key_heads) * dim,
        inputs,
        providers,
        ("q", "k", *weights),
        ("dq", "dk"),
    )
