"""A miner's inner steps: bit for bit those of a plain loop, by a schedule over the whole run, partial ones too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import nn

from nanochat.config import MuonAdamWConfig
from pilot.training.gradient import GradientAccumulator
from pilot.training.inner_loop import AccumulatorFactory, InnerLoop
from protocol import Fault, InnerSteps, Order, ProtocolError, Range, Update, VersionStep
from tasks import Task
from tasks.gpt2 import GPT2
from tasks.nanochat import NanochatConfig
from tasks.optimizer import AdamWConfig, optimizer_from_order
from tests.tiny import CPU, MINERS, equal, tiny_task, write_text

torch.set_num_threads(1)
ADAMW = AdamWConfig(lr=3e-3, warmup=3, clip=0.5)
MUON = MuonAdamWConfig(warmup_steps=3)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def nanochat(tmp_path_factory: pytest.TempPathFactory) -> Task:
    pytest.importorskip("rustbpe", reason="the tokenizer is not built: no cargo")
    from tasks.nanochat import Nanochat

    folder = tmp_path_factory.mktemp("nanochat")
    flags = {"depth": 2, "head_dim": 16, "aspect_ratio": 16, "seq_len": 32, "batch_size": 2, "tokenizer": "byte"}
    config = NanochatConfig(text=str(write_text(folder / "text.txt")), validation=0.1, crop="keep", **flags)  # type: ignore[arg-type]
    return Nanochat.prepare(config, seed=0, cache=folder / "cache")


def inner_of(config: AdamWConfig | MuonAdamWConfig, **changes: Any) -> InnerSteps:
    return InnerSteps(
        **{"batches": 2, "first_step": 5, "steps": 20, "keep": False, "optimizer": asdict(config)} | changes
    )


def start(task: Task, inner: InnerSteps, optimizer: torch.optim.Optimizer | None = None) -> InnerLoop:
    model = task.build_model(CPU, initial=True)
    return InnerLoop(task, model, inner, values(task, model), optimizer)


def values(task: Task, model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in task.trainable(model).items()}


def plain_adamw(task: Task, config: AdamWConfig, steps: Sequence[Sequence[int]], first: int, of: int) -> nn.Module:
    """torch's own optimizer in a loop that a textbook would have: a step over each of the lists of micro-batches."""
    model = task.build_model(CPU, initial=True)
    wide, narrow = ([p for _, p in sorted(model.named_parameters()) if (p.ndim < 2) == n] for n in (False, True))
    groups = [{"params": wide, "weight_decay": config.weight_decay}, {"params": narrow, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=config.eps, fused=True)
    for step, indices in enumerate(steps, first):
        optimizer.zero_grad()
        for index in indices:
            task.loss(model, task.batch(index)).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad /= sum(task.count(index) for index in indices)
        nn.utils.clip_grad_norm_([p for _, p in sorted(model.named_parameters())], config.clip)
        for group in optimizer.param_groups:
            group["lr"] = task.settings(config, step, of, 1)["lr"]
        optimizer.step()
    return model


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [[[0, 1], [2, 3], [7, 8]], [[0, 1], [4]]], ids=["whole", "partial"])
def test_steps_are_bitwise_those_of_plain_adamw(task: GPT2, steps: list[list[int]]) -> None:
    """With a last step over one micro-batch of two, that one is by its own mean."""
    loop = start(task, inner_of(ADAMW))
    before = dict(loop.base)
    for index in (i for indices in steps for i in indices):
        loop.add(index)
    work = loop.result()
    plain = values(task, plain_adamw(task, ADAMW, steps, first=5, of=20))
    assert equal(values(task, loop.model), plain)
    assert equal(work.gradient, {name: before[name] - p for name, p in plain.items()})  # downhill is model - gradient
    assert any(g.abs().max() > 0 for g in work.gradient.values())
    assert [i for r in work.done for i in range(*r)] == [i for indices in steps for i in indices]
    assert work.count == sum(task.count(i) for r in work.done for i in range(*r))
    assert loop.steps == len(steps)


def test_steps_are_bitwise_those_of_plain_muon(nanochat: Task) -> None:
    loop = start(nanochat, inner_of(MUON))
    for index in range(6):
        loop.add(index)
    moved = loop.result().gradient

    model = nanochat.build_model(CPU, initial=True)
    optimizer = nanochat.optimizer(model, MUON)
    for step in range(3):
        for index in (2 * step, 2 * step + 1):
            nanochat.loss(model, nanochat.batch(index)).backward()
        units = 2 * nanochat.count(0)
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= units
        settings = nanochat.settings(MUON, 5 + step, 20, units)
        for group in optimizer.param_groups:
            for key in ("lr", "momentum", "weight_decay"):
                if f"{key}_scale" in group:
                    group[key] = settings[key] * group[f"{key}_scale"]
        optimizer.step()
        optimizer.zero_grad()
    assert equal(values(nanochat, loop.model), values(nanochat, model))
    assert equal(moved, {name: loop.base[name] - p for name, p in values(nanochat, model).items()})


def test_the_schedule_goes_by_the_step_of_the_whole_run(task: GPT2) -> None:
    loop = start(task, inner_of(ADAMW, batches=1, first_step=1, steps=8))
    rates = []
    for index in range(9):
        loop.add(index)
        rates.append(loop.optimizer.param_groups[0]["lr"])
    assert rates == [task.settings(ADAMW, step, 8, 1)["lr"] for step in range(1, 10)]
    assert rates[0] < max(rates) > rates[-1] == rates[-2]  # rises, falls, and stays at its last


def test_the_last_partial_step_is_made_once(task: GPT2) -> None:
    loop = start(task, inner_of(ADAMW, batches=4096))
    loop.add(3)
    first, steps = loop.result(), loop.steps
    assert equal(first.gradient, loop.result().gradient)
    assert loop.steps == steps == 1


# --- from order to order ----------------------------------------------------------------------------------------------


def order_of(task: Task, inner: InnerSteps | None, run: str = "tiny") -> Order:
    update = Update(base=None, steps=(VersionStep(kind="state", codec="fp32", digest="0" * 64, bytes=1),))
    return Order(
        run=run, round=3, hotkey=MINERS[0].ss58_address, version=update.version, update=update, state_digest=None,
        task=task.spec(), data=task.data_spec, ranges=(Range(0, 4),), deadline_s=60.0, staleness=0, codec_up="fp32",
        codec_down="fp32", inner_steps=inner,
    )  # fmt: skip


def begin(factory: AccumulatorFactory, task: Task, model: nn.Module, order: Order) -> InnerLoop:
    loop = factory.create(order, task, model, lambda: values(task, model))
    assert isinstance(loop, InnerLoop)
    return loop


def work(factory: AccumulatorFactory, task: Task, model: nn.Module, order: Order, indices: Sequence[int]) -> InnerLoop:
    loop = begin(factory, task, model, order)
    for index in indices:
        loop.add(index)
    loop.result()
    return loop


def test_an_optimizer_that_is_kept_goes_on(task: GPT2) -> None:
    """Two orders of two steps are then four steps of plain AdamW; where it is reset they are not."""
    model, factory = task.build_model(CPU, initial=True), AccumulatorFactory()
    for first, indices in ((5, range(4)), (7, range(4, 8))):
        work(factory, task, model, order_of(task, inner_of(ADAMW, keep=True, first_step=first)), indices)
    plain = values(task, plain_adamw(task, ADAMW, [[0, 1], [2, 3], [4, 5], [6, 7]], first=5, of=20))
    assert equal(values(task, model), plain)

    other, fresh = task.build_model(CPU, initial=True), AccumulatorFactory()
    for first, indices in ((5, range(4)), (7, range(4, 8))):
        work(fresh, task, other, order_of(task, inner_of(ADAMW, first_step=first)), indices)
    assert not equal(values(task, other), plain)


@pytest.mark.parametrize("what", ["reset", "run", "flags", "model"])
def test_an_optimizer_is_kept_for_the_same_run_flags_and_model_only(task: GPT2, what: str) -> None:
    model, factory = task.build_model(CPU, initial=True), AccumulatorFactory()
    order = order_of(task, inner_of(ADAMW, keep=True))
    before = work(factory, task, model, order, [0, 1]).optimizer
    assert (
        factory.create(order_of(task, None), task, model, dict).__class__ is GradientAccumulator
    )  # a gradient round between
    assert begin(factory, task, model, order).optimizer is before
    if what == "model":
        model = task.build_model(CPU, initial=True)
    changed = {
        "reset": order_of(task, inner_of(ADAMW)),
        "run": order_of(task, inner_of(ADAMW, keep=True), run="other"),
        "flags": order_of(task, inner_of(replace(ADAMW, beta1=0.5), keep=True)),
        "model": order,
    }
    assert not begin(factory, task, model, changed[what]).optimizer.state
    if what != "model":
        assert not begin(factory, task, model, order).optimizer.state  # the one before is gone


def test_a_kept_optimizer_gets_over_nan(task: GPT2) -> None:
    model, factory = task.build_model(CPU, initial=True), AccumulatorFactory()
    loop = begin(factory, task, model, order_of(task, inner_of(ADAMW, keep=True)))
    loop.add(0)
    for p in loop.parameters.values():
        assert p.grad is not None
        p.grad.fill_(torch.nan)
    with pytest.raises(ProtocolError, match="1 inner steps led to NaN or infinity") as error:
        loop.result()
    assert error.value.fault is Fault.NONFINITE
    with torch.no_grad():
        for name, p in loop.parameters.items():
            p.copy_(loop.base[name])
    work(factory, task, model, order_of(task, inner_of(ADAMW, keep=True)), [0, 1])


def ended(loop: InnerLoop) -> Fault | None:
    try:
        loop.result()
    except ProtocolError as error:
        return error.fault
    return None


# --- what an order may say of it --------------------------------------------------------------------------------------

JUNK: list[dict[str, object]] = [
    {},
    {"lr": 1.0},
    {**asdict(ADAMW), "amsgrad": True},
    {**asdict(ADAMW), "lr": "1"},
    {**asdict(ADAMW), "lr": True},
    {**asdict(ADAMW), "lr": -1.0},
    {**asdict(ADAMW), "lr": 10**400},
    {**asdict(ADAMW), "lr": 1e300},
    {**asdict(ADAMW), "warmup": 10.5},
    {**asdict(ADAMW), "warmup": 10**400},
    {**asdict(ADAMW), "beta1": 1},
    {**asdict(ADAMW), "eps": float("nan")},
    asdict(MUON),
]


@pytest.mark.parametrize("parameters", JUNK, ids=range(len(JUNK)))
def test_flags_that_no_optimizer_of_the_task_has_are_malformed(parameters: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match=r"^optimizer of task gpt2: ") as error:
        optimizer_from_order("gpt2", AdamWConfig, parameters)
    assert error.value.fault is Fault.MALFORMED


def test_flags_come_back_as_they_went() -> None:
    assert optimizer_from_order("gpt2", AdamWConfig, asdict(ADAMW)) == ADAMW
    assert optimizer_from_order("nanochat", MuonAdamWConfig, asdict(MUON)) == MUON
    assert optimizer_from_order("gpt2", AdamWConfig, {**asdict(ADAMW), "lr": 1}).lr == 1.0  # JSON's number


@pytest.mark.parametrize("flag", ["lr", "eps", "weight_decay", "clip"])
def test_the_largest_flags_move_a_model_somewhere_and_raise_nothing_else(task: GPT2, flag: str) -> None:
    loop = start(task, inner_of(replace(ADAMW, **{flag: 1e30}), batches=1))
    for index in range(3):
        loop.add(index)
    assert ended(loop) in (None, Fault.NONFINITE)


@pytest.mark.parametrize("flag", list(asdict(MUON)))
def test_the_largest_flags_of_muon_raise_nothing_else(nanochat: Task, flag: str) -> None:
    largest = {"warmup_steps": 1 << 60, "warmdown_ratio": 1.0, "final_lr_frac": 1.0}.get(flag, 1e30)
    loop = start(nanochat, inner_of(replace(MUON, **{flag: largest}), batches=1, steps=0, first_step=1 << 50))
    loop.add(0)
    assert ended(loop) in (None, Fault.NONFINITE)
