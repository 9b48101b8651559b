"""Text as people and spreadsheets send it: hidden characters, odd spaces, full width letters, broken accents."""

from __future__ import annotations

import unicodedata

# Invisible characters that copying from web pages, chats and spreadsheets brings along, and those that turn the
# reading direction of what follows, which can make one name look like another. Joiners stay: scripts and emoji need them.
_HIDDEN = dict.fromkeys([0x00AD, 0x200B, 0x2060, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
_LETTERS = {code: code - 0xFEE0 for code in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))}


class Unclean(ValueError):
    """A value that cannot be read as what it should be.

    Args:
        field: name of the input.
        slug: stable code, e.g. `phone-not-a-number`.
        reason: for a person; never repeats the value, since it ends up in answers and logs.
    """

    def __init__(self, field: str, slug: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.slug, self.reason = field, slug, reason


def is_tidy(value: str) -> bool:
    """Whether there is nothing to do for `tidy`: the quick answer for nearly every value."""
    return (
        value.isprintable()
        and not value.startswith(" ")
        and not value.endswith(" ")
        and "  " not in value
        and unicodedata.is_normalized("NFC", value)
    )


def tidy(field: str, value: str) -> tuple[str, tuple[str, ...]]:
    """One line of text without hidden characters and with single spaces, and the rules that changed it.

    Raises:
        Unclean: there is a control character other than white space in it.
    """
    if is_tidy(value):
        return value, ()
    rules: list[str] = []
    text = value.translate(_HIDDEN)
    if text != value:
        rules.append("hidden_characters")
    _no_controls(field, text)
    composed = unicodedata.normalize("NFC", text)
    if composed != text:
        rules.append("composed_accents")
    spaced = " ".join(composed.split())
    if spaced != composed:
        rules.append("spaces")
    return spaced, tuple(rules)


def tidy_lines(field: str, value: str) -> tuple[str, tuple[str, ...]]:
    """Free text of several lines without hidden characters and without white space around it."""
    text = value.translate(_HIDDEN)
    rules = ["hidden_characters"] if text != value else []
    _no_controls(field, text)
    stripped = text.strip()
    if stripped != text:
        rules.append("spaces")
    return stripped, tuple(rules)


def half_width(value: str) -> str:
    """Full width Latin letters and digits as ordinary ones. Punctuation stays: in Chinese text it is right as it is."""
    return value if value.isascii() else value.translate(_LETTERS)


def _no_controls(field: str, text: str) -> None:
    for character in text:
        if unicodedata.category(character) == "Cc" and not character.isspace():
            raise Unclean(field, "control-character", "contains a control character; the file may be damaged")
