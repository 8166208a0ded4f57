"""Selective checkpointing: the outputs that a policy keeps are recorded, and replayed in backward.

An output that the function later changes in place (``clamp_`` of a product) is copied before the
change, so that the replay returns the original. The selective contexts of
``torch.utils.checkpoint`` raise for some of these changes and miss others, behind ``_unsafe_view``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Keep = Callable[[str], bool]


def operation(func: Any) -> str:
    """An operation's name in policies: ``aten.mm``, ``nanovision.flash_attention``."""
    return str(func.overloadpacket)


@dataclass
class Output:
    """An operation's output; ``changed``: the function later changed it in place."""

    operation: str
    value: Any
    changed: bool = False


@dataclass
class Kept:
    """Outputs in the order of the calls; None for one that was replayed and dropped."""

    outputs: list[Output | None] = field(default_factory=list)

    def before_change(self, tensors: Iterator[Tensor]) -> None:
        """Copies the outputs that share memory with tensors about to change."""
        for tensor in tensors:
            memory = _memory(tensor)
            for output in self.outputs:
                if output is None or output.changed:
                    continue
                leaves = pytree.tree_leaves(output.value)
                if any(isinstance(leaf, Tensor) and _memory(leaf) == memory for leaf in leaves):
                    output.value = pytree.tree_map_only(Tensor, torch.clone, output.value)
                    output.changed = True


class RecordOutputs(TorchDispatchMode):
    """Records the outputs of the operations that ``keep`` selects."""

    def __init__(self, keep: Keep, kept: Kept) -> None:
        super().__init__()
        self.keep, self.kept = keep, kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            self.kept.before_change(_written(func, args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if self.keep(operation(func)):
            # detached: a new tensor object, for code that counts references to the output
            own = pytree.tree_map_only(Tensor, torch.Tensor.detach, out)
            self.kept.outputs.append(Output(operation(func), own))
        return out


class ReplayOutputs(TorchDispatchMode):
    """Returns recorded outputs instead of computing them; ``drop``: frees each once returned."""

    def __init__(self, keep: Keep, kept: Kept, *, drop: bool = False) -> None:
        super().__init__()
        self.keep, self.kept, self.drop, self.count = keep, kept, drop, 0

    def __enter__(self) -> Any:
        self.count = 0
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = operation(func)
        if not self.keep(name):
            return func(*args, **(kwargs or {}))
        output = self.kept.outputs[self.count] if self.count < len(self.kept.outputs) else None
        if output is None and self.count < len(self.kept.outputs):
            raise RuntimeError(
                "a second backward through a block whose outputs a checkpoint policy keeps: the "
                "first backward freed them; use policy='nothing', or call the forward again"
            )
        if output is None or output.operation != name:
            recorded = None if output is None else output.operation
            raise RuntimeError(
                f"a checkpointed function called {name} where its first run called {recorded}: "
                "it must run the same operations each time"
            )
        if self.drop:
            self.kept.outputs[self.count] = None
        self.count += 1
        # the function will change it in place again, and another replay needs the original
        own = torch.clone if output.changed and not self.drop else torch.Tensor.detach
        return pytree.tree_map_only(Tensor, own, output.value)


def contexts(keep: Keep) -> tuple[RecordOutputs, ReplayOutputs]:
    """The ``context_fn`` of ``torch.utils.checkpoint`` in eager mode."""
    kept = Kept()
    return RecordOutputs(keep, kept), ReplayOutputs(keep, kept, drop=True)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation changes."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor))
