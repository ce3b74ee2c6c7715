"""Build the parts of a miner from its flags: worker, axon, and the registration with a validator."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilot.app import cli
from pilot.app.miner_flags import MinerConfig
from pilot.common.addresses import EVERY_INTERFACE, is_loopback
from pilot.common.files import evict, mark_used
from pilot.common.units import format_bytes
from pilot.interfaces import Refused
from protocol import MAX_SERVED_BYTES, DataSpec, Fault, Hotkey, TaskSpec

if TYPE_CHECKING:
    from bittensor.sp_core import Keypair

    from pilot.display.console import Activity, MinerConsole
    from pilot.storage.miner_store import FileMinerStore
    from pilot.transport.client.peer import Endpoint
    from pilot.transport.client.registration import Registration
    from pilot.transport.server.axon import Axon
    from pilot.worker.worker import Worker

MADE_COPIES = 2  # of a token file while it is made


@dataclass
class Miner:
    """The parts of a miner. `stack` of `build_miner` closes them."""

    config: MinerConfig
    console: MinerConsole
    worker: Worker
    registration: Registration | None = None
    """With --validator."""
    refused: dict[int, int] = field(default_factory=dict)
    """Requests that the axon refused, by HTTP status."""
    failures: list[asyncio.Future[Any]] = field(default_factory=list)
    """Futures that a failure of our own in the background completes."""

    def activity(self) -> Activity:
        """Return what the worker is doing, for the line at the bottom of a terminal."""
        from pilot.display.console import Activity
        from pilot.training.ranges import size

        worker, refused = self.worker, sum(self.refused.values())
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


async def build_miner(config: MinerConfig, program: str, console: MinerConsole, stack: AsyncExitStack) -> Miner:
    """Build a miner. A mistake of the user's ends the program with one line and exit code 2."""
    from pilot.storage.blob_store import FolderSource
    from pilot.storage.miner_store import FileMinerStore
    from pilot.transport.client.registration import Registration
    from pilot.transport.tls import client_context
    from pilot.transport.wallets import load_keypair
    from pilot.worker.worker import Worker
    from tasks import load_task

    with cli.mistakes(program):
        validator = _find_validator(config)
        allowed = _allowed_hotkeys(config, validator)
        tls = client_context(config.tls_ca.expanduser()) if config.tls_ca else None

        # A missing wallet is created if the validator is on this machine, too.
        local = validator.is_loopback if validator and config.pull else is_loopback(config.axon.ip)
        device, wallet = cli.pick_device(config.device), config.wallet
        keypair: Keypair = load_keypair(wallet.name, wallet.hotkey, str(wallet.path), create=local, say=console.say)
        store = FileMinerStore(config.cache.expanduser() / f"{wallet.name}.{wallet.hotkey}", config.limits)
        if config.unpin:
            store.unpin()

        for task in config.tasks:
            load_task(task)  # imports take seconds: now, rather than in the first round
        worker = Worker(
            keypair.ss58_address,
            frozenset(config.tasks),
            device,
            store,
            partial(_open_blob, config, store),
            console.say,
            compiled=config.compile,
            sources={name: FolderSource(folder) for name, folder in config.source_folders().items()},
            limits=config.limits,
        )
        stack.callback(worker.close)
        console.say(f"tasks {', '.join(config.tasks)} on {device}")

        miner = Miner(config, console, worker, failures=[worker.failed])
        address = None
        if not config.pull:
            axon, address = await _open_axon(config, keypair, store, worker, allowed, console)
            stack.push_async_callback(axon.close)
            miner.refused = axon.refused
            miner.failures.append(axon.accepting)
        if validator is not None:
            miner.registration = Registration(
                worker,
                keypair,
                validator,
                address,
                console.say,
                config.limits,
                serves_tls=config.axon.tls_cert is not None,
                tls=tls,
            )
            stack.push_async_callback(miner.registration.close)
            miner.failures.append(miner.registration.failed)
    return miner


def _find_validator(config: MinerConfig) -> Endpoint | None:
    """Return the endpoint that --validator names. Raises ValueError if it could not reach this miner."""
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


def _allowed_hotkeys(config: MinerConfig, validator: Endpoint | None) -> frozenset[Hotkey]:
    """Return the hotkeys that --allow and --validator name. Raises ValueError for one that is no ss58 address."""
    from pilot.transport.auth import is_hotkey

    for hotkey in config.allow:
        if not is_hotkey(hotkey):
            raise ValueError(f"--allow {hotkey}: no ss58 address; name the hotkeys of your validators")
    return frozenset({*config.allow, *([validator.hotkey] if validator and validator.hotkey else [])})


async def _open_axon(
    config: MinerConfig,
    keypair: Keypair,
    store: FileMinerStore,
    worker: Worker,
    allowed: frozenset[Hotkey],
    console: MinerConsole,
) -> tuple[Axon, str]:
    """Open the axon. Return it and the HOST:PORT to register; the host is left out if it is no single address."""
    from pilot.storage.kept_clock import KeptClock
    from pilot.transport.auth import Guard
    from pilot.transport.server.axon import Axon
    from pilot.transport.tls import server_context

    cert, key = config.axon.tls_cert, config.axon.tls_key
    tls = server_context(cert, key) if cert and key else None
    guard = Guard(allowed, store.pin(), store.set_pin)
    clock_ns = KeptClock(store.folder / "clock")
    axon = Axon(worker, keypair, guard, config.axon.ip, config.axon.port, config.limits, tls, clock_ns)
    bound = await axon.start()
    if (config.axon.external_ip or config.axon.ip) in EVERY_INTERFACE and not config.validator:
        console.say("listening on every interface: replace the host below by this machine's address")
    console.announce(f"serving {config.axon.shown(bound)}@{worker.hotkey}")
    if not config.validator:
        console.say("the address above is for a validator's --axons")
    return axon, config.axon.announced(bound)


def _open_blob(config: MinerConfig, store: FileMinerStore, task: TaskSpec, data: DataSpec, name: str) -> Path:
    """Return the file of a blob of the order's data: sent by the validator, or made from --data or its source."""
    from pilot.storage.miner_store import KEPT_BLOBS
    from tasks import load_task

    ref, source = data.blobs[name], data.source
    path = store.blob(ref)
    if path is not None:
        return path
    if ref.bytes <= MAX_SERVED_BYTES:
        raise Refused(409, f"the order's {name} is not here", missing=[ref])
    local = config.data.expanduser() if config.data else None
    if local is None and source is not None and source.name not in config.datasets:
        raise Refused(
            409, f"data set {source.name}: not among those that this miner's --datasets allows", Fault.WRONG_DATA
        )
    open_other = partial(_open_blob, config, store, task, data)
    cache, limits = config.cache.expanduser(), config.limits
    made = cache / f"tokens-{ref.digest}.bin"
    if made.is_file():
        mark_used(made)
    elif not (local and local.is_file() and local.stat().st_size == ref.bytes):  # else it is read where it lies
        free = shutil.disk_usage(store.folder).free - limits.reserve_bytes
        if ref.bytes > min(limits.cache_bytes, free // MADE_COPIES):
            said = f"the order's {name}: {format_bytes(ref.bytes)} are more than this miner has room for"
            raise Refused(409, said, Fault.WRONG_DATA)
    path = load_task(task.name).make_blob(name, data, open_other, local, cache)
    evict(cache, KEPT_BLOBS, limits.cache_bytes, "tokens-*.bin")
    return path
