"""The generated reference: complete, and true of the code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from kehu.cli.docs import asyncapi, event_schema, events_page, example_of, http_page, openapi, settings_classes
from kehu.events import registered
from kehu.events.envelope import Envelope
from kehu.ids import derived
from kehu.settings import reference
from kehu.supervisor import SUITE
from kehu.testing.examples import example

CLASSES = list(registered().values())


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def resolve(document: Any, reference: str) -> Any:
    node = document
    for part in reference.removeprefix("#/").split("/"):
        node = node[part]
    return node


@pytest.mark.req("DC-02")
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.TYPE)
def test_the_example_of_an_event_fits_its_published_schema(cls: Any) -> None:
    schema = event_schema(cls)
    jsonschema.Draft202012Validator.check_schema(schema)
    data = example(cls).model_dump(mode="json", exclude_none=True)
    jsonschema.validate(data, schema)
    assert schema["$id"] == f"urn:kehu:schema:{cls.TYPE}"


@pytest.mark.req("DC-02")
def test_the_asyncapi_document_holds_together() -> None:
    document = asyncapi(CLASSES)
    assert document["asyncapi"] == "3.0.0"
    assert set(document["components"]["messages"]) == {cls.TYPE for cls in CLASSES}
    for reference_ in references(document):
        resolve(document, reference_)
    assert document["channels"]["lead-intake"]["address"] == "crm.lead-intake.events"
    assert json.loads(json.dumps(document)) == document


@pytest.mark.req("DC-01")
def test_a_message_on_kafka_fits_the_asyncapi_document() -> None:
    from datetime import UTC, datetime

    document = asyncapi(CLASSES)
    at = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)
    for cls in CLASSES:
        envelope = Envelope(
            id=derived("x"),
            producer=cls.PRODUCER,
            stream=f"{cls.STREAM}-x",
            version=1,
            time=at,
            recorded=at,
            partition_key="c-1",
            customer_id="c-1",
            correlation_id="x",
            causation_id="x",
            actor="user:x",
            traceparent=None,
            store_epoch="x",
        )
        sent = json.loads(envelope.encode(example(cls)))
        payload = document["components"]["messages"][cls.TYPE]["payload"]
        jsonschema.validate(sent, {**payload, "components": document["components"]})
        known = set(document["components"]["schemas"]["envelope"]["properties"]) | {"data"}
        assert set(sent) <= known


@pytest.mark.req("DC-02")
def test_the_catalogue_has_every_event_and_marks_personal_data() -> None:
    page = events_page(CLASSES)
    for cls in CLASSES:
        assert f"### {cls.TYPE}" in page
    assert "| `contact` | encrypted Contact | **P** |" in page
    assert "13800138000" not in page


@pytest.mark.req("PL-07")
def test_the_settings_page_has_every_service() -> None:
    page = reference(settings_classes())
    for spec in SUITE:
        assert f"## {spec.name}" in page


@pytest.mark.parametrize("package", [spec.package for spec in SUITE])
def test_the_http_page_has_every_route_with_an_example_that_fits(package: str) -> None:
    document = openapi(package)
    page = http_page({package: document})
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f"### {method.upper()} {path}" in page
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                if kind == "application/json":
                    body = example_of(content["schema"], document)
                    jsonschema.validate(body, {**content["schema"], "components": document["components"]})
    for reference_ in references(document):
        resolve(document, reference_)


def test_pages_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kehu.cli.docs import events

    events(tmp_path)
    written = capsys.readouterr().out.splitlines()
    assert len(written) == len(CLASSES) + 2
    assert (tmp_path / "events" / "schemas" / "lead.captured.v1.json").exists()
