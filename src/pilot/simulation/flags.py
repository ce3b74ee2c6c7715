"""The flags of scripts/simulate.py. Torch-free, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pilot.app.training_flags import DILOCO, LINKS, ROUNDS, TASK, TRAINING, RoundConfig
from pilot.common.flags import arg, nested, option
from pilot.simulation.costs import CostConfig
from pilot.simulation.link_model import LinkSpec
from pilot.simulation.traces import Ending

TRACE = "Trace: which miners are up, and when"
NETWORK = "Simulated links and costs"
OUTPUT = "Output"

STATE_MB = 42.0  # a model of 10 million parameters in fp32


@dataclass(frozen=True)
class LinkConfig:
    """Each miner's link to the validator, unless the trace says otherwise."""

    up_mbps: float = arg(100.0, short=True)
    """Megabits per second from a miner to the validator: 12.5 million bytes at 100."""
    down_mbps: float = arg(100.0, short=True)
    """Megabits per second from the validator to a miner: 12.5 million bytes at 100."""
    latency_ms: float = arg(50.0, short=True)
    """Milliseconds that a message takes one way."""
    jitter_ms: float = 0.0
    """Milliseconds that may be added at random."""
    loss: float = 0.0
    """Fraction of the bytes that is lost and sent again."""

    def spec(self) -> LinkSpec:
        """Return the link that the flags describe. Raises ValueError for impossible ones."""
        try:
            return LinkSpec(
                up_bps=1e6 * self.up_mbps,
                down_bps=1e6 * self.down_mbps,
                latency_s=self.latency_ms / 1e3,
                jitter_s=self.jitter_ms / 1e3,
                loss=self.loss,
            )
        except ValueError as error:
            raise ValueError(f"--link.…: {error}") from None


@dataclass(frozen=True)
class SimulateConfig(RoundConfig):
    """Play a marketplace through a trace of miners that come and go, in virtual time, and plot the result.

    Market, miners, files and task are the real ones. The network is simulated, and computing takes the time that a
    table of costs says.
    """

    groups: ClassVar[tuple[str, ...]] = (TRACE, NETWORK, TASK, TRAINING, ROUNDS, LINKS, DILOCO, OUTPUT)

    trace: Path | None = arg(None, TRACE, short=True)
    """CSV file with a line for each time that a miner is up: miner,start,end in seconds. Further columns may be
    price,speed,bandwidth_mbps,latency_ms,ending."""
    make: Literal["", "spot", "diurnal", "flaky", "steady"] = arg("", TRACE, short=True)
    """Make a trace by --seed instead of reading one. spot: machines are taken away and come back. diurnal: day and
    night, with energy prices. flaky: slow links that break. steady: all miners are always up."""
    out: Path | None = arg(None, TRACE, short=True, path="write")
    """File to write the trace of --make to, without simulating it."""
    miners: int = arg(8, TRACE, short=True)
    """Number of miners for --make, processes that each give one reply in a round."""
    hours: float = arg(0.0, TRACE, short=True)
    """Hours (of 3600 seconds) to simulate. 0: 24 for --make, the whole of a --trace."""
    ending: Ending = arg("notice", TRACE)
    """How a miner's time ends where the trace does not say. notice: SIGTERM, with --grace to hand over. kill: at once.
    cut: its link is dead, and it computes on."""
    state_mb: float | None = arg(None, NETWORK, short=True)
    """Megabytes of fp32 that the model counts for, in times and figures. None: 42 for the quadratic task, and the true
    size for others."""
    link: LinkConfig = nested(LinkConfig, NETWORK)
    costs: CostConfig = nested(CostConfig, NETWORK)
    measure: bool = arg(False, NETWORK, short=True)
    """Measure the costs once with this task on this machine, instead of using --costs."""
    plot: Path = arg(Path("simulation.png"), OUTPUT, short=True, path="write")
    """File for the plot of miners, utilisation, work and loss over time."""
    keep: Path | None = arg(None, OUTPUT, short=True, path="folder")
    """New folder to keep the run in: its ledger, payloads and the miners' receipts."""
    task: str = arg("quadratic", TASK, short=True)
    """Task to train: quadratic, which costs almost nothing, or gpt2 and nanochat, which train for real."""
    round_seconds: float = arg(300.0, ROUNDS, short=True)
    """Seconds that a round lasts: each miner computes what it can in this time. 0: --batches each."""
    grace: float = arg(30.0, ROUNDS)
    """Seconds that miners have to send their partial work when they are told to stop or a round closes early."""
    rounds: int = arg(0, TRAINING, short=True)
    """Rounds until the learning rate's schedule ends. 0: the simulated time over --round-seconds, or 200."""
    eval_every: int = arg(0, TRAINING)
    """Rounds between evaluations, which take the validator's time. 0: only at the end."""
    device: str = arg("cpu", TRAINING)
    """Device: auto (CUDA if there is one), cpu, cuda, cuda:1 or mps."""
    threads: int = arg(1, TRAINING)
    """CPU threads that torch uses. 0: torch decides."""

    def check(self) -> None:
        """Raise ValueError for flags that the user must change."""
        if (self.trace is None) == (not self.make):
            both = "--trace: give either this or --make" if self.trace else "--trace: none given"
            raise ValueError(f"{both}; name a CSV file, or make a trace with --make spot")
        if self.out is not None and not self.make:
            raise ValueError(f"--out {self.out}: only --make writes a trace; add --make spot")
        if not 1 <= self.miners <= 4096:
            raise ValueError(f"--miners {self.miners}: must lie between 1 and 4096")
        if not 0 <= self.hours <= 24 * 366:
            raise ValueError(f"--hours {self.hours:g}: must lie between 0 and a year's {24 * 366}")
        if self.state_mb is not None and not 0 < self.state_mb < float("inf"):
            raise ValueError(f"--state-mb {self.state_mb:g}: must be above 0")
        if self.keep is not None and self.keep.exists():
            raise ValueError(f"--keep {self.keep}: exists; choose another folder")
        for name in ("rounds", "eval_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{option(name)} {getattr(self, name)}: must be 0 or more")
        self.link.spec()
        self.check_rounds()
        self.check_task()
