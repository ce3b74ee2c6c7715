"""Text that is not what it seems: encodings, damage, separators, long runs, odd rows, columns and row groups."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.tokenizer import Tokenizer as Inner
from protocol import DataSpec
from tasks.data.plain import PIECE, pieces
from tasks.data.text import prepare_tokens, rebuild_tokens
from tasks.data.tokenizer import ByteTokenizer, RustTokenizer, Tokenizer
from tasks.data.tokens import Tokens
from tasks.gpt2 import GPT2Config
from tests.test_text import data_file, save, text_of

TEXT = "Some ordinary words – they're as old as the sea.\r\n" * 90
CHINESE = "晨光照在小河上，石头很绿。" * 300
WORDS = [f"row {i} of some words" for i in range(40)]


def read(path: Path, **flags: object) -> tuple[str, list[str]]:
    """Return all of a text, training part first, as the byte tokenizer has it, and what was said of it."""
    tokens, _, said = prepared(path, **flags)
    return text_of(tokens.train) + text_of(tokens.validation), said


def prepared(path: Path, tokenizer: Tokenizer | None = None, **flags: object) -> tuple[Tokens, DataSpec, list[str]]:
    said: list[str] = []
    config = GPT2Config(text=str(path), **flags)  # type: ignore[arg-type]
    tokens, spec = prepare_tokens(config, tokenizer or ByteTokenizer(), path.parent / "cache", said.append)
    return tokens, spec, [line for line in said if line.startswith("text: ")]


def refusal(path: Path, **flags: object) -> str:
    with pytest.raises(ValueError, match=r"^--gpt2\.text ") as error:
        read(path, **flags)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"--gpt2.text {path}: ")


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# --- encodings and damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, codec: str, name: str) -> None:
    text = TEXT if name == "a.txt" else json.dumps({"text": TEXT}, ensure_ascii=False) + "\n"
    assert read(write(tmp_path / name, text.encode(codec))) == (TEXT, [])


@pytest.mark.parametrize(
    ("text", "codec", "advice"),
    [
        (TEXT, "utf-16-le", "give --gpt2.encoding utf-16-le"),
        (TEXT, "utf-16-be", "give --gpt2.encoding utf-16-be"),
        (TEXT, "utf-32-le", "give --gpt2.encoding utf-32-le"),
        (TEXT, "utf-32-be", "give --gpt2.encoding utf-32-be"),
        (TEXT, "cp1252", "as in --gpt2.encoding latin-1"),
        ("être ou ne pas être " * 90, "latin-1", "as in --gpt2.encoding latin-1"),
        ("Мы шли по берегу. " * 90, "koi8-r", "--gpt2.encoding"),
        (CHINESE, "gb18030", "--gpt2.encoding"),
        (CHINESE, "utf-16-be", "--gpt2.encoding"),
    ],
)
def test_another_encoding_is_refused_and_read_when_named(tmp_path: Path, text: str, codec: str, advice: str) -> None:
    path = write(tmp_path / "a.txt", text.encode(codec))
    said = refusal(path)
    assert "characters are no text" in said.replace(", first in line 1, are", " are").replace(
        "characters are", "characters are"
    )
    assert advice in said
    assert read(path, encoding=codec)[0] == text


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bytes(range(256)) * 50, "binary"),
        (bytes(5000), "binary"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "run git lfs pull"),
        (gzip.compress(TEXT.encode()), "must end in .gz"),
        (b"%PDF-1.7\n" + bytes(range(200, 256)) * 9, "a PDF"),
        (b"PK\x03\x04" + bytes(99), "a zip archive"),
        (b" \n\t\r\n" * 99, "empty"),
        (b"\xef\xbb\xbf", "empty"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    assert reason in refusal(write(tmp_path / "a.txt", data))


def test_a_little_damage_is_replaced_and_told_each_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXT.encode() + b"caf\xe9 \0" + TEXT.encode())
    for _ in range(2):  # the second time from the cache
        text, said = read(path)
        assert text == f"{TEXT}caf\ufffd \ufffd{TEXT}"
        assert said == ["text: damaged characters, of which the undecodable and NULs are replaced: 2 in a.txt"]


def test_how_much_damage_is_refused_is_a_flag(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ("x" * 99 + "\n").encode() * 100 + b"\xe9" * 20)  # 20 of 10,020
    assert refusal(path).startswith("a.txt: 20 of its 10,020 characters are no text, the first in line 101; ")
    assert "\ufffd" in read(path, max_replaced=0.01)[0]
    with pytest.raises(ValueError, match=r"^--gpt2\.max-replaced 2: must lie between 0 and 1"):
        GPT2Config(max_replaced=2)


def test_rows_are_held_to_the_same_share(tmp_path: Path) -> None:
    bad = "\ud800" * 20 + "x"
    path = save(tmp_path / "a.jsonl", [*WORDS, bad, *WORDS])
    assert "row 41: 20 of 21 characters are no text" in refusal(path)
    text, said = read(path, bad_shards="skip")
    assert "?" not in text
    assert said[0].startswith("text: skipped 1 bad rows or files: a.jsonl: row 41: ")
    nuls = save(tmp_path / "b.jsonl", ["a\0b", *WORDS])
    assert read(nuls)[0].startswith("a\ufffdb\0")


# --- separators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|bos|>", "<|user_start|>", "<|EOT_2|>", "</s>", "<eos>"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_special_tokens_in_a_text_are_told(tmp_path: Path, token: str, name: str) -> None:
    path = save(tmp_path / name, [f"one\n{token}\ntwo\n{token}{token}three\n" + TEXT])
    _, (line,) = read(path)
    assert line.startswith(f"text: {token} stands 3 times in it as ordinary characters")
    assert ("--gpt2.separator" in line) == (token not in ("<|user_start|>", "<|EOT_2|>"))
    text, said = read(path, separator=token)
    assert text == "one\0two\0three\n" + TEXT.strip() or text.replace("\0", "").startswith("onetwothree")
    assert not said


def test_a_separator_makes_documents_of_their_own(tmp_path: Path) -> None:
    documents = [f"document {i} " + "x" * (i % 50) for i in range(300)]
    joined = save(tmp_path / "a.txt", ["\n<|end of this|>\n".join(documents)])
    tokens, spec, said = prepared(joined, separator="<|end of this|>")
    assert tokens.digest == prepared(save(tmp_path / "b.jsonl", documents))[0].digest
    assert not said
    assert rebuild_tokens(spec, joined, None, tmp_path / "miner").read_bytes() == tokens.path.read_bytes()
    assert "nowhere" in read(joined, separator="<|eos|>")[1][0]


# --- long runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["a", CHINESE, " ", ".", "a\t", "ACGT0"])
def test_a_text_without_spaces_is_cut_into_pieces(unit: str) -> None:
    text = (unit * (5 * PIECE // len(unit) + 1))[: 5 * PIECE]
    chunks = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
    began = time.perf_counter()
    found = list(pieces(chunks))
    assert time.perf_counter() - began < 5
    assert "".join(found) == text
    assert max(map(len, found)) <= 2 * PIECE


def test_safe_cuts_leave_the_tokens_as_they_are(tmp_path: Path) -> None:
    """GPT-2's and nanochat's patterns split where the pieces do."""
    text = "".join(f"第{i}行，don't{i % 7}x_y/{i}" for i in range(PIECE // 8))
    from_file, _, _ = prepared(save(tmp_path / "a.txt", [text]), RustTokenizer(Inner.bytewise().blob))
    from_row, _, _ = prepared(save(tmp_path / "a.parquet", [text]), RustTokenizer(Inner.bytewise().blob))
    assert from_file.digest == from_row.digest
    cut = list(pieces([text[at : at + PIECE] for at in range(0, len(text), PIECE)]))
    assert len(cut) > 1
    for piece, after in itertools.pairwise(cut):
        assert piece[-1].isalnum()
        assert not after[0].isalnum()


# --- compressed -------------------------------------------------------------------------------------------------------

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_are_read(tmp_path: Path, suffix: str) -> None:
    lines = "".join(json.dumps({"text": row}) + "\n" for row in WORDS).encode()
    plain = prepared(write(tmp_path / "a.jsonl", lines))[0]
    assert prepared(write(tmp_path / f"b.jsonl{suffix}", COMPRESS[suffix](lines)))[0].digest == plain.digest
    assert prepared(write(tmp_path / f"c.jsonl{suffix}", COMPRESS[suffix](lines[:-1])))[0].digest == plain.digest
    assert read(write(tmp_path / f"d.txt{suffix}", COMPRESS[suffix](TEXT.encode("utf-16"))))[0] == TEXT
    for name, data in (("e", COMPRESS[suffix](lines)[:-12]), ("f", lines), ("g", b"\x1f\x8b\x08")):
        assert "cannot read" in refusal(write(tmp_path / f"{name}.jsonl{suffix}", data))


# --- rows and columns -------------------------------------------------------------------------------------------------

GOOD = '{"text": "good"}\n'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "is not JSON"),
        ('{"text": "cut', "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('"text"', "is not a JSON object"),
        ('{"body": "b", "n": 1}', "has no column text, only body, n; give --gpt2.column body"),
        ("{}", "has no column text"),
        ('{"text": 5}', "holds int, not text, in column text"),
        ('{"text": ["a"], "body": "b"}', "holds list, not text, in column text; give --gpt2.column body"),
        ('{"text": "a", "x": ' + "[" * 99_999 + "]" * 99_999 + "}", "is nested too deeply"),
        ('{"text": "a", "x": ' + '{"x":' * 5000 + "1" + "}" * 5000 + "}", "is nested too deeply"),
        ('{"text": "a", "x": ' + "9" * 5000 + "}", "is not JSON"),
        (b'{"text": "caf\xe9"}', "not in the file's encoding"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_one_bad_line_costs_one_line(tmp_path: Path, line: str | bytes, reason: str) -> None:
    bad = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "a.jsonl", GOOD.encode() * 3 + bad + b"\n" + GOOD.encode() * 20)
    said = refusal(path)
    assert said.startswith("a.jsonl: line 4 ")
    assert reason in said
    assert said.endswith("--gpt2.bad-shards skip goes on without such rows")
    text, (told,) = read(path, bad_shards="skip")
    assert text.replace("\0", "") == "good" * 23
    assert told.startswith("text: skipped 1 bad rows or files: a.jsonl: line 4 ")


def test_blank_lines_null_rows_and_marks_within_are_no_mistakes(tmp_path: Path) -> None:
    lines = f'{GOOD}\n  \r\n{GOOD}{{"text": null}}\n\ufeff{GOOD}\n\n'
    text, said = read(write(tmp_path / "a.jsonl", lines.encode() * 9))
    assert text.replace("\0", "") == "good" * 27
    assert said == ["text: left out 9 rows without text"]


def test_a_shard_of_nulls_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    save(folder / "a.parquet", WORDS)
    pq.write_table(pa.table({"text": pa.nulls(5)}), folder / "b.parquet")
    _, said = read(folder)
    assert said[-1] == "text: left out 5 rows without text"
    assert "5 rows without text" in refusal(folder / "b.parquet")


def table(**columns: object) -> pa.Table:
    return pa.table(columns)


@pytest.mark.parametrize(
    ("content", "column", "reason"),
    [
        (pa.table([WORDS, WORDS], names=["text", "text"]), "text", "has 2 columns text; rename one"),
        (table(text=[b"a"] * 9), "text", "holds binary, not text; give --gpt2.encoding utf-8"),
        (table(text=[b"a"], body=["b"]), "text", "if these bytes are UTF-8, or --gpt2.column body"),
        (table(text=[["a"]], body=["b"]), "text", "holds list<element: string>, not text; give --gpt2.column body"),
        (table(text=[{"b": "x"}]), "text.b", "has no column text.b, only text"),
        (table(text=[{"b": "x"}]), "text", "holds struct<b: string>, not text"),
        (table(**{f"c{i}": [1] for i in range(99)}), "text", "only c0, c1, c2, c3, c4, c5, c6, c7 and more"),
    ],
)
def test_an_odd_column_is_one_line_that_can_help(tmp_path: Path, content: pa.Table, column: str, reason: str) -> None:
    pq.write_table(content, tmp_path / "a.parquet")
    assert reason in refusal(tmp_path / "a.parquet", column=column)


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        (table(text=[word.encode() for word in WORDS]), {"encoding": "utf-8"}),
        (pa.table([WORDS, WORDS, WORDS], names=["id", "id", "text"]), {}),
        (pa.table([[{"b": "x"}] * 40, WORDS], names=["a", "a.b"]), {"column": "a.b"}),
        (pa.table([WORDS, ["x"] * 40], names=["a", "a.b"]), {"column": "a"}),
    ],
)
def test_a_column_beside_an_odd_one_is_read(tmp_path: Path, content: pa.Table, flags: dict[str, str]) -> None:
    pq.write_table(content, tmp_path / "a.parquet")
    plain = save(tmp_path / "b.jsonl", WORDS)
    assert read(tmp_path / "a.parquet", **flags)[0] == read(plain)[0]


def test_a_damaged_row_group_costs_that_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(text=WORDS), path, row_group_size=10)
    column = pq.read_metadata(path).row_group(1).column(0)
    begin = min(at for at in (column.dictionary_page_offset, column.data_page_offset) if at)
    data = bytearray(path.read_bytes())
    data[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    assert "a.parquet: cannot be read (rows 11 to 20: " in refusal(path)
    text, (told,) = read(path, bad_shards="skip")
    assert [word for word in WORDS if word[:7] in text.replace("\0", "\n")][:11] == [*WORDS[:10], WORDS[20]]
    assert told.startswith("text: skipped 10 bad rows or files: a.parquet: cannot be read (rows 11 to 20")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
def test_a_pointer_of_git_lfs_says_what_to_run(tmp_path: Path, name: str) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
    said = refusal(write(tmp_path / name, pointer))
    assert said == f"{name}: is a Git LFS pointer, not the file itself: run git lfs pull"


def test_one_string_that_is_not_utf_8_costs_its_row(tmp_path: Path) -> None:
    raw = pa.array([*(word.encode() for word in WORDS[:5]), b"caf\xe9", *(word.encode() for word in WORDS[5:])])
    strings = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(table(text=strings), tmp_path / "a.parquet")
    assert "cannot be read (row 6: " in refusal(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", bad_shards="skip")[0] == read(save(tmp_path / "b.jsonl", WORDS))[0]


@pytest.mark.parametrize("name", ["latin1.txt", "deep.jsonl", "dup_columns.parquet", "dotted_beside_struct.parquet"])
def test_the_reported_files_are_refused(tmp_path: Path, name: str) -> None:
    source = data_file(f"cases/{name}")
    (tmp_path / name).symlink_to(source)
    assert refusal(tmp_path / name).startswith(name)
