from __future__ import annotations

import importlib
import itertools
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runners.data.encode.encoder import Encoder
from runners.data.encode.images import Augment, ImageSpec
from runners.data.encode.tokenizer import ChatTokenizer
from runners.data.feeding.columns import results_of
from runners.data.feeding.loader import Loader
from runners.data.feeding.workers import Workers, pickled_job
from runners.data.packing.collate import Batch
from runners.data.packing.plan import PackSpec
from runners.data.sources.llava import Llava
from runners.data.sources.shapes import Shapes
from runners.data.sources.text import TextFiles
from runners.data.types import Conversation, Turn
from runners.shell import process, wire
from runners.shell.errors import UserError
from runners.shell.wire import Gone

WriteLlava = Callable[..., Path]


@pytest.fixture
def spec(images: ImageSpec, tokenizer: ChatTokenizer) -> PackSpec:
    return PackSpec(
        row_len=256,
        rows=2,
        max_docs=8,
        max_images=16,
        max_patches=256,
        images=images,
        vocab_size=tokenizer.vocab_size,
    )


def same(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def take(loader: Loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def documents_of(batch: Batch) -> list[tuple[int, ...]]:
    """The tokens of every document of a batch, padding left out."""
    bounds = itertools.pairwise(batch["cu_seqlens"].tolist())
    found = [tuple(batch["tokens"][start:end].tolist()) for start, end in bounds if start < end]
    return [tokens for tokens in found if set(tokens) != {0}]


def augmented(tokenizer: ChatTokenizer, images: ImageSpec) -> Encoder:
    return Encoder(tokenizer, images, max_tokens=256, augment=Augment(crop=0.3, colour=0.2))


def test_workers_change_nothing(
    tokenizer: ChatTokenizer, images: ImageSpec, spec: PackSpec, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(wire, "MOST", 7)  # some batches stay in shared memory, some do not
    source, encode = Shapes(size=32, length=150), augmented(tokenizer, images)
    made = [
        take(Loader(source, encode, spec, seed=1, augment=True, workers=workers), 20)
        for workers in (0, 1, 3)
    ]
    assert all(len(batches) == 20 for batches in made)  # over several epochs
    for one, two, three in zip(*made, strict=True):
        assert same(one, two)
        assert same(one, three)
    assert not same(made[0][0], made[0][1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restored_loader_gives_the_identical_next_batches(
    tokenizer: ChatTokenizer, images: ImageSpec, spec: PackSpec, workers: int
):
    source, encode = Shapes(size=32, length=90), augmented(tokenizer, images)

    def loader() -> Loader:
        return Loader(source, encode, spec, seed=5, augment=True, workers=workers, window=40)

    whole = loader()
    batches, states = [], [whole.state_dict()]
    for batch in itertools.islice(whole, 14):
        batches.append(batch)
        states.append(json.loads(json.dumps(whole.state_dict())))
    whole.close()
    assert states[-1]["epoch"] >= 1
    for at in (0, 1, 6, 7, 11) if workers == 0 else (6,):
        restored = loader()
        restored.load_state_dict(states[at])
        again = take(restored, 3)
        restored.close()
        assert all(same(a, b) for a, b in zip(again, batches[at : at + 3], strict=True))
        assert restored.state_dict() == states[at + 3]
        assert len(json.dumps(states[at])) < 4000


def test_an_iteration_left_goes_on_with_the_next_batch(encoder: Encoder, spec: PackSpec):
    source = Shapes(size=32)
    whole = take(Loader(source, encoder, spec), 6)
    for workers in (0, 1):
        loader = Loader(source, encoder, spec, workers=workers)
        pieces = take(loader, 2) + take(loader, 3) + take(loader, 1)
        loader.close()
        assert all(same(a, b) for a, b in zip(pieces, whole, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_was_started_hands_out_what_it_began(
    encoder: Encoder, spec: PackSpec, workers: int
):
    whole = take(Loader(Shapes(size=32), encoder, spec), 3)
    loader = Loader(Shapes(size=32), encoder, spec, workers=workers)
    loader.start()
    begun = loader._running
    before = loader.state_dict()
    batches = iter(loader)
    assert batches is begun
    assert loader.state_dict() == before  # until a batch is handed out
    pieces = [next(batches), next(batches), *take(loader, 1)]  # the second iter begins anew
    assert loader._running is not begun
    loader.close()
    assert all(same(a, b) for a, b in zip(pieces, whole, strict=True))


def test_a_started_loader_makes_batches_before_they_are_asked_for(
    started: list[process.Process], encoder: Encoder, spec: PackSpec
):
    loader = Loader(Shapes(size=32), encoder, spec, workers=1)
    loader.start()
    readable, _, _ = select.select([started[0].link], [], [], 60)
    assert readable  # a batch lies there
    loader.close()


def test_a_loader_closed_amid_its_start_ends(
    started: list[process.Process], encoder: Encoder, spec: PackSpec
):
    """Its job is larger than a socket takes before the other end reads."""
    source = Shapes(size=32)
    source.burden = b"0" * 2**24
    loader = Loader(source, encoder, spec, workers=1)
    loader.start()
    loader.close()
    assert_all_ended(started[0])


def test_a_loader_that_was_started_ends_unused(
    started: list[process.Process], encoder: Encoder, spec: PackSpec
):
    loader = Loader(Shapes(size=32), encoder, spec, workers=1)
    loader.start()
    (packer,) = started
    assert packer.popen.poll() is None
    loader.close()
    assert_all_ended(packer)


def test_a_state_of_other_settings_is_refused(encoder: Encoder, spec: PackSpec):
    loader = Loader(Shapes(size=32, length=90), encoder, spec)
    state = loader.state_dict()
    with pytest.raises(UserError, match="records=90, this run records=91"):
        Loader(Shapes(size=32, length=91), encoder, spec).load_state_dict(state)
    with pytest.raises(UserError, match="seed=0, this run seed=3"):
        Loader(Shapes(size=32, length=90), encoder, spec, seed=3).load_state_dict(state)
    with pytest.raises(UserError, match="seed=None"):
        loader.load_state_dict({})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_pass_holds_every_document_once(encoder: Encoder, spec: PackSpec, workers: int):
    source = Shapes(size=32, split="val", length=101)
    loader = Loader(source, encoder, spec, repeat=False, shuffle=False, workers=workers, window=30)
    batches = list(loader)
    found = [tokens for batch in batches for tokens in documents_of(batch)]
    expected = [tuple(encoder(source[i])[0].tokens.tolist()) for i in range(101)]
    assert sorted(found) == sorted(expected)
    assert {batch["tokens"].shape for batch in batches} == {(512,)}
    again = list(loader)
    assert len(again) == len(batches)
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))


def test_the_end_of_a_full_pass_can_be_resumed(encoder: Encoder, spec: PackSpec):
    def loader() -> Loader:
        return Loader(Shapes(size=32, length=60), encoder, spec, repeat=False, window=30)

    whole, states, batches = loader(), [], []
    for batch in whole:
        states.append(whole.state_dict())
        batches.append(batch)
    for at, state in enumerate(states):
        restored = loader()
        restored.load_state_dict(state)
        rest = list(restored)
        assert len(rest) == len(batches) - at - 1
        assert all(same(a, b) for a, b in zip(rest, batches[at + 1 :], strict=True))


def test_packing_is_counted_and_logged(
    encoder: Encoder, spec: PackSpec, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    loader = Loader(Shapes(size=32, length=200), encoder, spec, repeat=False)
    batches = list(itertools.takewhile(lambda _: loader.stats.documents < 100, loader))
    stats = loader.stats
    assert stats.rows == 2 * (len(batches) + 1)
    assert stats.room == 256 * stats.rows
    assert 0.9 < stats.fill <= 1
    list(loader)
    assert "Sequence packing: 200 -> " in caplog.text
    assert "sequences (fill 9" in caplog.text


def test_epochs_differ_and_each_is_a_permutation(encoder: Encoder, spec: PackSpec):
    loader = Loader(Shapes(size=32, length=40), encoder, spec, seed=2)
    order = [index for _, index in itertools.islice(loader.stream.requests(0, 0), 120)]
    epochs = [order[start : start + 40] for start in (0, 40, 80)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[0])
    assert [i for _, i in itertools.islice(loader.stream.requests(1, 7), 33)] == epochs[1][7:]


def test_shards_part_the_items(encoder: Encoder, spec: PackSpec):
    source = Shapes(size=32, length=31)
    loaders = [Loader(source, encoder, spec, repeat=False, shard=(r, 3)) for r in range(3)]
    parts = [[i for _, i in loader.stream.requests(0, 0)] for loader in loaders]
    assert sorted(itertools.chain(*parts)) == list(range(31))
    with pytest.raises(UserError, match=r"2 records, too few for 3 process"):
        Loader(Shapes(length=2), encoder, spec, shard=(0, 3))
    with pytest.raises(ValueError, match="shard="):
        Loader(source, encoder, spec, shard=(3, 3))


def test_augmentation_changes_with_the_epoch(
    tokenizer: ChatTokenizer, images: ImageSpec, spec: PackSpec
):
    source = Shapes(size=32, length=8)
    encode = augmented(tokenizer, images)
    loader = Loader(source, encode, spec, shuffle=False, augment=True, window=1)
    plain = Loader(source, encode, spec, shuffle=False, window=1)
    changed, unchanged = take(loader, 9), take(plain, 9)
    pictures = {batch["patches"].numpy().tobytes() for batch in changed}
    assert len(pictures) == 9
    assert len({batch["patches"].numpy().tobytes() for batch in unchanged}) < 9


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_pictures_are_skipped_up_to_one_percent(
    write_llava: WriteLlava,
    tmp_path: Path,
    encoder: Encoder,
    spec: PackSpec,
    workers: int,
    caplog: pytest.LogCaptureFixture,
):
    path = write_llava(200)
    for number in (5, 77):
        (tmp_path / f"images/{number}.png").write_bytes(b"damaged")
    loader = Loader(Llava(path, check=0), encoder, spec, repeat=False, workers=workers)
    found = [tokens for batch in loader for tokens in documents_of(batch)]
    assert len(found) == 198
    assert "Skipped 1 records so far (picture unreadable)" in caplog.text
    (tmp_path / "images/9.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="3 of 200 records cannot be used, more than 1%"):
        list(loader)


def test_skips_are_part_of_the_state(
    write_llava: WriteLlava, tmp_path: Path, encoder: Encoder, spec: PackSpec
):
    path = write_llava(200)
    (tmp_path / "images/5.png").write_bytes(b"damaged")
    source = Llava(path, check=0)
    loader = Loader(source, encoder, spec, shuffle=False, window=20)
    take(loader, 2)
    assert loader.stats.skipped == {"picture unreadable": 1}
    assert loader.state_dict()["stats"]["bad"] == 1
    other = Loader(source, encoder, spec, shuffle=False, window=20)
    other.load_state_dict(loader.state_dict())
    waiting = loader.state_dict()["waiting"]
    (tmp_path / f"images/{waiting[0][1]}.png").unlink()
    with pytest.raises(UserError, match="data has changed since the run was saved"):
        take(other, 1)


def test_long_answers_are_cut_with_a_counted_warning(
    write_llava: WriteLlava, encoder: Encoder, spec: PackSpec, caplog: pytest.LogCaptureFixture
):
    def change(records: list[Any]) -> None:
        for record in records[:12]:
            record["conversations"][3]["value"] = "long " * 400
        records[12]["conversations"][0]["value"] = "<image>" + "long " * 400

    source = Llava(write_llava(20, change))
    loader = Loader(source, encoder, spec, repeat=False, shuffle=False)
    found = [tokens for batch in loader for tokens in documents_of(batch)]
    assert sorted(map(len, found))[-12:] == [256] * 12
    assert len(found) == 19
    assert "Truncated 1 documents" in caplog.text
    assert "Truncated 10 documents" in caplog.text
    assert "Skipped 1 records so far (answer beyond the row)" in caplog.text


def test_data_of_which_nothing_is_left_ends_the_run(
    write_llava: WriteLlava, tokenizer: ChatTokenizer, images: ImageSpec, spec: PackSpec
):
    source = Llava(write_llava(4))
    short = Encoder(tokenizer, images, max_tokens=5)
    for repeat in (True, False):
        with pytest.raises(UserError, match=r"None of the 4 records .*4 answer beyond the row"):
            list(Loader(source, short, spec, repeat=repeat))


def test_pictures_over_the_budget_end_the_run(encoder: Encoder, images: ImageSpec):
    small = PackSpec(256, 1, 8, max_images=1, max_patches=8, images=images)
    with pytest.raises(UserError, match="budget of 1 pictures and 8 patches"):
        take(Loader(Shapes(size=32, length=50), encoder, small), 1)


def test_long_texts_come_in_rows(tmp_path: Path, tokenizer: ChatTokenizer):
    text = "\n".join(f"line {i} of many" for i in range(3000))
    (tmp_path / "a.txt").write_text(text)
    source = TextFiles([tmp_path])
    encode, spec = Encoder(tokenizer, max_tokens=128), PackSpec(128, 2, 4)
    batches = list(Loader(source, encode, spec, repeat=False, shuffle=False))
    pieces = [tokens for batch in batches for tokens in documents_of(batch)]
    assert "".join(map(tokenizer.decode, pieces)) == text
    half = Loader(source, encode, spec, repeat=False, shuffle=False)
    take(half, 20)
    rest = Loader(source, encode, spec, repeat=False, shuffle=False)
    rest.load_state_dict(half.state_dict())
    assert all(same(a, b) for a, b in zip(rest, batches[20:], strict=True))


def test_mistakes_in_workers_come_out_here(
    write_llava: WriteLlava, tokenizer: ChatTokenizer, spec: PackSpec
):
    blind = Encoder(tokenizer, max_tokens=256)
    with pytest.raises(UserError, match="no vision part"):
        take(Loader(Llava(write_llava(3)), blind, spec, workers=1), 1)


class Mine:
    """A source that the workers cannot import, as one defined in a user's script."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Conversation:
        return Conversation("mine", self.turns(index))

    def turns(self, index: int) -> tuple[Turn, ...]:
        return (Turn("user", "?"), Turn("assistant", "!"))


def test_sources_of_the_script_itself_need_no_workers(
    encoder: Encoder, spec: PackSpec, monkeypatch: pytest.MonkeyPatch
):
    take(Loader(Mine(), encoder, spec, workers=0), 1)
    monkeypatch.setattr(Mine, "__module__", "__main__")
    with pytest.raises(UserError, match="use workers=0"):
        take(Loader(Mine(), encoder, spec, workers=1), 1)
    monkeypatch.setattr(Mine, "__module__", "gone")
    monkeypatch.setitem(sys.modules, "gone", sys.modules[__name__])
    with pytest.raises(RuntimeError, match="No module named 'gone'"):
        take(Loader(Mine(), encoder, spec, workers=1), 1)


def test_a_worker_that_dies_is_reported(encoder: Encoder):
    workers = Workers(2, pickled_job(Shapes(size=32), encoder, None))
    try:
        requests = ((0, index) for index in range(1000))
        results = workers.feed(requests)
        assert next(results)[0] == (0, 0)
        workers._processes[1].popen.kill()
        with pytest.raises(
            UserError, match=r"Data worker 1 was killed by SIGKILL \(process \d+; .*memory"
        ):
            list(results)
    finally:
        workers.close()


def test_signals_that_end_a_run_are_left_to_its_owner():
    """From the first moment on; SIGKILL is told by name."""
    link, popen = process.start("runners.data.feeding.worker")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        popen.send_signal(number)
    link.send(pickle.dumps((Shapes(size=32), len, None)))
    link.send([])
    assert results_of(*link.receive()) == []
    popen.terminate()
    link.send([])
    assert results_of(*link.receive()) == []
    popen.kill()
    with pytest.raises(Gone):
        link.receive()
    assert process.how_it_ended(popen).startswith(f"was killed by SIGKILL (process {popen.pid}; ")
    process.close([process.Process(link, popen)])


def test_processes_end_with_their_owner_while_they_start():
    code = """
    import os
    from runners.shell import process
    started = [process.start("runners.data.feeding.worker", group=i == 0) for i in range(3)]
    print(*[popen.pid for _, popen in started], flush=True)
    os.kill(os.getpid(), 9)
    """
    begin = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )  # when the last process ends that may write
    assert time.monotonic() - begin < 20
    assert (ended.returncode, ended.stderr) == (-9, "")
    for pid in map(int, ended.stdout.split()):
        assert (
            not Path(f"/proc/{pid}/cmdline").exists()
            or not Path(f"/proc/{pid}/cmdline").read_bytes()
        )  # gone, or a zombie that nobody waits for


def test_more_workers_than_could_help_are_refused(
    encoder: Encoder, spec: PackSpec, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("runners.data.feeding.workers.cores", lambda: 2)
    Loader(Shapes(size=32), encoder, spec, workers=8)
    with pytest.raises(UserError, match="9 workers are too many: 8 are 4 for each of the 2 cores"):
        Loader(Shapes(size=32), encoder, spec, workers=9)


def test_a_system_without_room_for_a_process_is_named(monkeypatch: pytest.MonkeyPatch):
    def full(*args: object, **keywords: object) -> None:
        raise BlockingIOError(11, os.strerror(11))

    monkeypatch.setattr(subprocess, "Popen", full)
    with pytest.raises(
        UserError, match=r"runners\.data\.feeding\.worker \(Resource temp.*fewer workers"
    ):
        process.start("runners.data.feeding.worker")


def test_workers_end_when_closed(encoder: Encoder):
    workers = Workers(2, pickled_job(Shapes(size=32), encoder, None))
    processes = [popen for _, popen in workers._processes]
    assert all(process.poll() is None for process in processes)
    workers.close()
    assert [process.returncode for process in processes] == [0, 0]


@pytest.fixture
def deadly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Makes a source, importable by workers, whose 60th item does what it is told."""

    def make(deed: str) -> Any:
        (tmp_path / "deadly.py").write_text(
            textwrap.dedent(f"""
            import os, time
            from runners.data.sources.shapes import Shapes
            class Deadly(Shapes):
                def __getitem__(self, index):
                    if index == 60:
                        {deed}
                    return super().__getitem__(index)
            """)
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "deadly", raising=False)
        return importlib.import_module("deadly").Deadly(size=32)

    return make


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[process.Process]:
    """The packers that tests start, each the leader of the group of its workers."""
    found: list[process.Process] = []
    start = process.start

    def noted(module: str, **options: bool) -> process.Process:
        found.append(start(module, **options))
        return found[-1]

    monkeypatch.setattr(process, "start", noted)
    return found


def assert_all_ended(packer: process.Process) -> None:
    assert packer.popen.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(packer.popen.pid, 0)


def test_a_worker_killed_amid_a_run_is_reported(
    deadly: Callable[[str], Any], started: list[process.Process], encoder: Encoder, spec: PackSpec
):
    source = deadly("os.kill(os.getpid(), 9)")
    loader = Loader(source, encoder, spec, shuffle=False, workers=2, window=10)
    begin = time.monotonic()
    with pytest.raises(
        UserError, match=r"Data worker 1 was killed by SIGKILL \(process \d+; .*memory"
    ):
        list(loader)
    assert time.monotonic() - begin < 20
    assert_all_ended(started[0])


def test_an_ended_packer_is_reported(
    started: list[process.Process], encoder: Encoder, spec: PackSpec
):
    loader = Loader(Shapes(size=32), encoder, spec, workers=1)
    batches = iter(loader)
    next(batches)
    started[0].popen.kill()
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"The data packer was killed by SIGKILL"):
        list(batches)
    assert time.monotonic() - begin < 20


def test_nothing_is_left_after_close(
    deadly: Callable[[str], Any], started: list[process.Process], encoder: Encoder, spec: PackSpec
):
    loader = Loader(Shapes(size=32), encoder, spec, workers=2)
    kept = take(loader, 3)[0]
    loader.close()
    assert started[0].popen.returncode == 0
    assert_all_ended(started[0])
    assert same(kept, take(Loader(Shapes(size=32), encoder, spec), 1)[0])
    # Nor when a worker does not come back from an item.
    source = deadly("time.sleep(600)")
    loader = Loader(source, encoder, spec, shuffle=False, workers=2, window=10)
    take(loader, 2)
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 20
    assert_all_ended(started[1])


def test_a_batch_stays_as_it_is_for_as_long_as_a_part_of_it_is_held(
    encoder: Encoder, spec: PackSpec
):
    loader = Loader(Shapes(size=32), encoder, spec, workers=1)
    batches = iter(loader)
    held = next(batches)["patches"][3:90]
    copy = held.clone()
    addresses = {next(batches)["tokens"].data_ptr() for _ in range(12)}
    assert torch.equal(held, copy)
    assert len(addresses) < 6  # memory is used again
    loader.close()


def test_other_processes_do_without_torch():
    modules = "runners.data.feeding.packer, runners.data.feeding.worker"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("False\n", "")


@pytest.mark.parametrize(("end", "status"), [("", 0), ("import os; os.kill(os.getpid(), 9)", -9)])
def test_a_script_may_end_without_closing(tmp_path: Path, end: str, status: int):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        from runners.data.encode.encoder import Encoder
        from runners.data.feeding.loader import Loader
        from runners.data.packing.plan import PackSpec
        from runners.data.encode.images import ImageSpec
        from runners.data.sources.shapes import Shapes
        from runners.data.encode.tokenizer import train_tokenizer
        images = ImageSpec(8, 32)
        encode = Encoder(train_tokenizer(["words"]), images, max_tokens=512)
        spec = PackSpec(512, 1, 9, max_images=9, max_patches=144, images=images)
        batches = iter(Loader(Shapes(size=32), encode, spec, workers=2))
        print(next(batches)["tokens"].shape, flush=True)
        """)
        + end
    )
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,  # the output ends when the last process does that inherited it
    )
    assert (ended.returncode, ended.stderr) == (status, "")
    assert "torch.Size([512])" in ended.stdout
