"""What a hostile miner may send as a gradient: exactly the right tensors, or one line on why not. Nothing in between.

Valid for the safetensors library is not good enough: a payload has one canonical form, and anything else is refused.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilot.codec import CODECS, DENSE, load_codec
from protocol import ProtocolError, Refusal

SETTINGS = settings(derandomize=True, max_examples=300, deadline=None, database=None)
ROOM = 1 << 20  # bytes that a refusal may need

GRADIENT = {"b": torch.tensor([1.0, 2.0, 3.0]), "scale": torch.tensor(4.0), "w": torch.arange(6.0).view(2, 3)}
SPECS = {name: t.shape for name, t in GRADIENT.items()}
Header = dict[str, Any]


def encoded(codec: str = "fp32") -> bytes:
    return bytes(load_codec(codec).encode(GRADIENT))


def split(payload: bytes) -> tuple[Header, bytes]:
    size = int.from_bytes(payload[:8], "little")
    return json.loads(payload[8 : 8 + size]), payload[8 + size :]


def joined(header: Header | bytes | str, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header, separators=(",", ":")) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    raw += b" " * (-len(raw) % 8)
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def with_header(change: Callable[[Header], object], tail: bytes = b"") -> bytes:
    header, data = split(encoded())
    change(header)
    return joined(header, data + tail)


def with_entry(name: str, **fields: object) -> bytes:
    return with_header(lambda header: header[name].update(fields))


def renamed(old: str, new: str) -> bytes:
    header, data = split(encoded())
    return joined({new if name == old else name: entry for name, entry in header.items()}, data)


def reordered() -> bytes:
    """The same tensors, rightly described, but the header's entries and the data the other way round."""
    header, data = split(encoded())
    entries, parts, offset = {}, b"", 0
    for name, entry in reversed(header.items()):
        start, end = entry["data_offsets"]
        parts += data[start:end]
        entries[name] = entry | {"data_offsets": [offset, offset + end - start]}
        offset += end - start
    return joined(entries, parts)


def spaced() -> bytes:
    """The same header, with other white space."""
    header, data = split(encoded())
    return joined(json.dumps(header), data)


def duplicated() -> bytes:
    """A name twice, the second time as it should be: JSON readers disagree on which one counts."""
    header, data = split(encoded())
    entry = json.dumps(header["b"] | {"shape": [1 << 40]})
    return joined('{"b":' + entry + "," + json.dumps(header, separators=(",", ":"))[1:], data)


def missing(*names: str) -> bytes:
    return bytes(load_codec("fp32").encode({name: t for name, t in GRADIENT.items() if name not in names}))


def extra(name: str) -> bytes:
    return bytes(load_codec("fp32").encode({**GRADIENT, name: torch.ones(1)}))


def shaped(name: str, *shape: int) -> bytes:
    return bytes(load_codec("fp32").encode({**GRADIENT, name: GRADIENT[name].view(shape)}))


def shift(entry: Header, by: int) -> None:
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


DATA = split(encoded())[1]
HEADER = json.dumps(split(encoded())[0], separators=(",", ":"))
DEEP = 10_000
ATTACKS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no such header"),
    "seven bytes": (b"\0" * 7, "no such header"),
    "eight zeros": (b"\0" * 8, "not JSON"),
    "one byte short": (encoded()[:-1], "bytes where these tensors take"),
    "only the header": (encoded()[: -len(DATA)], "bytes where these tensors take"),
    "half a header": (encoded()[:40], "no such header"),
    "one byte more": (encoded() + b"\0", "bytes where these tensors take"),
    "a megabyte more": (encoded() + b"\0" * ROOM, "bytes where these tensors take"),
    "one byte before": (b"\0" + encoded(), "no such header"),
    "a missing tensor": (missing("scale"), "scale is missing"),
    "all but one missing": (missing("b", "w"), "b is missing (2 in all)"),
    "no tensors": (joined({}, b""), "is missing (3 in all)"),
    "an extra tensor": (extra("backdoor"), "backdoor was not asked for"),
    "an extra tensor, named to break a log": (extra("a\n\x1b[2J"), "a??[2J was not asked for"),
    "an extra tensor with a long name": (extra("x" * 900), "was not asked for"),
    "an extra tensor, named by a lone surrogate": (
        with_header(lambda header: header.update({"\ud800": header["b"]})),
        "? was not asked for",
    ),
    "a renamed tensor": (renamed("w", "v"), "w is missing"),
    "an empty name": (renamed("w", ""), "w is missing"),
    "a transposed shape": (shaped("w", 3, 2), "w: shape [3, 2], expected [2, 3]"),
    "a flat shape": (shaped("w", 6), "w: shape [6], expected [2, 3]"),
    "a shape for a scalar": (shaped("scale", 1), "scale: shape [1], expected []"),
    "a huge shape": (with_entry("w", shape=[1 << 40, 1 << 40]), "w: shape"),
    "a shape whose product overflows to the right one": (with_entry("w", shape=[2, 3, 1 << 32, 1 << 32]), "w: shape"),
    "a shape of nothing": (with_entry("w", shape=[0, 1 << 63]), "w: shape"),
    "a shape of floats": (with_entry("w", shape=[2.0, 3.0]), "not laid out"),
    "a negative shape": (with_entry("w", shape=[-2, -3]), "w: shape [-2, -3]"),
    "a shape that is text": (with_entry("w", shape="\ud800\n"), "w: shape ??"),
    "no shape": (with_header(lambda header: header["w"].pop("shape")), "w: shape None"),
    "another dtype, said": (with_entry("w", dtype="F64"), "w: dtype F64, expected F32"),
    "another dtype, meant": (encoded("bf16"), "b: dtype BF16, expected F32"),
    "a dtype that takes fewer bytes": (with_entry("w", dtype="U8"), "w: dtype U8, expected F32"),
    "a dtype that is none": (with_entry("b", dtype=["\x00"]), "b: dtype"),
    "an entry that is none": (with_header(lambda header: header.update(b=None)), "b: dtype None"),
    "overlapping offsets": (with_entry("w", data_offsets=[0, 24]), "not laid out"),
    "offsets with a gap": (with_entry("w", data_offsets=[20, 44]), "not laid out"),
    "negative offsets": (with_entry("w", data_offsets=[-24, 0]), "not laid out"),
    "offsets that overflow": (with_entry("w", data_offsets=[1 << 63, (1 << 64) + 24]), "not laid out"),
    "offsets beyond 2^53": (with_entry("w", data_offsets=[1 << 53, (1 << 53) + 24]), "not laid out"),
    "offsets that wrap around": (with_entry("w", data_offsets=[(1 << 64) - 24, 0]), "not laid out"),
    "offsets that run backwards": (with_entry("w", data_offsets=[40, 16]), "not laid out"),
    "offsets beyond the data": (with_entry("w", data_offsets=[16, 4096]), "not laid out"),
    "offsets as floats": (with_entry("w", data_offsets=[16.0, 40.0]), "not laid out"),
    "offsets of 400 digits": (with_entry("w", data_offsets=[0, 10**400]), "not laid out"),
    "two tensors in one place": (with_entry("b", data_offsets=[12, 16]), "not laid out"),
    "a hole at the start": (
        with_header(lambda header: [shift(entry, 4) for entry in header.values()], b"\0" * 4),
        "laid",
    ),
    "offsets that are text": (with_entry("w", data_offsets="all"), "not laid out"),
    "another order": (reordered(), "not laid out"),
    "other white space": (spaced(), "not laid out"),
    "a duplicate name": (duplicated(), "not laid out"),
    "a duplicate field": (
        joined(HEADER.replace('"dtype":"F32"', '"dtype":"I8","dtype":"F32"', 1), DATA),
        "not laid out",
    ),
    "every name twice": (joined(HEADER[:-1] + "," + HEADER[1:], DATA), "not laid out"),
    "metadata": (with_header(lambda header: header.update(__metadata__={"a": "b"})), "__metadata__ was not asked for"),
    "another field": (with_entry("w", hook="os.system"), "not laid out"),
    "a header that is a list": (joined("[1,2,3]", DATA), "not an object"),
    "a header that is a number": (joined("1" * 100, DATA), "not an object"),
    "a header of too many digits": (joined("1" * 1200, DATA), "header"),
    "a header that is no JSON": (joined("{b:", DATA), "not JSON"),
    "a header that is no text": (joined(b"\xff" * 64, DATA), "not JSON"),
    "a header with a byte order mark": (joined(b"\xef\xbb\xbf" + HEADER.encode(), DATA), "not laid out"),
    "a header in UTF-16": (joined(HEADER.encode("utf-16"), DATA), "not JSON"),
    "a header with a NUL": (joined(HEADER + "\0", DATA), "not JSON"),
    "a header with bytes that are no UTF-8": (
        joined(HEADER.encode().replace(b"scale", b"sc\xff\xfee"), DATA),
        "not JSON",
    ),
    "a header of lists as objects": (joined('{"b":' * 200, DATA), "not JSON"),
    "a deep header": (joined("[" * 1200, DATA), "not JSON"),
    "a deep shape": (with_entry("w", shape=[[[[[[[[1]]]]]]]]), "w: shape"),
    "a very deep header": (joined("[" * DEEP + "]" * DEEP, DATA), "no such header"),
    "a header longer than the payload": (joined(split(encoded())[0], DATA, length=1 << 20), "no such header"),
    **{
        f"a header of {name}": (joined(split(encoded())[0], DATA, length=length), "no such header")
        for name, length in {
            "4 gigabytes": 4 << 30,
            "2^53": 1 << 53,
            "2^63 - 8, which overflows with the length itself": (1 << 63) - 8,
            "2^63": 1 << 63,
            "2^64 - 8, which is 0 with the length itself": (1 << 64) - 8,
            "2^64 - 1": (1 << 64) - 1,
        }.items()
    },
    "a header of length 0": (joined("", DATA), "not JSON"),
    "a pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR." + b"\0" * 200, "no such header"),
}


def refusal(codec: str, payload: bytes) -> str:
    """Why the payload is refused, once it is seen that the refusal is cheap and fit for a receipt."""
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError) as caught:
            load_codec(codec).decode(bytearray(payload), SPECS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(payload) + ROOM
    reason = str(caught.value)
    assert 0 < len(reason) <= 500
    assert reason.isprintable()
    assert Refusal(reason=reason).reason == reason
    return reason


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0x80000000, 0x00000001])
def test_any_bits_are_a_value_here(bits: int) -> None:
    """NaN with any payload, infinity, -0, denormals: handed on as they are; whether they count is judged later."""
    payload = bytearray(encoded())
    payload[-24:-20] = bits.to_bytes(4, "little")
    decoded = load_codec("fp32").decode(payload, SPECS)
    assert decoded["w"].view(torch.int32)[0, 0].item() & 0xFFFFFFFF == bits


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_refused_in_one_line(attack: str) -> None:
    payload, reason = ATTACKS[attack]
    assert reason in refusal("fp32", payload)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_refused_whatever_the_codec(attack: str) -> None:
    for codec in CODECS:
        payload, _ = ATTACKS[attack]
        if payload != encoded(codec):
            refusal(codec, payload)


def test_specs_of_one_empty_tensor_still_need_their_header() -> None:
    codec, specs = load_codec("fp32"), {"none": torch.Size([0, 5])}
    assert codec.decode(codec.encode({"none": torch.empty(0, 5)}), specs)["none"].shape == (0, 5)
    with pytest.raises(ProtocolError, match="no such header"):
        codec.decode(b"", specs)


def test_shape_of_any_depth() -> None:
    """Around the depth at which Python's own recursion ends, in reading it or in saying what it was."""
    tensors = {f"layer.{i}": torch.ones(1) for i in range(200)}  # a long header of ours allows a long one of theirs
    specs = {name: t.shape for name, t in tensors.items()}
    payload = bytes(load_codec("fp32").encode(tensors))
    for depth in (*range(900, 1020), 5000):
        deep = ('"shape":' + "[" * depth + "]" * depth).encode()
        header = payload[8:-800].replace(b'"shape":[1]', deep, 1)
        with pytest.raises(ProtocolError, match=r"layer.0: shape \[|not JSON"):
            load_codec("fp32").decode(bytearray(joined(header, payload[-800:])), specs)


def right_or_refused(codec: str, payload: bytes) -> None:
    """Decodes to tensors that encode to these very bytes, or is refused as every attack is."""
    try:
        decoded = load_codec(codec).decode(bytearray(payload), SPECS)
    except ProtocolError:
        refusal(codec, payload)
        return
    assert load_codec(codec).encode(decoded) == payload
    assert {name: t.shape for name, t in decoded.items()} == SPECS


@pytest.mark.parametrize("codec", DENSE)
@SETTINGS
@given(st.binary(max_size=400))
def test_random_bytes(codec: str, payload: bytes) -> None:
    right_or_refused(codec, payload)


@pytest.mark.parametrize("codec", DENSE)
@SETTINGS
@given(st.data())
def test_flipped_bits_and_spliced_bytes(codec: str, data: st.DataObject) -> None:
    payload = bytearray(encoded(codec))
    header = 8 + int.from_bytes(payload[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header - 1))
        if data.draw(st.booleans()):
            payload[at] ^= 1 << data.draw(st.integers(0, 7))
        else:
            payload[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    if payload != encoded(codec):
        refusal(codec, bytes(payload))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64"]) | values,
        "shape": st.lists(st.integers(-1, 6), max_size=3) | values,
        "data_offsets": st.lists(st.integers(-8, 48), min_size=2, max_size=2) | values,
    },
)


@pytest.mark.parametrize("codec", DENSE)
@SETTINGS
@given(st.dictionaries(st.sampled_from(["b", "scale", "w", "v", "__metadata__"]), entries | values, max_size=5))
def test_headers_that_are_nearly_right(codec: str, header: Header) -> None:
    right_or_refused(codec, joined(header, DATA))
