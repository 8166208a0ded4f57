import pytest
import torch

from params.tree import (
    count,
    flatten,
    map_leaves,
    map_with_path,
    merge,
    num_bytes,
    partition,
    select,
    ties,
    unflatten,
)

TREE = {"text": {"blocks": {"0": {"w": 1}, "1": {"w": 2}}, "norm": 3}, "vision": {"w": 4}}
FLAT = {"text.blocks.0.w": 1, "text.blocks.1.w": 2, "text.norm": 3, "vision.w": 4}


def test_flatten_and_back():
    assert flatten(TREE) == FLAT
    assert unflatten(FLAT) == TREE
    assert unflatten(dict(reversed(FLAT.items()))) == TREE
    assert flatten({}) == unflatten({}) == {}


@pytest.mark.parametrize("key", ["a.b", "", 3])
def test_flatten_refuses_keys_that_are_no_names(key):
    with pytest.raises(ValueError, match="is not a name"):
        flatten({"x": {key: 1}})


@pytest.mark.parametrize("flat", [{"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}, {"a": 1, "a.b.c": 2}])
def test_unflatten_refuses_a_leaf_that_is_a_branch(flat):
    with pytest.raises(ValueError, match="leaf"):
        unflatten(flat)


def test_maps():
    assert flatten(map_leaves(lambda x: -x, TREE)) == {p: -x for p, x in FLAT.items()}
    reordered = {"vision": TREE["vision"], "text": TREE["text"]}
    total = map_leaves(lambda a, b, c: a + b * c, TREE, reordered, TREE)
    assert flatten(total) == {p: x + x * x for p, x in FLAT.items()}
    assert flatten(map_with_path(lambda p, x: (p, x), TREE)) == {p: (p, x) for p, x in FLAT.items()}


@pytest.mark.parametrize(
    ("other", "where"),
    [({"a": {"c": 1}}, "'a'"), ({"b": 1}, "root"), ({"a": 1}, "'a'"), ({"a": {"b": {}}}, "a.b")],
)
def test_maps_refuse_trees_that_differ(other, where):
    with pytest.raises(ValueError, match=where):
        map_leaves(lambda a, b: a, {"a": {"b": 1}}, other)


def test_partition_and_merge_are_inverse():
    chosen, rest = partition(TREE, ["blocks.-1", "vision"])
    assert chosen == {"text": {"blocks": {"1": {"w": 2}}}, "vision": {"w": 4}}
    assert rest == {"text": {"blocks": {"0": {"w": 1}}, "norm": 3}}
    assert merge(chosen, rest) == merge(rest, chosen) == TREE
    assert select(TREE, "vision") == {"vision": {"w": 4}}
    assert partition(TREE, ["text", "vision"]) == (TREE, {})
    with pytest.raises(ValueError, match="did you mean 'vision'"):
        partition(TREE, ["vison"])


def test_merge_refuses_clashes():
    with pytest.raises(ValueError, match=r"text\.norm is in more than one"):
        merge(TREE, {"text": {"norm": 5}})
    with pytest.raises(ValueError, match="leaf"):
        merge(TREE, {"text": {"norm": {"w": 5}}})


def test_inputs_stay_as_they_are():
    before = flatten(TREE)
    merged = merge(*partition(TREE, ["vision"]))
    merged["text"]["norm"] = 0
    map_leaves(lambda x: 0, TREE)["vision"]["w"] = 9
    assert flatten(TREE) == before


def test_count_and_bytes():
    tree = {"a": torch.zeros(3, 4), "b": {"c": torch.zeros((), dtype=torch.bfloat16)}}
    assert count(tree) == 13
    assert num_bytes(tree) == 50
    assert num_bytes({"a": torch.zeros(1, 4).expand(3, 4)}) == 48


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ties_are_leaves_with_the_very_same_memory(device):
    w = torch.empty(4, 4, device=device)
    tree = {"b": {"w": w}, "a": w.detach(), "row": w[0], "t": w.t(), "x": torch.empty_like(w)}
    assert ties(tree) == {"b.w": "a"}


def test_tree_functions_trace_without_a_graph_break():
    tree = {"a": {"0": torch.randn(3), "1": torch.randn(3)}, "b": torch.randn(3)}

    def f(tree):
        tree = map_with_path(lambda p, x: x * 2 if p == "b" else x, unflatten(flatten(tree)))
        tree = map_leaves(torch.add, merge({"a": tree["a"]}, {"b": tree["b"]}), tree)
        return sum(x.sum() * (i + 1) for i, x in enumerate(flatten(tree).values()))

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tree), f(tree))
