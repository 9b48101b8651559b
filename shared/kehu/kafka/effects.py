"""What a subscription does with events: keep read models, or react with commands. One call is one transaction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from kehu.commands import CommandHandler, Failed, Progress, Request, caused_by
from kehu.events import Event, Recorded
from kehu.kafka import metrics
from kehu.postgres import Pool
from kehu.read_models import ReadModel, of_interest

log = logging.getLogger(__name__)

Types = tuple[type[Event], ...] | None


class Effect(Protocol):
    """Does something with events, together with the progress of the consumer, in one transaction or not at all."""

    @property
    def types(self) -> Types:
        """The events it wants; None is all. Others only move the progress, and need not be known to this release."""
        ...

    def __call__(self, events: Sequence[Recorded], progress: Progress) -> None:
        """Handle events in order. Runs in a thread.

        `progress.write(connection)` must be called once in the transaction, after an append if there is one; also when
        there are no events. Any exception means that nothing was done.
        """
        ...


class Project:
    """Keeps read models of this service from the events of others, all in the same transaction."""

    def __init__(self, pool: Pool, *read_models: ReadModel) -> None:
        if not read_models:
            raise ValueError("nothing to project into")
        self.pool, self.read_models = pool, read_models

    @property
    def types(self) -> Types:
        wanted: dict[type[Event], None] = {}
        for read_model in self.read_models:
            if read_model.types is None:
                return None
            wanted.update(dict.fromkeys(read_model.types))
        return tuple(wanted)

    def __call__(self, events: Sequence[Recorded], progress: Progress) -> None:
        with self.pool.connection() as connection, connection.transaction():
            for read_model in self.read_models:
                wanted = of_interest(read_model, events) if len(self.read_models) > 1 else events
                if wanted:
                    read_model.apply(connection, wanted)
            progress.write(connection)


class Policy:
    """Reacts to events with commands of its own service. Stateless: what the decision needs is loaded by the handler.

    Args:
        name: stable name; it is part of the ids of the commands, so that a repeat does nothing. Never rename it.
        service: who acts, e.g. `scoring`.
        react: gives the commands for an event, none when there is nothing to do; or whole requests.
        types: the events it reacts to; None is all.
    """

    def __init__(
        self,
        handler: CommandHandler,
        name: str,
        service: str,
        react: Callable[[Recorded], Iterable[Any]],
        types: Types,
    ) -> None:
        self.handler, self.name, self.service, self.react, self._types = handler, name, service, react, types

    @property
    def types(self) -> Types:
        return self._types

    def __call__(self, events: Sequence[Recorded], progress: Progress) -> None:
        requests = [
            command if isinstance(command, Request) else caused_by(event, self.service, self.name, command, index)
            for event in events
            for index, command in enumerate(self.react(event))
        ]
        if not requests:
            with self.handler.store.pool.connection() as connection, connection.transaction():
                progress.write(connection)
            return
        for request, outcome in zip(requests, self.handler.handle(requests, progress), strict=True):
            if isinstance(outcome, Failed):  # a rule said no: that is an answer, not an error
                metrics.POLICY_REFUSED.labels(self.name, outcome.refusal.slug).inc()
                log.info(
                    "a policy's command was refused",
                    extra={
                        "handler": self.name,
                        "slug": outcome.refusal.slug,
                        "event_id": request.context.causation_id,
                    },
                )
