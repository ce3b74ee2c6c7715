"""Deliver what no round waits for: stops, receipts, and receipts for late replies."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterable
from functools import partial
from typing import Any

from pilot.interfaces import Network, Store
from pilot.market import receipts
from pilot.training.ranges import size
from protocol import Digest, Hotkey, Order, Receipt, Reply, Signed, Stop

MAX_PENDING = 8  # messages in delivery to one miner; an unreachable miner misses more, but the ledger keeps them
MAX_UNDELIVERED = 4  # receipts of one miner that are delivered again
MAX_LATE = 4  # late replies of one miner that are awaited, the newest ones


class Notifier:
    """Runs a few background tasks a miner. A failure of our own in one of them is raised by the next `check`."""

    def __init__(self, network: Network, store: Store) -> None:
        self._network, self._store = network, store
        self._tasks: set[asyncio.Task[object]] = set()
        self._pending: Counter[Hotkey] = Counter()
        self._late: dict[Hotkey, list[asyncio.Task[object]]] = {}
        self._undelivered: dict[Hotkey, list[Signed]] = {}  # the newest receipts that a miner has not taken
        self._failed: BaseException | None = None

    def deliver(self, hotkey: Hotkey, signed: Signed) -> None:
        """Deliver a message in the background."""
        if self._pending[hotkey] >= MAX_PENDING:
            self._keep_undelivered(hotkey, signed)
        else:
            self._pending[hotkey] += 1
            task = self._start(self._network.deliver(hotkey, signed))
            task.add_done_callback(partial(self._on_delivered, hotkey, signed))

    def add_undelivered(self, receipts: Iterable[Signed]) -> None:
        """Add the receipts of an earlier process, which may not have delivered them."""
        for signed in receipts:
            self._keep_undelivered(Receipt.parse(signed.body).hotkey, signed)

    def deliver_again(self, hotkey: Hotkey) -> None:
        """Deliver the receipts that a miner missed, now that it is there: its error feedback waits for them."""
        for signed in self._undelivered.pop(hotkey, ()):
            self.deliver(hotkey, signed)

    def _keep_undelivered(self, hotkey: Hotkey, signed: Signed) -> None:
        if signed.kind == Receipt.kind:
            self._undelivered[hotkey] = [*self._undelivered.get(hotkey, ()), signed][-MAX_UNDELIVERED:]

    def stop(self, order: Order, order_digest: Digest) -> None:
        """Tell a miner to stop working on an order."""
        stop = Stop(run=order.run, round=order.round, hotkey=order.hotkey, order=order_digest)
        self.deliver(order.hotkey, self._network.sign(stop))

    def expect_late_reply(self, order: Order, signed: Signed, ordered_at: float, weight: float) -> None:
        """Record the reply to an order whose round is closed, if it still comes, and send its receipt."""
        awaited = self._late.setdefault(order.hotkey, [])
        awaited[:] = [task for task in awaited if not task.done()]
        if len(awaited) >= MAX_LATE:
            awaited.pop(0).cancel()
        awaited.append(self._start(self._record_late_reply(order, signed, ordered_at, weight)))

    async def _record_late_reply(self, order: Order, signed: Signed, ordered_at: float, weight: float) -> None:
        reply = await self._network.await_late_reply(order, signed, order.deadline_s)
        if reply is not None:
            done, seconds = size(Reply.parse(reply.body).done), self._network.now() - ordered_at
            receipt = self._network.sign(receipts.late_receipt(order, signed.digest, done, seconds, weight))
            await asyncio.to_thread(self._store.note_late, order.round, reply, receipt)
            await self._network.deliver(order.hotkey, receipt)

    def check(self) -> None:
        """Raise the failure of a background task, if there was one."""
        if self._failed is not None:
            raise self._failed

    async def finish(self, timeout_s: float) -> None:
        """Wait for the background tasks, at most `timeout_s`."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        self.check()

    async def close(self) -> None:
        """Cancel the background tasks."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, coroutine: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        task: asyncio.Task[object] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_end)
        return task

    def _on_end(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._failed = self._failed or task.exception()

    def _on_delivered(self, hotkey: Hotkey, signed: Signed, task: asyncio.Task[object]) -> None:
        if not task.cancelled() and task.exception() is None and not task.result():
            self._keep_undelivered(hotkey, signed)
        self._pending[hotkey] -= 1
        if not self._pending[hotkey]:
            del self._pending[hotkey]
