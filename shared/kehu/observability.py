"""What a process tells of itself: logs, metrics, traces and its health. Never personal data.

Logs are one JSON object a line. A record's extra fields pass only when they are on the list `FIELDS`; messages of
exceptions only when their class is known to carry none of the data that was worked on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

if TYPE_CHECKING:
    from prometheus_client.metrics import MetricWrapperBase

    from kehu.settings import ServiceSettings

# --- Logs -------------------------------------------------------------------------------------------------------------

# The extra fields that a log record may carry. Ids, names of ours, numbers: add here what is of that kind, nothing else.
FIELDS = frozenset(
    """
    action actor attempts batch before bytes cause code command constraint consumer correlation_id count cursor customer_id database
    deadline_seconds delay_seconds depth duration_ms epoch error event_id event_type events exit_code fields frames generation generations
    handler held
    holder kind lag lag_seconds lead_id lease listening method migration model model_version offset oldest_seconds partition
    partitions pause pid port position process projection projector
    reason removed relay_epoch request_id role roles route rows seconds service signal
    slug sqlstate status stream streams subscription table task timer topic topics total trace_id type types version versions
    waiting written
    """.split()  # noqa: SIM905 (eighty words read better so)
)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}
_EMAIL = re.compile(r"[^\s@/:\"'<>(),;]{1,64}@[^\s@\"'<>(),;]{1,255}")
_MOBILE = re.compile(r"(?<![\dA-Za-z-])(?:\+?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}(?![\dA-Za-z-])")
_PASSWORD = re.compile(r"(?<=://)[^/\s@]+@")
_LONGEST = 4_000

# Exceptions whose message is about our code or a connection, never about the data that was worked on.
_PLAIN_SPOKEN = (
    OSError,
    TypeError,
    AttributeError,
    NameError,
    ImportError,
    NotImplementedError,
    RecursionError,
    MemoryError,
)
_PLAIN_MODULES = ("aiokafka.", "kafka.", "psycopg_pool", "kehu.devstack", "kehu.settings")


def redacted(text: str) -> str:
    """The text without e-mail addresses, mobile numbers and passwords in URLs: the second fence behind `FIELDS`."""
    if "@" in text:
        text = _EMAIL.sub("<email>", _PASSWORD.sub("<secret>@", text))
    return _MOBILE.sub("<phone>", text)[:_LONGEST]


def exception_summary(error: BaseException) -> dict[str, Any]:
    """What may be logged of an exception: its class, what the database says of it without values, and our frames."""
    summary: dict[str, Any] = {
        "error": f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    }
    sqlstate = getattr(error, "sqlstate", None)
    module = type(error).__module__
    if sqlstate is not None:
        summary["sqlstate"] = sqlstate
        for name in ("constraint_name", "table_name"):
            if value := getattr(getattr(error, "diag", None), name, None):
                summary[name.removesuffix("_name")] = value
    if slug := getattr(error, "slug", None):
        summary["slug"] = str(slug)
    elif hasattr(error, "errors") and module.startswith("pydantic"):
        lines = error.errors(include_url=False, include_input=False, include_context=False)[:20]
        summary["fields"] = [
            {"at": ".".join(str(part) for part in line["loc"])[:200], "type": line["type"]} for line in lines
        ]
    elif _says_no_data(error, sqlstate):
        summary["reason"] = redacted(str(error))[:500]
    frames = traceback.extract_tb(error.__traceback__)[-12:]
    summary["frames"] = [f"{_module(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        summary["cause"] = f"{type(cause).__module__}.{type(cause).__qualname__}".removeprefix("builtins.")
    return summary


def _says_no_data(error: BaseException, sqlstate: str | None) -> bool:
    module = type(error).__module__
    if sqlstate is not None:
        return sqlstate[:2] in {
            "08",
            "53",
            "57",
            "58",
            "40",
            "55",
            "42",
            "28",
            "3D",
        }  # connection, resources, syntax: no values
    if module == "psycopg" or module.startswith("psycopg."):
        return type(error).__name__ in {"OperationalError", "InterfaceError", "ConnectionTimeout"}
    if type(error) is RuntimeError:
        return True
    return isinstance(error, _PLAIN_SPOKEN) or module.startswith(_PLAIN_MODULES)


def _module(filename: str) -> str:
    for marker in ("/site-packages/", "/services/", "/shared/", "/lib/python3"):
        _, found, rest = filename.rpartition(marker)
        if found:
            return rest
    return os.path.basename(filename)  # noqa: PTH119 (a name in a traceback, not a path to open)


class _Base(logging.Formatter):
    def __init__(self, service: str, role: str) -> None:
        super().__init__()
        self.service, self.role = service, role

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """The extra fields that may be shown, and what is known of the request or event under way."""
        found: dict[str, Any] = {}
        trace = _current.get()
        if trace is not None:
            found["trace_id"] = trace[3:35]
        for name, value in record.__dict__.items():
            if name in FIELDS and name not in _STANDARD:
                found[name] = value if isinstance(value, (int, float, bool, type(None))) else redacted(str(value))[:500]
        if record.exc_info and record.exc_info[1] is not None:
            found.update(exception_summary(record.exc_info[1]))
        return found


class JsonFormatter(_Base):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "service": self.service,
            "role": self.role,
            "logger": record.name,
            "message": redacted(record.getMessage()),
        }
        for name, value in self.fields(record).items():
            line.setdefault(name, value)
        return json.dumps(line, ensure_ascii=False, default=str)


class ConsoleFormatter(_Base):
    """Text for a terminal."""

    _COLOURS = {"WARNING": "\033[33m", "ERROR": "\033[31m", "CRITICAL": "\033[41m"}

    def format(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        frames = fields.pop("frames", [])
        at = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]
        text = f"{at} {self.service}/{self.role} {redacted(record.getMessage())}"
        text += "".join(f" {name}={value}" for name, value in fields.items()) + "".join(
            f"\n    {frame}" for frame in frames
        )
        colour = self._COLOURS.get(record.levelname)
        return f"{colour}{text}\033[0m" if colour and sys.stderr.isatty() else text


def configure_logging(service: str, role: str, level: str = "info", form: str = "json") -> None:
    """Send all logs of this process to stderr in our form.

    Args:
        level: debug, info, warning or error.
        form: json or console.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((ConsoleFormatter if form == "console" else JsonFormatter)(service, role))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    logging.getLogger("uvicorn.access").disabled = True  # requests are counted, not told one by one
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of every broken request of a stranger
    for chatty in ("httpx", "httpcore", "aiokafka", "asyncio", "faust", "mode"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


# --- Metrics ----------------------------------------------------------------------------------------------------------

disable_created_metrics()  # type: ignore[no-untyped-call]  # when a series began is of no use to us, and doubles their number
M = TypeVar("M", bound="MetricWrapperBase")


def _metric(kind: type[M], name: str, text: str, labels: tuple[str, ...], **more: Any) -> M:
    # The registry knows a counter by its name without `_total`, and by its name with it.
    known = REGISTRY._names_to_collectors.get(name)
    if known is None:
        return kind(name, text, labels, **more)
    if type(known) is not kind:
        raise TypeError(f"metric {name} is declared twice, as different kinds")
    return known


def counter(name: str, text: str, *labels: str) -> Counter:
    """The counter of this name (`kehu_..._total`), made when it is first asked for. Labels must have few values, none of them an id."""
    return _metric(Counter, name, text, labels)


def gauge(name: str, text: str, *labels: str) -> Gauge:
    """The gauge of this name, made when it is first asked for."""
    return _metric(Gauge, name, text, labels)


def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = Histogram.DEFAULT_BUCKETS) -> Histogram:
    """The histogram of this name, made when it is first asked for. `buckets` are upper edges, in the unit of the name."""
    return _metric(Histogram, name, text, labels, buckets=buckets)


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

HTTP_REQUESTS = counter("kehu_http_requests_total", "Requests answered.", "method", "route", "status")
HTTP_SECONDS = histogram(
    "kehu_http_request_seconds", "From the request to the whole answer.", "method", "route", buckets=SECONDS
)
HTTP_IN_FLIGHT = gauge("kehu_http_in_flight", "Requests under way.")


def metrics_page() -> bytes:
    """All metrics of this process in Prometheus' text format."""
    return generate_latest(REGISTRY)


METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# --- Traces -----------------------------------------------------------------------------------------------------------

_TRACEPARENT = re.compile(r"^00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}$")
_current: ContextVar[str | None] = ContextVar("traceparent", default=None)
_random = random.Random(os.urandom(32))  # noqa: S311 (ids of traces, no secrets)
_tracer: Any = None  # an OpenTelemetry tracer, when a collector is set
_provider: Any = None


def new_traceparent() -> str:
    """A new W3C trace context, as sampled: 128 and 64 random bits. See https://www.w3.org/TR/trace-context/."""
    return f"00-{_random.getrandbits(128) or 1:032x}-{_random.getrandbits(64) or 1:016x}-01"


def valid_traceparent(value: str | None) -> str | None:
    """The value if it is a trace context of version 00, else None."""
    return value if value is not None and len(value) == 55 and _TRACEPARENT.match(value) else None


def current_traceparent() -> str | None:
    """The trace context of what is under way in this task or thread."""
    return _current.get()


@contextlib.contextmanager
def continuing(traceparent: str | None) -> Iterator[None]:
    """Make this the current trace context, without a span of its own."""
    token = _current.set(traceparent)
    try:
        yield
    finally:
        _current.reset(token)


def tracing() -> bool:
    """Whether spans are recorded, so that the trace context comes from them."""
    return _tracer is not None


class _NoSpan:
    """Stands for a span when nobody listens: costs next to nothing."""

    __slots__ = ()

    def __enter__(self) -> _NoSpan:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def set(self, **attributes: Any) -> None:
        """Add attributes."""


class _Span:
    """A span of OpenTelemetry that is also the current trace context."""

    __slots__ = ("_attributes", "_name", "_parent", "_span", "_token")

    def __init__(self, name: str, parent: str | None, attributes: dict[str, Any]) -> None:
        self._name, self._parent, self._attributes = name, parent, attributes

    def __enter__(self) -> _Span:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = self._parent or _current.get()
        context = TraceContextTextMapPropagator().extract({"traceparent": parent}) if parent else None
        self._span = _tracer.start_span(self._name, context=context, attributes=self._attributes)
        made = self._span.get_span_context()
        self._token = _current.set(f"00-{made.trace_id:032x}-{made.span_id:016x}-{made.trace_flags:02x}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        from opentelemetry.trace import StatusCode

        if error is not None:
            self._span.set_status(StatusCode.ERROR, type(error).__name__)  # not its message: it may hold data
        self._span.end()
        _current.reset(self._token)

    def set(self, **attributes: Any) -> None:
        """Add attributes: ids, names of ours, numbers; never personal data."""
        self._span.set_attributes(attributes)


def span(name: str, parent: str | None = None, **attributes: Any) -> _Span | _NoSpan:
    """A context manager around a piece of work that shows up in traces; nothing when no collector is set.

    Args:
        parent: trace context it belongs to, e.g. that of an event; the current one when None.
        attributes: ids, names of ours, numbers; never personal data.
    """
    return _NO_SPAN if _tracer is None else _Span(name, parent, attributes)


_NO_SPAN = _NoSpan()
_MOST_SPANS = 200


@contextlib.contextmanager
def spans(name: str, parents: Iterable[str | None], **attributes: Any) -> Iterator[None]:
    """One span around the work on a batch in each of the traces that the batch carries on, at most 200; none without a collector.

    Args:
        parents: trace contexts, e.g. of the events of a batch; those that are None belong to no trace.
        attributes: as of `span`.
    """
    if _tracer is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        for parent in islice((parent for parent in dict.fromkeys(parents) if parent is not None), _MOST_SPANS):
            stack.enter_context(_Span(name, parent, attributes))
        yield


def configure_tracing(settings: ServiceSettings, role: str) -> None:
    """Send spans to the collector of the settings, if one is set. They go in batches, from a bounded queue."""
    global _tracer, _provider
    if settings.otlp_endpoint is None:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    resource = Resource.create({"service.name": settings.SERVICE, "service.instance.id": f"{role}-{os.getpid()}"})
    provider = TracerProvider(resource=resource, sampler=ParentBasedTraceIdRatio(settings.trace_ratio))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{settings.otlp_endpoint}/v1/traces", timeout=5)))
    _provider, _tracer = provider, provider.get_tracer("kehu")


def flush_traces() -> None:
    """Send the spans that wait, and stop. It may take some seconds when the collector does not answer."""
    global _tracer, _provider
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        provider.shutdown()


# --- Health -----------------------------------------------------------------------------------------------------------

Check = Callable[[], Awaitable[None]]


class Health:
    """Whether a process is alive and ready. Ready is: all roles have started, none is stopping, every check passes.

    A check is an async function that raises when its thing is not there. Answers are kept for a short time, so that
    probes cannot load the database.
    """

    TIMEOUT_SECONDS = 2.0
    FRESH_SECONDS = 0.5

    def __init__(self) -> None:
        self.starting: set[str] = set()
        self.stopping = False
        self._checks: dict[str, Check] = {}
        self._answer: dict[str, str] = {}
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[dict[str, str]] | None = None

    def add(self, name: str, check: Check) -> None:
        """Ask `check` for readiness. Its name is shown to whoever asks, its error only as a class."""
        self._checks[name] = check

    def remove(self, name: str) -> None:
        """Ask no longer."""
        self._checks.pop(name, None)

    async def failing(self) -> dict[str, str]:
        """What keeps the process from being ready, with the reason; empty when it is ready."""
        if self.stopping:
            return {"process": "stopping"}
        if self.starting:
            return dict.fromkeys(sorted(self.starting), "starting")
        if time.monotonic() - self._asked_at > self.FRESH_SECONDS:
            if self._asking is None:  # probes that come together share one answer
                self._asking = asyncio.create_task(self._ask())
            self._answer = await asyncio.shield(self._asking)
        return dict(self._answer)

    async def _ask(self) -> dict[str, str]:
        try:
            names = list(self._checks)
            answers = await asyncio.gather(*(self._one(name) for name in names))
            self._asked_at = time.monotonic()
            return {name: reason for name, reason in zip(names, answers, strict=True) if reason is not None}
        finally:
            self._asking = None

    async def _one(self, name: str) -> str | None:
        try:
            async with asyncio.timeout(self.TIMEOUT_SECONDS):
                await self._checks[name]()
        except TimeoutError:
            return "no answer in time"
        except Exception as error:  # a probe reports whatever is wrong
            return type(error).__name__
        return None


PROBES = frozenset(("/healthz", "/readyz", "/metrics"))


async def probe(path: str, health: Health) -> tuple[int, str, bytes]:
    """The answer to one of `PROBES`: status, media type, body."""
    if path == "/metrics":
        return 200, METRICS_TYPE, metrics_page()
    failing = await health.failing() if path == "/readyz" else {}
    body: dict[str, Any] = {"status": "unready", "failing": failing} if failing else {"status": "ok"}
    return 503 if failing else 200, "application/json", json.dumps(body).encode()
