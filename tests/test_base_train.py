"""scripts/base_train.py: nanochat's flags, exact resume after any end, several ranks, and what a user gets wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pilot.common.files import FileLock
from pilot.training.distributed import RankLost, Ranks
from tests.processes import PATIENCE_S, SRC, Process, eventually
from tests.test_nanochat_task import write_books

pytest.importorskip("rustbpe", reason="the tokenizer is not built: no cargo")

ROOT = SRC.parent
sys.path.insert(0, str(ROOT / "scripts"))

from base_train import long_names, main  # noqa: E402

SCRIPT = str(ROOT / "scripts" / "base_train.py")
STEPS = 12


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_books(tmp_path_factory.mktemp("books"))


def flags(books: Path, place: Path) -> list[str]:
    return [
        *("--depth", "2", "--head-dim", "16", "--aspect-ratio", "16", "--max_seq_len", "32", "--batch-size", "2"),
        *("--num-iterations", str(STEPS), "--batches", "4", "--tokenizer", "byte", "--text", str(books)),
        *("--eval-every", "0", "--nanochat.eval-sequences", "4", "--cache", str(books / "cache")),
        *("--device", "cpu", "--threads", "1", "--checkpoints", str(place)),
    ]


def run(command: Sequence[str], code: int = 0) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout if code == 0 else ended.stderr


def rows(log: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]


@pytest.fixture(scope="module")
def whole(books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run: its folder holds out.safetensors and log.jsonl."""
    place = tmp_path_factory.mktemp("whole")
    out, log = place / "out.safetensors", place / "log.jsonl"
    said = run([sys.executable, SCRIPT, *flags(books, place / "c"), "--out", str(out), "--log", str(log)])
    assert f"round {STEPS}/{STEPS}" in said
    return place


def test_the_figures_of_a_run(whole: Path) -> None:
    seen = rows(whole / "log.jsonl")
    assert [row["round"] for row in seen] == list(range(STEPS))
    assert seen[-1]["loss"] < seen[0]["loss"] - 0.1
    assert seen[-1]["val_bpb"] == pytest.approx(seen[-1]["val_loss"] / 0.6931, rel=0.05)
    assert (whole / "c" / "metrics.jsonl").read_text().count("\n") == STEPS


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_was_stopped_and_killed_ends_in_the_same_parameters(
    books: Path, whole: Path, tmp_path: Path
) -> None:
    """SIGTERM after some steps, SIGKILL after some more, then to the end: bit for bit."""
    out, log = tmp_path / "out.safetensors", tmp_path / "log.jsonl"
    command = [sys.executable, SCRIPT, *flags(books, tmp_path / "c"), "--save-every", "1"]
    with Process([*command, "--log", str(log)], tmp_path / "first") as process:
        eventually(lambda: log.exists() and len(rows(log)) >= 2, "second step")
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == 130
        assert "stopped after step" in process.said()
        assert "--resume goes on" in process.said()
    stopped = len(rows(log))
    assert 2 <= stopped < STEPS
    with Process([*command, "--resume", "--log", str(log)], tmp_path / "second") as process:
        eventually(lambda: len(rows(log)) > stopped, "step of the second process")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert f"resumed after step {stopped} of {STEPS}" in process.said()
    short = ["--resume", "--checkpoints", str(tmp_path / "c"), "--log", str(log), "--out", str(out)]
    run([sys.executable, SCRIPT, "--task", "nanochat", *short])  # its flags are the run's
    assert [row["round"] for row in rows(log)] == list(range(STEPS))
    assert [json.loads(line)["round"] for line in (tmp_path / "c" / "metrics.jsonl").open()] == list(range(STEPS))
    ours, theirs = load_file(out), load_file(whole / "out.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_second_start_overwrites_nothing(books: Path, whole: Path) -> None:
    said = run([sys.executable, SCRIPT, *flags(books, whole / "c")], code=2)
    assert said.startswith("base_train.py: --checkpoints ")
    assert f"step {STEPS}" in said
    assert "--resume" in said


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (["--depth", "3"], "--nanochat.depth 3 (was 2)"),
        (["--preset", "classic"], "--nanochat.preset classic (was modern)"),
        (["--matrix-lr", "0.1"], "--nanochat.optimizer.matrix-lr 0.1 (was 0.02)"),
        (["--seed", "1"], "--seed 1 (was 0)"),
        (["--batches", "8"], "--batches 8 (was 4)"),
        (
            ["--max-seq-len", "16", "--batch-size", "4"],
            "--nanochat.seq-len 16 (was 32), --nanochat.batch-size 4 (was 2)",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_another_run_is_not_resumed(
    books: Path, whole: Path, changed: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*flags(books, whole / "c"), "--resume", *changed])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(f"base_train.py: {line}: the run in --checkpoints ")
    assert said.count("\n") == 1


def tiny(place: Path, *more: str) -> list[str]:
    """GPT-2 of 8 channels, with the files of its run in `place`."""
    text, model = place / "text.txt", place / "model"
    if not model.exists():
        text.write_text("the miner commits a round of gradients. " * 100)
        transformers.utils.logging.disable_progress_bar()
        none = {"bos_token_id": None, "eos_token_id": None}
        shape = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=16, vocab_size=256, **none)
        transformers.GPT2LMHeadModel(shape).save_pretrained(model)
    return [
        *("--task", "gpt2", "--gpt2.model", str(model), "--gpt2.text", str(text), "--gpt2.tokenizer", "byte"),
        *("--gpt2.seq-len", "16", "--gpt2.batch-size", "2", "--gpt2.eval-sequences", "2", "--batches", "1"),
        *("--checkpoints", str(place / "c"), "--cache", str(place / "cache"), "--device", "cpu", "--threads", "1"),
        *("--eval-every", "0", "--rounds", "3", *more),
    ]


def test_a_text_that_changed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(tiny(tmp_path))
    (tmp_path / "text.txt").write_text("the validator closes a round of weights. " * 100)
    with pytest.raises(SystemExit):
        main(tiny(tmp_path, "--resume"))
    said = capsys.readouterr().err
    assert f"--checkpoints {tmp_path / 'c'}: the text or the tokenizer has changed since the run was started" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("rate", ["1e38", "1e20"])
def test_a_run_that_diverges_stops_and_keeps_its_good_checkpoints(
    tmp_path: Path, rate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(tiny(tmp_path, "--rounds", "2"))
    [good] = (tmp_path / "c").glob("step_*")
    before = {path.name: path.read_bytes() for path in good.iterdir()}
    out = tmp_path / "out.safetensors"
    changed = ["--optimizer.warmup", "0", "--rounds", "30", "--save-every", "1", "--save-keep", "1"]
    worse = ["--checkpoints", str(tmp_path / "d"), "--optimizer.lr", rate]
    with pytest.raises(SystemExit) as ended:
        main(tiny(tmp_path, *changed, *worse, "--out", str(out)))
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.count("\n") == 1
    assert re.match(r"base_train.py: after \d+ steps .*; lower the learning rate", said)
    assert not out.exists()
    for weights in (tmp_path / "d").glob("step_*/*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(weights).values())
    assert before == {path.name: path.read_bytes() for path in good.iterdir()}


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c").mkdir()
    held = FileLock(tmp_path / "c" / "lock")
    log = tmp_path / "log.jsonl"
    log.write_text("of the other")
    with pytest.raises(SystemExit) as ended:
        main(tiny(tmp_path, "--log", str(log)))
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert log.read_text() == "of the other"
    assert f"another base_train.py (pid {os.getpid()}) is using it" in said
    assert said.count("\n") == 1
    assert not list((tmp_path / "c").glob("step_*"))
    held.release()
    main(tiny(tmp_path))
    main(tiny(tmp_path, "--resume", "--rounds", "4"))  # it does not stay locked


@pytest.mark.parametrize(
    "damage",
    [
        b'\0\0\0\0{"round":1,"loss":5.4}\n',
        b'{"round":1,"lo',
        b'{"round":1,"lo\n{"round":1,"loss":5.4}\n',
        b"[1]\n",
        b"null\n",
        b'"round"\n',
        b'{"loss":5.4}\n',
        b'{"round":"1","loss":5.4}\n',
        b'{"round":true}\n',
        b"\xff\xfe\n",
        b"\0" * 4096,
    ],
)
def test_damaged_figures_are_named_and_dropped(
    tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    if not (tmp_path / "c").exists():
        main(tiny(tmp_path, "--rounds", "2", "--log", str(log)))
    for path in (tmp_path / "c" / "metrics.jsonl", log):
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] + damage)
    main(tiny(tmp_path, "--resume", "--log", str(log)))
    said = capsys.readouterr().out
    for path in (tmp_path / "c" / "metrics.jsonl", log):
        assert f"{path}: line 2 is damaged, and dropped" in said
        found = [json.loads(line)["round"] for line in path.read_text().splitlines()]
        assert found in ([0, 2], [0, 1, 2])


def test_what_base_train_saves_is_a_model_for_others_and_for_itself(tmp_path: Path) -> None:
    main(tiny(tmp_path))
    [step] = (tmp_path / "c").glob("step_*")
    [said] = transformers.pipeline("text-generation", model=str(step))("the miner")
    assert said["generated_text"].startswith("the miner")
    main(tiny(tmp_path, "--gpt2.model", str(step), "--gpt2.tokenizer", "auto", "--checkpoints", str(tmp_path / "d")))
    first, second = (json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in "cd")
    assert second["loss"] < first["loss"]


def test_a_checkpoint_cut_short_is_named(books: Path, whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "c"
    subprocess.run(["cp", "-r", str(whole / "c"), str(copy)], check=True)
    [weights] = copy.glob("step_*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    said = run([sys.executable, SCRIPT, *flags(books, copy), "--resume"], code=2)
    assert "model.safetensors" in said
    assert said.count("\n") == 1


# --- several ranks ----------------------------------------------------------------------------------------------------


def torchrun(ranks: int, *more: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, "--", SCRIPT, *more]  # or it takes --log for an abbreviation of its own


COMBINED = """
import sys
import torch
import transformers
from safetensors.torch import save_file
from pilot.training.gradient import compute
from protocol import Range
from pilot.training.distributed import Ranks
from tests.test_nanochat_task import make_task

ranks = Ranks.of_environment()
torch.set_num_threads(1)
with ranks:
    ranks.start(torch.device("cpu"), print)
    task = make_task(__import__("pathlib").Path(sys.argv[1]) / str(ranks.rank))
    model = task.build_model("cpu", initial=True)
    batches = 6 if ranks.world == 1 else 2 + 2 * ranks.rank  # ranks that did not do the same amount of work
    first = 0 if ranks.first else 2
    work = ranks.combine(compute(task, model, [Range(first, first + batches)]))
    if ranks.first:
        tensors = {**work.gradient, "count": torch.tensor(work.count), "loss": torch.tensor(work.loss)}
        save_file(tensors, sys.argv[2])
"""


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"RANK": "1"}, "RANK=1 in the environment: must be below WORLD_SIZE, which is 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 in the environment: must be below WORLD_SIZE, which is 2"),
        ({"RANK": "x"}, "RANK=x in the environment: must be a number from 0"),
        ({"RANK": "-1"}, "RANK=-1 in the environment: must be a number from 0"),
        ({"RANK": "1.0"}, "RANK=1.0 in the environment: must be a number from 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment: must be a number from 0"),
        ({"WORLD_SIZE": "0"}, "RANK=0 in the environment: must be below WORLD_SIZE, which is 0"),
        ({"LOCAL_RANK": "gpu0"}, "LOCAL_RANK=gpu0 in the environment: must be a number from 0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment: needs RANK too"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "WORLD_SIZE=2 in the environment: needs RANK too"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 in the environment: needs MASTER_ADDR too"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "::1", "MASTER_PORT": "http"},
            "MASTER_PORT=http in the environment: must be 1 to 65535",
        ),
    ],
    ids=str,
)
def test_an_environment_of_no_torchrun_is_refused_in_a_line(
    tmp_path: Path,
    environment: dict[str, str],
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["--task", "gpt2", "--checkpoints", str(tmp_path)])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(f"base_train.py: {line}; start all ranks with torchrun, or unset it")
    assert said.count("\n") == 1


def test_an_empty_rank_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    assert Ranks.of_environment() == Ranks()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_partner_that_never_comes_is_waited_for_aloud_and_not_for_ever(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    said: list[str] = []
    with pytest.raises(
        RankLost, match=f"rank {rank} of 2: the other ranks have not all come to 127.0.0.1:{port}"
    ) as lost:
        Ranks.of_environment().start(torch.device("cpu"), said.append, timedelta(seconds=2))
    assert said == [f"rank {rank} of 2: waiting up to 2 s for the other ranks at 127.0.0.1:{port}"]
    assert "\n" not in str(lost.value)


@pytest.mark.slow
def test_the_gradient_of_two_ranks_is_that_of_one(tmp_path: Path) -> None:
    program = tmp_path / "combined.py"
    program.write_text(COMBINED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SRC), str(ROOT)])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for ranks in (1, 2):
        command = [
            *launcher,
            f"--nproc_per_node={ranks}",
            str(program),
            str(tmp_path / f"{ranks}"),
            f"{tmp_path}/{ranks}.st",
        ]
        subprocess.run(command, env=environment, check=True, timeout=PATIENCE_S, capture_output=True)
    one, two = load_file(tmp_path / "1.st"), load_file(tmp_path / "2.st")
    assert one["count"] == two["count"] == 6 * 64
    for name, gradient in one.items():
        assert torch.allclose(two[name], gradient, rtol=1e-4, atol=1e-6 * max(1.0, float(gradient.abs().max()))), name


@pytest.mark.slow
def test_two_ranks_train_as_one(books: Path, whole: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "log.jsonl", tmp_path / "out.safetensors"
    run(torchrun(2, *flags(books, tmp_path / "c"), "--log", str(log), "--out", str(out)))
    ours, theirs = rows(log), rows(whole / "log.jsonl")
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=2e-3)
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], abs=1e-6)
    one, two = load_file(out), load_file(whole / "out.safetensors")
    assert one.keys() == two.keys()
    moved = sum(float((one[name] - two[name]).square().sum()) for name in one) ** 0.5
    assert moved < 1e-2 * sum(float(p.square().sum()) for p in two.values()) ** 0.5


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_in_a_line(books: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    command = torchrun(2, *flags(books, tmp_path / "c"), "--num-iterations", "100000", "--save-every", "5")
    with Process([*command, "--log", str(log)], tmp_path / "said") as process:
        eventually(lambda: log.exists() and len(rows(log)) > 6, "seventh step")
        os.kill(rank_pid(process.pid, 1), signal.SIGKILL)
        assert process.wait() not in (0, None)
        said = process.said()
    mine = [line for line in said.splitlines() if line.startswith("base_train.py: ")]
    assert mine
    assert all("another rank is gone" in line or "stopped" in line for line in mine)
    run([sys.executable, SCRIPT, *flags(books, tmp_path / "c"), "--resume", "--num-iterations", "5", "--rounds", "8"])


def rank_pid(parent: int, rank: int) -> int:
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"no rank {rank} below {parent}")


# --- flags ------------------------------------------------------------------------------------------------------------


def test_nanochats_names_are_ours_by_another_name() -> None:
    long = ["--nanochat.depth", "4", "--nanochat.seq-len=512", "--rounds", "20"]
    assert long_names(["--depth", "4", "--max_seq_len=512", "--num-iterations", "20"]) == (["--task", "nanochat"], long)
    assert long_names(["--rounds", "3"]) == ([], ["--rounds", "3"])
    wandb = ["--task", "gpt2", "--wandb.project", "p"]
    assert long_names(["--task", "gpt2", "--wandb-project", "p"]) == (["--wandb.mode", "online"], wandb)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--batches", "0"], "--batches 0: must be 1 or more"),
        (["--total-batch-size", "100"], "--total-batch-size 100: must be a multiple of a micro-batch's 64 tokens"),
        (["--target-param-data-ratio", "-1"], "--target-param-data-ratio -1.0: must be 0 or more"),
        (["--optimizer.lr", "1"], "--optimizer.…: task nanochat has its own"),
        (["--resume"], "--resume"),
        (["--tokenizer", "/nowhere.json"], "--nanochat.tokenizer /nowhere.json: "),
        (["--text", "/nowhere"], "--nanochat.text /nowhere: "),
        (["--head-dim", "15"], "--nanochat.depth 2: "),
        (["--depth", "1"], "--nanochat.depth 1: n_embd 16: gates of this model read 24 channels"),
        (["--task", "gpt2"], "--nanochat.…: --task is gpt2"),
        (["--out", "/tmp"], "--out /tmp: must be a file"),
        (["--window-pattern", "Q"], "--nanochat.depth 2: window_pattern 'Q'"),
        (["--depth", "0"], "--nanochat.depth 0: must be 1 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    books: Path, tmp_path: Path, more: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*flags(books, tmp_path / "c"), *more])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert line in said
    assert not (tmp_path / "c").exists()


def test_a_damaged_file_of_a_folder_is_named_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books = write_books(tmp_path / "books")
    (books / "aa.jsonl").write_bytes(b"{")
    with pytest.raises(SystemExit) as ended:
        main([*flags(books, tmp_path / "c"), "--num-iterations", "1"])
    assert ended.value.code == 2
    assert "aa.jsonl" in capsys.readouterr().err
    main([*flags(books, tmp_path / "c"), "--num-iterations", "1", "--nanochat.bad-shards", "skip"])
    assert "skipped 1 bad rows or files: aa.jsonl" in capsys.readouterr().out


def test_the_length_by_the_ratio_of_tokens_to_parameters(books: Path, tmp_path: Path) -> None:
    """d2 of width 32: 2 * 12 * 32^2 in matrices, a few in gates, 320 * 32 in the head; steps of 256 tokens."""
    log = tmp_path / "log.jsonl"
    main([*flags(books, tmp_path / "c"), "--target-param-data-ratio", "0.1", "--log", str(log)])
    parameters = 2 * 12 * 32**2 + 2 * 12 + 320 * 32
    assert len(rows(log)) == round(0.1 * parameters / 256)


@pytest.mark.slow
def test_the_short_form(books: Path, tmp_path: Path) -> None:
    short = ["--num-steps", "2", "--batch-size", "2", "--max-length", "32", "--run", "first", "--wandb.mode", "offline"]
    more = ["--depth", "2", "--head-dim", "16", "--aspect-ratio", "16", "--tokenizer", "byte", "--text", str(books)]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    command = [sys.executable, str(ROOT / "nanochat_train.py"), *short, *more, "--cache", str(books / "cache")]
    ended = subprocess.run(
        [*command, "--wandb-project", "pilot", "--wandb.mode", "offline", "--device", "cpu"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=PATIENCE_S,
    )
    assert ended.returncode == 0, ended.stderr
    [folder] = (tmp_path / "base_checkpoints" / "first").glob("step_*")
    assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "meta.json", "tokenizer.json"}
    assert list((tmp_path / "base_checkpoints" / "first" / "wandb").glob("offline-run-*"))
