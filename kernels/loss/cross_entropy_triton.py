# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""The Triton kernels of `cross_entropy` and `linear_cross_entropy`: a row of logits a turn.

The row goes by in tiles [STEPS, THREADS, VECTOR], laid out so that a thread holds 16 bytes of every
step: its running maximum and sum of exponentials are its own until the row ends, and one reduction
over the program follows. `cross_entropy_overwrite_kernel` then goes back over the row, last tile
first: what was read last is found in the caches, so that the row comes from memory once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.runtime.launch import LOG2E, jit, launch, processors, tl, triton

# Pieces


@jit
def _read(row_ptr, bias_ptr, cols, vocab, scale, softcap, MASKED: tl.constexpr, KEEP: tl.constexpr):
    """Logits as the loss sees them, in fp32; -inf beyond the vocabulary."""
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
    elif scale is not None and MASKED:  # a negative scale turns the padding round
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
    base = tl.where(new == -float("inf"), 0.0, new)  # nothing but -inf so far: no inf - inf
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
def _row_statistics(
    row_ptr,
    bias_ptr,
    vocab,
    smoothing,
    softcap,
    scale,
    STEPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Maximum, sum of exp(z - maximum), and (with smoothing) sum of z, over a row."""
    tile = _tile(STEPS, THREADS, VECTOR)
    size: tl.constexpr = STEPS * THREADS * VECTOR
    top = tl.full([THREADS], -float("inf"), tl.float32)
    total = tl.zeros([THREADS], tl.float32)
    plain = tl.zeros([THREADS], tl.float32)
    whole = vocab // size * size
    for start in tl.range(0, whole, size, num_stages=1):  # three stages: 1.71 ms for 1.52
        z = _read(row_ptr, bias_ptr, start + tile, vocab, scale, softcap, False, KEEP)
        top, total = _online(top, total, z)
        if smoothing is not None:
            plain += _inner_sum(z)
    if whole < vocab:
        z = _read(row_ptr, bias_ptr, whole + tile, vocab, scale, softcap, True, KEEP)
        top, total = _online(top, total, z)
        if smoothing is not None:
            plain += _inner_sum(tl.where(whole + tile < vocab, z, 0.0))
    highest = tl.max(top, 0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    return base, tl.sum(total * tl.exp2((top - base) * LOG2E), 0), tl.sum(plain, 0)


@jit
def _loss(target, top, total, plain, vocab, smoothing, z_loss):
    """The loss of a row and its log sum exp."""
    log_total = tl.log(total)
    loss = log_total + (top - target)  # small numbers first: a sure token keeps its digits
    if smoothing is not None:
        loss += smoothing * (target - plain / vocab)
    lse = top + log_total
    if z_loss is not None:
        loss += z_loss * lse * lse
    return loss, lse


@jit
def _column(label, vocab):
    """The label's column in 32 bits, -1 if there is none."""
    return tl.where((label >= 0) & (label < vocab), label, -1).to(tl.int32)


@jit
def _target(row_ptr, bias_ptr, at, scale, softcap):
    """The logit at a column as the loss sees it; NaN, and no memory touched, at -1."""
    z = tl.load(row_ptr + at, mask=at >= 0, other=float("nan")).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + at, mask=at >= 0, other=0.0).to(tl.float32)
    if scale is not None:
        z *= scale
    if softcap is not None:
        z = _capped(z, softcap)
    return z


@jit
def _factors(weight_ptr, total, lse, vocab, smoothing, z_loss, scale):
    """What multiplies exp(z - top), what is taken from every entry, and from the label's."""
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
    """The gradient of every entry but the label's, before the softcap's own slope."""
    g = tl.exp2((z - top) * LOG2E) * first
    if smoothing is not None:
        g -= uniform
    if softcap is not None:
        g *= _softcap_slope(z, softcap)
    return g


@jit
def _softcap_slope(z, softcap):
    """1 - tanh^2, for z that has been capped; 0 beyond the vocabulary, where z is -inf."""
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
            at = _column(label, vocab)
            target = _target(row_ptr, bias_ptr, at, scale, softcap)
            top, total, plain = _row_statistics(
                row_ptr, bias_ptr, vocab, smoothing, softcap, scale, STEPS, THREADS, VECTOR,
                "evict_first",
            )  # fmt: skip
            loss, _ = _loss(target, top, total, plain, vocab, smoothing, z_loss)
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
            at = _column(label, vocab)
            target = _target(row_ptr, bias_ptr, at, scale, softcap)
            top, total, plain = _row_statistics(
                row_ptr, bias_ptr, vocab, smoothing, softcap, scale, STEPS, THREADS, VECTOR,
                "evict_last",
            )  # fmt: skip
            loss, lse = _loss(target, top, total, plain, vocab, smoothing, z_loss)
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


@jit
def cross_entropy_scale_kernel(x_ptr, factor_ptr, stride, cols, tiles, total, BLOCK: tl.constexpr):
    """x *= factor, in place; nothing is read or written if the factor is 1."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        begin = tl.program_id(0).to(tl.int64)
        for turn in range(tl.cdiv(total - begin, tl.num_programs(0))):
            at = begin + turn * tl.num_programs(0)
            col = (at % tiles) * BLOCK + tl.arange(0, BLOCK)
            ptr = x_ptr + (at // tiles) * stride + col
            x = tl.load(ptr, mask=col < cols, other=0.0).to(tl.float32)
            tl.store(ptr, (x * factor).to(x_ptr.dtype.element_ty), mask=col < cols)


# Host


@dataclass(frozen=True)
class Config:
    """How a kernel over rows is launched.

    warps: a program; steps: 16-byte vectors a thread in a tile; programs: an SM, each taking rows
    in turn (0: one program a row); registers: the most a thread may have (None: as ptxas likes).
    """

    warps: int
    steps: int
    programs: int = 0
    registers: int | None = None


def _shape(config: Config, logits: Tensor) -> dict[str, Any]:
    """The tile, and what else these kernels are all launched with."""
    vector = 16 // logits.element_size()
    tile = {"STEPS": config.steps, "THREADS": config.warps * 32, "VECTOR": vector}
    return tile if config.registers is None else {**tile, "maxnreg": config.registers}


def _tile_size(config: Config, logits: Tensor) -> int:
    return config.steps * config.warps * 32 * (16 // logits.element_size())


def _warps(logits: Tensor, most: int) -> int:
    """Warps a program, fewer where the row is so short that some would have nothing to do."""
    wanted = triton.cdiv(logits.shape[1], 512 // logits.element_size())
    return min(most, triton.next_power_of_2(wanted))


def _config(logits: Tensor, usual: bool, fast: Config) -> Config:
    """`fast` for aligned rows and no options; else what never spills.

    Left to itself, ptxas aims at 32, 40 or 64 registers and spills some bytes to get there; told
    how many it may have, it does not.
    """
    aligned = logits.shape[1] % 16 == 0 and logits.stride(0) % 16 == 0
    if usual and aligned and logits.shape[1] >= 4096:
        return fast
    return Config(_warps(logits, 16), 1, registers=64 if aligned else 128)


def forward_config(logits: Tensor, usual: bool) -> Config:
    """On an H200, bf16, 16,384 rows of 75,968: 8 warps 0.574 ms, 4,339 GB/s; 16 0.584, 32 0.658."""
    return _config(logits, usual, Config(8, 1))


def backward_config(logits: Tensor, usual: bool) -> Config:
    """As above: 4 warps of two vectors a thread 1.238 ms (4,021 GB/s), of one 1.443."""
    return _config(logits, usual, Config(4, 2))


def overwrite_config(logits: Tensor, usual: bool) -> Config:
    """As above, ms at 32,768, 75,968 and (4,096 rows) 131,072 entries: 16 warps of two vectors
    0.553, 1.499, 0.721; 32 of one, two programs an SM in turn 0.642, 1.452, 0.695. Rows that stay
    in registers 0.687 at best: too few of them are in flight.
    """
    long = logits.shape[1] > 2**16
    return _config(logits, usual, Config(32, 1, programs=2) if long else Config(16, 2))


def _usual(*options: Any) -> bool:
    """Whether the loss is the plain one: no smoothing, z-loss, softcap or scale."""
    return not any(option is not None and option != 0.0 for option in options)


def _grid(logits: Tensor, config: Config) -> tuple[int]:
    rows = logits.shape[0]
    return (min(rows, processors(logits.device) * config.programs) if config.programs else rows,)


def _or_none(value: float | None) -> float | None:
    """An option that is off is left out of the kernel altogether."""
    return value or None


def forward_rows(
    logits: Tensor,  # [N, V], last dimension contiguous
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    losses: Tensor,  # [N] fp32, written
    top: Tensor | None,  # [N] fp32, written; maximum of a row
    total: Tensor | None,  # [N] fp32, written; lse = top + log(total)
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    scale: float | None = None,
    config: Config | None = None,
) -> None:
    """Writes the losses and, if asked for, what the backward needs of every row."""
    usual = bias is None and _usual(label_smoothing, z_loss, softcap, scale)
    config = config or forward_config(logits, usual)
    rows, vocab = logits.shape
    launch(
        cross_entropy_forward_kernel,
        _grid(logits, config),
        logits,
        labels.contiguous(),
        bias,
        losses,
        top,
        total,
        rows,
        logits.stride(0),
        vocab,
        ignore_index,
        _or_none(label_smoothing),
        _or_none(z_loss),
        softcap,
        scale,
        num_warps=config.warps,
        **_shape(config, logits),
    )


def backward_rows(
    logits: Tensor,  # [N, V], last dimension contiguous
    labels: Tensor,  # [N]
    weight: Tensor,  # scalar fp32
    top: Tensor,  # [N]
    total: Tensor,  # [N]
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    config: Config | None = None,
) -> Tensor:
    """weight * d loss / d logits [N, V]."""
    config = config or backward_config(logits, _usual(label_smoothing, z_loss, softcap))
    rows, vocab = logits.shape
    grads = logits.new_empty(rows, vocab)
    tiles = triton.cdiv(vocab, _tile_size(config, logits))
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
        ignore_index,
        _or_none(label_smoothing),
        _or_none(z_loss),
        softcap,
        num_warps=config.warps,
        **_shape(config, logits),
    )
    return grads


def overwrite_rows(
    logits: Tensor,  # [N, V], last dimension contiguous; overwritten
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    weight: Tensor | None,  # scalar fp32; None is 1
    losses: Tensor,  # [N] fp32, written
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    scale: float | None = None,
    config: Config | None = None,
) -> None:
    """Writes the losses, and weight * d loss / d logits over the logits."""
    usual = bias is None and _usual(label_smoothing, z_loss, softcap, scale)
    config = config or overwrite_config(logits, usual)
    rows, vocab = logits.shape
    launch(
        cross_entropy_overwrite_kernel,
        _grid(logits, config),
        logits,
        labels.contiguous(),
        bias,
        weight,
        losses,
        rows,
        logits.stride(0),
        vocab,
        ignore_index,
        _or_none(label_smoothing),
        _or_none(z_loss),
        softcap,
        scale,
        num_warps=config.warps,
        **_shape(config, logits),
    )


def scale_rows(x: Tensor, factor: Tensor) -> None:
    """x *= factor in place, x with contiguous rows or columns; free if the factor is 1.

    The factor is looked at on the device: no program does anything if it is 1.
    """
    if x.ndim == 2 and x.stride(0) < x.stride(1):
        x = x.t()
    flat = x.view(1, -1) if x.is_contiguous() else x
    rows, cols = flat.shape
    block = min(8192, triton.next_power_of_2(max(cols, 16)))
    tiles = triton.cdiv(cols, block)
    total = rows * tiles
    launch(
        cross_entropy_scale_kernel,
        (min(total, processors(x.device) * 8),),
        flat,
        factor,
        flat.stride(0),
        cols,
        tiles,
        total,
        num_warps=8,
        BLOCK=block,
    )
