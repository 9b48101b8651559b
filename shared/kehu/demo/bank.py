"""45 211 real telephone contacts of a Portuguese bank, as leads: who was called when, how often, and who took the offer.

The set is UCI 222 (Moro, Rita, Cortez 2014, CC BY 4.0; see data/README.md). What is real in it and what is ours:

- **Dates.** The file has day and month and no year, and its rows are in order of date: months run on from May 2008 to November
  2010 (a month that is lower than the one before begins a year), and within a month the days never run back. Both are
  checked when the file is read. No row is of September 2008, and December 2008 has 13. The years are right: 99.9 % of the
  days that they give are Monday to Friday.
- **Times of day** are ours: all of a contact's own day lies between 6:00 and 11:00 UTC, the same date from Lisbon to Shanghai.
- **Names, phones and addresses** are made up from the number of the contact, so that every contact is somebody else.
  example.com is reserved (RFC 2606); nobody is to be called at these numbers.
- **The campaign before** (`previous`, `pdays`, `poutcome`) is one behaviour at the date less `pdays` days: the file tells how many
  contacts there were, and when the last one was.
- **Calls of this campaign**: `campaign` counts them and only the last one's day is told. The others are placed before it on the
  same day.
- **`duration`** is known when the last call has ended, so it stands on that call's behaviour, and no rule that scores before the
  outcome may look at it.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import UUID

from kehu.ids import derived

DATA_PATH = Path(__file__).with_name("data") / "bank_market.csv.gz"
MODEL_PATH = Path(__file__).with_name("bank_model.json")
CONTACTS = 45_211
FIRST_YEAR = 2008

_MONTHS = {name: n for n, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split(), 1)}  # noqa: SIM905
# The catalogue entries that leads of this set need: channel → title and kind.
CHANNELS: Mapping[str, tuple[str, str]] = {
    "cellular": ("Called on a mobile", "call"),
    "telephone": ("Called on a landline", "call"),
    "unknown": ("Called, line not noted", "call"),
}
OFFER = "term deposit"

# On the day of the contact.
_CAPTURED = time(6, 0, tzinfo=UTC)
_LAST_CALL = time(9, 0, tzinfo=UTC)
_BETWEEN_CALLS = timedelta(minutes=2)  # 63 calls, the most in the set, are over two hours
_CAMPAIGN_BEFORE = time(10, 0, tzinfo=UTC)

_FAMILY = "王李张刘陈杨黄赵周吴徐孙马朱胡郭何林高罗"
_GIVEN = "伟芳娜敏静丽强磊洋艳勇军杰娟涛超明霞秀平"


class BadData(ValueError):
    """The file is not the bank marketing set, or not in the order that gives its dates."""


@dataclass(frozen=True, slots=True)
class BankContact:
    """One row.

    Args:
        number: of the contact, from 1; `Cust_num`.
        day: of the last call of this campaign.
        channel: `cellular`, `telephone` or `unknown`.
        duration_seconds: of the last call.
        calls: of this campaign, the last one included.
        days_since: from the last contact of the campaign before, None when there was none.
        contacts_before: in the campaign before.
        outcome_before: `success`, `failure`, `other` or `unknown`.
        accepted: whether the offer was taken at the end.
        facts: age, job, marital, education, default, balance, housing, loan; what is unknown is absent.
    """

    number: int
    day: date
    channel: str
    duration_seconds: int
    calls: int
    days_since: int | None
    contacts_before: int
    outcome_before: str
    accepted: bool
    facts: Mapping[str, str | int | bool]

    @property
    def external_id(self) -> str:
        """What the lead is called at the bank."""
        return f"bank-{self.number}"

    @property
    def captured_at(self) -> datetime:
        """Early on the day of the calls."""
        return datetime.combine(self.day, _CAPTURED) + timedelta(seconds=self.number % 1_800)

    @property
    def last_call_at(self) -> datetime:
        """When the last call ended. The score in force just before it is the one to judge by the outcome."""
        return datetime.combine(self.day, _LAST_CALL) + timedelta(seconds=self.number % 3_600)


def load(path: Path = DATA_PATH, limit: int | None = None) -> list[BankContact]:
    """The contacts in order of date.

    Args:
        path: the CSV file, gzipped or not.
        limit: take a `sample` of as many.

    Raises:
        FileNotFoundError: it is not there.
        BadData: it is another file.
    """
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if len(rows) != CONTACTS:
        raise BadData(f"{path.name} has {len(rows)} rows and should have {CONTACTS}")
    try:
        contacts = [_contact(row, day) for row, day in zip(rows, _days(rows), strict=True)]
    except (KeyError, ValueError) as error:
        raise BadData(f"{path.name} is not the bank marketing set: {error!r}") from error
    return contacts if limit is None else sample(contacts, limit)


def sample(contacts: Sequence[BankContact], limit: int) -> list[BankContact]:
    """As many contacts, evenly over the whole time; the same ones each time.

    Args:
        limit: 1 and more; from the number of contacts on it is all of them.
    """
    most = min(limit, len(contacts))
    return [contacts[n * len(contacts) // most] for n in range(most)]


def _days(rows: Iterable[Mapping[str, str]]) -> Iterator[date]:
    """The date of each row, by the order of the rows. Raises BadData when days run back inside a month."""
    before: date | None = None
    for row in rows:
        month, day = _MONTHS[row["month"]], int(row["day"])
        year = before.year + (month < before.month) if before else FIRST_YEAR
        at = date(year, month, day)
        if before and at < before:
            raise BadData(f"contact {row['Cust_num']} is of {at}, before {before}: the rows are not in order of date")
        before = at
        yield at


def _contact(row: Mapping[str, str], day: date) -> BankContact:
    facts: dict[str, str | int | bool] = {"age": int(row["age"]), "balance": int(row["balance"])}
    facts |= {name: row[name].rstrip(".") for name in ("job", "marital", "education") if row[name] != "unknown"}
    facts |= {name: _yes(row[name]) for name in ("default", "housing", "loan")}
    days_since = int(row["pdays"])
    return BankContact(
        number=int(row["Cust_num"]),
        day=day,
        channel=row["contact"],
        duration_seconds=int(row["duration"]),
        calls=int(row["campaign"]),
        days_since=days_since if days_since >= 0 else None,
        contacts_before=int(row["previous"]),
        outcome_before=row["poutcome"],
        accepted=_yes(row["y"]),
        facts=facts,
    )


def _yes(text: str) -> bool:
    return {"yes": True, "no": False}[text]


def by_day(contacts: Iterable[BankContact]) -> Iterator[tuple[date, list[BankContact]]]:
    """Contacts day by day, in order of date."""
    for day, group in groupby(contacts, key=lambda contact: contact.day):
        yield day, list(group)


def lead_row(contact: BankContact) -> dict[str, Any]:
    """The contact as a line of `POST /imports` (NDJSON)."""
    n = contact.number
    return {
        "external_id": contact.external_id,
        "channel": contact.channel,
        "name": _FAMILY[n % 20] + _GIVEN[n // 20 % 20] + _GIVEN[n // 400 % 20],
        "phone": f"+86190000{n:05d}",
        "email": f"contact-{n}@example.com",
        "captured_at": contact.captured_at.isoformat(),
        "facts": dict(contact.facts),
    }


def behaviours(contact: BankContact, lead_id: UUID | str) -> list[dict[str, Any]]:
    """What the contact did, as items of `POST /behaviours` or lines of `POST /behaviours/import`, in order of time.

    Args:
        lead_id: what lead-intake called the lead.
    """
    found: list[dict[str, Any]] = []

    def did(kind: str, at: datetime, **more: Any) -> None:
        behaviour_id = derived("bank", contact.number, kind, len(found))
        found.append(
            {
                "behaviour_id": str(behaviour_id),
                "lead_id": str(lead_id),
                "kind": kind,
                "occurred_at": at.isoformat(),
                "channel": contact.channel,
                **more,
            }
        )

    if contact.days_since is not None:
        before = datetime.combine(contact.day - timedelta(days=contact.days_since), _CAMPAIGN_BEFORE)
        facts = {"contacts": contact.contacts_before, "outcome": contact.outcome_before}
        did("campaign_contacted", before, object=OFFER, facts=facts)
    for left in range(contact.calls - 1, 0, -1):
        did("call_answered", contact.last_call_at - left * _BETWEEN_CALLS, object=OFFER)
    did("call_answered", contact.last_call_at, object=OFFER, duration_seconds=contact.duration_seconds)
    if contact.accepted:
        did("offer_accepted", contact.last_call_at + timedelta(minutes=1), object=OFFER)
    return found


def model() -> dict[str, Any]:
    """The scoring model for this set, as the body of scoring's `POST /models`.

    It was fitted to the contacts until April 2009 (34 177) without the length of the last call: a logistic regression on
    the rules of the file, weights times 28, rounded. How well the score just before the end of the last call tells who
    accepts (area under the ROC curve): 0.663 until April 2009, 0.729 from May 2009 on, 0.742 over all.
    Of the 5.3 % with 80 points and more 53 % accept, of those under 50 7 %.
    """
    body: dict[str, Any] = json.loads(MODEL_PATH.read_text())
    return body


@dataclass(frozen=True, slots=True)
class Expected:
    """Exact counts that the suite must come to.

    Args:
        by_month: leads by `yyyy-mm` of the contact's day.
        behaviours: by kind.
        accepted_by_channel: leads that took the offer.
    """

    leads: int
    by_channel: Mapping[str, int]
    by_month: Mapping[str, int]
    behaviours: Mapping[str, int]
    accepted: int
    accepted_by_channel: Mapping[str, int]
    accepted_by_month: Mapping[str, int]


def expected(contacts: Sequence[BankContact]) -> Expected:
    """The counts, summed over the columns of the file and not over what is sent."""
    accepted = [contact for contact in contacts if contact.accepted]
    before = sum(contact.days_since is not None for contact in contacts)
    calls = sum(contact.calls for contact in contacts)
    kinds = {"campaign_contacted": before, "call_answered": calls, "offer_accepted": len(accepted)}
    return Expected(
        leads=len(contacts),
        by_channel=Counter(contact.channel for contact in contacts),
        by_month=Counter(f"{contact.day:%Y-%m}" for contact in contacts),
        behaviours={kind: count for kind, count in kinds.items() if count},
        accepted=len(accepted),
        accepted_by_channel=Counter(contact.channel for contact in accepted),
        accepted_by_month=Counter(f"{contact.day:%Y-%m}" for contact in accepted),
    )
