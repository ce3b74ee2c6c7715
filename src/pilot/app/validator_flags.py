"""The flags of validator.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pilot.app.training_flags import LoggingConfig, RoundConfig, WalletConfig, WandbConfig
from pilot.common.limits import Limits


@dataclass(frozen=True)
class ServeConfig:
    port: int | None = None
    """TCP port for GET /v1/status and, with --admit, for miners that announce themselves or pull their orders; 0 takes
    a free one, None serves nothing."""
    ip: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface."""
    tls_cert: Path | None = None
    """PEM file with the validator's certificate: serve by TLS. Miners then need --tls-ca."""
    tls_key: Path | None = None
    """PEM file with the certificate's key."""


@dataclass(frozen=True)
class ValidatorConfig(RoundConfig):
    """Owns the model and its optimizer; orders gradients from miners, checks, aggregates, steps, scores and pays."""

    wallet: WalletConfig = field(default_factory=WalletConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    limits: Limits = field(default_factory=Limits)
    axons: tuple[str, ...] = ()
    """Miners: a port on this machine, or host:port@ss58 elsewhere (the ss58 address of the miner's hotkey)."""
    axons_file: Path | None = None
    """File with a miner a line, as --axons takes them; # begins a comment. Read again when it changes."""
    admit: str = ""
    """Miners that announce themselves at --serve.port: everyone, or a file with an ss58 address a line, read again when
    it changes. Empty admits nobody."""
    tls_ca: Path | None = None
    """PEM file with the certificates that sign those of the miners: every miner of --axons is then reached by TLS."""
    local: int = 0
    """Start so many miners on this machine, as processes on free ports, for the length of the run."""
    run: str = ""
    """Name of the run, and of its folder; empty: the task and the time, or with --resume the newest."""
    runs: Path = Path("runs")
    """Folder of the runs."""
    resume: bool = False
    """Continue the run where its ledger ends; its flags are the defaults."""
    snapshot_every: int = 50
    """Rounds between snapshots of the model and the optimizer. A restart replays the rounds after the newest."""
    snapshot_keep: int = 2
    """Snapshots kept, at least 2. Payloads are kept back to the second-newest."""
    patience: int = 10
    """Rounds in a row without one good reply, after which the validator gives up."""
    connect_timeout: float = 20.0
    """Seconds at the start to wait for all the miners named; it goes on with those that are there."""
    ranking: str = "accepted_work"
    """accepted_work (share of accepted work), or your own package.module:Class."""
    baseline: bool = False
    """Afterwards train the plain baseline on the same batches, and show both."""
    config: Path | None = None
    """JSON file of flags, for example experiments/demo.json; flags given here override it."""
