"""What scoring reads from its environment: what every service reads."""

from __future__ import annotations

from typing import ClassVar

from kehu.settings import ServiceSettings


class ScoringSettings(ServiceSettings):
    """Nothing of its own."""

    SERVICE: ClassVar[str] = "scoring"
