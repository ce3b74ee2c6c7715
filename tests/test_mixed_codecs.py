"""Miners that know fewer codecs beside one that knows all: each gets orders that it can do, and all count."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pilot.codec import known_codecs
from pilot.market.scheduling import CodecFallback
from pilot.simulation.virtual_time import run
from pilot.storage.run_store import RunStore
from pilot.transport.client.dendrite import Dendrite, Endpoint
from pilot.transport.client.registration import Registration
from pilot.transport.server.admission import Admission
from pilot.transport.server.axon import Axon
from pilot.transport.server.gateway import Gateway
from pilot.worker.worker import Worker
from protocol import Health, Order, Reply, Update, VersionStep
from tasks.gpt2 import GPT2
from tests.echo import open_guard, serving
from tests.tiny import MINERS, VALIDATOR, Place, make_place, make_worker, play, receipts, tiny_task

OLD = ("fp32", "bf16")
ALL, SOME, NONE = (keypair.ss58_address for keypair in MINERS[:3])


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


def orders(store: RunStore, round: int) -> dict[str, Order]:
    return {order.hotkey: order for order in (Order.parse(s.body) for s in store.orders(round))}


def replies(store: RunStore, round: int) -> dict[str, Reply]:
    return {received.reply.hotkey: received.reply for received in store.received(round)}


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "up", "down"),
    [
        (None, "ternary-rc", "2bit"),  # not heard yet: as the others
        (("ternary-rc", "2bit"), "ternary-rc", "2bit"),
        (OLD, "bf16", "fp32"),
        (("fp32", "ternary-rc"), "ternary-rc", "fp32"),
        (("fp32", "2bit"), "2bit", "2bit"),
        (("fp32", "1bit"), "fp32", "fp32"),  # 1bit is coarser
        (("1bit",), "1bit", "fp32"),
        (("fp32",), "fp32", "fp32"),
    ],
)
def test_who_does_not_know_a_codec_gets_another(
    known: Sequence[str] | None, up: str, down: str, caplog: pytest.LogCaptureFixture
) -> None:
    fallback = CodecFallback({ALL: known}.get)
    for _ in range(3):
        assert fallback.up(ALL, "ternary-rc") == up
        assert fallback.down(ALL, "2bit") == down
    assert len(caplog.records) == (up != "ternary-rc") + (down != "2bit")  # each said once


@pytest.mark.parametrize("known", [(), ("junk", "ternary"), ("x" * 64,)])
def test_who_names_no_codec_of_ours_gets_the_runs(known: Sequence[str], caplog: pytest.LogCaptureFixture) -> None:
    """Or silence would buy 17 times the bytes."""
    fallback = CodecFallback({ALL: known}.get)
    step = VersionStep(kind="delta", codec="2bit", digest="1" * 64, bytes=1)
    for _ in range(3):
        assert (fallback.up(ALL, "ternary-rc"), fallback.down(ALL, "2bit")) == ("ternary-rc", "2bit")
        assert not fallback.needs_state(ALL, Update(base=None, steps=(step,)))
    assert len(caplog.records) == 1


def test_a_whole_state_is_for_who_cannot_read_a_delta_on_the_way() -> None:
    def step(codec: str) -> VersionStep:
        return VersionStep(kind="delta", codec=codec, digest="1" * 64, bytes=1)

    fallback = CodecFallback({ALL: known_codecs(), SOME: ("fp32", "int8")}.get)
    old, both = (step("fp32"), step("int8")), (step("int8"), step("2bit"))
    for steps, needs in ((old, False), (both, True)):
        update = Update(base=None, steps=steps)
        assert fallback.needs_state(SOME, update) is needs
        assert not fallback.needs_state(ALL, update)
        assert not fallback.needs_state(NONE, update)  # not heard yet


def test_what_a_stranger_names_is_cut_short_when_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    CodecFallback({ALL: ("x" * 60,) * 200}.get).up(ALL, "ternary-rc")
    [record] = caplog.records
    assert len(record.getMessage()) < 400


# --- whole rounds -----------------------------------------------------------------------------------------------------


def check(store: RunStore, round: int) -> None:
    """Every miner was ordered what it can do, did it, and was paid."""
    ordered, came = orders(store, round), replies(store, round)
    assert {hotkey: order.codec_up for hotkey, order in ordered.items()} == {
        ALL: "ternary-rc",
        SOME: "bf16",
        NONE: "2bit",
    }
    assert {hotkey: order.codec_down for hotkey, order in ordered.items()} == {ALL: "2bit", SOME: "fp32", NONE: "2bit"}
    assert {hotkey: reply.codec for hotkey, reply in came.items()} == {h: o.codec_up for h, o in ordered.items()}
    assert {r.verdict for r in receipts(store, round).values()} == {"ACCEPTED"}
    assert len({order.version for order in ordered.values()}) == 1
    assert came[ALL].payload_bytes < came[NONE].payload_bytes < came[SOME].payload_bytes / 6


def differ(workers: dict[str, Worker]) -> None:
    """One knows all, one is of a release that knew only the dense ones, one can read deltas and encode little."""
    workers[SOME].codecs = OLD
    workers[NONE].codecs = ("fp32", "2bit")


def place(folder: Path, task: GPT2, **policy: Any) -> Place:
    made = make_place(
        folder, task, miners=MINERS[:3], codec_up="ternary-rc", codec_down="2bit", broadcast="delta", **policy
    )
    differ(made.workers)
    return made


def test_miners_of_all_kinds_share_the_rounds(tmp_path: Path, task: GPT2, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        p = place(tmp_path, task, digest_every=2)
        await play(p.market, 6)
        for round in range(6):
            check(p.store, round)
        versions = {worker.replica.version for worker in p.workers.values()}
        assert versions == {orders(p.store, 5)[ALL].version}  # the same model by a state as by deltas
        said = [r.getMessage() for r in caplog.records if "does not know codec" in r.getMessage()]
        assert len(said) == 3  # SOME both ways, NONE one
        await p.market.close()

    with caplog.at_level(logging.WARNING):
        run(main())


def test_only_who_cannot_read_deltas_gets_states(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        p = place(tmp_path, task)
        await play(p.market, 4)
        state = 4 * sum(t.numel() for t in p.market.learner.parameters.values())
        got = {r.reply.hotkey: r.bytes_down for n in (2, 3) for r in p.store.received(n)}
        assert got[SOME] > state > 4 * got[ALL]
        assert state > 4 * got[NONE]
        await p.market.close()

    run(main())


def test_an_old_miner_is_served_over_an_overlap_and_a_restart(tmp_path: Path, task: GPT2) -> None:
    """With two rounds in flight its state of the older version is still there; a second market goes on."""

    async def part(last: int) -> None:
        p = place(tmp_path, task, overlap=1)
        await p.market.replay(0)
        await play(p.market, last)
        for round in range(last - 3, last):
            check(p.store, round)
        await p.market.close()
        p.store.close()

    run(part(3))
    run(part(6))


# --- by real sockets --------------------------------------------------------------------------------------------------


def nobody_asks() -> Health:
    raise AssertionError


def test_over_http_what_each_says_in_its_hello_and_announcement_holds(tmp_path: Path, task: GPT2) -> None:
    """Two serve, one of them old; the third opens no port, announces itself and pulls."""

    async def main() -> None:
        said: list[str] = []
        async with contextlib.AsyncExitStack() as stack:
            clock = asyncio.get_running_loop().time
            workers = {k.ss58_address: make_worker(tmp_path / "real", k, said, clock) for k in MINERS[:3]}
            differ(workers)
            for worker in workers.values():
                stack.callback(worker.close)
            endpoints = []
            for keypair in MINERS[:2]:
                axon = Axon(workers[keypair.ss58_address], keypair, open_guard(), "127.0.0.1", 0)
                endpoints.append(Endpoint("127.0.0.1", await stack.enter_async_context(serving(axon))))
            network = Dendrite(VALIDATOR, endpoints, {}, lambda _: None, "gpt2", said.append, hello_interval_s=0.05)
            await network.start()
            stack.push_async_callback(network.close)
            desk = Gateway(VALIDATOR, "gpt2", Admission("everyone", said.append, clock), nobody_asks, "127.0.0.1", 0)
            door = Endpoint("127.0.0.1", await desk.start(), VALIDATOR.ss58_address)
            stack.push_async_callback(desk.close)
            desk.attach(network)
            pulls = Registration(workers[NONE], MINERS[2], door, None, said.append, interval_s=0.2)
            stack.push_async_callback(pulls.close)
            assert await network.wait_for_peers(3, 60) == 3
            assert [network.known_codecs(hotkey) for hotkey in (ALL, SOME, NONE)] == [
                known_codecs(),
                OLD,
                ("fp32", "2bit"),
            ]
            p = place(tmp_path, task, network=lambda _: network)
            stack.push_async_callback(p.market.close)
            await play(p.market, 3)
            for round in range(3):
                check(p.store, round)

    asyncio.run(main())
