"""Shards: read, damaged, and fetched over real HTTP from a server that does everything wrong that a server can."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web

from nanochat.dataset import (
    Display,
    Outcome,
    ShardError,
    Wanted,
    check_shard,
    download,
    list_shards,
    main,
    read_shard,
)

SRC = Path(__file__).resolve().parent.parent / "src"
TEXTS = [f"document {number}: " + "words and words " * (number % 7) for number in range(50)]


def write_shard(path: Path, texts: list[Any] = TEXTS, column: str = "text", kind: pa.DataType | None = None) -> Path:
    pq.write_table(pa.table({column: pa.array(texts, kind)}), path, row_group_size=16, compression="zstd")
    return path


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_shard_is_read_from_any_row_on(tmp_path: Path, kind: pa.DataType) -> None:
    path = write_shard(tmp_path / "s.parquet", kind=kind)
    for start in (0, 1, 15, 16, 17, 47, 49, 50, 99):
        assert list(read_shard(path, start=start)) == TEXTS[start:]


def test_rows_without_a_text_are_left_out(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "s.parquet", ["a", None, "", "b"], column="story")
    assert list(read_shard(path, "story")) == ["a", "", "b"]
    assert list(read_shard(path, "story", start=2)) == ["", "b"]


def test_a_shard_is_streamed(tmp_path: Path) -> None:
    """What comes before a damaged row group is there before the damage is met."""
    path = write_shard(tmp_path / "s.parquet")
    metadata = pq.read_metadata(path)
    data = bytearray(path.read_bytes())
    column = metadata.row_group(2).column(0)
    begin = min(at for at in (column.dictionary_page_offset, column.data_page_offset) if at)
    data[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    texts = read_shard(path)
    assert [next(texts) for _ in range(32)] == TEXTS[:32]
    with pytest.raises(ShardError, match=r"s\.parquet: cannot be read"):
        next(texts)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"not a parquet file at all"), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "cannot be read"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: write_shard(path, column="body"), "has no column text, only body"),
        (lambda path: write_shard(path, [1, 2]), "column text holds int64, not text"),
        (lambda path: write_shard(path, [b"a"]), "column text holds binary, not text"),
    ],
)
def test_a_bad_shard_is_named(tmp_path: Path, spoil: Callable[[Path], Any], match: str) -> None:
    bad = write_shard(tmp_path / "b.parquet")
    spoil(bad)
    for read in (lambda: list(read_shard(bad)), lambda: check_shard(bad, "text")):
        with pytest.raises(ShardError, match=rf"b\.parquet: {match}") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_the_shards_of_a_folder_are_sorted(tmp_path: Path) -> None:
    others = ("notes.txt", "shard_00003.parquet.part", "._shard_00002.parquet")
    for name in ("shard_00010.parquet", "shard_00002.parquet", *others):
        (tmp_path / name).touch()
    assert [path.name for path in list_shards(tmp_path)] == ["shard_00002.parquet", "shard_00010.parquet"]
    assert list_shards(tmp_path / "nonesuch") == []


# --- downloading ------------------------------------------------------------------------------------------------------

LAST = 5
NAMES = ["shard_00000.parquet", "shard_00001.parquet", "shard_00005.parquet"]


class Server:
    """Serves shards as the hub does: over a redirect that tells the digest. `tricks` play once each, in turn."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.shards = {
            f"shard_{number:05d}.parquet": write_shard(
                folder / f"{number}.parquet", [os.urandom(3000).hex() for _ in range(100)]
            ).read_bytes()
            for number in range(LAST + 1)
        }
        self.url = ""
        self.sums: str | None = None
        self.digests = True
        self.tricks: dict[str, list[str]] = {}
        self.always: dict[str, str] = {}
        self.asked: list[tuple[str, str | None]] = []  # each GET of a shard, with its Range
        self.sent = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        app = web.Application()
        app.add_routes([web.get("/main/{name}", self._redirect), web.get("/cdn/{name}", self._serve)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}/main"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _redirect(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name == "SHA256SUMS" and self.sums is not None:
            return web.Response(text=self.sums)
        if name not in self.shards:
            raise web.HTTPNotFound
        headers = {"Location": f"/cdn/{name}"}
        if self.digests:
            data = self.shards[name]
            headers |= {"X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        return web.Response(status=302, headers=headers)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        data = self.shards[name]
        self.asked.append((name, request.headers.get("Range")))
        waiting = self.tricks.get(name)
        trick = waiting.pop(0) if waiting else self.always.get(name, "")
        if trick.isdecimal():
            return web.Response(status=int(trick), headers={"Retry-After": "0"})
        held = 0
        if "Range" in request.headers and trick not in ("ignores ranges", "truncates from the start"):
            held = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if held >= len(data):
            return web.Response(status=416, headers={"Content-Range": f"bytes */{len(data)}"})
        if trick == "another range":
            held = 0
        part = data[held:]
        if trick == "wrong bytes":
            part = bytes(len(part) // 2) + part[len(part) // 2 :]
        if trick == "a whole file of something else":
            part = b"<html>sign in</html>"
        response = web.StreamResponse(status=206 if held or trick == "another range" else 200)
        if response.status == 206:
            response.headers["Content-Range"] = f"bytes {held}-{len(data) - 1}/{len(data)}"
        response.content_length = len(part)
        await response.prepare(request)
        if trick.startswith(("truncates", "resets")):
            await response.write(part[: max(1, len(part) // 2)])
            self.sent += max(1, len(part) // 2)
            await asyncio.sleep(0.05)
            if trick == "truncates only after a while":
                await asyncio.sleep(60)
            assert request.transport is not None
            request.transport.abort() if trick == "resets" else request.transport.close()
            return response
        await response.write(part)
        self.sent += len(part)
        return response


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "served")


def fetched(server: Server, folder: Path, shards: int = 2, **options: Any) -> Outcome:
    async def run() -> Outcome:
        async with server.running():
            values = {"base_url": server.url, "last": LAST, "attempts": 3, "wait_s": 0.01, **options}
            wanted = Wanted(shards, folder, **values)
            with Display(len(wanted.names)) as display:
                return await download(wanted, display)

    return asyncio.run(run())


def assert_all_there(server: Server, folder: Path, outcome: Outcome, names: list[str] = NAMES) -> None:
    assert outcome.missing == {}
    assert sorted(outcome.there) == names
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: server.shards[name] for name in names}


def test_the_first_shards_and_the_last_are_fetched_once(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "base"
    assert_all_there(server, folder, fetched(server, folder))
    assert sorted(server.asked) == [(name, None) for name in NAMES]
    assert_all_there(server, folder, fetched(server, folder))
    assert len(server.asked) == len(NAMES)
    assert_all_there(server, folder, fetched(server, folder, shards=-1), sorted(server.shards))
    assert len(server.asked) == len(server.shards)


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize(
    "tricks",
    [
        ["503", "429"],
        ["truncates"] * 6,  # more than the attempts: each brings something new
        ["resets", "503", "resets", "resets"],
        ["truncates", "ignores ranges"],
        ["truncates", "another range"],
        ["a whole file of something else", "500"],
    ],
    ids=" ".join,
)
def test_a_bad_line_only_takes_longer(server: Server, tmp_path: Path, tricks: list[str], digests: bool) -> None:
    server.digests = digests
    server.tricks = {NAMES[0]: [*tricks]}
    assert_all_there(server, tmp_path / "data", fetched(server, tmp_path / "data"))
    assert server.tricks == {NAMES[0]: []}


def test_what_was_begun_goes_on(server: Server, tmp_path: Path) -> None:
    folder, name = tmp_path / "data", NAMES[0]
    folder.mkdir()
    data = server.shards[name]
    half = len(data) // 2
    (folder / f"{name}.part").write_bytes(data[:half])
    assert_all_there(server, folder, fetched(server, folder))
    assert [asked for asked in server.asked if asked[0] == name] == [(name, f"bytes={half}-")]
    assert server.sent == half + len(data) % 2 + sum(len(server.shards[other]) for other in NAMES[1:])


@pytest.mark.parametrize("left", ["all of it", "more than it", "something else"])
@pytest.mark.parametrize("digests", [True, False])
def test_whatever_was_left_behind_ends_right(server: Server, tmp_path: Path, left: str, digests: bool) -> None:
    """Without a digest the middle of a shard is taken on trust: its length and its footer are not."""
    folder, name = tmp_path / "data", NAMES[0]
    folder.mkdir()
    data = server.shards[name]
    content = {"all of it": data, "more than it": data + b"more", "something else": bytes(len(data))}[left]
    (folder / f"{name}.part").write_bytes(content)
    server.digests = digests
    assert_all_there(server, folder, fetched(server, folder))
    if left == "all of it":
        assert (name, None) not in server.asked


@pytest.mark.parametrize("how", ["the server's", "beside the shards", "a file"])
def test_wrong_bytes_are_never_taken(server: Server, tmp_path: Path, how: str) -> None:
    folder, name = tmp_path / "data", NAMES[1]
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in server.shards.items())
    options = {}
    server.digests = how == "the server's"
    if how == "beside the shards":
        server.sums = sums
    if how == "a file":
        (tmp_path / "sums").write_text(sums)
        options["checksums"] = str(tmp_path / "sums")
    server.tricks = {name: ["wrong bytes"]}
    assert_all_there(server, folder, fetched(server, folder, **options))
    (folder / name).unlink()
    server.always = {name: "wrong bytes"}
    outcome = fetched(server, folder, **options)
    assert list(outcome.missing) == [name]
    assert "wrong bytes (sha256 is " in outcome.missing[name]
    assert "given up after 3 attempts" in outcome.missing[name]
    assert sorted(path.name for path in folder.iterdir()) == sorted({*NAMES} - {name})


def test_a_shard_without_a_whole_footer_is_never_taken(server: Server, tmp_path: Path) -> None:
    server.digests = False
    server.shards[NAMES[0]] = server.shards[NAMES[0]][:-100]
    outcome = fetched(server, tmp_path / "data")
    assert list(outcome.missing) == [NAMES[0]]
    assert "wrong bytes" in outcome.missing[NAMES[0]]


def test_a_spoilt_shard_is_fetched_again(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    fetched(server, folder)
    (folder / NAMES[0]).write_bytes(server.shards[NAMES[0]][:-100])
    server.sums = f"{hashlib.sha256(server.shards[NAMES[1]]).hexdigest()}  {NAMES[1]}\n"
    spoilt = bytearray(server.shards[NAMES[1]])
    spoilt[1000] ^= 1
    (folder / NAMES[1]).write_bytes(spoilt)
    assert_all_there(server, folder, fetched(server, folder))


def test_shards_that_stay_away_are_named_and_the_others_come(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    server.always = {NAMES[0]: "404", NAMES[1]: "503"}
    outcome = fetched(server, folder)
    assert outcome.there == [NAMES[2]]
    assert "HTTP 404 Not Found" in outcome.missing[NAMES[0]]
    assert "HTTP 503 Service Unavailable; given up after 3 attempts" in outcome.missing[NAMES[1]]
    asked = [name for name, _ in server.asked]
    assert (asked.count(NAMES[0]), asked.count(NAMES[1])) == (1, 3)


def test_a_server_that_never_gets_any_further_is_given_up(server: Server, tmp_path: Path) -> None:
    server.always = {NAMES[0]: "truncates from the start"}
    outcome = fetched(server, tmp_path / "data")
    assert list(outcome.missing) == [NAMES[0]]
    assert "given up after 3 attempts" in outcome.missing[NAMES[0]]
    assert 3 <= [name for name, _ in server.asked].count(NAMES[0]) <= 4
    server.always = {}
    assert_all_there(server, tmp_path / "data", fetched(server, tmp_path / "data"))
    assert server.asked[-1][1] is not None, "what was there of it was not sent again"


def test_two_processes_do_not_write_one_shard(server: Server, tmp_path: Path) -> None:
    import fcntl

    folder = tmp_path / "data"
    folder.mkdir()
    with (folder / f"{NAMES[0]}.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        outcome = fetched(server, folder)
    assert outcome.missing == {NAMES[0]: f"{NAMES[0]}.part: another process is at it"}
    assert_all_there(server, folder, fetched(server, folder))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "nanochat.dataset", *flags],
            env={**os.environ, "PYTHONPATH": str(SRC), "NANOCHAT_BASE_DIR": str(tmp_path / "base")},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_the_command_as_a_process(server: Server, tmp_path: Path, command: Callable[..., Any]) -> None:
    async def run() -> list[subprocess.CompletedProcess[str]]:
        async with server.running():
            flags = ("-n", "2", "--base-url", server.url, "--last", str(LAST), "--wait-s", "0.01", "--attempts", "2")
            server.always = {NAMES[1]: "503"}
            first = await asyncio.to_thread(command, *flags)
            server.always = {}
            return [first, await asyncio.to_thread(command, *flags, "-w", "2")]

    failed, went = asyncio.run(run())
    assert failed.returncode == 1
    assert failed.stderr == f"dataset: 1 of 3 shards are missing: {NAMES[1]}\n"
    assert went.returncode == 0, went.stderr
    assert went.stderr == ""
    assert f"all 3 shards are in {tmp_path / 'base' / 'base_data'}" in went.stdout
    assert [path.name for path in list_shards(tmp_path / "base" / "base_data")] == NAMES


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_download_that_was_stopped_goes_on(server: Server, tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "data"
    server.always = {NAMES[0]: "truncates only after a while"}
    half = len(server.shards[NAMES[0]]) // 2

    async def stopped() -> tuple[int, str]:
        async with server.running():
            flags = ("-n", "2", "-w", "1", "--folder", str(folder), "--base-url", server.url, "--last", str(LAST))
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "nanochat.dataset", *flags),
                env={**os.environ, "PYTHONPATH": str(SRC)},
                stderr=asyncio.subprocess.PIPE,
            )
            part = folder / f"{NAMES[0]}.part"
            async with asyncio.timeout(60):
                while not part.exists() or part.stat().st_size < half // 2:
                    await asyncio.sleep(0.02)
                process.send_signal(number)
                _, said = await process.communicate()
            assert process.returncode is not None
            return process.returncode, said.decode()

    code, said = asyncio.run(stopped())
    if number == signal.SIGINT:
        assert (code, said) == (130, "dataset: stopped; the same command goes on from here\n")
    else:
        assert code == -signal.SIGKILL
    server.always, server.asked = {}, []
    assert_all_there(server, folder, fetched(server, folder))
    begun = next(held for name, held in server.asked if name == NAMES[0])
    assert begun is not None
    assert int(begun.removeprefix("bytes=").removesuffix("-")) >= half // 2


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ([], "the following arguments are required: -n/--num-files; see --help"),
        (["-n", "many"], "argument -n/--num-files: invalid int value: 'many'"),
        (["-n", "0"], "-n 0: must lie between 1 and 6542, or be -1 for all"),
        (["-n", "9999"], "-n 9999: must lie between 1 and 6542"),
        (["-n", "1", "-w", "0"], "-w 0: must lie between 1 and 64"),
        (["-n", "1", "--base-url", "file:///etc"], "--base-url file:///etc: must begin with http"),
        (["-n", "1", "--attempts", "0"], "--attempts 0: must be 1 or more"),
        (["-n", "1", "--wait-s", "nan"], "--wait-s nan: must lie between 0 and 60"),
        (["-n", "1", "--nonesuch"], "unrecognized arguments: --nonesuch"),
        (["-n", "1", "--checksums", "nonesuch.txt"], "--checksums nonesuch.txt: No such file or directory"),
        (["-n", "1", "--folder", "FILE"], "--folder FILE: is no folder"),
        (["-n", "1", "--checksums", "FILE"], "--checksums FILE: line 1 is not a sha256 and a name"),
    ],
)
def test_a_wrong_flag_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    match: str,
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "FILE").write_text("what is this\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"dataset: {match}")
