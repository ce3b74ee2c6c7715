"""Deltas that do not apply, ways that lead nowhere, proofs that lie, miners that want a state over and over.

A miner is never left with a model that passes for a version which it is not; it asks for a whole state once, and where
that does not help either the order is refused for good. A validator sends what its own orders name, and so often.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import Buffer

from pilot.codec import load_codec
from pilot.interfaces import Faulted, Refused
from pilot.simulation.virtual_time import run
from pilot.training.learner import Learner
from protocol import BlobRef, Digest, Fault, Hotkey, Order, Reply, StateSnapshot, Update, VersionStep, digest
from tasks.gpt2 import GPT2
from tests.desk import CALLER, MINER, Gateway, refused
from tests.echo import STATE, Echo, blobs_of, dendrite, make_order, served
from tests.test_learner import gradients, tensors_of
from tests.tiny import CPU, OPTIMIZER, make_worker, tiny_task

VERSIONS = 7  # deltas on the way, with a snapshot in the middle


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


def advance(learner: Learner, versions: int, seed: int = 0) -> None:
    for gradient in gradients(learner, versions, seed):
        learner.step(gradient, {"lr": 1e-3})
        learner.advance()


@pytest.fixture
def desk(tmp_path: Path, task: GPT2) -> Callable[[], Gateway]:
    """To be called inside the loop: a chain of int8 deltas, of which four weigh as much as a state."""

    def make() -> Gateway:
        learner = Learner(task, OPTIMIZER, CPU, "delta", "int8")
        advance(learner, VERSIONS)
        said: list[str] = []
        return Gateway(task, learner, make_worker(tmp_path, MINER, said, asyncio.get_running_loop().time), said)

    return make


MakeDesk = Callable[[], Gateway]


def follows(d: Gateway, payload: Buffer, codec: str = "int8", kind: Any = "delta") -> Update:
    """The learner's way and one step more, which leads somewhere by its digest alone."""
    update = d.learner.update
    step = VersionStep(kind=kind, codec=codec, digest=digest(kind, payload), bytes=memoryview(payload).nbytes)
    d.blobs[step.digest] = payload
    return update.model_copy(update={"steps": (*update.steps, step)})


def is_at_the_newest_version(d: Gateway) -> None:
    assert d.worker.replica.version == d.learner.version
    task, model = d.worker.replica.prepare(d.order())
    assert d.learner.replica is not None
    for name, t in tensors_of(Learner(task, OPTIMIZER, CPU), model).items():
        assert torch.equal(t, d.learner.replica[name])


# --- deltas that do not apply -----------------------------------------------------------------------------------------


def other_shapes(d: Gateway) -> Buffer:
    return load_codec("int8").encode({"lm_head.weight": torch.ones(3)})


def truncated(d: Gateway) -> Buffer:
    return bytes(d.learner.blobs[d.learner.update.steps[-1].digest])[:-1]


def junk(d: Gateway) -> Buffer:
    return b"\xff" * d.learner.update.steps[-1].bytes


def not_finite(d: Gateway) -> Buffer:
    zeros = {name: torch.zeros_like(p) for name, p in d.learner.parameters.items()}
    zeros[min(zeros)].view(-1)[0] = math.nan
    return load_codec("int8").encode(zeros)


def another_codecs(d: Gateway) -> Buffer:
    return load_codec("2bit").encode({name: torch.ones_like(p) for name, p in d.learner.parameters.items()})


@pytest.mark.parametrize("bad", [other_shapes, truncated, junk, not_finite, another_codecs])
def test_a_delta_that_does_not_apply(desk: MakeDesk, bad: Callable[[Gateway], Buffer]) -> None:
    """A whole state before it does not help: refused for good, at no version; the next good order is done."""

    async def main() -> None:
        d = desk()
        await d.reply(d.send(d.order()))
        order = d.order(update=follows(d, bad(d)), round=1)
        first = await d.refusal(d.send(order))
        assert first.missing
        assert d.worker.status().version is None
        sent = len(d.sent)
        again = await d.refusal(d.send(order))
        assert {ref.kind for ref in d.sent[sent:]} == {"state", "delta"}
        assert (again.status, again.missing) == (409, ())
        assert again.fault is (Fault.NONFINITE if bad is not_finite else Fault.MALFORMED)
        assert d.worker.status().version is None
        assert "asks for a whole state" in d.said[-2] + d.said[-1]
        await d.reply(d.send(d.order(round=2)))
        is_at_the_newest_version(d)
        assert not d.worker.failed.done()

    run(main())


def test_a_bad_delta_before_a_snapshot_is_healed_by_it(desk: MakeDesk) -> None:
    """The order is done in the end, and bit for bit on its version: of the bad delta nothing is left."""

    async def main() -> None:
        d = desk()
        await d.reply(d.send(d.order()))
        payload = other_shapes(d)
        update = follows(d, payload)
        state = load_codec("fp32").encode(d.learner.replica or {})
        ref = BlobRef(kind="state", digest=digest("state", state), bytes=memoryview(state).nbytes)
        d.blobs[ref.digest] = state
        update = update.model_copy(update={"snapshots": (StateSnapshot(steps=len(update.steps), blob=ref),)})
        order = d.order(update=update, round=1)
        assert [r.kind for r in (await d.refusal(d.send(order))).missing] == ["state"]
        await d.reply(d.send(order))
        assert d.worker.status().version == update.version
        assert d.sent[-1] == ref

    run(main())


def test_a_model_that_was_damaged_heals_itself_and_says_so(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        _, model = d.worker.replica.prepare(d.order()) if await d.reply(d.send(d.order())) else (None, None)
        assert model is not None
        with torch.no_grad():
            next(model.parameters()).view(-1)[7] += 1e-6
        order = d.order(round=1, state_digest=d.learner.state_digest())
        await d.refusal(d.send(order))
        assert "is not the version" in d.said[-1]
        assert "asks for a whole state" in d.said[-1]
        await d.reply(d.send(order))
        assert d.sent[-1].kind in ("state", "delta")
        is_at_the_newest_version(d)

    run(main())


def test_a_proof_that_lies_is_refused_after_one_state(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        await d.reply(d.send(d.order()))
        order = d.order(round=1, state_digest="0" * 64)
        assert (await d.refusal(d.send(order))).missing
        sent = len(d.sent)
        for _ in range(3):  # offered again and again, it asks for nothing more than the state that it has no longer
            final = await d.refusal(d.send(order))
            assert (final.missing, final.fault) == ((), Fault.MALFORMED)
        assert sum(ref.kind == "state" for ref in d.sent[sent:]) <= 3
        await d.reply(d.send(d.order(round=2, state_digest=d.learner.state_digest())))
        is_at_the_newest_version(d)

    run(main())


# --- ways that lead nowhere -------------------------------------------------------------------------------------------


def gap(update: Update) -> Update:
    return update.model_copy(update={"steps": (*update.steps[:2], *update.steps[3:])})


def exchanged(update: Update) -> Update:
    first, second, *rest = update.steps
    return update.model_copy(update={"steps": (second, first, *rest)})


def cut_off(update: Update) -> Update:
    return update.model_copy(update={"steps": update.steps[:-1]})


def another_base(update: Update) -> Update:
    return update.model_copy(update={"base": "1" * 64})


def another_kind(update: Update) -> Update:
    steps = tuple(step.model_copy(update={"digest": digest("state", step.digest.encode())}) for step in update.steps)
    return update.model_copy(update={"steps": steps})


@pytest.mark.parametrize("change", [gap, exchanged, cut_off, another_base, another_kind])
def test_a_way_that_does_not_end_at_the_version(desk: MakeDesk, change: Callable[[Update], Update]) -> None:
    async def main() -> None:
        d = desk()
        update = d.learner.update
        order = d.order(update=change(update.model_copy(update={"snapshots": ()})), version=update.version)
        bad = refused(lambda: d.send(order))
        assert (bad.status, bad.fault, bad.missing) == (400, Fault.MALFORMED, ())
        assert "does not follow" in bad.reason
        await d.reply(d.send(d.order(round=1)))

    run(main())


def test_a_way_without_a_state_is_none_for_a_newcomer(desk: MakeDesk) -> None:
    async def main() -> None:
        d = desk()
        update = d.learner.update.model_copy(update={"snapshots": ()})
        bad = refused(lambda: d.send(d.order(update=update)))
        assert (bad.status, bad.fault, bad.missing) == (400, Fault.MALFORMED, ())
        assert "begins with no whole state" in bad.reason
        await d.reply(d.send(d.order()))
        advance(d.learner, 1, seed=1)
        update = d.learner.update.model_copy(update={"snapshots": ()})
        await d.reply(d.send(d.order(update=update, round=1)))  # who has a version on it needs none
        is_at_the_newest_version(d)

    run(main())


@pytest.mark.parametrize(("kind", "codec"), [("state", "int8"), ("state", "topk64"), ("delta", "zip")])
def test_a_step_whose_codec_does_not_fit_its_kind(desk: MakeDesk, kind: str, codec: str) -> None:
    """Nothing is asked for: what could not be read is not fetched."""

    async def main() -> None:
        d = desk()
        await d.reply(d.send(d.order()))
        sent = len(d.sent)
        bad = refused(lambda: d.send(d.order(update=follows(d, b"x" * 100, codec, kind), round=1)))
        assert (bad.status, bad.fault, bad.missing) == (400, Fault.MALFORMED, ())
        assert f"{kind} as {codec}" in bad.reason
        assert len(d.sent) == sent
        await d.reply(d.send(d.order(round=2)))

    run(main())


def test_a_state_that_calls_itself_a_delta(desk: MakeDesk) -> None:
    """Equal bytes of two kinds have two digests, so neither passes for the other."""

    async def main() -> None:
        d = desk()
        await d.reply(d.send(d.order()))
        state = load_codec("fp32").encode(d.learner.replica or {})
        as_delta = VersionStep(
            kind="delta", codec="fp32", digest=digest("state", state), bytes=memoryview(state).nbytes
        )
        update = d.learner.update
        update = update.model_copy(update={"steps": (*update.steps, as_delta)})
        d.blobs[as_delta.digest] = state
        with pytest.raises(ValueError, match="not the"):
            d.send(d.order(update=update, round=1))
        assert d.worker.status().version == d.learner.version

    run(main())


# --- a newcomer on a slow line ----------------------------------------------------------------------------------------


def bring(d: Gateway, order: Order, budget: float) -> bool:
    """So many bytes of what it lacks. True where the order is accepted."""
    try:
        d.worker.accept_order(CALLER, order, digest("order", order.text().encode()))
        return True
    except Refused as asked:
        missing, held = asked.missing, asked.held
    for ref in missing:
        offset = held.get(ref.digest, 0)
        size = ref.bytes - offset if ref.kind == "data" else min(ref.bytes - offset, int(budget))
        writer = d.worker.open_blob(CALLER, ref, offset)
        writer.write(memoryview(d.blob(ref)).cast("B")[offset : offset + size])
        budget -= size if ref.kind != "data" else 0
        if offset + size == ref.bytes:
            writer.commit()
            d.sent.append(ref)
    return budget >= 1 and bring(d, order, budget)


def test_a_state_that_takes_several_rounds_is_gone_on_with(desk: MakeDesk) -> None:
    """0.4 states a round, of which each round's delta takes 0.26: after five rounds all is there, though the snapshot
    that it began with is the older one by then; and it works in that round."""

    async def main() -> None:
        d = desk()
        while not d.learner.update.snapshots or d.learner.update.snapshots[-1].steps < len(d.learner.update.steps):
            advance(d.learner, 1)
        state = d.learner.update.snapshots[-1].blob
        rounds, order = 0, d.order()
        while not bring(d, order, 0.4 * state.bytes):
            rounds += 1
            advance(d.learner, 1, seed=rounds)
            order = d.order(round=rounds)
            assert rounds < 10
        assert rounds == 5
        assert d.learner.update.snapshots[0].blob == state != d.learner.update.snapshots[1].blob
        assert [ref for ref in d.sent if ref.kind == "state"] == [state]
        assert (await d.reply(digest("order", order.text().encode()))).version == d.learner.version
        is_at_the_newest_version(d)

    run(main())


# --- miners that lie about their version ------------------------------------------------------------------------------


class Wants(Echo):
    """Accepts its order, and then says each time that it lacks the state after all; `asks` for it before, or not."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.asks, self.answers = asks, 0

    async def wait_for_reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
        self.answers += 1
        state = self.orders[order].update.refs[0]
        if self.asks:
            self.blobs.pop(state.digest, None)
        raise Refused(409, "the model is not that version; asks for a whole state", missing=[state])


@pytest.mark.parametrize("asks", [True, False])
def test_a_miner_that_wants_its_state_again_and_again(tmp_path: Path, asks: bool) -> None:
    """Over real sockets: its order ends with a fault after a few states, whatever the deadline."""

    async def main() -> None:
        miner = Wants(asks)
        order = make_order(deadline_s=300.0)
        async with served(miner) as port, dendrite(port) as network:
            assert await network.wait_for_peer(60)
            with pytest.raises(Faulted) as caught:
                await network.exchange(order, network.sign(order), blobs_of(order), tmp_path / "payload")
            assert caught.value.fault is Fault.REFUSED
            assert "asks for a whole state" in caught.value.reason
            assert miner.answers == 3
            [link] = network.miner_states()
            assert link.bytes_down < 5 * (len(STATE) + 100_000)

    asyncio.run(main())
