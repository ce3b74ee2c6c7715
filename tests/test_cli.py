"""Check that a user's mistake ends a program with one line that names flag, value and fix, exit code 2 and no harm.

The programs run inside this process through their `main`, so that torch is imported once; only the miner is a process.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

import miner
import validator
from pilot.app import cli
from pilot.app import run_folder as runs
from pilot.app.miner_flags import MinerConfig
from pilot.app.path_flags import usable
from pilot.app.validator_flags import ValidatorConfig
from pilot.storage.run_store import RunStore
from tests.processes import RUN, Miner, program, run_program, start_miner, tiny_flags

ALICE = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
Capture = pytest.CaptureFixture[str]
Main = Callable[[Sequence[str]], None]


def mistake(main: Main, argv: Sequence[str], capture: Capture) -> str:
    """Run a program that must refuse its flags; return the one line that it prints on standard error."""
    capture.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(argv)
    [line] = capture.readouterr().err.splitlines()
    assert ended.value.code == 2, line
    return line


# --- mistakes in flags ------------------------------------------------------------------------------------------------

VALIDATOR_MISTAKES = [
    ("--axons 8091 --task gtp2", "--task gtp2: unknown; known: gpt2"),
    ("--axons 8091 --codec.up fp8", "--codec.up fp8: unknown; known: fp32, bf16"),
    ("--axons 8091 --aggregation median", "--aggregation median: unknown; known: mean, median_norm_mean"),
    ("--axons 8091 --ranking elo", "--ranking elo: unknown; known: accepted_work, or your own package.module:Class"),
    ("--axons 8091 --ranking no_such:Elo", "--ranking no_such:Elo: .*; it must name an importable class"),
    ("", "--axons: no miner named; give the ports of your miners, or --local 2"),
    ("--axons 8091 --rounds 0", "--rounds 0: must be 1 or more"),
    ("--axons 8091 --batches 0", "--batches 0: must be 1 or more"),
    ("--axons 8091 --local -1", "--local -1: must be 0 or more"),
    ("--axons 8091 --snapshot-keep 1", "--snapshot-keep 1: must be 2 or more"),
    ("--axons 8091 --deadline 0", "--deadline 0: must be 0.1 or more"),
    ("--axons 8091 --deadline soon", "Error parsing --deadline: .*'soon'"),
    ("--axons 8091 --round-seconds -1", "--round-seconds -1.0: must be 0 or more"),
    ("--axons 8091 --round-seconds 60 --deadline 30", "--deadline 30: .*less than --round-seconds 60; leave"),
    ("--axons 8091 --deadline auto --quorum 0", "--quorum 0: must be a share of the miners, more than 0 and at most 1"),
    ("--axons 8091 --grace -3", "--grace -3.0: must be 0 or more"),
    ("--axons 8091 --overlap 2", "--overlap"),
    ("--axons 8091 --coverage twice", "--coverage"),
    ("--axons 8091 --gpt2.validation 3", r"--gpt2.validation 3.0: must be 0 or lie below 1, such as 0.05"),
    ("--axons 8091 --optimizer.beta1 1", r"--optimizer.beta1 1.0: must be at least 0 and below 1"),
    ("--axons 8091 --rounds many", "--rounds: .*'many'"),
    ("--axons 8091 --wandb.mode on", "'on' for argument '--wandb.mode'. Expected one of .*'offline'"),
    ("--axons 8091 --codec.down topk48", "--codec.down topk48: unknown; known: fp32, bf16, int8, int4, 2bit"),
    ("--axons 8091 --broadcast full --codec.down 2bit", "--codec.down 2bit: --broadcast full .*; choose one of these"),
    ("--axons 8091 --broadcast half", "--broadcast"),
    ("--axons 8091 --codec.feedback 2", "--codec.feedback 2: must lie between 0 .off. and 1"),
    ("--axons 8091 --digest-every -1", "--digest-every -1: must be 0 or more"),
    ("--axons 8091 --mode hogwild", "'hogwild' for argument '--mode'"),
    ("--axons 8091 --outer-lr 0.5", "--outer-lr 0.5: only --mode diloco uses it; give that too"),
    ("--axons 8091 --mode diloco --tau 0", "--tau 0: must be 1 or more"),
    ("--axons 8091 --mode diloco --warmup-sync 1", "--warmup-sync 1: must be at least 0 and below 1"),
    ("--axons 8091 --ruonds 3", "--ruonds, 3; perhaps you meant --rounds INT"),
    ("--axons 8091 --run ../demo", "--run ../demo: must be a plain name of letters, digits and .*, such as demo"),
    ("--axons 8091 --run=ünder", "--run ünder: must be a plain name of letters, digits and .*, such as demo"),
    ("--axons 99999", "--axons 99999: '99999' is no port; write 8091 or host:8091, ports are 1 to 65535"),
    ("--axons M1", "--axons M1: 'M1' is no port; write 8091 or host:8091"),
    ("--axons 10.0.0.7:8091", "--axons 10.0.0.7:8091: not on this machine; write 10.0.0.7:8091@<the miner's ss58"),
    ("--axons 10.0.0.7:8091@me", "--axons 10.0.0.7:8091@me: 'me' is no ss58 address"),
    ("--axons 8091 --device gpu", "--device gpu: unknown; use auto, cpu, cuda, cuda:N or mps"),
    ("--axons 8091 --device cuda:97", "--device cuda:97: this machine has .* cuda device; use cpu, or auto"),
    ("--axons 8091 --device cpu --threads -1", "--threads -1: must be 0 or more"),
    (
        f"--axons 10.0.0.7:8091@{ALICE} --device cpu --wallet.path {{folder}}/none",
        "--wallet.hotkey default: no key file {folder}/none/.*; make one with: btcli wallet new-hotkey -w default "
        "-H default --wallet-path {folder}/none",
    ),
    ("--resume", "--resume: there is no run in {folder}/runs; name their folder with --runs"),
    ("--resume --run demo", "--run demo: there is no such run in {folder}/runs; start it without --resume"),
]

MINER_MISTAKES = [
    ("--tasks gtp2", "--tasks gtp2: unknown; known: gpt2"),
    ("--axon.port 65536", "--axon.port 65536: must be 0 to 65535"),
    (
        "--axon.ip 0.0.0.0",
        "--axon.ip 0.0.0.0: off loopback anyone can call; name your validators' hotkeys with --allow",
    ),
    ("--allow me", "--allow me: no ss58 address; name the hotkeys of your validators"),
    ("--data {folder}/none", "--data {folder}/none: no such file or folder"),
    ("--sources bucket", "--sources bucket: write NAME=FOLDER"),
    ("--sources ../a={folder}", "--sources ../a={folder}: write NAME=FOLDER"),
    ("--sources bucket={folder}/none", "--sources bucket={folder}/none: no such folder"),
    ("--device cuda:97", "--device cuda:97: this machine has .* cuda device; use cpu, or auto"),
    ("--axon.prot 8091", "--axon.prot, 8091; perhaps you meant --axon.port INT"),
    (
        f"--axon.ip 0.0.0.0 --allow {ALICE} --device cpu --wallet.name far --wallet.path {{folder}}/none",
        "--wallet.hotkey default: no key file .*; make one with: btcli wallet new-hotkey -w far",
    ),
]


@pytest.mark.parametrize(("flags", "said"), VALIDATOR_MISTAKES)
def test_mistakes_in_a_validators_flags(flags: str, said: str, tmp_path: Path, capfd: Capture) -> None:
    argv = ["--runs", str(tmp_path / "runs"), *shlex.split(flags.format(folder=tmp_path))]
    line = mistake(validator.main, argv, capfd)
    assert re.match("validator.py: .*" + said.format(folder=tmp_path), line), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("flags", "said"), MINER_MISTAKES)
def test_mistakes_in_a_miners_flags(flags: str, said: str, tmp_path: Path, capfd: Capture) -> None:
    argv = ["--cache", str(tmp_path / "cache"), *shlex.split(flags.format(folder=tmp_path))]
    line = mistake(miner.main, argv, capfd)
    assert re.match("miner.py: .*" + said.format(folder=tmp_path), line), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["validator.py", "miner.py", "../scripts/base_train.py"])
def test_a_program_ends_with_exit_code_2(program: str) -> None:
    ended = run_program(program, "--theads", "1")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"{Path(program).name}: Unrecognized options: --theads, 1; perhaps you meant --threads INT\n"


@pytest.mark.parametrize("program_name", ["validator.py", "miner.py"])
def test_help_is_quiet_when_its_reader_is_gone(program_name: str) -> None:
    """Close the reading end first, as `--help | head -1` may."""
    ours, theirs = os.pipe()
    os.close(ours)
    ended = subprocess.run(program(program_name, "--help"), stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_busy_port(tmp_path: Path, capfd: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ["--axon.port", str(port), "--cache", str(tmp_path), "--wallet.path", str(tmp_path), "--device", "cpu"]
        line = mistake(miner.main, flags, capfd)
    assert line == f"miner.py: --axon.port {port}: already in use; choose another or 0 for any free one"


# --- a file of flags --------------------------------------------------------------------------------------------------


def write_config(folder: Path, text: str) -> list[str]:
    path = folder / "flags.json"
    path.write_text(text)
    return ["--config", str(path)]


def test_flags_override_the_values_of_a_file(tmp_path: Path) -> None:
    values = {
        "rounds": 7,
        "eval-every": 3,
        "axons": ["8091", "8092"],
        "baseline": True,
        "gpt2": {"seq-len": 64, "subset": None},
        "optimizer.weight_decay": 0.5,
        "logging": {"debug": True},
    }
    flags = write_config(tmp_path, json.dumps(values))
    config = cli.parse(ValidatorConfig, "validator.py", [*flags, "--rounds", "9", "--logging.no-debug"])
    assert (config.rounds, config.eval_every, config.axons, config.baseline) == (9, 3, ("8091", "8092"), True)
    assert (config.gpt2.seq_len, config.gpt2.subset, config.optimizer.weight_decay) == (64, None, 0.5)
    assert not config.logging.debug
    assert config.batches == ValidatorConfig().batches
    assert cli.parse(ValidatorConfig, "validator.py", [f"--config={flags[1]}"]).rounds == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"ruonds": 3}', "unknown field ruonds; the nearest known one is rounds"),
        ('{"gpt2": {"sequence_len": 3}}', "unknown field gpt2.sequence_len; the nearest known one is gpt2.seq_len"),
        ("{", "not JSON"),
        ("[1]", "must be a JSON object of flags"),
        ('{"rounds": "many"}', 'rounds is "many": input should be a valid integer'),
        ('{"rounds": [1, 2]}', r"rounds is \[1, 2\]: input should be a valid integer"),
        ('{"rounds": true}', "rounds is true: input should be a valid integer"),
        ('{"baseline": 1}', "baseline is 1: input should be a valid boolean"),
        ('{"axons": 8091}', "axons is 8091: input should be a valid"),
        ('{"axons": [8091]}', r"axons is \[8091\]: input should be a valid string"),
        ('{"rounds": 1.5}', "rounds is 1.5: input should be a valid integer"),
        ('{"optimizer": {"lr": null}}', "optimizer.lr is null: input should be a valid number"),
        ('{"optimizer": {"lr": NaN}}', "not JSON"),
        ('{"deadline": "soon"}', "deadline is \"soon\": input should be a valid number or input should be 'auto'"),
        ('{"wandb": {"mode": "on"}}', 'wandb.mode is "on": input should be .*offline'),
        ('{"resume": true}', "resume cannot be set in a file; give --resume as a flag"),
        ('{"gpt2": 3}', "unknown field gpt2"),
        ('{"gpt2": {}, "rounds": {"x": 1}}', "unknown field rounds.x"),
        ('{"rounds": 1, "rounds": 2}', "rounds is given twice; remove one"),
        ('{"gpt2": {"seq_len": 1}, "gpt2.seq-len": 2}', "gpt2.seq_len is given twice; remove one"),
        ('{"rounds": ' + "9" * 5000 + "}", "not JSON"),
        ("[" * 99_999 + "]" * 99_999, "nested too deeply; give flags like"),
        ('{"a":' * 99_999 + "1" + "}" * 99_999, "nested too deeply; give flags like"),
        ('{"a":' * 800 + "1" + "}" * 800, "(nested too deeply; give flags like|unknown field a.a.a)"),
        ('{"rounds": ' + "[" * 200 + "]" * 200 + "}", r"rounds is \[{80}…: input should be a valid integer"),
        ('{"task": "\\ud800"}', "task is"),
    ],
)
def test_mistakes_in_a_file_of_flags(text: str, said: str, tmp_path: Path, capfd: Capture) -> None:
    line = mistake(validator.main, write_config(tmp_path, text), capfd)
    assert re.match(f"validator.py: .*{said}", line), line


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_file_of_flags_may_begin_with_a_byte_order_mark(tmp_path: Path, codec: str) -> None:
    (tmp_path / "flags.json").write_bytes('{"rounds": 1}'.encode(codec))
    assert cli.parse(ValidatorConfig, "validator.py", ["--config", str(tmp_path / "flags.json")]).rounds == 1


def test_a_missing_file_of_flags(tmp_path: Path, capfd: Capture) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        line = mistake(miner.main, ["--config", str(path)], capfd)
        assert re.match(f"miner.py: --config {path}: .*; name a JSON file of flags", line), line


def test_flags_written_as_text_parse_to_the_same_configuration() -> None:
    """A resumed run reads its flags from text."""
    for config in (ValidatorConfig(axons=("1", "2"), baseline=True, local=3), MinerConfig(unpin=True, data=Path("x"))):
        values = {name: value for name, value in cli.flatten(config).items() if value is not None}
        flags = [flag for name, value in values.items() for flag in cli.as_flags(name, value)]
        assert cli.parse(type(config), "program", flags) == usable(config)


# --- with a text, a miner and a run -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "--gpt2.text {path}: no such file or folder"),
        ("", "--gpt2.text {path}: empty: there is no text in it"),
        ("of 29 letters, too few for one", "--gpt2.text.*give more text, or lower --gpt2.batch.size or --gpt2.seq.len"),
    ],
)
def test_unusable_texts(text: str | None, said: str, tmp_path: Path, capfd: Capture) -> None:
    path = tmp_path / "given.txt"
    if text is not None:
        path.write_text(text)
    line = mistake(validator.main, [*tiny_flags(tmp_path), "--axons", "1", "--gpt2.text", str(path)], capfd)
    assert re.match("validator.py: " + said.format(path=path), line), line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def worker(place: Path) -> Iterator[Miner]:
    with start_miner(place, "M1") as started:
        yield started


@pytest.fixture(scope="module")
def finished(place: Path, worker: Miner) -> Path:
    """Return a run of four rounds with snapshots after the second and the fourth; tests only read it."""
    validator.main([*tiny_flags(place), "--axons", worker.endpoint, "--rounds", "4", "--snapshot-every", "2"])
    return place / "runs"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run."""
    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs" / RUN


def contents(run: Path) -> dict[str, bytes | list[str]]:
    """Return all that a run keeps: its files, and its ledger as SQL, which SQLite may store in more than one way."""
    files: dict[str, bytes | list[str]] = {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != "lock" and not path.name.startswith("ledger")
    }
    with closing(sqlite3.connect(run / "ledger.sqlite")) as ledger:
        return {**files, "ledger": list(ledger.iterdump())}


def damage(snapshot: Path) -> None:
    data = bytearray(snapshot.read_bytes())
    data[len(data) // 2] ^= 1
    snapshot.write_bytes(data)


def versions(run: Path) -> list[str]:
    with closing(RunStore.open(run, keep=2)) as store:
        return [record.version for record in store.committed(0)]


def test_without_a_reachable_miner_the_runs_name_stays_free(worker: Miner, tmp_path: Path, capfd: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as vacated:
        port = vacated.getsockname()[1]
    flags = [*tiny_flags(tmp_path), "--wallet.path", str(Path(worker.log).parent / "wallets"), "--rounds", "1"]
    line = mistake(validator.main, [*flags, "--axons", str(port), "--connect-timeout", "0.3"], capfd)
    assert re.match(rf"validator.py: --axons \S*{port}: no miner answered within --connect-timeout 0.3 s; start", line)
    assert not (tmp_path / "runs" / RUN).exists()

    validator.main([*flags, "--axons", worker.endpoint])
    assert len(versions(tmp_path / "runs" / RUN)) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "--run tiny: .* exists; go on with --resume, or choose another name"),
        ("--resume --seed 1", "--seed 1: run tiny was started with 0; resume it with that, or start another --run"),
        ("--resume --gpt2.batch-size 2", "--gpt2.batch-size 2: run tiny was started with 4; resume it with that"),
        ("--resume --aggregation mean", '--aggregation "mean": run tiny was started with "median_norm_mean"'),
    ],
)
def test_a_run_is_not_resumed_with_other_fixed_flags(
    flags: str, said: str, run: Path, place: Path, worker: Miner, capfd: Capture
) -> None:
    before = contents(run)
    argv = [*tiny_flags(place), "--runs", str(run.parent), "--axons", worker.endpoint, *flags.split()]
    line = mistake(validator.main, argv, capfd)
    assert re.match(f"validator.py: {said}", line), line
    assert contents(run) == before


def test_only_one_validator_at_a_time_uses_a_run(run: Path, place: Path, worker: Miner, capfd: Capture) -> None:
    with closing(RunStore.open(run, keep=2)):
        line = mistake(validator.main, ["--resume", "--runs", str(run.parent), "--rounds", "5"], capfd)
    assert re.match(r"validator.py: --run tiny: another validator \(pid \d+\) is using it", line), line


def test_a_resumed_run_takes_its_own_flags_as_defaults(run: Path) -> None:
    """Resume the newest run where none is named."""
    flags = ["--resume", "--runs", str(run.parent)]
    config = cli.parse(ValidatorConfig, "validator.py", [*flags, "--rounds", "6"], runs.resume_flags(flags))
    assert (config.run, config.resume, config.rounds, config.snapshot_every) == (RUN, True, 6, 2)
    assert (config.gpt2.tokenizer, config.gpt2.batch_size, config.wallet.name) == ("byte", 4, "validator")


def test_a_corrupt_snapshot_is_replaced_by_the_one_before(run: Path, worker: Miner, capfd: Capture) -> None:
    before = versions(run)
    damage(run / "snapshots" / "00000004.safetensors")
    validator.main(["--resume", "--runs", str(run.parent), "--axons", worker.endpoint, "--rounds", "5"])
    said = capfd.readouterr().out
    assert re.search(r"00000004.safetensors is damaged: using 00000002.safetensors instead", said), said
    after = versions(run)
    assert (after[:4], len(after)) == (before, 5)


def test_without_an_intact_snapshot_a_run_cannot_be_resumed(run: Path, worker: Miner, capfd: Capture) -> None:
    for snapshot in (run / "snapshots").iterdir():
        damage(snapshot)
    line = mistake(
        validator.main, ["--resume", "--runs", str(run.parent), "--axons", worker.endpoint, "--rounds", "5"], capfd
    )
    assert re.match("validator.py: --run tiny: no whole snapshot is left; .*; otherwise start another --run", line), (
        line
    )


def test_a_run_is_resumed_on_a_text_that_moved(run: Path, worker: Miner, place: Path, tmp_path: Path) -> None:
    text = Path(tiny_flags(place)[tiny_flags(place).index("--gpt2.text") + 1])
    moved = shutil.copyfile(text, tmp_path / "moved.txt")
    flags = ["--axons", worker.endpoint, "--runs", str(run.parent), "--rounds", "5", "--gpt2.text", str(moved)]
    validator.main(["--resume", *flags])
    assert len(versions(run)) == 5
    assert runs.resume_flags(["--resume", "--runs", str(run.parent)]).count(str(moved)) == 1


def test_a_run_is_not_resumed_on_another_text(run: Path, worker: Miner, place: Path, capfd: Capture) -> None:
    text = Path(tiny_flags(place)[tiny_flags(place).index("--gpt2.text") + 1])
    before, original = contents(run), text.read_bytes()
    text.write_bytes(original[::-1])
    try:
        argv = [*tiny_flags(place), "--axons", worker.endpoint, "--runs", str(run.parent), "--rounds", "6", "--resume"]
        line = mistake(validator.main, argv, capfd)
        assert re.search(r"--run tiny: its data were \w+, are now \w+: the text of --gpt2.text \S+ .* is another", line)
    finally:
        text.write_bytes(original)
    assert contents(run) == before
