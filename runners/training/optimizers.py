"""What changes params: AdamW in one kernel or in a loop, AdamW with moments of 8 bits, Muon.

An optimizer holds the params it changes in place (by path), and bf16 copies of them, where compute
needs copies: it keeps those equal to the params. Each step takes gradients by path, of any floating
dtype, and a factor for all of them on the device (the clipping), so that nothing waits for it.
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
    """What differs from leaf to leaf: the decoupled weight decay, and the factor of the rate."""

    decay: float
    scale: float = 1.0


class Optimizer(Protocol):
    """What a training loop asks of one."""

    def step(self, grads: Leaves, *, number: int, lr: float, factor: Tensor | None) -> None:
        """Step ``number``, counted from 1; ``factor``: 0-dim fp32, multiplies the gradients."""

    def state(self) -> dict[str, Tensor]:
        """All that it remembers, by name: ``{"exp_avg.text.embed.weight": tensor, ...}``."""

    def load(self, state: Leaves) -> None:
        """The inverse of :meth:`state`. Raises ValueError naming what is missing."""


class AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101) through ``kernels.adamw_``.

    The moments are of their param's dtype. Params and moments of bf16 are rounded stochastically,
    by a hash of seed, step, leaf and place.
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

    A matrix moves along the nearest semi-orthogonal matrix to its momentum (Nesterov's), found by
    five Newton-Schulz steps (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). The
    step's length is that of an AdamW step: its root mean square is 0.2 times the rate
    (https://arxiv.org/abs/2502.16982, section 2.2). Matrices of one shape are stacked, so that
    a step is a few batched products.
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
            self._turn(paths, grads, lr, factor)
        rest = {path: grad for path, grad in grads.items() if path not in self.matrices}
        if rest:
            self.rest.step(rest, number=number, lr=lr, factor=factor)

    def _turn(self, paths: Sequence[str], grads: Leaves, lr: float, factor: Tensor | None) -> None:
        """Moves matrices of one stack.

        The floor for a decoder of 1.31e9 entries in matrices (28 layers of 1,536, MLP of 8,960) on
        an H200: 44.5 TFLOP at 670 TFLOP/s, 66 ms, and 24 bytes an entry at 4,300 GB/s, 7.3 ms.
        """
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


STACK = 2**28  # entries: 0.5 GB in bf16, and three times that while it is turned


def stacks_of(matrices: Leaves, copies: Container[str] = ()) -> list[list[str]]:
    """Paths of matrices of one shape together, with copies or without, as many as ``STACK``
    admits."""
    alike: dict[tuple[torch.Size, bool], list[str]] = {}
    for path, matrix in matrices.items():
        alike.setdefault((matrix.shape, path in copies), []).append(path)
    stacks = []
    for (shape, _), paths in alike.items():
        length = max(1, STACK // shape.numel())
        stacks += [paths[i : i + length] for i in range(0, len(paths), length)]
    return stacks


def newton_schulz(g: Tensor, eps: float = 1e-7) -> Tensor:
    """Singular values of ``g [n, A, B]`` to about 1 (0.7 to 1.2), singular vectors as they are.

    Five steps of the quintic iteration x -> a x + (b x x' + c (x x')^2) x, in g's dtype; the
    coefficients are the source's, for the steepest start at 0. With s the short side and l the long
    one a step takes s^2 (4 l + 2 s) FLOPs a matrix: the polynomial is [s, s], multiplied from the
    side that is short, so that no transposed copy of x is ever made. baddbmm copies x before it
    adds to it, 4 bytes an entry; with ``a`` on the polynomial's diagonal it would not, but rounded
    to bf16 that leaks large singular values into small ones, which grow: updates are off by 2%.
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
    """AdamW by PyTorch's loop over the leaves, one operation after the other: the baseline."""

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
    """AdamW with moments of 8 bits, in blocks (https://arxiv.org/abs/2110.02861), by bitsandbytes.

    Leaves of fewer than 4,096 entries keep moments of 32 bits, as that library has it.
    """

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
    """Why bitsandbytes cannot be used on a device, as a clause, or None. Tried once a process."""

    def prove() -> None:
        """Two steps of one block of 8-bit moments, against fp64."""
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
        # codes of 8 bits lie up to 1/16 of their value apart
        check_close("what two steps change", mine, exact, 1 / 16)

    return import_problem("bitsandbytes", "install bitsandbytes") or proof_problem(
        ("bitsandbytes", "torch"), prove, ("adamw8bit", str(device)), str(device)
    )


def named(moments: Mapping[str, Leaves]) -> dict[str, Tensor]:
    """``{name: {path: tensor}}`` as ``{"name.path": tensor}``."""
    return {f"{n}.{path}": leaf for n, leaves in moments.items() for path, leaf in leaves.items()}


def restore(moments: Mapping[str, Leaves], state: Leaves) -> None:
    """Takes over what :func:`named` gave. Raises ValueError naming the first that is missing."""
    for name, leaf in named(moments).items():
        if name not in state:
            raise ValueError(f"the optimizer state lacks {name}")
        leaf.copy_(state[name])
