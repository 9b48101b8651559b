"""Cleaning of what comes in: one value in one spelling, and every correction visible beside the raw input."""

from __future__ import annotations

from dataclasses import dataclass

from kehu.events.lead_intake import Contact, Correction, Facts
from lead_intake.domain.cleaning.company import clean_company
from lead_intake.domain.cleaning.email import clean_email, email_for_matching
from lead_intake.domain.cleaning.phone import clean_phone
from lead_intake.domain.cleaning.text import Unclean, half_width, tidy, tidy_lines

__all__ = [
    "Profile",
    "Unclean",
    "UncleanInput",
    "clean_company",
    "clean_email",
    "clean_phone",
    "clean_profile",
    "email_for_matching",
]

# Cleaning can make a text longer: composed characters of some scripts come apart, legal forms get their dots.
LONGEST_TEXT = 500
_LONGEST = {"note": 10_000}


class UncleanInput(ValueError):
    """At least one value cannot be read. Nothing personal is in it."""

    def __init__(self, problems: tuple[Unclean, ...]) -> None:
        super().__init__("; ".join(str(problem) for problem in problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Profile:
    """What is known of a lead, cleaned.

    Args:
        raw_contact: the contact as it came in, when cleaning changed it; else None.
        corrections: each with its rule; values only of fields that are not personal.
    """

    contact: Contact
    raw_contact: Contact | None
    company: str | None
    industry: str | None
    region: str | None
    size: str | None
    title: str | None
    facts: Facts
    corrections: tuple[Correction, ...]


def clean_profile(
    *,
    name: str | None = None,
    phone: str | None = None,
    email: str | None = None,
    note: str | None = None,
    company: str | None = None,
    industry: str | None = None,
    region: str | None = None,
    size: str | None = None,
    title: str | None = None,
    facts: Facts | None = None,
) -> Profile:
    """Clean every field. An empty value is the same as none.

    Raises:
        UncleanInput: with every value that cannot be read.
    """
    problems: list[Unclean] = []
    corrections: list[Correction] = []
    raw = {"name": name, "phone": phone, "email": email, "note": note}
    cleaned: dict[str, str | None] = {}
    for field, value in raw.items():
        if value is None:
            continue
        try:
            text, rules = _CONTACT[field](value) if value.strip() else ("", ())
        except Unclean as problem:
            problems.append(problem)
            continue
        if len(text) > _LONGEST.get(field, LONGEST_TEXT):
            problems.append(_too_long(field))
        elif text:
            cleaned[field] = text
        corrections.extend(Correction(field=field, rule=rule) for rule in rules)
    plain: dict[str, str | None] = {
        "company": company,
        "industry": industry,
        "region": region,
        "size": size,
        "title": title,
    }
    for field, value in plain.items():
        if value is None:
            continue
        try:
            text, rules = clean_company(value) if field == "company" else tidy(field, value)
        except Unclean as problem:
            problems.append(problem)
            continue
        if len(text) > LONGEST_TEXT:
            problems.append(_too_long(field))
        plain[field] = text or None
        if rules:
            corrections.extend(Correction(field=field, rule=rule, before=value, after=text) for rule in rules)
    if problems:
        raise UncleanInput(tuple(problems))
    return Profile(
        contact=Contact(**cleaned),
        raw_contact=Contact(**raw) if any(c.field in raw for c in corrections) else None,
        facts=facts or {},
        corrections=tuple(corrections),
        **plain,
    )


def _too_long(field: str) -> Unclean:
    return Unclean(field, "too-long", f"has more than {_LONGEST.get(field, LONGEST_TEXT)} characters")


def _clean_name(value: str) -> tuple[str, tuple[str, ...]]:
    text, rules = tidy("name", value)
    narrow = half_width(text)
    return narrow, rules if narrow == text else (*rules, "full_width")


def _clean_note(value: str) -> tuple[str, tuple[str, ...]]:
    return tidy_lines("note", value)


_CONTACT = {"name": _clean_name, "phone": clean_phone, "email": clean_email, "note": _clean_note}
