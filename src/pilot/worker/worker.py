"""The miner's side of a round: what it holds, what it is doing, and what it refuses.

It keeps no optimizer and no state between rounds but the model version it has, its data, and its last reply, which
stays fetchable until the next order. Typed messages in, typed messages out: bytes, signatures and sockets are the
transport's.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import torch
from typing_extensions import Buffer

from pilot.codec import bits, known_codecs, load_codec
from pilot.common.units import fp32_megabytes
from pilot.interfaces import BlobWriter, MinerStore, Refused
from pilot.training.executor import Charge, TimedExecutor
from pilot.training.gradient import GradientAccumulator
from pilot.training.inner_loop import WorkStarter
from pilot.training.versions import UpdatePath
from pilot.worker.blob_inbox import BlobInbox
from pilot.worker.error_feedback import ErrorFeedback
from pilot.worker.job import Job
from pilot.worker.replica import Replica
from protocol import (
    MAX_SERVED_BYTES,
    BlobRef,
    DataSpec,
    Digest,
    Fault,
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
    Version,
)
from tasks.tokens import Tokens

KEPT_JOBS = 4  # replies stay answerable for so many orders: one that comes too late is noted all the same

V = TypeVar("V")


class Worker:
    """Serves the orders of one validator at a time. Everything but the computing runs on the event loop."""

    def __init__(
        self,
        hotkey: Hotkey,
        tasks: frozenset[str],
        device: torch.device,
        cache: MinerStore,
        find_tokens: Callable[[DataSpec], Tokens],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        compiled: bool = False,
        charge: Charge | None = None,
    ) -> None:
        """`charge` is for emulations: a micro-batch then takes what it lets pass (`pilot.training.executor`)."""
        self.hotkey, self.tasks, self.cache, self.say, self.clock = hotkey, tasks, cache, say, clock
        self.jobs: dict[Digest, Job] = {}  # of the last orders
        self.codecs = known_codecs()
        self.feedback = ErrorFeedback(cache.residuals, cache.receipts, say)
        self.replica = Replica(device, find_tokens, compiled, lambda codec: codec in self.codecs)
        self.inbox = BlobInbox(self.replica.states, cache.store)
        self.starter = WorkStarter()
        self.leaving = False
        self.heard: dict[Digest, float] = {}  # when each of the last orders was first offered
        self.stopped: dict[Digest, None] = {}  # orders that were stopped before they came
        self.figures: tuple[str, ...] = ()  # of the last gradient, for display
        self.refusals: dict[Hotkey, str] = {}  # the reason that each caller got last, so that it is said once
        self.encodings: deque[float] = deque(maxlen=5)  # seconds
        self.uploads: deque[float] = deque(maxlen=5)  # seconds from a payload's first byte asked for to its last
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[object] = self._loop.create_future()
        self._thread = ThreadPoolExecutor(1, "compute")  # one thread: one OpenMP team, and jobs never overlap
        self._alone = charge is not None  # under virtual time one micro-batch is computed at a time
        self._executor = TimedExecutor(self._thread, lambda: self.clock(), charge)
        self._running: set[asyncio.Task[None]] = set()

    @property
    def job(self) -> Job | None:
        """The one at work, else the newest."""
        return next(iter(self._unfinished()), None) or next(reversed(self.jobs.values()), None)

    def _unfinished(self) -> list[Job]:
        return [job for job in self.jobs.values() if not job.finished.is_set()]

    async def leave(self, grace_s: float) -> bool:
        """Take no more orders, end the work after its micro-batch, and hand over what was done.

        True where nothing is left that a validator waits for; False where that took longer than `grace_s`.
        """
        self.leaving = True
        for job in self.jobs.values():
            job.stopping.set()
        try:
            async with asyncio.timeout(grace_s):
                for job in list(self.jobs.values()):
                    if self._awaited(job):
                        await job.settled.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Ends the work after its micro-batch, for which it does not wait."""
        for job in self.jobs.values():
            job.stopping.set()
        for running in self._running:
            running.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    # --- requests -------------------------------------------------------------------------------------------------

    def hello(self, nonce: str) -> Hello:
        return Hello(
            hotkey=self.hotkey,
            nonce=nonce,
            tasks=tuple(sorted(self.tasks)),
            codecs=self.codecs,
            version=self.replica.version,
            time_ns=time.time_ns(),
        )

    def status(self) -> Status:
        job = self.job
        state: Literal["idle", "working", "done"]
        state = "idle" if job is None else "done" if job.finished.is_set() else "working"
        return Status(
            hotkey=self.hotkey,
            state="leaving" if self.leaving else state,
            order=job.digest if job else None,
            run=job.order.run if job else None,
            round=job.order.round if job else None,
            version=self.replica.version,
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
            version=self.replica.version,
            time_ns=time.time_ns(),
        )

    def accept_order(self, caller: Hotkey, order: Order, order_digest: Digest) -> Status:
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
        known = self.jobs.get(order_digest)
        if known and known.owner == caller and not (known.finished.is_set() and known.payload is None):
            return self.status()  # else it was refused, or its payload has made room: it is done again
        busy = [job for job in self.jobs.values() if job.owner != caller and self._awaited(job)]
        if busy:
            raise Refused(409, f"working for {busy[0].owner[:8]} on round {busy[0].order.round}", Fault.BUSY)
        if self.leaving:
            raise Refused(409, "this miner is shutting down", Fault.LEAVING)
        if order_digest in self.stopped:
            raise Refused(409, "stopped before it came", Fault.LATE)
        self._check(order)
        if self.clock() - self.heard.get(order_digest, -math.inf) >= order.deadline_s:
            _remember(self.heard, order_digest, self.clock())
        self.inbox.ask(self._needed(order))
        self._begin(Job(order, order_digest, caller, self.heard[order_digest]))
        return self.status()

    def _begin(self, job: Job) -> None:
        """An order takes the place of those before it; one that says staleness 1 waits for the one at work."""
        before = self._unfinished()
        stays = job.order.staleness  # so many of the last ones
        for other in before[: len(before) - stays]:
            other.stopping.set()
            other.settled.set()
        for other in list(self.jobs.values())[: len(self.jobs) - stays]:
            other.payload = None
        self.jobs.pop(job.digest, None)  # refused before, it is at the end now
        _remember(self.jobs, job.digest, job, KEPT_JOBS)
        running = asyncio.create_task(self._run(job, before))
        self._running.add(running)
        running.add_done_callback(self._ended)

    def open_blob(self, caller: Hotkey, ref: BlobRef, offset: int) -> BlobWriter:
        """Only blobs that the last order was refused for are taken, from where they broke off."""
        return self.inbox.receive(ref, offset)

    async def wait_for_reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
        """The reply, or None while the work goes on after `wait_s` seconds."""
        job = self._job(caller, order)
        try:
            async with asyncio.timeout(wait_s):  # wait_for may lose a cancellation, until Python 3.12
                await job.finished.wait()
        except TimeoutError:
            return None
        if job.refusal is not None:
            job.settled.set()
            raise job.refusal
        return job.reply

    def read_payload(self, caller: Hotkey, order: Digest) -> Buffer:
        job = self._job(caller, order)
        if job.payload is None:
            raise Refused(404, "no payload for this order yet, or no longer")
        job.fetching_at = job.fetching_at or self.clock()
        return job.payload

    def mark_delivered(self, caller: Hotkey, order: Digest) -> None:
        job = self.jobs.get(order)
        if job is not None and job.owner == caller and not job.settled.is_set():
            job.settled.set()
            self.uploads.append(self.clock() - job.fetching_at)

    def stop_order(self, caller: Hotkey, stop: Stop) -> Status:
        """Ends the order's work after its micro-batch; before it began, before it came, or twice, it is as good."""
        job = self.jobs.get(stop.order)
        if job is None:
            _remember(self.stopped, stop.order, None)
        else:
            self._job(caller, stop.order).stopping.set()
        return self.status()

    def accept_receipt(self, caller: Hotkey, receipt: Receipt, signed: Signed) -> Status:
        if receipt.hotkey != self.hotkey:
            raise Refused(400, f"a receipt for {receipt.hotkey[:8]}", Fault.MALFORMED)
        new = self.cache.add_receipt(signed)
        self.feedback.heard(caller, receipt)
        if not new:
            return self.status()
        job = self.jobs.get(receipt.order)
        if job is not None and job.owner == caller:
            self._loop.call_soon_threadsafe(job.settled.set)
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
            if codec not in self.codecs:
                raise Refused(400, f"codec {codec}: this miner knows {', '.join(self.codecs)}", Fault.MALFORMED)
        if order.update.version != order.version:
            raise Refused(400, "the version does not follow from its base and its update", Fault.MALFORMED)

    def _needed(self, order: Order) -> list[BlobRef]:
        """What is not here of its data, and of its way from the version that its turn will find in the model."""
        before = self._unfinished()
        way = self._way(order, before[-1].order.version if before else self.replica.version)
        needed = [step.ref for step in way if step.digest not in self.replica.states]
        tokens, vocabulary = order.data.tokens, order.data.vocabulary
        if self.cache.blob(tokens) is None:
            if tokens.bytes <= MAX_SERVED_BYTES:
                needed.append(tokens)
            elif vocabulary is not None and self.cache.blob(vocabulary) is None:
                needed.append(vocabulary)
        return list(dict.fromkeys(needed))  # two deltas may be the same

    def _way(self, order: Order, version: Version | None) -> UpdatePath:
        return self.replica.way(order, version, self.inbox.missing)

    def _awaited(self, job: Job) -> bool:
        """Until it is delivered or refused, or its deadline is over."""
        return not job.settled.is_set() and self.clock() - job.heard < job.order.deadline_s

    def _job(self, caller: Hotkey, order: Digest) -> Job:
        job = self.jobs.get(order)
        if job is None or job.owner != caller:
            raise Refused(404, "no such order here")
        return job

    async def _run(self, job: Job, before: Sequence[Job]) -> None:
        """After the micro-batch, or the end, of those before it."""
        for other in before:
            await other.finished.wait()
        try:
            await self._work(job)
        except Refused as refusal:
            job.refusal = refusal
        except ProtocolError as error:
            job.refusal = Refused(409, str(error), error.fault)
        except asyncio.CancelledError:
            job.refusal = Refused(409, "this miner has shut down", Fault.LEAVING)
            raise
        finally:
            job.finished.set()
            self._forget_states()
        if job.refusal is not None:
            self.say(f"round {job.order.round}: refused, {job.refusal}")

    def _forget_states(self) -> None:
        """Those that are not on the way to an order's version, or to the newest one's."""
        jobs = self._unfinished() or list(self.jobs.values())[-1:]
        needed: set[Digest] = set()
        for job in jobs:
            with contextlib.suppress(Refused):  # for want of a way to its version, and it was told so
                needed |= {step.digest for step in self._way(job.order, self.replica.version)}
        self.replica.states.keep(needed)

    def _ended(self, running: asyncio.Task[None]) -> None:
        """Our own fault ends the process: `failed` is what miner.py waits on."""
        self._running.discard(running)
        error = None if running.cancelled() else running.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)

    async def _work(self, job: Job) -> None:
        """Model and data, the gradient, its encoding: each in the compute thread."""
        order = job.order
        if job.stopping.is_set():  # replaced or stopped in the queue: the model stays at the version it has
            raise Refused(409, "stopped before it began", Fault.LATE)
        began = self.clock()
        way = self._way(order, self.replica.version)
        megabytes = sum(step.bytes * 32 / bits(step.codec) for step in way) / 1e6
        task, model = await self._executor.run("load", megabytes, self.replica.prepare, order)
        self._forget_states()
        job.began = self.clock()
        asked = f"{order.budget_s:g} s of micro-batches" if order.budget_s else f"{job.left} micro-batches"
        self.say(f"round {order.round}: {asked} on version {order.version[:12]}")
        computation = await self._executor.run("load", 0.0, self.starter.begin, order, task, model, self.replica.lend)
        while not self._enough(job):
            looked = self.clock()
            await self._executor.run("batch", 1.0, self._compute, job, computation)
            if self._alone:
                job.did(self.clock() - looked)
        if not computation.done:
            why = "stopped" if job.stopping.is_set() else "no time left"
            raise Refused(409, f"{why} before the first micro-batch was done", Fault.LATE)
        computed = self.clock()
        codec = load_codec(order.codec_up)
        megabytes = fp32_megabytes(p.shape for p in computation.parameters.values())
        await self.feedback.ready(job, computation.parameters, self._executor, self._handing_over_s)
        began_encoding = self.clock()
        await self._executor.run(
            "encode", megabytes, job.encode, codec, computation, computed - job.began, self.feedback
        )
        self.encodings.append(self.clock() - began_encoding)
        per_s = computation.count / max(computed - job.began, 1e-9)
        loss = computation.loss / computation.count
        self.figures = (f"loss {loss:.3f}", f"{per_s:,.0f} {task.unit}/s")
        self.say(
            f"round {order.round}: loss {loss:.4f} over {computation.count} {task.unit}; "
            f"load {job.began - began:.3f} s, compute {computed - job.began:.3f} s, encode {self.encodings[-1]:.3f} s"
        )

    @property
    def _handing_over_s(self) -> float:
        """The least of the last times: one that held a pause of anybody's says nothing about the next."""
        return min(self.encodings, default=0.0) + min(self.uploads, default=0.0)

    def _enough(self, job: Job) -> bool:
        return job.enough(self.clock(), self._handing_over_s)

    def _compute(self, job: Job, computation: GradientAccumulator) -> None:
        """In the compute thread: micro-batches until it is enough; under virtual time only one."""
        for index in job.todo:
            began = self.clock()
            computation.add(index)
            job.left -= 1
            job.batches_done += 1
            job.did(self.clock() - began)
            if self._alone or self._enough(job):
                break


def _remember(kept: dict[Digest, V], key: Digest, value: V, most: int = 64) -> None:
    """The last ones; a stranger's orders shall not pile up."""
    kept[key] = value
    while len(kept) > most:
        del kept[next(iter(kept))]
