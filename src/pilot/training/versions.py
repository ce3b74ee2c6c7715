"""Keep the versions of the model, and the bytes by which a miner gets to the newest one.

    version(t+1) = next_version(version(t), digest of the step from one to the other)

    base ── delta ── delta ── … ── delta ── delta ── … ── version
      │                              │
    snapshot                       snapshot                   two at most, each the whole fp32 state of the replica

A miner that holds one of these versions needs the deltas after it; any other miner needs a snapshot and the deltas
after that. A new snapshot is made when the deltas since the last one take as many bytes. The snapshot before it stays,
with its deltas, so that a newcomer that began with it over a slow link still reaches the newest version. What is kept
follows from sizes alone, so a replay keeps the same.

With `--broadcast full` an update is one step, the whole state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Literal

from typing_extensions import Buffer

from pilot.codec import DENSE
from pilot.interfaces import Blobs, BlobStore
from protocol import BlobRef, Digest, StateSnapshot, Update, Version, VersionStep, digest

MIN_DELTAS, MAX_DELTAS = 4, 16  # from one snapshot to the next

UpdatePath = tuple[VersionStep, ...]


# --- the miner's side -------------------------------------------------------------------------------------------------


def paths_to(update: Update, version: Version | None) -> Iterator[UpdatePath]:
    """Yield every path to the update's version: the steps after `version`, or a whole state and the steps after it."""
    versions = update.versions
    if version is not None and version in versions:
        yield update.steps[versions.index(version) :]
    for snapshot in update.snapshots:
        yield (snapshot.step, *update.steps[snapshot.steps :])
    for at, step in enumerate(update.steps):
        if step.kind == "state":
            yield update.steps[at:]


def shortest_path(
    update: Update, version: Version | None, codecs: Collection[str], held: Mapping[Digest, int]
) -> UpdatePath | None:
    """Return the path that lacks the fewest bytes, of equal ones the one with the fewest steps.

    `codecs` are those that the miner can read, and `held` says how many bytes of each blob it has. None: no such path.
    """
    readable = [
        path
        for path in paths_to(update, version)
        if all(step.codec in codecs and (step.kind == "delta" or step.codec in DENSE) for step in path)
    ]
    return min(
        readable,
        key=lambda path: (sum(step.bytes - held.get(step.digest, 0) for step in path), len(path)),
        default=None,
    )


# --- the validator's side ---------------------------------------------------------------------------------------------


class MemoryBlobStore:
    """A `BlobStore` that does not survive a restart."""

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
    """The update that leads to the newest version, and the bytes that it names."""

    def __init__(self, store: BlobStore, keep_previous: bool, codec: str, state: Buffer) -> None:
        """Begin with `state`. With `keep_previous`, keep what the version before the newest needs as well.

        What an earlier process stored is there for `restore` until the next version is made.
        """
        self._store, self.keep_previous = store, keep_previous
        self.blobs: dict[Digest, Buffer] = {}
        self._previous: set[Digest] = set()  # blobs of the update before the newest
        self._fp32_state: BlobRef | None = None  # the newest version, for miners that cannot read deltas
        self.update = Update(base=None, steps=(self._add_blob("state", codec, state),))
        self.version = self.update.version

    def replace(self, base: Version | None, codec: str, state: Callable[[], Buffer]) -> None:
        """Make the next version from a whole state. The blobs before it are dropped first, if they are not kept."""
        if not self.keep_previous:
            self._retain(set())
        self._advance(Update(base=base, steps=(self._add_blob("state", codec, state()),)))

    def extend(self, codec: str, delta: Buffer) -> None:
        """Make the next version from the newest one and a delta."""
        steps = (*self.update.steps, self._add_blob("delta", codec, delta))
        self._advance(self.update.model_copy(update={"steps": steps}))

    def _advance(self, update: Update) -> None:
        self._previous = self.update.digests if self.keep_previous else set()
        self._fp32_state = None
        self.update, self.version = update, update.version
        self._retain(update.digests | self._previous)

    # --- snapshots ------------------------------------------------------------------------------------------------

    @property
    def wants_snapshot(self) -> bool:
        """Return whether the deltas since the last whole state take as many bytes as it."""
        at, state = self._last_state
        deltas = [step.bytes for step in self.update.steps[at:]]
        return len(deltas) >= MAX_DELTAS or (len(deltas) >= MIN_DELTAS and sum(deltas) >= state.bytes)

    def add_snapshot(self, state: Buffer) -> None:
        """Add a snapshot of the newest version. The update then begins at the whole state before it."""
        first, previous = self._last_state
        steps = self.update.steps[first:]
        new = self._add_blob("state", "fp32", state).ref
        snapshots = (StateSnapshot(steps=0, blob=previous), StateSnapshot(steps=len(steps), blob=new))
        self.update = Update(base=self.update.versions[first], steps=steps, snapshots=snapshots)
        self._retain(self.update.digests | self._previous)

    def with_snapshot(self, state: Callable[[], Buffer]) -> Update:
        """Return the update for a miner that reads only fp32. `state` is called at most once a version."""
        steps = self.update.steps
        last = steps[-1]
        if last.kind == "state" and last.codec == "fp32":
            return self.update
        at, whole = self._last_state
        if at < len(steps) or last.kind == "state":
            whole = self._fp32_state = self._fp32_state or self._add_blob("state", "fp32", state()).ref
        return self.update.model_copy(update={"snapshots": (StateSnapshot(steps=len(steps), blob=whole),)})

    @property
    def is_complete(self) -> bool:
        """Return whether the bytes of the newest whole state and of the deltas after it are here, for a newcomer."""
        at, state = self._last_state
        return {state.digest, *(step.digest for step in self.update.steps[at:])} <= self.blobs.keys()

    @property
    def _last_state(self) -> tuple[int, BlobRef]:
        """Return the newest whole state, and the number of steps up to it."""
        steps = [(at, step.ref) for at, step in enumerate(self.update.steps, 1) if step.kind == "state"]
        return max([*steps, *((s.steps, s.blob) for s in self.update.snapshots)], key=lambda state: state[0])

    # --- the bytes ------------------------------------------------------------------------------------------------

    def restore(self, update: Update) -> None:
        """Continue from the update of an earlier process, with those of its blobs that are stored."""
        self._previous, self._fp32_state, self.blobs = set(), None, {}
        self.update, self.version = update, update.version
        self.blobs = dict(self.find(update))

    def find(self, update: Update) -> Blobs:
        """Return the blobs of an update that are here; the update may be that of an order."""
        found = ((ref.digest, self.blobs.get(ref.digest) or self._store.get(ref)) for ref in update.refs)
        return {name: data for name, data in found if data is not None}

    def _add_blob(self, kind: Literal["state", "delta"], codec: str, data: Buffer) -> VersionStep:
        step = VersionStep(kind=kind, codec=codec, digest=digest(kind, data), bytes=memoryview(data).nbytes)
        self.blobs[step.digest] = self._store.put(step.ref, data)
        return step

    def _retain(self, digests: set[Digest]) -> None:
        self.blobs = {name: data for name, data in self.blobs.items() if name in digests}
        self._store.retain(digests)
