"""One training step: the accumulated gradient of a few batches, and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from core import Batch
from params import flatten
from params.tree import Tree
from runners.training.optim import build_optimizer, clipping, learning_rate
from runners.training.settings import OptimSettings
from runners.training.states import TrainState
from runners.training.weights import split_params
from transforms import accumulate_grads, cast_matrices, trainable
from transforms.accumulate import GradFn, labelled_tokens, to_device


class Learner:
    """Everything that training changes: params (in place), the optimizer's moments, the step.

    The forward takes ``working``: the same leaves, but matrices of another dtype are copies in the
    compute dtype. The optimizer writes both, which saves a cast, and gradients arrive in the
    compute dtype.

    Args:
        params: what is trained and saved, and frozen leaves.
        config: of the optimizer.
        select: path patterns of the trained params; None: all.
        dtype: of the matrices that the forward takes.
        seed: of dropout and stochastic rounding.
    """

    def __init__(
        self,
        params: Tree,
        config: OptimSettings,
        select: Sequence[str] | None,
        dtype: torch.dtype = torch.float32,
        *,
        seed: int = 0,
    ) -> None:
        self.params, self.working = params, cast_matrices(params, dtype)
        # sorted: sums such as the gradient's norm must not depend on the order of params, which
        # differs between fresh ones and those from a file
        self.learning = dict(sorted(flatten(trainable(params, select)[0]).items()))
        working = flatten(self.working)
        copies = {p: working[p] for p, leaf in self.learning.items() if working[p] is not leaf}
        self.kept, _ = split_params(params)
        self.optimizer = build_optimizer(self.learning, copies, config, seed)
        self.config, self.seed = config, seed
        self.step = 0
        self.best: float | None = None
        self.tokens, self.seconds = 0, 0.0  # over all commands of the run

    def state(self, loader: dict[str, object]) -> TrainState:
        return TrainState(
            step=self.step,
            params=self.kept,
            moments=self.optimizer.state(),
            loader=loader,
            best=self.best,
            rng=rng_state(),
            tokens=self.tokens,
            seconds=self.seconds,
        )

    def not_finite(self) -> str | None:
        """The first leaf of params or moments that holds a NaN or an infinity."""
        for path, leaf in (flatten(self.params) | self.optimizer.state()).items():
            # aminmax allocates nothing, and returns NaN for both if there is one
            if not leaf.is_floating_point() or not leaf.numel():
                continue
            if not torch.stack(leaf.detach().aminmax()).isfinite().all():
                return path
        return None

    def restore(self, state: TrainState) -> None:
        """Continues from ``state``, whose params this learner already holds."""
        if state.step:
            self.optimizer.load(state.moments)
        self.step, self.best = state.step, state.best
        self.tokens, self.seconds = state.tokens, state.seconds
        set_rng_state(state.rng)

    def train_step(self, grad_fn: GradFn, batches: Sequence[Batch]) -> Tensor:
        """One step on CPU batches. Returns fp32 ``[2 + len(batches)]`` on the params' device: the
        loss, the gradient's norm before clipping, and the loss of each batch."""
        device = next(iter(self.learning.values())).device
        loss, losses, grads = accumulate_grads(
            grad_fn, self.working, self._prepared(batches), device
        )
        norm, factor = clipping([grads[path] for path in self.learning], self.config.grad_clip)
        lr = learning_rate(self.config, self.step)
        self.step += 1
        self.optimizer.step(grads, number=self.step, lr=lr, factor=factor)
        return torch.stack([loss, norm, *losses])

    def _prepared(self, batches: Sequence[Batch]) -> list[Batch]:
        """Adds dropout's seed, a function of the run's seed and the step."""
        first = self.step * len(batches) + (self.seed * 0x9E3779B1)
        seeds = [torch.tensor(first + i & 0x7FFFFFFF) for i in range(len(batches))]
        return [batch | {"seed": seed} for batch, seed in zip(batches, seeds, strict=True)]


@torch.no_grad()
def mean_loss(
    loss_fn: Callable[[Tree, Batch], Tensor], params: Tree, batches: Sequence[Batch]
) -> float | None:
    """The mean loss over all labelled tokens of CPU batches; None without any."""
    counts = labelled_tokens(batches).tolist()
    device = next(iter(flatten(params).values())).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch, count in zip(batches, counts, strict=True):
        total += loss_fn(params, to_device(batch, device)).double() * count
    return float(total) / sum(counts) if sum(counts) else None


def rng_state() -> dict[str, Tensor]:
    """The states of PyTorch's global generators, uint8. Training itself draws from neither."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_rng_state(state: dict[str, Tensor]) -> None:
    """The inverse of :func:`rng_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
