"""Which GPUs the tests compile kernels for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

ARCHS = (80, 90, 100)  # compute capabilities of A100, H200, B200
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory a program


def compiled_for(cases: Iterable[Any], few: Collection[Any] = ()) -> list[Any]:
    """(case, arch): all cases for an H200, a few for every GPU. The rest takes minutes: slow."""
    return [
        pytest.param(
            case,
            arch,
            marks=() if arch == 90 or case in few else pytest.mark.slow,
            id=f"{case}-{arch}",
        )
        for case in cases
        for arch in ARCHS
    ]
