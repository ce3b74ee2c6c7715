"""Messages that no round waits for: stops, receipts, and what comes of work that came too late."""

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

AT_ONCE = 8  # on their way to one miner: what an unreachable one misses, the ledger keeps
TOLD_AGAIN = 4  # receipts of one miner
LATE_AT_ONCE = 4  # replies of one miner that are waited for, the newest ones


class Notifier:
    """Its tasks are few a miner, and our own fault in one of them surfaces with the next `check`."""

    def __init__(self, network: Network, store: Store) -> None:
        self._network, self._store = network, store
        self._tasks: set[asyncio.Task[object]] = set()
        self._telling: Counter[Hotkey] = Counter()
        self._late: dict[Hotkey, list[asyncio.Task[object]]] = {}
        self._untold: dict[Hotkey, list[Signed]] = {}  # the last receipts that a miner has not taken
        self._failed: BaseException | None = None

    def deliver(self, hotkey: Hotkey, signed: Signed) -> None:
        if self._telling[hotkey] >= AT_ONCE:
            self._missed(hotkey, signed)
        else:
            self._telling[hotkey] += 1
            self._start(self._network.deliver(hotkey, signed)).add_done_callback(partial(self._told, hotkey, signed))

    def owe(self, receipts: Iterable[Signed]) -> None:
        """Receipts of which nobody knows whether their miners have taken them: a process before this one told them."""
        for signed in receipts:
            self._missed(Receipt.parse(signed.body).hotkey, signed)

    def deliver_again(self, hotkey: Hotkey) -> None:
        """It is there: the last receipts that it did not take, for which its error feedback waits."""
        for signed in self._untold.pop(hotkey, ()):
            self.deliver(hotkey, signed)

    def _missed(self, hotkey: Hotkey, signed: Signed) -> None:
        if signed.kind == Receipt.kind:
            self._untold[hotkey] = [*self._untold.get(hotkey, ()), signed][-TOLD_AGAIN:]

    def stop(self, order: Order, name: Digest) -> None:
        """`name` is the order's digest."""
        stop = Stop(run=order.run, round=order.round, hotkey=order.hotkey, order=name)
        self.deliver(order.hotkey, self._network.sign(stop))

    def note_late(self, order: Order, signed: Signed, ordered_at: float, weight: float) -> None:
        """Should the reply to a round that is closed still come: into the ledger, with a receipt for the miner."""
        awaited = self._late.setdefault(order.hotkey, [])
        awaited[:] = [task for task in awaited if not task.done()]
        if len(awaited) >= LATE_AT_ONCE:
            awaited.pop(0).cancel()
        awaited.append(self._start(self._note_late(order, signed, ordered_at, weight)))

    def check(self) -> None:
        if self._failed is not None:
            raise self._failed

    async def finish(self, timeout_s: float) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        self.check()

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _note_late(self, order: Order, signed: Signed, ordered_at: float, weight: float) -> None:
        answer = await self._network.await_late_reply(order, signed, order.deadline_s)
        if answer is not None:
            done, seconds = size(Reply.parse(answer.body).done), self._network.now() - ordered_at
            receipt = self._network.sign(receipts.late_receipt(order, signed.digest, done, seconds, weight))
            await asyncio.to_thread(self._store.note_late, order.round, answer, receipt)
            await self._network.deliver(order.hotkey, receipt)

    def _start(self, coroutine: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        task: asyncio.Task[object] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._failed = self._failed or task.exception()

    def _told(self, hotkey: Hotkey, signed: Signed, task: asyncio.Task[object]) -> None:
        if not task.cancelled() and task.exception() is None and not task.result():
            self._missed(hotkey, signed)
        self._telling[hotkey] -= 1
        if not self._telling[hotkey]:
            del self._telling[hotkey]
