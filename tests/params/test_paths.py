import pytest

from params.paths import alias_table, matches, no_match, segment_aliases, select_paths

PATHS = [f"text.blocks.{i}.mlp.{n}.weight" for i in range(12) for n in ("up", "down")]
PATHS += ["text.embed.weight", "vision.patch_embed.weight", "vision.patch_embed.bias"]


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("vision", "vision.patch_embed.weight", True),
        ("patch_embed", "vision.patch_embed.weight", True),
        ("embed", "vision.patch_embed.weight", False),  # a segment, not a substring
        ("*embed", "vision.patch_embed.weight", True),
        ("blocks.0", "text.blocks.0.mlp", True),
        ("blocks.0", "text.blocks.10.mlp", False),
        ("blocks.1", "text.blocks.10.mlp", False),
        ("blocks.mlp", "text.blocks.0.mlp", False),  # contiguous
        ("blocks.*.mlp", "text.blocks.0.mlp", True),
        ("text.*.mlp", "text.blocks.0.mlp", False),  # a star is one segment
        ("mlp.*", "text.blocks.0.mlp", False),
        ("attn.[qk]", "text.blocks.0.attn.q", True),
        ("attn.[qk]", "text.blocks.0.attn.v", False),
        ("lm_head", "lm_head", True),
        ("LM_head", "lm_head", False),
        ("a.b.c", "a.b", False),
        ("", "a.b", False),
        ("blocks.", "text.blocks.0", False),
    ],
)
def test_a_pattern_is_a_run_of_segments(pattern, path, expected):
    assert matches(pattern, path) is expected


def test_negative_segments_count_from_the_end():
    aliases = {2: "-1"}
    assert matches("blocks.-1", "text.blocks.11.mlp", aliases)
    assert matches("text.blocks.-1.mlp", "text.blocks.11.mlp", aliases)
    assert not matches("blocks.-2", "text.blocks.11.mlp", aliases)
    assert not matches("blocks.-1", "text.blocks.11.mlp")
    assert matches("blocks.-[12]", "text.blocks.11.mlp", aliases)
    # only a pattern that starts with a minus sees the alias
    assert not matches("blocks.[!1]*", "text.blocks.11.mlp", aliases)
    # an alias belongs to its own segment
    assert not matches("mlp.-1", "text.blocks.11.mlp", aliases)


def test_aliases_of_a_tree_and_of_its_paths_agree():
    tree = {"a": {str(i): {"w": 0, "list": {"0": 1}} for i in range(12)}, "b": {"1": 1, "2": 2}}
    paths = [f"a.{i}.{n}" for i in range(12) for n in ("w", "list.0")] + ["b.1", "b.2"]
    table = alias_table(paths)
    assert table["a.11.list.0"] == {1: "-1", 3: "-1"}
    assert table["a.0.w"] == {1: "-12"}
    assert table["b.2"] == {}  # keys 1 and 2 are names, not a list
    assert {p: segment_aliases(tree, p) for p in paths} == table


def test_select_keeps_order_and_unites_patterns():
    assert select_paths(["vision", "blocks.-1.mlp.up", "blocks.0"], PATHS) == [
        "text.blocks.0.mlp.up.weight",
        "text.blocks.0.mlp.down.weight",
        "text.blocks.11.mlp.up.weight",
        "vision.patch_embed.weight",
        "vision.patch_embed.bias",
    ]
    assert select_paths("vision", PATHS) == PATHS[-2:]  # one pattern, not six letters
    assert select_paths([], PATHS) == []


def test_a_pattern_that_names_nothing_raises_with_what_there_is():
    with pytest.raises(ValueError, match=r"'mpl\.down' matches nothing; did you mean 'mlp\.down'"):
        select_paths(["vision", "mpl.down"], PATHS)
    with pytest.raises(ValueError, match=r"blocks\.\*\.mlp\.up\.weight, text") as error:
        select_paths(["blocks.12"], PATHS)
    assert str(error.value).count("mlp.up") == 1  # layers are folded into one line
    with pytest.raises(ValueError, match=r"did you mean 'mlp\.\*'"):
        select_paths("mpl.*", PATHS)
    with pytest.raises(ValueError, match="There are these params: none at all"):
        select_paths("x", [])


def test_the_list_of_what_there_is_stays_short():
    message = str(no_match("zzz", [f"leaf_{i}" for i in range(100)], what="sites"))
    assert "these sites: leaf_0, " in message
    assert message.endswith("leaf_11, ... (88 more)")
