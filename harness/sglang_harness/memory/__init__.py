"""The memory of a server: where it is read, and the readings at named marks."""

from __future__ import annotations

import time
from typing import Protocol

from sglang_harness.memory.sampler import RATE, Sampler
from sglang_harness.memory.timeline import Sample, Timeline
from sglang_harness.verdict import Reading

__all__ = ["MemoryLedger", "MemorySource", "Sample", "Timeline", "WatchedSource"]


class MemorySource(Protocol):
    """Something that reports how much memory is in use now."""

    name: str

    def read(self) -> tuple[int, dict[str, int]]:
        """Bytes in use, and the parts; raises :class:`HarnessError` if they cannot be read."""


class WatchedSource(MemorySource, Protocol):
    """A source that can be sampled: an error of one part does not hide the others.

    Attributes:
        first_call_only: the driver has only the first version of the memory call, which counts
            memory that the driver reserves as used.
    """

    first_call_only: bool

    def read_partly(self) -> tuple[int, dict[str, int], list[str]]:
        """Bytes in use, the parts that could be read, and the reasons for those that could not;
        raises :class:`HarnessError` if nothing could be read."""


class MemoryLedger:
    """Reads every source at named marks and keeps the readings in order.

    :meth:`watch` samples a source between the marks, in a thread and at its own rate.
    """

    def __init__(self, sources: list[MemorySource]) -> None:
        self._sources = sources
        self._began = time.monotonic()
        self._watched: list[WatchedSource] = []
        self._samplers: dict[str, Sampler] = {}
        self.readings: list[Reading] = []
        self.timelines: dict[str, Timeline] = {}
        """By source: its samples, where it is watched."""

    @property
    def source_names(self) -> list[str]:
        return [source.name for source in self._sources]

    @property
    def first_call_only(self) -> bool:
        """See :class:`WatchedSource`; true where one of them says so."""
        return any(source.first_call_only for source in self._watched)

    def source(self, name: str) -> MemorySource:
        """The source of that name.

        Raises:
            KeyError: no source has that name.
        """
        for source in self._sources:
            if source.name == name:
                return source
        raise KeyError(f"no source {name!r} among {self.source_names}")

    def now(self) -> float:
        """Seconds since the ledger began."""
        return time.monotonic() - self._began

    def mark(self, name: str, *, only: list[MemorySource] | None = None) -> list[Reading]:
        """Reads every source (or ``only`` these) now under ``name``."""
        now = []
        for source in self._sources if only is None else only:
            used, parts = source.read()
            seconds = self.now()
            now.append(
                Reading(
                    mark=name,
                    seconds=seconds,
                    source=source.name,
                    used_bytes=used,
                    parts=parts,
                    peak_bytes=self._peak(source.name, seconds, used),
                )
            )
        for reading in now:
            if reading.source in self.timelines:
                self.timelines[reading.source].mark(name, reading.seconds)
        self.readings += now
        return now

    def _peak(self, source: str, seconds: float, used: int) -> int | None:
        timeline = self.timelines.get(source)
        if timeline is None:
            return None
        marks = timeline.marks
        since = marks[-1][0] if marks else 0.0
        return max([used, *(s.used for s in timeline.between(since, seconds))])

    def watch(self, source: WatchedSource, *, rate: float = RATE) -> Sampler:
        """Samples ``source`` from now on, ``rate`` times a second, until :meth:`close`. A lost
        device is a gap in the samples, and the others continue."""
        timeline = self.timelines.setdefault(source.name, Timeline())
        sampler = Sampler(source.read_partly, timeline.add, rate=rate, clock=self.now)
        self._watched.append(source)
        self._samplers[source.name] = sampler
        return sampler.start()

    @property
    def samplers(self) -> dict[str, Sampler]:
        """By source: the sampler that watches it, or watched it."""
        return dict(self._samplers)

    def close(self) -> None:
        """Stops the sampling and keeps the readings."""
        for sampler in self._samplers.values():
            sampler.stop()
