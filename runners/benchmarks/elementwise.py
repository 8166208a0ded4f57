"""Cases: norms, gated activations, rotary embedding. All of them should cost what memory costs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runners.benchmarks.harness import Case
from runners.benchmarks.providers import (
    Forward,
    Inputs,
    Provider,
    ours,
    simple,
    torch_and_compiled,
)

EPS = 1e-6
BF16 = 2  # bytes


def cases() -> list[Case]:
    return [
        *(rms_norm(16384, dim) for dim in (2048, 8192)),
        rms_norm(16384 * 16, 128),
        add_rms_norm(16384, 2048),
        *(gated(name, 16384, 8960) for name in ("swiglu", "geglu")),
        relu2(16384, 8960),
        rope(8, 2048, 16, 16, 128),
        rope(8, 2048, 12, 2, 128),
        rope(8, 2048, 16, 16, 128, normed=True),
        rope(8, 2048, 12, 2, 128, normed=True),
    ]


def _normal(*names: str, shape: tuple[int, ...], wrt: Sequence[str]) -> Callable[..., Inputs]:
    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        return {
            name: torch.randn(
                shape, generator=generator, device=device, dtype=torch.bfloat16
            ).requires_grad_(name in wrt)
            for name in names
        }

    return inputs


def _with_weights(make: Callable[..., Inputs], dim: int, *names: str) -> Callable[..., Inputs]:
    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        weights = {
            name: (1 + 0.1 * torch.randn(dim, generator=generator, device=device))
            .to(torch.bfloat16)
            .requires_grad_()
            for name in names
        }
        return make(device, generator) | weights

    return inputs


def _liger(name: str) -> Callable[..., Any]:
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
    make = _normal("x", "dy", shape=(n, dim), wrt=("x",))

    def forward(function: Any, *rest: Any, **options: Any) -> Forward:
        return lambda i: function(i["x"], i["weight"], *rest, **options)

    return Case(
        "rms_norm",
        f"N={n} D={dim}",
        5.0 * n * dim * BF16,
        "copy",
        _with_weights(make, dim, "weight"),
        (
            *torch_and_compiled(forward(plain_rms_norm)),
            simple("torch rms_norm", lambda i: F.rms_norm(i["x"], (dim,), i["weight"], EPS)),
            Provider("ours", lambda sets: forward(ours("rms_norm"), EPS)),
            Provider("Liger", lambda sets: forward(_liger("rms_norm"), EPS), peer="Liger"),
            Provider("quack", lambda sets: forward(_quack_norm(), eps=EPS), peer="quack"),
        ),
        wrt=("x", "weight"),
        seeds=("dy",),
        restore=("x", "dy"),  # Liger's gradient takes the place of dy
    )


def add_rms_norm(n: int, dim: int) -> Case:
    """The stream s = x + branch and its norm: 4 passes forward, and 4 backward, since x and branch
    share one gradient."""
    make = _normal("x", "branch", "dy", "ds", shape=(n, dim), wrt=("x", "branch"))

    def eager(i: Inputs) -> tuple[Tensor, Tensor]:
        total = i["x"] + i["branch"]
        return plain_rms_norm(total, i["weight"]), total

    def mine(sets: Sequence[Inputs]) -> Forward:
        function = ours("add_rms_norm")
        return lambda i: function(i["x"], i["branch"], i["weight"], EPS)

    def quack(sets: Sequence[Inputs]) -> Forward:
        norm = _quack_norm()
        return lambda i: norm(i["x"], i["weight"], residual=i["branch"], eps=EPS, prenorm=True)

    def liger(sets: Sequence[Inputs]) -> Forward:
        norm = _liger("fused_add_rms_norm")
        return lambda i: norm(i["x"], i["branch"], i["weight"], EPS)

    return Case(
        "add_rms_norm",
        f"N={n} D={dim}",
        8.0 * n * dim * BF16,
        "copy",
        _with_weights(make, dim, "weight"),
        (
            *torch_and_compiled(eager),
            Provider("ours", mine),
            Provider("Liger", liger, peer="Liger"),
            Provider("quack", quack, peer="quack"),
        ),
        wrt=("x", "branch", "weight"),
        seeds=("dy", "ds"),
        restore=("x", "branch", "dy", "ds"),
    )


# Activations


def _gelu(gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": _gelu}


def gated(name: str, n: int, dim: int) -> Case:
    """3 passes forward (gate, up, out), 5 backward."""
    activation = _ACTIVATIONS[name]

    def forward(function: Any) -> Forward:
        return lambda i: function(i["gate"], i["up"])

    return Case(
        name,
        f"N={n} F={dim}",
        8.0 * n * dim * BF16,
        "copy",
        _normal("gate", "up", "dy", shape=(n, dim), wrt=("gate", "up")),
        (
            *torch_and_compiled(forward(lambda gate, up: activation(gate) * up)),
            Provider("ours", lambda sets: forward(ours(name))),
            Provider("Liger", lambda sets: forward(_liger(name)), peer="Liger"),
        ),
        wrt=("gate", "up"),
        seeds=("dy",),
        restore=("gate", "up", "dy"),  # Liger's gradients take their places
    )


def relu2(n: int, dim: int) -> Case:
    """2 passes forward, 3 backward."""

    def forward(function: Any) -> Forward:
        return lambda i: function(i["x"])

    return Case(
        "relu2",
        f"N={n} F={dim}",
        5.0 * n * dim * BF16,
        "copy",
        _normal("x", "dy", shape=(n, dim), wrt=("x",)),
        (
            *torch_and_compiled(lambda i: F.relu(i["x"]).square()),
            Provider("ours", lambda sets: forward(ours("relu2"))),
            Provider("Liger", lambda sets: forward(_liger("relu_squared")), peer="Liger"),
        ),
        wrt=("x",),
        seeds=("dy",),
        restore=("x", "dy"),
    )


# Rotary embedding


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rope(
    documents: int, length: int, heads: int, key_heads: int, dim: int, normed: bool = False
) -> Case:
    """q and k in one go: 2 passes over both forward, 2 backward; with a norm before it (QK-norm)
    3 backward, because its input is read too."""
    n = documents * length

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        made: Inputs = {}
        for name, count in (("q", heads), ("k", key_heads), ("dq", heads), ("dk", key_heads)):
            shape = (n, count, dim)
            made |= _normal(name, shape=shape, wrt=("q", "k"))(device, generator)
        frequency = 1e6 ** (-torch.arange(0, dim, 2, device=device) / dim)
        angle = torch.arange(length, device=device)[:, None] * frequency
        positions = torch.arange(n, device=device) % length
        return made | {
            "cos": angle.cos(), "sin": angle.sin(), "positions": positions,
            # the tables as other libraries want them: a row a token, both halves
            "cos_rows": angle.cos()[positions], "sin_rows": angle.sin()[positions],
        }  # fmt: skip

    weights = ("q_weight", "k_weight") if normed else ()

    def norms(norm: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs], tuple[Tensor, ...]]:
        if not normed:
            return lambda i: (i["q"], i["k"])
        return lambda i: (norm(i["q"], i["q_weight"]), norm(i["k"], i["k_weight"]))

    def eager(i: Inputs) -> tuple[Tensor, ...]:
        c, s = (torch.cat((i[name],) * 2, -1)[:, None] for name in ("cos_rows", "sin_rows"))
        prepared = norms(plain_rms_norm)(i)
        return tuple((x * c + _rotate_half(x) * s).to(x.dtype) for x in prepared)

    def mine(sets: Sequence[Inputs]) -> Forward:
        function = ours("rope", *weights)
        options = {"eps": EPS} if normed and "eps" in inspect.signature(function).parameters else {}

        def forward(i: Inputs) -> Any:
            given = {name: i[name] for name in weights}
            return function(i["q"], i["k"], i["cos"], i["sin"], i["positions"], **given, **options)

        return forward

    def apart(sets: Sequence[Inputs]) -> Forward:
        function, norm = ours("rope"), ours("rms_norm")
        prepare = norms(lambda x, weight: norm(x, weight, EPS))
        return lambda i: function(*prepare(i), i["cos"], i["sin"], i["positions"])

    def liger(sets: Sequence[Inputs]) -> Forward:
        function, norm = _liger("rope"), _liger("rms_norm")
        prepare = norms(lambda x, weight: norm(x, weight, EPS))

        def forward(i: Inputs) -> tuple[Tensor, ...]:
            q, k = (x.unsqueeze(0).transpose(1, 2) for x in prepare(i))  # [1, heads, N, D]
            c, s = (torch.cat((i[name],) * 2, -1)[None] for name in ("cos_rows", "sin_rows"))
            return tuple(x.transpose(1, 2).squeeze(0) for x in function(q, k, c, s))

        return forward

    def quack(sets: Sequence[Inputs]) -> Forward:
        from quack.rotary import apply_rotary_emb

        norm = _quack_norm()
        prepare = norms(lambda x, weight: norm(x, weight, eps=EPS))

        def forward(i: Inputs) -> tuple[Tensor, ...]:
            rows = (x.unflatten(0, (documents, length)) for x in prepare(i))
            return tuple(apply_rotary_emb(x, i["cos"], i["sin"]).flatten(0, 1) for x in rows)

        return forward

    providers = [
        *torch_and_compiled(eager),
        Provider("ours", mine),
        Provider("Liger", liger, peer="Liger"),
        Provider("quack", quack, peer="quack"),
    ]
    if normed:
        providers.insert(3, Provider("ours, norms apart", apart))
    passes = 5 if normed else 4
    return Case(
        "rope_qk_norm" if normed else "rope",
        f"N={n} heads {heads}/{key_heads} D={dim}",
        float(passes * n * (heads + key_heads) * dim * BF16),
        "copy",
        _with_weights(inputs, dim, *weights),
        tuple(providers),
        wrt=("q", "k", *weights),
        seeds=("dq", "dk"),
        restore=("q", "k", "dq", "dk"),  # Liger's results take their places
    )
