"""What a spec accepts, and that it survives the way through JSON."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kehu.lake import Exclusion, FunnelSpec, Step
from kehu.lake.spec import matches_type
from kehu.lake.stats import quantile, wilson

A, B, C = (Step(name=name, types=f"{name}.done") for name in "abc")
DAY = timedelta(days=1)


def spec(**more: Any) -> FunnelSpec:
    return FunnelSpec(**{"steps": (A, B, C), "window": DAY, **more})


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"steps": ()}, "at least 1"),
        ({"steps": (A,) * 17}, "at most 16"),
        ({"steps": (A, B, A)}, "same name"),
        ({"window": timedelta(days=-1)}, "window"),
        ({"window": timedelta(days=40_000)}, "window"),
        ({"count": "attempts"}, "not built"),
        ({"count": "value"}, "not built"),
        ({"optional": {1}}, "optional"),
        ({"optional": {3}}, "optional"),
        ({"exclude": (Exclusion(types="x", after=2, before=2),)}, "exclude between"),
        ({"exclude": (Exclusion(types="x", after=1, before=4),)}, "exclude between"),
        ({"exclude": (Exclusion(types="x", after=1, before=2),), "order": "strict"}, "means nothing"),
        ({"optional": {2}, "order": "unordered"}, "means nothing|mean nothing"),
        ({"ties": "strictly_later", "order": "unordered"}, "ties"),
        ({"breakdown": "nonsense"}, "neither a column"),
        ({"breakdown": "data.a'b"}, "neither a column"),
        ({"hold": ("data.",)}, "neither a column"),
        ({"attribution": "step:4"}, "attribution"),
        ({"attribution": "middle"}, "attribution"),
        ({"tz": "Mars/Olympus"}, "no time zone"),
        ({"tz": "../etc/passwd"}, "no time zone"),
        ({"as_of": datetime(2026, 1, 1)}, "timezone"),
        ({"unit": "household"}, "unit"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_what_cannot_be_counted_is_refused(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        spec(**more)


def test_where_is_about_known_attributes() -> None:
    with pytest.raises(ValidationError, match="neither a column"):
        Step(name="x", types="x", where={"data.a b": "1"})
    with pytest.raises(ValidationError, match="no value"):
        Step(name="x", types="x", where={"data.a": ()})


def test_a_spec_survives_json() -> None:
    full = spec(
        steps=(Step(name="a", types=("a.x", "a.y.v2"), where={"data.n": 1, "data.s": "1", "data.b": True}), B, C),
        window=timedelta(days=2, microseconds=3),
        exclude=(Exclusion(types="x", after=1, before=3),),
        optional={2},
        hold=("data.deal",),
        breakdown="month",
        attribution="step:2",
        as_of=datetime(2026, 3, 1, 12, 0, 0, 5, tzinfo=UTC),
        tz="Asia/Shanghai",
    )
    assert FunnelSpec.model_validate_json(full.model_dump_json()) == full
    assert FunnelSpec.model_validate(full.model_dump(mode="json")) == full


def test_a_spec_is_frozen() -> None:
    with pytest.raises(ValidationError):
        spec().window = DAY  # type: ignore[misc]


def test_a_type_without_a_version_is_every_version() -> None:
    actual = [
        "lead.captured",
        "lead.captured.v1",
        "lead.captured.v12",
        "lead.captured.vx",
        "lead.captured.v1.v2",
        "lead.cap.v1",
    ]
    assert [matches_type("lead.captured", a) for a in actual] == [True, True, True, False, False, False]
    assert [matches_type("lead.captured.v1", a) for a in actual] == [False, True, False, False, True, False]


def test_wilson_against_published_values() -> None:
    """R. G. Newcombe, Two-sided confidence intervals for the single proportion, Stat. Med. 17 (1998), table I, method 3."""
    for (successes, trials), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="3 successes in 2 trials"):
        wilson(3, 2)


@given(st.lists(st.integers(0, 50), max_size=30), st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_a_quantile_is_one_of_the_values(values: list[int], q: float) -> None:
    found = quantile(np.array(values, np.int64), q)
    if not values:
        assert found is None
        return
    assert found in values
    assert sum(v <= found for v in values) >= q * len(values)
    assert sum(v < found for v in values) < q * len(values)
