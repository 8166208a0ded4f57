"""A family beside the library's forwards of it, and the weights that transforms stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from core import Forward, from_module
from params.tree import Tree, flatten, unflatten
from tests.foreign.families import Batch, Family
from tests.foreign.oracle import ROUNDED, Named, Oracle, Result, compare, compare_grads, loss_of
from transforms import (
    value_and_grad,
)

RANK, ALPHA = 2, 3.0
_STARRED = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


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
        rtol: float = ROUNDED,
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
        compare_grads(flatten(grads), self.wanted(params, want), noise.grads, rtol)

    def loss(self, forward: Any, finished: bool = False) -> Callable[[Tree, Batch], Tensor]:
        if finished:
            return forward
        return lambda p, b: loss_of(forward(p, b), b)

    def wanted(self, params: Tree, result: Result) -> Named:
        """Gradients of what learns: of adapters where there are any, by the chain rule."""
        flat, out = flatten(params), {}
        grads = result.grads | result.of_frozen
        for at, name in adapters(flat).items():
            a, b = flat[f"{at}lora_a"].double(), flat[f"{at}lora_b"].double()
            g = grads[name].double()
            g = g.mT if self.turned(name) else g
            out[f"{at}lora_a"] = ALPHA / RANK * b.mT @ g
            out[f"{at}lora_b"] = ALPHA / RANK * g @ a.mT
        return out or {n: g for n, g in result.grads.items() if n in flat}

    def turned(self, name: str) -> bool:
        forward, _ = self.forward()
        return any(s.transposed and s.weight == name for s in forward.sites)

    def named_as_left(self, forward: Forward, params: Tree, name: str) -> bool:
        """Whether the library says that it leaves a weight as it is."""
        holder = name.rpartition(".")[0]
        sited = {s.path for s in forward.sites}
        text = forward.explain(params) + "\n" + "\n".join(self.said)
        words = {word.strip("',:()[]") for word in text.split()}
        # layers that are alike are told once: blocks.*.attn
        asked = {each for n in (name, holder) for each in (n, _STARRED.sub("*", n))}
        return bool(asked & words) and holder not in sited


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
        turned = q.shape != old[name].shape or bench.turned(name)
        want = rounded(old[name], by_column=turned)
        codes = q.float() * new[f"{name}_scale"].float()
        codes = codes.mT if turned else codes
        compare(f"int8 {name}", codes, want.float(), 0.0, 2e-7)
        out[name] = want
    return out


def adapters(flat: Mapping[str, Tensor]) -> dict[str, str]:
    """Where each adapter is, without ``lora_a`` -> the weight that it goes with."""
    places = [path.removesuffix("lora_a") for path in flat if path.endswith("lora_a")]
    return {at: f"{at}weight" if not at or at.endswith(".") else at[:-1] for at in places}


def adapted(bench: Bench, params: Tree, weights: Mapping[str, Tensor] | None = None) -> Named:
    """Weights with adapters added in."""
    flat = flatten(params)
    own = flatten(bench.forward()[1]) | dict(weights or {})
    out = dict(weights or {})
    for at, name in adapters(flat).items():
        change = ALPHA / RANK * flat[f"{at}lora_b"].double() @ flat[f"{at}lora_a"].double()
        out[name] = own[name].double() + (change.mT if bench.turned(name) else change)
    return out


def shaken(params: Tree) -> Tree:
    """Adapters begin as nothing: here they do something."""

    def shake(path: str, leaf: Tensor) -> Tensor:
        if "lora" not in path:
            return leaf
        generator = torch.Generator().manual_seed(len(path))
        return leaf + 0.1 * torch.randn(leaf.shape, generator=generator).to(leaf)

    return unflatten({path: shake(path, leaf) for path, leaf in flatten(params).items()})
