"""tok_train.py and tok_eval.py as a user starts them: real processes, files and terminals; what is told is true."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.tokenizer import SPECIAL_TOKENS
from scripts import tok_eval, tok_train
from tasks.data.compression import (
    CODE,
    KINDS,
    LANGUAGES,
    LONGEST_WORD,
    NUMBERS,
    PROSE,
    SAMPLE,
    Samples,
    data_files,
    kind_of,
    read_texts,
)
from tasks.data.documents import PIECE
from tasks.data.reading import Findings, Reading
from tests.processes import PATIENCE_S
from tests.test_console import Terminal

try:
    from rustbpe import Tokenizer
except ImportError:
    Tokenizer = None

ROOT = Path(__file__).resolve().parent.parent
PROSE_TEXT = "It was the best of times, it was the worst of times; the rain fell upon the just and the unjust alike.\n"
CODE_TEXT = "def total(rows: list[int]) -> int:\n    return sum(row * 2 for row in rows if row[0] != {'a': 1})\n\n"

built = pytest.mark.skipif(Tokenizer is None, reason="rustbpe is not built: no Rust here")


def run(script: str, *flags: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script with these flags, to its end."""
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *map(str, flags)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def one_line(status: int | str | None, said: str) -> str:
    """What a user's mistake brings: exit code 2 and one line, which this returns."""
    assert status == 2
    (line,) = said.splitlines()
    return line


def mistake(main: Callable[[Sequence[str]], None], flags: str, capfd: pytest.CaptureFixture[str]) -> str:
    """The line that a mistake in the flags brings, in this process: there are many of them."""
    with pytest.raises(SystemExit) as ended:
        main(flags.split())
    out, said = capfd.readouterr()
    assert not out
    return one_line(ended.value.code, said)


def data(name: str) -> Path:
    folder = os.environ.get("PILOT_DATA")
    if folder is None or not Path(folder, name).exists():
        pytest.skip(f"PILOT_DATA names no folder with {name}")
    return Path(folder, name)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of 40 documents, half of them prose, half of them code."""
    folder = tmp_path / "text"
    folder.mkdir()
    rows = [(PROSE_TEXT if i % 2 else CODE_TEXT) * 20 + f"the end, number {i}" for i in range(40)]
    pq.write_table(pa.table({"text": rows}), folder / "a.parquet")
    return folder


# --- what is read -----------------------------------------------------------------------------------------------------


def texts_of(folder: Path, **limits: int) -> list[str]:
    return list(read_texts(data_files(str(folder)).train, Reading(), **limits))


def test_documents_are_read_whole_or_cut(tmp_path: Path) -> None:
    long = "word " * (PIECE // 2) + "\n"  # two and a half pieces
    write_rows(tmp_path / "a.jsonl", [long, "", "short é\r\n"])
    assert "".join(texts_of(tmp_path)) == long + "short é\r\n"
    assert texts_of(tmp_path)[-1] == "short é\r\n"  # no document's end goes astray
    assert texts_of(tmp_path, doc_cap=3) == ["wor", "sho"]
    assert texts_of(tmp_path, doc_cap=3, max_chars=4) == ["wor", "s"]
    cut = texts_of(tmp_path, doc_cap=2 * PIECE)
    assert (sum(map(len, cut[:-1])), cut[-1]) == (2 * PIECE, "short é\r\n")
    assert sum(map(len, texts_of(tmp_path, max_chars=PIECE + 7))) == PIECE + 7


def test_a_plain_text_file_has_no_cap(tmp_path: Path) -> None:
    """It may hold many documents, as a corpus in one file does; behind a separator they are documents again."""
    long = "word " * (PIECE // 2) + "\n"
    (tmp_path / "a.txt").write_text(long + "<|endoftext|>" + long)
    assert "".join(texts_of(tmp_path, doc_cap=3)) == long + "<|endoftext|>" + long
    findings = Findings()
    split = Reading(separator="<|endoftext|>")
    assert list(read_texts(data_files(str(tmp_path)).train, split, findings, doc_cap=3)) == ["wor", "wor"]
    assert findings.capped == 2


def test_a_word_that_is_none_is_cut(tmp_path: Path) -> None:
    """Training on the whole of it would take hours."""
    run = "abcdefgh" * (PIECE // 4)
    (tmp_path / "a.txt").write_text(run)
    texts = texts_of(tmp_path)
    assert "".join(texts) == run
    assert max(map(len, texts)) == LONGEST_WORD


@built
def test_a_large_text_file_is_trained_on_whole_and_long_rows_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PILOT_DATA", "")
    rows = ["".join(f"{word}{number} " for word in PROSE_TEXT.split()) for number in range(40)]
    (tmp_path / "a.txt").write_text("".join(rows))
    write_rows(tmp_path / "b.jsonl", rows)
    told = {}
    for name in ("a.txt", "b.jsonl"):
        flags = f"--data {tmp_path / name} --doc-cap 50 --vocab-size 4000 --out {tmp_path / 't.json'}"
        tok_train.main(flags.split())
        told[name] = capsys.readouterr().out
    assert f"trained on {sum(map(len, rows)):,} characters" in told["a.txt"]
    assert "the text has no more to merge" in told["a.txt"]
    assert "of 40 longer documents only the first 50 characters; --doc-cap 0 takes all" in told["b.jsonl"]
    assert "what was taken of the text has no more to merge" in told["b.jsonl"]


@built
def test_what_is_taken_of_a_folder_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PILOT_DATA", "")
    folder, out = tmp_path / "set", tmp_path / "t.json"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [PROSE_TEXT, "not\ud800so", *[PROSE_TEXT] * 9])
    write_rows(folder / "val.jsonl", ["the held-out text", "<|bos|>"])
    (folder / "LICENSE.txt").write_text("some terms")
    tok_train.main(f"--data {folder} --vocab-size 300 --out {out}".split())
    told = capsys.readouterr().out
    assert "text: train.jsonl for training; left out: LICENSE.txt (about the data); val.jsonl (another split)" in told
    assert "text: damaged characters, of which the undecodable and NULs are replaced: 1 in train.jsonl" in told
    tok_eval.main(f"--data {folder} --tokenizer {out}".split())
    told = capsys.readouterr().out
    assert "text: val.jsonl for the check; left out: LICENSE.txt (about the data); train.jsonl (another split)" in told
    assert "text: <|bos|> stands 1 times in it" in told
    assert "all 2 texts come back as they were" in told


def write_rows(path: Path, rows: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (PROSE_TEXT, PROSE),
        (CODE_TEXT, CODE),
        ("Die Straße führt über die Brücke nach Köln, und von dort weiter.", LANGUAGES),
        ("Мы шли по берегу и говорили о погоде.", LANGUAGES),
        ("12 45.3 99\n7 8 2019-01-01\n", NUMBERS),
        (" \n" * 40, NUMBERS),
    ],
)
def test_kinds_of_text(text: str, kind: str) -> None:
    assert kind_of(text) == kind


def test_samples_are_bounded() -> None:
    samples = Samples()
    for _ in range(30):
        for text in (PROSE_TEXT * 1000, CODE_TEXT * 1000):
            samples.add(text)
    assert samples.by_kind.keys() == {PROSE, CODE}
    assert {sum(map(len, texts)) for texts in samples.by_kind.values()} == {SAMPLE}


# --- training and checking --------------------------------------------------------------------------------------------


@built
def test_from_text_to_a_checked_tokenizer(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokenizer.json"
    ended = run("tok_train.py", "--data", text, "--vocab_size", 300, "--out", out, cwd=tmp_path, PILOT_DATA="")
    assert ended.returncode == 0, ended.stderr
    tokenizer = Tokenizer.load(out)
    assert tokenizer.vocab_size == 300
    assert tokenizer.special_tokens() == {token: 291 + i for i, token in enumerate(SPECIAL_TOKENS)}
    rows = pq.read_table(text / "a.parquet")["text"].to_pylist()
    assert f"trained on {sum(map(len, rows)):,} characters" in ended.stdout
    assert "vocabulary: 300 tokens: 256 bytes, 35 merges, 9 special" in ended.stdout
    for kind, texts in ((CODE, rows[::2]), (PROSE, rows[1::2])):
        size = sum(len(row.encode()) for row in texts)
        tokens = sum(len(tokenizer.encode_ordinary(row)) for row in texts)
        assert re.search(rf"^ *{kind} +{size:,} +{size / tokens:.3f}$", ended.stdout, re.MULTILINE)
    longest = max(tokenizer.get_mergeable_ranks(), key=lambda item: len(item[0]))[0]
    assert f"{len(longest):4} bytes, id" in ended.stdout
    assert "give --gpt2-vocabulary" in ended.stdout
    assert not ended.stderr

    checked = run("tok_eval.py", "--data", text, cwd=tmp_path, PILOT_DATA="", NANOCHAT_BASE_DIR=str(tmp_path))
    assert checked.returncode == 0, checked.stderr
    assert "all 40 texts come back as they were" in checked.stdout
    size, tokens = (sum(map(len, rows)), sum(len(tokenizer.encode_ordinary(row)) for row in rows))
    assert f"{size:,} bytes, {tokens:,} tokens, {size / tokens:.3f} bytes a token" in checked.stdout


@built
def test_beside_gpt2_and_cl100k(tmp_path: Path) -> None:
    """As a module, on books; a file of our own merges stands in for cl100k's, so that the two must agree."""
    books, vocabulary = data("books_val.parquet"), data("gpt2_encoder.json").with_name("gpt2_")
    out, theirs = tmp_path / "t.json", tmp_path / "t.tiktoken"
    common = ("--data", books, "--max-chars", 400_000, "--gpt2-vocabulary", vocabulary)
    command = [
        sys.executable,
        "-m",
        "scripts.tok_train",
        "--vocab-size",
        "3000",
        "--pattern",
        "gpt4",
        "--out",
        str(out),
    ]
    told = subprocess.run([*command, *map(str, common)], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "trained on 400,000 characters" in told
    ranks = Tokenizer.load(out).get_mergeable_ranks()
    theirs.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks))
    checked = run("tok_eval.py", "--tokenizer", out, "--tiktoken", theirs, *common, cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    for said in (told, checked.stdout):
        ours, gpt2, more = re.search(
            r"^ *prose +[\d,]+ +([\d.]+) +([\d.]+) \(ours ([+-][\d.]+)%\)", said, re.M
        ).groups()
        assert float(more) == pytest.approx(100 * (float(ours) / float(gpt2) - 1), abs=0.1)
        assert 3.5 < float(gpt2) < 5
    assert re.search(r"^ *prose .*\(ours \+0.0%\)$", checked.stdout, re.MULTILINE)


@built
def test_pythons_own_sources_and_a_text_too_small(tmp_path: Path) -> None:
    ended = run("tok_train.py", "--max_chars", 50_000, "--special", cwd=tmp_path, NANOCHAT_BASE_DIR=str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert "trained on 50,000 characters of stdlib" in ended.stdout
    reached = Tokenizer.load(tmp_path / "tokenizer.json").vocab_size
    assert 1000 < reached < 32_768
    assert f"vocabulary: {reached:,} tokens: 256 bytes, {reached - 256:,} merges, 0 special" in ended.stdout
    assert f"that is {32_768 - reached:,} tokens fewer than asked for" in ended.stdout
    assert any(kind in ended.stdout for kind in KINDS)
    assert not ended.stderr


# --- terminals and Ctrl-C ---------------------------------------------------------------------------------------------


def many_books(folder: Path) -> Path:
    folder.mkdir()
    for i in range(200):  # half a gigabyte
        (folder / f"{i}.parquet").symlink_to(data("books_val.parquet"))
    return folder


@built
def test_a_terminal_sees_bars(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/tok_train.py"), "--data", str(text), "--vocab-size", "300"]
    command += ["--out", str(tmp_path / "t.json")]
    with Terminal(command, tmp_path / "log", 100, 40) as terminal:
        assert terminal.wait() == 0
        terminal.wait_for(r"tokenizer in ")
        assert re.search(r"^merge +━+ +35 of 35 merges", terminal.said(), re.MULTILINE)
        assert re.search(r"^read +━+ 0\.1 million characters", terminal.said(), re.MULTILINE)


@built
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    books, out = many_books(tmp_path / "books"), tmp_path / "out"
    out.mkdir()
    (out / "t.json").write_text("the one before")
    command = [sys.executable, str(ROOT / "scripts/tok_train.py"), "--data", str(books), "--out", str(out / "t.json")]
    with Terminal(command, tmp_path / "log", 100, 40) as terminal:
        terminal.wait_for(r"^read .*million characters")
        terminal.interrupt()
        assert terminal.wait() == 130
        terminal.wait_for(r"stopped; nothing was written")
    assert [path.name for path in out.iterdir()] == ["t.json"]
    assert (out / "t.json").read_text() == "the one before"


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_where_rustbpe_is_not_built(tmp_path: Path) -> None:
    empty = tmp_path / "empty" / "rustbpe"
    empty.mkdir(parents=True)
    (empty / "__init__.py").touch()  # without it, one that is built would be found behind it
    for script in ("tok_train.py", "tok_eval.py"):
        ended = run(script, cwd=tmp_path, PYTHONPATH=str(empty.parent))
        line = one_line(ended.returncode, ended.stderr)
        assert "rustbpe is not built: install Rust" in line
        assert "make setup" in line
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]


@built
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--data nowhere", "--data nowhere: no such file or folder"),
        ("--data empty.txt", "--data empty.txt: holds no text"),
        ("--data other.csv", "--data other.csv: not one of .txt"),
        ("--data broken.parquet", "--data broken.parquet: broken.parquet: cannot be read"),
        ("--data text --column body", "has no column body, only text; give --column"),
        ("--data later", "other.parquet: has no column text"),
        ("--vocab-size 264", "--vocab-size 264: must lie between 265, for 256 bytes and 9 special tokens"),
        ("--max-chars -1", "--max-chars -1: must be 0 or more"),
        ("--special a b a", "--special 'a': must not be empty, nor given twice"),
        ("--data text --pattern (", "--pattern: "),
        ("--data text --out text", "--out text: must be a file in a folder that is there"),
        ("--data text --out nowhere/t.json", "--out nowhere/t.json: must be a file"),
        ("--gpt2-vocabulary nowhere", "--gpt2-vocabulary nowhere: no encoder.json and vocab.bpe there"),
    ],
)
def test_mistakes_in_training(
    flags: str,
    said: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "other.csv").touch()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" * 9)
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "a.parquet").symlink_to(text / "a.parquet")
    pq.write_table(pa.table({"body": ["b"]}), tmp_path / "later" / "other.parquet")
    before = sorted(tmp_path.rglob("*"))
    assert said in mistake(tok_train.main, flags, capfd)
    assert sorted(tmp_path.rglob("*")) == before


@built
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tokenizer nowhere", "--tokenizer nowhere: No such file or directory; tok_train.py makes one"),
        ("--tokenizer empty.txt", "--tokenizer empty.txt: "),
        ("--tokenizer cut.json", "--tokenizer cut.json: "),
        ("--data empty.txt", "--data empty.txt: holds no text"),
        ("--data text --column body", "has no column body, only text; give --column"),
        ("--tiktoken empty.txt", "--tiktoken empty.txt: "),
        ("--tiktoken nowhere", "--tiktoken nowhere: "),
    ],
)
def test_mistakes_in_checking(
    flags: str,
    said: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "empty.txt").touch()
    tokenizer = Tokenizer()
    tokenizer.train_from_iterator(iter([PROSE_TEXT]), 260)
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "cut.json").write_bytes((tmp_path / "tokenizer.json").read_bytes()[:-40])
    assert said in mistake(tok_eval.main, flags, capfd)
