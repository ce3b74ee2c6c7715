"""Orders of a validator that a miner has let in, and that would read its files, end it, fill its disk or block it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from protocol import MAX_SERVED_BYTES, BlobRef, DatasetRef, DataSpec, Fault, Order, Refusal, TaskSpec
from tests.attacks.hostile import QUADRATIC, SHAPE, Rogue, against_miner
from tests.updates import whole_state

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


# --- ends it ----------------------------------------------------------------------------------------------------------

NANOCHAT: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 2,
    "n_kv_head": 2,
    "n_embd": 64,
    "vocab_size": 320,
    "sequence_len": 16,
    "window_pattern": "L",
    "value_embeds": False,
    "smear": False,
    "backout": False,
    "dtype": "fp32",
    "crop": "keep",
    "bos": 0,
    "batch_size": 1,
    "eval_sequences": 1,
    "seed": 0,
}
MOST = 1 << 20
GREEDY: dict[str, tuple[str, dict[str, Any]]] = {
    "a batch of terabytes": ("gpt2", {"batch_size": MOST, "vocab_size": MOST}),
    "long rows": ("gpt2", {"seq_len": MOST, "n_positions": MOST, "vocab_size": MOST}),
    "eager attention over 2^17 positions": (
        "gpt2",
        {"seq_len": 1 << 17, "n_positions": 1 << 17, "reorder_and_upcast_attn": True},
    ),
    "many heads of eager attention": (
        "gpt2",
        {"seq_len": 1 << 15, "n_positions": 1 << 15, "n_head": 512, "n_embd": 512, "reorder_and_upcast_attn": True},
    ),
    "a model of 60 GB": ("gpt2", {"n_embd": 1 << 14, "n_inner": 1 << 14, "n_layer": 9}),
    "a model above the protocol's bound": ("gpt2", {"n_embd": MOST, "n_inner": MOST}),
    "a vocabulary of 60 GB": ("gpt2", {"vocab_size": MOST, "n_embd": 1 << 13}),
    "positions of 60 GB": ("gpt2", {"n_positions": MOST, "n_embd": 1 << 13}),
    "an inner width of 60 GB": ("gpt2", {"n_inner": MOST, "n_embd": 1 << 12}),
    "512 layers of 512 heads": ("gpt2", {"n_layer": 512, "n_head": 512, "n_embd": 512 * 6, "n_inner": 512 * 6}),
    "512 layers of a long row": ("gpt2", {"n_layer": 512, "n_positions": 1 << 16, "seq_len": 1 << 16, "n_embd": 64}),
    "logits of terabytes": ("nanochat", {"batch_size": MOST}),
    "a nanochat of 60 GB": ("nanochat", {"n_layer": 64, "n_embd": 4096, "n_head": 64, "n_kv_head": 64}),
    "a wide vocabulary": ("nanochat", {"vocab_size": MOST, "n_embd": 1 << 13, "n_head": 64, "n_kv_head": 64}),
    "windows of 2^17 tokens": (
        "nanochat",
        {"sequence_len": 1 << 17, "window_pattern": "SL", "n_embd": 512, "n_head": 64, "n_kv_head": 64},
    ),
    "scores of many narrow heads": (
        "nanochat",
        {"sequence_len": 1024, "batch_size": 1024, "dtype": "bf16", "n_head": 512, "n_embd": 1024, "n_kv_head": 512},
    ),
    "a large quadratic": ("quadratic", {"dimension": MOST}),
}
ALLOWED = 50_000_000


@pytest.mark.parametrize("greed", GREEDY)
def test_an_order_that_needs_too_much_is_refused_by_its_numbers(tmp_path: Path, greed: str) -> None:
    """At once, before a byte of its state or data is taken. Nothing is built for it."""
    task, changes = GREEDY[greed]
    parameters = {"gpt2": SHAPE, "nanochat": NANOCHAT, "quadratic": QUADRATIC}[task] | changes

    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        status, refusal = await first.post(first.order(task=TaskSpec(name=task, parameters=parameters)))
        assert (status, refusal.fault, refusal.missing) == (409, Fault.MALFORMED, ())
        assert "memory" in refusal.reason or "too large" in refusal.reason
        assert first.worker.replica.version is None

    against_miner(tmp_path, play, f"--limits.memory={ALLOWED}")


def test_a_slow_micro_batch_is_refused_by_its_numbers(tmp_path: Path) -> None:
    parameters = SHAPE | {"n_embd": 256, "n_inner": 1024, "n_layer": 4, "batch_size": 4}

    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        _, refusal = await first.post(first.order(task=TaskSpec(name="gpt2", parameters=parameters)))
        assert "a micro-batch takes" in refusal.reason

    against_miner(tmp_path, play, "--limits.batch-s", "0.0001")


def test_a_large_state_a_large_delta_and_copies_count(tmp_path: Path) -> None:
    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        ref = BlobRef(kind="state", digest="0" * 64, bytes=ALLOWED)
        status, refusal = await first.post(first.order(update=whole_state(ref)))
        assert (status, refusal.missing) == (409, ())
        assert "memory" in refusal.reason
        parameters = QUADRATIC | {"dimension": 1 << 17}  # 0.5 MB a copy
        fine = first.order(task=TaskSpec(name="quadratic", parameters=parameters))
        assert (await first.post(fine))[1].missing

    against_miner(tmp_path, play, f"--limits.memory={ALLOWED}")


ODD = [0, -1, 3, MOST, MOST + 1, 1 << 53, True, 1.5, "x", ""]


@pytest.mark.parametrize("task", ["gpt2", "nanochat", "quadratic"])
def test_odd_numbers_are_refused_or_done(tmp_path: Path, task: str) -> None:
    """Each parameter with each odd value: zero, negative, not dividing, huge, another type."""
    shape = {"gpt2": SHAPE, "nanochat": NANOCHAT, "quadratic": QUADRATIC}[task]

    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        for name in shape:
            for value in ODD:
                order = first.order(task=TaskSpec(name=task, parameters=shape | {name: value}))
                status, refusal = await first.post(order)
                assert status == 409, (name, value)
                assert refusal.missing or refusal.fault is Fault.MALFORMED, (name, value)

    against_miner(tmp_path, play, f"--limits.memory={ALLOWED}")


@pytest.mark.parametrize("layers", [512])
def test_a_deep_model_is_done_or_refused(tmp_path: Path, layers: int) -> None:
    """It is small, so its numbers do not rule it out; its state is another model's."""

    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        parameters = SHAPE | {"n_layer": layers}
        status, refusal = await first.outcome(first.order(task=TaskSpec(name="gpt2", parameters=parameters)))
        assert (status, refusal.fault) == (409, Fault.MALFORMED)

    against_miner(tmp_path, play)
