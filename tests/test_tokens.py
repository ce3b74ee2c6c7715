"""The token file: exact, damaged and hostile ones; and the order of an epoch, which may never change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from protocol import Hasher, ProtocolError
from tasks.data.tokens import HEADER, MAGIC, Tokens, window_order, write


def chunks(*parts: list[int]) -> list[np.ndarray]:
    return [np.array(part, dtype=np.int64) for part in parts]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_what_is_written_is_read(tmp_path: Path, dtype: type) -> None:
    write(tmp_path / "t.bin", chunks([1, 2], [], [250]), chunks([7]), dtype)
    tokens = Tokens.open(tmp_path / "t.bin")
    assert tokens.train.tolist() == [1, 2, 250]
    assert tokens.validation.tolist() == [7]
    assert tokens.largest == 250
    assert tokens.train.itemsize == np.dtype(dtype).itemsize
    assert bytes(tokens.buffer) == (tmp_path / "t.bin").read_bytes()


def test_the_digest_is_of_the_whole_file_and_only_of_its_content(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", chunks([1, 2, 3]), chunks([4]), np.uint16)
    write(tmp_path / "b.bin", chunks([1], [2], [3]), chunks([4]), np.uint16)
    write(tmp_path / "other split.bin", chunks([1, 2]), chunks([3, 4]), np.uint16)
    a, b, other = (Tokens.open(tmp_path / f"{name}.bin") for name in ("a", "b", "other split"))
    hasher = Hasher("data")
    hasher.update((tmp_path / "a.bin").read_bytes())
    assert a.digest == b.digest == hasher.hexdigest()
    assert other.digest != a.digest
    assert (a.ref().kind, a.ref().digest, a.ref().bytes) == ("data", a.digest, HEADER.size + 8)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    write(path, chunks([1]), chunks([2]), np.uint8)
    before = path.read_bytes()

    def broken():
        yield np.array([9], dtype=np.uint8)
        raise OSError("the source went away")

    with pytest.raises(OSError, match="went away"):
        write(path, broken(), [], np.uint8)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: HEADER.size],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"x" + data[1:],
        lambda data: HEADER.pack(MAGIC, 3, 0, 3, 1) + data[HEADER.size :],
        lambda data: HEADER.pack(MAGIC, 1, 1, 3, 1) + data[HEADER.size :],
        lambda data: HEADER.pack(MAGIC, 1, 0, 2**64 - 1, 5) + data[HEADER.size :],  # 2^64 + 4 is 4, were it to wrap
    ],
)
def test_anything_else_is_refused(tmp_path: Path, damage) -> None:
    path = tmp_path / "t.bin"
    write(path, chunks([1, 2, 3]), chunks([4]), np.uint8)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ProtocolError, match=r"t\.bin"):
        Tokens.open(path)


def test_an_order_is_a_permutation_that_seed_and_epoch_change() -> None:
    orders = [window_order(seed, epoch, 1000) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(1000))
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert window_order(0, 0, 1000).tolist() == orders[0].tolist()


def test_the_order_is_fixed_for_ever() -> None:
    assert window_order(0, 0, 10).tolist() == [6, 9, 4, 8, 3, 5, 7, 1, 0, 2]
    assert window_order(7, 3, 10).tolist() == [9, 3, 5, 6, 7, 2, 1, 0, 4, 8]
