"""Accumulation, validation, the values that are read late, and what a step leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from core import Batch
from core.batch import IGNORE
from params import flatten, init_params
from params.tree import Tree
from runners.data.packing.collate import collate
from runners.shell.errors import UserError
from runners.training.compose import choose_backends, compose, is_compiled, is_graphed
from runners.training.config import TrainConfig, model_config
from runners.training.loop import DelayedReader, Step, Throughput
from runners.training.setup import Job, prepare, sample_documents
from runners.training.step import Learner, mean_loss
from tests.rounding import FP32
from transforms import accumulate_grads, value_and_grad

Micro = Callable[..., TrainConfig]
CPU = torch.device("cpu")


@pytest.fixture
def job(micro: Micro) -> Job:
    return prepare(micro())


def _rows(job: Job) -> tuple[Batch, list[Batch]]:
    """A batch of two rows, and its rows as batches, with 4 to 1 labelled tokens."""
    one, *rest = islice(sample_documents(job.data.sources.train, job.data.encoder, 8), 5)
    single = replace(job.data.spec, rows=1)
    rows = [[one], rest[:2]]
    return collate(rows, job.data.spec), [collate([row], single) for row in rows]


def assert_same(a: torch.Tensor, b: torch.Tensor, path: str) -> None:
    """The absolute part is for what cancels to 0, as the gradient of a key's bias does."""
    assert float((a - b).norm()) <= FP32 * float(b.norm()) + 1e-8, path


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_named(micro: Micro, bad: float, dtype: torch.dtype) -> None:
    learner = Learner(init_params(model_config(micro().model), dtype=dtype), micro().optim, None)
    assert learner.not_finite() is None
    learner.params["text"]["norm"]["weight"][5] = bad
    assert learner.not_finite() == "text.norm.weight"


def test_accumulated_batches_weigh_as_many_as_their_labelled_tokens(job: Job) -> None:
    both, apart = _rows(job)
    counts = [int((batch["labels"] != IGNORE).sum()) for batch in apart]
    assert counts[0] != counts[1]
    grad_fn = value_and_grad(job.composed.loss_fn)
    loss, _, grads = accumulate_grads(grad_fn, job.params, [both])
    total, losses, summed = accumulate_grads(grad_fn, job.params, apart)
    torch.testing.assert_close(total, loss, rtol=FP32, atol=0)
    for path, grad in grads.items():
        assert_same(summed[path], grad, path)
    plain_mean = torch.stack(losses).mean()
    assert abs(plain_mean - loss) > 100 * abs(total - loss)  # what a wrong weighting would give


def test_a_batch_without_labels_adds_nothing(job: Job) -> None:
    _, (batch, other) = _rows(job)
    empty = other | {"labels": torch.full_like(other["labels"], IGNORE)}
    grad_fn = value_and_grad(job.composed.loss_fn)
    loss, _, grads = accumulate_grads(grad_fn, job.params, [batch])
    again, losses, summed = accumulate_grads(grad_fn, job.params, [empty, batch])
    assert again == loss
    assert losses[0] == 0
    assert all(torch.equal(summed[path], grad) for path, grad in grads.items())
    nothing, _, zeros = accumulate_grads(grad_fn, job.params, [empty, empty])
    assert nothing == 0
    assert not any(grad.any() for grad in zeros.values())


def test_validation_is_the_mean_over_tokens(job: Job) -> None:
    both, apart = _rows(job)
    loss = mean_loss(job.composed.eval_loss, job.params, apart)
    assert loss == pytest.approx(float(job.composed.eval_loss(job.params, both)), rel=1e-6)
    assert mean_loss(job.composed.eval_loss, job.params, []) is None


def test_a_step_changes_what_learns_in_place_and_nothing_else(job: Job) -> None:
    before = {path: leaf.clone() for path, leaf in flatten(job.params).items()}
    learner = Learner(job.params, job.config.optim, ("projector",))
    grad_fn = value_and_grad(job.composed.loss_fn, ("projector",))
    values = learner.train_step(grad_fn, _rows(job)[1])
    assert values.shape == (4,)
    assert learner.step == 1
    for path, leaf in flatten(learner.params).items():
        assert torch.equal(leaf, before[path]) != path.startswith("projector"), path


def test_dropout_follows_the_seed_and_the_step(micro: Micro) -> None:
    config = micro(override=(*micro().model.override, "text.dropout=0.3"))
    job = prepare(config)
    batch = _rows(job)[0]

    def loss_at(step: int, seed: int) -> float:
        learner = Learner(init_params(job.model), micro().optim, None, seed=seed)
        learner.step = step
        return float(learner.train_step(value_and_grad(job.composed.loss_fn), [batch])[0])

    assert loss_at(3, 0) == loss_at(3, 0)
    assert len({loss_at(3, 0), loss_at(4, 0), loss_at(3, 1)}) == 3


@pytest.mark.parametrize(
    "flags",
    [
        {"use_gradient_checkpointing": True},
        *(
            {"use_gradient_checkpointing": True, "checkpoint_policy": policy}
            for policy in ("dots", "attention", "dots+attention", "offload")
        ),
        {"use_fused_loss": False},
    ],
    ids=str,
)
def test_optimisations_change_no_number(micro: Micro, job: Job, flags: dict[str, Any]) -> None:
    batch = _rows(job)[0]
    plain = compose(micro(), job.model, CPU)
    other = compose(micro(**flags), job.model, CPU)
    loss, grads = value_and_grad(plain.loss_fn)(job.params, batch)
    again, same = value_and_grad(other.loss_fn)(job.params, batch)
    torch.testing.assert_close(again, loss, rtol=FP32, atol=0)
    for path, grad in flatten(grads).items():
        assert_same(flatten(same)[path], grad, path)


def test_flags_turn_kernels_off_and_the_report_says_so(micro: Micro) -> None:
    model = model_config(micro().model)
    on, off = (
        compose(
            micro(use_fused_kernels=f, use_fused_loss=f, use_gradient_checkpointing=f), model, CPU
        )
        for f in (True, False)
    )
    assert dict(on.backends) == {}
    assert set(off.backends.values()) == {"torch"}
    assert any(line.startswith("Using fused cross-entropy") for line in on.report)
    assert any(line.startswith("Using gradient checkpointing") for line in on.report)
    assert "Fused loss off" in off.report
    assert "Fused kernels off" in off.report
    assert any(line.startswith("Gradient checkpointing off") for line in off.report)
    assert any("fp32 compute" in line for line in off.report)
    cuda = torch.device("cuda")
    assert choose_backends(micro(use_flash_attn=False).speed, cuda) == {"attention": "plain"}
    assert choose_backends(micro(use_flash_attn=False).speed, CPU) == {}


def test_offload_needs_eager_mode(micro: Micro) -> None:
    config = micro(use_gradient_checkpointing=True, checkpoint_policy="offload", compile=True)
    with pytest.raises(UserError, match="needs --compile=0"):
        compose(config, model_config(config.model), CPU)


def test_who_records_and_who_compiles(micro: Micro) -> None:
    gpu = torch.device("cuda")
    offload = {"use_gradient_checkpointing": True, "checkpoint_policy": "offload"}
    for flags, device, graphed, compiled in (
        ({}, gpu, True, False),
        ({}, CPU, False, False),
        ({"cuda_graph": False}, gpu, False, True),
        ({"compile": True}, gpu, True, True),
        ({"use_fp8": True}, gpu, True, True),
        ({"use_gradient_checkpointing": True}, gpu, True, True),
        ({"compile": False, **offload}, gpu, False, False),
    ):
        config = micro(**{"compile": None, **flags})
        assert (is_graphed(config.speed, device), is_compiled(config.speed, device)) == (
            graphed,
            compiled,
        )
    for flags, device in (({}, CPU), (offload, gpu)):
        with pytest.raises(UserError, match="--cuda_graph: "):
            is_graphed(micro(cuda_graph=True, **flags).speed, device)


def test_gradients_may_lie_where_the_last_ones_lay(job: Job) -> None:
    """As those of a CUDA graph do."""
    _, apart = _rows(job)
    grad_fn = value_and_grad(job.composed.loss_fn)
    kept = grad_fn(job.params, apart[0])

    def overwriting(params: Tree, batch: Batch) -> tuple[torch.Tensor, Tree]:
        for old, new in zip(tree_leaves(kept), tree_leaves(grad_fn(params, batch)), strict=True):
            old.copy_(new)
        return kept

    loss, losses, grads = accumulate_grads(grad_fn, job.params, apart)
    again, each, same = accumulate_grads(overwriting, job.params, apart)
    assert losses[0] != losses[1]
    assert torch.equal(torch.stack(each), torch.stack(losses))
    assert torch.equal(again, loss)
    assert all(torch.equal(same[path], grad) for path, grad in grads.items())


def test_values_come_in_order_and_none_is_lost() -> None:
    late = DelayedReader(CPU)
    seen = []
    for number in range(1, 4):
        step = Step(number, 0.1, 10, 1.0)
        seen += [(s.number, v) for s, v, _ in late.push(step, torch.tensor([float(number)]))]
    seen += [(s.number, v) for s, v, _ in late.flush()]
    assert seen == [(1, [1.0]), (2, [2.0]), (3, [3.0])]


@pytest.fixture
def gpu_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """In place of a GPU: ``[when the work given so far ends]``, as its events see it."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.end = clock[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Any) -> float:
            return 1e3 * (other.end - self.end)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **how: plain(*size, **how))
    return clock


def test_steps_take_what_the_device_took_whenever_they_are_read(gpu_clock: list[float]) -> None:
    late = DelayedReader(torch.device("cuda"))
    took: list[tuple[int, float]] = []
    for number, seconds in enumerate((0.5, 0.25, 0.5), 1):
        gpu_clock[0] += seconds
        step = Step(number, 0.1, 10, 1.0)
        took += [(s.number, t) for s, _, t in late.push(step, torch.zeros(1))]
    assert [number for number, _ in took] == [1, 2]  # one behind
    took += [(s.number, t) for s, _, t in late.flush()]  # read at once after the one before
    assert took == [(1, 0.5), (2, 0.25), (3, 0.5)]
    with late.paused():
        gpu_clock[0] += 100.0
    gpu_clock[0] += 0.5
    assert not list(late.push(Step(4, 0.1, 10, 1.0), torch.zeros(1)))
    assert [t for _, _, t in late.flush()] == [0.5]


def test_the_pace_is_that_of_the_steps_made() -> None:
    pace = Throughput()
    for number in (1, 2):
        pace.add(Step(number, 0.1, 1000, 7.0, waited=0.1), seconds=0.5)
    assert (pace.steps, pace.tokens, pace.flops, pace.seconds) == (2, 2000, 14.0, 1.0)
    assert pace.waited == pytest.approx(0.2)


def test_a_cpu_step_leaves_out_interruptions(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    late = DelayedReader(CPU)
    now[0] = 110.0
    with late.paused():
        now[0] = 115.0
    now[0] = 117.0
    ((_, _, seconds),) = late.push(Step(1, 0.1, 10, 1.0), torch.zeros(1))
    assert seconds == 2.0
