"""`bench train`, on a CPU: rungs, documents, figures, and what happens where a rung fails."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import runners.training.compose
import transforms
from core import PRESETS
from core.batch import IGNORE
from core.config import VLMConfig
from runners.bench import run
from runners.benchmarks import peers, steps, training
from runners.benchmarks.clock import CpuClock, DeviceLostError
from runners.benchmarks.documents import PAD, Documents, batches_of, draw_documents
from runners.benchmarks.ladder import TOPS, ladder, rung_configs
from runners.benchmarks.steps import Entry, Measured, Ready, StepPace, bench, measure_round
from runners.benchmarks.training import Programs, TrainBenchConfig
from runners.shell.cli import UsageError
from runners.shell.errors import UserError
from runners.training.compose import is_compiled, is_graphed
from runners.training.config import TrainConfig, flags_of
from runners.training.flops import measure_load

MICRO = (
    "text.dim=32",
    "text.layers=2",
    "text.heads=4",
    "text.kv_heads=2",
    "text.mlp_dim=48",
    "text.vocab_size=128",
    "text.qkv_bias=true",
    "text.qk_norm=false",
)
SMALL = TrainBenchConfig(
    preset="tiny", override=MICRO, rows=2, length=32, steps=2, warmup=1, rounds=2, loaded=0.0
)
QUIET = Console(quiet=True)
TEXT = VLMConfig(PRESETS["tiny"].text)


def no_ceilings(clock: object) -> dict:
    return {"copy": 1e12, "bf16": 1e14, "int8": 1e14}


def measured(config: TrainBenchConfig) -> list[dict]:
    assert bench(config, CpuClock(), "bench train", QUIET, no_ceilings) == 0
    lines = (Path(config.out) / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# -- rungs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
def test_rungs_differ_by_the_flags_they_name_and_by_nothing_else(ragged: bool) -> None:
    start = TrainConfig()
    made = rung_configs(ladder(8, ragged), start)
    for plan in made.values():
        rung = plan.rung
        named = {name for name in rung.changes if name != "packed"}
        if rung.parent is None:
            before, packed = start, True
        else:
            before, packed = made[rung.parent].config, made[rung.parent].packed
        differing = {
            name for name, value in flags_of(plan.config).items() if flags_of(before)[name] != value
        }
        assert differing <= named, rung.key
        assert flags_of(plan.config, named) == {name: rung.changes[name] for name in named}
        if rung.parent is not None:
            assert differing == named, f"{rung.key} names what it does not change"
            assert (plan.packed != packed) == ("packed" in rung.changes)
            assert len(rung.changes) == 1 or rung.key in (
                "graph",
                "checkpoint",
                "checkpoint_half",
                "bf16_checkpoint",
                "fp8",
            )
    assert ("packing" in made) == ("padded" in made) == ragged
    assert all(plan.packed or ragged for plan in made.values())


def test_without_packing_its_children_stand_on_its_parent() -> None:
    with_it, without = ({rung.key: rung for rung in ladder(8, ragged)} for ragged in (True, False))
    assert set(with_it) - set(without) == {"packing", "padded"}
    assert (with_it["flash"].parent, without["flash"].parent) == ("packing", "adamw")
    for key in set(without) - {"flash"}:
        assert without[key].parent == with_it[key].parent
    assert "padded" in with_it["baseline"].flags()
    assert "row" not in without["baseline"].flags()


def test_the_top_of_the_ladder_is_what_the_trainer_does_by_default() -> None:
    """On a GPU: what is None there by default."""
    plan = rung_configs(ladder(8, True), TrainConfig())[TOPS[0]]
    gpu, default = torch.device("cuda"), TrainConfig().changed(dtype="bf16", device_batch_size=8)
    chosen = {
        "compile": is_compiled(default.speed, gpu),
        "cuda_graph": is_graphed(default.speed, gpu),
    }
    assert plan.config == default.changed(**chosen)
    assert plan.packed
    for key in ("fp8", "checkpoint"):
        made = rung_configs(ladder(8, True), TrainConfig())[key].config
        assert made.speed.compile == is_compiled(made.changed(compile=None).speed, gpu)


def test_phases_come_in_order_and_every_parent_before_its_child() -> None:
    seen: set[str | None] = {None}
    for rung in ladder(8, True):
        assert rung.parent in seen
        seen.add(rung.key)
    phases = [rung.phase for rung in ladder(8, True)]
    assert list(dict.fromkeys(phases)) == ["baseline", "phase 1", "phase 2", "phase 3", "beyond"]


def test_rungs_share_programs_where_only_the_optimizer_differs() -> None:
    model = TEXT
    programs = Programs(model, torch.device("cpu"))
    made = rung_configs(ladder(2, False, graphs=False), SMALL.start)
    shared = {key: programs.shared(key, plan) for key, plan in made.items()}
    assert {key: owner for key, owner in shared.items() if owner} == {
        "adamw": "compile",
        "bf16_states": "blocks",
        "bf16_checkpoint": "checkpoint",
        "fp8_bf16": "fp8",
        "muon": "blocks",
        "adamw8bit": "blocks",
    }


# -- documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("packed", "at_once"), [(True, 1), (True, 4), (False, 1), (False, 4)])
def test_real_tokens_are_counted_right_whether_padded_or_packed(packed: bool, at_once: int) -> None:
    documents = draw_documents(4, 256, 0.7)
    batches, bounds = batches_of(documents, 97, at_once, packed)
    naive = sum(int((batch["tokens"] != PAD).sum()) for batch in batches)
    assert naive == documents.tokens == documents.load.tokens
    labels = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
    assert labels == sum(length - 1 for length in documents.lengths)
    loads = [measure_load(TEXT, batch, PAD) for batch in batches]
    found = sorted(int(length) for load in loads for length in load.documents)
    assert found == sorted(documents.lengths)  # attention sees each document alone
    rows = len(documents.rows) if packed else len(documents.lengths)
    per_row = documents.row_len if packed else documents.padded_len()
    assert bounds.max_seqlen == per_row
    computed = sum(len(batch["tokens"]) for batch in batches)  # padding included
    assert computed == -(-rows // at_once) * at_once * per_row


def test_padded_and_packed_hold_the_same_tokens() -> None:
    documents = draw_documents(3, 128, 1.0)
    words = []
    for packed in (False, True):
        batches, _ = batches_of(documents, 1000, 2, packed)
        tokens = torch.cat([batch["tokens"] for batch in batches])
        words.append(tokens[tokens != PAD])
    assert torch.equal(*words)


def test_lengths_are_drawn_as_said() -> None:
    documents = draw_documents(64, 2048, 0.7)
    assert documents == draw_documents(64, 2048, 0.7)
    assert max(documents.lengths) <= 2048
    mean = documents.tokens / len(documents.lengths)
    assert 0.85 < mean / 512 < 1.1  # the mean of about 256 draws, each with a deviation of 0.8 mean
    assert documents.tokens / (64 * 2048) > 0.98  # packed nearly full
    assert max(documents.lengths) <= documents.padded_len() < max(documents.lengths) + 8


def test_padded_rows_at_once_take_as_many_tokens_as_packed_ones() -> None:
    documents = Documents(((96, 90) * 10,) * 2 + ((91,) * 7,), 2048)  # 47 of 96 when padded
    assert documents.rows_at_once(8, True) == 8
    assert documents.rows_at_once(1, False) == 1
    assert documents.rows_at_once(3, False) == 47  # up to 64
    assert documents.rows_at_once(2, False) == 24  # up to 42: twice 24
    wide = Documents(((1900,), (1500, 500), (1000, 1000)), 2048)
    assert wide.rows_at_once(2, False) == 2
    assert wide.rows_at_once(3, False) == 3


def test_full_rows_are_one_document_each() -> None:
    documents = draw_documents(3, 40, 0.0)
    assert documents == Documents(((40,),) * 3, 40)
    (batch,), bounds = batches_of(documents, 50, 3, True)
    assert batch["cu_seqlens"].tolist() == [0, 40, 80, 120]
    assert bounds.max_seqlen == 40
    assert documents.tokens == int((batch["tokens"] != PAD).sum()) == 120


# -- figures --------------------------------------------------------------------------------------


def test_every_rung_is_measured_and_written(tmp_path: Path, uncompiled: None) -> None:
    rows = measured(replace(SMALL, out=str(tmp_path), lengths=0.6))
    assert [row["key"] for row in rows] == [rung.key for rung in ladder(2, True, graphs=False)]
    by_key = {row["key"]: row for row in rows}
    optional = {"fp8", "fp8_bf16", "adamw8bit"}  # a CPU has no fp8, and few have bitsandbytes
    for key, row in by_key.items():
        assert row["status"] == "ok" or key in optional, row["reason"]
        if row["status"] == "ok":
            assert len(row["samples"]) == 4
            assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["ms"] * 1e3)
            assert row["times_baseline"] == pytest.approx(by_key["baseline"]["ms"] / row["ms"])
    documents = draw_documents(2, 32, 0.6)
    assert {row["tokens"] for row in rows} == {documents.tokens}
    # the same function of the same weights and tokens: bf16 rounds to 2^-9, the loss is about 5
    losses = [row["loss"] for row in rows if row["status"] == "ok"]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=2**-7)
    page = (tmp_path / "train.md").read_text()
    assert "![Training steps: tokens a second](train.png)" in page
    assert all(rung.label in page for rung in ladder(2, True, graphs=False))
    assert "`--use_fused_loss=1`" in page
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo looks at it
def test_compiled_rungs_run_through_the_compiler(tmp_path: Path, monkeypatch) -> None:
    scopes: list[bool] = []

    def through_dynamo(forward, *, blocks: bool):
        scopes.append(blocks)
        return transforms.compile(forward, blocks=blocks, backend="eager")

    monkeypatch.setattr(runners.training.compose, "compile", through_dynamo)
    only = ("compile", "adamw", "blocks")
    rows = measured(replace(SMALL, out=str(tmp_path), only=only, rounds=1, steps=1))
    assert [row["reason"] for row in rows] == [None] * 3
    # a loss for training and one for validation each; adamw runs the programs of compile
    assert scopes == [False, False, True, True]
    assert [row["warm_up"] is None for row in rows] == [False, True, False]


def test_running_out_of_memory_is_a_row(tmp_path: Path, uncompiled: None, monkeypatch) -> None:
    class Full(training.Learner):
        def train_step(self, grad_fn, batches):
            if self.working["text"]["embed"]["weight"].dtype == torch.float32:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
            return super().train_step(grad_fn, batches)

    monkeypatch.setattr(training, "Learner", Full)
    rows = measured(replace(SMALL, out=str(tmp_path), only=("baseline", "bf16")))
    assert (rows[0]["status"], rows[0]["samples"]) == ("out of memory", [])
    assert rows[0]["reason"] == "CUDA out of memory. Tried to allocate"
    assert rows[1]["status"] == "ok"
    assert rows[1]["times_baseline"] is None
    page = (tmp_path / "train.md").read_text()
    assert "- baseline: fp32, nothing fused: out of memory: CUDA out of memory." in page


def entry(step, **options) -> Entry:
    @contextmanager
    def start():
        yield Ready(step)

    return Entry("key", "label", "phase", "", start, 10, 1.0, **options)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("full"), "out of memory"),
        (UserError("pip install it"), "missing"),
        (ModuleNotFoundError("No module named 'x'"), "missing"),
        (RuntimeError("it broke\nhere"), "error"),
    ],
)
def test_what_fails_is_a_result_and_is_not_tried_again(error: Exception, status: str) -> None:
    tries = []

    def step():
        tries.append(1)
        raise error

    row = Measured("key", "label", "phase", "", 10, 1.0)
    for _ in range(2):
        measure_round(entry(step), row, CpuClock(), StepPace(1, 1))
    assert (row.status, row.samples, len(tries)) == (status, [], 1)


def test_a_lost_device_ends_the_run() -> None:
    def step():
        raise DeviceLostError("an illegal memory access")

    row = Measured("key", "label", "phase", "", 10, 1.0)
    with pytest.raises(DeviceLostError):
        measure_round(entry(step), row, CpuClock(), StepPace(1, 1))


def test_a_slow_rung_takes_fewer_steps_and_one_is_measured_once(monkeypatch) -> None:
    monkeypatch.setattr(steps, "LONGEST", 0.0)
    row = Measured("key", "label", "phase", "", 10, 1.0)
    for _ in range(2):
        measure_round(entry(lambda: torch.ones(2), once=True), row, CpuClock(), StepPace(5, 2))
    assert (len(row.samples), len(row.walls), row.loss) == (1, 2, 1.0)


def test_no_rung_is_begun_after_the_time_is_up(tmp_path: Path, uncompiled: None) -> None:
    rows = measured(replace(SMALL, out=str(tmp_path), only=("baseline",), minutes=0.0))
    assert rows[0]["status"] == "not begun"


# -- peers ----------------------------------------------------------------------------------------


def test_peers_that_are_not_installed_are_rows_with_the_reason(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it raises
    only = ("hf", "hf_liger")
    rows = measured(replace(SMALL, out=str(tmp_path), peers=True, only=only))
    assert [row["status"] for row in rows] == ["missing", "missing"]
    assert rows[0]["reason"] == "transformers is not installed"


def test_hugging_face_takes_the_same_step(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    only = ("hf", "hf_checkpoint")
    rows = measured(replace(SMALL, out=str(tmp_path), peers=True, only=only, rounds=1))
    assert [row["status"] for row in rows] == ["ok", "ok"], rows
    # recomputation changes no number
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-6)
    assert rows[0]["tokens"] == 64


def test_a_shape_that_qwen2_has_no_place_for_is_said(monkeypatch) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(peers.MissingError, match="no QK-norm"):
        peers.build_model(TEXT, torch.device("cpu"), 8)


def test_what_liger_replaces_is_put_back() -> None:
    modeling = pytest.importorskip(peers.MODULE)
    norm, forward = modeling.Qwen2RMSNorm, modeling.Qwen2ForCausalLM.forward
    turn = modeling.apply_rotary_pos_emb
    with peers._unpatched():
        modeling.Qwen2RMSNorm = modeling.apply_rotary_pos_emb = object()
        modeling.Qwen2ForCausalLM.forward = None
    assert (modeling.Qwen2RMSNorm, modeling.apply_rotary_pos_emb) == (norm, turn)
    assert modeling.Qwen2ForCausalLM.forward is forward


# -- flags ----------------------------------------------------------------------------------------


def test_bad_flags(monkeypatch) -> None:
    for change, message in (
        ({"preset": "tini"}, "no preset 'tini'"),
        ({"only": ("flsh",)}, "--only flsh: .*did you mean flash"),
        ({"only": ("hf",)}, "--only hf: there are"),
        ({"rows": 0}, "--rows must be 1 or more, not 0"),
        ({"lengths": -1.0}, "--lengths must lie in"),
        ({"lengths": 0.5, "peers": True}, "--peers measures full rows"),
    ):
        with pytest.raises(UsageError, match=message):
            replace(SMALL, **change).check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch sees none here"):
        run(["train"])


def test_the_keys_are_listed(capsys) -> None:
    assert run(["train", "--list", "--peers"]) == 0
    rungs = ladder(8, False, torch.cuda.is_available())
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [*(rung.key for rung in rungs), *peers.PEERS]


def test_the_device_is_under_load_before_it_is_timed() -> None:
    def step():
        time.sleep(0.01)
        return torch.ones(2)

    row = Measured("key", "label", "phase", "", 10, 1.0)
    measure_round(entry(step), row, CpuClock(), StepPace(2, 1, loaded=0.05))
    assert sum(row.walls[1:]) >= 0.05  # the first compiles: it does not count
    assert sum(row.walls[1:-1]) < 0.05
    assert len(row.samples) == 2
