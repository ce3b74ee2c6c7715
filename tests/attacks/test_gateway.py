"""Strangers at a validator's desk: each costs a bounded share, and the miners that are known go on meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import pytest

from pilot.common.addresses import may_call
from pilot.common.limits import Limits
from pilot.transport.auth import Keypair, sign_message, sign_request
from pilot.transport.client.dendrite import Dendrite
from pilot.transport.server.gateway import Gateway
from protocol import Announce, Refusal
from tests.attacks.caller import Caller
from tests.echo import MALLORY, MINER, STATE, VALIDATOR, Echo, blobs_of, dendrite, desk, make_order, member, until

ZEROS = "0" * 64
NO_SESSION = "0" * 32
SIGNED = [
    ("POST", f"/v1/announce?session={NO_SESSION}"),
    ("GET", f"/v1/next?session={NO_SESSION}&taken={ZEROS}&wait=1"),
    ("GET", f"/v1/blob?session={NO_SESSION}&order={ZEROS}&digest={ZEROS}&offset=0"),
    ("POST", f"/v1/working?session={NO_SESSION}&order={ZEROS}"),
    ("POST", f"/v1/refusal?session={NO_SESSION}&order={ZEROS}"),
    ("POST", f"/v1/reply?session={NO_SESSION}&order={ZEROS}"),
    ("PUT", f"/v1/payload?session={NO_SESSION}&order={ZEROS}&digest={ZEROS}&bytes=2&offset=0"),
]


@dataclass
class Scene:
    """A desk with one honest miner, which pulls."""

    network: Dendrite
    server: Gateway
    caller: Caller
    folder: Path
    session: str  # of that miner's process
    rounds: int = 0

    async def works(self) -> None:
        order = make_order(round=self.rounds)
        self.rounds += 1
        await self.network.exchange(order, self.network.sign(order), blobs_of(order), self.folder / "p")
        assert (self.folder / "p").read_bytes() == STATE


@asynccontextmanager
async def scene(folder: Path, admit: str = "everyone", limits: Limits | None = None) -> AsyncIterator[Scene]:
    limits = limits or Limits()
    async with (
        dendrite(limits=limits) as network,
        desk(network, admit=admit, limits=limits) as (server, at),
        member(Echo(), at) as registration,
        aiohttp.ClientSession() as session,
    ):
        await until(network.peers)
        found = Scene(network, server, Caller(session, at.port), folder, registration.heartbeat.session)
        await found.works()
        yield found
        await found.works()


def headers(method: str, target: str, body: bytes, signer: Keypair, receiver: Keypair = VALIDATOR) -> dict[str, str]:
    return sign_request(signer, method, target, receiver.ss58_address, body)


def announcement(keypair: Keypair, endpoint: str | None = None) -> bytes:
    message = Announce(
        hotkey=keypair.ss58_address,
        endpoint=endpoint,
        tls=False,
        tasks=("echo",),
        codecs=(),
        leaving=False,
        time_ns=time.time_ns(),
    )
    return sign_message(keypair, message).model_dump_json().encode()


@pytest.mark.parametrize(("method", "target"), SIGNED)
def test_without_a_signature_with_a_wrong_one_and_from_one_not_admitted(
    method: str, target: str, tmp_path: Path
) -> None:
    (tmp_path / "admitted").write_text(MINER.ss58_address)

    async def main() -> None:
        async with scene(tmp_path, str(tmp_path / "admitted")) as there:
            send, body, covered = there.caller.send, b"" if method == "GET" else b"{}", b"{}" * (method == "POST")
            for signature, status in (
                ({}, 401),
                (headers(method, target, covered, MALLORY), 403),
                (headers(method, target + "0", covered, MINER), 401),
                (headers(method, target, covered, MINER, MALLORY), 403),
            ):
                got, refusal = await send(method, target, signature, body or None)
                assert (got, "Traceback" in refusal.reason) == (status, False)
            assert there.server.connections <= 8

    asyncio.run(main())


def test_a_replayed_announcement_and_one_for_another() -> None:
    async def main() -> None:
        async with dendrite() as network, desk(network) as (_, at), aiohttp.ClientSession() as session:
            send, target, body = Caller(session, at.port).send, SIGNED[0][1], announcement(MINER)
            once = headers("POST", target, body, MINER)
            assert (await send("POST", target, once, body))[0] == 200
            assert (await send("POST", target, once, body))[0] == 401
            stolen = await send("POST", target, headers("POST", target, body, MALLORY), body)
            assert stolen[0] == 401
            assert "signed by" in stolen[1].reason
            assert [link.hotkey for link in network.miner_states()] == [MINER.ss58_address]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{}", 400),
        (b"[" * 10_000, 400),
        (b"\xff" * 100, 400),
        (b"{" + b" " * (1 << 20) + b"}", 413),
    ],
    ids=["empty", "no fields", "deep", "not UTF-8", "long"],
)
@pytest.mark.parametrize(("method", "target"), [pair for pair in SIGNED if pair[0] == "POST"])
def test_bodies_that_are_no_messages(method: str, target: str, body: bytes, status: int, tmp_path: Path) -> None:
    async def main() -> tuple[int, Refusal]:
        async with scene(tmp_path) as there:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                own = target.replace(NO_SESSION, there.session)
                return await there.caller.send(method, own, headers(method, own, body, MINER), body)
            return status, Refusal(reason="hung up")

    assert asyncio.run(main())[0] == status


def test_a_flood_of_announcements_is_rationed_and_miners_go_on(tmp_path: Path) -> None:
    """Keys cost nothing: a thousand of them, each with an endpoint where nobody is."""
    limits = replace(Limits(), strangers_per_s=50.0, miners=5)

    async def main() -> None:
        async with scene(tmp_path, limits=limits) as there:
            outcomes: Counter[int] = Counter()

            async def flood() -> None:
                while True:
                    key = Keypair.create_from_uri(f"//{secrets.token_hex(8)}")
                    target, body = SIGNED[0][1], announcement(key, ":9")
                    with contextlib.suppress(aiohttp.ClientError):
                        status, _ = await there.caller.send("POST", target, headers("POST", target, body, key), body)
                        outcomes[status] += 1

            began = time.monotonic()
            flooding = [asyncio.create_task(flood()) for _ in range(20)]
            most = 0
            while there.rounds < 10 or outcomes[409] < 50:
                await there.works()
                most = max(most, len(there.network.miner_states()))
            took_s = time.monotonic() - began
            for task in flooding:
                task.cancel()
            await asyncio.wait(flooding)
            assert outcomes.total() <= 50.0 * took_s + 10 + 20  # so many a second, those of a quiet time, those in hand
            assert most == 5

    asyncio.run(main())


def test_a_poll_that_never_takes_its_letter_keeps_nobody_waiting_for_ever(tmp_path: Path) -> None:
    """It gets the same one again, and what waits for it gives up."""
    limits = replace(Limits(), message_s=0.3)

    async def main() -> None:
        async with (
            dendrite(limits=limits) as network,
            desk(network, limits=limits) as (_, at),
            aiohttp.ClientSession() as session,
        ):
            call = Caller(session, at.port)
            (target, body), poll = (SIGNED[0][1], announcement(MINER)), SIGNED[1][1]
            await call.send("POST", target, headers("POST", target, body, MINER), body)
            polling = asyncio.create_task(call.send("GET", poll, headers("GET", poll, b"", MINER)))
            await until(network.peers)
            for _ in range(2):
                assert not await network.deliver(MINER.ss58_address, network.sign(make_order()))
                assert (await polling)[0] == 200
                polling = asyncio.create_task(call.send("GET", poll, headers("GET", poll, b"", MINER)))
            assert (await polling)[0] == 202  # nothing waits any more

    asyncio.run(main())


@pytest.mark.parametrize(
    ("address", "sender", "called"),
    [
        ("8.8.8.8", "8.8.8.8", True),
        ("8.8.4.4", "8.8.8.8", True),
        ("10.0.0.7", "10.0.0.8", True),
        ("8.8.8.8", "10.0.0.8", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("10.0.0.7", "127.0.0.1", True),
        ("10.0.0.7", "8.8.8.8", False),
        ("192.168.0.1", "8.8.8.8", False),
        ("100.64.0.1", "8.8.8.8", False),
        ("fd00::7", "2001:4860:4860::8888", False),
        ("127.0.0.1", "8.8.8.8", False),
        ("127.0.0.1", "10.0.0.8", False),
        ("169.254.169.254", "10.0.0.8", False),
        ("64:ff9b::808:808", "8.8.8.8", True),
        ("64:ff9b::808:808", "2001:4860:4860::8888", True),
        ("2002:808:808::1", "2001:4860:4860::8888", True),
        ("10.0.0.7", "2001:0:808:808::1", False),  # from a Teredo address, which is one of the outside
        ("10.0.0.7", "2002:808:808::1", False),
        ("10.0.0.7", "64:ff9b::808:808", False),
    ],
)
def test_who_may_have_whom_called(address: str, sender: str, called: bool) -> None:
    assert may_call(ipaddress.ip_address(address), ipaddress.ip_address(sender)) is called


@pytest.mark.parametrize("sender", ["8.8.8.8", "2001:4860:4860::8888", "10.0.0.8", "127.0.0.1", "::1", "fd00::8"])
def test_nobody_has_an_address_called_that_stands_for_one_of_ours(sender: str) -> None:
    """By any of the forms in which an IPv6 address stands for an IPv4 one."""
    for hidden in ("127.0.0.1", "127.255.255.254", "10.0.0.7", "192.168.0.1", "169.254.169.254", "100.100.100.200",
                   "168.63.129.16", "0.0.0.0", "0.0.0.1", "224.0.0.1", "255.255.255.255"):  # fmt: skip
        ipv4 = ipaddress.ip_address(hidden)
        bits, flipped = int(ipv4), int(ipv4) ^ 0xFFFF_FFFF
        around = bits >> 16 << 64 | (bits & 0xFFFF) << 40  # a reserved byte
        forms = {
            "NAT64": f"64:ff9b::{ipv4}",
            "local NAT64, /96": f"64:ff9b:1::{ipv4}",
            "local NAT64, /48": str(ipaddress.ip_address(0x64_FF9B_0001 << 80 | around)),
            "6to4": str(ipaddress.ip_address(0x2002 << 112 | bits << 80 | 1)),
            "Teredo's client": str(ipaddress.ip_address(0x2001_0000_0808_0808 << 64 | flipped)),
            "Teredo's server": str(ipaddress.ip_address(0x2001_0000 << 96 | bits << 64 | 0xF7F7_F7F7)),
            "translated": f"::ffff:0:{ipv4}",
            "ISATAP": f"2001:4860:4860:1:0:5efe:{ipv4}",
            "global ISATAP": f"2001:4860:4860:1:200:5efe:{ipv4}",
            **({"compatible": f"::{ipv4}"} if bits > 1 else {}),
        }  # fmt: skip
        for form, address in forms.items():
            assert not may_call(ipaddress.ip_address(address), ipaddress.ip_address(sender)), form


@pytest.mark.parametrize("address", ["fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "fec0::7"])
def test_nobody_has_a_cloud_s_own_address_called(address: str) -> None:
    for sender in ("8.8.8.8", "10.0.0.8", "127.0.0.1"):
        assert not may_call(ipaddress.ip_address(address), ipaddress.ip_address(sender))
