"""Servers that somebody else runs, given by environment variables: looked at, never stopped."""

from __future__ import annotations

from collections.abc import Callable

from kehu.devstack.base import DevStackError, kafka_answers, poll, postgres_answers, without_password

# Seconds that a given server may still need for its own start (a compose file brings all up together).
PATIENCE = 10.0


class ExternalServer:
    """A server whose address was given.

    Args:
        variable: the environment variable that gave it, for messages.
        answers: None when it serves, else the reason why not.
    """

    def __init__(self, variable: str, url: str, shown: str, answers: Callable[[str], str | None]) -> None:
        self.variable = variable
        self.url = url
        self._shown = shown
        self._answers = answers

    @property
    def pid(self) -> int:
        raise self._not_ours("has no process that is ours")

    def start(self) -> None:
        self.wait_ready(PATIENCE)

    def stop(self, *, discard: bool = False) -> None:
        """Nothing: it is not ours to stop."""

    def kill(self) -> None:
        raise self._not_ours("is not ours to kill")

    def pause(self) -> None:
        raise self._not_ours("is not ours to pause")

    def resume(self) -> None:
        raise self._not_ours("is not ours to resume")

    def wait_ready(self, deadline: float = 30.0) -> None:
        reason: str | None = None

        def ready() -> bool:
            nonlocal reason
            reason = self._answers(self.url)
            return reason is None

        if not poll(ready, deadline, step=0.2):
            raise DevStackError(
                f"{self.variable} is set to {self._shown}, and that cannot be used: {reason}.\n"
                f"Start that server, correct {self.variable}, or unset it to have one started here."
            )

    def log_tail(self, lines: int = 50) -> str:
        return f"(its log is where {self._shown} runs)"

    def _not_ours(self, what: str) -> DevStackError:
        return DevStackError(
            f"{self._shown} (from {self.variable}) {what}. Unset {self.variable} to have one started here."
        )


def external_postgres(url: str) -> ExternalServer:
    """The server of KEHU_POSTGRES_URL."""
    if not url.startswith(("postgresql://", "postgres://")):
        raise DevStackError("KEHU_POSTGRES_URL is not a URL: postgresql://user:password@host:port/database.")
    return ExternalServer("KEHU_POSTGRES_URL", url, without_password(url), postgres_answers)


def external_kafka(bootstrap: str) -> ExternalServer:
    """The brokers of KEHU_KAFKA_BOOTSTRAP."""
    return ExternalServer("KEHU_KAFKA_BOOTSTRAP", bootstrap, bootstrap, kafka_answers)
