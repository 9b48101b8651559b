"""Cleaning: one spelling for each value, and nothing that is clean already is touched."""

from __future__ import annotations

from datetime import UTC, datetime

import phonenumbers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kehu.events.lead_intake import Contact, Correction
from lead_intake.domain.cleaning import (
    Unclean,
    UncleanInput,
    clean_company,
    clean_email,
    clean_phone,
    clean_profile,
    email_for_matching,
)
from lead_intake.domain.cleaning.text import tidy
from lead_intake.domain.times import local_time

pytestmark = pytest.mark.req("LI-04")


@pytest.mark.parametrize(
    "given_number",
    [
        "13800138000",
        "138 0013 8000",
        "138-0013-8000",
        "+8613800138000",
        "+86 138 0013 8000",
        "86-13800138000",
        "008613800138000",
        "(+86)13800138000",
        "\uff0b\uff18\uff16\u3000\uff11\uff13\uff18\uff0d\uff10\uff10\uff11\uff13\uff0d\uff18\uff10\uff10\uff10",
        "\u202d13800138000\u202c",
        "13800138000.0",
        "tel:13800138000",
    ],
)
def test_a_chinese_mobile_in_any_spelling_is_one_number(given_number: str) -> None:
    number, rules = clean_phone(given_number)
    assert number == "+8613800138000"
    assert (rules == ()) == (given_number == number)


@pytest.mark.parametrize(
    ("given_number", "number", "rules"),
    [
        ("010-62345678", "+861062345678", ("e164",)),
        ("(021) 6234 5678", "+862162345678", ("e164",)),
        ("010-62345678转8001", "+861062345678", ("e164", "extension_dropped")),
        ("0755-26780000 分机 12", "+8675526780000", ("e164", "extension_dropped")),
        ("400-800-8888", "+864008008888", ("e164",)),
        ("+1 415 555 2671", "+14155552671", ("e164",)),
        ("0044 20 7946 0958", "+442079460958", ("e164",)),
        ("+852 2345 6789", "+85223456789", ("e164",)),
    ],
)
def test_other_numbers(given_number: str, number: str, rules: tuple[str, ...]) -> None:
    assert clean_phone(given_number) == (number, rules)


@pytest.mark.parametrize(
    "nonsense", ["", "abc", "12345", "138001380000", "13800138000/13900139000", "+999 1234567", "1.38E+10", "٠", "无"]
)
def test_what_is_no_number_is_refused_without_being_repeated(nonsense: str) -> None:
    with pytest.raises(Unclean) as refused:
        clean_phone(nonsense)
    assert refused.value.field == "phone"
    assert not nonsense or nonsense not in str(refused.value)


@given(st.from_regex(r"1[3-9][0-9]{9}", fullmatch=True))
def test_the_quick_way_for_mobiles_agrees_with_the_library(mobile: str) -> None:
    parsed = phonenumbers.parse(mobile, "CN")
    quick, _ = clean_phone(mobile)
    assert quick == phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164)


@given(st.text(alphabet="0123456789+-() 转ext.\uff11\uff0b\u3000", max_size=24))
def test_cleaning_a_number_again_changes_nothing(text: str) -> None:
    try:
        number, _ = clean_phone(text)
    except Unclean:
        return
    assert clean_phone(number) == (number, ())
    assert len(number) <= 16


@pytest.mark.parametrize(
    ("given_address", "address"),
    [
        ("zhang.wei@example.com", "zhang.wei@example.com"),
        ("Zhang.Wei@EXAMPLE.Com", "Zhang.Wei@example.com"),
        ("  li@example.cn ", "li@example.cn"),
        ("li@example.cn;", "li@example.cn"),
        ("mailto:li@example.cn", "li@example.cn"),
        ("<li@example.cn>", "li@example.cn"),
        ("\uff4c\uff49\uff20\uff45\uff58\uff41\uff4d\uff50\uff4c\uff45\uff0e\uff43\uff4e", "li@example.cn"),
        ("li@example\u3002cn", "li@example.cn"),
        ("a+b@sub.example.co.uk", "a+b@sub.example.co.uk"),
        ("张伟@例子.公司", "张伟@例子.公司"),
        ("info@xn--fsqu00a.xn--55qx5d", "info@例子.公司"),
    ],
)
def test_addresses(given_address: str, address: str) -> None:
    assert clean_email(given_address)[0] == address


@pytest.mark.parametrize(
    "nonsense",
    [
        *[
            "",
            "li",
            "li@",
            "@example.cn",
            "li@example",
            "li@@example.cn",
            "li..x@example.cn",
            ".li@example.cn",
            "li@-x.cn",
        ],
        *["li@exa mple", "li,wang@example.cn,x@y.cn"],
        *["x" * 65 + "@example.cn", "a@" + "b" * 64 + ".cn", "a@" + "b." * 130 + "cn"],
    ],
)
def test_what_is_no_address_is_refused(nonsense: str) -> None:
    with pytest.raises(Unclean) as refused:
        clean_email(nonsense)
    assert (refused.value.field, refused.value.slug) == ("email", "email-not-valid")


@given(st.emails() | st.text(alphabet="aB1.-_@+ \uff20\u3002<>;张", max_size=30))
def test_cleaning_an_address_again_changes_nothing(text: str) -> None:
    try:
        address, _ = clean_email(text)
    except Unclean:
        return
    assert clean_email(address) == (address, ())
    assert len(address) <= 254


def test_letter_case_does_not_tell_addresses_apart() -> None:
    assert email_for_matching("Zhang.Wei@example.com") == email_for_matching("zhang.wei@example.com")


@pytest.mark.parametrize(
    ("given_name", "name", "rules"),
    [
        ("深圳市星辰科技有限公司", "深圳市星辰科技有限公司", ()),
        ("星辰科技有限责任公司", "星辰科技有限责任公司", ()),
        ("星辰科技有限責任公司", "星辰科技有限责任公司", ("legal_form",)),
        ("星辰(深圳)科技有限公司", "星辰\uff08深圳\uff09科技有限公司", ("brackets",)),
        ("星辰\u3000科技 有限公司", "星辰科技有限公司", ("spaces",)),
        ("星辰科技(股份)有限公司", "星辰科技股份有限公司", ("brackets", "legal_form")),
        ("星辰集團股份有限公司。", "星辰集团股份有限公司", ("punctuation", "legal_form")),
        ("\uff21\uff22\uff23科技有限公司", "ABC科技有限公司", ("full_width",)),
        ("ABC Trading CO.,LTD", "ABC Trading Co., Ltd.", ("legal_form",)),
        ("ABC Trading Company Limited", "ABC Trading Co., Ltd.", ("legal_form",)),
        (
            "\uff21\uff22\uff23\u3000\uff23\uff4f\uff0e\uff0c\uff2c\uff54\uff44",
            "ABC Co., Ltd.",
            ("spaces", "full_width", "legal_form"),
        ),
        ("Acme, INC", "Acme Inc.", ("legal_form",)),
        ("Acme Inc.", "Acme Inc.", ()),
        ("Acme Pty Limited", "Acme Pty Ltd", ("legal_form",)),
        ("Acme Pte Ltd", "Acme Pte. Ltd.", ("legal_form",)),
        ("Muster G.m.b.H.", "Muster GmbH", ("legal_form",)),
        ("Muster gmbh", "Muster GmbH", ("legal_form",)),
        ("Muster l.l.c.", "Muster LLC", ("legal_form",)),
        ("Limited", "Limited", ()),
        ("Incubator Partners", "Incubator Partners", ()),
    ],
)
def test_company_names(given_name: str, name: str, rules: tuple[str, ...]) -> None:
    assert clean_company(given_name) == (name, rules)


@given(st.text(alphabet="星辰公司有限責任集團股份()\uff08\uff09[]. ,;。\u3000AbLtdInc&\uff21-", max_size=40))
def test_cleaning_a_company_again_changes_nothing(text: str) -> None:
    name, _ = clean_company(text)
    assert clean_company(name) == (name, ())


@given(st.text(max_size=60))
def test_tidying_again_changes_nothing(text: str) -> None:
    try:
        tidied, _ = tidy("title", text)
    except Unclean:
        return
    assert tidy("title", tidied) == (tidied, ())


@pytest.mark.parametrize(
    "name", ["👩\u200d💻 Ann", "مريم", "=cmd|' /C calc'!A0", "O'Brien; DROP TABLE leads", "𠮷野家"]
)
def test_unusual_names_are_kept_as_they_are(name: str) -> None:
    assert clean_profile(name=name).contact.name == name


def test_characters_that_turn_the_reading_direction_are_taken_out() -> None:
    profile = clean_profile(name="evil\u202egnp.exe")
    assert profile.contact.name == "evilgnp.exe"
    assert profile.corrections == (Correction(field="name", rule="hidden_characters"),)


def test_the_raw_contact_stays_beside_the_cleaned_one_and_corrections_hold_no_personal_value() -> None:
    profile = clean_profile(name=" 张  伟 ", phone="138 0013 8000", company="Acme, INC")
    assert profile.contact == Contact(name="张 伟", phone="+8613800138000")
    assert profile.raw_contact == Contact(name=" 张  伟 ", phone="138 0013 8000")
    assert profile.corrections == (
        Correction(field="name", rule="spaces"),
        Correction(field="phone", rule="e164"),
        Correction(field="company", rule="legal_form", before="Acme, INC", after="Acme Inc."),
    )


def test_nothing_to_correct_leaves_no_raw_contact() -> None:
    profile = clean_profile(name="张伟", phone="+8613800138000", company="Acme, INC")
    assert profile.raw_contact is None


def test_every_value_that_cannot_be_read_is_named_at_once() -> None:
    with pytest.raises(UncleanInput) as refused:
        clean_profile(name="a\x00b", phone="abc", email="nobody", company="x\x07")
    assert [problem.field for problem in refused.value.problems] == ["name", "phone", "email", "company"]


def test_empty_text_is_the_same_as_none() -> None:
    assert clean_profile(name="", phone=" ", email="\u3000", company="  ", title="").contact == Contact()


def test_a_note_keeps_its_lines() -> None:
    assert clean_profile(note="  first\n\nsecond\t\n").contact.note == "first\n\nsecond"


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2024-05-17", datetime(2024, 5, 16, 16, 0, tzinfo=UTC)),
        ("2024/5/17 8:30", datetime(2024, 5, 17, 0, 30, tzinfo=UTC)),
        ("2024年5月17日 08:30:15", datetime(2024, 5, 17, 0, 30, 15, tzinfo=UTC)),
        ("2024.05.17T23:59", datetime(2024, 5, 17, 15, 59, tzinfo=UTC)),
        ("2024-02-30", None),
        ("17/05/2024", None),
        ("yesterday", None),
    ],
)
def test_dates_as_people_write_them_are_of_china(text: str, instant: datetime | None) -> None:
    assert local_time(text) == instant
