"""Choose the text files of a folder: one kind, without hidden or accompanying files, split by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from nanochat.shards import HIDDEN

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (".txt", ".jsonl", ".parquet", *(f"{kind}{c}" for kind in (".txt", ".jsonl") for c in COMPRESSED))
PRIORITY = (".parquet", ".jsonl", ".txt")  # of equally much
EXPANSION = 4  # bytes of text in a byte that is compressed, about
PACKED = (*COMPRESSED, ".zip", ".tar", ".tgz", ".7z", ".rar")
ACCOMPANYING = {"readme", "license", "licence", "licenses", "copying", "notice", "changelog", "contributing", "authors"}
ACCOMPANYING |= {"citation", "requirements"}
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "heldout", "holdout"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
NAMED = 3  # files that a line names of each sort


class TextError(ValueError):
    """Say in one line why a text is not available. The caller adds the flag that named it."""


class TextFile(NamedTuple):
    path: Path
    name: str  # below the folder, for messages

    @property
    def suffix(self) -> str:
        """Return the kind of file, without a compression: .txt, .jsonl or .parquet."""
        return Path(plain_name(self.name)).suffix.lower()


@dataclass
class Selection:
    """The files of a text."""

    train: list[TextFile]
    folder: bool = False
    validation: list[TextFile] = field(default_factory=list)  # those that are named for it
    left: dict[str, list[str]] = field(default_factory=dict)  # names by reason

    @property
    def files(self) -> list[TextFile]:
        return [*self.train, *self.validation]

    def parts(self, fraction: float) -> tuple[list[TextFile], list[TextFile]]:
        """Return the files for training and for validation. The second is empty if a fraction of the text is split off.

        Without a fraction, and without files that are named for it, the last of several files is for validation.
        """
        if self.validation or fraction:
            return self.train, self.validation
        if len(self.train) < 2:
            raise TextError("one file, where the last of several is the validation part")
        return self.train[:-1], self.train[-1:]

    def line(self, uses: Mapping[str, Sequence[TextFile] | str]) -> str:
        """Say what is taken for each use, and what is left out and why."""
        taken = [f"{part if isinstance(part, str) else named(part)} for {use}" for use, part in uses.items()]
        used = {file for part in uses.values() for file in part}  # a string has no files
        left = dict(self.left)
        if unused := [file.name for file in self.files if file not in used]:
            left["another split"] = unused
        told = "; ".join(f"{named(names)} ({reason})" for reason, names in left.items()) or "nothing"
        return f"text: {', '.join(taken)}; left out: {told}"


def named(files: Iterable[TextFile | str]) -> str:
    names = [file if isinstance(file, str) else file.name for file in files]
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def plain_name(name: str) -> str:
    """Return a file's name without the suffix of a compression."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in COMPRESSED else name


def select(path: Path) -> Selection:
    """Return the files of a text, sorted by their names: one file, or those of a folder.

    Raises TextError if there are none.
    """
    if path.is_file():
        if not path.name.lower().endswith(SUFFIXES):
            raise TextError(f"not one of {', '.join(SUFFIXES)}")
        return Selection([TextFile(path, path.name)])
    if not path.is_dir():
        raise TextError("no such file or folder")
    found = Selection([], folder=True)
    files = sorted(_walk(path, found.left), key=lambda file: file.path.as_posix())
    files = _one_kind(files, found.left)
    if not files:
        left = "; ".join(f"{named(names)} ({reason})" for reason, names in found.left.items())
        raise TextError(f"no .txt, .jsonl or .parquet file in this folder{left and f', but {left}'}")
    _deal(files, found)
    return found


def local_files(path: Path) -> list[Path]:
    """Return the paths of a text's files. Raises TextError if there are none."""
    return [file.path for file in select(path).files]


# --- what a folder holds ----------------------------------------------------------------------------------------------


def _walk(root: Path, left: dict[str, list[str]]) -> Iterator[TextFile]:
    """Yield the regular files below a folder that are not hidden. Links to folders elsewhere are followed once."""

    def refuse(error: OSError) -> None:
        raise TextError(f"cannot read the folder {error.filename} ({error.strerror})")

    real_root = root.resolve()
    linked: set[Path] = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        base = Path(folder)
        for name in sorted(folders):
            shown = (base / name).relative_to(root).as_posix() + "/"
            reason = "hidden" if name.startswith((*HIDDEN, "_")) else _link_reason(base / name, real_root, linked)
            if reason:
                folders.remove(name)
                left.setdefault(reason, []).append(shown)
        folders.sort()
        for name in sorted(files):
            file = TextFile(base / name, (base / name).relative_to(root).as_posix())
            if name.startswith(HIDDEN):
                left.setdefault("hidden", []).append(file.name)
            elif not file.path.is_file():
                reason = "a link to nothing" if file.path.is_symlink() else "not a regular file"
                left.setdefault(reason, []).append(file.name)
            else:
                yield file


def _link_reason(folder: Path, root: Path, linked: set[Path]) -> str | None:
    """Return why a link to a folder is not followed, or None."""
    if not folder.is_symlink():
        return None
    target = folder.resolve()
    if target.is_relative_to(root) or root.is_relative_to(target):
        return "a link within this folder"
    if any(target.is_relative_to(other) or other.is_relative_to(target) for other in linked):
        return "a link to a folder that is read already"
    linked.add(target)
    return None


def _one_kind(files: list[TextFile], left: dict[str, list[str]]) -> list[TextFile]:
    """Return the files of the kind of which the folder holds most text."""
    kept: list[TextFile] = []
    for file in files:
        name = file.name.lower()
        if not name.endswith(SUFFIXES):
            reason = "compressed: unpack it" if name.endswith(PACKED) else "not .txt, .jsonl or .parquet"
            left.setdefault(reason, []).append(file.name)
        elif file.suffix == ".txt" and _accompanies(file):
            left.setdefault("about the data", []).append(file.name)
        else:
            kept.append(file)
    text_bytes = dict.fromkeys(PRIORITY, -1)
    for file in kept:
        packed = file.suffix == ".parquet" or file.name != plain_name(file.name)
        text_bytes[file.suffix] += file.path.stat().st_size * (EXPANSION if packed else 1) + 1
    kind = max(PRIORITY, key=lambda kind: text_bytes[kind])
    names = {file.name for file in kept}
    taken = []
    for file in kept:
        if file.suffix != kind:
            left.setdefault(f"not {kind}", []).append(file.name)
        elif file.name != plain_name(file.name) and plain_name(file.name) in names:
            left.setdefault("there without compression too", []).append(file.name)
        else:
            taken.append(file)
    return taken


def _accompanies(file: TextFile) -> bool:
    """Tell whether a .txt file is about the data, as a README is."""
    words = [word for word in re.split(r"[^a-z]+", Path(plain_name(file.name)).stem.lower()) if word]
    return bool(words) and (words[0] in ACCOMPANYING or words[-1] in ACCOMPANYING)


def _deal(files: list[TextFile], found: Selection) -> None:
    """Deal the files to the splits that their names tell; a file whose name tells none is for training."""
    splits = [split_of(file.name) or "train" for file in files]
    if "train" not in splits:
        found.train = files
        return
    for file, split in zip(files, splits, strict=True):
        if split == "test":
            found.left.setdefault("the test split", []).append(file.name)
        else:
            (found.validation if split == "validation" else found.train).append(file)


def split_of(name: str) -> str | None:
    """Return the split that a relative path names, such as train for data/train-00000-of-00002.parquet.

    A file's own name comes first, then its folders from within. A name that tells two splits tells none.
    """
    stem, *folders = reversed(Path(plain_name(name)).with_suffix("").parts)
    for part in (stem, *folders):
        told = {SPLITS[word] for word in re.split(r"[-_.\d]+", part.lower()) if word in SPLITS}
        if told:
            return told.pop() if len(told) == 1 else None
    return None
