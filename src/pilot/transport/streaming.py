"""Bulk from a socket to wherever it goes, with hashing and disk off the event loop, and a floor under its speed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import aiohttp

from pilot.common.limits import Limits

CHUNK = 1 << 20  # bytes given to a socket at a time
BATCH = 4 << 20  # bytes given to the thread at a time: under two hand-overs for each piece that a socket brings
BEHIND = 2  # batches that the thread may be behind: with one being gathered and the stream's two, all that is held
HELD = 64 << 20  # bytes of all transfers in this process: where there are many, each one's batches are smaller
SMALL = 1 << 16  # bytes for which a thread is too much, and of a batch at least


class MinimumRate:
    """`async with` around a transfer: TimeoutError where `min_rate * rate_s` bytes do not pass in `rate_s` seconds."""

    def __init__(self, limits: Limits, first_s: float | None = None) -> None:
        """The first window lasts `first_s` seconds; None: as long as the others."""
        self._window_s, self._first_s = limits.rate_s, first_s
        self._quota = self._due = limits.min_rate * limits.rate_s

    async def __aenter__(self) -> Self:
        self._timeout = await asyncio.timeout(self._first_s or self._window_s).__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._timeout.__aexit__(kind, error, traceback)

    def passed(self, size: int) -> None:
        self._due -= size
        if self._due <= 0:
            self.restart()

    def restart(self, window_s: float | None = None) -> None:
        """Begin a new window now; the time until now was not the peer's."""
        self._due = self._quota
        self._timeout.reschedule(asyncio.get_running_loop().time() + (window_s or self._window_s))


class _Transfers:
    """Those under way in this process."""

    count = 0

    @classmethod
    def batch(cls) -> int:
        return max(SMALL, min(BATCH, HELD // ((BEHIND + 3) * cls.count)))


async def stream_body(content: aiohttp.StreamReader, write: Callable[[bytes], object], limits: Limits) -> None:
    """Every byte of `content`, in order, to `write`, which runs in a thread. It is done with all when this returns.

    Raises TimeoutError for a peer that is too slow, what `write` raised, and what the stream raises.
    """
    loop = asyncio.get_running_loop()
    pending: deque[asyncio.Future[None]] = deque()
    batch: list[bytes] = []
    size = 0
    broken = whole = False

    def take(pieces: Sequence[bytes]) -> None:
        nonlocal broken
        if not broken:  # nothing after a gap can be used
            broken = True
            for piece in pieces:
                write(piece)
            broken = False

    _Transfers.count += 1
    content.set_read_chunk_size(min(CHUNK, _Transfers.batch()))  # only now is more than a little held of what comes
    with ThreadPoolExecutor(1, "pump") as thread:  # one thread keeps the batches in order; it starts with the first
        try:
            async with MinimumRate(limits) as pace:
                while chunk := (await content.readchunk())[0]:
                    pace.passed(len(chunk))
                    batch.append(chunk)
                    size += len(chunk)
                    if size >= _Transfers.batch():
                        if len(pending) == BEHIND:
                            await pending.popleft()
                            pace.restart()
                        pending.append(loop.run_in_executor(thread, take, batch))
                        batch, size = [], 0
            whole = True
        finally:  # also where the peer is gone: what did come is kept, and the thread lets go of its buffers
            _Transfers.count -= 1
            if pending or size > SMALL or not whole:
                pending.append(loop.run_in_executor(thread, take, batch))
            else:
                take(batch)
            await wait_for_threads(pending)
    for future in pending:
        future.result()


async def to_the_end(function: Callable[[], None]) -> None:
    """Runs it in a thread, and waits for it also where the waiting is cancelled, which then shows afterwards."""
    running = asyncio.ensure_future(asyncio.to_thread(function))
    await wait_for_threads([running])
    running.result()


async def wait_for_threads(jobs: Collection[asyncio.Future[None]]) -> None:
    """Wait until all jobs have ended; a cancellation is raised only then, and the loop goes on meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while running := [job for job in jobs if not job.done()]:
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        for job in jobs:
            job.exception()
        raise cancelled
