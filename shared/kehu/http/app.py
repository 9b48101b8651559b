"""The application of a service: its routers under one layer of limits, errors and metrics, with its OpenAPI document."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from kehu.auth import TokenVerifier
from kehu.http.middleware import Kit
from kehu.http.problems import MEDIA_TYPE, Problem, ProblemDetails, problem_of
from kehu.http.routes import Route, guard_of
from kehu.http.security import Public, RequiresCommand
from kehu.observability import Health
from kehu.settings import ServiceSettings

if TYPE_CHECKING:
    from kehu.gate import CommandGate

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    settings: ServiceSettings,
    *,
    title: str,
    routers: Sequence[APIRouter],
    gate: CommandGate | None = None,
    health: Health | None = None,
    lifespan: Lifespan | None = None,
    verifier: TokenVerifier | None = None,
    state: Mapping[str, Any] | None = None,
    description: str = "",
    version: str = "1",
) -> FastAPI:
    """The application of a service.

    Args:
        routers: `kehu.http.Router`s with their own prefix. Every route says who may call it (`requires`, `commands`, `public`).
        gate: started with the app, and drained when it stops, after the last request.
        health: of the process, for `/readyz`.
        lifespan: entered before the first request and left after the gate is empty, e.g. to close a pool.
        state: goes to `app.state`, where routes find it as `request.app.state`.

    Raises:
        TypeError: a route that is not ours, or that says nothing of who may call it.
    """

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan(app) if lifespan is not None else contextlib.nullcontext():
            if gate is not None:
                gate.start()
            try:
                yield
            finally:
                if gate is not None:
                    await gate.stop()

    app = FastAPI(
        title=title,
        version=version,
        description=description,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: _handled, RequestValidationError: _handled},
        generate_unique_id_function=lambda route: route.name,
    )
    for router in routers:
        for route in router.routes:
            if not isinstance(route, Route):
                raise TypeError(f"{getattr(route, 'path', router)}: use kehu.http.Router")
            if guard_of(route) is None:
                raise TypeError(f"{route.path} says nothing of who may call it: use requires(), commands() or public()")
        # Not include_router: it would look for each request's route in two stages, which costs some 25 µs.
        app.router.routes.extend(router.routes)
    app.state.settings, app.state.gate = settings, gate
    for name, value in (state or {}).items():
        setattr(app.state, name, value)
    app.add_middleware(
        Kit,
        service=settings.SERVICE,
        verifier=verifier or TokenVerifier.of(settings),
        health=health or Health(),
        body_limit=settings.max_body_bytes,
        most_in_flight=settings.max_in_flight,
    )
    routes = [route for router in routers for route in router.routes if isinstance(route, Route)]
    app.openapi = lambda: _openapi(app, routes)  # type: ignore[method-assign]
    return app


async def _handled(_: Request, error: Exception) -> Response:
    problem = problem_of(error) or Problem(500, "Something is wrong on our side.")
    return problem.response()


def _openapi(app: FastAPI, routes: Sequence[APIRoute]) -> dict[str, Any]:
    """The OpenAPI document: what FastAPI finds, with who may call each route and every problem it can answer with."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description or None,
        routes=app.routes,
        separate_input_output_schemas=False,
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    details = ProblemDetails.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(details.pop("$defs", {}))
    schemas["ProblemDetails"] = details
    components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}
    for route in routes:
        for method in route.methods or ():
            operation = document["paths"].get(route.path_format, {}).get(method.lower())
            if operation is not None:
                _describe(operation, route)
    app.openapi_schema = document
    return document


_WHEN = {
    400: "The request cannot be understood.",
    401: "No token, or one that proves nothing.",
    403: "The caller does not hold one of the roles.",
    404: "There is no such thing.",
    409: "A rule refuses it; the slug says which.",
    412: "If-Match names another version than the present one.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    422: "Fields are wrong; each is named. Or the Idempotency-Key was used for another request.",
    503: "Not now: come again after Retry-After seconds, with the same Idempotency-Key.",
}
_COMMAND_HEADERS = [
    {
        "name": "Idempotency-Key",
        "in": "header",
        "required": False,
        "description": "Sending a request again with the same key does nothing twice and gives the same answer.",
        "schema": {"type": "string", "maxLength": 128, "pattern": "^[\\x21-\\x7e]+$"},
        "example": "7c0a6c0e-5b1d-4b0e-9d53-0f6d1f0f2a11",
    },
    {
        "name": "If-Match",
        "in": "header",
        "required": False,
        "description": "ETag of the version that the caller has seen; 412 when there is a newer one.",
        "schema": {"type": "string", "pattern": '^"\\d+"$'},
        "example": '"3"',
    },
]


def _describe(operation: dict[str, Any], route: APIRoute) -> None:
    guard = guard_of(route)
    statuses = {400, 503}
    if "{" in route.path_format:
        statuses.add(404)
    if "requestBody" in operation:
        statuses |= {413, 415, 422}
    if operation.get("parameters"):
        statuses.add(422)
    if guard is not None and not isinstance(guard, Public):
        statuses |= {401, 403} if guard.roles else {401}
        operation["security"] = [{"bearer": []}]
        operation["x-roles"] = [role.value for role in guard.roles]
        roles = ", ".join(f"`{role.value}`" for role in guard.roles) or "any"
        operation["description"] = f"{operation.get('description', '')}\n\nRoles: {roles}.".strip()
    if isinstance(guard, RequiresCommand):
        statuses |= {409, 412, 422}
        operation.setdefault("parameters", []).extend(_COMMAND_HEADERS)
    responses = operation.setdefault("responses", {})
    responses.pop("422", None)
    for status in sorted(statuses):
        schema = {"$ref": "#/components/schemas/ProblemDetails"}
        responses.setdefault(str(status), {"description": _WHEN[status], "content": {MEDIA_TYPE: {"schema": schema}}})
