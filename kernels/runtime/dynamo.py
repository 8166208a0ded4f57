"""What Dynamo, torch.compile's front end, is told of our functions: as soon as it is imported.

Importing `torch._dynamo` takes 1.2 s (of the 3.1 that all of the trainer's imports took, on a slow
core; twice that beside an H200), and most runs compile nothing. So what Dynamo has to know is kept
here until somebody imports it, us or a user who calls torch.compile; no other file may use
`torch._dynamo` when it is imported. `tests/runners/test_lean_start.py` watches that.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
Tell = Callable[[Any], object]  # takes the module torch._dynamo
NAME = "torch._dynamo"

_waiting: list[Tell] = []
_lock = threading.RLock()  # one thread may import Dynamo while another imports our kernels


def allow_in_graph(function: F) -> F:
    """Dynamo writes calls of the function down instead of looking inside: `runtime.autograd` says
    what would go wrong otherwise, without a word."""
    when_imported(lambda dynamo: dynamo.allow_in_graph(function))
    return function


def constant_result(function: F) -> F:
    """Dynamo calls the function while it traces, and takes what it gives for a constant."""
    when_imported(lambda dynamo: dynamo.assume_constant_result(function))
    return function


def when_imported(tell: Tell) -> None:
    """Calls `tell(torch._dynamo)`: now if it is imported, else right after it has been."""
    with _lock:
        there = NAME in sys.modules
        if not there:
            _waiting.append(tell)
    if there:
        tell(importlib.import_module(NAME))  # which waits for another thread that is at it


def check_hidden() -> None:
    """Raises RuntimeError where Dynamo looks inside a function that it was to write down.

    Then it never heard of `allow_in_graph`, and would drop the function's own backward.
    """
    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError("torch._dynamo was imported without telling nanovision: a bug of ours")


class _Watch(MetaPathFinder):
    """Lets others find Dynamo, and adds to its import that `_waiting` is told."""

    def __init__(self) -> None:
        self._looking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != NAME or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            execute(module)
            with _lock:
                told = _waiting[:]
                _waiting.clear()
            for tell in told:
                tell(module)

        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


if NAME not in sys.modules:
    sys.meta_path.insert(0, _Watch())
