"""Messages as text: what is fixed for good, and what is refused.

tests/golden/protocol.json holds texts, digests and a signature as they were first sent. A version that changes one of
them cannot read the ledgers and receipts that exist: then `PROTOCOL` changes too.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pilot.interfaces import Faulted
from pilot.transport.auth import verify_message
from protocol import (
    MAX_INDEX,
    MAX_MESSAGE_BYTES,
    MAX_RANGES,
    MESSAGES,
    RELEASE,
    Announce,
    BlobRef,
    DatasetRef,
    DataSpec,
    Fault,
    Hasher,
    Hello,
    InnerSteps,
    Message,
    Order,
    ProtocolError,
    Range,
    Receipt,
    Refusal,
    Reply,
    Signed,
    StateSnapshot,
    Status,
    Stop,
    TaskSpec,
    Update,
    VersionStep,
    digest,
    next_version,
    signing_bytes,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "protocol.json").read_text())
SETTINGS = settings(derandomize=True, max_examples=100, deadline=None, database=None)

ALICE = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
A, B, C = "a" * 64, "b" * 64, "c" * 64
WHICH: dict[str, Any] = {"run": "demo", "round": 7, "hotkey": ALICE}

ORDER = Order(
    **WHICH,
    version=next_version(next_version(A, B), C),
    update=Update(
        base=A,
        steps=(
            VersionStep(kind="state", codec="bf16", digest=B, bytes=248_879_616),
            VersionStep(kind="delta", codec="2bit", digest=C, bytes=33_053_286),
        ),
        snapshots=(StateSnapshot(steps=1, blob=BlobRef(kind="state", digest=A, bytes=497_759_232)),),
    ),
    state_digest=A,
    task=TaskSpec(name="gpt2", parameters={"n_layer": 12, "layer_norm_epsilon": 1e-05, "tie": True, "act": "gelu_new"}),
    data=DataSpec(
        blobs={
            "tokens": BlobRef(kind="data", digest=C, bytes=1 << 30),
            "vocabulary": BlobRef(kind="vocabulary", digest=A, bytes=1_500_000),
        },
        source=DatasetRef(name="tiiuae/falcon-refinedweb", subset=None, split="train", revision="main"),
        parameters={"tokenizer": "gpt2", "column": "content", "rows": 100_000},
    ),
    ranges=(Range(0, 4), Range(8, MAX_INDEX)),
    deadline_s=300.0,
    staleness=0,
    codec_up="bf16",
    codec_down="2bit",
    budget_s=60.0,
    inner_steps=InnerSteps(batches=4, first_step=1500, steps=20_000, keep=False, optimizer={"lr": 6e-4, "warmup": 100}),
    feedback=0.9,
)
REPLY = Reply(
    **WHICH,
    order=B,
    version=A,
    done=(Range(0, 4), Range(8, 9)),
    loss=5.545177,
    seconds=12.5,
    codec="bf16",
    payload_digest=C,
    payload_bytes=123,
    residual_before=None,
    residual_after=A,
)
RECEIPT = Receipt(
    **WHICH,
    order=B,
    verdict="ACCEPTED",
    reason="5 of 8 – done",
    done=(Range(0, 4),),
    work=4096,
    scores={"accepted_work": 1e6},
    weight=0.25,
    seconds=59.5,
)
SAMPLES: dict[str, Message] = {
    "order": ORDER,
    "reply": REPLY,
    "receipt": RECEIPT,
    "stop": Stop(**WHICH, order=C),
    "announce": Announce(
        hotkey=ALICE, endpoint=":8091", tls=False, tasks=("gpt2",), codecs=("fp32",), leaving=False, time_ns=4
    ),
    "hello": Hello(hotkey=ALICE, nonce="0" * 32, tasks=("gpt2",), codecs=("fp32", "bf16"), version=None, time_ns=1),
    "status": Status(hotkey=ALICE, state="working", order=A, run="demo", round=7, version=B, batches_done=3, time_ns=2),
    "refusal": Refusal(
        reason="busy", fault=Fault.BUSY, missing=(BlobRef(kind="state", digest=A, bytes=9),), held={A: 4}, time_ns=3
    ),
}


# --- fixed for good ---------------------------------------------------------------------------------------------------


def test_every_message_has_a_golden_sample() -> None:
    assert SAMPLES.keys() == GOLDEN["messages"].keys() == MESSAGES.keys() | {"refusal"}
    assert all(type(SAMPLES[kind]) is MESSAGES[kind] for kind in MESSAGES)


@pytest.mark.parametrize("kind", SAMPLES)
def test_text_digest_and_signing_bytes_are_golden(kind: str) -> None:
    message, golden = SAMPLES[kind], GOLDEN["messages"][kind]
    assert message.text() == golden["text"]
    assert type(message).parse(golden["text"]) == message
    assert digest(kind, golden["text"].encode()) == golden["digest"]
    assert signing_bytes(kind, golden["text"]).decode() == golden["signing_bytes"]


@pytest.mark.parametrize("kind", GOLDEN["earlier"])
def test_what_was_kept_before_a_field_was_added_is_still_read(kind: str) -> None:
    """The new field has its default, and everything else is as it was."""
    earlier = GOLDEN["earlier"][kind]
    message = MESSAGES[kind].parse(earlier)
    assert json.loads(message.text()).items() >= json.loads(earlier).items()


def test_the_release_is_that_of_the_package() -> None:
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert pyproject["project"]["version"] == RELEASE


def test_golden_signature_holds() -> None:
    """sr25519 salts its signatures, so an old one is verified rather than made again."""
    signed = Signed.parse(json.dumps(GOLDEN["signed"]))
    assert verify_message(signed, Order, ALICE) == ORDER


def test_version_chain_is_golden() -> None:
    version, versions = None, []
    for update in (A, B, B):
        version = next_version(version, update)
        versions.append(version)
    assert versions == GOLDEN["chain"]
    assert len(set(versions)) == 3  # the same update twice makes two versions
    pair = bytes.fromhex(versions[1]) + bytes.fromhex(B)
    assert versions[2] == blake3(pair, derive_key_context="pilot/1 version").hexdigest()


@pytest.mark.parametrize("domain", GOLDEN["domains"])
def test_digest_of_each_domain_is_golden(domain: str) -> None:
    assert digest(domain, b"pilot") == GOLDEN["domains"][domain]


def test_equal_bytes_of_different_kinds_never_share_a_digest() -> None:
    domains = [*MESSAGES, "payload", "state", "delta", "data", "vocabulary", "version"]
    assert set(domains) == GOLDEN["domains"].keys()
    assert len({digest(domain, b"same") for domain in domains}) == len(domains)
    assert len({signing_bytes(kind, "same") for kind in MESSAGES}) == len(MESSAGES)


@SETTINGS
@given(st.lists(st.binary(max_size=50), max_size=5))
def test_digest_of_a_stream_is_that_of_the_whole(chunks: list[bytes]) -> None:
    hasher = Hasher("payload")
    for chunk in chunks:
        hasher.update(memoryview(chunk))
    assert hasher.hexdigest() == digest("payload", b"".join(chunks))


# --- round trips ------------------------------------------------------------------------------------------------------

digests = st.text("0123456789abcdef", min_size=64, max_size=64)
names = st.from_regex(r"[A-Za-z0-9_.+-]{1,64}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
counts = st.integers(0, MAX_INDEX)
numbers = st.floats(allow_nan=False, allow_infinity=False)
blobs = st.builds(
    BlobRef,
    kind=st.sampled_from(["state", "delta", "data", "vocabulary"]),
    digest=digests,
    bytes=st.integers(1, 1 << 36),
)
states = st.builds(BlobRef, kind=st.just("state"), digest=digests, bytes=st.integers(1, 1 << 36))
steps = st.builds(
    VersionStep, kind=st.sampled_from(["state", "delta"]), codec=names, digest=digests, bytes=st.integers(1, 1 << 36)
)
snapshots = st.lists(st.builds(StateSnapshot, steps=st.integers(0, 1), blob=states), max_size=2).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[Range, ...]:
    bounds = sorted(draw(st.sets(counts, max_size=12)))
    return tuple(Range(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=False))


words = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}", fullmatch=True)
SHARED: dict[str, st.SearchStrategy[Any]] = {"run": names, "round": counts, "hotkey": st.just(ALICE)}
orders = st.builds(
    Order,
    **SHARED,
    version=digests,
    update=st.builds(
        Update,
        base=st.none() | digests,
        steps=st.lists(steps, min_size=1, max_size=64).map(tuple),
        snapshots=snapshots,
    ),
    state_digest=st.none() | digests,
    task=st.builds(
        TaskSpec,
        name=names,
        parameters=st.dictionaries(
            names, st.integers(-MAX_INDEX, MAX_INDEX) | numbers | st.booleans() | texts, max_size=5
        ),
    ),
    data=st.builds(
        DataSpec,
        blobs=st.dictionaries(
            names, blobs.filter(lambda ref: ref.kind in ("data", "vocabulary")), min_size=1, max_size=3
        ),
        source=st.none()
        | st.builds(
            DatasetRef,
            name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}", fullmatch=True),
            subset=st.none() | words,
            split=words,
            revision=st.none() | words,
        ),
        parameters=st.dictionaries(names, counts | texts | st.floats(0.01, 0.99), max_size=4),
    ),
    ranges=ranges(),
    deadline_s=st.floats(0, 1e7),
    staleness=st.sampled_from([0, 1]),
    codec_up=names,
    codec_down=names,
)
receipts = st.builds(
    Receipt,
    **SHARED,
    order=digests,
    verdict=st.just("ACCEPTED") | st.sampled_from(Fault),
    reason=texts,
    done=ranges(),
    work=counts,
    scores=st.dictionaries(names, numbers, max_size=3),
    weight=numbers,
)


@SETTINGS
@given(orders | receipts)
def test_parse_of_text_is_the_message(message: Message) -> None:
    text = message.text()
    parsed = type(message).parse(text)
    assert parsed == message
    assert parsed.text() == text  # also where == is blind, as between 1 and 1.0 and True


@SETTINGS
@given(st.data())
def test_damaged_text_is_a_message_or_one_line(data: st.DataObject) -> None:
    text = bytearray(ORDER.text().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        parsed = Order.parse(bytes(text))
    except ProtocolError as error:
        assert is_one_line(error)  # noqa: PT017 - either outcome is right
    else:
        assert Order.parse(parsed.text()) == parsed


def is_one_line(error: ProtocolError) -> bool:
    """Fit for a log, a terminal and a receipt: pydantic refuses lone surrogates in its Text."""
    assert Refusal(reason=str(error)).reason == str(error)
    return 0 < len(str(error)) <= 500 and str(error).isprintable()


# --- what is refused --------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


def put(path: str, value: object) -> Change:
    def change(fields: dict[str, Any]) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            fields = fields[parent]
        fields[name] = value

    return change


def change_step(**values: object) -> Change:
    return lambda order: order["update"]["steps"][1].update(values)


def put_in_snapshot(name: str, value: object) -> Change:
    return lambda order: order["update"]["snapshots"][0]["blob"].update({name: value})


def drop(name: str) -> Change:
    return lambda fields: fields.pop(name)


BAD_ORDERS: dict[str, tuple[Change, str]] = {
    "unknown field": (put("priority", 1), "priority"),
    "unknown field inside": (put("task.code", "import os"), "task.code"),
    "a field's name of several lines": (put("a\nb\x1b[31m\u202e", 1), "a?b?[31m?"),
    "unknown protocol": (put("protocol", "pilot/1"), "protocol"),
    "no protocol": (drop("protocol"), "protocol"),
    "missing field": (drop("deadline_s"), "deadline_s"),
    "string for a number": (put("round", "7"), "round"),
    "float for an integer": (put("round", 7.0), "round"),
    "boolean for an integer": (put("round", True), "round"),
    "negative round": (put("round", -1), "round"),
    "round beyond exact JSON numbers": (put("round", MAX_INDEX + 1), "round"),
    "null": (put("hotkey", None), "hotkey"),
    "no address": (put("hotkey", "0x" + "1" * 46), "hotkey"),
    "short digest": (put("version", "ab"), "version"),
    "digest in capitals": (put("version", "A" * 64), "version"),
    "digest and a newline": (put("version", "a" * 64 + "\n"), "version"),
    "NaN deadline": (put("deadline_s", float("nan")), "deadline_s"),
    "infinite deadline": (put("deadline_s", float("inf")), "deadline_s"),
    "negative deadline": (put("deadline_s", -1.0), "deadline_s"),
    "staleness 2": (put("staleness", 2), "staleness"),
    "a way of no steps": (put("update.steps", []), "update.steps"),
    "a way that never ends": (
        lambda order: order["update"].update(steps=65 * order["update"]["steps"]),
        "update.steps",
    ),
    "a step of another kind": (change_step(kind="pickle"), "update.steps.1.kind"),
    "an empty step": (change_step(bytes=0), "update.steps.1.bytes"),
    "a huge step": (change_step(bytes=1 << 60), "update.steps.1.bytes"),
    "a step by a path": (change_step(codec="../zip"), "update.steps.1.codec"),
    "three snapshots": (
        lambda order: order["update"].update(snapshots=3 * order["update"]["snapshots"]),
        "update.snapshots",
    ),
    "a snapshot that is a delta": (put_in_snapshot("kind", "delta"), "update.snapshots.0"),
    "a snapshot beyond the way": (lambda order: order["update"]["snapshots"][0].update(steps=3), "update: "),
    "inner steps of nothing": (put("inner_steps.batches", 0), "inner_steps.batches"),
    "feedback that grows": (put("feedback", 1.01), "feedback"),
    "a task that is a path": (put("task.name", "../../evil"), "task.name"),
    "a parameter that is a list": (put("task.parameters", {"n": [1]}), "task.parameters"),
    "a parameter that is NaN": (put("task.parameters", {"n": float("nan")}), "task.parameters"),
    "a parameter's name of several lines": (put("task.parameters", {"a\nb": 1}), "task.parameters"),
    "too many parameters": (put("task.parameters", {f"p{i}": i for i in range(65)}), "task.parameters"),
    "a long text": (put("data.column", "x" * 1001), "data.column"),
    "all the text for validation": (put("data.validation", 1.0), "data.validation"),
}
BAD_RANGES: dict[str, object] = {
    "overlapping": [[0, 4], [3, 5]],
    "descending": [[4, 8], [0, 4]],
    "twice": [[0, 4], [0, 4]],
    "empty": [[3, 3]],
    "backwards": [[5, 3]],
    "negative": [[-1, 3]],
    "huge": [[0, MAX_INDEX + 1]],
    "astronomical": [[0, 10**4000]],
    "one bound": [[0]],
    "three bounds": [[0, 1, 2]],
    "floats": [[0.0, 1.0]],
    "strings": [["0", "1"]],
    "a number": 7,
    "too many": [[2 * i, 2 * i + 1] for i in range(MAX_RANGES + 1)],
}


@pytest.mark.parametrize("wrong", BAD_ORDERS)
def test_bad_order_is_one_line_that_names_the_field(wrong: str) -> None:
    change, field = BAD_ORDERS[wrong]
    fields = json.loads(ORDER.text())
    change(fields)
    with pytest.raises(ProtocolError) as caught:
        Order.parse(json.dumps(fields))
    assert is_one_line(caught.value)
    assert str(caught.value).startswith(f"Order: {field}")
    assert caught.value.fault is Fault.MALFORMED


@pytest.mark.parametrize("wrong", BAD_RANGES)
@pytest.mark.parametrize(("sample", "field"), [(ORDER, "ranges"), (REPLY, "done"), (RECEIPT, "done")])
def test_bad_ranges_are_refused(sample: Message, field: str, wrong: str) -> None:
    fields = json.loads(sample.text()) | {field: BAD_RANGES[wrong]}
    with pytest.raises(ProtocolError, match=f"{type(sample).__name__}: {field}") as caught:
        type(sample).parse(json.dumps(fields))
    assert is_one_line(caught.value)


def test_ranges_that_touch_and_none_at_all_are_fine() -> None:
    for good in ([], [[0, 1], [1, 2]], [[MAX_INDEX - 1, MAX_INDEX]]):
        assert Order.parse(json.dumps(json.loads(ORDER.text()) | {"ranges": good})).ranges == tuple(map(tuple, good))


@pytest.mark.parametrize("cls", [*MESSAGES.values(), Refusal, Signed])
@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b'"order"',
        b"{",
        b"{}",
        b"\xff\xfe",
        b'{"protocol":"pilot/\xff"}',
        '{"\ud800": 1}',
        rb'{"\ud800": 1}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"round":' + b"9" * 10_000 + b"}",
        b"\x80\x04K\x01.",  # a pickle
        b" " * (MAX_MESSAGE_BYTES + 1),
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_text_that_is_no_message_is_one_line(cls: type[Message], text: str | bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        cls.parse(text)
    assert is_one_line(caught.value)


def test_message_of_exactly_the_limit_is_read() -> None:
    text = ORDER.text()
    padded = text + " " * (MAX_MESSAGE_BYTES - len(text))
    assert Order.parse(padded) == ORDER
    with pytest.raises(ProtocolError, match="at most"):
        Order.parse(padded + " ")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["loss", "seconds"])
def test_number_that_is_not_finite_is_refused(field: str, number: str) -> None:
    text = json.dumps(json.loads(REPLY.text()) | {field: "HERE"}).replace('"HERE"', number)
    with pytest.raises(ProtocolError, match=f"Reply: {field}"):
        Reply.parse(text)


@pytest.mark.parametrize("time_ns", [-1, 1 << 63, 10**4000])
def test_clock_out_of_this_world_is_refused(time_ns: int) -> None:
    with pytest.raises(ProtocolError, match="time_ns"):
        Refusal.parse(json.dumps(json.loads(SAMPLES["refusal"].text()) | {"time_ns": time_ns}))


def test_message_does_not_parse_as_another_kind() -> None:
    for kind, message in SAMPLES.items():
        for other in SAMPLES.keys() - {kind}:
            with pytest.raises(ProtocolError):
                type(SAMPLES[other]).parse(message.text())


@pytest.mark.parametrize("change", [{"signature": "0" * 127}, {"signature": "Z" * 128}, {"kind": "a b"}, {"extra": 1}])
def test_bad_envelope_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="Signed: "):
        Signed.parse(json.dumps(GOLDEN["signed"] | change))


@pytest.mark.parametrize("fault", Fault)
def test_every_fault_is_a_verdict(fault: Fault) -> None:
    receipt = RECEIPT.model_copy(update={"verdict": fault})
    parsed = Receipt.parse(receipt.text())
    assert parsed.verdict is fault
    assert json.loads(receipt.text())["verdict"] == fault.value == fault.name


def test_verdict_of_another_protocol_is_refused() -> None:
    with pytest.raises(ProtocolError, match="Receipt: verdict"):
        Receipt.parse(json.dumps(json.loads(RECEIPT.text()) | {"verdict": "FORGIVEN"}))


def test_peers_words_cannot_break_a_receipt() -> None:
    """A lone surrogate would not encode, a newline or an escape would forge lines of a log."""
    words = "tensor \ud800\n\x1b[2J gone" + "x" * 1000
    for reason in (str(ProtocolError(words)), Faulted(Fault.MALFORMED, words).reason):
        assert reason.startswith("tensor ???[2J gone")
        assert len(reason) == 500
        assert Receipt.parse(RECEIPT.model_copy(update={"reason": reason}).text()).reason == reason


def test_messages_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ORDER.round = 8
