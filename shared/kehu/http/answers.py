"""Answers: JSON, and the outcome of a command as its HTTP status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import BaseModel
from starlette.responses import Response

from kehu.commands import Done, Outcome
from kehu.http.problems import Problem, refusal
from kehu.http.security import etag


def _default(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "as_tuple"):  # Decimal: exact as text
        return str(value)
    raise TypeError


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer from plain data, dataclasses, times, UUIDs and models."""
    return Response(
        orjson.dumps(content, default=_default, option=orjson.OPT_UTC_Z), status, headers, "application/json"
    )


def problem_of_outcome(outcome: Outcome) -> Problem | None:
    """The problem of a command that was not carried out: refused 409 (404 when the thing is not there), version lost 412, id reused 422."""
    if isinstance(outcome, Done):
        return None
    refused = outcome.refusal
    if outcome.kind == "conflict":
        if refused.slug == "version-conflict":
            return Problem(412, refused.detail, refused.slug)
        return Problem(409, refused.detail, refused.slug, headers={"Retry-After": "1"})
    if outcome.kind == "reused":
        return Problem(422, refused.detail, refused.slug)
    return refusal(refused)


def answer(outcome: Outcome, status: int = 200, *, location: str | None = None, stream: str | None = None) -> Response:
    """The HTTP answer to a command.

    Args:
        status: when it was carried out, 201 for something new; the same when it is answered again.
        location: path of what was made.
        stream: whose version becomes the ETag; needed only when the command touched several.

    Raises:
        Problem: it was not carried out.
    """
    problem = problem_of_outcome(outcome)
    if problem is not None:
        raise problem
    assert isinstance(outcome, Done)
    headers: dict[str, str] = {}
    if stream is None and len(outcome.versions) == 1:
        stream = next(iter(outcome.versions))
    version = outcome.versions.get(stream) if stream is not None else None
    if version is not None:
        headers["ETag"] = etag(version)
    if location is not None:
        headers["Location"] = location
    if outcome.repeated:
        headers["Idempotent-Replayed"] = "true"
    return json_response(outcome.result, status, headers)


def item(outcome: Outcome, status: int = 201) -> dict[str, Any]:
    """One command's outcome inside the answer to a batch: its status, and its result or its problem."""
    problem = problem_of_outcome(outcome)
    if problem is not None:
        return {"status": problem.status_code, "problem": problem.document()}
    assert isinstance(outcome, Done)
    return {"status": status, "repeated": outcome.repeated, "result": outcome.result}
