"""What a hostile peer may send as a message: numbers out of range, odd JSON, no text at all, what costs memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol import (
    MAX_INDEX,
    MAX_MESSAGE_BYTES,
    MAX_MESSAGE_MARKS,
    MAX_RANGES,
    Message,
    Order,
    ProtocolError,
    Range,
    Refusal,
    Signed,
    Stop,
    TaskSpec,
)
from tests.test_protocol import GOLDEN, ORDER, SAMPLES, WHICH

ROOT = Path(__file__).resolve().parent.parent.parent


def refusal(cls: type[Message] | type[Signed], text: str | bytes) -> str:
    """Why the text is refused, once it is seen that the reason is fit for a receipt."""
    with pytest.raises(ProtocolError) as caught:
        cls.parse(text)
    reason = str(caught.value)
    assert 0 < len(reason) <= 500
    assert reason.isprintable()
    assert Refusal(reason=reason).reason == reason
    return reason


# --- numbers ----------------------------------------------------------------------------------------------------------

OUT_OF_RANGE = ["-1", str(-(1 << 63)), str(1 << 63), str(1 << 64), "9" * 400, "9" * 5000, "1e400", "-1e400", "1e3"]
OUT_OF_RANGE += ["7.0", "NaN", "Infinity", "0x7", "07", "7_0", "+7", '"7"', "true", "null", "[7]"]
COUNTS = [
    ("order", '"round":7', '"round":{}', "round"),
    ("order", '"ranges":[[0,', '"ranges":[[{},', "ranges"),
    ("order", '"ranges":[[0,4', '"ranges":[[0,{}', "ranges"),
    ("order", '"bytes":1073741824', '"bytes":{}', "data.blobs.tokens.bytes"),
    ("order", '"bytes":497759232', '"bytes":{}', "update.snapshots.0.blob.bytes"),
    ("order", '"bytes":33053286', '"bytes":{}', "update.steps.1.bytes"),
    ("order", '"steps":1,', '"steps":{},', "update.snapshots.0.steps"),
    ("order", '"staleness":0', '"staleness":{}', "staleness"),
    ("reply", '"payload_bytes":123', '"payload_bytes":{}', "payload_bytes"),
    ("receipt", '"work":4096', '"work":{}', "work"),
    ("status", '"batches_done":3', '"batches_done":{}', "batches_done"),
    ("refusal", '"time_ns":3', '"time_ns":{}', "time_ns"),
]


@pytest.mark.parametrize("number", OUT_OF_RANGE, ids=lambda number: number[:20])
@pytest.mark.parametrize(("kind", "old", "new", "field"), COUNTS, ids=lambda part: part if part.isalpha() else "")
def test_a_count_out_of_range_is_refused(kind: str, old: str, new: str, field: str, number: str) -> None:
    text = SAMPLES[kind].text()
    assert text.count(old) == 1
    reason = refusal(type(SAMPLES[kind]), text.replace(old, new.format(number)))
    assert f": {field}" in reason or "Invalid JSON" in reason


def test_the_largest_index_is_exact_and_the_next_is_refused() -> None:
    text = ORDER.text()
    assert Order.parse(text).ranges[-1].stop == MAX_INDEX
    assert "ranges.1.1" in refusal(Order, text.replace(str(MAX_INDEX), str(MAX_INDEX + 1)))


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "-Infinity", "9" * 400 + ".0"])
@pytest.mark.parametrize(("kind", "field"), [("order", "deadline_s"), ("reply", "loss"), ("receipt", "weight")])
def test_a_number_beyond_any_float_is_refused(kind: str, field: str, number: str) -> None:
    text = re.sub(rf'"{field}":[^,}}]+', f'"{field}":{number}', SAMPLES[kind].text())
    assert field in refusal(type(SAMPLES[kind]), text)


# --- odd JSON and no text ---------------------------------------------------------------------------------------------

TEXT = SAMPLES["stop"].text()
ODD: dict[str, tuple[str | bytes, str]] = {
    "cut short": (TEXT[:-1], "EOF"),
    "something after it": (TEXT + "{}", "trailing characters"),
    "a byte order mark": (b"\xef\xbb\xbf" + TEXT.encode(), "Invalid JSON"),
    "UTF-16": (TEXT.encode("utf-16"), "Invalid JSON"),
    "a NUL at the end": (TEXT + "\0", "trailing characters"),
    "a NUL in a name": (TEXT.replace("demo", "de\0mo"), "control character"),
    "an escaped NUL in a name": (TEXT.replace("demo", r"de\u0000mo"), "run"),
    "bytes that are no UTF-8": (TEXT.encode().replace(b"demo", b"\xff\xfe"), "Invalid JSON"),
    "a surrogate in UTF-8": (TEXT.encode().replace(b"demo", b"\xed\xa0\x80"), "Invalid JSON"),
    "a lone surrogate, escaped": (TEXT.replace("demo", r"\ud800"), "Invalid JSON"),
    "a lone surrogate in a str": (TEXT.replace("demo", "\ud800"), "Stop: "),
    "a field named by a lone surrogate": (TEXT.replace('"run"', r'"\udfff"'), "Invalid JSON"),
    "overlong UTF-8": (TEXT.encode().replace(b"demo", b"\xc0\xae"), "Invalid JSON"),
    "a comment": (TEXT.replace(",", ",/**/", 1), "Invalid JSON"),
    "a comma too many": (TEXT.replace("}", ",}"), "Invalid JSON"),
    "single quotes": (TEXT.replace('"', "'"), "Invalid JSON"),
    "lists as deep as the stack": (TEXT.replace('"demo"', "[" * 10_000 + "]" * 10_000), "recursion limit"),
    "objects as deep as the stack": (TEXT.replace('"demo"', '{"a":' * 10_000 + "1" + "}" * 10_000), "recursion limit"),
    "lists too deep to count": ("[" * (MAX_MESSAGE_BYTES - 1), "commas and brackets"),
    "a message in a list": (f"[{TEXT}]", "object"),
    "a message in a text": (json.dumps(TEXT), "object"),
    "a text of a megabyte": (TEXT.replace("demo", "d" * (MAX_MESSAGE_BYTES - len(TEXT))), "run"),
    "a byte more than a megabyte": (" " * (MAX_MESSAGE_BYTES + 1), "at most 1048576"),
    "a field there twice, at last wrong": (TEXT.replace('"round":7', '"round":7,"round":-7'), "round"),
    "another field there twice": (TEXT.replace('"round":7', '"round":7,"Round":7'), "Round"),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_text_is_refused_in_one_line(odd: str) -> None:
    text, reason = ODD[odd]
    assert reason in refusal(Stop, text)


def test_of_a_field_there_twice_the_last_counts_for_everybody() -> None:
    """No harm: the signature covers the text, and every reader of it is this parser."""
    stop = Stop.parse(TEXT.replace('"round":7', '"round":-7,"round":8'))
    assert stop == SAMPLES["stop"].model_copy(update={"round": 8})
    assert stop.text().count('"round"') == 1


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY = """
import sys
import protocol
from tests.fuzz import peak

cls, text = getattr(protocol, sys.argv[1]), sys.stdin.buffer.read()
for small in (b"{}", b"{"):
    try:
        cls.parse(small)
    except protocol.ProtocolError:
        pass
before = peak()
try:
    cls.parse(text)
except protocol.ProtocolError as error:
    print(error)
print(peak() - before)
"""
HUNGRY: dict[str, tuple[str, str, Callable[[int], str], str]] = {
    "lists for ranges": ("Order", '{"ranges":[', lambda i: "[]", "]}"),
    "numbers for ranges": ("Order", '{"ranges":[', lambda i: "1", "]}"),
    "objects for blobs": ("Refusal", '{"missing":[', lambda i: "{}", "]}"),
    "lists for parameters": ("Order", '{"task":{"parameters":{', lambda i: f'"{i:x}":[]', "}}}"),
    "unknown fields": ("Order", "{", lambda i: f'"{i:x}":1', "}"),
    "digests that are none": ("Refusal", '{"held":{', lambda i: f'"{i:x}":[]', "}}"),
}


@pytest.mark.parametrize("most", [MAX_MESSAGE_MARKS - 8, MAX_MESSAGE_BYTES])
@pytest.mark.parametrize("hungry", HUNGRY)
def test_memory_stays_in_proportion(hungry: str, most: int) -> None:
    """A megabyte of small values took a gigabyte: each became several objects, and each error told all of them."""
    kind, opening, piece, closing = HUNGRY[hungry]
    pieces, marks, size = [], 0, len(opening) + len(closing)
    while marks < most and size < MAX_MESSAGE_BYTES - 20:
        pieces.append(piece(len(pieces)))
        marks += 1 + sum(pieces[-1].count(mark) for mark in "[{")
        size += len(pieces[-1]) + 1
    text = opening + ",".join(pieces) + closing
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, kind], cwd=ROOT, input=text.encode(), capture_output=True, check=True
    )
    reason, grown = ran.stdout.decode().splitlines()
    assert ("commas and brackets" in reason) == (marks > MAX_MESSAGE_MARKS)
    assert int(grown) < 64 << 20


def test_the_largest_order_passes() -> None:
    ranges = tuple(Range(MAX_INDEX - 2 * i - 1, MAX_INDEX - 2 * i) for i in reversed(range(MAX_RANGES)))
    task = TaskSpec(name="t", parameters={f"p{i}": "x, y" for i in range(64)})
    order = ORDER.model_copy(update={"ranges": ranges, "task": task, **WHICH})
    body = order.text()
    envelope = Signed.model_validate_json(json.dumps({**GOLDEN["signed"], "body": body})).model_dump_json()
    assert Order.parse(Signed.parse(envelope).body) == order


def test_commas_and_brackets_up_to_the_limit() -> None:
    def envelope(marks: int) -> str:
        return json.dumps({**GOLDEN["signed"], "body": ",[{" * (marks // 3) + "," * (marks % 3)})

    own = sum(json.dumps({**GOLDEN["signed"], "body": ""}).count(mark) for mark in ",[{")
    assert Signed.parse(envelope(MAX_MESSAGE_MARKS - own))
    assert refusal(Signed, envelope(MAX_MESSAGE_MARKS - own + 1)).startswith(f"Signed: {MAX_MESSAGE_MARKS + 1} commas")
    with pytest.raises(ProtocolError, match=f"{MAX_MESSAGE_MARKS + 1} commas"):
        Signed.parse(envelope(MAX_MESSAGE_MARKS - own + 1).encode())


def test_many_wrong_fields_are_counted_and_few_are_named() -> None:
    def extended(extra: int) -> str:
        return json.dumps(json.loads(TEXT) | {f"x{i}": 1 for i in range(extra)})

    assert refusal(Stop, extended(101)) == "Stop: 101 fields are wrong"
    assert refusal(Stop, extended(100)).startswith("Stop: x0: ")
