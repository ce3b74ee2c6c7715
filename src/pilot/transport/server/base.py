"""What a miner's server and a validator's have in common: who calls, what they send, and that neither costs too much.

A request's signature (btauth/1) is checked before its body means anything. Bulk signs an empty body, with digest,
length and offset in the query, so it is verified before a byte of it is read. What is refused gets a `Refusal` in JSON,
and is counted; the `Listener` rations strangers.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

from aiohttp import web

from pilot.common.files import NO_SPACE
from pilot.common.limits import Limits
from pilot.interfaces import Refused
from pilot.transport.auth import Keypair, Verifier, sign_message, sign_refusal, verify_message
from pilot.transport.server.health import READING
from pilot.transport.server.listener import Listener
from pilot.transport.streaming import CHUNK, MinimumRate, stream_body
from protocol import Digest, Fault, Hotkey, Message, Signed

CALLER = web.RequestKey("caller", str)  # the hotkey that signed the request
OPEN = ("/v1/hello", "/v1/status")  # paths that need no signature
PROVEN = web.RequestKey("proven", bool)  # a refusal is signed: it rests on nothing that may be damaged on the way

M = TypeVar("M", bound=Message)
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

logger = logging.getLogger(__name__)


class AccessPolicy(Protocol):
    """Decides which callers are served. Both methods raise Refused 403."""

    def check(self, caller: Hotkey) -> None:
        """Check the hotkey that a request claims."""

    def admit(self, caller: Hotkey) -> None:
        """Admit a caller whose signature was verified."""


class Server:
    """Answers by `routes`, a method and a handler by path, on host:port, with TLS where there is a context for it."""

    DISK_FULL = "the disk is full"

    def __init__(
        self,
        keypair: Keypair,
        policy: AccessPolicy,
        host: str,
        port: int,
        limits: Limits | None,
        routes: Mapping[str, tuple[str, Handler]],
        *,
        flag: str,
        tls: ssl.SSLContext | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._keypair, self._policy, self._routes = keypair, policy, routes
        self._limits = limits or Limits()
        self._verifier = Verifier(keypair.ss58_address, clock_ns)
        told_ns = self._verifier.clock_ns
        self._listener = Listener(
            *(self._answer, host, port, self._limits),
            flag=flag,
            tls=tls,
            clock_ns=told_ns,
            sign=self._sign_refusal,
        )
        self._requests: Counter[Hotkey] = Counter()  # signed ones under way

    @property
    def refused(self) -> Counter[int]:
        """Requests refused, by HTTP status."""
        return self._listener.refused

    @property
    def accepting(self) -> asyncio.Task[None]:
        """Never ends by itself; its failure is our own."""
        return self._listener.accepting

    @property
    def connections(self) -> int:
        """Open ones."""
        return self._listener.connections

    async def start(self) -> int:
        """Returns the bound port (port 0 takes a free one). Raises ValueError where it cannot be bound."""
        return await self._listener.start()

    async def close(self) -> None:
        await self._listener.close()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        method, handler = self._routes.get(request.path, ("", None))
        if handler is None:
            raise Refused(404, "no such path")
        reading = request.path in OPEN and request.method in READING
        if request.method != method and not reading:
            raise Refused(405, f"{method} {request.path}")
        if reading:
            await self._listener.pace_open(request)
        elif not self._listener.knows(request):
            await self._listener.pace_attempt(request)
        try:
            return await handler(request)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            logger.warning("%s: %s", request.path, self.DISK_FULL)
            raise Refused(507, self.DISK_FULL) from None
        finally:
            if caller := request.get(CALLER):
                self._requests[caller] -= 1
                if not self._requests[caller]:
                    del self._requests[caller]

    # --- who calls ----------------------------------------------------------------------------------------------------

    def _caller(self, request: web.BaseRequest, body: bytes) -> Hotkey:
        """Raises AuthError, and Refused: 403 by its policy, 429."""
        self._check_claim(request)  # before a signature costs anything
        caller = self._verifier.verify(request.headers, request.method, request.raw_path, body)
        request[PROVEN] = True
        self._policy.admit(caller)
        if self._is_known(caller):
            self._listener.mark_known(request)
        if self._requests[caller] >= self._limits.requests_per_peer:
            raise Refused(429, f"{self._limits.requests_per_peer} requests of {caller} are under way", Fault.BUSY)
        self._requests[caller] += 1
        request[CALLER] = caller
        return caller

    def _check_claim(self, request: web.BaseRequest) -> None:
        """Raises MalformedAuth, and Refused 403, which rests on the claimed hotkey: that is part of what it answers."""
        claimed = self._verifier.claimed(request.headers)
        request[PROVEN] = True
        self._policy.check(claimed)
        request[PROVEN] = False

    def _is_known(self, caller: Hotkey) -> bool:
        """Whether its connections are kept when there are too many."""
        return True

    async def _signed_body(self, request: web.BaseRequest, kind: str) -> tuple[Hotkey, bytes]:
        """The caller, and the message's body that its signature covers."""
        self._check_claim(request)  # before its body costs anything
        body = await read_body(request, self._limits.body(kind), self._limits.message_s)
        return self._caller(request, body), body

    async def _envelope(self, request: web.BaseRequest, cls: type[M]) -> tuple[Hotkey, M, Signed]:
        """The caller and its message, which it has signed itself."""
        caller, body = await self._signed_body(request, cls.kind)
        signed = Signed.parse(body)
        return caller, verify_message(signed, cls, caller), signed

    def _signed_response(self, message: Message, status: int = 200) -> web.Response:
        text = sign_message(self._keypair, message).model_dump_json()
        return web.Response(text=text, status=status, content_type="application/json")

    def _sign_refusal(self, request: web.BaseRequest, status: int, body: str) -> dict[str, str]:
        return sign_refusal(self._keypair, request.headers, status, body) if request.get(PROVEN) else {}

    # --- bulk ---------------------------------------------------------------------------------------------------------

    async def _receive_body(self, request: web.BaseRequest, write: Callable[[bytes], object]) -> None:
        """The request's body, as it arrives, to `write` in a thread; a sender that waits is told to go on."""
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # the answer has not begun
        try:
            await stream_body(request.content, write, self._limits)
        except TimeoutError:
            raise Refused(408, f"fewer than {self._limits.min_rate:g} bytes a second") from None

    async def _send_body(
        self,
        request: web.BaseRequest,
        data: memoryview,
        passed: Callable[[int], object] = lambda size: None,
    ) -> tuple[web.StreamResponse, bool]:
        """Sends all of it; False where the caller was too slow and has been cut off. `passed` counts the bytes."""
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        response.content_length = len(data)
        await response.prepare(request)
        try:
            async with MinimumRate(self._limits) as pace:
                for begin in range(0, len(data), CHUNK):
                    piece = data[begin : begin + CHUNK]
                    await response.write(piece)
                    pace.passed(CHUNK)
                    passed(len(piece))
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            return response, False
        return response, True


class Transfers:
    """One transfer of a thing at a time: a newer request ends the older one, whose connection may be dead."""

    def __init__(self) -> None:
        self._under_way: dict[str, asyncio.Task[object]] = {}

    @asynccontextmanager
    async def take_over(self, thing: str) -> AsyncIterator[None]:
        await self.end(thing)
        task = asyncio.current_task()
        assert task is not None
        self._under_way[thing] = task
        try:
            yield
        finally:
            del self._under_way[thing]

    async def end(self, thing: str) -> None:
        while (older := self._under_way.get(thing)) is not None:
            older.cancel()
            await asyncio.wait({older})


def check_length(request: web.BaseRequest, left: int, whats: str) -> None:
    """Raises Refused where the body is not announced to be the bytes that are left. The length is not signed."""
    request[PROVEN] = request.content_length == left
    if request.content_length is None:
        raise Refused(411, f"a {whats} needs a Content-Length", Fault.MALFORMED)
    if request.content_length != left:
        status = 413 if request.content_length > left else 400
        raise Refused(status, f"{request.content_length} bytes announced, {left} signed", Fault.MALFORMED)


async def read_body(request: web.BaseRequest, largest: int, timeout_s: float) -> bytes:
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


def query(request: web.BaseRequest, *names: str) -> tuple[str, ...]:
    """The values of exactly these parameters, each there once."""
    if sorted(name for name, _ in request.query.items()) != sorted(names):
        raise Refused(400, f"query: {', '.join(names)} expected, each once", Fault.MALFORMED)
    return tuple(request.query[name] for name in names)


def hex_digits(name: str, text: str, count: int = 64) -> Digest:
    if not re.fullmatch(rf"[0-9a-f]{{{count}}}", text):
        raise Refused(400, f"{name}: {count} hex digits expected", Fault.MALFORMED)
    return text


def whole_number(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise Refused(400, f"{name}: a whole number expected", Fault.MALFORMED)
    return int(text)
