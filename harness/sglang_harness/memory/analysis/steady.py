"""Waits until memory use is stable. A release answers before the memory is free, so the time
between the two is a figure of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Settled:
    """Memory use once it was stable, or when the wait ended.

    Attributes:
        parts: bytes by part at the end (by UUID for devices).
        used: their sum.
        reached: the expected state was reached; true where none was given.
        flat: it was stable for as long as was asked.
        seconds: from ``since`` to the start of the stable phase: for a release, the time from the
            answer to free memory.
        waited: seconds in total.
    """

    parts: dict[str, int]
    used: int
    reached: bool
    flat: bool
    seconds: float
    waited: float


def settle(
    read: Callable[[], tuple[int, dict[str, int]]],
    *,
    reached: Callable[[dict[str, int]], bool] = lambda _: True,
    within: int = 4 * MIB,
    flat_for: float = 0.5,
    timeout: float = 20.0,
    every: float = 0.05,
    since: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Settled:
    """Reads until memory is where it should be and stable, ``timeout`` seconds at most.

    Args:
        read: as of a :class:`sglang_harness.memory.MemorySource`; its errors propagate.
        reached: whether memory is where it should be, because memory that has not begun to fall is
            stable too.
        within: bytes that each part may change by and still count as stable.
        flat_for: seconds that it has to be stable.
        since: ``clock()`` when the server answered; ``None``: now.

    Returns:
        The last reading, whether or not the expected state was reached.
    """
    began = clock()
    origin = began if since is None else since
    seen: list[tuple[float, dict[str, int]]] = []
    while True:
        used, parts = read()
        now = clock()
        seen.append((now, parts))
        rest = _at_rest_since(seen, within)
        flat = now - rest >= flat_for
        arrived = reached(parts)
        if (flat and arrived) or now - began >= timeout:
            return Settled(
                parts=parts,
                used=used,
                reached=arrived,
                flat=flat,
                seconds=max(0.0, rest - origin),
                waited=now - began,
            )
        sleep(every)


def _at_rest_since(seen: list[tuple[float, dict[str, int]]], within: int) -> float:
    """Start of the last period in which no part changed by more than ``within``."""
    last = seen[-1][1]
    low, high = dict(last), dict(last)
    rest = seen[-1][0]
    for when, parts in reversed(seen):
        if parts.keys() != last.keys():
            break
        for name, used in parts.items():
            low[name], high[name] = min(low[name], used), max(high[name], used)
        if any(high[n] - low[n] > within for n in last):
            break
        rest = when
    return rest
