"""Buffers travel up beside the gradient: a batch norm trained by the marketplace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pilot.aggregation.buffers import merge_buffers
from pilot.codec import buffers as buffers_codec
from pilot.codec import load_codec
from pilot.simulation.virtual_time import run
from pilot.training.diloco import DiLoCo
from pilot.training.learner import Learner
from pilot.training.plain_loop import train
from protocol import Fault, ProtocolError
from tasks.quadratic import Quadratic, QuadraticConfig
from tests.tiny import CPU, MINERS, OPTIMIZER, TERMS, Place, equal, make_place, parameters, play, receipts

DIMENSION = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIMENSION)
        self.head = nn.Linear(DIMENSION, 1, bias=False)


class Normed(Quadratic):
    """Rows of noise through a batch norm; the loss is the square of a linear head."""

    floats_only = False

    def build_model(self, device: torch.device | str, initial: bool) -> nn.Module:
        torch.manual_seed(0)
        return Net().to(device)

    def buffers(self, model: nn.Module) -> dict[str, torch.Tensor]:
        found = dict(model.named_buffers())
        return {name: b for name, b in found.items() if b.is_floating_point() or not self.floats_only}

    def batch(self, index: int) -> Any:
        noise, _ = self._noise
        return torch.from_numpy(noise[self._orders.batch(index, self.shape.batch_size)])

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        model.train()
        out: torch.Tensor = model.head(model.norm(batch))
        return (out - 1).square().sum()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            return {"val_loss": float((model.head(model.norm(self.batch(0))) - 1).square().mean())}


class Floats(Normed):
    floats_only = True


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Normed:
    return make_task(Normed, tmp_path, monkeypatch)


def make_task(cls: type[Normed], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Normed:
    monkeypatch.setattr("pilot.worker.replica.load_task", lambda name: cls)
    config = QuadraticConfig(dimension=DIMENSION, batch_size=4, samples=64)
    return cls.prepare(config, seed=0, cache=folder / "cache")


def state(place: Place) -> dict[str, torch.Tensor]:
    buffers = place.market.task.buffers(place.market.learner.model)
    return {**parameters(place.market), **{name: b.clone() for name, b in buffers.items()}}


DILOCO = DiLoCo(tau=2, batches=1, outer_lr=0.7, momentum=0.9, keep=False, warmup_rounds=0, rounds=20)


def policy(mode: str) -> dict[str, Any]:
    if mode == "gradient":
        return {}
    optimizer = {name: getattr(OPTIMIZER, name) for name in OPTIMIZER.__dataclass_fields__}
    return {"diloco": DiLoCo(**{**DILOCO.__dict__, "optimizer": optimizer}), "batches": 1}


def test_the_validator_has_the_mean_of_the_miners_buffers(tmp_path: Path, task: Normed) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task)
        await play(place.market, 1)
        found = []
        for hotkey, receipt in sorted(receipts(place.store, 0).items()):
            payload = place.store.payload(0, hotkey)
            shapes = {name: b.shape for name, b in task.buffers(place.market.learner.model).items()}
            found.append((receipt.work, buffers_codec.buffers(payload, shapes)))
        (first, a), (second, b) = found
        assert not torch.equal(a["norm.running_mean"], b["norm.running_mean"])
        own = task.buffers(place.market.learner.model)
        for name in ("norm.running_mean", "norm.running_var"):
            assert torch.allclose(own[name], (first * a[name] + second * b[name]) / (first + second))
        assert own["norm.num_batches_tracked"] == 2  # of both

    run(main())


@pytest.mark.parametrize("mode", ["gradient", "diloco"])
@pytest.mark.parametrize("broadcast", ["full", "delta"])
def test_a_replay_and_every_replica_are_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, broadcast: str
) -> None:
    task = make_task(Floats if broadcast == "delta" else Normed, tmp_path, monkeypatch)
    how = {**policy(mode), "broadcast": broadcast}
    if broadcast == "delta":
        how |= {"codec_down": "bf16", "digest_every": 1}  # each order names the digest of the state, buffers too

    async def until(folder: Path, rounds: int) -> dict[str, torch.Tensor]:
        place = make_place(folder, task, codec_up="int8", **how)
        await place.market.replay(0)
        await play(place.market, rounds)
        for number in range(rounds):
            assert {r.verdict for r in receipts(place.store, number).values()} == {"ACCEPTED"}
        place.store.close()
        return state(place)

    async def main() -> None:
        whole = await until(tmp_path / "whole", 4)
        await until(tmp_path / "parts", 2)
        assert equal(await until(tmp_path / "parts", 4), whole)

    run(main())


def test_with_one_miner_it_is_the_plain_loop_bit_by_bit(tmp_path: Path, task: Normed) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, miners=MINERS[:1])
        await play(place.market, 3)
        plain = Learner(task, OPTIMIZER, CPU)
        steps = [(r.done, record.settings) for record in place.store.committed(0)
                 for r in receipts(place.store, record.round).values()]  # fmt: skip
        assert len(list(train(plain, steps))) == 3
        trained = {**{n: p.detach() for n, p in plain.parameters.items()}, **task.buffers(plain.model)}
        assert equal(state(place), trained)
        assert trained["norm.num_batches_tracked"] == 3 * TERMS.batches

    run(main())


def test_deltas_refuse_buffers_of_integers(task: Normed) -> None:
    with pytest.raises(ValueError, match=r"--broadcast delta: buffer norm.num_batches_tracked holds integers"):
        Learner(task, OPTIMIZER, CPU, "delta", "bf16")


# --- the bytes --------------------------------------------------------------------------------------------------------

BUFFERS = {"mean": torch.tensor([1.5, -2.0]), "tracked": torch.tensor(7)}
SHAPES = {name: b.shape for name, b in BUFFERS.items()}


def test_buffers_come_back_and_the_gradient_is_untouched() -> None:
    gradient = load_codec("int8").encode({"w": torch.randn(10, 10)})
    payload = buffers_codec.append(gradient, BUFFERS)
    assert bytes(buffers_codec.gradient(payload, SHAPES)) == bytes(gradient)
    found = buffers_codec.buffers(payload, SHAPES)
    assert equal(found, {"mean": BUFFERS["mean"], "tracked": torch.tensor(7.0)})
    assert len(payload) == len(bytes(gradient)) + buffers_codec.largest(SHAPES)


def test_without_buffers_a_payload_is_the_codecs_own() -> None:
    payload = b"any"
    assert buffers_codec.append(payload, {}) is payload
    assert buffers_codec.gradient(payload, {}) is payload
    assert (buffers_codec.largest({}), buffers_codec.buffers(payload, {})) == (0, {})


def test_wrong_sizes_and_numbers_are_refused() -> None:
    good = bytes(buffers_codec.append(b"gradient", BUFFERS))
    with pytest.raises(ProtocolError, match="its buffers alone take"):
        buffers_codec.gradient(good[:20], SHAPES)
    with pytest.raises(ProtocolError):
        buffers_codec.buffers(good[:-1], SHAPES)
    bad = buffers_codec.append(b"gradient", {**BUFFERS, "mean": torch.tensor([float("nan"), 0.0])})
    with pytest.raises(ProtocolError) as caught:
        buffers_codec.buffers(bad, SHAPES)
    assert caught.value.fault is Fault.NONFINITE


def test_integers_become_the_largest_and_floats_the_weighted_mean() -> None:
    other = {"mean": torch.tensor([3.5, 0.0]), "tracked": torch.tensor(4.0)}
    merged = merge_buffers([3, 1], [{"mean": BUFFERS["mean"], "tracked": torch.tensor(7.0)}, other], BUFFERS)
    assert equal(merged, {"mean": torch.tensor([2.0, -1.5]), "tracked": torch.tensor(7.0)})
