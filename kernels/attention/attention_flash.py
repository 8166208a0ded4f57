"""Flash attention by the libraries that have it: one pair of custom ops over all of them.

| backend | library | documents |
|---|---|---|
| `flash-attn-4` | flash-attn-4 (`flash_attn.cute`) | packed; equal lengths as a dense batch |
| `flash-attn` | flash-attn 2 | packed |
| `torch-varlen` | the flash-attn 2 inside torch | packed; equal lengths as a dense batch |
| `cudnn` | cuDNN through torch | equal lengths only |
| `triton` | our own (`kernels.attention.attention_triton`) | packed |

On a GPU, fp16 and bf16 (`triton`: fp32 too); outputs, and gradients of first order.
`kernels.attention` makes of them something that has every derivative.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.attention import attention_triton
from kernels.runtime.autograd import fold_all
from kernels.runtime.operators import LIBRARY, operator

# The libraries. Each forward gives (out, lse), each backward (dq, dk, dv), in any layout: the ops
# make them contiguous. `cu` is None for a dense batch: q, k, v are then [B, T, heads, Dh].


class FlashOptions(NamedTuple):
    """A call's options: those of `attention`."""

    max_seqlen: int
    causal: bool
    window: int | None
    scale: float
    deterministic: bool = False

    @property
    def sides(self) -> tuple[int, int]:
        """Keys seen to the left and right of a query; -1 is all of them."""
        reach = -1 if self.window is None else self.window - 1
        return reach, 0 if self.causal else reach


class Saved(NamedTuple):
    """A forward's tensors, which its backward takes beside the gradient of out."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    cu: Tensor | None


def _flash_attn_4_options(cu: Tensor | None, options: FlashOptions) -> dict[str, Any]:
    left, right = (None, None) if options.window is None else options.sides
    return {
        "cu_seqlens_q": cu,
        "cu_seqlens_k": cu,
        "max_seqlen_q": options.max_seqlen,
        "max_seqlen_k": options.max_seqlen,
        "softmax_scale": options.scale,
        "causal": options.causal and options.window is None,  # given both, it ignores one
        "window_size_left": left,
        "window_size_right": right,
    }


def _flash_attn_4_forward(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, options: FlashOptions
) -> tuple[Tensor, Tensor]:
    # below its autograd Function of 33 arguments, which has neither vmap nor setup_context
    forward = _function("flash_attn.cute.interface", "_flash_attn_fwd")
    with torch.cuda.device_of(q):  # it launches on the current device
        out, lse, *_ = forward(q, k, v, **_flash_attn_4_options(cu, options), return_lse=True)
    return out, lse


def _flash_attn_4_backward(grad: Tensor, saved: Saved, options: FlashOptions) -> tuple[Tensor, ...]:
    q, k, v, out, lse, cu = saved
    backward = _function("flash_attn.cute.interface", "_flash_attn_bwd")
    named = _flash_attn_4_options(cu, options) | {"deterministic": options.deterministic}
    with torch.cuda.device_of(q):
        dq, dk, dv, *_ = backward(q, k, v, out, grad, lse, **named)
    return dq, dk, dv


def _flash_attn_2_options(options: FlashOptions) -> dict[str, Any]:
    left, right = options.sides
    return {
        "dropout_p": 0.0,
        "softmax_scale": options.scale,
        "causal": options.causal,
        "window_size_left": left,
        "window_size_right": right,
    }


def _flash_attn_2_forward(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, options: FlashOptions
) -> tuple[Tensor, Tensor]:
    forward = _function("flash_attn.flash_attn_interface", "_flash_attn_varlen_forward")
    most = options.max_seqlen
    out, lse, *_ = forward(q, k, v, cu, cu, most, most, **_flash_attn_2_options(options))
    return out, lse


def _flash_attn_2_backward(grad: Tensor, saved: Saved, options: FlashOptions) -> tuple[Tensor, ...]:
    q, k, v, out, lse, cu = saved
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    backward = _function("flash_attn.flash_attn_interface", "_flash_attn_varlen_backward")
    named = _flash_attn_2_options(options) | {"softcap": 0.0, "alibi_slopes": None}
    bounds = (cu, cu, options.max_seqlen, options.max_seqlen)
    named["deterministic"] = options.deterministic
    backward(grad, q, k, v, out, lse, *grads, *bounds, **named)
    return grads


def _torch_options(options: FlashOptions) -> dict[str, Any]:
    left, right = options.sides
    return {"scale": options.scale, "window_size_left": left, "window_size_right": right}


def _torch_flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, options: FlashOptions
) -> tuple[Tensor, Tensor]:
    # what torch.nn.attention.varlen calls; it shares key heads in every torch from 2.10 on
    bounds = (cu, cu, options.max_seqlen, options.max_seqlen)
    x = (_rows(q), _rows(k), _rows(v))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *x, *bounds, 0.0, options.causal, False, **_torch_options(options)
    )
    return out, lse


def _torch_flash_backward(grad: Tensor, saved: Saved, options: FlashOptions) -> tuple[Tensor, ...]:
    # torch itself reads whether to be deterministic
    q, k, v, out, lse, cu = saved
    x = (_rows(q), _rows(k), _rows(v), out, lse)
    bounds = (cu, cu, options.max_seqlen, options.max_seqlen)
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # dropout's seed and offset
    return torch.ops.aten._flash_attention_backward(
        grad, *x, *bounds, 0.0, options.causal, unused, unused[:0], **_torch_options(options)
    )


# Statistics are [B, H, T] or [B, H, T, 1], by torch's version; backward wants what forward gave.
_cudnn_statistics = {"ndim": 4}


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, options: FlashOptions
) -> tuple[Tensor, Tensor]:
    q, k, v = (_rows(x).transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, options.causal, False, scale=options.scale
    )
    _cudnn_statistics["ndim"] = lse.ndim
    return out.transpose(1, 2), lse.reshape(q.shape[:3])


def _cudnn_backward(grad: Tensor, saved: Saved, options: FlashOptions) -> tuple[Tensor, ...]:
    x = [_rows(x).transpose(1, 2) for x in (grad, *saved[:4])]
    lse = saved.lse[..., None] if _cudnn_statistics["ndim"] == 4 else saved.lse
    unused = torch.empty((), dtype=torch.int64, device=grad.device)  # dropout's seed and offset
    most = options.max_seqlen
    rest = (unused, unused, None, None, None, most, most, 0.0, options.causal)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *x, lse, *rest, scale=options.scale
    )
    return tuple(x.transpose(1, 2) for x in grads)


def _triton_options(options: FlashOptions) -> dict[str, Any]:
    return {"causal": options.causal, "window": options.window, "scale": options.scale}


def _triton_forward(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, options: FlashOptions
) -> tuple[Tensor, Tensor]:
    return attention_triton.flash_forward(q, k, v, cu, **_triton_options(options))


def _triton_backward(grad: Tensor, saved: Saved, options: FlashOptions) -> tuple[Tensor, ...]:
    q, k, v, out, lse, cu = saved
    assert cu is not None
    return attention_triton.flash_backward(grad, q, k, v, out, lse, cu, **_triton_options(options))


def _rows(x: Tensor) -> Tensor:
    """x with the heads' rows contiguous and on 16 bytes, copied only where it is not so."""
    whole = 16 // x.element_size()
    if (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride % whole == 0 for stride in x.stride()[:-1])
    ):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@functools.cache
def _function(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


_LIBRARIES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "flash-attn-4": (_flash_attn_4_forward, _flash_attn_4_backward),
    "flash-attn": (_flash_attn_2_forward, _flash_attn_2_backward),
    "torch-varlen": (_torch_flash_forward, _torch_flash_backward),
    "cudnn": (_cudnn_forward, _cudnn_backward),
    "triton": (_triton_forward, _triton_backward),
}
_DENSE = ("flash-attn-4", "torch-varlen", "cudnn")  # take equal lengths as a batch [B, T, H, Dh]
# Number the entries of their fp32 gradient of q in 32 bits, each document padded by 128 rows: at
# 2.2e9 of them 1.3% of torch 2.11's came out wrong, without an error.
SMALL = ("torch-varlen", "flash-attn")


def is_large(q: Tensor, documents: int) -> bool:
    """Whether that is too many for them."""
    return (q.shape[0] + 128 * documents) * q.shape[1] * q.shape[2] >= 2**31


# The ops. `length`: that of every document, or None; `cu_seqlens` is None if it is given.


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    backend: str,
    longest: int,
    length: int | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [N, H, Dh] and the scores' log-sum-exp, fp32: [H, N], or [B, H, T] from a dense batch."""
    lse_shape = _lse_shape(q, backend, length)
    if q.numel() == 0:
        return torch.empty_like(q), torch.empty(lse_shape, device=q.device)
    if backend in SMALL and is_large(q, 0 if cu_seqlens is None else cu_seqlens.shape[0]):
        raise RuntimeError(
            f"attention backend {backend} cannot count the entries of this many examples"
        )
    forward = _LIBRARIES[backend][0]
    (x, y, z), cu = _arranged((q, k, v), cu_seqlens, backend, length)
    out, lse = forward(x, y, z, cu, FlashOptions(length or longest, causal, window, scale))
    return _packed(out), lse.contiguous()


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    backend: str,
    longest: int,
    length: int | None,
    causal: bool,
    window: int | None,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    if q.numel() == 0:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    backward = _LIBRARIES[backend][1]
    (g, x, y, z, o), cu = _arranged((grad.contiguous(), q, k, v, out), cu_seqlens, backend, length)
    options = FlashOptions(length or longest, causal, window, scale, deterministic)
    dq, dk, dv = backward(g, Saved(x, y, z, o, lse, cu), options)
    return _packed(dq), _packed(dk), _packed(dv)


def _packed(x: Tensor) -> Tensor:
    """[N, heads, Dh] or a dense batch of it -> [N, heads, Dh], contiguous."""
    return (x if x.ndim == 3 else x.flatten(0, 1)).contiguous()


def _arranged(
    tensors: tuple[Tensor, ...], cu_seqlens: Tensor | None, backend: str, length: int | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """[N, ...] tensors as the library takes them, and the boundaries, None for a dense batch."""
    if length is None:
        assert cu_seqlens is not None
        return tensors, cu_seqlens.contiguous()
    n = tensors[0].shape[0]
    if backend in _DENSE:
        return tuple(x.unflatten(0, (n // length, length)) for x in tensors), None
    device = tensors[0].device
    return tensors, torch.arange(0, n + 1, length, dtype=torch.int32, device=device)


def _lse_shape(q: Tensor, backend: str, length: int | None) -> tuple[int, ...]:
    n, heads = q.shape[:2]
    if length is not None and backend in _DENSE:
        return n // length, heads, length
    return heads, n


def _forward_fake(q: Tensor, backend: str, length: int | None, **_: Any) -> tuple[Tensor, Tensor]:
    lse_shape = _lse_shape(q, backend, length)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def _backward_fake(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


operator("flash_attention", fake=_forward_fake, kind="attention")(flash_forward)
operator("flash_attention_backward", fake=_backward_fake)(flash_backward)


# Examples side by side are documents of one packed batch: a vmap level costs no further launch.


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    *,
    deterministic: bool,
    **static: Any,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """q [..., N, H, Dh], cu_seqlens [..., S + 1] -> out [..., N, H, Dh], (out, log-sum-exp)."""
    lead, n = q.shape[:-3], q.shape[-3]
    if lead:
        q, k, v = (x.flatten(0, len(lead)) for x in (q, k, v))
        cu_seqlens = _as_one(cu_seqlens, n)
    out, lse = torch.ops.nanovision.flash_attention(q, k, v, cu_seqlens, **static)
    if lead:
        out = out.unflatten(0, (*lead, n))
        if lse.ndim == 3:  # [examples * B, H, T]
            lse = lse.unflatten(0, (*lead, lse.shape[0] // lead.numel()))
        else:  # [H, examples * N]
            lse = lse.unflatten(1, (*lead, n)).movedim(0, -2)
    return out, (out.detach(), lse)


def backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    residuals: tuple[Tensor, Tensor],
    **static: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v (and none of the boundaries), with the same leading dimensions."""
    q, k, v, cu_seqlens = tensors
    out, lse = residuals
    lead, n = q.shape[:-3], q.shape[-3]
    if lead:
        grad, q, k, v, out = (x.flatten(0, len(lead)) for x in (grad, q, k, v, out))
        cu_seqlens = _as_one(cu_seqlens, n)
        dense = lse.ndim - len(lead) == 3
        lse = lse.flatten(0, len(lead)) if dense else lse.movedim(-2, 0).flatten(1)
    grads = torch.ops.nanovision.flash_attention_backward(
        grad, q, k, v, out, lse, cu_seqlens, **static
    )
    if lead:
        grads = (g.unflatten(0, (*lead, n)) for g in grads)
    return (*grads, None)


def _as_one(cu_seqlens: Tensor | None, n: int) -> Tensor | None:
    """Boundaries [..., S + 1] of examples of n tokens -> those of all; seams hold no tokens."""
    if cu_seqlens is None:
        return None
    rows = cu_seqlens.reshape(-1, cu_seqlens.shape[-1])
    starts = n * torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    return (rows + starts[:, None]).flatten()


def _backward_vmap(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    tensors, static = args[:7], args[7:]
    grad, q, k, v, out, lse, cu_seqlens = fold_all(info.batch_size, in_dims[:7], tensors)
    names = ("backend", "longest", "length", "causal", "window", "scale", "deterministic")
    grads = backward(
        grad,  # type: ignore[arg-type]
        (True,) * 4,
        (q, k, v, cu_seqlens),  # type: ignore[arg-type]
        (out, lse),  # type: ignore[arg-type]
        **dict(zip(names, static, strict=True)),
    )
    return tuple(g for g in grads if g is not None), (0, 0, 0)


torch.library.register_vmap("nanovision::flash_attention_backward", _backward_vmap, lib=LIBRARY)
