"""Sites and rules: what is listed is what is reached, and every param passes one gather site."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core import Rule, TextConfig, VLMConfig, preset, vlm
from core.forward import Recorder
from params.tree import flatten, map_leaves

CONFIGS = ["text", "untied", "mlp", "resampler", "sincos"]


@pytest.mark.parametrize("name", CONFIGS)
def test_sites_listed_are_sites_reached(micro, rough, example, name: str) -> None:
    config = micro[name]
    forward, params, batch = vlm(config), rough(config), example(config)
    reached: Counter[tuple[str, str]] = Counter()

    def counting(kind: str) -> Rule:
        def wrap(f, path):
            def run(p, *args):
                reached[kind, path] += 1
                return f(p, *args)

            return run

        return Rule(kind, wrap)

    watched = forward
    for kind in sorted({site.kind for site in forward.sites}):
        watched = watched.with_rule(counting(kind))
    assert torch.equal(watched(params, batch), forward(params, batch))
    assert reached == Counter((site.kind, site.path) for site in forward.sites)
    recorder = Recorder({})
    forward.build(recorder)(params, batch)
    assert tuple(recorder.found) == forward.sites  # the same order, kinds, paths, outermost


@pytest.mark.parametrize("name", CONFIGS)
def test_every_leaf_enters_through_one_gather_site(micro, rough, example, name: str) -> None:
    """All params are NaN; the gather rule hands each outermost site its own from elsewhere."""
    config = micro[name]
    forward, params, batch = vlm(config), rough(config), example(config)
    flat = flatten(params)
    taken: Counter[str] = Counter()

    def supply(f, path):
        def run(p, *args):
            names = {leaf: f"{path}.{leaf}" for leaf in flatten(p)}
            taken.update(names.values())
            tree = map_leaves(lambda leaf: leaf, p)
            for leaf, full in names.items():
                *branches, last = leaf.split(".")
                node = tree
                for branch in branches:
                    node = node[branch]
                node[last] = flat[full]
            return f(tree, *args)

        return run

    supplied = forward.with_rule(Rule("gather", supply))
    blank = map_leaves(lambda leaf: torch.full_like(leaf, torch.nan), params)
    assert torch.equal(supplied(blank, batch), forward(params, batch))
    assert taken.keys() == flat.keys()
    twice = {leaf for leaf, times in taken.items() if times != 1}
    assert twice == ({"text.embed.weight"} if config.text.tied else set())
    assert taken["text.embed.weight"] == (2 if config.text.tied else 1)


def test_batches_without_pictures_skip_the_eye(micro, rough, example) -> None:
    config = micro["mlp"]
    params = rough(config)
    assert torch.equal(
        vlm(config)(params, example(micro["text"])),
        vlm(micro["text"])({"text": params["text"]}, example(micro["text"])),
    )


def adding(number: float):
    def wrap(f, path):
        return lambda p, *args: f(p, *args) * 2 + number

    return wrap


def test_later_rules_are_outer(micro, rough, example) -> None:
    config = micro["text"]
    bare, params, batch = vlm(config), rough(config), example(config)
    norm = ("text.norm",)

    def outcome(*numbers: float) -> torch.Tensor:
        forward = bare
        for number in numbers:
            forward = forward.with_rule(Rule("norm", adding(number), norm))
        return forward(params, batch)

    table = params["text"]["embed"]["weight"]
    hidden = torch.linalg.lstsq(table, bare(params, batch).mT).solution.mT
    want = ((hidden * 2 + 1) * 2 + 5) @ table.mT
    torch.testing.assert_close(outcome(1, 5), want, rtol=0, atol=1e-9)
    assert not torch.allclose(outcome(5, 1), want)


def test_a_forward_is_immutable(micro, rough, example) -> None:
    config = micro["text"]
    bare, params, batch = vlm(config), rough(config), example(config)
    before = bare(params, batch)
    changed = bare.with_rule(Rule("norm", adding(1))).with_step("test")
    assert not torch.equal(changed(params, batch), before)
    assert torch.equal(bare(params, batch), before)
    assert bare.rules == ()
    assert bare.applied == ()
    assert changed.applied == ("test",)
    with pytest.raises(AttributeError):
        bare.rules = changed.rules  # type: ignore[misc]


def test_calling_a_forward_changes_neither_params_nor_batch(micro, rough, example) -> None:
    config = micro["resampler"]
    params, batch = rough(config), example(config)
    kept = [{k: (v, v.clone()) for k, v in d.items()} for d in (flatten(params), batch)]
    vlm(config)(params, batch)
    for now, then in zip((flatten(params), batch), kept, strict=True):
        assert now.keys() == then.keys()
        for name, (tensor, copy) in then.items():
            assert now[name] is tensor
            assert torch.equal(tensor, copy)


@pytest.mark.parametrize(
    ("patterns", "paths"),
    [
        (("text.blocks.-1.mlp",), {f"text.blocks.1.mlp.{n}" for n in ("gate", "up", "down")}),
        (("vision.blocks.0.attn.[qk]",), {"vision.blocks.0.attn.q", "vision.blocks.0.attn.k"}),
        (("projector", "patch_embed"), {"projector.up", "projector.down", "vision.patch_embed"}),
        (("lm_head",), set()),  # a head, but no linear
        ((), set()),
    ],
)
def test_select(micro, patterns: tuple[str, ...], paths: set[str]) -> None:
    assert {s.path for s in vlm(micro["mlp"]).select(("linear",), patterns)} == paths


@pytest.mark.parametrize("name", ["text", "untied"])
def test_lm_head_names_the_head_tied_or_not(micro, name: str) -> None:
    (head,) = vlm(micro[name]).select(("head", "embed"), ("lm_head",))
    assert head.kind == "head"
    assert head.path == ("text.embed" if name == "text" else "text.lm_head")


def test_a_pattern_that_names_nothing_lists_what_there_is(micro) -> None:
    forward = vlm(micro["mlp"])
    with pytest.raises(ValueError, match=r"'visoin' matches nothing; did you mean 'vision'.*text"):
        forward.select(("linear",), ("vision", "visoin"))
    with pytest.raises(ValueError, match=r"blocks\.7.* matches nothing"):
        forward.with_rule(Rule("block", adding(0), ("blocks.7",)))
    with pytest.raises(ValueError, match="no site has kind 'layer'; kinds: embed, block"):
        forward.with_rule(Rule("layer", adding(0)))
    with pytest.raises(ValueError, match=r"linear .*text\.norm.* matches nothing"):
        forward.with_rule(Rule("linear", adding(0), ("text.norm",)))  # right path, wrong kind
    with pytest.raises(ValueError, match="matches nothing"):
        forward.with_rule(Rule("linear", adding(0), lambda site: False))


def test_explain_shows_every_site_its_params_and_rules(micro, rough) -> None:
    config = micro["untied"]
    forward = vlm(config).with_rule(Rule("norm", adding(1), ("text.norm",), "first"))
    forward = forward.with_rule(Rule("gather", adding(1), ("text.norm",), "second"))
    text = forward.with_step("numbers").explain(rough(config))
    head, columns, *rows = text.splitlines()
    assert head == "transforms, innermost first: numbers"
    assert columns.split()[:3] == ["kind", "path", "params"]
    assert [tuple(row.split()[:2]) for row in rows] == [(s.kind, s.path) for s in forward.sites]
    final = next(row for row in rows if row.startswith("norm") and "text.norm " in row)
    assert final.endswith("first > second")
    assert "weight [16]" in final
    assert sum("first" in row for row in rows) == 1
    assert "innermost first: none" in vlm(config).explain()


def test_prepare_runs_innermost_first(micro) -> None:
    calls = []
    forward = vlm(micro["text"])
    for name in ("inner", "outer"):
        step = lambda params, seed, name=name: calls.append((name, seed)) or {**params, name: seed}  # noqa: E731
        forward = forward.with_step(name, preparations=(*forward.preparations, step))
    assert forward.prepare({}, seed=3) == {"inner": 3, "outer": 3}
    assert calls == [("inner", 3), ("outer", 3)]


def test_building_a_large_model_makes_no_large_tensor() -> None:
    assert len(vlm(preset("text_8b")).sites) == 32 * 15 + 3


def test_many_layers_keep_their_order() -> None:
    """Twelve layers: key "10" must not run before "2"."""
    config = VLMConfig(TextConfig(11, 8, 12, 2, 1, 8))
    blocks = [s.path for s in vlm(config).sites if s.kind == "block"]
    assert blocks == [f"text.blocks.{i}" for i in range(12)]
    last = vlm(config).select(("block",), ("blocks.-1", "blocks.-12"))
    assert [s.path for s in last] == ["text.blocks.0", "text.blocks.11"]


def test_the_order_of_keys_does_not_matter(micro, rough, example) -> None:
    config = micro["mlp"]
    params, batch = rough(config), example(config)

    def backwards(tree):
        items = reversed(list(tree.items()))
        return {k: backwards(v) if isinstance(v, dict) else v for k, v in items}

    assert torch.equal(vlm(config)(backwards(params), batch), vlm(config)(params, batch))


def test_a_float_weight_that_is_missing_says_what_to_do(micro, rough, example) -> None:
    config = micro["text"]
    params = rough(config)
    params["text"]["embed"] = {"weight_int8": torch.zeros(1), "weight_scale": torch.zeros(1)}
    with pytest.raises(KeyError, match="the params were prepared by a transform"):
        vlm(config)(params, example(config))


def test_replacing_a_rule_keeps_the_sites(micro) -> None:
    forward = vlm(micro["text"])
    assert replace(forward, rules=()).sites is forward.sites


def test_asking_for_a_backend_does_not_stop_a_model_from_being_built(micro, monkeypatch) -> None:
    monkeypatch.setenv("NANOVISION_KERNELS", "attention=torch-varlen")
    assert vlm(micro["mlp"]).sites


class Additions(TorchDispatchMode):
    """How often two tensors of one shape are added."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[torch.Size] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            self.shapes[args[0].shape] += isinstance(args[1], torch.Tensor)
        return func(*args, **(kwargs or {}))


def test_no_residual_branch_leaves_an_addition_to_autograd(micro, rough, example) -> None:
    """The gradients of both branches meet inside the norm's backward, as those of the linear layers
    do; with a rule at the norms all of them are added one by one."""
    config = micro["text"]
    forward, batch = vlm(config), example(config)
    params = map_leaves(lambda leaf: leaf.requires_grad_(), rough(config))
    rule = Rule("norm", lambda f, path: lambda p, *args: f(p, *args))
    for model, least, most in ((forward, 0, 0), (forward.with_rule(rule), 5, 10)):
        loss = model(params, batch).square().sum()
        with Additions() as seen:
            loss.backward()
        stream = torch.Size((len(batch["tokens"]), config.text.dim))
        assert least <= seen.shapes[stream] / config.text.layers <= most
