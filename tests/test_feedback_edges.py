"""Error feedback where a codec cannot carry the sum, and where a validator has gone back by a round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pilot.codec import load_codec
from pilot.worker.error_feedback import residual_digest
from protocol import Fault, ProtocolError
from tests.test_feedback import SHAPES, Miner, Textbook, gradient

torch.set_num_threads(1)
SPECS = {name: torch.Size(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(("codec", "value"), [("ternary-rc", 3e18), ("2bit", 3e19), ("bf16", 3.4e38)])
@pytest.mark.parametrize("restart", [False, True])
def test_a_gradient_that_the_codec_cannot_carry_is_not_kept(
    tmp_path: Path, codec: str, value: float, restart: bool
) -> None:
    """It is encoded plainly, refused, and forgotten; what was left before it is still there."""
    miner, textbook = Miner(tmp_path, codec), Textbook(codec)
    textbook.encode(gradient(0))
    textbook.settle(True)
    miner.hear(miner.encode(miner.order(0), gradient(0)))
    broken = gradient(1)
    broken["w"][3, 100] = value
    plain = bytes(load_codec(codec).encode(broken))
    reply = miner.encode(miner.order(1), broken)
    assert reply.residual_before is None
    assert bytes(miner.payload) == plain
    miner.hear(reply, Fault.NONFINITE)
    if restart:
        miner.restart()
    for round in (2, 3):
        expected = residual_digest(textbook.e)
        payload = textbook.encode(gradient(round))
        reply = miner.encode(miner.order(round), gradient(round))
        assert reply.residual_before == expected
        assert bytes(miner.payload) == payload
        assert load_codec(codec).check(miner.payload, SPECS) > 0
        miner.hear(reply)
        textbook.settle(True)
    assert not miner.said


@pytest.mark.parametrize("again", [True, False])
def test_an_order_of_an_earlier_round_says_nothing_of_a_later_one(tmp_path: Path, again: bool) -> None:
    """A validator that went back by a round comes to the later one again: by the same order, or by another."""
    miner, textbook = Miner(tmp_path), Textbook()
    textbook.encode(gradient(3))
    late = miner.encode(miner.order(3), gradient(3))
    assert miner.encode(miner.order(2), gradient(2)).residual_before is None
    if again:
        assert miner.encode(miner.order(3), gradient(3)) == late
        miner.hear(late)
    else:
        miner.encode(miner.order(2, deadline_s=21.0), gradient(2))
    textbook.settle(again)
    order = miner.order(4) if again else miner.order(3, deadline_s=21.0)
    assert miner.encode(order, gradient(4)).residual_before == residual_digest(textbook.e)


def test_what_was_refused_is_told_by_the_codec() -> None:
    """Else the tests above would be of nothing."""
    broken = gradient(1)
    broken["w"][3, 100] = 3e18
    with pytest.raises(ProtocolError):
        load_codec("ternary-rc").check(load_codec("ternary-rc").encode(broken), SPECS)
