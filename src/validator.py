"""A validator: owns a model and its optimizer, and runs the marketplace that trains it.

python src/validator.py --wallet.name validator --wallet.hotkey default --device cuda:0 --axons 8091 8092
python src/validator.py --local 2 --baseline        # two miners of this machine, and plain training to compare

pilot/app/build_validator.py   builds the parts from the flags
pilot/market/round.py          one round: plan, broadcast, collect, verify, aggregate, step, score, commit
pilot/training/learner.py      the model, its optimizer and its versions
pilot/transport/               signed requests and streamed bodies over HTTP
pilot/storage/                 the ledger, payloads and snapshots
"""

from __future__ import annotations

from pilot.common import interrupts

PROGRAM = "validator.py"
if __name__ == "__main__":
    interrupts.catch(PROGRAM, "stopped before the run began; there is nothing to resume")

import asyncio
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING

from pilot.app import cli, export, run_folder
from pilot.app.build_validator import Validator, build_validator
from pilot.app.validator_flags import ValidatorConfig
from protocol import Receipt

if TYPE_CHECKING:
    from pilot.display.console import Console
    from pilot.market.round import Market

logger = logging.getLogger("validator")


async def train(v: Validator) -> None:
    """Run one round after the other, from where the ledger ends to the last."""
    config, market, store = v.config, v.market, v.store
    while True:
        # Once in a while, with the miners already at work on the next round: evaluate, save a snapshot.
        if due(market.round, config.eval_every, config.rounds) and market.round not in store.ledger.evaluations():
            logger.debug("%d rounds done: evaluating", market.round)
            store.add_evaluation(market.round, await market.evaluate())
            v.plot.redraw(store.ledger.evaluations())
        if due(market.round, config.snapshot_every, config.rounds) or market.out_of_patience:
            logger.debug("%d rounds done: saving a snapshot", market.round)
            market.save_snapshot(store.save_snapshot)
        if market.round and market.round != config.rounds and due(market.round, config.save_every, 0):
            await asyncio.to_thread(export.save_model, v.task, market.learner, market.round, v.folder, config.save_keep)
        report_round(v)
        if not market.in_flight:
            await market.open_rounds(config.rounds)  # plan, broadcast
        if not market.in_flight:
            break
        await market.run_round(config.rounds)  # collect to commit; the rounds after it are in flight by then
    await market.finish()


def due(done: int, every: int, rounds: int) -> bool:
    """Return whether something is due at the start, at the end, and after each `every` rounds between."""
    return done in (0, rounds) or (every > 0 and done % every == 0)


def report_round(v: Validator) -> None:
    """Show the newest committed round, with an evaluation after it, and add it to metrics.jsonl."""
    done, ledger, head = v.market.round, v.store.ledger, v.store.head()
    if head is not None and head.round == done - 1:
        row = {**head.metrics, **ledger.evaluations().get(done, {}), "late_batches": ledger.late_batches()}
        receipts = [Receipt.parse(signed.body) for signed in head.receipts]
        verdicts = ", ".join(f"{r.hotkey[:8]} {r.verdict}" for r in receipts)
        logger.debug("round %d: committed, version %s, %s", head.round, head.version[:12], verdicts or "no orders")
        v.metrics.log(row)
        v.console.round(row, receipts)


def rewrite_metrics(v: Validator) -> None:
    """Bring metrics.jsonl in line with the ledger after a restart, up to the round before the newest."""
    evaluations = v.store.ledger.evaluations()
    v.metrics.rewrite([{**r.metrics, **evaluations.get(r.round + 1, {})} for r in v.store.committed(0)[:-1]])


async def run(config: ValidatorConfig) -> None:
    """Build the parts, train, and report."""
    from pilot.app import report

    async with AsyncExitStack() as stack:
        v = await build_validator(config, PROGRAM, stack)
        interrupts.says("stopped; --resume goes on from here")
        with cli.mistakes(PROGRAM):
            rewrite_metrics(v)
        cli.settle_memory()
        began = time.monotonic()
        with stopping_on_signals(v.market, v.console):
            async with v.console.watching(v.network.miner_states):
                await train(v)
        await v.disconnect()  # the baseline gets the whole machine
        seconds, market = time.monotonic() - began, v.market
        done, gave_up, stopped = market.round, market.out_of_patience, market.stopping and market.round < config.rounds
        evaluated = {} if done in v.store.ledger.evaluations() else {done: v.task.evaluate(market.learner.model)}
        export.save_model(v.task, market.learner, done, v.folder, config.save_keep)
        parameters = sum(p.numel() for p in market.learner.parameters.values())
        del v.market, market  # the baseline gets its memory, too
        report.finish(v, evaluated, parameters, seconds, baseline=config.baseline and not stopped)
        if gave_up:
            v.console.say(f"stopped after --patience {config.patience} rounds in a row without one valid reply")
            raise SystemExit(1)
        if stopped:
            v.console.say(f"stopped after round {done} of {config.rounds}; --resume goes on from here")


@contextmanager
def stopping_on_signals(market: Market, console: Console) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM close the round: miners are told to stop, and the work they have done is committed.

    A second signal stops at once; the round's orders are in the ledger, and --resume continues with them.
    """
    loop = asyncio.get_running_loop()

    def stop() -> None:
        console.say(f"stopping: the round closes within {market.policy.grace_s:g} s; again to stop at once")
        market.request_stop()

    with interrupts.asking(lambda: loop.call_soon_threadsafe(stop)):
        yield


@cli.program(PROGRAM, ValidatorConfig)
def main(argv: Sequence[str] | None = None) -> None:
    """Run a validator with these flags, by default the command line's."""
    if argv is None:
        interrupts.catch(PROGRAM, "stopped before the run began; there is nothing to resume")  # for pilot-validator
    argv = sys.argv[1:] if argv is None else argv
    cli.keep_files_private()
    with cli.mistakes(PROGRAM):
        config = cli.parse(ValidatorConfig, PROGRAM, argv, run_folder.resume_flags(argv))
        config.check()
    if config.resume:
        interrupts.says("stopped before the run went on; --resume goes on from where it is")
    if config.local:
        # Processes share the cores, so OpenMP's threads should soon sleep when they wait. With the default spin count a
        # nano step beside a busy process takes 190 to 700 ms; with this it takes 40, and undisturbed 19 instead of 16.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from pilot.interfaces import Diverged
    from pilot.ranking import BadRanker

    try:
        asyncio.run(run(config))
    except Diverged as end:
        cli.fail(PROGRAM, str(end), code=1)
    except BadRanker as mistake:
        cli.fail(PROGRAM, str(mistake), code=2)
    except (KeyboardInterrupt, asyncio.CancelledError):
        cli.fail(PROGRAM, interrupts.line(), interrupts.CODE)


if __name__ == "__main__":
    main()
