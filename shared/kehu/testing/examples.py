"""A deterministic example of every event, made from its declaration: for golden files, the catalogue and round-trip tests."""

from __future__ import annotations

import re
import types
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from uuid import UUID

from annotated_types import Ge, Gt, Le
from pydantic import AwareDatetime, BaseModel, StringConstraints
from pydantic.fields import FieldInfo

from kehu.events import Event, Personal
from kehu.ids import derived

# Examples that read like the thing, by field name; everything else is made from the type.
_BY_NAME: dict[str, Any] = {
    "number": "CRM202405001",
    "name": "王小明",
    "phone": "+8613800138000",
    "email": "wang.xiaoming@example.com",
    "company": "杭州示例科技有限公司",
    "channel": "search-ads",
    "kind": "page_viewed",
    "currency": "CNY",
    "rule": "exact_phone",
    "region": "浙江",
    "industry": "software",
}
_AT = datetime(2024, 5, 1, 8, 30, tzinfo=UTC)


def example(cls: type[Event]) -> Event:
    """An event with every field filled; its personal data is sealed (with a token that nothing opens)."""
    values = {name: _field(name, info) for name, info in cls.model_fields.items()}
    for name in cls.PERSONAL:
        values[name] = Personal.sealed("c2VhbGVk")
    return cls.model_validate(values)


def _field(name: str, info: FieldInfo) -> Any:
    return _value(name, info.annotation, list(info.metadata))


def _value(name: str, kind: Any, metadata: list[Any]) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _value(name, arguments[0], [*metadata, *arguments[1:]])
    if origin in (Union, types.UnionType):
        return _value(name, next(a for a in arguments if a is not type(None)), metadata)
    if origin is Literal:
        return arguments[0]
    if origin is tuple:
        return (_value(name, arguments[0], []),)
    if origin is dict:
        return {_value("key", arguments[0], []): _value("value", arguments[1], [])}
    if origin is Personal:
        return Personal.sealed("c2VhbGVk")
    return _scalar(name, kind, metadata)


def _scalar(name: str, kind: Any, metadata: list[Any]) -> Any:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.model_validate({field: _field(field, info) for field, info in kind.model_fields.items()})
    if kind is UUID:
        return derived("example", name)
    if kind in (datetime, AwareDatetime):
        return _AT
    if kind is bool:
        return True
    if kind in (int, float, Decimal):
        bounds = [m for m in _flat(metadata) if isinstance(m, Ge | Gt | Le)]
        low = next((float(b.ge) for b in bounds if isinstance(b, Ge)), 0.0)  # type: ignore[arg-type]
        high = next((float(b.le) for b in bounds if isinstance(b, Le)), low + 2)  # type: ignore[arg-type]
        return kind((low + high) / 2 if kind is not int else int(low) + 1)
    if kind is str:
        return _text(name, metadata)
    raise TypeError(f"no example for {name}: {kind!r}")


def _flat(metadata: list[Any]) -> list[Any]:
    """Constraints, also those inside a FieldInfo of an Annotated."""
    return [m for item in metadata for m in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _text(name: str, metadata: list[Any]) -> str:
    patterns = [m.pattern for m in _flat(metadata) if isinstance(m, StringConstraints) and isinstance(m.pattern, str)]
    candidates = [str(_BY_NAME.get(name, f"{name} 示例")), name.replace("_", "-"), "CNY"]
    for candidate in candidates:
        if all(re.search(pattern, candidate) for pattern in patterns):
            return candidate
    raise TypeError(f"no example for {name} with pattern {patterns}: add one by name")
