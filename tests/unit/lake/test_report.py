"""Reports: one file, no network, nothing that was put in can break out."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import pyarrow as pa
import pytest

from kehu.lake import FunnelSpec, Report, Step, evaluate
from kehu.lake.charts import band_chart, conversion_chart, funnel_chart, score_chart, timeline_chart

HOSTILE = "</td></table><script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\" 'single' \u202e"
START = datetime(2026, 1, 1, tzinfo=UTC)
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """The elements, their text, and whether every one that was opened was closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.words.append((self.open[-1], data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def events(months: int = 4, customers: int = 40) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for n in range(customers * months):
        start = START + timedelta(days=30 * (n % months), hours=n)
        rows.append({"customer": f"客户{n}", "type": "a.done.v1", "time": start})
        if n % 3:
            rows.append({"customer": f"客户{n}", "type": "b.done.v1", "time": start + timedelta(days=n % 7)})
    return pa.Table.from_pylist(
        rows, pa.schema([("customer", pa.string()), ("type", pa.string()), ("time", pa.timestamp("us", tz="UTC"))])
    )


def funnel(names: tuple[str, str] = ("线索", "成交"), **more: Any) -> Any:
    steps = (Step(name=names[0], types="a.done"), Step(name=names[1], types="b.done"))
    return evaluate(events(), FunnelSpec(steps=steps, window=timedelta(days=5), **more))


def full() -> Report:
    result = funnel(breakdown="month")
    bands = [{"band": "热", "total": 40, "converted": 22}, {"band": "冷", "total": 0, "converted": 0}]
    scores = [{"time": START + timedelta(days=d), "score": s} for d, s in ((0, 10), (3, 45.5), (9, 83))]
    return (
        Report("三月销售漏斗", language="zh-CN")
        .heading("转化")
        .paragraph("每一步的客户数。")
        .figure(result.chart(), "漏斗：从线索到成交")
        .figure(conversion_chart(result), "按月转化率", caption="图 2")
        .figure(band_chart(bands), "按评分段的转化率")
        .figure(score_chart(scores, {"MQL": 80}), "评分历史")
        .figure(timeline_chart(events(1, 5)), "时间线")
        .heading("明细", 3)
        .table(
            result.rows(), {"value": "月份", "name": "步骤", "reached": "客户数", "rate": "转化率"}, caption="各月各步"
        )
    )


@pytest.mark.req("AN-09")
def test_one_file_that_needs_nothing_else(tmp_path: Path) -> None:
    path = full().save(tmp_path / "out" / "report.html")
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 300_000
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object", "embed", "image", "foreignobject"} & {
        tag for tag, _ in page.tags
    }
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert not [
            v for name, v in attributes.items() if name.endswith(("href", "src")) and v and not v.startswith("#")
        ]
    assert not re.search(r"url\((?!#)|@import", text)
    policy = next(m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_chinese_stays_text() -> None:
    page = Page(full().html())
    assert page.all("html")[0]["lang"] == "zh-CN"
    in_figures = {word for tag, word in page.words if tag == "text"}
    assert {"线索", "成交", "热", "MQL"} <= in_figures


def test_figures_say_what_they_show_and_keep_their_ids_apart() -> None:
    text = full().html()
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for value in attributes.values():
            for target in re.findall(r"url\(#([^)]+)\)", value or ""):
                assert target in ids
    figures = [a for a in page.all("svg") if a.get("role") == "img"]
    assert len(figures) == len(page.all("figure")) == len(page.all("figcaption")) == 5
    titles = {attributes["id"] for attributes in page.all("title") if attributes.get("id")}
    assert {figure["aria-labelledby"] for figure in figures} == titles


def test_tables_have_headers_and_captions() -> None:
    page = Page(full().html())
    assert [a["scope"] for a in page.all("th")] == ["col"] * 4
    assert ("caption", "各月各步") in page.words
    assert len(page.all("td")) == 4 * len(funnel(breakdown="month").rows())


def test_hostile_text_stays_text() -> None:
    result = funnel((HOSTILE, "b"))
    report = (
        Report(HOSTILE)
        .heading(HOSTILE)
        .paragraph(HOSTILE)
        .table([{HOSTILE: HOSTILE, "b": 1}], caption=HOSTILE)
        .table([{"x": HOSTILE}], {"x": HOSTILE})
        .figure(funnel_chart(result), HOSTILE, caption=HOSTILE)
        .figure(timeline_chart([{"time": START, "type": HOSTILE}]), HOSTILE)
        .figure(band_chart([{"band": HOSTILE, "total": 3, "converted": 1}]), HOSTILE)
    )
    page = Page(report.html())
    assert page.open == []
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    for tag in ("h1", "h2", "p", "caption", "th", "td", "figcaption", "title"):
        assert any(name == tag and HOSTILE in word for name, word in page.words), tag
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_values_are_written_for_people() -> None:
    at = datetime(2026, 3, 1, 8, 30, tzinfo=UTC)
    row = {
        "none": None,
        "yes": True,
        "count": 1234567,
        "rate": 0.123456,
        "money": Decimal("12.30"),
        "at": at,
        "big": 12345.678,
    }
    words = [word for tag, word in Page(Report("x").table([row]).html()).words if tag == "td"]
    assert words == ["–", "yes", "1,234,567", "0.1235", "12.30", "2026-03-01 08:30:00+00:00", "12,346"]


def test_limits() -> None:
    with pytest.raises(ValueError, match="limit"):
        Report("x").table([{"a": 1}] * 2_001)
    with pytest.raises(ValueError, match="alternative text"):
        Report("x").figure(funnel().chart(), "  ")
    with pytest.raises(ValueError, match="level 1"):
        Report("x").heading("x", 1)
    with pytest.raises(ValueError, match="limit"):
        timeline_chart([{"time": START, "type": "x"}] * 20_001)
    with pytest.raises(ValueError, match="time zone"):
        timeline_chart([{"time": datetime(2026, 1, 1), "type": "x"}])
    with pytest.raises(ValueError, match="breakdown"):
        conversion_chart(funnel())
    report = Report("x")
    with pytest.raises(ValueError, match="500"):
        for _ in range(501):
            report.paragraph("x")


def test_a_chart_fetches_nothing() -> None:
    chart = alt.Chart("http://127.0.0.1:9/data.json").mark_point().encode(x="a:Q")
    with pytest.raises(ValueError, match="127"):
        Report("x").figure(chart, "points")


def test_a_page_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    Report("old").save(path)

    def broken(_: Report) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(Report, "html", broken)
    with pytest.raises(OSError, match="no space"):
        Report("new").save(path)
    assert "old" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_young_months_are_marked() -> None:
    result = funnel(breakdown="month", as_of=START + timedelta(days=92))
    assert {steps[1].value: steps[1].young for steps in result.values}["2026-04"]
    spec = conversion_chart(result).to_dict()
    points = spec["datasets"][spec["layer"][2]["data"]["name"]]
    states = {row["period"]: row["state"] for row in points}
    assert states["2026-01"] == "complete"
    assert states["2026-04"] == "some windows still open"
