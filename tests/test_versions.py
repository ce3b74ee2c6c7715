"""The chain of versions by itself: every way leads to the newest, few bytes are kept, a restart finds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import Buffer

from pilot.codec import known_codecs
from pilot.storage.blob_store import FileBlobStore
from pilot.training.versions import MAX_DELTAS, MIN_DELTAS, MemoryBlobStore, VersionHistory, paths_to, shortest_path
from protocol import MAX_STEPS, BlobRef, StateSnapshot, Update, Version, VersionStep, digest, next_version

STATE = 1000  # bytes of a snapshot
SETTINGS = settings(derandomize=True, max_examples=200, deadline=None, database=None)
ANY = known_codecs()


def state(number: int) -> bytes:
    return b"s%d;" % number + bytes(STATE)


def delta(number: int, size: int) -> bytes:
    return b"d%d;" % number + bytes(size)


def grown(
    sizes: Sequence[int], look: Callable[[VersionHistory], object] = lambda chain: None, before: bool = True
) -> VersionHistory:
    """A chain after a delta of each of these sizes, and a snapshot wherever it wants one."""
    found = VersionHistory(MemoryBlobStore(), before, "fp32", state(0))
    for number, size in enumerate(sizes, 1):
        found.extend("2bit", delta(number, size))
        if found.wants_snapshot:
            found.add_snapshot(state(number))
        look(found)
    return found


def walk(found: VersionHistory, way: Sequence[VersionStep], at: int | None) -> int:
    """Which state it leads to, from the state of version `at`, by the numbers in the bytes."""
    for step in way:
        text = bytes(found.blobs[step.digest])
        number = int(text[1 : text.index(b";")])
        assert text[:1] == step.kind[:1].encode()
        assert step.kind == "state" or at == number - 1  # a delta fits what it was made on
        at = number
    assert at is not None
    return at


# --- ways -------------------------------------------------------------------------------------------------------------


@SETTINGS
@given(st.lists(st.integers(1, 700), max_size=60))
def test_every_way_leads_to_the_newest_version(sizes: list[int]) -> None:
    """From nothing, from every version on the way, and from one that nobody knows."""
    versions: list[Version] = [next_version(None, digest("state", state(0)))]
    found = grown(sizes, lambda chain: versions.append(chain.update.version))
    assert len(set(versions)) == len(sizes) + 1
    known = found.update.versions
    assert [v for v in known if v is not None] == versions[-len(found.update.steps) - (known[0] is not None) :]
    for at, version in [(None, None), (None, "0" * 64), *enumerate(versions)]:
        possible = list(paths_to(found.update, version))
        assert possible
        for way in possible:
            begins_anew = bool(way) and way[0].kind == "state"
            assert walk(found, way, None if begins_anew else at) == len(sizes)
        best = shortest_path(found.update, version, ANY, {})
        assert best is not None
        assert sum(s.bytes for s in best) == min(sum(s.bytes for s in way) for way in possible)
    assert shortest_path(found.update, versions[-1], ANY, {}) == ()


def test_what_is_here_already_makes_a_way_short() -> None:
    """A newcomer goes on with the snapshot that it has most of, though a newer one is there."""
    found = grown([300] * 6)
    old, new = found.update.snapshots
    assert (old.steps, new.steps) == (0, 4)
    held: dict[str, int] = {}

    def best() -> Sequence[VersionStep]:
        way = shortest_path(found.update, None, ANY, held)
        assert way is not None
        return way

    assert best()[0].digest == new.blob.digest
    held[old.blob.digest] = STATE
    assert best()[0].digest == new.blob.digest  # four deltas more are more than a snapshot
    for step in found.update.steps[:1]:
        held[step.digest] = step.bytes
    assert best()[0].digest == old.blob.digest


def test_steps_that_nobody_can_read_are_not_gone() -> None:
    found = grown([300] * 6)
    way = shortest_path(found.update, found.update.versions[2], {"fp32"}, {})
    assert way is None
    update = found.with_snapshot(lambda: state(6))
    way = shortest_path(update, found.update.versions[2], {"fp32"}, {})
    assert way is not None
    assert walk(found, way, None) == 6
    assert found.with_snapshot(pytest.fail) == update  # made once a version
    assert found.update.snapshots != update.snapshots  # the others go on as they did
    found.extend("2bit", delta(7, 300))
    assert digest("state", state(6)) not in found.blobs


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 30, 66, 70, 200, 251, 600, 5000])
def test_a_long_chain_stays_short(size: int) -> None:
    """Over 1,000 versions: two snapshots at most, a newcomer's bytes bounded, and what is kept is what is named."""
    snapshots: list[int] = []

    def look(found: VersionHistory) -> None:
        update = found.update
        Update.model_validate_json(update.model_dump_json())  # what an order may say
        assert len(update.steps) <= 2 * MAX_DELTAS <= MAX_STEPS
        assert {ref.digest for ref in update.refs} == found.blobs.keys()
        newcomers = shortest_path(update, None, ANY, {})
        assert newcomers is not None
        least = max(MIN_DELTAS, min(MAX_DELTAS, STATE // size + 1))
        assert len(newcomers) <= least + 1
        if update.snapshots and update.snapshots[-1].steps == len(update.steps):
            snapshots.append(update.steps[-1].bytes)
        if len(snapshots) > 1:  # a transfer that begins with a snapshot has until the next but one
            assert len(update.steps) - update.snapshots[0].steps >= MIN_DELTAS

    grown([size] * 1000, look, before=False)
    assert 1000 / MAX_DELTAS - 2 <= len(snapshots) <= 1000 / MIN_DELTAS


def test_the_version_before_keeps_its_bytes_for_a_version() -> None:
    """A validator that is killed between a version and its commit goes on with the version before."""
    updates: list[Update] = []

    def look(found: VersionHistory) -> None:
        assert not updates or {ref.digest for ref in updates[-1].refs} <= found.blobs.keys()
        updates.append(found.update)

    grown([300] * 40, look)


def test_full_broadcast_keeps_one_state_or_two() -> None:
    for before, kept in ((False, 1), (True, 2)):
        found = VersionHistory(MemoryBlobStore(), before, "bf16", state(0))
        for number in range(1, 5):
            room = len(found.blobs)

            def encode(number: int = number, room: int = room, found: VersionHistory = found) -> Buffer:
                assert len(found.blobs) == (room if before else 0)  # noqa: B023 - called at once
                return state(number)

            base = found.update.version
            found.replace(base, "bf16", encode)
            assert found.update.versions == (base, next_version(base, digest("state", state(number))))
            assert len(found.blobs) == kept
            assert not found.wants_snapshot


def test_a_state_in_another_codec_is_not_for_who_knows_only_fp32() -> None:
    found = VersionHistory(MemoryBlobStore(), False, "fp32", state(0))
    assert found.with_snapshot(pytest.fail) == found.update
    for number in (1, 2):
        base = found.update.version
        found.replace(base, "bf16", lambda number=number: b"half" + state(number))  # type: ignore[misc]
        assert len(found.blobs) == 1
        update = found.with_snapshot(lambda number=number: state(number))  # type: ignore[misc]
        way = shortest_path(update, base, {"fp32"}, {})
        assert way is not None
        assert walk(found, way, None) == number
        assert found.with_snapshot(pytest.fail) == update  # made once a version
        assert update.version == found.version
        assert found.update.snapshots == ()


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_found_again_and_only_whole(tmp_path: Path) -> None:
    kept = FileBlobStore(tmp_path / "versions")
    found = VersionHistory(kept, True, "fp32", state(0))
    for number in range(1, 30):
        found.extend("2bit", delta(number, 60))
        if found.wants_snapshot:
            found.add_snapshot(state(number))
    kept.sync()
    assert {path.name for path in (tmp_path / "versions").iterdir()} == found.blobs.keys()
    again = VersionHistory(FileBlobStore(tmp_path / "versions"), True, "fp32", state(7777))
    again.restore(Update.model_validate_json(found.update.model_dump_json()))
    assert again.update == found.update
    named = {ref.digest for ref in found.update.refs}
    assert {n: bytes(b) for n, b in again.blobs.items()} == {n: bytes(found.blobs[n]) for n in named}
    for other in (found, again):
        other.extend("2bit", delta(30, 60))
    assert again.update == found.update

    torn, gone, *_ = [tmp_path / "versions" / step.digest for step in found.update.steps]
    torn.write_bytes(torn.read_bytes()[:-1] + b"\1")
    gone.unlink()
    again.restore(found.update)
    assert again.blobs.keys() == {ref.digest for ref in found.update.refs} - {torn.name, gone.name}
    assert again.find(found.update) == again.blobs


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    kept = FileBlobStore(tmp_path)
    ref = BlobRef(kind="delta", digest=digest("delta", b"abc"), bytes=3)
    assert kept.get(ref) is None
    assert bytes(kept.put(ref, b"abc")) == bytes(kept.get(ref) or b"") == b"abc"
    (tmp_path / (ref.digest + ".tmp")).write_bytes(b"ab")  # what a kill leaves
    FileBlobStore(tmp_path).retain([ref.digest])
    assert [path.name for path in tmp_path.iterdir()] == [ref.digest]
    assert kept.get(ref.model_copy(update={"kind": "state"})) is None  # equal bytes of another kind


def test_an_update_says_where_its_snapshots_lie() -> None:
    step = VersionStep(kind="delta", codec="2bit", digest="a" * 64, bytes=5)
    blob = BlobRef(kind="state", digest="b" * 64, bytes=9)
    update = Update(base="c" * 64, steps=(step, step), snapshots=(StateSnapshot(steps=2, blob=blob),))
    assert update.refs == (step.ref, step.ref, blob)
    assert update.versions == (
        "c" * 64,
        *(v := (next_version("c" * 64, step.digest),)),
        next_version(v[0], step.digest),
    )
    with pytest.raises(ValueError, match="after 3 steps, the way has 2"):
        Update(base=None, steps=(step, step), snapshots=(StateSnapshot(steps=3, blob=blob),))
