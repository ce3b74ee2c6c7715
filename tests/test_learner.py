"""The validator's model: its steps against torch's own, its state through a snapshot, its versions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from typing_extensions import Buffer

from pilot.codec import load_codec
from pilot.training.learner import Learner
from pilot.worker.replica import apply_step
from protocol import BlobRef, ProtocolError, digest, next_version
from tasks.optimizer import AdamWConfig, adamw
from tests.tiny import CPU, OPTIMIZER
from tests.updates import whole_state

FP32 = load_codec("fp32")
Tensors = dict[str, torch.Tensor]


class Norms:
    """A model with matrices, vectors, and buffers that travel; of a task, what a learner uses."""

    def __init__(self, width: int = 6) -> None:
        self.width = width

    def build_model(self, device: torch.device | str, initial: bool) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0 if initial else 1)
            return nn.Sequential(nn.Linear(4, self.width), nn.BatchNorm1d(self.width), nn.Linear(self.width, 2))

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return dict(sorted(model.named_parameters()))

    def buffers(self, model: nn.Module) -> Tensors:
        return {name: b for name, b in sorted(model.named_buffers()) if b.is_floating_point()}

    def optimizer(self, model: nn.Module, config: AdamWConfig) -> torch.optim.Optimizer:
        return adamw(model, config)


def make_learner(config: AdamWConfig = OPTIMIZER, width: int = 6, codec: str = "fp32") -> Learner:
    return Learner(Norms(width), config, CPU, "full", codec)  # type: ignore[arg-type]


def gradients(learner: Learner, steps: int, seed: int = 0, scale: float = 1.0) -> Iterator[Tensors]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield {n: scale * torch.randn(p.shape, generator=generator) for n, p in learner.parameters.items()}


def train(learner: Learner, steps: int, seed: int = 0) -> None:
    for gradient in gradients(learner, steps, seed):
        learner.step(gradient, {"lr": 1e-2})
        for b in learner.task.buffers(learner.model).values():
            b.add_(0.125)  # as a round that aggregates buffers would
        learner.advance()


def saved(learner: Learner) -> tuple[dict[str, str], Tensors]:
    """A snapshot: through bytes, so nothing is shared with the learner."""
    header, tensors = learner.state()
    return header, {name: t.clone() for name, t in tensors.items()}


def same(a: Learner, b: Learner) -> bool:
    (header_a, state_a), (header_b, state_b) = a.state(), b.state()
    equal = state_a.keys() == state_b.keys() and all(torch.equal(state_a[k], state_b[k]) for k in state_a)
    return equal and header_a == header_b and blob_of(a) == blob_of(b) and a.update == b.update


# --- a step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clip", "scale"), [(1.0, 1.0), (1.0, 1e-3), (0.0, 1.0)])
def test_step_is_clipping_and_torchs_adamw(clip: float, scale: float) -> None:
    """Against torch's plainest AdamW on a copy, with the clipping done by hand."""
    config = replace(OPTIMIZER, clip=clip, weight_decay=0.1)
    learner = make_learner(config)
    copies = {n: p.detach().clone().requires_grad_() for n, p in learner.parameters.items()}
    groups = [
        {"params": [p for p in copies.values() if p.ndim == ndim], "weight_decay": decay}
        for ndim, decay in ((2, 0.1), (1, 0.0))
    ]
    options: dict[str, Any] = {
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "foreach": False,
        "fused": False,
    }
    reference = torch.optim.AdamW(groups, **options)
    for step, gradient in enumerate(gradients(learner, 5, scale=scale), start=1):
        norm = float(torch.cat([g.flatten() for g in gradient.values()]).norm())
        assert (norm > 1) == (scale == 1.0)
        for name, p in copies.items():
            p.grad = gradient[name] * (min(1.0, clip / norm) if clip else 1.0)
        for group in reference.param_groups:
            group["lr"] = 1e-2 / step
        reference.step()
        learner.step(gradient, {"lr": 1e-2 / step})
        for name, p in learner.parameters.items():
            torch.testing.assert_close(p, copies[name], rtol=1e-5, atol=1e-6)


def test_step_is_deterministic_and_depends_on_every_gradient() -> None:
    one, other = make_learner(), make_learner()
    train(one, 3)
    train(other, 3)
    assert same(one, other)
    for name in one.parameters:
        before = one.parameters[name].detach().clone()
        gradient = {n: torch.zeros_like(p) for n, p in one.parameters.items()}
        one.step(gradient | {name: torch.ones_like(before)}, {"lr": 1e-2})
        assert not torch.equal(one.parameters[name], before)


# --- versions ---------------------------------------------------------------------------------------------------------


def test_versions_are_the_protocols_chain_of_the_broadcast_bytes() -> None:
    learner = make_learner()
    version = next_version(None, digest("state", FP32.encode(state_of(learner))))
    assert learner.version == version
    assert learner.update.base is None
    for gradient in gradients(learner, 3):
        learner.step(gradient, {"lr": 1e-2})
        assert learner.version == version  # until it is encoded
        learner.advance()
        blob = FP32.encode(state_of(learner))
        assert learner.version == next_version(version, digest("state", blob))
        assert learner.update == whole_state(
            BlobRef(kind="state", digest=digest("state", blob), bytes=memoryview(blob).nbytes), version
        )
        assert blob_of(learner) == blob
        version = learner.version


def blob_of(learner: Learner) -> Buffer:
    [blob] = learner.blobs.values()
    return blob


def state_of(learner: Learner) -> Tensors:
    return {**learner.parameters, **learner.task.buffers(learner.model)}


# --- snapshots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("steps", [0, 3])
def test_state_continues_bit_identically(steps: int, codec: str) -> None:
    """Also where the broadcast is coarser than the parameters: it is the exact ones that are kept."""
    learner, restored = make_learner(codec=codec), make_learner(codec=codec)
    train(learner, steps)
    train(restored, 2, seed=5)  # it has a past of its own, which must not shine through
    restored.load_state(*saved(learner))
    assert same(restored, learner)
    train(learner, 2, seed=7)
    train(restored, 2, seed=7)
    assert same(restored, learner)


def test_restored_learner_shares_nothing_with_the_snapshot() -> None:
    learner, restored = make_learner(), make_learner()
    train(learner, 1)
    header, tensors = saved(learner)
    before = {name: t.clone() for name, t in tensors.items()}
    restored.load_state(header, tensors)
    train(restored, 1)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_snapshot_of_another_model_is_refused_and_changes_nothing() -> None:
    """Wider, with a tensor more, with one less: each a ValueError that names the tensor."""
    learner, wider = make_learner(), make_learner(width=7)
    train(learner, 1)
    before = saved(learner)
    header, tensors = saved(learner)
    others = [
        ("buffer/1.running_mean", saved(wider)[1]),
        ("model/3.weight", tensors | {"model/3.weight": torch.ones(2)}),
        ("model/0.weight", tensors | {"model/0.weight": torch.ones(1)}),  # would broadcast
        *(
            (lost, {n: t for n, t in tensors.items() if n != lost})
            for lost in ("model/2.weight", "buffer/1.running_var")
        ),
    ]
    for name, other in others:
        with pytest.raises(ValueError, match=f"snapshot: {name}"):
            learner.load_state(header, other)
        assert learner.version == before[0]["version"]
        assert all(torch.equal(t, before[1][n]) for n, t in learner.state()[1].items())


def test_snapshot_whose_state_is_not_its_versions_is_refused() -> None:
    learner = make_learner()
    header, tensors = saved(learner)
    tensors["model/0.bias"][0] += 1
    with pytest.raises(ValueError, match="snapshot: its state makes version"):
        learner.load_state(header, tensors)


# --- replicas ---------------------------------------------------------------------------------------------------------


def tensors_of(learner: Learner, model: nn.Module) -> Tensors:
    return {n: p.detach() for n, p in learner.task.trainable(model).items()} | learner.task.buffers(model)


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_replica_is_what_was_broadcast(codec: str) -> None:
    learner = make_learner(codec=codec)
    train(learner, 2)
    model = learner.task.build_model(CPU, initial=False)
    replica = tensors_of(learner, model)
    apply_step(learner.update.steps[-1], blob_of(learner), replica)
    rounded = {"fp32": torch.float32, "bf16": torch.bfloat16}[codec]
    for name, t in state_of(learner).items():
        assert torch.equal(replica[name], t.to(rounded).to(torch.float32))
    assert FP32.encode(replica) == blob_of(learner) or codec == "bf16"


def test_who_knows_only_fp32_has_the_model_of_the_others() -> None:
    learner = make_learner(codec="bf16")
    train(learner, 2)
    [step] = learner.update.steps
    others, its = ({name: torch.zeros_like(t) for name, t in state_of(learner).items()} for _ in range(2))
    apply_step(step, blob_of(learner), others)
    [snapshot] = learner.snapshot_now().snapshots
    assert snapshot.step.codec == "fp32"
    apply_step(snapshot.step, learner.blobs[snapshot.blob.digest], its)
    assert all(torch.equal(its[name], others[name]) for name in others)


class Transposed(Norms):
    """A model with a matrix that lies in memory column by column."""

    def build_model(self, device: torch.device | str, initial: bool) -> nn.Module:
        model = super().build_model(device, initial)
        for p in model.parameters():
            if p.ndim == 2:
                p.data = p.data.t().contiguous().t()
        return model


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk64"])
def test_deltas_of_tensors_that_do_not_lie_row_by_row(codec: str) -> None:
    learner = Learner(Transposed(), OPTIMIZER, CPU, "delta", codec)  # type: ignore[arg-type]
    assert not all(t.is_contiguous() for t in learner.parameters.values())
    train(learner, 2)
    assert learner.replica is not None
    for name, t in learner.replica.items():
        assert t.is_contiguous()
        torch.testing.assert_close(t, state_of(learner)[name].detach(), rtol=0, atol=1e-2 if codec == "int8" else 1)


def test_replica_takes_no_other_tensors() -> None:
    learner = make_learner()
    state = {name: t.detach() for name, t in state_of(learner).items()}
    model = learner.task.build_model(CPU, initial=False)
    before = {name: p.detach().clone() for name, p in learner.task.trainable(model).items()}
    for wrong in (
        {n: t for n, t in state.items() if n != "1.running_var"},
        state | {"3.weight": torch.ones(2)},
        state | {"0.bias": torch.ones(7)},
    ):
        with pytest.raises(ProtocolError, match="tensor"):
            apply_step(learner.update.steps[-1], FP32.encode(wrong), tensors_of(learner, model))
        assert all(torch.equal(p, before[n]) for n, p in learner.task.trainable(model).items())
