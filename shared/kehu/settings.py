"""Settings of a service: one typed model, read from `KEHU_*` variables, refused at start with every wrong one named."""

from __future__ import annotations

import base64
import binascii
import difflib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticUndefined
from pydantic_settings import BaseSettings, SettingsConfigDict

from kehu.clock import Clock, DevelopmentClock, SystemClock

PREFIX = "KEHU_"
# A process ends with this code when its settings are refused: starting it again cannot help.
EXIT_REFUSED = 2


class SettingsError(Exception):
    """The settings of a process are wrong. `wrong` has each variable with the reason and what to set."""

    def __init__(self, service: str, wrong: Mapping[str, str]) -> None:
        self.service, self.wrong = service, dict(wrong)
        width = max(map(len, self.wrong), default=0)
        lines = "\n".join(f"  {name:<{width}}  {reason}" for name, reason in self.wrong.items())
        count = "one setting is" if len(self.wrong) == 1 else f"{len(self.wrong)} settings are"
        super().__init__(f"{service} cannot start: {count} wrong.\n{lines}")


def _key(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        key = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise PydanticCustomError("key", "is not 32 bytes in base64 (`openssl rand -base64 32` makes one)")
    return key


def _url(*schemes: str) -> AfterValidator:
    def check(value: str) -> str:
        try:
            parts = urlsplit(value)
            good = parts.scheme in schemes and bool(parts.hostname)
            _ = parts.port
        except ValueError:
            good = False
        if not good:
            raise PydanticCustomError("url", f"is not a URL that begins with {' or '.join(s + '://' for s in schemes)}")
        return value.rstrip("/")

    return AfterValidator(check)


Key = Annotated[bytes, BeforeValidator(_key), Field(json_schema_extra={"shown": "32 bytes in base64"})]
HttpUrl = Annotated[str, _url("http", "https")]
PostgresUrl = Annotated[str, _url("postgresql", "postgres")]
Bootstrap = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9_.\[\]:-]+:\d{1,5}(,[A-Za-z0-9_.\[\]:-]+:\d{1,5})*$", strip_whitespace=True),
]
Port = Annotated[int, Field(ge=0, le=65535)]


class ServiceSettings(BaseSettings):
    """What every service reads. A service inherits, sets `SERVICE`, and adds its own fields with a description."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    SERVICE: ClassVar[str] = "kehu"

    environment: Literal["development", "production"] = Field(
        "production",
        description="`development` allows a clock that can be moved and tokens signed with a shared secret.",
    )
    postgres_url: PostgresUrl = Field(
        description="URL of the PostgreSQL server, with a user who may create the service's database.",
        examples=["postgresql://kehu:secret@127.0.0.1:5432/postgres"],
    )
    database: Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_]{0,62}$")] = Field(
        "", description="Name of the service's own database. Default: `kehu_` and the service's name."
    )
    kafka_bootstrap: Bootstrap = Field(
        description="Addresses of Kafka brokers, `host:port`, divided by commas.", examples=["127.0.0.1:9092"]
    )
    kafka_replication: int = Field(1, ge=1, le=7, description="Copies of each partition of the topics that are made.")
    http_host: str = Field(
        "127.0.0.1", min_length=1, description="Address that the HTTP ports listen on; `0.0.0.0` in a container."
    )
    http_port: Port = Field(8000, description="Port of the API; 0 takes a free one.")
    admin_port: Port = Field(
        0, description="Port of `/healthz`, `/readyz` and `/metrics` of a process without API; 0 is none."
    )
    jwt_secret: SecretStr | None = Field(
        None,
        description="Shared secret of HS256 tokens, 32 characters and more: of everybody in development, of services among"
        " themselves in production.",
        examples=["openssl rand -base64 32"],
    )
    jwt_jwks_url: HttpUrl | None = Field(
        None,
        description="Where the identity provider publishes its keys.",
        examples=["https://id.example.com/jwks.json"],
    )
    jwt_issuer: str | None = Field(
        None, description="`iss` that a token must carry.", examples=["https://id.example.com"]
    )
    jwt_audience: str | None = Field(None, description="`aud` that a token must carry.", examples=["kehu"])
    jwt_roles_claim: str = Field(
        "roles", description="Claim with the list of roles; a path with dots, e.g. `realm_access.roles`."
    )
    system_token: SecretStr | None = Field(
        None,
        description="Token for calls to other services. Default: made from the shared secret.",
        examples=["eyJhbGciOi..."],
    )
    lead_intake_url: HttpUrl | None = Field(
        None,
        description="Base URL of lead-intake, which keeps the keys of customers.",
        examples=["http://lead-intake:8000"],
    )
    master_key: Key | None = Field(
        None, description="Wraps the keys of customers, 32 bytes in base64; lead-intake only."
    )
    hash_key: Key | None = Field(
        None, description="Key of the hashes by which phone and email are found, 32 bytes in base64."
    )
    clock_file: Path | None = Field(None, description="File of the clock that can be moved; only in development.")
    lake_path: Path | None = Field(None, description="Directory of the event lake; analytics only.")
    otlp_endpoint: HttpUrl | None = Field(
        None,
        description="OpenTelemetry collector (OTLP over HTTP) that gets the traces.",
        examples=["http://127.0.0.1:4318"],
    )
    trace_ratio: float = Field(1.0, ge=0, le=1, description="Part of the traces that is kept when we begin them.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least level that is logged."
    )
    log_format: Literal["json", "console"] = Field(
        "json", description="One JSON object a line, or text for a terminal."
    )
    pool_size: int = Field(8, ge=1, le=100, description="The most connections to PostgreSQL of one process.")
    max_body_bytes: int = Field(1 << 20, ge=1024, le=1 << 30, description="The largest body of a request.")
    max_in_flight: int = Field(
        1024, ge=1, le=100_000, description="Requests under way at once; beyond it the answer is 503."
    )
    stop_seconds: float = Field(
        22.0, ge=1, le=300, description="How long a process may take to stop in order after SIGTERM."
    )
    drain_seconds: float = Field(
        0.0,
        ge=0,
        le=60,
        description="How long the API goes on after SIGTERM, no longer ready, so that balancers notice.",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Report what is wrong with single variables together with what does not go together."""
        errors: list[InitErrorDetails] = []
        made: Self | None = None
        if isinstance(values, dict) and not values.get("database"):
            values = {**values, "database": "kehu_" + cls.SERVICE.replace("-", "_")}
        try:
            made = handler(values)
        except ValidationError as error:
            for line in error.errors(include_url=False, include_input=False):
                kind = PydanticCustomError(
                    line["type"] if line["type"].isidentifier() else "wrong", "{reason}", {"reason": line["msg"]}
                )
                errors.append({"type": kind, "loc": line["loc"], "input": None})
        raw = values if isinstance(values, dict) else {}
        for name, reason in cls.contradictions(raw):
            errors.append(
                {"type": PydanticCustomError("rule", "{reason}", {"reason": reason}), "loc": (name,), "input": None}
            )
        if errors or made is None:
            raise ValidationError.from_exception_data(cls.__name__, errors, hide_input=True)
        return made

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """What must not be, or not be missing, together with the rest: (field, reason). `given` is raw, before validation."""
        secret = given.get("jwt_secret")
        if secret is not None and len(secret.get_secret_value() if isinstance(secret, SecretStr) else str(secret)) < 32:
            yield "jwt_secret", "has less than 32 characters"
        if given.get("environment", "production") == "development":
            if secret is None and given.get("jwt_jwks_url") is None:
                yield (
                    "jwt_secret",
                    "is missing, and no identity provider (KEHU_JWT_JWKS_URL) is set: nobody could log in",
                )
            return
        for name in ("jwt_jwks_url", "jwt_issuer", "jwt_audience"):
            if given.get(name) is None:
                yield name, "is missing: in production tokens are checked against an identity provider"
        if given.get("clock_file") is not None:
            yield (
                "clock_file",
                "is refused in production: its clock can be moved. Unset it, or set KEHU_ENVIRONMENT=development",
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(<{self.environment}>)"  # never the values: a repr ends up in logs

    __str__ = __repr__

    @property
    def database_url(self) -> str:
        """URL of the service's own database."""
        return urlunsplit(urlsplit(self.postgres_url)._replace(path="/" + quote(self.database)))

    @property
    def production(self) -> bool:
        """Whether nothing meant for development is allowed."""
        return self.environment == "production"

    def clock(self) -> Clock:
        """The clock of business time."""
        return DevelopmentClock(self.clock_file) if self.clock_file is not None else SystemClock()


S = TypeVar("S", bound=ServiceSettings)


def read(cls: type[S]) -> S:
    """Read settings from the environment, and from files named like the variables in the directory `KEHU_SECRETS_DIR`.

    Raises:
        SettingsError: with every wrong variable.
    """
    try:
        return cls(_secrets_dir=os.environ.get(PREFIX + "SECRETS_DIR"))
    except ValidationError as error:
        raise SettingsError(cls.SERVICE, _reasons(cls, error)) from None


def load(cls: type[S]) -> S:
    """As `read`, but print what is wrong and end the process with code 2."""
    try:
        return read(cls)
    except SettingsError as error:
        refuse(error)


def refuse(error: SettingsError) -> NoReturn:
    """Say what is wrong and end the process."""
    sys.stderr.write(f"{error}\n")
    raise SystemExit(EXIT_REFUSED)


def variable(field: str) -> str:
    """The environment variable of a field, e.g. `KEHU_POSTGRES_URL`."""
    return PREFIX + field.upper()


def _reasons(cls: type[ServiceSettings], error: ValidationError) -> dict[str, str]:
    wrong: dict[str, str] = {}
    for line in error.errors(include_url=False, include_input=False, include_context=False):
        field = str(line["loc"][0]) if line["loc"] else ""
        info = cls.model_fields.get(field)
        if info is None:
            wrong.setdefault(field or cls.__name__, line["msg"])
            continue
        reason = "is missing" if line["type"] == "missing" else line["msg"]
        like = _misspelt(variable(field), cls) if line["type"] == "missing" or "is missing" in reason else None
        hint = f"{reason}. {info.description or ''}".rstrip()
        if info.examples:
            hint += f" E.g. {variable(field)}={info.examples[0]}"
        if like is not None:
            hint += f" ({like} is set: is that a typing error?)"
        wrong.setdefault(variable(field), hint)
    return wrong


def _misspelt(name: str, cls: type[ServiceSettings]) -> str | None:
    """A variable that is set, that nothing reads, and that looks like this one."""
    known = {variable(field) for field in cls.model_fields}
    strangers = [given for given in os.environ if given.upper().startswith(PREFIX[:-1]) and given.upper() not in known]
    found = difflib.get_close_matches(name, strangers, n=1, cutoff=0.85)
    return found[0] if found else None


def reference(classes: Iterable[type[ServiceSettings]]) -> str:
    """The reference of all settings as Markdown: what every service reads, then what each adds or changes."""
    lines = [
        "# Settings",
        "",
        "Every process reads its settings from environment variables, or from files of the same name (lower case) in the directory",
        "that `KEHU_SECRETS_DIR` names. It refuses to start (exit code 2) when one is wrong and says which, why and what to set.",
        "",
        "## Every service",
        "",
        *_table(ServiceSettings, ServiceSettings.model_fields),
    ]
    for cls in classes:
        own = {name: info for name, info in cls.model_fields.items() if _differs(name, info)}
        lines += ["", f"## {cls.SERVICE}", ""]
        lines += _table(cls, own) if own else ["Nothing of its own."]
    return "\n".join(lines) + "\n"


def _differs(name: str, info: FieldInfo) -> bool:
    base = ServiceSettings.model_fields.get(name)
    return base is None or (base.annotation, base.default, base.description) != (
        info.annotation,
        info.default,
        info.description,
    )


def _table(cls: type[ServiceSettings], fields: Mapping[str, FieldInfo]) -> list[str]:
    lines = ["| variable | type | default | what |", "|---|---|---|---|"]
    for name, info in fields.items():
        default = (
            "**required**"
            if info.default is PydanticUndefined and info.default_factory is None
            else f"`{info.default}`"
        )
        if info.default is None or info.default == "":
            default = ""
        what = (info.description or "").replace("|", "\\|")
        if info.examples:
            what += f" E.g. `{info.examples[0]}`."
        lines.append(f"| `{variable(name)}` | {_type(cls, name)} | {default} | {what} |")
    return lines


def _type(cls: type[ServiceSettings], name: str) -> str:
    """What may be set, from the JSON Schema of the field."""
    schema: dict[str, Any] = cls.model_json_schema(mode="validation")["properties"][name]
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    shown = schema.get("shown") or options[0].get("shown")
    if shown:
        return str(shown)
    option = options[0]
    if "enum" in option:
        return ", ".join(f"`{value}`" for value in option["enum"])
    text = {"path": "path", "password": "secret"}.get(option.get("format", ""), str(option.get("type", "text")))
    low, high = option.get("minimum"), option.get("maximum")
    if low is not None and high is not None:
        text += f", {_number(low)} to {_number(high)}"
    return {"string": "text"}.get(text, text)


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ") if value == int(value) else str(value)
