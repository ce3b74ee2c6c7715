"""A validator's HTTP server for its miners: they announce where they serve, or pull their orders and bring the work.

    GET  /v1/hello, /v1/status           open to all
    POST /v1/announce?session=…          Announce: 200, or 202 with a Refusal that says why it is not reached yet
    GET  /v1/next?session=…&taken=…      long poll: an order, a stop or a receipt; `taken` is the last that came; or 202
    GET  /v1/blob?session=…&order=…      what an order needs, by its digest, from an offset
    POST /v1/working, /v1/refusal        the miner's Status, or why it does not work on an order
    POST /v1/reply                       the signed Reply
    PUT  /v1/payload?session=…&order=…   its payload, from an offset; 409 says how much is held

Everything but hello and status is signed, by a hotkey that --admit lets in; but for the announcement, by one that has
announced itself. `session`, in all of them, names the miner's process: of two under one hotkey the second is refused
while the first is there, and the first once the second has taken its entry.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from pilot.common.addresses import Address, may_call, without_brackets
from pilot.common.limits import Limits
from pilot.interfaces import ANNOUNCE_S, Refused
from pilot.transport.auth import Keypair, verify_message
from pilot.transport.client.dendrite import Dendrite
from pilot.transport.client.peer import Endpoint, Peer
from pilot.transport.client.remote_miner import RemoteMiner
from pilot.transport.server.admission import Admission
from pilot.transport.server.base import Server, check_length, hex_digits, query, whole_number
from pilot.transport.server.health import health_response
from pilot.transport.server.pull_queue import PULLS, PullQueue
from protocol import Announce, Digest, Fault, Health, Hello, Hotkey, ProtocolError, Refusal, Signed, Status, one_line

MISSED = 3  # such intervals, after which one that is not there either is forgotten
UNREACHED = "not reached at {}: nothing there answers as this miner; check --axon.external-ip, port, firewall and TLS"
DUPLICATE = "another process is at work under this hotkey; this one is used when that is gone"


@dataclass
class RegisteredMiner:
    """A miner that has announced itself."""

    miner: RemoteMiner
    session: str
    heard: float  # its last announcement
    leaving: bool = False


class Gateway(Server):
    """For the miners that `admission` lets in. They become contacts of the network that is attached."""

    DISK_FULL = "the validator's disk is full"

    def __init__(
        self,
        keypair: Keypair,
        task: str,
        admission: Admission,
        health: Callable[[], Health],
        host: str,
        port: int,
        limits: Limits | None = None,
        tls: ssl.SSLContext | None = None,
        *,
        reaches_tls: bool = False,
        interval_s: float = ANNOUNCE_S,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`reaches_tls`: miners that serve by TLS can be called."""
        self._task, self._admission, self._health = task, admission, health
        self._reaches_tls, self._interval_s = reaches_tls, interval_s
        self._network: Dendrite | None = None
        self._registered: dict[Hotkey, RegisteredMiner] = {}
        routes = {
            "/v1/hello": ("GET", self._hello),
            "/v1/status": ("GET", self._status),
            "/v1/announce": ("POST", self._announce),
            "/v1/next": ("GET", self._next),
            "/v1/blob": ("GET", self._blob),
            "/v1/working": ("POST", self._working),
            "/v1/refusal": ("POST", self._refusal),
            "/v1/reply": ("POST", self._reply),
            "/v1/payload": ("PUT", self._payload),
        }
        super().__init__(keypair, admission, host, port, limits, routes, flag="serve", tls=tls, clock_ns=clock_ns)

    def attach(self, network: Dendrite) -> None:
        """From now on miners can come; until then they are told to try again."""
        self._network = network
        network.run_in_background(self._forget_absent())
        network.run_in_background(self._watch_listener())

    def _is_known(self, caller: Hotkey) -> bool:
        return caller in self._registered

    async def _watch_listener(self) -> None:
        await asyncio.shield(self.accepting)

    async def _forget_absent(self) -> None:
        """Forgets those that are gone, or no longer admitted."""
        while True:
            await asyncio.sleep(self._interval_s / 5)
            for hotkey, entry in list(self._registered.items()):
                if self._is_gone(entry) or not self._admission.admits(hotkey):
                    self._drop(hotkey)

    def _is_gone(self, entry: RegisteredMiner) -> bool:
        miner, patience_s = entry.miner, MISSED * self._interval_s
        silent = time.monotonic() - entry.heard > patience_s
        if isinstance(miner, PullQueue):
            return not miner.exchanges and miner.away_s > patience_s and silent
        return silent and not miner.reachable

    def _drop(self, hotkey: Hotkey) -> None:
        self._remove(self._registered.pop(hotkey).miner)

    def _remove(self, miner: RemoteMiner) -> None:
        """Unless the command line names it."""
        assert self._network is not None
        if miner.announced:
            self._network.remove_miner(miner)

    # --- open to all --------------------------------------------------------------------------------------------------

    async def _hello(self, request: web.BaseRequest) -> web.StreamResponse:
        (nonce,) = query(request, "nonce")
        hex_digits("nonce", nonce, 32)
        hotkey, now = self._keypair.ss58_address, self._verifier.clock_ns()
        return self._signed_response(
            Hello(hotkey=hotkey, nonce=nonce, tasks=(self._task,), codecs=(), version=None, time_ns=now)
        )

    async def _status(self, request: web.BaseRequest) -> web.StreamResponse:
        return health_response(self._health())

    # --- who is there -------------------------------------------------------------------------------------------------

    async def _announce(self, request: web.BaseRequest) -> web.StreamResponse:
        caller, announce, _ = await self._envelope(request, Announce)
        (session,) = query(request, "session")
        hex_digits("session", session, 32)
        if caller not in self._registered:
            await self._listener.pace_attempt(request)
        if announce.hotkey != caller:
            raise Refused(403, f"announce: of {announce.hotkey}, signed by {caller}")
        if self._network is None:
            raise Refused(503, "starting")
        entry = self._registered.get(caller)
        if announce.leaving:
            if entry is not None and entry.session == session:
                self._leave(entry)
            return web.Response()
        if self._task not in announce.tasks:
            does = one_line(", ".join(announce.tasks)) or "none"
            raise Refused(409, f"task {self._task} is done here (yours: {does}); start with --tasks {self._task}")
        endpoint = self._endpoint(request, caller, announce)
        await self._check_duplicate(request, caller, session, endpoint)
        entry = self._register(caller, session, endpoint)
        entry.miner.codecs = announce.codecs
        self._listener.mark_known(request)
        return await self._confirm_reachable(request, entry)

    def _leave(self, entry: RegisteredMiner) -> None:
        """No more orders. Where it pulls, what it still brings is taken."""
        entry.leaving = True
        self._remove(entry.miner)
        if isinstance(entry.miner, Peer):
            del self._registered[entry.miner.hotkey or ""]

    async def _check_duplicate(
        self, request: web.BaseRequest, caller: Hotkey, session: str, endpoint: Endpoint | None
    ) -> None:
        """Raises Refused 409 while another process of this hotkey is there, or it is in use by the command line.

        Two cannot listen at one endpoint: who announces that again is the same one, or its successor.
        """
        assert self._network is not None
        entry = self._registered.get(caller)
        if entry is None:
            known = self._network.find(caller)
            if known is not None and known.reachable and known.name != _name(endpoint):
                raise Refused(409, f"the validator uses this hotkey at {known.name} already, by its --axons")
        elif entry.session != session and not entry.leaving and (endpoint is None or entry.miner.name != str(endpoint)):
            miner = entry.miner
            there = await self._say_hello(request, miner) if isinstance(miner, Peer) else miner.reachable
            if there or self._registered.get(caller) is not entry:
                raise Refused(409, DUPLICATE)
            miner.reachable = False

    def _register(self, caller: Hotkey, session: str, endpoint: Endpoint | None) -> RegisteredMiner:
        """Its entry from now on; at another endpoint, or pulling instead, it gets another miner."""
        assert self._network is not None
        entry = self._registered.get(caller)
        if entry is not None and entry.miner.name != _name(endpoint):
            self._remove(entry.miner)
            entry = None
        if entry is None or entry.leaving:
            if caller not in self._registered and len(self._registered) >= self._limits.miners:
                raise Refused(409, f"{self._limits.miners} miners are here already, as many as --limits.miners")
            miner = entry.miner if entry else self._find_or_add(caller, endpoint)
            if entry:
                self._network.add_miner(miner)
            entry = self._registered[caller] = RegisteredMiner(miner, session, 0.0)
        entry.session, entry.heard = session, time.monotonic()
        if isinstance(entry.miner, PullQueue):
            entry.miner.begin(session)
        return entry

    def _find_or_add(self, caller: Hotkey, endpoint: Endpoint | None) -> RemoteMiner:
        assert self._network is not None
        if endpoint is None:
            self._network.add_miner(queue := PullQueue(caller, self._limits))
            return queue
        known = self._network.find(caller)
        return known if known and known.name == str(endpoint) else self._network.add(endpoint, announced=True)

    def _endpoint(self, request: web.BaseRequest, caller: Hotkey, announce: Announce) -> Endpoint | None:
        """Where it says that it serves. Raises Refused for what a stranger shall not make us call."""
        if announce.endpoint is None:
            return None
        host, _, port = announce.endpoint.rpartition(":")
        number = whole_number("endpoint: port", port)
        sender = _ip(request.remote or "")
        try:
            address = _ip(without_brackets(host)) if host else sender
            if "%" in host:
                raise ValueError("the name of an interface means nothing on another machine")
        except ValueError:
            raise Refused(400, "endpoint: give an IP address as --axon.external-ip", Fault.MALFORMED) from None
        if not may_call(address, sender):
            raise Refused(400, f"endpoint: {address} is no address to call", Fault.MALFORMED)
        if not 1 <= number <= 65535:
            raise Refused(400, f"endpoint: {number} is no port", Fault.MALFORMED)
        if announce.tls and not self._reaches_tls:
            raise Refused(
                409, "this validator calls nobody by TLS: it needs --tls-ca, or this miner no --axon.tls-cert"
            )
        return Endpoint(f"[{address}]" if address.version == 6 else str(address), number, caller, announce.tls)

    async def _say_hello(self, request: web.BaseRequest, peer: Peer) -> bool:
        assert self._network is not None
        await self._listener.pace_call(request)  # to announce, and be called, is cheap
        try:
            async with asyncio.timeout(self._limits.connect_s):
                return await self._network.say_hello(peer)
        except TimeoutError:
            peer.problem = f"no answer in {self._limits.connect_s:g} s"
            return False

    async def _confirm_reachable(self, request: web.BaseRequest, entry: RegisteredMiner) -> web.Response:
        miner = entry.miner
        if not isinstance(miner, Peer) or miner.reachable or await self._say_hello(request, miner):
            return web.Response()
        return web.Response(
            status=202, text=Refusal(reason=UNREACHED.format(miner.endpoint)).text(), content_type="application/json"
        )

    # --- those who pull -----------------------------------------------------------------------------------------------

    def _queue_of(self, caller: Hotkey, session: str) -> PullQueue:
        """Raises Refused: 404 for one that is not here, 409 for another process of one that is."""
        hex_digits("session", session, 32)
        entry = self._registered.get(caller)
        if entry is None or not isinstance(entry.miner, PullQueue):
            raise Refused(404, "announce yourself first")
        if entry.miner.session != session:
            raise Refused(409, DUPLICATE)
        return entry.miner

    def _queue_and_order(self, request: web.BaseRequest, caller: Hotkey) -> tuple[PullQueue, Digest]:
        """The caller's queue, and the order that it speaks of."""
        session, order = query(request, "session", "order")
        return self._queue_of(caller, session), hex_digits("order", order)

    async def _next(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request, b"")
        session, taken, wait = query(request, "session", "taken", "wait")
        hex_digits("taken", taken)
        queue = self._queue_of(caller, session)
        with queue.heard():
            message = await queue.next(taken, min(whole_number("wait", wait), self._limits.poll_s))
        if message is None:
            return web.Response(status=202)
        return web.Response(text=message.model_dump_json(), content_type="application/json")

    async def _blob(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request, b"")
        session, order, digest, offset = query(request, "session", "order", "digest", "offset")
        queue = self._queue_of(caller, session)
        exchange = queue.order(hex_digits("order", order))
        hex_digits("digest", digest)
        with queue.heard(), exchange.sending(digest, whole_number("offset", offset)) as rest:
            response, _ = await self._send_body(request, rest, partial(exchange.count_sent, digest))
        return response

    async def _working(self, request: web.BaseRequest) -> web.StreamResponse:
        caller, body = await self._signed_body(request, Status.kind)
        queue, order = self._queue_and_order(request, caller)
        with queue.heard():
            status = verify_message(Signed.parse(body), Status, caller)
            queue.order(order).take_status(status)
        return web.Response()

    async def _refusal(self, request: web.BaseRequest) -> web.StreamResponse:
        caller, body = await self._signed_body(request, Refusal.kind)
        queue, order = self._queue_and_order(request, caller)
        with queue.heard():
            refusal = Refusal.parse(body)
            queue.order(order).take_refusal(refusal.reason, refusal.fault)
        return web.Response()

    async def _reply(self, request: web.BaseRequest) -> web.StreamResponse:
        caller, body = await self._signed_body(request, "reply")
        queue, order = self._queue_and_order(request, caller)
        with queue.heard():
            try:
                queue.take_reply(order, Signed.parse(body))
            except ProtocolError as error:  # the request is the miner's: to sign it again would change nothing
                raise Refused(400, str(error), error.fault) from None
        return web.Response()

    async def _payload(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request, b"")
        session, order, digest, size, offset = query(request, "session", "order", "digest", "bytes", "offset")
        queue = self._queue_of(caller, session)
        length, start = whole_number("bytes", size), whole_number("offset", offset)
        if start > length:
            raise Refused(416, f"offset {start} of {length} bytes", Fault.MALFORMED)
        check_length(request, length - start, "payload")
        hex_digits("digest", digest)
        if queue.has(hex_digits("order", order)):
            return web.Response()
        exchange = queue.order(order)
        take: Callable[[Callable[[bytes], object]], Awaitable[None]] = partial(self._receive_body, request)
        with queue.heard():
            await exchange.take_payload(digest, length, start, take)
        return web.Response()


def _name(endpoint: Endpoint | None) -> str:
    """Of the miner there."""
    return PULLS if endpoint is None else str(endpoint)


def _ip(text: str) -> Address:
    """Raises ValueError. A socket for both families says ::ffff:127.0.0.1."""
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address
