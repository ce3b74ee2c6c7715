"""The chain of versions: how a miner gets to the newest one, and the bytes that it takes.

    version(t+1) = next_version(version(t), digest of what leads from the one to the other)

    base ── delta ── delta ── … ── delta ── delta ── … ── version
      │                              │
    snapshot                       snapshot                   two at most, each the whole fp32 state of the replica

Whoever holds a version on the way needs the deltas after it; anyone else a snapshot, and the deltas after that. A new
snapshot is made when the deltas since the last weigh as much as one. The one before it stays, with the deltas after it:
a newcomer that began with it, over a link that takes many rounds for a state, still comes to its end. What is kept
follows from sizes alone, so a replay makes the same chain.

With `--broadcast full` the way is one step, the whole state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Literal

from typing_extensions import Buffer

from pilot.interfaces import Blobs, BlobStore
from protocol import BlobRef, Digest, StateSnapshot, Update, Version, VersionStep, digest

FEWEST, MOST = 4, 16  # deltas from one snapshot to the next

UpdatePath = tuple[VersionStep, ...]


# --- for who goes it --------------------------------------------------------------------------------------------------


def paths_to(update: Update, version: Version | None) -> Iterator[UpdatePath]:
    """Every way to the update's version: by the steps after `version`, or by a whole state and the steps after that."""
    versions = update.versions
    if version is not None and version in versions:
        yield update.steps[versions.index(version) :]
    for snapshot in update.snapshots:
        yield (snapshot.step, *update.steps[snapshot.steps :])
    for at, step in enumerate(update.steps):
        if step.kind == "state":
            yield update.steps[at:]


def shortest_path(
    update: Update,
    version: Version | None,
    missing: Callable[[VersionStep], int],
    usable: Callable[[VersionStep], bool],
) -> UpdatePath | None:
    """The way with the fewest bytes `missing` yet, of equals that with the fewest steps; None where there is none."""
    possible = [way for way in paths_to(update, version) if all(map(usable, way))]
    return min(possible, key=lambda way: (sum(map(missing, way)), len(way)), default=None)


# --- for who makes it -------------------------------------------------------------------------------------------------


class MemoryBlobStore:
    """A `BlobStore` that a restart does not find again."""

    def __init__(self) -> None:
        self._blobs: dict[Digest, Buffer] = {}

    def put(self, ref: BlobRef, data: Buffer) -> Buffer:
        self._blobs[ref.digest] = data
        return data

    def get(self, ref: BlobRef) -> Buffer | None:
        return self._blobs.get(ref.digest)

    def retain(self, digests: Collection[Digest]) -> None:
        self._blobs = {name: data for name, data in self._blobs.items() if name in digests}


class VersionHistory:
    """An `Update`, and the bytes that it names."""

    def __init__(self, keep: BlobStore, keep_before: bool, codec: str, state: Buffer) -> None:
        """The first version is `state`. `keep_before`: what the version before the newest needs stays as well.

        What an earlier process kept is there for `restore`, until the next version.
        """
        self._keep, self.keep_before = keep, keep_before
        self.blobs: dict[Digest, Buffer] = {}
        self._before: set[Digest] = set()  # named by the update before, where that is kept
        self._whole: BlobRef | None = None  # of the newest version, for those who can make nothing of deltas
        self._lead(Update(base=None, steps=(self._step("state", codec, state),)))

    def replace(self, base: Version | None, codec: str, state: Callable[[], Buffer]) -> None:
        """The next version is a whole state. What was before it makes room first, where it is not kept."""
        if not self.keep_before:
            self._retain(())
        self._go_on(Update(base=base, steps=(self._step("state", codec, state()),)))

    def extend(self, codec: str, delta: Buffer) -> None:
        """The next version is the newest and a delta."""
        steps = (*self.update.steps, self._step("delta", codec, delta))
        self._go_on(self.update.model_copy(update={"steps": steps}))

    def _go_on(self, update: Update) -> None:
        self._before, self._whole = _named(self.update) if self.keep_before else set(), None
        self._become(update)

    def _become(self, update: Update) -> None:
        self._lead(update)
        self._retain(_named(update) | self._before)

    def _lead(self, update: Update) -> None:
        self.update, self.version = update, update.version

    # --- snapshots ------------------------------------------------------------------------------------------------

    @property
    def wants_snapshot(self) -> bool:
        """The deltas since the last whole state weigh as much as that."""
        at, whole = self._last_whole
        deltas = [step.bytes for step in self.update.steps[at:]]
        return len(deltas) >= MOST or (len(deltas) >= FEWEST and sum(deltas) >= whole.bytes)

    def add_snapshot(self, state: Buffer) -> None:
        """Of the newest version. The way now begins at the whole state before it."""
        first, whole = self._last_whole
        steps = self.update.steps[first:]
        new = self._step("state", "fp32", state).ref
        snapshots = (StateSnapshot(steps=0, blob=whole), StateSnapshot(steps=len(steps), blob=new))
        self._become(Update(base=self.update.versions[first], steps=steps, snapshots=snapshots))

    def with_snapshot(self, state: Callable[[], Buffer]) -> Update:
        """The update for a miner that knows only fp32; `state` of the newest version is asked for once."""
        steps = self.update.steps
        last = steps[-1]
        if last.kind == "state" and last.codec == "fp32":
            return self.update
        at, whole = self._last_whole
        if at < len(steps) or last.kind == "state":
            whole = self._whole = self._whole or self._step("state", "fp32", state()).ref
        return self.update.model_copy(update={"snapshots": (StateSnapshot(steps=len(steps), blob=whole),)})

    @property
    def is_whole(self) -> bool:
        """The bytes of the newest whole state and of the deltas after it are here: a newcomer can come by them."""
        at, whole = self._last_whole
        return {whole.digest, *(step.digest for step in self.update.steps[at:])} <= self.blobs.keys()

    @property
    def _last_whole(self) -> tuple[int, BlobRef]:
        """The newest whole state, and the steps that it makes unnecessary."""
        steps = [(at, step.ref) for at, step in enumerate(self.update.steps, 1) if step.kind == "state"]
        return max([*steps, *((s.steps, s.blob) for s in self.update.snapshots)], key=lambda whole: whole[0])

    # --- the bytes ------------------------------------------------------------------------------------------------

    def restore(self, update: Update) -> None:
        """Go on from the update of an earlier process, with those of its bytes that are kept."""
        self._before, self._whole, self.blobs = set(), None, {}
        self._lead(update)
        self.blobs = dict(self.find(update))

    def find(self, update: Update) -> Blobs:
        """What is kept of the bytes that an update names, this one or an order's."""
        found = ((ref.digest, self.blobs.get(ref.digest) or self._keep.get(ref)) for ref in update.refs)
        return {name: data for name, data in found if data is not None}

    def _step(self, kind: Literal["state", "delta"], codec: str, data: Buffer) -> VersionStep:
        step = VersionStep(kind=kind, codec=codec, digest=digest(kind, data), bytes=memoryview(data).nbytes)
        self.blobs[step.digest] = self._keep.put(step.ref, data)
        return step

    def _retain(self, digests: Collection[Digest]) -> None:
        self.blobs = {name: data for name, data in self.blobs.items() if name in digests}
        self._keep.retain(digests)


def _named(update: Update) -> set[Digest]:
    return {ref.digest for ref in update.refs}
