"""Telephone numbers to E.164, the default region being China."""

from __future__ import annotations

import re
import unicodedata

import phonenumbers

from lead_intake.domain.cleaning.text import Unclean, tidy

REGION = "CN"
# Most numbers are Chinese mobiles. All of 13x to 19x are assigned; this saves the 25 µs that the library takes.
_MOBILE = re.compile(r"(?:\+86|0086|86)?(1[3-9][0-9]{9})", re.ASCII)
_SEPARATORS = str.maketrans("", "", " -()")
# A number that a spreadsheet turned into a float.
_FLOAT = re.compile(r"([0-9]{7,15})\.0", re.ASCII)
_EXTENSION = re.compile(r"\s*(?:转接|转|轉|分机|分機)\s*:?\s*(?=[0-9])")


def clean_phone(value: str) -> tuple[str, tuple[str, ...]]:
    """The number in E.164 (`+8613800138000`), and the rules that changed it.

    An extension cannot be written in E.164: it is dropped and the rule `extension_dropped` tells.

    Raises:
        Unclean: not a valid number.
    """
    if (mobile := _MOBILE.fullmatch(value)) is not None:
        number = "+86" + mobile[1]
        return number, () if number == value else ("e164",)
    text, _ = tidy("phone", unicodedata.normalize("NFKC", value))
    if (spreadsheet := _FLOAT.fullmatch(text)) is not None:
        text = spreadsheet[1]
    if (mobile := _MOBILE.fullmatch(text.translate(_SEPARATORS))) is not None:
        return "+86" + mobile[1], ("e164",)
    try:
        parsed = phonenumbers.parse(_EXTENSION.sub(" ext. ", text), REGION)
    except phonenumbers.NumberParseException:
        raise Unclean("phone", "phone-not-a-number", "is not a telephone number") from None
    if not phonenumbers.is_valid_number(parsed):
        raise Unclean(
            "phone", "phone-not-valid", "is not a valid number; write numbers outside China with + and country code"
        )
    number = phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164)
    rules = () if number == value else ("e164",)
    return number, (*rules, "extension_dropped") if parsed.extension else rules
