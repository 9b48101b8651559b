"""The rules of leads, customers, channels, activities and imports: given events, when a command, then events."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kehu.events import Event, Personal
from kehu.events.lead_intake import (
    BehaviourRecorded,
    ChannelDefined,
    Contact,
    CustomerErased,
    CustomerErasureRequested,
    CustomerRegistered,
    ImportCompleted,
    ImportStarted,
    LeadCaptured,
    LeadDetailsUpdated,
    LeadMerged,
    LeadRejected,
)
from kehu.testing.specs import Spec
from lead_intake.domain.activity import ACTIVITY, RecordBehaviour, month_key
from lead_intake.domain.channel import CHANNEL, DefineChannel
from lead_intake.domain.cleaning import clean_profile
from lead_intake.domain.customer import CUSTOMER, EraseCustomer, RegisterCustomer, customer_number, month_of
from lead_intake.domain.importing import IMPORT, CompleteImport, StartImport
from lead_intake.domain.lead import LEAD, CaptureLead, PlaceLead, Placement, RejectLead, UpdateLead, first_rating

LEAD_ID = UUID("01900000-0000-7000-8000-000000000001")
OLDER = UUID("01900000-0000-7000-8000-000000000002")
CUSTOMER_ID = UUID("01900000-0000-7000-8000-000000000003")
NOW = datetime(2024, 5, 17, 8, 0, tzinfo=UTC)

PROFILE = clean_profile(name="张伟", phone="13800138000", company="星辰科技有限公司", title="采购经理")
CAPTURE = CaptureLead(LEAD_ID, "api", "baidu_ads", PROFILE, NOW, campaign="spring")
STRANGER = Placement(CUSTOMER_ID, "search_ads", number="CRM202405001", kind="company")
KNOWN = Placement(CUSTOMER_ID, "search_ads", survivor=OLDER, rule="exact_phone")
CAPTURED = LeadCaptured(
    lead_id=LEAD_ID,
    customer_id=CUSTOMER_ID,
    source="api",
    channel="baidu_ads",
    campaign="spring",
    contact=Personal(Contact(name="张伟", phone="+8613800138000")),
    raw_contact=Personal(Contact(name="张伟", phone="13800138000")),
    company="星辰科技有限公司",
    title="采购经理",
    rating="warm",
    corrections=PROFILE.corrections,
)
MERGED = LeadMerged(
    lead_id=LEAD_ID, customer_id=CUSTOMER_ID, survivor_lead_id=OLDER, confidence=1.0, rule="exact_phone"
)
REJECTED = LeadRejected(lead_id=LEAD_ID, customer_id=CUSTOMER_ID, reason="no_budget")


@pytest.mark.req("LI-01")
class TestCapture:
    def test_a_stranger_becomes_a_lead(self) -> None:
        Spec(LEAD).when(PlaceLead(CAPTURE, STRANGER)).then(CAPTURED)

    @pytest.mark.req("LI-05")
    def test_somebody_known_is_merged_into_their_open_lead(self) -> None:
        Spec(LEAD).when(PlaceLead(CAPTURE, KNOWN)).then(CAPTURED, MERGED)

    def test_somebody_known_without_an_open_lead_gets_one(self) -> None:
        Spec(LEAD).when(PlaceLead(CAPTURE, Placement(CUSTOMER_ID, "search_ads", rule="exact_phone"))).then(CAPTURED)

    def test_resent_does_nothing(self) -> None:
        Spec(LEAD).given(CAPTURED).when(PlaceLead(CAPTURE, STRANGER)).then_nothing()

    def test_nobody_is_refused(self) -> None:
        nobody = CaptureLead(LEAD_ID, "api", "baidu_ads", clean_profile(note="called, hung up", region="北京"), NOW)
        Spec(LEAD).when(PlaceLead(nobody, STRANGER)).then_refused("nobody")

    @pytest.mark.parametrize(
        ("captured_at", "slug"),
        [(NOW + timedelta(minutes=6), "in-the-future"), (datetime(1999, 12, 31, tzinfo=UTC), "too-early")],
    )
    def test_an_impossible_time_is_refused(self, captured_at: datetime, slug: str) -> None:
        capture = CaptureLead(LEAD_ID, "api", "baidu_ads", PROFILE, NOW, captured_at)
        Spec(LEAD).when(PlaceLead(capture, STRANGER)).then_refused(slug)


@pytest.mark.req("LI-08")
class TestFirstRating:
    @pytest.mark.parametrize(
        ("kind", "fields", "rating"),
        [
            ("referral", {"phone": "13800138000", "email": "a@b.cn", "company": "星辰"}, "hot"),
            ("referral", {"phone": "13800138000"}, "warm"),
            ("search_ads", {"phone": "13800138000", "email": "a@b.cn", "company": "星辰", "title": "经理"}, "hot"),
            ("search_ads", {"phone": "13800138000"}, "warm"),
            ("list", {"phone": "13800138000", "company": "星辰"}, "cold"),
            ("list", {"phone": "13800138000", "email": "a@b.cn", "company": "星辰"}, "warm"),
            ("never_heard_of", {"phone": "13800138000"}, "cold"),
            ("referral", {"name": "张伟", "company": "星辰", "title": "经理"}, "cold"),
        ],
    )
    def test_by_channel_and_completeness(self, kind: str, fields: dict[str, str], rating: str) -> None:
        assert first_rating(kind, clean_profile(**fields)) == rating  # type: ignore[arg-type]

    @given(
        st.sampled_from(["referral", "search_ads", "list", "other"]),
        st.sets(st.sampled_from(["email", "company", "title"])),
    )
    def test_knowing_more_never_makes_a_lead_colder(self, kind: str, known: set[str]) -> None:
        values = {"email": "a@b.cn", "company": "星辰", "title": "经理"}
        order = ["cold", "warm", "hot"]
        less = clean_profile(phone="13800138000", **{k: values[k] for k in sorted(known)[1:]})  # type: ignore[arg-type]
        more = clean_profile(phone="13800138000", **{k: values[k] for k in sorted(known)})  # type: ignore[arg-type]
        assert order.index(first_rating(kind, more)) >= order.index(first_rating(kind, less))


class TestDetails:
    def test_only_what_changed_is_recorded(self) -> None:
        command = UpdateLead(LEAD_ID, clean_profile(company="星辰科技有限公司", title="总经理", facts={"budget": 500}))
        Spec(LEAD).given(CAPTURED).when(command).then(
            LeadDetailsUpdated(lead_id=LEAD_ID, customer_id=CUSTOMER_ID, title="总经理", facts={"budget": 500})
        )

    def test_a_contact_change_carries_only_that_part(self) -> None:
        command = UpdateLead(LEAD_ID, clean_profile(email="Zhang@EXAMPLE.com"))
        (event,) = Spec(LEAD).given(CAPTURED).when(command).events
        assert isinstance(event, LeadDetailsUpdated)
        assert event.contact == Personal(Contact(email="Zhang@example.com"))
        assert [c.rule for c in event.corrections] == ["domain_case"]

    def test_resent_does_nothing(self) -> None:
        command = UpdateLead(LEAD_ID, clean_profile(title="总经理", facts={"budget": 500}))
        Spec(LEAD).given(CAPTURED).when(command).when(command).then_nothing()

    def test_refused_for_a_merged_a_rejected_and_an_unknown_lead(self) -> None:
        command = UpdateLead(LEAD_ID, clean_profile(title="总经理"))
        Spec(LEAD).given(CAPTURED, MERGED).when(command).then_refused("lead-merged")
        Spec(LEAD).given(CAPTURED, REJECTED).when(command).then_refused("lead-rejected")
        Spec(LEAD).when(command).then_refused("lead-not-found")


class TestRejection:
    COMMAND = RejectLead(LEAD_ID, "no_budget")

    def test_an_open_lead_is_rejected(self) -> None:
        Spec(LEAD).given(CAPTURED).when(self.COMMAND).then(REJECTED)

    def test_resent_does_nothing(self) -> None:
        Spec(LEAD).given(CAPTURED).when(self.COMMAND).when(self.COMMAND).then_nothing()

    def test_refused_for_a_merged_and_an_unknown_lead(self) -> None:
        Spec(LEAD).given(CAPTURED, MERGED).when(self.COMMAND).then_refused("lead-merged")
        Spec(LEAD).when(self.COMMAND).then_refused("lead-not-found")


@pytest.mark.req("LI-06")
class TestCustomer:
    REGISTER = RegisterCustomer(CUSTOMER_ID, "CRM202405001", "company")
    REGISTERED = CustomerRegistered(customer_id=CUSTOMER_ID, number="CRM202405001", kind="company")
    ERASE = EraseCustomer(CUSTOMER_ID, "pipl_request")

    def test_registered_once(self) -> None:
        Spec(CUSTOMER).when(self.REGISTER).then(self.REGISTERED).when(self.REGISTER).then_nothing()

    def test_the_number_has_month_and_sequence(self) -> None:
        assert customer_number("202405", 1) == "CRM202405001"
        assert customer_number("202405", 1234) == "CRM2024051234"
        for month, sequence in (("202405", 0), ("202405", 10**9), ("2405", 1)):
            with pytest.raises(ValueError, match="not a customer number"):
                customer_number(month, sequence)

    def test_the_month_is_that_of_china(self) -> None:
        assert month_of(datetime(2024, 4, 30, 15, 59, tzinfo=UTC)) == "202404"
        assert month_of(datetime(2024, 4, 30, 16, 0, tzinfo=UTC)) == "202405"

    @pytest.mark.req("LI-11")
    def test_erased_once(self) -> None:
        Spec(CUSTOMER).given(self.REGISTERED).when(self.ERASE).then(
            CustomerErasureRequested(customer_id=CUSTOMER_ID, reason="pipl_request"),
            CustomerErased(customer_id=CUSTOMER_ID, key_destroyed=True),
        ).when(self.ERASE).then_nothing()

    def test_somebody_unknown_cannot_be_erased(self) -> None:
        Spec(CUSTOMER).when(self.ERASE).then_refused("customer-not-found")


@pytest.mark.req("LI-02")
class TestActivity:
    COMMAND = RecordBehaviour(
        LEAD_ID, "page_viewed", NOW, NOW, customer_id=CUSTOMER_ID, object="/pricing", duration_seconds=4.5
    )

    def test_a_behaviour_is_recorded(self) -> None:
        Spec(ACTIVITY).when(self.COMMAND).then(
            BehaviourRecorded(
                behaviour_id=LEAD_ID,
                customer_id=CUSTOMER_ID,
                kind="page_viewed",
                object="/pricing",
                duration_seconds=4.5,
            )
        )

    @pytest.mark.parametrize(
        ("occurred_at", "slug"),
        [
            (NOW + timedelta(minutes=5, seconds=1), "in-the-future"),
            (datetime(1999, 12, 31, tzinfo=UTC), "too-early"),
        ],
    )
    def test_an_impossible_time_is_refused(self, occurred_at: datetime, slug: str) -> None:
        command = RecordBehaviour(LEAD_ID, "page_viewed", occurred_at, NOW, customer_id=CUSTOMER_ID)
        Spec(ACTIVITY).when(command).then_refused(slug)

    def test_a_clock_that_is_a_little_ahead_is_forgiven(self) -> None:
        command = RecordBehaviour(LEAD_ID, "page_viewed", NOW + timedelta(minutes=5), NOW, customer_id=CUSTOMER_ID)
        assert len(Spec(ACTIVITY).when(command).events) == 1

    def test_without_a_customer_it_is_refused(self) -> None:
        Spec(ACTIVITY).when(RecordBehaviour(LEAD_ID, "page_viewed", NOW, NOW)).then_refused("customer-not-found")

    def test_streams_are_cut_by_month(self) -> None:
        assert month_key(CUSTOMER_ID, NOW) == f"{CUSTOMER_ID}-202405"


@pytest.mark.req("LI-03")
class TestChannel:
    COMMAND = DefineChannel("baidu_ads", "百度推广", "search_ads")
    DEFINED = ChannelDefined(channel="baidu_ads", title="百度推广", kind="search_ads")

    def test_defined_and_defined_again(self) -> None:
        Spec(CHANNEL).when(self.COMMAND).then(self.DEFINED).when(self.COMMAND).then_nothing()

    def test_a_change_is_recorded(self) -> None:
        closed = DefineChannel("baidu_ads", "百度推广", "search_ads", active=False)
        Spec(CHANNEL).given(self.DEFINED).when(closed).then(
            ChannelDefined(channel="baidu_ads", title="百度推广", kind="search_ads", active=False)
        )


class TestImport:
    START = StartImport(LEAD_ID, "csv", "expo_2024")
    STARTED = ImportStarted(import_id=LEAD_ID, format="csv", channel="expo_2024")
    COMPLETE = CompleteImport(LEAD_ID, captured=3, merged=1, refused=1, repeated=0)
    COMPLETED = ImportCompleted(import_id=LEAD_ID, captured=3, merged=1, refused=1, repeated=0)

    def test_started_once_however_often_it_is_sent(self) -> None:
        Spec(IMPORT).when(self.START).then(self.STARTED).when(self.START).then_nothing()

    def test_completed_with_what_the_sender_was_told(self) -> None:
        Spec(IMPORT).given(self.STARTED).when(self.COMPLETE).then(self.COMPLETED)

    def test_the_whole_file_again_says_nothing_new(self) -> None:
        again = CompleteImport(LEAD_ID, captured=0, merged=0, refused=1, repeated=4)
        Spec(IMPORT).given(self.STARTED, self.COMPLETED).when(again).then_nothing()

    def test_a_mended_row_completes_it_again(self) -> None:
        mended = CompleteImport(LEAD_ID, captured=1, merged=0, refused=0, repeated=4)
        Spec(IMPORT).given(self.STARTED, self.COMPLETED).when(mended).then(
            ImportCompleted(import_id=LEAD_ID, captured=1, merged=0, refused=0, repeated=4)
        )

    def test_completing_what_was_not_started_is_refused(self) -> None:
        Spec(IMPORT).when(self.COMPLETE).then_refused("import-not-started")


@given(st.permutations([MERGED, REJECTED, CAPTURED]), st.integers(0, 3))
def test_folding_never_fails_on_a_recorded_fact(events: list[Event], count: int) -> None:
    assert LEAD.fold(events[:count]).status in {"new", "open", "merged", "rejected"}
