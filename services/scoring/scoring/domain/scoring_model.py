"""The scoring model: what a set of rules must fulfil before leads are scored by it, and its versions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from kehu.decider import Decider, Refused
from kehu.events import Event
from kehu.events.scoring import Condition, Rule, ScoringModel, ScoringModelPublished

# The one model of a suite; its stream is scoring_model-default.
MODEL = "default"
PROFILE_ATTRIBUTES = frozenset(
    {
        "source", "channel", "campaign", "company", "industry", "region", "size", "title", "rating",
        "utm.source", "utm.medium", "utm.campaign", "utm.term", "utm.content",
    }
)  # fmt: skip
BEHAVIOUR_ATTRIBUTES = frozenset({"object", "channel", "duration_seconds", "device"})
DIMENSIONS = ("frequency", "depth", "fit")
MOST_CONDITIONS = 10
MOST_CHOICES = 100
MOST_BEHAVIOURS = 50

_FACT = re.compile(r"^facts\.[a-z0-9][a-z0-9_.:-]{0,93}$")


@dataclass(frozen=True, slots=True)
class PublishModel:
    """Score leads by these rules from now on.

    Args:
        at: the instant from which they are in force.
        note: why, for the people who read the versions later.
    """

    model: ScoringModel
    note: str | None
    at: datetime


@dataclass(frozen=True, slots=True)
class Models:
    """The versions so far: the last number and the model under it."""

    version: int = 0
    model: ScoringModel | None = None


def decide(command: PublishModel, state: Models) -> Sequence[Event]:
    """Publish, unless it is what is in force already.

    Raises:
        Refused: `scoring-model-invalid`, with the field that is wrong.
    """
    check(command.model)
    if command.model == state.model:
        return ()
    return (
        ScoringModelPublished(
            model_version=state.version + 1, model=command.model, note=command.note, effective=command.at
        ),
    )


def evolve(state: Models, event: Event) -> Models:
    if isinstance(event, ScoringModelPublished):
        return Models(version=event.model_version, model=event.model)
    return state


MODELS: Decider[PublishModel, Models] = Decider("scoring_model", Models(), decide, evolve)


def check(model: ScoringModel) -> None:
    """What the types of a model do not say.

    Raises:
        Refused: `scoring-model-invalid`.
    """
    if set(model.caps) != set(DIMENSIONS):
        raise _invalid("caps", "caps must name frequency, depth and fit, each once")
    if not model.warm_at < model.hot_at:
        raise _invalid("warm_at", "the edge of warm must be below the edge of hot")
    if not model.hysteresis < model.hot_at - model.warm_at:
        raise _invalid("hysteresis", "must be less than the distance between the edges of hot and warm")
    if model.hysteresis > model.warm_at:
        raise _invalid("hysteresis", "must not be more than the edge of warm")
    if model.qualify_at <= 0:
        raise _invalid("qualify_at", "must be above 0, or every lead would be qualified")
    seen: set[str] = set()
    for index, rule in enumerate(model.rules):
        where = f"rules.{index}"
        if rule.name in seen:
            raise _invalid(f"{where}.name", f"{rule.name} is the name of two rules")
        seen.add(rule.name)
        _check_rule(rule, where)


def _check_rule(rule: Rule, where: str) -> None:
    if rule.name == "base" or rule.name.startswith("cap."):
        raise _invalid(f"{where}.name", "base and cap.… are names of parts that are not rules")
    if rule.points == 0:
        raise _invalid(f"{where}.points", "a rule gives or takes points")
    if len(rule.conditions) > MOST_CONDITIONS:
        raise _invalid(f"{where}.conditions", f"at most {MOST_CONDITIONS} conditions")
    if len(rule.behaviours) > MOST_BEHAVIOURS:
        raise _invalid(f"{where}.behaviours", f"at most {MOST_BEHAVIOURS} kinds of behaviour")
    if rule.dimension == "fit":
        if rule.behaviours:
            raise _invalid(f"{where}.behaviours", "a fit rule looks at the profile, not at behaviours")
        if rule.half_life_days is not None:
            raise _invalid(
                f"{where}.half_life_days", "a profile does not fade; only rules about behaviours have a half-life"
            )
        if not rule.conditions:
            raise _invalid(f"{where}.conditions", "a fit rule without a condition is the base")
    for number, condition in enumerate(rule.conditions):
        _check_condition(condition, rule, f"{where}.conditions.{number}")


def _check_condition(condition: Condition, rule: Rule, where: str) -> None:
    known = PROFILE_ATTRIBUTES if rule.dimension == "fit" else BEHAVIOUR_ATTRIBUTES
    if condition.attribute not in known and not _FACT.match(condition.attribute):
        raise _invalid(
            f"{where}.attribute", f"{condition.attribute} is not one of {', '.join(sorted(known))} or facts.<name>"
        )
    value, operator = condition.value, condition.operator
    if operator == "in":
        fits = isinstance(value, tuple) and 0 < len(value) <= MOST_CHOICES
        wanted = f"a list of 1 to {MOST_CHOICES} values"
    elif operator == "present":
        fits, wanted = value is None or isinstance(value, bool), "true, false or nothing"
    elif operator in ("eq", "ne"):
        fits, wanted = value is not None and not isinstance(value, tuple), "one value"
    else:
        fits, wanted = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    if not fits:
        raise _invalid(f"{where}.value", f"{operator} needs {wanted}")


def _invalid(field: str, detail: str) -> Refused:
    return Refused("scoring-model-invalid", detail, field=f"model.{field}")
