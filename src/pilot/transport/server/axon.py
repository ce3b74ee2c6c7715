"""A miner's HTTP server: checks callers and bodies, hands typed messages to a `MinerService`, signs its answers.

Hello and status are open; everything else is signed by the caller and passes the guard (`pilot.transport.server.base`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable
from typing import TypeVar

from aiohttp import web
from pydantic import ValidationError

from pilot.common.limits import Limits
from pilot.interfaces import MinerService, Refused
from pilot.transport.auth import Guard, Keypair
from pilot.transport.server.base import Server, Transfers, check_length, hex_digits, query, whole_number
from pilot.transport.server.health import health_response
from pilot.transport.streaming import to_the_end
from protocol import BlobRef, Fault, Hotkey, Order, ProtocolError, Receipt, Signed, Stop

M = TypeVar("M", Order, Stop, Receipt)


class Axon(Server):
    """Serves `service` on host:port, with TLS where there is a context for it."""

    DISK_FULL = "this miner's disk is full; delete old files, in its --cache for example"

    def __init__(
        self,
        service: MinerService,
        keypair: Keypair,
        guard: Guard,
        host: str,
        port: int,
        limits: Limits | None = None,
        tls: ssl.SSLContext | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._service = service
        self._blobs = Transfers()
        routes = {
            "/v1/hello": ("GET", self._hello),
            "/v1/status": ("GET", self._status),
            "/v1/order": ("POST", self._order),
            "/v1/blob": ("PUT", self._blob),
            "/v1/reply": ("GET", self._reply),
            "/v1/payload": ("GET", self._payload),
            "/v1/stop": ("POST", self._stop),
            "/v1/receipt": ("POST", self._receipt),
        }
        super().__init__(keypair, guard, host, port, limits, routes, flag="axon", tls=tls, clock_ns=clock_ns)

    # --- open to all --------------------------------------------------------------------------------------------------

    async def _hello(self, request: web.BaseRequest) -> web.StreamResponse:
        (nonce,) = query(request, "nonce")
        hex_digits("nonce", nonce, 32)
        hello = self._service.hello(nonce)
        return self._signed_response(hello.model_copy(update={"time_ns": self._verifier.clock_ns()}))

    async def _status(self, request: web.BaseRequest) -> web.StreamResponse:
        return health_response(self._service.health())

    # --- signed -------------------------------------------------------------------------------------------------------

    async def _order(self, request: web.BaseRequest) -> web.StreamResponse:
        caller, order, signed = await self._addressed(request, Order)
        return self._signed_response(self._service.accept_order(caller, order, signed.digest))

    async def _stop(self, request: web.BaseRequest) -> web.StreamResponse:
        caller, stop, _ = await self._addressed(request, Stop)
        return self._signed_response(self._service.stop_order(caller, stop))

    async def _receipt(self, request: web.BaseRequest) -> web.StreamResponse:
        caller, receipt, signed = await self._addressed(request, Receipt)
        return self._signed_response(await asyncio.to_thread(self._service.accept_receipt, caller, receipt, signed))

    async def _addressed(self, request: web.BaseRequest, cls: type[M]) -> tuple[Hotkey, M, Signed]:
        """The caller and its message, which is for this miner."""
        caller, message, signed = await self._envelope(request, cls)
        if message.hotkey != self._service.hotkey:
            raise Refused(403, f"{cls.kind}: for {message.hotkey}, this is {self._service.hotkey}")
        return caller, message, signed

    async def _reply(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request, b"")
        order, wait = query(request, "order", "wait")
        wait_s = min(whole_number("wait", wait), self._limits.poll_s)
        reply = await self._service.wait_for_reply(caller, hex_digits("order", order), wait_s)
        return (
            self._signed_response(self._service.status(), status=202) if reply is None else self._signed_response(reply)
        )

    async def _payload(self, request: web.BaseRequest) -> web.StreamResponse:
        """The payload from `offset` on, from the one buffer that it is in."""
        caller = self._caller(request, b"")
        order, offset = query(request, "order", "offset")
        digest, start = hex_digits("order", order), whole_number("offset", offset)
        data = memoryview(self._service.read_payload(caller, digest)).cast("B")
        if start > len(data):
            raise Refused(416, f"offset {start}: the payload has {len(data)} bytes", Fault.MALFORMED)

        def passed(size: int) -> None:
            with contextlib.suppress(Refused):  # what was dropped meanwhile is sent to its end
                self._service.read_payload(caller, digest)  # tells the service that its validator is still there

        response, all_sent = await self._send_body(request, data[start:], passed)
        if all_sent:
            self._service.mark_delivered(caller, digest)
        return response

    async def _blob(self, request: web.BaseRequest) -> web.StreamResponse:
        """The blob's bytes go to the service's writer as they arrive, in a thread."""
        caller = self._caller(request, b"")
        ref, offset = _blob_ref(request)
        largest = self._limits.blob(ref.kind)
        if ref.bytes > largest:
            raise Refused(413, f"a {ref.kind} of {ref.bytes} bytes; this miner takes {largest}", Fault.MALFORMED)
        check_length(request, ref.bytes - offset, "blob")
        async with self._blobs.take_over(f"{caller} {ref.digest}"):  # not another validator's upload
            writer = self._service.open_blob(caller, ref, offset)
            try:
                try:
                    await self._receive_body(request, writer.write)
                finally:
                    if writer.held == ref.bytes:  # also where the sender has gone: what is whole nobody sends again
                        await to_the_end(writer.commit)
            except ProtocolError as error:  # damaged on the way: a body is not signed
                raise Refused(409, str(error), missing=[ref], held={ref.digest: writer.held}) from None
        return self._signed_response(self._service.status())


def _blob_ref(request: web.BaseRequest) -> tuple[BlobRef, int]:
    """The blob and the offset from which it comes, which leaves at least one byte."""
    kind, digest, size, offset = query(request, "kind", "digest", "bytes", "offset")
    length, start = whole_number("bytes", size), whole_number("offset", offset)
    if start >= length:
        raise Refused(416, f"offset {start} of {length} bytes", Fault.MALFORMED)
    try:
        return BlobRef.model_validate({"kind": kind, "digest": digest, "bytes": length}), start
    except ValidationError as error:
        raise Refused(400, f"blob: {error.errors()[0]['loc'][0]}: not valid", Fault.MALFORMED) from None
