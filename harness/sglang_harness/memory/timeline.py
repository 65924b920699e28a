"""Samples and marks in their order, and what was highest between them. Knows no clock but the
seconds it is given."""

from __future__ import annotations

import threading
from dataclasses import dataclass

#: So many samples of a source are kept; then every other one of the older half goes. Peaks stay.
KEPT = 100_000


@dataclass(frozen=True)
class Sample:
    """Bytes in use at one moment, whole and by part (by UUID for devices)."""

    seconds: float
    used: int
    parts: dict[str, int]


class Timeline:
    """What one source read, and when. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: list[Sample] = []
        self._marks: list[tuple[float, str]] = []

    def add(self, sample: Sample) -> None:
        """Samples come in the order of their seconds."""
        with self._lock:
            self._samples.append(sample)
            if len(self._samples) >= KEPT:
                self._thin()

    def _thin(self) -> None:
        """Of each two neighbours in the older half the higher one stays."""
        middle = len(self._samples) // 4 * 2
        older = self._samples[:middle]
        kept = [max(two, key=lambda s: s.used) for two in zip(older[::2], older[1::2], strict=True)]
        self._samples = kept + self._samples[middle:]

    def mark(self, name: str, seconds: float) -> None:
        """Names a moment. A name may come again: the last one counts."""
        with self._lock:
            self._marks.append((seconds, name))

    @property
    def samples(self) -> list[Sample]:
        with self._lock:
            return list(self._samples)

    @property
    def marks(self) -> list[tuple[float, str]]:
        """Seconds and names, in their order."""
        with self._lock:
            return list(self._marks)

    def at(self, mark: str) -> float:
        """Seconds of the last mark of that name.

        Raises:
            KeyError: there is none.
        """
        for seconds, name in reversed(self.marks):
            if name == mark:
                return seconds
        raise KeyError(f"no mark {mark!r}")

    def between(self, after: float, before: float = float("inf")) -> list[Sample]:
        """Samples from ``after`` to ``before``, both included."""
        return [s for s in self.samples if after <= s.seconds <= before]

    def peak(self, after: float, before: float = float("inf")) -> int:
        """The highest use from ``after`` to ``before``, in bytes.

        Raises:
            ValueError: nothing was read in between, so nothing is known.
        """
        found = self.between(after, before)
        if not found:
            raise ValueError(f"no sample between {after:.3f} s and {before:.3f} s")
        return max(s.used for s in found)
