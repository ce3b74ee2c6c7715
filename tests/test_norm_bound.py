"""What one contribution may move: norms against those of the last rounds, and steps that are undone."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from pilot.app.validator_flags import ValidatorConfig
from pilot.codec import buffers as buffers_codec
from pilot.interfaces import Diverged
from pilot.market.norm_bound import NormBound
from pilot.market.verify import Contribution
from pilot.simulation.virtual_time import run
from pilot.training.diloco import DiLoCo
from pilot.training.learner import Learner
from pilot.worker.job import Job
from protocol import Fault, ProtocolError
from tasks.gpt2 import GPT2
from tasks.optimizer import AdamWConfig
from tests.test_buffers import Normed, make_task, policy
from tests.tiny import (
    CPU,
    MINERS,
    OPTIMIZER,
    TERMS,
    Place,
    equal,
    make_place,
    parameters,
    play,
    receipts,
    tiny_task,
)

PLAN = DiLoCo(
    tau=3, batches=2, outer_lr=0.7, momentum=0.7, keep=True, warmup_rounds=0, rounds=8, optimizer=asdict(OPTIMIZER)
)
A, B = sorted(k.ss58_address for k in MINERS[:2])


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


# --- the bound --------------------------------------------------------------------------------------------------------


def contribution(norm: float, count: int = 4, buffers: float = 0.0) -> Contribution:
    return Contribution("", (), count, norm, {}, None, None, dict, buffers)  # type: ignore[arg-type]


def refused(
    history: Sequence[Sequence[float]], *now: Contribution, terms: Mapping[str, object] | None = None
) -> list[int]:
    """Which contributions of a round are refused, after rounds with contributions of these norms."""
    bound = NormBound(replace(TERMS, **(terms or {})))
    for round, norms in enumerate(history):
        bound.observe(round, bound.judge(round, dict(enumerate(map(contribution, norms))))[1])
    return sorted(bound.judge(len(history), dict(enumerate(now)))[0])


HONEST = [[1.0, 1.2]] * 8


@pytest.mark.parametrize("huge", [1e2, 1e6, 1e18, 1e38])
@pytest.mark.parametrize("history", [[], HONEST[:1], HONEST])
@pytest.mark.parametrize("others", [1, 2, 4])
def test_one_huge_norm_is_refused_from_the_first_round_on(huge: float, history: list[list[float]], others: int) -> None:
    honest = [contribution(1.0 + i / 10) for i in range(others)]
    assert refused(history, contribution(huge), *honest) == [0]
    assert refused(history, *honest, contribution(huge)) == [others]
    if history:
        assert refused(history, contribution(huge)) == [0]  # alone


def test_what_honest_miners_send_is_accepted() -> None:
    assert refused([]) == refused([], contribution(1e18)) == []  # alone in the first round: nothing to compare with
    assert refused(HONEST, contribution(9.0), contribution(0.1), contribution(0.0), contribution(1e-30)) == []
    assert refused([[1e3 * 0.7**n] for n in range(8)], contribution(40.0), contribution(60.0)) == []
    assert refused([[1.5**n, 1.6**n] for n in range(12)], contribution(1.5**12)) == []
    assert refused([[0.0, 0.0]] * 8, contribution(1.0), contribution(2.0)) == []  # no reward yet, no gradient
    assert refused(HONEST, contribution(1e18), terms={"norm_bound": 0.0}) == []


def test_less_work_has_more_noise_and_fewer_inner_steps_are_shorter() -> None:
    much, little = contribution(1.0, count=4096), contribution(30.0, count=4)
    assert refused([], much, little) == []
    assert refused([], much, replace(little, norm=330.0)) == [1]
    long, short = contribution(30.0, count=4096), contribution(1.0, count=128)
    assert refused([], short, long, terms={"diloco": PLAN}) == []
    assert refused([], short, replace(long, norm=330.0), terms={"diloco": PLAN}) == [1]


def test_buffers_have_a_bound_of_their_own() -> None:
    assert refused([], contribution(1.0, buffers=3.0), contribution(1.0, buffers=1e18)) == [1]
    assert refused([], contribution(1.0, buffers=3.0), contribution(1.1, buffers=29.0)) == []


def test_a_liar_beside_an_honest_miner_does_not_move_what_is_usual() -> None:
    honest = [1.0, 1.1, 0.9]
    for lie in (9.0, 1e18, 0.12, 1e-18, 0.0):
        bound = NormBound(TERMS)
        for round in range(60):
            history = [honest[round % 3]] if round < 8 else [honest[round % 3], lie]
            why, row = bound.judge(round, dict(enumerate(map(contribution, history))))
            assert 0 not in why
            bound.observe(round, row)
        assert sorted(bound.judge(60, {0: contribution(1.0), 1: contribution(12.0)})[0]) == [1]


def test_a_huge_norm_that_came_alone_first_is_forgotten() -> None:
    assert refused([[1e18]], contribution(1e18), contribution(1.0)) == [0]
    assert refused([[1e18], [1.0, 1.1]], contribution(1e18)) == [0]


def test_a_change_that_stays_is_accepted_after_some_rounds() -> None:
    bound = NormBound(TERMS)
    for round in range(8):
        bound.observe(round, bound.judge(round, {0: contribution(1.0), 1: contribution(1.1)})[1])
    accepted = []
    for round in range(8, 16):
        why, row = bound.judge(round, {0: contribution(30.0), 1: contribution(33.0)})
        bound.observe(round, row)
        accepted.append(not why)
    assert accepted == [False] * 5 + [True] * 3
    for round in range(16, 40):  # rounds without a reply forget nothing
        bound.observe(round, bound.judge(round, {})[1])
    assert bound.judge(40, {0: contribution(1e18)})[0]


@pytest.mark.parametrize("flag", ["--norm-bound 1", "--norm-bound -3", "--norm-bound nan", "--rollback -1"])
def test_a_wrong_flag_is_one_line(flag: str) -> None:
    option, value = flag.split(" ")
    name = option[2:].replace("-", "_")
    config = ValidatorConfig(local=1, **{name: int(value) if name == "rollback" else float(value)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^{flag}: must be"):
        config.check()


# --- rounds -----------------------------------------------------------------------------------------------------------


def lies(place: Place, hotkey: str, factor: float, rounds: Sequence[int]) -> None:
    """Let a miner send `factor` times its gradient in these rounds."""
    worker = place.workers[hotkey]
    honest = worker.feedback.encode
    sent = iter(range(1000))

    def encode(codec, gradient):  # type: ignore[no-untyped-def]
        scale = factor if next(sent) in rounds else 1.0
        return honest(codec, {name: t * scale for name, t in gradient.items()})

    worker.feedback.encode = encode  # type: ignore[method-assign]


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "2bit", "1bit", "ternary-rc", "topk64"])
@pytest.mark.parametrize("aggregation", ["mean", "median_norm_mean"])
def test_a_huge_gradient_costs_its_sender_and_not_the_model(
    tmp_path: Path, task: GPT2, codec: str, aggregation: str
) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, codec_up=codec, aggregation=aggregation)
        lies(place, B, 1e15, [0, 3])
        await play(place.market, 6)
        found = [receipts(place.store, n) for n in range(6)]
        assert [r[A].verdict for r in found] == ["ACCEPTED"] * 6
        assert [r[B].verdict for r in found] == [Fault.OUTLIER if n in (0, 3) else "ACCEPTED" for n in range(6)]
        assert "the usual one is" in found[3][B].reason
        assert place.store.head().metrics["loss"] < place.store.committed(0)[0].metrics["loss"]

    run(main())


@pytest.mark.parametrize("diloco", [None, PLAN])
@pytest.mark.parametrize("miners", [2, 3])
def test_the_model_is_as_if_the_liar_had_not_been_there(
    tmp_path: Path, task: GPT2, diloco: DiLoCo | None, miners: int
) -> None:
    """With a restart in between that has only honest miners."""

    async def first(folder: Path, huge: bool) -> None:
        place = make_place(folder, task, miners=MINERS[:miners], diloco=diloco)
        if huge:
            lies(place, B, 1e18, range(8))
        else:
            place.network.drop(B)
        await play(place.market, 4)
        await place.market.close()
        place.store.close()

    async def then(folder: Path) -> tuple[float, list[str], dict[str, torch.Tensor]]:
        place = make_place(folder, task, miners=MINERS[:miners], diloco=diloco)
        await place.market.replay(0)
        await play(place.market, 8)
        verdicts = [r.verdict for n in range(4, 8) for r in receipts(place.store, n).values()]
        place.store.close()
        return (await place.market.evaluate())["val_loss"], verdicts, parameters(place.market)

    run(first(tmp_path / "huge", True))
    loss, verdicts, _ = run(then(tmp_path / "huge"))
    run(first(tmp_path / "honest", False))
    expected, _, _ = run(then(tmp_path / "honest"))
    assert set(verdicts) == {"ACCEPTED"}
    assert loss == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("mode", ["gradient", "diloco"])
@pytest.mark.parametrize("huge_at", [0, 3])
def test_huge_buffers_cost_their_sender_and_not_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, huge_at: int
) -> None:
    batch_norm, sent = make_task(Normed, tmp_path, monkeypatch), iter(range(1000))

    def append(payload, buffers):  # type: ignore[no-untyped-def]
        scale = 1e18 if next(sent) == 2 * huge_at + 1 else 1.0
        return buffers_codec.append(payload, {name: b.float() * scale for name, b in buffers.items()})

    monkeypatch.setattr("pilot.worker.job.append", append)

    async def main() -> None:
        place = make_place(tmp_path, batch_norm, **policy(mode))
        await play(place.market, 5)
        verdicts = [sorted(str(r.verdict) for r in receipts(place.store, n).values()) for n in range(5)]
        assert verdicts == [["ACCEPTED", "OUTLIER" if n == huge_at else "ACCEPTED"] for n in range(5)]
        refused = [r for r in receipts(place.store, huge_at).values() if r.verdict == Fault.OUTLIER]
        assert refused[0].reason.startswith("norm of the buffers")
        own = batch_norm.buffers(place.market.learner.model)
        assert all(float(b.abs().max()) < 100 for b in own.values())

    run(main())


def test_what_a_miner_claims_of_itself_buys_nothing(tmp_path: Path, task: GPT2) -> None:
    """A reply has no count of tokens; its loss, its seconds and the norm of its work change no weight."""

    async def main() -> None:
        place = make_place(tmp_path, task)
        worker = place.workers[B]
        work = worker._work

        async def boast(job: Job) -> None:
            await work(job)
            assert job.reply is not None
            job.reply = job.reply.model_copy(update={"loss": -1e18, "seconds": 1e7})

        worker._work = boast  # type: ignore[method-assign]
        await play(place.market, 3)
        assert place.store.head().weights == {A: 0.5, B: 0.5}
        assert {r.work for r in receipts(place.store, 2).values()} == {2 * task.count(0)}
        reply = place.store.received(2)[0].reply
        for claim in ("count", "tokens", "work", "weight"):
            assert claim not in type(reply).model_fields
            with pytest.raises(ProtocolError):
                type(reply).parse(reply.model_dump_json()[:-1] + f', "{claim}": {10**18}}}')

    run(main())


# --- steps that are undone --------------------------------------------------------------------------------------------


def test_a_diverging_step_is_undone_to_the_last_bit(
    tmp_path: Path, task: GPT2, caplog: pytest.LogCaptureFixture
) -> None:
    """The miner alone in the first round sends a huge pseudo-gradient; then it does as it should."""

    async def main(folder: Path, huge: Sequence[int], rounds: int) -> tuple[Place, dict[str, torch.Tensor]]:
        place = make_place(folder, task, miners=MINERS[:1], diloco=PLAN, broadcast="delta", codec_down="int8")
        lies(place, place.workers[MINERS[0].ss58_address].hotkey, 1e18, huge)
        place.market.save_snapshot(place.store.save_snapshot)
        await play(place.market, rounds)
        return place, parameters(place.market)

    with caplog.at_level(logging.WARNING):
        place, found = run(main(tmp_path / "huge", [0], 4))
    verdicts = [next(iter(receipts(place.store, n).values())).verdict for n in range(4)]
    assert verdicts == [Fault.VALIDATOR_FAILED, "ACCEPTED", "ACCEPTED", "ACCEPTED"]
    first = receipts(place.store, 1).popitem()[1].done
    assert first[0].start == 0  # the work was ordered again
    assert "the step is undone, 1 of --rollback 3" in caplog.text
    assert all(torch.isfinite(p).all() for p in found.values())
    place.store.close()

    async def again() -> None:
        back = make_place(tmp_path / "huge", task, miners=MINERS[:1], diloco=PLAN, broadcast="delta", codec_down="int8")
        await back.market.replay(0)
        assert equal(parameters(back.market), found)

    run(again())


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("broadcast", ["full", "delta"])
@pytest.mark.parametrize("snapshot_at", [0, 3])
def test_a_step_is_undone_with_its_moments(
    tmp_path: Path, task: GPT2, overlap: int, broadcast: str, snapshot_at: int
) -> None:
    """In the midst of a run, parameters, moments, replica and version are those before the step; the miners go on."""

    async def main() -> None:
        how = {"overlap": overlap, "broadcast": broadcast, "digest_every": 1, "patience": 9}
        place = make_place(tmp_path, task, norm_bound=0.0, optimizer=AdamWConfig(lr=1e-3, clip=0.0), **how)
        market, learner = place.market, place.market.learner
        lies(place, B, 1e30, [3])
        await market.open_rounds(8)
        while market.in_flight:
            if market.round == snapshot_at:
                market.save_snapshot(place.store.save_snapshot)
            if market.round == 3:
                before = {name: t.clone() for name, t in learner.state()[1].items()}
                version = learner.version
            await market.run_round(8)
            if market.round == 4:
                assert learner.version == version == place.store.head().version
                after = learner.state()[1]
                assert before.keys() == after.keys()
                assert all(torch.equal(t, after[name]) for name, t in before.items())
        await market.finish()
        verdicts = [{r.verdict for r in receipts(place.store, n).values()} for n in range(8)]
        assert verdicts == [{Fault.VALIDATOR_FAILED if n == 3 else "ACCEPTED"} for n in range(8)]
        await market.close()
        place.store.close()
        again = make_place(tmp_path, task, norm_bound=0.0, optimizer=AdamWConfig(lr=1e-3, clip=0.0), **how)
        await again.market.replay(0)
        assert equal(parameters(again.market), parameters(market))

    run(main())


@pytest.mark.parametrize("rollback", [0, 2])
def test_a_run_that_keeps_diverging_ends_and_resumes_from_a_good_model(
    tmp_path: Path, task: GPT2, rollback: int
) -> None:
    async def main(folder: Path) -> None:
        place = make_place(folder, task, norm_bound=0.0, rollback=rollback, optimizer=AdamWConfig(lr=1e-3, clip=0.0))
        place.market.save_snapshot(place.store.save_snapshot)
        await play(place.market, 2)
        lies(place, B, 1e30, range(100))
        try:
            await play(place.market, 20)
        finally:
            await place.market.close()
            place.store.close()

    with pytest.raises(Diverged, match=r"no longer finite.*--optimizer.lr.*--resume"):
        run(main(tmp_path))

    async def resumed() -> None:
        place = make_place(tmp_path, task, rollback=rollback, optimizer=AdamWConfig(lr=1e-3, clip=0.0))
        await place.market.replay(0)
        assert place.store.head().round == 1 + rollback
        assert all(math.isfinite(value) for value in (await place.market.evaluate()).values())

    run(resumed())


def test_a_step_to_parameters_many_times_as_large_is_divergence(task: GPT2) -> None:
    learner = Learner(task, OPTIMIZER, CPU)
    for scale, diverges in ((1.0, False), (5.0, False), (20.0, True)):
        gradient = {name: (1 - scale) * p.detach() for name, p in learner.parameters.items()}
        learner.step(gradient, {"outer_lr": 1.0, "outer_momentum": 0.0})
        if diverges:
            with pytest.raises(Diverged, match="one step took the norm of the model from"):
                learner.check_step()
        else:
            learner.check_step()
