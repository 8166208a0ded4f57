"""Rotary position embeddings in foreign code, found by what a function computes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from core.foreign.probes import noise
from core.foreign.reroute import StandIn


def rotary_to(to: Callable[..., Any]) -> StandIn:
    """Replaces functions that apply rotary embeddings by ``to``."""
    return lambda value: to if is_rotary(value) else None


def is_rotary(value: Any) -> bool:
    """Whether ``value(q, k, cos, sin)`` rotates heads by halves (RoFormer, arXiv 2104.09864).

    q ``[B, H, T, Dh]``, k ``[B, Hk, T, Dh]``, cos and sin ``[B, T, Dh]``: the result must be
    ``x * cos + cat(-x[Dh/2:], x[:Dh/2]) * sin`` of both, on ordinary and on large numbers. Further
    arguments must have defaults.
    """
    named = isinstance(value, FunctionType) and not (value.__module__ or "").startswith("torch.")
    return named and _turns(value)


@functools.cache
def _turns(function: FunctionType) -> bool:
    try:
        given = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False
    required = [p for p in given if p.default is p.empty]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(required) != 4 or any(p.kind not in positional for p in given[:4]):
        return False
    if required != given[:4]:
        return False
    cos, sin = noise(2, 5, 8, seed=1).double(), noise(2, 5, 8, seed=2).double()
    for size in (1.0, 1e4):
        q, k = size * noise(2, 3, 5, 8).double(), size * noise(2, 1, 5, 8, seed=3).double()
        try:
            out = function(q, k, cos, sin)
        except Exception:  # foreign code may refuse these inputs: then it is another function
            return False
        if not isinstance(out, tuple) or len(out) != 2:
            return False
        for got, x in zip(out, (q, k), strict=True):
            want = turned(x, cos, sin)
            if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
                return False
            if not torch.allclose(got, want, rtol=0, atol=1e-12 * size):
                return False
    return True


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x ``[B, H, T, Dh]`` rotated by the tables ``[B, T, Dh]``."""
    a, b = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-b, a), -1) * sin.unsqueeze(1)


def takes_tables(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rest: Any) -> bool:
    """Whether a call has the shapes of :func:`is_rotary`, with whole heads rotated."""
    alike = q.ndim == k.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    whole = cos.ndim == 3 and cos.shape == sin.shape and cos.shape[1:] == q.shape[2:]
    return not rest and alike and whole and cos.shape[0] in (1, q.shape[0])
