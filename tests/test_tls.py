"""TLS between validator and miner, by certificates that the test makes: what it carries, and what a user gets wrong."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

import miner
import validator
from pilot.common.limits import Limits
from pilot.simulation.chaos.proxy import proxy_to
from pilot.transport.client.dendrite import Dendrite, Endpoint
from pilot.transport.client.registration import Registration
from pilot.transport.server.admission import Admission
from pilot.transport.server.axon import Axon
from pilot.transport.server.gateway import Gateway
from pilot.transport.tls import client_context, server_context
from tests.echo import (
    MALLORY,
    MINER,
    STATE,
    VALIDATOR,
    Echo,
    blobs_of,
    dendrite,
    make_order,
    nobody_asks,
    open_guard,
    serving,
)
from tests.processes import Miner, Process, quadratic_flags, start_miner, start_validator, tiny_flags
from tests.test_cli import Main, mistake
from tests.test_transport import free_port

BIG = os.urandom(8 << 20)


@dataclass(frozen=True)
class Files:
    """PEM files of a certificate, its key, and the authority that signed it."""

    cert: Path
    key: Path
    ca: Path

    def server(self) -> ssl.SSLContext:
        return server_context(self.cert, self.key)


def issue(folder: Path, *hosts: str) -> Files:
    authority = trustme.CA()
    issued = authority.issue_cert(*hosts)
    files = Files(folder / "cert.pem", folder / "key.pem", folder / "ca.pem")
    folder.mkdir()
    issued.cert_chain_pems[0].write_to_path(str(files.cert))
    issued.private_key_pem.write_to_path(str(files.key))
    authority.cert_pem.write_to_path(str(files.ca))
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return issue(tmp_path_factory.mktemp("tls") / "here", "127.0.0.1", "localhost")


@pytest.fixture(scope="module", autouse=True)
def programs(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Miner, Process]]:
    """miner.py and validator.py on their way through two rounds, while the other tests are at work."""
    folder, port = tmp_path_factory.mktemp("programs"), free_port()
    served = ("--axon.tls-cert", str(files.cert), "--axon.tls-key", str(files.key))
    called = ("--rounds", "2", "--tls-ca", str(files.ca), "--axons", str(port), "--connect-timeout", "60")
    task = quadratic_flags
    with start_miner(folder, "M1", port, *served) as m1, start_validator(folder, *called, task=task) as process:
        yield m1, process


def axon(tls: ssl.SSLContext | None) -> Axon:
    return Axon(Echo(), MINER, open_guard(), "127.0.0.1", 0, tls=tls)


@asynccontextmanager
async def client(port: int, ca: Path | None, said: list[str]) -> AsyncIterator[Dendrite]:
    """A started client of the miner at `port`, which it reaches by TLS if a certificate authority is given."""
    endpoints = [Endpoint("127.0.0.1", port, tls=ca is not None)]
    tls = client_context(ca) if ca else None
    network = Dendrite(
        VALIDATOR, endpoints, {}, lambda _: None, "echo", said.append, Limits(), tls=tls, hello_interval_s=0.02
    )
    await network.start()
    try:
        yield network
    finally:
        await network.close()


def test_an_exchange_over_a_line_that_breaks(files: Files, tmp_path: Path) -> None:
    """Nothing of it can be read on the line, and what has passed is not sent again."""
    said: list[str] = []

    async def main() -> None:
        order = make_order(BIG)
        async with serving(axon(files.server())) as far, proxy_to(far) as (line, near):
            async with client(near, files.ca, said) as network:
                line.cut_after = 3 << 20
                assert await network.wait_for_peer(10)
                await network.exchange(order, network.sign(order), blobs_of(order, BIG), tmp_path / "p")
            assert line.cuts >= 4
            assert line.down < 1.6 * len(BIG)
            assert line.up < 1.6 * len(BIG)

    asyncio.run(main())
    assert (tmp_path / "p").read_bytes() == BIG
    assert not said


def test_a_miner_that_pulls_by_it(files: Files, tmp_path: Path) -> None:
    said: list[str] = []

    async def main() -> None:
        order, admission = make_order(), Admission("everyone", said.append, time.monotonic)
        async with dendrite() as network:
            server = Gateway(VALIDATOR, "echo", admission, nobody_asks, "127.0.0.1", 0, tls=files.server())
            at = Endpoint("127.0.0.1", await server.start(), VALIDATOR.ss58_address, tls=True)
            server.attach(network)
            miner = Registration(Echo(), MINER, at, None, said.append, tls=client_context(files.ca))
            assert await network.wait_for_peer(60)
            await network.exchange(order, network.sign(order), blobs_of(order), tmp_path / "p")
            await miner.close()
            await server.close()

    asyncio.run(main())
    assert (tmp_path / "p").read_bytes() == STATE
    assert len(said) == 1


# --- what a user is told ----------------------------------------------------------------------------------------------


def complaint(server: ssl.SSLContext | None, ca: Path | None) -> str:
    """What is said, once, about a miner that cannot be reached like this."""
    said: list[str] = []

    async def main() -> None:
        async with serving(axon(server)) as port, client(port, ca, said) as network:
            async with asyncio.timeout(10):
                while not said:
                    await asyncio.sleep(0.01)
            assert not await network.wait_for_peer(0.3)  # it has been tried again, several times
            assert network.miner_states()[0].state == "away"

    asyncio.run(main())
    [line] = said
    assert re.match(r"--axons 127\.0\.0\.1:\d+: ", line)
    return line


def test_another_authority_s_certificate(files: Files, tmp_path: Path) -> None:
    other = issue(tmp_path / "other", "127.0.0.1")
    assert "--tls-ca does not make its certificate trusted: " in complaint(files.server(), other.ca)


def test_a_certificate_for_another_host(tmp_path: Path) -> None:
    elsewhere = issue(tmp_path / "elsewhere", "miner.example.org")
    assert "not valid for '127.0.0.1'" in complaint(elsewhere.server(), elsewhere.ca)


def test_tls_to_a_miner_without(files: Files) -> None:
    assert "serves without TLS needs no --tls-ca" in complaint(None, files.ca)


def test_no_tls_to_a_miner_with(files: Files) -> None:
    assert "serves TLS needs --tls-ca" in complaint(files.server(), None)


def test_an_old_tls_is_not_spoken(files: Files) -> None:
    old = client_context(files.ca)
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2

    async def main() -> None:
        async with serving(axon(files.server())) as port:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection("127.0.0.1", port, ssl=old)

    asyncio.run(main())


def test_a_certificate_alone_makes_nobody_a_miner(files: Files, tmp_path: Path) -> None:
    """Who a miner is says its hotkey: a trusted certificate with another one is not used."""
    said: list[str] = []

    async def main() -> None:
        order = make_order()
        other = Axon(Echo(MALLORY.ss58_address), MALLORY, open_guard(), "127.0.0.1", 0, tls=files.server())
        async with serving(other) as port:
            endpoint = Endpoint("127.0.0.1", port, MINER.ss58_address, tls=True)
            network = Dendrite(
                VALIDATOR, [endpoint], {}, lambda _: None, "echo", said.append, tls=client_context(files.ca)
            )
            await network.start()
            assert not await network.wait_for_peer(0.5)
            assert order.hotkey not in network.peers()
            await network.close()

    asyncio.run(main())
    assert len(said) == 1
    assert MALLORY.ss58_address in said[0]


# --- the programs -----------------------------------------------------------------------------------------------------


def test_the_programs_speak_it(programs: tuple[Miner, Process]) -> None:
    miner_process, validator_process = programs
    assert validator_process.wait() == 0, validator_process.said()
    assert miner_process.said().count("ACCEPTED") == 2


@pytest.fixture(scope="module")
def spoilt(files: Files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What is no certificate, key or authority of a miner."""
    folder = tmp_path_factory.mktemp("spoilt")
    (folder / "text.pem").write_text("once upon a time\n")
    (folder / "empty.pem").write_bytes(b"")
    (folder / "folder.pem").mkdir()
    key = load_pem_private_key(files.key.read_bytes(), None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (folder / "locked.pem").write_bytes(locked)
    other = issue(folder / "other", "127.0.0.1")
    names = ("text", "empty", "folder", "locked", "missing")
    return {name: folder / f"{name}.pem" for name in names} | {
        "other key": other.key,
        "cert": files.cert,
        "key": files.key,
    }


@pytest.mark.parametrize(
    ("cert", "key", "says"),
    [
        ("cert", None, "--axon.tls-cert: TLS needs --axon.tls-key too"),
        (None, "key", "--axon.tls-key: TLS needs --axon.tls-cert too"),
        ("missing", "key", r"--axon.tls-cert \S+missing.pem: no such file"),
        ("cert", "missing", r"--axon.tls-key \S+missing.pem: no such file"),
        ("folder", "key", r"--axon.tls-cert \S+folder.pem: no such file"),
        ("text", "key", r"--axon.tls-cert \S+text.pem: no certificate in PEM form"),
        ("key", "cert", r"--axon.tls-cert \S+key.pem: no certificate in PEM form"),
        ("cert", "text", r"that fits the unencrypted key of --axon.tls-key \S+text.pem"),
        ("cert", "empty", r"that fits the unencrypted key of --axon.tls-key \S+empty.pem"),
        ("cert", "other key", r"that fits the unencrypted key .*KEY_VALUES_MISMATCH"),
        ("cert", "locked", "that fits the unencrypted key .*the key has a password"),
    ],
)
def test_a_miner_s_flags(
    cert: str | None,
    key: str | None,
    says: str,
    spoilt: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--wallet.path", str(tmp_path), "--cache", str(tmp_path), "--device", "cpu", "--axon.port", "0"]
    for flag, name in (("--axon.tls-cert", cert), ("--axon.tls-key", key)):
        flags += [flag, str(spoilt[name])] if name else []
    assert_mistake(miner.main, flags, says, capsys)


@pytest.mark.parametrize(
    ("ca", "says"),
    [
        ("missing", r"--tls-ca \S+missing.pem: no such file"),
        ("folder", r"--tls-ca \S+folder.pem: no such file"),
        ("text", r"--tls-ca \S+text.pem: no certificate in PEM form"),
        ("empty", r"--tls-ca \S+empty.pem: no certificate in PEM form"),
        ("key", r"--tls-ca \S+key.pem: no certificate in PEM form"),
    ],
)
def test_a_validator_s_flag(ca: str, says: str, spoilt: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        client_context(spoilt[ca])


def test_a_validator_s_flag_in_one_line(
    spoilt: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*tiny_flags(tmp_path), "--axons", "8091", "--tls-ca", str(spoilt["missing"])]
    assert_mistake(validator.main, flags, "--tls-ca .*: no such file", capsys)


def assert_mistake(main: Main, flags: Sequence[str], says: str, capture: pytest.CaptureFixture[str]) -> None:
    line = mistake(main, flags, capture)
    assert re.search(says, line), line
