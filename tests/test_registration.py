"""Miners come, leave and return at any moment: by announcing themselves, by a watched file, by who is admitted."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pilot.app import cli
from pilot.app.miner_flags import MinerConfig
from pilot.common.limits import Limits
from pilot.interfaces import Faulted, Refused
from pilot.transport.auth import sign_message
from pilot.transport.client.dendrite import Dendrite
from pilot.transport.client.peer import Endpoint, Peer
from pilot.transport.server.axon import Axon
from pilot.transport.server.gateway import Gateway
from pilot.transport.wallets import load_keypair
from protocol import Announce
from tests.echo import (
    MALLORY,
    MINER,
    STATE,
    VALIDATOR,
    Echo,
    blobs_of,
    caller,
    dendrite,
    desk,
    make_order,
    make_receipt,
    member,
    open_guard,
    served,
    serving,
    until,
)
from tests.processes import PATIENCE_S, RUN, Miner, eventually, quadratic_flags, start_miner, start_validator
from tests.test_processes import receipts
from tests.test_transport import fault, free_port

M1, M2 = MINER.ss58_address, MALLORY.ss58_address
SESSION = "5" * 32


@asynccontextmanager
async def validator(
    port: int = 0, admit: str = "everyone", limits: Limits | None = None, said: list[str] | None = None
) -> AsyncIterator[tuple[Dendrite, Endpoint, Gateway]]:
    limits = limits or replace(Limits(), away_s=2.0, poll_s=1.0)
    async with (
        dendrite(limits=limits, said=said) as network,
        desk(network, port, admit, limits, said=said) as (server, at),
    ):
        yield network, at, server


async def exchange(network: Dendrite, path: Path, round: int = 0) -> None:
    order = make_order(round=round)
    await network.exchange(order, network.sign(order), blobs_of(order), path)
    assert path.read_bytes() == STATE


# --- announcements ----------------------------------------------------------------------------------------------------


def test_join_leave_and_return_on_another_port(tmp_path: Path) -> None:
    async def main() -> None:
        async with validator() as (network, at, _):
            changes = asyncio.create_task(network.wait_for_change())
            async with (
                served(Echo()) as port,
                member(Echo(), at, f":{port}") as registration,
            ):  # the address: as it comes
                await until(lambda: network.peers() == (M1,))
                await changes
                assert network.miner_states()[0].endpoint == f"127.0.0.1:{port}"
                await exchange(network, tmp_path / "p")
                for _ in range(3):
                    registration.heartbeat.announce_now()
                    await asyncio.sleep(0.05)
                assert len(network.miner_states()) == 1  # announcing again changes nothing
                registration.leave()
                await until(lambda: not network.peers())
                await registration.settle(60)
                assert await network.deliver(
                    M1, network.sign(make_receipt(make_order(), "0" * 64))
                )  # it is still there
            async with served(Echo()) as port, member(Echo(), at, f"127.0.0.1:{port}"):
                await until(lambda: network.peers() == (M1,))
                assert network.miner_states()[0].endpoint == f"127.0.0.1:{port}"
                await exchange(network, tmp_path / "p", 1)

    asyncio.run(main())


def test_one_that_was_killed_returns_elsewhere_and_is_given_its_order_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with validator() as (network, at, _):
            async with served(Echo()) as port, member(Echo(), at, f":{port}"):
                await until(network.peers)
            async with served(Echo()) as port, member(Echo(), at, f":{port}"):
                await until(lambda: network.peers() and network.miner_states()[0].endpoint.endswith(f":{port}"))
                await exchange(network, tmp_path / "p")
                assert len(network.miner_states()) == 1

    asyncio.run(main())


def test_one_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    async def main() -> None:
        async with validator() as (network, at, _):
            async with served(Echo()) as port, member(Echo(), at, f":{port}"):
                await until(network.peers)
            with pytest.raises(Faulted):
                await exchange(network, tmp_path / "p")
            await until(lambda: not network.miner_states())

    asyncio.run(main())


def test_of_two_processes_under_one_hotkey_one_is_used_and_the_other_told(tmp_path: Path) -> None:
    async def main() -> None:
        said: list[str] = []
        async with (
            validator() as (network, at, server),
            served(first := Echo()) as a,
            served(second := Echo()) as b,
            member(first, at, f":{a}"),
        ):
            await until(network.peers)
            async with member(second, at, f":{b}", said=said):
                await until(lambda: server.refused[409] >= 3)
                assert network.miner_states()[0].endpoint.endswith(f":{a}")
                for round in range(3):
                    await exchange(network, tmp_path / "p", round)
            assert (len(first.orders), len(second.orders)) == (3, 0)
            assert len(said) == 1
            assert "another process is at work under this hotkey" in said[0]

    asyncio.run(main())


def test_who_cannot_be_reached_is_told_why() -> None:
    async def main() -> tuple[list[str], list[str]]:
        said: list[str] = []
        here: list[str] = []
        async with validator(said=here) as (network, at, _), member(Echo(), at, f":{free_port()}", said=said):
            await until(lambda: said)
            assert network.miner_states()[0].state == "away"
        return said, here

    said, here = asyncio.run(main())
    assert "not reached at 127.0.0.1:" in said[0]
    assert not here  # a stranger's mistakes are not the validator's user's


def test_what_answers_there_instead_is_not_told() -> None:
    """Else whoever announces could look around in the validator's network."""

    async def main() -> None:
        said: list[str] = []
        async with validator() as (_, at, _), served(Echo(M2), MALLORY) as port:
            for there in (free_port(), port, at.port):
                async with member(Echo(), at, f":{there}", said=said):
                    await until(lambda: said)
                assert f"not reached at 127.0.0.1:{there}: nothing there answers as this miner" in said.pop()
                said.clear()

    asyncio.run(main())


def test_calls_to_those_that_announce_themselves_are_rationed() -> None:
    async def main() -> None:
        limits = replace(Limits(), strangers_per_s=20.0)
        async with validator(limits=limits) as (_, at, _), caller(at) as peer:
            endpoint, began = f"127.0.0.1:{free_port()}", time.monotonic()
            for _ in range(20):
                await announce(peer, endpoint)
            assert time.monotonic() - began > 0.75  # the first four do not wait

    asyncio.run(main())


def test_who_does_another_task_is_told() -> None:
    async def main() -> list[str]:
        said: list[str] = []
        async with validator() as (network, at, _), member(Echo(tasks=("other",)), at, said=said):
            await until(lambda: said)
            assert not network.miner_states()
        return said

    assert "start with --tasks echo" in asyncio.run(main())[0]


def test_both_are_restarted_independently(tmp_path: Path) -> None:
    async def main() -> None:
        port, said = free_port(), list[str]()
        at = Endpoint("127.0.0.1", port, VALIDATOR.ss58_address)
        async with served(Echo()) as serving, member(Echo(), at, f":{serving}", said=said):
            await until(lambda: said)  # that the validator is away
            for round in range(2):
                async with validator(port) as (network, _, _):
                    await until(network.peers)
                    await exchange(network, tmp_path / "p", round)
                await until(lambda: "is away" in said[-1])
        assert ["is away" in line for line in said] == [True, False, True, False, True]

    asyncio.run(main())


def test_another_validator_at_that_address_is_told_apart() -> None:
    async def main() -> list[str]:
        said: list[str] = []
        async with validator() as (network, at, _), member(Echo(), replace(at, hotkey=M2), said=said):
            await until(lambda: said)
            assert not network.miner_states()
        return said

    assert f"expected {M2}" in asyncio.run(main())[0]


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("10.0.0.7:0", "no port"),
        ("10.0.0.7:99999", "no port"),
        ("10.0.0.7", "IP address|whole number"),
        ("metadata.internal:80", "give an IP address"),
        ("169.254.169.254:80", "no address to call"),
        ("[fe80::1]:80", "no address to call"),
        ("224.0.0.1:80", "no address to call"),
        ("0.0.0.0:80", "no address to call"),
        ("http://10.0.0.7/:80", "give an IP address"),
        ("localhost:80", "give an IP address"),
        ("2130706433:80", "give an IP address"),
        ("0x7f000001:80", "give an IP address"),
        ("0177.0.0.1:80", "give an IP address"),
        ("127.1:80", "give an IP address"),
        ("127.0.0.1.:80", "give an IP address"),
        ("\uff11\uff12\uff17.0.0.1:80", "give an IP address"),
        ("[fe80::1%lo]:80", "give an IP address"),
        ("[2001:4860:4860::8888%lo]:80", "give an IP address"),
        ("10.0.0.7@127.0.0.1:80", "give an IP address"),
        ("[64:ff9b::7f00:1]:80", "no address to call"),
        ("[64:ff9b::a9fe:a9fe]:80", "no address to call"),
        ("[64:ff9b:1::7f00:1]:80", "no address to call"),
        ("[2002:7f00:1::]:80", "no address to call"),
        ("[2002:a9fe:a9fe::1]:80", "no address to call"),
        ("[::127.0.0.1]:80", "no address to call"),
        ("[::ffff:169.254.169.254]:80", "no address to call"),
        ("[2001:0:808:808::80ff:fffe]:80", "no address to call"),
    ],
)
def test_addresses_that_are_not_called(endpoint: str, reason: str) -> None:
    async def main() -> None:
        async with validator() as (network, at, _), caller(at) as peer:
            with pytest.raises(Refused, match=reason):
                await announce(peer, endpoint)
            assert not network.miner_states()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("flags", "shown", "announced"),
    [
        ("", "127.0.0.1:{port}", "127.0.0.1:{port}"),
        ("--axon.ip [::1]", "[::1]:{port}", "[::1]:{port}"),
        ("--axon.ip localhost", "localhost:{port}", ":{port}"),
        ("--axon.external-ip 203.0.113.7", "203.0.113.7:{port}", "203.0.113.7:{port}"),
        ("--axon.external-ip 203.0.113.7 --axon.external-port 9000", "203.0.113.7:9000", "203.0.113.7:9000"),
        ("--axon.external-ip [2001:db8::7] --axon.external-port 9000", "[2001:db8::7]:9000", "[2001:db8::7]:9000"),
        (f"--axon.ip 0.0.0.0 --axon.external-port 9000 --allow {M1}", "0.0.0.0:9000", ":9000"),
        ("--axon.external-ip miner.example", "miner.example:{port}", ":{port}"),
    ],
)
def test_where_a_miner_says_that_it_serves(flags: str, shown: str, announced: str) -> None:
    config = cli.parse(MinerConfig, "miner.py", ["--axon.port", "0", *flags.split()])
    config.check()

    async def main() -> tuple[int, str]:
        async with serving(Axon(Echo(), MINER, open_guard(), config.axon.ip, 0)) as port:
            return port, json.loads(await asyncio.to_thread(get, f"http://{listens}:{port}/v1/status"))["hotkey"]

    listens = "[::1]" if "::1" in config.axon.ip else "127.0.0.1"
    port, hotkey = asyncio.run(main())
    assert hotkey == M1
    assert config.axon.shown(port) == shown.format(port=port)
    assert config.axon.announced(port) == announced.format(port=port)


def get(url: str) -> bytes:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=20) as response:
        text: bytes = response.read()
        return text


async def announce(peer: Peer, endpoint: str | None = None, tls: bool = False) -> None:
    message = Announce(
        hotkey=M1, endpoint=endpoint, tls=tls, tasks=("echo",), codecs=(), leaving=False, time_ns=time.time_ns()
    )
    body = sign_message(MINER, message).model_dump_json().encode()
    await peer.call("POST", f"/v1/announce?session={SESSION}", "refusal", body=body)


def test_tls_that_is_not_spoken_here_is_said() -> None:
    async def main() -> None:
        async with validator() as (_, at, _), caller(at) as peer:
            with pytest.raises(Refused, match="needs --tls-ca"):
                await announce(peer, "10.0.0.7:80", tls=True)

    asyncio.run(main())


def test_a_miner_of_the_command_line_may_announce_itself_too(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(Echo()) as port, dendrite(port) as network, desk(network) as (_, at):
            assert await network.wait_for_peer(60)
            async with member(Echo(), at, f":{port}") as registration:
                await registration.heartbeat.registered.wait()
                assert len(network.miner_states()) == 1
                registration.leave()
                await registration.settle(60)
            await exchange(network, tmp_path / "p")  # the command line names it

    asyncio.run(main())


# --- while an exchange is under way -----------------------------------------------------------------------------------


def test_a_miner_that_is_removed_still_ends_what_it_is_at(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(miner := Echo()) as port, dendrite() as network:
            miner.held.clear()
            endpoint = Endpoint("127.0.0.1", port)
            network.add(endpoint)
            assert await network.wait_for_peer(60)
            task = asyncio.create_task(exchange(network, tmp_path / "p"))
            await until(lambda: miner.orders)
            network.remove(endpoint)
            assert not network.peers()
            assert not network.miner_states()
            miner.held.set()
            await task
            assert await network.deliver(M1, network.sign(make_receipt(make_order(), "0" * 64)))

    asyncio.run(main())


@pytest.mark.parametrize("moment", ["at once", "ordering", "working", "fetching"])
@pytest.mark.parametrize("by", ["cancel", "close"])
def test_an_exchange_can_end_at_any_point(tmp_path: Path, moment: str, by: str) -> None:
    """Nothing goes on in the background, nothing is thrown where nobody looks, and another exchange works."""
    noise: list[str] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: noise.append(str(context)))
        before = asyncio.all_tasks()
        state = STATE * 200
        async with served(miner := Echo()) as port, dendrite(port) as network:
            assert await network.wait_for_peer(60)
            miner.held.clear()
            order = make_order(state)
            signed = network.sign(order)
            task = asyncio.create_task(network.exchange(order, signed, blobs_of(order, state), tmp_path / "p"))
            told = asyncio.create_task(network.await_late_reply(order, signed, 60))
            if moment == "ordering":
                await until(lambda: miner.writers or miner.blobs)
            elif moment != "at once":
                await until(lambda: miner.orders)
            if moment == "fetching":
                miner.held.set()
                await asyncio.sleep(0.01)
            if by == "cancel":
                task.cancel()
                told.cancel()
            else:
                await network.close()
            await asyncio.wait({task, told})
            assert task.cancelled() or not task.exception() or moment == "at once"
        await asyncio.sleep(0.05)
        assert asyncio.all_tasks() <= before
        del task, told
        gc.collect()

    asyncio.run(main())
    assert not noise


def test_what_waits_for_changes_wakes_when_one_goes(tmp_path: Path) -> None:
    async def main() -> None:
        async with dendrite() as network:
            async with served(Echo()) as port:
                network.add(Endpoint("127.0.0.1", port))
                assert await network.wait_for_peer(60)
            change = asyncio.create_task(network.wait_for_change())
            await fault(network, make_order(deadline_s=3), tmp_path / "p")
            await asyncio.wait_for(change, 60)

    asyncio.run(main())


def test_a_late_reply_of_a_miner_that_serves(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(miner := Echo()) as port, dendrite(port) as network:
            assert await network.wait_for_peer(60)
            miner.held.clear()
            order = make_order(deadline_s=1.0)
            signed = network.sign(order)
            with pytest.raises(Faulted, match="LATE"):
                await network.exchange(order, signed, blobs_of(order), tmp_path / "p")
            assert await network.await_late_reply(order, signed, 0.1) is None
            late = asyncio.create_task(network.await_late_reply(order, signed, 60))
            await asyncio.sleep(0.05)
            miner.held.set()
            noted = await late
            assert noted is not None
            assert noted.signer == M1
            other = make_order(round=5)
            assert await network.await_late_reply(other, network.sign(other), 60) is None  # 404

    asyncio.run(main())


# --- floods -----------------------------------------------------------------------------------------------------------


def test_no_more_than_so_many_may_be_here(tmp_path: Path) -> None:
    async def main() -> None:
        limits = replace(Limits(), miners=1)
        said: list[str] = []
        async with validator(limits=limits) as (network, at, _), member(Echo(), at):
            await until(network.peers)
            async with member(Echo(M2), at, keypair=MALLORY, said=said):
                await until(lambda: said)
                assert network.peers() == (M1,)
                await exchange(network, tmp_path / "p")
        assert "1 miners are here already, as many as --limits.miners" in said[0]

    asyncio.run(main())


# --- the programs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_miners_that_nobody_listed(tmp_path: Path) -> None:
    """One announces itself, one pulls; told to end, they hand over what they have, and the run goes on without them."""
    port = free_port()
    key = load_keypair("validator", "default", str(tmp_path / "wallets"), create=True, say=print)
    at = ("--validator", f"127.0.0.1:{port}@{key.ss58_address}", "--grace", "60")
    flags = ("--rounds", "100000", "--batches", "50", "--serve.port", str(port), "--admit", "everyone")
    with (
        start_miner(tmp_path, "pulling", 0, *at, "--pull") as pulling,
        start_miner(tmp_path, "pushed", 0, *at) as pushed,
        start_validator(tmp_path, *flags, "--grace", "60") as process,
    ):

        def rounds_of(miner: Miner) -> int:
            return miner.said().count("ACCEPTED")

        eventually(lambda: min(rounds_of(pulling), rounds_of(pushed)) >= 3, "rounds of both", 2 * PATIENCE_S)
        pulling.terminate()
        assert pulling.wait() == 0, pulling.said()
        alone = rounds_of(pushed)
        eventually(lambda: rounds_of(pushed) >= alone + 3, "rounds of the other")
        pushed.terminate()
        assert pushed.wait() == 0, pushed.said()
        for miner in (pulling, pushed):
            assert "announced to the validator" in miner.said()
            assert "not everything was handed over" not in miner.said()
            assert "Traceback" not in miner.said()
        assert "serving" not in pulling.said()
        assert "no miner is there yet: waits for announcements" in process.said()
        process.interrupt()
        assert process.wait() == 0, process.said()
        assert "Traceback" not in process.said()
    verdicts = {r.verdict for r in receipts(tmp_path / "runs" / RUN)}
    assert "ACCEPTED" in verdicts
    assert verdicts <= {"ACCEPTED", "SILENT", "LEAVING", "LATE"}  # an order may cross with the leaving, or with Ctrl-C


@pytest.mark.slow
@pytest.mark.parametrize("grace", ["0", "600"])
def test_a_miner_whose_validator_does_not_listen_ends_all_the_same(grace: str, tmp_path: Path) -> None:
    """When its grace is over; or at once, when it is told again."""
    port = free_port()
    flags = ("--axons", str(port), "--connect-timeout", "60", "--rounds", "100000", "--batches", "100000")
    with (
        start_miner(tmp_path, "M1", port, "--grace", grace) as miner,
        start_validator(tmp_path, *flags, task=quadratic_flags) as process,
    ):
        miner.wait_for("micro-batches on version")
        os.kill(process.pid, signal.SIGSTOP)
        miner.terminate()
        if grace != "0":
            miner.wait_for("^stopping: ")
            miner.terminate()
        assert miner.wait() == 0, miner.said()
        assert ("not everything was handed over within --grace 0 s" in miner.said()) == (grace == "0")
