"""Many miners: their contributions take the memory of one, and the bench's miners are real ones. No timings."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from typing_extensions import Buffer

from aggregation import load_aggregator
from bench.scale import over_loopback
from codec import Codec, load_codec
from codec.dense import Dense
from market.verify import Contribution, verify
from protocol import Range, Reply, digest
from tests.echo import MINER, make_order
from transport.loopback import run

torch.set_num_threads(1)
SPECS = {"a": torch.Size((3,)), "b": torch.Size((40, 50))}
MINERS = 7
Tensors = dict[str, torch.Tensor]


class Watched(Dense):
    """Knows how many decoded gradients are alive, and the most that ever were."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.alive = self.most = self.decoded = 0

    def decode(self, payload: Buffer, specs: Mapping[str, torch.Size]) -> Tensors:
        tensors = super().decode(payload, specs)
        self.alive, self.decoded = self.alive + 1, self.decoded + 1
        self.most = max(self.most, self.alive)
        weakref.finalize(tensors["b"], self._gone)
        return tensors

    def _gone(self) -> None:
        self.alive -= 1


def gradient(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SPECS.items()}


def contributions(codec: Codec, name: str) -> list[Contribution]:
    """Of `MINERS` payloads, each verified."""
    order = make_order().model_copy(update={"codec_up": name, "ranges": (Range(0, MINERS),)})
    found = []
    for seed in range(MINERS):
        payload = codec.encode(gradient(seed))
        reply = Reply(
            run=order.run, round=order.round, hotkey=MINER.ss58_address, order="0" * 64, version=order.version,
            done=(Range(0, seed + 1),), loss=0.0, seconds=0.0, codec=name, payload_digest=digest("payload", payload),
            payload_bytes=len(memoryview(payload)), residual_before=None, residual_after=None,
        )  # fmt: skip
        found.append(
            verify(order, reply, partial(bytearray, payload), codec=codec, specs=SPECS, count=lambda index: 1 + index)
        )
    return found


def naive_mean(given: Sequence[Contribution], tensors: Sequence[Tensors], factors: Sequence[float]) -> Tensors:
    total = sum(c.count for c in given)
    result: Tensors = {}
    for c, each, factor in zip(given, tensors, factors, strict=True):
        for name, tensor in each.items():
            summand = tensor * (factor * (c.count / total))
            result[name] = result[name] + summand if name in result else summand
    return result


@pytest.mark.parametrize("aggregation", ["mean", "median_norm_mean"])
@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_contributions_take_the_memory_of_one(name: str, dtype: torch.dtype, aggregation: str) -> None:
    """None of them holds a tensor, and the sum holds one at a time; to the bit what comes of all held at once."""
    codec = Watched(dtype)
    gc.disable()  # references alone must do it
    try:
        given = contributions(codec, name)
        assert (codec.alive, codec.most) == (0, 1)
        result = load_aggregator(aggregation)(given)
        assert (codec.alive, codec.most, codec.decoded) == (0, 1, 2 * MINERS)
    finally:
        gc.enable()
    limit = sorted(c.norm for c in given)[MINERS // 2]
    clipped = [1.0 if aggregation == "mean" or c.norm <= limit else limit / c.norm for c in given]
    expected = naive_mean(
        given, [load_codec(name).decode(codec.encode(gradient(i)), SPECS) for i in range(MINERS)], clipped
    )
    assert all(torch.equal(result[key], expected[key]) for key in SPECS)


def test_rounds_of_many_miners_accept_every_reply(tmp_path: Path) -> None:
    """The bench's own way of playing fails where a single reply is not accepted."""
    assert run(over_loopback(tmp_path, 40, 2)) > 0
