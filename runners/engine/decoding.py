"""Decoding token by token: a KV cache as a rule on attention, and sampling."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from core import Batch, Forward, Logits, Rule, VLMConfig
from params.tree import Tree


class KVCache:
    """The keys and values of one document, for each layer of the decoder.

    Buffers of ``capacity`` positions, of which ``length`` are filled. The forward of
    :func:`with_cache` fills them and is not pure: a cache serves one document, once.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._kept: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds new ``[n, Hk, Dh]`` keys and values; returns all, ``[length + n, Hk, Dh]``."""
        buffers = self._kept[layer]
        if buffers is None:
            full = (self.capacity, *k.shape[1:])
            buffers = self._kept[layer] = (k.new_empty(full), v.new_empty(full))
        end = self.length + len(k)
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, not {end}")
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer[self.length : end] = new
        return buffers[0][:end], buffers[1][:end]


def with_cache(forward: Forward, config: VLMConfig, cache: KVCache) -> Forward:
    """The forward over the newest tokens of a document, with its earlier tokens in the cache.

    The first call takes the whole prompt, with its pictures; each further call takes the next
    tokens, with their ``positions``. Returns the logits of the last token, ``[1, V]``. Raises
    ValueError for a forward that ends in a loss.
    """
    if forward.finish is not None:
        raise ValueError(
            "with_cache gives logits, and this forward ends in a loss "
            f"({', '.join(forward.applied)}): apply it to the forward without"
        )

    def wrap(f: Callable[..., Tensor], path: str) -> Callable[..., Tensor]:
        layer = int(path.split(".")[2])  # text.blocks.3.attn

        def attend(p: Tree, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
            keys, values = cache.append(layer, k, v)
            if cache.length == 0:
                return f(p, q, k, v, cu_seqlens)
            return attend_last(q, keys, values, config.text.window_of(layer))

        return attend

    def last(logits: Logits, batch: Batch) -> Tensor:
        cache.length += batch["tokens"].shape[0]
        return logits.at(torch.tensor([-1], device=logits.hidden.device)).dense()

    return replace(forward.with_rule(Rule("attention", wrap, ("text",), "KV cache")), finish=last)


def attend_last(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention of a document's newest tokens: q ``[n, H, Dh]`` over k, v ``[t, Hk, Dh]``,
    whose last n belong to q. window: how many keys a token sees, its own included."""
    n, t = len(q), len(k)
    gap = torch.arange(t - n, t, device=q.device)[:, None] - torch.arange(t, device=q.device)
    seen = (gap >= 0) if window is None else (gap >= 0) & (gap < window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, n, Dh]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return o[0].transpose(0, 1)


@dataclass(frozen=True)
class Sampler:
    """Chooses the next token from its logits.

    temperature 0: the most likely token. top_k: sample from the k most likely (0: all). top_p:
    sample from the fewest tokens with this much probability (https://arxiv.org/abs/1904.09751).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def start(self) -> Callable[[Tensor], int]:
        """``choose(logits [V]) -> token``, with a generator of its own."""
        if self.temperature == 0:
            return lambda logits: int(logits.argmax())
        generator = torch.Generator().manual_seed(self.seed)
        return partial(self._draw, generator)

    def _draw(self, generator: torch.Generator, logits: Tensor) -> int:
        scores, ids = (logits.float().cpu() / self.temperature).sort(descending=True)
        if self.top_k:
            scores, ids = scores[: self.top_k], ids[: self.top_k]
        probabilities = scores.softmax(0)
        before = probabilities.cumsum(0) - probabilities
        # the first token always remains
        probabilities = torch.where(before < self.top_p, probabilities, 0.0)
        return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def decode(
    forward: Forward,
    config: VLMConfig,
    params: Tree,
    prompt: Batch,
    *,
    max_tokens: int,
    stop: Collection[int] = (),
    sampler: Sampler | None = None,
) -> Iterator[int]:
    """The tokens that follow a prompt, a batch of one document without padding.

    Ends before a token of ``stop``, or after ``max_tokens``.
    """
    length = prompt["tokens"].shape[0]
    cache = KVCache(config.text.layers, length + max_tokens)
    run, choose = with_cache(forward, config, cache), (sampler or Sampler()).start()
    batch = prompt
    for position in range(length, length + max_tokens):
        token = choose(run(params, batch)[0])
        if token in stop:
            return
        yield token
        batch = _next(token, position, prompt["tokens"].device)


def _next(token: int, position: int, device: torch.device) -> Batch:
    return {
        "tokens": torch.tensor([token], device=device),
        "positions": torch.tensor([position], device=device),
        "cu_seqlens": torch.tensor([0, 1], dtype=torch.int32, device=device),
    }
