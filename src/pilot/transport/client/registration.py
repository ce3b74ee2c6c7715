"""A miner's place with one validator: it announces itself there and, where it opens no port, pulls."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from pilot.common.limits import Limits
from pilot.interfaces import ANNOUNCE_S, MinerService
from pilot.transport.auth import Keypair
from pilot.transport.client.heartbeat import Heartbeat
from pilot.transport.client.peer import Endpoint, Peer, open_session
from pilot.transport.client.pull_client import PullClient


class Registration:
    """`validator` has its hotkey; `serves` is "host:port" (an empty host: as the validator sees it), None to pull."""

    def __init__(
        self,
        service: MinerService,
        keypair: Keypair,
        validator: Endpoint,
        serves: str | None,
        say: Callable[[str], None],
        limits: Limits | None = None,
        *,
        serves_tls: bool = False,
        tls: ssl.SSLContext | None = None,
        interval_s: float = ANNOUNCE_S,
    ) -> None:
        """`tls` holds whom to trust, for a validator that uses TLS."""
        limits = limits or Limits()
        self._session = open_session(limits)
        peer = Peer(validator, validator.hotkey, keypair, self._session, limits, tls)
        self.heartbeat = Heartbeat(service, keypair, peer, serves, serves_tls, say, interval_s)
        self._puller = None if serves else PullClient(service, keypair, peer, self.heartbeat, limits, say)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # done by a failure of our own
        self._running = [asyncio.create_task(job.run()) for job in (self.heartbeat, self._puller) if job]
        for task in self._running:
            task.add_done_callback(self._ended)

    def leave(self) -> None:
        """The validator is told at once that no more orders are taken."""
        self.heartbeat.leave()

    async def settle(self, timeout_s: float) -> None:
        """What was handed over has its last answers, and the validator has heard of the leaving; if it is there."""
        said = asyncio.wait(self._running[:1], timeout=timeout_s)
        await asyncio.gather(said, *([self._puller.finish(timeout_s)] if self._puller else []))

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.wait(self._running)
        await self._session.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)
