"""Packing and loading: rows that hold what they should, each token once, and batches that go on exactly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.dataloader import Loader, PackingIndex
from nanochat.packing import CHUNK
from tasks.data.tokens import window_order

torch.set_num_threads(1)

BOS = 0
CROPS = pytest.mark.parametrize("crop", ["discard", "keep"])


def joined(lengths: list[int]) -> np.ndarray:
    """Documents of so many tokens of text each, behind a bos; every token of text is another number."""
    parts, number = [], 1
    for length in lengths:
        parts += [[BOS], list(range(number, number + length))]
        number += length
    return np.array([token for part in parts for token in part], dtype=np.uint32)


def naive(tokens: np.ndarray, row_len: int, buffer: int) -> list[list[int]]:
    """Best fit with crop="discard", written plainly."""
    edges = [*np.flatnonzero(tokens == BOS), len(tokens)]
    waiting = [tokens[a:b].tolist() for a, b in pairwise(edges)]
    held: list[list[int]] = []
    rows: list[list[int]] = []
    row: list[int] = []
    while True:
        while waiting and len(held) < buffer:
            held.append(waiting.pop(0))
        if not held:
            return rows
        left = row_len - len(row)
        fitting = [document for document in held if len(document) <= left]
        if fitting:
            largest = max(map(len, fitting))
            chosen = next(document for document in fitting if len(document) == largest)
            held.remove(chosen)
        elif left == 1:
            chosen = [BOS]
        else:
            shortest_path = min(map(len, held))
            chosen = next(document for document in held if len(document) == shortest_path)
            held.remove(chosen)
        row += chosen[:left]
        if len(row) == row_len:
            rows.append(row)
            row = []


documents = st.lists(st.integers(0, 40), max_size=60)
shapes = {"lengths": documents, "row_len": st.integers(2, 17), "buffer": st.integers(1, 8)}


@given(**shapes)
@settings(max_examples=200, deadline=None)
def test_discard_is_best_fit(lengths: list[int], row_len: int, buffer: int) -> None:
    tokens = joined(lengths)
    index = PackingIndex.build(tokens, BOS, row_len, buffer=buffer)
    rows = index.rows(np.arange(len(index)))
    assert rows.tolist() == naive(tokens, row_len, buffer)
    text = rows[rows != BOS].tolist()
    assert len(text) == len(set(text)) == index.kept
    assert index.total == sum(lengths)


@given(crop=st.sampled_from(["discard", "keep"]), pad=st.booleans(), **shapes)
@settings(max_examples=300, deadline=None)
def test_every_row_is_whole_and_every_piece_is_a_run_of_one_document(
    lengths: list[int], row_len: int, buffer: int, crop: Any, pad: bool
) -> None:
    tokens = joined(lengths)
    index = PackingIndex.build(tokens, BOS, row_len, buffer=buffer, crop=crop, pad=pad)
    rows = index.rows(np.arange(len(index)))
    assert rows.shape == (len(index), row_len)
    assert rows.dtype == np.int64
    assert (rows[:, 0] == BOS).all()
    document = np.repeat(np.arange(len(lengths)), lengths)  # of each token of text
    last = np.full(len(lengths), -1)
    seen: dict[int, list[int]] = {}
    for row in rows:
        for piece in np.split(row, np.flatnonzero(row == BOS))[1:]:
            text = piece[1:]
            assert (np.diff(text) == 1).all()
            assert len(set(document[text - 1])) <= 1
            if len(text):
                seen.setdefault(int(document[text[0] - 1]), []).extend(text.tolist())
    for number, text in seen.items():
        assert text == sorted(set(text)), "in order, none twice"
        last[number] = text[-1]
        if crop == "discard":
            assert text[0] == 1 + sum(lengths[:number])
    assert sum(map(len, seen.values())) == index.kept


@given(**shapes)
@settings(max_examples=200, deadline=None)
def test_keep_holds_every_token_exactly_once(lengths: list[int], row_len: int, buffer: int) -> None:
    tokens = joined(lengths)
    padded = PackingIndex.build(tokens, BOS, row_len, buffer=buffer, crop="keep", pad=True)
    rows = padded.rows(np.arange(len(padded)))
    assert sorted(rows[rows != BOS].tolist()) == list(range(1, sum(lengths) + 1))
    assert padded.kept == padded.total == sum(lengths)
    cut = PackingIndex.build(tokens, BOS, row_len, buffer=buffer, crop="keep")
    assert len(padded) - len(cut) in (0, 1)
    assert (cut.rows(np.arange(len(cut))) == rows[: len(cut)]).all()
    assert cut.total - cut.kept < row_len


@CROPS
def test_the_same_tokens_of_any_type_give_the_same_rows(crop: Any, tmp_path: Path) -> None:
    tokens = joined([5, 30, 2, 9, 9, 1, 0, 17] * 20)
    tokens.astype(np.uint16).tofile(tmp_path / "t.bin")
    mapped = np.memmap(tmp_path / "t.bin", dtype=np.uint16, mode="r")
    one, other = (PackingIndex.build(t, BOS, 12, crop=crop) for t in (tokens, mapped))
    everything = np.arange(len(one))
    assert (one.rows(everything) == other.rows(everything)).all()
    some = np.array([3, 0, 3])
    assert (one.rows(some) == np.stack([one.row(i) for i in some])).all()


def test_documents_at_the_border_of_a_chunk() -> None:
    for begin in ([CHUNK - 1], [CHUNK], [CHUNK + 1], [CHUNK - 1, CHUNK, CHUNK + 1], []):
        tokens = np.ones(CHUNK + 5, dtype=np.uint16)
        tokens[[0, *begin]] = BOS
        index = PackingIndex.build(tokens, BOS, 1 << 20, crop="keep", pad=True)
        assert index.total == index.kept == len(tokens) - 1 - len(begin)
        pieces = np.concatenate([index.pieces(row)[0] for row in range(len(index))])
        assert {0, *begin} <= set(pieces.tolist())


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="begin with 7, not with bos 0"):
        PackingIndex.build(np.array([7, 0, 1], dtype=np.uint16), BOS, 4)
    with pytest.raises(ValueError, match="rows of 1 tokens"):
        PackingIndex.build(joined([3]), BOS, 1)
    index = PackingIndex.build(joined([3, 3, 3]), BOS, 4)
    assert len(index) == 3
    for row in (-1, 3):
        with pytest.raises(IndexError, match="of 3"):
            index.row(row)
    assert len(PackingIndex.build(joined([]), BOS, 4)) == 0
    assert len(PackingIndex.build(joined([2]), BOS, 4)) == 0


# --- the cached index -------------------------------------------------------------------------------------------------


def cached(folder: Path, tokens: np.ndarray, **changes: Any) -> PackingIndex:
    return PackingIndex.cached(folder, tokens, **{"name": "train-abc", "bos": BOS, "row_len": 9, **changes})


def rows_of(index: PackingIndex) -> list[list[int]]:
    return index.rows(np.arange(len(index))).tolist()


def test_an_index_is_written_once_and_read_again(tmp_path: Path) -> None:
    tokens = joined([4, 11, 6, 25, 3] * 10)
    first = cached(tmp_path, tokens)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns, path.read_bytes()
    again = cached(tmp_path, tokens)
    assert rows_of(first) == rows_of(again)
    assert (first.kept, first.total, first.digest) == (again.kept, again.total, again.digest)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == written
    others = ({"name": "train-xyz"}, {"row_len": 5}, {"crop": "keep"}, {"buffer": 3}, {"tokenizer": "t"}, {"pad": True})
    assert len({cached(tmp_path, tokens, **change).digest for change in others} | {first.digest}) == 1 + len(others)
    assert len(list(tmp_path.iterdir())) == 1 + len(others)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:70] + bytes([data[70] ^ 1]) + data[71:],
        lambda d: d * 2,
    ],
)
def test_a_damaged_index_is_refused_and_built_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    tokens = joined([4, 11, 6, 25, 3] * 10)
    rows = rows_of(cached(tmp_path, tokens))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.raises(ValueError, match=rf"{path.name}: .*; delete it"):
        PackingIndex.load(path, tokens)
    assert rows_of(cached(tmp_path, tokens)) == rows
    assert path.read_bytes() == whole


def test_an_index_of_something_else_is_refused(tmp_path: Path) -> None:
    tokens = joined([4, 11, 6, 25, 3] * 10)
    one, other = cached(tmp_path / "a", tokens), cached(tmp_path / "b", tokens, name="train-xyz")
    (path,) = (tmp_path / "a").iterdir()
    with pytest.raises(ValueError, match="of something else: data train-abc, not train-xyz"):
        PackingIndex.load(path, tokens, other.packing)
    with pytest.raises(ValueError, match=f"of {len(tokens)} tokens, not of these {len(tokens) - 1}"):
        PackingIndex.load(path, tokens[:-1])
    assert rows_of(PackingIndex.load(path, tokens, one.packing)) == rows_of(one)


# --- batches ----------------------------------------------------------------------------------------------------------


INDEX = PackingIndex.build(joined([4, 11, 6, 25, 3] * 10), BOS, 9, crop="keep", data="d", tokenizer="a" * 64)
BATCH = 3
PER_EPOCH = len(INDEX) // BATCH


def order(epoch: int) -> np.ndarray:
    return window_order(1, epoch, len(INDEX))


def loader(**options: Any) -> Loader:
    return Loader(INDEX, order, BATCH, **options)


def take(source: Loader, batches: int) -> list[list[list[int]]]:
    """Whole rows, put together from inputs and targets."""
    taken = []
    for _ in range(batches):
        inputs, targets = next(source)
        assert inputs.dtype == targets.dtype == torch.int64
        assert (inputs[:, 1:] == targets[:, :-1]).all()
        assert inputs.is_contiguous()
        assert targets.is_contiguous()
        taken.append(torch.cat((inputs[:, :1], targets), dim=1).tolist())
    return taken


def expected(number: int) -> list[list[int]]:
    epoch, at = divmod(number, PER_EPOCH)
    return INDEX.rows(order(epoch)[BATCH * at : BATCH * (at + 1)]).tolist()


def test_batches_are_those_of_the_epochs_orders() -> None:
    with loader() as source:
        assert take(source, 3 * PER_EPOCH) == [expected(number) for number in range(3 * PER_EPOCH)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_together_have_the_one_stream(world_size: int) -> None:
    steps = 2 * PER_EPOCH // world_size + 2
    shares = []
    for rank in range(world_size):
        with loader(rank=rank, world_size=world_size) as source:
            shares.append(take(source, steps))
    together = [batch for step in zip(*shares, strict=True) for batch in step]
    assert together == [expected(number) for number in range(steps * world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_resumed_loader_goes_on_exactly_at_every_step(world_size: int) -> None:
    steps, rank = PER_EPOCH // world_size + 4, world_size - 1
    with loader(rank=rank, world_size=world_size, ahead=3) as source:
        states, batches = [], []
        for _ in range(steps):
            states.append(source.state_dict())
            batches += take(source, 1)
    for done, state in enumerate(states):
        with loader(rank=rank, world_size=world_size) as resumed:
            take(resumed, done % 3)  # whatever it did before
            resumed.load_state_dict(state)
            assert take(resumed, steps - done) == batches[done:]


def test_a_run_goes_on_with_another_number_of_ranks() -> None:
    with loader(rank=1, world_size=2) as source:
        take(source, 3)
        state = source.state_dict()
    with loader(rank=2, world_size=3) as source:
        source.load_state_dict(state)
        assert take(source, 2) == [expected(6 + 2), expected(6 + 5)]


def test_a_state_of_something_else_is_refused() -> None:
    with loader() as source:
        state = source.state_dict()
        for key, match in (
            ("index", "data, tokenizer or sequence length"),
            ("order", "seed"),
            ("batch_size", "batch size"),
        ):
            with pytest.raises(ValueError, match=f"cannot resume with another {match}"):
                source.load_state_dict({**state, key: 99})
        for wrong in ({}, {**state, "position": -1}, {**state, "position": "1"}, {**state, "more": 1}):
            with pytest.raises(ValueError, match="state"):
                source.load_state_dict(wrong)
    other = Loader(INDEX, lambda epoch: window_order(2, epoch, len(INDEX)), BATCH)
    with other, pytest.raises(ValueError, match="another seed"):
        other.load_state_dict(state)


def test_what_no_loader_can_be_made_of() -> None:
    with pytest.raises(ValueError, match="give more data, or a smaller batch"):
        Loader(INDEX, order, len(INDEX) + 1)
    with pytest.raises(ValueError, match="tokenizer bbbbbbbbbbbb: the data were tokenised with aaaaaaaaaaaa"):
        loader(tokenizer="b" * 64)
    with pytest.raises(ValueError, match="an order of 2 rows"):
        Loader(INDEX, lambda epoch: np.arange(2), 1)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        loader(rank=2, world_size=2)
    loader(tokenizer="a" * 64).close()


def test_no_more_is_made_ahead_than_asked_for() -> None:
    asked: list[int] = []

    def counted(epoch: int) -> np.ndarray:
        asked.append(epoch)
        return np.arange(len(INDEX))

    with Loader(INDEX, counted, len(INDEX), ahead=2) as source:  # a batch is an epoch
        take(source, 3)
        for _ in range(200):
            if len(asked) == 5:
                break
            time.sleep(0.01)
        time.sleep(0.05)
    assert asked == [0, 0, 1, 2, 3]  # the first names the order; the last of them was on its way


def test_an_error_in_the_thread_reaches_the_consumer() -> None:
    def order_until(epoch: int) -> np.ndarray:
        if epoch == 1:
            raise OSError("the file went away")
        return order(epoch)

    with Loader(INDEX, order_until, BATCH) as source:
        take(source, PER_EPOCH)
        for _ in range(2):
            with pytest.raises(OSError, match="went away"):
                next(source)


def test_a_closed_loader_has_no_thread_left() -> None:
    with loader() as source:
        take(source, 1)
        assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())
    source.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        next(source)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_come_to_the_gpu() -> None:
    with loader(device="cuda") as source:
        inputs, _ = next(source)
        assert inputs.is_cuda
        assert source._made[0].result().is_pinned()
