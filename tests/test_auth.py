"""Envelopes, signed requests, who may call, and key files: real keys, real signatures, real files."""

from __future__ import annotations

import io
import json
import shlex
import time
from pathlib import Path

import pytest
from bittensor import Wallet, http_auth
from bittensor.sp_core import CRYPTO_SR25519, ss58_encode, verify

from pilot.interfaces import Refused
from pilot.storage.kept_clock import KeptClock
from pilot.transport.auth import (
    AuthError,
    Guard,
    StaleRequest,
    UsedNonces,
    Verifier,
    WrongReceiver,
    is_hotkey,
    sign_message,
    sign_request,
    verify_message,
)
from pilot.transport.wallets import load_keypair
from protocol import Fault, Message, Order, ProtocolError, Reply, Signed, Stop
from tests.echo import MALLORY, MINER, VALIDATOR, make_order

ORDER = make_order()


def fault_of(signed: Signed, cls: type[Message] = Order) -> Fault:
    with pytest.raises(ProtocolError) as caught:
        verify_message(signed, cls, VALIDATOR.ss58_address)
    return caught.value.fault


def test_an_envelope_opens_to_the_same_message() -> None:
    signed = Signed.parse(sign_message(VALIDATOR, ORDER).model_dump_json())
    assert verify_message(signed, Order, VALIDATOR.ss58_address) == ORDER


def test_an_envelope_of_another_signer_kind_body_or_signature_is_forged() -> None:
    signed = sign_message(VALIDATOR, ORDER)
    assert fault_of(sign_message(MALLORY, ORDER)) is Fault.FORGED
    assert fault_of(signed, Reply) is Fault.FORGED
    assert fault_of(signed.model_copy(update={"body": signed.body.replace('"round":0', '"round":1')})) is Fault.FORGED
    assert fault_of(signed.model_copy(update={"signature": "00" * 64})) is Fault.FORGED
    assert fault_of(sign_message(MALLORY, ORDER).model_copy(update={"signer": VALIDATOR.ss58_address})) is Fault.FORGED


def test_a_signature_of_one_kind_is_none_of_another() -> None:
    signed = sign_message(VALIDATOR, ORDER).model_copy(update={"kind": "stop"})
    assert fault_of(signed, Stop) is Fault.FORGED


def test_an_address_with_a_wrong_checksum_is_forged() -> None:
    address = VALIDATOR.ss58_address[:-1] + ("2" if VALIDATOR.ss58_address[-1] != "2" else "3")
    with pytest.raises(ProtocolError) as caught:
        verify_message(sign_message(VALIDATOR, ORDER).model_copy(update={"signer": address}), Order, address)
    assert caught.value.fault is Fault.FORGED


def test_a_signed_body_that_is_no_message_is_malformed() -> None:
    class Odd(Order):
        extra: int = 1

    values = {name: getattr(ORDER, name) for name in Order.model_fields}
    assert fault_of(sign_message(VALIDATOR, Odd(**values))) is Fault.MALFORMED


def test_a_request_is_good_once() -> None:
    verifier = Verifier(MINER.ss58_address)
    headers = sign_request(VALIDATOR, "POST", "/v1/order", MINER.ss58_address, b"body")
    assert verifier.verify(headers, "POST", "/v1/order", b"body") == VALIDATOR.ss58_address
    with pytest.raises(AuthError):
        verifier.verify(headers, "POST", "/v1/order", b"body")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("GET", "/v1/order", b"body"), ("POST", "/v1/order?x=1", b"body"), ("POST", "/v1/order", b"bodY")],
)
def test_a_signature_covers_method_path_and_body(method: str, path: str, body: bytes) -> None:
    verifier = Verifier(MINER.ss58_address)
    headers = sign_request(VALIDATOR, "POST", "/v1/order", MINER.ss58_address, b"body")
    with pytest.raises(AuthError):
        verifier.verify(headers, method, path, body)


def test_a_request_to_another_is_misdirected() -> None:
    headers = sign_request(VALIDATOR, "GET", "/", MALLORY.ss58_address)
    with pytest.raises(WrongReceiver):
        Verifier(MINER.ss58_address).verify(headers, "GET", "/", b"")


@pytest.mark.parametrize("offset_s", [-11, 2, 3600, -3600])
def test_old_and_future_nonces_are_stale_until_the_offset_is_known(offset_s: int) -> None:
    verifier = Verifier(MINER.ss58_address, lambda: time.time_ns() - offset_s * 10**9)
    with pytest.raises(StaleRequest):
        verifier.verify(sign_request(VALIDATOR, "GET", "/", MINER.ss58_address), "GET", "/", b"")
    offset_ns = verifier.clock_ns() - time.time_ns()
    headers = sign_request(VALIDATOR, "GET", "/", MINER.ss58_address, clock_offset_ns=offset_ns)
    assert verifier.verify(headers, "GET", "/", b"") == VALIDATOR.ss58_address


# --- keys and headers that the library would take ---------------------------------------------------------------------

NETWORKS = (2, 42, 63, 255)  # whose addresses match the protocol's pattern
ANYBODYS = "0x" + "00" * 63 + "80"  # the zero key's signature for everything


@pytest.mark.parametrize("network", NETWORKS)
def test_the_zero_key_signs_nothing(network: int) -> None:
    zero = ss58_encode(bytes(32), network)
    assert verify(b"anything", bytes.fromhex(ANYBODYS[2:]), zero, CRYPTO_SR25519)
    headers = sign_request(MALLORY, "GET", "/", MINER.ss58_address)
    with pytest.raises(AuthError):
        Verifier(MINER.ss58_address).verify(
            headers | {"X-Bittensor-Hotkey": zero, "X-Bittensor-Signature": ANYBODYS}, "GET", "/", b""
        )
    forged = sign_message(VALIDATOR, ORDER).model_copy(update={"signer": zero, "signature": ANYBODYS[2:]})
    with pytest.raises(ProtocolError) as caught:
        verify_message(forged, Order, zero)
    assert caught.value.fault is Fault.FORGED
    assert not is_hotkey(zero)


@pytest.mark.parametrize("network", [network for network in NETWORKS if network != 42])
def test_a_key_has_one_hotkey(network: int) -> None:
    """The same key's address in another network would be another miner."""
    alias = ss58_encode(VALIDATOR.public_key, network)
    verifier, nonce_ns = Verifier(MINER.ss58_address), time.time_ns()
    payload = http_auth.build_payload(
        scheme="sr25519",
        method="GET",
        path="/",
        body=b"",
        nonce_ns=nonce_ns,
        sender_ss58=alias,
        receiver_ss58=MINER.ss58_address,
    )
    headers = sign_request(VALIDATOR, "GET", "/", MINER.ss58_address) | {
        "X-Bittensor-Hotkey": alias,
        "X-Bittensor-Nonce": str(nonce_ns),
        "X-Bittensor-Signature": "0x" + bytes(VALIDATOR.sign(payload)).hex(),
    }
    with pytest.raises(AuthError):
        verifier.verify(headers, "GET", "/", b"")
    assert fault_of(sign_message(VALIDATOR, ORDER).model_copy(update={"signer": alias})) is Fault.FORGED


@pytest.mark.parametrize("scheme", ["ed25519", "1", "0", "2", "SR25519", "Sr25519", "sr25519 ", "", "sr25519,ed25519"])
def test_hotkeys_sign_by_one_scheme(scheme: str) -> None:
    verifier = Verifier(MINER.ss58_address)
    headers = sign_request(VALIDATOR, "GET", "/", MINER.ss58_address)
    for name in ("X-Bittensor-Crypto", "x-bittensor-crypto"):
        with pytest.raises(AuthError, match="X-Bittensor-Crypto"):
            verifier.verify(headers | {name: scheme}, "GET", "/", b"")
    assert verifier.verify(headers | {"X-Bittensor-Crypto": "sr25519"}, "GET", "/", b"") == VALIDATOR.ss58_address


HOTKEY, NONCE, SIGNATURE = "X-Bittensor-Hotkey", "X-Bittensor-Nonce", "X-Bittensor-Signature"
ADDRESS = VALIDATOR.ss58_address


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (HOTKEY, "5" + "z" * 7_900),
        (HOTKEY, ADDRESS + "1" * 7_000),
        (HOTKEY, ADDRESS + "\n"),
        (HOTKEY, ADDRESS[:45]),
        (HOTKEY, ADDRESS.replace(ADDRESS[9], "0", 1)),
        (HOTKEY, "0x" + "00" * 32),
        (HOTKEY, ""),
        (NONCE, "9" * 4_000),
        (NONCE, " 1700000000000000000"),
        (NONCE, "1_000"),
        (NONCE, "-1"),
        (NONCE, "\u0661\u0662"),
        (NONCE, ""),
        (SIGNATURE, "0x" + "0" * 7_000),
        (SIGNATURE, "0x" + "00 " * 64),
        (SIGNATURE, "00" * 63),
        ("X-Bittensor-Receiver", "5" + "z" * 7_900),
        ("X-Bittensor-Version", "01"),
    ],
    ids=lambda text: text[:20],
)
def test_a_header_of_another_form_never_reaches_the_library(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_auth, "verify", None)
    monkeypatch.setattr("pilot.transport.auth.is_bittensor_address", None)
    with pytest.raises(AuthError, match=name):
        Verifier(MINER.ss58_address).verify(
            sign_request(VALIDATOR, "GET", "/", MINER.ss58_address) | {name: value}, "GET", "/", b""
        )


@pytest.mark.parametrize("name", [HOTKEY, NONCE, SIGNATURE, "X-Bittensor-Version", "X-Bittensor-Receiver"])
def test_a_header_that_is_there_twice_is_refused(name: str) -> None:
    """Else one check may read the first of them and another the last."""
    headers = sign_request(VALIDATOR, "GET", "/", MINER.ss58_address)
    with pytest.raises(AuthError, match="twice"):
        Verifier(MINER.ss58_address).verify(headers | {name.lower(): headers[name]}, "GET", "/", b"")


@pytest.mark.parametrize("back_s", [-3600, 0, 1, 5, 9, 51, 70, 3600, 10**6])
def test_a_clock_that_is_set_back_makes_no_nonce_fresh(back_s: int) -> None:
    """Whenever that is, and whatever is forgotten meanwhile."""
    for steps_after_s in (0, 5, 15, 61, 130):
        wall, monotonic = time.time_ns(), 10**9
        verifier = Verifier(MINER.ss58_address, lambda: wall, lambda: monotonic)  # noqa: B023
        headers = sign_request(VALIDATOR, "GET", "/", MINER.ss58_address, clock_offset_ns=10**9)
        wall, monotonic = wall + 2 * 10**9, monotonic + 2 * 10**9
        assert verifier.verify(headers, "GET", "/", b"") == VALIDATOR.ss58_address
        for second in range(200):
            wall, monotonic = wall + 10**9, monotonic + 10**9
            wall -= back_s * 10**9 * (second == steps_after_s)
            with pytest.raises(AuthError):
                verifier.verify(headers, "GET", "/", b"")
            other = sign_request(
                MALLORY, "GET", "/", MINER.ss58_address, b"", verifier.clock_ns() - time.time_ns() - 10**9
            )
            if second % 20 == 0:
                assert verifier.verify(other, "GET", "/", b"") == MALLORY.ss58_address


@pytest.mark.parametrize("back_s", [0, 5, 9, 30, 60, 3600])
def test_a_clock_that_is_set_back_before_a_restart_makes_no_nonce_fresh(back_s: int, tmp_path: Path) -> None:
    """Nor later on, when the machine's clock is there again; and a caller that asks for the time is served."""
    now, passed = time.time_ns(), 0
    before = Verifier(MINER.ss58_address, KeptClock(tmp_path / "clock", lambda: now), lambda: 0)
    now += 20 * 10**9
    headers = sign_request(VALIDATOR, "GET", "/", MINER.ss58_address, clock_offset_ns=now - 10**8 - time.time_ns())
    assert before.verify(headers, "GET", "/", b"") == VALIDATOR.ss58_address
    now -= back_s * 10**9
    after = Verifier(MINER.ss58_address, KeptClock(tmp_path / "clock", lambda: now), lambda: passed)
    for _ in range(100):
        now, passed = now + 10**9, passed + 10**9
        with pytest.raises(AuthError):
            after.verify(headers, "GET", "/", b"")
    offset_ns = after.clock_ns() - time.time_ns() - 10**8
    fresh = sign_request(VALIDATOR, "GET", "/", MINER.ss58_address, clock_offset_ns=offset_ns)
    assert after.verify(fresh, "GET", "/", b"") == VALIDATOR.ss58_address


def test_a_clock_that_was_hours_ahead_is_said(tmp_path: Path) -> None:
    file = tmp_path / "clock"
    KeptClock(file, lambda: time.time_ns() + 5 * 3600 * 10**9)()
    with pytest.raises(
        ValueError, match=rf"{file}: the clock of this machine was 5.0 hours ahead .* set the clock right"
    ):
        KeptClock(file)
    file.write_text("soon")
    with pytest.raises(ValueError, match=rf"{file}: does not hold a time; delete it"):
        KeptClock(file)


def test_nonces_are_forgotten_when_they_are_stale() -> None:
    now = 0
    used = UsedNonces(lambda: now)
    for second in range(100):
        now = second * 10**9
        assert used.check_and_store("5A", now)
        assert used.check_and_store("5B", now)
        assert not used.check_and_store("5A", max(now - 10 * 10**9, 0))
    assert len(used._used) == 22


def test_no_request_is_good_for_two_processes() -> None:
    """What one process could have accepted, the next refuses: also a nonce from the future."""
    for offset_ns in (0, 10**9):
        headers = sign_request(VALIDATOR, "GET", "/", MINER.ss58_address, clock_offset_ns=offset_ns)
        with pytest.raises(StaleRequest):
            Verifier(MINER.ss58_address).verify(headers, "GET", "/", b"")


def test_without_an_allow_list_the_first_caller_is_pinned() -> None:
    pins: list[str] = []
    guard = Guard(frozenset(), None, pins.append)
    guard.admit("first")
    guard.admit("first")
    assert pins == ["first"]
    with pytest.raises(Refused, match=r"--unpin") as caught:
        guard.admit("second")
    assert caught.value.status == 403
    with pytest.raises(Refused):
        Guard(frozenset(), "first", pins.append).admit("second")


def test_an_allow_list_decides_alone() -> None:
    pins: list[str] = []
    guard = Guard(frozenset({"a", "b"}), "c", pins.append)
    guard.admit("a")
    guard.admit("b")
    with pytest.raises(Refused, match=r"--allow") as caught:
        guard.admit("c")
    assert caught.value.status == 403
    assert not pins


def test_a_missing_wallet_is_made_once_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    first = load_keypair("demo", "h1", str(tmp_path), create=True, say=said.append)
    again = load_keypair("demo", "h1", str(tmp_path), create=False, say=said.append)
    other = load_keypair("demo", "h2", str(tmp_path), create=True, say=said.append)
    assert first.ss58_address == again.ss58_address != other.ss58_address
    assert len(said) == 2
    assert all("unencrypted" in line and "\n" not in line for line in said)


def test_a_missing_wallet_elsewhere_names_the_command(tmp_path: Path) -> None:
    path = str(tmp_path / "a folder")
    with pytest.raises(ValueError, match=r"--wallet\.hotkey h1") as caught:
        load_keypair("cold", "h1", path, create=False, say=print)
    line = str(caught.value)
    command = shlex.split(line.partition("make one with: ")[2])
    assert command == ["btcli", "wallet", "new-hotkey", "-w", "cold", "-H", "h1", "--wallet-path", path]
    assert "\n" not in line
    assert not Path(path).exists()


def test_a_broken_key_file_is_one_line(tmp_path: Path) -> None:
    load_keypair("cold", "h1", str(tmp_path), create=True, say=lambda _: None)
    (tmp_path / "cold" / "hotkeys" / "h1").write_text("not a key")
    with pytest.raises(ValueError, match=r"--wallet\.hotkey h1: ") as caught:
        load_keypair("cold", "h1", str(tmp_path), create=True, say=print)
    assert "\n" not in str(caught.value)


def key_file(folder: Path, content: dict[str, object] | str) -> None:
    """Write it as the hotkey `cold/h1`."""
    path = folder / "cold" / "hotkeys" / "h1"
    path.parent.mkdir(parents=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("content", ["$NACL and what follows", "$ANSIBLE_VAULT;1.1;AES256", "gAAAAAB and what follows"])
def test_an_encrypted_hotkey_without_a_terminal_is_refused(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file(tmp_path, content)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ValueError, match=r"^--wallet\.hotkey h1: .* is encrypted, and there is no terminal") as caught:
        load_keypair("cold", "h1", str(tmp_path), create=True, say=print)
    assert "\n" not in str(caught.value)
    assert "BT_WALLET_PASSWORD" in str(caught.value)


@pytest.mark.slow  # the key is derived from the password with much memory
def test_the_environment_gives_the_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wallet = Wallet(name="cold", hotkey="h1", path=str(tmp_path))
    wallet.create_new_hotkey(use_password=True, hotkey_password="a-test-only-password", suppress=True)
    monkeypatch.setenv("BT_WALLET_PASSWORD", "a-test-only-password")
    key = load_keypair("cold", "h1", str(tmp_path), create=True, say=print)
    assert key.ss58_address == wallet.hotkeypub.ss58_address
    monkeypatch.setenv("BT_WALLET_PASSWORD", "another")
    with pytest.raises(ValueError, match=r"^--wallet\.hotkey h1: ") as caught:
        load_keypair("cold", "h1", str(tmp_path), create=True, say=print)
    assert "another" not in str(caught.value)


@pytest.mark.parametrize("fields", [("ss58Address",), ("publicKey", "ss58Address", "cryptoType", "accountId")])
def test_a_hotkey_without_its_secret_is_refused_at_the_start(tmp_path: Path, fields: tuple[str, ...]) -> None:
    load_keypair("other", "h1", str(tmp_path), create=True, say=lambda _: None)
    whole = json.loads((tmp_path / "other" / "hotkeys" / "h1").read_text())
    key_file(tmp_path, {name: whole[name] for name in fields})
    with pytest.raises(ValueError, match=r"^--wallet\.hotkey h1: .* holds only the public key, which cannot sign"):
        load_keypair("cold", "h1", str(tmp_path), create=True, say=print)


def test_a_hotkey_of_another_kind_is_refused_at_the_start(tmp_path: Path) -> None:
    key_file(tmp_path, {"secretSeed": "0x" + "11" * 32, "cryptoType": 0})
    with pytest.raises(ValueError, match=r"^--wallet\.hotkey h1: .* is not an sr25519 key"):
        load_keypair("cold", "h1", str(tmp_path), create=True, say=print)
