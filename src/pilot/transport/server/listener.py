"""An HTTP server that strangers may lean on: connections, patience and answers are all rationed.

    accept      at most so many connections in all and from one network; where they are used up, the oldest that never
                brought a valid signature is closed, never one that did
    head        a connection brings a whole request head in `header_s`, or is closed
    request     a stranger's waits its turn before anything is verified: `strangers_per_s` of the open ones are served
                in a second, as many others are looked at, and a refused stranger's connection is closed

The networks that strangers call from have their turns one after the other. So junk costs a bounded share of processor
and memory, whoever sends it; those that are known never wait for it, and who asks what is open waits only for others
who do.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from weakref import WeakValueDictionary

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from pilot.common.addresses import network_of
from pilot.common.limits import Limits
from pilot.interfaces import Refused
from pilot.transport.auth import AuthError, WrongReceiver
from protocol import Fault, ProtocolError, Refusal

READ_BUFFER = 64 << 10  # bytes held of a request that nobody reads yet, for each connection
LINGER_S = 1.0  # a refused sender may still send that long, so that it sees the refusal
ACCEPTS = 4  # connections accepted for each stranger's request that is looked at: more than these can use up

KNOWN = web.RequestKey("known", bool)
PACED = web.RequestKey("paced", bool)  # it has waited its turn

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Connection:
    address: str
    network: str
    socket: socket.socket
    transport: asyncio.Transport | None = None  # None during the TLS handshake
    connecting: asyncio.Task[None] | None = None
    known: bool = False

    @property
    def closed(self) -> bool:
        """Really: one that waits for its peer to read or to say goodbye still costs a file descriptor."""
        return self.socket.fileno() < 0

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        elif self.connecting is not None:
            self.connecting.cancel()


class RateLimiter:
    """Let `per_s` callers pass in a second, by turns of their networks, and in order within one.

    The first `burst` after a quiet time do not wait. aiolimiter does nearly the same, but has no order, and a timer for
    every caller that waits: a flood has many.
    """

    def __init__(self, per_s: float, burst: float) -> None:
        self._gap_s = 1 / per_s
        self._ahead_s = burst * self._gap_s
        self._next = 0.0  # when all turns given so far are over
        self._queue = asyncio.Lock()  # the first of each network; who goes away while it waits leaves no gap behind
        self._networks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # with somebody waiting

    async def wait(self, network: str = "") -> None:
        first = self._networks.setdefault(network, asyncio.Lock())
        async with first, self._queue:
            now = asyncio.get_running_loop().time()
            self._next = max(self._next, now - self._ahead_s) + self._gap_s
            if self._next > now:  # else the handler goes on at once: a request whose sender has gone is still read
                await asyncio.sleep(self._next - now)


class Listener:
    """Serves `answer` on host:port. A handler marks known callers with `mark_known`; `refused` counts by status.

    `sign` returns the headers that sign a refusal: of a request, the status and the body.
    """

    def __init__(
        self,
        answer: Handler,
        host: str,
        port: int,
        limits: Limits,
        *,
        flag: str,
        tls: ssl.SSLContext | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        sign: Callable[[web.BaseRequest, int, str], dict[str, str]] = lambda request, status, text: {},
    ) -> None:
        self._answer, self._host, self._port, self._limits, self._sign = answer, host, port, limits, sign
        self._flag, self._tls, self._clock_ns = flag, tls, clock_ns
        per_s = limits.strangers_per_s
        self._accept_rate = RateLimiter(ACCEPTS * per_s, limits.connections_per_address)
        self._handshake_rate = RateLimiter(per_s, limits.connections_per_address)
        self._open_rate = RateLimiter(per_s, per_s / 5)
        self._attempt_rate = RateLimiter(per_s, per_s / 5)
        self._connections: list[_Connection] = []
        self._connecting: set[asyncio.Task[None]] = set()
        self.refused: Counter[int] = Counter()

    async def start(self) -> int:
        """Returns the bound port (port 0 takes a free one). Raises ValueError where it cannot be bound."""
        limits = self._limits
        self._server = web.Server(
            self._respond,
            handler_cancellation=True,  # who hangs up waits no longer
            access_log=None,
            auto_decompress=False,  # nothing of ours is compressed; nobody's bomb is unpacked
            keepalive_timeout=limits.header_s,
            lingering_time=LINGER_S,
            max_line_size=limits.header_bytes,
            max_field_size=limits.header_bytes,
            max_headers=64,
            read_bufsize=READ_BUFFER,
            logger=self._logger(),
        )
        try:
            self._listener = await _listen(self._host, self._port, limits.connections)
        except OSError as error:
            raise ValueError(self._unbound(error)) from None
        self.accepting = asyncio.create_task(self._accept())
        self.accepting.add_done_callback(_log_failure)
        port: int = self._listener.getsockname()[1]
        return port

    async def close(self) -> None:
        self.accepting.cancel()
        for task in self._connecting:
            task.cancel()
        await asyncio.gather(self.accepting, *self._connecting, return_exceptions=True)
        self._listener.close()
        self._server.pre_shutdown()
        await self._server.shutdown(0.5)

    @property
    def connections(self) -> int:
        """Those that cost a file descriptor."""
        return sum(not connection.closed for connection in self._connections)

    def mark_known(self, request: web.BaseRequest) -> None:
        """The connection has brought a valid signature of somebody who may call: it is not closed to make room."""
        request[KNOWN] = True
        if connection := self._connection_of(request):
            connection.known = True

    def _connection_of(self, request: web.BaseRequest) -> _Connection | None:
        return next((c for c in self._connections if c.transport is request.transport), None)

    def knows(self, request: web.BaseRequest) -> bool:
        """Whether the connection has brought such a signature before."""
        connection = self._connection_of(request)
        return connection is not None and connection.known

    async def pace_open(self, request: web.BaseRequest) -> None:
        """Before a request that needs no signature is served."""
        request[PACED] = True
        await self._open_rate.wait(network_of(request.remote or ""))

    async def pace_attempt(self, request: web.BaseRequest) -> None:
        """Before anything of another request costs us much; once a request."""
        if PACED not in request:
            await self.pace_call(request)

    async def pace_call(self, request: web.BaseRequest) -> None:
        """Before something further is done for its sender."""
        request[PACED] = True
        await self._attempt_rate.wait(network_of(request.remote or ""))

    def _unbound(self, error: OSError) -> str:
        flag, port = f"--{self._flag}.port {self._port}", self._port
        if error.errno == errno.EADDRINUSE:
            return f"{flag}: already in use; choose another or 0 for any free one"
        if error.errno == errno.EACCES:
            return f"{flag}: not allowed for this user; choose one above 1023 or 0 for any free one"
        return f"--{self._flag}.ip {self._host}: this machine cannot listen there ({error.strerror}, port {port})"

    # --- connections --------------------------------------------------------------------------------------------------

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, (address, *_) = await loop.sock_accept(self._listener)
            except OSError as error:  # the peer has gone already, or we have no file descriptors left
                logger.debug("accept: %s", error)
                await asyncio.sleep(0.1)
                continue
            connection = _Connection(address, network_of(address), accepted)
            if not self._make_room(connection.network):
                accepted.close()
                continue
            self._connections.append(connection)
            connection.connecting = task = asyncio.create_task(self._connect(connection))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
            await asyncio.sleep(0)  # it begins: a task that is cancelled before would leave its socket open
            await self._accept_rate.wait()

    def _make_room(self, network: str) -> bool:
        """Closes the oldest strangers; False where only the known are left."""
        self._connections = [c for c in self._connections if not c.closed]
        same = [c for c in self._connections if c.network == network]
        for present, limit in (
            (same, self._limits.connections_per_address),
            (self._connections, self._limits.connections),
        ):
            if len(present) >= limit:
                stranger = next((c for c in present if not c.known), None)
                if stranger is None:
                    return False
                stranger.abort()
                self._connections.remove(stranger)
        return True

    async def _connect(self, connection: _Connection) -> None:
        patience = {"ssl_handshake_timeout": self._limits.connect_s, "ssl_shutdown_timeout": LINGER_S}
        try:
            if self._tls:
                await self._handshake_rate.wait(connection.network)
            connection.transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                self._server, connection.socket, ssl=self._tls, **(patience if self._tls else {})
            )
        except (OSError, ssl.SSLError) as error:  # no TLS, too slow, gone
            logger.debug("%s: no connection: %s", connection.address, error)
        finally:
            if connection.transport is None:
                connection.socket.close()
                with contextlib.suppress(ValueError):
                    self._connections.remove(connection)

    # --- answers ------------------------------------------------------------------------------------------------------

    async def _respond(self, request: web.BaseRequest) -> web.StreamResponse:
        began = time.monotonic()
        try:
            if request.headers.get("Content-Encoding", "identity") != "identity":
                raise Refused(415, "nothing here is compressed", Fault.MALFORMED)
            response = await self._answer(request)
        except AuthError as error:
            response = await self._refuse(
                request, Refused(403 if isinstance(error, WrongReceiver) else 401, str(error))
            )
        except ProtocolError as error:
            status = 401 if error.fault is Fault.FORGED else 400
            response = await self._refuse(request, Refused(status, str(error), error.fault))
        except Refused as refused:
            response = await self._refuse(request, refused)
        elapsed_s = time.monotonic() - began
        logger.debug("%s %s %s: %d, %.4f s", request.remote, request.method, request.path, response.status, elapsed_s)
        return response

    async def _refuse(self, request: web.BaseRequest, refused: Refused) -> web.Response:
        refusal = Refusal(
            reason=refused.reason[:1000],
            fault=refused.fault,
            missing=refused.missing,
            held=refused.held,
            time_ns=self._clock_ns(),
        )
        if not refused.missing:  # saying what is missing is the way of every order
            self.refused[refused.status] += 1
            logger.debug("%s refused with %d: %s", request.remote, refused.status, refusal.reason)
        if KNOWN not in request:
            await self.pace_attempt(request)
        text = refusal.text()
        headers = self._sign(request, refused.status, text)
        response = web.Response(text=text, status=refused.status, headers=headers, content_type="application/json")
        if KNOWN not in request:
            response.force_close()
        return response

    def _logger(self) -> logging.Logger:
        """aiohttp's: our own failures belong into the log; what is no HTTP is counted like any refusal."""

        def keep(record: logging.LogRecord) -> bool:
            junk = record.exc_info is not None and isinstance(record.exc_info[1], HttpProcessingError)
            self.refused[400] += junk
            return not junk and record.levelno >= logger.getEffectiveLevel()

        own = logging.Logger(f"{__name__}.http", logging.DEBUG)  # on which it tells of some of the junk
        own.parent = logger
        own.addFilter(keep)
        return own


def _log_failure(accepting: asyncio.Task[None]) -> None:
    """It never ends by itself: its failure is ours, and whoever waits on `accepting` ends with it."""
    if not accepting.cancelled() and (error := accepting.exception()):
        logger.error("no more connections are accepted", exc_info=error)


async def _listen(host: str, port: int, backlog: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    family, _, _, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE))[0]
    dual = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
    listener = socket.create_server(address, family=family, backlog=backlog, dualstack_ipv6=dual)
    listener.setblocking(False)
    return listener
