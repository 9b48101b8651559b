"""The model that a new suite begins with: business customers, a long sale. Marketing publishes its own when it knows better."""

from __future__ import annotations

from kehu.events.scoring import Condition, Rule, ScoringModel

_PRICES = ("pricing", "/pricing", "price-list", "报价", "价格")
_DECIDERS = ("ceo", "cto", "cfo", "founder", "director", "董事长", "总经理", "创始人", "采购总监", "技术总监", "总监")
_INDUSTRIES = ("software", "internet", "finance", "manufacturing", "软件", "互联网", "金融", "制造", "制造业")
_LARGE = ("201-500", "501-1000", "1000+", "large", "大型")

DEFAULT_MODEL = ScoringModel(
    rules=(
        # How often: fades within weeks.
        Rule(
            name="interaction", title="Interacted with us", dimension="frequency", points=3.0, cap=15.0, half_life_days=14.0,
            behaviours=(
                "page_viewed", "product_viewed", "content_downloaded", "email_clicked", "call_answered", "demo_attended",
                "form_submitted", "guide_opened", "feature_used", "contract_template_viewed",
            ),
        ),
        Rule(
            name="email-opened", title="Opened an email", dimension="frequency", behaviours=("email_opened",), points=2.0,
            cap=8.0, half_life_days=14.0,
        ),
        Rule(
            name="call-answered", title="Answered a call", dimension="frequency", behaviours=("call_answered",), points=5.0,
            cap=15.0, half_life_days=21.0,
        ),
        Rule(
            name="unsubscribed", title="Unsubscribed", dimension="frequency", behaviours=("email_unsubscribed", "unsubscribed"),
            points=-20.0, cap=20.0, half_life_days=180.0,
        ),
        # How deep: what somebody does who is about to decide.
        Rule(
            name="content", title="Downloaded a white paper or case", dimension="depth", behaviours=("content_downloaded",),
            points=8.0, cap=16.0, half_life_days=30.0,
        ),
        Rule(
            name="pricing", title="Looked at prices", dimension="depth", behaviours=("page_viewed", "product_viewed"),
            conditions=(Condition(attribute="object", operator="in", value=_PRICES),), points=8.0, cap=16.0, half_life_days=21.0,
        ),
        Rule(
            name="demo", title="Attended a demo", dimension="depth", behaviours=("demo_attended",), points=20.0, cap=30.0,
            half_life_days=45.0,
        ),
        Rule(
            name="contract-template", title="Looked at the contract template", dimension="depth",
            behaviours=("contract_template_viewed",), points=15.0, cap=15.0, half_life_days=45.0,
        ),
        Rule(
            name="long-call", title="Talked for five minutes or more", dimension="depth", behaviours=("call_answered",),
            conditions=(Condition(attribute="duration_seconds", operator="ge", value=300),), points=8.0, cap=16.0,
            half_life_days=30.0,
        ),
        Rule(
            name="trial", title="Used the product on trial", dimension="depth", behaviours=("feature_used",), points=4.0, cap=16.0,
            half_life_days=21.0,
        ),
        # How well they fit: industry, budget, size, and who asks.
        Rule(
            name="industry", title="Works in an industry that we serve", dimension="fit", points=8.0,
            conditions=(Condition(attribute="industry", operator="in", value=_INDUSTRIES),),
        ),
        Rule(
            name="budget", title="Has a budget of 100 000 or more", dimension="fit", points=8.0,
            conditions=(Condition(attribute="facts.budget", operator="ge", value=100_000),),
        ),
        Rule(
            name="large-budget", title="Has a budget of 500 000 or more", dimension="fit", points=4.0,
            conditions=(Condition(attribute="facts.budget", operator="ge", value=500_000),),
        ),
        Rule(
            name="employees", title="Has 200 employees or more", dimension="fit", points=5.0,
            conditions=(Condition(attribute="facts.employees", operator="ge", value=200),),
        ),
        Rule(
            name="size", title="Is a large company", dimension="fit", points=5.0,
            conditions=(Condition(attribute="size", operator="in", value=_LARGE),),
        ),
        Rule(
            name="decision-maker", title="Decides", dimension="fit", points=5.0,
            conditions=(Condition(attribute="title", operator="in", value=_DECIDERS),),
        ),
        Rule(
            name="recommended", title="Came by recommendation", dimension="fit", points=6.0,
            conditions=(Condition(attribute="channel", operator="in", value=("referral", "partner")),),
        ),
        Rule(
            name="hot-at-capture", title="Was rated hot when captured", dimension="fit", points=5.0,
            conditions=(Condition(attribute="rating", operator="eq", value="hot"),),
        ),
        Rule(
            name="no-company", title="Named no company", dimension="fit", points=-10.0,
            conditions=(Condition(attribute="company", operator="present", value=False),),
        ),
    )
)  # fmt: skip
