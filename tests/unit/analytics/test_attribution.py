"""Which lead converted: the rules, and that the order of arrival does not matter."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from analytics.read_models.lead_journey import Conversion, Lead, attribute

START = datetime(2026, 1, 1, tzinfo=UTC)


def at(days: int) -> datetime:
    return START + timedelta(days=days)


def uid(number: int) -> UUID:
    return UUID(int=number)


def lead(number: int, captured: int, merged: int | None = None, rejected: int | None = None) -> Lead:
    return Lead(uid(number), at(captured), uid(merged) if merged else None, at(rejected) if rejected else None)


def test_the_lead_that_is_named_converts() -> None:
    assert attribute([lead(1, 0), lead(2, 1)], [Conversion(uid(2), at(5))]) == {uid(2): at(5)}


def test_a_merged_lead_converts_as_the_one_that_it_became() -> None:
    leads = [lead(1, 0), lead(2, 1, merged=1), lead(3, 2, merged=2)]
    assert attribute(leads, [Conversion(uid(3), at(5))]) == {uid(1): at(5)}


def test_without_a_name_the_first_open_lead_converts() -> None:
    leads = [lead(1, 0, rejected=3), lead(2, 4)]
    assert attribute(leads, [Conversion(None, at(2))]) == {uid(1): at(2)}
    assert attribute(leads, [Conversion(None, at(5))]) == {uid(2): at(5)}
    assert attribute([lead(1, 0, rejected=3)], [Conversion(None, at(5))]) == {uid(1): at(5)}


def test_the_first_conversion_counts() -> None:
    assert attribute([lead(1, 0)], [Conversion(None, at(9)), Conversion(uid(1), at(5))]) == {uid(1): at(5)}


def test_nothing_to_attribute_to() -> None:
    assert attribute([], [Conversion(None, at(1))]) == {}
    assert attribute([lead(1, 0)], []) == {}


def test_a_merge_that_goes_in_a_circle_or_elsewhere_ends() -> None:
    circle = [lead(1, 0, merged=2), lead(2, 1, merged=1)]
    assert list(attribute(circle, [Conversion(uid(1), at(5))]).values()) == [at(5)]
    assert attribute([lead(1, 0, merged=9)], [Conversion(uid(1), at(5))]) == {uid(1): at(5)}


_leads = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, 9), st.none() | st.integers(1, 6), st.none() | st.integers(0, 9)),
    max_size=6,
    unique_by=lambda row: row[0],
)
_conversions = st.lists(st.tuples(st.none() | st.integers(1, 7), st.integers(0, 9)), max_size=5)


@given(_leads, _conversions, st.randoms(use_true_random=False))
def test_the_order_of_what_is_known_does_not_matter(
    leads: list[tuple[int, int, int | None, int | None]],
    conversions: list[tuple[int | None, int]],
    rng: random.Random,
) -> None:
    known = [Lead(uid(n), at(c), uid(m) if m else None, at(r) if r is not None else None) for n, c, m, r in leads]
    happened = [Conversion(uid(n) if n else None, at(t)) for n, t in conversions]
    expected = attribute(known, happened)
    rng.shuffle(known)
    rng.shuffle(happened)
    assert attribute(known, happened) == expected
    assert set(expected) <= {one.lead_id for one in known}
