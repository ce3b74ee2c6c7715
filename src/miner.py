"""A miner: serves orders for gradients on an axon, or fetches them from its validator.

    python src/miner.py --wallet.name miners --wallet.hotkey M1 --device cuda:1 --axon.port 8091
    python src/miner.py --validator HOST:PORT@SS58            # announces itself there
    python src/miner.py --validator HOST:PORT@SS58 --pull     # and needs no open port

It takes an order, gets the model's version and the data if it lacks them, computes the gradient on the index ranges
that the order assigns, and hands the result over. Receipts say what it was paid and why. Told to end (Ctrl-C, SIGTERM)
it hands over what was done within --grace seconds; told twice, it ends at once. Both times the exit code is 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from ssl import SSLContext
from typing import TYPE_CHECKING, Any

from pilot.app import cli
from pilot.app.miner_flags import MinerConfig
from pilot.common.addresses import is_loopback
from protocol import DataSpec, Hotkey

if TYPE_CHECKING:
    from bittensor.sp_core import Keypair

    from pilot.display.console import Activity, MinerConsole
    from pilot.storage.miner_store import FileMinerStore
    from pilot.transport.client.peer import Endpoint
    from pilot.transport.client.registration import Registration
    from pilot.transport.server.axon import Axon
    from pilot.worker.worker import Worker
    from tasks.tokens import Tokens

Say = Callable[[str], None]

PROGRAM = "miner.py"
WILDCARDS = ("0.0.0.0", "::", "")
GOODBYE_S = 2.0  # for the last answers, once all is handed over


def main(argv: Sequence[str] | None = None) -> None:
    config = cli.parse(MinerConfig, PROGRAM, sys.argv[1:] if argv is None else argv)
    with cli.mistakes(PROGRAM):
        check(config)
        cli.set_threads(config.threads)
        cli.reuse_memory()
    from pilot.display.console import MinerConsole

    with contextlib.suppress(KeyboardInterrupt), MinerConsole(config.logging.debug) as console:
        asyncio.run(serve(config, console))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # else Python waits for the compute thread: its micro-batch may take minutes, and nobody waits for it


def check(config: MinerConfig) -> None:
    """Mistakes that can be seen without importing anything heavy."""
    from pilot.transport.tls import check_pair
    from tasks import TASKS

    for task in config.tasks:
        if task not in TASKS:
            raise ValueError(f"--tasks {task}: unknown; known: {', '.join(TASKS)}")
    if config.compile:
        cli.check_compiler()
    cli.check_port("axon.port", config.axon.port)
    config.limits.check()
    if not config.grace >= 0:
        raise ValueError(f"--grace {config.grace}: must be 0 or more")
    check_pair(config.axon.tls_cert, config.axon.tls_key, "axon")
    if config.pull and config.axon.tls_cert:
        raise ValueError(
            "--axon.tls-cert: nothing is served with --pull; --tls-ca is for reaching the validator by TLS"
        )
    for flag, given in (("--pull", config.pull), ("--tls-ca", config.tls_ca)):
        if given and not config.validator:
            raise ValueError(f"{flag}: needs a validator; name it with --validator host:port@ss58")
    if not is_loopback(config.axon.ip) and not config.allow and not config.validator:
        raise ValueError(
            f"--axon.ip {config.axon.ip}: off loopback anyone can call; name your validators' hotkeys with --allow"
        )
    if config.data is not None and not config.data.expanduser().exists():
        raise ValueError(f"--data {config.data}: no such file or folder")


def find_validator(config: MinerConfig) -> Endpoint | None:
    """Where --validator says. Raises ValueError."""
    from pilot.transport.client.peer import parse_endpoint

    if not config.validator:
        return None
    endpoint = parse_endpoint(config.validator, config.tls_ca is not None, "validator", "validator")
    if endpoint.hotkey is None:
        raise ValueError(f"--validator {config.validator}: write {endpoint}@<the validator's ss58 address>")
    own = config.axon.external_ip or config.axon.ip
    if not config.pull and is_loopback(own) and not endpoint.is_loopback:
        raise ValueError(f"--axon.ip {own}: {endpoint} could not call that; give --axon.ip 0.0.0.0, or --pull")
    return endpoint


def allowed(config: MinerConfig, validator: Endpoint | None) -> frozenset[Hotkey]:
    """Who may call: whom --allow and --validator name. Raises ValueError."""
    from pilot.transport.auth import is_bittensor_address

    for caller in config.allow:
        if not is_bittensor_address(caller):
            raise ValueError(f"--allow {caller}: no ss58 address; name the hotkeys of your validators")
    own = {validator.hotkey} if validator and validator.hotkey else set()
    return frozenset(config.allow) | own


async def serve(config: MinerConfig, console: MinerConsole) -> None:
    """Wires the worker and its ways to a validator; works until it is told to end, or something of ours fails."""
    from pilot.transport.tls import client_context

    told = [asyncio.Event(), asyncio.Event()]  # to end, and to end at once
    axon = membership = None
    async with AsyncExitStack() as stack:
        with cli.mistakes(PROGRAM):
            validator = find_validator(config)
            allow = allowed(config, validator)
            tls = client_context(config.tls_ca.expanduser()) if config.tls_ca else None
            near = validator.is_loopback if validator and config.pull else is_loopback(config.axon.ip)
            keypair, cache, worker = make_worker(config, near, console)
            stack.callback(worker.close)
            serves = None
            if not config.pull:
                axon, serves = await open_axon(config, keypair, cache, worker, allow, console.say)
                stack.push_async_callback(axon.close)
            if validator is not None:
                membership = join(config, keypair, worker, validator, serves, tls, console.say)
                stack.push_async_callback(membership.close)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, tell, told)
        failures: list[asyncio.Future[Any]] = [worker.failed]
        failures += [axon.accepting] if axon else []
        failures += [membership.failed] if membership else []
        refused = axon.refused if axon else {}
        async with console.watching(lambda: activity(worker, sum(refused.values()))):
            if await first(failures, told[0].wait(), parent_gone(config.parent)) == 0:
                console.say(
                    f"ending: hands over what is done, for --grace {config.grace:g} s; told again, it ends at once"
                )
                await first(failures, told[1].wait(), hand_over(config, worker, membership, console))
    if refused:
        console.say("requests refused: " + ", ".join(f"{n} with {status}" for status, n in sorted(refused.items())))


def tell(told: Sequence[asyncio.Event]) -> None:
    """The next of the events."""
    next((event for event in told if not event.is_set()), told[-1]).set()


async def first(failures: Sequence[asyncio.Future[Any]], *causes: Coroutine[Any, Any, object]) -> int:
    """Which of the causes comes first. A failure of ours ends the process with its traceback."""
    waits = [asyncio.ensure_future(cause) for cause in causes]
    try:
        await asyncio.wait([*failures, *waits], return_when=asyncio.FIRST_COMPLETED)
        for future in (*failures, *waits):
            if future.done():
                future.result()
        return next(i for i, wait in enumerate(waits) if wait.done())
    finally:
        for wait in waits:
            wait.cancel()


async def hand_over(
    config: MinerConfig, worker: Worker, membership: Registration | None, console: MinerConsole
) -> None:
    """No more orders; what is done goes to the validator."""
    if membership is not None:
        membership.leave()
    if not await worker.leave(config.grace):
        console.say(f"not everything was handed over within --grace {config.grace:g} s")
    elif membership is not None:
        await membership.settle(GOODBYE_S)


def make_worker(config: MinerConfig, near: bool, console: MinerConsole) -> tuple[Keypair, FileMinerStore, Worker]:
    """`near`: validator and miner are on this machine, where a missing wallet is made. Raises ValueError."""
    from pilot.storage.miner_store import FileMinerStore
    from pilot.transport.wallets import load_keypair
    from pilot.worker.worker import Worker
    from tasks import load_task

    device, wallet = cli.pick_device(config.device), config.wallet
    keypair: Keypair = load_keypair(wallet.name, wallet.hotkey, str(wallet.path), create=near, say=console.say)
    cache = FileMinerStore(config.cache.expanduser() / f"{wallet.name}.{wallet.hotkey}")
    if config.unpin:
        cache.unpin()
    for task in config.tasks:
        load_task(task)  # now, rather than in the first round
    worker = Worker(
        keypair.ss58_address,
        frozenset(config.tasks),
        device,
        cache,
        lambda spec: find_tokens(config, cache, spec),
        console.say,
        compiled=config.compile,
    )
    console.say(f"tasks {', '.join(config.tasks)} on {device}")
    return keypair, cache, worker


async def open_axon(
    config: MinerConfig, keypair: Keypair, cache: FileMinerStore, worker: Worker, allow: frozenset[Hotkey], say: Say
) -> tuple[Axon, str]:
    """The axon, and HOST:PORT for an announcement: no host where it listens on every interface. Raises ValueError."""
    from pilot.transport.auth import Guard
    from pilot.transport.server.axon import Axon
    from pilot.transport.tls import server_context

    cert, key = config.axon.tls_cert, config.axon.tls_key
    tls = server_context(cert, key) if cert and key else None
    guard = Guard(allow, cache.pin(), cache.set_pin)
    axon = Axon(worker, keypair, guard, config.axon.ip, config.axon.port, config.limits, tls)
    port = await axon.start()
    host = config.axon.external_ip or config.axon.ip
    if host in WILDCARDS and not config.validator:
        say("on every interface: in the address below put this machine's own, or name it with --axon.external-ip")
    shown = f"[{host}]" if ":" in host else host
    say(f"serving {shown}:{port}@{worker.hotkey}")
    if not config.validator:
        say("the address above is for a validator's --axons")
    return axon, f"{'' if host in WILDCARDS else shown}:{port}"


def join(
    config: MinerConfig,
    keypair: Keypair,
    worker: Worker,
    validator: Endpoint,
    serves: str | None,
    tls: SSLContext | None,
    say: Say,
) -> Registration:
    """Announces this miner to --validator from now on; without an axon, `serves` None, it pulls. Raises ValueError."""
    from pilot.transport.client.registration import Registration

    serves_tls = config.axon.tls_cert is not None
    return Registration(worker, keypair, validator, serves, say, config.limits, serves_tls=serves_tls, tls=tls)


def activity(worker: Worker, refused: int) -> Activity:
    """What the worker is at, for the line at a terminal. `refused` requests are shown where there were any."""
    from pilot.display.console import Activity
    from pilot.training.ranges import size

    figures = (*worker.summary, *([f"{refused} refused"] if refused else []))
    arriving, job = worker.inbox.arriving, worker.job
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


def find_tokens(config: MinerConfig, cache: FileMinerStore, spec: DataSpec) -> Tokens:
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
