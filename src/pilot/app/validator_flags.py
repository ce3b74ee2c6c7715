"""The flags of validator.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pilot.app.cli import check_port
from pilot.app.training_flags import (
    LIMITS,
    MINERS,
    NETWORK,
    ROUNDS,
    RUN,
    SHOW,
    LoggingConfig,
    RoundConfig,
    WalletConfig,
    WandbConfig,
)
from pilot.common.addresses import EVERY_INTERFACE, check_host, without_brackets
from pilot.common.flags import arg, nested, option
from pilot.common.limits import Limits


@dataclass(frozen=True)
class ServeConfig:
    """The validator's own server."""

    port: int | None = arg(None, short=True)
    """TCP port for status and miners. It serves GET /v1/status and, with --admit, miners that register or pull orders.
    0: any free port. None: no server."""
    ip: str = arg("127.0.0.1", short=True)
    """Address to listen on. 0.0.0.0 is every interface."""
    external_ip: str = arg("", short=True)
    """Address or name at which miners reach the validator, where it is not --serve.ip: with NAT, or 0.0.0.0."""
    external_port: int = arg(0, short=True)
    """Port at which they reach it, where a router forwards another. 0: the same."""
    tls_cert: Path | None = None
    """PEM file with the validator's certificate; miners then need --tls-ca."""
    tls_key: Path | None = None
    """PEM file with the certificate's key."""

    def __post_init__(self) -> None:
        for name in ("ip", "external_ip"):
            object.__setattr__(self, name, without_brackets(getattr(self, name)))

    def reached_at(self, bound: int) -> str:
        """Return host:port for miners, given the port that is bound. The host is empty if nobody has named one."""
        host = self.external_ip or ("" if self.ip in EVERY_INTERFACE else self.ip)
        return f"{f'[{host}]' if ':' in host else host}:{self.external_port or bound}"


@dataclass(frozen=True)
class ValidatorConfig(RoundConfig):
    """Train a model on gradients from miners.

    The validator owns the model and its optimizer. It orders gradients, checks and aggregates the replies, steps, and
    scores and pays the miners.
    """

    wallet: WalletConfig = nested(WalletConfig, NETWORK)
    logging: LoggingConfig = nested(LoggingConfig, SHOW)
    wandb: WandbConfig = nested(WandbConfig, SHOW)
    serve: ServeConfig = nested(ServeConfig, NETWORK)
    limits: Limits = nested(Limits, LIMITS)
    local: int = arg(0, MINERS, short=True)
    """Start this many miner processes here. They use free ports and stop with the run."""
    axons: tuple[str, ...] = arg((), MINERS, short=True)
    """Miners: local ports, or host:port@ss58. The ss58 address is that of the miner's hotkey."""
    axons_file: Path | None = arg(None, MINERS, short=True)
    """File with one miner a line, as for --axons. # begins a comment. It is read again when it changes."""
    admit: str = arg("", MINERS, short=True, path="read")
    """Let miners register: everyone, or a file. They do so at --serve.port. The file has one ss58 address a line, and
    is read again when it changes. Empty admits nobody."""
    connect_timeout: float = arg(20.0, MINERS)
    """Seconds to wait at the start for all miners that are named. After that, start with those that answered."""
    patience: int = arg(10, MINERS)
    """Rounds in a row without a valid reply after which the validator gives up, if --patience-seconds are over, too."""
    patience_seconds: float = arg(60.0, MINERS)
    """Seconds without a valid reply before it gives up. Between such rounds it pauses, longer each time."""
    tls_ca: Path | None = arg(None, NETWORK)
    """PEM file with the certificates that sign the miners'. Every miner of --axons is then reached by TLS."""
    run: str = arg("", RUN, short=True, resume="command")
    """Name of the run and of its folder. Empty: task and time, or the newest run with --resume."""
    runs: Path = arg(Path("runs"), RUN, resume="command", path="folder")
    """Folder that holds the run folders."""
    resume: bool = arg(False, RUN, short=True, resume="command")
    """Continue a run where it stopped. Its own flags are the defaults."""
    resume_at: int | None = arg(None, RUN, resume="command")
    """With --resume: go back to the state after so many rounds. Later rounds are given up; the run's folder keeps what
    was recorded of them. Needs an intact snapshot of that state, or an older one and the payloads since."""
    snapshot_every: int = arg(50, RUN)
    """Rounds between snapshots of model and optimizer. A restart replays the rounds after the newest."""
    snapshot_keep: int = arg(2, RUN)
    """Snapshots to keep, at least 2. Payloads are kept back to the second-newest."""
    save_every: int = arg(0, RUN, short=True)
    """Rounds between models in the run's folder, for other programs. 0: only at the end and when the run is stopped.
    pilot-export makes one from any snapshot."""
    save_keep: int = arg(2, RUN)
    """Steps whose models are kept there. 0: all of them."""
    ranking: str = arg("accepted_work", ROUNDS, short=True, resume="fixed")
    """accepted_work, or your package.module:Class. The ranker scores the miners."""
    baseline: bool = arg(False, SHOW, short=True)
    """Train without miners afterwards, to compare. It uses the batches that were accepted, and plots both losses."""
    samples: int = arg(2, SHOW)
    """Held-out documents whose beginnings the model continues at the end, if it is a language model."""
    details: bool = arg(False, SHOW)
    """Show every figure at the end. They are in the run's summary.json, too."""
    config: Path | None = arg(None, RUN, short=True, resume="command")
    """JSON file of flags (experiments/demo.json). Flags on the command line override it."""

    def check(self) -> None:
        """Raise ValueError for mistakes that can be found without importing torch."""
        from pilot.market.measures import load_measures
        from pilot.ranking import load_ranker
        from pilot.transport.tls import check_pair, client_context

        self.check_rounds()
        load_measures(load_ranker(self.ranking))
        self.check_task()
        least = {"rounds": 1, "patience": 1, "local": 0, "eval_every": 0, "snapshot_every": 1, "snapshot_keep": 2}
        least |= {"patience_seconds": 0, "save_every": 0, "save_keep": 0, "samples": 0}
        for name, minimum in {**least, "connect_timeout": 0.1}.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{option(name)} {getattr(self, name)}: must be {minimum} or more")
        if self.resume_at is not None and not (self.resume and self.resume_at >= 0):
            raise ValueError(f"--resume-at {self.resume_at}: must be 0 or more, and needs --resume")
        self.limits.check()
        check_port("serve.port", self.serve.port or 0)
        check_port("serve.external-port", self.serve.external_port)
        check_host("serve.ip", self.serve.ip, "serve.port")
        check_host("serve.external-ip", self.serve.external_ip, "serve.external-port")
        if self.serve.external_ip in EVERY_INTERFACE[:2]:
            raise ValueError(f"--serve.external-ip {self.serve.external_ip}: nobody can call that; give an address")
        if self.serve.port is None:
            needs_port = (
                (f"--admit {self.admit}", self.admit),
                ("--serve.tls-cert", self.serve.tls_cert),
                (f"--serve.external-ip {self.serve.external_ip}", self.serve.external_ip),
                (f"--serve.external-port {self.serve.external_port}", self.serve.external_port),
            )
            for given, value in needs_port:
                if value:
                    raise ValueError(f"{given}: nothing is served; choose a --serve.port, 0 for any free one")
        check_pair(self.serve.tls_cert, self.serve.tls_key, "serve")
        if self.tls_ca is not None:
            client_context(self.tls_ca)
        if not (self.axons or self.axons_file or self.local or self.admit):
            raise ValueError(
                "--axons: no miner named; give the ports of your miners, or --local 2 for two of this machine, "
                "--axons-file FILE, or --serve.port with --admit"
            )
