# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""The Triton kernels of `cross_entropy` and `linear_cross_entropy`: one row of logits at a time.

A program reads a row in tiles [STEPS, THREADS, VECTOR], laid out so that a thread holds 16 bytes of
every step. Each thread keeps its own running maximum and sum of exponentials until the row ends;
one reduction over the program follows. `cross_entropy_overwrite_kernel` then goes back over the
row, last tile first: the caches still hold the end of it, so that memory is read about once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.loss.cross_entropy_torch import LossOptions
from kernels.runtime.launch import LOG2E, jit, launch, processors, tl, triton

# Pieces


@jit
def _read(row_ptr, bias_ptr, cols, vocab, scale, softcap, MASKED: tl.constexpr, KEEP: tl.constexpr):
    """Logits after bias, scale and softcap, in fp32; -inf beyond the vocabulary."""
    if MASKED:
        mask = cols < vocab
        x = tl.load(row_ptr + cols, mask=mask, other=-float("inf"), eviction_policy=KEEP)
    else:
        x = tl.load(row_ptr + cols, eviction_policy=KEEP)
    z = x.to(tl.float32)
    if bias_ptr is not None:
        if MASKED:
            z += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        else:
            z += tl.load(bias_ptr + cols).to(tl.float32)
    if scale is not None:
        z *= scale
    if softcap is not None:
        z = _capped(z, softcap)
        if MASKED:
            z = tl.where(mask, z, -float("inf"))
    elif scale is not None and MASKED:  # a negative scale makes +inf of the padding
        z = tl.where(mask, z, -float("inf"))
    return z


@jit
def _capped(z, softcap):
    """softcap * tanh(z / softcap), to within an ulp of softcap."""
    u = tl.exp2(tl.abs(z) * (-2.0 * LOG2E / softcap))
    size = softcap * (1.0 - u) / (1.0 + u)
    return tl.where(z < 0, -size, size)


@jit
def _online(top, total, z):
    """The running maximum and sum of exp(z - top) of each thread, after one more tile."""
    new = tl.maximum(top, tl.max(tl.max(z, 2), 0))
    base = tl.where(new == -float("inf"), 0.0, new)  # all -inf so far: avoid inf - inf
    total *= tl.exp2((top - base) * LOG2E)
    total += _inner_sum(tl.exp2((z - base[None, :, None]) * LOG2E))
    return new, total


@jit
def _inner_sum(z):
    """[STEPS, THREADS, VECTOR] -> [THREADS]"""
    return tl.sum(tl.sum(z, 2), 0)


@jit
def _tile(STEPS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Column numbers of the first tile."""
    step = tl.arange(0, STEPS)[:, None, None] * (THREADS * VECTOR)
    return step + tl.arange(0, THREADS)[None, :, None] * VECTOR + tl.arange(0, VECTOR)


@jit
def _target(row_ptr, bias_ptr, at, scale, softcap):
    """What `_read` gives at one column; NaN, without reading memory, at -1."""
    z = tl.load(row_ptr + at, mask=at >= 0, other=float("nan")).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + at, mask=at >= 0, other=0.0).to(tl.float32)
    if scale is not None:
        z *= scale
    if softcap is not None:
        z = _capped(z, softcap)
    return z


@jit
def _row_loss(
    row_ptr,
    bias_ptr,
    label,
    vocab,
    options,
    STEPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    KEEP: tl.constexpr,
):
    """The loss, the label's column and logit, the maximum, sum of exponentials and lse of a row."""
    smoothing, z_loss, softcap, scale = options
    at = tl.where((label >= 0) & (label < vocab), label, -1).to(tl.int32)  # -1: no such column
    target = _target(row_ptr, bias_ptr, at, scale, softcap)

    tile = _tile(STEPS, THREADS, VECTOR)
    size: tl.constexpr = STEPS * THREADS * VECTOR
    tops = tl.full([THREADS], -float("inf"), tl.float32)
    totals = tl.zeros([THREADS], tl.float32)
    sums = tl.zeros([THREADS], tl.float32)
    whole = vocab // size * size
    for start in tl.range(0, whole, size, num_stages=1):  # three stages are slower
        z = _read(row_ptr, bias_ptr, start + tile, vocab, scale, softcap, False, KEEP)
        tops, totals = _online(tops, totals, z)
        if smoothing is not None:
            sums += _inner_sum(z)
    if whole < vocab:
        z = _read(row_ptr, bias_ptr, whole + tile, vocab, scale, softcap, True, KEEP)
        tops, totals = _online(tops, totals, z)
        if smoothing is not None:
            sums += _inner_sum(tl.where(whole + tile < vocab, z, 0.0))
    highest = tl.max(tops, 0)
    top = tl.where(highest == -float("inf"), 0.0, highest)
    total = tl.sum(totals * tl.exp2((tops - top) * LOG2E), 0)
    plain = tl.sum(sums, 0)

    log_total = tl.log(total)
    loss = log_total + (top - target)  # in this order a loss near 0 keeps its digits
    if smoothing is not None:
        loss += smoothing * (target - plain / vocab)
    lse = top + log_total
    if z_loss is not None:
        loss += z_loss * lse * lse
    return loss, at, target, top, total, lse


@jit
def _factors(weight_ptr, total, lse, vocab, smoothing, z_loss, scale):
    """The factor of exp(z - top), and what to subtract from every entry and from the label's."""
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr)
    if scale is not None:
        weight *= scale
    first = weight / total
    if z_loss is not None:
        first *= 1.0 + 2.0 * z_loss * lse
    uniform = 0.0
    at_label = weight
    if smoothing is not None:
        uniform = weight * smoothing / vocab
        at_label = weight * (1.0 - smoothing)
    return first, uniform, at_label


@jit
def _slope(z, top, first, uniform, smoothing, softcap):
    """The gradient with respect to every entry but the label's."""
    g = tl.exp2((z - top) * LOG2E) * first
    if smoothing is not None:
        g -= uniform
    if softcap is not None:
        g *= _softcap_slope(z, softcap)
    return g


@jit
def _softcap_slope(z, softcap):
    """1 - tanh^2 of a capped z; 0 beyond the vocabulary, where z is -inf."""
    t = z / softcap
    return tl.maximum(1.0 - t * t, 0.0)


# Kernels


@jit
def cross_entropy_forward_kernel(
    logits_ptr,
    labels_ptr,
    bias_ptr,
    losses_ptr,
    top_ptr,
    total_ptr,
    rows,
    stride,
    vocab,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    scale,
    STEPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Losses, and (top, total) of every row for the backward: one read."""
    for turn in range(tl.cdiv(rows - tl.program_id(0), tl.num_programs(0))):
        row = tl.program_id(0) + turn * tl.num_programs(0)
        row_ptr = logits_ptr + row.to(tl.int64) * stride
        label = tl.load(labels_ptr + row)
        loss = 0.0
        top = 0.0
        total = 1.0
        if label != ignore_index:
            options = (smoothing, z_loss, softcap, scale)
            loss, _, _, top, total, _ = _row_loss(
                row_ptr, bias_ptr, label, vocab, options, STEPS, THREADS, VECTOR, "evict_first"
            )
        tl.store(losses_ptr + row, loss)
        if top_ptr is not None:
            tl.store(top_ptr + row, top)
            tl.store(total_ptr + row, total)


@jit
def cross_entropy_backward_kernel(
    grads_ptr,
    logits_ptr,
    labels_ptr,
    weight_ptr,
    top_ptr,
    total_ptr,
    stride,
    vocab,
    tiles,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    STEPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """weight * d loss / d logits, in a new tensor with rows of `vocab` entries: one tile."""
    row = tl.program_id(0).to(tl.int64) // tiles
    cols = (tl.program_id(0) % tiles) * (STEPS * THREADS * VECTOR) + _tile(STEPS, THREADS, VECTOR)
    mask = cols < vocab
    label = tl.load(labels_ptr + row)
    out_ptr = grads_ptr + row * vocab + cols
    if label == ignore_index:
        tl.store(out_ptr, tl.zeros([STEPS, THREADS, VECTOR], grads_ptr.dtype.element_ty), mask=mask)
    else:
        top = tl.load(top_ptr + row)
        total = tl.load(total_ptr + row)
        row_ptr = logits_ptr + row * stride
        z = _read(row_ptr, None, cols, vocab, None, softcap, True, "evict_first")
        first, uniform, at_label = _factors(
            weight_ptr, total, top + tl.log(total), vocab, smoothing, z_loss, None
        )
        g = tl.exp2((z - top) * LOG2E) * first
        if smoothing is not None:
            g -= uniform
        g = tl.where(cols == label, g - at_label, g)
        if softcap is not None:
            g *= _softcap_slope(z, softcap)
        tl.store(out_ptr, g, mask=mask, eviction_policy="evict_first")


@jit
def cross_entropy_overwrite_kernel(
    logits_ptr,
    labels_ptr,
    bias_ptr,
    weight_ptr,
    losses_ptr,
    rows,
    stride,
    vocab,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    scale,
    STEPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Losses, and weight * d loss / d logits in place of the logits."""
    tile = _tile(STEPS, THREADS, VECTOR)
    size: tl.constexpr = STEPS * THREADS * VECTOR
    dtype = logits_ptr.dtype.element_ty
    whole = vocab // size * size
    for turn in range(tl.cdiv(rows - tl.program_id(0), tl.num_programs(0))):
        row = tl.program_id(0) + turn * tl.num_programs(0)
        row_ptr = logits_ptr + row.to(tl.int64) * stride
        label = tl.load(labels_ptr + row)
        if label == ignore_index:
            tl.store(losses_ptr + row, 0.0)
            for start in range(0, vocab, size):
                zeros = tl.zeros([STEPS, THREADS, VECTOR], dtype)
                tl.store(row_ptr + start + tile, zeros, mask=start + tile < vocab)
        else:
            options = (smoothing, z_loss, softcap, scale)
            loss, at, target, top, total, lse = _row_loss(
                row_ptr, bias_ptr, label, vocab, options, STEPS, THREADS, VECTOR, "evict_last"
            )
            tl.store(losses_ptr + row, loss)
            first, uniform, at_label = _factors(
                weight_ptr, total, lse, vocab, smoothing, z_loss, scale
            )
            if whole < vocab:
                z = _read(
                    row_ptr, bias_ptr, whole + tile, vocab, scale, softcap, True, "evict_first"
                )
                g = _slope(z, top, first, uniform, smoothing, softcap)
                tl.store(row_ptr + whole + tile, g.to(dtype), mask=whole + tile < vocab)
            for back in tl.range(size, whole + size, size, num_stages=1):
                cols = whole - back + tile
                z = _read(row_ptr, bias_ptr, cols, vocab, scale, softcap, False, "evict_first")
                g = _slope(z, top, first, uniform, smoothing, softcap)
                tl.store(row_ptr + cols, g.to(dtype), eviction_policy="evict_first")
            # the label's entry is written twice, by different threads: first the loop, then this
            tl.debug_barrier()
            g = tl.exp2((target - top) * LOG2E) * first - at_label
            if smoothing is not None:
                g -= uniform
            if softcap is not None:
                g *= _softcap_slope(target, softcap)
            tl.store(row_ptr + at, g.to(dtype), mask=at >= 0)


# Host


@dataclass(frozen=True)
class LossConfig:
    """How a kernel over rows is launched.

    warps: per program; steps: 16-byte vectors per thread in a tile; programs: per SM, each taking
    rows in turn (0: one program per row); registers: the most per thread (None: up to ptxas).
    """

    warps: int
    steps: int
    programs: int = 0
    registers: int | None = None


def _config(logits: Tensor, plain: bool, fast: LossConfig) -> LossConfig:
    """`fast` for long aligned rows and the plain loss, else a configuration that never spills.

    By default ptxas aims at 32, 40 or 64 registers and spills to get there; an explicit limit
    avoids that. Short rows get fewer warps, so that each has work.
    """
    vocab = logits.shape[1]
    aligned = vocab % 16 == 0 and logits.stride(0) % 16 == 0
    if plain and aligned and vocab >= 4096:
        return fast
    useful = triton.next_power_of_2(triton.cdiv(vocab, 512 // logits.element_size()))
    return LossConfig(min(16, useful), 1, registers=64 if aligned else 128)


def _is_plain(options: LossOptions, scale: float | None = None) -> bool:
    """Whether the loss has no smoothing, z-loss, softcap or scale."""
    return not any(option is not None and option != 0.0 for option in (*options[1:], scale))


def _launch_rows(
    kernel: Any,
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    pointers: tuple[Tensor | None, ...],
    options: LossOptions,
    scale: float | None,
    config: LossConfig,
) -> None:
    """Starts a kernel that walks over rows; pointers: the arguments between bias and sizes."""
    rows, vocab = logits.shape
    programs = processors(logits.device) * config.programs
    launch(
        kernel,
        (min(rows, programs) if programs else rows,),
        logits,
        labels.contiguous(),
        bias,
        *pointers,
        rows,
        logits.stride(0),
        vocab,
        *_given(options),
        scale,
        **_tile_constants(logits, config),
    )


def _given(options: LossOptions) -> tuple[int, float | None, float | None, float | None]:
    """The options with None for a term that is off: its code is then left out of the kernel."""
    return (
        options.ignore_index,
        options.label_smoothing or None,
        options.z_loss or None,
        options.softcap,
    )


def _tile_constants(logits: Tensor, config: LossConfig) -> dict[str, Any]:
    return {
        "STEPS": config.steps,
        "THREADS": config.warps * 32,
        "VECTOR": 16 // logits.element_size(),
        "num_warps": config.warps,
        "maxnreg": config.registers,
    }


def forward_rows(
    logits: Tensor,  # [N, V], last dimension contiguous
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    losses: Tensor,  # [N] fp32, written
    top: Tensor | None,  # [N] fp32, written; maximum of a row
    total: Tensor | None,  # [N] fp32, written; lse = top + log(total)
    options: LossOptions,
    scale: float | None = None,
    config: LossConfig | None = None,
) -> None:
    """Writes the losses and, if asked for, what the backward needs of each row."""
    plain = bias is None and _is_plain(options, scale)
    config = config or _config(logits, plain, LossConfig(8, 1))
    pointers = (losses, top, total)
    kernel = cross_entropy_forward_kernel
    _launch_rows(kernel, logits, labels, bias, pointers, options, scale, config)


def backward_rows(
    logits: Tensor,  # [N, V], last dimension contiguous
    labels: Tensor,  # [N]
    weight: Tensor,  # scalar fp32
    top: Tensor,  # [N]
    total: Tensor,  # [N]
    options: LossOptions,
    config: LossConfig | None = None,
) -> Tensor:
    """weight * d loss / d logits [N, V]."""
    config = config or _config(logits, _is_plain(options), LossConfig(4, 2))
    rows, vocab = logits.shape
    grads = logits.new_empty(rows, vocab)
    constants = _tile_constants(logits, config)
    tiles = triton.cdiv(vocab, constants["STEPS"] * constants["THREADS"] * constants["VECTOR"])
    launch(
        cross_entropy_backward_kernel,
        (rows * tiles,),
        grads,
        logits,
        labels.contiguous(),
        weight,
        top,
        total,
        logits.stride(0),
        vocab,
        tiles,
        *_given(options),
        **constants,
    )
    return grads


def overwrite_rows(
    logits: Tensor,  # [N, V], last dimension contiguous; overwritten
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    weight: Tensor | None,  # scalar fp32; None is 1
    losses: Tensor,  # [N] fp32, written
    options: LossOptions,
    scale: float | None = None,
    config: LossConfig | None = None,
) -> None:
    """Writes the losses, and weight * d loss / d logits over the logits.

    On an H200 longer rows are fastest with two programs per SM, each taking rows in turn.
    """
    long = logits.shape[1] > 2**16
    fast = LossConfig(32, 1, programs=2) if long else LossConfig(16, 2)
    config = config or _config(logits, bias is None and _is_plain(options, scale), fast)
    kernel = cross_entropy_overwrite_kernel
    _launch_rows(kernel, logits, labels, bias, (weight, losses), options, scale, config)
