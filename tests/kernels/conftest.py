"""What the tests of this room share."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.runtime.launch import INTERPRETED


class Allocations(TorchDispatchMode):
    """Every tensor that an operation makes: its size, and whether it still lives.

    Views of the tensors given here do not count.
    """

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = {x.untyped_storage()._cdata for x in inputs}
        self.made: list[tuple[StorageWeakRef, int, str]] = []
        self.ops: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.nanovision.linear_cross_entropy.default:
            module = importlib.import_module("kernels.loss.linear_cross_entropy")
            with self:  # a dispatch mode does not see into a custom op by itself
                return module._loss_and_gradients(*args)
        out = func(*args, **(kwargs or {}))
        self.ops.append(str(func))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self.inputs:
                    continue
                self.made.append(
                    (StorageWeakRef(storage), storage.nbytes(), f"{func} {tuple(tensor.shape)}")
                )
        return out

    def largest(self) -> tuple[int, str]:
        return max((size, what) for _, size, what in self.made)

    def living(self) -> int:
        """Bytes of storages made here that are still alive."""
        alive = {ref.cdata: size for ref, size, _ in self.made if not ref.expired()}
        return sum(alive.values())


@pytest.fixture
def allocations_in() -> type[Allocations]:
    """`with allocations_in(*inputs) as allocations:` counts what operations allocate."""
    return Allocations


def beyond_a_sample(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The cases that a GPU leaves out of tests which the interpreter runs in full: all but two of
    each test, the first and the last. Each case is a kernel to compile, for a second or
    more; the interpreter shows that a kernel is right, a GPU that compiled it is the same."""
    cases: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        fixtures = {"kernel_device", "kernel_backend"} & {*getattr(item, "fixturenames", ())}
        if item.get_closest_marker("gpu") and fixtures:
            test = getattr(item, "originalname", item.name)
            cases.setdefault((str(item.path), test), []).append(item)
    kept = {id(each[i]) for each in cases.values() for i in (0, -1)}
    return [item for each in cases.values() for item in each if id(item) not in kept]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what this process cannot run: it has a GPU or not, it interprets Triton or not."""
    cannot = {
        "gpu": not torch.cuda.is_available(),
        "interpreter": not INTERPRETED,
        "compiles": INTERPRETED,
    }
    out = [
        item
        for item in items
        if any(absent and item.get_closest_marker(mark) for mark, absent in cannot.items())
    ]
    if not config.getoption("every_case"):
        out += [item for item in items if item.get_closest_marker("every_case")]
        out += beyond_a_sample(item for item in items if item not in out)
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where a Triton kernel runs: "cpu" in the interpreter (TRITON_INTERPRET=1), or "cuda"."""
    return request.param


@pytest.fixture(
    params=[
        pytest.param(("torch", "cpu"), id="torch"),
        pytest.param(("triton", "cpu"), id="interpreter", marks=pytest.mark.interpreter),
        pytest.param(("triton", "cuda"), id="gpu", marks=pytest.mark.gpu),
    ]
)
def kernel_backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(backend, device): torch's path, or a Triton kernel where ``kernel_device`` has it."""
    return request.param


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.interpreter)])
def interpreter(request: pytest.FixtureRequest) -> str:
    """ "cpu", in the interpreter alone: for what a GPU would only show again."""
    return request.param


@pytest.fixture
def whole_gpu() -> Iterator[None]:
    """Nothing that earlier tests left takes room on the GPU, and nothing of this one stays."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin give NaN (integers: a large value): what is not written shows."""

    def poison(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            if out.device.type != "meta":
                out.fill_(float("nan") if out.is_floating_point() else 77)
            return out

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
