"""What `make fuzz` throws bytes at: the parsers of untrusted bytes, valid inputs of each, and ways to spoil them.

A target's `check` says whether the bytes were accepted. It raises for whatever must never happen: an exception that is
not the parser's own, a reason that is not one printable line, a value that does not survive being sent on.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from pilot.codec import CODECS, DENSE, load_codec
from pilot.transport.auth import Keypair, open_reply, sign_message, verify_message
from pilot.transport.client.peer import Endpoint, parse_endpoint
from protocol import MESSAGES, Message, Order, ProtocolError, Refusal, Signed, signing_bytes
from tests import codec_reference
from tests.test_protocol import ORDER, REPLY, SAMPLES, A

GRADIENT = {"b": torch.tensor([1.0, 2.0, 3.0]), "scale": torch.tensor(4.0), "w": torch.arange(6.0).view(2, 3)}
SPECS = {name: t.shape for name, t in GRADIENT.items()}
VALIDATOR, MINER = (Keypair.create_from_uri(f"//{name}") for name in ("Validator", "Miner"))
ASKED = ORDER.model_copy(update={"hotkey": MINER.ss58_address})


@dataclass(frozen=True)
class Target:
    """A parser: what it must do with any bytes, and valid ones of its own."""

    check: Callable[[bytes], bool]
    seeds: tuple[bytes, ...]
    framed: bool = False  # as safetensors: eight bytes of length, JSON, data


# --- the properties ---------------------------------------------------------------------------------------------------


def refused(error: ProtocolError) -> bool:
    """False, what a check returns, once the reason is seen to fit into a log, a terminal and a receipt."""
    reason = str(error)
    assert 0 < len(reason) <= 500
    assert reason.isprintable()
    assert Refusal(reason=reason).reason == reason
    return False


def check_message(cls: type[Message] | type[Signed], data: bytes) -> bool:
    try:
        message = cls.parse(data)
    except ProtocolError as error:
        return refused(error)
    text = message.model_dump_json()
    again = cls.parse(text)
    assert again == message
    assert again.model_dump_json() == text  # also where == is blind, as between 1, 1.0 and True
    return True


def check_unseal(data: bytes) -> bool:
    """Nothing but what the validator sealed comes out of an envelope, however near the bytes are."""
    try:
        signed = Signed.parse(data)
        order = verify_message(signed, Order, VALIDATOR.ss58_address)
    except ProtocolError as error:
        return refused(error)
    assert order == ORDER
    assert signed.body == ORDER.text()
    return True


def check_reply(data: bytes) -> bool:
    """The bytes as a body that the miner has really signed: a hostile miner signs anything."""
    body = data.decode(errors="replace")
    signature = bytes(MINER.sign(signing_bytes("reply", body))).hex()
    signed = Signed(kind="reply", signer=MINER.ss58_address, body=body, signature=signature)
    try:
        reply = open_reply(signed, ASKED, A)
    except ProtocolError as error:
        return refused(error)
    assert (reply.order, reply.run, reply.round, reply.hotkey) == (A, ASKED.run, ASKED.round, ASKED.hotkey)
    return True


def check_endpoint(data: bytes) -> bool:
    try:
        endpoint = parse_endpoint(data.decode("utf-8", "surrogateescape"))
    except UnicodeError:  # a ValueError, but not ours
        raise
    except ValueError:
        return False
    assert 1 <= endpoint.port <= 65535
    assert endpoint.is_loopback or endpoint.hotkey
    again = f"{endpoint}@{endpoint.hotkey}" if endpoint.hotkey else str(endpoint)
    assert parse_endpoint(again) == endpoint == Endpoint(endpoint.host, endpoint.port, endpoint.hotkey)
    return True


def check_payload(name: str, data: bytes) -> bool:
    """Exactly the tensors of the specs, bit for bit, or one line."""
    codec = load_codec(name)
    try:
        tensors = codec.decode(bytearray(data), SPECS)
    except ProtocolError as error:
        return refused(error)
    assert {key: t.shape for key, t in tensors.items()} == SPECS
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    header = 8 + int.from_bytes(data[:8], "little")
    valid = bytes(codec.encode(GRADIENT))
    assert data[:header] == valid[:header]
    bits = np.concatenate([tensors[key].reshape(-1).numpy().view("<u4") for key in sorted(SPECS)])
    sent = np.frombuffer(data[header:], "<u4" if name == "fp32" else "<u2").astype("<u4")
    assert (bits == (sent if name == "fp32" else sent << 16)).all()
    return True


def check_packed(name: str, data: bytes) -> bool:
    """As the layout's plain reader reads it, with the norm that it has, or one line."""
    codec = load_codec(name)
    try:
        norm, tensors = codec.check(data, SPECS), codec.decode(data, SPECS)
    except ProtocolError as error:
        return refused(error)
    assert {key: t.shape for key, t in tensors.items()} == SPECS
    for key, values in codec_reference.read(name, data, SPECS).items():
        assert (tensors[key].reshape(-1).numpy() == values.reshape(-1)).all()
    square = sum(float(t.double().square().sum()) for t in tensors.values())
    assert norm == pytest.approx(math.sqrt(square), rel=1e-5)
    return True


# --- the targets ------------------------------------------------------------------------------------------------------

REPLIED = REPLY.model_copy(update={"hotkey": MINER.ss58_address, "order": A}).text().encode()
ENVELOPES = tuple(sign_message(VALIDATOR, m).model_dump_json().encode() for m in (ORDER, SAMPLES["stop"]))
ENDPOINTS = (b"8091", b"localhost:1", b"[::1]:65535", b"miner.example.org:8091@" + MINER.ss58_address.encode())

PACKED = tuple(name for name in CODECS if name not in DENSE)

TARGETS: dict[str, Target] = {
    **{
        kind: Target(partial(check_message, type(message)), (message.text().encode(),))
        for kind, message in SAMPLES.items()
        if type(message) in (*MESSAGES.values(), Refusal)
    },
    "signed": Target(partial(check_message, Signed), ENVELOPES),
    "unseal": Target(check_unseal, ENVELOPES[:1]),
    "open_reply": Target(check_reply, (REPLIED,)),
    "endpoint": Target(check_endpoint, ENDPOINTS),
    **{
        name: Target(partial(check_payload, name), (bytes(load_codec(name).encode(GRADIENT)),), framed=True)
        for name in DENSE
    },
    **{name: Target(partial(check_packed, name), (bytes(load_codec(name).encode(GRADIENT)),)) for name in PACKED},
}


# --- ways to spoil valid bytes ----------------------------------------------------------------------------------------

INTEGERS = [n + d for n in (0, 1 << 31, 1 << 32, 1 << 53, 1 << 63, 1 << 64) for d in (-1, 0, 1)]
ODD_NUMBERS = [
    "1.0",
    "1e2",
    "-0",
    "-0.0",
    "1e400",
    "-1e400",
    "5e-324",
    "1e-9999",
    "0x1",
    "01",
    "NaN",
    "-Infinity",
    "9" * 400,
]
ODD_TEXTS = ["", "\\ud800", "\\ud800\\udc00", "\\u0000", "\n", "\x00", "\u202e", "🜁", "a" * 1001, "../../etc/passwd"]
SHAPES = [
    "null",
    "true",
    "[]",
    "{}",
    "[[]]",
    "[[0,1]]",
    "[[1,0]]",
    "[0,1,2]",
    '{"":{}}',
    "[" * 250,
    '{"a":' * 250,
    "]",
    "}",
]
NUMBERS = [str(n).encode() for n in (*INTEGERS, *ODD_NUMBERS)]
ODD = [
    *NUMBERS,
    *(shape.encode() for shape in SHAPES),
    *(f'"{text}"'.encode() for text in ODD_TEXTS),
    *(b"[" * depth + b"]" * depth for depth in (2, 100, 201)),
    *(b"\xff", b'"\xed\xa0\x80"', b"\xef\xbb\xbf", b"\0", b"\x80\x04K\x01."),
]
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[-+.\w]+|[^\s]')


def spoil(data: bytes, target: Target, rng: random.Random) -> bytes:
    """The bytes with one to four things wrong; those of a frame mostly with a length that is right again."""
    head, body = (data[:8], data[8:]) if target.framed else (b"", data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        body = rng.choice((_spoil_token, _spoil_token, _spoil_token, _spoil_bytes))(body, target, rng)
    if not target.framed:
        return body
    if (choice := rng.random()) < 0.1:
        return (rng.choice(INTEGERS) % (1 << 64)).to_bytes(8, "little") + body
    length = body.rfind(b"}}") + 2
    return (length.to_bytes(8, "little") if choice < 0.7 else head) + body


def _spoil_token(data: bytes, target: Target, rng: random.Random) -> bytes:
    """JSON that is nearly right: a value, a name or a mark replaced, left out, or there again."""
    tokens = [match.span() for match in TOKEN.finditer(data, 0, 8192)]
    if not tokens:
        return _spoil_bytes(data, target, rng)
    start, end = rng.choice(tokens)
    if data[start:end] in b"{}[]:,":  # half of all: values are worth a second try
        start, end = rng.choice(tokens)
    if data[start:end].replace(b".", b"").isdigit() and rng.random() < 0.5:
        return data[:start] + rng.choice(NUMBERS) + data[end:]
    other = data[slice(*rng.choice(tokens))]
    piece = data[start : min(rng.choice(tokens)[1], end + 400)]  # from here to some other token
    new = rng.choice((rng.choice(ODD), rng.choice(ODD), other, b"", piece + b"," + piece, piece + piece))
    return data[:start] + new + data[end:]


def _spoil_bytes(data: bytes, target: Target, rng: random.Random) -> bytes:
    """A bit flipped, bytes put in or taken out, the end cut off, or the end of another valid input."""
    at, few = rng.randint(0, len(data)), rng.randint(1, 8)
    if (choice := rng.randrange(5)) == 0 and data:
        at = at % len(data)
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if choice == 1:
        return data[:at] + rng.randbytes(few) + data[at:]
    if choice == 2:
        return data[:at] + data[at + few :]
    if choice == 3:
        return data[:at]
    return data[:at] + rng.choice(target.seeds)[at:]


# --- the same by hypothesis, which also makes a finding small ---------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(INTEGERS) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Any bytes, JSON of any shape and depth, and valid inputs with a field replaced or some damage."""
    seeds = st.sampled_from(target.seeds)
    deep = st.builds(lambda n, opening, inner: opening * n + json.dumps(inner).encode(), depths, openings, values)
    spoilt = st.builds(lambda seed, n: spoil(seed, target, random.Random(n)), seeds, st.integers(0, 1 << 32))
    json_like = deep | values.map(lambda value: json.dumps(value).encode())
    if target.framed:
        json_like = json_like.map(lambda text: len(text).to_bytes(8, "little") + text)
    return st.binary(max_size=400) | json_like | spoilt | _replaced(target)


depths = st.integers(0, 2000)
openings = st.sampled_from([b"[", b'{"a":', b'{"missing":[', b"[[0,"])


@st.composite
def _replaced(draw: st.DrawFn, target: Target) -> bytes:
    """A valid input with another value in one place, however deep."""
    seed = draw(st.sampled_from(target.seeds))
    data = seed[8 + int.from_bytes(seed[:8], "little") :] if target.framed else b""
    text = seed[8 : len(seed) - len(data)] if target.framed else seed
    if not text.startswith(b"{"):
        return seed
    fields = place = json.loads(text)
    while True:
        name = draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if not (place[name] and isinstance(place[name], dict | list) and draw(st.booleans())):
            break
        place = place[name]
    place[name] = draw(values)
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    return (len(text).to_bytes(8, "little") + text + data) if target.framed else text
