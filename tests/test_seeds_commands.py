"""The commands of nanochat's users, as they type them: each finds what the one before has left in NANOCHAT_BASE_DIR."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import checkpoint_manager
from scripts import base_eval, base_train, tok_train

ROOT = Path(__file__).resolve().parent.parent
rustbpe = pytest.importorskip("rustbpe", reason="the tokenizer is not built: no cargo")
TINY = "--nanochat.head-dim 16 --nanochat.aspect-ratio 16 --nanochat.eval-sequences 4 --threads 1"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base directory with two shards, the second of which is kept for validation."""
    (tmp_path / "base_data").mkdir()
    lines = [f"the miner of round {i} commits its gradient to the ledger " * 8 for i in range(300)]
    for number, part in enumerate((lines[:250], lines[250:])):
        pq.write_table(pa.table({"text": part}), tmp_path / "base_data" / f"shard_{number:05d}.parquet")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(ROOT)
    return tmp_path


def typed(command: str) -> str:
    """Run a command at the project's root, and return its output; fail the test if it fails."""
    words = command.split()
    program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [*program, *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"
    return ended.stdout


@pytest.mark.slow
def test_the_commands_one_after_the_other(place: Path) -> None:
    told = typed("python -m scripts.tok_train --max_chars=4000000000 --vocab_size=300")
    assert f"text: 2 shards in {place / 'base_data'}" in told
    assert f"tokenizer in {place / 'tokenizer.json'}" in told
    size = "from nanochat.tokenizer import get_tokenizer; print(get_tokenizer().get_vocab_size())"
    asked = [sys.executable, "-c", size]  # as make setup leaves it: src/ is on the path
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout == "300\n"

    typed(f"python scripts/base_train.py --depth=2 --max_seq_len=32 --num_iterations=2 {TINY}")
    typed(f"python nanochat_train.py --depth 2 --num-steps 2 --batch-size 2 --max-length 32 {TINY}")
    checkpoints = place / "base_checkpoints"
    assert [checkpoint_manager.steps(checkpoints / name) for name in ("d2", "d2-2")] == [[2], [2]]
    shared = f"--depth 2 --target-param-data-ratio 0.01 --batch-size 2 --max-seq-len 32 {TINY} --wandb-project p"
    torchrun = "torchrun --standalone --nproc_per_node=2 -m scripts.base_train"
    typed(f"{torchrun} -- {shared} --run baseline")
    typed(f"{torchrun} {shared} --model-tag other")  # torchrun would take --run for its own --run-path
    assert all(checkpoint_manager.steps(checkpoints / name) for name in ("baseline", "other"))
    told = typed(f"python scripts/base_eval.py --checkpoint {checkpoints / 'd2'} --eval bpb sample --threads 1")
    assert "bits per byte: " in told


def flags(text: str) -> list[str]:
    return [*text.split(), *TINY.split()]


def test_tok_train_reads_the_shards_and_writes_where_the_others_look(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nanochat.tokenizer import get_tokenizer

    tok_train.main(["--max_chars=4000000000", "--vocab_size=300"])
    assert f"text: 2 shards in {place / 'base_data'}" in capsys.readouterr().out
    assert get_tokenizer().get_vocab_size() == 300


def test_there_is_no_byte_fallback_beside_shards(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        base_train.main(flags("--depth 2 --max-seq-len 32 --num-iterations 1"))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"there are shards, but no {place / 'tokenizer.json'}; python -m scripts.tok_train makes it" in said


def test_a_second_run_gets_a_folder_of_its_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tok_train.main(["--vocab_size=300"])
    train = "--depth 2 --max-seq-len 32 --device-batch-size 2 --batches 1 --eval-every 0"
    folders = place / "base_checkpoints"
    base_train.main(flags(f"-- {train} --num-iterations 1"))
    base_train.main(flags(f"{train} --num-iterations 2"))
    assert {path.name: checkpoint_manager.steps(path) for path in folders.iterdir()} == {"d2": [1], "d2-2": [2]}
    base_train.main(flags(f"{train} --num-iterations 3 --resume"))  # the last of them
    assert checkpoint_manager.steps(folders / "d2-2")[-1] == 3
    capsys.readouterr()

    with pytest.raises(SystemExit):
        base_train.main(flags(f"{train} --num-iterations 1 --run d2"))
    assert capsys.readouterr().err == (
        f"base_train.py: --run d2: {folders / 'd2'} holds a run up to step 1; go on with --resume, delete it with "
        "--overwrite, or give another --run\n"
    )
    base_train.main(flags(f"{train} --num-iterations 2 --run d2 --overwrite"))
    assert checkpoint_manager.steps(folders / "d2") == [2]
    with pytest.raises(SystemExit):
        base_train.main(flags(f"{train} --resume --overwrite"))
    assert "--overwrite: deletes what --resume goes on from" in capsys.readouterr().err


def test_a_file_of_weights_is_refused_with_the_form_that_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("final_model.pt").write_bytes(b"weights")
    with pytest.raises(SystemExit) as ended:
        base_eval.main(["--checkpoint", "final_model.pt"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "base_eval.py: --checkpoint final_model.pt: a file of weights alone; name the folder of a checkpoint, such as "
        "base_checkpoints/d4, which holds the model's shape and tokenizer as well\n"
    )
