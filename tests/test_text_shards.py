"""A folder whose last file is the validation part, files that cannot be read, and a tokenizer of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from pilot.interfaces import Refused
from protocol import DataSpec, ProtocolError
from tasks.data.text import prepare_tokens, rebuild_tokens
from tasks.data.tokenizer import ByteTokenizer, RustTokenizer, Tokenizer, load_tokenizer
from tasks.data.tokens import Tokens
from tasks.gpt2 import GPT2Config
from tests.test_text import TEXT, save, text_of

BYTE = ByteTokenizer()


def shards(folder: Path) -> Path:
    folder.mkdir()
    for name, rows in (("s0.parquet", ["one", "two"]), ("s1.parquet", ["three"]), ("s2.parquet", ["four", "five"])):
        save(folder / name, rows)
    return folder


def prepared(tmp_path: Path, text: Path, tokenizer: Tokenizer = BYTE, **flags: object) -> tuple[Tokens, DataSpec]:
    said = flags.pop("said", [])
    assert isinstance(said, list)
    config = GPT2Config(text=str(text), **{"validation": 0.0, **flags})  # type: ignore[arg-type]
    return prepare_tokens(config, tokenizer, tmp_path / "cache", said.append)


# --- the last file is for validation ----------------------------------------------------------------------------------


def test_the_last_of_several_files_is_kept_whole(tmp_path: Path) -> None:
    tokens, spec = prepared(tmp_path, shards(tmp_path / "set"))
    assert (text_of(tokens.train), text_of(tokens.validation)) == ("one\0two\0three", "four\0five")
    assert spec.parameters["validation"] == 0


def test_of_a_single_file_a_twentieth_is(tmp_path: Path) -> None:
    tokens, spec = prepared(tmp_path, save(tmp_path / "a.txt", [TEXT]))
    assert spec.parameters["validation"] == 0.05
    assert 0.04 < len(tokens.validation) / (len(tokens.train) + len(tokens.validation)) < 0.06


def test_a_miner_with_the_same_files_makes_the_same_tokens(tmp_path: Path) -> None:
    folder = shards(tmp_path / "set")
    tokens, spec = prepared(tmp_path, folder, rows=2)
    assert text_of(tokens.train) == "one\0two"
    assert rebuild_tokens(spec, folder, None, tmp_path / "miner").read_bytes() == tokens.path.read_bytes()
    with pytest.raises(Refused, match="does not make the order's tokens"):
        rebuild_tokens(spec, folder / "s0.parquet", None, tmp_path / "other")


# --- files that cannot be read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"no parquet at all", "cut", "middle"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: bytes | str) -> None:
    folder = shards(tmp_path / "set")
    shard = folder / "s0.parquet"
    whole = shard.read_bytes()
    if damage == "cut":
        damage = whole[: len(whole) // 2]
    elif damage == "middle":  # all but the footer, which a parquet file has at its end, behind it its length
        footer = int.from_bytes(whole[-8:-4], "little") + 8
        damage = b"PAR1" + bytes(len(whole) - 4 - footer) + whole[-footer:]
    assert isinstance(damage, bytes)
    shard.write_bytes(damage)
    with pytest.raises(ValueError, match=r"^--gpt2\.text .*s0\.parquet: cannot be read"):
        prepared(tmp_path, folder)
    said: list[str] = []
    tokens, _ = prepared(tmp_path, folder, bad_shards="skip", said=said)
    assert text_of(tokens.train).endswith("three")
    assert any("s0.parquet" in line and "skipped" in line for line in said)


# --- a tokenizer of one's own -----------------------------------------------------------------------------------------


def own_tokenizer(folder: Path, pattern: str | None = None) -> Path:
    rustbpe = pytest.importorskip("rustbpe", reason="the tokenizer is not built: no cargo")
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator([TEXT] * 3, 300, pattern=pattern)
    tokenizer.add_special_tokens(["<|bos|>"])
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


def test_a_file_of_tok_trains_leads_every_document(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(own_tokenizer(tmp_path / "t")), None)
    assert isinstance(tokenizer, RustTokenizer)
    tokens, spec = prepared(tmp_path, shards(tmp_path / "set"), tokenizer)
    for part, text in ((tokens.train, ["one", "two", "three"]), (tokens.validation, ["four", "five"])):
        assert part[0] == tokenizer.separator
        assert tokenizer.inner.decode(part) == "".join("<|bos|>" + word for word in text)
    vocabulary = tmp_path / "vocabulary"
    vocabulary.write_bytes(tokenizer.vocabulary or b"")
    rebuilt = rebuild_tokens(spec, tmp_path / "set", vocabulary, tmp_path / "miner")
    assert rebuilt.read_bytes() == tokens.path.read_bytes()


def test_a_pattern_that_nobody_knows_does_not_travel(tmp_path: Path) -> None:
    """A regular expression of a stranger's could take any time on a miner."""
    path = own_tokenizer(tmp_path / "t", r"(?:a|aa)+|.|\s")
    with pytest.raises(ValueError, match=r"--gpt2\.tokenizer .* pattern of its own"):
        load_tokenizer(str(path), None)
    with pytest.raises(ProtocolError, match="pattern of its own"):
        RustTokenizer(path.read_bytes())


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1, 2", b"\x80\x04K\x01."])
def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    pytest.importorskip("rustbpe", reason="the tokenizer is not built: no cargo")
    if content is not None:
        (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^--gpt2\.tokenizer ") as error:
        load_tokenizer(str(tmp_path / "t.json"), None)
    assert "\n" not in str(error.value)
