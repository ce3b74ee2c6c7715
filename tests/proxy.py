"""A bad line between a validator and a miner: a relay on loopback that cuts connections, slows down, counts bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

PIECE = 1 << 16


class Line:
    """Each new connection lives for `cut_after` bytes, counted both ways; `bytes_per_s` holds for each direction."""

    def __init__(self, port: int) -> None:
        self.port = port  # of the miner
        self.cut_after: int | None = None
        self.bytes_per_s: float | None = None
        self.cuts = 0
        self._open: set[asyncio.Task[None]] = set()
        self.down = self.up = 0  # bytes that passed: validator to miner, and back

    def hang_up(self) -> None:
        """Ends every connection."""
        for task in self._open:
            task.cancel()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.close()
            return
        left = [self.cut_after]
        directions = [
            asyncio.create_task(self._relay(reader, far_writer, left, down=True)),
            asyncio.create_task(self._relay(far_reader, writer, left, down=False)),
        ]
        self._open.update(directions)
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        for task in directions:
            task.cancel()
            self._open.discard(task)
        for end in (writer, far_writer):
            end.close()

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: list[int | None], down: bool
    ) -> None:
        while True:
            rate = self.bytes_per_s
            piece = await reader.read(PIECE if rate is None else max(1, int(rate / 10)))
            if not piece:
                return
            if left[0] is not None:
                piece = piece[: left[0]]
                left[0] -= len(piece)
            if rate is not None:
                await asyncio.sleep(len(piece) / rate)
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
async def line_to(port: int) -> AsyncIterator[tuple[Line, int]]:
    """The line, and the port at its near end."""
    line = Line(port)
    server = await asyncio.start_server(line.serve, "127.0.0.1", 0)
    try:
        yield line, server.sockets[0].getsockname()[1]
    finally:
        server.close()
