"""From the 201 answer to the visible score: HTTP → store → relay → Kafka → consumer → score, at a steady 100 leads a second."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import httpx
from rich.table import Table

from bench.kit import console
from kehu.devstack import DevStack
from kehu.supervisor import SUITE, Supervisor

POLL_SECONDS = 0.004
SAMPLE = 10  # one lead in so many is watched: watching all would be most of the load


async def watch(client: httpx.AsyncClient, lead_id: str, answered: float, deadline: float = 30.0) -> float:
    """Milliseconds from the answer until the score can be read."""
    while time.perf_counter() - answered < deadline:
        if (await client.get(f"/leads/{lead_id}/score")).status_code == 200:
            return (time.perf_counter() - answered) * 1000
        await asyncio.sleep(POLL_SECONDS)
    raise TimeoutError(f"no score for {lead_id} after {deadline:g} s")


async def round_of(
    intake: httpx.AsyncClient, scoring: httpx.AsyncClient, rate: float, seconds: float, tag: int
) -> list[float]:
    """Send leads at a steady rate, whatever the answers take, and watch a sample."""
    watched: list[asyncio.Task[float]] = []
    sent: list[asyncio.Task[None]] = []

    async def send(number: int) -> None:
        body = {
            "channel": "bench",
            "name": "王小明",
            "phone": f"+86138{tag:02}{number:06}",
            "facts": {"budget": 50_000},
        }
        response = await intake.post("/leads", json=body)
        answered = time.perf_counter()
        response.raise_for_status()
        if number % SAMPLE == 0:
            watched.append(asyncio.create_task(watch(scoring, response.json()["lead_id"], answered)))

    start = time.perf_counter()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        sent.append(asyncio.create_task(send(number)))
    await asyncio.gather(*sent)
    return list(await asyncio.gather(*watched))


async def measure(supervisor: Supervisor, rate: float, seconds: float, repeat: int) -> list[list[float]]:
    """One round to warm up, then `repeat` rounds."""
    headers = {"Authorization": f"Bearer {supervisor.token()}"}
    limits = httpx.Limits(max_connections=64)
    async with (
        httpx.AsyncClient(base_url=supervisor.url("lead-intake"), headers=headers, limits=limits, timeout=30) as intake,
        httpx.AsyncClient(base_url=supervisor.url("scoring"), headers=headers, limits=limits, timeout=30) as scoring,
    ):
        (await intake.put("/channels/bench", json={"title": "Bench", "kind": "web"})).raise_for_status()
        rounds = [await round_of(intake, scoring, rate, seconds, tag) for tag in range(repeat + 1)]
    return rounds[1:]


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=100.0, help="leads a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    services = [spec for spec in SUITE if spec.name in ("lead-intake", "scoring")]
    with tempfile.TemporaryDirectory(prefix="kehu-bench-") as folder, DevStack() as stack:
        console.print("Starting lead-intake and scoring …")
        with Supervisor(stack.address, Path(folder), services) as supervisor:
            rounds = asyncio.run(measure(supervisor, options.rate, options.seconds, options.repeat))
    table = Table(
        "",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "max ms",
        "samples",
        title=f"From the 201 to the visible score, {options.rate:g} leads/s",
    )
    for number, values in enumerate(rounds, 1):
        cut = statistics.quantiles(values, n=100)
        table.add_row(
            f"round {number}", *(f"{v:.0f}" for v in (cut[49], cut[89], cut[98], max(values))), str(len(values))
        )
    cuts = [statistics.quantiles(values, n=100) for values in rounds]
    medians = [statistics.median(cut[at] for cut in cuts) for at in (49, 89, 98)]
    table.add_row("median", *(f"{v:.0f}" for v in medians), "", "", style="bold")
    console.print(table)


if __name__ == "__main__":
    main()
