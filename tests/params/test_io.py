import collections
import contextlib
import json
import os
import pickle
import shutil
import stat

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from params import (
    Leaf,
    flatten,
    init_params,
    load_metadata,
    load_params,
    save_params,
    unflatten,
)
from params.tree import ties


def bits(leaf):
    return leaf.contiguous().reshape(-1).view(torch.uint8)


def assert_same(a, b):
    a, b = flatten(a), flatten(b)
    assert set(a) == set(b)
    for path in a:
        assert (a[path].dtype, a[path].shape) == (b[path].dtype, b[path].shape), path
        assert torch.equal(bits(a[path]), bits(b[path])), path


def zoo():
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(6, 4, generator=g)
    return {
        "f32": torch.randn(3, 5, generator=g),
        "special": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "low": {
            "bf16": torch.randn(7, generator=g).bfloat16(),
            "f16": torch.randn(2, 3, generator=g).half(),
            "fp8": torch.randn(4, generator=g).to(torch.float8_e4m3fn),
        },
        "f64": torch.randn(2, generator=g, dtype=torch.float64),
        "c64": torch.randn(2, generator=g, dtype=torch.complex64),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "bool": torch.tensor([True, False]),
        "u8": torch.arange(5, dtype=torch.uint8),
        "linear": {
            "weight_int8": torch.randint(-127, 128, (4, 6), generator=g, dtype=torch.int8),
            "weight_scale": torch.rand(4, 1, generator=g),
        },
        "transposed": torch.randn(4, 6, generator=g).t(),
        "q": fused[:2],
        "kv": {"0": fused[2:4], "1": fused[4:]},
        "overlapping": fused[1:5],
        "learning": torch.nn.Parameter(torch.ones(2)),
    }


def blocks(n=6, size=256, start=0.0):
    """Leaves of ``4 * size`` bytes."""
    return {"blocks": {str(i): {"w": torch.full((size,), float(start + i))} for i in range(n)}}


# -- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2**32, 64])
def test_every_dtype_and_layout_comes_back_bit_for_bit(tmp_path, limit):
    params = zoo()
    written = save_params(params, tmp_path / "m.safetensors", max_shard_bytes=limit)
    assert written.name == ("m.safetensors" if limit > 64 else "m.safetensors.index.json")
    loaded = load_params(tmp_path / "m.safetensors", like=params)
    assert_same(loaded, params)
    assert not any(x.requires_grad for x in flatten(loaded).values())
    assert not list(tmp_path.glob("*.part"))


def test_the_order_of_keys_does_not_matter(tmp_path):
    a = save_params(blocks(12), tmp_path / "a.safetensors")
    turned = {"blocks": dict(reversed(blocks(12)["blocks"].items()))}
    b = save_params(turned, tmp_path / "b.safetensors")
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("limit", [2**32, 100])
def test_tied_leaves_are_stored_once_and_come_back_tied(tmp_path, limit):
    w = torch.randn(10, 10)
    params = {"text": {"embed": {"weight": w}, "lm_head": {"weight": w}}, "other": torch.ones(100)}
    written = save_params(params, tmp_path, metadata={"a": "b"}, max_shard_bytes=limit)
    assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) < 2 * 400 + 1000
    loaded = load_params(written, like=params, dtype=torch.bfloat16)
    assert ties(loaded) == {"text.lm_head.weight": "text.embed.weight"}
    assert loaded["text"]["embed"]["weight"] is loaded["text"]["lm_head"]["weight"]
    assert_same(load_params(written), params)
    assert load_metadata(written) == {"a": "b"}


def test_dtype_casts_floating_leaves_and_spares_scales(tmp_path):
    params = zoo()
    save_params(params, tmp_path)
    loaded = flatten(load_params(tmp_path, dtype=torch.bfloat16))
    for path, leaf in flatten(params).items():
        cast = leaf.is_floating_point() and path != "linear.weight_scale"
        expected = leaf.to(torch.bfloat16) if cast else leaf
        assert loaded[path].dtype == expected.dtype, path
        assert torch.equal(bits(loaded[path]), bits(expected)), path


def test_loaded_tensors_outlive_the_file_and_never_write_to_it(tmp_path):
    file = save_params(blocks(), tmp_path)
    before = file.read_bytes()
    loaded = load_params(file)
    for leaf in flatten(loaded).values():
        leaf += 1
    assert file.read_bytes() == before
    loaded = load_params(file)
    file.write_bytes(bytes(len(before)))  # in place, as cp does: a mapping of it would see zeros
    assert_same(loaded, blocks())


def test_device(tmp_path):
    save_params(blocks(), tmp_path)
    assert all(x.is_meta for x in flatten(load_params(tmp_path, device="meta")).values())


def test_metadata(tmp_path):
    meta = {"step": "12", "config": json.dumps({"ünï": 1})}
    one = save_params(blocks(), tmp_path / "one.safetensors", metadata=meta)
    many = save_params(blocks(), tmp_path / "m.safetensors", metadata=meta, max_shard_bytes=2048)
    assert load_metadata(one) == load_metadata(many) == meta
    assert load_metadata(save_params(blocks(), tmp_path / "none.safetensors")) == {}
    for bad, match in (({"step": 1}, "'step' is 1"), ({"format": "pt"}, "reserved")):
        with pytest.raises(ValueError, match=match):
            save_params(blocks(), tmp_path / "bad.safetensors", metadata=bad)
    assert not (tmp_path / "bad.safetensors").exists()


def test_like_may_be_a_spec(tmp_path):
    class Config:
        def param_spec(self):
            return {"w": Leaf((3, 4)), "norm": {"weight": Leaf((4,), "ones")}}

    params = init_params(Config())
    save_params(params, tmp_path)
    assert_same(load_params(tmp_path, like=Config().param_spec()), params)
    assert_same(load_params(tmp_path, like=init_params(Config(), device="meta")), params)


@pytest.mark.parametrize("limit", [2**32, 2048])
def test_files_are_readable_as_the_umask_says(tmp_path, limit):
    old = os.umask(0o027)
    try:
        save_params(blocks(), tmp_path, max_shard_bytes=limit)
    finally:
        os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o640}


# -- shards -----------------------------------------------------------------------------------


def test_shards_follow_the_layout_of_hugging_face(tmp_path):
    written = save_params(blocks(5), tmp_path, max_shard_bytes=2 * 1024)
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, written.name]
    index = json.loads(written.read_text())
    assert index["metadata"]["total_size"] == 5 * 1024
    assert index["weight_map"] == {f"blocks.{i}.w": names[i // 2] for i in range(5)}
    held = {k: v for n in names for k, v in load_file(tmp_path / n).items()}
    assert_same(unflatten(held), blocks(5))
    with safe_open(tmp_path / names[0], framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # without which transformers refuses it
    for path in (tmp_path, written, tmp_path / "model.safetensors"):
        assert_same(load_params(path), blocks(5))


def test_a_leaf_larger_than_a_shard_gets_one_to_itself(tmp_path):
    for sizes in ((10, 1000, 10), (1000, 10, 1000)):
        params = {name: torch.ones(n) for name, n in zip("abc", sizes, strict=True)}
        save_params(params, tmp_path, max_shard_bytes=100)
        assert len(list(tmp_path.glob("*.safetensors"))) == 3
        assert_same(load_params(tmp_path, like=params), params)


def test_replacing_a_checkpoint_leaves_nothing_of_the_old_one(tmp_path):
    expected = []
    for turn, limit in enumerate((2**32, 2048, 2048, 2048, 1024, 2**32, 2**32)):
        params = blocks(start=turn)
        written = save_params(params, tmp_path, max_shard_bytes=limit)
        assert_same(load_params(tmp_path, like=params), params)
        assert_same(load_params(tmp_path / "model.safetensors"), params)
        shards = {2**32: 0, 2048: 3, 1024: 6}[limit]
        assert len(list(tmp_path.iterdir())) == shards + 1
        expected.append(written.name)
    assert set(expected) == {"model.safetensors", "model.safetensors.index.json"}


@pytest.mark.parametrize("limits", [(2**32, 2**32), (2048, 2048), (2**32, 2048), (2048, 2**32)])
@pytest.mark.parametrize("survives", range(8))
def test_a_failure_at_any_write_keeps_the_old_checkpoint(tmp_path, monkeypatch, limits, survives):
    save_params(blocks(), tmp_path, max_shard_bytes=limits[0])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    left = [survives]

    def falter(fd):
        left[0] -= not stat.S_ISDIR(os.fstat(fd).st_mode)
        if left[0] < 0:
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.fsync", falter)
    writes = 1 if limits[1] > 2048 else 4
    if survives >= writes:
        save_params(blocks(start=9), tmp_path, max_shard_bytes=limits[1])
        assert_same(load_params(tmp_path), blocks(start=9))
        return
    with pytest.raises(OSError, match=r"cannot write .*model.safetensors: No space left"):
        save_params(blocks(start=9), tmp_path, max_shard_bytes=limits[1])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_checkpoint_killed_before_its_last_rename_is_the_old_one(tmp_path, monkeypatch):
    """As kill -9 leaves it: nothing is cleaned up, and the next save is none the worse."""
    save_params(blocks(), tmp_path, max_shard_bytes=2048)
    with monkeypatch.context() as m:
        m.setattr("pathlib.Path.replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        m.setattr("pathlib.Path.unlink", lambda *a, **k: None)
        with pytest.raises(KeyboardInterrupt):
            save_params(blocks(start=5), tmp_path, max_shard_bytes=2048)
    assert len(list(tmp_path.iterdir())) > 4
    assert_same(load_params(tmp_path), blocks())
    save_params(blocks(start=7), tmp_path, max_shard_bytes=2048)
    assert_same(load_params(tmp_path), blocks(start=7))
    assert len(list(tmp_path.iterdir())) == 4


# -- bad input --------------------------------------------------------------------------------


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.safetensors"):
        load_params(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file"):
        load_params(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_metadata(tmp_path / "x.safetensors.index.json")


def test_a_folder_of_several_checkpoints(tmp_path):
    for name in "ab":
        save_params(blocks(), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"name one of them: a\.safetensors, b\.safetensors"):
        load_params(tmp_path)
    save_params(blocks(start=1), tmp_path)  # model.safetensors is the one that is meant
    assert_same(load_params(tmp_path), blocks(start=1))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "b.safetensors").unlink()
    assert_same(load_params(tmp_path), blocks())


def test_truncated_files(tmp_path):
    whole = save_params(blocks(), tmp_path / "m.safetensors").read_bytes()
    for kept in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "m.safetensors").write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"m\.safetensors is not a safetensors .*truncated"):
            load_params(tmp_path / "m.safetensors")


@pytest.mark.parametrize("limit", [2**32, 2048])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, limit):
    """In the leaves and the header alike; or it changed nothing that is read."""
    params = blocks()
    save_params(params, tmp_path, max_shard_bytes=limit, metadata={"step": "3"})
    random = np.random.default_rng(0)
    found = 0
    for turn in range(60):
        files = sorted(tmp_path.iterdir())
        file = files[turn % len(files)]
        whole = file.read_bytes()
        broken = bytearray(whole)
        broken[random.integers(len(whole) if turn % 3 else 400)] ^= 1 << random.integers(8)
        file.write_bytes(broken)
        with contextlib.suppress(ValueError, OSError):
            assert_same(load_params(tmp_path), params)
            found -= 1
        found += 1
        file.write_bytes(whole)
    assert found > 45


def test_a_checksum_is_compared_unless_told_otherwise(tmp_path):
    path = save_params({"w": torch.ones(3)}, tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"\xbf")  # -1 at the end
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .* checksum"):
        load_params(path)
    assert load_params(path, verify=False)["w"].tolist() == [1, 1, -1]


def test_foreign_files(tmp_path):
    path = tmp_path / "m.safetensors"
    for content in (b"\x89PNG\r\n\x1a\n" + b"x" * 99, b'{"a": 1}' * 9, whole_of_other_header()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"m\.safetensors is not .*another format"):
            load_params(path)


def whole_of_other_header():
    return (20).to_bytes(8, "little") + b'{"a": "not a tensor"}'


def test_pickles_are_named_and_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"w": torch.ones(3), "x": Bomb()}, tmp_path / "zip.safetensors")
    (tmp_path / "old.safetensors").write_bytes(pickle.dumps(Bomb()))
    for name in ("zip", "old"):
        with pytest.raises(ValueError, match="pickle, which is never loaded"):
            load_params(tmp_path / f"{name}.safetensors")
    assert not (tmp_path / "exploded").exists()


def test_an_index_that_names_a_missing_shard(tmp_path):
    index = save_params(blocks(), tmp_path, max_shard_bytes=2048)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"index.json names 3 .* 1 are missing: model-00002"
    ):
        load_params(index)


def test_a_shard_that_lacks_a_leaf_or_is_truncated(tmp_path):
    index = save_params(blocks(), tmp_path, max_shard_bytes=2048)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors is not"):
        load_params(index)
    save_file({"other": torch.ones(1)}, shard)
    with pytest.raises(ValueError, match=r"index\.json places blocks\.2\.w in model-00002"):
        load_params(index)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/hosts"}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {}, "metadata": [1]}',
        "\udcff",
        "[" * 100_000,
    ],
)
def test_broken_indices(tmp_path, content):
    index = tmp_path / "m.safetensors.index.json"
    index.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"m\.safetensors\.index\.json is not an index of shards"):
        load_params(tmp_path / "m.safetensors")


@pytest.mark.parametrize("tied", ["{", "[]", '{"b": "none"}', '{"a": "a"}', '{"b": ["a"]}'])
def test_broken_ties(tmp_path, tied):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"nanovision.tied": tied})
    with pytest.raises(ValueError, match=r"broken metadata nanovision\.tied"):
        load_params(path)


def test_params_that_differ_from_like(tmp_path):
    path = save_params(blocks(), tmp_path)
    with pytest.raises(ValueError, match=r"missing: blocks\.6\.w, blocks\.7\.w$"):
        load_params(path, like=blocks(8))
    with pytest.raises(ValueError, match=r"unexpected: blocks\.1\.w, .*blocks\.4\.w and 1 more$"):
        load_params(path, like=blocks(1))
    with pytest.raises(ValueError, match=r"another shape: blocks\.0\.w \[256\] \(not \[255\]\)"):
        load_params(path, like=blocks(size=255))
    int8 = {"blocks": {"0": {"w_int8": torch.ones(2, 2)}}}
    with pytest.raises(
        ValueError, match=r"m.* missing: blocks\.0\.w_int8; unexpected: blocks\.0\.w"
    ):
        load_params(path, like=int8)


def test_a_dtype_that_params_cannot_have(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be torch\.int8"):
        load_params(save_params(blocks(), tmp_path), dtype=torch.int8)


def test_foreign_safetensors_load(tmp_path):
    save_file({"model.layers.0.w": torch.ones(3)}, tmp_path / "x.safetensors", {"format": "pt"})
    loaded = load_params(tmp_path)
    assert_same(loaded, {"model": {"layers": {"0": {"w": torch.ones(3)}}}})
    assert load_metadata(tmp_path) == {}


@pytest.mark.parametrize("names", [("a", "a.b"), ("a..b",), ("",)])
def test_names_that_make_no_tree(tmp_path, names):
    save_file({name: torch.ones(1) for name in names}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"m\.safetensors holds no tree of params: "):
        load_params(tmp_path)


@pytest.mark.parametrize("kept", [1, 2])
def test_shards_whose_index_was_never_written_are_no_model(tmp_path, kept):
    """A first save, killed: one shard on its own must not pass for the whole."""
    save_params(blocks(), tmp_path, max_shard_bytes=2048).unlink()
    for shard in sorted(tmp_path.iterdir())[kept:]:
        shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shards \(model-00001-of-00003\.safe.* but no \*"):
        load_params(tmp_path)
    save_params(blocks(), tmp_path / "other.safetensors")
    assert_same(load_params(tmp_path), blocks())  # leftovers of one do not hide another


def test_leaves_and_paths_that_cannot_be_saved(tmp_path):
    for bad in (3.0, None, torch.eye(2).to_sparse()):
        with pytest.raises(ValueError, match=r"a\.b is not a dense tensor"):
            save_params({"a": {"b": bad}}, tmp_path)
    with pytest.raises(ValueError, match="b is on the meta device"):
        save_params({"a": torch.ones(1), "b": torch.ones(1, device="meta")}, tmp_path)
    with pytest.raises(ValueError, match=r"no dtype for .*complex128"):
        save_params({"a": torch.ones(1, dtype=torch.complex128)}, tmp_path)
    with pytest.raises(ValueError, match=r"model\.pt: name a \.safetensors file"):
        save_params(blocks(), tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 2**20 + 6 * 1024 - 1))
    with pytest.raises(OSError, match=r"cannot write .*m.safetensors: .* GB free and it takes"):
        save_params(blocks(), tmp_path / "new" / "m.safetensors")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 2**20 + 6 * 1024))
    assert_same(load_params(save_params(blocks(), tmp_path / "new" / "m.safetensors")), blocks())


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"cannot write .*file/m\.safetensors: .*/file is not a folder"
    ):
        save_params(blocks(), tmp_path / "file" / "m.safetensors")

    def refuse(*args, **kwargs):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr("params.files.write_tensors", refuse)
    with pytest.raises(PermissionError, match=r"cannot write .*model\.safetensors: Permission"):
        save_params(blocks(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"cannot write .*ermission"):
        save_params(blocks(), tmp_path)
    tmp_path.chmod(0o700)
