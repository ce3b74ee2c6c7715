"""The compressing codecs against naive ones: layouts read a value at a time, quantisers by their definition in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilot.codec import CODECS, DENSE, load_codec
from pilot.codec.topk import CHUNK, KEPT
from protocol import Fault, ProtocolError
from tests import codec_reference as reference

SETTINGS = settings(derandomize=True, max_examples=30, deadline=None, database=None)
COMPRESSING = [name for name in CODECS if name not in DENSE]
Tensors = dict[str, torch.Tensor]


def specs_of(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in tensors.items()}


def some_tensors(seed: int = 0) -> Tensors:
    """Of every awkward size, heavy-tailed, from 1e-12 to 1e6, with blocks and chunks of nothing but zeros."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (3, 4096), "none": (0, 5), "b": (3,), "scale": (), "block": (128,), "odd": (7, 131), "a": (4097,)}
    shapes["matrix"] = (2, 65, 256)
    found = {name: torch.randn(shape, generator=generator) ** 3 for name, shape in shapes.items()}
    found["w"][1] = 0
    found["matrix"] *= torch.randn(256, generator=generator).exp()  # columns that differ
    found["matrix"][0, 3], found["matrix"][..., 130] = 0, 0
    found["odd"].view(-1)[128:256] = 0
    found["odd"] *= 1e-12
    found["a"] *= 1e6
    return found


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPRESSING)
def test_layout_is_as_drawn(name: str) -> None:
    tensors = some_tensors()
    codec = load_codec(name)
    payload = bytes(codec.encode(tensors))
    expected = reference.read(name, payload, specs_of(tensors))
    decoded = codec.decode(payload, specs_of(tensors))
    assert decoded.keys() == tensors.keys()
    for tensor, t in decoded.items():
        assert t.dtype == torch.float32
        assert t.shape == tensors[tensor].shape
        np.testing.assert_array_equal(t.view(-1).numpy(), expected[tensor])
    assert all(t.any() for name_, t in decoded.items() if name_ != "none")


@pytest.mark.parametrize("name", COMPRESSING)
@SETTINGS
@given(st.lists(st.integers(0, 9000), min_size=1, max_size=4), st.integers(0, 99))
def test_the_size_follows_from_the_shapes(name: str, sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {str(i): torch.randn(size, generator=generator) for i, size in enumerate(sizes)}
    codec = load_codec(name)
    payload = codec.encode(tensors)
    assert len(payload) == codec.largest(specs_of(tensors))
    assert codec.check(payload, specs_of(tensors)) >= 0


@pytest.mark.parametrize("name", COMPRESSING)
def test_nothing_to_encode(name: str) -> None:
    codec = load_codec(name)
    for tensors in ({}, {"none": torch.empty(0, 5)}):
        payload = codec.encode(tensors)
        assert len(payload) == codec.largest(specs_of(tensors)) == 32
        assert same(codec.decode(payload, specs_of(tensors)), tensors)
        assert codec.check(payload, specs_of(tensors)) == 0.0


# --- what is in them --------------------------------------------------------------------------------------------------


def blocks(tensors: Tensors, width: int) -> list[tuple[np.ndarray, str, int]]:
    """fp64 values of each block."""
    found = reference.blocks_of(specs_of(tensors), width)
    return [(tensors[n].view(-1)[start : start + size].double().numpy(), n, start) for n, start, size in found]


@pytest.mark.parametrize(("name", "steps"), [("int8", 127), ("int4", 7)])
def test_integers_are_the_nearest(name: str, steps: int) -> None:
    """Within half a step of the largest magnitude's, which bf16 may make 1/128 longer."""
    tensors = some_tensors()
    decoded = load_codec(name).decode(load_codec(name).encode(tensors), specs_of(tensors))
    for x, tensor, start in blocks(tensors, 128):
        y = decoded[tensor].view(-1)[start : start + len(x)].double().numpy()
        assert np.abs(x - y).max() <= np.abs(x).max() / steps / 2 * (1 + 1 / 128)
        assert np.abs(y).max() <= np.abs(x).max() * (1 + 1 / 128)


def two_bit(x: np.ndarray) -> np.ndarray:
    level = np.array([-95, -29, 29, 95])[
        np.clip(np.floor(x / (0.9816 * np.sqrt((x**2).mean()))), -2, 1).astype(int) + 2
    ]
    return level * (x @ level) / (level @ level)


def one_bit(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, -1, 1) * np.abs(x).mean()


@pytest.mark.parametrize(("name", "quantise"), [("2bit", two_bit), ("1bit", one_bit)])
def test_levels_are_by_definition(name: str, quantise: object) -> None:
    """Every value on its level; the level to the precision of bf16."""
    assert callable(quantise)
    tensors = some_tensors()
    decoded = load_codec(name).decode(load_codec(name).encode(tensors), specs_of(tensors))
    for x, tensor, start in blocks(tensors, 128):
        y = decoded[tensor].view(-1)[start : start + len(x)].double().numpy()
        expected = quantise(x) if x.any() else x
        np.testing.assert_allclose(y, expected, rtol=1 / 256, atol=0)


def test_rows_and_columns_are_by_definition() -> None:
    """A code is 1 beyond 0.612 of row times column; the row's scale is then the one of least squares."""
    x = some_tensors()["matrix"]
    y = load_codec("ternary-rc").decode(load_codec("ternary-rc").encode({"x": x}), {"x": x.shape})["x"].view(130, 256)
    x = x.view(130, 256).double()
    row = x.square().mean(1, keepdim=True).sqrt()
    column = ((x / row.where(row > 0, 1)).square().sum(0) / (row > 0).sum()).sqrt().bfloat16().double()
    code = (x.abs() > 0.612 * row * column) * x.sign() * column
    scale = (x * code).sum(1, keepdim=True) / code.square().sum(1, keepdim=True).clamp(min=1e-30)
    np.testing.assert_allclose(y.double().numpy(), (scale * code).numpy(), rtol=1 / 256, atol=0)


def test_two_bits_lose_no_more_of_a_gaussian_than_lloyd_and_max() -> None:
    """0.1175 of the energy is their optimum; least squares in each block of 128 may be below it."""
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    codec = load_codec("2bit")
    y = codec.decode(codec.encode({"x": x}), {"x": x.shape})["x"]
    assert float((x - y).square().sum() / x.square().sum()) < 0.1175


def test_top_k_keeps_the_largest() -> None:
    """Indices and signs are exact; the two levels are the means of the smaller and of the larger magnitudes."""
    codec, tensors = load_codec("topk64"), some_tensors()
    decoded = codec.decode(codec.encode(tensors), specs_of(tensors))
    for x, tensor, start in blocks(tensors, CHUNK):
        y = decoded[tensor].view(-1)[start : start + len(x)].double().numpy()
        places = reference.largest(list(x), math.ceil(KEPT * len(x) / CHUNK))
        assert not np.delete(y, places).any()
        kept, found = np.abs(x[places]), np.abs(y[places])
        assert (np.sign(y[places]) == np.sign(x[places])).all()
        high = kept > kept.mean()
        expected = np.where(high, kept[high].mean() if high.any() else 0, kept[~high].mean())
        np.testing.assert_allclose(found, expected, rtol=1 / 128)


def test_top_k_of_equal_magnitudes_takes_the_first() -> None:
    codec = load_codec("topk64")
    x = torch.zeros(2 * CHUNK)
    x[100:200], x[CHUNK:] = -1.0, 2.0
    x[7] = 3.0
    y = codec.decode(codec.encode({"x": x}), {"x": x.shape})["x"]
    assert y.nonzero()[:, 0].tolist() == [7, *range(100, 163), *range(CHUNK, CHUNK + 64)]


# --- adding and checking ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("weight", [1.0, 0.3, -2.0])
def test_adding_is_a_product_and_a_sum(name: str, weight: float) -> None:
    tensors, codec = some_tensors(), load_codec(name)
    payload = codec.encode(tensors)
    decoded = codec.decode(payload, specs_of(tensors))
    into = some_tensors(seed=1)
    expected = {tensor: into[tensor] + decoded[tensor] * weight for tensor in into}
    codec.add(payload, into, weight)
    assert same(into, expected)


@pytest.mark.parametrize("name", COMPRESSING)
def test_checking_is_the_norm(name: str) -> None:
    tensors, codec = some_tensors(), load_codec(name)
    payload = codec.encode(tensors)
    decoded = codec.decode(payload, specs_of(tensors))
    expected = math.sqrt(sum(float(t.double().square().sum()) for t in decoded.values()))
    assert codec.check(payload, specs_of(tensors)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["int8", "2bit", "ternary-rc", "1bit", "topk64"])
def test_threads_change_no_bit(name: str) -> None:
    """Of a tensor that torch splits among its threads."""
    x = {"x": torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))}
    codec, threads, found = load_codec(name), torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            payload, into = codec.encode(x), {"x": torch.ones(1 << 20)}
            codec.add(payload, into, 0.3)
            found.append((bytes(payload), into["x"].numpy().tobytes(), codec.check(payload, specs_of(x))))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", [*DENSE, *COMPRESSING])
def test_adding_on_a_gpu_is_bit_equal(name: str) -> None:
    tensors, codec = some_tensors(), load_codec(name)
    payload = codec.encode(tensors)
    into, there = some_tensors(seed=1), {n: t.cuda() for n, t in some_tensors(seed=1).items()}
    for target in (into, there):
        codec.add(payload, target, 0.3)
    assert same({n: t.cpu() for n, t in there.items()}, into)
    from_there = codec.encode({n: t.cuda() for n, t in tensors.items()})
    assert codec.check(from_there, specs_of(tensors)) == pytest.approx(
        codec.check(payload, specs_of(tensors)), rel=1e-3
    )


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_layout_and_dtype_can_be_encoded(name: str, dtype: torch.dtype) -> None:
    base = torch.randn(40, 600, generator=torch.Generator().manual_seed(0)).to(dtype)
    strided = {"t": base.t(), "column": base[:, 2], "step": base[::2, 1::3], "expanded": base[0, :1].expand(500)}
    plain = {tensor: t.float().clone(memory_format=torch.contiguous_format) for tensor, t in strided.items()}
    assert load_codec(name).encode(strided) == load_codec(name).encode(plain)
    assert load_codec(name).encode(dict(reversed(plain.items()))) == load_codec(name).encode(plain)
    assert load_codec(name).encode({"p": torch.nn.Parameter(plain["t"])}) == load_codec(name).encode({"p": plain["t"]})


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 4095, 4096, 5000])
def test_what_is_not_finite_is_refused(name: str, bad: float, at: int) -> None:
    x = torch.randn(5001, generator=torch.Generator().manual_seed(0))
    x[at] = bad
    payload = load_codec(name).encode({"x": x})
    for read in (load_codec(name).check, load_codec(name).decode):
        with pytest.raises(ProtocolError, match=r"NaN or infinity|to infinity") as caught:
            read(payload, {"x": x.shape})
        assert caught.value.fault is Fault.NONFINITE


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-40, 1e-30, 1e-20, 1e15])
def test_magnitudes_far_from_one(name: str, scale: float) -> None:
    """Finite, never larger than what it was but for a few roundings, and the same at every size that is normal."""
    x = torch.randn(5001, generator=torch.Generator().manual_seed(0))
    codec = load_codec(name)
    small = codec.decode(codec.encode({"x": x * scale}), {"x": x.shape})["x"]
    assert float(small.abs().max()) <= float((x * scale).abs().max()) * 1.01 + 1e-38
    if scale >= 1e-20:
        usual = codec.decode(codec.encode({"x": x}), {"x": x.shape})["x"]
        loss, least = (float((y.double() / s - x).square().sum()) for y, s in ((small, scale), (usual, 1.0)))
        assert loss == pytest.approx(least, rel=0.02)
