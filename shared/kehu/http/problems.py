"""Every error as a problem document (RFC 9457): stable slug, what was wrong where, and never a value that was sent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
import psycopg
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kehu.auth import KeysNotReachable
from kehu.decider import Refused
from kehu.gate import Overloaded, Unavailable
from kehu.observability import current_traceparent
from kehu.postgres import TRANSIENT
from kehu.privacy import KeysUnavailable

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:kehu:problem:"
# Errors that go away by themselves, so that the caller should come again. A read-only transaction: the server is a
# standby now, or was one just before.
PASSING = (*TRANSIENT, Unavailable, KeysUnavailable, KeysNotReachable, psycopg.errors.ReadOnlySqlTransaction)
_SLUGS = {
    400: "bad-request",
    401: "not-authenticated",
    403: "not-allowed",
    404: "not-found",
    405: "method-not-allowed",
    408: "too-slow",
    409: "conflict",
    412: "version-conflict",
    413: "too-large",
    415: "unsupported-media-type",
    422: "invalid",
    429: "too-many-requests",
    500: "internal-error",
    503: "unavailable",
}
MOST_ERRORS = 100


class FieldError(BaseModel):
    """What is wrong with one part of a request."""

    at: str = Field(description="`body`, `query`, `path` or `header`.", examples=["body"])
    field: str = Field(description="Path of the field; empty for the whole.", examples=["contact.phone"])
    reason: str = Field(description="What is wrong, without the value.", examples=["is required"])


class ProblemDetails(BaseModel):
    """The body of every answer from 400 on (RFC 9457)."""

    type: str = Field(examples=["urn:kehu:problem:invalid"])
    title: str = Field(examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    slug: str = Field(description="Stable code that a program can act on.", examples=["invalid"])
    detail: str = Field(description="For a person.", examples=["One field is wrong."])
    errors: list[FieldError] | None = Field(None, description="Each wrong field.")
    trace_id: str | None = Field(None, description="To find the request in logs and traces.")


class Problem(HTTPException):
    """An error with everything that the answer needs. Raise it anywhere in the handling of a request.

    Args:
        status: HTTP status.
        detail: what a person should know; without values that were sent.
        slug: stable code; the usual one of the status when None.
        errors: wrong fields.
        more: further members of the document, e.g. the roles that would do.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        slug: str | None = None,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(status, detail, dict(headers) if headers else None)
        self.slug = slug or _SLUGS.get(status, "error")
        self.errors, self.more = list(errors), dict(more or {})

    def document(self) -> dict[str, Any]:
        """The JSON of the answer."""
        document: dict[str, Any] = {
            "type": TYPE_PREFIX + self.slug,
            "title": _title(self.status_code),
            "status": self.status_code,
            "slug": self.slug,
            "detail": self.detail,
        }
        if self.errors:
            document["errors"] = [error.model_dump() for error in self.errors[:MOST_ERRORS]]
        document.update(self.more)
        traceparent = current_traceparent()
        if traceparent is not None:
            document["trace_id"] = traceparent[3:35]
        return document

    def response(self) -> Response:
        """The answer."""
        return Response(orjson.dumps(self.document()), self.status_code, self.headers, MEDIA_TYPE)


def _title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def later(slug: str, detail: str, seconds: int) -> Problem:
    """A 503 that says when to come again."""
    return Problem(503, detail, slug, headers={"Retry-After": str(seconds)})


def refusal(refused: Refused) -> Problem:
    """The answer to what a rule refused: 404 where the thing itself is not there, else 409."""
    status = 404 if refused.slug.endswith("not-found") else 409
    errors = [FieldError(at="body", field=refused.field, reason=refused.detail)] if refused.field else []
    return Problem(status, refused.detail, refused.slug, errors=errors)


def problem_of(error: Exception) -> Problem | None:
    """The problem that an exception means; None when it is a mistake of ours."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        return invalid(from_errors(error.errors()))
    if isinstance(error, HTTPException):
        return Problem(error.status_code, _title(error.status_code) + ".", headers=error.headers)
    if isinstance(error, Refused):
        return refusal(error)
    if isinstance(error, Overloaded):
        return later("overloaded", "Too many commands wait. Nothing was done; try again in a moment.", 1)
    if isinstance(error, PASSING):
        detail = (
            "A server behind this one cannot be reached. Whether a command was carried out is not known:"
            " send it again with the same Idempotency-Key."
        )
        return later("unavailable", detail, 2)
    return None


def invalid(errors: Sequence[FieldError]) -> Problem:
    """A 422 with its fields."""
    count = "One field is" if len(errors) == 1 else f"{len(errors)} fields are"
    return Problem(422, f"{count} wrong.", errors=errors)


def from_validation(error: ValidationError, at: str = "body") -> list[FieldError]:
    """The wrong fields of a pydantic error."""
    lines = error.errors(include_url=False)
    return from_errors({**line, "loc": (at, *line["loc"])} for line in lines)


def from_errors(lines: Iterable[Mapping[str, Any]]) -> list[FieldError]:
    """The wrong fields of pydantic's error lines whose location begins with body, query, path or header."""
    found = []
    for line in lines:
        at, *path = line["loc"]
        found.append(FieldError(at=str(at), field=_path(path), reason=_reason(line)))
        if len(found) >= MOST_ERRORS:
            break
    return found


def _path(parts: Sequence[str | int]) -> str:
    path = ""
    for part in parts[:20]:
        # A name can be the caller's own (an unknown field): shown so that it can be found, but short and harmless.
        name = f"[{part}]" if isinstance(part, int) else "".join(c if c.isprintable() else "?" for c in part[:64])
        path += name if not path or name.startswith("[") else f".{name}"
    return path


_REASONS = {
    "missing": "is required",
    "extra_forbidden": "is not a field of this request",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "dict_type": "must be an object",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "set_type": "must be a list",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "uuid_type": "must be a UUID",
    "uuid_parsing": "must be a UUID",
    "uuid_version": "must be a UUID",
    "datetime_type": "must be an RFC 3339 time, e.g. 2026-01-31T09:30:00+08:00",
    "datetime_parsing": "must be an RFC 3339 time, e.g. 2026-01-31T09:30:00+08:00",
    "datetime_from_date_parsing": "must be an RFC 3339 time, e.g. 2026-01-31T09:30:00+08:00",
    "timezone_aware": "must have a time zone, e.g. +08:00 or Z",
    "union_tag_invalid": "is not one of the known kinds",
    "union_tag_not_found": "has no field that names its kind",
}
# Kinds whose text is somebody's own words: a validator of ours or of a library.
_OWN_WORDS = {"value_error", "assertion_error"}
_VERB = re.compile(r"^(Input|Value|String|List|Tuple|Set|Dictionary|Decimal|URL) should ")


def _reason(line: Mapping[str, Any]) -> str:
    kind, text = str(line["type"]), str(line["msg"])
    if kind in _REASONS:
        return _REASONS[kind]
    if kind in _OWN_WORDS:
        text = text.removeprefix("Value error, ").removeprefix("Assertion failed, ")
        error = line.get("ctx", {}).get("error")
        # Libraries put parts of the value into their messages; a plain ValueError is one of ours.
        if type(error) is not ValueError or _echoes(text, line.get("input")):
            return "is not valid"
    return _VERB.sub("must ", text)[:300]


def _echoes(text: str, value: Any, budget: int = 200) -> bool:
    """Whether a text repeats something of the value."""
    waiting = [value]
    while waiting and budget > 0:
        budget -= 1
        item = waiting.pop()
        if isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)
        elif item is not None and not isinstance(item, bool) and len(shown := str(item)) > 1 and shown in text:
            return True
    return bool(waiting)
