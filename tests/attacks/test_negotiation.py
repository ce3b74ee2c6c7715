"""Peers that lie about what they know or have, and orders in codecs that nobody knows: one clear outcome each.

What a miner says of its version is for display alone; what its reply says is signed, and must be the order's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pilot.codec import known_codecs
from pilot.interfaces import Refused
from pilot.simulation.virtual_time import run
from pilot.worker.worker import Worker
from protocol import Fault, Hello, Hotkey, Order, Reply, Status, Update, VersionStep, digest
from tasks.gpt2 import GPT2
from tests.tiny import MINERS, VALIDATOR, Place, make_place, play, receipts, tiny_task

HONEST, LIAR = (keypair.ss58_address for keypair in MINERS[:2])
CALLER = VALIDATOR.ss58_address


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


@dataclass
class Lying:
    """A worker whose answers are changed on their way out."""

    worker: Worker
    says: dict[str, Any]  # in hello and status
    replies: dict[str, Any]

    def __getattr__(self, name: str) -> object:
        return getattr(self.worker, name)

    def hello(self, nonce: str) -> Hello:
        hello = self.worker.hello(nonce)
        return hello.model_copy(update={k: v for k, v in self.says.items() if k in Hello.model_fields})

    def status(self) -> Status:
        status = self.worker.status()
        return status.model_copy(update={k: v for k, v in self.says.items() if k in Status.model_fields})

    async def wait_for_reply(self, caller: Hotkey, order: str, wait_s: float) -> Reply | None:
        reply = await self.worker.wait_for_reply(caller, order, wait_s)
        return reply and reply.model_copy(update=self.replies)


def lied(
    folder: Path, task: GPT2, says: dict[str, Any] | None = None, replies: dict[str, Any] | None = None, **policy: Any
) -> list[tuple[str, str]]:
    """The liar's verdicts and reasons in three rounds, beside an honest miner that is paid for all of them."""

    def wrap(worker: Worker) -> Any:
        return Lying(worker, says or {}, replies or {}) if worker.hotkey == LIAR else worker

    async def main() -> list[tuple[str, str]]:
        defaults: dict[str, Any] = {"codec_up": "ternary-rc", "codec_down": "2bit", "broadcast": "delta"}
        p = make_place(folder, task, wrap=wrap, **(defaults | policy))
        await play(p.market, 3)
        found = [receipts(p.store, round) for round in range(3)]
        assert {of[HONEST].verdict for of in found} == {"ACCEPTED"}
        await p.market.close()
        return [(of[LIAR].verdict, of[LIAR].reason) for of in found]

    return run(main())


@pytest.mark.parametrize("version", ["0" * 64, "f" * 64, None])
def test_what_a_miner_says_of_its_version_moves_nothing(tmp_path: Path, task: GPT2, version: str | None) -> None:
    """It gets what it asks for, whatever it says that it has."""
    assert {verdict for verdict, _ in lied(tmp_path, task, says={"version": version})} == {"ACCEPTED"}


def test_a_reply_on_another_version_is_stale(tmp_path: Path, task: GPT2) -> None:
    for verdict, reason in lied(tmp_path, task, replies={"version": "f" * 64}):
        assert verdict == Fault.STALE
        assert reason.startswith("computed on version ffffffffffff, not ")


def test_a_reply_in_another_codec_is_malformed(tmp_path: Path, task: GPT2) -> None:
    for verdict, reason in lied(tmp_path, task, replies={"codec": "2bit"}):
        assert (verdict, reason) == (Fault.MALFORMED, "encoded as 2bit, not ternary-rc")


def test_residuals_that_are_made_up_buy_nothing(tmp_path: Path, task: GPT2) -> None:
    made_up = {"residual_before": "1" * 64, "residual_after": "2" * 64}
    assert {verdict for verdict, _ in lied(tmp_path, task, replies=made_up, feedback=0.9)} == {"ACCEPTED"}


@pytest.mark.parametrize("codecs", [(), ("junk",), ("fp64", "x" * 64), tuple(f"c{i}" for i in range(1000))])
def test_who_names_no_codec_of_ours_is_ordered_the_runs(tmp_path: Path, task: GPT2, codecs: tuple[str, ...]) -> None:
    """It knows them after all, here; one that does not refuses, as below."""
    assert {verdict for verdict, _ in lied(tmp_path, task, says={"codecs": codecs})} == {"ACCEPTED"}


def test_who_names_codecs_that_it_does_not_know_refuses_and_the_round_goes_on(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        p = make_place(
            tmp_path,
            task,
            wrap=lambda worker: Lying(worker, {"codecs": known_codecs()}, {}),  # type: ignore[arg-type,return-value]
            codec_up="ternary-rc",
            codec_down="2bit",
            broadcast="delta",
        )
        p.workers[LIAR].codecs = ("fp32",)
        await play(p.market, 2)
        for round in range(2):
            found = receipts(p.store, round)
            assert found[HONEST].verdict == "ACCEPTED"
            assert found[LIAR].verdict == Fault.REFUSED
            assert found[LIAR].reason == "refused with 400: codec ternary-rc: this miner knows fp32"
        await p.market.close()

    run(main())


# --- orders -----------------------------------------------------------------------------------------------------------

UNKNOWN = (
    "nonesuch",
    "TERNARY",
    "ternary",
    "ternary-rc+entropy",
    "topk64-4bit",
    "fp32+entropy",
    "topk",
    "topk0",
    "topk65",
    "topk-64",
    "topk64-3bit",
    "topk" + "9" * 60,
    "pilot.codec.dense",
    "x" * 64,
)


@pytest.fixture
def ordered(tmp_path: Path, task: GPT2) -> Callable[[Callable[[Place, Order], None]], None]:
    """Runs a check on a place with one round behind it, and an order of that round."""

    def runs(check: Callable[[Place, Order], None]) -> None:
        async def main() -> None:
            p = make_place(tmp_path, task, codec_up="ternary-rc", codec_down="2bit", broadcast="delta")
            await play(p.market, 2)
            orders = [Order.parse(s.body) for s in p.store.orders(1)]
            check(p, next(order for order in orders if order.hotkey == HONEST))
            await p.market.close()

        run(main())

    return runs


def refusal(worker: Worker, order: Order) -> Refused:
    with pytest.raises(Refused) as caught:
        worker.accept_order(CALLER, order, digest(order.kind, order.text().encode()))
    return caught.value


def test_an_order_in_an_unknown_codec_is_refused_with_those_that_are_known(ordered: Any) -> None:
    def check(p: Place, order: Order) -> None:
        began = time.process_time()
        for field in ("codec_up", "codec_down"):
            for name in UNKNOWN:
                refused = refusal(p.workers[HONEST], order.model_copy(update={field: name}))
                assert (refused.status, refused.fault) == (400, Fault.MALFORMED)
                assert refused.reason.startswith(f"codec {name}: this miner knows fp32, bf16, int8, ")
                assert len(refused.reason) <= 1000  # as a refusal may say
        assert time.process_time() - began < 5  # thirty names
        assert p.workers[HONEST].status().state == "done"

    ordered(check)


def test_a_step_in_an_unknown_codec_leads_nowhere(ordered: Any) -> None:
    """For who must take it; who has its version already has no need to."""

    def check(p: Place, order: Order) -> None:
        worker, last = p.workers[HONEST], order.update.steps[-1]
        assert worker.replica.version == order.version
        for name in UNKNOWN:
            step = VersionStep(kind="delta", codec=name, digest="e" * 64, bytes=last.bytes)
            update = Update(base=order.update.base, steps=(*order.update.steps, step))
            refused = refusal(worker, order.model_copy(update={"update": update, "version": update.version}))
            assert (refused.status, refused.fault) == (400, Fault.MALFORMED)
            assert refused.reason == f"no way to its version: cannot read a delta as {name}"
        assert worker.replica.version == order.version

    ordered(check)
