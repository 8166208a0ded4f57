"""Modules that change what they are given: the batch is kept as it was, parameters are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


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
        self.changes: dict[Any, list[Any]] = {}  # form of a batch -> which of its leaves

    def call(
        self,
        run: Callable[[Any], Any],
        batch: Any,
        flat: dict[str, Tensor],
        names: Collection[str],
        own: Mapping[str, Tensor],
    ) -> Any:
        """``run(batch)``; flat: the leaves it is given, names: of parameters, own: its buffers."""
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
        out = run(batch)
        changed, lost, written = (
            [key for key, version in old.items() if tree[key]._version != version]
            for tree, old in zip(trees, versions, strict=True)
        )
        if known is None:
            self.changes[form] = written
        if not self.done:
            self._tell(changed, lost)
        return out

    def _tell(self, changed: list[str], lost: list[str]) -> None:
        self.done = True
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
