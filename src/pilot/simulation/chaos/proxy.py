"""Relay connections between two programs of this machine, and delay, stall, cut or reset them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

PIECE = 1 << 16
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST and forgets what has not left


class Proxy:
    """Relays connections to a port; it cuts each after `cut_after` bytes in all, at `bytes_per_s` per direction."""

    def __init__(self, port: int) -> None:
        self.port = port  # port of the server behind it
        self.cut_after: int | None = None
        self.bytes_per_s: float | None = None
        self.latency_s = 0.0  # per direction
        self.open = asyncio.Event()  # while it is cleared, nothing passes and no connection closes
        self.open.set()
        self.cuts = 0
        self._connections: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, ...]] = {}
        self.down = self.up = 0  # bytes relayed to the server, and back

    def hang_up(self) -> None:
        """Close every connection."""
        for task in list(self._connections):
            task.cancel()

    def reset(self) -> None:
        """Reset every connection, as a crashed router does: both ends get RST, and lose the bytes in flight."""
        for task, ends in list(self._connections.items()):
            for end in ends:
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                end.transport.abort()
            task.cancel()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.close()
            return
        left = [self.cut_after]
        directions = [
            asyncio.create_task(self._relay(reader, server_writer, left, down=True)),
            asyncio.create_task(self._relay(server_reader, writer, left, down=False)),
        ]
        self._connections.update(dict.fromkeys(directions, (writer, server_writer)))
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        for task in directions:
            task.cancel()
            self._connections.pop(task, None)
        for end in (writer, server_writer):
            end.close()

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: list[int | None], down: bool
    ) -> None:
        while True:
            rate = self.bytes_per_s
            try:
                piece = await reader.read(PIECE if rate is None else max(1, int(rate / 10)))
            except ConnectionError:
                return
            if not piece:
                return
            if left[0] is not None:
                piece = piece[: left[0]]
                left[0] -= len(piece)
            if delay := self.latency_s + (0.0 if rate is None else len(piece) / rate):
                await asyncio.sleep(delay)
            await self.open.wait()
            writer.write(piece)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            if down:
                self.down += len(piece)
            else:
                self.up += len(piece)
            if left[0] == 0:
                self.cuts += 1
                return


@asynccontextmanager
async def proxy_to(port: int) -> AsyncIterator[tuple[Proxy, int]]:
    """Start a proxy to a port of this machine; yield it and its own port."""
    proxy = Proxy(port)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    try:
        yield proxy, server.sockets[0].getsockname()[1]
    finally:
        server.close()
        proxy.hang_up()
