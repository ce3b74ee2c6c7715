"""What miners have of the model: bit-equal to the validator's replica wherever it is, and what it lacks comes later."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import Buffer

from nanochat.config import GPTConfig
from nanochat.gpt import GPT
from pilot.codec import load_codec
from pilot.storage.blob_store import FileBlobStore
from pilot.training.learner import Learner, state_digest
from pilot.worker.replica import apply_step
from protocol import Update, VersionStep, digest
from tests.test_learner import Norms, gradients, tensors_of
from tests.tiny import CPU, OPTIMIZER

CODECS = ["2bit", "ternary-rc", "int8", "bf16", "topk64"]
Tensors = dict[str, torch.Tensor]


def make_learner(codec: str, width: int = 70, **options: Any) -> Learner:
    return Learner(Norms(width), OPTIMIZER, CPU, "delta", codec, **options)  # type: ignore[arg-type]


def train(learner: Learner, steps: int, seed: int = 0) -> None:
    for gradient in gradients(learner, steps, seed):
        learner.step(gradient, {"lr": 1e-2})
        for b in learner.task.buffers(learner.model).values():
            b.add_(0.125)
        learner.advance()


def replica_of(learner: Learner) -> Tensors:
    assert learner.replica is not None
    return learner.replica


def exact_of(learner: Learner) -> Tensors:
    return tensors_of(learner, learner.model)


def bits(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return bytes(load_codec("fp32").encode(tensors))


def join(learner: Learner, into: Tensors, snapshot: bool = False) -> None:
    """From a state on the way, the oldest or the newest, by the deltas after it."""
    update = learner.update
    wholes = [(at, s.step) for at, s in ((s.steps, s) for s in update.snapshots)]
    wholes += [(at, step) for at, step in enumerate(update.steps, 1) if step.kind == "state"]
    at, whole = (max if snapshot else min)(wholes, key=lambda found: found[0])
    for step in (whole, *update.steps[at:]):
        apply_step(step, learner.blobs[step.digest], into)


# --- the validator's --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_replica_is_what_the_deltas_make(codec: str) -> None:
    """By every way there is, over several snapshots; and it is what the proof says."""
    learner = make_learner(codec)
    for round in range(24):
        train(learner, 1, seed=round)
        for newest in (False, True):
            model = learner.task.build_model(CPU, initial=False)
            own = tensors_of(learner, model)
            join(learner, own, newest)
            assert bits(own) == bits(replica_of(learner))
            assert state_digest(own) == learner.state_digest() == digest("state", bits(replica_of(learner)))
    assert learner.update.snapshots[-1].steps > 0


@pytest.mark.parametrize("codec", ["2bit", "ternary-rc", "int4"])
def test_what_a_delta_loses_comes_later(codec: str) -> None:
    """Once the exact parameters rest, the replica comes as near to them as one likes."""
    learner = make_learner(codec)
    train(learner, 5)

    def apart() -> float:
        exact, replica = exact_of(learner), replica_of(learner)
        return max(float((exact[n] - replica[n]).abs().max()) for n in exact)

    far = apart()
    assert far > 0
    for _ in range(40):
        learner.advance()
    assert apart() < far / 100


def test_the_replicas_model_changes_places_with_the_exact_one() -> None:
    learner = make_learner("1bit")
    train(learner, 3)
    exact, replica = bits(exact_of(learner)), bits(replica_of(learner))
    assert exact != replica
    memory = [p.data_ptr() for p in learner.parameters.values()]
    with learner.replica_model() as model:
        assert bits(tensors_of(learner, model)) == replica
    assert bits(exact_of(learner)) == exact
    assert bits(replica_of(learner)) == replica
    assert memory == [p.data_ptr() for p in learner.parameters.values()]
    whole = Learner(Norms(), OPTIMIZER, CPU)  # type: ignore[arg-type]
    before = bits(exact_of(whole))
    with whole.replica_model() as model:
        assert bits(tensors_of(whole, model)) == before


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_outer_step_is_nesterovs(momentum: float) -> None:
    """By hand: m' = momentum m + g; p' = p - lr (g + momentum m'). No clipping; the inner optimizer's state stays."""
    learner = make_learner("2bit")
    train(learner, 1)
    moments = {n: t.clone() for n, t in learner.state()[1].items() if n.startswith("optimizer/")}
    expected = {n: p.detach().clone() for n, p in learner.parameters.items()}
    velocity = {n: torch.zeros_like(p) for n, p in expected.items()}
    for gradient in gradients(learner, 4, seed=3, scale=30.0):
        learner.step(gradient, {"outer_lr": 0.5, "outer_momentum": momentum})
        for name, g in gradient.items():
            velocity[name] = momentum * velocity[name] + g
            expected[name] -= 0.5 * (g + momentum * velocity[name])
            torch.testing.assert_close(learner.parameters[name].detach(), expected[name], rtol=1e-5, atol=1e-4)
    after = {n: t for n, t in learner.state()[1].items() if n.startswith("optimizer/")}
    assert after.keys() == moments.keys()
    assert all(torch.equal(after[n], moments[n]) for n in moments)
    assert any(n.startswith("outer/momentum_buffer/") for n in learner.state()[1]) == bool(momentum)


@pytest.mark.parametrize("steps", [0, 3, 23])
def test_a_restart_makes_the_same_chain_bit_for_bit(tmp_path: Path, steps: int) -> None:
    """From a snapshot, with the chain's files; what has come since is made again, and the same."""
    learner = make_learner("ternary-rc", keep=FileBlobStore(tmp_path / "versions"))
    settings = [{"lr": 1e-2}, {"outer_lr": 0.3, "outer_momentum": 0.6}]

    def go_on(other: Learner, codec: str) -> None:
        other.codec = codec
        for number, gradient in enumerate(gradients(other, 10, seed=9)):
            other.step(gradient, settings[number % 2])
            other.advance()

    train(learner, steps)
    for gradient in gradients(learner, 1, seed=5):
        learner.step(gradient, settings[1])
    learner.advance()
    header, tensors = learner.state()
    kept = {name: t.clone() for name, t in tensors.items()}
    go_on(learner, "int4")
    updates, exact, replica = learner.update, bits(exact_of(learner)), bits(replica_of(learner))
    again = make_learner("ternary-rc", keep=FileBlobStore(tmp_path / "versions"))
    train(again, 2, seed=7)  # it has a past of its own
    again.load_state(header, kept)
    assert again.update == Update.model_validate_json(header["update"])
    go_on(again, "int4")
    assert (again.update, bits(exact_of(again)), bits(replica_of(again))) == (updates, exact, replica)
    assert again.blobs.keys() >= {ref.digest for ref in updates.refs}
    assert {n: bytes(b) for n, b in again.find([updates]).items()} == {n: bytes(learner.blobs[n]) for n in again.blobs}


def test_a_snapshot_without_its_replica_is_refused() -> None:
    learner = make_learner("2bit")
    header, tensors = learner.state()
    with pytest.raises(ValueError, match=r"snapshot: replica/0\.bias does not fit this model"):
        learner.load_state(header, {n: t for n, t in tensors.items() if n != "replica/0.bias"})


# --- bit-equal everywhere ---------------------------------------------------------------------------------------------

DELTAS = 200
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
SHAPES: Shapes = (("a", (700, 130)), ("b", (130,)), ("c", (3, 130)), ("d", (3,)))


@cache
def drifting(codec: str, shapes: Shapes) -> tuple[Tensors, list[Buffer]]:
    """Parameters, and `DELTAS` deltas that follow them on a random walk."""
    generator, found = torch.Generator().manual_seed(1), load_codec(codec)
    start = {n: torch.randn(shape, generator=generator) for n, shape in shapes}
    exact, made, deltas = dict(start), {n: t.clone() for n, t in start.items()}, []
    for _ in range(DELTAS):
        exact = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in exact.items()}
        deltas.append(found.encode({n: exact[n] - made[n] for n in exact}))
        found.add(deltas[-1], made)
    return start, deltas


def followed(codec: str, into: Tensors) -> bytes:
    """Where the deltas lead, as a miner goes."""
    start, deltas = drifting(codec, tuple((n, tuple(t.shape)) for n, t in into.items()))
    for name, t in start.items():
        into[name].copy_(t)
    for data in deltas:
        step = VersionStep(kind="delta", codec=codec, digest=digest("delta", data), bytes=memoryview(data).nbytes)
        apply_step(step, data, into)
    return bits(into)


def on(device: str) -> Tensors:
    return {name: torch.empty(shape, device=device) for name, shape in SHAPES}


@pytest.mark.parametrize("codec", ["2bit", "ternary-rc"])
def test_threads_make_no_difference(codec: str) -> None:
    made = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            made.append(followed(codec, on("cpu")))
        finally:
            torch.set_num_threads(1)
    assert made[0] == made[1]


def test_the_dtype_that_a_miner_computes_in_makes_no_difference() -> None:
    """nanochat's model holds fp32 parameters, whatever it computes in."""
    config = GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        model = GPT(config, dtype, CPU)
        made.append(followed("2bit", {n: p.detach() for n, p in model.named_parameters()}))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert made[0] == made[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("codec", CODECS)
def test_a_gpu_makes_no_difference(codec: str) -> None:
    assert followed(codec, on("cuda")) == followed(codec, on("cpu"))
