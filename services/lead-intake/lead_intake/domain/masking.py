"""What somebody sees of a contact who may know that there is one, but not whose it is."""

from __future__ import annotations

from kehu.events.lead_intake import Contact


def masked(contact: Contact) -> Contact:
    """The contact with the first character of the name and address, and the ends of the number. Notes are left out."""
    return Contact(
        name=None if contact.name is None else f"{contact.name[:1]}**",
        phone=None if contact.phone is None else masked_phone(contact.phone),
        email=None if contact.email is None else masked_email(contact.email),
    )


def masked_phone(phone: str) -> str:
    """`+86138****8000`: all but six digits at the beginning and up to four at the end."""
    shown = min(4, max(0, len(phone) - 10))
    return f"{phone[:6]}****{phone[len(phone) - shown :]}"


def masked_email(address: str) -> str:
    """`z***@example.com`."""
    local, _, domain = address.rpartition("@")
    return f"{local[:1]}***@{domain}"
