"""Text of every source to tokens: the split, equal digests, the cache, a miner's way to the same, and bad input."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pilot.interfaces import Refused
from protocol import DatasetRef, DataSpec, Fault, ProtocolError
from tasks.data.documents import PIECE, Document, hub_documents, split
from tasks.data.reading import Reading
from tasks.data.text import prepare_tokens, rebuild_tokens
from tasks.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from tasks.data.tokens import Tokens
from tasks.gpt2 import GPT2Config

BYTE = ByteTokenizer()
DIFFERS = "this miner's --data: does not make the order's tokens"
TEXT = "Being in doubt, ask the sea – it's older.\n\n  Ask it twice: 12 345 times!\r\n" * 30


def data_file(name: str) -> Path:
    folder = os.environ.get("PILOT_DATA")
    if folder is None or not Path(folder, name).exists():
        pytest.skip(f"PILOT_DATA names no folder with {name}")
    return Path(folder, name)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return load_tokenizer("gpt2", Path(str(data_file("gpt2_encoder.json")).removesuffix("encoder.json")))


def save(path: Path, rows: list[str], column: str = "text") -> Path:
    """The rows as the kind of file that the path's suffix says; a .txt takes one row."""
    if path.suffix == ".txt":
        (text,) = rows
        path.write_bytes(text.encode())
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"id": list(range(len(rows))), column: rows}), path, row_group_size=7)
    else:
        lines = "".join(json.dumps({"id": i, column: row}) + "\n" for i, row in enumerate(rows)).encode()
        path.write_bytes(lzma.compress(lines) if path.suffix == ".xz" else lines)
    return path


def prepared(tmp_path: Path, text: Path | str, tokenizer: Tokenizer = BYTE, **flags) -> tuple[Tokens, DataSpec]:
    return prepare_tokens(GPT2Config(text=str(text), **flags), tokenizer, tmp_path / "cache")


def text_of(part: np.ndarray) -> str:
    return part.tobytes().decode()


# --- sources and the split --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.xz", "a.parquet"])
def test_one_document_is_cut_at_a_character_near_its_end(tmp_path: Path, name: str) -> None:
    text = "é" * 500
    tokens, spec = prepared(tmp_path, save(tmp_path / name, [text]), validation=0.333)
    assert text_of(tokens.train) + text_of(tokens.validation) == text
    assert len(tokens.validation) == 332  # of 1000 bytes; byte 667 is inside a character
    assert spec.blobs["tokens"] == tokens.ref()
    assert (spec.parameters["tokenizer"], list(spec.blobs), spec.source) == ("byte", ["tokens"], None)


def test_the_same_text_has_the_same_digest_from_every_source(tmp_path: Path) -> None:
    names = ["a.txt", "a.jsonl", "a.jsonl.xz", "a.parquet"]
    assert len({prepared(tmp_path, save(tmp_path / name, [TEXT]))[0].digest for name in names}) == 1
    rows = [f"document {i}: {'x' * (i % 13)}" for i in range(300)]
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, row in enumerate(rows):
        save(folder / f"{i:03}.txt", [row])
    sources = [folder, save(tmp_path / "rows.jsonl", rows), save(tmp_path / "rows.parquet", rows)]
    assert len({prepared(tmp_path, source)[0].digest for source in sources}) == 1


def test_many_documents_are_dealt_out_whole(tmp_path: Path) -> None:
    rows = [f"document {i}." for i in range(2000)]
    tokens, _ = prepared(tmp_path, save(tmp_path / "a.jsonl", rows), validation=0.1)
    train, validation = (text_of(part).split("\0") for part in (tokens.train, tokens.validation))
    assert sorted(train + validation) == sorted(rows)
    assert [row for row in rows if row in set(train)] == train  # in their order
    assert 150 < len(validation) < 250
    more, _ = prepared(tmp_path, save(tmp_path / "b.jsonl", [*rows, "one more."]), validation=0.1)
    assert set(validation) <= set(text_of(more.validation).split("\0"))


def test_a_few_documents_are_all_cut(tmp_path: Path) -> None:
    tokens, _ = prepared(tmp_path, save(tmp_path / "a.jsonl", ["abcd", "efgh"]), validation=0.25)
    assert (text_of(tokens.train), text_of(tokens.validation)) == ("abc\0efg", "d\0h")


def test_rows_and_bytes_are_limits(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", ["abcd", "efgh", "ijkl"])
    assert text_of(prepared(tmp_path, path, rows=2)[0].train) == "abcd\0efgh"
    assert text_of(prepared(tmp_path, path, max_bytes=6)[0].train) == "abcd\0ef"
    assert text_of(prepared(tmp_path, save(tmp_path / "a.txt", ["abcdefgh"]), max_bytes=3)[0].train) == "abc"


def test_the_standard_library_needs_no_download(tmp_path: Path) -> None:
    tokens, spec = prepared(tmp_path, "stdlib", max_bytes=300_000)
    assert 280_000 < len(tokens.train) + len(tokens.validation) < 301_000
    assert b"def " in tokens.train.tobytes()
    assert spec.source is None


def test_rows_without_text_are_left_out_and_broken_characters_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab"}\n{"text": null}\n{"text": "c\\ud800d"}\n')
    assert text_of(prepared(tmp_path, path)[0].train) == "ab\0c?d"
    latin = tmp_path / "a.txt"
    latin.write_bytes(b"caf\xe9 au lait")
    assert text_of(prepared(tmp_path, latin)[0].train).startswith("caf\ufffd")


def test_real_books(tmp_path: Path, bpe: Tokenizer) -> None:
    books = data_file("books_val.parquet")
    tokens, spec = prepared(tmp_path, books, bpe)
    rows = pq.read_table(books)["text"].to_pylist()
    parts = [piece.data for piece in split((Document(len(row), (row,)) for row in rows), 0.05)]
    assert sum(map(len, parts)) == sum(len(row.encode()) for row in rows)
    assert 450_000 < len(tokens.train) < 700_000
    assert 0.02 < len(tokens.validation) / len(tokens.train) < 0.09
    assert int((tokens.train == 50256).sum() + (tokens.validation == 50256).sum()) == len(rows) - 2
    assert "vocabulary" in spec.blobs


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_gpt2_tokens_do_not_depend_on_how_the_text_arrives(tmp_path: Path, bpe: Tokenizer) -> None:
    """A file is read in pieces, a row at once; neither border nor batch may show."""
    text = (data_file("tinyshakespeare.txt").read_text() + TEXT)[: PIECE + PIECE // 4]
    text += "\u3000\n\n \u00a0 \n x" * 300 + "y" * 50
    from_file, _ = prepared(tmp_path, save(tmp_path / "a.txt", [text]), bpe)
    from_row, _ = prepared(tmp_path, save(tmp_path / "a.jsonl", [text]), bpe)
    assert from_file.digest == from_row.digest
    assert from_file.train.dtype == np.uint16
    cut = len(text.encode()) - int(len(text.encode()) * 0.05)
    whole = bpe.encode([text.encode()[:cut]])[0]
    assert from_file.train.tolist() == whole.tolist()


def test_gpt2_is_the_published_encoding(bpe: Tokenizer) -> None:
    assert bpe.encode([b"Hello world", b"<|endoftext|>"])[0].tolist() == [15496, 995]
    assert 50256 not in bpe.encode([b"<|endoftext|>"])[0].tolist()
    assert (bpe.vocab_size, bpe.separator) == (50257, 50256)


def test_the_vocabulary_travels_as_one_blob(bpe: Tokenizer) -> None:
    assert bpe.vocabulary is not None
    again = BPETokenizer(bpe.vocabulary)
    assert again.encode([TEXT.encode()])[0].tolist() == bpe.encode([TEXT.encode()])[0].tolist()
    lines = bpe.vocabulary.splitlines(keepends=True)
    attacks = (
        b"",
        lines[1] + lines[0],
        b"".join(lines[1:]),
        bpe.vocabulary + b"!! 50256\n",
        lines[0] * 300,
        b"\xff 0\n",
    )
    for blob in attacks:
        with pytest.raises(ProtocolError, match="vocabulary"):
            BPETokenizer(blob)


def test_a_vocabulary_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--gpt2\.vocabulary .*encoder\.json"):
        load_tokenizer("gpt2", tmp_path)
    (tmp_path / "encoder.json").write_text("{}")
    (tmp_path / "vocab.bpe").write_text("#version\na b\n")
    with pytest.raises(ValueError, match=r"^--gpt2\.vocabulary: cannot read"):
        load_tokenizer("gpt2", tmp_path)


# --- the cache --------------------------------------------------------------------------------------------------------


def test_tokens_are_made_once_and_again_when_the_text_or_a_flag_changes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.txt", [TEXT])
    lines: list[str] = []
    config = GPT2Config(text=str(path))

    def digest(config: GPT2Config) -> str:
        lines.clear()
        return prepare_tokens(config, BYTE, tmp_path / "cache", lines.append)[0].digest

    first = digest(config)
    assert lines
    assert digest(config) == first
    assert not lines  # nothing was read
    assert digest(replace(config, validation=0.2)) != first
    save(path, [TEXT + "more"])
    assert digest(config) != first


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    path = save(tmp_path / "a.txt", [TEXT])
    tokens, spec = prepared(tmp_path, path)
    data = bytearray(tokens.path.read_bytes())
    data[-1] ^= 1
    tokens.path.write_bytes(data)
    again, same = prepared(tmp_path, path)
    assert again.digest == spec.blobs["tokens"].digest
    assert same == spec


# --- a miner's own data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_miner_makes_the_same_tokens_from_its_copy(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", [TEXT], "content")
    tokens, spec = prepared(tmp_path, path, column="content", max_bytes=1500, validation=0.1)
    spec = DataSpec.model_validate_json(spec.model_dump_json())
    rebuilt = rebuild_tokens(spec, path, None, tmp_path / "miner")
    assert rebuilt.read_bytes() == tokens.path.read_bytes()
    assert rebuild_tokens(spec, tokens.path, None, tmp_path / "other") == tokens.path
    assert rebuild_tokens(spec, None, None, tmp_path / "miner") == rebuilt  # once made, it stays


def test_a_miner_needs_the_vocabulary(tmp_path: Path, bpe: Tokenizer) -> None:
    path = save(tmp_path / "a.txt", [TEXT])
    tokens, spec = prepared(tmp_path, path, bpe)
    with pytest.raises(Refused) as refused:
        rebuild_tokens(spec, path, None, tmp_path / "miner")
    assert refused.value.missing == (spec.blobs["vocabulary"],)
    vocabulary = tmp_path / "vocabulary"
    vocabulary.write_bytes(bpe.vocabulary or b"")
    assert Tokens.open(rebuild_tokens(spec, path, vocabulary, tmp_path / "miner")).digest == tokens.digest


def test_a_miner_with_other_data_is_told(tmp_path: Path) -> None:
    tokens, spec = prepared(tmp_path, save(tmp_path / "a.txt", [TEXT]))
    other = prepared(tmp_path, save(tmp_path / "b.txt", [TEXT[::-1]]))[0].path
    hub = DatasetRef(name="owner/set", subset=None, split="train", revision="0" * 40)

    def changed(name: str, value: float | str) -> DataSpec:
        return spec.model_copy(update={"parameters": spec.parameters | {name: value}})

    cases = [
        (spec, tmp_path / "b.txt", DIFFERS),
        (spec, other, DIFFERS),
        (spec, tmp_path / "missing", DIFFERS),
        (spec, save(tmp_path / "c.txt", [TEXT * 3]), DIFFERS),
        (spec, None, "--data"),
        (spec.model_copy(update={"source": hub}), None, "number of rows"),
        (spec.model_copy(update={"source": hub.model_copy(update={"revision": "main"})}), None, "no commit"),
        (changed("tokenizer", "other"), tmp_path / "a.txt", "unknown tokenizer"),
        (changed("rows", -1), tmp_path / "a.txt", "rows: Input should be greater"),
        (changed("rows", "9"), tmp_path / "a.txt", "rows: Input should be a valid integer"),
        (changed("validation", 1.0), tmp_path / "a.txt", "validation: Input should be less"),
        (changed("path", "/etc"), tmp_path / "a.txt", "path: Extra inputs"),
    ]
    for ordered, local, reason in cases:
        with pytest.raises(Refused, match=reason) as refused:
            rebuild_tokens(ordered, local, None, tmp_path / "miner")
        assert (refused.value.status, refused.value.fault) == (409, Fault.WRONG_DATA)
        assert str(tmp_path) not in refused.value.reason
    assert not list((tmp_path / "miner").iterdir())
    assert rebuild_tokens(spec, tokens.path, None, tmp_path / "miner") == tokens.path


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_rows_are_streamed_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands for the hub: `datasets` streams both in the same way."""
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [f"row {i}" for i in range(50)]
    save(folder / "train.parquet", rows, "content")
    source = DatasetRef(name="owner/set", subset=None, split="train", revision="0" * 40)
    on_the_hub(monkeypatch, source, folder)
    documents = list(hub_documents(source, Reading(column="content"), 20))
    assert ["".join(document.pieces) for document in documents] == rows[:20]
    with pytest.raises(ValueError, match="no column text, only id, content"):
        list(hub_documents(source, Reading(), 20))
    with pytest.raises(ValueError, match="cannot read this data set"):
        list(hub_documents(source.model_copy(update={"split": "nope"}), Reading(column="content"), 20))


def on_the_hub(monkeypatch: pytest.MonkeyPatch, source: DatasetRef, folder: Path, outside: bool = False) -> None:
    """Let `datasets` find the files of `folder` where it is asked for `source`."""
    load = datasets.load_dataset_builder

    def from_folder(address: str, subset: str | None, revision: str | None) -> Any:
        assert (address, subset, revision) == (f"hf://datasets/{source.name}", source.subset, source.revision)
        builder = load(str(folder))
        seen = SimpleNamespace(data_files={} if not outside else {"train": [str(folder / "train.parquet")]})
        return SimpleNamespace(config=seen, as_streaming_dataset=builder.as_streaming_dataset)

    monkeypatch.setattr(datasets, "load_dataset_builder", from_folder)


def test_a_data_sets_own_card_cannot_name_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anyone can propose a card for a public data set, and an order can name the proposal's commit."""
    save(tmp_path / "train.parquet", ["a secret"], "content")
    source = DatasetRef(name="owner/set", subset=None, split="train", revision="0" * 40)
    on_the_hub(monkeypatch, source, tmp_path, outside=True)
    with pytest.raises(ValueError, match="names files outside itself"):
        list(hub_documents(source, Reading(column="content"), 20))


PLACES = ["text", "csv", "json", "parquet", "arrow", "imagefolder", "webdataset", "./set", "../set", "/etc", "~/set"]
PLACES += ["a/../b", "a/b/c", "a//b", "hf://datasets/a/b", "http://a/b", "file:///etc", "C:\\set", "a/b\n", "", "ü/b"]


@pytest.mark.parametrize("name", PLACES)
def test_an_order_cannot_name_a_loader_a_path_or_a_url(name: str) -> None:
    good = {"name": "owner/set", "subset": "en", "split": "train", "revision": "0" * 40}
    assert DatasetRef.model_validate(good)
    with pytest.raises(ValueError, match="name"):
        DatasetRef.model_validate(good | {"name": name})
    for field in ("subset", "split", "revision"):
        with pytest.raises(ValueError, match=field):
            DatasetRef.model_validate(good | {field: f"/{name}"})


def test_without_a_network_the_error_is_one_line(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tasks.gpt2 import GPT2Config\n"
        "from tasks.data import text, tokenizer\n"
        "for attempt in (lambda: tokenizer.load_tokenizer('gpt2', None), lambda: text.prepare_tokens("
        "GPT2Config(text='owner/set', rows=5), tokenizer.ByteTokenizer(), Path(sys.argv[1]))):\n"
        "    try: attempt()\n"
        "    except ValueError as error: print(error)\n"
    )
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60
    )
    first, second = ended.stdout.splitlines()
    assert first.startswith("--gpt2.tokenizer gpt2: cannot fetch")
    assert "--gpt2.vocabulary" in first
    assert second.startswith("--gpt2.text owner/set: cannot read this data set from the hub")


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.txt", None, "no such file"),
        ("missing", None, "no such file or folder"),
        ("a.csv", b"x", "not one of .txt"),
        ("a.txt", b"", "empty"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b'{"text": ""}\n', "empty"),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        (
            "a.jsonl",
            b'{"question": "a", "answer": "b"}\n',
            r"no column text, only question, answer; give --gpt2\.column",
        ),
        ("a.jsonl", b'{"text": 5}\n', "holds int, not text"),
        ("a.jsonl.xz", b"not xz", "cannot read"),
        ("a.parquet", b"not parquet", "cannot be read"),
    ],
)
def test_bad_text_is_one_line(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^--gpt2\.text .*{reason}") as error:
        prepared(tmp_path, tmp_path / name)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("*"))


def test_other_bad_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--gpt2\.rows"):
        prepared(tmp_path, "tiiuae/falcon-refinedweb")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="in this folder"):
        prepared(tmp_path, tmp_path / "empty")
    with pytest.raises(ValueError, match="no column nope, only id, text"):
        prepared(tmp_path, save(tmp_path / "a.parquet", ["x"]), column="nope")
    for flag, value in (
        ("validation", 1.0),
        ("validation", -0.1),
        ("rows", -1),
        ("max_bytes", -1),
        ("eval_sequences", 0),
    ):
        with pytest.raises(ValueError, match=rf"^--gpt2\.{flag} {value}"):
            GPT2Config(**{flag: value})
