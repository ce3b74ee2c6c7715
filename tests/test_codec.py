"""Dense payloads against the safetensors library and torch's own rounding, down to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pilot.codec import BITS, CODECS, DENSE, bits, known_codecs, load_codec
from protocol import Fault, ProtocolError, digest

GOLDEN = json.loads((Path(__file__).parent / "golden" / "codec.json").read_text())
SETTINGS = settings(derandomize=True, max_examples=100, deadline=None, database=None)
Tensors = dict[str, torch.Tensor]


def specs_of(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in tensors.items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit: NaN payloads and the sign of zero too."""
    as_ints = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[a.dtype]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(as_ints), b.view(as_ints))


def round_trip(codec: str, tensors: Tensors) -> Tensors:
    return load_codec(codec).decode(load_codec(codec).encode(tensors), specs_of(tensors))


def from_bits(*bits: int) -> torch.Tensor:
    return torch.tensor([b - (1 << 32) if b >> 31 else b for b in bits], dtype=torch.int32).view(torch.float32)


# zero, -0.0, the smallest subnormal, 1, the largest, infinities, quiet and signalling NaNs with payloads
EDGES = (0, 0x80000000, 1, 0x007FFFFF, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC12345, 0xFFA00001)

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")


@st.composite
def tensors(draw: st.DrawFn) -> Tensors:
    """A few tensors of any bits, in any order of their names."""
    drawn = {}
    for name in draw(st.lists(names, min_size=1, max_size=4, unique=True)):
        shape = draw(shapes)
        size = math.prod(shape)
        bits = draw(st.lists(st.sampled_from(EDGES) | st.integers(0, 2**32 - 1), min_size=size, max_size=size))
        drawn[name] = from_bits(*bits).view(shape)
    return drawn


@SETTINGS
@given(tensors())
@example({"edges": from_bits(*EDGES), "scalar": from_bits(EDGES[-1]).view(()), "none": torch.empty(3, 0)})
def test_fp32_is_exact(given_: Tensors) -> None:
    decoded = round_trip("fp32", given_)
    assert decoded.keys() == given_.keys()
    assert all(same_bits(decoded[name], given_[name]) for name in given_)


@SETTINGS
@given(tensors())
def test_bf16_is_torchs_rounding(given_: Tensors) -> None:
    decoded = round_trip("bf16", given_)
    for name, t in given_.items():
        expected = t.to(torch.bfloat16).to(torch.float32)
        assert torch.equal(decoded[name].isnan(), t.isnan())
        assert same_bits(decoded[name].nan_to_num(0.0), expected.nan_to_num(0.0))  # a NaN's payload may differ


def test_bf16_rounds_to_nearest_even() -> None:
    """1 + 1/256 lies half-way between two bf16 numbers, so does 1 + 3/256: down to the even one, up to the even one."""
    t = torch.tensor([1 + 1 / 256, 1 + 3 / 256, 1 + 1 / 256 + 1e-6])
    assert round_trip("bf16", {"t": t})["t"].tolist() == [1.0, 1 + 4 / 256, 1 + 2 / 256]


@pytest.mark.parametrize(("codec", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@SETTINGS
@given(tensors())
def test_safetensors_reads_it_and_writes_the_same(codec: str, dtype: torch.dtype, given_: Tensors) -> None:
    given_ = {name: t.nan_to_num(1.0) for name, t in given_.items()}
    payload = bytes(load_codec(codec).encode(given_))
    loaded = safetensors.torch.load(payload)
    assert loaded.keys() == given_.keys()
    assert all(same_bits(loaded[name], given_[name].to(dtype)) for name in given_)
    assert (int.from_bytes(payload[:8], "little") + 8) % 8 == 0  # the data is aligned
    assert safetensors.torch.save({name: t.to(dtype) for name, t in given_.items()}) == payload


@pytest.mark.parametrize("codec", DENSE)
def test_dense_codec_decodes_its_own_encoding(codec: str) -> None:
    decoded = round_trip(codec, {"w": torch.ones(2, 3), "b": torch.zeros(3), "s": torch.tensor(2.0)})
    assert torch.equal(decoded["w"], torch.ones(2, 3))
    assert torch.equal(decoded["b"], torch.zeros(3))
    assert torch.equal(decoded["s"], torch.tensor(2.0))
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in decoded.values())


@pytest.mark.parametrize("codec", GOLDEN)
def test_payload_is_golden(codec: str) -> None:
    """The bytes that digests and version chains are over: key order must not matter, nor anything else change them."""
    for order in (1, -1):
        given_ = {"b": torch.tensor([[1.0, -0.5], [2.0, 3.0]]), "a.w": torch.tensor(0.25)}
        payload = load_codec(codec).encode(dict(list(given_.items())[::order]))
        assert bytes(payload).hex() == GOLDEN[codec]["payload"]
        assert digest("state", payload) == GOLDEN[codec]["digest"]


@pytest.mark.parametrize("codec", DENSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_layout_and_dtype_can_be_encoded(codec: str, dtype: torch.dtype) -> None:
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    strided = {"t": base.t(), "column": base[:, 2], "step": base[::2, 1::3], "expanded": base[0, :1].expand(5)}
    plain = {name: t.clone(memory_format=torch.contiguous_format) for name, t in strided.items()}
    assert load_codec(codec).encode(strided) == load_codec(codec).encode(plain)
    rounded = {"fp32": torch.float32, "bf16": torch.bfloat16}[codec]
    for name, t in round_trip(codec, strided).items():
        assert torch.equal(t, plain[name].to(rounded).to(torch.float32))


def test_parameters_that_need_gradients_can_be_encoded() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    decoded = round_trip("fp32", {"p": p})["p"]
    assert torch.equal(decoded, p)
    assert not decoded.requires_grad


def test_fp32_decodes_to_views_of_the_payload() -> None:
    payload = bytearray(load_codec("fp32").encode({"a": torch.ones(5), "b": torch.ones(2, 2)}))
    start = torch.frombuffer(payload, dtype=torch.uint8).data_ptr()
    decoded = load_codec("fp32").decode(payload, {"a": torch.Size([5]), "b": torch.Size([2, 2])})
    assert [t.data_ptr() - start for t in decoded.values()] == [len(payload) - 36, len(payload) - 16]
    payload[-4:] = torch.tensor([7.0]).numpy().tobytes()
    assert decoded["b"][1, 1] == 7.0


def test_decoding_follows_the_specs_order_of_names_only() -> None:
    given_ = {"b": torch.tensor([1.0]), "a": torch.tensor([2.0])}
    payload = load_codec("fp32").encode(given_)
    for order in (("a", "b"), ("b", "a")):
        decoded = load_codec("fp32").decode(payload, {name: given_[name].shape for name in order})
        assert all(torch.equal(decoded[name], given_[name]) for name in given_)


@pytest.mark.parametrize("codec", DENSE)
@pytest.mark.parametrize("weight", [1.0, 0.3, -2.0])
def test_adding_is_a_product_and_a_sum(codec: str, weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    given_ = {"w": torch.randn(300, 257, generator=generator), "s": torch.tensor(3.0), "none": torch.empty(0, 2)}
    payload = load_codec(codec).encode(given_)
    into = {name: torch.randn(t.shape, generator=generator) for name, t in given_.items()}
    decoded = load_codec(codec).decode(payload, specs_of(given_))
    expected = {name: into[name] + decoded[name] * weight for name in into}
    load_codec(codec).add(payload, into, weight)
    assert all(same_bits(into[name], expected[name]) for name in into)


@pytest.mark.parametrize("codec", DENSE)
def test_checking_is_the_norm_or_a_fault(codec: str) -> None:
    given_ = {"w": torch.randn(300, 257, generator=torch.Generator().manual_seed(0)), "s": torch.tensor(3.0)}
    payload = load_codec(codec).encode(given_)
    decoded = load_codec(codec).decode(payload, specs_of(given_))
    expected = math.sqrt(sum(float(t.double().square().sum()) for t in decoded.values()))
    assert load_codec(codec).check(payload, specs_of(given_)) == pytest.approx(expected, rel=1e-12)
    for bad in (math.nan, math.inf, -math.inf):
        given_["w"][299, 256] = bad
        with pytest.raises(ProtocolError, match="NaN or infinity") as caught:
            load_codec(codec).check(load_codec(codec).encode(given_), specs_of(given_))
        assert caught.value.fault is Fault.NONFINITE


# --- the names --------------------------------------------------------------------------------------------------------


def test_every_name_is_known_loads_and_has_its_bits() -> None:
    """Nominal bits are those of a large payload."""
    tensors = {"w": torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))}
    assert known_codecs() == tuple(CODECS) == tuple(BITS)
    for name in known_codecs():
        size = 8 * len(load_codec(name).encode(tensors)) / (512 * 1024)
        assert size == pytest.approx(bits(name), rel=0.03)


UNKNOWN = [
    *(
        "zip",
        "FP32",
        "fp32+entropy",
        "ternary",
        "ternary-rc+entropy",
        "2bit+",
        "",
        "fp32\n",
        "topk",
        "topk16",
        "topk64-4bit",
    ),
    *("topk\u0664", "pilot.codec.dense:FP32", "topk" + "9" * 5000),
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_codec_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown; known: fp32, bf16, int8, int4, 2bit, ternary-rc, 1bit, topk64$"):
        load_codec(name)
