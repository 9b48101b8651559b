"""The funnel kernels: one pass over the events of a unit in time order.

`start[k]` is the start of the latest chain that stands at step k (1-based). An event of step k at time t sets
`start[1] = t` for k = 1, and otherwise `start[k] = start[k-1]` when that is set and `t - start[k-1] <= window`. Later
starts are never worse, so one start a step is enough: the pass is exact, not greedy (see tests/unit/lake/oracle.py for
the count that tries every combination). All times are integer microseconds.

`fold_ordered` is the plain funnel on sorted files: branch-free for nearly every row, and its state carries over from one
file to the next, so that months are read one after the other. `ordered_histories` knows everything else of an ordered or
strict funnel, and `unordered_histories` the unordered one; they take the sorted events of many histories at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import uintp
from numpy.typing import NDArray

from kehu.lake.jit import compiled

Ints = NDArray[np.int64]
Codes = NDArray[np.int32]
Small = NDArray[np.int8]
Flags = NDArray[np.bool_]
Index = np.unsignedinteger[Any]  # unsigned, so that no index is checked for counting from the end

UNSET = -(1 << 62)  # no start; far enough from every time that t - UNSET is beyond any window, and does not overflow
MAX_WINDOW = 1 << 60

NONE, CONVERTED, PENDING, DROPPED, EXCLUDED = 0, 1, 2, 3, 4  # what became of a unit
REACHED, WENT_ON, WAITING, KINDS = 5, 6, 7, 8  # what is counted by step beside these

# The four blocks of a unit's row in the state of fold_ordered, each with a slot for "no step" and one a step.
START, TOOK, SINCE, GAP, BLOCKS = 0, 1, 2, 3, 4


@compiled
def clear(state: Ints) -> None:
    """Make the state that of units without events. SINCE and GAP are read only where the other two are set."""
    for row in range(len(state)):
        for slot in range(state.shape[2]):
            state[row, START, slot] = UNSET
        for slot in range(state.shape[2]):
            state[row, TOOK, slot] = -1


@compiled
def fold_ordered(
    unit: Codes,
    code: Codes,
    time: Ints,
    single: Ints,
    masks: Ints,
    shift: int,
    first: int,
    window: int,
    steps: int,
    first_only: bool,
    later: bool,
    state: Ints,
    picked: Codes,
) -> None:
    """Advance the state of an ordered funnel by rows sorted by (unit, time).

    Args:
        unit: of each row; `(unit >> shift) - first` is its row in `state`. Rows with a negative unit are passed over.
        code: of each row, an index into `single` and `masks`.
        time: of each row, microseconds.
        single: by code: 0 no step, k the one step, -1 several.
        masks: by code: bit k-1 set for each step k.
        window: microseconds, inclusive.
        first_only: only the first event of step 1 starts a chain.
        later: a step must come strictly later than the one before; else events of one instant count in step order.
        state: flat, by unit BLOCKS * (steps + 1): latest start, time to the first reach of the step (-1 never), when
            the chain came to the step, and the time from the step before at the first reach.
        picked: scratch of at least len(unit) + 1.
    """
    rows = uintp(len(unit))
    block = uintp(steps + 1)
    width = uintp(BLOCKS * (steps + 1))
    count = uintp(0)
    for i in range(rows):
        picked[count] = i
        count += uintp((single[uintp(code[i])] != 0) & (unit[i] >= 0))
    if count == 0:
        return
    picked[count] = picked[count - uintp(1)]
    j = uintp(0)
    while j < count:
        i = uintp(picked[j])
        j += uintp(1)
        n = uintp(picked[j])
        u = unit[i]
        t = time[i]
        c = uintp(code[i])
        base = uintp((u >> shift) - first) * width
        k = single[c]
        if k < 0 or (time[n] == t and unit[n] == u and n != i):
            mask = masks[c]
            while j < count and time[n] == t and unit[n] == u:
                mask |= masks[uintp(code[n])]
                j += uintp(1)
                n = uintp(picked[j])
            _instant(state, base, block, mask, t, window, steps, first_only, later)
            continue
        at = base + uintp(k)
        previous = at - uintp(1)
        # Choices, not branches: which step comes next is what a processor cannot foretell.
        start = state[at]
        begins = k == 1 and not (first_only and start != UNSET)
        came = start if k == 1 else state[previous]
        came = t if begins else came
        since = came if k == 1 else state[previous + block + block]
        ok = t - came <= window
        state[at] = came if ok else start
        if ok and state[at + block] < 0:
            state[at + block] = t - came
            state[at + block + block + block] = t - since
        before = state[at + block + block]
        state[at + block + block] = t if ok and came != start else before


@compiled
def _instant(
    state: Ints, base: Index, block: Index, mask: int, t: int, window: int, steps: int, first_only: bool, later: bool
) -> None:
    """All events of a unit at one instant, or one event of several steps."""
    for index in range(steps):
        # In step order an event may carry on what another of the same instant began. Strictly later: from the last step
        # down, so that each step sees only what was there before this instant.
        k = steps - index if later else index + 1
        if not (mask >> (k - 1)) & 1:
            continue
        at = base + uintp(k)
        previous = at - uintp(1)
        start = state[at]
        if k == 1:
            came = start if first_only and start != UNSET else t
            since = came
        else:
            came = state[previous]
            since = state[previous + block + block]
        if t - came > window:
            continue
        state[at] = came
        if state[at + block] < 0:
            state[at + block] = t - came
            state[at + block + block + block] = t - since
        if came != start:
            state[at + block + block] = t


@compiled
def ordered_histories(
    bounds: Ints,
    time: Ints,
    mask: Ints,
    breaks: Ints,
    lowest: Ints,
    exclude_from: Ints,
    exclude_to: Ints,
    window: int,
    steps: int,
    first_only: bool,
    later: bool,
    has_optional: bool,
    took: Ints,
    gap: Ints,
    level: Ints,
    reached_at: Ints,
    open_start: Ints,
    broken: Flags,
    path: Ints,
) -> None:
    """Count ordered funnels with exclusions, optional steps and the rows that each chain went through.

    Args:
        bounds: history h is the rows bounds[h] to bounds[h+1], sorted by time and sequence.
        time, mask, breaks: of each row; bit k-1 of mask for each step k, bit r of breaks for each exclusion r.
        lowest: by step (from 0), the lowest step a chain may come from: the one before, or less over optional steps.
        exclude_from, exclude_to: by exclusion, the steps between which it must not happen.
        window, steps, first_only, later: as in fold_ordered.
        has_optional: go on after the goal, for the optional steps that are still to be reached.
        took, gap, level, reached_at, open_start, broken, path: results, by history (and step). `took` and `path` come
            filled with -1.
    """
    start = np.empty(steps + 1, np.int64)
    since = np.empty(steps + 1, np.int64)
    trail = np.empty((steps + 1, steps), np.int64)
    for h in range(len(bounds) - 1):
        start[:] = UNSET
        best = 0
        settled = False  # a chain that stood at the furthest step saw its window close unbroken
        i = bounds[h]
        end = bounds[h + 1]
        while i < end and (best < steps or has_optional):
            t = time[i]
            j = i
            reached = 0
            broken_by = 0
            while j < end and time[j] == t:
                reached |= mask[j]
                broken_by |= breaks[j]
                j += 1
            # An exclusion counts as before the steps of its instant: it breaks what stands, not what begins now.
            for r in range(len(exclude_from)):
                if not (broken_by >> r) & 1:
                    continue
                for k in range(exclude_from[r], exclude_to[r]):
                    if start[k] != UNSET and t - start[k] <= window:
                        start[k] = UNSET
            for index in range(steps):
                k = steps - index if later else index + 1
                if not (reached >> (k - 1)) & 1:
                    continue
                source = 0
                if k > 1:
                    source = _source(start, lowest[k - 1], k)
                    if source == 0 or t - start[source] > window:
                        continue
                    came = start[source]
                    begun = since[source]
                elif first_only and took[h, 0] >= 0:
                    continue
                else:
                    came = t
                    begun = t
                if took[h, k - 1] < 0:
                    took[h, k - 1] = t - came
                    gap[h, k - 1] = t - begun
                if came == start[k]:
                    continue  # the same chain again: it came here when it first did
                if k == best and start[k] != UNSET and t - start[k] > window:
                    settled = True
                renewed = k == best and start[k] == UNSET and not settled
                start[k] = came
                since[k] = t
                row = i
                while not (mask[row] >> (k - 1)) & 1:
                    row += 1
                for s in range(steps):
                    trail[k, s] = trail[source, s] if source else -1
                trail[k, k - 1] = row
                if k > best or renewed:
                    best = k
                    settled = False
                    reached_at[h] = t
                    path[h] = trail[k]
            i = j
        level[h] = best
        open_start[h] = start[1:].max()
        broken[h] = 0 < best < steps and start[best] == UNSET and not settled


@compiled
def strict_histories(
    bounds: Ints,
    time: Ints,
    mask: Ints,
    lowest: Ints,
    window: int,
    steps: int,
    first_only: bool,
    later: bool,
    has_optional: bool,
    took: Ints,
    gap: Ints,
    level: Ints,
    reached_at: Ints,
    open_start: Ints,
    path: Ints,
) -> None:
    """Count strict funnels: an event that is not of the step where a chain stands carries it on or ends it.

    Events of one instant are taken one by one: those that are no step first, then by their first step.
    Arguments as in ordered_histories.
    """
    start = np.empty(steps + 1, np.int64)
    since = np.empty(steps + 1, np.int64)
    trail = np.empty((steps + 1, steps), np.int64)
    # Strictly later: what came to its step in this very instant waits here and cannot be carried on before the next.
    fresh = np.empty(steps + 1, np.int64)
    fresh_trail = np.empty((steps + 1, steps), np.int64)
    for h in range(len(bounds) - 1):
        start[:] = UNSET
        fresh[:] = UNSET
        best = 0
        i = bounds[h]
        end = bounds[h + 1]
        while i < end and (best < steps or has_optional):
            t = time[i]
            j = i
            reached = 0
            others = False
            while j < end and time[j] == t:
                reached |= mask[j]
                others = others or mask[j] == 0
                j += 1
            if others:
                start[:] = UNSET
            for lead in range(1, steps + 1):
                if not (reached >> (lead - 1)) & 1:
                    continue
                for row in range(i, j):
                    m = mask[row]
                    if not (m >> (lead - 1)) & 1 or m & ((1 << (lead - 1)) - 1):
                        continue
                    for k in range(lead, steps + 1):
                        if not (m >> (k - 1)) & 1:
                            continue
                        source = 0
                        if k > 1:
                            source = _source(start, lowest[k - 1], k)
                            if source == 0 or t - start[source] > window:
                                continue
                            came = start[source]
                            begun = since[source]
                        elif first_only and took[h, 0] >= 0:
                            continue
                        else:
                            came = t
                            begun = t
                        if took[h, k - 1] < 0:
                            took[h, k - 1] = t - came
                            gap[h, k - 1] = t - begun
                        if came <= (fresh[k] if later else start[k]):
                            continue
                        into = fresh_trail if later else trail
                        for s in range(steps):
                            into[k, s] = trail[source, s] if source else -1
                        into[k, k - 1] = row
                        if later:
                            fresh[k] = came
                        else:
                            start[k] = came
                            since[k] = t
                        if k > best:
                            best = k
                            reached_at[h] = t
                            path[h] = into[k]
                    for k in range(1, steps + 1):
                        if not (m >> (k - 1)) & 1:
                            start[k] = UNSET
                            fresh[k] = UNSET
            for k in range(1, steps + 1):
                if fresh[k] != UNSET:
                    if fresh[k] > start[k]:
                        start[k] = fresh[k]
                        since[k] = t
                        trail[k] = fresh_trail[k]
                    fresh[k] = UNSET
            i = j
        level[h] = best
        open_start[h] = start[1:].max()


@compiled
def _source(start: Ints, lowest: int, k: int) -> int:
    """The step before k with the latest start, the higher one when they are equal; 0 when no chain stands there."""
    source = 0
    latest = UNSET
    for q in range(k - 1, lowest - 1, -1):
        if start[q] > latest:
            latest = start[q]
            source = q
    return source


@compiled
def unordered_histories(
    bounds: Ints,
    time: Ints,
    mask: Ints,
    window: int,
    steps: int,
    first_only: bool,
    capacity: int,
    took: Ints,
    gap: Ints,
    level: Ints,
    reached_at: Ints,
    open_start: Ints,
    path: Ints,
) -> None:
    """Count unordered funnels: the most steps that distinct events match inside one window.

    At each instant the events of the window that ends there are taken from the latest back, and each one joins when all
    that joined can still be matched to distinct steps (an augmenting path). Sets that can be matched are a transversal
    matroid, so this gives the latest start for every number of steps.

    Args:
        capacity: the sum, over the different masks, of the steps in each: of events alike no more are ever needed.
        The others as in ordered_histories; `took[h, n-1]` is of the first window with n steps.
    """
    owner = np.empty(steps, np.int64)  # by step, the row that is matched to it
    parent = np.empty(steps, np.int64)
    queue = np.empty(steps, np.int64)
    recent = np.empty(capacity + 1, np.int64)  # rows that may still matter, oldest first
    for h in range(len(bounds) - 1):
        best = 0
        kept = 0
        opening = UNSET
        latest = UNSET
        last_gain = 0
        i = bounds[h]
        end = bounds[h + 1]
        while i < end and best < steps:
            t = time[i]
            if first_only and opening != UNSET and t - opening > window:
                break
            before = kept
            while i < end and time[i] == t:
                if mask[i]:
                    kept = _keep(recent, kept, i, mask, steps, first_only)
                    before = -1
                i += 1
            if before >= 0:
                continue  # nothing but other events
            if opening == UNSET:
                opening = t
            latest = opening if first_only else t
            owner[:] = -1
            matched = 0
            for turn in range(kept):
                # From the latest back, for the latest start; a window that is fixed is taken from its first event on.
                row = recent[turn if first_only else kept - 1 - turn]
                if t - time[row] > window:
                    break
                if not _augment(row, mask, owner, parent, queue, steps):
                    continue
                matched += 1
                if matched > best:
                    best = matched
                    took[h, best - 1] = t - (opening if first_only else time[row])
                    gap[h, best - 1] = t - last_gain if best > 1 else 0
                    last_gain = t
                    reached_at[h] = t
                    path[h] = owner
        level[h] = best
        open_start[h] = latest


@compiled
def _keep(recent: Ints, kept: int, row: int, mask: Ints, steps: int, first_only: bool) -> int:
    """Add a row to the recent ones. When there are as many of its kind as it has steps, the oldest goes, or itself."""
    m = mask[row]
    room = 0
    for k in range(steps):
        room += (m >> k) & 1
    oldest = -1
    for index in range(kept - 1, -1, -1):
        if mask[recent[index]] == m:
            room -= 1
            oldest = index
            if room == 0:
                break
    if room == 0 and first_only:
        return kept
    if room == 0:
        for index in range(oldest, kept - 1):
            recent[index] = recent[index + 1]
        kept -= 1
    recent[kept] = row
    return kept + 1


@compiled
def _augment(row: int, mask: Ints, owner: Ints, parent: Ints, queue: Ints, steps: int) -> bool:
    """Match one more row to a step, moving others to make room; whether it was possible."""
    seen = 0
    head = 0
    tail = 0
    m = mask[row]
    for s in range(steps):
        if (m >> s) & 1:
            seen |= 1 << s
            parent[s] = -1
            queue[tail] = s
            tail += 1
    while head < tail:
        s = queue[head]
        head += 1
        if owner[s] < 0:
            while parent[s] >= 0:
                owner[s] = owner[parent[s]]
                s = parent[s]
            owner[s] = row
            return True
        m = mask[owner[s]]
        for s2 in range(steps):
            if (m >> s2) & 1 and not (seen >> s2) & 1:
                seen |= 1 << s2
                parent[s2] = s
                queue[tail] = s2
                tail += 1
    return False


@compiled
def tally(
    took: Ints,
    gap: Ints,
    open_start: Ints,
    broken: Flags,
    horizon: int,
    window: int,
    steps: int,
    level: Small,
    outcome: Small,
    reached: Codes,
    counts: Ints,
    took_values: Ints,
    gap_values: Ints,
) -> None:
    """Where each unit ended, and the counts of all.

    Args:
        took, gap, open_start, broken: by unit, as the other kernels leave them.
        horizon: microseconds since 1970 UTC; a window is open when it reaches the horizon.
        level, outcome, reached: results by unit: the furthest step, one of NONE, CONVERTED, PENDING, DROPPED and
            EXCLUDED, and bit k-1 for each step k that was reached.
        counts, took_values, gap_values: results as in `summarise`.
    """
    for h in range(len(took)):
        bits = 0
        furthest = 0
        for k in range(steps):
            here = took[h, k] >= 0
            bits |= int(here) << k
            furthest = k + 1 if here else furthest
        ending = PENDING if horizon - open_start[h] <= window else DROPPED  # never pending without a start: see UNSET
        ending = EXCLUDED if broken[h] else ending
        ending = CONVERTED if furthest == steps else ending
        ending = NONE if furthest == 0 else ending
        level[h] = furthest
        outcome[h] = ending
        reached[h] = bits
        _add(took, gap, h, furthest, ending, steps, counts, took_values, gap_values)


@compiled
def summarise(
    took: Ints,
    gap: Ints,
    level: Small,
    outcome: Small,
    steps: int,
    counts: Ints,
    took_values: Ints,
    gap_values: Ints,
) -> None:
    """The counts of units whose ends are known.

    Args:
        counts: by kind and step, zeros to begin with: units by what became of them and their furthest step, and those
            that REACHED the step, WENT_ON from it (or reached the goal), and are WAITING (pending, not there yet).
        took_values, gap_values: by step, the times of the units that reached it, from the front; with room for one more
            than there are units. Not of step 1: they are all zero.
    """
    for h in range(len(took)):
        _add(took, gap, h, level[h], outcome[h], steps, counts, took_values, gap_values)


@compiled
def _add(
    took: Ints,
    gap: Ints,
    h: int,
    level: int,
    outcome: int,
    steps: int,
    counts: Ints,
    took_values: Ints,
    gap_values: Ints,
) -> None:
    """Add one unit; without branches, since what becomes of a unit cannot be foretold either."""
    counts[outcome, max(level, 1) - 1] += 1
    kept = int(outcome != EXCLUDED)
    waits = int(outcome == PENDING)
    done = int(level == steps)
    for k in range(steps):
        here = int(took[h, k] >= 0)
        reached = counts[REACHED, k]
        if k > 0:  # written at the end of the values in any case, and kept when the count moves on
            took_values[k, reached] = took[h, k]
            gap_values[k, reached] = gap[h, k]
        counts[REACHED, k] = reached + (here & kept)
        counts[WENT_ON, k] += here & kept & (int(level > k + 1) | done)
        counts[WAITING, k] += waits & (1 - here)
