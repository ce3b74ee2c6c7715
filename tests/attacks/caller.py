"""Sends whatever it likes to an axon of MINER, after which an honest exchange must still work."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from pilot.common.limits import Limits
from pilot.transport.auth import Keypair, sign_message, sign_request
from pilot.transport.server.axon import Axon
from protocol import Refusal, digest
from tests.echo import MINER, VALIDATOR, Echo, honest_exchange, make_order, open_guard, serving

ORDER = make_order()
BODY = sign_message(VALIDATOR, ORDER).model_dump_json().encode()
ORDER_DIGEST = sign_message(VALIDATOR, ORDER).digest
Headers = dict[str, str]


class Caller:
    """To the axon at `port`."""

    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self.session, self.port = session, port

    async def send(
        self, method: str, target: str, headers: Headers | None = None, body: bytes | None = None
    ) -> tuple[int, Refusal]:
        url = URL(f"http://127.0.0.1:{self.port}{target}", encoded=True)
        async with self.session.request(method, url, headers=headers, data=body and io.BytesIO(body)) as response:
            text = await response.read()
            return response.status, Refusal.parse(text) if response.status >= 400 else Refusal(reason="")

    async def order(self, body: bytes = BODY, signer: Keypair = VALIDATOR) -> tuple[int, Refusal]:
        """A correctly signed request with this body."""
        return await self.send("POST", "/v1/order", signed("POST", "/v1/order", body, signer), body)

    async def raw(self, request: bytes) -> bytes:
        """The answer's first line, empty where there is none; the connection is closed by us afterwards."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            await writer.drain()
            return await asyncio.wait_for(reader.readline(), 5)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async def whole(self, request: bytes) -> bytes:
        """All that comes back until the axon closes the connection, or says nothing for a second."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        answer = b""
        try:
            writer.write(request)
            await writer.drain()
            while piece := await asyncio.wait_for(reader.read(1 << 16), 1 if answer else 5):
                answer += piece
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.close()
        return answer


def signed(method: str, target: str, body: bytes = b"", signer: Keypair = VALIDATOR, offset_s: float = 0) -> Headers:
    return sign_request(signer, method, target, MINER.ss58_address, body, int(offset_s * 1e9))


def head(method: str, target: str, *lines: str, body: bytes = b"") -> bytes:
    """The head of a signed request."""
    headers = [f"{k}: {v}" for k, v in signed(method, target, body).items()]
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: x", *headers, *lines, "", ""]).encode()


def blob_target(data: bytes, size: int | str | None = None, offset: int | str = 0) -> str:
    return f"/v1/blob?kind=state&digest={digest('state', data)}&bytes={size or len(data)}&offset={offset}"


def attack(tmp_path: Path, play: Callable[[Caller, Axon, Echo], Awaitable[None]], limits: Limits | None = None) -> Axon:
    """Plays it against an axon of MINER; afterwards an honest exchange must work. Returns the axon, for its counts."""

    async def main() -> Axon:
        axon = Axon(miner := Echo(), MINER, open_guard(), "127.0.0.1", 0, limits)
        async with serving(axon) as port, aiohttp.ClientSession() as session:
            await play(Caller(session, port), axon, miner)
            await honest_exchange(port, tmp_path)
        return axon

    return asyncio.run(main())


def refuses(tmp_path: Path, status: int, send: Callable[[Caller], Awaitable[tuple[int, Refusal]]]) -> Refusal:
    """One request, refused with `status`, counted, and without effect."""
    refusals: list[Refusal] = []

    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        got, refusal = await send(caller)
        assert (got, dict(axon.refused)) == (status, {status: 1})
        assert refusal.reason
        assert "Traceback" not in refusal.reason
        assert not miner.orders
        assert not miner.blobs
        assert not miner.receipts
        refusals.append(refusal)

    attack(tmp_path, play)
    return refusals[0]


class Apart:
    """An axon of MINER in a process of its own, which the test can measure."""

    def __init__(self, strangers_per_s: float = 500.0) -> None:
        """Strangers wait less for each other than by default, for quick tests."""
        self._strangers_per_s = strangers_per_s

    def __enter__(self) -> Self:
        root = Path(__file__).resolve().parent.parent.parent
        environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}
        command = [sys.executable, "-m", "tests.attacks.caller", str(self._strangers_per_s)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=environment
        )
        self.port = int(self._line())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def refused(self) -> dict[str, int]:
        """Requests by status."""
        assert self._process.stdin is not None
        self._process.stdin.write("refused\n")
        self._process.stdin.flush()
        counts: dict[str, int] = json.loads(self._line())
        return counts

    @property
    def sockets(self) -> int:
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    @property
    def resident_mb(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) >> 10

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the axon's process has ended"
        return line


async def serve_apart() -> None:
    limits = replace(Limits(), strangers_per_s=float(sys.argv[1]))
    async with serving(axon := Axon(Echo(), MINER, open_guard(), "127.0.0.1", 0, limits)) as port:
        print(port, flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(axon.refused), flush=True)


if __name__ == "__main__":
    asyncio.run(serve_apart())
