"""A miner: computes gradients for a validator that orders them.

    python src/miner.py --wallet.name miners --wallet.hotkey M1 --device cuda:1 --axon.port 8091
    python src/miner.py --validator HOST:PORT@SS58            # registers there
    python src/miner.py --validator HOST:PORT@SS58 --pull     # and needs no open port

It takes an order, fetches the model's version and the data if it lacks them, computes the gradient on the index ranges
that the order assigns, and sends the result. Receipts say what it was paid and why.

On Ctrl-C or SIGTERM it hands over what is done within --grace seconds; a second signal stops it at once. Both times the
exit code is 0.
"""

from __future__ import annotations

from pilot.common import interrupts

PROGRAM = "miner.py"
if __name__ == "__main__":
    interrupts.catch(PROGRAM, "stopped", code=0)

import asyncio
import contextlib
import os
import sys
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from pilot.app import cli
from pilot.app.build_miner import Miner, build_miner
from pilot.app.miner_flags import MinerConfig

if TYPE_CHECKING:
    from pilot.display.console import MinerConsole

GOODBYE_S = 2.0  # for the last answers, once all work is handed over


async def serve(config: MinerConfig, console: MinerConsole) -> None:
    """Work for the validator until a signal, the end of the parent process, or a failure of our own."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    async with AsyncExitStack() as stack:
        miner = await build_miner(config, PROGRAM, console, stack)
        stack.enter_context(interrupts.asking(lambda: loop.call_soon_threadsafe(stop.set)))
        async with console.watching(miner.activity):
            if await first_of(miner, stop.wait(), parent_gone(config.parent)) == 0:
                console.say(f"stopping: hands over its work within {config.grace:g} s; again to stop at once")
                await first_of(miner, hand_over(miner))
    if miner.refused:
        counts = ", ".join(f"{count} with {status}" for status, count in sorted(miner.refused.items()))
        console.say(f"requests refused: {counts}")


async def first_of(miner: Miner, *events: Coroutine[Any, Any, object]) -> int:
    """Return the index of the event that comes first. Raises the failure of a background task of the miner's."""
    waits = [asyncio.ensure_future(event) for event in events]
    try:
        await asyncio.wait([*miner.failures, *waits], return_when=asyncio.FIRST_COMPLETED)
        for future in (*miner.failures, *waits):
            if future.done():
                future.result()
        return next(i for i, wait in enumerate(waits) if wait.done())
    finally:
        for wait in waits:
            wait.cancel()


async def hand_over(miner: Miner) -> None:
    """Take no more orders, and send the validator the work that is done."""
    grace = miner.config.grace
    if miner.registration is not None:
        miner.registration.leave()
    if not await miner.worker.leave(grace):
        miner.console.say(f"not everything was handed over within --grace {grace:g} s")
    elif miner.registration is not None:
        await miner.registration.settle(GOODBYE_S)


async def parent_gone(pid: int) -> None:
    """Return when the process that started this one has ended; never for pid 0."""
    while not pid or os.getppid() == pid:
        await asyncio.sleep(0.5)


@cli.program(PROGRAM, MinerConfig)
def main(argv: Sequence[str] | None = None) -> None:
    """Run a miner with these flags, by default the command line's."""
    if argv is None:
        interrupts.catch(PROGRAM, "stopped", code=0)  # for pilot-miner, which imports this module
    cli.keep_files_private()
    config = cli.parse(MinerConfig, PROGRAM, sys.argv[1:] if argv is None else argv)
    with cli.mistakes(PROGRAM):
        config.check()
        cli.set_threads(config.threads)
        cli.reuse_memory()
    from pilot.display.console import MinerConsole

    with contextlib.suppress(KeyboardInterrupt), MinerConsole(config.logging.least, config.logging.json) as console:
        asyncio.run(serve(config, console))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Python would wait for the compute thread, whose micro-batch may take minutes


if __name__ == "__main__":
    main()
