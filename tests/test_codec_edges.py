"""Where the arithmetic of the compressing codecs ends: rounding, rows of nothing, what fp32 holds no longer."""

from __future__ import annotations

import math

import pytest
import torch

from pilot.codec import load_codec
from pilot.codec.packed import scale_bytes
from pilot.codec.ternary_rc import TernaryRowColumn
from protocol import Fault, ProtocolError

torch.set_num_threads(1)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def through(name: str, x: torch.Tensor) -> torch.Tensor:
    codec = load_codec(name)
    return codec.decode(codec.encode({"x": x}), {"x": x.shape})["x"]


# --- top-k: a mean below all that it is of ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["topk64"])
@pytest.mark.parametrize("size", [1, 100, 500, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("magnitude", [1e-3, 0.1, 0.3, 1e-30])
def test_top_k_of_equal_magnitudes(name: str, size: int, magnitude: float) -> None:
    x = randn(size).sign() * magnitude
    y = through(name, x)
    kept = y != 0
    assert kept.any()
    torch.testing.assert_close(y[kept], x[kept], rtol=1 / 128, atol=0)


@pytest.mark.parametrize("value", [1e-3, 0.1, 0.3, 1.7])
def test_top_k_of_two_adjacent_magnitudes(value: float) -> None:
    for kept in (2, 3, 7, 63, 64):
        x = torch.zeros(4096)
        x[:kept] = value
        x[: kept // 2] = torch.nextafter(x[0], torch.tensor(1e9))
        y = through("topk64", x)
        torch.testing.assert_close(y, x, rtol=1 / 64, atol=0)


# --- rows and columns -------------------------------------------------------------------------------------------------


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).double().sum() / a.double().norm() / b.double().norm())


def test_rows_of_nothing_are_not_of_the_columns() -> None:
    """As in an embedding's gradient, where a batch has few of the tokens."""
    x = torch.zeros(2000, 256)
    x[::50] = randn(40, 256)
    assert cosine(x, through("ternary-rc", x)) > 0.8
    assert not through("ternary-rc", torch.zeros(2000, 256)).any()


def test_a_norm_is_that_of_the_products() -> None:
    """A column's scale whose square fp32 cannot hold, under a row's that makes it large."""
    codec, shape = load_codec("ternary-rc"), torch.Size([128, 128])
    assert isinstance(codec, TernaryRowColumn)
    body = torch.full((4 * 128 + 128 * 26,), (3**5 - 1), dtype=torch.uint8).numpy()  # all digits 2, codes +1
    scales = torch.cat([torch.full((128,), 2.0**60), torch.full((128,), 2.0**-75)]).bfloat16()
    body[: 4 * 128] = scale_bytes(scales)
    payload = codec._header + body.tobytes()
    assert codec.check(payload, {"x": shape}) == pytest.approx(2.0**-15 * 128, rel=1e-12)
    assert codec.decode(payload, {"x": shape})["x"].eq(2.0**-15).all()


# --- beyond the largest norm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["2bit", "ternary-rc"])
@pytest.mark.parametrize("shape", [(700,), (130, 256)])
def test_a_finite_block_whose_norm_is_not_is_refused(name: str, shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    x.view(-1)[300] = 3e19
    assert math.isfinite(x.sum())
    with pytest.raises(ProtocolError) as caught:
        load_codec(name).check(load_codec(name).encode({"x": x}), {"x": x.shape})
    assert caught.value.fault is Fault.NONFINITE
