"""Which models may be published, and how their versions count."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from kehu.decider import Refused
from kehu.events.scoring import Condition, Rule, ScoringModel, ScoringModelPublished
from kehu.testing.specs import Spec
from scoring.domain.scoring_model import MODELS, PublishModel, check

AT = datetime(2026, 3, 1, tzinfo=UTC)
RULE = Rule(name="demo", title="Demo", dimension="depth", behaviours=("demo_attended",), points=20.0)
FIT = Rule(
    name="industry",
    title="Industry",
    dimension="fit",
    conditions=(Condition(attribute="industry", operator="in", value=("software", "banking")),),
    points=10.0,
)
MODEL = ScoringModel(rules=(RULE, FIT))


def published(model: ScoringModel, version: int) -> ScoringModelPublished:
    return ScoringModelPublished(model_version=version, model=model, note="why", effective=AT)


@pytest.mark.req("SC-05")
def test_a_model_is_published_under_the_next_version() -> None:
    changed = MODEL.model_copy(update={"base": 5.0})
    spec = Spec(MODELS).when(PublishModel(MODEL, "why", AT)).then(published(MODEL, 1))
    spec.when(PublishModel(changed, "why", AT)).then(published(changed, 2))


@pytest.mark.req("SC-05")
def test_publishing_what_is_in_force_does_nothing() -> None:
    Spec(MODELS).given(published(MODEL, 3)).when(PublishModel(MODEL, None, AT)).then_nothing()


def fit(**changes: Any) -> ScoringModel:
    return ScoringModel(rules=(FIT.model_copy(update=changes),))


def condition(attribute: str, operator: str, value: Any) -> tuple[Condition, ...]:
    return (Condition(attribute=attribute, operator=operator, value=value),)  # type: ignore[arg-type]


WRONG = {
    "model.rules.1.name": ScoringModel(rules=(RULE, RULE)),
    "model.rules.0.name": fit(name="cap.fit"),
    "model.rules.0.points": fit(points=0.0),
    "model.rules.0.behaviours": fit(behaviours=("page_viewed",)),
    "model.rules.0.half_life_days": fit(half_life_days=3.0),
    "model.rules.0.conditions": fit(conditions=()),
    "model.rules.0.conditions.0.attribute": fit(conditions=condition("duration_seconds", "ge", 3)),
    "model.rules.0.conditions.0.value": fit(conditions=condition("facts.budget", "ge", "many")),
    "model.caps": ScoringModel(rules=(RULE,), caps={"depth": 40.0}),
    "model.warm_at": ScoringModel(rules=(RULE,), warm_at=80.0),
    "model.hysteresis": ScoringModel(rules=(RULE,), hysteresis=41.0),
    "model.qualify_at": ScoringModel(rules=(RULE,), qualify_at=0.0),
}


@pytest.mark.req("SC-05")
@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_model_is_refused_with_the_field(field: str) -> None:
    Spec(MODELS).when(PublishModel(WRONG[field], None, AT)).then_refused("scoring-model-invalid")
    with pytest.raises(Refused) as refused:
        check(WRONG[field])
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("operator", "value"),
    [
        ("in", "software"), ("in", ()), ("in", tuple(range(101))), ("present", "yes"), ("eq", None), ("ne", ("a",)),
        ("ge", True), ("lt", None), ("gt", ("a",)),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_its_operator_is_refused(operator: str, value: Any) -> None:
    with pytest.raises(Refused, match=operator):
        check(fit(conditions=condition("facts.it", operator, value)))


def test_what_a_rule_may_look_at() -> None:
    check(fit(conditions=condition("facts.budget", "ge", 1000)))
    check(ScoringModel(rules=(RULE.model_copy(update={"conditions": condition("object", "eq", "pricing")}),)))
    with pytest.raises(Refused, match="industry"):
        check(ScoringModel(rules=(RULE.model_copy(update={"conditions": condition("industry", "eq", "software")}),)))
