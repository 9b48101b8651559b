"""Funnels counted by trying every combination of events: slow, and made from the definitions alone.

A chain is one event for each step that it did (required ones without a hole). What the kernels work out in one pass is
here a search over all chains, so that a mistake in the one is not repeated in the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations


@dataclass(frozen=True)
class Event:
    """One event: microseconds, the steps that it is (1-based), and the exclusions that it is (0-based)."""

    time: int
    steps: frozenset[int] = frozenset()
    breaks: frozenset[int] = frozenset()
    label: str = ""


@dataclass(frozen=True)
class Rules:
    """A funnel as the oracle knows it; see FunnelSpec."""

    steps: int
    window: int
    order: str = "ordered"
    first_only: bool = False
    later: bool = False
    optional: frozenset[int] = frozenset()
    exclude: tuple[tuple[int, int], ...] = ()


@dataclass
class Verdict:
    """What became of a unit."""

    level: int = 0
    took: dict[int, int] = field(default_factory=dict)
    gap: dict[int, int] = field(default_factory=dict)
    outcome: str = "none"
    reached_at: int = 0
    open_start: int | None = None
    path: dict[int, int] = field(default_factory=dict)  # of the chain that counts: step → time


def judge(events: list[Event], rules: Rules, horizon: int) -> Verdict:
    """What became of a unit with these events, given in their sequence."""
    events = sorted(events, key=lambda e: e.time)
    if rules.order == "unordered":
        verdict = _unordered(events, rules)
        broken = False
    elif rules.order == "strict":
        verdict = _strict(events, rules)
        broken = False
    else:
        verdict, broken = _ordered(events, rules)
    if verdict.level == 0:
        verdict.outcome = "none"
    elif verdict.level == rules.steps:
        verdict.outcome = "converted"
    elif broken:
        verdict.outcome = "excluded"
    elif verdict.open_start is not None and horizon - verdict.open_start <= rules.window:
        verdict.outcome = "pending"
    else:
        verdict.outcome = "dropped"
    return verdict


Chain = tuple[tuple[int, int], ...]  # (step, index of the event), in the order of the steps


def _chains(events: list[Event], rules: Rules, fits: object) -> Iterator[Chain]:
    starts = [i for i, e in enumerate(events) if 1 in e.steps]
    if rules.first_only and starts:
        begin = min(events[i].time for i in starts)
        starts = [i for i in starts if events[i].time == begin][:1]

    def extend(chain: Chain) -> Iterator[Chain]:
        yield chain
        step, index = chain[-1]
        nexts = [step + 1]
        while nexts[-1] in rules.optional:
            nexts.append(nexts[-1] + 1)
        for k in nexts:
            for j, event in enumerate(events):
                if k in event.steps and event.time - events[chain[0][1]].time <= rules.window:
                    longer = (*chain, (k, j))
                    if fits(step, index, k, j):  # type: ignore[operator]
                        yield from extend(longer)

    for i in starts:
        yield from extend(((1, i),))


def _measures(verdict: Verdict, chains: list[Chain], events: list[Event], rank: list[int]) -> None:
    """Levels and times: of the chains that first reach a step, the one with the latest start."""
    for k in sorted({chain[-1][0] for chain in chains}):
        ending = [chain for chain in chains if chain[-1][0] == k]
        first = min(rank[chain[-1][1]] for chain in ending)
        ending = [chain for chain in ending if rank[chain[-1][1]] == first]
        latest = max(events[chain[0][1]].time for chain in ending)
        ending = [chain for chain in ending if events[chain[0][1]].time == latest]
        reached = events[ending[0][-1][1]].time
        verdict.took[k] = reached - latest
        if k == 1:
            verdict.gap[k] = 0
        else:
            source = max(chain[-2][0] for chain in ending)
            came = min(events[chain[-2][1]].time for chain in ending if chain[-2][0] == source)
            verdict.gap[k] = reached - came
        verdict.level = k
        verdict.reached_at = reached
        verdict.path = _path(chains, events, rank, k, first, latest)


def _path(chains: list[Chain], events: list[Event], rank: list[int], k: int, at: int, start: int) -> dict[int, int]:
    """The times by which a chain with this start came to each step, on its way to step k at this rank."""
    ending = [c for c in chains if c[-1][0] == k and rank[c[-1][1]] == at and events[c[0][1]].time == start]
    own = {k: events[ending[0][-1][1]].time}
    if k == 1:
        return own
    source = max(c[-2][0] for c in ending)
    came = min(rank[c[-2][1]] for c in ending if c[-2][0] == source)
    return {**_path(chains, events, rank, source, came, start), **own}


def _ordered(events: list[Event], rules: Rules) -> tuple[Verdict, bool]:
    def broken_between(step: int, begin: int, end: int) -> bool:
        """Whether an exclusion falls after a chain came to a step and not after it came to the next."""
        return any(
            rules.exclude[r][0] <= step < rules.exclude[r][1] and begin < e.time <= end
            for e in events
            for r in e.breaks
        )

    def fits(p: int, i: int, k: int, j: int) -> bool:
        before, after = events[i].time, events[j].time
        in_time = before < after if rules.later else before <= after
        return in_time and not broken_between(p, before, after)

    chains = list(_chains(events, rules, fits))
    verdict = Verdict()
    _measures(verdict, chains, events, [e.time for e in events])

    def standing(k: int) -> tuple[int | None, bool, int | None]:
        """The start that stands at step k in the end, whether one saw its window close unbroken, and when the one came
        that counts: the first, or after all so far were broken the next."""
        start, settled, counts = None, False, None
        for t in sorted({e.time for e in events}):
            for r in {r for e in events if e.time == t for r in e.breaks}:
                if rules.exclude[r][0] <= k < rules.exclude[r][1] and start is not None:
                    if t - start <= rules.window:
                        start = None
                    else:
                        settled = True
            came = [events[c[0][1]].time for c in chains if c[-1][0] == k and events[c[-1][1]].time == t]
            if came and max(came) != start:
                settled = settled or (start is not None and t - start > rules.window)
                if counts is None or (start is None and not settled):
                    counts = t
                start = max(came)
        return start, settled, counts

    stands = [standing(k)[0] for k in range(1, rules.steps + 1)]
    verdict.open_start = max((s for s in stands if s is not None), default=None)
    if verdict.level in (0, rules.steps):
        return verdict, False
    start, settled, counts = standing(verdict.level)
    assert counts is not None
    begun = max(events[c[0][1]].time for c in chains if c[-1][0] == verdict.level and events[c[-1][1]].time == counts)
    verdict.reached_at = counts
    verdict.path = _path(chains, events, [e.time for e in events], verdict.level, counts, begun)
    return verdict, start is None and not settled


def _strict(events: list[Event], rules: Rules) -> Verdict:
    line = sorted(range(len(events)), key=lambda i: (events[i].time, min(events[i].steps, default=0), i))
    events = [events[i] for i in line]

    def fits(p: int, i: int, k: int, j: int) -> bool:
        if i == j:
            return not rules.later
        in_order = i < j and (events[i].time < events[j].time or not rules.later)
        return in_order and all(p in e.steps for e in events[i + 1 : j])

    chains = list(_chains(events, rules, fits))
    verdict = Verdict()
    _measures(verdict, chains, events, list(range(len(events))))
    verdict.open_start = max(
        (events[c[0][1]].time for c in chains if all(c[-1][0] in e.steps for e in events[c[-1][1] + 1 :])),
        default=None,
    )
    return verdict


def _unordered(events: list[Event], rules: Rules) -> Verdict:
    own = [e for e in events if e.steps]
    verdict = Verdict()
    if not own:
        return verdict
    starts = sorted({e.time for e in own})
    if rules.first_only:
        starts = starts[:1]
    verdict.open_start = starts[-1]
    before = 0
    for n in range(1, rules.steps + 1):
        done = [
            (end, -start)
            for start in starts
            for end in sorted({e.time for e in own})
            if 0 <= end - start <= rules.window
            and _matching([e for e in own if start <= e.time <= end], rules.steps) >= n
        ]
        if not done:
            break
        end, start = min(done)
        verdict.level, verdict.reached_at = n, end
        verdict.took[n] = end + start
        verdict.gap[n] = end - before if n > 1 else 0
        before = end
    verdict.path = {1: verdict.reached_at - verdict.took[verdict.level], verdict.level: verdict.reached_at}
    return verdict


def _matching(events: list[Event], steps: int) -> int:
    """The most steps that distinct events can be, by trying all assignments."""
    best = 0
    for size in range(1, min(steps, len(events)) + 1):
        for chosen in permutations(range(len(events)), size):
            for wanted in permutations(range(1, steps + 1), size):
                if all(step in events[i].steps for step, i in zip(wanted, chosen, strict=True)):
                    best = size
                    break
            if best == size:
                break
        if best < size:
            break
    return best
