"""Modules with side effects: the batch is protected, changes of parameters are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn


class ModuleMemory:
    """Attributes that modules change from call to call (dicts, lists and sets in them, too).

    They are restored after each call in modules that store a tensor: a table computed from params
    and kept would belong to older params. Hooks added by the first call stay.
    """

    def __init__(self, body: nn.Module) -> None:
        inner = (vars(m).get("inner") for m in body.modules())
        self.modules = [*body.modules(), *(m for m in inner if isinstance(m, nn.Module))]
        self.first: dict[tuple[int, str], Any] = {}  # what changes: (module, attribute) -> value
        self.seen: list[Any] = []  # structures of batches for which changes were looked for

    @contextmanager
    def kept(self, look: bool) -> Iterator[None]:
        """Restores attributes after a call. look: finds new ones that change, too."""
        self._put_back()  # a block recomputed in backward may have changed them since
        before = (
            {at: _shallow(held.get(at[1], _NONE)) for at, held in self._places()} if look else {}
        )
        try:
            yield
        finally:
            changed, remember = {}, set()
            for at, held in self._places() if look else ():
                old, new = before.get(at, _NONE), held[at[1]]
                same_kind = type(old) is type(new) and type(old) in KINDS
                if old is not new and not (same_kind and _alike(old, new)):
                    changed[at] = old
                    remember |= {at[0]} if _holds_tensors(new) or _holds_tensors(old) else set()
            self.first = {at: old for at, old in changed.items() if at[0] in remember} | self.first
            self._put_back()

    def _put_back(self) -> None:
        for (i, key), value in self.first.items():
            held = vars(self.modules[i])
            if value is _NONE:
                held.pop(key, None)
            else:
                held[key] = _shallow(value)

    def _places(self) -> list[tuple[tuple[int, str], dict[str, Any]]]:
        return [
            ((i, key), vars(m))
            for i, m in enumerate(self.modules)
            for key in vars(m)
            if key not in TORCHS
        ]


KINDS = (dict, list, set)
TORCHS = {*vars(nn.Module()), "inner", "site", "info", "leaves", "added", "reads", "defaults"}
_NONE = object()


def _shallow(value: Any) -> Any:
    return type(value)(value) if type(value) in KINDS else value


def _holds_tensors(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value if type(value) in KINDS else ()
    return isinstance(value, Tensor) or any(isinstance(each, Tensor) for each in values)


def _alike(old: Any, new: Any) -> bool:
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(v is new[k] for k, v in old.items())
    if isinstance(old, list):
        return len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))
    return bool(old == new)


class Watch:
    """Keeps a module from changing what it is given, which no pure function does.

    A batch of a new form is given as a copy; what the module changes in it is copied in later calls
    too. Parameters are looked at in the first eager call; ``risky`` ones, of which the code says
    that it changes them, are copied there.
    """

    def __init__(self, risky: Collection[str]) -> None:
        self.risky = risky
        self.done = False
        self.refused = ""
        self.lost: list[str] = []  # buffers that a call changes
        self.changes: dict[Any, list[Any]] = {}  # form of a batch -> which of its leaves

    def call(
        self,
        run: Callable[[Any], Any],
        batch: Any,
        flat: dict[str, Tensor],
        names: Collection[str],
        own: Mapping[str, Tensor],
        state: ModuleMemory,
    ) -> Any:
        """``run(batch)``; flat: the leaves it is given, names: of parameters, own: copies
        of its buffers."""
        if torch.compiler.is_compiling():
            return run(batch)
        if self.refused:
            raise RuntimeError(self.refused)
        leaves, form = pytree.tree_flatten(batch)
        known = self.changes.get(form)
        copied = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        copied = copied if known is None else known
        if copied:
            for i in copied:
                leaves[i] = leaves[i].clone()
            batch = pytree.tree_unflatten(leaves, form)
        held: Mapping[Any, Tensor] = {}
        own = {} if self.done else own
        if not self.done:
            spare = {id(flat[name]): flat[name].clone() for name in self.risky if name in flat}
            flat |= {name: spare[id(leaf)] for name, leaf in flat.items() if id(leaf) in spare}
            held = {name: flat[name] for name in names if name in flat}
        fresh: Mapping[Any, Tensor] = {i: leaves[i] for i in copied} if known is None else {}
        trees = (held, own, fresh)
        versions = [{key: leaf._version for key, leaf in tree.items()} for tree in trees]
        look = form not in state.seen  # of one forward of several that a module has
        with state.kept(look):
            out = run(batch)
        state.seen += [form] if look else []
        changed, lost, written = (
            [key for key, version in old.items() if tree[key]._version != version]
            for tree, old in zip(trees, versions, strict=True)
        )
        lost += [name for name, leaf in own.items() if flat[name] is not leaf]
        if known is None:
            self.changes[form] = written
        if not self.done:
            self._tell(changed, lost)
        return out

    def _tell(self, changed: list[str], lost: list[str]) -> None:
        self.done, self.lost = True, lost
        if changed:
            spared = set(changed) <= set(self.risky)
            self.refused = (
                f"the module changes its parameters {changed[:4]} in place while it runs, and they "
                "are the caller's params: no pure function. Have it done before from_module, or "
                "switch it off (training mode, an option of the model)"
                + ("" if spared else "; these have been changed now: take module and params anew")
            )
            raise RuntimeError(self.refused)
        if lost:
            layers = list(dict.fromkeys(name.rpartition(".")[0] for name in lost))
            warnings.warn(
                f"a call changes the buffers of {layers[:4]} ({len(layers)} layers in all), and "
                "the change is lost: from_module(..., buffers=True) returns it",
                stacklevel=6,
            )
