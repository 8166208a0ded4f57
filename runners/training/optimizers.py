"""Optimizers: AdamW in one kernel or in a loop, AdamW with 8-bit moments, Muon.

An optimizer updates params in place, and the bf16 copies that compute needs. A step takes gradients
by path, of any floating dtype, and their common factor from clipping, which stays on the device so
that the host does not wait.
"""

from __future__ import annotations

import importlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.optimizer.adamw import adamw_
from kernels.optimizer.muon import gather_momenta, move_
from kernels.runtime.proof import check_close, import_problem, proof_problem

Leaves = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rates:
    """A leaf's decoupled weight decay and the factor of its learning rate."""

    decay: float
    scale: float = 1.0


class Optimizer(Protocol):
    """The interface of an optimizer."""

    def step(self, grads: Leaves, *, number: int, lr: float, factor: Tensor | None) -> None:
        """Step ``number``, counted from 1; ``factor``: 0-dim fp32, multiplies the gradients."""

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name: ``{"exp_avg.text.embed.weight": tensor, ...}``."""

    def load(self, state: Leaves) -> None:
        """The inverse of :meth:`state`. Raises ValueError naming what is missing."""


class AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101) through ``kernels.adamw_``.

    Moments have their param's dtype. bf16 params and moments are rounded stochastically, by a hash
    of seed, step, leaf and index.
    """

    def __init__(
        self,
        params: Leaves,
        copies: Leaves,
        rates: Mapping[str, Rates],
        *,
        beta1: float,
        beta2: float,
        eps: float = 1e-8,
        seed: int = 0,
    ) -> None:
        self.params, self.copies, self.rates = params, copies, rates
        self.betas, self.eps, self.seed = (beta1, beta2), eps, seed
        self.moments = {
            name: {path: torch.zeros_like(leaf) for path, leaf in params.items()}
            for name in ("exp_avg", "exp_avg_sq")
        }
        self.groups: dict[float, list[str]] = {}  # the rate's factor -> paths
        for path in params:
            self.groups.setdefault(rates[path].scale, []).append(path)

    def step(self, grads: Leaves, *, number: int, lr: float, factor: Tensor | None) -> None:
        for scale, paths in self.groups.items():
            adamw_(
                [self.params[path] for path in paths],
                [grads[path] for path in paths],
                [self.moments["exp_avg"][path] for path in paths],
                [self.moments["exp_avg_sq"][path] for path in paths],
                step=number,
                lr=lr * scale,
                beta1=self.betas[0],
                beta2=self.betas[1],
                eps=self.eps,
                weight_decay=[self.rates[path].decay for path in paths],
                scale=factor,
                copies=[self.copies.get(path) for path in paths],
                seed=self.seed,
            )

    def state(self) -> dict[str, Tensor]:
        return named(self.moments)

    def load(self, state: Leaves) -> None:
        restore(self.moments, state)


class Muon:
    """Muon for matrices, another optimizer for the rest.

    A matrix's update is the semi-orthogonal matrix closest to its Nesterov momentum, from five
    Newton-Schulz steps (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). Its root
    mean square is 0.2 times the rate, as an AdamW step's (https://arxiv.org/abs/2502.16982, section
    2.2). Matrices of one shape are stacked, so that a step is a few batched products.
    """

    def __init__(
        self,
        matrices: Leaves,
        copies: Leaves,
        rates: Mapping[str, Rates],
        rest: Optimizer,
        *,
        momentum: float,
    ) -> None:
        self.matrices, self.copies, self.rates = matrices, copies, rates
        self.rest, self.momentum = rest, momentum
        self.moments = {"momentum": {path: torch.zeros_like(m) for path, m in matrices.items()}}
        self.stacks = stacks_of(matrices, copies)

    def step(self, grads: Leaves, *, number: int, lr: float, factor: Tensor | None) -> None:
        for paths in self.stacks:
            self._update(paths, grads, lr, factor)
        rest = {path: grad for path, grad in grads.items() if path not in self.matrices}
        if rest:
            self.rest.step(rest, number=number, lr=lr, factor=factor)

    def _update(
        self, paths: Sequence[str], grads: Leaves, lr: float, factor: Tensor | None
    ) -> None:
        """Updates the matrices of one stack."""
        stack = gather_momenta(
            [self.moments["momentum"][path] for path in paths],
            [grads[path] for path in paths],
            momentum=self.momentum,
            scale=factor,
        )
        matrices = [self.matrices[path] for path in paths]
        rates = [lr * self.rates[path].scale for path in paths]
        length = 0.2 * max(matrices[0].shape) ** 0.5
        move_(
            matrices,
            newton_schulz(stack),
            keeps=[1 - r * self.rates[p].decay for r, p in zip(rates, paths, strict=True)],
            lengths=[rate * length for rate in rates],
            copies=[self.copies[p] for p in paths] if paths[0] in self.copies else None,
        )

    def state(self) -> dict[str, Tensor]:
        return named(self.moments) | self.rest.state()

    def load(self, state: Leaves) -> None:
        restore(self.moments, state)
        self.rest.load(state)


STACK = 2**28  # elements: 0.5 GB in bf16, and three times that during Newton-Schulz


def stacks_of(matrices: Leaves, copies: Container[str] = ()) -> list[list[str]]:
    """Paths of matrices grouped by shape, and by whether they have copies; at most ``STACK``
    elements in a group."""
    alike: dict[tuple[torch.Size, bool], list[str]] = {}
    for path, matrix in matrices.items():
        alike.setdefault((matrix.shape, path in copies), []).append(path)
    stacks = []
    for (shape, _), paths in alike.items():
        length = max(1, STACK // shape.numel())
        stacks += [paths[i : i + length] for i in range(0, len(paths), length)]
    return stacks


def newton_schulz(g: Tensor, eps: float = 1e-7) -> Tensor:
    """Brings the singular values of ``g [n, A, B]`` to about 1 (0.7 to 1.2), with the same singular
    vectors.

    Five steps of the quintic iteration x -> a x + (b x x' + c (x x')^2) x, in g's dtype, with the
    source's coefficients. The polynomial is [s, s], with s the shorter side, and multiplies x from
    that side, so that x is never transposed. ``a`` must not move to the polynomial's diagonal:
    rounded to bf16 it mixes large singular values into small ones, and updates are off by 2%.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g / g.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(5):
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (x, polynomial) if tall else (polynomial, x)
        x = torch.baddbmm(x, left, right, beta=a)
    return x


class TorchAdamW:
    """AdamW by PyTorch's loop over the leaves: the baseline."""

    def __init__(
        self,
        params: Leaves,
        copies: Leaves,
        rates: Mapping[str, Rates],
        *,
        beta1: float,
        beta2: float,
    ) -> None:
        self.params, self.copies, self.rates = params, copies, rates
        groups = [
            {"params": [leaf], "weight_decay": rates[path].decay} for path, leaf in params.items()
        ]
        self.optimizer = self._build(groups, (beta1, beta2))

    def _build(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> Any:
        return torch.optim.AdamW(groups, betas=betas, foreach=False, fused=False)

    def step(self, grads: Leaves, *, number: int, lr: float, factor: Tensor | None) -> None:
        for group, (path, leaf) in zip(
            self.optimizer.param_groups, self.params.items(), strict=True
        ):
            group["lr"] = lr * self.rates[path].scale
            grad = grads[path].to(leaf.dtype)
            leaf.grad = grad if factor is None else grad * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for path, copy in self.copies.items():
            copy.copy_(self.params[path])

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{path}": value
            for path, leaf in self.params.items()
            for name, value in self.optimizer.state.get(leaf, {}).items()
            if isinstance(value, Tensor)
        }

    def load(self, state: Leaves) -> None:
        kept: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            kind, _, path = name.partition(".")
            kept.setdefault(path, {})[kind] = value
        for path, leaf in self.params.items():
            if path not in kept:
                raise ValueError(f"the optimizer state has nothing for {path}")
            self.optimizer.state[leaf] = {
                name: value if name == "step" else value.to(leaf.device)
                for name, value in kept[path].items()
            }


class AdamW8bit(TorchAdamW):
    """AdamW with blockwise 8-bit moments (https://arxiv.org/abs/2110.02861), by bitsandbytes, which
    keeps 32-bit moments for leaves of fewer than 4,096 elements."""

    def _build(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> Any:
        return _bitsandbytes()(groups, betas=betas)

    def load(self, state: Leaves) -> None:
        super().load(state)
        for path, leaf in self.params.items():
            kept = self.optimizer.state[leaf]
            kept["step"] = int(state[f"step.{path}"])

    def state(self) -> dict[str, Tensor]:
        steps = {
            f"step.{path}": torch.tensor(self.optimizer.state[leaf]["step"])
            for path, leaf in self.params.items()
            if leaf in self.optimizer.state
        }
        return super().state() | steps


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes").optim.AdamW8bit


def adamw8bit_problem(device: torch.device) -> str | None:
    """Why bitsandbytes cannot be used on a device, as a clause, or None. Tried once per process."""

    def prove() -> None:
        """Compares two steps with one block of 8-bit moments to fp64."""
        generator = torch.Generator().manual_seed(0)
        start, *grads = torch.randn(3, 64, 64, generator=generator, dtype=torch.float32)
        moved = [start.clone().to(device), start.double()]
        rates: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.99)}
        for leaf, kind in zip(moved, (_bitsandbytes(), torch.optim.AdamW), strict=True):
            optimizer = kind([leaf.requires_grad_()], **rates)
            for grad in grads:
                leaf.grad = grad.to(leaf)
                optimizer.step()
        mine, exact = (leaf.detach().cpu().double() - start.double() for leaf in moved)
        # 8-bit codes are up to 1/16 of their value apart
        check_close("what two steps change", mine, exact, 1 / 16)

    return import_problem("bitsandbytes", "install bitsandbytes") or proof_problem(
        ("bitsandbytes", "torch"), prove, ("adamw8bit", str(device)), str(device)
    )


def named(moments: Mapping[str, Leaves]) -> dict[str, Tensor]:
    """``{name: {path: tensor}}`` as ``{"name.path": tensor}``."""
    return {f"{n}.{path}": leaf for n, leaves in moments.items() for path, leaf in leaves.items()}


def restore(moments: Mapping[str, Leaves], state: Leaves) -> None:
    """Copies ``state`` into moments. Raises ValueError naming the first missing tensor."""
    for name, leaf in named(moments).items():
        if name not in state:
            raise ValueError(f"the optimizer state lacks {name}")
        leaf.copy_(state[name])
