"""The CORE metric's files: damaged ones, folders of any layout, archives."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from nanochat.core_eval import load
from tests.test_nanochat_core import CHOICES, FACTS, SCHEMA, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "core", copa=CHOICES, winograd_wsc=SCHEMA, lambada_openai=FACTS)


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("copa", '{"query": "a", "choices": ["b"', "line 3: not JSON"),
        ("copa", "[" * 99_999, "line 3: not JSON"),
        ("copa", "[1]", "line 3: not a JSON object"),
        ("copa", '{"choices": ["b", "c"], "gold": 0}', "line 3: query must be a string"),
        (
            "copa",
            '{"query": "a", "choices": ["b"], "gold": 0}',
            "line 3: choices must be a list of two strings or more",
        ),
        ("copa", '{"query": "a", "choices": ["b", 1], "gold": 0}', "line 3: choices must be"),
        ("copa", '{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 3: gold must be the number of one of the 2"),
        ("copa", '{"query": "a", "choices": ["b", "c"], "gold": true}', "line 3: gold must be"),
        ("copa", '{"query": "a", "choices": ["b", "c"]}', "line 3: gold must be"),
        (
            "winograd_wsc",
            '{"context_options": "ab", "continuation": "c", "gold": 0}',
            "line 3: context_options must be",
        ),
        ("winograd_wsc", '{"context_options": ["a", "b"], "gold": 0}', "line 3: continuation must be a string"),
        ("lambada_openai", '{"context": "a"}', "line 3: continuation must be a string"),
        ("lambada_openai", '{"context": null, "continuation": "a"}', "line 3: context must be a string"),
        ("lambada_openai", '"\xff"', "line 3: not JSON"),
    ],
)
def test_a_damaged_line_is_named(folder: Path, file: str, line: str, said: str) -> None:
    path = folder / f"{file}.jsonl"
    lines = path.read_text().splitlines()
    path.write_bytes("\n".join([lines[0], "", line, *lines[1:]]).encode("latin-1"))
    with pytest.raises(ValueError, match=said) as error:
        load(folder)
    assert str(error.value).startswith(f"{folder}: {file}.jsonl: ")
    assert "\n" not in str(error.value)


def test_an_empty_file_and_an_empty_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "copa.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"copa\.jsonl: holds no example"):
        load(folder)
    with pytest.raises(ValueError, match="no such folder or archive"):
        load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds none of the tasks of CORE, such as jeopardy_all\.jsonl"):
        load(tmp_path / "empty")
    with pytest.raises(ValueError, match="neither a folder nor one of"):
        load(folder / "copa.jsonl")


def test_files_lie_anywhere_below_and_have_stand_ins(tmp_path: Path) -> None:
    write(tmp_path / "eval_data" / "commonsense_reasoning", copa=CHOICES)
    write(tmp_path / "eval_data" / "language_understanding", hellaswag_val_1000_core=CHOICES)
    names = [(task.name, file) for task, file, _ in load(tmp_path).tasks]
    stand_in = "hellaswag_val_1000_core.jsonl"
    assert names == [("hellaswag_zeroshot", stand_in), ("copa", "copa.jsonl"), ("hellaswag", stand_in)]
    write(tmp_path / "eval_data", hellaswag=CHOICES)
    assert [file for _, file, _ in load(tmp_path).tasks] == ["hellaswag.jsonl", "copa.jsonl", "hellaswag.jsonl"]


def pack(folder: Path, archive: Path) -> Path:
    """The folder as a bundle: its files in a folder of another name, and some that reach outside."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(folder.iterdir()):
                packed.write(path, f"bundle/eval_data/{path.name}")
            packed.writestr("../outside.jsonl", "{}")
            packed.writestr("../../piqa.jsonl", json.dumps(CHOICES[0]))
        return archive
    with tarfile.open(archive, f"w:{archive.suffix[1:].replace('tgz', 'gz')}") as tar:
        tar.add(folder, "bundle/eval_data")
        for name in ("../outside.jsonl", "../../piqa.jsonl"):
            entry = tarfile.TarInfo(name)
            content = json.dumps(CHOICES[0]).encode()
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("bundle/boolq.jsonl")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return archive


@pytest.mark.parametrize("name", ["core.tar.xz", "core.tar.gz", "core.tgz", "core.zip"])
def test_an_archive_serves_as_well_and_reaches_nowhere(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "deep" / "temporary"
    temporary.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    archive = pack(folder, tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    names = [task.name for task, _, _ in load(archive).tasks]
    assert names == ["copa", "piqa", "lambada_openai", "winograd"]
    assert sorted(tmp_path.rglob("*")) == before

    content = archive.read_bytes()
    for damaged in (content[: len(content) // 2], b"no archive", b""):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}: cannot be unpacked") as error:
            load(archive)
        assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
