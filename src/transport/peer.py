"""One miner as the validator sees it over HTTP: its endpoint, signed requests to it, and its clock."""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from typing_extensions import Buffer
from yarl import URL

from protocol import MAX_MESSAGE_BYTES, Hotkey, ProtocolError, Refusal, Refused
from transport.auth import Keypair, is_bittensor_address, sign_request

CHUNK = 1 << 20
READ_BUFFER = 4 << 20


class Lost(Exception):
    """The connection failed, or the peer failed inside: the same request may work in a moment."""


@dataclass(frozen=True)
class Endpoint:
    """Where a miner listens; its hotkey where the command line says so."""

    host: str  # an IPv6 address in brackets
    port: int
    hotkey: Hotkey | None = None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:  # a name
            return False


def parse_endpoint(text: str) -> Endpoint:
    """What --axons takes: 8091 (on this machine), host:8091, or host:8091@ss58, which is needed off loopback.

    Raises ValueError.
    """
    address, at, hotkey = text.partition("@")
    host, colon, port = address.rpartition(":")
    host = host if colon else "127.0.0.1"
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError(f"--axons {text}: {port!r} is no port; write 8091 or host:8091, ports are 1 to 65535")
    if not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", host):
        raise ValueError(f"--axons {text}: {host!r} is no host; write host:8091, or [address]:8091 for IPv6")
    if at and not is_bittensor_address(hotkey):
        raise ValueError(f"--axons {text}: {hotkey!r} is no ss58 address; the miner prints its own when it starts")
    endpoint = Endpoint(host, int(port), hotkey if at else None)
    if not at and not endpoint.is_loopback:
        raise ValueError(f"--axons {text}: not on this machine; write {endpoint}@<the miner's ss58 address>")
    return endpoint


class Peer:
    """Requests to one miner. Connection failures become Lost, error statuses Refused."""

    def __init__(self, endpoint: Endpoint, hotkey: Hotkey | None, keypair: Keypair, session: aiohttp.ClientSession):
        self.endpoint = endpoint
        self.hotkey = hotkey  # None until the first hello
        self.reachable = False  # answered hello, and not lost since
        self.complaint = ""  # what was last said about it, so that it is said once
        self._clock_offset_ns = 0
        self._keypair = keypair
        self._session = session

    async def hello(self, nonce: str, timeout_s: float) -> bytes:
        """The answer to an unsigned hello. Raises Lost, Refused, ProtocolError."""
        response = await self._send("GET", f"/v1/hello?nonce={nonce}", {}, None, timeout_s)
        try:
            if response.status != 200:
                raise await _refused(response)
            return await _whole(response)
        finally:
            response.release()

    async def call(
        self, method: str, target: str, timeout_s: float | None, *, body: bytes = b"", blob: Buffer | None = None
    ) -> tuple[int, bytes]:
        """A signed request with a message's body, or with a blob streamed from its buffer: (200 or 202, the answer).

        Raises Lost, Refused, ProtocolError.
        """
        async with self.open(method, target, timeout_s, body=body, blob=blob) as response:
            return response.status, await _whole(response)

    @asynccontextmanager
    async def open(
        self, method: str, target: str, timeout_s: float | None, *, body: bytes = b"", blob: Buffer | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The same, with the answer still to be read by `receive`. A wrong clock is corrected, once a request."""
        for last in (False, True):
            data = body if blob is None else memoryview(blob).cast("B")
            response = await self._send(method, target, self._sign(method, target, body), data, timeout_s)
            try:
                if response.status in (200, 202):
                    yield response
                    return
                refused = await _refused(response)
            finally:
                response.release()
            if response.status != 401 or last or not refused.time_ns:
                raise refused
            self._clock_offset_ns = refused.time_ns - time.time_ns()

    def _sign(self, method: str, target: str, body: bytes) -> dict[str, str]:
        if self.hotkey is None:
            raise RuntimeError(f"{self.endpoint}: a signed request before hello has told the receiver's hotkey")
        return sign_request(self._keypair, method, target, self.hotkey, body, self._clock_offset_ns)

    async def _send(
        self,
        method: str,
        target: str,
        headers: dict[str, str],
        data: bytes | memoryview | None,
        timeout_s: float | None,
    ) -> aiohttp.ClientResponse:
        stream = _pieces(data) if isinstance(data, memoryview) else (data or None)
        if data:
            headers = {**headers, "Content-Length": str(len(data)), "Content-Type": "application/octet-stream"}
        try:
            return await self._session.request(
                method,
                URL(f"http://{self.endpoint}{target}", encoded=True),  # the very bytes that are signed
                data=stream,
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=5),
            )
        except (aiohttp.ClientError, OSError) as error:
            raise _lost(self.endpoint, error) from error


class RefusedAt(Refused):
    """A refusal as received: `time_ns` is the refusing server's clock, 0 if it told none."""

    def __init__(self, status: int, refusal: Refusal) -> None:
        super().__init__(status, refusal.reason, refusal.fault, refusal.missing)
        self.time_ns = refusal.time_ns


async def receive(response: aiohttp.ClientResponse) -> bytes:
    """The body's next piece, empty at its end. Raises Lost."""
    try:
        return await response.content.readany()
    except (aiohttp.ClientError, OSError) as error:
        raise _lost(str(response.url.authority), error) from error


def open_session() -> aiohttp.ClientSession:
    """No proxies, cookies, compression or limits but one on connections to a single miner."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, limit_per_host=4),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept-Encoding": "identity"},
        auto_decompress=False,
        read_bufsize=READ_BUFFER,
        trust_env=False,
    )


async def _pieces(data: memoryview) -> AsyncIterator[memoryview]:
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    while piece := await receive(response):
        body += piece
        if len(body) > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"an answer of more than {MAX_MESSAGE_BYTES} bytes")
    return bytes(body)


async def _refused(response: aiohttp.ClientResponse) -> RefusedAt:
    """What an error response says. Raises Lost for a failure inside the server."""
    body = await _whole(response)
    if response.status >= 500:
        raise Lost(f"{response.url.authority}: HTTP {response.status}")
    return RefusedAt(response.status, Refusal.parse(body))


def _lost(where: Endpoint | str, error: Exception) -> Lost:
    return Lost(f"{where}: {str(error) or type(error).__name__}")
