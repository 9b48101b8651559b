"""Company names: width, brackets, spaces, and one spelling for each legal form."""

from __future__ import annotations

import re

from lead_intake.domain.cleaning.text import half_width, tidy

# The legal forms, longest spelling first; matched at the end of the name, any case, any dots and spaces between.
_FORMS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"[\s,]+(?:{pattern})$", re.IGNORECASE), form)
    for pattern, form in (
        (r"co(?:mpany)?[\s.,]*(?:ltd|limited)\.?", " Co., Ltd."),
        (r"p(?:te|rivate)[\s.,]+(?:ltd|limited)\.?", " Pte. Ltd."),
        (r"p(?:ty|roprietary)[\s.,]+(?:ltd|limited)\.?", " Pty Ltd"),
        (r"(?:ltd|limited)\.?", " Ltd."),
        (r"inc(?:orporated)?\.?", " Inc."),
        (r"corp(?:oration)?\.?", " Corp."),
        (r"l\.?l\.?c\.?", " LLC"),
        (r"p\.?l\.?c\.?", " PLC"),
        (r"g\.?m\.?b\.?h\.?", " GmbH"),
        (r"a\.?g\.?", " AG"),
        (r"s\.?a\.?r\.?l\.?", " SARL"),
        (r"s\.?a\.?", " SA"),
        (r"b\.?v\.?", " BV"),
    )
)
# Company forms in traditional script or with brackets that the register does not use.
_CHINESE_FORMS = (
    ("有限責任公司", "有限责任公司"),
    ("\uff08股份\uff09有限公司", "股份有限公司"),
    ("股份有限责任公司", "股份有限公司"),
    ("集團", "集团"),
    ("企業", "企业"),
    ("實業", "实业"),
    ("貿易", "贸易"),
)
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
# White space beside a Chinese character or bracket on both sides says nothing.
_BETWEEN_HAN = re.compile(r"(?<=[\u3400-\u9fff\uff08\uff09])\s+(?=[\u3400-\u9fff\uff08\uff09])")
# Brackets of Chinese names are full width: ( ) [ ] and the tortoise shell ones become U+FF08 and U+FF09.
_CHINESE_BRACKETS = str.maketrans("()[]\u3014\u3015", "\uff08\uff09" * 3)
# In Latin names they are ASCII, like comma, full stop, ampersand, apostrophe and hyphen.
_LATIN_PUNCTUATION = str.maketrans("\uff08\uff09\uff0c\uff0e\uff06\uff07\uff0d", "(),.&'-")
# Nearly every Chinese name is nothing but Chinese characters, without one that tells of a form above.
_ONLY_HAN = re.compile(r"[\u3400-\u9fff]+")
_TELLING = frozenset("責團業實貿")
_TRAILING = "\u3002\uff1b\uff0c\u3001;,. "


def clean_company(value: str) -> tuple[str, tuple[str, ...]]:
    """The name in one spelling, and the rules that changed it: `full_width`, `spaces`, `brackets`, `legal_form`, …

    The legal form itself is never changed into another one: 有限责任公司 stays what the register says.

    Raises:
        Unclean: there is a control character in it.
    """
    if _ONLY_HAN.fullmatch(value) and _TELLING.isdisjoint(value) and not value.endswith("股份有限责任公司"):
        return value, ()
    name, tidied = tidy("company", value)
    rules = list(tidied)
    narrow = half_width(name)
    chinese = _HAN.search(narrow) is not None
    if not chinese and not narrow.isascii():
        narrow = narrow.translate(_LATIN_PUNCTUATION)
    _note(rules, "full_width", name, narrow)
    if chinese:
        bracketed = narrow.translate(_CHINESE_BRACKETS)
        _note(rules, "brackets", narrow, bracketed)
        closed = _BETWEEN_HAN.sub("", bracketed)
        _note(rules, "spaces", bracketed, closed)
        ended = closed.rstrip(_TRAILING)
        _note(rules, "punctuation", closed, ended)
        formed = ended
        for old, new in _CHINESE_FORMS:
            formed = formed.replace(old, new)
        _note(rules, "legal_form", ended, formed)
        return formed, tuple(dict.fromkeys(rules))
    for pattern, form in _FORMS:
        if pattern.search(narrow):
            formed = pattern.sub(form, narrow)
            _note(rules, "legal_form", narrow, formed)
            return formed, tuple(dict.fromkeys(rules))
    return narrow, tuple(dict.fromkeys(rules))


def _note(rules: list[str], rule: str, before: str, after: str) -> None:
    if before != after:
        rules.append(rule)
