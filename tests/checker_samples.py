"""A correct run of four rounds as a draft to break in one place, and a writer that stores it like a validator."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bittensor.sp_core import Keypair

from pilot.interfaces import ReceivedReply, RoundRecord
from pilot.ranking import Evidence
from pilot.ranking.accepted_work import AcceptedWork
from pilot.storage.miner_store import FileMinerStore
from pilot.storage.run_store import RunStore
from pilot.transport.auth import sign_message
from protocol import (
    BlobRef,
    DataSpec,
    Fault,
    InnerSteps,
    Message,
    Order,
    Range,
    Receipt,
    Reply,
    Signed,
    TaskSpec,
    Version,
    digest,
    next_version,
)
from tests.updates import whole_state

KEYS = {name: Keypair.create_from_uri(f"//{name}") for name in ("Validator", "A", "B", "Mallory")}
VALIDATOR, A, B, MALLORY = (keypair.ss58_address for keypair in KEYS.values())
A, B = sorted([A, B])
BY_HOTKEY = {keypair.ss58_address: keypair for keypair in KEYS.values()}
UNITS = 10  # in a micro-batch
Place = tuple[int, str]


def span(*ends: int) -> tuple[Range, ...]:
    return tuple(Range(*pair) for pair in zip(ends[::2], ends[1::2], strict=True))


STATES = [digest("state", b"%d" % version) for version in range(5)]
V0 = next_version(None, STATES[0])
V1 = next_version(V0, STATES[1])
V2 = next_version(V1, STATES[2])
V3 = next_version(V2, STATES[3])
V4 = next_version(V3, STATES[4])


def order(round: int, hotkey: str, ranges: tuple[Range, ...], version: Version, base: Version | None) -> Order:
    [state] = [state for state in STATES if next_version(base, state) == version]
    return Order(
        run="run",
        round=round,
        hotkey=hotkey,
        version=version,
        update=whole_state(BlobRef(kind="state", digest=state, bytes=100), base),
        state_digest=None,
        task=TaskSpec(name="gpt2", parameters={}),
        data=DataSpec(blobs={"tokens": BlobRef(kind="data", digest=V0, bytes=7)}),
        ranges=ranges,
        deadline_s=10.0,
        staleness=0,
        codec_up="fp32",
        codec_down="fp32",
    )


@dataclass
class Draft:
    """A run before it is signed and written. What was done of an order that was accepted; faults of the others."""

    orders: dict[Place, Order]
    done: dict[Place, tuple[Range, ...]]
    faults: dict[Place, Fault]
    replies: dict[Place, tuple[Range, ...]]  # in the spool
    late: dict[Place, tuple[Range, ...]]
    cursors: list[tuple[int, tuple[Range, ...]]]
    versions: list[Version]
    snapshots: dict[int, Version]
    coverage: str = "once"
    settled: dict[Place, int] = field(default_factory=dict)  # by the next round, or one that never came
    receipts: dict[Place, dict[str, object]] = field(default_factory=dict)  # what they say otherwise
    keys: dict[tuple[str, int, str], str] = field(default_factory=dict)  # who signed otherwise: kind, round, hotkey
    held: list[Receipt] = field(default_factory=list)  # by B besides


def draft() -> Draft:
    """Four rounds and an open one: B's work partly done, then late, then nobody's; an epoch is four micro-batches."""
    return Draft(
        orders={
            (0, A): order(0, A, span(0, 2), V0, None),
            (0, B): order(0, B, span(2, 4), V0, None),
            (1, A): order(1, A, span(3, 4), V1, V0),
            (2, A): order(2, A, span(4, 6), V2, V1),
            (2, B): order(2, B, span(6, 8), V2, V1),
            (3, A): order(3, A, span(6, 7), V3, V2),
            (4, A): order(4, A, span(6, 8), V3, V2),
        },
        done={(0, A): span(0, 2), (0, B): span(2, 3), (1, A): span(3, 4), (2, A): span(4, 6)},
        faults={(2, B): Fault.LATE, (3, A): Fault.SILENT},
        replies={(0, A): span(0, 2), (0, B): span(2, 3), (1, A): span(3, 4), (2, A): span(4, 6)},
        late={(2, B): span(6, 7)},
        cursors=[(4, span(3, 4)), (4, ()), (8, span(6, 8)), (8, span(6, 8))],
        versions=[V1, V2, V3, V3],
        snapshots={1: V1, 3: V3},
    )


INNER = InnerSteps(batches=1, first_step=0, steps=5, keep=False, optimizer={})


def carried() -> Draft:
    """Four rounds of inner steps and an open one: B's work comes a round late, then not at all, then may still come."""

    def inner(round: int, hotkey: str, ranges: tuple[Range, ...], version: Version, base: Version | None) -> Order:
        return order(round, hotkey, ranges, version, base).model_copy(update={"inner_steps": INNER})

    return Draft(
        orders={
            (0, A): inner(0, A, span(0, 2), V0, None),
            (0, B): inner(0, B, span(2, 4), V0, None),
            (1, A): inner(1, A, span(4, 6), V1, V0),
            (2, A): inner(2, A, span(6, 8), V2, V1),
            (2, B): inner(2, B, span(8, 10), V2, V1),
            (3, A): inner(3, A, span(10, 12), V3, V2),
            (3, B): inner(3, B, span(12, 14), V3, V2),
            (4, A): inner(4, A, span(8, 10), V4, V3),
        },
        settled={(0, B): 1, (2, B): 3, (3, B): 4},
        done={(0, A): span(0, 2), (0, B): span(2, 4), (1, A): span(4, 6), (2, A): span(6, 8), (3, A): span(10, 12)},
        faults={(2, B): Fault.LATE},
        replies={(0, A): span(0, 2), (0, B): span(2, 4), (1, A): span(4, 6), (2, A): span(6, 8), (3, A): span(10, 12)},
        late={},
        cursors=[(4, span(2, 4)), (6, ()), (10, span(8, 10)), (14, span(8, 10, 12, 14))],
        versions=[V1, V2, V3, V4],
        snapshots={1: V1, 3: V3},
        coverage="stream",
    )


class Writer:
    """Signs a draft and writes it, with the store that a validator has and the caches that miners have."""

    def __init__(self, place: Path, run: Draft) -> None:
        self.run, self.folder = run, place / "runs" / "run"
        self.caches = {hotkey: FileMinerStore(place / hotkey) for hotkey in (A, B)}
        self.miners = [place / hotkey for hotkey in (A, B)]
        self.ranker = AcceptedWork()
        self.orders = {where: self.seal(order, VALIDATOR) for where, order in run.orders.items()}
        with closing(RunStore.create(self.folder, {"coverage": json.dumps(run.coverage)}, keep=2)) as store:
            for round in range(len(run.versions)):
                self.write_round(store, round)
            store.open_round(4, [signed for where, signed in self.orders.items() if where[0] == 4])
        for receipt in run.held:
            self.caches[B].add_receipt(self.seal(receipt, VALIDATOR))

    def seal(self, message: Message, by: str) -> Signed:
        said = message.model_dump()
        by = self.run.keys.get((message.kind, said["round"], said["hotkey"]), by)
        return sign_message(BY_HOTKEY[by], message)

    def write_round(self, store: RunStore, round: int) -> None:
        run = self.run
        if round in run.snapshots:
            store.save_snapshot(round, {"version": run.snapshots[round]}, {"w": torch.zeros(2)})
        hotkeys = [hotkey for at, hotkey in run.orders if at == round]
        store.open_round(round, [self.orders[round, hotkey] for hotkey in hotkeys])
        for hotkey in hotkeys:
            if (round, hotkey) in run.replies:
                payload = f"{round} {hotkey}".encode()
                reply = self.reply((round, hotkey), run.replies[round, hotkey], payload)
                store.payload_path(round, hotkey).write_bytes(payload)
                store.make_durable(
                    ReceivedReply(reply=reply, signed=self.seal(reply, hotkey), bytes_up=1, bytes_down=1)
                )
        settled = [place for place in run.orders if run.settled.get(place, place[0]) == round]
        given = [Evidence(p[1], run.faults.get(p), self.work(p), self.work(p)) for p in settled]
        scores, weights = self.ranker.update(given), self.ranker.weights()
        receipts = [self.receipt(p, dict(scores[p[1]]), weights.get(p[1], 0.0)) for p in settled]
        signed = [self.seal(receipt, VALIDATOR) for receipt in receipts]
        store.commit(
            RoundRecord(
                round=round,
                version=run.versions[round],
                settings={},
                codec_up="fp32",
                codec_down="fp32",
                cursor=json.dumps({"next": run.cursors[round][0], "returned": run.cursors[round][1]}),
                receipts=tuple(signed),
                weights=weights,
                ranker=json.dumps(self.ranker.state_dict()),
                metrics={"round": round, "epoch_total": 4},
            )
        )
        for (_, hotkey), envelope in zip(settled, signed, strict=True):
            self.caches[hotkey].add_receipt(envelope)
        for (at, hotkey), done in run.late.items():
            if at == round:
                reply = self.reply((at, hotkey), done, b"never fetched")
                receipt = self.receipt((at, hotkey), {}, 0.0).model_copy(update={"seconds": 12.0})
                store.note_late(round, self.seal(reply, hotkey), self.seal(receipt, VALIDATOR))

    def reply(self, place: Place, done: tuple[Range, ...], payload: bytes) -> Reply:
        return Reply(
            run="run",
            round=place[0],
            hotkey=place[1],
            order=self.orders[place].digest,
            version=self.run.orders[place].version,
            done=done,
            loss=1.5,
            seconds=0.25,
            codec="fp32",
            payload_digest=digest("payload", payload),
            payload_bytes=len(payload),
            residual_before=None,
            residual_after=None,
        )

    def work(self, place: Place) -> int:
        return UNITS * sum(stop - start for start, stop in self.run.done.get(place, ()))

    def receipt(self, place: Place, scores: dict[str, float], weight: float) -> Receipt:
        fault = self.run.faults.get(place)
        receipt = Receipt(
            run="run",
            round=self.run.settled.get(place, place[0]),
            hotkey=place[1],
            order=self.orders[place].digest,
            verdict=fault or "ACCEPTED",
            reason="so it was",
            done=self.run.done.get(place, ()),
            work=self.work(place),
            scores=scores,
            weight=weight,
            seconds=0.0 if fault else 1.0,
        )
        return receipt.model_copy(update=self.run.receipts.get(place, {}))
