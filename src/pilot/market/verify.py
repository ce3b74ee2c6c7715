"""A reply and its payload → a contribution, or a fault. Nothing a miner says of itself is believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from typing_extensions import Buffer

from pilot.codec import Codec
from pilot.codec import buffers as buffers_codec
from pilot.training.ranges import indices, within
from protocol import Fault, Hotkey, Order, ProtocolError, Range, Reply

if TYPE_CHECKING:
    import torch

    from pilot.codec import Specs, Tensors


PIECES = 64  # that partial work may leave an order's ranges in, beyond their number: ranks need no prefix


@dataclass(frozen=True)
class Contribution:
    """A verified gradient, in DiLoCo a pseudo-gradient. It weighs `count`: the validator's own, over the ranges done.

    It holds no tensors: however many there are in a round, they take no memory until they are summed.
    """

    hotkey: Hotkey
    done: tuple[Range, ...]
    count: int
    norm: float
    specs: Specs
    add: Callable[[Tensors, float], None]  # adds weight times the gradient; the payload is only read for it
    read: Callable[[int, int], torch.Tensor]  # coordinates [start, stop) of the flat gradient
    buffers: Callable[[], Tensors] = field(default=dict)  # the model's buffers after the work, such as a batch norm's
    buffers_norm: float = 0.0


def verify(
    order: Order,
    reply: Reply,
    payload: Callable[[], Buffer],
    *,
    codec: Codec,
    specs: Specs,
    buffers: Specs,
    count: Callable[[int], int],
) -> Contribution:
    """Raises ProtocolError with the fault. The payload's digest was checked against the signed reply as it arrived."""
    if (reply.run, reply.round, reply.hotkey) != (order.run, order.round, order.hotkey):
        raise ProtocolError(f"a reply of {reply.hotkey[:8]} to round {reply.round} of {reply.run}, not to this order")
    if reply.version != order.version:
        raise ProtocolError(f"computed on version {reply.version[:12]}, not {order.version[:12]}", Fault.STALE)
    if reply.codec != order.codec_up:
        raise ProtocolError(f"encoded as {reply.codec}, not {order.codec_up}")
    if len(reply.done) > len(order.ranges) + PIECES:
        raise ProtocolError(f"did {len(reply.done)} separate ranges of {len(order.ranges)} ordered", Fault.WRONG_DATA)
    if not reply.done or not within(reply.done, order.ranges):
        raise ProtocolError(f"did {list(reply.done)[:3]}, ordered were {list(order.ranges)[:3]}", Fault.WRONG_DATA)

    def add(into: Tensors, weight: float) -> None:  # the bytes are the same then, and until then not even mapped
        codec.add(buffers_codec.gradient(payload(), buffers), into, weight)

    def read(start: int, stop: int) -> torch.Tensor:
        return codec.read(buffers_codec.gradient(payload(), buffers), specs, start, stop)

    def read_buffers() -> Tensors:
        return buffers_codec.buffers(payload(), buffers)

    norm = codec.check(buffers_codec.gradient(payload(), buffers), specs)
    buffers_norm = buffers_codec.check(payload(), buffers)
    units = sum(map(count, indices(reply.done)))
    return Contribution(order.hotkey, reply.done, units, norm, specs, add, read, read_buffers, buffers_norm)
