"""The bank set: its dates, what is made of its rows, its reference counts, and what its scoring model is worth."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from itertools import groupby
from pathlib import Path
from uuid import UUID

import pytest

from kehu.demo import bank
from kehu.demo.bank import BankContact
from kehu.events.scoring import ScoringModel
from scoring.api.schemas import PublishBody
from scoring.domain.evaluation import BehaviourInput, Inputs, ProfileInput, Rulebook, evaluate
from scoring.domain.scoring_model import check


@pytest.fixture(scope="module")
def contacts() -> list[BankContact]:
    return bank.load()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with gzip.open(bank.DATA_PATH, "rt", newline="") as file:
        return list(csv.DictReader(file))


def test_dates_run_from_may_2008_to_november_2010(contacts: list[BankContact]) -> None:
    days = [contact.day for contact in contacts]
    assert days == sorted(days)
    assert (days[0], days[-1]) == (date(2008, 5, 5), date(2010, 11, 17))
    months = [month for month, _ in groupby(f"{day:%Y-%m}" for day in days)]
    assert len(months) == len(set(months)) == 30  # 31 months, and none of them is September 2008
    assert "2008-09" not in months
    by_month = Counter(f"{day:%Y-%m}" for day in days)
    assert (by_month["2008-10"], by_month["2008-11"], by_month["2008-12"], by_month["2009-01"]) == (80, 3598, 13, 1176)
    at_weekends = sum(day.weekday() >= 5 for day in days)
    assert at_weekends == 50  # of 45 211: in any other year it would be some 13 000


def test_the_counts_are_those_of_the_file(contacts: list[BankContact], rows: list[dict[str, str]]) -> None:
    counts = bank.expected(contacts)
    assert counts.leads == len(rows) == 45_211
    assert counts.by_channel == Counter(row["contact"] for row in rows)
    assert counts.accepted == sum(row["y"] == "yes" for row in rows) == 5_289
    assert counts.accepted_by_channel == Counter(row["contact"] for row in rows if row["y"] == "yes")
    assert counts.behaviours == {
        "campaign_contacted": sum(row["pdays"] != "-1" for row in rows),
        "call_answered": sum(int(row["campaign"]) for row in rows),
        "offer_accepted": 5_289,
    }
    assert sum(counts.by_month.values()) == 45_211
    assert sum(counts.accepted_by_month.values()) == 5_289


@pytest.mark.parametrize("limit", [1, 500, 2_000])
def test_what_is_sent_comes_to_the_counts(contacts: list[BankContact], limit: int) -> None:
    sample = bank.sample(contacts, limit)
    assert len(sample) == limit
    counts = bank.expected(sample)
    sent = [behaviour for contact in sample for behaviour in bank.behaviours(contact, contact.external_id)]
    assert Counter(behaviour["kind"] for behaviour in sent) == counts.behaviours
    assert len({behaviour["behaviour_id"] for behaviour in sent}) == len(sent)
    leads = [bank.lead_row(contact) for contact in sample]
    assert Counter(lead["channel"] for lead in leads) == counts.by_channel
    assert Counter(lead["captured_at"][:7] for lead in leads) == counts.by_month
    days = list(bank.by_day(sample))
    assert [day for day, _ in days] == sorted({contact.day for contact in sample})
    assert [contact for _, group in days for contact in group] == sample


def test_a_sample_is_the_same_each_time(contacts: list[BankContact]) -> None:
    assert bank.load(limit=700) == bank.sample(contacts, 700)
    assert bank.sample(contacts, 10**6) == contacts


def test_a_sample_has_the_months_of_the_whole(contacts: list[BankContact]) -> None:
    whole, sample = bank.expected(contacts).by_month, bank.expected(bank.sample(contacts, 4_000)).by_month
    for month, count in whole.items():
        assert abs(sample.get(month, 0) - count * 4_000 / 45_211) <= 1, month


def test_everybody_is_somebody_else_and_nobody_real(contacts: list[BankContact]) -> None:
    leads = [bank.lead_row(contact) for contact in contacts]
    for field in ("phone", "email", "external_id"):
        assert len({lead[field] for lead in leads}) == len(leads)
    assert all(lead["email"].endswith("@example.com") for lead in leads)


def test_a_contact_lives_through_its_day_in_order(contacts: list[BankContact]) -> None:
    for contact in contacts:
        times = [datetime.fromisoformat(b["occurred_at"]) for b in bank.behaviours(contact, "lead")]
        assert times == sorted(times)
        own = [at for at in times if at.date() == contact.day]
        assert len(own) == contact.calls + contact.accepted
        assert contact.captured_at < own[0]
        assert contact.captured_at.date() == own[-1].date() == (own[-1] + timedelta(hours=8)).date() == contact.day


def test_the_length_of_a_call_is_told_with_the_last_call_and_nowhere_else(contacts: list[BankContact]) -> None:
    for contact in bank.sample(contacts, 1_000):
        told = bank.behaviours(contact, "lead")
        last = [b for b in told if datetime.fromisoformat(b["occurred_at"]) == contact.last_call_at]
        assert [b.get("duration_seconds") for b in told if "duration_seconds" in b] == [contact.duration_seconds]
        assert "duration_seconds" in last[0]
        assert "duration" not in json.dumps(bank.lead_row(contact))
    assert "duration" not in bank.MODEL_PATH.read_text()


@pytest.mark.parametrize("damage", ["order", "length", "column"])
def test_another_file_is_refused(tmp_path: Path, rows: list[dict[str, str]], damage: str) -> None:
    changed = [dict(row) for row in rows]
    if damage == "order":
        changed[10]["day"] = "1"
    elif damage == "length":
        changed.pop()
    else:
        changed = [{name: value for name, value in row.items() if name != "pdays"} for row in changed]
    path = tmp_path / "bank.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, changed[0])
        writer.writeheader()
        writer.writerows(changed)
    with pytest.raises(bank.BadData):
        bank.load(path)


# --- What the model is worth


def inputs_before_the_outcome(contact: BankContact) -> Inputs:
    """What scoring knows just before the last call ends, from the very payloads that are sent."""
    lead = bank.lead_row(contact)
    attributes = {"channel": lead["channel"], **{f"facts.{name}": value for name, value in lead["facts"].items()}}
    behaviours = [
        BehaviourInput(
            UUID(b["behaviour_id"]),
            datetime.fromisoformat(b["occurred_at"]),
            b["kind"],
            {"object": b["object"], **{f"facts.{name}": value for name, value in b.get("facts", {}).items()}},
        )
        for b in bank.behaviours(contact, "lead")
        if datetime.fromisoformat(b["occurred_at"]) < contact.last_call_at
    ]
    return Inputs.of([ProfileInput(UUID(int=contact.number), contact.captured_at, attributes)], behaviours)


@pytest.fixture(scope="module")
def scored(contacts: list[BankContact]) -> list[tuple[BankContact, float]]:
    model = ScoringModel.model_validate(bank.model()["model"], strict=False)
    book = Rulebook(model, 1, contacts[0].captured_at)
    before = timedelta(microseconds=1)
    return [(c, evaluate(book, inputs_before_the_outcome(c), c.last_call_at - before).score) for c in contacts]


def area_under_the_curve(scored: Sequence[tuple[BankContact, float]]) -> float:
    """The chance that of one who accepts and one who does not the first has the higher score (ties count half)."""
    ordered = sorted(scored, key=lambda pair: pair[1])
    ranks, passed = 0.0, 0
    for _, tied in groupby(ordered, key=lambda pair: pair[1]):
        group = [contact.accepted for contact, _ in tied]
        ranks += sum(group) * (passed + (len(group) + 1) / 2)
        passed += len(group)
    won = sum(contact.accepted for contact, _ in scored)
    return (ranks - won * (won + 1) / 2) / (won * (len(scored) - won))


@pytest.mark.req("SC-01")
def test_the_model_can_be_published() -> None:
    body = PublishBody.model_validate_json(bank.MODEL_PATH.read_text())
    model = ScoringModel.model_validate(body.model.model_dump())
    check(model)
    assert all(rule.points == int(rule.points) for rule in model.rules)


@pytest.mark.req("SC-06")
def test_a_higher_score_accepts_more_often_also_after_the_time_it_was_fitted_to(
    scored: list[tuple[BankContact, float]],
) -> None:
    fitted = [pair for pair in scored if pair[0].day < date(2009, 5, 1)]
    later = [pair for pair in scored if pair[0].day >= date(2009, 5, 1)]
    assert len(fitted) == 34_177
    areas = {
        name: area_under_the_curve(pairs) for name, pairs in (("fitted", fitted), ("later", later), ("all", scored))
    }
    assert areas["fitted"] == pytest.approx(0.66, abs=0.005)
    assert areas["later"] == pytest.approx(0.73, abs=0.005)
    assert areas["all"] == pytest.approx(0.742, abs=0.002)
    bands = {
        "hot": [c.accepted for c, score in scored if score >= 80],
        "warm": [c.accepted for c, score in scored if 50 <= score < 80],
        "cold": [c.accepted for c, score in scored if score < 50],
    }
    share = {band: len(accepted) / len(scored) for band, accepted in bands.items()}
    rate = {band: sum(accepted) / len(accepted) for band, accepted in bands.items()}
    assert 0.03 <= share["hot"] <= 0.10
    assert rate["hot"] > 0.5 > 0.2 > rate["warm"] > 2 * rate["cold"]
