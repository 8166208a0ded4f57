"""`bench foreign`: training steps of a Hugging Face model, by itself and through `from_module`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from core import Forward, VLMConfig, from_module
from params.tree import unflatten
from runners.benchmarks import peers
from runners.benchmarks.documents import batches_of, draw_documents
from runners.benchmarks.steps import Entry, Ready, StepBench, Steps, check_counts
from runners.benchmarks.training import RUNGS, plain_config
from runners.training.config import model_config
from runners.training.flops import training_flops
from runners.training.step import GradFn, Learner
from transforms import checkpoint, compile, cuda_graph, fuse_kernels, fuse_loss, value_and_grad

TABLE = replace(
    RUNGS,
    name="foreign",
    title="Training steps of a Hugging Face model",
    headers=("forward", *(h for h in RUNGS.headers[1:] if h != "x baseline")),
    legend=(
        "Weights and moments are bf16, rounded stochastically in our rows, to nearest in Liger's. "
        "tok/s: over the median time of a whole step (forward, backward, clipping, AdamW). MFU: 6 "
        "operations a weight and token and those of attention, recomputation not counted, over the "
        "data sheet's bf16 figure. peak: memory held at the worst moment from the second step on. "
        "first step: from building to its end. loss: of the first step."
    ),
    changes="What each row runs:",
)


@dataclass(frozen=True)
class Way:
    """A loss made of the foreign forward (None: the module's own), and whether its gradients are
    one CUDA graph."""

    label: str
    code: str  # as the page shows it
    loss: Callable[[Forward], Forward] | None = None
    graph: bool = False


def _kernels(forward: Forward) -> Forward:
    return fuse_loss(fuse_kernels(forward))


def _checkpointed(forward: Forward) -> Forward:
    return fuse_loss(checkpoint(fuse_kernels(forward)))


WAYS: dict[str, Way] = {
    "module": Way("the module by itself", "module(**batch).loss"),
    "loss": Way("fused loss", "fuse_loss(forward)", fuse_loss),
    "kernels": Way("+ fused kernels", "fuse_loss(fuse_kernels(forward))", _kernels),
    "graph": Way(
        "+ CUDA graph",
        "cuda_graph(value_and_grad(fuse_loss(fuse_kernels(forward))))",
        _kernels,
        graph=True,
    ),
    "blocks": Way(
        "fused, compiled by blocks",
        "compile(fuse_loss(fuse_kernels(forward)), blocks=True)",
        lambda forward: compile(_kernels(forward), blocks=True),
    ),
    "checkpoint": Way(
        "fused, checkpointing", "fuse_loss(checkpoint(fuse_kernels(forward)))", _checkpointed
    ),
    "checkpoint_graph": Way(
        "fused, checkpointing, CUDA graph",
        "cuda_graph(value_and_grad(fuse_loss(checkpoint(fuse_kernels(forward)))))",
        _checkpointed,
        graph=True,
    ),
}
LIGER = ("hf_liger", "hf_liger_checkpoint")


@dataclass(frozen=True)
class ForeignConfig(StepBench):
    """Measures training steps of Hugging Face's Qwen2 in a preset's shape, unpatched: the module by
    itself, through `from_module` with our transforms, and with Liger's kernels."""

    rows: int = 8
    """Rows of a step."""
    length: int = 2048
    """Tokens of a row."""
    warmup: int = 3
    loaded: float = 2.0
    rounds: int = 2

    def keys(self) -> Mapping[str, str]:
        known = {key: way.label for key, way in WAYS.items()}
        return known | {key: peers.PEERS[key].label for key in LIGER}

    def check(self) -> None:
        super().check()
        check_counts(self, "rows", "length")

    @property
    def model(self) -> VLMConfig:
        override = (*self.override, "vision=none")
        return model_config(plain_config(self.preset, override, self.length).model)

    def table(self) -> Steps:
        about = f"Qwen2ForCausalLM, {self.model.num_params():,} parameters, {self.rows} x"
        return replace(TABLE, about=f"{about} {self.length} tokens a step")

    def entries(self, device: torch.device) -> list[Entry]:
        documents, model = draw_documents(self.rows, self.length, 0.0), self.model
        tokens = batches_of(documents, model.text.vocab_size, self.rows, True)[0][0]["tokens"]
        rows = tokens.view(self.rows, self.length)
        flops = training_flops(model, documents.load, {"text"})
        wanted = self.only or tuple(self.keys())
        made = [
            Entry(
                key,
                way.label,
                "from_module" if way.loss else "itself",
                way.code,
                partial(training, way, model, as_batch(rows), device),
                documents.tokens,
                flops,
            )
            for key, way in WAYS.items()
            if key in wanted and not (way.graph and device.type == "cpu")
        ]
        return made + peers.entries([k for k in LIGER if k in wanted], model, rows, device, flops)


def as_batch(rows: Tensor) -> dict[str, Tensor]:
    """``[B, T]`` tokens as the module's arguments, labels shifted."""
    labels = torch.full_like(rows, -100)
    labels[:, :-1] = rows[:, 1:]
    return {"input_ids": rows, "labels": labels}


@contextmanager
def training(
    way: Way, model: VLMConfig, batch: Mapping[str, Tensor], device: torch.device
) -> Iterator[Ready]:
    """A step of the module by itself, or of a loss made of its forward."""
    built = peers.build_model(model, device, batch["input_ids"].shape[1]).to(torch.bfloat16)
    forward, params = from_module(built, call=_without_mask)
    grad_fn: GradFn = partial(_module_gradients, built)
    if way.loss is not None:
        grad_fn = value_and_grad(way.loss(forward))
        if way.graph:
            grad_fn = cuda_graph(grad_fn)
    config = plain_config("tiny", (), 1).changed(state_dtype="bf16")
    learner = Learner(params, config.optim, None, torch.bfloat16)
    own = {name: batch[name] for name in ("input_ids", "labels")}

    def gradients(params: Any, given: Mapping[str, Tensor]) -> Any:
        return grad_fn(params, {name: given[name] for name in own})

    yield Ready(lambda: learner.train_step(gradients, [own]))


def _without_mask(run: Callable[..., Any], batch: Mapping[str, Tensor]) -> Any:
    """Rows are full, so attention needs no mask but the causal one. transformers finds that out by
    reading positions off the GPU, which it cannot do while a CUDA graph is recorded: it then makes
    a mask, for which torch has a slower attention. An empty table of masks says so beforehand."""
    return run(
        input_ids=batch["input_ids"], attention_mask={"full_attention": None}, use_cache=False
    ).logits


def _module_gradients(built: Any, params: Any, batch: Mapping[str, Tensor]) -> Any:
    """The module's own loss; its parameters share memory with ``params``."""
    named = dict(built.named_parameters())
    loss = built(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
    grads = torch.autograd.grad(loss, list(named.values()))
    return loss.detach(), unflatten(dict(zip(named, grads, strict=True)))
