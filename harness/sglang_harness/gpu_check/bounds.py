"""The bounds of memory that the harness uses, beside what was seen here, so that a run on a GPU
says which of them to change. It changes none of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sglang_harness.memory.gpu import guard
from sglang_harness.suite.checks.memory import release

MIB = 1 << 20


@dataclass(frozen=True)
class Bound:
    """One bound and what was seen of what it bounds.

    Attributes:
        where: the constant.
        in_use: what it is now, in bytes.
        seen: the largest that was seen here; ``None``: nothing was.
        step: a proposal is a multiple of it.
    """

    where: str
    in_use: int
    seen: int | None
    step: int = 32 * MIB

    @property
    def proposed(self) -> int | None:
        """Twice what was seen, in whole steps, one at least."""
        if self.seen is None:
            return None
        return max(1, math.ceil(2 * max(0, self.seen) / self.step)) * self.step

    @property
    def holds(self) -> bool:
        """What was seen is within the bound in use."""
        return self.seen is None or self.seen <= self.in_use

    def told(self) -> dict[str, Any]:
        return {
            "constant": self.where,
            "in_use_mib": _mib(self.in_use),
            "seen_mib": None if self.seen is None else _mib(self.seen),
            "proposed_mib": None if self.proposed is None else _mib(self.proposed),
            "holds": self.holds,
        }


def idle(used: Iterable[int], *, first_call_only: bool) -> Bound:
    """Bytes in use on each GPU before a server started, against the harness's own bound, whatever
    a variable of this run has set."""
    name = "IDLE_BELOW_FIRST_CALL" if first_call_only else "IDLE_BELOW"
    in_use = guard.IDLE_BELOW_FIRST_CALL if first_call_only else guard.IDLE_BELOW
    return Bound(f"memory/gpu/guard.py {name}", in_use, max(used, default=None))


def residue(left: Iterable[int]) -> Bound:
    """Bytes on each GPU above what it held before, once a server had ended."""
    return Bound(
        "memory/gpu/guard.py GIVEN_BACK_WITHIN", guard.GIVEN_BACK_WITHIN, max(left, default=None)
    )


def of_release(deviations: Iterable[tuple[int, int]]) -> Bound:
    """How far each release or resume was off, and what the server had said that it holds; of the
    pair that comes nearest to its own tolerance, or exceeds it most."""
    pairs = [(max(0, off), said) for off, said in deviations]
    where = "suite/checks/memory/release.py tolerance() (32 MiB + 2 %)"
    if not pairs:
        return Bound(where, release.tolerance(0), None, 8 * MIB)
    off, said = max(pairs, key=lambda pair: pair[0] / release.tolerance(pair[1]))
    return Bound(where, release.tolerance(said), off, 8 * MIB)


def _mib(size: int) -> float:
    return round(size / MIB, 1)
