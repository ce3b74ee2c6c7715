"""A validator: owns a model and the only optimizer, and runs the marketplace that trains it.

python src/validator.py --wallet.name validator --wallet.hotkey default --device cuda:0 --axons 8091 8092
python src/validator.py --local 2 --baseline        # two miners of this machine, and plain training beside it

market/round.py     a round, one method a step: plan, broadcast, collect, verify, aggregate, step, score, commit
market/learner.py   the model, the optimizer, the chain of versions
transport/          the wire: signed requests, streamed bodies
records/            the ledger, spooled payloads, snapshots, metrics, the display
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import cli
import runs
from market.config import ValidatorConfig
from protocol import Health, Hotkey, Receipt

if TYPE_CHECKING:
    import torch

    from market.planning import Terms
    from market.round import Market, Network
    from records.console import Console
    from records.metrics import Metrics
    from records.store import Store
    from tasks import Task
    from transport.auth import Keypair
    from transport.dendrite import Dendrite
    from transport.desk import Desk
    from transport.health import HealthServer
    from transport.peer import Endpoint
    from transport.roster import Admission, Axons

PROGRAM = "validator.py"
logger = logging.getLogger("validator")


async def train(config: ValidatorConfig, market: Market, store: Store, metrics: Metrics, console: Console) -> None:
    """The marketplace, one round after the other, from wherever the ledger ends."""
    while True:
        # Once in a while, with the miners at work on the next round already: evaluate, save a snapshot.
        if due(market.round, config.eval_every, config.rounds) and market.round not in store.evaluations():
            logger.debug("%d rounds done: evaluating", market.round)
            store.add_evaluation(market.round, await market.evaluate())
        if due(market.round, config.snapshot_every, config.rounds) or market.out_of_patience:
            logger.debug("%d rounds done: saving a snapshot", market.round)
            market.save_snapshot(store.save_snapshot)
        report_round(market.round, store, metrics, console)
        if not market.in_flight:
            await market.fill(config.rounds)  # plan, broadcast
        if not market.in_flight:
            break
        await market.play(config.rounds)  # collect to commit; those that follow are in flight then
    await market.finish()


def due(done: int, every: int, rounds: int) -> bool:
    """At the start, at the end, and after each `every` rounds between."""
    return done in (0, rounds) or (every > 0 and done % every == 0)


def report_round(done: int, store: Store, metrics: Metrics, console: Console) -> None:
    """The newest round for the display and for metrics.jsonl: what its commit says, and an evaluation after it."""
    head = store.head()
    if head is not None and head.round == done - 1:
        row = {**head.metrics, **store.evaluations().get(done, {}), "late_batches": store.late_batches()}
        receipts = [Receipt.parse(signed.body) for signed in head.receipts]
        verdicts = ", ".join(f"{r.hotkey[:8]} {r.verdict}" for r in receipts)
        logger.debug("round %d: committed, version %s, %s", head.round, head.version[:12], verdicts or "no orders")
        metrics.log(row)
        console.round(row, receipts)


def rewrite_metrics(store: Store, metrics: Metrics) -> None:
    """After a restart metrics.jsonl says what the ledger says, up to the newest round, which comes anew."""
    looks = store.evaluations()
    metrics.rewrite([{**r.metrics, **looks.get(r.round + 1, {})} for r in store.committed(0)[:-1]])


async def run(config: ValidatorConfig) -> None:
    """Wires the parts, trains, and shows what came of it."""
    import report
    from local_miners import LocalMiners
    from records.console import Console
    from records.metrics import Metrics
    from records.store import Room
    from transport.dendrite import parse_endpoint

    with ExitStack() as stack:
        with cli.mistakes(PROGRAM):
            folder = runs.folder_of(config)
            endpoints = [parse_endpoint(axon, tls=config.tls_ca is not None) for axon in config.axons]
            device = cli.pick_device(config.device)
            cli.set_threads(config.threads)
            cli.reuse_memory()
            console = stack.enter_context(Console(config.rounds, config.logging.debug))
            listed, admission = watched_files(config, console)
            keypair = signing_key(config, [*endpoints, *(listed.endpoints if listed else ())], console)
            stack.enter_context(Room(folder))
            store = stack.enter_context(closing(runs.open_store(config, folder)))
            local = stack.enter_context(  # they import while we do
                LocalMiners(config.local, folder / "miners", config.task, config.device, config.threads)
            )
            task = prepare_task(config, device, console)
            metrics = stack.enter_context(
                closing(Metrics(folder, config.wandb.mode, config.wandb.project, folder.name))
            )
            tensors = stack.enter_context(ThreadPoolExecutor(1, "tensors"))
            endpoints += map(parse_endpoint, local.endpoints(console.say))
            status = await serve_status(config, folder, keypair, admission, store, console)
            network = await connect(config, folder, keypair, endpoints, listed, status, store, console)
            runs.begin(config, store, task.data_digest)
        try:
            with cli.mistakes(PROGRAM):
                market = await restored_market(config, folder, task, network, store, tensors, console)
                rewrite_metrics(store, metrics)
                stack.enter_context(stopping_politely(market, console))
            began = time.monotonic()
            try:
                async with console.watching(network.links):
                    await train(config, market, store, metrics, console)
            finally:
                await market.close()
            seconds = time.monotonic() - began
            if market.stopping:
                raise KeyboardInterrupt
        finally:
            if status is not None:
                await status.close()  # which hands requests on to the network
            await network.close()
        local.stop()  # the baseline gets the whole machine
        console.say(f"model in {report.save_model(task, market.learner, market.round, folder)}")
        gave_up = market.out_of_patience
        del market  # its memory is the baseline's
        report.finish(config, folder, task, device, store, metrics, console, seconds)
        if gave_up:
            console.say(f"stopped after --patience {config.patience} rounds in a row without one good reply")
            raise SystemExit(1)


@contextmanager
def stopping_politely(market: Market, console: Console) -> Iterator[None]:
    """Ctrl-C and SIGTERM close the round: the miners are told to stop, and what they have done is committed.

    A second one stops at once; the round's orders are in the ledger, and --resume goes on with them.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def stop() -> None:
        if market.stopping:
            task.cancel()
            return
        console.say(f"stopping: the round closes in {market.terms.grace_s:g} s at most; once more to stop at once")
        market.request_stop()

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def prepare_task(config: ValidatorConfig, device: torch.device, console: Console) -> Task:
    from tasks import load_task

    flags, cache = getattr(config, config.task), config.cache.expanduser()
    return load_task(config.task).prepare(flags, seed=config.seed, cache=cache, device=device, progress=console.say)


def watched_files(config: ValidatorConfig, console: Console) -> tuple[Axons | None, Admission | None]:
    """What --axons-file and --admit name."""
    from transport.roster import Admission, Axons

    listed = Axons(config.axons_file, config.tls_ca is not None, console.say) if config.axons_file else None
    return listed, Admission(config.admit, console.say, time.monotonic) if config.admit else None


def signing_key(config: ValidatorConfig, endpoints: Sequence[Endpoint], console: Console) -> Keypair:
    """The wallet's hotkey, made where it is missing and every miner is on this machine."""
    from transport.peer import is_loopback
    from transport.wallets import load_keypair

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
    store: Store,
    console: Console,
) -> HealthServer | Desk | None:
    """GET /v1/status, where --serve.port asks for it; with --admit miners announce themselves there, and pull."""
    from transport.desk import Desk
    from transport.health import HealthServer
    from transport.tls import server_context

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

    server: HealthServer | Desk
    tls = server_context(serve.tls_cert, serve.tls_key, "serve") if serve.tls_cert and serve.tls_key else None
    place = (health, serve.ip, serve.port, config.limits, tls)
    if admission is not None:
        server = Desk(keypair, config.task, admission, *place, reaches_tls=config.tls_ca is not None)
    else:
        server = HealthServer(*place)
    at = f"{f'[{serve.ip}]' if ':' in serve.ip else serve.ip}:{await server.start()}"
    console.say(f"status at http{'s' if tls else ''}://{at}/v1/status")
    if admission is not None:
        console.say(f"miners come by: python src/miner.py --validator {at}@{keypair.ss58_address}")
    return server


async def connect(
    config: ValidatorConfig,
    folder: Path,
    keypair: Keypair,
    endpoints: Sequence[Endpoint],
    listed: Axons | None,
    status: HealthServer | Desk | None,
    store: Store,
    console: Console,
) -> Dendrite:
    """Says hello to the miners. ValueError where not one answers in time, and none may come later."""
    from transport.dendrite import Dendrite
    from transport.desk import Desk
    from transport.tls import client_context

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
        lambda path, size: store.make_room(path, size, config.limits),
        client_context(config.tls_ca.expanduser()) if config.tls_ca else None,
    )
    await network.start()
    later = []  # where more may come from
    if listed is not None:
        network.attend(listed.follow(network, tuple(endpoints)))
        later.append(f"--axons-file {config.axons_file}")
    if isinstance(status, Desk):
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
    from durable import replacing

    with replacing(path) as file:
        file.write(json.dumps(pins, indent=2).encode())


async def restored_market(
    config: ValidatorConfig,
    folder: Path,
    task: Task,
    network: Network,
    store: Store,
    tensors: ThreadPoolExecutor,
    console: Console,
) -> Market:
    """The market as the run's ledger left it: the newest whole snapshot, and the committed rounds after it."""
    from aggregation import load_aggregator
    from codec import load_codec
    from market.learner import Learner
    from market.round import Market
    from ranking import load_ranker

    units = task.count(0) * config.batches * (len(config.axons) + config.local)  # of a round with all miners
    learner = Learner(task, config.optimizer_flags, load_codec(config.codec.down), cli.pick_device(config.device))
    market = Market(
        terms_of(config, folder.name),
        task,
        learner,
        network,
        store,
        load_ranker(config.ranking),
        load_aggregator(config.aggregation),
        load_codec(config.codec.up),
        lambda step: task.settings(config.optimizer_flags, step, config.rounds, units),
        tensors,
    )
    snapshot = store.newest_snapshot(console.say)
    if snapshot is not None:
        learner.load_state(snapshot.header, snapshot.tensors)
    try:
        await market.replay(snapshot.round if snapshot else 0)
    except ValueError as error:
        lost = "" if snapshot else "no whole snapshot is left; "
        raise ValueError(f"--run {folder.name}: {lost}{error}; otherwise start another --run") from None
    if market.round:
        console.say(f"resumed after round {market.round} of {config.rounds}, version {learner.version[:12]}")
    return market


def terms_of(config: ValidatorConfig, run: str) -> Terms:
    from market.planning import Terms

    given = config.deadline if isinstance(config.deadline, float) else None
    return Terms(
        run,
        config.batches,
        given or max(300.0, 2 * config.round_seconds),
        config.patience,
        config.codec.up,
        config.codec.down,
        round_s=config.round_seconds,
        auto=config.deadline == "auto",
        quorum=config.quorum,
        deadline_k=config.deadline_k,
        grace_s=config.grace,
        overlap=config.overlap,
        once=config.coverage == "once",
    )


def check(config: ValidatorConfig) -> None:
    """Mistakes that can be seen without importing anything heavy."""
    from aggregation import AGGREGATORS
    from codec import CODECS
    from ranking import load_ranker
    from tasks import TASKS
    from transport.tls import check_pair

    choices = {"task": TASKS, "codec.up": CODECS, "codec.down": CODECS, "aggregation": AGGREGATORS}
    flags = cli.flatten(config)
    for flag, known in choices.items():
        if flags[flag] not in known:
            raise ValueError(f"--{flag} {flags[flag]}: unknown; known: {', '.join(known)}")
    load_ranker(config.ranking)
    config.check_task()
    least = {"rounds": 1, "batches": 1, "patience": 1, "local": 0, "eval_every": 0, "snapshot_every": 1,
             "snapshot_keep": 2, "deadline": 0.1, "connect_timeout": 0.1, "round_seconds": 0, "deadline_k": 0,
             "grace": 0}  # fmt: skip
    for flag, value in least.items():
        given = flags[flag]
        if isinstance(given, int | float) and not value <= given < float("inf"):
            raise ValueError(f"--{flag.replace('_', '-')} {given}: must be {value} or more")
    if not 0 < config.quorum <= 1:
        raise ValueError(f"--quorum {config.quorum:g}: a share of the miners, more than 0 and at most 1")
    if isinstance(config.deadline, float) and config.deadline <= config.round_seconds:
        raise ValueError(
            f"--deadline {config.deadline:g}: must be more than --round-seconds {config.round_seconds:g}; "
            "leave it out for twice that"
        )
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


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with cli.mistakes(PROGRAM):
        config = cli.parse(ValidatorConfig, PROGRAM, argv, runs.resume_flags(argv))
        check(config)
    if config.local:
        # Processes that share the cores: OpenMP's threads shall soon sleep while they wait. With the default count of
        # spins a nano step beside a busy process takes 190 to 700 ms, with this 40, and undisturbed 19 instead of 16.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from records.store import DiskFull

    try:
        asyncio.run(run(config))
    except DiskFull as full:
        cli.fail(PROGRAM, str(full), code=1)
    except KeyboardInterrupt:
        cli.fail(PROGRAM, "stopped; --resume goes on from here", code=130)


if __name__ == "__main__":
    main()
