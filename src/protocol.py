"""Every message on the wire, its limits, its digests, and what can be wrong with a peer.

    validator                                             miner
        │  GET  /v1/hello?nonce=…      ─────────────────▶  Hello    who are you, what do you hold and speak
        │  POST /v1/order              ─────────────────▶  Status   accepted, or 409 with the blobs it lacks
        │  PUT  /v1/blob?kind=…        ─────────────────▶  Status   state, data or vocabulary, by digest, from an offset
        │  GET  /v1/reply?order=…      ─────────────────▶  Reply    long poll: what was done
        │  GET  /v1/payload?order=…    ─────────────────▶  bytes    the encoded gradient, from an offset
        │  POST /v1/receipt, /v1/stop  ─────────────────▶  Status

Messages are frozen and strict: an unknown field or protocol version is refused, never guessed at. Each travels in a
`Signed` envelope, whose detached signature covers the exact text of the body and its kind, so it stays evidence in a
ledger whichever way it came. This module does no I/O, knows no keys and imports nothing of ours but `digests`.
"""

from __future__ import annotations

import secrets
from enum import StrEnum
from typing import Annotated, ClassVar, Final, Literal, NamedTuple, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from pilot.common.hashing import CONTEXT as CONTEXT
from pilot.common.hashing import PROTOCOL as PROTOCOL
from pilot.common.hashing import Digest as Digest
from pilot.common.hashing import Hasher as Hasher
from pilot.common.hashing import Version as Version
from pilot.common.hashing import digest as digest
from pilot.common.hashing import next_version as next_version

RELEASE: Final = "0.1.0"  # of this program, as pyproject.toml has it

# Limits: what a peer may ask us to hold in memory before anything is believed.
MAX_MESSAGE_BYTES = 1 << 20  # an envelope with its body
MAX_MESSAGE_MARKS = 1 << 14  # commas and opening brackets in it: each can cost 3 KB; MAX_RANGES ranges have 12,288
MAX_ERRORS = 100  # wrong fields in a message, up to which the first is named
MAX_RANGES = 4096
MAX_INDEX = 1 << 53  # every index is exact in a JSON number
MAX_BLOB_BYTES = 1 << 36
MAX_SERVED_BYTES = 64 << 20  # data and vocabularies up to this size come from the validator
MAX_BLOBS = 16  # that an order's data consist of
MAX_STEPS = 64  # of the chain of versions that an order names

HOTKEY_PATTERN: Final = r"[1-9A-HJ-NP-Za-km-z]{46,49}"  # an ss58 address
Hotkey = Annotated[str, StringConstraints(pattern=f"^{HOTKEY_PATTERN}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+-]{1,64}$")]
Text = Annotated[str, StringConstraints(max_length=1000)]
Count = Annotated[int, Field(ge=0, le=MAX_INDEX)]
Seconds = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Nanoseconds = Annotated[int, Field(ge=0, lt=1 << 63)]  # since 1970
# A data set on the hub (OWNER/NAME), its subset or split, and its commit, branch or tag.
DatasetName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}$")
]
HubWord = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}$")]
Revision = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./+-]{0,127}$")]
BlobKind = Literal["state", "delta", "data", "vocabulary"]


class Fault(StrEnum):
    """Why an order came to nothing: data, not an exception. A round goes on without that contribution."""

    SILENT = "SILENT"  # the miner never answered, or went away
    LEAVING = "LEAVING"  # the miner said that it is shutting down
    BUSY = "BUSY"  # the miner works for another validator, or has too many requests under way
    REFUSED = "REFUSED"  # the miner refused the order, for a reason of its own
    LATE = "LATE"  # the miner took the order; no whole reply by the deadline, or before the round was closed
    MALFORMED = "MALFORMED"  # bytes that are not what the protocol, the digest or the codec says
    STALE = "STALE"  # not the version that the order names
    NONFINITE = "NONFINITE"  # NaN or infinity
    WRONG_DATA = "WRONG_DATA"  # other data than the order's, or ranges that were not ordered
    FORGED = "FORGED"  # not a valid signature of the expected key over a message of the expected kind
    OUTLIER = "OUTLIER"  # for rankers and audits: far from the other contributions
    DUPLICATE = "DUPLICATE"  # for rankers and audits: a copy of another miner's contribution
    UNVERIFIED = "UNVERIFIED"  # for audits: the work was checked, and could not be reproduced
    VALIDATOR_FAILED = "VALIDATOR_FAILED"  # the validator could not take the work; not the miner's fault


# What a miner may say of itself by refusing an order. Everything else that it names counts as REFUSED: the other faults
# are found by the validator.
REFUSAL_FAULTS = frozenset({Fault.LEAVING, Fault.BUSY, Fault.LATE, Fault.NONFINITE})


def one_line(text: str) -> str:
    """Text that may quote a peer, fit for a log, a terminal and a receipt: 500 printable characters at most."""
    return "".join(c if c.isprintable() else "?" for c in text[:500])


class ProtocolError(ValueError):
    """A peer's bytes are not what they claim to be: why, in one line. `fault` says which kind of wrong."""

    def __init__(self, reason: str, fault: Fault = Fault.MALFORMED) -> None:
        super().__init__(one_line(reason))
        self.fault = fault


# --- ranges -----------------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """Micro-batch indices start, …, stop - 1, counted across epochs."""

    start: Annotated[int, Field(ge=0, le=MAX_INDEX)]
    stop: Annotated[int, Field(ge=0, le=MAX_INDEX)]


def _ascending(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
    end = 0
    for start, stop in ranges:
        if not end <= start < stop:
            raise ValueError(f"range [{start}, {stop}) is empty, or not after the one before it")
        end = stop
    return ranges


Ranges = Annotated[tuple[Range, ...], Field(max_length=MAX_RANGES), AfterValidator(_ascending)]


M = TypeVar("M", bound=BaseModel)


def _marks(text: str | bytes) -> int:
    """Commas and opening brackets: fewer than the JSON values in the text by one at most. Counted, not parsed."""
    if isinstance(text, str):
        return sum(text.count(mark) for mark in ",[{")
    return sum(text.count(mark) for mark in (b",", b"[", b"{"))


def _validate(cls: type[M], text: str | bytes) -> M:
    if len(text) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{cls.__name__}: {len(text)} bytes, at most {MAX_MESSAGE_BYTES}")
    if (marks := _marks(text)) > MAX_MESSAGE_MARKS:
        raise ProtocolError(f"{cls.__name__}: {marks} commas and brackets, at most {MAX_MESSAGE_MARKS}")
    try:
        return cls.model_validate_json(text)
    except ValidationError as error:
        if error.error_count() > MAX_ERRORS:  # each would become a dictionary with what it found
            raise ProtocolError(f"{cls.__name__}: {error.error_count()} fields are wrong") from None
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "message"
        raise ProtocolError(f"{cls.__name__}: {field}: {first['msg']}") from None


# --- messages ---------------------------------------------------------------------------------------------------------


class Part(BaseModel):
    """A value inside a message."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Message(Part):
    """A typed value of the wire. `kind` is its domain: an order's signature is never a receipt's."""

    kind: ClassVar[str]

    protocol: Literal["pilot/2"] = PROTOCOL

    def text(self) -> str:
        """The body that is signed, sent and kept."""
        return self.model_dump_json()

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Checked bytes of a peer. Raises ProtocolError with one line that names the field."""
        message = _validate(cls, text)
        if "protocol" not in message.model_fields_set:  # its default is for what we send
            raise ProtocolError(f"{cls.__name__}: protocol: Field required")
        return message


class Signed(Part):
    """An envelope: the body's exact text, its signer, and a detached sr25519 signature over `signing_bytes`."""

    kind: Name
    signer: Hotkey
    body: Annotated[str, StringConstraints(max_length=MAX_MESSAGE_BYTES)]
    signature: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        return _validate(cls, text)

    @property
    def digest(self) -> Digest:
        """Names the message, for example an order, in later requests."""
        return digest(self.kind, self.body.encode())


def signing_bytes(kind: str, body: str) -> bytes:
    return f"{PROTOCOL}/{kind}/{digest(kind, body.encode())}".encode()


def new_nonce() -> str:
    return secrets.token_hex(16)


# Where a blob lies: a name, never a URL or a path. A miner's own configuration says what it means; a miner that does
# not know it asks the validator. Left out of messages where it is None: the validator sends the blob.
Source = Annotated[Name | None, Field(exclude_if=lambda source: source is None)]


class BlobRef(Part):
    """Bytes by digest: a model state (safetensors), a delta between two, a token file, a vocabulary.

    References to the same bytes are equal, wherever these lie.
    """

    kind: BlobKind
    digest: Digest
    bytes: Annotated[int, Field(ge=1, le=MAX_BLOB_BYTES)]
    source: Source = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlobRef) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, Digest, int]:
        return self.kind, self.digest, self.bytes


class TaskSpec(Part):
    """A task by name, with plain parameters that the task itself validates: never code, never a path."""

    name: Name
    parameters: Annotated[dict[Name, int | Number | bool | Text], Field(max_length=64)]


class DatasetRef(Part):
    """A hub data set, for data too large to be sent. `DataSpec.parameters` says how many rows of it make the data.

    No field can name a path, a URL, or a loader of the `datasets` library, such as `csv`.
    """

    name: DatasetName
    subset: HubWord | None
    split: HubWord
    revision: Revision | None


class DataSpec(Part):
    """The data of an order: blobs under the names that its task gives them, and how to make those that are too large.

    The validator sends blobs of up to MAX_SERVED_BYTES. A miner makes a larger one from its own copy or from `source`,
    by the task's own `parameters`, and its digest must match.
    """

    blobs: Annotated[dict[Name, BlobRef], Field(min_length=1, max_length=MAX_BLOBS)]
    source: DatasetRef | None = None
    parameters: Annotated[dict[Name, int | Number | bool | Text], Field(max_length=64)] = {}

    @model_validator(mode="after")
    def _are_data(self) -> Self:
        for name, ref in self.blobs.items():
            if ref.kind not in ("data", "vocabulary"):
                raise ValueError(f"blob {name} is a {ref.kind}, not data")
        return self

    @property
    def digests(self) -> dict[str, Digest]:
        """Return the digest of each blob by its name: what the data are, wherever they come from."""
        return {name: ref.digest for name, ref in self.blobs.items()}


class VersionStep(Part):
    """From one version to the next: a whole state in place of what was there, or a delta to add to it."""

    kind: Literal["state", "delta"]
    codec: Name
    digest: Digest
    bytes: Annotated[int, Field(ge=1, le=MAX_BLOB_BYTES)]
    source: Source = None

    @property
    def ref(self) -> BlobRef:
        return BlobRef(kind=self.kind, digest=self.digest, bytes=self.bytes, source=self.source)


class StateSnapshot(Part):
    """The whole fp32 state that the first `steps` of an update's steps make: a newcomer's short cut."""

    steps: Annotated[int, Field(ge=0, le=MAX_STEPS)]
    blob: BlobRef

    @model_validator(mode="after")
    def _is_a_state(self) -> Self:
        if self.blob.kind != "state":
            raise ValueError(f"a snapshot is a state, not {self.blob.kind}")
        return self

    @property
    def step(self) -> VersionStep:
        """It takes the place of whatever a miner has."""
        blob = self.blob
        return VersionStep(kind="state", codec="fp32", digest=blob.digest, bytes=blob.bytes, source=blob.source)


class Update(Part):
    """The way to the order's version: from `base` by `steps`, the newest last.

    version(t+1) = next_version(version(t), digest of the step).

    A miner that holds one of these versions needs the steps after it; any other needs a whole state and the steps after
    that.
    """

    base: Version | None
    steps: Annotated[tuple[VersionStep, ...], Field(min_length=1, max_length=MAX_STEPS)]
    snapshots: Annotated[tuple[StateSnapshot, ...], Field(max_length=2)] = ()

    @model_validator(mode="after")
    def _snapshots_lie_on_the_way(self) -> Self:
        for snapshot in self.snapshots:
            if snapshot.steps > len(self.steps):
                raise ValueError(f"a snapshot after {snapshot.steps} steps, the way has {len(self.steps)}")
        return self

    @property
    def refs(self) -> tuple[BlobRef, ...]:
        """All that a miner may ask for on the way."""
        return (*(step.ref for step in self.steps), *(snapshot.blob for snapshot in self.snapshots))

    @property
    def digests(self) -> set[Digest]:
        """Return the digests of `refs`."""
        return {*(step.digest for step in self.steps), *(snapshot.blob.digest for snapshot in self.snapshots)}

    @property
    def versions(self) -> tuple[Version | None, ...]:
        """`base`, then the version that each step makes."""
        found = [self.base]
        for step in self.steps:
            found.append(next_version(found[-1], step.digest))
        return tuple(found)

    @property
    def version(self) -> Version:
        version = self.versions[-1]
        assert version is not None  # there is a step
        return version


class InnerSteps(Part):
    """DiLoCo: what a miner's own optimizer does in an order, from the order's version on.

    The payload is then the pseudo-gradient: the parameters of the order's version less those after the inner steps.
    """

    batches: Annotated[int, Field(ge=1, le=MAX_RANGES)]  # micro-batches in an inner step
    first_step: Count  # of the run's schedule: what the first inner step of this order is
    steps: Count  # in the whole run, for the schedule
    keep: bool  # the optimizer's state stays from order to order; else each begins with none
    optimizer: Annotated[dict[Name, int | Number | bool | Text], Field(max_length=64)]  # the task's optimizer's flags


class Order(Message):
    """What one miner shall do in one round. Deadline and budget run on its own clock from when it first hears of it.

    With `staleness` 1 the work begins when that of the order before it ends, and the budget runs from then.
    """

    kind: ClassVar[str] = "order"

    run: Name
    round: Count
    hotkey: Hotkey
    version: Version
    update: Update
    state_digest: Digest | None  # of the version's whole fp32 state, as a snapshot's: once in a while, as a proof
    task: TaskSpec
    data: DataSpec
    ranges: Ranges
    deadline_s: Seconds
    staleness: Annotated[int, Field(ge=0, le=1)]  # and not true, which a Literal takes for 1
    codec_up: Name
    codec_down: Name
    budget_s: Seconds = 0.0  # until the reply shall be there, if the ranges are not done before; 0: only the deadline
    inner_steps: InnerSteps | None = None  # DiLoCo; None: the payload is the mean gradient
    feedback: Annotated[float, Field(ge=0, le=1)] = 0.0  # decay of the miner's error feedback; 0: none


class Reply(Message):
    """What was done. The payload is the sum of the gradients over `done`, divided by the examples or tokens in it; or,
    in an order with `inner_steps`, the pseudo-gradient after inner steps over `done`."""

    kind: ClassVar[str] = "reply"

    run: Name
    round: Count
    hotkey: Hotkey
    order: Digest
    version: Version
    done: Ranges
    loss: Number  # mean over `done`, as the miner saw it: for display, never for pay
    seconds: Seconds
    codec: Name
    payload_digest: Digest
    payload_bytes: Count
    residual_before: Digest | None  # error feedback: of the residual that was added; None: a plain encoding
    residual_after: Digest | None  # and of what is left, once the receipt says ACCEPTED


class Receipt(Message):
    """What became of an order, why, and what it earned."""

    kind: ClassVar[str] = "receipt"

    run: Name
    round: Count
    hotkey: Hotkey
    order: Digest
    verdict: Literal["ACCEPTED"] | Fault
    reason: Text
    done: Ranges  # accepted: in the model now
    work: Count  # examples or tokens in them, by the validator's own count
    scores: dict[Name, Number]  # of the ranker
    measures: dict[Name, Number] = {}  # of the contribution, which the ranker has asked for
    weight: Number
    seconds: Seconds = 0.0  # from the order to the whole reply, on the validator's clock; 0: none came


class Stop(Message):
    """End the work of an order now; what is done can still be fetched."""

    kind: ClassVar[str] = "stop"

    run: Name
    round: Count
    hotkey: Hotkey
    order: Digest


class Hello(Message):
    """A miner proves its hotkey by signing the caller's nonce, and says what it can do."""

    kind: ClassVar[str] = "hello"

    hotkey: Hotkey
    nonce: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    tasks: tuple[Name, ...]
    codecs: tuple[Name, ...]
    version: Version | None
    time_ns: Nanoseconds


class Announce(Message):
    """A miner tells a validator where it serves, or that it will pull its orders; and when it leaves."""

    kind: ClassVar[str] = "announce"

    hotkey: Hotkey
    endpoint: Text | None  # HOST:PORT; an empty host is the address that the announcement comes from; None: it pulls
    tls: bool
    tasks: Annotated[tuple[Name, ...], Field(max_length=64)]
    codecs: Annotated[tuple[Name, ...], Field(max_length=64)]
    leaving: bool
    time_ns: Nanoseconds


class Status(Message):
    """What a miner is doing."""

    kind: ClassVar[str] = "status"

    hotkey: Hotkey
    state: Literal["idle", "working", "done", "leaving"]
    order: Digest | None
    run: Name | None
    round: Count | None
    version: Version | None
    batches_done: Count
    time_ns: Nanoseconds


class Health(Part):
    """What anyone may ask of a miner or a validator, unsigned: GET /v1/status; HTTP 503 where it is not healthy."""

    protocol: Literal["pilot/2"] = PROTOCOL
    release: Text = RELEASE
    role: Literal["miner", "validator"]
    hotkey: Hotkey
    healthy: bool
    state: Text
    run: Name | None
    round: Count | None
    version: Version | None  # of the model
    time_ns: Nanoseconds
    commit_age_s: float | None = None  # seconds since a validator's last commit
    miners: dict[Text, Count] | None = None  # of a validator, by state: working, idle, away


class Refusal(Message):
    """The body of an error response. It decides something only if a header signs it for the request that it answers."""

    kind: ClassVar[str] = "refusal"

    reason: Text
    fault: Fault | None = None
    missing: tuple[BlobRef, ...] = ()
    held: dict[Digest, Count] = {}  # bytes of a missing blob that are here: send it from there on
    time_ns: Nanoseconds = 0  # the server's clock, for people: a caller signs by what a hello says, which is signed


MESSAGES: dict[str, type[Message]] = {m.kind: m for m in (Hello, Announce, Order, Reply, Status, Stop, Receipt)}
