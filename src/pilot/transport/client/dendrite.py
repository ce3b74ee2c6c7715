"""The validator's client: finds its miners, gives orders, fetches replies and payloads. The market's `Network`.

A miner is a peer that signs hello's nonce with the hotkey that its endpoint is pinned to, or that calls the `Gateway`.
Miners may come and go at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pilot.common.limits import Limits
from pilot.interfaces import Blobs, Faulted, MinerState, ReceivedReply, Refused
from pilot.transport.auth import Keypair, sign_message
from pilot.transport.client.exchange import Exchange, Push, Room
from pilot.transport.client.peer import Endpoint, Peer, open_session, parse_endpoint
from pilot.transport.client.remote_miner import Lost, MinerChannel, RemoteMiner, Unproven
from pilot.transport.server.pull_queue import Pull, PullQueue
from protocol import Fault, Hello, Hotkey, Message, Order, ProtocolError, Signed, one_line

__all__ = ["Dendrite", "Endpoint", "Peer", "parse_endpoint"]

HELLO_INTERVAL_S = 1.0
RARELY = 5  # times that interval, to who announced itself: it is said hello to whenever it does that
RETIRED = 64  # miners that were removed, to which receipts and stops still go

logger = logging.getLogger(__name__)


def no_check(path: Path, size: int) -> None:
    """Room for any payload."""


class Dendrite:
    """The miners at `endpoints`, and those that are added later, over HTTP.

    `pins` are hotkeys by "host:port", from earlier runs; `save_pins` keeps them when a first hello on loopback adds
    one. `say` gets a line, once, about an endpoint that cannot be used. `room` refuses payloads that do not fit on the
    disk. `tls` holds whom to trust, for the endpoints that use TLS.
    """

    def __init__(
        self,
        keypair: Keypair,
        endpoints: Sequence[Endpoint],
        pins: Mapping[str, Hotkey],
        save_pins: Callable[[dict[str, Hotkey]], None],
        task: str,
        say: Callable[[str], None],
        limits: Limits | None = None,
        room: Room = no_check,
        tls: ssl.SSLContext | None = None,
        hello_interval_s: float = HELLO_INTERVAL_S,
    ) -> None:
        self._keypair = keypair
        self._endpoints = tuple(endpoints)  # from the start
        self._pins = dict(pins)
        self._save_pins = save_pins
        self._task = task
        self._say = say
        self._limits = limits or Limits()
        self._room = room
        self._tls = tls
        self._hello_interval_s = hello_interval_s
        self._miners: list[RemoteMiner] = []
        self._retired: deque[RemoteMiner] = deque(maxlen=RETIRED)
        self._hello_tasks: dict[RemoteMiner, asyncio.Task[None]] = {}
        self._background_tasks: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[object]] = set()  # that wait for a miner

    async def start(self) -> None:
        """Opens the session, and says hello to whoever is not there yet from now on."""
        loop = asyncio.get_running_loop()
        self._session = open_session(self._limits)
        self._background = ThreadPoolExecutor(1, "room")
        self._change = loop.create_future()  # done when `peers()` may be others, or something of ours has died
        self._died: asyncio.Future[None] = loop.create_future()  # our own failure in the background
        self._closed = False
        for endpoint in self._endpoints:
            self.add(endpoint)

    async def close(self) -> None:
        """Whatever still waits for a miner is cancelled first."""
        self._closed = True
        calls = self._calls - {asyncio.current_task()}
        tasks = {*calls, *self._hello_tasks.values(), *self._background_tasks}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)  # their callers ask for what came of it
        await self._session.close()
        self._background.shutdown()

    # --- who is there -------------------------------------------------------------------------------------------------

    def add(self, endpoint: Endpoint, announced: bool = False) -> Peer:
        """A miner that listens there; said hello to from now on. One that announced itself hears of complaints."""
        peer = Peer(
            *(endpoint, endpoint.hotkey or self._pins.get(str(endpoint)), self._keypair, self._session, self._limits),
            self._tls,
        )
        peer.announced = announced
        self.add_miner(peer)
        self._hello_tasks[peer] = self._watched(self._repeat_hello(peer))
        return peer

    def remove(self, endpoint: Endpoint) -> None:
        """It gets no more orders; an exchange under way ends by itself."""
        for miner in self._miners:
            if isinstance(miner, Peer) and miner.endpoint == endpoint:
                self.remove_miner(miner)
                return

    def add_miner(self, miner: RemoteMiner) -> None:
        """A miner that is tended elsewhere."""
        self._miners.append(miner)
        miner.changed = self._changed
        self._changed()

    def remove_miner(self, miner: RemoteMiner) -> None:
        """It gets no more orders; receipts and stops still go there. Nothing happens where it has parted already."""
        if miner in self._miners:
            self._miners.remove(miner)
            self._retired.append(miner)
            if miner in self._hello_tasks:
                self._hello_tasks.pop(miner).cancel()
            self._changed()

    def find(self, hotkey: Hotkey) -> RemoteMiner | None:
        """The miner of this hotkey, rather one that is reachable."""
        known = [c for c in self._miners if c.hotkey == hotkey]
        return next((c for c in known if c.reachable), known[0] if known else None)

    def run_in_background(self, job: Coroutine[object, object, None]) -> None:
        """Runs until `close`; should it fail, that is ours, and the next call here raises it."""
        task = self._watched(job)
        self._background_tasks.add(task)
        task.add_done_callback(self._background_tasks.discard)

    def _watched(self, job: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(job)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._died.done():
            self._died.set_exception(error)
            self._changed()

    def _changed(self) -> None:
        self._change.set_result(None)
        self._change = asyncio.get_running_loop().create_future()

    def _raise_if_dead(self) -> None:
        if self._died.done():
            self._died.result()

    # --- Network ------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return time.monotonic()

    def sign(self, message: Message) -> Signed:
        return sign_message(self._keypair, message)

    def peers(self) -> tuple[Hotkey, ...]:
        """Those that answered hello, were not lost since, and do the task; sorted."""
        return tuple(sorted({c.hotkey for c in self._miners if c.reachable and c.hotkey}))

    def miner_states(self) -> tuple[MinerState, ...]:
        """Every miner as it is now, in the order in which they were added."""
        return tuple(miner.state() for miner in self._miners)

    def known_codecs(self, hotkey: Hotkey) -> tuple[str, ...] | None:
        """Those that a miner says it knows; None for one that was not heard of yet."""
        miner = self._known(hotkey)
        return miner.codecs if miner else None

    async def wait_for_change(self) -> None:
        """Until somebody comes or goes. Raises what has failed here in the background."""
        self._raise_if_dead()
        await asyncio.wait({self._change})
        self._raise_if_dead()

    async def wait_for_peer(self, timeout_s: float) -> bool:
        return await self.wait_for_peers(1, timeout_s) >= 1

    async def wait_for_peers(self, count: int, timeout_s: float) -> int:
        """Until `count` are there or the time is over: how many are."""
        deadline = self.now() + timeout_s
        while True:
            self._raise_if_dead()
            left_s = deadline - self.now()
            if len(self.peers()) >= count or left_s <= 0:
                return len(self.peers())
            await asyncio.wait({self._change}, timeout=left_s)

    async def exchange(
        self,
        order: Order,
        signed: Signed,
        blobs: Blobs,
        path: Path,
        largest: int | None = None,
        accepted: Callable[[], object] | None = None,
    ) -> ReceivedReply:
        """Order out; reply in; its payload, with the right digest, of at most `largest` bytes, in the file `path`.

        `accepted` is called when the miner has taken the order. Raises Faulted.
        """
        self._raise_if_dead()
        exchange: Exchange | None = None
        try:
            with self._call():
                async with asyncio.timeout(order.deadline_s) as deadline:
                    miner = await self._expect(order.hotkey)
                    exchange = self._exchange(miner, order, signed, blobs, path, largest)
                    exchange.on_accepted = accepted or exchange.on_accepted
                    with miner.shows(exchange.progress):
                        return await exchange.run()
        except TimeoutError:
            if not deadline.expired():
                raise
            if exchange is not None and exchange.accepted:
                faulted = Faulted(Fault.LATE, f"no whole reply within {order.deadline_s:g} s")
            else:
                if exchange is not None:
                    exchange.peer.reachable = False
                    exchange.peer.lost_because = f"did not take the order within {order.deadline_s:g} s"
                faulted = Faulted(Fault.SILENT, f"did not take the order within {order.deadline_s:g} s")
        except ProtocolError as error:
            faulted = Faulted(error.fault, str(error))
        except Faulted as error:
            faulted = error
        path.unlink(missing_ok=True)  # a fault's payload is of no use; one that a stopped process left goes on later
        if faulted.fault is Fault.VALIDATOR_FAILED:
            self._say(f"round {order.round}: the reply of {order.hotkey} is not taken: {faulted.reason}")
        logger.debug("round %d: %s: %s", order.round, order.hotkey, faulted)
        raise faulted

    async def _expect(self, hotkey: Hotkey) -> RemoteMiner:
        """Its miner. One that has not been here yet has `away_s` to come: after a restart of ours nobody has been.

        Raises Faulted SILENT; at once for one that has gone for good.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.away_s):
                while not self._closed and self._known(hotkey) is None:
                    await self.wait_for_change()
        miner = None if self._closed else self.find(hotkey)
        if miner is None:
            raise Faulted(Fault.SILENT, "no endpoint has answered with this hotkey")
        return miner

    def _exchange(
        self, miner: RemoteMiner, order: Order, signed: Signed, blobs: Blobs, path: Path, largest: int | None
    ) -> Exchange:
        what = (order, signed, blobs, path, largest, self._limits, self._room, self._background)
        if isinstance(miner, PullQueue):
            return Pull(miner, *what)
        assert isinstance(miner, MinerChannel)
        return Push(miner, *what)

    async def await_late_reply(self, order: Order, signed: Signed, timeout_s: float) -> Signed | None:
        """After its round was closed: the signed reply to an order, if it still comes. Its payload is not fetched."""
        miner = self._known(order.hotkey)
        if miner is None:
            return None
        try:
            with self._call():
                async with asyncio.timeout(timeout_s):
                    return await miner.await_late_reply(order, signed)
        except TimeoutError:
            return None

    async def deliver(self, hotkey: Hotkey, signed: Signed) -> bool:
        """Delivers a receipt or a stop; False where the miner is away or refuses it."""
        miner = self._known(hotkey)
        if miner is None:
            return False
        with self._call():
            return await miner.deliver(signed)

    def _known(self, hotkey: Hotkey) -> RemoteMiner | None:
        """Also one that was removed."""
        if self._closed:
            return None
        return self.find(hotkey) or next((c for c in reversed(self._retired) if c.hotkey == hotkey), None)

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """Around all that waits for a miner, so that `close` can end it."""
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        try:
            yield
        finally:
            self._calls.discard(task)

    # --- hello --------------------------------------------------------------------------------------------------------

    async def _repeat_hello(self, peer: Peer) -> None:
        while True:
            if not peer.reachable:
                await self.say_hello(peer)
            await asyncio.sleep(self._hello_interval_s * (RARELY if peer.announced else 1))

    async def say_hello(self, peer: Peer) -> bool:
        """Says hello. True where it is as it should be, and so reachable; else its complaint says why not."""
        try:
            hello = await peer.hello()
        except (Refused, Unproven, ProtocolError) as error:
            self._report(peer, f"no valid hello: {one_line(str(error))}; not used")
            return False
        except Lost as lost:
            if lost.hint or peer.announced:
                self._report(peer, f"{one_line(lost.hint or str(lost))}; not used")
            return False
        if reason := self._reason_against(peer, hello):
            self._report(peer, reason)
            return False
        if peer.hotkey is None:
            self._pins[str(peer.endpoint)] = hello.hotkey
            self._save_pins(dict(self._pins))
            peer.hotkey = hello.hotkey
        peer.codecs, peer.reachable, peer.problem = hello.codecs, True, ""
        return True

    def _reason_against(self, peer: Peer, hello: Hello) -> str | None:
        signer = hello.hotkey
        if peer.hotkey not in (None, signer):
            return f"answers as {signer}, but is pinned to {peer.hotkey}; not used, until the pin is removed"
        other = self.find(signer)
        if other is not None and other is not peer and other.reachable:
            return f"the same miner ({signer}) as at {other.name}; not used twice"
        if self._task not in hello.tasks:
            does = one_line(", ".join(hello.tasks)) or "none"
            return f"does not do task {self._task} (it does: {does}); start that miner with --tasks {self._task}"
        return None

    def _report(self, peer: Peer, text: str) -> None:
        if text != peer.problem:
            peer.problem = text
            if peer.announced:
                logger.debug("announced %s: %s", peer.endpoint, text)
            else:
                self._say(f"--axons {peer.endpoint}: {text}")
