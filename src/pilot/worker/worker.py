"""The miner's side of a round: accept an order, bring the model to its version, compute, encode, hand over.

A miner keeps no optimizer between rounds (except DiLoCo's, if an order says so): only the model at one version, its
data, and the last replies, so that a validator may fetch them again. Messages come and go typed; bytes,
signatures and sockets are the transport's.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import torch
from typing_extensions import Buffer

from nanochat.common import usable_memory
from pilot.codec import bits, known_codecs, load_codec
from pilot.common.limits import Limits
from pilot.common.units import fp32_megabytes
from pilot.interfaces import BlobSource, BlobWriter, MinerStore, Refused
from pilot.training.executor import Charge
from pilot.training.gradient import GradientAccumulator
from pilot.training.inner_loop import AccumulatorFactory
from pilot.training.ranges import size
from pilot.worker.blob_inbox import IN_MEMORY, BlobInbox, BufferWriter
from pilot.worker.containment import Contained, ContainedExecutor, contain, private_cause
from pilot.worker.contradictions import contradiction
from pilot.worker.error_feedback import ErrorFeedback
from pilot.worker.job import Job
from pilot.worker.needs import NeedChecker
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
    TaskSpec,
)

KEPT_JOBS = 4  # orders whose replies may still be fetched: the validator records one that comes too late
FETCHES = 4  # blobs that are fetched from sources at the same time
POLL_S = 0.05

K = TypeVar("K")
V = TypeVar("V")


class Worker:
    """Serves the orders of one validator at a time. Everything but computing and fetching runs on the event loop."""

    def __init__(
        self,
        hotkey: Hotkey,
        tasks: frozenset[str],
        device: torch.device,
        cache: MinerStore,
        open_blob: Callable[[TaskSpec, DataSpec, str], Path],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        compiled: bool = False,
        charge: Charge | None = None,
        sources: Mapping[str, BlobSource] | None = None,
        limits: Limits | None = None,
    ) -> None:
        """`sources` are what orders may name as a blob's source; the validator sends blobs of all others.

        `charge` is for simulations: it lets the virtual time pass that a phase takes (`pilot.training.executor`).
        """
        self.hotkey, self.tasks, self.cache, self.say, self.clock = hotkey, tasks, cache, say, clock
        self.sources, self.limits = dict(sources or {}), limits or Limits()
        self.codecs = known_codecs()
        self.feedback = ErrorFeedback(cache.residuals, cache.receipts, say)
        self.replica = Replica(device, open_blob, compiled, lambda codec: codec in self.codecs)
        self.inbox = BlobInbox(self.replica.blobs, cache.store, lambda: self.clock(), self.limits)
        self.accumulators = AccumulatorFactory()
        self.needs = NeedChecker(device, self.limits, usable_memory)
        self.leaving = False
        self.jobs: dict[Digest, Job] = {}  # the last orders that were accepted
        self.offered_at: dict[Digest, float] = {}  # when each of the last orders was first offered
        self.stopped: dict[tuple[Hotkey, Digest], None] = {}  # by whom: orders that were stopped before they came
        self.unavailable: dict[Digest, None] = {}  # blobs that their source did not have
        self.refusals: dict[Hotkey, str] = {}  # the last reason for each caller, so that it is logged once
        self.summary: tuple[str, ...] = ()  # loss and speed of the last gradient, for display
        self.encode_seconds: deque[float] = deque(maxlen=5)
        self.upload_seconds: deque[float] = deque(maxlen=5)  # from the first request for a payload to its last byte
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[object] = self._loop.create_future()  # gets the exception of a bug of ours
        self._thread = ThreadPoolExecutor(1, "compute")  # one thread: one OpenMP team, and jobs never overlap
        self._fetch_threads = ThreadPoolExecutor(FETCHES, "fetch")
        self._simulated = charge is not None  # then each call to the compute thread is one micro-batch
        self._executor = ContainedExecutor(self._thread, lambda: self.clock(), charge)
        self._running: set[asyncio.Task[None]] = set()

    @property
    def job(self) -> Job | None:
        """The job that is running, or else the newest."""
        return next(iter(self._unfinished()), None) or next(reversed(self.jobs.values()), None)

    def _unfinished(self) -> list[Job]:
        return [job for job in self.jobs.values() if not job.finished.is_set()]

    async def leave(self, grace_s: float) -> bool:
        """Take no more orders, end the work after its micro-batch, and hand over what was done.

        Returns False if a validator still waits for something after `grace_s`.
        """
        self.leaving = True
        for job in self.jobs.values():
            job.stopping.set()
        try:
            async with asyncio.timeout(grace_s):
                for job in list(self.jobs.values()):
                    if self._is_awaited(job):
                        await job.settled.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """End the work after its micro-batch, without waiting for it."""
        for job in self.jobs.values():
            job.stopping.set()
        for running in self._running:
            running.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._fetch_threads.shutdown(wait=False, cancel_futures=True)

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
        """Accept an order, and work on it in the background. The same order again is the same job.

        Raises Refused: BUSY, an order that contradicts itself, or `missing` blobs.
        """
        try:
            try:
                contain(self._accept, caller, order, order_digest)
            except ProtocolError as error:
                raise Refused(409, str(error), error.fault) from error.__cause__
        except Refused as refused:
            if not refused.missing and self.refusals.get(caller) != refused.reason:
                self.refusals[caller] = refused.reason
                why = refused.reason + private_cause(refused)
                self.say(f"round {order.round}: order of {caller[:8]} refused, {why}")
            raise
        self.refusals.pop(caller, None)
        return self.status()

    def _accept(self, caller: Hotkey, order: Order, order_digest: Digest) -> None:
        known = self.jobs.get(order_digest)
        if known and known.owner == caller and not (known.finished.is_set() and known.payload is None):
            return  # a job that was refused, or whose payload was dropped, is done again
        busy = [job for job in self.jobs.values() if job.owner != caller and self._keeps_others_waiting(job)]
        if busy:
            raise Refused(409, f"working for {busy[0].owner[:8]} on round {busy[0].order.round}", Fault.BUSY)
        sender = self.inbox.sender
        if sender is not None and sender != caller:
            raise Refused(409, f"receiving blobs from {sender[:8]}", Fault.BUSY)
        if self.leaving:
            raise Refused(409, "this miner is shutting down", Fault.LEAVING)
        if (caller, order_digest) in self.stopped:
            raise Refused(409, "stopped before it came", Fault.LATE)
        self._check(order)
        longest_s = self.limits.deadline_s
        if self.clock() - self.offered_at.get(order_digest, -math.inf) >= min(order.deadline_s, longest_s):
            _add_bounded(self.offered_at, order_digest, self.clock())

        needed = self._needed(order)
        self.needs.check(order, sum(ref.bytes for ref in needed if ref.kind in IN_MEMORY))
        fetches = [ref for ref in needed if self._has_source(ref)]
        self.inbox.require(caller, [ref for ref in needed if ref not in fetches])

        # The order replaces those before it; if it allows a staleness of 1, the last of them goes on, and it waits.
        before = self._unfinished()
        for other in before[: len(before) - order.staleness]:
            other.stopping.set()
            other.settled.set()
        for other in list(self.jobs.values())[: len(self.jobs) - order.staleness]:
            other.payload = None
        job = Job(order, order_digest, caller, self.offered_at[order_digest], longest_s, heard_at=self.clock())
        self.jobs.pop(order_digest, None)  # if it was refused before: the newest job is the last one
        _add_bounded(self.jobs, order_digest, job, KEPT_JOBS)
        running = asyncio.create_task(self._run(job, before, fetches))
        self._running.add(running)
        running.add_done_callback(self._ended)

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
        """Return the blobs that are not here: of the data, and of the path from the version before the order's."""
        before = self._unfinished()
        version = before[-1].order.version if before else self.replica.version
        path = self.replica.path_to(order, version, self.inbox.held)
        needed = [step.ref for step in path if step.digest not in self.replica.blobs]
        for ref in order.data.blobs.values():  # the task makes larger ones
            if (ref.bytes <= MAX_SERVED_BYTES or self._has_source(ref)) and self.cache.blob(ref) is None:
                needed.append(ref)
        return list(dict.fromkeys(needed))  # two deltas may be the same

    def _has_source(self, ref: BlobRef) -> bool:
        return ref.source in self.sources and ref.digest not in self.unavailable

    def open_blob(self, caller: Hotkey, ref: BlobRef, offset: int) -> BlobWriter:
        """Open a blob that the last order was refused for, from where its transfer broke off.

        The validator of the newest order may also send one delta ahead of its next order, which then is posted only
        once: at most twice as large as any blob of the newest order, and only while no other blob is expected.
        """
        newest = next(reversed(self.jobs.values()), None)
        if newest is not None and newest.owner == caller and not self.leaving:
            most = 2 * max(named.bytes for named in newest.order.update.refs)
            if ref.kind == "delta" and ref.bytes <= most:
                self.inbox.expect(caller, ref)
        return self.inbox.open_writer(caller, ref, offset)

    async def wait_for_reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
        """Return the reply, or None if the work still goes on after `wait_s` seconds."""
        job = self._find_job(caller, order)
        job.askers += 1
        try:
            async with asyncio.timeout(wait_s):  # wait_for may lose a cancellation, until Python 3.12
                await job.finished.wait()
        except TimeoutError:
            return None
        finally:
            job.askers -= 1
            job.heard_at = self.clock()
        if job.refusal is not None:
            job.settled.set()
            raise job.refusal
        return job.reply

    def read_payload(self, caller: Hotkey, order: Digest) -> Buffer:
        job = self._find_job(caller, order)
        if job.payload is None:
            raise Refused(404, "no payload for this order yet, or no longer")
        job.heard_at = self.clock()
        job.upload_started_at = job.upload_started_at or job.heard_at
        return job.payload

    def mark_delivered(self, caller: Hotkey, order: Digest) -> None:
        job = self.jobs.get(order)
        if job is not None and job.owner == caller and not job.settled.is_set():
            job.settled.set()
            self.upload_seconds.append(self.clock() - job.upload_started_at)

    def stop_order(self, caller: Hotkey, stop: Stop) -> Status:
        """End the order's work after its micro-batch, or prevent it if the order has not begun or not come yet."""
        job = self.jobs.get(stop.order)
        if job is None:
            _add_bounded(self.stopped, (caller, stop.order), None)
        else:
            self._find_job(caller, stop.order).stopping.set()
        return self.status()

    def accept_receipt(self, caller: Hotkey, receipt: Receipt, signed: Signed) -> Status:
        if receipt.hotkey != self.hotkey:
            raise Refused(400, f"a receipt for {receipt.hotkey[:8]}", Fault.MALFORMED)
        new = self.cache.add_receipt(signed)
        self.feedback.record_receipt(caller, receipt)
        if not new:
            return self.status()
        job = self.jobs.get(receipt.order)
        reply = None
        if job is not None and job.owner == caller:
            reply = job.reply
            self._loop.call_soon_threadsafe(job.settled.set)
        kept = [Receipt.parse(other.body) for other in self.cache.receipts() if other.signer == signed.signer]
        if against := contradiction(receipt, kept, reply):
            self.say(
                f"round {receipt.round}: a CONTRADICTORY receipt of {caller[:8]}: {receipt.verdict}, "
                f"{size(receipt.done)} micro-batches, work {receipt.work}, weight {receipt.weight:.3f}, but {against}; "
                "both are kept as evidence"
            )
            return self.status()
        self.say(
            f"round {receipt.round}: {receipt.verdict}, {receipt.reason}; weight {receipt.weight:.3f}"
            + "".join(f", {name} {value:.4g}" for name, value in receipt.scores.items())
        )
        return self.status()

    def _find_job(self, caller: Hotkey, order: Digest) -> Job:
        job = self.jobs.get(order)
        if job is None or job.owner != caller:
            raise Refused(404, "no such order here")
        return job

    def _is_awaited(self, job: Job) -> bool:
        """Return whether its validator still waits for it: not delivered, not refused, not past its deadline."""
        return not job.settled.is_set() and self.clock() - job.received_at < job.deadline_s

    def _keeps_others_waiting(self, job: Job) -> bool:
        """Return whether its validator still waits for it, and is heard of: else another may have this miner."""
        heard = bool(job.askers) or self.clock() - job.heard_at < self.limits.away_s
        return heard and self._is_awaited(job)

    # --- the work on an order -------------------------------------------------------------------------------------

    async def _run(self, job: Job, before: Sequence[Job], fetches: Sequence[BlobRef]) -> None:
        """Work on a job when those before it have ended. Its reply or refusal is there at the end."""
        try:
            await self._fetch(job, fetches)
            for other in before:
                await other.finished.wait()
            await self._work(job)
        except Refused as refusal:
            job.refusal = refusal
            if isinstance(refusal, Contained):  # what it left may be half done, and take memory
                self.replica.forget()
                self.feedback.forget()
                self.accumulators = AccumulatorFactory()
        except ProtocolError as error:
            job.refusal = Refused(409, str(error), error.fault)
            job.refusal.__cause__ = error.__cause__
        except asyncio.CancelledError:
            job.refusal = Refused(409, "this miner has shut down", Fault.LEAVING)
            raise
        finally:
            job.finished.set()
            self._drop_blobs()
        if job.refusal is not None:
            self.say(f"round {job.order.round}: refused, {job.refusal}{private_cause(job.refusal)}")

    async def _fetch(self, job: Job, refs: Sequence[BlobRef]) -> None:
        """Fetch blobs from their sources, until the deadline. Raises Refused with those that failed."""
        missing = []
        for ref in refs:
            assert ref.source is not None  # see _has_source
            try:
                writer = self.inbox.new_writer(ref)
            except OSError as error:  # the disk is full
                missing.append(ref)
                self.say(f"round {job.order.round}: {ref.kind} not fetched from {ref.source}: {error}")
                continue
            fetching = self._loop.run_in_executor(
                self._fetch_threads, contain, _fetch_blob, self.sources[ref.source], ref, writer
            )
            while not fetching.done() and not job.stopping.is_set() and self.clock() < job.deadline:
                await asyncio.wait({fetching}, timeout=POLL_S)
            problem = fetching.result() if fetching.done() else "it takes too long"
            if problem is not None:
                missing.append(ref)
                self.say(f"round {job.order.round}: {ref.kind} not fetched from {ref.source}: {problem}")
            elif isinstance(writer, BufferWriter):
                self.replica.blobs.add(writer)
        for ref in missing:
            _add_bounded(self.unavailable, ref.digest, None)
        if missing:
            raise Refused(409, "a source does not have what it should: send the order again", missing=missing)

    async def _work(self, job: Job) -> None:
        """Bring model and data to the order's version, compute the gradient, encode it: each in the compute thread."""
        order = job.order
        if job.stopping.is_set():  # replaced or stopped in the queue: the model stays at the version it has
            raise Refused(409, "stopped before it began", Fault.LATE)

        load_started = self.clock()
        path = self.replica.path_to(order, self.replica.version, self.inbox.held)
        megabytes = sum(step.bytes * 32 / bits(step.codec) for step in path) / 1e6
        task, model = await self._executor.run("load", megabytes, self.replica.prepare, order)
        self._drop_blobs()

        job.started_at = self.clock()
        amount = f"{order.budget_s:g} s of micro-batches" if order.budget_s else f"{job.batches_left} micro-batches"
        self.say(f"round {order.round}: {amount} on version {order.version[:12]}")
        accumulator = await self._executor.run(
            "load", 0.0, self.accumulators.create, order, task, model, self.replica.copy_version
        )
        while not job.should_stop(self.clock(), self._handover_s):
            batch_started = self.clock()
            await self._executor.run("batch", 1.0, self._compute, job, accumulator)
            if self._simulated:
                job.record_batch(self.clock() - batch_started)
        if not accumulator.done:
            why = "stopped" if job.stopping.is_set() else "no time left"
            raise Refused(409, f"{why} before the first micro-batch was done", Fault.LATE)
        compute_s = self.clock() - job.started_at

        codec = load_codec(order.codec_up)
        megabytes = fp32_megabytes(p.shape for p in accumulator.parameters.values())
        await self.feedback.wait_for_verdict(job, accumulator.parameters, self._executor, self._handover_s)
        encode_started = self.clock()
        await self._executor.run("encode", megabytes, job.encode, codec, accumulator, compute_s, self.feedback)
        self.encode_seconds.append(self.clock() - encode_started)

        loss, per_s = accumulator.loss / accumulator.count, accumulator.count / max(compute_s, 1e-9)
        self.summary = (f"loss {loss:.3f}", f"{per_s:,.0f} {task.unit}/s")
        self.say(
            f"round {order.round}: loss {loss:.4f} over {accumulator.count} {task.unit}; "
            f"load {job.started_at - load_started:.3f} s, compute {compute_s:.3f} s, "
            f"encode {self.encode_seconds[-1]:.3f} s"
        )

    def _compute(self, job: Job, accumulator: GradientAccumulator) -> None:
        """In the compute thread, add micro-batches until the job should stop; under virtual time only one."""
        for index in job.indices:
            started = self.clock()
            accumulator.add(index)
            job.batches_left -= 1
            job.batches_done += 1
            job.record_batch(self.clock() - started)
            if self._simulated or job.should_stop(self.clock(), self._handover_s):
                break

    @property
    def _handover_s(self) -> float:
        """Seconds to encode and send: the least of the last times, since a pause of either side says nothing."""
        return min(self.encode_seconds, default=0.0) + min(self.upload_seconds, default=0.0)

    def _drop_blobs(self) -> None:
        """Drop states and deltas that do not lead to the version of an unfinished job, or of the newest one."""
        jobs = self._unfinished() or list(self.jobs.values())[-1:]
        needed: set[Digest] = set()
        for job in jobs:
            with contextlib.suppress(Refused):  # no path leads to its version: its validator was told so
                path = self.replica.path_to(job.order, self.replica.version, self.inbox.held)
                needed |= {step.digest for step in path}
        self.replica.blobs.retain(needed)

    def _ended(self, running: asyncio.Task[None]) -> None:
        """Report a bug of ours to `failed`, on which miner.py waits."""
        self._running.discard(running)
        error = None if running.cancelled() else running.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)


def _fetch_blob(source: BlobSource, ref: BlobRef, into: BlobWriter) -> str | None:
    """Fetch a blob, in a thread. Returns what went wrong, if anything."""
    try:
        source.fetch(ref, into)
        into.commit()
    except (OSError, ProtocolError) as error:
        into.abort()
        return str(error)
    return None


def _add_bounded(entries: dict[K, V], key: K, value: V, most: int = 64) -> None:
    """Add an entry, and drop the oldest beyond `most`: a peer's orders must not fill the memory."""
    entries[key] = value
    while len(entries) > most:
        del entries[next(iter(entries))]
