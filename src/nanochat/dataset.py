"""Shards of text: parquet files with a column of documents, from the hub or your own.

    python -m nanochat.dataset -n 240

downloads the first 240 shards of ClimbMix-400B (shuffled) and the last one, which is for validation. It keeps complete
shards and continues partial ones. Exit code 0: all are there; 1: some are missing, and named; 2: a wrong flag. Any
folder of parquet files with such a column works as well.
"""

from __future__ import annotations

from pilot.common import interrupts

if __name__ == "__main__":
    interrupts.catch("dataset", "stopped; the same command goes on from here")

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from nanochat.shards import ShardError, check_shard, data_dir, list_shards, read_shard
from pilot.common.paths import check_path, expanded
from pilot.common.streams import keep_streams

if TYPE_CHECKING:
    import aiohttp

    from nanochat.download import File, Patience

__all__ = ["ShardError", "Wanted", "check_shard", "data_dir", "download", "list_shards", "main", "read_shard"]

BASE_URL = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main"
LAST = 6542  # the number of the last shard
SUMS = "SHA256SUMS"
LINE_S = 5.0  # between two lines without a terminal
NAMED = 20  # missing shards named at most

Say = Callable[[str], object]


# --- downloading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """The shards to download, their source and destination."""

    shards: int  # this many from the start, and the last one; -1: all
    folder: Path
    base_url: str = BASE_URL
    checksums: str | None = None  # a file or an address; None: SHA256SUMS beside the shards, if there is one
    last: int = LAST
    workers: int = 4
    attempts: int = 5
    wait_s: float = 1.0  # before the second attempt

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"--base-url {self.base_url}: must begin with http:// or https://")
        if self.last < 1:
            raise ValueError(f"--last {self.last}: must be 1 or more")
        if self.shards != -1 and not 1 <= self.shards <= self.last:
            raise ValueError(f"-n {self.shards}: must lie between 1 and {self.last}, or be -1 for all")
        if not 1 <= self.workers <= 64:
            raise ValueError(f"-w {self.workers}: must lie between 1 and 64")
        if self.attempts < 1:
            raise ValueError(f"--attempts {self.attempts}: must be 1 or more")
        if not 0 <= self.wait_s <= 60:
            raise ValueError(f"--wait-s {self.wait_s}: must lie between 0 and 60")

    @property
    def names(self) -> list[str]:
        first = self.last if self.shards == -1 else self.shards
        return [f"shard_{number:05d}.parquet" for number in (*range(first), self.last)]


@dataclass
class Outcome:
    """The result of a download, by the shards' names."""

    there: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # why


async def download(wanted: Wanted, display: Display) -> Outcome:
    """Download the missing shards. Raises ValueError if the given checksums or the folder are not available."""
    import aiohttp

    from nanochat.download import Patience

    try:
        wanted.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--folder {wanted.folder}: {error.strerror}") from None
    outcome, patience = Outcome(), Patience(wanted.attempts, wanted.wait_s)
    async with aiohttp.ClientSession(trust_env=True) as session:
        sums = await _checksums(session, wanted, patience)
        left = iter(wanted.names)  # shared: each worker takes the next

        async def work() -> None:
            for name in left:
                await _one(session, wanted, name, sums.get(name), patience, outcome, display)

        async with asyncio.TaskGroup() as group:
            for _ in range(wanted.workers):
                group.create_task(work())
    return outcome


async def _one(
    session: aiohttp.ClientSession,
    wanted: Wanted,
    name: str,
    sha256: str | None,
    patience: Patience,
    outcome: Outcome,
    display: Display,
) -> None:
    from nanochat.download import DownloadError, File, fetch

    file = File(f"{wanted.base_url.rstrip('/')}/{name}", wanted.folder / name, check_shard, sha256)
    try:
        if not await asyncio.to_thread(_is_whole, file, display.say):
            await fetch(session, file, patience, display.grew)
        outcome.there.append(name)
        display.ended(file)
    except (DownloadError, OSError) as error:
        outcome.missing[name] = str(error)
        display.say(str(error))


def _is_whole(file: File, say: Say) -> bool:
    """Check that the file exists with an intact footer and the right digest, if known; delete it otherwise."""
    from nanochat.download import sha256

    if not file.path.exists():
        return False
    try:
        check_shard(file.path)
        if file.sha256 is not None and sha256(file.path) != file.sha256:
            raise ShardError(f"{file.path}: is not what {SUMS} says")
    except ShardError as error:
        say(f"{error}; fetched again")
        file.path.unlink()
        return False
    return True


async def _checksums(session: aiohttp.ClientSession, wanted: Wanted, patience: Patience) -> dict[str, str]:
    """Return the sha256 digests by name, from --checksums or from the file beside the shards, if there is one."""
    given = wanted.checksums
    if given is not None and not given.startswith(("http://", "https://")):
        try:
            return _parse_sums(
                given, Path(expanded("--checksums", given)).read_text(encoding="utf-8", errors="replace")
            )
        except OSError as error:
            raise ValueError(f"--checksums {given}: {error.strerror}") from None
    text = await _get_text(session, given or f"{wanted.base_url.rstrip('/')}/{SUMS}", patience)
    if text is None:
        if given is not None:
            raise ValueError(f"--checksums {given}: cannot be had")
        return {}
    return _parse_sums(given or SUMS, text)


async def _get_text(session: aiohttp.ClientSession, url: str, patience: Patience) -> str | None:
    import aiohttp

    from nanochat.download import TIMEOUT

    for attempt in range(1, patience.attempts + 1):
        try:
            async with session.get(url, timeout=TIMEOUT) as response:
                if response.status == 200:
                    return await response.text(errors="replace")
                if 400 <= response.status < 500 and response.status != 429:
                    return None
        except (aiohttp.ClientError, TimeoutError):
            pass  # tried again
        if attempt < patience.attempts:
            await asyncio.sleep(patience.before(attempt))
    return None


def _parse_sums(origin: str, text: str) -> dict[str, str]:
    """Parse the lines of sha256sum: "<64 hex digits>  <name>"."""
    from nanochat.download import SHA256

    sums = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        digest, _, name = line.strip().partition(" ")
        if not SHA256.fullmatch(digest.lower()) or not name.strip():
            raise ValueError(f"--checksums {origin}: line {number} is not a sha256 and a name")
        sums[Path(name.strip().lstrip("*")).name] = digest.lower()
    return sums


class Display:
    """Show shards and bytes: a bar on a terminal, otherwise a line every few seconds. A context manager."""

    def __init__(self, shards: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(highlight=False)
        self._live = console.is_terminal and console.file.isatty()
        columns = (TextColumn("shards"), BarColumn(), TextColumn("{task.fields[line]}"), TimeRemainingColumn())
        self._bars = Progress(*columns, console=console, disable=not self._live)
        self._task = self._bars.add_task("shards", total=shards, line="")
        self._shards, self._done = shards, 0
        self._began = self._spoke = time.monotonic()
        self._bytes = 0  # bytes downloaded by this call
        self._held: dict[Path, int] = {}  # bytes held by each file that is downloading
        self._sizes: dict[Path, int] = {}

    def grew(self, file: File, held: int) -> None:
        self._bytes += max(0, held - self._held.get(file.path, held))
        self._held[file.path] = held
        self._sizes[file.path] = max(file.size or 0, held, 1)
        self._show()

    def ended(self, file: File) -> None:
        self._done += 1
        self._held.pop(file.path, None)
        self._show(last=self._done == self._shards)

    def say(self, line: str) -> None:
        if self._live:
            self._bars.console.print(line, markup=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def _show(self, last: bool = False) -> None:
        now = time.monotonic()
        rate = self._bytes / 1e6 / max(now - self._began, 1e-9)
        line = f"{self._done:,} of {self._shards:,}, {self._bytes / 1e6:,.1f} MB, {rate:,.1f} MB/s"
        parts = sum(held / self._sizes[path] for path, held in self._held.items())
        self._bars.update(self._task, completed=self._done + parts, line=line)
        if not self._live and (last or now - self._spoke >= LINE_S):
            self._spoke = now
            print(f"shards: {line}", flush=True)

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    keep_streams()
    try:
        wanted = _parse(argv)
        with Display(len(wanted.names)) as display:
            outcome = asyncio.run(download(wanted, display))
    except ValueError as error:
        _fail(str(error))
    if not outcome.missing:
        print(f"all {len(outcome.there):,} shards are in {wanted.folder}")
        return 0
    names = sorted(outcome.missing)
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    counted = f"{len(names):,} of {len(wanted.names):,} shards are missing"
    print(f"dataset: {counted}: {', '.join(names[:NAMED])}{more}", file=sys.stderr)
    return 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(f"{message}; see --help")


def _fail(reason: str) -> NoReturn:
    print(f"dataset: {reason}", file=sys.stderr)
    raise SystemExit(2)


def _parse(argv: Sequence[str] | None) -> Wanted:
    parser = _Parser(prog="python -m nanochat.dataset", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("-n", "--num-files", dest="shards", type=int, required=True, help="the first so many; -1: all")
    add("-w", "--num-workers", dest="workers", type=int, default=4, help="downloads at a time (default 4)")
    add("--folder", default=None, help="where they go (default base_data in NANOCHAT_BASE_DIR)")
    add("--base-url", default=BASE_URL, help="where they come from: the address without the file's name")
    add("--checksums", default=None, help=f"file or address of lines as sha256sum's (default {SUMS} there, if any)")
    add("--last", type=int, default=LAST, help=f"number of the last shard (default {LAST})")
    add("--attempts", type=int, default=5, help="of a shard without a new byte (default 5)")
    add("--wait-s", type=float, default=1.0, help="seconds before the second; doubled for each (default 1)")
    values = vars(parser.parse_args(argv))
    values["folder"] = data_dir() if values["folder"] is None else Path(expanded("--folder", values["folder"]))
    check_path("--folder", values["folder"], "folder")
    return Wanted(**values)


if __name__ == "__main__":
    sys.exit(main())
