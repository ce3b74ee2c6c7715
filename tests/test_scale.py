"""Many miners: their contributions take the memory of one, and the bench's miners are real ones. No timings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from typing_extensions import Buffer

from bench.scale import over_loopback
from pilot.aggregation import load_aggregator
from pilot.codec import Codec, load_codec
from pilot.market.verify import Contribution, verify
from pilot.simulation.virtual_time import run
from protocol import Range, Reply, digest
from tests.echo import MINER, make_order

torch.set_num_threads(1)
SPECS = {"a": torch.Size((3,)), "b": torch.Size((400, 1000))}
MINERS = 5
Tensors = dict[str, torch.Tensor]


class Large(TorchFunctionMode):
    """The sizes of what calls inside the block make, where it is as large as a tenth of the gradient. Views of a
    payload's bytes are not made, nor is what is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and function is not torch.frombuffer:
            given = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
            if result.untyped_storage().data_ptr() not in given and result.numel() >= SPECS["b"].numel() // 10:
                self.made.append(result.numel())
        return result


def gradient(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SPECS.items()}


def contributions(payloads: Sequence[Buffer], codec: Codec, name: str) -> list[Contribution]:
    """Each verified."""
    order = make_order().model_copy(update={"codec_up": name, "ranges": (Range(0, MINERS),)})
    found = []
    for seed, payload in enumerate(payloads):
        reply = Reply(
            run=order.run, round=order.round, hotkey=MINER.ss58_address, order="0" * 64, version=order.version,
            done=(Range(0, seed + 1),), loss=0.0, seconds=0.0, codec=name, payload_digest=digest("payload", payload),
            payload_bytes=len(memoryview(payload)), residual_before=None, residual_after=None,
        )  # fmt: skip
        found.append(
            verify(
                order,
                reply,
                partial(bytearray, payload),
                codec=codec,
                specs=SPECS,
                buffers={},
                count=lambda index: 1 + index,
            )
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
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_contributions_take_the_memory_of_one(name: str, aggregation: str) -> None:
    """Checking makes no tensors, and the sum only itself: to the bit what comes of all held at once."""
    codec = load_codec(name)
    payloads = [codec.encode(gradient(seed)) for seed in range(MINERS)]
    with Large() as large:
        given = contributions(payloads, codec, name)
        assert large.made == []
        result = load_aggregator(aggregation)(given)
        assert large.made == [SPECS["b"].numel()]
    limit = sorted(c.norm for c in given)[MINERS // 2]
    clipped = [1.0 if aggregation == "mean" or c.norm <= limit else limit / c.norm for c in given]
    expected = naive_mean(given, [codec.decode(payload, SPECS) for payload in payloads], clipped)
    assert all(torch.equal(result[key], expected[key]) for key in SPECS)


def test_rounds_of_many_miners_accept_every_reply(tmp_path: Path) -> None:
    """The bench's own way of playing fails where a single reply is not accepted."""
    assert run(over_loopback(tmp_path, 40, 2)) > 0
