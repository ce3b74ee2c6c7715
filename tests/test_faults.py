"""Every wrong that a miner can do in a round becomes its fault and a receipt, and costs the others nothing.

The miners are real workers behind a service that lies in one way; the network is the loopback.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typing_extensions import Buffer

from pilot.codec import load_codec
from pilot.interfaces import Refused
from pilot.simulation.virtual_time import run
from pilot.worker.worker import Worker
from protocol import Digest, Fault, Hotkey, Order, Range, Reply, Status, digest
from tasks.gpt2 import GPT2
from tests.tiny import MINERS, equal, make_place, parameters, play, receipts, tiny_task

LIAR, HONEST = (k.ss58_address for k in MINERS[:2])


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


class Liar:
    """A worker whose reply or payload is changed on its way out, in its first round only."""

    def __init__(
        self,
        worker: Worker,
        reply: Callable[[Reply], Reply] = lambda reply: reply,
        payload: Callable[[Buffer], bytes] | None = None,
        order: Callable[[Order], None] = lambda order: None,
    ) -> None:
        self.worker, self.change_reply, self.change_payload, self.look = worker, reply, payload, order

    def __getattr__(self, name: str) -> object:
        return getattr(self.worker, name)

    def accept_order(self, caller: Hotkey, order: Order, order_digest: Digest) -> Status:
        if order.round == 0:
            self.look(order)
        return self.worker.accept_order(caller, order, order_digest)

    async def wait_for_reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
        reply = await self.worker.wait_for_reply(caller, order, wait_s)
        if reply is None or reply.round > 0:
            return reply
        if self.change_payload is not None:  # signed over what is sent: only its content is wrong
            data = self.read_payload(caller, order)
            reply = reply.model_copy(
                update={"payload_digest": digest("payload", data), "payload_bytes": len(memoryview(data))}
            )
        return self.change_reply(reply)

    def read_payload(self, caller: Hotkey, order: Digest) -> Buffer:
        data = self.worker.read_payload(caller, order)
        first = self.worker.job is not None and self.worker.job.order.round == 0
        return self.change_payload(data) if self.change_payload is not None and first else data


def changed(**fields: object) -> Callable[[Reply], Reply]:
    return lambda reply: reply.model_copy(update=fields)


def with_gradient(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Buffer], bytes]:
    """The payload of a changed gradient, well encoded."""

    def payload(data: Buffer) -> bytes:
        codec = load_codec("fp32")
        specs = Liar.specs
        return bytes(codec.encode(change(dict(codec.decode(bytearray(data), specs)))))

    return payload


def poison(value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = max(gradient)
        gradient[name] = gradient[name].clone()
        gradient[name].view(-1)[-1] = value
        return gradient

    return change


def drop_one(gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    gradient.pop(min(gradient))
    return gradient


def one_more(gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**gradient, "backdoor": torch.ones(3)}


def misshapen(gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.t().contiguous() if t.ndim == 2 and t.shape[0] != t.shape[1] else t for name, t in gradient.items()}


def as_bf16(data: Buffer) -> bytes:
    gradient = load_codec("fp32").decode(bytearray(data), Liar.specs)
    return bytes(load_codec("bf16").encode(gradient))


def refuse(fault: Fault) -> Callable[[Order], None]:
    def order(order: Order) -> None:
        raise Refused(409, "not now", fault)

    return order


LIES: dict[str, tuple[Fault, dict[str, object]]] = {
    "NaN": (Fault.NONFINITE, {"payload": with_gradient(poison(float("nan")))}),
    "infinity": (Fault.NONFINITE, {"payload": with_gradient(poison(float("inf")))}),
    "a missing tensor": (Fault.MALFORMED, {"payload": with_gradient(drop_one)}),
    "an extra tensor": (Fault.MALFORMED, {"payload": with_gradient(one_more)}),
    "misshapen tensors": (Fault.MALFORMED, {"payload": with_gradient(misshapen)}),
    "another dtype": (Fault.MALFORMED, {"payload": as_bf16}),
    "a payload cut short": (Fault.MALFORMED, {"payload": lambda data: bytes(data)[:-4]}),
    "an empty payload": (Fault.MALFORMED, {"payload": lambda data: b""}),
    "a wrong digest": (Fault.SILENT, {"reply": changed(payload_digest="0" * 64)}),
    "an older version's gradient": (Fault.STALE, {"reply": changed(version="1" * 64)}),
    "ranges not ordered": (Fault.WRONG_DATA, {"reply": changed(done=(Range(100, 102),))}),
    "more than was ordered": (Fault.WRONG_DATA, {"reply": changed(done=(Range(0, 50),))}),
    "nothing done": (Fault.WRONG_DATA, {"reply": changed(done=())}),
    "another round": (Fault.MALFORMED, {"reply": changed(round=7)}),
    "another run": (Fault.MALFORMED, {"reply": changed(run="other")}),
    "another codec": (Fault.MALFORMED, {"reply": changed(codec="bf16")}),
    "another's hotkey": (Fault.MALFORMED, {"reply": changed(hotkey=HONEST)}),
    "busy": (Fault.BUSY, {"order": refuse(Fault.BUSY)}),
    "no work": (Fault.REFUSED, {"order": refuse(Fault.WRONG_DATA)}),
    "a fault of the validator": (Fault.REFUSED, {"order": refuse(Fault.VALIDATOR_FAILED)}),
    "a verdict of its own": (Fault.REFUSED, {"order": refuse(Fault.UNVERIFIED)}),
}


@pytest.mark.parametrize("lie", LIES)
def test_lie_is_refused_and_the_round_goes_on(tmp_path: Path, task: GPT2, lie: str) -> None:
    """The liar gets a receipt with the fault; the model is the one that the honest miner alone would have made."""
    fault, lies = LIES[lie]

    async def lying() -> tuple[str, dict[str, torch.Tensor]]:
        place = make_place(
            tmp_path / "lie",
            task,
            wrap=lambda w: Liar(w, **lies) if w.hotkey == LIAR else w,
        )
        Liar.specs = place.market.dispatcher.specs
        await place.market.open_rounds(2)
        await place.market.run_round(2)
        first = parameters(place.market)
        receipt = receipts(place.store, 0)[LIAR]
        assert (receipt.verdict, receipt.work, receipt.done, receipt.weight) == (fault, 0, (), 0.0), receipt.reason
        assert receipt.reason
        assert receipts(place.store, 0)[HONEST].verdict == "ACCEPTED"
        await play(place.market, 2)  # honest again: used again
        assert receipts(place.store, 1)[LIAR].verdict == "ACCEPTED"
        return place.store.committed(0)[0].version, first

    async def honest_alone() -> tuple[str, dict[str, torch.Tensor]]:
        place = make_place(tmp_path / "honest", task)
        await place.market.open_rounds(1)
        place.network.drop(LIAR)
        await play(place.market, 1)
        return place.market.learner.version, parameters(place.market)

    version, first = run(lying())
    expected_version, expected = run(honest_alone())
    assert version == expected_version
    assert equal(first, expected)


def test_silent_and_late(tmp_path: Path, task: GPT2) -> None:
    """One that goes away is SILENT, one that takes the order and never answers LATE; neither holds the round longer."""

    class Asleep(Liar):
        async def wait_for_reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
            import asyncio

            await asyncio.sleep(wait_s)
            return None

    async def main() -> None:
        place = make_place(tmp_path, task, miners=MINERS[:3], wrap=lambda w: Asleep(w) if w.hotkey == LIAR else w)
        await place.market.open_rounds(1)
        place.network.drop(HONEST)
        await play(place.market, 1)
        verdicts = {hotkey: r.verdict for hotkey, r in receipts(place.store, 0).items()}
        assert verdicts == {LIAR: Fault.LATE, HONEST: Fault.SILENT, MINERS[2].ss58_address: "ACCEPTED"}
        assert place.store.head().metrics["seconds"] == pytest.approx(60.0, abs=1.0)

    run(main())


def test_every_fault_counts_in_the_totals(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        lies = LIES["NaN"][1]
        place = make_place(tmp_path, task, wrap=lambda w: Liar(w, **lies) if w.hotkey == LIAR else w)
        Liar.specs = place.market.dispatcher.specs
        await play(place.market, 2)
        totals = {t.hotkey: t for t in place.store.ledger.totals()}
        assert totals[LIAR].faults == {"NONFINITE": 1}
        assert (totals[LIAR].accepted, totals[HONEST].accepted) == (1, 2)

    run(main())
