"""One token after the other: a plain KV cache as a rule on attention, and how tokens are chosen."""

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
    """Keys and values of one document so far, for every layer of the decoder.

    Written by index into buffers of ``capacity`` positions; ``length`` of them are filled. The
    forward that fills it is made by :func:`with_cache` and is not pure: one cache serves one
    document, once.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._kept: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds ``[n, Hk, Dh]`` of the newest tokens; gives all so far, ``[length + n, Hk, Dh]``."""
        buffers = self._kept[layer]
        if buffers is None:
            buffers = (
                k.new_empty(self.capacity, *k.shape[1:]),
                v.new_empty(self.capacity, *v.shape[1:]),
            )
            self._kept[layer] = buffers
        end = self.length + len(k)
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, not {end}")
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer[self.length : end] = new
        return buffers[0][:end], buffers[1][:end]


def with_cache(forward: Forward, config: VLMConfig, cache: KVCache) -> Forward:
    """The same forward, over the newest tokens of a document whose others are in the cache.

    The first call takes the whole prompt, with its pictures; each further one takes the tokens
    that followed, with their own ``positions``. Returns the logits of the last token, ``[1, V]``.
    Raises ValueError for a forward that ends in a loss.
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
    of which q's own are the last. window: keys seen, the token's own included."""
    n, t = len(q), len(k)
    gap = torch.arange(t - n, t, device=q.device)[:, None] - torch.arange(t, device=q.device)
    seen = (gap >= 0) if window is None else (gap >= 0) & (gap < window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, n, Dh]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return o[0].transpose(0, 1)


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen from its logits.

    temperature 0: the likeliest. top_k: among the k likeliest (0: all). top_p: among the fewest
    that hold this much probability (nucleus sampling, https://arxiv.org/abs/1904.09751).
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
        probabilities = torch.where(
            before < self.top_p, probabilities, 0.0
        )  # never drops the first
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
