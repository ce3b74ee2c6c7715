"""A miner's HTTP server: checks who calls and what they send, hands typed messages to a `Service`, signs its answers.

Hello and status are open; everything else is signed by the caller (btauth/1) and passes the guard before its body means
anything. A blob's request signs an empty body, with digest, length and offset in the query, so it is verified before a
byte of the blob is read. What is refused gets a `Refusal` in JSON, and is counted; the `Door` rations strangers.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from aiohttp import web
from pydantic import ValidationError

from limits import Limits
from protocol import BlobRef, Digest, Fault, Hotkey, Message, Order, Receipt, Signed, Stop
from transport import Service
from transport.auth import Guard, Keypair, Verifier, seal, unseal
from transport.door import Door
from transport.health import health_response
from transport.pump import CHUNK, Pace, pump
from values import Refused

CALLER = web.RequestKey("caller", str)  # of a signed request

M = TypeVar("M", Order, Stop, Receipt)

logger = logging.getLogger(__name__)


class Axon:
    """Serves `service` on host:port, with TLS where there is a context for it."""

    def __init__(
        self,
        service: Service,
        keypair: Keypair,
        guard: Guard,
        host: str,
        port: int,
        limits: Limits | None = None,
        tls: ssl.SSLContext | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._service = service
        self._keypair = keypair
        self._guard = guard
        self._limits = limits or Limits()
        self._verifier = Verifier(service.hotkey, clock_ns)
        self._door = Door(self._answer, host, port, self._limits, flag="axon", tls=tls, clock_ns=clock_ns)
        self._requests: Counter[Hotkey] = Counter()  # signed ones under way
        self._receiving: dict[Digest, asyncio.Task[object]] = {}
        self._routes: dict[str, tuple[str, Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]]] = {
            "/v1/hello": ("GET", self._hello),
            "/v1/status": ("GET", self._status),
            "/v1/order": ("POST", self._order),
            "/v1/blob": ("PUT", self._blob),
            "/v1/reply": ("GET", self._reply),
            "/v1/payload": ("GET", self._payload),
            "/v1/stop": ("POST", self._stop),
            "/v1/receipt": ("POST", self._receipt),
        }

    @property
    def refused(self) -> Counter[int]:
        """Requests refused, by HTTP status."""
        return self._door.refused

    @property
    def accepting(self) -> asyncio.Task[None]:
        """Never ends by itself; its failure is our own."""
        return self._door.accepting

    @property
    def connections(self) -> int:
        """Open ones."""
        return self._door.connections

    async def start(self) -> int:
        """Returns the bound port (port 0 takes a free one). Raises ValueError where it cannot be bound."""
        return await self._door.start()

    async def close(self) -> None:
        await self._door.close()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        method, handler = self._routes.get(request.path, ("", None))
        if handler is None:
            raise Refused(404, "no such path")
        if request.method != method:
            raise Refused(405, f"{method} {request.path}")
        try:
            return await handler(request)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = "this miner's disk is full; delete old files, in its --cache for example"
            logger.warning("%s: %s", request.path, reason)
            raise Refused(507, reason) from None
        finally:
            if caller := request.get(CALLER):
                self._requests[caller] -= 1

    # --- open to all --------------------------------------------------------------------------------------------------

    async def _hello(self, request: web.BaseRequest) -> web.StreamResponse:
        (nonce,) = _query(request, "nonce")
        if not re.fullmatch(r"[0-9a-f]{32}", nonce):
            raise Refused(400, "nonce: 32 hex digits expected", Fault.MALFORMED)
        await self._door.turn()
        return self._sealed(self._service.hello(nonce))

    async def _status(self, request: web.BaseRequest) -> web.StreamResponse:
        await self._door.turn()
        return health_response(self._service.health())

    # --- signed -------------------------------------------------------------------------------------------------------

    async def _order(self, request: web.BaseRequest) -> web.StreamResponse:
        caller, order, signed = await self._envelope(request, Order)
        return self._sealed(self._service.order(caller, order, signed.digest))

    async def _stop(self, request: web.BaseRequest) -> web.StreamResponse:
        caller, stop, _ = await self._envelope(request, Stop)
        return self._sealed(self._service.stop(caller, stop))

    async def _receipt(self, request: web.BaseRequest) -> web.StreamResponse:
        caller, receipt, signed = await self._envelope(request, Receipt)
        return self._sealed(await asyncio.to_thread(self._service.receipt, caller, receipt, signed))

    async def _reply(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request, b"")
        order, wait = _query(request, "order", "wait")
        wait_s = min(_count("wait", wait), self._limits.poll_s)
        reply = await self._service.reply(caller, _digest(order), wait_s)
        return self._sealed(self._service.status(), 202) if reply is None else self._sealed(reply)

    async def _payload(self, request: web.BaseRequest) -> web.StreamResponse:
        """The payload from `offset` on, from the one buffer that it is in."""
        caller = self._caller(request, b"")
        order, offset = _query(request, "order", "offset")
        digest, start = _digest(order), _count("offset", offset)
        data = memoryview(self._service.payload(caller, digest)).cast("B")
        if start > len(data):
            raise Refused(416, f"offset {start}: the payload has {len(data)} bytes", Fault.MALFORMED)
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        response.content_length = len(data) - start
        await response.prepare(request)
        try:
            async with Pace(self._limits) as pace:
                for begin in range(start, len(data), CHUNK):
                    await response.write(data[begin : begin + CHUNK])
                    pace.passed(CHUNK)
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            return response
        self._service.delivered(caller, digest)
        return response

    async def _blob(self, request: web.BaseRequest) -> web.StreamResponse:
        """The blob's bytes go to the service's writer as they arrive, in a thread."""
        caller = self._caller(request, b"")
        ref, offset = _blob_ref(request)
        largest = self._limits.blob(ref.kind)
        if ref.bytes > largest:
            raise Refused(413, f"a {ref.kind} of {ref.bytes} bytes; this miner takes {largest}", Fault.MALFORMED)
        if request.content_length is None:
            raise Refused(411, "a blob needs a Content-Length", Fault.MALFORMED)
        if request.content_length != ref.bytes - offset:
            status = 413 if request.content_length > ref.bytes - offset else 400
            said = f"{request.content_length} bytes announced, {ref.bytes - offset} signed"
            raise Refused(status, said, Fault.MALFORMED)
        async with self._take_over(ref.digest):
            writer = self._service.receive(caller, ref, offset)
            try:
                if request.headers.get("Expect", "").lower() == "100-continue":
                    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    request.writer.output_size = 0  # the answer has not begun
                await pump(request.content, writer.write, self._limits)
                await asyncio.to_thread(writer.commit)
            except TimeoutError:
                raise Refused(408, f"fewer than {self._limits.min_rate:g} bytes a second") from None
        return self._sealed(self._service.status())

    # --- what they share ----------------------------------------------------------------------------------------------

    def _caller(self, request: web.BaseRequest, body: bytes) -> Hotkey:
        """Raises AuthError, and Refused: 403 by the guard, 429."""
        caller = self._verifier.verify(request.headers, request.method, request.raw_path, body)
        self._guard.admit(caller)
        self._door.welcome(request)
        if self._requests[caller] >= self._limits.requests_per_peer:
            raise Refused(429, f"{self._limits.requests_per_peer} requests of {caller} are under way", Fault.BUSY)
        self._requests[caller] += 1
        request[CALLER] = caller
        return caller

    async def _envelope(self, request: web.BaseRequest, cls: type[M]) -> tuple[Hotkey, M, Signed]:
        """The caller and its message, which it has signed itself and addressed to this miner."""
        self._guard.check(self._verifier.claimed(request.headers))  # before its body costs anything
        body = await _body(request, self._limits.body(cls.kind), self._limits.message_s)
        caller = self._caller(request, body)
        signed = Signed.parse(body)
        message = unseal(signed, cls, caller)
        if message.hotkey != self._service.hotkey:
            raise Refused(403, f"{cls.kind}: for {message.hotkey}, this is {self._service.hotkey}")
        return caller, message, signed

    @asynccontextmanager
    async def _take_over(self, blob: Digest) -> AsyncIterator[None]:
        """One transfer of a blob at a time: a newer request ends the older one, whose connection may be dead."""
        while (older := self._receiving.get(blob)) is not None:
            older.cancel()
            await asyncio.wait({older})
        task = asyncio.current_task()
        assert task is not None
        self._receiving[blob] = task
        try:
            yield
        finally:
            del self._receiving[blob]

    def _sealed(self, message: Message, status: int = 200) -> web.Response:
        text = seal(self._keypair, message).model_dump_json()
        return web.Response(text=text, status=status, content_type="application/json")


async def _body(request: web.BaseRequest, largest: int, timeout_s: float) -> bytes:
    """A message's body, never more of it in memory than `largest` bytes and a read. Raises Refused 408, 413."""
    too_large = Refused(413, f"this message has at most {largest} bytes", Fault.MALFORMED)
    body = bytearray()
    if (request.content_length or 0) > largest:
        raise too_large
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > largest:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the message did not arrive within {timeout_s:g} s") from None
    return bytes(body)


def _query(request: web.BaseRequest, *names: str) -> tuple[str, ...]:
    """The values of exactly these parameters, each there once."""
    if sorted(name for name, _ in request.query.items()) != sorted(names):
        raise Refused(400, f"query: {', '.join(names)} expected, each once", Fault.MALFORMED)
    return tuple(request.query[name] for name in names)


def _digest(text: str) -> Digest:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise Refused(400, "order: 64 hex digits expected", Fault.MALFORMED)
    return text


def _count(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise Refused(400, f"{name}: a whole number expected", Fault.MALFORMED)
    return int(text)


def _blob_ref(request: web.BaseRequest) -> tuple[BlobRef, int]:
    """The blob and the offset from which it comes, which leaves at least one byte."""
    kind, digest, size, offset = _query(request, "kind", "digest", "bytes", "offset")
    length, start = _count("bytes", size), _count("offset", offset)
    if start >= length:
        raise Refused(416, f"offset {start} of {length} bytes", Fault.MALFORMED)
    try:
        return BlobRef.model_validate({"kind": kind, "digest": digest, "bytes": length}), start
    except ValidationError as error:
        raise Refused(400, f"blob: {error.errors()[0]['loc'][0]}: not valid", Fault.MALFORMED) from None
