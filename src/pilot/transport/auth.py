"""Who says so: signed envelopes for messages, btauth/1 headers for requests, and who may call at all.

An envelope's signature covers its kind and body, so it is evidence however it travelled. A request's signature covers
method, path, query, body and receiver, and is good for ten seconds, once. A clock that is wrong is no lasting error:
the caller of a refused request asks for the server's time in a signed hello, and signs again with it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from bittensor import http_auth
from bittensor.http_auth import AuthError, MalformedAuth, StaleRequest, WrongReceiver
from bittensor.sp_core import CRYPTO_SR25519, Keypair, ss58_decode, verify
from bittensor.wallets import is_bittensor_address

from pilot.common.clock import SteadyClock
from pilot.interfaces import Refused
from protocol import (
    HOTKEY_PATTERN,
    Digest,
    Fault,
    Hotkey,
    Message,
    Order,
    ProtocolError,
    Reply,
    Signed,
    one_line,
    signing_bytes,
)

__all__ = [
    "AuthError",
    "Guard",
    "Keypair",
    "StaleRequest",
    "UsedNonces",
    "Verifier",
    "WrongReceiver",
    "is_hotkey",
    "open_reply",
    "refusal_holds",
    "sign_message",
    "sign_refusal",
    "sign_request",
    "verify_message",
]

M = TypeVar("M", bound=Message)

REFUSAL_SIGNATURE = "X-Pilot-Signature"  # the header of a refusal that its sender has signed

# Headers of a signed request: their names, and all that their values may be. The library would also take numbers and
# hex of any length, and other schemes than that of hotkeys.
HEADERS = {
    http_auth.HEADER_VERSION: re.escape(http_auth.VERSION),
    http_auth.HEADER_HOTKEY: HOTKEY_PATTERN,
    http_auth.HEADER_NONCE: "[0-9]{1,19}",
    http_auth.HEADER_CRYPTO: "sr25519",
    http_auth.HEADER_SIGNATURE: "(0x)?[0-9a-fA-F]{128}",
    http_auth.HEADER_RECEIVER: HOTKEY_PATTERN,
}
FRESH_S = 10  # that a request is good for
REQUIRED = HEADERS.keys() - {http_auth.HEADER_CRYPTO, http_auth.HEADER_RECEIVER}  # a missing receiver is another error


def is_hotkey(address: str) -> bool:
    """Return whether a text is the Bittensor address of a key that can sign.

    Another network's address of the same key is none, so a key has one hotkey. Nor is that of the zero key, the one of
    small order among sr25519's, for which anybody can sign. The time that the library takes grows with the square of
    the length, so the length is checked first.
    """
    return bool(re.fullmatch(HOTKEY_PATTERN, address) and is_bittensor_address(address) and any(ss58_decode(address)))


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
    if not is_hotkey(signed.signer):
        return False
    try:
        signature = bytes.fromhex(signed.signature)
    except ValueError:  # a ledger that was tampered with is read as it is
        return False
    return bool(verify(signing_bytes(signed.kind, signed.body), signature, signed.signer, CRYPTO_SR25519))


def sign_refusal(keypair: Keypair, request: Mapping[str, str], status: int, body: str) -> dict[str, str]:
    """Return the header that signs an error response to the request with the headers `request`, and to no other."""
    return {REFUSAL_SIGNATURE: bytes(keypair.sign(_refusal_bytes(request, status, body))).hex()}


def refusal_holds(
    headers: Mapping[str, str], signer: Hotkey, request: Mapping[str, str], status: int, body: str
) -> bool:
    """Return whether `signer` has signed an error response to the request with the headers `request`."""
    try:
        signature = bytes.fromhex(headers.get(REFUSAL_SIGNATURE, ""))
        return bool(verify(_refusal_bytes(request, status, body), signature, signer, CRYPTO_SR25519))
    except ValueError:
        return False


def _refusal_bytes(request: Mapping[str, str], status: int, body: str) -> bytes:
    """A request's signature covers a nonce: it names the request. A changed caller is another request's refusal."""
    caller, signature = (request.get(name, "") for name in (http_auth.HEADER_HOTKEY, http_auth.HEADER_SIGNATURE))
    return signing_bytes("refusal", f"{status} {caller} {signature} {body}")


def open_reply(signed: Signed, order: Order, order_digest: Digest) -> Reply:
    """The reply to exactly this order, by the miner that it was given to.

    Raises ProtocolError: FORGED where this miner has not signed it as a reply to this order.
    """
    reply = verify_message(signed, Reply, order.hotkey)
    if reply.order != order_digest:  # an older reply, which anyone may have kept
        raise ProtocolError(f"reply: order is {reply.order}, asked was {order_digest}", Fault.FORGED)
    for field, said, asked in (
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
    """btauth/1 headers. `clock_offset_ns`: the receiver's clock minus ours, as its hello told."""
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


def signature_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of a request's signature, each there once and of its form. Raises MalformedAuth."""
    names = {name.lower(): name for name in HEADERS}
    found: dict[str, str] = {}
    for given, value in headers.items():
        name = names.get(given.lower())
        if name is None:
            continue
        if name in found:
            raise MalformedAuth(f"{name} is there twice")
        if not re.fullmatch(HEADERS[name], value):
            raise MalformedAuth(f"{name} is not of its form")
        found[name] = value
    for name in REQUIRED:
        if name not in found:
            raise MalformedAuth(f"missing {name}")
    return found


class UsedNonces:
    """Remembers nonces for as long as they are fresh, by the clock that says so. The library's store has another clock:
    a step between the two would make a nonce fresh that is forgotten.
    """

    def __init__(self, clock_ns: Callable[[], int]) -> None:
        """`clock_ns` never goes back, and no nonce is ahead of it."""
        self._clock_ns = clock_ns
        self._used: dict[tuple[Hotkey, int], int] = {}  # to when it was used, oldest first

    def check_and_store(self, hotkey_ss58: Hotkey, nonce_ns: int) -> bool:
        """Return whether the nonce is new, and remember it."""
        now_ns, key = self._clock_ns(), (hotkey_ss58, nonce_ns)
        while self._used and now_ns - next(iter(self._used.values())) > FRESH_S * 10**9:
            del self._used[next(iter(self._used))]
        if key in self._used:
            return False
        self._used[key] = now_ns
        return True


class Verifier:
    """Checks requests to one hotkey, each nonce once.

    The memory of nonces dies with the process, so those older than it are stale; and none may come from the future,
    because one that this process has taken would then be new to the next. The clock never goes back, whatever the
    machine's does: what was stale stays so.
    """

    def __init__(
        self,
        hotkey: Hotkey,
        clock_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._hotkey = hotkey
        self.clock_ns = SteadyClock(clock_ns, monotonic_ns)
        self._started_ns = self.clock_ns()
        self._used = UsedNonces(self.clock_ns)

    @staticmethod
    def claimed(headers: Mapping[str, str]) -> Hotkey:
        """Who the caller says it is, before anything is verified. Raises MalformedAuth."""
        return signature_headers(headers)[http_auth.HEADER_HOTKEY]

    def verify(self, headers: Mapping[str, str], method: str, path_qs: str, body: bytes) -> Hotkey:
        """The caller. Raises AuthError: MalformedAuth, WrongReceiver, StaleRequest, BadSignature, ReplayedRequest."""
        checked = signature_headers(headers)
        if not is_hotkey(checked[http_auth.HEADER_HOTKEY]):
            raise MalformedAuth(f"{http_auth.HEADER_HOTKEY}: no address of a key that can sign")
        caller = http_auth.verify(
            checked,
            body,
            method=method,
            path=path_qs,
            self_hotkey_ss58=self._hotkey,
            max_age=FRESH_S,
            allowed_skew=0.0,
            nonce_store=self._used,
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
