"""Rounds to put into records: orders, replies and receipts in envelopes whose signatures nobody checks there."""

from __future__ import annotations

from pilot.interfaces import ReceivedReply, RoundRecord
from protocol import (
    BlobRef,
    DataSpec,
    Fault,
    Message,
    Order,
    Range,
    Receipt,
    Reply,
    Signed,
    TaskSpec,
    Update,
    VersionStep,
    digest,
)

VALIDATOR = "5" + "V" * 47
HOTKEYS = tuple("5" + letter * 47 for letter in "ABC")
VERSION = "ab" * 32


def signed(message: Message) -> Signed:
    return Signed(kind=message.kind, signer=VALIDATOR, body=message.text(), signature="0f" * 64)


def order(round: int, hotkey: str, deadline_s: float = 10.0, ranges: tuple[Range, ...] = ()) -> Signed:
    return signed(
        Order(
            run="run",
            round=round,
            hotkey=hotkey,
            version=VERSION,
            update=Update(base=None, steps=(VersionStep(kind="state", codec="fp32", digest=VERSION, bytes=100),)),
            state_digest=None,
            task=TaskSpec(name="gpt2", parameters={"depth": 2}),
            data=DataSpec(blobs={"tokens": BlobRef(kind="data", digest=VERSION, bytes=7)}),
            ranges=ranges or (Range(round, round + 1),),
            deadline_s=deadline_s,
            staleness=0,
            codec_up="fp32",
            codec_down="fp32",
        )
    )


def orders(round: int, hotkeys: tuple[str, ...] = HOTKEYS) -> tuple[Signed, ...]:
    return tuple(order(round, hotkey) for hotkey in hotkeys)


def payload(round: int, hotkey: str, size: int = 3000) -> bytes:
    return f"{round} {hotkey}".encode().ljust(size, b".")


def reply(round: int, hotkey: str, data: bytes = b"") -> Reply:
    return Reply(
        run="run",
        round=round,
        hotkey=hotkey,
        order=VERSION,
        version=VERSION,
        done=(Range(round, round + 1),),
        loss=1.5,
        seconds=0.25,
        codec="fp32",
        payload_digest=digest("payload", data),
        payload_bytes=len(data),
        residual_before=None,
        residual_after=None,
    )


def received(round: int, hotkey: str, data: bytes) -> ReceivedReply:
    what = reply(round, hotkey, data)
    return ReceivedReply(reply=what, signed=signed(what), bytes_up=len(data) + 500, bytes_down=900, seconds=1.75)


def receipt(
    round: int,
    hotkey: str,
    fault: Fault | None = None,
    work: int = 512,
    weight: float = 0.5,
    done: tuple[Range, ...] = (),
    seconds: float = 0.0,
) -> Signed:
    return signed(
        Receipt(
            run="run",
            round=round,
            hotkey=hotkey,
            order=VERSION,
            verdict=fault or "ACCEPTED",
            reason="no reply by the deadline" if fault else "",
            done=() if fault else done or (Range(round, round + 1),),
            work=0 if fault else work,
            scores={"accepted": 1.0},
            weight=weight,
            seconds=seconds,
        )
    )


def record(round: int, receipts: tuple[Signed, ...] | None = None) -> RoundRecord:
    return RoundRecord(
        round=round,
        version=digest("version", str(round).encode()),
        settings={"lr": 0.1 + round},
        codec_up="ternary-rc",
        codec_down="2bit",
        cursor=f'{{"next": {round + 1}}}',
        receipts=tuple(receipt(round, hotkey) for hotkey in HOTKEYS) if receipts is None else receipts,
        weights=dict.fromkeys(HOTKEYS, 1 / 3),
        ranker="{}",
        metrics={"round": round, "loss": 0.1 + round, "note": "fine"},
    )
