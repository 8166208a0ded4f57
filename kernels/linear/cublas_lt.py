"""Matrix products by cuBLASLt, where another of its kernels is more economical than its first.

A training step is bound by energy: an H200 runs it at its 700 W, and a kernel that costs less of
them makes the clock rise. For products with a short inner dimension and a wide result cuBLAS takes
large tiles, of 192 x 192 above all. Its own list of kernels for the same product has others that
give the same numbers, bit for bit. At the power limit, by turns with the first choice, in TFLOP/s
(H200, cuBLAS 13.1, 16,384 rows, inner dimension 1,536; the head's 3,328 rows):

    x W^T, to 8,960      192 x 192: 652   176 x 128: 684   128 x 256: 679   128 x 160: 680
    x W^T, to 151,936    320 x 128: 665   176 x 128: 704   128 x 160: 693   256 x 128: 676
    x W, to 8,960        192 x 192: 635   256 x 128: 688   128 x 256: 682   320 x 128: 661

For long inner dimensions, narrow results and gradients of weights nothing was above 1% better. A
step of 1.5B, by turns: 298.0 and 298.1 ms as cuBLAS chooses, 295.2 and 295.6 so.

PyTorch asks cuBLAS for one kernel, and has no way to say which (its TunableOp is for AMD's
libraries). So cuBLASLt is called here by its C interface, in the library that PyTorch has loaded.
https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.runtime.proof import check_close

# What to take, by cuBLASLt's numbers of tiles, in place of which first choice, for x W^T and x W:
# those of the faster whole step. With 128 x 256 and 256 x 128 it took 296.1 and 296.6 ms.
T176X128, T128X256, T192X192, T320X128 = 201, 23, 209, 248
_BETTER = {True: ((T192X192, T320X128), T176X128), False: ((T192X192,), T128X256)}
LONGEST_INNER, LEAST_WIDE, LEAST_ROWS = 2048, 8192, 2048  # where that was measured

# cublasLt.h, of CUDA 12 and 13
_BF16, _FP32, _COMPUTE_FP32 = 14, 0, 68
_TRANSPOSE_A, _TRANSPOSE_B = 3, 4  # of a description
_MOST_WORKSPACE = 1  # of a preference
_TILE, _SPLITS = 1, 2  # of an algorithm's configuration
_LISTED = 8  # it lists no more
_WORKSPACE = 1 << 25  # bytes, at most: what PyTorch gives cuBLAS on Hopper
_ALIGNED = 256  # bytes: what cuBLASLt takes for granted of where matrices begin


class _Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algo", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class Library:
    """The C functions; each raises RuntimeError for a status other than success."""

    def __init__(self) -> None:
        if torch.version.cuda is None:
            raise OSError("PyTorch was built without CUDA")
        # that of torch: it is loaded, and found by its name wherever it lies
        self._library = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}")

    def __call__(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: status {status}")


@functools.cache
def library() -> Library:
    """Raises OSError where there is none."""
    return Library()


class Plan(NamedTuple):
    """A product that cuBLASLt is to compute, of [rows, inner] by [inner, wide]."""

    handle: c_void_p
    description: c_void_p
    layouts: tuple[c_void_p, c_void_p, c_void_p]
    algorithm: _Algorithm


def problem() -> str | None:
    """Why the library cannot be called, as a clause, or None."""
    try:
        library()
    except OSError as error:
        return f"cannot load cuBLASLt: {error}"
    return None


def better(transposed: bool, tiles: Sequence[tuple[int, int]], always: bool = False) -> int | None:
    """Which of the listed (tile, parts of the inner dimension) to take instead of the first.

    transposed: of x W^T, else of x W. None: the first. always: whichever the first is.
    """
    instead_of, wanted = _BETTER[transposed]
    if not tiles or (tiles[0][0] not in instead_of and not always):
        return None
    return next((i for i, found in enumerate(tiles) if found == (wanted, 1)), None)


def is_wide(rows: int, inner: int, wide: int) -> bool:
    """Whether a product of [rows, inner] by [inner, wide] is of the kind that was measured."""
    return 0 < inner <= LONGEST_INNER and wide >= LEAST_WIDE and rows >= LEAST_ROWS


@functools.cache
def _plan(
    device: int, rows: int, inner: int, wide: int, transposed: bool, always: bool = False
) -> Plan | None:
    """cuBLASLt counts columns first: there the result is [wide, rows], W is A and x is B.

    always: there is a plan, by the kernel that is better elsewhere or else by the first.
    """
    call = library()
    with torch.cuda.device(device):
        handle = _handle(device)
        description = c_void_p()
        call("cublasLtMatmulDescCreate", byref(description), _COMPUTE_FP32, _FP32)
        for attribute, value in ((_TRANSPOSE_A, transposed), (_TRANSPOSE_B, False)):
            call(
                "cublasLtMatmulDescSetAttribute", description, attribute, byref(c_int(value)),
                c_size_t(4),
            )  # fmt: skip
        layouts = []
        for height, width in (
            (inner, wide) if transposed else (wide, inner),
            (inner, rows),
            (wide, rows),
        ):
            layouts.append(c_void_p())
            call(
                "cublasLtMatrixLayoutCreate", byref(layouts[-1]), _BF16, c_uint64(height),
                c_uint64(width), c_int64(height),
            )  # fmt: skip
        a, b, d = layouts
        preference, found, listed = c_void_p(), c_int(), (_Algorithm * _LISTED)()
        call("cublasLtMatmulPreferenceCreate", byref(preference))
        call(
            "cublasLtMatmulPreferenceSetAttribute", preference, _MOST_WORKSPACE,
            byref(c_size_t(_WORKSPACE)), c_size_t(8),
        )  # fmt: skip
        call(
            "cublasLtMatmulAlgoGetHeuristic", handle, description, a, b, d, d, preference,
            _LISTED, listed, byref(found),
        )  # fmt: skip
        call("cublasLtMatmulPreferenceDestroy", preference)
        tiles = [_tile(algorithm) for algorithm in listed[: found.value]]
        index = better(transposed, tiles, always)
        if index is None and always:
            index = 0
    return None if index is None else Plan(handle, description, (a, b, d), listed[index])


@functools.cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    library()("cublasLtCreate", byref(handle))
    return handle


def _tile(algorithm: _Algorithm) -> tuple[int, int]:
    found = []
    for attribute in (_TILE, _SPLITS):
        value, written = c_int(), c_size_t()
        library()(
            "cublasLtMatmulAlgoConfigGetAttribute", byref(algorithm), attribute, byref(value),
            c_size_t(4), byref(written),
        )  # fmt: skip
        found.append(value.value)
    return found[0], found[1]


def fires(device: str, rows: int, inner: int, wide: int, transposed: bool) -> bool:
    """Whether another kernel than the first choice is taken for a product of these sizes."""
    if not is_wide(rows, inner, wide):
        return False
    return _plan(_index(device), rows, inner, wide, transposed) is not None


def prove(device: str) -> None:
    """Raises whatever is wrong with products by the library: with x W^T and x W of the smallest
    sizes that count as wide."""
    index = _index(device)
    rows, inner, wide = LEAST_ROWS, 64, LEAST_WIDE
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(n, inner, generator=generator, dtype=torch.float32).bfloat16().to(device)
        for n in (rows, wide)
    )
    for transposed in (True, False):
        w = weight.t() if transposed else weight.t().contiguous()
        plan = _plan(index, rows, inner, wide, transposed, always=True)
        if plan is None:
            raise RuntimeError("it lists no kernel")
        out = torch.full((rows, wide), torch.nan, dtype=torch.bfloat16, device=device)
        multiply(plan, x, w, out)
        for here in torch.arange(rows).split(256):  # fp32 of all of it would be 64 MiB
            exact = x[here].float() @ w.float()
            check_close("a product", out[here], exact, torch.finfo(torch.bfloat16).eps)


def _index(device: str) -> int:
    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index


def plan_of(x: Tensor, weight: Tensor, out: Tensor) -> Plan | None:
    """How to compute x [rows, inner] @ weight [inner, wide] into out; None: as PyTorch does.

    A plan is for CUDA matrices in bf16 without gaps, of which weight may be a transpose.
    """
    rows, inner = x.shape
    if (
        not is_wide(rows, inner, weight.shape[1])
        or (weight.shape[0], *out.shape) != (inner, rows, weight.shape[1])
        or not x.device == weight.device == out.device
        or any(t.dtype != torch.bfloat16 or t.data_ptr() % _ALIGNED for t in (x, weight, out))
        or not (x.is_contiguous() and out.is_contiguous())
    ):
        return None
    transposed = weight.t().is_contiguous()
    if not (transposed or weight.is_contiguous()):
        return None
    return _plan(x.device.index, rows, inner, weight.shape[1], transposed)


def multiply(plan: Plan, x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x @ weight, as `plan_of` these says, on the current stream."""
    size = plan.algorithm.workspace
    # PyTorch's own memory, so that streams and recorded graphs each have theirs
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    one, zero = c_float(1.0), c_float(0.0)
    w_layout, x_layout, out_layout = plan.layouts
    with torch.cuda.device_of(x):
        library()(
            "cublasLtMatmul", plan.handle, plan.description, byref(one),
            c_void_p(weight.data_ptr()), w_layout, c_void_p(x.data_ptr()), x_layout, byref(zero),
            c_void_p(out.data_ptr()), out_layout, c_void_p(out.data_ptr()), out_layout,
            byref(plan.algorithm), c_void_p(workspace.data_ptr()), c_size_t(size),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip
