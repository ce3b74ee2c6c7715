"""Bits per byte against a case worked out by hand, and over two real ranks."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat.loss_eval import evaluate, evaluate_bpb

torch.set_num_threads(1)

SRC = Path(__file__).resolve().parent.parent / "src"
SIZES = np.array([1, 2, 3, 0, 7], dtype=np.int32)  # bytes of each token; 3 is special


class Scripted:
    """A model whose loss, in nats, is what its inputs say, in hundredths."""

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "none"
        return inputs.float() / 100


def batch(nats: list[list[float]], targets: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.tensor(nats) * 100).round().long(), torch.tensor(targets)


def test_a_case_worked_out_by_hand() -> None:
    batches = [
        batch([[0.5, 1.0, 2.0]], [[0, 2, 3]]),  # 1.5 nats over 4 bytes; the special one does not count
        batch([[0.25, 9.0], [0.75, 9.0]], [[1, -1], [1, 3]]),  # 1.0 nats over 4 bytes
    ]
    assert evaluate_bpb(Scripted(), batches, SIZES) == pytest.approx(2.5 / (8 * math.log(2)), rel=1e-6)
    assert evaluate_bpb(Scripted(), batches, torch.from_numpy(SIZES)) == pytest.approx(0.4508422, rel=1e-6)


def test_a_model_that_knows_nothing_needs_a_tokens_bits() -> None:
    vocab = 256

    class Uniform:
        def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
            logits = torch.zeros(*targets.shape, vocab)
            return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction=reduction)

    targets = torch.arange(vocab).view(2, -1)
    assert evaluate_bpb(Uniform(), [(targets, targets)], np.ones(vocab, np.int32)) == pytest.approx(8.0)


def test_what_does_not_count_may_be_anything() -> None:
    class Broken:
        def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
            return torch.tensor([[0.5, math.inf, math.nan]])

    assert evaluate_bpb(Broken(), [batch([[0, 0, 0]], [[0, 3, -1]])], SIZES) == pytest.approx(0.5 / math.log(2))


def test_no_bytes_is_infinite() -> None:
    assert evaluate_bpb(Scripted(), [], SIZES) == math.inf
    assert evaluate_bpb(Scripted(), [batch([[1.0]], [[3]])], SIZES) == math.inf


def test_small_losses_beside_a_large_one_lose_no_precision() -> None:
    """fp32 has no 2^25 + 65, nor can it add 1 to 2^25."""
    large = batch([[2.0**25, *[1.0] * 65]], [[0] * 66])
    small = batch([[1.0]], [[0]])
    found = evaluate_bpb(Scripted(), [large, *[small] * 4], SIZES)
    assert found * math.log(2) * 70 == pytest.approx(2.0**25 + 69, rel=1e-12)


def test_the_mean_loss_counts_special_tokens_and_not_ignored_ones() -> None:
    batches = [batch([[0.5, 1.0, 2.0, 9.0]], [[0, 2, 3, -1]]), batch([[0.5]], [[1]])]
    sums = evaluate(Scripted(), batches, SIZES)
    assert sums.loss == pytest.approx(1.0)
    assert sums.bits_per_byte == evaluate_bpb(Scripted(), batches, SIZES) == pytest.approx(2.0 / (6 * math.log(2)))
    assert evaluate(Scripted(), batches, None).loss == sums.loss
    assert evaluate(Scripted(), batches, None).bits_per_byte == math.inf
    assert math.isnan(evaluate(Scripted(), [], SIZES).loss)


def of_rank(rank: int, rendezvous: Path) -> float:
    method = f"file://{rendezvous}"
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=2)
    try:
        batches = [batch([[1.0, 2.0]], [[0, 1]]), batch([[5.0]], [[2]])]
        return evaluate_bpb(Scripted(), batches[rank : rank + 1], SIZES)
    finally:
        torch.distributed.destroy_process_group()


def test_two_ranks_together_have_the_figure_of_one(tmp_path: Path) -> None:
    rendezvous = tmp_path / "rendezvous"
    code = f"from pathlib import Path; import {__name__} as t; print(t.of_rank(1, Path({str(rendezvous)!r})))"
    paths = os.pathsep.join((str(Path(__file__).parent), str(SRC)))
    other = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True
    )
    try:
        own = of_rank(0, rendezvous)
        said, _ = other.communicate(timeout=120)
    finally:
        other.kill()
    assert own == pytest.approx((1 + 2 + 5) / (6 * math.log(2)))
    assert float(said) == own
