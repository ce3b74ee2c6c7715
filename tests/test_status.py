"""GET /v1/status of both programs: what health checks and curious people are told, and what not."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from records_samples import orders, record

from pilot.app.health import ValidatorHealth
from pilot.app.local_miners import ask_status
from pilot.common.limits import Limits
from pilot.storage.miner_store import FileMinerStore
from pilot.storage.run_store import RunStore
from pilot.transport.auth import Guard
from pilot.transport.server.admission import Admission
from pilot.transport.server.axon import Axon
from pilot.transport.server.gateway import Gateway
from pilot.transport.server.health import HealthServer
from pilot.worker.worker import Worker
from protocol import Health, Hotkey
from tasks.data.tokens import Tokens
from tests.echo import MINER, VALIDATOR, Echo, open_guard, serving
from tests.processes import RUN, Miner, Process, eventually, quadratic_flags, start_miner, start_validator
from tests.test_transport import free_port

FIELDS = {"protocol", "release", "role", "hotkey", "healthy", "state", "run", "round", "version", "time_ns"}
FIELDS |= {"commit_age_s", "miners"}


@dataclass(frozen=True)
class Place:
    """A run under way: it ends when the fixture does."""

    miner: Miner
    validator: Process

    def port(self, role: str) -> int:
        if role == "miner":
            return int(self.miner.port)
        return int(self.validator.wait_for(r"^status at http://127\.0\.0\.1:(\d+)/v1/status$")[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder, port = tmp_path_factory.mktemp("status"), free_port()
    flags = ("--rounds", "100000", "--axons", str(port), "--serve.port", "0", "--connect-timeout", "60")
    with start_miner(folder, "M1", port) as m1, start_validator(folder, *flags, task=quadratic_flags) as process:
        yield Place(m1, process)


def ask(port: int, method: str = "GET", path: str = "/v1/status") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def health_of(place: Place, role: str) -> Health:
    status, text = ask(place.port(role))
    assert status == 200
    assert set(json.loads(text)) == FIELDS
    return Health.model_validate_json(text)


@pytest.mark.parametrize("role", ["miner", "validator"])
def test_it_follows_the_rounds(role: str, place: Place) -> None:
    def at_work() -> Health | None:
        health = health_of(place, role)
        return health if health.version is not None else None

    first = eventually(at_work, "a round on a version")
    assert first.round is not None
    assert (first.role, first.healthy, first.run) == (role, True, RUN)
    assert first.state in ("working", "done", "training")
    assert abs(first.time_ns - time.time_ns()) < 60e9
    eventually(
        lambda: (h := health_of(place, role)).round > first.round and h.version not in (None, first.version),
        "a later round on another version",
    )


def test_the_two_are_named_by_their_own_hotkeys(place: Place) -> None:
    assert health_of(place, "miner").hotkey == place.miner.hotkey
    pinned = (place.miner.log.parent / "M1" / "M1.default" / "validator").read_text().strip()
    assert health_of(place, "validator").hotkey == pinned


@pytest.mark.parametrize("role", ["miner", "validator"])
def test_it_tells_nothing_of_this_machine(role: str, place: Place) -> None:
    _, text = ask(place.port(role))
    assert str(place.miner.log.parent) not in text
    assert "wallet" not in text
    assert len(text) < 1000


@pytest.mark.parametrize("role", ["miner", "validator"])
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/status", 405),
        ("DELETE", "/v1/status", 405),
        ("HEAD", "/v1/status", 200),
        ("HEAD", "/metrics", 404),
        ("GET", "/", 404),
        ("GET", "/v1/status/", 404),
        ("GET", "/v1/../v1/status/x", 404),
        ("GET", "/metrics", 404),
    ],
)
def test_it_is_there_and_nowhere_else(role: str, method: str, path: str, status: int, place: Place) -> None:
    assert ask(place.port(role), method, path)[0] == status


def test_a_validator_takes_no_orders(place: Place) -> None:
    assert ask(place.port("validator"), "POST", "/v1/order")[0] == 404
    assert ask(place.port("validator"), "GET", f"/v1/hello?nonce={'0' * 32}")[0] == 404


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on this machine")
@pytest.mark.parametrize("role", ["miner", "validator"])
def test_curl_as_a_container_s_health_check(role: str, place: Place) -> None:
    url = f"http://127.0.0.1:{place.port(role)}/v1/status"
    command = ["curl", "--fail", "--silent", "--show-error", "--noproxy", "*", "--max-time", "10"]
    assert subprocess.run([*command, url], check=False, capture_output=True).returncode == 0
    assert subprocess.run([*command, url + "x"], check=False, capture_output=True).returncode == 22


async def over_http(axon: Axon) -> tuple[int, str]:
    async with serving(axon) as port:
        return await asyncio.to_thread(ask, port)


def test_a_miner_whose_work_has_failed_is_not_healthy(tmp_path: Path) -> None:
    def no_tokens(spec: object) -> Tokens:
        raise AssertionError

    async def main() -> tuple[int, str]:
        worker = Worker(
            MINER.ss58_address, frozenset(), torch.device("cpu"), FileMinerStore(tmp_path), no_tokens, lambda line: None
        )
        worker.failed.set_exception(RuntimeError("a secret path"))
        worker.failed.exception()  # as miner.py does, which then ends
        try:
            return await over_http(Axon(worker, MINER, open_guard(), "127.0.0.1", 0))
        finally:
            worker.close()

    status, text = asyncio.run(main())
    assert status == 503
    assert Health.model_validate_json(text).healthy is False
    assert "secret" not in text


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("gateway", [False, True])
def test_a_validator_answers_from_memory(gateway: bool, method: str, tmp_path: Path) -> None:
    """Whoever asks, and however often, waits for no commit and causes no read."""
    store = RunStore.create(tmp_path / "demo", {"task": "gpt2"}, 2)
    asked = ValidatorHealth(tmp_path / "demo", VALIDATOR.ss58_address, store.ledger, 0, time.monotonic)
    assert asked().state == "starting"
    for round in range(3):
        store.open_round(round, orders(round))
        store.commit(record(round))

    async def main() -> tuple[int, str]:
        server: HealthServer | Gateway = HealthServer(asked, "127.0.0.1", 0, Limits())
        if gateway:
            admission = Admission("everyone", print, time.monotonic)
            server = Gateway(VALIDATOR, "gpt2", admission, asked, "127.0.0.1", 0)
        port = await server.start()
        try:
            with store.ledger._lock:  # as during a commit
                return await asyncio.to_thread(ask, port, method)
        finally:
            await server.close()

    status, text = asyncio.run(main())
    store.close()
    assert status == 200
    if method == "GET":
        health = Health.model_validate_json(text)
        assert (health.round, health.version, health.state) == (2, record(2).version, "training")
    else:
        assert text == ""


@pytest.mark.parametrize("path", ["/v1/status", f"/v1/hello?nonce={'0' * 32}"])
def test_head_is_a_get_without_its_body(path: str) -> None:
    async def main() -> tuple[bytes, bytes]:
        async with serving(Axon(Echo(), MINER, open_guard(), "127.0.0.1", 0)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            answers = []
            for method in ("HEAD", "GET"):  # over one connection: a body would be taken for the next answer
                writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                answers.append(await reader.readuntil(b"\r\n\r\n"))
            writer.close()
            return answers[0], answers[1]

    got_head, got = asyncio.run(main())
    assert got_head.startswith(b"HTTP/1.1 200 ")
    assert [line.split(b":")[0] for line in got_head.splitlines()] == [line.split(b":")[0] for line in got.splitlines()]


def test_asking_pins_nobody() -> None:
    pinned: list[Hotkey] = []

    async def main() -> tuple[int, str]:
        return await over_http(Axon(Echo(), MINER, Guard(frozenset(), None, pinned.append), "127.0.0.1", 0))

    assert asyncio.run(main())[0] == 200
    assert not pinned


def test_a_local_miner_is_asked_whatever_proxy_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.delenv("no_proxy", raising=False)

    async def main() -> Health:
        async with serving(Axon(Echo(), MINER, open_guard(), "127.0.0.1", 0)) as port:
            return await asyncio.to_thread(ask_status, f"127.0.0.1:{port}@{MINER.ss58_address}")

    assert asyncio.run(main()).healthy
