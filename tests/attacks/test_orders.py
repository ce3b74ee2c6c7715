"""Orders of a validator that a miner has let in, and that would read its files, end it, fill its disk or block it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from protocol import MAX_SERVED_BYTES, BlobRef, DatasetRef, DataSpec, Fault, Order, Refusal, TaskSpec
from tests.attacks.hostile import SHAPE, Rogue, against_miner

SECRET = "HUNTER2 the first line of a private file"
LARGE = BlobRef(kind="data", digest="0" * 64, bytes=MAX_SERVED_BYTES + 1)  # the miner makes it, if it can
PARAMETERS: dict[str, Any] = {"tokenizer": "byte", "column": "text", "rows": 9, "max_bytes": 0, "validation": 0.05}


# --- reads its files --------------------------------------------------------------------------------------------------


def of_hub(rogue: Rogue, name: str = "owner/set", **parameters: Any) -> Order:
    """Return an order whose tokens the miner makes from a data set."""
    source = DatasetRef(name=name, subset=None, split="train", revision="0" * 40)
    data = DataSpec(blobs={"tokens": LARGE}, source=source, parameters=PARAMETERS | parameters)
    return rogue.order(task=TaskSpec(name="gpt2", parameters=SHAPE), data=data)


def plant_secrets(folder: Path) -> None:
    """Put private files where `datasets` would find them as a data set of their folder."""
    (folder / "owner" / "set").mkdir(parents=True)
    for place in (folder, folder / "owner" / "set"):
        for name in ("train.txt", "train.csv", "a.jsonl", "set.py"):
            (place / name).write_text(f"{SECRET}\n" * 9)


def tells_nothing(refusal: Refusal, folder: Path) -> bool:
    words = [*SECRET.split()[:1], str(folder), "train.csv"]
    return not any(word in refusal.reason for word in words)


@pytest.mark.parametrize("allowed", [False, True])
def test_no_local_file_is_read_in_place_of_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    """Neither is a folder of the data set's name, even where --datasets allows the data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    plant_secrets(tmp_path)

    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        status, refusal = await first.outcome(of_hub(first))
        assert (status, refusal.fault) == (409, Fault.WRONG_DATA)
        assert tells_nothing(refusal, tmp_path)
        assert ("--datasets" in refusal.reason) == (not allowed)
        assert not any("HUNTER2" in line for line in said)

    against_miner(tmp_path / "miner", play, *(["--datasets", "owner/set"] if allowed else []))


LOCAL_TEXTS = {
    "text": (".txt", SECRET),
    "rows without the column": (".jsonl", f'{{"{SECRET}": 1}}'),
    "a row that is no text": (".jsonl", '{"text": 1234}'),
    "no JSON": (".jsonl", SECRET),
    "too much text": (".txt", SECRET * 10),
    "a token file": (".bin", ""),
}


@pytest.mark.parametrize("text", LOCAL_TEXTS)
def test_a_refusal_tells_nothing_of_the_miners_data(tmp_path: Path, text: str) -> None:
    """Neither contents nor digests, names of columns or paths of --data. The miner's own log says what is wrong."""
    suffix, content = LOCAL_TEXTS[text]
    path = tmp_path / f"private{suffix}"
    path.write_text(content) if content else path.write_bytes(b"pilotok1" + bytes(24) + b"x")

    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        status, refusal = await first.outcome(of_hub(first))
        assert (status, refusal.fault) == (409, Fault.WRONG_DATA)
        assert refusal.reason == "this miner's --data: does not make the order's tokens"
        assert any(refusal.reason + " (" in line for line in said)

    against_miner(tmp_path / "miner", play, "--data", str(path))


def test_blobs_that_are_no_token_files_tell_no_path(tmp_path: Path) -> None:
    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        for data in (b"junk" * 99, b"x", b"pilotok1" + bytes(99)):
            status, refusal = await first.outcome(first.order(data))
            assert (status, refusal.fault) == (409, Fault.WRONG_DATA)
            assert refusal.reason == "the order's tokens are no token file"

    against_miner(tmp_path, play)


@pytest.mark.parametrize("size", [1, 100, MAX_SERVED_BYTES])
def test_what_a_validator_could_send_is_never_made_from_data(tmp_path: Path, size: int) -> None:
    """Else a few bytes could be guessed: an order for the tokens of a guess would be done where it is right."""
    (tmp_path / "private.txt").write_text(SECRET)

    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        small = LARGE.model_copy(update={"bytes": size})
        data = DataSpec(blobs={"tokens": small}, parameters=PARAMETERS)
        _, refusal = await first.post(first.order(task=TaskSpec(name="gpt2", parameters=SHAPE), data=data))
        assert small in refusal.missing

    against_miner(tmp_path / "miner", play, "--data", str(tmp_path / "private.txt"))
