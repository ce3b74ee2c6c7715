"""A miner and its orders, request by request: what it takes, repeats, replaces, stops and refuses.

Real workers, files and gradients. Under the virtual loop a job begins when the test next awaits, so what comes before
that comes while the order is accepted and not yet begun; where work must be cut off in its middle, the loop is real.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pilot.codec import known_codecs, load_codec
from pilot.interfaces import BlobWriter, Refused
from pilot.simulation.virtual_time import run
from pilot.storage.blob_store import FolderSource
from pilot.training.gradient import compute
from pilot.training.learner import Learner
from pilot.transport.auth import sign_message
from protocol import (
    BlobKind,
    BlobRef,
    DataSpec,
    Fault,
    Order,
    ProtocolError,
    Range,
    Receipt,
    Signed,
    TaskSpec,
    digest,
)
from tasks import TASKS
from tasks.data.tokens import Tokens
from tasks.gpt2 import GPT2
from tests.desk import CALLER, HOTKEY, MINER, Gateway, refused
from tests.tiny import CPU, MINERS, OPTIMIZER, VALIDATOR, make_worker, tiny_task

FP32 = load_codec("fp32")
OTHER_MINER, RIVAL = MINERS[1].ss58_address, MINERS[7].ss58_address
ENDLESS = (Range(0, 10**6),)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def learner(task: GPT2) -> Learner:
    return Learner(task, OPTIMIZER, CPU)


@pytest.fixture
def desk(tmp_path: Path, task: GPT2, learner: Learner) -> Callable[[], Gateway]:
    """To be called inside the loop."""

    def make() -> Gateway:
        said: list[str] = []
        worker = make_worker(tmp_path, MINER, said, asyncio.get_running_loop().time)
        return Gateway(task, learner, worker, said)

    return make


MakeDesk = Callable[[], Gateway]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


# --- an order's way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_reply_is_the_gradient_of_what_was_ordered(desk: MakeDesk, task: GPT2, learner: Learner, codec: str) -> None:
    async def main() -> None:
        d = desk()
        order = d.order((Range(0, 2), Range(5, 6)), codec_up=codec)
        sent = d.send(order)
        assert (d.worker.status().state, d.worker.status().order) == ("working", sent)
        reply = await d.reply(sent)
        work = compute(task, learner.model, order.ranges)
        assert work is not None
        payload = d.worker.read_payload(CALLER, sent)
        assert bytes(payload) == bytes(load_codec(codec).encode(work.gradient))
        assert (reply.payload_digest, reply.payload_bytes) == (digest("payload", payload), len(memoryview(payload)))
        assert (reply.order, reply.version, reply.done, reply.loss) == (sent, order.version, order.ranges, work.loss)
        assert (reply.run, reply.round, reply.hotkey, reply.codec) == ("tiny", 0, HOTKEY, codec)
        assert (reply.residual_before, reply.residual_after) == (None, None)
        status = d.worker.status()
        assert (status.state, status.batches_done, status.version) == ("done", 3, order.version)

    run(main())


def test_gradient_is_that_of_the_mean_loss(desk: MakeDesk, task: GPT2, learner: Learner) -> None:
    """Against autograd on the loss of all the micro-batches at once."""

    async def main() -> None:
        d = desk()
        order = d.order((Range(0, 2), Range(5, 6)))
        sent = d.send(order)
        reply = await d.reply(sent)
        indices = (0, 1, 5)
        losses = [task.loss(learner.model, task.batch(i)) for i in indices]
        loss = torch.stack(losses).sum() / sum(map(task.count, indices))
        expected = torch.autograd.grad(loss, list(learner.parameters.values()))
        assert reply.loss == pytest.approx(loss.item(), rel=1e-6)
        specs = {name: p.shape for name, p in learner.parameters.items()}
        decoded = FP32.decode(d.worker.read_payload(CALLER, sent), specs)
        for name, reference in zip(learner.parameters, expected, strict=True):
            torch.testing.assert_close(decoded[name], reference, rtol=1e-4, atol=1e-7)

    run(main())


def test_hello_says_what_it_can_and_holds(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        hello = d.worker.hello("0" * 32)
        assert (hello.hotkey, hello.nonce, hello.tasks) == (HOTKEY, "0" * 32, tuple(TASKS))
        assert (hello.codecs, hello.version) == (known_codecs(), None)
        assert d.worker.status().state == "idle"
        order = d.order()
        await d.reply(d.send(order))
        assert d.worker.hello("1" * 32).version == order.version

    run(main())


def test_next_order_on_the_same_version_asks_for_nothing(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        missing = refused(lambda: d.worker.accept_order(CALLER, d.order(), "0" * 64)).missing
        assert [ref.kind for ref in missing] == ["state", "data"]
        await d.reply(d.send(d.order()))
        assert (
            d.learner.update.refs[0].digest not in d.worker.replica.blobs
        )  # it is in the model now, and needs no memory of its own
        second = d.order((Range(2, 3),), round=1)
        d.worker.accept_order(CALLER, second, "1" * 64)  # accepted
        assert (await d.reply("1" * 64)).done == (Range(2, 3),)

    run(main())


def test_same_order_again_is_the_same_job(desk: MakeDesk) -> None:
    """Before, during and after: a validator that lost an answer asks again, and the work is not repeated."""

    async def main() -> None:
        d = desk()
        order = d.order((Range(0, 4),))
        sent = d.send(order)
        assert d.send(order) == sent
        first = await d.reply(sent)
        assert d.worker.accept_order(CALLER, order, sent).batches_done == 4
        assert await d.reply(sent) == first
        payload = d.worker.read_payload(CALLER, sent)
        assert d.worker.read_payload(CALLER, sent) is payload  # fetched twice
        assert d.computed() == 1

    run(main())


def test_new_order_replaces_one_that_has_not_begun(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        old, new = d.send(d.order(ENDLESS)), d.send(d.order(round=1))
        assert (await d.reply(new)).round == 1
        assert d.computed() == 1
        assert (await d.refusal(old)).fault is Fault.LATE
        assert refused(lambda: d.worker.read_payload(CALLER, old)).status == 404

    run(main())


def test_new_order_replaces_one_under_way(desk: MakeDesk) -> None:
    """On a real loop and thread: the old one ends after its micro-batch, the new one is whole."""

    async def main() -> None:
        d = desk()
        old = d.send(d.order(ENDLESS))
        waiting = asyncio.create_task(d.reply(old))
        await until(lambda: d.worker.status().batches_done > 0)
        new = d.send(d.order((Range(7, 9),), round=1))
        assert (await d.reply(new)).done == (Range(7, 9),)
        assert 0 < (await waiting).done[0].stop < 10**6  # who waited for it already gets what was done
        d.worker.close()

    asyncio.run(main())


# --- other validators -------------------------------------------------------------------------------------------------


def test_busy_for_another_validator_until_the_payload_is_fetched(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        sent = d.send(d.order())
        for stage in (lambda: d.reply(sent), lambda: asyncio.sleep(0)):  # not begun; computed, not fetched
            busy = refused(lambda: d.send(d.order(), RIVAL))
            assert (busy.status, busy.fault) == (409, Fault.BUSY)
            assert not busy.missing
            await stage()
        d.worker.read_payload(CALLER, sent)
        d.worker.mark_delivered(CALLER, sent)
        theirs = d.send(d.order(), RIVAL)
        await d.reply(theirs, RIVAL)
        assert d.computed() == 2  # the same order of another owner is another job

    run(main())


@pytest.mark.parametrize("ending", ["refused", "deadline"])
def test_not_busy_once_the_order_is_over(desk: MakeDesk, ending: str) -> None:
    async def main() -> None:
        d = desk()
        sent = d.send(d.order(deadline_s=60.0))
        if ending == "refused":
            d.stop(sent)
            await d.refusal(sent)
        else:
            await d.reply(sent)
            assert refused(lambda: d.send(d.order(), RIVAL)).fault is Fault.BUSY
            await asyncio.sleep(60.0)  # virtual
        await d.reply(d.send(d.order(), RIVAL), RIVAL)

    run(main())


def test_why_an_order_is_refused_is_said_once_until_it_changes(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        sent = d.send(d.order())  # what it lacked is no refusal to speak of
        for codec_up in ("none", "none", "nine"):
            refused(lambda codec=codec_up: d.send(d.order(codec_up=codec, round=1)))
        await d.reply(sent)
        d.send(d.order(round=2))
        refused(lambda: d.send(d.order(codec_up="nine", round=3)))
        said, codecs = [line for line in d.said if "refused" in line], ", ".join(known_codecs())
        assert said == [
            f"round {number}: order of {CALLER[:8]} refused, codec {codec}: this miner knows {codecs}"
            for number, codec in ((1, "none"), (1, "nine"), (3, "nine"))
        ]

    run(main())


def test_anothers_order_is_not_shown_stopped_or_fetched(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        sent = d.send(d.order())
        assert refused(lambda: d.stop(sent, RIVAL)).status == 404
        assert (await d.refusal(sent, RIVAL)).status == 404
        await d.reply(sent)
        assert refused(lambda: d.worker.read_payload(RIVAL, sent)).status == 404

    run(main())


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_stop_before_it_began_twice_and_after(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        order = d.order(ENDLESS)
        sent = d.send(order)
        d.stop(sent)
        d.stop(sent)
        late = await d.refusal(sent)
        assert (late.status, late.fault) == (409, Fault.LATE)
        d.stop(sent)
        assert d.worker.status().state == "done"
        assert (d.worker.status().batches_done, d.worker.status().version) == (0, None)
        assert refused(lambda: d.worker.read_payload(CALLER, sent)).status == 404
        d.worker.accept_order(CALLER, d.order(), "0" * 64)  # and it works on as ever, with the state that it was sent
        assert (await d.reply("0" * 64)).done == (Range(0, 2),)

    run(main())


def test_stop_in_the_middle_leaves_what_was_done(desk: MakeDesk, task: GPT2, learner: Learner) -> None:
    """On a real loop and thread. The partial gradient is the mean over exactly what the reply says."""

    async def main() -> None:
        d = desk()
        sent = d.send(d.order(ENDLESS))
        assert await d.worker.wait_for_reply(CALLER, sent, 0.0) is None  # still at work
        assert refused(lambda: d.worker.read_payload(CALLER, sent)).status == 404
        await until(lambda: d.worker.status().batches_done >= 2)
        d.stop(sent)
        d.stop(sent)
        reply = await d.reply(sent)
        [done] = reply.done
        assert done.start == 0
        assert 2 <= done.stop == d.worker.status().batches_done < 10**6
        work = compute(task, learner.model, reply.done)
        assert work is not None
        assert bytes(d.worker.read_payload(CALLER, sent)) == bytes(FP32.encode(work.gradient))
        d.worker.close()

    asyncio.run(main())


def test_without_a_stop_the_deadline_ends_it(desk: MakeDesk) -> None:
    """Each look at the clock costs 0.1 s of virtual time; at 20 s it has replied, with room for the way back."""

    async def main() -> None:
        d = desk()
        looks = iter(range(10**6))
        d.worker.clock = lambda: 0.1 * next(looks)
        sent = d.send(d.order(ENDLESS, deadline_s=20.0))
        reply = await d.reply(sent)
        assert 0 < reply.done[0].stop < 200
        assert d.worker.clock() <= 20.0
        assert d.worker.status().state == "done"

    run(main())


def test_no_time_for_a_single_batch_is_late(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        looks = iter(range(10**6))
        d.worker.clock = lambda: 10.0 * next(looks)
        sent = d.send(d.order(deadline_s=15.0))
        assert (await d.refusal(sent)).fault is Fault.LATE
        assert d.worker.status().batches_done == 0

    run(main())


def test_order_for_nothing_is_late_not_an_error(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        assert (await d.refusal(d.send(d.order(())))).fault is Fault.LATE
        assert not d.worker.failed.done()

    run(main())


# --- blobs ------------------------------------------------------------------------------------------------------------


def test_blobs_that_nobody_asked_for_are_refused(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        state, tokens = d.learner.update.refs[0], d.task.data_spec.blobs["tokens"]
        assert refused(lambda: d.worker.open_blob(CALLER, state, 0)).status == 409
        refused(lambda: d.worker.accept_order(CALLER, d.order(), "0" * 64))  # now it has asked
        for other in (
            state.model_copy(update={"bytes": state.bytes + 1}),
            state.model_copy(update={"kind": "data"}),
            BlobRef(kind="state", digest="0" * 64, bytes=state.bytes),
            BlobRef(kind="vocabulary", digest=tokens.digest, bytes=tokens.bytes),
        ):
            assert refused(lambda ref=other: d.worker.open_blob(CALLER, ref, 0)).status == 409
        await d.reply(d.send(d.order()))
        assert refused(lambda: d.worker.open_blob(CALLER, state, 0)).status == 409  # it has what it asked for

    run(main())


@pytest.mark.parametrize("kind", ["state", "data"])
def test_wrong_bytes_are_refused_and_the_right_ones_taken(desk: MakeDesk, kind: BlobKind) -> None:
    async def main() -> None:
        d = desk()
        order = d.order()
        missing = {ref.kind: ref for ref in refused(lambda: d.worker.accept_order(CALLER, order, "0" * 64)).missing}
        right = bytes(d.blob(missing[kind]))
        for wrong in (bytes(len(right)), right[:-1], right + b"\0", b""):
            with pytest.raises(ProtocolError):
                d.push(missing[kind], wrong)
            again = refused(lambda: d.worker.accept_order(CALLER, order, "0" * 64)).missing
            assert missing[kind] in again
        abandoned = d.worker.open_blob(CALLER, missing[kind], 0)
        abandoned.write(right[:100])
        again = refused(lambda: d.worker.open_blob(CALLER, missing[kind], 50))
        assert (again.status, again.held) == (409, {missing[kind].digest: 100})
        await d.reply(d.send(order))

    run(main())


def test_state_of_another_model_is_refused_and_the_right_one_taken(desk: MakeDesk) -> None:
    """Its digest holds, its tensors do not: no crash, and no half-loaded model that passes for a version."""

    async def main() -> None:
        d = desk()
        await d.reply(d.send(d.order()))
        state = FP32.encode({"lm_head.weight": torch.ones(3)})
        malformed = await d.refusal(d.send(d.order(state=state, round=1), state=state))
        assert (malformed.status, malformed.fault) == (409, Fault.MALFORMED)
        assert "missing" in malformed.reason
        assert d.worker.status().version is None
        right = d.order(round=2)
        assert (await d.reply(d.send(right))).version == right.version
        assert not d.worker.failed.done()

    run(main())


def test_diverged_model_is_the_orders_fault_not_a_crash(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        state = FP32.encode({n: torch.full_like(p, math.nan) for n, p in d.learner.parameters.items()})
        diverged = await d.refusal(d.send(d.order(state=state), state=state))
        assert diverged.fault is Fault.NONFINITE
        assert not d.worker.failed.done()
        await d.reply(d.send(d.order()))

    run(main())


# --- orders that are refused ------------------------------------------------------------------------------------------

BAD_ORDERS: dict[str, tuple[dict[str, Any], str]] = {
    "for another hotkey": ({"hotkey": OTHER_MINER}, "an order for"),
    "an unknown task": ({"task": TaskSpec(name="mine_bitcoin", parameters={})}, "this miner does gpt2"),
    "an unknown codec up": ({"codec_up": "zip"}, "codec zip"),
    "an unknown codec down": ({"codec_down": "zip"}, "codec zip"),
    "a version from nowhere": ({"version": "0" * 64}, "does not follow"),
}


@pytest.mark.parametrize("wrong", BAD_ORDERS)
def test_bad_order_is_refused_at_once(desk: MakeDesk, wrong: str) -> None:
    async def main() -> None:
        d = desk()
        changes, reason = BAD_ORDERS[wrong]
        bad = refused(lambda: d.worker.accept_order(CALLER, d.order(**changes), "0" * 64))
        assert (bad.status, bad.fault) == (400, Fault.MALFORMED)
        assert reason in bad.reason
        assert not bad.missing
        assert d.worker.status().state == "idle"

    run(main())


def test_version_does_not_follow_from_another_base(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        update = d.learner.update.model_copy(update={"base": "1" * 64})
        bad = refused(
            lambda: d.worker.accept_order(CALLER, d.order(update=update, version=d.learner.version), "0" * 64)
        )
        assert "does not follow" in bad.reason
        await d.reply(d.send(d.order(update=update, version=update.version)))

    run(main())


def test_bad_order_leaves_the_job_under_way_alone(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        sent = d.send(d.order())
        refused(lambda: d.worker.accept_order(CALLER, d.order(version="0" * 64), "0" * 64))
        assert (await d.reply(sent)).order == sent

    run(main())


@pytest.mark.parametrize("parameters", [{}, {"n_layer": 0}, {"n_embd": 7}, {"code": "import os"}])
def test_task_with_bad_parameters_is_refused(desk: MakeDesk, parameters: dict[str, Any]) -> None:
    async def main() -> None:
        d = desk()
        good = d.task.spec().parameters
        spec = TaskSpec(name="gpt2", parameters=good | parameters if parameters else {})
        malformed = refused(lambda: d.send(d.order(task=spec)))
        assert not malformed.missing
        assert malformed.fault is Fault.MALFORMED
        assert malformed.reason.startswith("task gpt2: ")
        await d.reply(d.send(d.order()))

    run(main())


def test_other_data_than_the_orders_is_wrong_data(tmp_path: Path, desk: MakeDesk) -> None:
    """Both ways: the miner's own search says so, or the tokens that it found have another digest."""

    async def main() -> None:
        d = desk()
        open_blob = d.worker.replica.open_blob

        def has_other_data(task: TaskSpec, data: DataSpec, name: str) -> Path:
            raise Refused(409, "--data says otherwise", Fault.WRONG_DATA)

        d.worker.replica.open_blob = has_other_data
        order = d.order()
        wrong = await d.refusal(d.send(order))
        assert (wrong.fault, wrong.reason) == (Fault.WRONG_DATA, "--data says otherwise")

        mine = Tokens.open(open_blob(order.task, order.data, "tokens"))
        raw = bytearray(mine.buffer)
        raw[-1] ^= 1
        (tmp_path / "other").write_bytes(raw)
        d.worker.replica.open_blob = lambda task, data, name: tmp_path / "other"
        assert (await d.refusal(d.send(order))).fault is Fault.WRONG_DATA

        d.worker.replica.open_blob = open_blob
        await d.reply(d.send(order))  # the same order, now that the data is right

    run(main())


# --- our own fault, and receipts --------------------------------------------------------------------------------------


FAILURES = [RuntimeError, MemoryError, RecursionError, SystemExit, OSError, ZeroDivisionError, BaseException]


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("where", ["data", "load", "compute", "encode"])
def test_whatever_an_orders_work_raises_is_a_refusal(
    desk: MakeDesk, kind: type[BaseException], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal has fixed words, the miner's log the error's own, and the next order is done."""

    async def main() -> None:
        d = desk()

        def broken(*arguments: object, **named: object) -> Any:
            raise kind("/home/alice/secret.txt")

        owner: object = {"data": d.worker.replica, "load": GPT2, "compute": GPT2, "encode": d.worker.feedback}[where]
        name = {"data": "open_blob", "load": "build_model", "compute": "loss", "encode": "encode"}[where]
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            refusal = await d.refusal(d.send(d.order()))
        assert (refusal.status, refusal.reason) == (409, "the order's work failed at this miner")
        assert refusal.fault is Fault.MALFORMED
        assert f"{kind.__name__}: /home/alice/secret.txt" in d.said[-1]
        assert not d.worker.failed.done()
        assert (await d.reply(d.send(d.order(round=1)))).round == 1

    run(main())


def test_our_own_bug_surfaces_and_hangs_nobody(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()

        async def broken(*arguments: object) -> None:
            raise RuntimeError("a bug of ours")

        d.worker.feedback.wait_for_verdict = broken  # type: ignore[method-assign]
        sent = d.send(d.order())
        with pytest.raises(RuntimeError, match="a bug of ours"):
            await d.worker.failed
        assert d.worker.status().state == "done"
        assert await d.worker.wait_for_reply(CALLER, sent, 60.0) is None

    run(main())


def test_receipts_are_kept_and_said(tmp_path: Path, desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        sent = d.send(d.order())
        await d.reply(sent)
        receipts = [
            Receipt(
                run="tiny",
                round=0,
                hotkey=hotkey,
                order=sent,
                verdict=verdict,
                reason="because",
                done=(),
                work=0,
                scores={"accepted_work": 1234.0},
                weight=0.125,
            )
            for hotkey, verdict in ((HOTKEY, Fault.SILENT), (HOTKEY, Fault.LATE), (OTHER_MINER, "ACCEPTED"))
        ]
        signed = [sign_message(VALIDATOR, receipt) for receipt in receipts]
        for receipt, envelope in zip(receipts[:2], signed[:2], strict=True):
            assert d.worker.accept_receipt(CALLER, receipt, envelope).hotkey == HOTKEY
        assert refused(lambda: d.worker.accept_receipt(CALLER, receipts[2], signed[2])).status == 400
        kept = (tmp_path / HOTKEY / "receipts.jsonl").read_text().splitlines()
        assert [Signed.parse(line) for line in kept] == signed[:2]
        assert d.said[-2:] == [
            "round 0: SILENT, because; weight 0.125, accepted_work 1234",
            "round 0: LATE, because; weight 0.125, accepted_work 1234",
        ]

    run(main())


# --- blobs from elsewhere ---------------------------------------------------------------------------------------------


class CountingSource(FolderSource):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: list[BlobRef] = []

    def fetch(self, ref: BlobRef, into: BlobWriter) -> None:
        self.asked.append(ref)
        super().fetch(ref, into)


def published(d: Gateway, folder: Path, source: str | None = "bucket", **changes: Any) -> Order:
    """Return an order whose state and data lie in `folder` by digest, under the source's name."""
    folder.mkdir(exist_ok=True)
    update, data = d.learner.update, d.task.data_spec
    for ref in (*update.refs, *data.blobs.values()):
        (folder / ref.digest).write_bytes(bytes(d.blob(ref)))
    steps = tuple(step.model_copy(update={"source": source}) for step in update.steps)
    blobs = {name: ref.model_copy(update={"source": source}) for name, ref in data.blobs.items()}
    order = d.order(update=update.model_copy(update={"steps": steps}), **changes)
    return order.model_copy(update={"data": data.model_copy(update={"blobs": blobs})})


def test_blobs_come_from_a_source_and_the_validator_is_not_asked(tmp_path: Path, desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        source = d.worker.sources["bucket"] = CountingSource(tmp_path / "bucket")
        sent = d.send(published(d, tmp_path / "bucket"))
        reply = await d.reply(sent)
        assert (reply.version, reply.done) == (d.learner.version, (Range(0, 2),))
        assert [ref.kind for ref in source.asked] == ["state", "data"]
        assert d.sent == []
        await d.reply(d.send(published(d, tmp_path / "bucket", round=1)))  # all of it is here now
        assert len(source.asked) == 2

    run(main())


@pytest.mark.parametrize("kind", ["state", "data"])
@pytest.mark.parametrize("damage", ["missing", "corrupt", "short", "long"])
def test_a_source_without_the_right_bytes_falls_back_to_the_validator(
    tmp_path: Path, desk: MakeDesk, kind: BlobKind, damage: str
) -> None:
    async def main() -> None:
        d = desk()
        source = d.worker.sources["bucket"] = CountingSource(tmp_path / "bucket")
        order = published(d, tmp_path / "bucket")
        ref = {"state": order.update.refs[0], "data": order.data.blobs["tokens"]}[kind]
        path = tmp_path / "bucket" / ref.digest
        right = path.read_bytes()
        wrong = {"corrupt": b"\0" * len(right), "short": right[:-1], "long": right + b"\0"}
        path.unlink() if damage == "missing" else path.write_bytes(wrong[damage])
        refusal = await d.refusal(d.send(order))
        assert (refusal.status, refusal.missing) == (409, (ref,))
        assert d.sent == []
        reply = await d.reply(d.send(order))
        assert reply.version == d.learner.version
        assert d.sent == [ref]
        assert [r.digest for r in source.asked].count(ref.digest) == 1  # the order came again, the source is not asked
        assert any(f"{kind} not fetched from bucket" in line for line in d.said)
        assert not d.worker.failed.done()

    run(main())


@pytest.mark.parametrize("source", ["nowhere", "..", None])
def test_an_unknown_source_falls_back_to_the_validator(tmp_path: Path, desk: MakeDesk, source: str | None) -> None:
    """The name is never a path: what is not configured is not looked for."""

    async def main() -> None:
        d = desk()
        known = d.worker.sources["bucket"] = CountingSource(tmp_path / "bucket")
        order = published(d, tmp_path / "bucket", source)
        await d.reply(d.send(order))
        assert [ref.kind for ref in d.sent] == ["state", "data"]
        assert known.asked == []

    run(main())


def test_a_source_that_hangs_ends_with_the_order(tmp_path: Path, desk: MakeDesk) -> None:
    """On a real loop and thread. The next order is served meanwhile, from the validator."""
    hanging = threading.Event()

    class Hanging(FolderSource):
        def fetch(self, ref: BlobRef, into: BlobWriter) -> None:
            hanging.wait(60)
            raise OSError("gone")

    async def main() -> None:
        d = desk()
        d.worker.sources["bucket"] = Hanging(tmp_path / "bucket")
        slow = d.send(published(d, tmp_path / "bucket", deadline_s=60.0))
        waiting = asyncio.create_task(d.refusal(slow))
        await asyncio.sleep(0.1)
        assert d.worker.status().state == "working"
        following = d.order(round=1)  # replaces it, and counted on its blobs
        assert (await d.refusal(d.send(following))).missing
        await d.reply(d.send(following))
        assert (await waiting).missing
        hanging.set()
        d.worker.close()

    asyncio.run(main())


def test_references_to_the_same_bytes_are_equal_wherever_they_lie() -> None:
    here = BlobRef(kind="delta", digest="a" * 64, bytes=7)
    there = here.model_copy(update={"source": "bucket"})
    assert here == there
    assert len({here, there}) == 1
    assert here != here.model_copy(update={"bytes": 8})
    assert "source" not in here.model_dump_json()
    assert BlobRef.model_validate_json(there.model_dump_json()).source == "bucket"
    for path in ("http://example.org/a", "../a", "/etc/passwd", ""):
        with pytest.raises(ValueError, match="source"):
            BlobRef(kind="delta", digest="a" * 64, bytes=7, source=path)
