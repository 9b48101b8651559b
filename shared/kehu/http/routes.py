"""The router of our services: routes whose caller is checked before the body is read, and whose body is read strictly."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request, Response, params
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter

from kehu.http.bodies import check_model, parse
from kehu.http.exchange import exchange_of
from kehu.http.problems import FieldError, Problem, invalid
from kehu.http.security import Requires

F = TypeVar("F", bound=Callable[..., Any])
_LIMIT = "__kehu_body_limit__"
_MOST_QUERY_FIELDS = 100


def body_limit(limit: int | None) -> Callable[[F], F]:
    """Mark an endpoint whose body may have this many bytes; None for a stream of any length, which it must read piece by piece."""

    def mark(endpoint: F) -> F:
        setattr(endpoint, _LIMIT, limit)
        return endpoint

    return mark


class _Parsed(Request):
    """A request whose JSON was read already: FastAPI gets the checked model."""

    parsed: Any = None

    async def json(self) -> Any:
        return self.parsed


class Route(APIRoute):
    """A route. The order is: who calls, may they, is the address right, is the body right; then the endpoint."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        guard = guard_of(self)
        names = _query_names(self.dependant)
        adapter, optional = _body(self)
        limit = getattr(self.endpoint, _LIMIT, False)

        async def handle(request: Request) -> Response:
            exchange = exchange_of(request)
            if limit is not False:
                exchange.body_limit = limit
            if guard is not None:
                await guard.principal(exchange)
            if query := request.scope["query_string"]:
                _check_query(query, names)
            if adapter is None:
                return await handler(request)
            request = _Parsed(request.scope, request.receive)
            exchange.body = raw = await request.body()
            if not raw:
                if not optional:
                    raise invalid([FieldError(at="body", field="", reason="is required: a JSON body")])
                return await handler(request)
            if not _is_json(exchange.headers.get(b"content-type")):
                raise Problem(415, "The body must be JSON: send Content-Type: application/json.")
            request.parsed = parse(raw, adapter)
            return await handler(request)

        return handle


class Router(APIRouter):
    """As FastAPI's router, with our routes. Give it its prefix here, not when it is included."""

    def __init__(self, **options: Any) -> None:
        super().__init__(route_class=Route, **options)


def guard_of(route: APIRoute) -> Requires | None:
    """What asks who calls; None when nothing does."""
    found = [dependant.call for dependant in _all(route.dependant) if isinstance(dependant.call, Requires)]
    return found[0] if found else None


def _all(dependant: Dependant) -> Iterator[Dependant]:
    yield dependant
    for inner in dependant.dependencies:
        yield from _all(inner)


def _query_names(dependant: Dependant) -> set[str]:
    names: set[str] = set()
    for field in (field for part in _all(dependant) for field in part.query_params):
        model = field.field_info.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):  # one model for many parameters
            names |= {info.alias or name for name, info in model.model_fields.items()}
        else:
            names.add(field.alias)
    return names


def _body(route: APIRoute) -> tuple[TypeAdapter[Any] | None, bool]:
    """Reads the body of a route, and whether it may be missing; (None, False) for a route that takes none, or a stream."""
    fields = [field for dependant in _all(route.dependant) for field in dependant.body_params]
    if not fields or route.body_field is None:
        return None, False
    info = fields[0].field_info
    if len(fields) > 1 or not isinstance(info, params.Body) or isinstance(info, params.Form):
        raise TypeError(f"{route.path}: a route takes one JSON body, as one model")
    model: Any = info.annotation
    check_model(model, f"{'/'.join(sorted(route.methods or ()))} {route.path}")
    return TypeAdapter(model), not info.is_required()


def _is_json(content_type: bytes | None) -> bool:
    if content_type is None:
        return False
    kind, _, parameters = content_type.partition(b";")
    kind = kind.strip().lower()
    charset = parameters.strip().lower().replace(b'"', b"")
    return (
        kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json"))
    ) and charset in (
        b"",
        b"charset=utf-8",
        b"charset=utf8",
    )


def _check_query(query: bytes, names: set[str]) -> None:
    try:
        given = parse_qsl(
            query.decode("latin-1"), keep_blank_values=True, max_num_fields=_MOST_QUERY_FIELDS, errors="strict"
        )
    except ValueError:
        raise Problem(400, "The query cannot be read.") from None
    unknown = [name for name, _ in given if name not in names]
    if unknown:
        raise invalid(
            [FieldError(at="query", field=name[:64], reason="is not a parameter of this route") for name in unknown]
        )
