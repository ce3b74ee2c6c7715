"""A miner: serves orders for gradients on an axon.

    python src/miner.py --wallet.name miners --wallet.hotkey M1 --device cuda:1 --axon.port 8091

It takes an order, gets the model's version and the data if it lacks them, computes the gradient on the index ranges
that the order assigns, and serves the result until the next one. Receipts say what it was paid and why.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import cli
from market.config import MinerConfig
from protocol import DataSpec, Hotkey

if TYPE_CHECKING:
    from bittensor.sp_core import Keypair

    from market.worker import Worker
    from records.cache import Cache
    from records.console import Activity, MinerConsole
    from tasks.tokens import Tokens

PROGRAM = "miner.py"
WILDCARDS = ("0.0.0.0", "::", "")


def main(argv: Sequence[str] | None = None) -> None:
    config = cli.parse(MinerConfig, PROGRAM, sys.argv[1:] if argv is None else argv)
    with cli.mistakes(PROGRAM):
        check(config)
        cli.set_threads(config.threads)
        cli.reuse_memory()
    from records.console import MinerConsole

    with contextlib.suppress(KeyboardInterrupt), MinerConsole(config.logging.debug) as console:
        asyncio.run(serve(config, console))


def check(config: MinerConfig) -> None:
    """Mistakes that can be seen without importing anything."""
    from tasks import TASKS

    for task in config.tasks:
        if task not in TASKS:
            raise ValueError(f"--tasks {task}: unknown; known: {', '.join(TASKS)}")
    if config.compile:
        cli.check_compiler()
    cli.check_port("axon.port", config.axon.port)
    config.limits.check()
    if (config.axon.tls_cert is None) != (config.axon.tls_key is None):
        given, other = ("cert", "key") if config.axon.tls_cert else ("key", "cert")
        raise ValueError(f"--axon.tls-{given}: TLS needs --axon.tls-{other} too")
    if not is_loopback(config.axon.ip) and not config.allow:
        raise ValueError(
            f"--axon.ip {config.axon.ip}: off loopback anyone can call; name your validators' hotkeys with --allow"
        )
    if config.data is not None and not config.data.expanduser().exists():
        raise ValueError(f"--data {config.data}: no such file or folder")


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def serve(config: MinerConfig, console: MinerConsole) -> None:
    """Wires key, cache, worker and axon; serves until it is told to end, or its work fails."""
    from market.worker import Worker
    from records.cache import Cache
    from tasks import load_task
    from transport.auth import Guard, is_bittensor_address
    from transport.axon import Axon
    from transport.tls import server_context
    from transport.wallets import load_keypair

    say = console.say
    with cli.mistakes(PROGRAM):
        for caller in config.allow:
            if not is_bittensor_address(caller):
                raise ValueError(f"--allow {caller}: no ss58 address; name the hotkeys of your validators")
        device = cli.pick_device(config.device)
        wallet = config.wallet
        loopback = is_loopback(config.axon.ip)
        keypair: Keypair = load_keypair(wallet.name, wallet.hotkey, str(wallet.path), create=loopback, say=say)
        cache = Cache(config.cache.expanduser() / f"{wallet.name}.{wallet.hotkey}")
        if config.unpin:
            cache.unpin()
        hotkey: Hotkey = keypair.ss58_address
        for task in config.tasks:
            load_task(task)  # now, rather than in the first round
        worker = Worker(
            hotkey,
            frozenset(config.tasks),
            device,
            cache,
            lambda spec: find_tokens(config, cache, spec),
            say,
            compiled=config.compile,
        )
        guard = Guard(frozenset(config.allow), cache.pin(), cache.set_pin)
        tls = None
        if config.axon.tls_cert and config.axon.tls_key:
            tls = server_context(config.axon.tls_cert.expanduser(), config.axon.tls_key.expanduser())
        axon = Axon(worker, keypair, guard, config.axon.ip, config.axon.port, config.limits, tls)
        port = await axon.start()
    host = config.axon.external_ip or config.axon.ip
    if host in WILDCARDS:
        say("on every interface: in the address below put this machine's own, or name it with --axon.external-ip")
    say(f"serving {f'[{host}]' if ':' in host else host}:{port}@{hotkey}")
    say(f"tasks {', '.join(config.tasks)} on {device}; the address above is for a validator's --axons")
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    waits: list[asyncio.Future[Any]] = [
        worker.failed,
        axon.accepting,
        asyncio.ensure_future(ended.wait()),
        asyncio.ensure_future(parent_gone(config.parent)),
    ]
    try:
        async with console.watching(lambda: activity(worker, axon.refused.total())):
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for future in done:
            future.result()  # our own fault ends the process with its traceback
    finally:
        worker.close()
        await axon.close()
        if axon.refused:
            say("requests refused: " + ", ".join(f"{n} with {status}" for status, n in sorted(axon.refused.items())))


def activity(worker: Worker, refused: int) -> Activity:
    """What the worker is at, for the line at a terminal. `refused` requests are shown where there were any."""
    from market.cursor import size
    from records.console import Activity

    figures = (*worker.figures, *([f"{refused} refused"] if refused else []))
    arriving, job = worker.arriving, worker.job
    if arriving is not None:
        held, whole = arriving.held, arriving.ref.bytes
        return Activity(f"receiving the state, {100 * held // whole} %", held, whole, figures)
    if job is None:
        return Activity("waiting for an order", figures=figures)
    done, whole = job.batches_done, size(job.order.ranges)
    at = "refused" if job.refusal else "done" if job.finished.is_set() else f"{done}/{whole} batches"
    return Activity(f"round {job.order.round}, {at}", done, whole, figures)


async def parent_gone(pid: int) -> None:
    """Returns when the process that started this one is no more; never, for pid 0."""
    while not pid or os.getppid() == pid:
        await asyncio.sleep(0.5)


def find_tokens(config: MinerConfig, cache: Cache, spec: DataSpec) -> Tokens:
    """The order's data: handed over by the validator, or, where that is too large, made from --data or a hub's rows."""
    from tasks.text import rebuild_tokens
    from tasks.tokens import Tokens

    path = cache.blob(spec.tokens)
    if path is None:
        local = config.data.expanduser() if config.data else None
        vocabulary = cache.blob(spec.vocabulary) if spec.vocabulary else None
        path = rebuild_tokens(spec, local, vocabulary, config.cache.expanduser())
    return Tokens.open(path)


if __name__ == "__main__":
    main()
