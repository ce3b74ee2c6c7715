"""The flags of scripts/simulate.py. Torch-free, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pilot.app.training_flags import RoundConfig
from pilot.simulation.costs import CostConfig
from pilot.simulation.link_model import LinkSpec
from pilot.simulation.traces import Ending

STATE_MB = 42.0  # a model of 10 million parameters in fp32


@dataclass(frozen=True)
class LinkConfig:
    """Every miner's own link to the validator, where the trace names no other."""

    up_mbps: float = 100.0
    """Megabits per second from a miner to the validator: 12.5 million bytes at 100."""
    down_mbps: float = 100.0
    """Megabits per second from the validator to a miner: 12.5 million bytes at 100."""
    latency_ms: float = 50.0
    """Milliseconds that a message takes, one way."""
    jitter_ms: float = 0.0
    """Up to so many milliseconds more, at random."""
    loss: float = 0.0
    """Fraction that is lost, and sent again."""

    def spec(self) -> LinkSpec:
        """Raises ValueError for what no link can be."""
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
    """Plays a marketplace through a trace of who is up when, in virtual time, and shows what came of it.

    The market, the miners, the files and the task are the real ones; the network is emulated, and computing takes what
    a table of costs says.
    """

    trace: Path | None = None
    """CSV file of who is up when: miner,start,end in seconds, and price,speed,bandwidth_mbps,latency_ms,ending."""
    make: Literal["", "spot", "diurnal", "flaky", "calm"] = ""
    """Instead of --trace, make one by --seed: spot (machines are taken away and come back), diurnal (day and night, and
    what energy costs), flaky (slow links that break off), calm (all are up)."""
    out: Path | None = None
    """With --make: write the trace to this file, and play nothing."""
    miners: int = 8
    """--make: so many miners, at most one reply of each in a round."""
    hours: float = 0.0
    """Length, in hours (3600 seconds). 0: 24 for --make, and a --trace to its end."""
    ending: Ending = "notice"
    """What the end of a miner's time is where the trace does not say: notice (SIGTERM; --grace to hand over), kill, or
    cut (its line is dead, and it works on)."""
    state_mb: float | None = None
    """Count the model for so many megabytes of fp32, in time and in the figures. None: 42 for the
    quadratic, for every other task what they are."""
    link: LinkConfig = field(default_factory=LinkConfig)
    costs: CostConfig = field(default_factory=CostConfig)
    measure: bool = False
    """Measure the costs once, with this task on this machine, instead of --costs."""
    plot: Path = Path("simulation.png")
    """File for the picture: miners, utilisation, work and loss over time."""
    keep: Path | None = None
    """Folder, which must not exist, to keep the run in: its ledger, payloads, the miners' receipts."""
    task: str = "quadratic"
    """What is trained: quadratic (costs next to nothing); gpt2 and nanochat train for real."""
    round_seconds: float = 300.0
    """Time budget of a round: each miner computes what it can and has its reply here by then. 0: --batches each."""
    grace: float = 30.0
    """Seconds that miners have, when they are told to end or a round is closed early, to send what they did."""
    rounds: int = 0
    """Rounds until the learning rate's schedule ends. 0: as many as the time has of --round-seconds, or 200."""
    eval_every: int = 0
    """Rounds between evaluations, which take the validator's time. 0: only at the end."""
    device: str = "cpu"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, mps."""
    threads: int = 1
    """CPU threads that torch uses; 0 leaves it to torch."""

    def check(self) -> None:
        """Raises ValueError for what the user can mend."""
        if (self.trace is None) == (not self.make):
            both = "--trace: give either this or --make" if self.trace else "--trace: none given"
            raise ValueError(f"{both}; name a CSV file, or make a trace with --make spot")
        if self.out is not None and not self.make:
            raise ValueError(f"--out {self.out}: only a trace that is made is written; say --make spot")
        if not 1 <= self.miners <= 4096:
            raise ValueError(f"--miners {self.miners}: must lie between 1 and 4096")
        if not 0 <= self.hours <= 24 * 366:
            raise ValueError(f"--hours {self.hours:g}: must lie between 0 and a year's {24 * 366}")
        if self.state_mb is not None and not 0 < self.state_mb < float("inf"):
            raise ValueError(f"--state-mb {self.state_mb:g}: must be above 0")
        if self.keep is not None and self.keep.exists():
            raise ValueError(f"--keep {self.keep}: is there already; choose another folder")
        for flag in ("rounds", "eval_every"):
            if getattr(self, flag) < 0:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(self, flag)}: must be 0 or more")
        if self.plot.is_dir() or not self.plot.absolute().parent.is_dir():
            raise ValueError(f"--plot {self.plot}: must be a file in a folder that is there")
        self.link.spec()
        self.check_rounds()
        self.check_task()
