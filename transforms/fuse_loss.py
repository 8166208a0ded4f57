"""Cross-entropy as the end of a forward: fused with the output head, or from dense logits."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch import Tensor

import kernels
from core.forward import Forward
from core.model.layers import Logits
from transforms.legal import check_legal


def fuse_loss(
    forward: Forward,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    accumulate: Literal["fp32", "bf16"] = "fp32",
) -> Forward:
    """``(params, batch) -> fp32 scalar``: cross-entropy computed together with the output head.

    Equals ``F.cross_entropy(logits.float(), batch["labels"])``, the mean over labelled tokens (0
    with zero gradients if no token is labelled), without logits ``[N, V]`` in memory.

    Args:
        forward: with an output head.
        z_loss: adds ``z_loss * logsumexp(logits) ** 2`` per token (PaLM,
            https://arxiv.org/abs/2204.02311, section 5).
        label_smoothing: as in ``F.cross_entropy``.
        accumulate: dtype in which the unembedding's gradient is summed over chunks of the batch.
            "bf16", for bf16 weights only, rounds once per chunk and saves ``V * D * 4`` bytes.

    Raises ValueError if the forward has no head site, or ends in a loss already.
    """
    finish = partial(_fused, z_loss=z_loss, smoothing=label_smoothing, accumulate=accumulate)
    return _with_loss(forward, "fuse_loss", finish)


def unfused_loss(forward: Forward, *, z_loss: float = 0.0, label_smoothing: float = 0.0) -> Forward:
    """The loss of :func:`fuse_loss` from dense logits ``[N, V]``.

    It serves as a reference, and for modules whose operations on logits cannot be fused.
    """
    finish = partial(_unfused, z_loss=z_loss, smoothing=label_smoothing)
    return _with_loss(forward, "unfused_loss", finish, dense=True)


def token_logprobs(forward: Forward) -> Forward:
    """``(params, batch) -> [N] fp32``: each label's log-probability, 0 where it is -100.

    Equals ``log_softmax(logits)`` at ``batch["labels"]``, with the memory of :func:`fuse_loss`.
    It is differentiable, so that losses of one's own are sums over it: preference losses compare
    the sums of two answers, policy gradients weight tokens.

    >>> import torch
    >>> from core import make_batch, preset, vlm
    >>> from params import init_params
    >>> config = preset("tiny")
    >>> params, batch = init_params(config, seed=0), make_batch(torch.tensor([[1, 2, 3]]))
    >>> logprobs, mean_loss = token_logprobs(vlm(config)), fuse_loss(vlm(config))
    >>> found = -logprobs(params, batch).sum() / 2  # of the three tokens two have labels
    >>> bool((found - mean_loss(params, batch)).abs() < 1e-5)
    True

    Raises ValueError if the forward has no head site, or ends in a loss already.
    """
    return _with_loss(forward, "token_logprobs", _logprobs)


def _with_loss(forward: Forward, name: str, finish: Any, *, dense: bool = False) -> Forward:
    check_legal(forward, name)
    if not forward.select(("head",)):
        have = ", ".join(sorted({f"{s.kind} {s.path}" for s in forward.sites})[:20])
        raise ValueError(
            f"{name} needs the output head, and this forward has no head site (from_module takes "
            f"head='path.of.the.linear'); it has: {have}"
        )
    return forward.with_step(name, finish=finish, dense=dense)


def _logits(out: Any) -> Logits:
    if not isinstance(out, Logits):
        raise TypeError(
            f"the forward returned {type(out).__name__}, not lazy Logits: the model changes its "
            "logits after the head, so a loss cannot be fused with it: use unfused_loss"
        )
    return out


def _fused(
    out: Any, batch: Any, *, z_loss: float, smoothing: float, accumulate: Literal["fp32", "bf16"]
) -> Tensor:
    logits = _logits(out)
    return kernels.linear_cross_entropy(
        logits.hidden.flatten(0, -2),
        logits.weight(),
        batch["labels"].flatten(),
        bias=logits.bias(),
        scale=logits.scale,
        softcap=logits.softcap,
        z_loss=z_loss,
        label_smoothing=smoothing,
        accumulate=accumulate,
    )


def _logprobs(out: Any, batch: Any) -> Tensor:
    logits = _logits(out)
    return kernels.token_logprobs(
        logits.hidden.flatten(0, -2),
        logits.weight(),
        batch["labels"].flatten(),
        bias=logits.bias(),
        scale=logits.scale,
        softcap=logits.softcap,
    )


def _unfused(out: Any, batch: Any, *, z_loss: float, smoothing: float) -> Tensor:
    dense = out.flatten(0, -2)
    labels = batch["labels"].flatten()
    return kernels.cross_entropy(dense, labels, z_loss=z_loss, label_smoothing=smoothing)
