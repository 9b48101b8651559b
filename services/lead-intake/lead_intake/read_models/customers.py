"""Who is behind a phone number or an email address, and the numbers of customers: what captures look up.

The tables are written in the transaction of the events. Two captures of one person that meet collide there, and the loser
is decided again: it then finds the customer that the winner made.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from uuid import UUID

from kehu.events.lead_intake import Contact
from kehu.postgres import Connection, Row, Unnest
from kehu.privacy import keyed_hash
from lead_intake.domain.cleaning import email_for_matching
from lead_intake.domain.customer import customer_number

_LOOK_UP = """
SELECT i.hash, c.customer_id, c.number, c.open_lead FROM contact_index i JOIN customers c USING (customer_id)
WHERE i.hash = ANY(%b::bytea[])
UNION ALL
SELECT NULL, NULL, NULL, command_id FROM commands WHERE command_id = ANY(%b::uuid[])
"""
# Keys, customers and what they are recognised by, of a whole batch in one statement.
_REGISTERED = Unnest("""
WITH new AS (
    SELECT * FROM unnest(%b::text[], %b::bytea[], %b::text[], %b::uuid[], %b::bytea[], %b::bytea[])
        AS new (customer_id, wrapped, number, lead_id, hash, other)
), keys AS (
    INSERT INTO customer_keys (customer_id, wrapped) SELECT customer_id, wrapped FROM new
), registered AS (
    INSERT INTO customers (customer_id, number, open_lead) SELECT customer_id, number, lead_id FROM new
)
INSERT INTO contact_index (hash, customer_id)
SELECT hash, customer_id FROM new WHERE hash IS NOT NULL UNION ALL SELECT other, customer_id FROM new WHERE other IS NOT NULL
ORDER BY 1
""")
_CONTACT = Unnest(
    "INSERT INTO contact_index (hash, customer_id) SELECT * FROM unnest(%b::bytea[], %b::text[]) AS new (h, c) ORDER BY h"
)
_CONTACT_IF_FREE = Unnest(
    "INSERT INTO contact_index (hash, customer_id) SELECT * FROM unnest(%b::bytea[], %b::text[]) AS new (h, c) ORDER BY h"
    " ON CONFLICT DO NOTHING"
)
_HOLD = Unnest("SELECT hold_customer(c, l) FROM unnest(%b::text[], %b::uuid[]) AS held (c, l) ORDER BY c")
# The same for customers whom an earlier capture of the batch registers. Rows are written text by text in order of first
# appearance, and this text never appears before that capture's rows.
_HOLD_FRESH = Unnest("SELECT hold_customer(c, l) FROM unnest(%b::text[], %b::uuid[]) AS fresh (c, l) ORDER BY c")
_OPEN = Unnest("SELECT open_lead(c, l) FROM unnest(%b::text[], %b::uuid[]) AS opened (c, l) ORDER BY c")


@dataclass(slots=True)
class KnownCustomer:
    """A customer, as the captures of a batch see them one after the other.

    Args:
        fresh: an earlier capture of the batch registers the customer, or opens its lead.
    """

    customer_id: UUID
    number: str
    open_lead: UUID | None
    fresh: bool = False


def contact_hashes(hash_key: bytes, contact: Contact) -> list[tuple[str, bytes]]:
    """The keyed hashes by which somebody is recognised, each with its rule. The phone comes first: it decides."""
    found: list[tuple[str, bytes]] = []
    if contact.phone is not None:
        found.append(("exact_phone", keyed_hash(hash_key, "phone", contact.phone)))
    if contact.email is not None:
        found.append(("exact_email", keyed_hash(hash_key, "email", email_for_matching(contact.email))))
    return found


def look_up(
    connection: Connection, hashes: Sequence[bytes], command_ids: Sequence[UUID]
) -> tuple[dict[bytes, KnownCustomer], set[UUID]]:
    """The customers behind contact hashes, and which commands were carried out already, in one query."""
    customers: dict[str, KnownCustomer] = {}
    known: dict[bytes, KnownCustomer] = {}
    done: set[UUID] = set()
    rows = connection.execute(_LOOK_UP, (hashes, command_ids), binary=True)
    for found, customer_id, number, last in rows:
        if found is None:
            done.add(last)
        else:
            known[found] = customers.setdefault(customer_id, KnownCustomer(UUID(customer_id), number, last))
    return known, done


def registered(customer_id: str, wrapped_key: bytes, number: str, lead_id: UUID, hashes: Sequence[bytes]) -> Row:
    """A new customer with their key, whose first lead is open.

    Args:
        hashes: of phone and email, those that nobody had when they were looked up. That somebody has them now is a conflict.
    """
    first, other = (*hashes, None, None)[:2]
    return _REGISTERED, (customer_id, wrapped_key, number, lead_id, first, other)


def recognised_by(customer_id: str, hashes: Iterable[bytes]) -> Iterable[Row]:
    """Contact hashes that nobody had when they were looked up. That somebody has them now is a conflict."""
    return ((_CONTACT, (h, customer_id)) for h in hashes)


def recognised_if_free(customer_id: str, hashes: Iterable[bytes]) -> Iterable[Row]:
    """Contact hashes of a known customer; what belongs to somebody else stays theirs."""
    return ((_CONTACT_IF_FREE, (h, customer_id)) for h in hashes)


def held(customer_id: str, open_lead: UUID | None, fresh: bool = False) -> Row:
    """The customer must still be there, and the lead still the open one, when this is written; else it is a conflict.

    Args:
        fresh: the rows that make it so are in the same batch.
    """
    return _HOLD_FRESH if fresh else _HOLD, (customer_id, open_lead)


def opened(customer_id: str, lead_id: UUID) -> Row:
    """The lead becomes the open one of a known customer who has none; else it is a conflict."""
    return _OPEN, (customer_id, lead_id)


def closed(customer_id: str, lead_id: UUID) -> Row:
    """The lead is not open any more: the next capture of the customer opens one."""
    return "UPDATE customers SET open_lead = NULL WHERE customer_id = %s AND open_lead = %s", (customer_id, lead_id)


def forgotten(customer_id: str) -> Row:
    """Nobody is recognised as this customer any more."""
    return "DELETE FROM contact_index WHERE customer_id = %s", (customer_id,)


class CustomerNumbers:
    """Takes blocks of a month's sequence from the database and gives them out. A restart loses the rest of a block, never reuses it.

    Blocks begin small, so that a quiet shop has few holes, and double while they are used up, so that an import asks rarely.
    """

    SMALLEST, LARGEST = 10, 1000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._month = ""
        self._next = self._end = 0
        self._size = self.SMALLEST

    def take(self, connection: Connection, month: str) -> str:
        """The next number of a month.

        Args:
            connection: not inside a transaction: a block is committed at once, whatever happens to the capture.
            month: `yyyymm`.
        """
        with self._lock:
            if month != self._month:
                self._month, self._next, self._end, self._size = month, 0, 0, self.SMALLEST
            if self._next == self._end:
                self._take_block(connection, month, self._size)
            self._next += 1
            return customer_number(month, self._next - 1)

    def _take_block(self, connection: Connection, month: str, size: int) -> None:
        row = connection.execute(
            "INSERT INTO customer_numbers (month, last) VALUES (%s, %s)"
            " ON CONFLICT (month) DO UPDATE SET last = customer_numbers.last + excluded.last RETURNING last",
            (month, size),
        ).fetchone()
        assert row is not None
        self._next, self._end = row[0] - size + 1, row[0] + 1
        self._size = min(self._size * 2, self.LARGEST)
