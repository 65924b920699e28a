"""Samples and marks in their order. It has no clock: every time is given to it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

#: Samples kept of a source; beyond it every other one of the older half is dropped, never a peak.
KEPT = 100_000


@dataclass(frozen=True)
class Sample:
    """Bytes in use at one moment, in total and by part (by UUID for devices)."""

    seconds: float
    used: int
    parts: dict[str, int]


class Timeline:
    """The samples and marks of one source. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: list[Sample] = []
        self._marks: list[tuple[float, str]] = []

    def add(self, sample: Sample) -> None:
        """Adds a sample, which must not be older than the last one."""
        with self._lock:
            self._samples.append(sample)
            if len(self._samples) >= KEPT:
                self._thin()

    def _thin(self) -> None:
        """Keeps the higher of each two neighbours in the older half."""
        middle = len(self._samples) // 4 * 2
        older = self._samples[:middle]
        kept = [max(two, key=lambda s: s.used) for two in zip(older[::2], older[1::2], strict=True)]
        self._samples = kept + self._samples[middle:]

    def mark(self, name: str, seconds: float) -> None:
        """Names a moment. Names may repeat."""
        with self._lock:
            self._marks.append((seconds, name))

    @property
    def samples(self) -> list[Sample]:
        with self._lock:
            return list(self._samples)

    @property
    def marks(self) -> list[tuple[float, str]]:
        """Seconds and names, in order."""
        with self._lock:
            return list(self._marks)

    def between(self, after: float, before: float = float("inf")) -> list[Sample]:
        """Samples from ``after`` to ``before``, both included."""
        return [s for s in self.samples if after <= s.seconds <= before]
