"""Snapshots: bit-equal, readable by safetensors itself, and a damaged one is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pilot.storage.snapshots import Snapshots

PEAK_RESET = Path("/proc/self/clear_refs")
HEADER = {"version": "ab" * 32, "cursor": '{"next": 7, "name": "ü"}'}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "flags": torch.tensor([True, False, True]),
        "odd bytes": torch.arange(5, dtype=torch.uint8),
        "weight": torch.randn(17, 33, generator=generator),
        "transposed": torch.randn(8, 5, generator=generator).T,
        "bf16": torch.randn(3, 3, generator=generator).bfloat16(),
        "step": torch.tensor(12.0),
        "count": torch.tensor(7, dtype=torch.int64),
        "double": torch.randn(2, dtype=torch.float64, generator=generator),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(4, generator=generator)),
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def no_warning(line: str) -> None:
    raise AssertionError(line)


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    path = Snapshots(tmp_path, 2).save(40, HEADER, tensors())
    assert path == tmp_path / "00000040.safetensors"
    snapshot = Snapshots(tmp_path, 2).newest(no_warning)
    assert snapshot is not None
    assert (snapshot.round, snapshot.header) == (40, HEADER)
    assert snapshot.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert same(snapshot.tensors[name], tensor), name


def test_safetensors_reads_it(tmp_path: Path) -> None:
    path = Snapshots(tmp_path, 2).save(1, HEADER, tensors())
    with safe_open(path, framework="pt") as file:
        assert file.metadata().items() >= HEADER.items()
    loaded = load_file(path)
    assert all(same(loaded[name], tensor) for name, tensor in tensors().items())


def test_loaded_tensors_are_the_callers_own(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, 2)
    snapshots.save(1, {}, {"weight": torch.ones(1000)})
    snapshot = snapshots.newest(no_warning)
    assert snapshot is not None
    snapshot.tensors["weight"].zero_()
    again = snapshots.newest(no_warning)
    assert again is not None
    assert again.tensors["weight"].sum() == 1000


def test_no_snapshot(tmp_path: Path) -> None:
    assert Snapshots(tmp_path, 2).newest(no_warning) is None
    assert Snapshots(tmp_path, 2).rounds() == []


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, 3)
    (tmp_path / "notes.safetensors").write_text("not ours")
    for round in (0, 5, 10, 15, 20):
        snapshots.save(round, {}, {"step": torch.tensor(float(round))})
    assert snapshots.rounds() == [10, 15, 20]
    assert len(list(tmp_path.iterdir())) == 4


def test_fewer_than_two_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Snapshots(tmp_path, 1)


def test_saving_a_round_again_replaces_it(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, 2)
    for value in (1.0, 2.0):
        snapshots.save(3, {}, {"step": torch.tensor(value)})
    snapshot = snapshots.newest(no_warning)
    assert snapshot is not None
    assert snapshot.tensors["step"] == 2.0


def test_leftovers_of_a_killed_save_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "00000009.safetensors.tmp").write_bytes(b"half")
    assert Snapshots(tmp_path, 2).rounds() == []
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, 2)
    snapshots.save(3, {}, {"step": torch.tensor(1.0)})
    with pytest.raises(NotImplementedError):  # a meta tensor has no bytes
        snapshots.save(3, {}, {"step": torch.zeros(2, device="meta")})
    snapshot = snapshots.newest(no_warning)
    assert snapshot is not None
    assert snapshot.tensors["step"] == 1.0
    assert len(list(tmp_path.iterdir())) == 1


def cut(data: bytes) -> bytes:
    return data[:-1]


def flip_at(place: float) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        index = min(int(place * len(data)), len(data) - 1)
        return data[:index] + bytes([data[index] ^ 4]) + data[index + 1 :]

    return flip


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": cut,
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "longer": lambda data: data + b"\0",
    **{f"flipped at {place}": flip_at(place) for place in (0.0, 0.005, 0.02, 0.1, 0.5, 1.0)},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_used(tmp_path: Path, damage: str) -> None:
    snapshots = Snapshots(tmp_path, 3)
    for round in (5, 10):
        snapshots.save(round, HEADER, {**tensors(), "step": torch.tensor(float(round))})
    newest = tmp_path / "00000010.safetensors"
    newest.write_bytes(DAMAGE[damage](newest.read_bytes()))
    lines: list[str] = []
    snapshot = snapshots.newest(lines.append)
    assert snapshot is not None
    assert (snapshot.round, snapshot.tensors["step"].item()) == (5, 5.0)
    assert lines == [f"snapshot {newest} is damaged: using 00000005.safetensors instead"]
    assert snapshots.rounds() == [5]  # so the spool is kept back to a whole one
    snapshots.save(10, {}, {"step": torch.tensor(10.0)})
    again = snapshots.newest(no_warning)
    assert again is not None
    assert again.round == 10


def test_all_damaged(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, 2)
    for round in (1, 2):
        snapshots.save(round, {}, tensors()).write_bytes(b"?")
    lines: list[str] = []
    assert snapshots.newest(lines.append) is None
    assert len(lines) == 2
    assert "there is no older one" in lines[1]


@pytest.mark.skipif(not PEAK_RESET.exists(), reason="the peak of resident memory is Linux's to tell")
def test_memory_stays_flat(tmp_path: Path) -> None:
    """Saving 256 MB takes less than 32 MB beyond the tensors."""
    large = {f"layer {i}": torch.ones(8 << 20) for i in range(8)}
    PEAK_RESET.write_text("5")
    before_kb = peak()
    Snapshots(tmp_path, 2).save(1, {}, large)
    assert peak() - before_kb < 32 << 10


def peak() -> int:
    """kB of resident memory at the highest since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
