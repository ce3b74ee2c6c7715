"""Signed requests to a peer over HTTP: its endpoint, its clock, what of it may be repeated."""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from typing_extensions import Buffer
from yarl import URL

from pilot.common.addresses import is_loopback
from pilot.common.limits import Limits
from pilot.interfaces import Refused
from pilot.transport.auth import Keypair, is_hotkey, refusal_holds, sign_request, verify_message
from pilot.transport.client.remote_miner import Lost, MinerChannel, Unproven
from pilot.transport.streaming import CHUNK, SMALL, MinimumRate, stream_body
from protocol import BlobRef, Digest, Fault, Hello, Hotkey, ProtocolError, Refusal, Signed, new_nonce

MOST_OFF_S = 7200  # between two clocks: beyond that, one of them is to be set right


@dataclass(frozen=True)
class Endpoint:
    """Where a peer listens; its hotkey where the command line, or its announcement, says so."""

    host: str  # an IPv6 address in brackets
    port: int
    hotkey: Hotkey | None = None
    tls: bool = False

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host.strip("[]"))


def parse_endpoint(text: str, tls: bool = False, flag: str = "axons", whose: str = "miner") -> Endpoint:
    """What --axons takes: 8091 (on this machine), host:8091, or host:8091@ss58, which is needed off loopback.

    Raises ValueError that names the flag.
    """
    address, at, hotkey = text.partition("@")
    host, colon, port = address.rpartition(":")
    host = host if colon else "127.0.0.1"
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError(f"--{flag} {text}: {port!r} is no port; write 8091 or host:8091, ports are 1 to 65535")
    if not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", host):
        raise ValueError(f"--{flag} {text}: {host!r} is no host; write host:8091, or [address]:8091 for IPv6")
    if at and not is_hotkey(hotkey):
        raise ValueError(f"--{flag} {text}: {hotkey!r} is no ss58 address; the {whose} prints its own when it starts")
    endpoint = Endpoint(host, int(port), hotkey if at else None, tls)
    if not at and not endpoint.is_loopback:
        raise ValueError(f"--{flag} {text}: not on this machine; write {endpoint}@<the {whose}'s ss58 address>")
    return endpoint


class Peer(MinerChannel):
    """Requests to one peer. Connection failures become Lost, error responses that the peer has signed Refused.

    For its validator it is a miner; a miner calls its validator by one too.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        hotkey: Hotkey | None,
        keypair: Keypair,
        session: aiohttp.ClientSession,
        limits: Limits,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(str(endpoint), hotkey)
        self.endpoint = endpoint
        self._clock_offset_ns = 0
        self._keypair, self._session, self._limits = keypair, session, limits
        self._tls: ssl.SSLContext | bool = tls or True
        self._base = f"http{'s' if endpoint.tls else ''}://{endpoint}"

    async def deliver(self, signed: Signed) -> bool:
        body = signed.model_dump_json().encode()
        for _ in range(2):  # an idle connection may have been closed under us
            try:
                await self.call("POST", f"/v1/{signed.kind}", "status", body=body)
                return True
            except Lost:
                continue
            except (Refused, ProtocolError):
                return False
        return False

    async def post_order(self, signed: Signed) -> bytes:
        _, text = await self.call("POST", "/v1/order", "status", body=signed.model_dump_json().encode())
        return text

    async def put_blob(self, ref: BlobRef, rest: memoryview, passed: Callable[[int], object]) -> bytes:
        offset, began = ref.bytes - len(rest), time.monotonic()
        target = f"/v1/blob?kind={ref.kind}&digest={ref.digest}&bytes={ref.bytes}&offset={offset}"
        _, text = await self.call("PUT", target, "status", blob=rest, passed=passed)
        self.down.add(len(rest), time.monotonic() - began)
        return text

    async def poll_reply(self, signed: Signed) -> tuple[int, bytes]:
        wait_s = self._limits.poll_s
        target = f"/v1/reply?order={signed.digest}&wait={max(1, round(wait_s))}"
        return await self.call("GET", target, "reply", wait_s=wait_s)

    async def read_payload(self, order: Digest, offset: int, size: int, write: Callable[[bytes], object]) -> None:
        began, left = time.monotonic(), size - offset
        try:
            async with self.open("GET", f"/v1/payload?order={order}&offset={offset}") as response:
                if response.content_length != left:
                    raise Lost(f"payload: {response.content_length} bytes, {left} of those signed are left")
                await stream_body(response.content, write, self._limits)
        except TimeoutError:
            raise Lost(f"{self.endpoint}: fewer than {self._limits.min_rate:g} bytes a second") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise Lost(f"{self.endpoint}: {str(error) or type(error).__name__}") from error
        self.up.add(left, time.monotonic() - began)

    async def hello(self) -> Hello:
        """Return the answer to an unsigned hello with a new nonce, signed by the hotkey that it names.

        Raises Lost, Refused, ProtocolError.
        """
        began, nonce = time.monotonic(), new_nonce()
        response = await self._send("GET", f"/v1/hello?nonce={nonce}", {}, b"", self._limits.message_s)
        try:
            if response.status != 200:
                raise await self._refused(response, None)
            signed = Signed.parse(await self._whole(response, self._limits.body("hello")))
        finally:
            response.release()
        self.latency_s = time.monotonic() - began
        hello = verify_message(signed, Hello, signed.signer)
        if hello.nonce != nonce or hello.hotkey != signed.signer:
            raise ProtocolError("its hello is not an answer to ours", Fault.FORGED)
        return hello

    async def _correct_clock(self) -> None:
        """Sign by the peer's clock from now on, as its hello tells it. Raises Lost, and Refused for hello.

        A refusal tells the time too, but is unsigned: with a time of its own, whoever is between us and the peer would
        get requests that are good later on. Nor is what it does to a hello the peer's fault.
        """
        try:
            hello = await self.hello()
        except ProtocolError as error:
            raise Lost(f"{self.endpoint}: {error}") from error
        if hello.hotkey != self.hotkey:
            raise Lost(f"{self.endpoint}: answers as {hello.hotkey}, not {self.hotkey}")
        offset_ns = hello.time_ns - time.time_ns()
        if abs(offset_ns) > MOST_OFF_S * 10**9:
            raise Unproven(f"its clock is {offset_ns / 1e9:+.0f} s from ours: set the one right that is wrong")
        self._clock_offset_ns = offset_ns

    async def call(
        self,
        method: str,
        target: str,
        answer: str,
        *,
        body: bytes = b"",
        blob: Buffer | None = None,
        wait_s: float = 0,
        passed: Callable[[int], object] = lambda size: None,
    ) -> tuple[int, bytes]:
        """A signed request with a message's body, or with a blob streamed from its buffer: (200 or 202, the answer).

        `answer` is its kind, and bounds its length; the peer may keep us waiting for `wait_s`. `passed` counts the
        blob's bytes. Raises Lost, Refused.
        """
        began = time.monotonic()
        async with self.open(method, target, body=body, blob=blob, wait_s=wait_s, passed=passed) as response:
            text = await self._whole(response, self._limits.body(answer))
        if blob is None and not wait_s:
            self.latency_s = time.monotonic() - began
        return response.status, text

    @asynccontextmanager
    async def open(
        self,
        method: str,
        target: str,
        *,
        body: bytes = b"",
        blob: Buffer | None = None,
        wait_s: float = 0,
        passed: Callable[[int], object] = lambda size: None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The same, with the answer still to be read. A wrong clock is corrected, once a request."""
        for last in (False, True):
            data = body if blob is None else memoryview(blob).cast("B")
            headers = self._sign(method, target, body)
            response = await self._send(method, target, headers, data, self._limits.message_s + wait_s, passed)
            try:
                if response.status in (200, 202):
                    yield response
                    return
                raise await self._refused(response, headers)
            except Unproven:
                if response.status != 401 or last:
                    raise
            finally:
                response.release()
            await self._correct_clock()

    def _sign(self, method: str, target: str, body: bytes) -> dict[str, str]:
        if self.hotkey is None:
            raise RuntimeError(f"{self.endpoint}: a signed request before hello has told the receiver's hotkey")
        return sign_request(self._keypair, method, target, self.hotkey, body, self._clock_offset_ns)

    async def _send(
        self,
        method: str,
        target: str,
        headers: dict[str, str],
        data: bytes | memoryview,
        answer_s: float,
        passed: Callable[[int], object] = lambda size: None,
    ) -> aiohttp.ClientResponse:
        """Send a request and return the answer's head, which must come `answer_s` after the last byte. Raises Lost."""
        if data or isinstance(data, memoryview):
            headers = {**headers, "Content-Length": str(len(data)), "Content-Type": "application/octet-stream"}
        if isinstance(data, memoryview) and len(data) <= SMALL:
            passed(len(data))
            data = bytes(data)  # is there before a 100 Continue would be
        try:
            async with MinimumRate(self._limits, self._limits.connect_s + answer_s) as pace:
                self.bytes_down += 0 if isinstance(data, memoryview) else len(data)
                return await self._session.request(
                    method,
                    URL(self._base + target, encoded=True),  # the very bytes that are signed
                    data=self._pieces(data, pace, answer_s, passed) if isinstance(data, memoryview) else data or None,
                    headers=headers,
                    allow_redirects=False,
                    expect100=isinstance(data, memoryview),  # a refusal comes before the first byte has left
                    ssl=self._tls,
                )
        except TimeoutError:
            raise Lost(f"{self.endpoint}: no answer, or slower than {self._limits.min_rate:g} bytes a second") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._lost(error) from error

    async def _pieces(
        self, data: memoryview, pace: MinimumRate, answer_s: float, passed: Callable[[int], object]
    ) -> AsyncIterator[memoryview]:
        pace.restart()
        for start in range(0, len(data), CHUNK):
            piece = data[start : start + CHUNK]
            yield piece
            self.bytes_down += len(piece)
            passed(len(piece))
            pace.passed(len(piece))
        pace.restart(answer_s)

    async def _whole(self, response: aiohttp.ClientResponse, largest: int) -> bytes:
        """Read an answer's body. Raises Lost."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.message_s):
                while piece := await response.content.readany():
                    body += piece
                    self.bytes_up += len(piece)
                    if len(body) > largest:
                        raise Unproven(f"{self.endpoint}: an answer of more than {largest} bytes")
        except TimeoutError:
            raise Lost(f"{self.endpoint}: its answer did not end in {self._limits.message_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._lost(error) from error
        return bytes(body)

    async def _refused(self, response: aiohttp.ClientResponse, request: dict[str, str] | None) -> RefusedAt:
        """Read an error response to a request with these signed headers, or to hello.

        Raises Lost for what may pass in a moment: slowness, failures inside, and what the peer has not signed.
        """
        status, body = response.status, await self._whole(response, self._limits.body("refusal"))
        if status in (408, 429) or (status >= 500 and status != 507):  # 507: a full disk
            raise Lost(f"{self.endpoint}: HTTP {status}")
        try:
            text = body.decode()
            refusal = Refusal.parse(text)
        except ValueError as error:  # a ProtocolError is one
            raise Unproven(f"{self.endpoint}: HTTP {status} without a reason: {error}") from None
        if request and not refusal_holds(response.headers, self.hotkey or "", request, status, text):
            raise Unproven(f"refused with {status}, unsigned: {refusal.reason}")
        return RefusedAt(status, refusal)

    def _lost(self, error: Exception) -> Lost:
        hint, cause = "", error.__cause__
        if isinstance(cause, ssl.SSLCertVerificationError):
            hint = f"--tls-ca does not make its certificate trusted: {cause.verify_message}"
        elif isinstance(cause, ssl.SSLError):
            hint = f"no TLS that we could speak ({cause.reason}); one that serves without TLS needs no --tls-ca"
        elif isinstance(error, aiohttp.ServerDisconnectedError) and not self.endpoint.tls:
            hint = "hangs up without an answer; one that serves TLS needs --tls-ca here"
        return Lost(f"{self.endpoint}: {str(error) or type(error).__name__}", hint)


class RefusedAt(Refused):
    """A refusal as received."""

    def __init__(self, status: int, refusal: Refusal) -> None:
        super().__init__(status, refusal.reason, refusal.fault, refusal.missing, refusal.held)


def open_session(limits: Limits) -> aiohttp.ClientSession:
    """No proxies, cookies, compression or limits but one on connections to a single peer."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=0, limit_per_host=limits.requests_per_peer, keepalive_timeout=limits.header_s / 2
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept-Encoding": "identity"},
        auto_decompress=False,
        max_line_size=limits.header_bytes,
        max_field_size=limits.header_bytes,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=limits.connect_s),
        trust_env=False,
    )
