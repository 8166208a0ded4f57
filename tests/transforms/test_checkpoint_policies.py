"""What each policy keeps: the number of matmuls and attentions that are computed again."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from core import Rule, VLMConfig, vlm
from core.batch import stack_examples
from params.tree import flatten, map_leaves
from tests.rounding import FP32, FP64
from transforms import checkpoint, fuse_loss, offload, rematerialize, value_and_grad

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    # vmap over torch's CPU flash kernel loops
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

Fn = Callable[..., Any]
FORWARD = {"aten.mm", "aten.addmm", "aten.bmm"}
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"


class Ops(TorchDispatchMode):
    """How often each operation is really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def dots(self) -> int:
        return sum(n for op, n in self.count.items() if op in FORWARD)

    @property
    def attentions(self) -> int:
        return self.count[ATTENTION]


# A block of four matmuls with weights and one attention, in whose backward every output is needed.


def block(p: dict[str, Tensor], x: Tensor) -> Tensor:
    h = torch.tanh(x)
    q, k, v = (torch.tanh(h @ p[name]).unflatten(-1, (2, -1)).transpose(-2, -3) for name in "qkv")
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2)
    return x + torch.tanh(torch.tanh(o) @ p["o"])


BLOCKS, DOTS = 3, 4


def loss(f: Fn, params: list[dict[str, Tensor]], x: Tensor) -> Tensor:
    for p in params:
        x = f(p, x)
    return x.square().sum()


def inputs() -> tuple[list[dict[str, Tensor]], Tensor]:
    generator = torch.Generator().manual_seed(0)
    make = partial(torch.randn, generator=generator, dtype=torch.float64)
    return [{name: make(8, 8) / 3 for name in "qkvo"} for _ in range(BLOCKS)], make(1, 5, 8)


def by_autograd(f: Fn, params: Any, x: Tensor) -> Any:
    leaves = [{k: t.clone().requires_grad_() for k, t in p.items()} for p in params]
    flat = [t for p in leaves for t in p.values()]
    return torch.autograd.grad(loss(f, leaves, x), flat)


def directional(f: Fn, params: Any, x: Tensor) -> Any:
    """A Hessian-vector product, forward over reverse."""
    along = [map_leaves(torch.cos, p) for p in params]
    return jvp(lambda p: grad(partial(loss, f))(p, x), (params,), (along,))[1]


DRIVERS: dict[str, Fn] = {
    "autograd": by_autograd,
    "grad": lambda f, p, x: grad(partial(loss, f))(p, x),
    "vmap of grad": lambda f, p, x: vmap(grad(partial(loss, f)), (None, 0))(
        p, torch.stack([x, x.flip(1)])
    ),
    "grad of vmap": lambda f, p, x: grad(
        lambda q: vmap(partial(loss, f), (None, 0))(q, torch.stack([x, x.flip(1)])).sum()
    )(p),
}

# matmuls and attentions that a block computes again
AGAIN = {
    "nothing": (DOTS, 1),
    "dots": (0, 1),
    "attention": (DOTS, 0),
    ("dots", "attention"): (0, 0),
}
AS_FUNCTION = {"only o": (DOTS - 1, 1)}


def test_again_names_every_policy() -> None:
    from transforms.checkpoint import POLICIES

    assert {*AGAIN} == {*POLICIES, ("dots", "attention")} - {"offload"}


@pytest.mark.parametrize("policy", AGAIN, ids=str)
@pytest.mark.parametrize("driver", DRIVERS)
def test_what_is_computed_again(driver: str, policy: Any) -> None:
    params, x = inputs()
    run = DRIVERS[driver]
    with Ops() as bare:
        want = run(block, params, x)
    with Ops() as saving:
        got = run(rematerialize(block, policy), params, x)
    dots, attentions = AGAIN[policy]
    extra = saving.dots - bare.dots
    # the last matmul of a block is not needed again if only its input's gradients are asked for
    assert BLOCKS * max(0, dots - 1) <= extra <= BLOCKS * dots, (extra, saving.count, bare.count)
    assert bare.attentions > 0
    assert saving.attentions - bare.attentions == bare.attentions * attentions
    for a, b in zip(tree(got), tree(want), strict=True):
        torch.testing.assert_close(a, b, rtol=FP64, atol=FP64)


def tree(out: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(out)


def test_a_function_of_names() -> None:
    """It is asked about every operation, by name."""
    params, x = inputs()
    seen: set[str] = set()

    def keep(op: str) -> bool:
        seen.add(op)
        return op == "aten.tanh"

    for driver in ("autograd", "grad", "vmap of grad"):
        seen.clear()
        with Ops() as bare:
            want = DRIVERS[driver](block, params, x)
        with Ops() as saving:
            got = DRIVERS[driver](rematerialize(block, keep), params, x)
        assert saving.count["aten.tanh"] == bare.count["aten.tanh"]
        assert saving.dots > bare.dots
        assert {"aten.tanh", ATTENTION} <= seen
        for a, b in zip(tree(got), tree(want), strict=True):
            torch.testing.assert_close(a, b, rtol=FP64, atol=FP64)


@pytest.mark.parametrize("policy", AGAIN, ids=str)
def test_higher_derivatives_are_right_whatever_is_kept(policy: Any) -> None:
    """With plain attention, which has them."""

    def plain(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = torch.tanh(x)
        q, k, v = (torch.tanh(h @ p[name]) for name in "qkv")
        return x + torch.softmax(q @ k.mT, -1) @ v @ p["o"]

    params, x = inputs()
    kept = rematerialize(plain, policy)
    for run in (
        directional,
        lambda f, p, x: hessian(lambda w: loss(f, [{**p[0], "q": w}, *p[1:]], x))(p[0]["q"]),
        lambda f, p, x: grad(lambda q: grad(partial(loss, f))(q, x)[0]["o"].square().sum())(p),
        lambda f, p, x: jacfwd(lambda w: loss(f, [{**p[0], "q": w}, *p[1:]], x))(p[0]["q"]),
    ):
        for a, b in zip(tree(run(kept, params, x)), tree(run(plain, params, x)), strict=True):
            torch.testing.assert_close(a, b, rtol=FP64, atol=FP64)


@pytest.mark.parametrize("seen", [True, False])
def test_outputs_that_change_in_place_are_kept_as_they_were(seen: bool) -> None:
    """``seen``: by PyTorch's own count of changes, which ends at the view behind a 3-D product."""

    def clamped(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = torch.tanh(x).flatten(0, -2 if seen else 0) @ (p["q"] + p["k"] * p["v"])
        h.clamp_(-0.3, 0.3)
        h.mul_(2)
        return x + (h * h).view(x.shape) @ p["o"]

    params, x = inputs()
    for run in (by_autograd, directional):
        got = run(rematerialize(clamped, "dots"), params, x)
        for a, b in zip(tree(got), tree(run(clamped, params, x)), strict=True):
            torch.testing.assert_close(a, b, rtol=FP64, atol=FP64)


@pytest.mark.parametrize("policy", AGAIN, ids=str)
def test_compiled(policy: Any) -> None:
    torch._dynamo.reset()
    params, x = inputs()
    want = by_autograd(block, params, x)
    f = rematerialize(block, policy)

    @partial(torch.compile, backend="aot_eager", fullgraph=True)
    def run(p: Any, x: Tensor) -> Tensor:
        return loss(f, p, x)

    leaves = [{k: t.clone().requires_grad_() for k, t in p.items()} for p in params]
    flat = [t for p in leaves for t in p.values()]
    for a, b in zip(torch.autograd.grad(run(leaves, x), flat), want, strict=True):
        torch.testing.assert_close(a, b, rtol=FP64, atol=FP64)


@pytest.mark.parametrize("policy", AGAIN, ids=str)
def test_the_model(micro, rough, example, assert_same, policy: Any) -> None:
    """Padded attention is one operation to a policy, on the native model too."""
    config = micro["mlp"]
    params, batch, forward = rough(config, dtype=torch.float32), example(config), vlm(config)
    want, want_grads = value_and_grad(fuse_loss(forward))(params, batch)
    with Ops() as bare:
        value_and_grad(fuse_loss(forward))(params, batch)
    with Ops() as saving:
        value, grads = value_and_grad(fuse_loss(checkpoint(forward, policy=policy)))(params, batch)
    assert torch.equal(value, want)
    assert_same(grads, want_grads, 0)
    calls = bare.count["nanovision.padded_attention"]
    assert calls == 4
    again = saving.count["nanovision.padded_attention"] - calls
    assert again == calls * AGAIN[policy][1]
    stacked = stack_examples([batch, batch])
    with kernels.override(attention="plain"):
        each = vmap(grad(fuse_loss(checkpoint(forward, policy=policy))), (None, 0))(params, stacked)
    for path, g in flatten(each).items():
        torch.testing.assert_close(g[0], flatten(want_grads)[path], rtol=FP32, atol=FP32)


def test_unknown_policies_are_refused(micro) -> None:
    forward = vlm(micro["text"])
    with pytest.raises(ValueError, match=r"no policy 'dot': there are nothing, dots, attention"):
        checkpoint(forward, policy="dot")
    with pytest.raises(ValueError, match="only dots and attention go together"):
        checkpoint(forward, policy=("dots", "offload"))


@pytest.mark.parametrize("driver", ["grad", "jvp", "vmap of grad"])
def test_a_captured_tensor_is_an_error(driver: str) -> None:
    x = torch.randn(3)

    def captures(p: Tensor, x: Tensor) -> Tensor:
        return rematerialize(lambda y: (y * p).tanh())(x + p).sum()

    runs = {
        "grad": lambda: grad(captures)(torch.ones(3), x),
        "jvp": lambda: jvp(lambda p: captures(p, x), (torch.ones(3),), (torch.ones(3),)),
        "vmap of grad": lambda: vmap(grad(captures), (None, 0))(torch.ones(3), torch.stack([x, x])),
    }
    with pytest.raises(RuntimeError, match="captured by closure"):
        runs[driver]()


def test_a_captured_tensor_is_followed_by_plain_autograd() -> None:
    p, x = torch.ones(3, requires_grad=True), torch.randn(3)
    rematerialize(lambda y: (y * p).tanh())(x).sum().backward()
    torch.testing.assert_close(p.grad, x * (1 - x.tanh() ** 2))


def test_a_captured_constant_is_no_error() -> None:
    """Made inside of the differentiated function, but of nothing that is differentiated."""

    def loss(p: Tensor) -> Tensor:
        constant = torch.arange(3.0).cos()
        return rematerialize(lambda y: (y * constant).tanh())(p).sum()

    p = torch.ones(3)
    c = torch.arange(3.0).cos()
    torch.testing.assert_close(grad(loss)(p), c * (1 - c.tanh() ** 2))


# -- offload: on a CPU nothing moves, so that the moves are counted instead


@pytest.fixture
def moves(monkeypatch) -> list[Tensor]:
    kept: list[Tensor] = []

    def to_host(x: Tensor) -> Any:
        if x.is_leaf:
            return x
        kept.append(x)
        return x.device, x.clone()

    monkeypatch.setattr(offload, "_to_host", to_host)
    monkeypatch.setattr(offload, "_to_device", lambda k: k if isinstance(k, Tensor) else k[1])
    return kept


def test_offload_moves_the_inputs_of_blocks_and_no_params(
    micro, rough, example, assert_same, moves: list[Tensor]
) -> None:
    config = micro["text"]
    params, batch, forward = rough(config), example(config), vlm(config)
    want = value_and_grad(fuse_loss(forward))(params, batch)[1]
    got = value_and_grad(fuse_loss(checkpoint(forward, policy="offload")))(params, batch)[1]
    assert_same(got, want, 0)
    n = batch["tokens"].shape[0]
    assert [tuple(x.shape) for x in moves] == [(n, config.text.dim)] * config.text.layers


def test_offload_is_for_eager_autograd(micro, rough, example) -> None:
    config = micro["text"]
    loss_fn = fuse_loss(checkpoint(vlm(config), policy="offload"))
    with pytest.raises(RuntimeError, match=r"offload.*torch.func does not take"):
        grad(loss_fn)(rough(config), example(config))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"offload.*torch.compile does not take"):
        torch.compile(loss_fn, backend="eager", fullgraph=True)(rough(config), example(config))


def test_a_policy_for_the_blocks_in_between(micro, rough, example, assert_same) -> None:
    """every=2 recomputes the first and third of four blocks whole, and the others' attention."""
    config = VLMConfig(dataclasses.replace(micro["text"].text, layers=4))
    params, batch = rough(config), example(config)
    bare, counts = fuse_loss(vlm(config)), {}
    _, want = value_and_grad(bare)(params, batch)
    for name, options in {
        "none": None,
        "every 2nd": {"every": 2},
        "between": {"every": 2, "between": "dots"},
        "all": {},
    }.items():
        loss = bare if options is None else fuse_loss(checkpoint(vlm(config), **options))
        with Ops() as ops:
            _, grads = value_and_grad(loss)(params, batch)
        assert_same(grads, want)
        counts[name] = ops.count["aten.mm"] + ops.count["aten.addmm"]
    assert counts["none"] < counts["every 2nd"] == counts["between"] < counts["all"]
    norms = forward_norms(params, batch, config)
    assert norms["none"] < norms["every 2nd"] < norms["between"] == norms["all"]


def forward_norms(params: Any, batch: Any, config: VLMConfig) -> dict[str, int]:
    """How often a norm inside of a block is computed by a value and its gradient."""
    counts = {}
    for name, options in {
        "none": None,
        "every 2nd": {"every": 2},
        "between": {"every": 2, "between": "dots"},
        "all": {},
    }.items():
        seen: list[str] = []

        def wrap(f: Fn, path: str, seen: list[str] = seen) -> Fn:
            seen.append(path)
            return f

        forward = vlm(config).with_rule(Rule("norm", wrap))
        loss = fuse_loss(forward if options is None else checkpoint(forward, **options))
        value_and_grad(loss)(params, batch)
        counts[name] = len(seen)
    return counts
