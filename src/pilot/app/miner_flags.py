"""The flags of miner.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pilot.app.training_flags import LoggingConfig, WalletConfig
from pilot.common.limits import Limits


@dataclass(frozen=True)
class AxonConfig:
    port: int = 8091
    """TCP port to listen on; 0 takes a free one."""
    ip: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface, which requires --allow."""
    external_ip: str = ""
    """Address under which the validator reaches this miner, if it is another (NAT, a container)."""
    tls_cert: Path | None = None
    """PEM file with this miner's certificate: serve by TLS. Validators then need --tls-ca."""
    tls_key: Path | None = None
    """PEM file with the certificate's key."""


@dataclass(frozen=True)
class MinerConfig:
    """Computes gradients on the data that a validator's orders assign. Holds no optimizer."""

    wallet: WalletConfig = field(default_factory=WalletConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    axon: AxonConfig = field(default_factory=AxonConfig)
    limits: Limits = field(default_factory=Limits)
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, mps."""
    threads: int = 0
    """CPU threads that torch uses; 0 leaves it to torch."""
    compile: bool = False
    """Compile the model with torch.compile: faster after a first round that takes a minute more."""
    validator: str = ""
    """HOST:PORT@SS58 of a validator with --serve.port and --admit: announce this miner to it."""
    pull: bool = False
    """Open no port: fetch orders from --validator and upload the work (behind NAT)."""
    tls_ca: Path | None = None
    """PEM file with the certificates that sign the validator's: --validator is then reached by TLS."""
    grace: float = 10.0
    """Seconds, when told to end (Ctrl-C, SIGTERM), to finish the micro-batch and hand over what was done."""
    allow: tuple[str, ...] = ()
    """Hotkeys (ss58) of the validators to work for. On loopback, without it, the first one to call is pinned."""
    unpin: bool = False
    """Forget the pinned validator."""
    tasks: tuple[str, ...] = ("gpt2", "nanochat", "quadratic")
    """Tasks that this miner is willing to do."""
    data: Path | None = None
    """Local copy of a data set that is too large to be handed over: a token file, or the text it was made from."""
    cache: Path = Path("~/.cache/pilot/miner")
    """Folder for data received, receipts and the pinned validator; in it each hotkey has its own."""
    parent: int = 0
    """Process id to end with; 0 for none. The validator's --local sets it."""
    config: Path | None = None
    """JSON file of flags; flags given here override it."""
