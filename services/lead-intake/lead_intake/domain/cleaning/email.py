"""Email addresses: form only. Whether mail arrives is not asked of any server."""

from __future__ import annotations

import re
import unicodedata

from email_validator import EmailNotValidError, validate_email

from lead_intake.domain.cleaning.text import Unclean, tidy

# The plain addresses that nearly all are; anything else goes to the library, which takes ten times as long.
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"(?!xn--)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_PLAIN = re.compile(rf"({_ATOM}(?:\.{_ATOM})*)@((?:{_LABEL}\.)+[a-z]{{2,63}})", re.ASCII)
LONGEST = 254  # RFC 5321, with its errata
_LONGEST_LOCAL = 64


def clean_email(value: str) -> tuple[str, tuple[str, ...]]:
    """The address with its domain in lower case, and the rules that changed it. The part before the @ keeps its case.

    Raises:
        Unclean: not an address that mail could be sent to.
    """
    if (plain := _plain(value)) is not None:
        return plain, ()
    rules: list[str] = []
    text, _ = tidy("email", unicodedata.normalize("NFKC", value))
    if text != value:
        rules.append("full_width")
    trimmed = text.removeprefix("mailto:").replace(" ", "").strip("<>;,")
    if trimmed != text:
        rules.append("spaces")
    local, at, domain = trimmed.rpartition("@")
    lowered = domain.lower().replace("\u3002", ".")
    if lowered != domain:
        rules.append("domain_case")
    address = _plain(local + at + lowered)
    if address is None:
        try:
            address = validate_email(
                local + at + lowered, check_deliverability=False, globally_deliverable=False
            ).normalized
        except EmailNotValidError:
            raise Unclean("email", "email-not-valid", "is not an email address") from None
        if "." not in address.rpartition("@")[2] or len(address) > LONGEST or len(local) > _LONGEST_LOCAL:
            raise Unclean("email", "email-not-valid", "is not an email address that mail can be sent to")
    return address, tuple(rules)


def _plain(value: str) -> str | None:
    match = _PLAIN.fullmatch(value)
    if match is None or len(value) > LONGEST or len(match[1]) > _LONGEST_LOCAL:
        return None
    return value


def email_for_matching(address: str) -> str:
    """What two addresses of one person have in common: providers do not tell letter cases apart."""
    return address.casefold()
