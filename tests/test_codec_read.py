"""Blocks of coordinates read from payloads, for every codec and for several codecs in one round."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilot.aggregation import Contribution, blocks
from pilot.aggregation.blockwise import by_coordinate
from pilot.codec import CODECS, load_codec
from tests.test_codec_compressed import some_tensors, specs_of

Tensors = dict[str, torch.Tensor]


def flat(tensors: Tensors) -> torch.Tensor:
    """Concatenate all tensors in the order of their names."""
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


@pytest.mark.parametrize("name", CODECS)
@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(st.data())
def test_a_block_is_the_slice_of_what_is_decoded(name: str, data: st.DataObject) -> None:
    tensors = some_tensors()
    codec, specs = load_codec(name), specs_of(tensors)
    payload = codec.encode(tensors)
    whole = flat(codec.decode(payload, specs))
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)) | st.integers(start, min(start + 300, len(whole))))
    block = codec.read(payload, specs, start, stop)
    assert block.dtype == torch.float32
    assert torch.equal(block.view(torch.int32), whole[start:stop].view(torch.int32))


@pytest.mark.parametrize("name", CODECS)
@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(st.data())
def test_a_block_of_tensors_of_any_shape(name: str, data: st.DataObject) -> None:
    """Shapes with and without padding, empty ones, and matrices with column scales; small blocks at any place."""
    sizes = st.sampled_from(
        [(), (0, 3), (1,), (127,), (128,), (4095,), (4096,), (4097,), (9, 131), (130, 128), (65, 2, 256)]
    )
    shapes = data.draw(st.lists(sizes | st.tuples(st.integers(0, 9000)), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    tensors = {chr(97 + i): torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    codec, specs = load_codec(name), specs_of(tensors)
    payload = codec.encode(tensors)
    whole = flat(codec.decode(payload, specs))
    for _ in range(5):
        start = data.draw(st.integers(0, len(whole)))
        stop = data.draw(st.integers(start, len(whole)))
        block = codec.read(payload, specs, start, stop)
        assert torch.equal(block.view(torch.int32), whole[start:stop].view(torch.int32))


@pytest.mark.parametrize("name", ["int8", "2bit", "1bit", "ternary-rc", "topk64"])
def test_a_zero_scale_under_negative_codes_reads_as_it_decodes(name: str) -> None:
    """-1 x 0 is -0.0, which `decode` adds to 0.0."""
    tensors = {"w": -torch.ones(300)}
    codec, specs = load_codec(name), specs_of(tensors)
    payload = bytearray(codec.encode(tensors))
    payload[32:38] = bytes(6)  # the scales of three blocks, or base and step of a chunk
    assert codec.check(payload, specs) == 0.0
    assert not codec.read(payload, specs, 0, 300).view(torch.int32).any()


@pytest.mark.parametrize("name", CODECS)
def test_blocks_of_any_size_make_the_whole(name: str) -> None:
    tensors = some_tensors()
    codec, specs = load_codec(name), specs_of(tensors)
    payload = codec.encode(tensors)
    whole = flat(codec.decode(payload, specs))
    for size in (1000, 4096, 1 << 20):
        assert torch.equal(torch.cat([codec.read(payload, specs, *block) for block in blocks(specs, size)]), whole)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 8), (8, 8)])
def test_a_block_outside_the_gradient_is_an_error(name: str, start: int, stop: int) -> None:
    codec, specs = load_codec(name), {"a": torch.Size([7])}
    with pytest.raises(IndexError):
        codec.read(codec.encode({"a": torch.ones(7)}), specs, start, stop)


@pytest.mark.parametrize("name", CODECS)
def test_a_block_takes_the_memory_of_a_block(name: str) -> None:
    """64 KB of 64 MB; `ternary-rc` also takes its 8,192 scales. numpy's memory is traced, torch's buffers are not."""
    tensors = {"w": torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))}
    codec, specs = load_codec(name), specs_of(tensors)
    payload = codec.encode(tensors)
    codec.read(payload, specs, 0, 1)
    tracemalloc.start()
    try:
        codec.read(payload, specs, 9_000_000, 9_016_384)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 18


class Payload:
    """A contribution read straight from its payload."""

    def __init__(self, name: str, tensors: Tensors) -> None:
        self.codec, self.specs = load_codec(name), specs_of(tensors)
        self.payload = self.codec.encode(tensors)
        self.count, self.norm = 1, self.codec.check(self.payload, self.specs)

    def add(self, into: Tensors, weight: float) -> None:
        self.codec.add(self.payload, into, weight)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.codec.read(self.payload, self.specs, start, stop)


def coordinate_median(contributions: Sequence[Contribution]) -> Tensors:
    return by_coordinate(contributions, lambda values: values.median(0).values, size=5000)


def test_a_median_over_blocks_of_mixed_codecs_is_the_dense_one() -> None:
    payloads = [Payload(name, some_tensors(seed)) for seed, name in enumerate(CODECS)]
    dense = torch.stack([flat(p.codec.decode(p.payload, p.specs)) for p in payloads]).median(0).values
    median = coordinate_median(payloads)
    assert {name: t.shape for name, t in median.items()} == payloads[0].specs
    assert torch.equal(flat(median), dense)
    with pytest.raises(ValueError, match="nothing to aggregate"):
        coordinate_median([])


def test_blocks_cover_every_coordinate_once() -> None:
    specs = {"b": torch.Size([3, 5]), "a": torch.Size([]), "none": torch.Size([0, 4])}
    assert list(blocks(specs, 6)) == [(0, 6), (6, 12), (12, 16)]
    assert list(blocks({}, 6)) == []
    assert sum(math.prod(shape) for shape in specs.values()) == 16
