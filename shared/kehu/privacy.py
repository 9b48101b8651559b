"""Personal data: sealed under a key of its customer, so that destroying the key erases the person everywhere at once.

AES-256-GCM with a fresh 96-bit nonce; the additional data binds a token to its customer, event and field, so that a
token cannot be moved. Keys are wrapped by the master key and live in lead-intake only; other services ask for them.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kehu.events import Event, Personal, PersonalState, Recorded
from kehu.postgres import Pool, Row

if TYPE_CHECKING:
    import httpx

KEY_BYTES = 32
_NONCE = 12


class KeysUnavailable(ConnectionError):
    """The key service could not be asked: try again later."""


class TamperedToken(ValueError):
    """A token that its customer's key does not open: it was changed or moved."""


class Keyring(Protocol):
    """Gives the keys of customers. A customer whose key was destroyed, or never existed, has None."""

    def keys(self, customer_ids: Iterable[str]) -> dict[str, bytes | None]:
        """The key of each customer, 32 bytes. Raises KeysUnavailable."""
        ...


def _aad(customer_id: str, event_id: UUID | str, field: str) -> bytes:
    return f"{customer_id}|{event_id}|{field}".encode()


def seal(event: Event, event_id: UUID, customer_id: str, key: bytes) -> Event:
    """The event with every plain Personal field sealed under the customer's key."""
    sealed: dict[str, Personal[object]] = {}
    cipher: AESGCM | None = None
    for field, adapter in event.PERSONAL.items():
        value = getattr(event, field)
        if isinstance(value, Personal) and value.state is PersonalState.PLAIN:
            cipher = cipher or AESGCM(key)
            nonce = os.urandom(_NONCE)
            content = adapter.dump_json(value.plain, exclude_none=True)
            token = nonce + cipher.encrypt(nonce, content, _aad(customer_id, event_id, field))
            sealed[field] = Personal.sealed(base64.b64encode(token).decode())
    return event.model_copy(update=sealed) if sealed else event


def needs_key(event: Event) -> bool:
    """Whether the event holds personal data that is not sealed yet."""
    for field in event.PERSONAL:
        value = getattr(event, field)
        if value is not None and value.state is PersonalState.PLAIN:
            return True
    return False


def opened(recorded: Recorded, key: bytes | None) -> Event:
    """The event with its personal data readable; erased where the key is gone.

    Raises:
        TamperedToken: the key does not fit the token.
    """
    event = recorded.event
    values: dict[str, Personal[object]] = {}
    for field, adapter in event.PERSONAL.items():
        value = getattr(event, field)
        if not isinstance(value, Personal) or value.state is not PersonalState.SEALED:
            continue
        if key is None:
            values[field] = Personal.erased()
            continue
        token = base64.b64decode(value.token)
        try:
            content = AESGCM(key).decrypt(
                token[:_NONCE], token[_NONCE:], _aad(recorded.customer_id or "", recorded.id, field)
            )
        except InvalidTag as error:
            raise TamperedToken(f"{recorded!r}: field {field}") from error
        values[field] = Personal(adapter.validate_json(content))
    return event.model_copy(update=values) if values else event


def open_events(events: Sequence[Recorded], keyring: Keyring) -> list[Event]:
    """Open many events with one look-up of keys."""
    keys = keyring.keys({r.customer_id for r in events if r.customer_id is not None and r.event.PERSONAL})
    return [opened(r, keys.get(r.customer_id or "")) for r in events]


def keyed_hash(hash_key: bytes, kind: str, value: str) -> bytes:
    """HMAC-SHA-256 of a normalised value: for look-ups of personal data without keeping it.

    Args:
        kind: what it is (`phone`, `email`), so that equal text of two kinds differs.
    """
    return hmac.digest(hash_key, f"{kind}\x1f{value}".encode(), hashlib.sha256)


def new_key() -> bytes:
    """A random key for a customer."""
    return os.urandom(KEY_BYTES)


class NoKeys:
    """The keyring of a process that has no business with personal data: everything stays sealed to it."""

    def keys(self, customer_ids: Iterable[str]) -> dict[str, bytes | None]:
        raise KeysUnavailable("this process must not read personal data")


class _Cache:
    """Bounded, short: an erased customer is forgotten by every process within its time to live."""

    def __init__(self, seconds: float, most: int) -> None:
        self.seconds, self.most = seconds, most
        self._kept: dict[str, tuple[float, bytes | None]] = {}

    def take(self, ids: Iterable[str]) -> tuple[dict[str, bytes | None], list[str]]:
        now = time.monotonic()
        known: dict[str, bytes | None] = {}
        missing: list[str] = []
        for customer in ids:
            entry = self._kept.get(customer)
            if entry is not None and entry[0] > now:
                known[customer] = entry[1]
            else:
                missing.append(customer)
        return known, missing

    def put(self, keys: Mapping[str, bytes | None]) -> None:
        if len(self._kept) + len(keys) > self.most:
            self._kept.clear()
        until = time.monotonic() + self.seconds
        for customer, key in keys.items():
            self._kept[customer] = (until, key)

    def forget(self, customer: str) -> None:
        self._kept.pop(customer, None)


class PostgresKeyring:
    """The key table of lead-intake: `customer_keys(customer_id text, wrapped bytea null, destroyed_at)`.

    Args:
        pool: its own, small one: it is asked while the caller holds a connection of the command handler's pool.
        master_key: 32 bytes that wrap every key; from the platform's secret store, never from the database.
    """

    def __init__(self, pool: Pool, master_key: bytes, cache_seconds: float = 5.0) -> None:
        if len(master_key) != KEY_BYTES:
            raise ValueError("the master key must be 32 bytes")
        self.pool = pool
        self._wrapper = AESGCM(master_key)
        self._cache = _Cache(cache_seconds, 50_000)

    def wrap(self, customer_id: str, key: bytes) -> bytes:
        """A new key as the table keeps it. It goes into the transaction that registers the customer."""
        nonce = os.urandom(_NONCE)
        return nonce + self._wrapper.encrypt(nonce, key, customer_id.encode())

    def destroy_row(self, customer_id: str) -> Row:
        """Destroys a key; goes into the transaction that erases the customer. `forget` the cached one afterwards."""
        return (
            "UPDATE customer_keys SET wrapped = NULL, destroyed_at = now() WHERE customer_id = %s AND wrapped IS NOT NULL",
            (customer_id,),
        )

    def forget(self, customer_id: str) -> None:
        """Drop a cached key of this process."""
        self._cache.forget(customer_id)

    def keys(self, customer_ids: Iterable[str]) -> dict[str, bytes | None]:
        known, missing = self._cache.take(customer_ids)
        if missing:
            with self.pool.connection() as connection:
                rows = connection.execute(
                    "SELECT customer_id, wrapped FROM customer_keys WHERE customer_id = ANY(%s)", (missing,)
                ).fetchall()
            found: dict[str, bytes | None] = dict.fromkeys(missing)
            for customer, wrapped in rows:
                if wrapped is not None:
                    found[customer] = self._wrapper.decrypt(wrapped[:_NONCE], wrapped[_NONCE:], customer.encode())
            self._cache.put(found)
            known.update(found)
        return known


class HttpKeyring:
    """Asks lead-intake's key service and keeps the answer for a short time.

    Args:
        client: with lead-intake's base URL, a timeout, and a bearer token of the role `system`.
        cache_seconds: an erased customer can be read by this process for at most this long.
    """

    BATCH = 500

    def __init__(self, client: httpx.Client, cache_seconds: float = 60.0) -> None:
        self._client = client
        self._cache = _Cache(cache_seconds, 50_000)

    def keys(self, customer_ids: Iterable[str]) -> dict[str, bytes | None]:
        import httpx  # it brings a whole command line: not for the many processes that ask nobody

        known, missing = self._cache.take(customer_ids)
        for start in range(0, len(missing), self.BATCH):
            asked = missing[start : start + self.BATCH]
            try:
                response = self._client.post("/keys/lookup", json={"customer_ids": asked})
                response.raise_for_status()
                answer = response.json()["keys"]
            except (httpx.HTTPError, KeyError, ValueError) as error:
                raise KeysUnavailable(f"the key service does not answer: {type(error).__name__}") from error
            found = {c: base64.b64decode(answer[c]) if answer.get(c) else None for c in asked}
            self._cache.put(found)
            known.update(found)
        return known
