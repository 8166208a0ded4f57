"""Redirects calls of functions inside foreign code (attention, rotary embeddings).

No code is edited. A function that names the callee is copied with other *globals*, in which a
stand-in replaces that name, or the module it is read from. ``TorchFunctionMode`` would be shorter,
but ``torch.compile`` refuses to enter one inside ``torch.utils.checkpoint``.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

StandIn = Callable[[Any], Callable[..., Any] | None]  # what to call in place of a value, or None
MODULES = (torch, torch.nn, F)
DEPTH = 3  # functions called by functions called by forward
KEEP = {"requires_grad_", "retain_grad_", "share_memory_", "rename_"}  # a tensor's numbers
IN_PLACE = {n for n in dir(torch.Tensor) if n[-1] == "_" != n[-2] and n[0] != "_"} - KEEP | {"data"}


def attention_to(to: Callable[..., Any]) -> StandIn:
    """Replaces ``F.scaled_dot_product_attention`` by ``to``."""
    return lambda value: to if value is F.scaled_dot_product_attention else None


def reroute(module: nn.Module, stand_in: StandIn) -> dict[str, FunctionType]:
    """Copies of a module's methods (``forward`` among them) that call stand-ins.

    Empty if no code that ``forward`` runs names a function with a stand-in.
    """
    new: dict[str, FunctionType] = {}
    seen, waiting = set(), ["forward"]
    rewriter = _Rewriter(module, stand_in)
    while waiting:
        name = waiting.pop()
        method = inspect.getattr_static(type(module), name, None)
        if name in seen or not isinstance(method, FunctionType) or _is_torchs(method):
            continue
        seen.add(name)
        if isinstance(plain := inspect.unwrap(method), FunctionType):
            waiting += _names(plain.__code__)
        if (rewritten := rewriter.function(method, DEPTH)) is not None:
            new[name] = rewritten
    return new


def functions_of(module: nn.Module) -> Iterator[FunctionType]:
    """``forward`` and the methods that it may call, directly or not; none of torch's own."""
    seen: set[str] = set()
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        method = inspect.getattr_static(type(module), name, None)
        if name in seen or not isinstance(method, FunctionType) or _is_torchs(method):
            continue
        seen.add(name)
        if isinstance(plain := inspect.unwrap(method), FunctionType):
            waiting += _names(plain.__code__)
            yield plain


def names_of(module: nn.Module) -> set[str]:
    """Every name that ``forward``, its methods and the functions they call may read."""
    names: set[str] = set()
    for function in functions_of(module):
        found = _names(function.__code__)
        names |= found
        for called in found & function.__globals__.keys():
            f = function.__globals__[called]
            if isinstance(f, FunctionType) and not _is_torchs(f):
                names |= _names(f.__code__)
    return names


def written(module: nn.Module, names: Collection[str]) -> set[str]:
    """The tensors among ``names`` that the module's code changes in place by an attribute chain:
    ``block.output.weight.div_(2)``, ``self.weight.data.copy_(w)``."""
    found: set[str] = set()
    for prefix, m in module.named_modules():
        under = [name for name in names if not prefix or name.startswith(f"{prefix}.")]
        for function in functions_of(m):
            for chain in _changed(function.__code__):
                tails = (".".join(chain[:i]) for i in range(len(chain), 0, -1))
                hits = ([n for n in under if f".{n}".endswith(f".{tail}")] for tail in tails)
                found.update(next(filter(None, hits), ()))
    return found


@functools.cache
def _changed(code: CodeType) -> frozenset[tuple[str, ...]]:
    """The attribute chains that end in an in-place method of tensors."""
    found: set[tuple[str, ...]] = set()
    for inner in code.co_consts:
        found |= _changed(inner) if isinstance(inner, CodeType) else set()
    if not IN_PLACE & set(code.co_names):
        return frozenset(found)
    chain: tuple[str, ...] = ()
    for each in dis.get_instructions(code):
        if each.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            chain = () if each.opname != "CACHE" else chain
        elif each.argval in IN_PLACE:
            found |= {chain} if chain else set()
            chain = (*chain, each.argval)
        else:
            chain = (*chain, each.argval)
    return frozenset(found)


class _Rewriter:
    def __init__(self, module: nn.Module, replacement: StandIn) -> None:
        config = getattr(module, "config", None)
        self.implementation: str | None = getattr(config, "_attn_implementation", None)
        self.replacement = replacement

    def function(self, f: FunctionType, depth: int) -> FunctionType | None:
        """A copy of ``f`` with stand-ins in its globals and closure; None if it needs none."""
        if depth == 0 or _is_torchs(f):
            return None
        names = _names(f.__code__)
        found = {
            name: stand_in
            for name in sorted(names & f.__globals__.keys())
            if (stand_in := self.stand_in(f.__globals__[name], names, depth)) is not None
        }
        cells = [self.cell(cell, names, depth) for cell in f.__closure__ or ()]
        if not found and all(cell is None for cell in cells):
            return None
        closure = tuple(new or old for new, old in zip(cells, f.__closure__ or (), strict=True))
        # without __name__: Dynamo would read the globals of the module of that name
        scope = {k: v for k, v in f.__globals__.items() if k != "__name__"} | found
        copy = FunctionType(f.__code__, scope, f.__name__, f.__defaults__, closure)
        copy.__kwdefaults__ = f.__kwdefaults__
        return copy

    def cell(self, cell: CellType, names: set[str], depth: int) -> CellType | None:
        try:
            stand_in = self.stand_in(cell.cell_contents, names, depth)
        except ValueError:  # an empty cell
            return None
        return None if stand_in is None else CellType(stand_in)

    def stand_in(self, value: Any, names: set[str], depth: int) -> Any:
        """A value's replacement, or None."""
        if callable(value) and (new := self.replacement(value)) is not None:
            return new
        if any(value is module for module in MODULES):
            return self.attributes(value, names)
        if isinstance(value, FunctionType):
            return self.function(value, depth - 1)
        if self.implementation and isinstance(value, Mapping):
            return self.interface(value, self.implementation, depth)
        return None

    def attributes(self, module: Any, names: set[str]) -> Any:
        """A stand-in for one of torch's modules, if code reads a replaced function from it."""
        read = {name: getattr(module, name) for name in names if hasattr(module, name)}
        new = {}
        for name, value in read.items():
            if (module is torch and value is torch.nn) or (module is torch.nn and value is F):
                new[name] = self.attributes(value, names)
            elif callable(value):
                new[name] = self.replacement(value)
        changed = {name: value for name, value in new.items() if value is not None}
        return _Attributes(read | changed) if changed else None

    def interface(self, table: Mapping[Any, Any], name: str, depth: int) -> Any:
        """A stand-in for Hugging Face's table of attention functions."""
        chosen = table.get(name)
        if not isinstance(chosen, FunctionType):
            return None
        rewritten = self.function(chosen, depth)
        return None if rewritten is None else _Interface(table, name, rewritten)


class _Attributes:
    """The attributes of a module that some code may read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        vars(self).update(values)


class _Interface:
    """A table with one of its entries replaced."""

    def __init__(self, table: Mapping[Any, Any], name: str, function: FunctionType) -> None:
        self.table, self.name, self.function = table, name, function

    def get_interface(self, name: str, default: Any = None) -> Any:
        return self.function if name == self.name else self.table.get(name, default)

    __getitem__ = get = get_interface


def _names(code: CodeType) -> set[str]:
    """Every global or attribute that code may read, in lambdas and comprehensions too."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)


def _is_torchs(f: FunctionType) -> bool:
    return (f.__module__ or "").partition(".")[0] == "torch"
