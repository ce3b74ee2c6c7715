"""Check that what the machine refuses ends a program with one line that names the flag: path, disk, stream, user."""

from __future__ import annotations

import errno
import os
import pwd
import resource
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from nanochat import dataset
from nanochat.common import base_dir
from pilot.app import cli
from pilot.app.base_train_flags import BaselineConfig
from pilot.app.miner_flags import MinerConfig
from pilot.app.path_flags import path_flags as flags_with_paths
from pilot.app.path_flags import paths_given, replaced, usable
from pilot.app.validator_flags import ValidatorConfig
from pilot.common.paths import PathError, blamed, check_path, check_room, naming
from pilot.common.streams import keep_streams
from pilot.simulation.chaos.run import ChaosConfig
from pilot.simulation.flags import SimulateConfig
from pilot.storage.run_store import detecting_full_disk
from pilot.transport.wallets import load_keypair
from scripts import base_train
from scripts.base_eval import BaseEvalConfig
from scripts.tok_eval import TokEvalConfig
from scripts.tok_train import TokTrainConfig

ROOT = Path(__file__).resolve().parent.parent
Capture = pytest.CaptureFixture[str]

# Every program, and the flags of each that name what it writes.
PROGRAMS: dict[type[object], dict[str, str]] = {
    ValidatorConfig: {"--runs": "folder", "--cache": "folder"},
    MinerConfig: {"--cache": "folder"},
    BaselineConfig: {"--checkpoints": "folder", "--out": "write", "--log": "log", "--cache": "folder"},
    SimulateConfig: {"--out": "write", "--plot": "write", "--keep": "folder", "--cache": "folder"},
    ChaosConfig: {"--folder": "folder"},
    BaseEvalConfig: {"--json": "write"},
    TokTrainConfig: {"--out": "write"},
    TokEvalConfig: {},
}
NAMES = {  # flags that take a name or a path
    *("--gpt2.text", "--gpt2.model", "--gpt2.tokenizer", "--nanochat.text", "--nanochat.tokenizer", "--admit"),
    "--data",
}

UNUSABLE = {  # by use, what no such flag takes, and what is said of it
    "any": {
        "~nouser/x": "there is no user nouser; for a name that begins with ~, write ./~nouser/x",
        "n" * 300: "too long; a name has at most 255 bytes",
        "n/" * 3000: "too long",
        "a\0b": "holds a NUL character",
        "\ud800": "holds characters that no file name can have here",
        "loop": "is a link to",
    },
    "read": {"/dev/zero": "is a device", "/dev/full": "is a device", "dangling": "is a link to what is not there"},
    "write": {
        "/dev/full": "is no regular file",
        "folder": "must be a file in a folder that is there",
        "none/x": "must be a file in a folder that is there",
        "file/x": "must be a file in a folder that is there",
        "dangling": "must be a file in a folder that is there",
        "/proc/x": "cannot write into /proc",
    },
    "log": {"folder": "must be a file in a folder that is there", "none/x": "must be", "/proc/x": "cannot write"},
    "folder": {
        "file": "is no folder",
        "file/x": "is no folder",
        "dangling": "is a link to what is not there",
        "dangling/x": "is a link to what is not there",
        "/dev/full": "is no folder",
        "/dev/null/x": "is no folder",
        "/proc/x/y": "cannot write into /proc",
    },
}
FLAGS = [(config, option) for config in PROGRAMS for option in flags_with_paths(config)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nothing/there")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- flags that name paths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", PROGRAMS, ids=lambda config: config.__name__)
def test_every_flag_says_how_its_path_is_used(config: type[object]) -> None:
    found = {option: flag.path for option, flag in flags_with_paths(config).items()}
    assert {option: use for option, use in found.items() if use != "read"} == PROGRAMS[config]
    if issubclass(config, ValidatorConfig | BaselineConfig | TokTrainConfig):
        assert NAMES & {"--" + name for name in cli.flatten(config())} - found.keys() == set()


@pytest.mark.parametrize(("config", "option"), FLAGS, ids=lambda value: getattr(value, "__name__", value))
def test_an_unusable_path_is_refused(config: type[object], option: str, place: Path) -> None:
    flag = flags_with_paths(config)[option]
    assert flag.path is not None
    for text, said in {**UNUSABLE["any"], **UNUSABLE[flag.path]}.items():
        value = (text,) if isinstance(flag.default, tuple) else text
        given = tuple(map(Path, value)) if flag.type == tuple[Path, ...] else value
        with pytest.raises(ValueError, match=f"^{option} ") as refused:
            usable(with_flag(config(), flag.name, given if isinstance(flag.default, str | tuple) else Path(text)))
        assert said in str(refused.value)
    assert sorted(path.name for path in place.iterdir()) == ["dangling", "file", "folder", "loop"]


def with_flag(config: object, name: str, value: object) -> object:
    return replaced(config, {name: value})


@pytest.mark.parametrize(("config", "option"), FLAGS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("form", [lambda option: [option, ""], lambda option: [f"--{option[2:].replace('-', '_')}="]])
def test_an_empty_path_is_not_the_current_folder(
    config: type[object], option: str, form: Callable[[str], list[str]], capfd: Capture
) -> None:
    if flags_with_paths(config)[option].default == "":
        pytest.skip("its default is empty")
    with pytest.raises(SystemExit) as ended:
        cli.parse(config, "program", form(option))
    said = f"program: {option} '': is empty; give a value, or leave {option} out\n"
    assert (ended.value.code, capfd.readouterr().err) == (2, said)


def test_a_path_in_a_file_of_flags_is_checked_and_expanded(place: Path, capfd: Capture) -> None:
    file = place / "flags.json"
    file.write_text('{"out": "~/x", "cache": "folder"}')
    assert cli.parse(BaselineConfig, "program", ["--config", str(file)]).out == Path.home() / "x"
    file.write_text('{"gpt2": {"text": ""}}')
    with pytest.raises(SystemExit):
        cli.parse(BaselineConfig, "program", ["--config", str(file)])
    assert capfd.readouterr().err.startswith("program: --gpt2.text '': is empty")


def test_usable_paths_are_left_alone(place: Path) -> None:
    (place / "link").symlink_to("file")
    for use, paths in {
        "read": ("file", "folder", "none", "dangling/none"),
        "write": ("file", "new", "link", "a\nb", "\udcff"),
        "log": ("file", "new", "/dev/null", "/dev/full"),
        "folder": ("folder", "new", "new/deep/er"),
    }.items():
        for path in paths:
            check_path("--flag", Path(path), use)  # type: ignore[arg-type]
    assert not (place / "new").exists()
    assert (place / "file").read_text() == "x"


@pytest.mark.parametrize("bad", ["", "~nouser/x", "file", "file/x", "/proc/x", "dangling"])
def test_the_folder_of_shards(bad: str, place: Path, capfd: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        dataset.main(["-n", "1", "--folder", bad])
    [line] = capfd.readouterr().err.splitlines()
    assert (ended.value.code, line.startswith(f"dataset: --folder {bad}")) == (2, True), line


def test_nanochats_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~nouser/x")
    with pytest.raises(ValueError, match=r"^NANOCHAT_BASE_DIR ~nouser/x: there is no user nouser"):
        base_dir()


def test_certificates_are_read_before_anything_else(place: Path) -> None:
    for config, said in (
        (ValidatorConfig(axons=("1",), tls_ca=Path("none")), "--tls-ca none: no such file"),
        (ValidatorConfig(axons=("1",), tls_ca=Path("file")), "--tls-ca file: no certificate"),
        (ValidatorConfig(axons=("1",), tls_ca=Path("folder")), "--tls-ca folder: no such file"),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            config.check()


@pytest.mark.parametrize("path", ["file", "file/x", "/proc/x"])
def test_a_folder_of_wallets_that_cannot_be(path: str, place: Path) -> None:
    with pytest.raises(ValueError, match=f"^--wallet.path {path}: .*(Not a directory|No such file)"):
        load_keypair("default", "default", path, create=True, say=print)


# --- users without a name or a home -----------------------------------------------------------------------------------


@pytest.fixture
def nobody(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user as in a container that knows only its number."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    before = dict(os.environ)
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("nobody")
def test_without_a_home_folder_the_flag_is_named(capfd: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parse(MinerConfig, "miner.py", ["--wallet.path", "folder"])
    said = "miner.py: --cache ~/.cache/pilot/miner: this user has no home folder; set HOME, or give another --cache\n"
    assert (ended.value.code, capfd.readouterr().err) == (2, said)


@pytest.mark.usefixtures("nobody")
def test_with_paths_a_user_needs_neither_name_nor_home() -> None:
    import getpass

    cli.parse(MinerConfig, "miner.py", ["--wallet.path", "folder", "--cache", "folder"])
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert Path.home() == Path("/nonexistent")  # bittensor looks for it when it is imported


# --- disks ------------------------------------------------------------------------------------------------------------


def test_a_later_error_names_the_flag(place: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(PathError, match=r"^--cache c: No space left on device; free some space"),
        naming("--cache", "c"),
    ):
        raise full
    with pytest.raises(OSError, match="No such file"), naming("--cache", "c"):
        open("other")  # noqa: SIM115 - missing
    with pytest.raises(OSError, match="Connection refused"), naming("--cache", "c"):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    paths = paths_given(ValidatorConfig, ["--runs", "r", "--cache=c", "--axons", "1"])
    inner = str(place / "r/demo/snapshots")
    line = blamed(PermissionError(errno.EACCES, "Permission denied", inner), paths)
    assert line == f"--runs r: {inner}: Permission denied; allow it, or name another"
    assert "ulimit -n" in (blamed(OSError(errno.EMFILE, "Too many open files", "x"), paths) or "")
    assert blamed(OSError(errno.EBADF, "Bad file descriptor"), paths) is None
    assert blamed(ConnectionResetError(errno.ECONNRESET, "reset"), paths) is None


def test_a_ledger_that_cannot_be_opened_names_the_folder_of_runs() -> None:
    said = "^--runs /proc: /proc/demo/ledger.sqlite: unable to open database file; allow it"
    with pytest.raises(PathError, match=said), detecting_full_disk(Path("/proc/demo")):
        sqlite3.connect("/proc/demo/ledger.sqlite")


def test_room_is_looked_for_before_the_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_room("--out", Path("new/x"), 1)
    with pytest.raises(ValueError, match=r"^--out x: takes 1e\+03 PB|^--out x: takes .* and its disk has .* left"):
        check_room("--out", Path("x"), 10**18)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 100))
    with pytest.raises(ValueError, match=r"^--out x: takes 101 B; `ulimit -f` allows 100 B a file"):
        check_room("--out", Path("x"), 101)


BASELINE = "--task quadratic --rounds 2 --batches 1 --quadratic.dimension 64 --quadratic.samples 8 --device cpu"


def refused(main: Callable[[Sequence[str]], None], argv: Sequence[str], capfd: Capture) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    [line] = capfd.readouterr().err.splitlines()
    return ended.value.code, line


def test_a_disk_that_fills_up_in_training(place: Path, capfd: Capture) -> None:
    argv = [*BASELINE.split(), "--cache", str(place), "--log", "/dev/full"]
    code, line = refused(base_train.main, argv, capfd)
    assert (code, line) == (
        1,
        "base_train.py: --log /dev/full: No space left on device; free some space, or name another disk",
    )


def test_no_training_without_room_for_its_result(place: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 100))
    argv = [*BASELINE.split(), "--cache", str(place), "--log", str(place / "log"), "--out", "x"]
    code, line = refused(base_train.main, argv, capfd)
    assert (code, line.startswith("base_train.py: --out x: takes 256 B; `ulimit -f` allows")) == (2, True), line
    assert not (place / "log").exists()


def test_a_full_cache_is_not_blamed_on_the_text(place: Path) -> None:
    (place / "text.txt").write_text("word " * 20_000)
    command = [sys.executable, str(ROOT / "scripts/base_train.py"), "--rounds", "1", "--device", "cpu"]
    ended = subprocess.run(
        [*command, "--gpt2.text", "text.txt", "--cache", "c"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        capture_output=True,
        text=True,
    )
    line = "base_train.py: --cache c: File too large; free some space, or name another disk\n"
    assert (ended.returncode, ended.stderr) == (1, line)


# --- ports and devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["", "gpu", "cuda:99", "cuda:-1", "cpu:1", "meta", "xla", "cuda:x", "é", "cuda:0 "])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ValueError, match=f"^--device {device}: "):
        cli.pick_device(device)


# --- streams ----------------------------------------------------------------------------------------------------------

PRINTS = """
import sys
sys.path.insert(0, "src")
from pilot.common import interrupts
from pilot.common.streams import keep_streams, lost_output
interrupts.catch("demo") if len(sys.argv) > 1 else keep_streams()
import os
opened = os.open(os.devnull, os.O_RDONLY)
for i in range(3000):
    print("a line \\u2588 \\udcff", flush=i % 100 == 0)
assert opened > 2, opened
print("done", file=sys.stderr)
if len(sys.argv) > 1:
    os.kill(os.getpid(), 15)
    os.read(os.pipe()[0], 1)
sys.exit(3 if lost_output() else 0)
"""


def prints(redirection: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$0" -c "$@" {redirection}', sys.executable, PRINTS, *flags],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("redirection", "said", "code"),
    [
        ("", "done\n", 0),
        (">&-", "done\n", 0),
        ("<&- >&-", "done\n", 0),
        ("<&- >&- 2>&-", "", 0),
        ("2>&-", "", 0),
        ("| head -1", "done\n", 0),
        ("| true", "done\n", 0),
        ("2>&1 | true", "", 0),
        ("> /dev/full", "standard output: No space left on device; no more is shown\ndone\n", 3),
        ("> /dev/full 2> /dev/full", "", 3),
    ],
)
def test_what_is_printed_never_ends_a_program(redirection: str, said: str, code: int) -> None:
    ended = prints(redirection)
    assert (ended.stderr, ended.returncode) == (said, code)


@pytest.mark.parametrize("redirection", [">&-", "<&- >&- 2>&-", "| true"])
def test_signals_end_a_program_whose_streams_are_closed(redirection: str) -> None:
    assert prints(redirection, "catch signals").returncode == 130


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_a_terminal_that_lacks_characters_shows_others(environment: dict[str, str]) -> None:
    ended = prints("", **environment)
    assert (ended.stderr, ended.returncode, ended.stdout.count("a line ")) == ("done\n", 0, 3000)


def test_a_pipe_that_does_not_block_gets_every_line() -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with subprocess.Popen(
        [sys.executable, "-c", PRINTS], stdout=theirs, stderr=subprocess.DEVNULL, cwd=ROOT
    ) as process:
        theirs.close()
        received = b"".join(iter(lambda: ours.recv(1 << 16), b""))
    ours.close()
    assert (received.count(b"\n"), process.returncode) == (3000, 0)


def test_streams_that_a_test_replaced_stay(capsys: Capture) -> None:
    before = sys.stdout
    keep_streams()
    assert sys.stdout is before


@pytest.mark.parametrize("program", ["src/validator.py", "scripts/tok_train.py"])
def test_help_in_a_locale_without_unicode(program: str) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run([sys.executable, program, "--help-all"], cwd=ROOT, env=environment, capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_training_goes_on_when_its_reader_has_left(place: Path) -> None:
    command = f'"$0" {ROOT / "scripts/base_train.py"} {BASELINE} --cache c --out x | true'
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", command, sys.executable], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (place / "x").stat().st_size > 256


def test_a_broken_program_still_shows_its_traceback() -> None:
    @cli.program("demo", MinerConfig)
    def main(argv: Sequence[str] | None = None) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    with pytest.raises(OSError, match="Bad file descriptor"):
        main([])
