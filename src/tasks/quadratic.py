"""A noisy quadratic with a known optimum: a task for simulations, whose micro-batches take about 100 µs.

    loss of sample w at x:   f_w(x) = 0.5 / d * sum_j h_j (x_j - c_wj)^2,   c_wj = o_j + noise * e_wj

The curvatures h_j lie evenly on a logarithmic scale between 1 / condition and 1; the optimum o follows from the
seed. The e_wj are the bytes of the token file, of mean 0 over all samples and of variance v_j, close to 1. So the
mean loss is

    f(x) = 0.5 / d * sum_j h_j ((x_j - o_j)^2 + noise^2 v_j),   least at o, where it is `floor`.

The model of "Which Algorithmic Choices Matter at Which Batch Sizes? Insights From a Noisy Quadratic Model"
(Zhang et al. 2019), with finitely many samples.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from pydantic import Field

from protocol import CONTEXT, DataSpec, ProtocolError, TaskSpec
from tasks import Need, OpenBlob
from tasks.base import (
    ORDER_BYTES,
    BaseTask,
    Dimension,
    EpochOrders,
    Seed,
    Shape,
    check_seed,
    open_tokens,
    token_bytes,
)
from tasks.data.tokens import Tokens, write

if TYPE_CHECKING:
    import torch
    from torch import nn

    Batch = tuple[torch.Tensor, float]  # the sum of the samples' c_w - o, (d,), and of their losses at the optimum

BYTE_DEVIATION = math.sqrt((256**2 - 1) / 12)  # standard deviation of a uniform byte


@dataclass(frozen=True)
class QuadraticConfig:
    """A noisy quadratic with a known optimum: micro-batches cost almost nothing, for simulations and smoke tests."""

    dimension: int = 2560
    """Parameters, of 4 bytes each."""

    samples: int = 256
    """Samples in an epoch: half of them come from the seed, the others are their mirror images."""

    batch_size: int = 8
    """Samples in a micro-batch, the unit in which work is handed out."""

    condition: float = 100.0
    """Largest curvature over the smallest: the larger, the more steps it takes."""

    noise: float = 0.1
    """Standard deviation of the samples of a micro-batch in each coordinate, about an optimum below 1/4 in each."""

    def __post_init__(self) -> None:
        for name, value in (("dimension", self.dimension), ("batch_size", self.batch_size)):
            if not 1 <= value <= 1 << 20:
                raise ValueError(f"--quadratic.{name} {value}: must lie between 1 and 2^20")
        if self.samples < 2 or self.samples % 2 or self.samples * self.dimension > 16 << 20:
            raise ValueError(
                f"--quadratic.samples {self.samples}: must be even, and with --quadratic.dimension {self.dimension} "
                "make at most 16 MB"
            )
        if not 1 <= self.condition <= 1e9:
            raise ValueError(f"--quadratic.condition {self.condition}: must lie between 1 and 1e9")
        if not 0 <= self.noise <= 1e3:
            raise ValueError(f"--quadratic.noise {self.noise}: must lie between 0 and 1000")


class QuadraticShape(Shape):
    """Everything except the samples."""

    dimension: Dimension
    batch_size: Dimension
    condition: Annotated[float, Field(ge=1, le=1e9)]
    noise: Annotated[float, Field(ge=0, le=1e3)]
    seed: Seed


class Quadratic(BaseTask[QuadraticShape]):
    """The task (tasks.Task). Sample w is the training tokens [w d, w d + d), one byte each."""

    name: ClassVar[str] = "quadratic"
    unit: ClassVar[str] = "samples"
    Config: ClassVar[type] = QuadraticConfig
    example: ClassVar[Mapping[str, Any]] = {"dimension": 16, "samples": 64, "batch_size": 4}

    def __init__(self, shape: QuadraticShape, data: DataSpec, tokens: Tokens) -> None:
        """Raises ValueError if there are fewer samples than in a micro-batch."""
        import torch

        self.shape = shape
        self._data, self._tokens = data, tokens
        self._samples = len(tokens.train) // shape.dimension
        self._orders = EpochOrders(shape.seed, self._samples)
        if not self.batches_per_epoch:
            raise ValueError(
                f"--quadratic.samples {self._samples}: less than a micro-batch; raise them, or lower "
                f"--quadratic.batch-size {shape.batch_size}"
            )
        d = shape.dimension
        exponents = np.linspace(-1, 0, d, dtype=np.float64)
        self.curvatures = torch.from_numpy(np.float32(shape.condition**exponents / d))  # (d,): h / d
        self.optimum = torch.from_numpy(_optimum(shape.seed, d))  # (d,)

    @cached_property
    def _noise(self) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Return c_w - o, (samples, d), and each sample's loss at the optimum, (samples,). Reads all samples once."""
        d, scale = self.shape.dimension, np.float32(self.shape.noise / BYTE_DEVIATION)
        noise = (self._tokens.train[: self._samples * d].reshape(-1, d).astype(np.float32) - np.float32(127.5)) * scale
        return np.asarray(noise), 0.5 * np.square(noise, dtype=np.float64) @ self.curvatures.double().numpy()

    @property
    def floor(self) -> float:
        """Return the minimum of the mean loss over all samples."""
        return float(self._noise[1].mean())

    @classmethod
    def prepare(
        cls,
        config: QuadraticConfig,
        *,
        seed: int,
        cache: Path,
        device: torch.device | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> Self:
        """Make the samples. Raises ValueError, in one line, for what the user can correct."""
        check_seed(seed)
        half = np.frombuffer(_stream("samples", seed, config.samples // 2 * config.dimension), np.uint8)
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / f"quadratic-{seed}-{config.dimension}-{config.samples}.tokens"
        write(path, [half, 255 - half], [], np.uint8)  # a sample and its mirror image: their mean is the optimum
        tokens = Tokens.open(path)
        data = DataSpec(blobs={"tokens": tokens.ref()})
        shape = QuadraticShape(
            dimension=config.dimension,
            batch_size=config.batch_size,
            condition=config.condition,
            noise=config.noise,
            seed=seed,
        )
        return cls(shape, data, tokens)

    @classmethod
    def from_spec(cls, spec: TaskSpec, data: DataSpec, open_blob: OpenBlob) -> Self:
        shape = QuadraticShape.parse(spec)
        tokens = open_tokens(data, open_blob, 256)
        try:
            return cls(shape, data, tokens)
        except ValueError as error:
            raise ProtocolError(str(error)) from None

    @classmethod
    def need(cls, spec: TaskSpec, data: DataSpec) -> Need:
        shape = QuadraticShape.parse(spec)
        d, samples = shape.dimension, token_bytes(data) // shape.dimension
        batch = min(shape.batch_size, samples) * d
        return Need(
            parameters=d,
            working=4 * 12 * d,
            data=4 * batch + samples * (16 * d + ORDER_BYTES),  # noise in fp32, its squares in fp64
            flops=6.0 * batch,
        )

    # --- the model ----------------------------------------------------------------------------------------------------

    def build_model(self, device: torch.device | str, initial: bool) -> nn.Module:
        """Return a module of one parameter x, which starts at 0 with or without `initial`."""
        import torch
        from torch import nn

        model = nn.Module()
        model.register_parameter("x", nn.Parameter(torch.zeros(self.shape.dimension)))
        return model.to(device)

    def flops(self, model: nn.Module) -> float:
        """Count four per coordinate for the loss and two for its gradient."""
        return 6.0 * self.shape.dimension

    def describe(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        return {"task": self.spec().model_dump(), "floor": self.floor}, {}

    # --- the data -----------------------------------------------------------------------------------------------------

    def batch(self, index: int) -> Batch:
        import torch

        noise, at_optimum = self._noise
        samples = self._orders.batch(index, self.shape.batch_size)
        return torch.from_numpy(noise[samples].sum(axis=0)), float(at_optimum[samples].sum())

    def count(self, index: int) -> int:
        return self.shape.batch_size

    # --- the loss -----------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss summed over the batch's samples; an fp32 scalar."""
        import torch

        noise, at_optimum = batch
        x = next(model.parameters())
        apart, curvatures = x - self.optimum.to(x.device), self.curvatures.to(x.device)
        pull = curvatures * noise.to(x.device)
        return torch.addcmul(pull, curvatures, apart, value=-0.5 * self.shape.batch_size).dot(-apart) + at_optimum

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return `val_loss`, the exact mean over all samples, and `excess_loss`, its distance from the minimum."""
        apart = next(model.parameters()).detach().double().cpu() - self.optimum
        excess = 0.5 * float(self.curvatures.double() @ apart.square())
        return {"val_loss": self.floor + excess, "excess_loss": excess}


def _stream(use: str, seed: int, size: int) -> bytes:
    """Return bytes of blake3's output stream, which never differ between machines or releases."""
    return blake3(struct.pack("<Q", seed), derive_key_context=f"{CONTEXT} quadratic {use}").digest(length=size)


def _optimum(seed: int, dimension: int) -> NDArray[np.float32]:
    """Return the optimum, (dimension,), uniform in [-1/4, 1/4): about a hundred AdamW steps at the default rate."""
    words = np.frombuffer(_stream("optimum", seed, 4 * dimension), "<u4")
    return ((words / 2.0**31 - 1) / 4).astype(np.float32)
