"""Receipts that a miner did not take are told it again; with error feedback it waits for them, and loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pilot.market.round import Network
from pilot.simulation.network import EmulatedNetwork
from pilot.simulation.virtual_time import run
from pilot.storage.run_store import RunStore
from pilot.training.diloco import DiLoCo
from pilot.training.ranges import size
from pilot.worker.error_feedback import residual_digest
from protocol import Fault, Hotkey, Order, Receipt, Reply, Signed
from tasks.gpt2 import GPT2
from tests.tiny import MINERS, OPTIMIZER, Place, make_place, make_worker, play, receipts, tiny_task

A, B = (keypair.ss58_address for keypair in MINERS[:2])


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


class Lossy:
    """A network on which receipts get lost, as `loses` says of each; the validator hears that they were not taken."""

    def __init__(self, loopback: EmulatedNetwork, loses: Callable[[Receipt], bool]) -> None:
        self._loopback, self._loses = loopback, loses
        self.told: list[Receipt] = []  # that got through

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loopback, name)

    async def deliver(self, hotkey: Hotkey, signed: Signed) -> bool:
        if signed.kind == Receipt.kind:
            receipt = Receipt.parse(signed.body)
            if self._loses(receipt):
                return False
            self.told.append(receipt)
        return await self._loopback.deliver(hotkey, signed)


def place(folder: Path, task: GPT2, loses: Callable[[Receipt], bool], **policy: Any) -> tuple[Place, Lossy]:
    networks: list[Lossy] = []

    def network(loopback: EmulatedNetwork) -> Network:
        networks.append(Lossy(loopback, loses))
        return networks[-1]

    defaults: dict[str, Any] = {"codec_up": "ternary-rc", "feedback": 0.9}
    return make_place(folder, task, network=network, **(defaults | policy)), networks[-1]


def replies(store: RunStore, hotkey: Hotkey) -> list[Reply]:
    """Of the committed rounds."""
    rounds = [record.round for record in store.committed(0)]
    return [r.reply for n in rounds for r in store.received(n) if r.reply.hotkey == hotkey]


def kept(folder: Path, hotkey: Hotkey) -> list[tuple[int, str]]:
    lines = (folder / "miners" / hotkey / "receipts.jsonl").read_text().splitlines()
    found = [Receipt.parse(Signed.parse(line).body) for line in lines]
    return [(receipt.round, receipt.verdict) for receipt in found]


def follows(replies: list[Reply], rounds: int) -> None:
    """Each encoding goes on from what the one before it left."""
    assert len(replies) == rounds
    for before, after in pairwise(replies):
        assert after.residual_before == before.residual_after is not None


def test_residuals_go_on_from_round_to_round(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        p, _ = place(tmp_path, task, lambda receipt: False)
        await play(p.market, 5)
        for hotkey in (A, B):
            follows(replies(p.store, hotkey), 5)
        assert not [line for line in p.said if "error feedback" in line]
        await p.market.close()

    run(main())


@pytest.mark.parametrize("times", [1, 2])
def test_a_receipt_that_was_lost_is_told_with_the_next_order(tmp_path: Path, task: GPT2, times: int) -> None:
    """The miner has the next order already, so it waits for nothing but that; each receipt is kept once."""
    lost: list[Receipt] = []

    def loses(receipt: Receipt) -> bool:
        if receipt.hotkey == A and receipt.round == 1 and len(lost) < times:
            lost.append(receipt)
            return True
        return False

    async def main() -> None:
        p, _ = place(tmp_path, task, loses)
        await play(p.market, 6)
        assert sorted(kept(tmp_path, A)) == [(round, "ACCEPTED") for round in range(6)]
        encoded = replies(p.store, A)
        plain = [reply.round for reply in encoded if reply.residual_before is None]
        assert plain in ([], [2], [2, 3])  # told when one of the orders after it was taken
        follows([reply for reply in encoded if reply.round not in plain], 6 - len(plain))
        follows(replies(p.store, B), 6)
        await p.market.close()

    run(main())


def test_a_miner_whose_receipts_are_all_lost_sends_plain_encodings_and_begins_anew(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        p, _ = place(tmp_path, task, lambda receipt: receipt.hotkey == A)
        await play(p.market, 7)
        encoded = replies(p.store, A)
        assert [reply.round for reply in encoded if reply.residual_before is not None] == [0, 5]
        assert p.said.count("error feedback starts over: no receipt for round 0 came") == 1
        assert {r.verdict for n in range(7) for r in receipts(p.store, n).values()} == {"ACCEPTED"}
        follows(replies(p.store, B), 7)
        await p.market.close()

    run(main())


def test_after_a_restart_of_the_validator_the_last_receipts_are_told(tmp_path: Path, task: GPT2) -> None:
    """It committed, and was killed before the receipts had left."""

    async def first() -> None:
        p, _ = place(tmp_path, task, lambda receipt: receipt.round == 2)
        await play(p.market, 3)
        await p.market.close()
        p.store.close()

    async def second() -> None:
        p, _ = place(tmp_path, task, lambda receipt: False)  # the miners were restarted too
        await p.market.replay(0)
        await play(p.market, 6)
        for hotkey in (A, B):
            assert kept(tmp_path, hotkey) == [(round, "ACCEPTED") for round in range(6)]
            follows(replies(p.store, hotkey), 6)
        assert not [line for line in p.said if "error feedback" in line]
        await p.market.close()

    run(first())
    run(second())


def test_a_miner_that_is_killed_goes_on_with_its_residual(tmp_path: Path, task: GPT2) -> None:
    """At any moment: another process of it takes the place of the first in the middle of a round."""

    async def main() -> None:
        p, _ = place(tmp_path, task, lambda receipt: False, batch_s=[1.0, 1.0])

        async def kills() -> None:
            clock = asyncio.get_running_loop().time
            for wait_s in (0.5, 2.3, 1.9, 3.1):  # a round takes a little over 2 s
                await asyncio.sleep(wait_s)
                p.network.drop(A)
                p.workers[A].close()
                p.workers[A] = make_worker(tmp_path / "miners", MINERS[0], p.said, clock)
                p.network.restore(A, p.workers[A])

        killing = asyncio.create_task(kills())
        await play(p.market, 10)
        await killing
        verdicts = {n: receipts(p.store, n)[A].verdict for n in range(10) if A in receipts(p.store, n)}
        assert Fault.SILENT in verdicts.values()
        accepted = [reply for reply in replies(p.store, A) if verdicts[reply.round] == "ACCEPTED"]
        assert len(accepted) >= 4
        assert all(reply.residual_before is not None for reply in accepted)
        assert not [line for line in p.said if "error feedback" in line]
        await p.market.close()

    run(main())


def test_orders_without_error_feedback_have_plain_replies(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        p, _ = place(tmp_path, task, lambda receipt: False, feedback=0.0)
        await play(p.market, 2)
        assert {reply.residual_before for reply in replies(p.store, A)} == {None}
        assert not (tmp_path / "miners" / A / "residual.safetensors").exists()
        assert {Order.parse(s.body).feedback for s in p.store.orders(1)} == {0.0}
        await p.market.close()

    run(main())


@pytest.mark.parametrize("overlap", [0, 1])
def test_gradients_and_pseudo_gradients_do_not_share_a_residual(tmp_path: Path, task: GPT2, overlap: int) -> None:
    """Two rounds of gradients, then inner steps for as long as a round has time: never as many as were ordered."""
    optimizer = asdict(OPTIMIZER)
    plan = DiLoCo(30, 2, outer_lr=0.7, momentum=0.7, keep=False, warmup_rounds=2, rounds=6, optimizer=optimizer)
    policy = {"diloco": plan, "overlap": overlap, "round_s": 10.0}

    async def main() -> None:
        p, _ = place(tmp_path, task, lambda receipt: False, batch_s=[1.0, 1.5], **policy)
        await play(p.market, 6)
        assert [line for line in p.said if "error feedback" in line] == 2 * [
            "error feedback starts over: the residual is of another mode"
        ]
        for hotkey in (A, B):
            came = replies(p.store, hotkey)
            assert all(0 < size(reply.done) < 60 for reply in came[2:])
            follows(came[:2], 2)
            follows(came[2:], 4)
            parameters = p.market.learner.parameters
            assert (
                came[0].residual_before
                == came[2].residual_before
                == residual_digest({name: torch.zeros(parameter.shape) for name, parameter in parameters.items()})
            )
        await p.market.close()

    run(main())
