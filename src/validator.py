"""A validator: owns a model and the only optimizer, and runs the marketplace that trains it.

python src/validator.py --wallet.name validator --wallet.hotkey default --device cuda:0 --axons 8091 8092
python src/validator.py --local 2 --baseline        # two miners of this machine, and plain training beside it

pilot/market/round.py     a round, one method a step: plan, broadcast, collect, verify, aggregate, step, score, commit
pilot/training/learner.py   the model, the optimizer, the chain of versions
transport/          the wire: signed requests, streamed bodies
records/            the ledger, spooled payloads, snapshots, metrics, the display
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING

from pilot.app import build_validator as wiring
from pilot.app import cli
from pilot.app import run_folder as runs
from pilot.app.validator_flags import ValidatorConfig
from protocol import Receipt

if TYPE_CHECKING:
    from pilot.display.console import Console
    from pilot.display.metrics import Metrics
    from pilot.market.round import Market
    from pilot.storage.run_store import RunStore

PROGRAM = "validator.py"
logger = logging.getLogger("validator")


async def train(config: ValidatorConfig, market: Market, store: RunStore, metrics: Metrics, console: Console) -> None:
    """The marketplace, one round after the other, from wherever the ledger ends."""
    while True:
        # Once in a while, with the miners at work on the next round already: evaluate, save a snapshot.
        if due(market.round, config.eval_every, config.rounds) and market.round not in store.ledger.evaluations():
            logger.debug("%d rounds done: evaluating", market.round)
            store.add_evaluation(market.round, await market.evaluate())
        if due(market.round, config.snapshot_every, config.rounds) or market.out_of_patience:
            logger.debug("%d rounds done: saving a snapshot", market.round)
            market.save_snapshot(store.save_snapshot)
        report_round(market.round, store, metrics, console)
        if not market.in_flight:
            await market.open_rounds(config.rounds)  # plan, broadcast
        if not market.in_flight:
            break
        await market.run_round(config.rounds)  # collect to commit; those that follow are in flight then
    await market.finish()


def due(done: int, every: int, rounds: int) -> bool:
    """At the start, at the end, and after each `every` rounds between."""
    return done in (0, rounds) or (every > 0 and done % every == 0)


def report_round(done: int, store: RunStore, metrics: Metrics, console: Console) -> None:
    """The newest round for the display and for metrics.jsonl: what its commit says, and an evaluation after it."""
    head = store.head()
    if head is not None and head.round == done - 1:
        row = {**head.metrics, **store.ledger.evaluations().get(done, {}), "late_batches": store.ledger.late_batches()}
        receipts = [Receipt.parse(signed.body) for signed in head.receipts]
        verdicts = ", ".join(f"{r.hotkey[:8]} {r.verdict}" for r in receipts)
        logger.debug("round %d: committed, version %s, %s", head.round, head.version[:12], verdicts or "no orders")
        metrics.log(row)
        console.round(row, receipts)


def rewrite_metrics(store: RunStore, metrics: Metrics) -> None:
    """After a restart metrics.jsonl says what the ledger says, up to the newest round, which comes anew."""
    looks = store.ledger.evaluations()
    metrics.rewrite([{**r.metrics, **looks.get(r.round + 1, {})} for r in store.committed(0)[:-1]])


async def run(config: ValidatorConfig) -> None:
    """Wires the parts, trains, and shows what came of it."""
    from pilot.app import report
    from pilot.app.local_miners import LocalMiners
    from pilot.display.console import Console
    from pilot.display.metrics import Metrics
    from pilot.storage.run_store import detecting_full_disk
    from pilot.transport.client.dendrite import parse_endpoint

    with ExitStack() as stack:
        with cli.mistakes(PROGRAM):
            folder = runs.folder_of(config)
            endpoints = [parse_endpoint(axon, tls=config.tls_ca is not None) for axon in config.axons]
            device = cli.pick_device(config.device)
            cli.set_threads(config.threads)
            cli.reuse_memory()
            console = stack.enter_context(Console(config.rounds, config.logging.debug))
            listed, admission = wiring.watched_files(config, console)
            keypair = wiring.signing_key(config, [*endpoints, *(listed.endpoints if listed else ())], console)
            stack.enter_context(detecting_full_disk(folder))
            store = stack.enter_context(closing(runs.open_store(config, folder)))
            local = stack.enter_context(  # they import while we do
                LocalMiners(config.local, folder / "miners", config.task, config.device, config.threads)
            )
            task = wiring.prepare_task(config, device, console)
            metrics = stack.enter_context(
                closing(Metrics(folder, config.wandb.mode, config.wandb.project, folder.name))
            )
            tensors = stack.enter_context(ThreadPoolExecutor(1, "tensors"))
            endpoints += map(parse_endpoint, local.endpoints(console.say))
            status = await wiring.serve_status(config, folder, keypair, admission, store, console)
            network = await wiring.connect(config, folder, keypair, endpoints, listed, status, store, console)
            runs.begin(config, store, task.data_digest)
        try:
            with cli.mistakes(PROGRAM):
                market = await wiring.restored_market(config, folder, task, network, store, tensors, console)
                rewrite_metrics(store, metrics)
            cli.settle_memory()
            began = time.monotonic()
            try:
                with stopping_politely(market, console):
                    async with console.watching(network.miner_states):
                        await train(config, market, store, metrics, console)
            finally:
                await market.close()
            seconds = time.monotonic() - began
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
        console.say(f"stopping: the round closes in {market.policy.grace_s:g} s at most; once more to stop at once")
        market.request_stop()

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
    if market.stopping:
        raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with cli.mistakes(PROGRAM):
        config = cli.parse(ValidatorConfig, PROGRAM, argv, runs.resume_flags(argv))
        wiring.check(config)
    if config.local:
        # Processes that share the cores: OpenMP's threads shall soon sleep while they wait. With the default count of
        # spins a nano step beside a busy process takes 190 to 700 ms, with this 40, and undisturbed 19 instead of 16.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from pilot.interfaces import Diverged
    from pilot.storage.run_store import DiskFull

    try:
        asyncio.run(run(config))
    except (DiskFull, Diverged) as end:
        cli.fail(PROGRAM, str(end), code=1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        cli.fail(PROGRAM, "stopped; --resume goes on from here", code=130)


if __name__ == "__main__":
    main()
