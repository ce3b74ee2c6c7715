"""The files of a folder: one kind, nothing hidden, splits by their names, and a line that says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.data.folders import TextError, select, split_of
from tests.test_text import save
from tests.test_text_odd import WORDS, prepared, read, refusal


def folder(root: Path, *names: str) -> Path:
    """Make a folder with these files, each of rows of its own if it is of a known kind."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".parquet", ".jsonl", ".txt"):
            save(path, [f"{name}: text"] if path.suffix == ".txt" else [f"{name}: {word}" for word in WORDS])
        else:
            path.write_bytes(b"\0\1\2 something else")
    return root


def names(files: list) -> list[str]:
    return [file.name for file in files]


@pytest.mark.parametrize(
    ("held", "taken", "reason"),
    [
        (["a.parquet", "b.parquet", "z_LICENSE.txt"], ["a.parquet", "b.parquet"], "about the data"),
        (["a.txt", "README.txt", "b.txt"], ["a.txt", "b.txt"], "about the data"),
        (["a.jsonl", "README_en.txt"], ["a.jsonl"], "about the data"),
        (["a.jsonl", "notes.txt"], ["a.jsonl"], "not .jsonl"),
        (["a.parquet", "metadata.jsonl"], ["a.parquet"], "not .parquet"),
        (["a.jsonl", "b.jsonl", *(f"c{i}.txt" for i in range(9))], ["a.jsonl", "b.jsonl"], "not .jsonl"),
        (["a.parquet", "._a.parquet"], ["a.parquet"], "hidden"),
        (["a.parquet", "__MACOSX/a.parquet"], ["a.parquet"], "hidden"),
        (["a.txt", ".ipynb_checkpoints/a-checkpoint.txt"], ["a.txt"], "hidden"),
        (["a.txt", ".git/b.txt", ".DS_Store"], ["a.txt"], "hidden"),
        (["a.parquet", "_temporary/0/b.parquet"], ["a.parquet"], "hidden"),
        (["a.jsonl", "b.csv", "c.json"], ["a.jsonl"], "not .txt, .jsonl or .parquet"),
        (["a.jsonl", "b.zip", "c.tar.gz", "d.parquet.gz"], ["a.jsonl"], "unpack"),
        (["a.jsonl", "a.jsonl.gz"], ["a.jsonl"], "there without compression too"),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], "the test split"),
        (["A.TXT", "sub/b.txt"], ["A.TXT", "sub/b.txt"], "nothing"),
    ],
)
def test_what_is_taken_and_what_is_left(tmp_path: Path, held: list[str], taken: list[str], reason: str) -> None:
    if "A.TXT" in held:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "A.TXT").write_text("upper")
        held = held[1:]
    found = select(folder(tmp_path / "set", *held))
    assert names(found.files) == taken
    line = found.line({"training": found.train})
    assert reason in line.partition("; left out: ")[2]
    left = {name for told in found.left.values() for name in told}
    assert len(left) >= (reason != "nothing")


def test_the_kind_with_most_text_is_taken(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", "metadata.jsonl", "b.parquet")
    (root / "book.txt").write_text("words " * 9000)
    assert names(select(root).files) == ["book.txt"]


@pytest.mark.parametrize(
    ("held", "train", "validation"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
          "data/validation-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], 2, 1),
        (["train/0.jsonl", "val/0.jsonl", "test/0.jsonl"], 1, 1),
        (["books_train.parquet", "books_val.parquet"], 1, 1),
        (["train.jsonl", "dev.jsonl", "test.jsonl"], 1, 1),
        (["s0.jsonl", "s1.jsonl", "test.jsonl"], 2, 0),
        (["test.jsonl", "test2.jsonl"], 2, 0),  # no other split: the folder's own name told enough
        (["Night train.txt", "The Test.txt", "Train to the sea.txt"], 3, 0),  # titles
        (["train_test.jsonl", "a.jsonl"], 2, 0),
    ],
)  # fmt: skip
def test_splits_go_by_their_names(tmp_path: Path, held: list[str], train: int, validation: int) -> None:
    found = select(folder(tmp_path / "set", *held))
    assert (len(found.train), len(found.validation)) == (train, validation)


def test_the_names_of_splits() -> None:
    assert split_of("validation/train-like.jsonl.gz") == "train"
    assert split_of("en/valid/0001.txt") == "validation"
    assert split_of("shard_00001.parquet") is None


def test_training_and_validation_are_the_named_files(tmp_path: Path) -> None:
    root = folder(
        tmp_path / "set", "data/train-0.parquet", "data/validation-0.parquet", "data/test-0.parquet", "README.md"
    )
    tokens, spec, said = prepared(root)
    train, validation = (bytes(part) for part in (tokens.train, tokens.validation))
    assert (train.count(b"train-0"), train.count(b"validation-0"), train.count(b"test-0")) == (40, 0, 0)
    assert (validation.count(b"train-0"), validation.count(b"validation-0")) == (0, 40)
    assert spec.parameters["validation"] == 0
    assert said[0] == (
        "text: data/train-0.parquet for training, data/validation-0.parquet for validation; left out: "
        "README.md (not .txt, .jsonl or .parquet); data/test-0.parquet (the test split)"
    )
    assert prepared(root)[2] == said  # from the cache as well


def test_the_last_of_several_files_is_no_licence(tmp_path: Path) -> None:
    tokens, _, said = prepared(folder(tmp_path / "set", "a.parquet", "b.parquet", "z_LICENSE.txt"), validation=0.0)
    assert bytes(tokens.validation).count(b"b.parquet") == 40
    assert said == ["text: a.parquet for training, b.parquet for validation; left out: z_LICENSE.txt (about the data)"]


# --- links ------------------------------------------------------------------------------------------------------------


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    elsewhere = folder(tmp_path / "elsewhere", "a.jsonl", "sub/b.jsonl")
    root = folder(tmp_path / "set", "c.jsonl", "real/d.jsonl")
    (root / "link").symlink_to(elsewhere)
    (root / "second").symlink_to(elsewhere / "sub")
    (root / "loop").symlink_to(root)
    (root / "inner").symlink_to(root / "real")
    (root / "above").symlink_to("/")
    (root / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (elsewhere / "back").symlink_to(elsewhere)
    found = select(root)
    assert names(found.files) == ["c.jsonl", "link/a.jsonl", "link/sub/b.jsonl", "real/d.jsonl"]
    assert found.left["a link within this folder"] == ["above/", "inner/", "loop/"]
    assert sorted(found.left["a link to a folder that is read already"]) == ["link/back/", "second/"]
    assert found.left["a link to nothing"] == ["gone.jsonl"]


def test_a_folder_that_is_all_links(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    (root / "data").symlink_to(folder(tmp_path / "elsewhere", "a.parquet", "b.parquet"))
    assert "b.parquet" in read(root)[0]


def test_a_folder_without_text_says_what_it_holds(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", "a.csv", "README.txt", ".hidden.txt")
    said = refusal(root)
    assert said.startswith("no .txt, .jsonl or .parquet file in this folder, but ")
    for name in ("a.csv", "README.txt", ".hidden.txt"):
        assert name in said
    with pytest.raises(TextError, match="no such file or folder"):
        select(tmp_path / "nowhere")
