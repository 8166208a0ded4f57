"""Backends from outside the project, proved by a small call before they are chosen.

A library can import and then fail when it is called, or give wrong numbers: one of its parts is of
another version than it was tested with. So the first choice of such a backend in a process, on each
device and for each kind of call, runs a small case forward and backward and compares it with the
reference. What fails is passed over, with one warning that names library, version and error.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

PATIENCE = 900.0  # seconds that a proof may take: compiling its kernels is part of it
_log = logging.getLogger(__name__)
_found: dict[Hashable, str | None] = {}
_warned: set[str] = set()
_lock = threading.Lock()


def proof_problem(
    libraries: Sequence[str], case: Callable[[], None], key: Hashable, device: str
) -> str | None:
    """None if a case is right, else what is wrong with it, as a clause.

    Each key's case runs once in a process. It runs in a thread of its own, where no transform,
    autocast, fake mode or compiler of the caller's is active. While a CUDA graph is recorded on the
    current stream nothing may be tried: a key that was not proved before counts as unproved.

    Args:
        libraries: the distributions that take part, the backend's own first.
        case: raises whatever is wrong, by `check_close` for numbers.
        key: what the library compiles or chooses separate code for.
        device: where the case runs.

    Raises:
        torch.OutOfMemoryError: the case found no memory, which says nothing of the library.
    """
    with _lock:
        if key in _found:
            return _found[key]
        if torch.device(device).type == "cuda" and torch.cuda.is_current_stream_capturing():
            unproved = "cannot be proved while a CUDA graph is recorded; call it once before"
            warn_once(f"{versions(libraries)} is passed over: it {unproved}.")
            return unproved
        error = _run(case, device)
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        _found[key] = problem = None if error is None else f"failed its proof: {_words(error)}"
        if problem is not None:
            warn_once(
                f"{versions(libraries)} is passed over: a small call forward and backward {problem}"
                ". docs/guide.md names the versions that work; install those."
            )
        return problem


def _run(case: Callable[[], None], device: str) -> BaseException | None:
    """What a case raises in a thread of its own."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            if torch.device(device).type == "cuda":
                with torch.cuda.device(device):
                    case()
            else:
                case()
        except BaseException as error:
            raised.append(error)

    # A warning of the library's is no failure, also where warnings are errors. And waiting for the
    # device is allowed here.
    syncs = torch.cuda.get_sync_debug_mode() if torch.device(device).type == "cuda" else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if syncs:
            torch.cuda.set_sync_debug_mode(0)
        try:
            thread = threading.Thread(target=work, name="proof", daemon=True)
            thread.start()
            thread.join(PATIENCE)
        finally:
            if syncs:
                torch.cuda.set_sync_debug_mode(syncs)
    if thread.is_alive():
        return TimeoutError(f"it did not end within {PATIENCE:.0f} s")
    return raised[0] if raised else None


def check_close(name: str, got: Tensor, exact: Tensor, allowed: float, slack: float = 0.0) -> None:
    """Raises ArithmeticError where got is further from exact than `allowed` of exact's norm and
    `slack` for each of its rows (independent ones), or holds a NaN."""
    if got.shape != exact.shape:
        raise ArithmeticError(f"{name} is {list(got.shape)} instead of {list(exact.shape)}")
    error = float((got.detach().to(exact.device, torch.float64) - exact.double()).norm())
    rows = exact.numel() // max(1, exact.shape[-1])
    limit = allowed * float(exact.double().norm()) + slack * rows**0.5
    if not error <= limit:
        raise ArithmeticError(f"{name} is off by {error:.3g}, allowed {limit:.3g}")


@functools.cache
def import_problem(module: str, remedy: str) -> str | None:
    """None if the module imports; else what to do, with the import's own words if it is broken.

    A library that is installed and broken is also warned of, once.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module == missing or module.startswith(missing + "."):
            return remedy  # not installed
        problem = f"{remedy} ({module} does not import: {_words(error)})"
    except Exception as error:
        problem = f"{remedy} ({module} does not import: {_words(error)})"
    else:
        return None
    warn_once(f"A library is passed over: {problem}.")
    return problem


def versions(libraries: Sequence[str]) -> str:
    """ "flash-attn-4 4.0.0b36 with quack-kernels 0.6.5, ...": the installed ones."""
    found = []
    for library in libraries:
        try:
            found.append(f"{library} {importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError:  # a checkout that is on the path
            found.append(f"{library} of unknown version")
    return found[0] + (f" with {', '.join(found[1:])}" if found[1:] else "")


def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        _log.warning(message)


def _words(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:300]}{'...' if len(said) > 300 else ''}"
