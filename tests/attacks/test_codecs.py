"""What a hostile miner may send where a codec compresses: refused in one line, with no more memory than its bytes say.

Whatever is not refused is finite, and is what `check` took the norm of.
"""

from __future__ import annotations

import math
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilot.codec import DENSE, known_codecs, load_codec
from protocol import Fault, ProtocolError, Refusal

SETTINGS = settings(derandomize=True, max_examples=25, deadline=None, database=None)
ROOM = 1 << 20  # bytes that a refusal may need
HEADER = 32

GENERATOR = torch.Generator().manual_seed(0)
GRADIENT = {"b": torch.randn(3, generator=GENERATOR), "w": torch.randn(5, 1000, generator=GENERATOR)}
SPECS = {name: t.shape for name, t in GRADIENT.items()}
BLOCKS, CHUNKS = 41, 3  # of 128 and of 4,096 values
PACKED = [name for name in known_codecs() if name not in DENSE]
QUANTISED = ["int8", "int4", "2bit", "1bit"]  # with a scale for each block
TOPK = ["topk64"]  # with two scales for each chunk


def encoded(codec: str) -> bytearray:
    return bytearray(load_codec(codec).encode(GRADIENT))


def refusal(codec: str, payload: bytes | bytearray) -> ProtocolError:
    """Why all three refuse it, once it is seen that refusing is cheap and the reason fit for a receipt."""
    reasons = []
    into = {name: torch.zeros(shape) for name, shape in SPECS.items()}
    for read in (lambda c: c.check(payload, SPECS), lambda c: c.decode(payload, SPECS)):
        tracemalloc.start()
        try:
            with pytest.raises(ProtocolError) as caught:
                read(load_codec(codec))
            assert tracemalloc.get_traced_memory()[1] < len(payload) + ROOM
        finally:
            tracemalloc.stop()
        reasons.append(caught.value)
    assert str(reasons[0]) == str(reasons[1])
    assert reasons[0].fault == reasons[1].fault
    reason = str(reasons[0])
    assert 0 < len(reason) <= 500
    assert reason.isprintable()
    assert Refusal(reason=reason).reason == reason
    with suppress(ProtocolError):  # what is cheap is checked once more, and nothing worse comes of the rest
        load_codec(codec).add(payload, into, 0.5)
    return reasons[0]


def right_or_refused(codec: str, payload: bytes | bytearray) -> None:
    """Decodes to finite tensors of the norm that `check` finds, or is refused by all."""
    try:
        norm = load_codec(codec).check(payload, SPECS)
    except ProtocolError:
        with pytest.raises(ProtocolError):
            load_codec(codec).decode(payload, SPECS)
        return
    decoded = load_codec(codec).decode(payload, SPECS)
    assert {name: t.shape for name, t in decoded.items()} == SPECS
    assert all(bool(t.isfinite().all()) for t in decoded.values())
    assert math.sqrt(sum(float(t.double().square().sum()) for t in decoded.values())) == pytest.approx(norm, rel=1e-9)


# --- header and length ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", PACKED)
def test_another_header(codec: str) -> None:
    payload = encoded(codec)
    for wrong in (
        *(b"", payload[:1], payload[:31], b"pilot/q2" + payload[8:], b"\0" * len(payload), b"\xff" + payload[1:]),
        *(b"\x80\x04cos\nsystem\n(S'true'\ntR." + payload[31:], b" " + payload, payload[1:], payload.upper()),
        payload[:31] + b"\x02" + payload[32:],
        payload[:31] + b"\x01" + zlib.compress(payload[32:]),
        payload[:8] + b"\x1b[2J\r\n".ljust(23, b"\0") + payload[31:],
    ):
        assert f"not a {codec} payload" in str(refusal(codec, wrong))


@pytest.mark.parametrize("codec", PACKED)
def test_one_codecs_payload_is_no_others(codec: str) -> None:
    for other in known_codecs():
        if other != codec:
            refusal(codec, encoded(other))


@pytest.mark.parametrize("codec", PACKED)
def test_other_tensors(codec: str) -> None:
    refusal(codec, bytes(load_codec(codec).encode({"w": GRADIENT["w"]})))
    refusal(codec, bytes(load_codec(codec).encode({**GRADIENT, "x": torch.ones(4097)})))


@pytest.mark.parametrize("codec", QUANTISED + TOPK)
def test_other_lengths(codec: str) -> None:
    payload = encoded(codec)
    for wrong in (payload[:-1], payload[:HEADER], payload + b"\0", payload + bytes(ROOM), payload * 2, payload[:-130]):
        assert "bytes where these tensors take" in str(refusal(codec, wrong))


# --- scales -----------------------------------------------------------------------------------------------------------


def with_scale(codec: str, at: int, bits: int) -> bytearray:
    """The payload with other bits for a scale: the high byte, then the low one in its plane."""
    payload = encoded(codec)
    number = CHUNKS if codec in TOPK else BLOCKS
    first = HEADER + (2 * number if codec in TOPK and at >= number else 0)
    payload[first + at % number], payload[first + number + at % number] = bits >> 8, bits & 0xFF
    return payload


SCALES = {
    "NaN": (0x7FC0, "NaN or infinity", Fault.NONFINITE),
    "a signalling NaN": (0x7F81, "NaN or infinity", Fault.NONFINITE),
    "a negative NaN": (0xFFC0, "NaN or infinity", Fault.NONFINITE),
    "infinity": (0x7F80, "NaN or infinity", Fault.NONFINITE),
    "minus infinity": (0xFF80, "NaN or infinity", Fault.NONFINITE),
    "minus one": (0xBF80, "negative", Fault.MALFORMED),
    "minus zero": (0x8000, "negative", Fault.MALFORMED),
}


@pytest.mark.parametrize("codec", QUANTISED + TOPK)
@pytest.mark.parametrize("scale", SCALES)
def test_scales_that_are_none(codec: str, scale: str) -> None:
    bits, reason, fault = SCALES[scale]
    for at in range(6) if codec in TOPK else (0, 1, BLOCKS - 1):
        error = refusal(codec, with_scale(codec, at, bits))
        assert reason in str(error)
        assert error.fault is fault


@pytest.mark.parametrize("codec", QUANTISED + TOPK)
@pytest.mark.parametrize("bits", [0x0000, 0x0001, 0x007F, 0x0080, 0x7A00, *range(0x7B00, 0x7F80, 0x20), 0x7F7F])
def test_scales_at_the_ends(codec: str, bits: int) -> None:
    """Zero and the least ones are scales, whatever the codes; the largest are where no level becomes infinity."""
    for at in (0, 1, 4):
        right_or_refused(codec, with_scale(codec, at, bits))
    if bits < 0x7B00:
        load_codec(codec).check(with_scale(codec, 1, bits), SPECS)
    elif bits == 0x7F7F and codec != "1bit":
        assert refusal(codec, with_scale(codec, 1, bits)).fault is Fault.NONFINITE


@pytest.mark.parametrize("at", [0, 129, 130, 257])
def test_scales_of_rows_and_of_columns(at: int) -> None:
    """130 rows, 128 columns: none is anything but a scale, and no product of two is infinite."""
    codec, specs = load_codec("ternary-rc"), {"m": torch.Size((130, 128))}
    payload = bytearray(codec.encode({"m": torch.randn(130, 128, generator=torch.Generator().manual_seed(0))}))
    changed = bytearray(payload)
    for bits, reason, fault in [*SCALES.values(), (0x5D81, "infinity", Fault.NONFINITE)]:
        changed[HEADER + at], changed[HEADER + 258 + at] = bits >> 8, bits & 0xFF
        for read in (codec.check, codec.decode):
            with pytest.raises(ProtocolError, match=reason) as caught:
                read(changed, specs)
            assert caught.value.fault is fault
    payload[HEADER : HEADER + 258], payload[HEADER + 258 : HEADER + 516] = b"\x5d" * 258, b"\x80" * 258
    assert math.isfinite(codec.check(payload, specs))
    assert bool(codec.decode(payload, specs)["m"].isfinite().all())


def test_zero_scale_makes_zeros_of_any_codes() -> None:
    for codec in QUANTISED:
        payload = with_scale(codec, 1, 0)
        assert not load_codec(codec).decode(payload, SPECS)["w"].view(-1)[:128].any()


# --- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("byte", [243, 244, 255])
def test_ternary_bytes_that_are_not_five_digits(byte: int) -> None:
    for at in (HEADER + 2 * BLOCKS, -1):
        payload = encoded("ternary-rc")
        payload[at] = byte
        assert f"byte {byte} is not 5 digits of base 3" in str(refusal("ternary-rc", payload))
    payload[-1] = 242
    assert load_codec("ternary-rc").check(payload, SPECS) > 0


@pytest.mark.parametrize("codec", QUANTISED)
def test_what_fills_the_last_block_counts_for_nothing(codec: str) -> None:
    """A block of `b` holds three values, and what its padding says is neither added nor in the norm."""
    payload, changed = encoded(codec), encoded(codec)
    row = HEADER + 2 * BLOCKS  # of the first block
    for i in range(3, 128):
        changed[row + i] = 0 if changed[row + i] else 1
    right_or_refused(codec, changed)
    decoded, expected = (load_codec(codec).decode(p, SPECS) for p in (changed, payload))
    assert torch.equal(decoded["b"], expected["b"])


# --- indices ----------------------------------------------------------------------------------------------------------

INDICES = {  # of the first chunk of `w`, which begins at the second entry and has 64
    "repeated": (lambda at: at[5:6] + at[:63], "do not ascend"),
    "twice the same": (lambda at: [*at[:-1], at[-2]], "do not ascend"),
    "the other way round": (lambda at: at[::-1], "do not ascend"),
    "two swapped": (lambda at: [at[1], at[0], *at[2:]], "do not ascend"),
    "all zero": (lambda at: [0] * 64, "do not ascend"),
    "all the last": (lambda at: [4095] * 64, "do not ascend"),
}


def with_indices(change: Callable[[list[int]], list[int]], first: int, count: int) -> bytearray:
    """topk64 with other indices of the chunk whose kept values begin at `first`: planes of 12 bits, MSB first."""
    payload, total = encoded("topk64"), 1 + 64 + 15
    planes = HEADER + 4 * CHUNKS + 2 * total // 8

    def bit(i: int, plane: int) -> tuple[int, int]:
        return planes + plane * total // 8 + i // 8, 1 << 7 - i % 8

    def read(i: int) -> int:
        return sum(bool(payload[at] & mask) << plane for plane in range(12) for at, mask in [bit(i, plane)])

    for i, value in enumerate(change([read(i) for i in range(first, first + count)]), first):
        for plane in range(12):
            at, mask = bit(i, plane)
            payload[at] = payload[at] | mask if value >> plane & 1 else payload[at] & ~mask
    return payload


def test_indices_are_where_the_test_thinks() -> None:
    assert with_indices(lambda at: at, 1, 64) == encoded("topk64")
    kept = load_codec("topk64").decode(encoded("topk64"), SPECS)["w"].view(-1)[:4096].nonzero()[:, 0].tolist()
    with_indices(lambda at: at if at == kept else pytest.fail("other indices"), 1, 64)


@pytest.mark.parametrize("attack", INDICES)
def test_indices_out_of_order(attack: str) -> None:
    change, reason = INDICES[attack]
    assert reason in str(refusal("topk64", with_indices(change, 1, 64)))


@pytest.mark.parametrize("beyond", [3, 4, 4095])
def test_an_index_beyond_a_short_chunk(beyond: int) -> None:
    """`b` has three values: in a chunk's 12 bits there is room for more."""
    assert "beyond its chunk" in str(refusal("topk64", with_indices(lambda at: [beyond], 0, 1)))
    load_codec("topk64").check(with_indices(lambda at: [2], 0, 1), SPECS)


# --- anything else ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", PACKED)
@SETTINGS
@given(st.data())
def test_flipped_and_spliced_bytes(codec: str, data: st.DataObject) -> None:
    payload = encoded(codec)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        if data.draw(st.booleans()):
            payload[at] ^= 1 << data.draw(st.integers(0, 7))
        else:
            payload[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    right_or_refused(codec, payload)


@pytest.mark.parametrize("codec", PACKED)
@SETTINGS
@given(st.binary(max_size=200))
def test_random_bytes_after_a_right_header(codec: str, body: bytes) -> None:
    right_or_refused(codec, bytes(encoded(codec)[:HEADER]) + body)
