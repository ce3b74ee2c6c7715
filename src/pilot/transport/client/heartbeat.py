"""A miner tells its validator that it is there, again and again: either may be restarted, or away, at any time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from pilot.interfaces import ANNOUNCE_S, MinerService, Refused
from pilot.transport.auth import Keypair, sign_message
from pilot.transport.client.peer import Peer
from pilot.transport.client.remote_miner import Lost, Unproven, pause
from protocol import Announce, ProtocolError, Refusal, new_nonce, one_line


class Heartbeat:
    """Announces `service`, which serves at `endpoint` ("host:port", by TLS or not), or pulls where that is None.

    `session` names this process. `registered` is set while the validator knows it. What changes is said, once.
    """

    def __init__(
        self,
        service: MinerService,
        keypair: Keypair,
        validator: Peer,
        endpoint: str | None,
        tls: bool,
        say: Callable[[str], None],
        interval_s: float = ANNOUNCE_S,
    ) -> None:
        self.session = new_nonce()
        self.registered = asyncio.Event()
        self._service, self._keypair, self._validator = service, keypair, validator
        self._endpoint, self._tls, self._say, self._interval_s = endpoint, tls, say, interval_s
        self._wake = asyncio.Event()
        self._leaving = False
        self._proven = False
        self._said = ""

    def announce_now(self) -> None:
        """Now: the validator does not know us any more."""
        self.registered.clear()
        self._wake.set()

    async def run(self) -> None:
        """For ever, or until the validator has heard that this miner is leaving."""
        attempt = 0
        while True:
            self._wake.clear()
            heard = await self._announce()
            if heard and self._leaving:
                return
            attempt = 0 if heard else attempt + 1
            wait_s = self._interval_s * random.uniform(0.8, 1.2) if heard else pause(attempt, self._interval_s / 2)
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def leave(self) -> None:
        """The next announcement, at once, says so."""
        self._leaving = True
        self._wake.set()

    async def _announce(self) -> bool:
        """Whether the validator took it."""
        try:
            if not self._proven:
                await self._ask_for_proof()
            hello = self._service.hello(new_nonce())
            announce = Announce(
                hotkey=self._service.hotkey,
                endpoint=self._endpoint,
                tls=self._tls,
                tasks=hello.tasks,
                codecs=hello.codecs,
                leaving=self._leaving,
                time_ns=time.time_ns(),
            )
            body = sign_message(self._keypair, announce).model_dump_json().encode()
            target = f"/v1/announce?session={self.session}"
            status, text = await self._validator.call("POST", target, Refusal.kind, body=body)
            self._tell(
                f"the validator: {Refusal.parse(text).reason}" if status == 202 else "announced to the validator"
            )
        except Unproven as refused:
            self._fail(f"not taken by the validator: {refused}")
        except Lost as lost:
            self._proven = False
            self._fail(
                f"the validator is away ({lost.hint or lost}); tried again until it is there", lost.hint or "away"
            )
        except Refused as refused:
            self._fail(f"not taken by the validator: {refused.reason}")
        except ProtocolError as error:
            self._fail(f"no validator that we know: {error}")
        else:
            self.registered.set()
            return True
        return False

    async def _ask_for_proof(self) -> None:
        """Raises ProtocolError where another answers there, and as `Peer.hello` does."""
        hello = await self._validator.hello()
        if hello.hotkey != self._validator.hotkey:
            raise ProtocolError(f"hello: signed by {hello.hotkey}, expected {self._validator.hotkey}")
        self._proven = True

    def _fail(self, text: str, why: str = "") -> None:
        self.registered.clear()
        self._tell(text, why)

    def _tell(self, text: str, why: str = "") -> None:
        """Once for the same reason in a row."""
        if (why or text) != self._said and not self._leaving:
            self._said = why or text
            self._say(f"--validator {self._validator.endpoint}: {one_line(text)}")
