"""Settings: refused with every reason, never with a value."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, ValidationError

from kehu.clock import DevelopmentClock, SystemClock
from kehu.settings import EXIT_REFUSED, Key, ServiceSettings, SettingsError, load, read, reference


class LeadIntake(ServiceSettings):
    SERVICE: ClassVar[str] = "lead-intake"

    master_key: Key = Field(description="Wraps the keys of customers.")
    pick_limit: int = Field(20, ge=1, le=500, description="Leads that one person may hold.")


GOOD = {
    "KEHU_ENVIRONMENT": "development",
    "KEHU_POSTGRES_URL": "postgresql://kehu:s3cret@db:5432/postgres?sslmode=disable",
    "KEHU_KAFKA_BOOTSTRAP": "k1:9092,k2:9092",
    "KEHU_JWT_SECRET": "x" * 32,
    "KEHU_MASTER_KEY": base64.b64encode(b"k" * 32).decode(),
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("KEHU")]:
        monkeypatch.delenv(name)


def _set(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.req("PL-07")
def test_good_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, GOOD)
    settings = read(LeadIntake)
    assert settings.database == "kehu_lead_intake"
    assert settings.database_url == "postgresql://kehu:s3cret@db:5432/kehu_lead_intake?sslmode=disable"
    assert settings.master_key == b"k" * 32
    assert not settings.production
    assert isinstance(settings.clock(), SystemClock)
    assert "s3cret" not in repr(settings) + str(settings)


@pytest.mark.req("PL-07")
def test_every_wrong_variable_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _set(
        monkeypatch,
        {
            "KEHU_POSTGRS_URL": "postgresql://kehu:s3cret@db/postgres",
            "KEHU_HTTP_PORT": "99999",
            "KEHU_LOG_FORMAT": "s3cret",
            "KEHU_JWT_SECRET": "s3cret",
            "KEHU_MASTER_KEY": "s3cret",
            "KEHU_PICK_LIMIT": "0",
            "KEHU_CLOCK_FILE": "/tmp/clock.json",
        },
    )
    with pytest.raises(SystemExit) as ended:
        load(LeadIntake)
    assert ended.value.code == EXIT_REFUSED == 2
    said = capsys.readouterr().err
    assert "lead-intake cannot start: 11 settings are wrong." in said
    reasons = dict(line.strip().split(maxsplit=1) for line in said.splitlines()[1:])
    assert set(reasons) == {
        "KEHU_POSTGRES_URL",
        "KEHU_KAFKA_BOOTSTRAP",
        "KEHU_HTTP_PORT",
        "KEHU_LOG_FORMAT",
        "KEHU_JWT_SECRET",
        "KEHU_JWT_JWKS_URL",
        "KEHU_JWT_ISSUER",
        "KEHU_JWT_AUDIENCE",
        "KEHU_MASTER_KEY",
        "KEHU_PICK_LIMIT",
        "KEHU_CLOCK_FILE",
    }
    assert "is missing" in reasons["KEHU_POSTGRES_URL"]
    assert "KEHU_POSTGRS_URL is set: is that a typing error?" in reasons["KEHU_POSTGRES_URL"]
    assert "E.g. KEHU_POSTGRES_URL=postgresql://" in reasons["KEHU_POSTGRES_URL"]
    assert "65535" in reasons["KEHU_HTTP_PORT"]
    assert "refused in production" in reasons["KEHU_CLOCK_FILE"]
    assert "32 bytes in base64" in reasons["KEHU_MASTER_KEY"]
    assert "s3cret" not in said.replace("kehu:secret@", "").replace("KEHU_POSTGRES_URL=postgresql://kehu:secret", "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KEHU_POSTGRES_URL", "mysql://x@h/d"),
        ("KEHU_POSTGRES_URL", "postgresql:///nohost"),
        ("KEHU_POSTGRES_URL", "postgresql://h:notaport/x"),
        ("KEHU_KAFKA_BOOTSTRAP", "nohost"),
        ("KEHU_KAFKA_BOOTSTRAP", "h:1;h:2"),
        ("KEHU_DATABASE", 'x"; DROP DATABASE y'),
        ("KEHU_OTLP_ENDPOINT", "collector:4318"),
        ("KEHU_TRACE_RATIO", "2"),
        ("KEHU_STOP_SECONDS", "nan"),
    ],
)
def test_single_wrong_values(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    _set(monkeypatch, {**GOOD, name: value})
    with pytest.raises(SettingsError) as refused:
        read(LeadIntake)
    assert list(refused.value.wrong) == [name]


def test_development_needs_some_way_to_log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, GOOD)
    monkeypatch.delenv("KEHU_JWT_SECRET")
    with pytest.raises(SettingsError, match="nobody could log in"):
        read(LeadIntake)


def test_production_with_an_identity_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(
        monkeypatch,
        {
            **GOOD,
            "KEHU_ENVIRONMENT": "production",
            "KEHU_JWT_JWKS_URL": "https://id.example.com/jwks.json",
            "KEHU_JWT_ISSUER": "https://id.example.com",
            "KEHU_JWT_AUDIENCE": "kehu",
        },
    )
    assert read(LeadIntake).production
    monkeypatch.setenv("KEHU_CLOCK_FILE", "/tmp/clock.json")
    with pytest.raises(SettingsError, match="refused in production"):
        read(LeadIntake)


def test_the_clock_can_be_moved_in_development_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _set(monkeypatch, {**GOOD, "KEHU_CLOCK_FILE": str(tmp_path / "clock.json")})
    assert isinstance(read(LeadIntake).clock(), DevelopmentClock)


def test_secrets_can_be_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _set(monkeypatch, {name: value for name, value in GOOD.items() if name != "KEHU_JWT_SECRET"})
    (tmp_path / "kehu_jwt_secret").write_text("y" * 40)
    monkeypatch.setenv("KEHU_SECRETS_DIR", str(tmp_path))
    secret = read(LeadIntake).jwt_secret
    assert secret is not None
    assert secret.get_secret_value() == "y" * 40


def test_made_in_code_the_same_rules_hold() -> None:
    with pytest.raises(ValidationError, match="refused in production"):
        ServiceSettings(
            postgres_url="postgresql://h/x",
            kafka_bootstrap="h:1",
            jwt_jwks_url="https://h/x",
            jwt_issuer="x",
            jwt_audience="x",
            clock_file=Path("/tmp/x"),
        )


def test_the_reference_is_made_from_the_models() -> None:
    page = reference([LeadIntake])
    assert "| `KEHU_POSTGRES_URL` | text | **required** |" in page
    common, own = page.split("## lead-intake")
    assert "`KEHU_PICK_LIMIT` | integer, 1 to 500 | `20` | Leads that one person may hold." in own
    assert "`KEHU_MASTER_KEY` | 32 bytes in base64 | **required** |" in own
    assert "KEHU_HTTP_PORT" in common
    assert "KEHU_HTTP_PORT" not in own
