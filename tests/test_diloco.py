"""Rounds with inner steps: the plan of a run, the marketplace against a loop by hand, orders gone wrong, the flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilot.app.training_flags import CodecConfig, RoundConfig
from pilot.app.validator_flags import ValidatorConfig
from pilot.interfaces import Faulted, ReceivedReply
from pilot.market.scheduling import History, RoundPolicy
from pilot.simulation.network import EmulatedNetwork
from pilot.simulation.virtual_time import run
from pilot.training.diloco import DiLoCo, plain_steps, round_settings, warmup_rounds
from pilot.training.inner_loop import InnerLoop
from pilot.training.ranges import indices
from protocol import Fault, Order, Range, Receipt
from tasks.gpt2 import GPT2
from tasks.optimizer import AdamWConfig
from tests.tiny import (
    CPU,
    MINERS,
    OPTIMIZER,
    TERMS,
    UNITS,
    equal,
    make_place,
    parameters,
    play,
    receipts,
    tiny_task,
)

torch.set_num_threads(1)
ROUNDS = 6
PLAN = DiLoCo(
    tau=3,
    batches=2,
    outer_lr=0.7,
    momentum=0.7,
    keep=False,
    warmup_rounds=2,
    rounds=ROUNDS,
    optimizer=asdict(OPTIMIZER),
)
HOTKEYS = sorted(k.ss58_address for k in MINERS[:2])


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


# --- the plan of a run ------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=200, deadline=None, database=None)
@given(st.floats(0, 0.99), st.integers(1, 5000), st.integers(1, 500))
def test_the_warm_up_is_its_share_of_the_micro_batches(warmup: float, rounds: int, tau: int) -> None:
    first = warmup_rounds(warmup, rounds, tau)
    assert 0 <= first < rounds

    def share(first: int) -> float:
        return first / (first + (rounds - first) * tau)

    assert share(max(0, first - 1)) <= warmup + 1e-9
    assert first + 1 >= rounds or share(first + 1) >= warmup - 1e-9


@settings(derandomize=True, max_examples=100, deadline=None, database=None)
@given(st.integers(1, 50), st.integers(0, 30), st.integers(1, 30))
def test_every_step_of_the_run_is_in_one_round(tau: int, warmup: int, rounds: int) -> None:
    plan = replace(PLAN, tau=tau, warmup_rounds=min(warmup, rounds - 1), rounds=rounds)
    first = 0
    for number in range(rounds):
        assert plan.step(number) == first
        inner = plan.ordered(number)
        assert (inner is not None) == plan.inner(number) == (number >= plan.warmup_rounds)
        first += 1 if inner is None else tau
        assert inner is None or (inner.first_step, inner.steps) == (plan.step(number), plan.steps)
    assert plan.steps == first


def test_settings_are_the_tasks_by_the_step_and_then_the_outer_optimizers(task: GPT2) -> None:
    of_round = round_settings(PLAN, task, OPTIMIZER, ROUNDS)
    assert PLAN.steps == 2 + 4 * 3
    assert [of_round(n, UNITS) for n in range(2)] == [task.settings(OPTIMIZER, n, 14, UNITS) for n in range(2)]
    assert of_round(2, UNITS) == of_round(5, UNITS) == {"outer_lr": 0.7, "outer_momentum": 0.7}
    plain = round_settings(None, task, OPTIMIZER, ROUNDS)
    assert [plain(n, UNITS) for n in range(6)] == [task.settings(OPTIMIZER, n, ROUNDS, UNITS) for n in range(6)]


def test_plain_training_makes_the_inner_steps_of_all_miners_together(task: GPT2) -> None:
    done = [[Range(10, 13), Range(20, 22)], [Range(13, 16)], []]  # the second miner came no further
    outer = {"outer_lr": 0.7, "outer_momentum": 0.7}
    steps = plain_steps(PLAN, task, OPTIMIZER, 3, done, outer)
    assert [ranges for ranges, _ in steps] == [
        (Range(10, 12), Range(13, 15)),
        (Range(12, 13), Range(15, 16), Range(20, 21)),
        (Range(21, 22),),
    ]
    assert [own for _, own in steps] == [task.settings(OPTIMIZER, step, 14, UNITS) for step in (5, 6, 7)]
    lr = {"lr": 1.0}
    assert plain_steps(PLAN, task, OPTIMIZER, 0, done, lr) == [((Range(10, 16), Range(20, 22)), lr)]
    assert plain_steps(PLAN, task, OPTIMIZER, 3, [[], []], outer) == []


def test_a_round_of_inner_steps_orders_all_of_them_or_what_time_allows() -> None:
    policy = replace(TERMS, diloco=PLAN)
    history = History()
    assert history.shares(HOTKEYS, policy, 1) == dict.fromkeys(HOTKEYS, 2)
    assert history.shares(HOTKEYS, policy, 2) == dict.fromkeys(HOTKEYS, 6)
    timed = replace(policy, round_s=60.0)
    assert history.shares(HOTKEYS, timed, 2) == dict.fromkeys(HOTKEYS, 6)  # nobody known: as many as there are
    history.observe([accepted(HOTKEYS[0], 2, done=2), accepted(HOTKEYS[1], 2, done=40)])
    assert history.shares(HOTKEYS, timed, 3) == {HOTKEYS[0]: 4, HOTKEYS[1]: 6}


def test_a_round_of_inner_steps_is_not_closed_by_what_gradient_rounds_took() -> None:
    policy = replace(TERMS, diloco=PLAN, auto=True)
    history = History()
    history.observe([accepted(hotkey, 1, seconds=2.0) for hotkey in HOTKEYS])
    assert history.closing_s(policy, 1) < 4.0
    assert history.closing_s(policy, 2) == float("inf")
    history.observe([accepted(hotkey, 2, seconds=60.0) for hotkey in HOTKEYS])
    assert 60.0 < history.closing_s(policy, 3) < 120.0


def accepted(hotkey: str, number: int, done: int = 1, seconds: float = 1.0) -> Receipt:
    return Receipt(
        run="tiny", round=number, hotkey=hotkey, order="0" * 64, verdict="ACCEPTED", reason="", done=(Range(0, done),),
        work=done, scores={}, weight=0.5, seconds=seconds,
    )  # fmt: skip


# --- the marketplace --------------------------------------------------------------------------------------------------


def test_rounds_are_those_of_a_loop_by_hand(tmp_path: Path, task: GPT2) -> None:
    """Two miners: gradient rounds of the task's optimizer, then torch's Nesterov SGD on the mean pseudo-gradient."""

    async def main() -> dict[str, torch.Tensor]:
        place = make_place(tmp_path, task, batches=2, diloco=PLAN)
        await play(place.market, ROUNDS)
        assert [r.metrics["batches_done"] for r in place.store.committed(0)] == [4, 4, 12, 12, 12, 12]
        return parameters(place.market)

    model = task.build_model(CPU, initial=True)
    own = task.trainable(model)
    optimizer = task.optimizer(model, OPTIMIZER)
    outer = torch.optim.SGD(own.values(), lr=0.7, momentum=0.7, nesterov=True)
    index = 0
    for number in range(ROUNDS):
        inner = PLAN.ordered(number)
        for p in own.values():
            p.grad = None
        if inner is None:
            for i in range(index, index + 4):
                task.loss(model, task.batch(i)).backward()
            index += 4
            for p in own.values():
                p.grad /= 4 * task.count(0)
            torch.nn.utils.clip_grad_norm_(own.values(), OPTIMIZER.clip)
            for group in optimizer.param_groups:
                group["lr"] = task.settings(OPTIMIZER, number, PLAN.steps, UNITS)["lr"]
            optimizer.step()
            continue
        moved = []
        for _ in range(2):
            worker = task.build_model(CPU, initial=False)
            worker.load_state_dict(model.state_dict())
            loop = InnerLoop(task, worker, inner, {name: p.detach().clone() for name, p in own.items()})
            for i in range(index, index + 6):
                loop.add(i)
            index += 6
            moved.append(loop.result().gradient)
        for name, p in own.items():
            p.grad = (moved[0][name] + moved[1][name]) / 2
        outer.step()
    trained = run(main())
    for name, p in own.items():
        torch.testing.assert_close(trained[name], p.detach(), rtol=1e-4, atol=1e-5)


def test_with_plain_outer_steps_of_1_one_miner_trains_as_if_alone(tmp_path: Path, task: GPT2) -> None:
    """Sign and scale: base - (base - model) is the miner's model. What it keeps makes the rounds one run of AdamW."""
    plan = replace(PLAN, outer_lr=1.0, momentum=0.0, keep=True, warmup_rounds=0, rounds=4)

    async def main() -> dict[str, torch.Tensor]:
        place = make_place(tmp_path, task, miners=MINERS[:1], batches=2, diloco=plan)
        await play(place.market, 4)
        return parameters(place.market)

    alone = task.build_model(CPU, initial=True)
    before = {name: p.detach().clone() for name, p in task.trainable(alone).items()}
    inner = plan.ordered(0)
    assert inner is not None
    loop = InnerLoop(task, alone, inner, before)
    for index in range(plan.steps * plan.batches):
        loop.add(index)
    for name, p in run(main()).items():
        torch.testing.assert_close(p, loop.parameters[name].detach(), rtol=1e-4, atol=1e-5)
        assert (p - before[name]).abs().max() > 1e-3


def test_a_partial_pseudo_gradient_weighs_by_its_work(tmp_path: Path, task: GPT2) -> None:
    """One miner has time for a third of its steps: its part counts for a third of the other's, and the rest returns."""
    plan = replace(PLAN, outer_lr=1.0, momentum=0.0, warmup_rounds=0)

    async def main() -> tuple[dict[str, torch.Tensor], dict[str, Receipt]]:
        seconds = {HOTKEYS[0]: 1.0, HOTKEYS[1]: 17.0}  # of a deadline of 60, less the reserve
        batch_s = [seconds[k.ss58_address] for k in MINERS[:2]]
        place = make_place(tmp_path, task, batches=2, batch_s=batch_s, diloco=plan)
        await play(place.market, 1)
        return parameters(place.market), receipts(place.store, 0)

    trained, given = run(main())
    done = {hotkey: [i for r in receipt.done for i in range(*r)] for hotkey, receipt in given.items()}
    assert {hotkey: len(d) for hotkey, d in done.items()} == {HOTKEYS[0]: 6, HOTKEYS[1]: 3}
    inner = plan.ordered(0)
    assert inner is not None
    model = task.build_model(CPU, initial=True)
    base = {name: p.detach().clone() for name, p in task.trainable(model).items()}
    expected = {name: p.clone() for name, p in base.items()}
    for hotkey in HOTKEYS:
        loop = InnerLoop(task, task.build_model(CPU, initial=True), inner, base)
        for index in done[hotkey]:
            loop.add(index)
        for name, g in loop.result().gradient.items():
            expected[name] -= g * (len(done[hotkey]) / 9)
    for name, p in expected.items():
        torch.testing.assert_close(trained[name], p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("overlap", [0, 1])
def test_model_learns_and_a_restart_makes_the_same_version(tmp_path: Path, task: GPT2, overlap: int) -> None:
    plan = replace(PLAN, tau=5, rounds=8, optimizer=asdict(AdamWConfig(lr=3e-3, warmup=2)))

    async def main(rounds: int) -> tuple[str, float, float]:
        place = make_place(tmp_path, task, batches=2, diloco=plan, overlap=overlap)
        before = (await place.market.evaluate())["val_loss"]
        await place.market.replay(0)
        await play(place.market, rounds)
        after = (await place.market.evaluate())["val_loss"]
        version = place.market.learner.version
        place.store.close()
        return version, before, after

    version, before, after = run(main(8))
    assert after < before - 0.5
    assert run(main(8))[0] == version  # from the ledger alone: the outer momentum too


@pytest.mark.parametrize("codec", ["2bit", "int4"])
def test_deltas_and_quantised_pseudo_gradients_learn_too(tmp_path: Path, task: GPT2, codec: str) -> None:
    plan = replace(PLAN, tau=5, rounds=8, optimizer=asdict(AdamWConfig(lr=3e-3, warmup=2)))

    async def main() -> tuple[float, float]:
        policy: dict[str, Any] = {"codec_up": codec, "codec_down": codec, "broadcast": "delta", "digest_every": 2}
        place = make_place(tmp_path, task, batches=2, diloco=plan, **policy)
        before = (await place.market.evaluate())["val_loss"]
        await play(place.market, 8)
        assert all(r.verdict == "ACCEPTED" for n in range(8) for r in receipts(place.store, n).values())
        return before, (await place.market.evaluate())["val_loss"]

    before, after = run(main())
    assert after < before - 0.4


class Losing:
    """A network on which the first round's replies come, and are lost."""

    def __init__(self, network: EmulatedNetwork) -> None:
        self.network = network

    def __getattr__(self, name: str) -> object:
        return getattr(self.network, name)

    async def exchange(self, order: Order, *arguments: Any) -> ReceivedReply:
        received = await self.network.exchange(order, *arguments)
        if order.round == 0:
            raise Faulted(Fault.SILENT, "lost")
        return received


def test_what_was_lost_is_done_again_from_the_version(tmp_path: Path, task: GPT2) -> None:
    """The model has moved at the miners, the version has not: the same ranges again make the same model."""
    constant = asdict(replace(OPTIMIZER, warmup=0, final_lr=1.0))
    plan = replace(PLAN, warmup_rounds=0, optimizer=constant)

    async def main(folder: Path, lost: int) -> dict[str, torch.Tensor]:
        wrap: Callable[[EmulatedNetwork], Any] = Losing if lost else lambda network: network
        place = make_place(folder, task, network=wrap, batches=2, diloco=plan)
        await play(place.market, 1 + lost)
        assert {r.verdict for r in receipts(place.store, lost).values()} == {"ACCEPTED"}
        return parameters(place.market)

    assert equal(run(main(tmp_path / "a", 0)), run(main(tmp_path / "b", 1)))


# --- orders gone wrong ------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], Fault]] = [
    ({"lr": 1e-3}, Fault.REFUSED),
    ({**asdict(OPTIMIZER), "lr": "fast"}, Fault.REFUSED),
    ({**asdict(OPTIMIZER), "beta1": 2.0}, Fault.REFUSED),
    ({**asdict(OPTIMIZER), "lr": 1e30, "warmup": 0, "clip": 0.0}, Fault.NONFINITE),
]


@pytest.mark.parametrize(("optimizer", "fault"), WRONG, ids=["missing", "junk", "bounds", "huge"])
def test_orders_with_a_wrong_optimizer_cost_the_round_and_no_miner(
    tmp_path: Path, task: GPT2, optimizer: dict[str, Any], fault: Fault
) -> None:
    plan = replace(PLAN, warmup_rounds=0, optimizer=optimizer)

    async def main() -> None:
        place = make_place(tmp_path, task, batches=2, diloco=plan)
        version = place.market.learner.version
        await play(place.market, 1)
        assert {r.verdict for r in receipts(place.store, 0).values()} == {fault}
        assert place.market.learner.version == version
        place.market.policy = replace(place.market.policy, diloco=replace(plan, optimizer=asdict(OPTIMIZER)))
        await play(place.market, 2)
        assert {r.verdict for r in receipts(place.store, 1).values()} == {"ACCEPTED"}
        assert not any(worker.failed.done() for worker in place.workers.values())

    run(main())


def test_an_inner_step_longer_than_the_order_is_one_step(tmp_path: Path, task: GPT2) -> None:
    plan = replace(PLAN, tau=1, batches=4096, warmup_rounds=0)

    async def main() -> None:
        place = make_place(tmp_path, task, batches=2, diloco=plan)
        await play(place.market, 1)
        assert {(r.verdict, r.work) for r in receipts(place.store, 0).values()} == {("ACCEPTED", 2 * task.count(0))}

    run(main())


def test_orders_of_the_other_mode_are_planned_anew(tmp_path: Path, task: GPT2) -> None:
    """A restart with other --rounds may find that an open round has become one of inner steps."""

    async def begin() -> None:
        place = make_place(tmp_path, task, batches=2, diloco=replace(PLAN, warmup_rounds=1))
        await place.market.open_rounds(1)
        await place.market.close()
        place.store.close()

    async def resume() -> None:
        place = make_place(tmp_path, task, batches=2, diloco=replace(PLAN, warmup_rounds=0))
        await place.market.replay(0)
        await play(place.market, 1)
        orders = [Order.parse(s.body) for s in place.store.orders(0)]
        assert [order.inner_steps for order in orders] == [replace(PLAN, warmup_rounds=0).ordered(0)] * 2
        assert sorted(i for order in orders for i in indices(order.ranges)) == list(range(12))
        assert {r.verdict for r in receipts(place.store, 0).values()} == {"ACCEPTED"}

    run(begin())
    run(resume())


# --- the flags --------------------------------------------------------------------------------------------------------


def terms_of(**flags: Any) -> RoundPolicy:
    config = RoundConfig(**flags)
    config.check_rounds()
    return config.policy("run", 3)


@pytest.mark.parametrize(
    ("flags", "up", "down"),
    [
        ({}, "ternary-rc", "2bit"),
        ({"mode": "diloco"}, "2bit", "2bit"),
        ({"broadcast": "full"}, "ternary-rc", "fp32"),
        ({"codec": CodecConfig(up="topk64", down="int8")}, "topk64", "int8"),
        ({"broadcast": "full", "mode": "diloco", "codec": CodecConfig(down="bf16")}, "2bit", "bf16"),
    ],
)
def test_codecs_are_the_modes_own_where_none_is_named(flags: dict[str, Any], up: str, down: str) -> None:
    policy = terms_of(**flags)
    assert (policy.codec_up, policy.codec_down) == (up, down)


def test_terms_say_what_the_flags_say() -> None:
    policy = terms_of(
        mode="diloco", rounds=100, batches=3, tau=10, inner_state="reset", codec=CodecConfig(feedback=0.9)
    )
    assert policy.diloco == DiLoCo(10, 3, 0.7, 0.7, False, 53, 100, asdict(AdamWConfig()))
    assert (policy.feedback, policy.broadcast, policy.digest_every) == (0.9, "delta", 20)
    assert terms_of().diloco is None
    muon = terms_of(mode="diloco", task="nanochat").diloco
    assert muon is not None
    assert muon.optimizer["matrix_lr"] == 0.02


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tau": 3}, "--tau 3: only --mode diloco uses it"),
        ({"inner_state": "reset"}, "--inner-state reset: only --mode diloco uses it"),
        ({"mode": "diloco", "tau": 0}, "--tau 0: must be 1 or more"),
        ({"mode": "diloco", "tau": 10**6}, "--tau 1000000: .* with --batches 4 make at most 1,000,000 micro-batches"),
        ({"mode": "diloco", "batches": 5000}, "--batches 5000: .* 4,096 at most"),
        ({"mode": "diloco", "outer_lr": 0.0}, "--outer-lr 0: must be above 0"),
        ({"mode": "diloco", "outer_lr": float("nan")}, "--outer-lr nan: must be above 0"),
        ({"mode": "diloco", "nesterov_momentum": 1.0}, "--nesterov-momentum 1: must be at least 0 and below 1"),
        ({"mode": "diloco", "warmup_sync": 1.0}, "--warmup-sync 1: must be at least 0 and below 1"),
        ({"codec": CodecConfig(feedback=1.5)}, "--codec.feedback 1.5: must lie between 0"),
        ({"codec": CodecConfig(up="fp8")}, "--codec.up fp8: unknown; known: fp32, bf16, int8"),
        ({"codec": CodecConfig(down="fp32+entropy")}, "--codec.down fp32.entropy: unknown; known: fp32"),
        (
            {"codec": CodecConfig(down="2bit"), "broadcast": "full"},
            "--codec.down 2bit: --broadcast full .*fp32 and bf16",
        ),
        ({"digest_every": -1}, "--digest-every -1: must be 0 or more"),
    ],
)
def test_mistakes_are_one_line_with_the_flag(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="^" + said) as error:
        ValidatorConfig(**flags).check_rounds()
    assert "\n" not in str(error.value)
