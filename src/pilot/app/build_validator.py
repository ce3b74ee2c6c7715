"""The parts of a validator, made from its flags: keys, task, doors, network, the market as the ledger left it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pilot.app import cli
from pilot.app.validator_flags import ValidatorConfig
from protocol import Health, Hotkey

if TYPE_CHECKING:
    import torch

    from pilot.app.training_flags import RoundConfig
    from pilot.display.console import Console
    from pilot.interfaces import MinerState
    from pilot.market.link_budget import LinkWatch
    from pilot.market.round import Market, Network
    from pilot.storage.run_store import RunStore
    from pilot.training.learner import Learner
    from pilot.transport.auth import Keypair
    from pilot.transport.client.dendrite import Dendrite
    from pilot.transport.client.peer import Endpoint
    from pilot.transport.server.admission import Admission, AxonsFile
    from pilot.transport.server.gateway import Gateway
    from pilot.transport.server.health import HealthServer
    from tasks import Task


def prepare_task(config: ValidatorConfig, device: torch.device, console: Console) -> Task:
    from tasks import load_task

    flags, cache = getattr(config, config.task), config.cache.expanduser()
    return load_task(config.task).prepare(flags, seed=config.seed, cache=cache, device=device, progress=console.say)


def watched_files(config: ValidatorConfig, console: Console) -> tuple[AxonsFile | None, Admission | None]:
    """What --axons-file and --admit name."""
    from pilot.transport.server.admission import Admission, AxonsFile

    listed = AxonsFile(config.axons_file, config.tls_ca is not None, console.say) if config.axons_file else None
    return listed, Admission(config.admit, console.say, time.monotonic) if config.admit else None


def signing_key(config: ValidatorConfig, endpoints: Sequence[Endpoint], console: Console) -> Keypair:
    """The wallet's hotkey, made where it is missing and every miner is on this machine."""
    from pilot.common.addresses import is_loopback
    from pilot.transport.wallets import load_keypair

    loopback = all(endpoint.is_loopback for endpoint in endpoints)
    if config.admit:
        loopback = loopback and is_loopback(config.serve.ip)
    wallet = config.wallet
    return load_keypair(wallet.name, wallet.hotkey, str(wallet.path), create=loopback, say=console.say)


async def serve_status(
    config: ValidatorConfig,
    folder: Path,
    keypair: Keypair,
    admission: Admission | None,
    store: RunStore,
    console: Console,
) -> HealthServer | Gateway | None:
    """GET /v1/status, where --serve.port asks for it; with --admit miners announce themselves there, and pull."""
    from pilot.transport.server.gateway import Gateway
    from pilot.transport.server.health import HealthServer
    from pilot.transport.tls import server_context

    serve = config.serve
    if serve.port is None:
        return None

    def health() -> Health:
        head = store.head()
        return Health(
            role="validator",
            hotkey=keypair.ss58_address,
            healthy=True,
            state="training" if head else "starting",
            run=folder.name,
            round=head.round if head else None,
            version=head.version if head else None,
            time_ns=time.time_ns(),
        )

    server: HealthServer | Gateway
    tls = server_context(serve.tls_cert, serve.tls_key, "serve") if serve.tls_cert and serve.tls_key else None
    place = (health, serve.ip, serve.port, config.limits, tls)
    if admission is not None:
        server = Gateway(keypair, config.task, admission, *place, reaches_tls=config.tls_ca is not None)
    else:
        server = HealthServer(*place)
    at = f"{f'[{serve.ip}]' if ':' in serve.ip else serve.ip}:{await server.start()}"
    console.say(f"status at http{'s' if tls else ''}://{at}/v1/status")
    if admission is not None:
        trust = " --tls-ca FILE" if tls else ""
        console.say(f"miners come by: python src/miner.py --validator {at}@{keypair.ss58_address}{trust}")
    return server


async def connect(
    config: ValidatorConfig,
    folder: Path,
    keypair: Keypair,
    endpoints: Sequence[Endpoint],
    listed: AxonsFile | None,
    status: HealthServer | Gateway | None,
    store: RunStore,
    console: Console,
) -> Dendrite:
    """Says hello to the miners. ValueError where not one answers in time, and none may come later."""
    from pilot.transport.client.dendrite import Dendrite
    from pilot.transport.server.gateway import Gateway
    from pilot.transport.tls import client_context

    pins = folder / "peers.json"  # which hotkey answers at which endpoint
    known = tuple(dict.fromkeys([*endpoints, *(listed.endpoints if listed else ())]))
    network = Dendrite(
        keypair,
        known,
        json.loads(pins.read_text()) if pins.exists() else {},
        partial(save_pins, pins),
        config.task,
        console.say,
        config.limits,
        lambda path, size: store.spool.reserve(path, size, config.limits),
        client_context(config.tls_ca.expanduser()) if config.tls_ca else None,
    )
    await network.start()
    later = []  # where more may come from
    if listed is not None:
        network.attend(listed.follow(network, tuple(endpoints)))
        later.append(f"--axons-file {config.axons_file}")
    if isinstance(status, Gateway):
        status.attach(network)
        later.append("announcements")
    there = await network.wait_for_peers(len(known), config.connect_timeout) if known else 0
    if not there and later:
        console.say(f"no miner is there yet: waits for {' and '.join(later)}; run folder {folder}")
    elif not there:
        await network.close()
        axons = " ".join(map(str, known))
        raise ValueError(
            f"--axons {axons}: no miner answered within --connect-timeout {config.connect_timeout:g} s; "
            "start one with python src/miner.py --axon.port PORT"
        )
    else:
        console.say(f"{there} of {len(known)} miners are there; run folder {folder}")
    return network


def save_pins(path: Path, pins: dict[str, Hotkey]) -> None:
    from pilot.common.files import replacing

    with replacing(path) as file:
        file.write(json.dumps(pins, indent=2).encode())


async def restored_market(
    config: ValidatorConfig,
    folder: Path,
    task: Task,
    network: Network,
    store: RunStore,
    tensors: ThreadPoolExecutor,
    console: Console,
) -> Market:
    """The market as the run's ledger left it: the newest whole snapshot, and the committed rounds after it."""
    from pilot.aggregation import load_aggregator
    from pilot.codec import load_codec
    from pilot.market.round import Market
    from pilot.ranking import load_ranker
    from pilot.training.diloco import round_settings
    from pilot.training.learner import Learner

    device, policy = cli.pick_device(config.device), config.policy(folder.name, config.patience)
    keep = store.versions if policy.broadcast == "delta" else None
    learner = Learner(task, config.optimizer_flags, device, policy.broadcast, policy.codec_down, keep)
    market = Market(
        policy,
        task,
        learner,
        network,
        store,
        load_ranker(config.ranking),
        load_aggregator(config.aggregation),
        load_codec,
        round_settings(policy.diloco, task, config.optimizer_flags, config.rounds),
        tensors,
    )
    market.watch = link_watch(config, learner, network.miner_states, console.say)
    market.watch.introduce()
    snapshot = store.snapshots.newest(console.say)
    try:
        if snapshot is not None:
            learner.load_state(snapshot.header, snapshot.tensors)
        await market.replay(snapshot.round if snapshot else 0)
    except ValueError as error:
        lost = "" if snapshot else "no whole snapshot is left; "
        raise ValueError(f"--run {folder.name}: {lost}{error}; otherwise start another --run") from None
    if market.round:
        console.say(f"resumed after round {market.round} of {config.rounds}, version {learner.version[:12]}")
    return market


def check(config: ValidatorConfig) -> None:
    """Mistakes that can be seen without importing anything heavy."""
    from pilot.market.measures import load_measures
    from pilot.ranking import load_ranker
    from pilot.transport.tls import check_pair

    config.check_rounds()
    load_measures(load_ranker(config.ranking))
    config.check_task()
    flags = cli.flatten(config)
    least = {"rounds": 1, "patience": 1, "local": 0, "eval_every": 0, "snapshot_every": 1, "snapshot_keep": 2,
             "connect_timeout": 0.1}  # fmt: skip
    for flag, value in least.items():
        if flags[flag] < value:
            raise ValueError(f"--{flag.replace('_', '-')} {flags[flag]}: must be {value} or more")
    config.limits.check()
    cli.check_port("serve.port", config.serve.port or 0)
    check_pair(config.serve.tls_cert, config.serve.tls_key, "serve")
    if config.serve.port is None:
        for flag, given in ((f"--admit {config.admit}", config.admit), ("--serve.tls-cert", config.serve.tls_cert)):
            if given:
                raise ValueError(f"{flag}: nothing is served; choose a --serve.port, 0 for any free one")
    if not (config.axons or config.axons_file or config.local or config.admit):
        raise ValueError(
            "--axons: no miner named; give the ports of your miners, or --local 2 for two of this machine, "
            "--axons-file FILE, or --serve.port with --admit"
        )


def link_watch(
    config: RoundConfig,
    learner: Learner,
    links: Callable[[], Iterable[MinerState]],
    say: Callable[[str], object],
    scale: float = 1.0,
) -> LinkWatch:
    """Make the watch that the flags ask for; each value of the learner's model counts `scale` times."""
    from pilot.market.link_budget import LinkBudget, LinkWatch

    up, down = config.codecs
    parameters = sum(p.numel() for p in learner.parameters.values())
    buffers = sum(b.numel() for b in learner.task.buffers(learner.model).values())
    budget = LinkBudget(
        round(scale * parameters),
        round(scale * buffers),
        up,
        down,
        round_s=config.round_seconds,
        overlap=config.overlap > 0,
        mode=config.mode,
        broadcast=config.broadcast,
    )
    return LinkWatch(budget, links, say, config.codec.up == "auto", config.codec.down == "auto")
