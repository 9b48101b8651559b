"""The table of edge cases with the answers of other engines.

`funnel_semantics.json` is facts: `steps` and `events` (letter@time), `window`, and the step reached by each mode of
ClickHouse's windowFunnel (`ch_*`, run), by PostHog's algorithm (`posthog_*`, modelled), and the most steps inside one
window in any order (`unordered_max_in_window`). The rows with `exclusion` have PostHog's answer alone.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kehu.lake import Exclusion, FunnelSpec, Step, evaluate

CASES = json.loads((Path(__file__).parent / "funnel_semantics.json").read_text())
PLAIN = [case for case in CASES if "exclusion" not in case]
EXCLUSIONS = [case for case in CASES if "exclusion" in case]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def events_of(text: str) -> pa.Table:
    pairs = [event.split("@") for event in text.split()]
    return pa.table(
        {
            "customer": ["u"] * len(pairs),
            "type": [letter for letter, _ in pairs],
            "time": pa.array([EPOCH + timedelta(seconds=int(t)) for _, t in pairs], pa.timestamp("us", tz="UTC")),
        }
    )


def spec_of(case: dict[str, Any], **more: Any) -> FunnelSpec:
    steps = tuple(Step(name=f"{k}: {letter}", types=letter) for k, letter in enumerate(case["steps"], 1))
    return FunnelSpec(steps=steps, window=timedelta(seconds=case["window"]), **more)


def level(case: dict[str, Any], **more: Any) -> int:
    result = evaluate(events_of(case["events"]), spec_of(case, **more))
    return sum(step.reached for step in result.steps)


def name(case: dict[str, Any]) -> str:
    return str(case["name"])


@pytest.mark.req("AN-01")
@pytest.mark.parametrize("case", PLAIN, ids=name)
def test_the_default_is_clickhouse_s_window_funnel(case: dict[str, Any]) -> None:
    assert level(case) == case["ch_default"]


@pytest.mark.req("AN-01")
@pytest.mark.parametrize("case", PLAIN, ids=name)
def test_the_default_is_posthog_s_ordered_funnel(case: dict[str, Any]) -> None:
    # An event that is two steps: ClickHouse counts it for both, PostHog for one. We follow ClickHouse.
    wanted = 3 if case["name"] == "repeat_step_one_event" else case["posthog_ordered"]
    assert level(case) == wanted


@pytest.mark.parametrize("case", PLAIN, ids=name)
def test_strict_is_posthog_s(case: dict[str, Any]) -> None:
    # ClickHouse's strict_order stops at the first other event for good; with us and PostHog a new chain may begin.
    wanted = 3 if case["name"] == "repeat_step_one_event" else case["posthog_strict"]
    assert level(case, order="strict") == wanted


@pytest.mark.parametrize("case", PLAIN, ids=name)
def test_unordered_is_the_most_steps_in_one_window(case: dict[str, Any]) -> None:
    assert level(case, order="unordered") == case["unordered_max_in_window"]


@pytest.mark.parametrize("case", PLAIN, ids=name)
def test_strictly_later(case: dict[str, Any]) -> None:
    # A@1 A@2 B@3 for A A B: ClickHouse forgets A@1 when A@2 comes, and finds no second A after it. There is one.
    wanted = 3 if case["name"] == "repeat_step_two_events" else case["ch_strict_increase"]
    assert level(case, ties="strictly_later") == wanted


@pytest.mark.parametrize("case", EXCLUSIONS, ids=name)
def test_exclusions_are_posthog_s(case: dict[str, Any]) -> None:
    result = evaluate(events_of(case["events"]), spec_of(case, exclude=(Exclusion(types="X", after=1, before=2),)))
    if case["posthog_ordered"] == "excluded":
        assert [step.reached for step in result.steps] == [0, 0]
        assert [step.excluded for step in result.steps] == [1, 0]
        assert result.units("excluded", 1) == ["u"]
    else:
        assert sum(step.reached for step in result.steps) == case["posthog_ordered"]
        assert sum(step.excluded for step in result.steps) == 0


def test_the_table_is_whole() -> None:
    assert (len(PLAIN), len(EXCLUSIONS)) == (16, 5)
