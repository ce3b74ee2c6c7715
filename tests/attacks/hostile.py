"""A real miner in this process, and validators that send it whatever orders they like over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import torch
from typing_extensions import Buffer
from yarl import URL

from pilot.app import cli
from pilot.app.build_miner import Miner, build_miner
from pilot.app.miner_flags import MinerConfig
from pilot.codec import load_codec
from pilot.display.console import MinerConsole
from pilot.transport.auth import Keypair, sign_message, sign_request
from pilot.transport.client.peer import parse_endpoint
from pilot.worker.worker import Worker
from protocol import BlobRef, DataSpec, Digest, Order, Range, Refusal, Stop, TaskSpec, digest
from tests.tiny import MINERS, VALIDATOR
from tests.updates import whole_state

RIVAL = MINERS[7]
SHAPE: dict[str, Any] = {
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 8,
    "n_inner": 8,
    "n_positions": 16,
    "vocab_size": 256,
    "activation_function": "relu",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "tie_word_embeddings": True,
    "seq_len": 8,
    "batch_size": 1,
    "eval_sequences": 1,
    "seed": 0,
}
SAMPLES = 8
QUADRATIC: dict[str, Any] = {"dimension": 16, "batch_size": 4, "condition": 10.0, "noise": 0.1, "seed": 0}


def token_file(fill: int = 7, count: int = SAMPLES * 16) -> bytes:
    """Return a token file with samples of the quadratic task, all alike."""
    from tasks.data.tokens import HEADER, MAGIC

    return HEADER.pack(MAGIC, 1, 0, count, 0) + bytes([fill]) * count


class Rogue:
    """A validator at a miner's axon. `state` and `data` are its blobs; any of them can be left unsent."""

    def __init__(self, session: aiohttp.ClientSession, miner: Miner, port: int, keypair: Keypair = VALIDATOR) -> None:
        self.session, self.miner, self.port, self.keypair = session, miner, port, keypair
        self.blobs: dict[Digest, Buffer] = {}
        self.rounds = 0

    @property
    def worker(self) -> Worker:
        return self.miner.worker

    def order(self, tokens: bytes | None = None, **changes: Any) -> Order:
        """Return an order for the quadratic task that an honest validator could give, with some fields changed."""
        state = load_codec("fp32").encode({"x": torch.zeros(16)})
        ref = BlobRef(kind="state", digest=digest("state", state), bytes=len(memoryview(state)))
        tokens = token_file() if tokens is None else tokens
        blob = BlobRef(kind="data", digest=digest("data", tokens), bytes=len(tokens))
        self.blobs |= {ref.digest: state, blob.digest: tokens}
        update = changes.get("update", whole_state(ref))
        self.rounds += 1
        fields: dict[str, Any] = {
            "run": "rogue",
            "round": self.rounds,
            "hotkey": self.worker.hotkey,
            "version": update.version,
            "update": update,
            "state_digest": None,
            "task": TaskSpec(name="quadratic", parameters=QUADRATIC),
            "data": DataSpec(blobs={"tokens": blob}),
            "ranges": (Range(0, 2),),
            "deadline_s": 60.0,
            "staleness": 0,
            "codec_up": "fp32",
            "codec_down": "fp32",
        }
        return Order(**(fields | changes))

    async def post(self, order: Order) -> tuple[int, Refusal]:
        """Offer an order once, without blobs."""
        body = sign_message(self.keypair, order).model_dump_json().encode()
        return await self._send("POST", "/v1/order", body)

    async def put(self, ref: BlobRef, data: Buffer, offset: int = 0) -> tuple[int, Refusal]:
        target = f"/v1/blob?kind={ref.kind}&digest={ref.digest}&bytes={ref.bytes}&offset={offset}"
        return await self._send("PUT", target, blob=bytes(memoryview(data).cast("B")[offset:]))

    async def put_part(self, ref: BlobRef, start: int, stop: int, pause_s: float = 0.0) -> int:
        """Send bytes `start` to `stop` of a blob over a connection that is cut then, if they are not its last ones.

        With `pause_s` half of them come later than the others. Return the status, 0 where the connection was cut.
        """
        data = bytes(memoryview(self.blobs[ref.digest]).cast("B"))
        target = f"/v1/blob?kind={ref.kind}&digest={ref.digest}&bytes={ref.bytes}&offset={start}"
        headers = sign_request(self.keypair, "PUT", target, self.worker.hotkey, b"")
        lines = [f"PUT {target} HTTP/1.1", "Host: x", f"Content-Length: {ref.bytes - start}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            middle = (start + stop) // 2
            writer.write("\r\n".join([*lines, "", ""]).encode() + data[start:middle])
            await writer.drain()
            await asyncio.sleep(pause_s)
            writer.write(data[middle:stop])
            await writer.drain()
            if stop == ref.bytes:
                return int((await reader.readline()).split()[1])
            while self.worker.inbox.held.get(ref.digest, 0) < stop:
                await asyncio.sleep(0.01)
            return 0
        finally:
            writer.close()

    async def stop(self, order: Order) -> tuple[int, Refusal]:
        """Stop an order, perhaps another validator's."""
        name = digest(order.kind, order.text().encode())
        stop = Stop(run=order.run, round=order.round, hotkey=order.hotkey, order=name)
        return await self._send("POST", "/v1/stop", sign_message(self.keypair, stop).model_dump_json().encode())

    async def give(self, order: Order) -> tuple[int, Refusal]:
        """Offer an order, send the blobs that it lacks, and offer it again. Return the last answer."""
        status, refusal = await self.post(order)
        for ref in refusal.missing:
            assert (await self.put(ref, self.blobs[ref.digest], refusal.held.get(ref.digest, 0)))[0] == 200
        return await self.post(order) if refusal.missing else (status, refusal)

    async def outcome(self, order: Order) -> tuple[int, Refusal]:
        """Give an order, and wait until its work is done or refused."""
        status, refusal = await self.give(order)
        while status == 200:
            name = sign_message(self.keypair, order).digest
            status, refusal = await self._send("GET", f"/v1/reply?order={name}&wait=1")
            if status == 200:
                return status, refusal
            if refusal.missing:  # with other data the model is built anew, from a whole state
                status, refusal = await self.give(order)
            status = 200 if status == 202 else status
        return status, refusal

    async def fetch(self, order: Order) -> int:
        """Fetch the payload of an order that is done. Return the status."""
        name = sign_message(self.keypair, order).digest
        return (await self._send("GET", f"/v1/payload?order={name}&offset=0"))[0]

    async def _send(self, method: str, target: str, body: bytes = b"", blob: bytes = b"") -> tuple[int, Refusal]:
        headers = sign_request(self.keypair, method, target, self.worker.hotkey, body)
        url = URL(f"http://127.0.0.1:{self.port}{target}", encoded=True)
        async with self.session.request(method, url, headers=headers, data=(body or blob) or None) as answer:
            text = await answer.read()
            return answer.status, Refusal.parse(text) if answer.status >= 400 else Refusal(reason="")


@asynccontextmanager
async def miner_serving(folder: Path, *flags: str) -> AsyncIterator[tuple[Rogue, Rogue, list[str]]]:
    """Serve as miner.py does. Yield the two validators that it allows, and what it has said."""
    said: list[str] = []
    wallet = ["--wallet.name", "m", "--wallet.path", str(folder / "wallets"), "--cache", str(folder / "cache")]
    allow = ["--allow", VALIDATOR.ss58_address, RIVAL.ss58_address]
    quick = ["--limits.rate-s", "0.5"]  # a transfer that was cut is noticed then
    config = cli.parse(
        MinerConfig, "miner.py", [*quick, *wallet, *allow, "--axon.port", "0", "--device", "cpu", *flags]
    )
    config.check()
    async with AsyncExitStack() as stack, aiohttp.ClientSession() as session:
        console = cast(MinerConsole, SimpleNamespace(say=said.append, announce=said.append))
        miner = await build_miner(config, "miner.py", console, stack)
        line = next(text for text in said if text.startswith("serving "))
        port = parse_endpoint(line.removeprefix("serving "), False, "axons", "miner").port
        yield Rogue(session, miner, port), Rogue(session, miner, port, RIVAL), said
        assert not any(failure.done() for failure in miner.failures), "the miner has ended"


def against_miner(
    folder: Path, play: Callable[[Rogue, Rogue, list[str]], Awaitable[None]], *flags: str, honest: bool = True
) -> None:
    """Play it against a miner, which afterwards must still do an honest order of either validator."""

    async def main() -> None:
        async with miner_serving(folder, *flags) as (first, second, said):
            await play(first, second, said)
            if honest:
                order = first.order()
                assert (await first.outcome(order))[0] == 200
                assert await first.fetch(order) == 200

    asyncio.run(main())
