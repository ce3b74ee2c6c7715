"""One accepted order at a miner: what it asks for, how far it is, and when it is time to stop."""

from __future__ import annotations

import asyncio
import math
import threading
from dataclasses import dataclass, field

from typing_extensions import Buffer

from pilot.codec import Codec
from pilot.interfaces import Refused
from pilot.training.gradient import GradientAccumulator
from pilot.training.ranges import indices, size
from pilot.worker.error_feedback import ErrorFeedback
from protocol import Digest, Fault, Hotkey, Order, Reply, digest

RESERVE = 0.05  # of the deadline, kept for encoding and the way back


@dataclass
class Job:
    """An order and what came of it. The compute thread reads and writes it while the event loop looks on."""

    order: Order
    digest: Digest
    owner: Hotkey
    heard: float  # when it was first offered: budget and deadline run from then
    began: float = 0.0  # when its computing did
    last_batch_s: float = 0.0
    slowest_batch_s: float = 0.0
    batches_done: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)
    finished: asyncio.Event = field(default_factory=asyncio.Event)  # reply or refusal is there
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # and delivered, or of no use to anybody any more
    fetching_at: float = 0.0  # when its payload was first asked for
    reply: Reply | None = None
    payload: Buffer | None = None
    refusal: Refused | None = None

    def __post_init__(self) -> None:
        self.todo = indices(self.order.ranges)  # not a list: a stranger's ranges may be long
        self.left = size(self.order.ranges)

    def did(self, seconds: float) -> None:
        """Another micro-batch."""
        self.last_batch_s, self.slowest_batch_s = seconds, max(seconds, self.slowest_batch_s)

    @property
    def deadline(self) -> float:
        return self.heard + self.order.deadline_s * (1 - RESERVE)

    def enough(self, now: float, handing_over_s: float) -> bool:
        """No further micro-batch: told to stop, or it would not be ready in time.

        `handing_over_s` is what encoding and sending take. The deadline holds for the slowest micro-batch so far, the
        budget for one like the last. A first one is done if the deadline is not over: else nothing would ever be
        measured again.
        """
        order = self.order
        if not self.left or self.stopping.is_set():
            return True
        if not self.batches_done:
            return now > self.deadline
        if now + self.slowest_batch_s + handing_over_s > self.deadline:
            return True
        if not order.budget_s:
            return False
        if order.staleness:  # the reply travels while the next order is at work
            return now + self.last_batch_s > self.began + order.budget_s
        return now + self.last_batch_s + handing_over_s > self.heard + order.budget_s

    def patience_s(self, now: float, handing_over_s: float) -> float:
        """How long what is computed may wait to be encoded: a tenth of the time that is left, if that is a second.

        Never beyond the budget.
        """
        order, left_s = self.order, self.deadline - handing_over_s - now
        patience_s = min(left_s, max(1.0, 0.1 * left_s))
        if order.budget_s:
            end = self.began if order.staleness else self.heard - handing_over_s
            patience_s = min(patience_s, end + order.budget_s - now)
        return max(0.0, patience_s)

    def encode(self, codec: Codec, computation: GradientAccumulator, seconds: float, feedback: ErrorFeedback) -> None:
        """The reply over what is done, and its payload. Raises Refused for a loss that is no number."""
        if kept := feedback.again(self.digest):
            self.payload, self.reply = kept.payload, kept.reply
            return
        work = computation.result()
        if not math.isfinite(work.loss):
            raise Refused(409, f"the loss is {work.loss}", Fault.NONFINITE)
        order = self.order
        payload, before, after = feedback.encode(codec, work.gradient)
        reply = Reply(
            run=order.run,
            round=order.round,
            hotkey=order.hotkey,
            order=self.digest,
            version=order.version,
            done=work.done,
            loss=work.loss,
            seconds=seconds,
            codec=order.codec_up,
            payload_digest=digest("payload", payload),
            payload_bytes=memoryview(payload).nbytes,
            residual_before=before,
            residual_after=after,
        )
        feedback.keep(reply, payload)
        self.payload, self.reply = payload, reply
