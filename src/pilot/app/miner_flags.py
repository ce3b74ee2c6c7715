"""The flags of miner.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pilot.app.cli import check_compiler, check_port
from pilot.app.training_flags import LIMITS, NETWORK, SHOW, LoggingConfig, WalletConfig
from pilot.common.addresses import EVERY_INTERFACE, check_host, is_address, is_loopback, without_brackets
from pilot.common.flags import arg, nested
from pilot.common.limits import Limits
from pilot.common.paths import expanded
from tasks import TASKS

DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
VALIDATORS = "Validators"
WORK = "Work"


@dataclass(frozen=True)
class AxonConfig:
    """The miner's server."""

    port: int = arg(8091, short=True)
    """TCP port to listen on. 0: any free port."""
    ip: str = arg("127.0.0.1", short=True)
    """Address to listen on. 0.0.0.0 is every interface, and requires --allow or --validator."""
    external_ip: str = arg("", short=True)
    """This machine's address as validators see it. Needed where it differs from --axon.ip (NAT, a container)."""
    external_port: int = arg(0, short=True)
    """TCP port as validators see it. 0: --axon.port."""
    tls_cert: Path | None = None
    """PEM file with this miner's certificate; validators then need --tls-ca."""
    tls_key: Path | None = None
    """PEM file with the certificate's key."""

    def __post_init__(self) -> None:
        for name in ("ip", "external_ip"):
            object.__setattr__(self, name, without_brackets(getattr(self, name)))

    def shown(self, bound: int) -> str:
        """Return HOST:PORT for people, with the port that the server is bound to, or the one outside."""
        host = self.external_ip or self.ip
        return f"{f'[{host}]' if ':' in host else host}:{self.external_port or bound}"

    def announced(self, bound: int) -> str:
        """Return HOST:PORT to register; the host is left out, for the validator to see, if it is no single address."""
        host = self.external_ip or self.ip
        return (
            self.shown(bound) if is_address(host) and host not in EVERY_INTERFACE else f":{self.external_port or bound}"
        )

    def check(self, pull: bool, validator: str) -> None:
        """Raise ValueError for a mistake. `validator` is the one to register with, if any."""
        from pilot.transport.tls import check_pair

        check_port("axon.port", self.port)
        check_port("axon.external-port", self.external_port)
        check_host("axon.ip", self.ip, "axon.port")
        check_host("axon.external-ip", self.external_ip, "axon.external-port")
        if validator and self.external_ip and not is_address(self.external_ip):
            raise ValueError(f"--axon.external-ip {self.external_ip}: validators call IP addresses only; give that one")
        for flag, given in (("external-ip", self.external_ip), ("external-port", self.external_port)):
            if pull and given:
                raise ValueError(f"--axon.{flag} {given}: nothing is served with --pull; leave it out")
        if pull and self.tls_cert:
            raise ValueError(
                "--axon.tls-cert: nothing is served with --pull; --tls-ca is for reaching the validator by TLS"
            )
        check_pair(self.tls_cert, self.tls_key, "axon")


@dataclass(frozen=True)
class MinerConfig:
    """Compute gradients for a validator, and be paid for them."""

    groups: ClassVar[tuple[str, ...]] = (VALIDATORS, NETWORK, WORK, SHOW, LIMITS)

    wallet: WalletConfig = nested(WalletConfig, NETWORK)
    logging: LoggingConfig = nested(LoggingConfig, SHOW)
    axon: AxonConfig = nested(AxonConfig, NETWORK)
    limits: Limits = nested(Limits, LIMITS)
    validator: str = arg("", VALIDATORS, short=True)
    """HOST:PORT@SS58 of a validator to register with. It needs --serve.port and --admit."""
    pull: bool = arg(False, VALIDATORS, short=True)
    """Fetch orders instead of opening a port. For a miner behind NAT; needs --validator."""
    allow: tuple[str, ...] = arg((), VALIDATORS, short=True)
    """Validators to work for, by hotkey (ss58). Without it, on loopback, the first to call is pinned."""
    unpin: bool = arg(False, VALIDATORS)
    """Forget the pinned validator."""
    tls_ca: Path | None = arg(None, VALIDATORS)
    """PEM file with the certificates that sign the validator's. --validator is then reached by TLS."""
    tasks: tuple[str, ...] = arg(tuple(TASKS), WORK, short=True)
    """Tasks that this miner accepts."""
    device: str = arg("auto", WORK, short=True)
    """auto (CUDA if there is one), cpu, cuda, cuda:1 or mps."""
    threads: int = arg(0, WORK)
    """CPU threads that torch uses. 0: torch decides."""
    compile: bool = arg(False, WORK, short=True)
    """Compile the model with torch.compile. It is faster after a first round that takes a minute longer."""
    data: Path | None = arg(None, WORK, short=True)
    """Local copy of a data set too large to be sent. A token file, or the text it was made from."""
    datasets: tuple[str, ...] = arg((), WORK)
    """Data sets of the Hugging Face hub that orders may name, as OWNER/NAME. None by default."""
    sources: tuple[str, ...] = arg((), WORK)
    """Folders of blobs by digest, as NAME=FOLDER. Read what orders give the source NAME there, if it is there."""
    cache: Path = arg(Path("~/.cache/pilot/miner"), WORK, short=True, path="folder")
    """Folder for received data and receipts. It also holds the pinned validator; each hotkey has a subfolder."""
    grace: float = arg(10.0, WORK, short=True)
    """Seconds to hand over work when told to stop. It finishes its micro-batch first (Ctrl-C, SIGTERM)."""
    parent: int = arg(0, WORK)
    """Process id to stop with. 0: none. The validator's --local sets it."""
    config: Path | None = arg(None, SHOW, short=True, resume="command")
    """JSON file of flags. Flags on the command line override it."""

    def check(self) -> None:
        """Raise ValueError for mistakes that can be found without importing torch."""
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"--tasks {task}: unknown; known: {', '.join(TASKS)}")
        if self.compile:
            check_compiler()
        self.axon.check(self.pull, self.validator)
        self.limits.check()
        self.source_folders()
        for name in self.datasets:
            if not DATASET_NAME.fullmatch(name):
                raise ValueError(f"--datasets {name}: no data set of the hub; write OWNER/NAME")
        if not self.grace >= 0:
            raise ValueError(f"--grace {self.grace}: must be 0 or more")
        for name, given in (("--pull", self.pull), ("--tls-ca", self.tls_ca)):
            if given and not self.validator:
                raise ValueError(f"{name}: needs a validator; name it with --validator host:port@ss58")
        if not is_loopback(self.axon.ip) and not self.allow and not self.validator:
            raise ValueError(
                f"--axon.ip {self.axon.ip}: off loopback anyone can call; name your validators' hotkeys with --allow"
            )
        if self.data is not None and not self.data.expanduser().exists():
            raise ValueError(f"--data {self.data}: no such file or folder")

    def source_folders(self) -> dict[str, Path]:
        """Return the folder of each source that --sources names. Raises ValueError."""
        folders = {}
        for source in self.sources:
            name, _, folder = source.partition("=")
            if not re.fullmatch(r"[A-Za-z0-9_.+-]{1,64}", name) or not folder:
                raise ValueError(f"--sources {source}: write NAME=FOLDER, with letters, digits and _.+- in the name")
            folders[name] = Path(expanded("--sources", folder))
            if not folders[name].is_dir():
                raise ValueError(f"--sources {source}: no such folder")
        return folders
