"""Running the parts of a relay or consumer beside each other."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def together(*parts: Coroutine[Any, Any, None]) -> None:
    """Run parts that never end by themselves, until one fails or all are cancelled; then end the others.

    Unlike a TaskGroup it gives the error itself, so that callers can tell errors apart.
    """
    tasks = [asyncio.create_task(part, name=getattr(part, "__qualname__", "part")) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
