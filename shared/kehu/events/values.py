"""Value types that events share: money, and personal data that is only ever stored encrypted."""

from __future__ import annotations

from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    StringConstraints,
)
from pydantic_core import CoreSchema, core_schema

T = TypeVar("T")

# Text that people type, bounded so that one event never grows past what a topic takes.
Text = Annotated[str, StringConstraints(max_length=500)]
LongText = Annotated[str, StringConstraints(max_length=10_000)]
# A code of ours or of a customer: channels, kinds, rule names.
Code = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.:-]{0,99}$")]
Currency = Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]
Instant = AwareDatetime


def _decimal(value: Any) -> Any:
    return Decimal(value) if isinstance(value, str) else value


class Value(BaseModel):
    """Base of the value objects inside events: frozen, strict in code, unknown fields ignored when read."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Money(Value):
    """An exact amount in one currency. JSON carries the amount as a string, never as a float."""

    amount: Annotated[Decimal, BeforeValidator(_decimal), Field(max_digits=20, decimal_places=4)]
    currency: Currency


class PersonalState(Enum):
    """What this process can see of a piece of personal data."""

    PLAIN = "plain"
    SEALED = "sealed"
    ERASED = "erased"


class PlaintextLeak(TypeError):
    """Personal data was about to be serialised in the clear."""


class Personal(Generic[T]):
    """A piece of personal data: plain in memory, sealed (AES-256-GCM token) wherever it is written.

    Serialising a plain one raises PlaintextLeak, so that forgetting to seal is an error and never a leak.
    """

    __slots__ = ("_content", "state")

    def __init__(self, content: T) -> None:
        self._content: Any = content
        self.state = PersonalState.PLAIN

    @classmethod
    def sealed(cls, token: str) -> Personal[T]:
        """Personal data as it lies in the store: readable only with the customer's key."""
        made: Personal[T] = cls.__new__(cls)
        made._content, made.state = token, PersonalState.SEALED
        return made

    @classmethod
    def erased(cls) -> Personal[T]:
        """Personal data whose key was destroyed."""
        made: Personal[T] = cls.__new__(cls)
        made._content, made.state = None, PersonalState.ERASED
        return made

    @property
    def plain(self) -> T:
        """The content. Raises ValueError when it is sealed or erased."""
        if self.state is not PersonalState.PLAIN:
            raise ValueError(f"personal data is {self.state.value}")
        content: T = self._content
        return content

    @property
    def token(self) -> str:
        """The ciphertext. Raises ValueError when it is not sealed."""
        if self.state is not PersonalState.SEALED:
            raise ValueError(f"personal data is {self.state.value}")
        return str(self._content)

    def plain_or(self, default: T) -> T:
        """The content, or `default` when it is sealed or erased."""
        return self.plain if self.state is PersonalState.PLAIN else default

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Personal) and (self.state, self._content) == (other.state, other._content)

    def __hash__(self) -> int:
        return hash((self.state, repr(self._content)))

    def __repr__(self) -> str:
        return f"Personal(<{self.state.value}>)"  # never the content: a repr ends up in logs

    @staticmethod
    def inner_type(annotation: Any) -> Any | None:
        """T of Personal[T], else None."""
        if get_origin(annotation) is Personal:
            return get_args(annotation)[0]
        return None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        inner = handler.generate_schema(get_args(source)[0] if get_args(source) else Any)

        def check(value: Any, validate: core_schema.ValidatorFunctionWrapHandler) -> Personal[Any]:
            if isinstance(value, Personal):
                if value.state is PersonalState.PLAIN:
                    return Personal(validate(value.plain))
                return value
            if isinstance(value, dict) and isinstance(value.get("sealed"), str):
                return Personal.sealed(value["sealed"])
            if isinstance(value, dict) and value.get("erased") is True:
                return Personal.erased()
            raise ValueError("expected Personal(...), {'sealed': token} or {'erased': true}")

        return core_schema.no_info_wrap_validator_function(
            check, inner, serialization=core_schema.plain_serializer_function_ser_schema(_serialise)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        inner = handler(schema.get("schema", core_schema.any_schema()))
        return {
            "type": "object",
            "description": "Personal data, AES-256-GCM under the customer's key. Erased when the key is destroyed.",
            "properties": {"sealed": {"type": "string"}, "erased": {"const": True}},
            "x-personal": inner,
        }


def _serialise(value: Personal[Any]) -> dict[str, Any]:
    if value.state is PersonalState.SEALED:
        return {"sealed": value.token}
    if value.state is PersonalState.ERASED:
        return {"erased": True}
    raise PlaintextLeak("personal data must be sealed before it is serialised")
