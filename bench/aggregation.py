"""Robust aggregation beside ByzFL 0.0.11: 16 contributions of 10 million coordinates, 4 of them liars, two threads.

    python -m bench.aggregation        # some minutes; figures as JSON lines, the rest on stderr

Both get the same tensors in the same process and take turns. ByzFL lies in a folder of its own, without the parts that
need torchvision. The results must be equal up to rounding, or the bench fails. Two are compared on fewer coordinates:
ByzFL's geometric median stops after 3 iterations by default, ours when it stands still, so here it gets 300; and its
centered clipping uses norms summed in fp32, which are off by 4e-4 at full length.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench import Figure

if TYPE_CHECKING:
    import torch

PEER = "byzfl 0.0.11"
N, F, D = 16, 4, 10_000_000
COMPARED = 20_000
RUNS = 5
THREADS = 2


@dataclass(frozen=True)
class Dense:
    """A contribution that is a vector in memory."""

    vector: torch.Tensor
    norm: float
    count: int = 1

    @property
    def specs(self) -> dict[str, torch.Size]:
        return {"w": self.vector.shape}

    def add(self, into: dict[str, torch.Tensor], weight: float) -> None:
        into["w"].add_(self.vector, alpha=weight)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.vector[start:stop]


def install(folder: Path) -> Any:
    """Return the module byzfl, installed into `folder`."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--target", str(folder), "byzfl==0.0.11", "scipy"], check=True)
    sys.path.append(str(folder))
    for part in ("attacks", "benchmark", "fed_framework"):  # they import torchvision
        stub = types.ModuleType(f"byzfl.{part}")
        sys.modules[stub.__name__] = stub
    return import_module("byzfl")


def peak_mb(function: Callable[[], object]) -> float:
    """Return by how many MB the process grows at most while the function runs."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status_mb("VmRSS")
    function()
    return status_mb("VmHWM") - before


def status_mb(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def attacked(d: int) -> torch.Tensor:
    """Return N gradients [N, d] around a common one; the last F are scaled and turned round."""
    import torch

    generator = torch.Generator().manual_seed(0)
    common = torch.randn(d, generator=generator)
    rows = torch.randn(N, d, generator=generator) + common
    rows[-F:] *= -3.0
    return rows


def contributions(rows: torch.Tensor) -> list[Dense]:
    return [Dense(row, float(row.double().norm())) for row in rows]


def check_equal(rule: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    apart = float((ours - theirs).norm() / theirs.norm())
    print(f"{rule}: {apart:.1e} apart", file=sys.stderr)
    if apart > 1e-5:
        raise SystemExit(f"{rule}: the results are {apart:.1e} apart, which is more than rounding")


def main() -> None:
    import torch

    from pilot.aggregation import coordinatewise, linear, mixers
    from pilot.aggregation.robust import coordinate_aggregator, linear_aggregator

    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        byzfl = install(Path(folder))
        nnm, trimmed = byzfl.NNM(F), byzfl.TrMean(F)
        radius = 0.7 * (2 * D) ** 0.5  # clips all of them somewhat
        clip = partial(linear.centered_clipping, iterations=1, radius=radius)
        rules: dict[str, tuple[Any, Callable[[Sequence[torch.Tensor]], torch.Tensor]]] = {
            "trimmed_mean": (coordinate_aggregator(coordinatewise.trimmed_mean, f=F), trimmed),
            "coordinate_median": (coordinate_aggregator(coordinatewise.coordinate_median, f=F), byzfl.Median()),
            "krum": (linear_aggregator(linear.krum, f=F), byzfl.Krum(F)),
            "multi_krum": (linear_aggregator(linear.multi_krum, f=F), byzfl.MultiKrum(F)),
            "geometric_median": (linear_aggregator(linear.geometric_median, f=F), byzfl.GeometricMedian()),
            "centered_clipping": (
                linear_aggregator(clip, f=F),
                lambda vectors: byzfl.CenteredClipping(L=1, tau=radius)(vectors),  # it keeps its last result
            ),
            "nnm_trimmed_mean": (
                coordinate_aggregator(coordinatewise.trimmed_mean, [mixers.nnm], f=F),
                lambda vectors: trimmed(nnm(vectors)),
            ),
        }
        small = attacked(COMPARED)
        weiszfeld = byzfl.GeometricMedian(nu=1e-3, T=300)
        check_equal("geometric_median", rules["geometric_median"][0](contributions(small))["w"], weiszfeld(list(small)))
        radius *= (COMPARED / D) ** 0.5
        small_clip = linear_aggregator(partial(linear.centered_clipping, iterations=1, radius=radius))
        clipping = byzfl.CenteredClipping(L=1, tau=radius)
        check_equal("centered_clipping", small_clip(contributions(small))["w"], clipping(list(small)))
        rows = attacked(D)
        given, vectors = contributions(rows), list(rows)
        for name, (ours, theirs) in rules.items():
            if name not in ("geometric_median", "centered_clipping"):
                check_equal(name, ours(given)["w"], theirs(vectors))
            extra = peak_mb(partial(ours, given))
            pairs = [(seconds(partial(ours, given)), seconds(partial(theirs, vectors))) for _ in range(RUNS)]
            our_s, their_s = (median(side) for side in zip(*pairs, strict=True))
            Figure(f"aggregation.{name}.s", round(our_s, 3), "s", PEER, round(their_s, 3), round(their_s / our_s, 1))
            peer_extra = peak_mb(partial(theirs, vectors))
            ratio = round(peer_extra / extra, 1)
            Figure(f"aggregation.{name}.extra_mb", round(extra, 1), "MB", PEER, round(peer_extra, 1), ratio)


if __name__ == "__main__":
    main()
