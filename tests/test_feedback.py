"""Error feedback: nothing of a gradient is lost that was not applied, and nothing is applied twice.

Real codecs, real files, real receipts' verdicts; a restart is a second `ErrorFeedback` over the same folder.
"""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from bittensor.sp_core import Keypair
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import Buffer

from pilot.codec import load_codec
from pilot.simulation.virtual_time import run
from pilot.storage.miner_store import FileMinerStore
from pilot.training.executor import TimedExecutor
from pilot.training.gradient import GradientResult
from pilot.transport.auth import sign_message
from pilot.worker.error_feedback import MAX_PLAIN, ErrorFeedback, residual_digest
from pilot.worker.job import Job
from protocol import (
    BlobRef,
    DataSpec,
    Digest,
    Fault,
    InnerSteps,
    Order,
    Range,
    Receipt,
    Reply,
    TaskSpec,
    Update,
    VersionStep,
    digest,
)

if TYPE_CHECKING:
    from pilot.codec import Tensors

torch.set_num_threads(1)
VALIDATOR, MALLORY = Keypair.create_from_uri("//Validator"), Keypair.create_from_uri("//Mallory")
HOTKEY, CALLER = Keypair.create_from_uri("//Miner").ss58_address, VALIDATOR.ss58_address
UPDATE = Update(base=None, steps=(VersionStep(kind="state", codec="fp32", digest="5" * 64, bytes=1),))
ORDER = Order(
    run="test",
    round=0,
    hotkey=HOTKEY,
    version=UPDATE.version,
    update=UPDATE,
    state_digest=None,
    task=TaskSpec(name="echo", parameters={}),
    data=DataSpec(blobs={"tokens": BlobRef(kind="data", digest="d" * 64, bytes=1)}),
    ranges=(Range(0, 4),),
    deadline_s=20.0,
    staleness=0,
    codec_up="fp32",
    codec_down="fp32",
)
SHAPES = {"b": (7,), "scale": (), "w": (5, 130)}


def gradient(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def zeros() -> Tensors:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def added(*policy: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: sum((t[name].double() for t in policy), torch.zeros(SHAPES[name]).double()) for name in SHAPES}


class Done:
    """A computation that has come to its end."""

    def __init__(self, order: Order, gradient: Tensors) -> None:
        self.order, self.gradient = order, gradient

    def result(self) -> GradientResult:
        return GradientResult(self.order.ranges, self.gradient, 4, 1.0)


class Miner:
    """What a miner does with its gradients, round by round."""

    def __init__(self, folder: Path, codec: str = "ternary-rc", decay: float = 1.0) -> None:
        self.folder, self.codec, self.decay = folder, codec, decay
        self.said: list[str] = []
        self.restart()

    def restart(self) -> None:
        self.cache = FileMinerStore(self.folder)
        self.feedback = ErrorFeedback(self.cache.residuals, self.cache.receipts, self.said.append)

    def order(self, round: int, **changes: Any) -> Order:
        fields = {"round": round, "codec_up": self.codec, "feedback": self.decay}
        return ORDER.model_copy(update=fields | changes)

    def encode(self, order: Order, gradient: Tensors, caller: str = CALLER) -> Reply:
        """As the worker does it, but for the waiting."""
        job = Job(order, digest(order.kind, order.text().encode()), caller, 0.0)
        self.feedback.load(order, job.digest, caller, gradient)
        job.encode(load_codec(order.codec_up), Done(order, gradient), 1.0, self.feedback)  # type: ignore[arg-type]
        assert job.reply is not None
        assert job.payload is not None
        self.payload: Buffer = job.payload
        return job.reply

    def hear(self, reply: Reply, verdict: Any = "ACCEPTED", caller: Any = VALIDATOR) -> None:
        """As the worker takes it: kept, then heard."""
        receipt = make_verdict(reply, verdict)
        self.cache.add_receipt(sign_message(caller, receipt))
        self.feedback.record_receipt(caller.ss58_address, receipt)


class Textbook:
    """The rule as it is written, with a dense copy of everything."""

    def __init__(self, codec: str = "ternary-rc", decay: float = 1.0) -> None:
        self.codec, self.decay, self.e = load_codec(codec), decay, zeros()

    def encode(self, gradient: Tensors) -> bytearray:
        self.u = {name: g + self.decay * self.e[name] for name, g in gradient.items()}
        payload = bytearray(self.codec.encode(self.u))
        self.decoded = self.codec.decode(payload, {name: torch.Size(shape) for name, shape in SHAPES.items()})
        return payload

    def settle(self, accepted: bool) -> None:
        self.e = {name: u - self.decoded[name] if accepted else u for name, u in self.u.items()}


def make_verdict(reply: Reply, verdict: Any = "ACCEPTED") -> Receipt:
    good = verdict == "ACCEPTED"
    return Receipt(
        run=reply.run,
        round=reply.round,
        hotkey=reply.hotkey,
        order=reply.order,
        verdict=verdict,
        reason="because",
        done=reply.done if good else (),
        work=4 if good else 0,
        scores={},
        weight=0.5,
    )


CODECS = ("ternary-rc", "2bit", "1bit", "int8", "topk64", "bf16")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_payloads_and_residuals_are_the_textbooks_bit_for_bit(tmp_path: Path, codec: str, decay: float) -> None:
    """Whatever becomes of each round."""
    miner, textbook = Miner(tmp_path, codec, decay), Textbook(codec, decay)
    for round, verdict in enumerate(["ACCEPTED", "ACCEPTED", Fault.LATE, "ACCEPTED", Fault.OUTLIER, "ACCEPTED"]):
        before = residual_digest(textbook.e)
        payload = textbook.encode(gradient(round))
        reply = miner.encode(miner.order(round), gradient(round))
        assert bytes(miner.payload) == payload
        assert reply.payload_digest == digest("payload", payload)
        assert reply.residual_before == before
        assert reply.residual_after == residual_digest(
            {name: u - textbook.decoded[name] for name, u in textbook.u.items()}
        )
        miner.hear(reply, verdict)
        textbook.settle(verdict == "ACCEPTED")
    assert not miner.said


@settings(derandomize=True, max_examples=10, deadline=None, database=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_what_was_applied_and_what_is_left_are_all_the_gradients(
    tmp_path_factory: pytest.TempPathFactory, accepted: list[bool]
) -> None:
    """With no decay: to the rounding of fp32."""
    miner, textbook, applied = Miner(tmp_path_factory.mktemp("miner")), Textbook(), []
    for round, good in enumerate(accepted):
        textbook.encode(gradient(round))
        reply = miner.encode(miner.order(round), gradient(round))
        assert reply.residual_before is not None
        specs = {name: torch.Size(shape) for name, shape in SHAPES.items()}
        applied += [textbook.codec.decode(miner.payload, specs)] if good else []
        miner.hear(reply, "ACCEPTED" if good else Fault.LATE)
        textbook.settle(good)
    last = miner.encode(miner.order(len(accepted)), zeros())
    assert last.residual_before == residual_digest(textbook.e)  # so that is what is left
    whole, found = added(*map(gradient, range(len(accepted)))), added(*applied, textbook.e)
    for name in SHAPES:
        torch.testing.assert_close(found[name], whole[name], rtol=0, atol=1e-5 * len(accepted))


@pytest.mark.parametrize("heard", ["before", "after", "both"])
@pytest.mark.parametrize("killed", range(4))
def test_a_miner_that_was_killed_goes_on_bit_for_bit(tmp_path: Path, killed: int, heard: str) -> None:
    """The verdict came before the kill, is told after it, or is told again."""
    miner, textbook = Miner(tmp_path, decay=0.95), Textbook(decay=0.95)
    for round, verdict in enumerate(["ACCEPTED", Fault.LATE, "ACCEPTED", "ACCEPTED", "ACCEPTED"]):
        reply = miner.encode(miner.order(round), gradient(round))
        assert bytes(miner.payload) == textbook.encode(gradient(round))
        if round != killed or heard != "after":
            miner.hear(reply, verdict)
        if round == killed:
            miner.restart()
            if heard != "before":
                miner.hear(reply, verdict)
        textbook.settle(verdict == "ACCEPTED")
    assert not miner.said
    assert len((tmp_path / "receipts.jsonl").read_text().splitlines()) == 5  # one told twice is kept once


def test_the_same_order_again_has_the_same_reply(tmp_path: Path) -> None:
    """Killed with the reply on its way: nobody knows whether it came, and its gradient is in the sum already."""
    miner, textbook = Miner(tmp_path), Textbook()
    textbook.encode(gradient(0))
    textbook.settle(True)
    miner.hear(miner.encode(miner.order(0), gradient(0)))
    payload, order = textbook.encode(gradient(1)), miner.order(1)
    reply = miner.encode(order, gradient(1))
    miner.restart()
    partial = gradient(77)  # less work got done the second time
    assert miner.encode(order, partial) == reply
    assert bytes(miner.payload) == payload
    miner.hear(reply)
    textbook.settle(True)
    assert miner.encode(miner.order(2), gradient(2)).residual_before == residual_digest(textbook.e)


def test_without_the_verdict_an_encoding_is_plain_and_the_residual_waits(tmp_path: Path) -> None:
    miner, textbook = Miner(tmp_path), Textbook()
    payload = textbook.encode(gradient(0))
    reply = miner.encode(miner.order(0), gradient(0))
    assert bytes(miner.payload) == payload
    file = (tmp_path / "residual.safetensors").read_bytes()
    for round in (1, 2):
        plain = miner.encode(miner.order(round), gradient(round))
        assert (plain.residual_before, plain.residual_after) == (None, None)
        assert bytes(miner.payload) == bytes(textbook.codec.encode(gradient(round)))
        miner.hear(plain)  # it says nothing of the residual
        assert (tmp_path / "residual.safetensors").read_bytes() == file
    miner.hear(reply)
    textbook.settle(True)
    assert miner.encode(miner.order(3), gradient(3)).residual_before == residual_digest(textbook.e)
    assert not miner.said


def test_a_receipt_that_never_comes_is_given_up(tmp_path: Path) -> None:
    miner = Miner(tmp_path)
    miner.encode(miner.order(0), gradient(0))
    for round in range(1, MAX_PLAIN + 1):
        assert miner.encode(miner.order(round), gradient(round)).residual_before is None
    reply = miner.encode(miner.order(MAX_PLAIN + 1), gradient(9))
    assert reply.residual_before == residual_digest(zeros())
    assert miner.said == ["error feedback starts over: no receipt for round 0 came"]


def test_an_order_in_the_place_of_another_means_that_this_was_not_applied(tmp_path: Path) -> None:
    """A validator that was restarted orders an open round anew; the first order gets no receipt any more."""
    miner, textbook = Miner(tmp_path), Textbook()
    textbook.encode(gradient(0))
    miner.encode(miner.order(3), gradient(0))
    textbook.settle(False)
    reply = miner.encode(miner.order(3, deadline_s=21.0), gradient(1))
    assert reply.residual_before == residual_digest(textbook.e)


def test_a_pseudo_gradient_that_was_carried_has_the_receipt_of_another_round(tmp_path: Path) -> None:
    miner, textbook = Miner(tmp_path), Textbook()
    textbook.encode(gradient(0))
    carried = miner.encode(miner.order(0), gradient(0))
    assert miner.encode(miner.order(1), gradient(1)).residual_before is None  # waits behind the other
    miner.hear(carried.model_copy(update={"round": 1}))
    textbook.settle(True)
    assert miner.encode(miner.order(2), gradient(2)).residual_before == residual_digest(textbook.e)


def test_of_two_verdicts_the_first_holds(tmp_path: Path) -> None:
    for first, second in (("ACCEPTED", Fault.LATE), (Fault.LATE, "ACCEPTED")):
        miner, textbook = Miner(tmp_path / first), Textbook()
        textbook.encode(gradient(0))
        reply = miner.encode(miner.order(0), gradient(0))
        miner.hear(reply, first)
        miner.hear(reply, second)
        miner.restart()
        textbook.settle(first == "ACCEPTED")
        assert miner.encode(miner.order(1), gradient(1)).residual_before == residual_digest(textbook.e)


def test_a_gradient_that_is_not_finite_leaves_the_residual_alone(tmp_path: Path) -> None:
    miner, textbook = Miner(tmp_path, codec="bf16"), Textbook(codec="bf16")
    textbook.encode(gradient(0))
    textbook.settle(True)
    miner.hear(miner.encode(miner.order(0), gradient(0)))
    broken = gradient(1)
    broken["w"][3, 100] = math.nan
    reply = miner.encode(miner.order(1), broken)
    assert reply.residual_before is None
    miner.hear(reply, Fault.NONFINITE)
    assert miner.encode(miner.order(2), gradient(2)).residual_before == residual_digest(textbook.e)


CHANGES: Sequence[tuple[str, dict[str, Any]]] = (
    ("mode", {"inner_steps": InnerSteps(batches=1, first_step=0, steps=10, keep=False, optimizer={})}),
    ("codec", {"codec_up": "2bit"}),
    ("decay", {"feedback": 0.5}),
    ("run", {"run": "another"}),
    ("task", {"task": ORDER.task.model_copy(update={"parameters": {"n": 2}})}),
)


@pytest.mark.parametrize(("what", "change"), CHANGES, ids=[what for what, _ in CHANGES])
@pytest.mark.parametrize("restart", [False, True])
def test_a_residual_does_not_leak_into_what_it_is_not_of(
    tmp_path: Path, what: str, change: dict[str, Any], restart: bool
) -> None:
    miner = Miner(tmp_path)
    miner.hear(miner.encode(miner.order(0), gradient(0)))
    if restart:
        miner.restart()
    reply = miner.encode(miner.order(1, **change), gradient(1))
    assert reply.residual_before == residual_digest(zeros())
    assert miner.said == [f"error feedback starts over: the residual is of another {what}"]


def test_another_validator_and_a_run_that_begins_anew_get_nothing_of_it(tmp_path: Path) -> None:
    for begin, caller in ((7, MALLORY.ss58_address), (0, CALLER)):
        miner = Miner(tmp_path / caller)
        miner.hear(miner.encode(miner.order(6), gradient(0)))
        reply = miner.encode(miner.order(begin), gradient(1), caller)
        assert reply.residual_before == residual_digest(zeros())
        assert len(miner.said) == 1


def test_without_error_feedback_an_order_leaves_it_alone(tmp_path: Path) -> None:
    """Its payload is plain, and no memory is held; the residual is there again for the next that asks."""
    miner, textbook = Miner(tmp_path, decay=0.9), Textbook(decay=0.9)
    textbook.encode(gradient(0))
    textbook.settle(True)
    miner.hear(miner.encode(miner.order(0), gradient(0)))
    order = miner.order(1, feedback=0.0)
    job = Job(order, "1" * 64, CALLER, 0.0)
    asyncio.run(miner.feedback.wait_for_verdict(job, gradient(1), TimedExecutor(None, lambda: 0.0), 0.0))
    job.encode(load_codec("ternary-rc"), Done(order, gradient(1)), 1.0, miner.feedback)  # type: ignore[arg-type]
    assert job.reply is not None
    assert job.reply.residual_before is None
    assert miner.encode(miner.order(2), gradient(2)).residual_before == residual_digest(textbook.e)


# --- waiting ----------------------------------------------------------------------------------------------------------


def waited(
    tmp_path: Path, says: float | None = None, stops: float | None = None, **changes: Any
) -> tuple[float, Digest | None]:
    """Virtual seconds until the second gradient is encoded, and its residual; the first verdict is heard at `says`."""

    async def main() -> tuple[float, Digest | None]:
        miner, loop = Miner(tmp_path), asyncio.get_running_loop()
        first = miner.encode(miner.order(0), gradient(0))
        order = miner.order(1, **changes)
        job = Job(order, "1" * 64, CALLER, loop.time())
        if says is not None:
            loop.call_later(says, miner.hear, first)
        if stops is not None:
            loop.call_later(stops, job.stopping.set)
        await miner.feedback.wait_for_verdict(job, gradient(1), TimedExecutor(None, loop.time), handover_s=0.5)
        job.encode(load_codec("ternary-rc"), Done(order, gradient(1)), 1.0, miner.feedback)  # type: ignore[arg-type]
        assert job.reply is not None
        return loop.time(), job.reply.residual_before

    return run(main())


def test_encoding_waits_for_the_verdict_of_the_last_order(tmp_path: Path) -> None:
    seconds, before = waited(tmp_path, says=3.0, deadline_s=100.0)
    assert 2.9 <= seconds < 3.2
    assert before is not None


@pytest.mark.parametrize(
    ("changes", "least", "most"),
    [
        ({"deadline_s": 100.0}, 9.4, 9.5),  # a tenth of 95 s less what handing over takes
        ({"deadline_s": 8.0}, 1.0, 1.1),  # a second at least
        ({"deadline_s": 100.0, "budget_s": 4.0}, 3.5, 3.6),  # within the budget, with time to hand it over
        ({"deadline_s": 100.0, "budget_s": 4.0, "staleness": 1}, 4.0, 4.1),  # the reply travels meanwhile
        ({"deadline_s": 0.4}, 0.0, 0.1),
    ],
)
def test_it_waits_no_longer_than_there_is_time(
    tmp_path: Path, changes: dict[str, Any], least: float, most: float
) -> None:
    seconds, before = waited(tmp_path, **changes)
    assert least <= seconds <= most
    assert before is None


def test_who_is_told_to_stop_waits_no_longer(tmp_path: Path) -> None:
    seconds, before = waited(tmp_path, stops=2.0, deadline_s=1000.0)
    assert 1.9 <= seconds < 2.2
    assert before is None


# --- cost -------------------------------------------------------------------------------------------------------------


def test_it_takes_one_copy_of_the_model_and_a_file(tmp_path: Path) -> None:
    """Beside the gradient, which is used up: the peak of the process's memory, in one of its own."""
    script = """
import resource, sys, torch
from pathlib import Path
from tests.test_feedback import *

import tests.test_feedback as here
here.SHAPES = {f"w{i}": (1 << 20,) for i in range(8)}  # 32 MB
miner = Miner(Path(sys.argv[1]), codec="1bit")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
first = gradient(0)
load_codec("1bit").encode(first)  # whatever encoding takes by itself
baseline = peak()
reply = miner.encode(miner.order(0), first)
for round in (1, 2, 3):
    miner.hear(reply)
    reply = miner.encode(miner.order(round), first)
print(peak() - baseline)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", "."])}

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 32 + 16, done.stdout
