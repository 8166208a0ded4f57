"""Gated MLPs in foreign modules: found by probes, and split at the product of gate and up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from core.foreign.probes import (
    close,
    failed,
    is_plain,
    noise,
    put,
    same_slopes,
    skeleton,
    takes_one,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class Gated:
    """The linears of a gated MLP: ``down(act(gate) * up)``.

    into: the names of gate and up, or of one linear that computes both side by side.
    first: the gate is the first half of that.
    """

    into: tuple[str, ...]
    down: str
    first: bool = True
    activation: str | None = None

    def split(self, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Gate and up, from the outputs of ``into``."""
        a, b = outputs if len(outputs) == 2 else outputs[0].chunk(2, -1)
        return (a, b) if self.first else (b, a)

    def join(self, gate: Tensor, up: Tensor) -> list[Tensor]:
        """The inverse of :meth:`split`."""
        pair = [gate, up] if self.first else [up, gate]
        return pair if len(self.into) == 2 else [torch.cat(pair, -1)]


class Slot(nn.Module):
    """Replaces a linear layer: returns ``value``, or its input if there is none."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer
        self.register_buffer("value", None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # a forward may read .weight.dtype, ...
            return getattr(self.__dict__["layer"], name)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.value is None else self.value


def product(module: nn.Module, gated: Gated) -> Callable[[Tensor, Tensor], Tensor]:
    """``act(gate) * up`` exactly as the module computes it: the module without its linears.

    It changes ``module``: pass a copy.
    """
    for name in (*gated.into, gated.down):
        put(module, name, Slot(module.get_submodule(name)))

    def compute(gate: Tensor, up: Tensor) -> Tensor:
        values = zip(gated.into, gated.join(gate, up), strict=True)
        return functional_call(module, {f"{name}.value": v for name, v in values}, (gate,))

    return compute


def find_gated(module: nn.Module, at: str, traits: Mapping[str, Any]) -> Gated | None:
    """The linears of the module at this path if it is a gated MLP and nothing else, else None.

    Slots replace its linears, so that no weights are needed. The probe sets the outputs of gate and
    up: ``down`` must receive an elementwise ``act(gate) * up``, and its output be the module's.
    """
    holders = [n for n, m in module.named_modules() if any(True for _ in m.parameters(False))]
    if not 2 <= len(holders) <= 3 or type(module) is nn.Sequential:
        return None
    layouts = {name: traits.get(f"{at}.{name}" if at else name) for name in holders}
    if not set(layouts.values()) <= {"linear", "transposed"}:
        return None
    sizes = {}  # (inputs, outputs) of each
    for name in holders:
        weight: Any = module.get_submodule(name).weight
        sizes[name] = tuple(weight.shape)[:: 1 if layouts[name] == "transposed" else -1]
    candidates = [
        Gated(tuple(into), down, first)
        for *into, down in itertools.permutations(holders)
        if _fit([sizes[name] for name in into], sizes[down])
        for first in ((True, False) if len(into) == 1 else (True,))
    ]
    if not candidates:
        return None
    looks = "its linears have the sizes of a gated MLP's, but"
    if not takes_one(module):
        failed(f"{looks} its forward does not take exactly one argument")
        return None
    if not all(is_plain(m) for m in module.modules()):
        failed(f"{looks} it has hooks, which would see other calls")
        return None
    reasons = []
    for gated in candidates:
        found = _probe_gated(module, gated, sizes[gated.into[0]][0], sizes[gated.down])
        if isinstance(found, str):
            return replace(gated, activation=found or None)
        reasons.append(found)
    failed(f"{looks} {REASONS[max(reasons)]}")  # of the candidate that passed most checks
    return None


def _fit(into: list[tuple[int, int]], down: tuple[int, int]) -> bool:
    """Whether linears of these sizes can be gate and up (or both in one), and down."""
    width = down[0] * (1 if len(into) == 2 else 2)
    return len(set(into)) == 1 and into[0][1] == width


REASONS = (
    "its probe ended in an error",
    "it does not call each of the first ones once, with its own input",
    "its result is not that of the last one",
    "the input of the last one changes from call to call, as with dropout",
    "it does not compute act(gate) * up elementwise",
)


def _probe_gated(module: nn.Module, gated: Gated, dim: int, down: tuple[int, int]) -> str | int:
    """The activation's name ("" for an unknown one), or the index of the reason in REASONS."""
    body = skeleton(module).float()
    compute = product(body, gated)
    seen: dict[str, list[Tensor]] = {name: [] for name in (*gated.into, gated.down)}
    for name, calls in seen.items():
        body.get_submodule(name).register_forward_pre_hook(
            lambda _, args, calls=calls: calls.append(*args)
        )
    x, out = noise(1, 2, dim), noise(1, 2, down[1], seed=3)
    gate, up = noise(1, 2, down[0], seed=4) * 2, noise(1, 2, down[0], seed=5)
    values = dict(zip(gated.into, gated.join(gate, up), strict=True)) | {gated.down: out}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            got = functional_call(body, {f"{n}.value": v for n, v in values.items()}, (x,))
            inputs = [seen[name][:] for name in (*gated.into, gated.down)]
            h, act = compute(gate, up), compute(gate, torch.ones_like(up))
            shifted = compute(gate + (noise(down[0], seed=6) > 0), torch.ones_like(up))
        except Exception as error:  # foreign code may refuse these inputs: the reason is recorded
            failed("as a gated MLP, its probe ended in", error)
            return 0
    if not all(len(calls) == 1 for calls in inputs):
        return 1
    if not all(torch.equal(calls[0], x) for calls in inputs[:-1]):
        return 1
    if not (isinstance(got, Tensor) and torch.equal(got, out)):
        return 2
    if not torch.equal(inputs[-1][0], h):
        return 3
    same = (noise(down[0], seed=6) <= 0).expand_as(gate)
    if not close(h, act * up, 1e-5) or not close(shifted[same], act[same], 1e-5):
        return 4
    known = (
        n
        for n, f in ACTIVATIONS.items()
        if close(act, f(gate), 1e-5)
        and _is_so_at_any_size(module, gated, f, down[0])
        and same_slopes(compute, lambda a, b, f=f: f(a) * b, gate, up)
    )
    return next(known, "")


def _is_so_at_any_size(
    module: nn.Module, gated: Gated, act: Callable[[Tensor], Tensor], width: int
) -> bool:
    """Whether the module computes ``act(gate) * up`` at every size of numbers: a clamp of gate, up
    or their product shows at large ones, in one dtype or in all."""
    rows = 4 + 1024 // width
    share = torch.rand(2, 1, rows, width, generator=torch.Generator().manual_seed(7))
    signs = noise(2, 1, rows, width, seed=8).sign()
    for dtype, most in ((torch.float32, 38.5), (torch.float16, 4.8)):
        exponent = share[0] * (most + 4) - 4  # of gate, such that gate * up is finite
        gate = (signs[0] * 10**exponent).to(dtype)
        up = (signs[1] * 10 ** (share[1] * (most - exponent.clamp(min=0)))).to(dtype)
        compute = product(skeleton(module).to(dtype), gated)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                got = compute(gate, up)
            except Exception:  # foreign code may refuse the dtype: then it is no known activation
                return False
        tolerance = 8 * torch.finfo(dtype).eps
        want = act(gate) * up
        # near 0 relative to the numbers subtracted there, which are near 1
        if not torch.allclose(got, want, rtol=tolerance, atol=tolerance):
            return False
    return True
