"""The HTTP kit of the services: routers, callers, bodies, pages, answers, problems, and the server."""

from kehu.auth import Principal, Role
from kehu.http.answers import answer, item, json_response
from kehu.http.app import create_app
from kehu.http.bodies import Body
from kehu.http.exchange import exchange_of
from kehu.http.paging import Page, paging
from kehu.http.problems import FieldError, Problem, ProblemDetails
from kehu.http.routes import Router, body_limit
from kehu.http.security import Call, commands, etag, public, requires
from kehu.http.server import serve

__all__ = [
    "Body",
    "Call",
    "FieldError",
    "Page",
    "Principal",
    "Problem",
    "ProblemDetails",
    "Role",
    "Router",
    "answer",
    "body_limit",
    "commands",
    "create_app",
    "etag",
    "exchange_of",
    "item",
    "json_response",
    "paging",
    "public",
    "requires",
    "serve",
]
