"""What files are taken for: leads, and behaviours."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import TypeAdapter, ValidationError

from kehu.clock import Clock
from kehu.commands import Context, Failed, Request
from kehu.http import FieldError, Problem
from kehu.http.answers import problem_of_outcome
from kehu.http.bodies import parse
from kehu.http.problems import from_validation, invalid
from kehu.ids import derived, uuid7
from lead_intake.api.bulk import BulkLane, Checked, RefusedRow
from lead_intake.api.rows import CsvRows, Encoding, NdjsonRows, Row, RowReader
from lead_intake.api.schemas import BehaviourIn, LeadRow
from lead_intake.domain.activity import RecordBehaviour
from lead_intake.domain.cleaning import UncleanInput
from lead_intake.domain.importing import CompleteImport, Format, StartImport
from lead_intake.domain.times import local_time

# Titles of CSV columns. Those that begin with `facts.` are taken as they are.
COLUMNS: Mapping[str, str] = {
    **{field: field for field in ("name", "phone", "email", "note", "company", "industry", "region", "size", "title")},
    **{field: field for field in ("channel", "campaign", "external_id", "captured_at")},
    **{f"utm_{tag}": f"utm.{tag}" for tag in ("source", "medium", "campaign", "term", "content")},
    "姓名": "name",
    "联系人": "name",
    "电话": "phone",
    "手机": "phone",
    "手机号": "phone",
    "联系电话": "phone",
    "邮箱": "email",
    "电子邮箱": "email",
    "备注": "note",
    "公司": "company",
    "公司名称": "company",
    "企业名称": "company",
    "行业": "industry",
    "地区": "region",
    "区域": "region",
    "规模": "size",
    "公司规模": "size",
    "职位": "title",
    "职务": "title",
    "渠道": "channel",
    "活动": "campaign",
    "编号": "external_id",
    "日期": "captured_at",
    "时间": "captured_at",
}
# A cell that is a number and nothing else; 0755 is none.
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,14})(\.[0-9]{1,9})?", re.ASCII)
_lead_row = TypeAdapter(LeadRow)
_behaviour = TypeAdapter(BehaviourIn)


def reader_of(content_type: str | None, encoding: Encoding | None, ignore_unknown: bool) -> tuple[Format, RowReader]:
    """The format of a file by its media type, and what reads it. Raises Problem (415)."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind in ("application/x-ndjson", "application/ndjson", "application/jsonl", "application/json-seq"):
        return "ndjson", NdjsonRows()
    if kind in ("text/csv", "application/csv", "application/vnd.ms-excel"):
        return "csv", CsvRows(COLUMNS, ("facts.",), ignore_unknown, encoding)
    raise Problem(415, "Send Content-Type: application/x-ndjson or text/csv.")


def unclean(error: UncleanInput) -> list[FieldError]:
    """The fields that cleaning could not read."""
    return [FieldError(at="body", field=problem.field, reason=problem.reason) for problem in error.problems]


class LeadFile:
    """A file of leads.

    Args:
        import_id: the same for the same Idempotency-Key; with the number of a row it gives the id of the row's command.
        channel: of rows that name none.
    """

    def __init__(
        self,
        lane: BulkLane,
        clock: Clock,
        context: Context,
        import_id: UUID,
        form: Format,
        channel: str | None,
    ) -> None:
        self._lane, self._clock, self._import_id = lane, clock, import_id
        self._context = Context(context.actor, context.correlation_id, str(import_id), context.traceparent)
        self._form, self._channel = form, channel
        self._salt = (channel or "").encode() + b"\0"

    async def start(self) -> None:
        command = StartImport(self._import_id, self._form, self._channel)
        await self._do(command, derived(self._import_id, "start"))

    async def complete(self, counts: Mapping[str, int]) -> None:
        await self._do(CompleteImport(self._import_id, **counts), uuid7(self._clock.now()))

    async def _do(self, command: StartImport | CompleteImport, command_id: UUID) -> None:
        (outcome,) = await self._lane.handle([Request(command, command_id, self._context)])
        problem = problem_of_outcome(outcome)
        if problem is not None:
            assert isinstance(outcome, Failed)
            raise problem

    def summary(self) -> dict[str, Any]:
        return {"import_id": str(self._import_id)}

    def check(self, row: Row) -> Checked:
        now = self._clock.now()
        try:
            lead = self._read(row)
            command = lead.command(uuid7(now), now, self._import_id)
        except UncleanInput as error:
            return RefusedRow(invalid(unclean(error)))
        except Problem as problem:
            return RefusedRow(problem)
        fingerprint = hashlib.blake2b(self._salt + row.raw, digest_size=16).digest()
        command_id = derived(self._import_id, row.number)
        return Request(command, command_id, self._context, fingerprint=fingerprint, at=lead.captured_at)

    def _read(self, row: Row) -> LeadRow:
        """Raises Problem."""
        whole(row)
        if isinstance(row.content, bytes):
            lead: LeadRow = parse(row.content, _lead_row)
        else:
            assert row.content is not None
            try:
                lead = LeadRow.model_validate(cells(row.content))
            except ValidationError as error:
                raise invalid(from_validation(error)) from None
        if lead.channel:
            return lead
        if self._channel is None:
            reason = "is required, in the row or as ?channel= for the whole file"
            raise invalid([FieldError(at="body", field="channel", reason=reason)])
        return lead.model_copy(update={"channel": self._channel})


class BehaviourFile:
    """A file of behaviours, NDJSON."""

    def __init__(self, lane: BulkLane, clock: Clock, context: Context, import_id: UUID) -> None:
        self._lane, self._clock, self._context, self._import_id = lane, clock, context, import_id

    async def start(self) -> None:
        """Nothing is recorded of the file itself."""

    async def complete(self, counts: Mapping[str, int]) -> None:
        """Nothing is recorded of the file itself."""

    def summary(self) -> dict[str, Any]:
        return {"import_id": str(self._import_id)}

    def check(self, row: Row) -> Checked:
        try:
            whole(row)
            assert isinstance(row.content, bytes)
            behaviour: BehaviourIn = parse(row.content, _behaviour)
        except Problem as problem:
            return RefusedRow(problem)
        fingerprint = hashlib.blake2b(row.raw, digest_size=16).digest()
        return record(behaviour, derived(self._import_id, row.number), self._context, self._clock.now(), fingerprint)


def record(
    behaviour: BehaviourIn, command_id: UUID, context: Context, now: datetime, fingerprint: bytes | None
) -> Request[RecordBehaviour]:
    """The command of a behaviour.

    The sender's own id, when there is one, makes the command id: whatever brings it again, it is recorded once.
    """
    behaviour_id = behaviour.behaviour_id
    if behaviour_id is not None:
        command_id, fingerprint = derived("behaviour", behaviour_id), None
    occurred_at = behaviour.occurred_at or now
    command = RecordBehaviour(
        behaviour_id=behaviour_id or command_id,
        kind=behaviour.kind,
        occurred_at=occurred_at,
        received_at=now,
        customer_id=behaviour.customer_id,
        lead_id=behaviour.lead_id,
        object=behaviour.object,
        channel=behaviour.channel,
        duration_seconds=behaviour.duration_seconds,
        device=behaviour.device,
        facts=behaviour.facts,
    )
    return Request(command, command_id, context, fingerprint=fingerprint, at=occurred_at)


def whole(row: Row) -> None:
    """Raise Problem for a record that is broken as a whole."""
    if row.problem is not None:
        slug, reason = row.problem
        raise Problem(422, f"The row {reason}.", slug, errors=[FieldError(at="body", field="", reason=reason)])
    if b"\0" in row.raw:
        reason = "holds a NUL character; the file may be damaged"
        raise Problem(
            422, f"The row {reason}.", "control-character", errors=[FieldError(at="body", field="", reason=reason)]
        )


def cells(content: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a CSV record: numbers among the facts, and times without a zone, as what they are."""
    fields: dict[str, Any] = {}
    for title, text in content.items():
        group, dot, name = title.partition(".")
        if dot:
            fields.setdefault(group, {})[name] = _number(text) if group == "facts" else text
        elif title == "captured_at":
            fields[title] = local_time(text) or text.strip()
        else:
            fields[title] = text.strip() if title == "channel" else text
    return fields


def _number(text: str) -> str | int | float:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return text
    return float(text) if match[1] else int(text)
