"""The bare module under plain autograd: what every cell of the matrix is held against.

Transforms that change numbers are, for the oracle, a module with other weights: rounded ones, or
ones with adapters added in. A rule that misses a use of a weight is then a wrong number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.foreign.families import Batch, Family
from tests.rounding import ulps

Named = dict[str, Tensor]
ROUNDED = ulps(torch.float32, 16)  # of the largest entry, beside the noise
ULP = {
    torch.float64: 2.0**-24,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def loss_of(out: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy where there are labels; else a projection that treats no two numbers alike."""
    out = out if out.dtype == torch.float64 else out.float()
    if "labels" in batch:
        return F.cross_entropy(out.flatten(0, -2), batch["labels"].flatten())
    weights = torch.cos(torch.arange(out.numel(), device=out.device, dtype=out.dtype))
    return (out * weights.view(out.shape)).sum() / out.numel() ** 0.5


@dataclass
class Result:
    """What a module gives: output, loss, its gradients by name, those of what is frozen apart."""

    out: Tensor
    loss: Tensor
    grads: Named
    of_frozen: Named = field(default_factory=dict)


@dataclass
class Oracle:
    """Results of the bare module, each computed once.

    dtype: fp64 where the module can compute in it at all, else fp32.
    """

    family: Family
    known: dict[Any, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        if "dtype" not in self.known:
            self.known["dtype"] = torch.float64
            try:
                self.result()
            except (RuntimeError, TypeError, ValueError):
                self.known["dtype"] = torch.float32
        return self.known["dtype"]

    def result(
        self,
        key: str = "plain",
        weights: Mapping[str, Tensor] | None = None,
        *,
        batch: Batch | None = None,
        dtype: torch.dtype | None = None,
        train: bool = False,
        attn: str | None = None,
        seed: int = 0,
        noise: int = 0,
    ) -> Result:
        """Output, loss and gradients, with these weights in place of the module's own.

        key: what tells weights and batch apart from others'; seed: of the batch; noise: above 0,
        every parameter is moved by about one rounding of the dtype, with numbers of this seed.
        """
        dtype = dtype or self.dtype
        full = (key, dtype, train, attn, seed, noise)
        if full in self.known:
            return self.known[full]
        module = self.family.fresh(dtype, train=train, attn=attn)
        batch = self.family.batch(seed, dtype) if batch is None else batch
        with torch.no_grad():
            generator = torch.Generator().manual_seed(noise)
            for name, p in module.named_parameters():
                p.copy_((weights or {}).get(name, p))
                if noise and p.is_floating_point():
                    p *= 1 + ULP[dtype] * torch.randn(p.shape, generator=generator).to(dtype)
        params = dict(module.named_parameters())
        frozen = [n for n, p in params.items() if not p.requires_grad]
        module.requires_grad_()
        torch.manual_seed(7)
        out = self.family.run(module, batch)
        loss = loss_of(out, batch)
        grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
        named = dict(zip(params, grads, strict=True))
        frozen = {n: named.pop(n) for n in frozen}
        self.known[full] = Result(out.detach(), loss.detach(), named, frozen)
        return self.known[full]

    def autocast(self, seed: int = 0) -> Result | None:
        """The fp32 module under PyTorch's own mixed precision; None if it cannot."""
        if ("autocast", seed) not in self.known:
            module = self.family.fresh()
            batch = self.family.batch(seed)
            learned = {n: p for n, p in module.named_parameters() if p.requires_grad}
            try:
                with torch.autocast("cpu", torch.bfloat16):
                    out = self.family.run(module, batch)
                loss = loss_of(out, batch)
                grads = torch.autograd.grad(loss, list(learned.values()), materialize_grads=True)
                named = dict(zip(learned, grads, strict=True))
                self.known["autocast", seed] = Result(out.detach(), loss.detach(), named)
            except (RuntimeError, TypeError, ValueError):
                self.known["autocast", seed] = None
        return self.known["autocast", seed]

    def noise(self, **given: Any) -> Result:
        """How far results move if every parameter moves by one rounding."""
        key = ("noise", *sorted((k, str(v)) for k, v in given.items() if k != "batch"))
        if key not in self.known:
            base = self.result(**given)
            moved = [self.result(**given, noise=i) for i in (1, 2)]
            self.known[key] = Result(
                torch.stack([(m.out - base.out).abs().max() for m in moved]).max(),
                torch.stack([(m.loss - base.loss).abs() for m in moved]).max(),
                {
                    n: torch.stack([(m.grads[n] - g).abs().max() for m in moved]).max()
                    for n, g in base.grads.items()
                },
            )
        return self.known[key]

    # -- drivers --

    def pure(self, module: nn.Module) -> Callable[[Named, Batch], Tensor]:
        """The bare module as a function of its parameters, for torch.func."""

        def loss(params: Named, batch: Batch) -> Tensor:
            bound: Any = _Bound(module, params)
            return loss_of(self.family.run(bound, batch), batch)

        return loss

    def bare(self, driver: str) -> str | None:
        """What the bare module says under a driver; None if it can."""
        if ("bare", driver) not in self.known:
            attn = "eager" if driver == "hvp" and self.family.other_attention else None
            module = self.family.fresh(self.dtype, attn=attn)
            params = {n: p.detach() for n, p in module.named_parameters()}
            batch = self.family.batch(0, self.dtype)
            loss = self.pure(module)
            runs: dict[str, Callable[[], Any]] = {
                "grad": lambda: grad(loss)(params, batch),
                "vmap": lambda: vmap(grad(loss), (None, 0))(params, self.stacked()),
                "hvp": lambda: jvp(
                    lambda p: grad(loss)(p, batch),
                    (params,),
                    ({n: torch.cos(p) for n, p in params.items()},),
                ),
                "compile": lambda: self.compiled(),
            }
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    runs[driver]()
                said = None
            except Exception as error:  # whatever the module says
                said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self.known["bare", driver] = said
        return self.known["bare", driver]

    def compiled(self) -> None:
        torch._dynamo.reset()
        module = self.family.fresh(self.dtype)
        params = list(module.parameters())
        batch = self.family.batch(0, self.dtype)
        run = torch.compile(lambda b: self.family.run(module, b), backend="aot_eager")
        loss_of(run(batch), batch).backward()
        assert params

    def stacked(self) -> Batch:
        batches = [self.family.batch(seed, self.dtype) for seed in (0, 1)]
        return {k: torch.stack([b[k] for b in batches]) for k in batches[0]}

    def hvp(self, attn: str | None) -> Named:
        """The Hessian times cos(parameters), by two backward passes or, where torch has no second
        one, by a central difference of gradients."""
        if "hvp" not in self.known:
            try:
                self.known["hvp"] = self._twice(attn)
                self.known["hvp error"] = 1.0
            except RuntimeError:
                self.known["hvp"] = self._difference()
                self.known["hvp error"] = 1e5
        return self.known["hvp"]

    def _twice(self, attn: str | None) -> Named:
        module = self.family.fresh(self.dtype, attn=attn)
        batch = self.family.batch(0, self.dtype)
        learned = {n: p for n, p in module.named_parameters() if p.requires_grad}
        with sdpa_kernel([SDPBackend.MATH]):
            loss = loss_of(self.family.run(module, batch), batch)
            grads = torch.autograd.grad(
                loss, list(learned.values()), create_graph=True, materialize_grads=True
            )
            slope = torch.stack(
                [(g * p.detach().cos()).sum() for g, p in zip(grads, learned.values(), strict=True)]
            ).sum()
            second = torch.autograd.grad(slope, list(learned.values()), materialize_grads=True)
        return dict(zip(learned, second, strict=True))

    def _difference(self) -> Named:
        step = 1e-4 if self.dtype == torch.float64 else 1e-2
        own = {n: p.detach() for n, p in self.family.fresh(self.dtype).named_parameters()}
        up, down = (
            self.result(f"moved {s}", {n: p + s * step * p.cos() for n, p in own.items()}).grads
            for s in (1, -1)
        )
        return {n: (up[n] - down[n]) / (2 * step) for n in up}


class _Bound:
    """A module that holds other tensors while it is called."""

    def __init__(self, module: nn.Module, params: Named) -> None:
        self.module, self.params = module, params
        self.forward, self.modules = module.forward, module.modules

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.module, self.params, args, kwargs)


# -- comparing ------------------------------------------------------------------------------------


class WrongError(AssertionError):
    """A cell's number, dtype or size is not what it should be."""


class BareFailsError(Exception):
    """The bare module gives no number there either."""


def compare(
    what: str,
    got: Tensor,
    want: Tensor,
    noise: Tensor | float,
    rtol: float = ROUNDED,
    floor: float = 0,
) -> None:
    """Within 64 times the noise of the bare module and rtol of the largest entry; NaN is wrong.

    floor: the size that counts where ``want`` is smaller.
    """
    if got.shape != want.shape:
        raise WrongError(f"{what}: shape {list(got.shape)}, not {list(want.shape)}")
    if not want.isfinite().all():
        raise BareFailsError(f"{what}: the bare module's is not finite")
    error = float((got.double() - want.double()).abs().max()) if want.numel() else 0.0
    size = max(float(want.double().abs().max()) if want.numel() else 0.0, floor)
    limit = 64 * float(noise) + rtol * size
    if not error <= limit:
        raise WrongError(f"{what}: off by {error:.3g} of {size:.3g}, allowed {limit:.3g}")


def compare_grads(
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    noise: Mapping[str, Tensor | float],
    rtol: float = ROUNDED,
    what: str = "gradient of",
) -> None:
    if missing := sorted(want.keys() - got.keys()):
        raise WrongError(f"{what}: none for {missing[:3]}")
    if extra := sorted(n for n in got.keys() - want.keys() if got[n].any()):
        raise WrongError(f"{what}: given to frozen {extra[:3]}")
    largest = max((float(g.abs().max()) for g in want.values() if g.numel()), default=0.0)
    for name, g in want.items():
        most = max(map(float, noise.values()), default=0.0)
        at = max(float(noise[name]), 1e-2 * most) if name in noise else most
        compare(f"{what} {name}", got[name], g, at, rtol, 1e-2 * largest)
