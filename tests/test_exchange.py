"""An order's way to a miner, at bad moments: after a restart, beside another order, behind a blob's last byte."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from typing_extensions import Buffer

from pilot.common.limits import Limits
from pilot.interfaces import Faulted
from pilot.transport.client.dendrite import Dendrite
from pilot.transport.server.axon import Axon
from protocol import BlobRef, Fault, Hotkey, ProtocolError, Range, Status, digest
from tests.attacks.caller import blob_target, head
from tests.echo import (
    MINER,
    TOKENS,
    Echo,
    Writer,
    dendrite,
    desk,
    make_order,
    member,
    open_guard,
    served,
    serving,
    until,
)
from tests.test_pull import begun, endpoint, there, validator
from tests.test_transport import free_port

BIG = os.urandom(1 << 20)


# --- a validator that was restarted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pulls", [True, False], ids=["pull", "push"])
def test_an_order_waits_for_a_miner_that_has_not_come_yet(pulls: bool, tmp_path: Path) -> None:
    """A validator that was restarted sends its standing orders at once, before anybody has announced itself."""

    async def main() -> None:
        async with validator() as (network, at), served(miner := Echo()) as port:
            exchange = begun(network, make_order(deadline_s=120), tmp_path / "p")
            await asyncio.sleep(0.05)
            assert not exchange.done()
            async with member(miner, at, None if pulls else f":{port}"):
                await exchange
            assert len(miner.orders) == 1

    asyncio.run(main())


@pytest.mark.parametrize("pulls", [True, False], ids=["pull", "push"])
def test_a_version_that_a_restarted_validator_lacks_is_not_the_miner_s_fault(pulls: bool, tmp_path: Path) -> None:
    async def main() -> Faulted:
        async with (
            validator() as (network, at),
            served(miner := Echo()) as port,
            member(miner, at, None if pulls else f":{port}"),
        ):
            await there(network)
            order = make_order()
            tokens = {order.data.blobs["tokens"].digest: TOKENS}
            with pytest.raises(Faulted) as caught:
                await network.exchange(order, network.sign(order), tokens, tmp_path / "p")
            return caught.value

    faulted = asyncio.run(main())
    assert faulted.fault is Fault.VALIDATOR_FAILED
    assert faulted.reason == "the validator was restarted and no longer has that version"


# --- two orders of one miner ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pulls", [True, False], ids=["pull", "push"])
def test_what_is_shown_is_the_older_of_two_orders(pulls: bool, tmp_path: Path) -> None:
    class Halfway(Echo):
        def status(self) -> Status:
            return super().status().model_copy(update={"batches_done": 2})

    def shown(network: Dendrite) -> tuple[str, int, int]:
        [link] = network.miner_states()
        return link.state, link.batches_done, link.batches

    async def main() -> None:
        limits = replace(Limits(), poll_s=1.0)
        async with (
            dendrite(limits=limits) as network,
            desk(network, limits=limits) as (_, at),
            served(miner := Halfway()) as port,
            member(miner, at, None if pulls else f":{port}"),
        ):
            miner.held.clear()
            await there(network)
            assert shown(network) == ("idle", 0, 0)
            first = begun(network, make_order(deadline_s=120), tmp_path / "a")
            await until(lambda: shown(network) == ("working", 2, 4))
            following = make_order(round=1, deadline_s=120).model_copy(update={"ranges": (Range(4, 10),)})
            second = begun(network, following, tmp_path / "b")
            for _ in range(50):
                assert shown(network) == ("working", 2, 4)
                await asyncio.sleep(0.01)
            await until(lambda: len(miner.orders) == 2)
            assert shown(network) == ("working", 2, 4)
            first.cancel()
            await asyncio.wait({first})
            await until(lambda: shown(network) == ("working", 2, 6))
            miner.held.set()
            await second
            assert shown(network) == ("done", 6, 6)

    asyncio.run(main())


# --- a connection that is cut behind a blob's last byte ---------------------------------------------------------------


class Stuck(Echo):
    """Gets no further than the state's last byte, in its writer's `where`, until `goes_on` is set."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.arrived, self.goes_on = threading.Event(), threading.Event()

    def open_blob(self, caller: Hotkey, ref: BlobRef, offset: int) -> Writer:
        if ref.kind == "state":
            self.writers.setdefault(ref, StuckWriter(self, ref, self))
        return super().open_blob(caller, ref, offset)

    def reach(self, where: str) -> None:
        if where == self.where:
            self.arrived.set()
            assert self.goes_on.wait(60)


class StuckWriter(Writer):
    def __init__(self, service: Echo, ref: BlobRef, stuck: Stuck) -> None:
        super().__init__(service, ref)
        self.stuck = stuck

    def write(self, chunk: Buffer) -> None:
        super().write(chunk)
        if self.held == self.ref.bytes:
            self.stuck.reach("write")

    def commit(self) -> None:
        self.stuck.reach("commit")
        if self.ref not in self.service.writers:
            raise ProtocolError("committed twice")
        super().commit()


@pytest.mark.parametrize("where", ["write", "commit"])
def test_a_blob_whose_sender_hung_up_behind_its_last_byte_is_there(where: str, tmp_path: Path) -> None:
    async def main() -> None:
        miner = Stuck(where)
        axon = Axon(miner, MINER, open_guard(), "127.0.0.1", 0)
        async with serving(axon) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head("PUT", blob_target(BIG), f"Content-Length: {len(BIG)}") + BIG)
            await until(miner.arrived.is_set)
            writer.transport.abort()
            await until(lambda: axon.connections == 0)
            miner.goes_on.set()
            await until(lambda: digest("state", BIG) in miner.blobs)
            async with dendrite(port) as network:
                await there(network)
                received = await begun(network, make_order(BIG), tmp_path / "p", BIG)
            assert received.bytes_down < len(BIG)  # it has not been sent again
        assert (tmp_path / "p").read_bytes() == BIG

    asyncio.run(main())


@pytest.mark.parametrize("where", ["write", "commit"])
def test_the_same_where_the_miner_pulls(where: str, tmp_path: Path) -> None:
    """Its validator is restarted and posts the order anew, which cancels what is under way for it."""

    async def main() -> None:
        port, order, miner = free_port(), make_order(BIG, deadline_s=120), Stuck(where)
        async with member(miner, endpoint(port)):
            async with validator(port) as (network, _):
                await there(network)
                first = begun(network, order, tmp_path / "p", BIG)
                await until(miner.arrived.is_set)
            await asyncio.wait({first})
            async with validator(port) as (network, _):
                again = begun(network, order, tmp_path / "p", BIG)
                await there(network)
                await asyncio.sleep(0.2)  # in which it takes the letter
                miner.goes_on.set()
                received = await again
            assert received.bytes_down < len(BIG)
        assert (tmp_path / "p").read_bytes() == BIG

    asyncio.run(main())
