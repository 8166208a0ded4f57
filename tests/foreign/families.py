"""Model families on tiny random configs, nothing downloaded: what the matrix runs over.

A family is a module in fp32, a batch for it and how to call it. Parameters are shaken, so that no
bias is 0 and no norm's weight 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Call = Callable[[Callable[..., Any], Any], Tensor]
VOCAB = 64


@dataclass(frozen=True)
class Family:
    """A kind of model.

    build: the attention's implementation (None: the model's own choice) -> the module, in fp32;
    inputs: a generator -> a batch; ``labels`` among it where a cross-entropy is the loss;
    head, call: as ``from_module`` takes them.
    implementations: other implementations of attention that it has.
    """

    name: str
    group: str
    build: Callable[[str | None], nn.Module]
    inputs: Callable[[torch.Generator], Batch]
    head: str | None = None
    call: Call | None = None
    other_attention: bool = False

    def fresh(
        self, dtype: torch.dtype = torch.float32, *, train: bool = False, attn: str | None = None
    ) -> nn.Module:
        """The same module each time, to the bit."""
        torch.manual_seed(0)
        module = self.build(attn)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in module.parameters():
                if p.is_floating_point():
                    p += 0.05 * torch.randn(p.shape, generator=generator)
        return module.to(dtype).train(train)

    def batch(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
        batch = self.inputs(torch.Generator().manual_seed(seed))
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}

    def run(self, module: nn.Module, batch: Batch) -> Tensor:
        """The bare module's output, by no code of the library's."""
        if self.call is not None:
            return self.call(module, batch)
        names = inspect.signature(module.forward).parameters
        kwargs: dict[str, Any] = {k: v for k, v in batch.items() if k in names and k != "labels"}
        caches = any(hasattr(getattr(m, "config", None), "use_cache") for m in module.modules())
        if "use_cache" in names or ("kwargs" in names and caches):
            kwargs["use_cache"] = False
        out = module(**kwargs)
        return out if isinstance(out, Tensor) else out.logits


REGISTRY: dict[str, Family] = {}


def register(family: Family) -> None:
    assert family.name not in REGISTRY, family.name
    REGISTRY[family.name] = family


# -- inputs ---------------------------------------------------------------------------------------


def tokens(generator: torch.Generator, length: int = 9) -> Batch:
    ids = torch.randint(5, VOCAB - 2, (2, length), generator=generator)
    labels = ids.roll(-1, 1).index_fill(1, torch.tensor([length - 1]), -100)
    return {"input_ids": ids, "labels": labels}


def masked_tokens(generator: torch.Generator, length: int = 9) -> Batch:
    """For encoders: some tokens are asked for."""
    batch = tokens(generator, length)
    return batch | {"labels": batch["input_ids"].masked_fill(torch.arange(length) % 3 != 0, -100)}


def ids_only(generator: torch.Generator) -> Batch:
    return {"input_ids": tokens(generator)["input_ids"]}


def two_sides(generator: torch.Generator) -> Batch:
    """For encoder-decoders."""
    batch = tokens(generator)
    return {
        "input_ids": batch["input_ids"].flip(1)[:, :7],
        "decoder_input_ids": batch["input_ids"],
        "labels": batch["labels"],
    }


def pictures(side: int = 16, *, classes: int | None = None) -> Callable[[torch.Generator], Batch]:
    def inputs(generator: torch.Generator) -> Batch:
        batch = {"pixel_values": torch.randn(2, 3, side, side, generator=generator)}
        if classes:
            batch["labels"] = torch.randint(classes, (2,), generator=generator)
        return batch

    return inputs


# -- Hugging Face ---------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def build(model: str, config: str, sizes: Mapping[str, Any]) -> Callable[[str | None], nn.Module]:
    """A model of transformers from its class's name and its config's; nested configs are dicts."""

    def make(attn: str | None) -> nn.Module:
        import transformers

        options = {} if attn is None else {"attn_implementation": attn}
        made = getattr(transformers, config)(**sizes)
        return getattr(transformers, model)._from_config(made, **options)

    return make


def hugging_face(
    name: str,
    group: str,
    model: str,
    config: str | None = None,
    *,
    inputs: Callable[[torch.Generator], Batch] = tokens,
    head: str | None = None,
    call: Call | None = None,
    eager: bool = True,
    sizes: Mapping[str, Any] = SIZES,
    **more: Any,
) -> None:
    """Registers a family of transformers; keys of ``sizes`` that are None in ``more`` are left out.

    config: its class, by default the model's first word; eager: it can be built with plain
    attention too.
    """
    config = config or _config_name(model)
    own = {k: v for k, v in {**sizes, **more}.items() if v != "absent"}
    register(Family(name, group, build(model, config, own), inputs, head, call, eager))


def _config_name(model: str) -> str:
    for end in (
        "ForCausalLM",
        "LMHeadModel",
        "ForMaskedLM",
        "ForConditionalGeneration",
        "Model",
        "ForImageClassification",
        "ForSequenceClassification",
        "MTModel",
    ):
        if model.endswith(end):
            return f"{model.removesuffix(end)}Config"
    raise ValueError(f"{model}: say which config it takes")
