"""An order is posted once: the newest step goes ahead of it to a miner that has the version before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from pilot.interfaces import Refused
from pilot.training.learner import Learner
from pilot.transport.client.dendrite import Dendrite, Endpoint
from pilot.transport.client.peer import Peer
from pilot.transport.server.axon import Axon
from pilot.worker.worker import Worker
from protocol import BlobRef, Order, Range, digest
from tasks.gpt2 import GPT2
from tests.echo import VALIDATOR, open_guard, serving
from tests.test_learner import gradients
from tests.tiny import CPU, MINERS, OPTIMIZER, make_worker, tiny_task

MINER = MINERS[0]


class CountingAxon(Axon):
    """Keeps "METHOD path status" of every request."""

    def __init__(self, worker: Worker, port: int = 0) -> None:
        super().__init__(worker, MINER, open_guard(), "127.0.0.1", port)
        self.seen: list[str] = []

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        status = 0
        try:
            response = await super()._answer(request)
            status = response.status
            return response
        except Refused as refused:
            status = refused.status
            raise
        finally:
            self.seen.append(f"{request.method} {request.path} {status}")

    def posts(self) -> list[str]:
        """The requests since the last call that offer an order, in their order."""
        seen, self.seen = self.seen, []
        return [line for line in seen if "/v1/order" in line or "/v1/blob" in line]


class Rounds:
    """A validator that gives one miner an order in each version."""

    def __init__(self, folder: Path, task: GPT2, network: Dendrite) -> None:
        self.folder, self.task, self.network = folder, task, network
        self.learner = Learner(task, OPTIMIZER, CPU, "delta", "int8")
        self.number = 0

    async def play(self) -> None:
        if self.number:
            [gradient] = gradients(self.learner, 1, self.number)
            self.learner.step(gradient, {"lr": 1e-3})
            self.learner.advance()
        update = self.learner.update
        order = Order(
            run="tiny", round=self.number, hotkey=MINER.ss58_address, version=update.version, update=update,
            state_digest=None, task=self.task.spec(), data=self.task.data_spec, ranges=(Range(0, 1),), deadline_s=60.0,
            staleness=0, codec_up="fp32", codec_down="int8",
        )  # fmt: skip
        blobs = {**self.task.blobs(), **self.learner.blobs}
        path = self.folder / f"payload {self.number}"
        received = await self.network.exchange(order, self.network.sign(order), blobs, path)
        assert received.reply.version == update.version
        self.number += 1


@asynccontextmanager
async def miner(folder: Path, port: int = 0) -> AsyncIterator[tuple[CountingAxon, Worker, int]]:
    loop = asyncio.get_running_loop()
    worker = make_worker(folder / "miner", MINER, [], loop.time)
    axon = CountingAxon(worker, port)
    async with serving(axon) as bound:
        yield axon, worker, bound
    worker.close()


@asynccontextmanager
async def reaching(port: int) -> AsyncIterator[Dendrite]:
    endpoints = [Endpoint("127.0.0.1", port)]
    network = Dendrite(VALIDATOR, endpoints, {}, lambda pins: None, "gpt2", print, hello_interval_s=0.05)
    await network.start()
    try:
        assert await network.wait_for_peer(10)
        yield network
    finally:
        await network.close()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


ONCE = ["PUT /v1/blob 200", "POST /v1/order 200"]


def test_a_steady_round_posts_its_order_once_and_a_restarted_miner_heals(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        async with miner(tmp_path) as (axon, _, port), reaching(port) as network:
            rounds = Rounds(tmp_path, task, network)
            await rounds.play()
            assert axon.posts()[0] == "POST /v1/order 409"  # it has nothing yet
            for _ in range(4):
                await rounds.play()
                assert axon.posts() == ONCE
            await axon.close()
            async with miner(tmp_path, port) as (restarted, _, _):
                await rounds.play()
                asked, refused, *_, accepted = restarted.posts()
                assert (asked, refused) == ("PUT /v1/blob 409", "POST /v1/order 409")
                assert accepted == "POST /v1/order 200"
                await rounds.play()
                assert restarted.posts() == ONCE

    asyncio.run(main())


def test_a_miner_holds_one_blob_that_no_order_asked_for(tmp_path: Path, task: GPT2) -> None:
    """Whatever a caller with a valid signature sends ahead of an order."""

    async def main() -> None:
        async with miner(tmp_path) as (_, worker, port), reaching(port) as network:
            [peer] = [p for p in network._miners if isinstance(p, Peer)]

            async def put(kind: str, data: bytes) -> None:
                ref = BlobRef.model_validate({"kind": kind, "digest": digest(kind, data), "bytes": len(data)})
                await peer.put_blob(ref, memoryview(data), lambda size: None)

            with pytest.raises(Refused, match="no order asked"):
                await put("delta", b"before any order")
            rounds = Rounds(tmp_path, task, network)
            await rounds.play()
            largest = max(ref.bytes for ref in rounds.learner.update.refs)
            for kind, size in (("state", 10), ("data", 10), ("vocabulary", 10), ("delta", 2 * largest + 1)):
                with pytest.raises(Refused, match="no order asked"):
                    await put(kind, bytes(size))
            await put("delta", b"the first")
            for n in range(20):
                with pytest.raises(Refused, match="no order asked"):
                    await put("delta", b"another %d" % n)
            assert len(worker.inbox._writers) == 1
            worker.inbox._wanted.clear()
            with pytest.raises(Refused, match="no order asked"):  # nor from another validator that may call
                worker.open_blob(MINERS[1].ss58_address, BlobRef(kind="delta", digest="0" * 64, bytes=1), 0)
            await rounds.play()
            assert worker.inbox._writers == {}

    asyncio.run(main())
