"""Funnels in the words of a command line."""

from __future__ import annotations

from datetime import timedelta

import pytest

from kehu.lake.questions import SPLITS, STEPS, funnel, step, window


def test_steps() -> None:
    assert step("captured") is STEPS["captured"]
    demo = step("behaviour:demo_attended")
    assert (demo.types, demo.where) == (("behaviour.recorded",), {"data.kind": ("demo_attended",)})
    assert step("lead.captured.v1").types == ("lead.captured.v1",)
    baidu = step("lead.captured[data.channel=baidu,data.channel=wechat, data.rating=hot]")
    assert baidu.where == {"data.channel": ("baidu", "wechat"), "data.rating": ("hot",)}


@pytest.mark.parametrize(
    "text",
    ["", "Captured", "lead", "lead.captured[]", "lead.captured[x]", "lead.captured[data.x=]", "lead.captured[y=1]"],
)
def test_what_is_no_step(text: str) -> None:
    with pytest.raises(ValueError):
        step(text)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("90s", timedelta(seconds=90)),
        ("48h", timedelta(hours=48)),
        ("1d12h", timedelta(hours=36)),
        ("0.5w", timedelta(days=3.5)),
    ],
)
def test_windows(text: str, length: timedelta) -> None:
    assert window(text) == length


@pytest.mark.parametrize("text", ["", "30", "d", "-3d", "3 d", "1e9d", "9" * 30 + "d"])
def test_what_is_no_window(text: str) -> None:
    with pytest.raises(ValueError):
        window(text)


def test_a_whole_funnel() -> None:
    spec = funnel(["captured", "behaviour:demo_attended", "converted"], "7d", by="channel", order="strict")
    assert [s.name for s in spec.steps] == ["captured", "behaviour:demo_attended", "converted"]
    assert (spec.window, spec.breakdown, spec.order) == (timedelta(days=7), SPLITS["channel"], "strict")
    assert funnel(by="month").breakdown == "month"
    assert funnel(by="data.rating").breakdown == "data.rating"
    for steps, by, tz in (
        ([], None, "UTC"),
        (["captured"] * 2, None, "UTC"),
        (["captured"], "nonsense", "UTC"),
        (["captured"], None, "Mars"),
    ):
        with pytest.raises(ValueError):
            funnel(steps, by=by, tz=tz)
