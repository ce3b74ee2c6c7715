"""The miner's side of a round: what it holds, what it is doing, and what it refuses.

It keeps no optimizer and no state between rounds but the model version it has, its data, and its last reply, which
stays fetchable until the next order. Typed messages in, typed messages out: bytes, signatures and sockets are the
transport's.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn
from typing_extensions import Buffer

from codec import CODECS, load_codec
from market.cursor import size
from market.learner import load_replica
from market.work import Work, compute
from protocol import (
    MAX_SERVED_BYTES,
    BlobRef,
    DataSpec,
    Digest,
    Fault,
    Hasher,
    Health,
    Hello,
    Hotkey,
    Order,
    ProtocolError,
    Receipt,
    Reply,
    Signed,
    Status,
    Stop,
    TaskSpec,
    Version,
    chain,
    digest,
)
from tasks import Task, load_task
from tasks.tokens import Tokens
from values import Refused

RESERVE = 0.05  # of the deadline, kept for encoding and the way back


class BlobWriter(Protocol):
    """A blob on its way in, written in a thread; `commit` raises ProtocolError where it is not what was promised."""

    @property
    def held(self) -> int: ...
    def write(self, chunk: Buffer) -> None: ...
    def commit(self) -> None: ...
    def abort(self) -> None: ...


class Cache(Protocol):
    """The miner's files (records.cache)."""

    def blob(self, ref: BlobRef) -> Path | None: ...
    def store(self, ref: BlobRef) -> BlobWriter: ...
    def add_receipt(self, signed: Signed) -> None: ...


class StateWriter:
    """A model state on its way into memory, hashed as it comes; `whole` once it is what the order named."""

    def __init__(self, ref: BlobRef, buffer: memoryview) -> None:
        self.ref, self.buffer = ref, buffer
        self.held = 0
        self.whole = False
        self.hasher = Hasher("state")

    def write(self, chunk: Buffer) -> None:
        data = memoryview(chunk).cast("B")
        end = self.held + len(data)
        if end > self.ref.bytes:
            self._restart()
            raise ProtocolError(f"state: more than the {self.ref.bytes} bytes promised")
        there = np.frombuffer(self.buffer, np.uint8)[self.held : end]
        np.copyto(there, np.frombuffer(data, np.uint8))  # lets go of the GIL, which a slice of memoryviews does not
        self.hasher.update(data)
        self.held = end

    def commit(self) -> None:
        if self.held != self.ref.bytes or self.hasher.hexdigest() != self.ref.digest:
            held = self.held
            self._restart()
            raise ProtocolError(f"state: {held} bytes that are not the {self.ref.bytes} that the order names")
        self.whole = True

    def _restart(self) -> None:
        self.held, self.hasher = 0, Hasher("state")

    def abort(self) -> None:
        """Nothing to clear away: the memory goes with its last user."""


@dataclass
class Job:
    """One accepted order."""

    order: Order
    digest: Digest
    owner: Hotkey
    accepted: float
    stopping: threading.Event = field(default_factory=threading.Event)
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    batches_done: int = 0
    reply: Reply | None = None
    payload: Buffer | None = None
    refusal: Refused | None = None
    delivered: bool = False


class Worker:
    """Serves the orders of one validator at a time. Everything but the computing runs on the event loop."""

    def __init__(
        self,
        hotkey: Hotkey,
        tasks: frozenset[str],
        device: torch.device,
        cache: Cache,
        find_tokens: Callable[[DataSpec], Tokens],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        compiled: bool = False,
    ) -> None:
        self.hotkey, self.tasks, self.device, self.cache = hotkey, tasks, device, cache
        self.find_tokens, self.say, self.clock, self.compiled = find_tokens, say, clock, compiled
        self.job: Job | None = None
        self.version: Version | None = None  # what the model holds
        self.state: tuple[Digest, memoryview] | None = None  # received, not yet in the model
        self.spare: memoryview | None = None  # the memory of the state before: pages that need no clearing again
        self.wanted: dict[Digest, BlobRef] = {}  # asked for by the last refusal; nothing else is taken
        self.writers: dict[Digest, BlobWriter] = {}  # of those wanted: what is held of them waits for the rest
        self.figures: tuple[str, ...] = ()  # of the last gradient, for display
        self.refusals: dict[Hotkey, str] = {}  # the reason that each caller got last, so that it is said once
        self.encode_s = 0.0
        self.failed: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._built: tuple[TaskSpec, Digest, Task, nn.Module] | None = None
        self._thread = ThreadPoolExecutor(1, "compute")  # one thread: one OpenMP team, and jobs never overlap
        self._running: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Ends the work after its micro-batch."""
        if self.job is not None:
            self.job.stopping.set()
        self._thread.shutdown(wait=True)

    # --- requests -------------------------------------------------------------------------------------------------

    def hello(self, nonce: str) -> Hello:
        return Hello(
            hotkey=self.hotkey,
            nonce=nonce,
            tasks=tuple(sorted(self.tasks)),
            codecs=tuple(CODECS),
            version=self.version,
            time_ns=time.time_ns(),
        )

    def status(self) -> Status:
        job = self.job
        return Status(
            hotkey=self.hotkey,
            state="idle" if job is None else "done" if job.finished.is_set() else "working",
            order=job.digest if job else None,
            run=job.order.run if job else None,
            round=job.order.round if job else None,
            version=self.version,
            batches_done=job.batches_done if job else 0,
            time_ns=time.time_ns(),
        )

    def health(self) -> Health:
        status = self.status()
        return Health(
            role="miner",
            hotkey=self.hotkey,
            healthy=not self.failed.done(),
            state=status.state,
            run=status.run,
            round=status.round,
            version=self.version,
            time_ns=time.time_ns(),
        )

    def order(self, caller: Hotkey, order: Order, order_digest: Digest) -> Status:
        """Accept at once, and work in the background. The same order again is the same job, not another.

        Raises Refused: BUSY, an order that contradicts itself, or `missing` blobs.
        """
        try:
            status = self._accept(caller, order, order_digest)
        except Refused as refused:
            if not refused.missing and self.refusals.get(caller) != refused.reason:
                self.refusals[caller] = refused.reason
                self.say(f"round {order.round}: order of {caller[:8]} refused, {refused.reason}")
            raise
        self.refusals.pop(caller, None)
        return status

    def _accept(self, caller: Hotkey, order: Order, order_digest: Digest) -> Status:
        job = self.job
        if job and job.digest == order_digest and job.owner == caller and job.refusal is None:
            return self.status()
        if job and job.owner != caller and self._unfinished(job):
            raise Refused(409, f"working for {job.owner[:8]} on round {job.order.round}", Fault.BUSY)
        self._check(order)
        writer = self.writers.get(order.update.blob.digest)
        if isinstance(writer, StateWriter) and writer.whole:
            self.state = (writer.ref.digest, writer.buffer)
        missing = self._missing(order)
        self.wanted = {ref.digest: ref for ref in missing}
        self._drop_unwanted()
        if missing:
            held = {name: writer.held for name, writer in self.writers.items()}
            raise Refused(409, "send the blobs that are missing, then the order again", missing=missing, held=held)
        self.job = Job(order, order_digest, caller, self.clock())
        running = asyncio.create_task(self._run(self.job, job))
        self._running.add(running)
        running.add_done_callback(self._ended)
        return self.status()

    def receive(self, caller: Hotkey, ref: BlobRef, offset: int) -> BlobWriter:
        """Only blobs that the last order was refused for are taken, from where they broke off."""
        if self.wanted.get(ref.digest) != ref:
            raise Refused(409, f"no order asked for this {ref.kind}")
        writer = self.writers.get(ref.digest)
        if offset != (writer.held if writer else 0):
            held = {ref.digest: writer.held} if writer else {}
            raise Refused(409, f"another part of the {ref.kind} is held", missing=[ref], held=held)
        if writer is None:
            writer = self.writers[ref.digest] = self._writer(ref)
        return writer

    def _writer(self, ref: BlobRef) -> BlobWriter:
        if ref.kind != "state":
            return self.cache.store(ref)
        buffer, self.spare = self.spare, None  # a second writer of the same state gets memory of its own
        if buffer is None or len(buffer) != ref.bytes:
            buffer = np.empty(ref.bytes, np.uint8).data
        return StateWriter(ref, buffer)

    def _drop_unwanted(self) -> None:
        for name in self.writers.keys() - self.wanted.keys():
            self.writers.pop(name).abort()

    @property
    def arriving(self) -> StateWriter | None:
        """The state that is on its way in."""
        return next((w for w in self.writers.values() if isinstance(w, StateWriter) and not w.whole), None)

    async def reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
        """The reply, or None while the work goes on after `wait_s` seconds."""
        job = self._job(caller, order)
        try:
            await asyncio.wait_for(job.finished.wait(), wait_s)
        except TimeoutError:
            return None
        if job.refusal is not None:
            raise job.refusal
        return job.reply

    def payload(self, caller: Hotkey, order: Digest) -> Buffer:
        job = self._job(caller, order)
        if job.payload is None:
            raise Refused(404, "no payload for this order yet")
        return job.payload

    def delivered(self, caller: Hotkey, order: Digest) -> None:
        job = self.job
        if job is not None and (job.owner, job.digest) == (caller, order):
            job.delivered = True

    def stop(self, caller: Hotkey, stop: Stop) -> Status:
        """Ends the order's work after its micro-batch; before it began, or twice, it is as good."""
        self._job(caller, stop.order).stopping.set()
        return self.status()

    def receipt(self, caller: Hotkey, receipt: Receipt, signed: Signed) -> Status:
        if receipt.hotkey != self.hotkey:
            raise Refused(400, f"a receipt for {receipt.hotkey[:8]}", Fault.MALFORMED)
        self.cache.add_receipt(signed)
        self.say(
            f"round {receipt.round}: {receipt.verdict}, {receipt.reason}; weight {receipt.weight:.3f}"
            + "".join(f", {name} {value:.4g}" for name, value in receipt.scores.items())
        )
        return self.status()

    # --- the order's way ------------------------------------------------------------------------------------------

    def _check(self, order: Order) -> None:
        if order.hotkey != self.hotkey:
            raise Refused(400, f"an order for {order.hotkey[:8]}", Fault.MALFORMED)
        if order.task.name not in self.tasks:
            raise Refused(
                400, f"task {order.task.name}: this miner does {', '.join(sorted(self.tasks))}", Fault.MALFORMED
            )
        for codec in (order.codec_up, order.codec_down):
            if codec not in CODECS:
                raise Refused(400, f"codec {codec}: this miner knows {', '.join(CODECS)}", Fault.MALFORMED)
        if chain(order.update.base, order.update.blob.digest) != order.version:
            raise Refused(400, "the version does not follow from its base and its update", Fault.MALFORMED)

    def _missing(self, order: Order) -> list[BlobRef]:
        missing = []
        update, tokens, vocabulary = order.update.blob, order.data.tokens, order.data.vocabulary
        if self.version != order.version and (self.state is None or self.state[0] != update.digest):
            missing.append(update)
        if self.cache.blob(tokens) is None:
            if tokens.bytes <= MAX_SERVED_BYTES:
                missing.append(tokens)
            elif vocabulary is not None and self.cache.blob(vocabulary) is None:
                missing.append(vocabulary)
        return missing

    def _unfinished(self, job: Job) -> bool:
        """Until it is delivered or refused, or its deadline is over."""
        ended = job.delivered or job.refusal is not None
        return not ended and self.clock() - job.accepted < job.order.deadline_s

    def _job(self, caller: Hotkey, order: Digest) -> Job:
        if self.job is None or self.job.digest != order or self.job.owner != caller:
            raise Refused(404, "no such order here")
        return self.job

    async def _run(self, job: Job, previous: Job | None) -> None:
        """A new order replaces the old one: that ends after its micro-batch, then this begins."""
        if previous is not None:
            previous.stopping.set()
            await previous.finished.wait()
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._work, job)
        except Refused as refusal:
            job.refusal = refusal
            self.say(f"round {job.order.round}: refused, {refusal.reason}")
        except ProtocolError as error:
            job.refusal = Refused(409, str(error), error.fault)
            self.say(f"round {job.order.round}: refused, {error}")
        finally:
            job.finished.set()

    def _ended(self, running: asyncio.Task[None]) -> None:
        """Our own fault ends the process: `failed` is what miner.py waits on."""
        self._running.discard(running)
        error = None if running.cancelled() else running.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)

    def _work(self, job: Job) -> None:
        """In the compute thread: model and data, the gradient, its encoding."""
        if job.stopping.is_set():  # replaced or stopped in the queue: the model stays at the version it has
            raise Refused(409, "stopped before it began", Fault.LATE)
        began = self.clock()
        order = job.order
        task, model = self._prepare(order)
        prepared = self.clock()
        self.say(f"round {order.round}: {size(order.ranges)} micro-batches on version {order.version[:12]}")

        def should_stop(slowest_s: float) -> bool:
            left_s = job.accepted + order.deadline_s * (1 - RESERVE) - self.encode_s - self.clock()
            return job.stopping.is_set() or left_s < slowest_s

        def on_batch() -> None:
            job.batches_done += 1

        work = compute(task, model, order.ranges, should_stop=should_stop, on_batch=on_batch, clock=self.clock)
        if work is None:
            raise Refused(409, "stopped before the first micro-batch was done", Fault.LATE)
        computed = self.clock()
        self._encode(job, work, computed - began)
        self.encode_s = self.clock() - computed
        per_s = work.count / max(computed - prepared, 1e-9)
        self.figures = (f"loss {work.loss:.3f}", f"{per_s:,.0f} {task.unit}/s")
        self.say(
            f"round {order.round}: loss {work.loss:.4f} over {work.count} {task.unit}; "
            f"load {prepared - began:.3f} s, compute {computed - prepared:.3f} s, encode {self.encode_s:.3f} s"
        )

    def _encode(self, job: Job, work: Work, seconds: float) -> None:
        if not math.isfinite(work.loss):
            raise Refused(409, f"the loss is {work.loss}", Fault.NONFINITE)
        order = job.order
        payload = load_codec(order.codec_up).encode(work.gradient)
        reply = Reply(
            run=order.run,
            round=order.round,
            hotkey=self.hotkey,
            order=job.digest,
            version=order.version,
            done=work.done,
            loss=work.loss,
            seconds=seconds,
            codec=order.codec_up,
            payload_digest=digest("payload", payload),
            payload_bytes=len(memoryview(payload)),
            residual_before=None,
            residual_after=None,
        )
        job.payload, job.reply = payload, reply

    def _prepare(self, order: Order) -> tuple[Task, nn.Module]:
        """The order's task and data, and its model at the order's version."""
        if self._built is None or self._built[:2] != (order.task, order.data.tokens.digest):
            self.version, self._built = None, None
            task = load_task(order.task.name).from_spec(order.task, order.data, self.find_tokens(order.data))
            model = task.build_model(self.device, initial=False)
            if self.compiled:
                model.compile()
            self._built = (order.task, order.data.tokens.digest, task, model)
        _, _, task, model = self._built
        if self.version != order.version:
            state = self.state
            if state is None or state[0] != order.update.blob.digest:
                raise Refused(409, "the state is gone: send the order again", missing=[order.update.blob])
            self.version = None  # neither the old one nor yet the new one
            load_replica(task, model, load_codec(order.codec_down), state[1])
            self.version = order.version
            if self.state is state:  # and no newer one has come meanwhile
                self.state, self.spare = None, state[1]
        return task, model
