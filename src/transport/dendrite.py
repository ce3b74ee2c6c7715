"""The validator's client: finds its miners, gives orders, fetches replies and payloads. `market.round`'s `Network`.

A miner is whoever signs hello's nonce with the hotkey that its endpoint is pinned to.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from limits import Limits
from protocol import Fault, Hello, Hotkey, Message, Order, ProtocolError, Signed, new_nonce, one_line
from transport.auth import Keypair, seal, unseal
from transport.exchange import Exchange, Room
from transport.peer import Endpoint, Lost, Peer, open_session, parse_endpoint
from values import Blobs, Faulted, Link, Received, Refused

__all__ = ["Dendrite", "Endpoint", "Peer", "parse_endpoint"]

HELLO_INTERVAL_S = 1.0

logger = logging.getLogger(__name__)


def anything_goes(path: Path, size: int) -> None:
    """Room for any payload."""


class Dendrite:
    """The miners at `endpoints`, over HTTP.

    `pins` are hotkeys by "host:port", from earlier runs; `save_pins` keeps them when a first contact on loopback adds
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
        room: Room = anything_goes,
        tls: ssl.SSLContext | None = None,
        hello_interval_s: float = HELLO_INTERVAL_S,
    ) -> None:
        self._keypair = keypair
        self._endpoints = tuple(endpoints)
        self._pins = dict(pins)
        self._save_pins = save_pins
        self._task = task
        self._say = say
        self._limits = limits or Limits()
        self._room = room
        self._tls = tls
        self._hello_interval_s = hello_interval_s
        self._peers: tuple[Peer, ...] = ()

    async def start(self) -> None:
        """Opens the session, and says hello to whoever is not there yet from now on."""
        self._session = open_session(self._limits)
        self._background = ThreadPoolExecutor(1, "room")
        self._peers = tuple(
            Peer(e, e.hotkey or self._pins.get(str(e)), self._keypair, self._session, self._limits, self._tls)
            for e in self._endpoints
        )
        self._change = asyncio.get_running_loop().create_future()  # done when `peers()` has grown, or tending has died
        self._tending = asyncio.create_task(self._tend_all())
        self._tending.add_done_callback(lambda _: self._changed())

    async def close(self) -> None:
        self._tending.cancel()
        await asyncio.gather(self._tending, return_exceptions=True)
        await self._session.close()
        self._background.shutdown()

    # --- Network ------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return time.monotonic()

    def seal(self, message: Message) -> Signed:
        return seal(self._keypair, message)

    def peers(self) -> tuple[Hotkey, ...]:
        """Those that answered hello, were not lost since, and do the task; sorted."""
        return tuple(sorted(p.hotkey for p in self._peers if p.reachable and p.hotkey))

    def links(self) -> tuple[Link, ...]:
        """Every endpoint as it is now, in the order given."""
        return tuple(peer.link() for peer in self._peers)

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
        self, order: Order, signed: Signed, blobs: Blobs, path: Path, largest: int | None = None
    ) -> Received:
        """Order out; reply in; its payload, with the right digest, of at most `largest` bytes, in the file `path`.

        Raises Faulted.
        """
        self._raise_if_dead()
        peer = self._find(order.hotkey)
        if peer is None:
            raise Faulted(Fault.SILENT, "no endpoint has answered with this hotkey")
        exchange = Exchange(peer, order, signed, blobs, path, largest, self._limits, self._room, self._background)
        try:
            async with asyncio.timeout(order.deadline_s) as deadline:
                return await exchange.run()
        except TimeoutError:
            if not deadline.expired():
                raise
            if exchange.accepted:
                faulted = Faulted(Fault.LATE, f"no whole reply within {order.deadline_s:g} s")
            else:
                peer.reachable = False
                faulted = Faulted(Fault.SILENT, f"did not take the order within {order.deadline_s:g} s")
        except ProtocolError as error:
            faulted = Faulted(error.fault, str(error))
        except Faulted as error:
            faulted = error
        path.unlink(missing_ok=True)  # a fault's payload is of no use; one that a stopped process left goes on later
        if faulted.fault is Fault.UNVERIFIED:
            self._say(f"round {order.round}: the reply of {order.hotkey} is not taken: {faulted.reason}")
        logger.debug("round %d: %s: %s", order.round, order.hotkey, faulted)
        raise faulted

    async def tell(self, hotkey: Hotkey, signed: Signed) -> bool:
        """Delivers a receipt or a stop; False where the miner is away or refuses it."""
        peer = self._find(hotkey)
        if peer is None:
            return False
        body = signed.model_dump_json().encode()
        for _ in range(2):  # an idle connection may have been closed under us
            try:
                await peer.call("POST", f"/v1/{signed.kind}", "status", body=body)
                return True
            except Lost:
                continue
            except (Refused, ProtocolError):
                return False
        return False

    def _find(self, hotkey: Hotkey) -> Peer | None:
        known = [p for p in self._peers if p.hotkey == hotkey]
        return next((p for p in known if p.reachable), known[0] if known else None)

    # --- hello --------------------------------------------------------------------------------------------------------

    async def _tend_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for peer in self._peers:
                    group.create_task(self._tend(peer))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _tend(self, peer: Peer) -> None:
        while True:
            if not peer.reachable:
                await self._greet(peer)
            await asyncio.sleep(self._hello_interval_s)

    async def _greet(self, peer: Peer) -> None:
        nonce = new_nonce()
        try:
            signed = Signed.parse(await peer.hello(nonce))
            hello = unseal(signed, Hello, signed.signer)
        except Lost as lost:
            if lost.hint:
                self._complain(peer, f"{one_line(lost.hint)}; not used")
            return
        except (Refused, ProtocolError) as error:
            self._complain(peer, f"no valid hello ({one_line(str(error))}); not used")
            return
        if objection := self._objection(peer, nonce, signed.signer, hello):
            self._complain(peer, objection)
            return
        if peer.hotkey is None:
            self._pins[str(peer.endpoint)] = signed.signer
            self._save_pins(dict(self._pins))
            peer.hotkey = signed.signer
        peer.reachable, peer.complaint = True, ""
        self._changed()

    def _objection(self, peer: Peer, nonce: str, signer: Hotkey, hello: Hello) -> str | None:
        if hello.nonce != nonce or hello.hotkey != signer:
            return "its hello is not an answer to ours; not used"
        if peer.hotkey not in (None, signer):
            return f"answers as {signer}, but is pinned to {peer.hotkey}; not used, until the pin is removed"
        twin = self._find(signer)
        if twin is not None and twin is not peer and twin.reachable:
            return f"the same miner ({signer}) as at {twin.endpoint}; not used twice"
        if self._task not in hello.tasks:
            does = one_line(", ".join(hello.tasks)) or "none"
            return f"does not do task {self._task} (it does: {does}); start that miner with --tasks {self._task}"
        return None

    def _complain(self, peer: Peer, text: str) -> None:
        if text != peer.complaint:
            peer.complaint = text
            self._say(f"--axons {peer.endpoint}: {text}")

    def _changed(self) -> None:
        self._change.set_result(None)
        self._change = asyncio.get_running_loop().create_future()

    def _raise_if_dead(self) -> None:
        """Tending never ends by itself: its failure is ours."""
        if self._tending.done():
            self._tending.result()
