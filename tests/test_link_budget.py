"""The link budget: bytes, seconds and shares of a round, and the flags that would improve them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bittensor.sp_core import Keypair

from pilot.app.build_validator import link_watch
from pilot.app.training_flags import CodecConfig, RoundConfig
from pilot.codec import bits, known_codecs
from pilot.interfaces import MinerState, ReceivedReply
from pilot.market.link_budget import CODECS_DOWN, CODECS_UP, LinkBudget, LinkWatch, Rate, median_rate
from pilot.market.receipts import AssignmentKey, VerifiedReply, summary
from pilot.market.verify import Contribution
from pilot.training.learner import Learner
from pilot.transport.auth import sign_message
from protocol import Range, Reply
from tasks.optimizer import AdamWConfig
from tasks.quadratic import Quadratic, QuadraticConfig
from tests.echo import VALIDATOR

torch.set_num_threads(1)

GPT2 = LinkBudget(124_439_808, 0, "fp32", "fp32", round_s=60.0)
HOME = Rate(20e6, 100e6, 0.1)
HUNDRED = Rate(100e6, 100e6)


def link(up_mbps: float, down_mbps: float, latency_s: float = 0.0) -> MinerState:
    return MinerState("here", None, "idle", 0, 0, latency_s, 0, 0, 1e6 * up_mbps, 1e6 * down_mbps)


def share(budget: LinkBudget, rate: Rate) -> float:
    found = budget.share(rate)
    assert found is not None
    return found


# --- sizes and seconds ------------------------------------------------------------------------------------------------


def test_fp32_both_ways_is_what_the_parameters_weigh() -> None:
    assert GPT2.bytes_up == GPT2.bytes_down == 4 * 124_439_808
    assert replace(GPT2, buffers=1000).bytes_down == 4 * 124_440_808
    assert replace(GPT2, buffers=1000).bytes_up == GPT2.bytes_up
    assert GPT2.communication_s(HUNDRED) == pytest.approx(2 * 39.82, rel=1e-3)
    assert GPT2.communication_s(HOME) == pytest.approx(199.1 + 39.82 + 0.4, rel=1e-3)


def test_a_narrower_codec_takes_its_part_of_that() -> None:
    narrow = replace(GPT2, up="bf16", down="int8")
    assert narrow.bytes_up == GPT2.bytes_up / 2
    assert narrow.bytes_down == pytest.approx(GPT2.bytes_down * 8.125 / 32)


@pytest.mark.parametrize("ladder", [*CODECS_UP.values(), *CODECS_DOWN.values()])
def test_ladders_are_of_known_codecs_and_go_down(ladder: tuple[str, ...]) -> None:
    assert set(ladder) <= set(known_codecs())
    widths = [bits(name) for name in ladder]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == len(widths)


def test_a_share_is_of_the_budget_or_of_what_the_round_takes() -> None:
    half = replace(GPT2, up="bf16", down="bf16")  # 39.82 s on HUNDRED
    assert half.share(HUNDRED) == pytest.approx(39.82 / 60, rel=1e-3)
    assert half.utilisation(HUNDRED) == pytest.approx(1 - 39.82 / 60, rel=1e-3)
    fixed = replace(half, round_s=0.0)
    assert fixed.share(HUNDRED) is fixed.utilisation(HUNDRED) is None  # nobody knows what a round takes
    fixed = replace(fixed, compute_s=80.0)
    assert fixed.share(HUNDRED) == pytest.approx(39.82 / 119.82, rel=1e-3)
    assert fixed.utilisation(HUNDRED) == pytest.approx(80 / 119.82, rel=1e-3)
    assert replace(GPT2, round_s=0.0, compute_s=0.0).warning(HUNDRED) is None


def test_with_overlap_computing_waits_only_for_what_takes_longer() -> None:
    beside = replace(GPT2, up="bf16", down="bf16", overlap=True)
    assert beside.utilisation(HUNDRED) == 1.0
    assert replace(beside, up="fp32", down="fp32").utilisation(HUNDRED) == pytest.approx(60 / 79.64, rel=1e-3)
    fixed = replace(beside, round_s=0.0, compute_s=20.0)
    assert fixed.share(HUNDRED) == 1.0
    assert fixed.utilisation(HUNDRED) == pytest.approx(20 / 39.82, rel=1e-3)


def test_the_median_of_the_links_that_were_measured() -> None:
    assert median_rate([]) is None
    assert median_rate([link(0, 5), link(0, 7)]) is None
    links = [link(10, 90, 0.1), link(0, 0), link(30, 50, 0.3), link(20, 1, 0.2)]
    assert median_rate(links) == Rate(20e6, 50e6, 0.2)


def test_the_line_says_it_all() -> None:
    line = replace(GPT2, up="bf16", down="bf16").describe(HUNDRED, "a link")
    assert line == (
        "249 MB up (bf16) and 249 MB down (bf16) a round and miner: 39.8 s on a link of 100 Mbit/s up, 100 down, "
        "66% of it; computing has 34%"
    )
    assert "%" not in replace(GPT2, round_s=0.0).describe(HUNDRED, "a link")


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_no_warning_up_to_a_fifth() -> None:
    fifth = replace(GPT2, round_s=5 * GPT2.communication_s(HUNDRED))
    assert fifth.warning(HUNDRED) is None
    assert replace(fifth, round_s=fifth.round_s - 1).warning(HUNDRED) is not None


def test_one_flag_is_suggested_where_one_will_do() -> None:
    slow_up = replace(GPT2, up="fp32", down="2bit", round_s=300.0)
    warning = slow_up.warning(HOME)
    assert warning is not None
    assert warning.startswith("communication takes 67% of a round on links of 20 Mbit/s up, 100 down; ")
    mended = replace(slow_up, up="int8")  # bf16 leaves too much
    assert share(replace(slow_up, up="bf16"), HOME) > 0.2
    assert f"; --codec.up int8 would make it {share(mended, HOME):.0%}" in warning
    assert "--codec.down" not in warning


def test_both_flags_where_one_is_not_enough() -> None:
    warning = GPT2.warning(HUNDRED)
    assert warning is not None
    assert "--codec.up " in warning
    assert "--codec.down " in warning
    assert "longer rounds" not in warning


def test_what_nothing_mends_is_said_too() -> None:
    lost = Rate(1e5, 1e5)
    assert "longer rounds less" in (GPT2.warning(lost) or "")
    best = replace(GPT2, up="ternary-rc", down="2bit")
    assert (best.warning(lost) or "").endswith("; longer rounds would make it less")


def test_no_codec_is_suggested_where_waiting_is_what_takes_long() -> None:
    small = replace(GPT2, parameters=20_000, up="ternary-rc", down="2bit", round_s=0.0, compute_s=0.01)
    warning = small.warning(Rate(100e6, 100e6, 0.01))
    assert warning is not None
    assert warning.endswith("; longer rounds would make it less")


def test_under_full_broadcast_deltas_are_suggested() -> None:
    full = replace(GPT2, up="ternary-rc", broadcast="full")
    assert "; --broadcast delta --codec.down int4 would make it 12%" in (full.warning(HUNDRED) or "")


# --- during a run ---------------------------------------------------------------------------------------------------


class Watched:
    """A watch over links that change, and what it said."""

    def __init__(self, budget: LinkBudget) -> None:
        self.links: list[MinerState] = []
        self.said: list[str] = []
        self.watch = LinkWatch(budget, lambda: self.links, self.said.append)

    def rounds(self, count: int, *links: MinerState) -> None:
        """Observe rounds with these links."""
        self.links = list(links)
        for _ in range(count):
            self.watch.observe({"compute_s": 50.0})


DEFAULT = replace(GPT2, up="ternary-rc", down="2bit")


def delivery(name: str, claimed_s: float, seen_s: float) -> tuple[AssignmentKey, VerifiedReply]:
    """A miner's, which says that it computed for so long, and whose reply was there so long after its order."""
    reply = Reply(
        run="r", round=0, hotkey=Keypair.create_from_uri(f"//{name}").ss58_address, order="0" * 64, version="1" * 64,
        done=(Range(0, 1),), loss=1.0, seconds=claimed_s, codec="fp32", payload_digest="2" * 64, payload_bytes=1,
        residual_before=None, residual_after=None,
    )  # fmt: skip
    received = ReceivedReply(reply, sign_message(VALIDATOR, reply), 1, 1, seen_s)
    nothing = torch.zeros(0)
    contribution = Contribution(
        reply.hotkey, reply.done, 1, 1.0, {}, lambda into, weight: None, lambda start, stop: nothing
    )
    return (reply.hotkey, 0), VerifiedReply(received, contribution)


@pytest.mark.parametrize("claim_s", [0.0, 1e7])
def test_a_miner_that_lies_about_its_seconds_does_not_change_the_median(claim_s: float, tmp_path: Path) -> None:
    task = Quadratic.prepare(QuadraticConfig(), seed=0, cache=tmp_path)

    def compute_s(*seconds: tuple[float, float]) -> object:
        outcomes = dict(delivery(f"m{n}", *each) for n, each in enumerate(seconds))
        return summary(task, 0, 60.0, {}, outcomes)["compute_s"]

    assert compute_s((50.0, 60.0), (50.0, 60.0), (claim_s, 60.0)) == 50.0
    assert compute_s((1e7, 60.0), (1e7, 60.0), (1e7, 60.0)) == 60.0  # no more than the validator's own clock saw


def test_a_warning_is_said_once() -> None:
    w = Watched(GPT2)
    w.rounds(2, link(100, 100))
    assert not w.said
    w.rounds(3, link(100, 100))
    (said,) = w.said
    assert said.startswith("communication takes 133% of a round on links of 100 Mbit/s up, 100 down; --codec.up ")
    w = Watched(DEFAULT)
    w.rounds(5, link(100, 100))
    assert not w.said


def test_metrics_say_what_was_measured() -> None:
    w = Watched(DEFAULT)
    assert w.watch.observe({"compute_s": 50.0}) == {}
    w.links = [link(80, 90, 0.1)]
    row = w.watch.observe({"compute_s": 50.0})
    assert (row["link_up_mbps"], row["link_down_mbps"]) == (80.0, 90.0)
    assert row["communication"] == DEFAULT.share(Rate(80e6, 90e6, 0.1))
    assert row["utilisation_expected"] == 1 - row["communication"]


def test_without_a_time_budget_a_round_is_what_was_computed() -> None:
    w = Watched(replace(GPT2, round_s=0.0))
    w.links = [link(100, 100)]
    assert w.watch.observe({"round": 0}) == {}  # nothing was computed yet
    assert w.watch.observe({"compute_s": 79.64})["communication"] == pytest.approx(0.5, rel=1e-3)


def test_before_anything_is_measured_a_hundred_megabits_are_assumed() -> None:
    w = Watched(DEFAULT)
    w.watch.introduce()
    assert "(ternary-rc) and " in w.said[0]
    assert " on a link of 100 Mbit/s up, 100 down" in w.said[0]


def test_flags_make_a_watch(tmp_path: Path) -> None:
    task = Quadratic.prepare(QuadraticConfig(), seed=0, cache=tmp_path)
    learner = Learner(task, AdamWConfig(), torch.device("cpu"))
    (model,) = learner.parameters.values()
    flags = RoundConfig(round_seconds=60.0, overlap=1, mode="diloco")
    said: list[str] = []
    watch = link_watch(flags, learner, lambda: [link(1000, 1000)], said.append, scale=10.0)
    assert watch.budget == LinkBudget(10 * model.numel(), 0, "2bit", "2bit", 60.0, overlap=True, mode="diloco")
    full = link_watch(RoundConfig(broadcast="full", codec=CodecConfig(down="bf16")), learner, list, said.append)
    assert (full.budget.up, full.budget.down) == ("ternary-rc", "bf16")
