"""An accepted order at a miner: its state, when it must stop, and its reply."""

from __future__ import annotations

import asyncio
import math
import threading
from dataclasses import dataclass, field

from typing_extensions import Buffer

from pilot.codec import Codec
from pilot.codec.buffers import append
from pilot.interfaces import Refused
from pilot.training.gradient import GradientAccumulator
from pilot.training.ranges import indices, size
from pilot.worker.error_feedback import ErrorFeedback
from protocol import Digest, Fault, Hotkey, Order, Reply, digest

RESERVE = 0.05  # fraction of the deadline that is kept for encoding and sending


@dataclass
class Job:
    """An order and its result. The compute thread reads and writes it while the event loop reads it."""

    order: Order
    digest: Digest
    owner: Hotkey
    received_at: float  # when it was first offered: budget and deadline run from then
    longest_s: float = math.inf  # this miner's own bound on deadlines
    heard_at: float = -math.inf  # when its validator last asked for it
    askers: int = 0  # requests for its reply that wait now
    started_at: float = 0.0  # when computing began
    last_batch_s: float = 0.0
    slowest_batch_s: float = 0.0
    batches_done: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)
    finished: asyncio.Event = field(default_factory=asyncio.Event)  # reply or refusal is set
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # it was delivered, or nobody waits for it any more
    upload_started_at: float = 0.0  # when its payload was first asked for
    reply: Reply | None = None
    payload: Buffer | None = None
    refusal: Refused | None = None

    def __post_init__(self) -> None:
        self.indices = indices(self.order.ranges)  # an iterator: the ranges of a hostile order may be long
        self.batches_left = size(self.order.ranges)

    def record_batch(self, seconds: float) -> None:
        self.last_batch_s, self.slowest_batch_s = seconds, max(seconds, self.slowest_batch_s)

    @property
    def deadline_s(self) -> float:
        return min(self.order.deadline_s, self.longest_s)

    @property
    def deadline(self) -> float:
        return self.received_at + self.deadline_s * (1 - RESERVE)

    def should_stop(self, now: float, handover_s: float) -> bool:
        """Return whether no further micro-batch fits: none is left, the job was stopped, or time would run out.

        `handover_s` is what encoding and sending take. The deadline is held against the slowest micro-batch so far, the
        budget against the last one. The first one is computed unless the deadline is over: otherwise a miner with a
        wrong `handover_s` would never measure it again.
        """
        order = self.order
        if not self.batches_left or self.stopping.is_set():
            return True
        if not self.batches_done:
            return now > self.deadline
        if now + self.slowest_batch_s + handover_s > self.deadline:
            return True
        if not order.budget_s:
            return False
        if order.staleness:  # the reply travels while the next order is computed
            return now + self.last_batch_s > self.started_at + order.budget_s
        return now + self.last_batch_s + handover_s > self.received_at + order.budget_s

    def wait_s(self, now: float, handover_s: float) -> float:
        """Return how long the encoding may wait for a verdict: a tenth of the time left, but at least a second.

        Never beyond the deadline or the budget.
        """
        order, left_s = self.order, self.deadline - handover_s - now
        wait_s = min(left_s, max(1.0, 0.1 * left_s))
        if order.budget_s:
            end = self.started_at if order.staleness else self.received_at - handover_s
            wait_s = min(wait_s, end + order.budget_s - now)
        return max(0.0, wait_s)

    def encode(self, codec: Codec, accumulator: GradientAccumulator, seconds: float, feedback: ErrorFeedback) -> None:
        """Make the reply over what is done, and its payload. Raises Refused if the loss is not finite."""
        if encoded := feedback.find_encoded(self.digest):
            self.payload, self.reply = encoded.payload, encoded.reply
            return
        work = accumulator.result()
        if not math.isfinite(work.loss):
            raise Refused(409, f"the loss is {work.loss}", Fault.NONFINITE)
        order = self.order
        gradient, before, after = feedback.encode(codec, work.gradient)
        payload = append(gradient, work.buffers)
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
        feedback.save(reply, payload)
        self.payload, self.reply = payload, reply
