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
while the first is there, and the first once the second has taken its place.
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

from pilot.common.limits import Limits
from pilot.interfaces import ANNOUNCE_S, Refused
from pilot.transport.auth import Keypair, verify_message
from pilot.transport.client.dendrite import Dendrite
from pilot.transport.client.peer import Endpoint, Peer
from pilot.transport.client.remote_miner import RemoteMiner
from pilot.transport.server.admission import Admission
from pilot.transport.server.base import Server, check_length, hex_digits, query, whole
from pilot.transport.server.health import health_response
from pilot.transport.server.pull_queue import PULLS, PullQueue
from protocol import Announce, Digest, Fault, Health, Hello, Hotkey, ProtocolError, Refusal, Signed, Status, one_line

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MISSED = 3  # such intervals, after which one that is not there either is forgotten
UNREACHED = "not reached at {}: nothing there answers as this miner; check --axon.external-ip, port, firewall and TLS"
TWIN = "another process is at work under this hotkey; this one is used when that is gone"


@dataclass
class Place:
    """A miner that has announced itself."""

    contact: RemoteMiner
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
        self._reaches_tls, self._interval_s, self._clock_ns = reaches_tls, interval_s, clock_ns
        self._network: Dendrite | None = None
        self._places: dict[Hotkey, Place] = {}
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
        network.attend(self._tidy())
        network.attend(self._until_deaf())

    def _is_known(self, caller: Hotkey) -> bool:
        return caller in self._places

    async def _until_deaf(self) -> None:
        await asyncio.shield(self.accepting)

    async def _tidy(self) -> None:
        """Forgets those that are gone, or no longer admitted."""
        while True:
            await asyncio.sleep(self._interval_s / 5)
            for hotkey, place in list(self._places.items()):
                if self._is_gone(place) or not self._admission.admits(hotkey):
                    self._drop(hotkey)

    def _is_gone(self, place: Place) -> bool:
        contact, patience_s = place.contact, MISSED * self._interval_s
        silent = time.monotonic() - place.heard > patience_s
        if isinstance(contact, PullQueue):
            return not contact.exchanges and contact.away_s > patience_s and silent
        return silent and not contact.reachable

    def _drop(self, hotkey: Hotkey) -> None:
        self._part(self._places.pop(hotkey).contact)

    def _part(self, contact: RemoteMiner) -> None:
        """Unless the command line names it."""
        assert self._network is not None
        if contact.announced:
            self._network.part(contact)

    # --- open to all --------------------------------------------------------------------------------------------------

    async def _hello(self, request: web.BaseRequest) -> web.StreamResponse:
        (nonce,) = query(request, "nonce")
        hex_digits("nonce", nonce, 32)
        await self._door.turn()
        hotkey, now = self._keypair.ss58_address, self._clock_ns()
        return self._sealed(
            Hello(hotkey=hotkey, nonce=nonce, tasks=(self._task,), codecs=(), version=None, time_ns=now)
        )

    async def _status(self, request: web.BaseRequest) -> web.StreamResponse:
        await self._door.turn()
        return health_response(self._health())

    # --- who is there -------------------------------------------------------------------------------------------------

    async def _announce(self, request: web.BaseRequest) -> web.StreamResponse:
        caller, announce, _ = await self._envelope(request, Announce)
        (session,) = query(request, "session")
        hex_digits("session", session, 32)
        if caller not in self._places:
            await self._door.turn()
        if announce.hotkey != caller:
            raise Refused(403, f"announce: of {announce.hotkey}, signed by {caller}")
        if self._network is None:
            raise Refused(503, "starting")
        place = self._places.get(caller)
        if announce.leaving:
            if place is not None and place.session == session:
                self._leave(place)
            return web.Response()
        if self._task not in announce.tasks:
            does = one_line(", ".join(announce.tasks)) or "none"
            raise Refused(409, f"task {self._task} is done here (yours: {does}); start with --tasks {self._task}")
        endpoint = self._endpoint(request, caller, announce)
        await self._check_twin(caller, session, endpoint)
        place = self._seat(caller, session, endpoint)
        place.contact.codecs = announce.codecs
        self._door.welcome(request)
        return await self._say_how_it_is(place)

    def _leave(self, place: Place) -> None:
        """No more orders. Where it pulls, what it still brings is taken."""
        place.leaving = True
        self._part(place.contact)
        if isinstance(place.contact, Peer):
            del self._places[place.contact.hotkey or ""]

    async def _check_twin(self, caller: Hotkey, session: str, endpoint: Endpoint | None) -> None:
        """Raises Refused 409 while another process of this hotkey is there, or it is in use by the command line.

        Two cannot listen at one endpoint: who announces that again is the same one, or its successor.
        """
        assert self._network is not None
        place = self._places.get(caller)
        if place is None:
            known = self._network.find(caller)
            if known is not None and known.reachable and known.name != _name(endpoint):
                raise Refused(409, f"the validator uses this hotkey at {known.name} already, by its --axons")
        elif (
            place.session != session and not place.leaving and (endpoint is None or place.contact.name != str(endpoint))
        ):
            contact = place.contact
            there = await self._greet(contact) if isinstance(contact, Peer) else contact.reachable
            if there or self._places.get(caller) is not place:
                raise Refused(409, TWIN)
            contact.reachable = False

    def _seat(self, caller: Hotkey, session: str, endpoint: Endpoint | None) -> Place:
        """Its place from now on; at another endpoint, or pulling instead, it gets another contact."""
        assert self._network is not None
        place = self._places.get(caller)
        if place is not None and place.contact.name != _name(endpoint):
            self._part(place.contact)
            place = None
        if place is None or place.leaving:
            if caller not in self._places and len(self._places) >= self._limits.miners:
                raise Refused(409, f"{self._limits.miners} miners are here already, as many as --limits.miners")
            contact = place.contact if place else self._contact(caller, endpoint)
            if place:
                self._network.join(contact)
            place = self._places[caller] = Place(contact, session, 0.0)
        place.session, place.heard = session, time.monotonic()
        if isinstance(place.contact, PullQueue):
            place.contact.begin(session)
        return place

    def _contact(self, caller: Hotkey, endpoint: Endpoint | None) -> RemoteMiner:
        assert self._network is not None
        if endpoint is None:
            self._network.join(mailbox := PullQueue(caller, self._limits))
            return mailbox
        known = self._network.find(caller)
        return known if known and known.name == str(endpoint) else self._network.add(endpoint, announced=True)

    def _endpoint(self, request: web.BaseRequest, caller: Hotkey, announce: Announce) -> Endpoint | None:
        """Where it says that it serves. Raises Refused for what a stranger shall not make us call."""
        if announce.endpoint is None:
            return None
        host, _, port = announce.endpoint.rpartition(":")
        number = whole("endpoint: port", port)
        sender = _ip(request.remote or "")
        try:
            address = _ip(host.strip("[]")) if host else sender
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

    async def _greet(self, peer: Peer) -> bool:
        assert self._network is not None
        await self._door.turn()  # to announce, and be called, is cheap
        try:
            async with asyncio.timeout(self._limits.connect_s):
                return await self._network.greet(peer)
        except TimeoutError:
            peer.complaint = f"no answer in {self._limits.connect_s:g} s"
            return False

    async def _say_how_it_is(self, place: Place) -> web.Response:
        contact = place.contact
        if not isinstance(contact, Peer) or contact.reachable or await self._greet(contact):
            return web.Response()
        return web.Response(
            status=202, text=Refusal(reason=UNREACHED.format(contact.endpoint)).text(), content_type="application/json"
        )

    # --- those who pull -----------------------------------------------------------------------------------------------

    def _mailbox(self, caller: Hotkey, session: str) -> PullQueue:
        """Raises Refused: 404 for one that is not here, 409 for another process of one that is."""
        hex_digits("session", session, 32)
        place = self._places.get(caller)
        if place is None or not isinstance(place.contact, PullQueue):
            raise Refused(404, "announce yourself first")
        if place.contact.session != session:
            raise Refused(409, TWIN)
        return place.contact

    def _about(self, request: web.BaseRequest, caller: Hotkey) -> tuple[PullQueue, Digest]:
        """The caller's mailbox, and the order that it speaks of."""
        session, order = query(request, "session", "order")
        return self._mailbox(caller, session), hex_digits("order", order)

    async def _next(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request, b"")
        session, taken, wait = query(request, "session", "taken", "wait")
        hex_digits("taken", taken)
        mailbox = self._mailbox(caller, session)
        with mailbox.heard():
            letter = await mailbox.next(taken, min(whole("wait", wait), self._limits.poll_s))
        if letter is None:
            return web.Response(status=202)
        return web.Response(text=letter.model_dump_json(), content_type="application/json")

    async def _blob(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request, b"")
        session, order, digest, offset = query(request, "session", "order", "digest", "offset")
        mailbox = self._mailbox(caller, session)
        exchange = mailbox.order(hex_digits("order", order))
        hex_digits("digest", digest)
        with mailbox.heard(), exchange.giving(digest, whole("offset", offset)) as rest:
            response, _ = await self._give(request, rest, partial(exchange.gave, digest))
        return response

    async def _working(self, request: web.BaseRequest) -> web.StreamResponse:
        caller, body = await self._signed_body(request, Status.kind)
        mailbox, order = self._about(request, caller)
        with mailbox.heard():
            status = verify_message(Signed.parse(body), Status, caller)
            mailbox.order(order).take_status(status)
        return web.Response()

    async def _refusal(self, request: web.BaseRequest) -> web.StreamResponse:
        caller, body = await self._signed_body(request, Refusal.kind)
        mailbox, order = self._about(request, caller)
        with mailbox.heard():
            refusal = Refusal.parse(body)
            mailbox.order(order).take_refusal(refusal.reason, refusal.fault)
        return web.Response()

    async def _reply(self, request: web.BaseRequest) -> web.StreamResponse:
        caller, body = await self._signed_body(request, "reply")
        mailbox, order = self._about(request, caller)
        with mailbox.heard():
            try:
                mailbox.take_reply(order, Signed.parse(body))
            except ProtocolError as error:  # the request is the miner's: to sign it again would change nothing
                raise Refused(400, str(error), error.fault) from None
        return web.Response()

    async def _payload(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request, b"")
        session, order, digest, size, offset = query(request, "session", "order", "digest", "bytes", "offset")
        mailbox = self._mailbox(caller, session)
        length, start = whole("bytes", size), whole("offset", offset)
        if start > length:
            raise Refused(416, f"offset {start} of {length} bytes", Fault.MALFORMED)
        check_length(request, length - start, "payload")
        hex_digits("digest", digest)
        if mailbox.has(hex_digits("order", order)):
            return web.Response()
        exchange = mailbox.order(order)
        take: Callable[[Callable[[bytes], object]], Awaitable[None]] = partial(self._take, request)
        with mailbox.heard():
            await exchange.take_payload(digest, length, start, take)
        return web.Response()


def _name(endpoint: Endpoint | None) -> str:
    """Of the contact there."""
    return PULLS if endpoint is None else str(endpoint)


def may_call(address: Address, sender: Address) -> bool:
    """Whether a validator calls what `sender` announces; none of its own networks, for one from outside of them."""
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        return False
    if address.is_loopback:
        return sender.is_loopback
    return address.is_global or not sender.is_global


def _ip(text: str) -> Address:
    """Raises ValueError. A socket for both families says ::ffff:127.0.0.1."""
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address
