"""Whole rounds with --broadcast delta over the loopback network: what travels, who joins, heals, is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pilot.simulation.virtual_time import run
from pilot.storage.run_store import RunStore
from pilot.worker.worker import Worker
from protocol import Digest, Fault, Hello, Hotkey, Order, Reply, Status
from tasks.gpt2 import GPT2
from tests.test_learner import tensors_of
from tests.test_round import Dying
from tests.tiny import MINERS, Place, make_place, receipts, tiny_task

STATE = 89_384  # bytes of the model in fp32
DELTA = {"broadcast": "delta", "codec_down": "2bit", "codec_up": "ternary-rc", "digest_every": 1}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


def bytes_down(place: Place) -> list[int]:
    return [int(record.metrics["bytes_down"]) for record in place.store.committed(0)]


def verdicts(place: Place, hotkey: Hotkey) -> list[str]:
    found = [receipts(place.store, record.round) for record in place.store.committed(0)]
    return [str(one[hotkey].verdict) for one in found if hotkey in one]


def healed(place: Place) -> int:
    return sum("asks for a whole state" in line for line in place.said)


# --- what travels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 1])
def test_miners_follow_by_deltas_and_prove_it_each_round(tmp_path: Path, task: GPT2, overlap: int) -> None:
    """20 rounds, more than lie between two snapshots; the model learns, and all miners have the replica's bits."""

    async def main() -> None:
        place = make_place(tmp_path, task, overlap=overlap, **DELTA)
        before = await place.market.evaluate()
        assert before["val_loss"] == before["replica_val_loss"]
        versions = []
        await place.market.open_rounds(20)
        while place.market.in_flight:
            versions.append(place.market.learner.update)
            await place.market.run_round(20)
        after = await place.market.evaluate()
        assert after["val_loss"] < before["val_loss"] - 0.4
        assert after["replica_val_loss"] == pytest.approx(after["val_loss"], abs=0.02)
        assert after["replica_val_loss"] != after["val_loss"]
        first, *later = bytes_down(place)
        assert first > 2 * STATE
        assert max(later) < 0.2 * 2 * STATE
        assert healed(place) == 0
        assert place.market.learner.update.snapshots
        for worker in place.workers.values():
            assert set(verdicts(place, worker.hotkey)) == {"ACCEPTED"}
        proofs = {Order.parse(s.body).state_digest for n in range(20) for s in place.store.orders(n)}
        assert len(proofs) == 20 - overlap  # with an overlap the first two rounds are on the first version
        await place.market.close()

    run(main())


async def rounds(place: Place, last: int) -> None:
    """Up to round `last`, with nothing in flight after it."""
    await place.market.open_rounds(last)
    while place.market.in_flight:
        await place.market.run_round(last)


@pytest.mark.parametrize("known", [False, True])
def test_who_comes_late_gets_the_shortest_way_and_works_in_that_round(tmp_path: Path, task: GPT2, known: bool) -> None:
    """A newcomer the first state and 18 deltas, or the snapshot and two; who was away for 17 rounds 17 deltas."""

    async def main() -> None:
        place = make_place(tmp_path, task, miners=MINERS[:3], **DELTA)
        late = MINERS[2].ss58_address
        if known:
            await rounds(place, 1)
        place.network.drop(late)
        await rounds(place, 18)
        place.network.restore(late)
        await rounds(place, 20)
        update = place.market.learner.update
        delta = max(step.bytes for step in update.steps)
        assert [s.steps for s in update.snapshots] == [0, 15]
        assert verdicts(place, late) == ["ACCEPTED"] * (3 if known else 2)
        extra = bytes_down(place)[18] - bytes_down(place)[17]  # beside an order and what the others got
        tokens = 0 if known else task.data_spec.blobs["tokens"].bytes
        least = 17 * delta if known else STATE + 3 * delta
        assert least <= extra - tokens < least + 4 * delta + 10_000
        assert healed(place) == 0
        await place.market.close()

    run(main())


# --- what heals -------------------------------------------------------------------------------------------------------


def test_a_damaged_model_heals_in_the_round_that_proves_it(tmp_path: Path, task: GPT2) -> None:
    """One bit of one miner's model: its work until then counts, as nothing else tells; then it says so, and goes on."""

    async def main() -> None:
        place = make_place(tmp_path, task, **{**DELTA, "digest_every": 4})
        await rounds(place, 6)
        worker = place.workers[MINERS[1].ss58_address]
        built = worker.replica._built
        assert built is not None
        with torch.no_grad():
            next(built[3].parameters()).view(-1)[3] += 1e-7
        await rounds(place, 8)
        assert healed(place) == 0
        await rounds(place, 12)
        assert healed(place) == 1
        assert set(verdicts(place, worker.hotkey)) == {"ACCEPTED"}
        _, model = worker.replica._built[2:] if worker.replica._built else (None, None)
        other = place.workers[MINERS[0].ss58_address].replica._built
        assert model is not None
        assert other is not None
        learner = place.market.learner
        for name, t in tensors_of(learner, model).items():
            assert torch.equal(t, tensors_of(learner, other[3])[name])
        await place.market.close()

    run(main())


class Liar(Worker):
    """Says that it holds a version that nobody knows."""

    def hello(self, nonce: str) -> Hello:
        return super().hello(nonce).model_copy(update={"version": "f" * 64})

    def status(self) -> Status:
        return super().status().model_copy(update={"version": "f" * 64})

    async def wait_for_reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
        reply = await super().wait_for_reply(caller, order, wait_s)
        return reply and reply.model_copy(update={"version": "f" * 64})


def test_a_version_that_nobody_knows_is_stale_and_costs_only_its_own_work(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, **DELTA)
        liar, honest = (place.workers[k.ss58_address] for k in MINERS[:2])
        liar.__class__ = Liar
        await rounds(place, 3)
        assert verdicts(place, liar.hotkey) == [Fault.STALE] * 3
        assert verdicts(place, honest.hotkey) == ["ACCEPTED"] * 3
        await place.market.close()

    run(main())


# --- restarts ---------------------------------------------------------------------------------------------------------


def test_death_at_any_durable_step_leaves_the_same_chain(tmp_path: Path, task: GPT2) -> None:
    """Versions, chain and bits are those of an undisturbed run. The chain gets a snapshot of its own, and is shortened,
    before and after the validator's checkpoint."""
    last = 9

    policy = {**DELTA, "codec_down": "bf16", "digest_every": 3}

    async def plays(folder: Path, at: int) -> tuple[object, ...]:
        again = (folder / "run").exists()
        store = RunStore.open(folder / "run", 2) if again else RunStore.create(folder / "run", {"task": "gpt2"}, keep=2)
        place = make_place(folder, task, store=Dying(store, at, after=True), overlap=1, miners=MINERS[:1], **policy)  # type: ignore[arg-type]
        try:
            market = place.market
            snapshot = store.snapshots.newest(lambda line: None)
            if snapshot:
                market.learner.load_state(snapshot.header, snapshot.tensors)
            await market.replay(snapshot.round if snapshot else 0)
            await market.open_rounds(last)
            while market.in_flight:
                await market.run_round(last)
                if market.round == 6:
                    market.save_snapshot(store.save_snapshot)
            await market.finish()
            assert healed(place) == 0
            learner = market.learner
            named = {ref.digest for ref in learner.update.refs}
            assert named <= learner.blobs.keys()
            assert named <= {path.name for path in (folder / "run" / "versions").iterdir()}
            return learner.version, learner.update, learner.state_digest(), market.store.left
        finally:
            store.close()

    *calm, left = run(plays(tmp_path / "calm", 1000))
    steps = 1000 - left
    assert steps >= 3 * last
    for at in range(1, steps + 1, 4):  # opening, sealing and committing take turns of three
        folder = tmp_path / f"death{at}"
        with pytest.raises(KeyboardInterrupt):
            run(plays(folder, at))
        assert run(plays(folder, 1000))[:3] == tuple(calm)
