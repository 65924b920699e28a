"""What the servers of a test session have cost."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Tally:
    """What a session's server has cost.

    Attributes:
        starts: seconds of each start.
        warm: how many of these were warm.
        restored: seconds of each comparison with the first state after a test, restoring included.
        replaced: why each server that could not be used any more had to be replaced.
        no_replacement: why the one after it did not come up, where that was tried.
        left: what of them could not be removed, with why.
    """

    starts: list[float] = field(default_factory=list)
    warm: int = 0
    restored: list[float] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    no_replacement: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
