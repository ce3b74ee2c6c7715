"""One miner, request by request, without a network between: what it is ordered, sent and asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from typing_extensions import Buffer

from pilot.interfaces import Refused
from pilot.training.learner import Learner
from pilot.worker.worker import Worker
from protocol import BlobRef, Digest, Order, Range, Reply, Stop, Update, digest
from tasks.gpt2 import GPT2
from tests.tiny import MINERS, VALIDATOR
from tests.updates import whole_state

MINER = MINERS[0]
HOTKEY, CALLER = MINER.ss58_address, VALIDATOR.ss58_address


@dataclass
class Gateway:
    """A validator's desk: writes orders, and sends them with what the miner lacks."""

    task: GPT2
    learner: Learner
    worker: Worker
    said: list[str]
    blobs: dict[Digest, Buffer] = field(default_factory=dict)  # beside the learner's and the task's
    sent: list[BlobRef] = field(default_factory=list)

    def order(self, ranges: Sequence[Range] = (Range(0, 2),), state: Buffer | None = None, **changes: Any) -> Order:
        """`state` instead of the learner's own, with the version that follows from it."""
        update: Update = changes.get("update", self.learner.update)
        if state is not None:
            ref = BlobRef(kind="state", digest=digest("state", state), bytes=len(memoryview(state)))
            update = whole_state(ref)
        fields: dict[str, Any] = {
            "run": "tiny",
            "round": 0,
            "hotkey": HOTKEY,
            "version": update.version,
            "update": update,
            "state_digest": None,
            "task": self.task.spec(),
            "data": self.task.data_spec,
            "ranges": tuple(ranges),
            "deadline_s": 60.0,
            "staleness": 0,
            "codec_up": "fp32",
            "codec_down": "fp32",
        }
        return Order(**(fields | changes))

    def send(self, order: Order, caller: str = CALLER, state: Buffer | None = None) -> Digest:
        """Until it is accepted, with every blob that is missing."""
        order_digest = digest(order.kind, order.text().encode())
        try:
            self.worker.accept_order(caller, order, order_digest)
        except Refused as refused:
            if not refused.missing:
                raise
            for ref in refused.missing:
                self.push(ref, self.blob(ref, state), caller, refused.held.get(ref.digest, 0))
            self.worker.accept_order(caller, order, order_digest)
        return order_digest

    def blob(self, ref: BlobRef, state: Buffer | None = None) -> Buffer:
        if ref.kind == "state" and state is not None:
            return state
        return {**self.task.blobs(), **self.learner.blobs, **self.blobs}[ref.digest]

    def push(self, ref: BlobRef, data: Buffer, caller: str = CALLER, offset: int = 0) -> None:
        writer = self.worker.open_blob(caller, ref, offset)
        view = memoryview(data).cast("B")
        for start in range(offset, len(view), 10_000):
            writer.write(view[start : start + 10_000])
        writer.commit()
        self.sent.append(ref)

    async def reply(self, order: Digest, caller: str = CALLER) -> Reply:
        reply = await self.worker.wait_for_reply(caller, order, 60.0)
        assert reply is not None
        return reply

    async def refusal(self, order: Digest, caller: str = CALLER) -> Refused:
        with pytest.raises(Refused) as caught:
            await self.worker.wait_for_reply(caller, order, 60.0)
        return caught.value

    def stop(self, order: Digest, caller: str = CALLER) -> None:
        self.worker.stop_order(caller, Stop(run="tiny", round=0, hotkey=HOTKEY, order=order))

    def computed(self) -> int:
        """Jobs that came to an end with a gradient."""
        return sum(": loss " in line for line in self.said)


def refused(call: Callable[[], object]) -> Refused:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value
