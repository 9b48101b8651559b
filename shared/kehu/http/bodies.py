"""JSON bodies, read strictly: in one pass from bytes to a checked model, and nothing in them that two readers could read differently."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from kehu.http.problems import Problem, from_validation, invalid


class Body(BaseModel):
    """Base of request models: unknown fields are refused, types are not guessed, numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


_PLACE = re.compile(r" at line (\d+) column (\d+)$")
_LARGEST = 2**63 - 1


class _Ambiguous(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _Ambiguous("an object has the same field twice")
    return made


def _constant(_: str) -> Any:
    raise _Ambiguous("NaN and Infinity are not JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Ambiguous("a number is too large")
    return value


def _int(text: str) -> int:
    if len(text) > 18 and abs(value := int(text)) > _LARGEST:
        raise _Ambiguous("a whole number has more than 64 bits")
    return value if len(text) > 18 else int(text)


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_float, parse_int=_int)


def parse(raw: bytes, adapter: TypeAdapter[Any]) -> Any:
    """The checked value of a JSON text.

    Nesting deeper than 200, text that is not UTF-8 and lone surrogates are refused by the parser; fields that come
    twice, NaN, numbers that no reader agrees on, and NUL characters (PostgreSQL has no place for them) by us.

    Raises:
        Problem: 400 when it is not JSON, 422 when it does not fit; with the place, never with a value.
    """
    try:
        value = adapter.validate_json(raw)
    except ValidationError as error:
        lines = error.errors(include_url=False, include_input=False)
        if lines[0]["type"] == "json_invalid":
            raise _not_json(str(lines[0].get("ctx", {}).get("error", ""))) from None
        _check(raw)
        raise invalid(from_validation(error)) from None
    _check(raw)
    return value


def _check(raw: bytes) -> None:
    if b"\\u0000" in raw and re.search(rb"(?<!\\)(?:\\\\)*\\u0000", raw):
        raise Problem(400, "The body holds a NUL character.", "not-json")
    try:
        _decoder.decode(raw.decode().strip())
    except _Ambiguous as error:
        raise Problem(400, f"The body is not acceptable JSON: {error}.", "not-json") from None


def _not_json(reason: str) -> Problem:
    place = _PLACE.search(reason)
    what = _PLACE.sub("", reason) or "it cannot be read"
    where = {"line": int(place[1]), "column": int(place[2])} if place else None
    at = f" at line {where['line']}, column {where['column']}" if where else ""
    return Problem(400, f"The body is not JSON: {what}{at}.", "not-json", more={"position": where} if where else None)


def check_model(model: Any, where: str, seen: set[type] | None = None) -> None:
    """Raise TypeError when a request model, or one inside it, would let unknown fields pass."""
    seen = set() if seen is None else seen
    waiting = [model]
    while waiting:
        annotation = waiting.pop()
        waiting.extend(getattr(annotation, "__args__", ()))
        if not isinstance(annotation, type) or not issubclass(annotation, BaseModel) or annotation in seen:
            continue
        seen.add(annotation)
        if annotation.model_config.get("extra") != "forbid":
            raise TypeError(f"{where}: {annotation.__name__} lets unknown fields pass; inherit kehu.http.Body")
        waiting.extend(info.annotation for info in annotation.model_fields.values())
