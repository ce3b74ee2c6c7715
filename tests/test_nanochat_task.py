"""The task nanochat: batches from packed rows, what an order may say, parity with plain training, exact resume."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nanochat.common import check_memory, memory_need
from nanochat.config import MuonAdamWConfig
from pilot.simulation.virtual_time import run
from pilot.training.gradient import compute
from pilot.training.learner import Learner
from pilot.training.plain_loop import train
from protocol import ProtocolError, Range, TaskSpec
from tasks import load_task
from tasks.data.tokens import Tokens, write
from tasks.nanochat import Nanochat, NanochatConfig, NanochatShape
from tests.tiny import CPU, MINERS, ROUNDS, UNITS, equal, make_place, parameters, play, write_text

pytest.importorskip("rustbpe", reason="the tokenizer is not built: no cargo")

OPTIMIZER = MuonAdamWConfig(warmup_steps=2)
CONFIG = NanochatConfig(
    depth=2, head_dim=16, aspect_ratio=16, seq_len=32, batch_size=2, eval_sequences=8, tokenizer="byte"
)


def write_books(folder: Path) -> Path:
    """Two files of many documents: the last is for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in (("a.jsonl", 40_000), ("b.jsonl", 6_000)):
        text = write_text(folder / "text", size).read_text()
        (folder / "text").unlink()
        rows = [text[i : i + 97] for i in range(0, len(text), 97)]
        (folder / name).write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    return folder


def make_task(folder: Path, **flags: Any) -> Nanochat:
    config = replace(CONFIG, text=str(write_books(folder / "books")), **flags)
    task = load_task("nanochat").prepare(config, seed=0, cache=folder / "cache", device=CPU, progress=lambda line: None)
    assert isinstance(task, Nanochat)
    return task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Nanochat:
    return make_task(tmp_path_factory.mktemp("nanochat"))


def miners_side(task: Nanochat, **changed: Any) -> Nanochat:
    spec = task.spec()
    return Nanochat.from_spec(
        TaskSpec(name="nanochat", parameters={**spec.parameters, **changed}),
        task.data_spec,
        lambda name: task._tokens.path,
    )


# --- batches ----------------------------------------------------------------------------------------------------------


def test_rows_begin_with_a_document_and_targets_are_the_next_tokens(task: Nanochat) -> None:
    for index in range(task.batches_per_epoch):
        inputs, targets = task.batch(index)
        assert inputs.shape == targets.shape == (2, 32)
        assert (inputs[:, 0] == task.shape.bos).all()
        assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_an_epoch_visits_each_row_once_and_the_next_in_another_order(task: Nanochat) -> None:
    def epoch(number: int) -> list[tuple[int, ...]]:
        first = number * task.batches_per_epoch
        batches = [task.batch(first + i)[0] for i in range(task.batches_per_epoch)]
        return [tuple(row.tolist()) for batch in batches for row in batch]

    one, two = epoch(0), epoch(1)
    assert one != two
    assert len(one) == task.batches_per_epoch * 2 <= len(task._train) + 1


def test_the_last_file_is_for_validation(task: Nanochat) -> None:
    documents = (task._tokens.train == task.shape.bos).sum(), (task._tokens.validation == task.shape.bos).sum()
    assert documents == (-(-40_000 // 97), -(-6_000 // 97))


def test_a_miner_makes_the_same_batches_and_loss_from_the_order(task: Nanochat) -> None:
    mine = miners_side(task)
    model = task.build_model(CPU, initial=True)
    replica = mine.build_model(CPU, initial=False)
    replica.load_state_dict(model.state_dict())
    for index in (0, 7, task.batches_per_epoch + 1):
        for ours, theirs in zip(task.batch(index), mine.batch(index), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(task.loss(model, task.batch(index)), mine.loss(replica, mine.batch(index)))
    assert task.blobs().keys() >= {task.data_digest}


def test_evaluation_knows_bytes_where_there_is_a_tokenizer(task: Nanochat) -> None:
    """Of bytes and special tokens, bits a byte follow from the loss of the bytes alone."""
    model = task.build_model(CPU, initial=True)
    values = task.evaluate(model)
    assert values["val_loss"] == pytest.approx(float(torch.tensor(265.0).log()), abs=0.1)
    assert values["val_bpb"] == pytest.approx(values["val_loss"] / 0.6931, rel=0.02)
    assert set(miners_side(task).evaluate(model)) == {"val_loss"}


@pytest.mark.parametrize(
    "changed",
    [
        {"n_head": 3},
        {"n_head": 1, "n_kv_head": 1, "n_embd": 16},
        {"n_kv_head": 0},
        {"n_layer": 10**6},
        {"sequence_len": 1},
        {"window_pattern": "X"},
        {"window_pattern": "S" * 65},
        {"dtype": "fp64"},
        {"crop": "all"},
        {"bos": 300},
        {"vocab_size": 100},
        {"n_layer": 512, "n_embd": 1 << 20, "n_head": 512, "n_kv_head": 512},
        {"sequence_len": 1 << 16},
        {"path": "/etc/passwd"},
    ],
    ids=str,
)
def test_an_order_that_makes_no_sense_is_refused(task: Nanochat, changed: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        miners_side(task, **changed)


ODD = st.sampled_from([-1, 0, 1, 2, 3, 12, 16, 24, 256, 512, 1 << 17, 1 << 20, 1 << 40, 0.5, True, "SL", "", "X", None])


@given(changes=st.dictionaries(st.sampled_from(sorted(NanochatShape.model_fields)), ODD, max_size=6))
def test_odd_numbers_make_a_model_or_a_refusal(task: Nanochat, changes: dict[str, Any]) -> None:
    """Whatever an order says: a shape whose need of memory can be told, or one error of one kind."""
    try:
        spec = TaskSpec(name="nanochat", parameters={**task.spec().parameters, **changes})
        shape = NanochatShape.parse(spec)
    except (ProtocolError, ValidationError):
        return
    config = shape.config()
    assert memory_need(config, shape.batch_size, optimizer=False) > 4 * config.parameter_counts()["total"]
    with contextlib.suppress(ValueError):
        check_memory(config, shape.batch_size, CPU, optimizer=False, copies=2)


def test_tokens_that_are_all_documents_are_refused(task: Nanochat, tmp_path: Path) -> None:
    """Packing goes document by document: of 64 MB of <|bos|> it would take minutes, and gigabytes."""
    bos = np.full(2_000_000, task.shape.bos, np.uint16)
    write(tmp_path / "bos", [bos], [bos], np.uint16)
    tokens = Tokens.open(tmp_path / "bos")
    data = task.data_spec.model_copy(update={"blobs": {"tokens": tokens.ref()}})
    with pytest.raises(ProtocolError, match="packing takes too long"):
        Nanochat.from_spec(task.spec(), data, lambda name: tmp_path / "bos")


def test_a_miner_leaves_no_file_behind(task: Nanochat) -> None:
    before = sorted(task._tokens.path.parent.iterdir())
    miners_side(task, sequence_len=16)
    assert sorted(task._tokens.path.parent.iterdir()) == before


def test_a_depth_that_does_not_fit_is_refused_beforehand(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--nanochat.depth 512: needs [\d.]+ [GT]B"):
        make_task(tmp_path, depth=512, aspect_ratio=64, head_dim=128)


def test_a_text_too_short_for_a_batch_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--nanochat.text: .* less than a micro-batch"):
        make_task(tmp_path, batch_size=10_000)
    with pytest.raises(ValueError, match=r"^--nanochat.(validation|text): "):
        make_task(tmp_path, seq_len=7_000, batch_size=1, crop="keep")


# --- parity -----------------------------------------------------------------------------------------------------------


def plain(task: Nanochat, batches: int, rounds: int = ROUNDS) -> tuple[Learner, list[float]]:
    learner = Learner(task, OPTIMIZER, CPU)
    steps = (
        ((Range(i * batches, (i + 1) * batches),), task.settings(OPTIMIZER, i, ROUNDS, UNITS)) for i in range(rounds)
    )
    return learner, [work.loss for work in train(learner, steps) if work]


def test_one_miner_is_bitwise_plain_training(tmp_path: Path, task: Nanochat) -> None:
    async def main() -> tuple[dict[str, torch.Tensor], list[object]]:
        place = make_place(tmp_path, task, miners=MINERS[:1], batches=3, optimizer=OPTIMIZER)
        await play(place.market, ROUNDS)
        return parameters(place.market), [r.metrics["loss"] for r in place.store.committed(0)]

    learner, losses = plain(task, 3)
    trained, seen = run(main())
    assert equal(trained, {name: p.detach() for name, p in learner.parameters.items()})
    assert seen == losses
    assert losses[-1] < losses[0] - 0.5


def test_two_miners_follow_plain_training(tmp_path: Path, task: Nanochat) -> None:
    async def main() -> list[object]:
        place = make_place(tmp_path, task, miners=MINERS[:2], batches=2, optimizer=OPTIMIZER)
        await play(place.market, ROUNDS)
        return [r.metrics["loss"] for r in place.store.committed(0)]

    _, losses = plain(task, 4)
    assert run(main()) == pytest.approx(losses, abs=1e-2)


def test_a_replay_of_the_ledger_makes_the_same_version(tmp_path: Path, task: Nanochat) -> None:
    """Muon's momentum and decay change from step to step: they are in each round's record."""

    async def main(rounds: int) -> str:
        place = make_place(tmp_path, task, miners=MINERS[:2], optimizer=OPTIMIZER)
        await place.market.replay(0)
        await play(place.market, rounds)
        version = place.market.learner.version
        place.store.close()
        return version

    before = run(main(6))
    assert run(main(6)) == before


def test_a_snapshot_holds_muons_moments(task: Nanochat) -> None:
    """Half of the steps, saved and loaded into another learner, then the rest: bitwise the whole run."""
    whole, _ = plain(task, 2, 6)
    first, _ = plain(task, 2, 3)
    first.advance()
    header, tensors = first.state()
    second = Learner(task, OPTIMIZER, CPU)
    second.load_state(header, {name: tensor.clone() for name, tensor in tensors.items()})
    for step in range(3, 6):
        work = compute(task, second.model, [Range(2 * step, 2 * step + 2)])
        assert work is not None
        second.step(work.gradient, task.settings(OPTIMIZER, step, ROUNDS, UNITS))
    assert equal(
        {name: p.detach() for name, p in whole.parameters.items()},
        {name: p.detach() for name, p in second.parameters.items()},
    )
