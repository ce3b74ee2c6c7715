"""Orders of a validator that a miner has let in, and that would read its files, end it, fill its disk or block it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pilot.common.limits import Limits
from pilot.storage.miner_store import FileMinerStore
from pilot.transport.auth import sign_message
from protocol import MAX_SERVED_BYTES, BlobRef, DatasetRef, DataSpec, Fault, Order, Receipt, Refusal, TaskSpec
from tests.attacks.hostile import QUADRATIC, RIVAL, SHAPE, Rogue, against_miner, token_file
from tests.tiny import VALIDATOR
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


# --- blocks it --------------------------------------------------------------------------------------------------------

AWAY = ("--limits.away-s", "0.5")


async def until_accepted(rogue: Rogue, order: Order) -> float:
    """Give an order until the miner is not BUSY any more. Return the seconds that it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while (answer := await rogue.give(order))[0] != 200:
        assert answer[1].fault is Fault.BUSY, answer[1].reason
        assert loop.time() - began < 10
        await asyncio.sleep(0.05)
    return loop.time() - began


@pytest.mark.parametrize("stage", ["inputs missing", "half of an input", "reply not asked for", "reply not fetched"])
def test_an_order_that_is_left_alone_blocks_nobody(tmp_path: Path, stage: str) -> None:
    """Its deadline is 115 days. The other validator has the miner as soon as the first is not heard of any more."""

    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        order = first.order(deadline_s=1e7)
        if stage == "inputs missing":
            assert (await first.post(order))[1].missing
        elif stage == "half of an input":
            ref = (await first.post(order))[1].missing[0]
            await first.put_part(ref, 0, 20)
        elif stage == "reply not asked for":
            assert (await first.give(order))[0] == 200
        else:
            assert (await first.outcome(order))[0] == 200
        theirs = second.order()
        assert 0.2 < await until_accepted(second, theirs) < 5
        assert (await second.outcome(theirs))[0] == 200
        assert await second.fetch(theirs) == 200

    against_miner(tmp_path, play, *AWAY)


def test_an_order_that_is_asked_for_without_end_is_over_by_the_miners_own_bound(tmp_path: Path) -> None:
    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        order = first.order(deadline_s=1e7)
        assert (await first.outcome(order))[0] == 200

        async def keep_asking() -> None:
            while True:
                await first.outcome(order)
                await asyncio.sleep(0.05)

        asking = asyncio.create_task(keep_asking())
        assert 0.5 < await until_accepted(second, second.order()) < 5
        asking.cancel()
        await asyncio.wait({asking})

    against_miner(tmp_path, play, "--limits.deadline-s", "1.5", honest=False)


def test_a_trickle_of_blobs_does_not_reserve_a_miner_for_ever(tmp_path: Path) -> None:
    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        ref = (await first.post(first.order()))[1].missing[0]

        async def trickle() -> None:
            for offset in range(ref.bytes - 1):
                await first.put_part(ref, offset, offset + 1)
                await asyncio.sleep(0.1)

        trickling = asyncio.create_task(trickle())
        assert 0.5 < await until_accepted(second, second.order()) < 5
        trickling.cancel()
        await asyncio.wait({trickling})

    against_miner(tmp_path, play, "--limits.deadline-s", "1.5", honest=False)


@pytest.mark.parametrize("kind", ["state", "data"])
def test_a_second_validator_does_not_disturb_the_firsts_upload(tmp_path: Path, kind: str) -> None:
    """It orders, sends the same blob and stops the order in the midst of the upload, which then goes on."""

    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        order = first.order()
        missing = {ref.kind: ref for ref in (await first.post(order))[1].missing}
        ref = missing[kind]
        half = ref.bytes // 2
        await first.put_part(ref, 0, half)
        theirs = second.order(token_file(9))
        assert (await second.post(theirs))[1].fault is Fault.BUSY
        assert (await second.put(ref, second.blobs.get(ref.digest, first.blobs[ref.digest])))[0] == 409
        await second.stop(order)
        held = (await first.post(order))[1].held
        assert held[ref.digest] == half
        for each in missing.values():
            offset = half if each == ref else 0
            assert (await first.put(each, first.blobs[each.digest], offset))[0] == 200
        assert (await first.outcome(order))[0] == 200
        assert await first.fetch(order) == 200

    against_miner(tmp_path, play)


def test_a_second_validator_does_not_end_a_transfer_under_way(tmp_path: Path) -> None:
    """A newer transfer of the same blob ends an older one, but only of the same validator."""

    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        order = first.order()
        refs = (await first.post(order))[1].missing
        ref = refs[0]
        sending = asyncio.create_task(first.put_part(ref, 0, ref.bytes, pause_s=0.3))
        await asyncio.sleep(0.1)
        assert (await second.put(ref, first.blobs[ref.digest]))[0] == 409
        assert await sending == 200
        for other in refs[1:]:
            assert (await first.put(other, first.blobs[other.digest]))[0] == 200
        assert (await first.outcome(order))[0] == 200
        assert await first.fetch(order) == 200

    against_miner(tmp_path, play)


@pytest.mark.parametrize("bad", ["malformed", "greedy", "of another task"])
def test_a_bad_order_does_not_end_an_upload_that_has_paused(tmp_path: Path, bad: str) -> None:
    """Even where the first validator is away so long that a good order could have the miner."""

    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        order = first.order()
        ref = (await first.post(order))[1].missing[0]
        await first.put_part(ref, 0, 20)
        await asyncio.sleep(0.6)
        spec = {
            "malformed": TaskSpec(name="quadratic", parameters={}),
            "greedy": TaskSpec(name="gpt2", parameters=SHAPE | {"batch_size": MOST, "vocab_size": MOST}),
            "of another task": TaskSpec(name="nonesuch", parameters={}),
        }[bad]
        assert (await second.post(second.order(task=spec)))[0] in (400, 409)
        assert (await first.post(order))[1].held[ref.digest] == 20

    against_miner(tmp_path, play, *AWAY, "--limits.memory", "5e9")


# --- fills its disk ---------------------------------------------------------------------------------------------------


def kept_data(folder: Path) -> list[Path]:
    return list((folder / "cache").glob("*/blobs/data/*"))


def test_other_data_with_each_order_does_not_fill_the_disk(tmp_path: Path) -> None:
    """The least recently used goes first: what an order used again stays."""

    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        for fill in range(20):
            assert (await first.outcome(first.order(token_file(fill + 10))))[0] == 200
            often = first.order()
            lacking = {ref.kind for ref in (await first.post(often))[1].missing}
            assert "data" not in lacking or not fill
            assert (await first.outcome(often))[0] == 200
        names = {path.name for path in kept_data(tmp_path)}
        assert len(names) == 16
        assert often.data.blobs["tokens"].digest in names

    against_miner(tmp_path, play)


def test_large_data_are_kept_up_to_a_number_of_bytes(tmp_path: Path) -> None:
    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        for fill in range(6):
            answer = await first.outcome(first.order(token_file(fill, 400_000)))
            assert answer[0] == 200, answer[1].reason
        assert sum(path.stat().st_size for path in kept_data(tmp_path)) <= 1_000_000

    against_miner(tmp_path, play, "--limits.cache-bytes", "1000000")


def test_receipts_are_kept_up_to_a_number_of_bytes(tmp_path: Path) -> None:
    """The newest stay, each whole, also where the file's last line was torn."""
    store = FileMinerStore(tmp_path, replace(Limits(), receipts_bytes=20_000))
    path = tmp_path / "receipts.jsonl"
    signed = []
    for round in range(40):
        receipt = Receipt(
            run="rogue",
            round=round,
            hotkey=RIVAL.ss58_address,
            order="0" * 64,
            verdict="ACCEPTED",
            reason="x" * 900,
            done=(),
            work=0,
            scores={},
            weight=0.0,
        )
        signed.append(sign_message(VALIDATOR, receipt))
        assert store.add_receipt(signed[-1])
        assert path.stat().st_size <= 20_000
        if round == 30:
            with path.open("ab") as file:
                file.write(b'{"kind": "rec')
            store = FileMinerStore(tmp_path, replace(Limits(), receipts_bytes=20_000))
    kept = store.receipts()
    assert 5 <= len(kept) < 20
    assert kept == signed[-len(kept) :]


def test_tokens_larger_than_the_disk_are_not_made(tmp_path: Path) -> None:
    async def play(first: Rogue, second: Rogue, said: list[str]) -> None:
        data = of_hub(first).data
        for size in (1 << 36, 1 << 30):
            blobs = {"tokens": LARGE.model_copy(update={"bytes": size})}
            spec = TaskSpec(name="gpt2", parameters=SHAPE | {"seq_len": 16})
            order = first.order(task=spec, data=data.model_copy(update={"blobs": blobs}))
            _, refusal = await first.outcome(order)
            assert "more than this miner has room for" in refusal.reason

    flags = ("--datasets", "owner/set", "--limits.cache-bytes", "1000000000", "--limits.memory", "1e12")
    against_miner(tmp_path, play, *flags, honest=False)
