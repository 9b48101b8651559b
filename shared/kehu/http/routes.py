"""The router of our services: routes whose caller is checked before the body is read, and whose body is read strictly."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request, Response, params
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import request_params_to_args
from fastapi.routing import APIRoute, serialize_response
from pydantic import BaseModel, TypeAdapter

from kehu.http.answers import json_response
from kehu.http.bodies import check_model, parse
from kehu.http.exchange import exchange_of
from kehu.http.problems import FieldError, Problem, from_errors, invalid
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
        fallback = super().get_route_handler()
        guard = guard_of(self)
        names = _query_names(self.dependant)
        adapter, optional = _body(self)
        limit = getattr(self.endpoint, _LIMIT, False)
        direct = inspect.iscoroutinefunction(self.endpoint) and all(map(_is_simple, _all(self.dependant)))

        async def handle(request: Request) -> Response:
            exchange = exchange_of(request)
            if limit is not False:
                exchange.body_limit = limit
            if guard is not None:
                await guard.principal(exchange)
            if query := request.scope["query_string"]:
                _check_query(query, names)
            body = None
            if adapter is not None:
                request = _Parsed(request.scope, request.receive)
                exchange.body = raw = await request.body()
                if raw:
                    if not _is_json(exchange.headers.get(b"content-type")):
                        raise Problem(415, "The body must be JSON: send Content-Type: application/json.")
                    request.parsed = body = parse(raw, adapter)
                elif not optional:
                    raise invalid([FieldError(at="body", field="", reason="is required: a JSON body")])
            if not direct:
                return await fallback(request)
            errors: list[Any] = []
            arguments = await _arguments(self.dependant, request, body, errors)
            if errors:
                raise invalid(from_errors(errors))
            result = await self.endpoint(**arguments)
            return result if isinstance(result, Response) else await self._shown(result)

        return handle

    async def _shown(self, result: Any) -> Response:
        status = self.status_code or 200
        if self.response_field is None or result is None:
            return Response(status_code=status) if result is None and status == 204 else json_response(result, status)
        content = await serialize_response(
            field=self.response_field,
            response_content=result,
            by_alias=self.response_model_by_alias,
            exclude_unset=self.response_model_exclude_unset,
            exclude_defaults=self.response_model_exclude_defaults,
            exclude_none=self.response_model_exclude_none,
            dump_json=True,
        )
        return Response(content, status, media_type="application/json")


def _is_simple(dependant: Dependant) -> bool:
    """Whether `_arguments` can make what this needs. The rest is left to FastAPI, whose general way costs some 80 µs more a request."""
    call: Any = dependant.call
    plain = inspect.iscoroutinefunction(call) or isinstance(call, Requires)
    return plain and not (
        dependant.cookie_params
        or dependant.background_tasks_param_name
        or dependant.response_param_name
        or dependant.security_scopes_param_name
        or dependant.http_connection_param_name
        or dependant.websocket_param_name
    )


async def _arguments(dependant: Dependant, request: Request, body: Any, errors: list[Any]) -> dict[str, Any]:
    """What an endpoint or dependency is called with. Wrong fields go to `errors`."""
    values: dict[str, Any] = {}
    for inner in dependant.dependencies:
        arguments = await _arguments(inner, request, body, errors)
        call: Any = inner.call
        if not errors:
            given = await call(**arguments)
            if inner.name is not None:
                values[inner.name] = given
    for fields, source in (
        (dependant.path_params, "path_params"),
        (dependant.query_params, "query_params"),
        (dependant.header_params, "headers"),
    ):
        if fields:
            found, wrong = request_params_to_args(fields, getattr(request, source))
            values.update(found)
            errors += wrong
    for field in dependant.body_params:
        values[field.name] = body if body is not None else field.get_default()
    if dependant.request_param_name is not None:
        values[dependant.request_param_name] = request
    return values


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
