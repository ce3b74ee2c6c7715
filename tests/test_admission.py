"""Files that say who may come and where they are: what is in them, what changes in them, what is wrong in them."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import time
from pathlib import Path

import pytest

import miner
import validator
from pilot.transport.client.peer import Endpoint
from pilot.transport.server.admission import Admission, AxonsFile
from tests.echo import MALLORY, MINER, Echo, dendrite, desk, make_order, member, served, until
from tests.test_cli import Capture, mistake
from tests.test_transport import fault

M1, M2 = MINER.ss58_address, MALLORY.ss58_address


# --- who is admitted --------------------------------------------------------------------------------------------------


def test_a_file_says_who_may_come(tmp_path: Path) -> None:
    file, lines = tmp_path / "admitted", list[str]()
    file.write_text(f"# ours\n{M2}\nnobody\n")

    async def main() -> None:
        said: list[str] = []
        async with (
            dendrite() as network,
            desk(network, admit=str(file), said=lines) as (server, at),
            member(Echo(), at, said=said),
        ):
            await until(lambda: server.refused[403] >= 2)
            assert not network.miner_states()
            replaced(file, f"{M2}\n{M1} # another\nnobody\n")
            await until(lambda: network.peers() == (M1,))
            assert len(said) == 2
            assert "is not among those that this validator's --admit names" in said[0]
            replaced(file, f"{M2}\n")
            await until(lambda: not network.miner_states())

    asyncio.run(main())
    assert lines == [f"--admit {file}, line 3: 'nobody' is no ss58 address; the line is not used"]


def test_a_missing_file_names_its_flag(tmp_path: Path) -> None:
    for make in (
        lambda path: Admission(str(path), print, time.monotonic),
        lambda path: AxonsFile(path, False, print),
    ):
        with pytest.raises(ValueError, match=r"^--a\S+ \S+none: no such file"):
            make(tmp_path / "none")


def replaced(path: Path, text: str) -> None:
    """As editors do it."""
    beside = path.with_suffix(".new")
    beside.write_text(text)
    os.replace(beside, path)


# --- the watched file -------------------------------------------------------------------------------------------------


def test_miners_come_and_go_with_the_lines_of_a_file(tmp_path: Path) -> None:
    file, said = tmp_path / "axons", list[str]()

    async def main() -> None:
        other = Echo(M2)
        async with served(Echo()) as a, served(other, MALLORY) as b, dendrite(said=said) as network:
            file.write_text(f"# mine\n\n127.0.0.1:{a}  # the first\nnonsense\n")
            axons = AxonsFile(file, False, said.append)
            assert axons.endpoints == (Endpoint("127.0.0.1", a),)
            network.add(axons.endpoints[0])
            network.run_in_background(axons.follow(network, (), check_s=0.02))
            assert await network.wait_for_peer(60)
            replaced(file, f"nonsense\n{a}\n127.0.0.1:{b}@{M2}\n")
            assert await network.wait_for_peers(2, 60) == 2
            file.unlink()  # for a moment
            await asyncio.sleep(0.2)
            assert len(network.peers()) == 2
            file.write_text(f"nonsense\n{b}\nmore:nonsense:x\n")
            await until(lambda: network.peers() == (M2,))
            order = make_order()
            assert (await fault(network, order, tmp_path / "p")).reason == "no endpoint has answered with this hotkey"

    asyncio.run(main())
    assert [line.partition(": '")[0] for line in said[:2]] == [
        f"--axons-file {file}, line 4: --axons nonsense",
        f"--axons-file {file}, line 3: --axons more:nonsense:x",
    ]
    assert len(said) == 2


# --- what a user may write wrong --------------------------------------------------------------------------------------

ZERO = "5C4hrfjw9DjXZTzV3MwzrrAr9P1MJhSrvWGWqi1eSuyUpnhM"  # the address of the zero key

VALIDATOR_MISTAKES = [
    ("", "--axons: no miner named; .*, --axons-file FILE, or --serve.port with --admit"),
    ("--admit everyone", "--admit everyone: nothing is served; choose a --serve.port, 0 for any free one"),
    (
        "--axons 8091 --serve.tls-cert {file} --serve.tls-key {file}",
        "--serve.tls-cert: nothing is served; choose a --serve.port",
    ),
    ("--axons 8091 --serve.port 0 --serve.tls-cert {file}", "--serve.tls-cert: TLS needs --serve.tls-key too"),
    ("--axons 8091 --serve.port 0 --serve.tls-key {file}", "--serve.tls-key: TLS needs --serve.tls-cert too"),
    ("--axons 8091 --serve.port 0 --serve.ip 0.0.0.0:80", "--serve.ip 0.0.0.0:80: must be .* with --serve.port"),
    (f"--axons 8091@{ZERO}", ".*is no ss58 address"),
    ("--axons-file {folder}/none", "--axons-file {folder}/none: no such file; make it, with a miner a line"),
    (
        "--serve.port 0 --admit {folder}/none",
        "--admit {folder}/none: no such file; make it, with an ss58 address a line",
    ),
]

MINER_MISTAKES = [
    ("--pull", "--pull: needs a validator; name it with --validator host:port@ss58"),
    ("--tls-ca x", "--tls-ca: needs a validator; name it"),
    ("--validator 8091", "--validator 8091: write 127.0.0.1:8091@<the validator's ss58 address>"),
    (f"--validator x:y@{M1}", f"--validator x:y@{M1}: 'y' is no port"),
    ("--validator 8091@me", "--validator 8091@me: 'me' is no ss58 address; the validator prints its own"),
    (f"--validator 10.0.0.7:80@{M1}", "--axon.ip 127.0.0.1: 10.0.0.7:80 could not call that; .* or --pull"),
    (
        f"--validator 80@{M1} --pull --axon.tls-cert {{file}} --axon.tls-key {{file}}",
        "--axon.tls-cert: nothing is served with --pull",
    ),
    (f"--validator 80@{M1} --tls-ca {{folder}}/none --pull --device cpu", "--tls-ca {folder}/none: no such file"),
    ("--axon.external-ip 203.0.113.7:9000", ".*must be an address without a port; give .* with --axon.external-port"),
    ("--axon.external-ip [2001:db8::7]:9000", ".*must be an address without a port; give .* with --axon.external-port"),
    ("--axon.external-ip miner.example:9000", ".*must be an address without a port; give .* with --axon.external-port"),
    ("--axon.external-ip http://203.0.113.7", ".*neither an IP address nor the name of a machine"),
    ("--axon.ip 127.0.0.1:8091", "--axon.ip 127.0.0.1:8091: must be an address without a port; .* --axon.port"),
    ("--axon.ip [::1]:8091", ".*must be an address without a port; give the port with --axon.port"),
    ("--axon.ip [[::1]]", ".*neither an IP address nor the name of a machine"),
    ("--axon.external-port 65536", "--axon.external-port 65536: must be 0 to 65535"),
    ("--axon.external-port -1", "--axon.external-port -1: must be 0 to 65535"),
    (f"--validator 80@{M1} --pull --axon.external-port 9000", "--axon.external-port 9000: nothing is served with"),
    (f"--validator 80@{M1} --pull --axon.external-ip 203.0.113.7", "--axon.external-ip .*: nothing is served with"),
    (f"--validator 80@{M1} --axon.external-ip miner.example", ".*: validators call IP addresses only"),
    (f"--allow {ZERO}", f"--allow {ZERO}: no ss58 address"),
    (f"--validator 80@{ZERO}", ".*is no ss58 address"),
    ("--grace -1", "--grace -1.0: must be 0 or more"),
    ("--grace nan", "--grace nan: must be 0 or more"),
]


@pytest.mark.parametrize(("flags", "said"), VALIDATOR_MISTAKES)
def test_mistakes_in_a_validators_flags(flags: str, said: str, tmp_path: Path, capfd: Capture) -> None:
    argv = [
        "--runs",
        str(tmp_path / "runs"),
        "--device",
        "cpu",
        *shlex.split(flags.format(folder=tmp_path, file=__file__)),
    ]
    line = mistake(validator.main, argv, capfd)
    assert re.match("validator.py: " + said.format(folder=tmp_path), line), line


@pytest.mark.parametrize(("flags", "said"), MINER_MISTAKES)
def test_mistakes_in_a_miners_flags(flags: str, said: str, tmp_path: Path, capfd: Capture) -> None:
    folders = ["--cache", str(tmp_path / "cache"), "--wallet.path", str(tmp_path / "wallets")]
    line = mistake(miner.main, [*folders, *shlex.split(flags.format(folder=tmp_path, file=__file__))], capfd)
    assert re.match("miner.py: " + said.format(folder=tmp_path), line), line
