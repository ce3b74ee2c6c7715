"""Build the parts of a validator from its flags: store, task, network, server, and the market as the ledger left it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pilot.app import cli, export, run_folder
from pilot.app.validator_flags import ValidatorConfig
from pilot.common.addresses import is_loopback
from pilot.common.paths import naming
from protocol import Hotkey

if TYPE_CHECKING:
    import torch

    from pilot.app.local_miners import LocalMiners
    from pilot.app.report import LossPlot
    from pilot.app.training_flags import RoundConfig
    from pilot.display.console import Console
    from pilot.display.metrics import Metrics
    from pilot.interfaces import MinerState
    from pilot.market.link_budget import LinkWatch
    from pilot.market.round import Market, Network
    from pilot.storage.run_store import RunStore
    from pilot.storage.snapshots import Snapshot
    from pilot.training.learner import Learner
    from pilot.transport.auth import Keypair
    from pilot.transport.client.dendrite import Dendrite
    from pilot.transport.client.peer import Endpoint
    from pilot.transport.server.admission import Admission, AxonsFile
    from pilot.transport.server.gateway import Gateway
    from pilot.transport.server.health import HealthServer
    from tasks import Task

logger = logging.getLogger(__name__)


@dataclass
class Validator:
    """The parts of a validator. `stack` of `build_validator` closes them."""

    config: ValidatorConfig
    folder: Path
    device: torch.device
    task: Task
    store: RunStore
    metrics: Metrics
    console: Console
    plot: LossPlot
    network: Dendrite
    market: Market
    local: LocalMiners
    connections: AsyncExitStack

    async def disconnect(self) -> None:
        """Close the market, the server and the network, and stop the local miners."""
        await self.connections.aclose()
        self.local.stop()


async def build_validator(config: ValidatorConfig, program: str, stack: AsyncExitStack) -> Validator:
    """Build a validator. A mistake of the user's ends the program with one line and exit code 2."""
    from pilot.app.local_miners import LocalMiners
    from pilot.app.report import LossPlot
    from pilot.display.console import Console
    from pilot.display.metrics import Metrics
    from pilot.storage.run_store import detecting_full_disk
    from pilot.transport.client.dendrite import parse_endpoint
    from pilot.transport.server.admission import Admission, AxonsFile
    from tasks import load_task

    with cli.mistakes(program):
        folder = run_folder.folder_of(config)
        endpoints = [parse_endpoint(axon, tls=config.tls_ca is not None) for axon in config.axons]
        device = cli.pick_device(config.device)
        cli.set_threads(config.threads)
        cli.reuse_memory()
        console = stack.enter_context(Console(config.rounds, config.logging.least, config.logging.json))
        listed = AxonsFile(config.axons_file, config.tls_ca is not None, console.say) if config.axons_file else None
        admission = Admission(config.admit, console.say, time.monotonic) if config.admit else None
        keypair = _load_keypair(config, [*endpoints, *(listed.endpoints if listed else ())], console)

        if not folder.exists():
            stack.callback(run_folder.remove_unbegun, folder)
        stack.enter_context(detecting_full_disk(folder))
        store = stack.enter_context(closing(run_folder.open_store(config, folder)))
        local = stack.enter_context(  # miners import their libraries while we prepare the task
            LocalMiners(config.local, folder / "miners", config.task, config.device, config.threads)
        )
        console.say(f"loading task {config.task} and its libraries, which takes up to a minute the first time")
        with naming("--cache", config.cache):
            task = load_task(config.task).prepare(
                getattr(config, config.task),
                seed=config.seed,
                cache=config.cache.expanduser(),
                device=device,
                progress=console.say,
            )
        metrics = stack.enter_context(closing(Metrics(folder, config.wandb.mode, config.wandb.project, folder.name)))
        tensors = stack.enter_context(ThreadPoolExecutor(1, "tensors"))
        connections = AsyncExitStack()
        stack.push_async_callback(connections.aclose)
        endpoints += map(parse_endpoint, local.endpoints(console.say))
        network = await _start_network(config, folder, keypair, endpoints, listed, store, console)
        connections.push_async_callback(network.close)
        server = await _start_server(config, folder, keypair, admission, store, network, console)
        if server is not None:  # it passes requests on to the network, so it closes first
            connections.push_async_callback(server.close)
        await _wait_for_miners(config, folder, network, endpoints, listed, server, console)
        run_folder.begin(config, store, task.data_digest)
        export.save_description(task, folder)

        market = await restored_market(config, folder, task, network, store, tensors, console)
        connections.push_async_callback(market.close)
        plot = LossPlot(folder, config.task)
    return Validator(config, folder, device, task, store, metrics, console, plot, network, market, local, connections)


def _load_keypair(config: ValidatorConfig, endpoints: Sequence[Endpoint], console: Console) -> Keypair:
    """Load the wallet's hotkey. A missing one is created if every miner is on this machine."""
    from pilot.transport.wallets import load_keypair

    local = all(endpoint.is_loopback for endpoint in endpoints) and (not config.admit or is_loopback(config.serve.ip))
    wallet = config.wallet
    return load_keypair(wallet.name, wallet.hotkey, str(wallet.path), create=local, say=console.say)


async def _start_network(
    config: ValidatorConfig,
    folder: Path,
    keypair: Keypair,
    endpoints: Sequence[Endpoint],
    listed: AxonsFile | None,
    store: RunStore,
    console: Console,
) -> Dendrite:
    """Begin to greet the miners that --axons, --axons-file and --local name."""
    from pilot.common.files import replacing
    from pilot.transport.client.dendrite import Dendrite
    from pilot.transport.tls import client_context

    pins = folder / "peers.json"  # which hotkey answers at which endpoint

    def save_pins(hotkeys: dict[str, Hotkey]) -> None:
        with replacing(pins) as file:
            file.write(json.dumps(hotkeys, indent=2).encode())

    network = Dendrite(
        keypair,
        tuple(dict.fromkeys([*endpoints, *(listed.endpoints if listed else ())])),
        run_folder.read_pins(pins),
        save_pins,
        config.task,
        console.say,
        config.limits,
        lambda path, size: store.spool.reserve(path, size, config.limits),
        client_context(config.tls_ca.expanduser()) if config.tls_ca else None,
    )
    await network.start()
    return network


async def _start_server(
    config: ValidatorConfig,
    folder: Path,
    keypair: Keypair,
    admission: Admission | None,
    store: RunStore,
    network: Dendrite,
    console: Console,
) -> HealthServer | Gateway | None:
    """Serve GET /v1/status if --serve.port asks for it; with --admit miners also register and pull orders there."""
    from pilot.app.health import ValidatorHealth
    from pilot.storage.kept_clock import KeptClock
    from pilot.transport.server.gateway import Gateway
    from pilot.transport.server.health import HealthServer
    from pilot.transport.tls import server_context

    serve = config.serve
    if serve.port is None:
        return None

    health = ValidatorHealth(folder, keypair.ss58_address, store.ledger, config.limits.reserve_bytes, time.monotonic)
    health.miners = network.miner_states
    server: HealthServer | Gateway
    tls = server_context(serve.tls_cert, serve.tls_key, "serve") if serve.tls_cert and serve.tls_key else None
    common = (health, serve.ip, serve.port, config.limits, tls)
    if admission is not None:
        clock_ns, reaches_tls = KeptClock(folder / "clock"), config.tls_ca is not None
        server = Gateway(keypair, config.task, admission, *common, reaches_tls=reaches_tls, clock_ns=clock_ns)
    else:
        server = HealthServer(*common)
    bound = await server.start()
    address = f"{f'[{serve.ip}]' if ':' in serve.ip else serve.ip}:{bound}"
    console.say(f"status at http{'s' if tls else ''}://{address}/v1/status")
    if admission is not None:
        reached, trust = serve.reached_at(bound), " --tls-ca FILE" if tls else ""
        host = "" if not reached.startswith(":") else "HOST"
        console.say(f"miners join with: python src/miner.py --validator {host}{reached}@{keypair.ss58_address}{trust}")
        if host:
            console.say("HOST is this machine's address as miners see it; --serve.external-ip names it")
    return server


async def _wait_for_miners(
    config: ValidatorConfig,
    folder: Path,
    network: Dendrite,
    endpoints: Sequence[Endpoint],
    listed: AxonsFile | None,
    server: HealthServer | Gateway | None,
    console: Console,
) -> None:
    """Wait until the named miners answer. Raises ValueError if none does in time and none can join later."""
    from pilot.transport.server.gateway import Gateway

    named = list(dict.fromkeys([*endpoints, *(listed.endpoints if listed else ())]))
    sources = []  # from which miners may join later
    if listed is not None:
        network.run_in_background(listed.follow(network, tuple(endpoints)))
        sources.append(f"--axons-file {config.axons_file}")
    if isinstance(server, Gateway):
        server.attach(network)
        sources.append("announcements")
    found = await network.wait_for_peers(len(named), config.connect_timeout) if named else 0
    if found:
        console.say(f"{found} of {len(named)} miners are there; run folder {folder}")
    elif sources:
        console.say(f"no miner is there yet: waits for {' and '.join(sources)}; run folder {folder}")
    else:
        raise ValueError(
            f"--axons {' '.join(map(str, named))}: no miner answered within --connect-timeout "
            f"{config.connect_timeout:g} s; start one with python src/miner.py --axon.port PORT"
        )


async def restored_market(
    config: ValidatorConfig,
    folder: Path,
    task: Task,
    network: Network,
    store: RunStore,
    tensors: ThreadPoolExecutor,
    console: Console,
) -> Market:
    """Restore the market from the newest intact snapshot and the rounds committed after it. Raises ValueError."""
    from pilot.aggregation import load_aggregator
    from pilot.codec import load_codec
    from pilot.market.round import Market
    from pilot.ranking import load_ranker
    from pilot.training.diloco import round_settings
    from pilot.training.learner import Learner
    from pilot.transport.client.dendrite import parse_endpoint

    device, policy = (
        cli.pick_device(config.device),
        config.policy(folder.name, config.patience, config.patience_seconds),
    )
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
    links = bool(config.admit or config.axons_file) or not all(
        parse_endpoint(axon).is_loopback for axon in config.axons
    )
    say = console.say if links else logger.debug  # loopback is no link to give advice on
    market.watch = link_watch(config, learner, network.miner_states, say)
    market.watch.introduce()
    head, at = store.head(), config.resume_at
    committed = head.round + 1 if head else 0
    snapshot = store.snapshots.newest(console.say, store.ledger.version, committed if at is None else at)
    try:
        if snapshot is not None:
            learner.load_state(snapshot.header, snapshot.tensors)
        await market.replay(snapshot.round if snapshot else 0, at)
    except ValueError as error:
        raise ValueError(f"--run {folder.name}: {_way_out(error, snapshot, committed)}") from None
    if store.given_up is not None:
        console.say(f"went back to after round {at}: what was recorded of later ones is in {store.given_up}")
    if market.round:
        console.say(f"resumed after round {market.round} of {config.rounds}, version {learner.version[:12]}")
    return market


def _way_out(error: ValueError, snapshot: Snapshot | None, committed: int) -> str:
    """Return why a run cannot be restored, and what a user can do about it."""
    from pilot.market.round import ReplayError

    lost = "" if snapshot else "no whole snapshot is left; "
    if isinstance(error, ReplayError) and (snapshot or error.round):
        gives_up = f"gives up rounds {error.round} to {committed - 1}"
        return f"{lost}{error}; otherwise go back with --resume-at {error.round}, which {gives_up}"
    restore = "" if snapshot else "restore snapshots and spool from a backup; "
    return f"{lost}{error}; {restore}otherwise start another --run"


def link_watch(
    config: RoundConfig,
    learner: Learner,
    links: Callable[[], Iterable[MinerState]],
    say: Callable[[str], object],
    scale: float = 1.0,
) -> LinkWatch:
    """Return the watch over the miners' links that the flags ask for; the model counts as `scale` times its size."""
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
    return LinkWatch(budget, links, say)
