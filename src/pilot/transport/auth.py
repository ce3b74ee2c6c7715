"""Who says so: signed envelopes for messages, btauth/1 headers for requests, and who may call at all.

An envelope's signature covers its kind and body, so it is evidence however it travelled. A request's signature covers
method, path, query, body and receiver, and is good for ten seconds, once. A clock that is wrong is no lasting error:
the refusal carries the server's time, and the caller signs again with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from bittensor import http_auth
from bittensor.http_auth import AuthError, MalformedAuth, StaleRequest, WrongReceiver
from bittensor.sp_core import CRYPTO_SR25519, Keypair, verify
from bittensor.wallets import is_bittensor_address

from pilot.interfaces import Refused
from protocol import Digest, Fault, Hotkey, Message, Order, ProtocolError, Reply, Signed, one_line, signing_bytes

__all__ = [
    "AuthError",
    "Guard",
    "Keypair",
    "StaleRequest",
    "Verifier",
    "WrongReceiver",
    "is_bittensor_address",
    "open_reply",
    "sign_message",
    "sign_request",
    "verify_message",
]

M = TypeVar("M", bound=Message)


def sign_message(keypair: Keypair, message: Message) -> Signed:
    body = message.text()
    signature = bytes(keypair.sign(signing_bytes(message.kind, body)))
    return Signed(kind=message.kind, signer=keypair.ss58_address, body=body, signature=signature.hex())


def verify_message(signed: Signed, cls: type[M], signer: Hotkey) -> M:
    """The checked message of an envelope.

    Raises ProtocolError: FORGED where kind, signer or signature are not those expected, MALFORMED for the body.
    """
    if signed.kind != cls.kind:
        raise ProtocolError(f"an envelope of kind {signed.kind}, expected {cls.kind}", Fault.FORGED)
    if signed.signer != signer:
        raise ProtocolError(f"{cls.kind}: signed by {signed.signer}, expected {signer}", Fault.FORGED)
    if not _signature_holds(signed):
        raise ProtocolError(f"{cls.kind}: the signature is not {signer}'s", Fault.FORGED)
    return cls.parse(signed.body)


def _signature_holds(signed: Signed) -> bool:
    try:
        message = signing_bytes(signed.kind, signed.body)
        return bool(verify(message, bytes.fromhex(signed.signature), signed.signer, CRYPTO_SR25519))
    except ValueError:  # an address whose checksum is wrong
        return False


def open_reply(signed: Signed, order: Order, order_digest: Digest) -> Reply:
    """The reply to exactly this order, by the miner that it was given to. Raises ProtocolError."""
    reply = verify_message(signed, Reply, order.hotkey)
    for field, said, asked in (
        ("order", reply.order, order_digest),
        ("run", reply.run, order.run),
        ("round", reply.round, order.round),
        ("hotkey", reply.hotkey, order.hotkey),
    ):
        if said != asked:
            raise ProtocolError(f"reply: {field} is {said}, asked was {asked}")
    return reply


def sign_request(
    keypair: Keypair, method: str, path_qs: str, receiver: Hotkey, body: bytes = b"", clock_offset_ns: int = 0
) -> dict[str, str]:
    """btauth/1 headers. `clock_offset_ns`: the receiver's clock minus ours, as its last refusal told."""
    nonce_ns = time.time_ns() + clock_offset_ns
    payload = http_auth.build_payload(  # http_auth.sign takes 8 of its 31 us to find out what signs
        scheme="sr25519",
        method=method,
        path=path_qs,
        body=body,
        nonce_ns=nonce_ns,
        sender_ss58=keypair.ss58_address,
        receiver_ss58=receiver,
    )
    return {
        http_auth.HEADER_VERSION: http_auth.VERSION,
        http_auth.HEADER_HOTKEY: keypair.ss58_address,
        http_auth.HEADER_NONCE: str(nonce_ns),
        http_auth.HEADER_SIGNATURE: "0x" + bytes(keypair.sign(payload)).hex(),
        http_auth.HEADER_RECEIVER: receiver,
    }


class Verifier:
    """Checks requests to one hotkey, each nonce once.

    The memory of nonces dies with the process, so those older than it are stale; and none may come from the future,
    because one that this process has taken would then be new to the next.
    """

    def __init__(self, hotkey: Hotkey, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._hotkey = hotkey
        self.clock_ns = clock_ns
        self._started_ns = clock_ns()
        self._seen = http_auth.InMemoryNonceStore()

    @staticmethod
    def claimed(headers: Mapping[str, str]) -> Hotkey:
        """Who the caller says it is, before anything is verified. Raises MalformedAuth."""
        hotkey = headers.get(http_auth.HEADER_HOTKEY)
        if not hotkey:
            raise MalformedAuth(f"missing {http_auth.HEADER_HOTKEY}")
        return hotkey

    def verify(self, headers: Mapping[str, str], method: str, path_qs: str, body: bytes) -> Hotkey:
        """The caller. Raises AuthError: MalformedAuth, WrongReceiver, StaleRequest, BadSignature, ReplayedRequest."""
        caller = http_auth.verify(
            headers,
            body,
            method=method,
            path=path_qs,
            self_hotkey_ss58=self._hotkey,
            allowed_skew=0.0,
            nonce_store=self._seen,
            now_ns=self.clock_ns(),
        )
        if caller.nonce_ns < self._started_ns:
            raise StaleRequest("the nonce is older than this process")
        hotkey: Hotkey = caller.hotkey_ss58
        return hotkey


class Guard:
    """Who may call: those on the allow list; without one, the first correctly signed caller, for good."""

    def __init__(self, allow: frozenset[Hotkey], pinned: Hotkey | None, pin: Callable[[Hotkey], None]) -> None:
        self._allow = allow
        self._pinned = pinned
        self._pin = pin  # keeps the pin beyond this process

    def check(self, caller: Hotkey) -> None:
        """Raises Refused 403 for one that may not call."""
        if self._allow:
            if caller not in self._allow:
                raise Refused(403, f"{one_line(caller)} is not among those that --allow names")
        elif self._pinned is not None and caller != self._pinned:
            raise Refused(403, f"this miner is pinned to {self._pinned}; --unpin frees it for another validator")

    def admit(self, caller: Hotkey) -> None:
        """One whose signature holds. Raises Refused 403."""
        self.check(caller)
        if not self._allow and self._pinned is None:
            self._pin(caller)
            self._pinned = caller
