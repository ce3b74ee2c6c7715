"""A miner's HTTP server: checks who calls and what they send, hands typed messages to a `Service`, signs its answers.

Hello and status are open; everything else is signed by the caller (btauth/1) and passes the guard before its body means
anything. A blob's request signs an empty body, with digest and length in the query, so it is verified before a byte of
the blob is read. What is refused gets a `Refusal` in JSON, and is counted.
"""

from __future__ import annotations

import asyncio
import errno
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from aiohttp import web
from pydantic import ValidationError

from protocol import (
    MAX_MESSAGE_BYTES,
    BlobRef,
    Digest,
    Fault,
    Hotkey,
    Message,
    Order,
    ProtocolError,
    Receipt,
    Refusal,
    Refused,
    Signed,
    Stop,
)
from transport import Service
from transport.auth import AuthError, Guard, Keypair, Verifier, WrongReceiver, seal, unseal

CHUNK = 1 << 20
READ_BUFFER = 4 << 20
MAX_WAIT_S = 20  # of a long poll
MAX_READ_S = 10  # for a whole message: older signatures are stale anyway

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
M = TypeVar("M", Order, Stop, Receipt)


class Axon:
    """Serves `service` on host:port. `refused` counts refusals by HTTP status."""

    def __init__(
        self,
        service: Service,
        keypair: Keypair,
        guard: Guard,
        host: str,
        port: int,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._service = service
        self._keypair = keypair
        self._guard = guard
        self._host = host
        self._port = port
        self._verifier = Verifier(service.hotkey, clock_ns)
        self._runner: web.AppRunner | None = None
        self.refused: Counter[int] = Counter()

    async def start(self) -> int:
        """Returns the bound port (port 0 takes a free one). Raises ValueError where it cannot be bound."""
        app = web.Application(middlewares=[self._refusals])
        route = app.router.add_route
        route("GET", "/v1/hello", self._hello)
        route("GET", "/v1/status", self._status)
        route("POST", "/v1/order", self._order)
        route("PUT", "/v1/blob", self._blob)
        route("GET", "/v1/reply", self._reply)
        route("GET", "/v1/payload", self._payload)
        route("POST", "/v1/stop", self._stop)
        route("POST", "/v1/receipt", self._receipt)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            auto_decompress=False,  # nothing of ours is compressed; nobody's bomb is unpacked
            handler_cancellation=True,  # who hangs up waits no longer
            read_bufsize=READ_BUFFER,
            shutdown_timeout=0.5,
        )
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self.close()
            raise ValueError(self._unbound(error)) from None
        port: int = self._runner.addresses[0][1]
        return port

    def _unbound(self, error: OSError) -> str:
        if error.errno == errno.EADDRINUSE:
            return f"--axon.port {self._port}: already in use; choose another or 0 for any free one"
        if error.errno == errno.EACCES:
            return f"--axon.port {self._port}: not allowed for this user; choose one above 1023 or 0 for any free one"
        return f"--axon.ip {self._host}: this machine cannot listen there ({error.strerror}); use one of its addresses"

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # --- open to all --------------------------------------------------------------------------------------------------

    async def _hello(self, request: web.Request) -> web.StreamResponse:
        (nonce,) = _query(request, "nonce")
        if not re.fullmatch(r"[0-9a-f]{32}", nonce):
            raise Refused(400, "nonce: 32 hex digits expected", Fault.MALFORMED)
        return self._sealed(self._service.hello(nonce))

    async def _status(self, request: web.Request) -> web.StreamResponse:
        return self._sealed(self._service.status())

    # --- signed -------------------------------------------------------------------------------------------------------

    async def _order(self, request: web.Request) -> web.StreamResponse:
        caller, order, signed = await self._envelope(request, Order)
        return self._sealed(self._service.order(caller, order, signed.digest))

    async def _stop(self, request: web.Request) -> web.StreamResponse:
        caller, stop, _ = await self._envelope(request, Stop)
        return self._sealed(self._service.stop(caller, stop))

    async def _receipt(self, request: web.Request) -> web.StreamResponse:
        caller, receipt, signed = await self._envelope(request, Receipt)
        return self._sealed(self._service.receipt(caller, receipt, signed))

    async def _reply(self, request: web.Request) -> web.StreamResponse:
        caller = self._caller(request, b"")
        order, wait = _query(request, "order", "wait")
        wait_s = min(_count("wait", wait), MAX_WAIT_S)
        reply = await self._service.reply(caller, _digest(order), wait_s)
        return self._sealed(self._service.status(), 202) if reply is None else self._sealed(reply)

    async def _payload(self, request: web.Request) -> web.StreamResponse:
        caller = self._caller(request, b"")
        (order,) = _query(request, "order")
        data = memoryview(self._service.payload(caller, _digest(order))).cast("B")
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        response.content_length = len(data)
        await response.prepare(request)
        for start in range(0, len(data), CHUNK):
            await response.write(data[start : start + CHUNK])
        await response.write_eof()
        return response

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        """The blob's bytes go to the service's writer as they arrive; only the exact length is committed."""
        caller = self._caller(request, b"")
        ref = _blob_ref(request)
        if request.content_length is None:
            raise Refused(411, "a blob needs a Content-Length", Fault.MALFORMED)
        if request.content_length > ref.bytes:
            raise Refused(413, f"{request.content_length} bytes announced, {ref.bytes} signed", Fault.MALFORMED)
        if request.content_length < ref.bytes:
            raise Refused(400, f"{request.content_length} bytes announced, {ref.bytes} signed", Fault.MALFORMED)
        writer = self._service.receive(caller, ref)
        try:
            async for chunk in request.content.iter_any():
                writer.write(chunk)
            writer.commit()
        except BaseException:  # also when the sender hangs up, which cancels this handler
            writer.abort()
            raise
        return self._sealed(self._service.status())

    # --- what they share ----------------------------------------------------------------------------------------------

    def _caller(self, request: web.Request, body: bytes) -> Hotkey:
        """Raises AuthError, and Refused 403 by the guard."""
        caller = self._verifier.verify(request.headers, request.method, request.raw_path, body)
        self._guard.admit(caller)
        return caller

    async def _envelope(self, request: web.Request, cls: type[M]) -> tuple[Hotkey, M, Signed]:
        """The caller and its message, which it has signed itself and addressed to this miner."""
        body = await _body(request)
        caller = self._caller(request, body)
        signed = Signed.parse(body)
        message = unseal(signed, cls, caller)
        if message.hotkey != self._service.hotkey:
            raise Refused(403, f"{cls.kind}: for {message.hotkey}, this is {self._service.hotkey}")
        return caller, message, signed

    def _sealed(self, message: Message, status: int = 200) -> web.Response:
        text = seal(self._keypair, message).model_dump_json()
        return web.Response(text=text, status=status, content_type="application/json")

    @web.middleware
    async def _refusals(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except AuthError as error:
            refused = Refused(403 if isinstance(error, WrongReceiver) else 401, str(error))
        except ProtocolError as error:
            refused = Refused(401 if error.fault is Fault.FORGED else 400, str(error), error.fault)
        except web.HTTPException as error:  # an unknown path or method
            refused = Refused(error.status, error.reason)
        except Refused as error:
            refused = error
        return self._refusal(refused)

    def _refusal(self, refused: Refused) -> web.Response:
        if not refused.missing:  # saying what is missing is the way of every order
            self.refused[refused.status] += 1
        refusal = Refusal(
            reason=refused.reason[:1000],
            fault=refused.fault,
            missing=refused.missing,
            time_ns=self._verifier.clock_ns(),
        )
        return web.Response(text=refusal.text(), status=refused.status, content_type="application/json")


async def _body(request: web.Request) -> bytes:
    """A message's body, never more of it in memory than MAX_MESSAGE_BYTES and a read. Raises Refused 408, 413."""
    body = bytearray()
    if (request.content_length or 0) > MAX_MESSAGE_BYTES:
        raise Refused(413, f"a message has at most {MAX_MESSAGE_BYTES} bytes", Fault.MALFORMED)
    try:
        async with asyncio.timeout(MAX_READ_S):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > MAX_MESSAGE_BYTES:
                    raise Refused(413, f"a message has at most {MAX_MESSAGE_BYTES} bytes", Fault.MALFORMED)
    except TimeoutError:
        raise Refused(408, f"the message did not arrive within {MAX_READ_S} s") from None
    return bytes(body)


def _query(request: web.Request, *names: str) -> tuple[str, ...]:
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


def _blob_ref(request: web.Request) -> BlobRef:
    kind, digest, size = _query(request, "kind", "digest", "bytes")
    try:
        return BlobRef.model_validate({"kind": kind, "digest": digest, "bytes": _count("bytes", size)})
    except ValidationError as error:
        raise Refused(400, f"blob: {error.errors()[0]['loc'][0]}: not valid", Fault.MALFORMED) from None
