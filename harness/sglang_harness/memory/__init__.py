"""Where a server's memory is read, and what was read when."""

from __future__ import annotations

import time
from typing import Protocol

from pydantic import BaseModel, ConfigDict


class Reading(BaseModel):
    """Memory at one moment, all figures in bytes.

    Attributes:
        source: ``nvml`` (whole GPUs, by UUID) or ``container`` (host memory of the server's
            container as the kernel counts it).
        used_bytes: the figure to compare: device memory in use for ``nvml``; anonymous plus
            shared memory for ``container`` (page cache is not counted: the kernel takes it
            back by itself).
        parts: what it is made of.
    """

    model_config = ConfigDict(frozen=True)

    mark: str
    seconds: float
    """Since the ledger began."""
    source: str
    used_bytes: int
    parts: dict[str, int]


class MemorySource(Protocol):
    """Something that can be asked how much memory is in use now."""

    name: str

    def read(self) -> tuple[int, dict[str, int]]:
        """Bytes in use, and the parts; raises :class:`HarnessError` when it cannot."""


class MemoryLedger:
    """Reads every source at named marks and keeps the readings in order."""

    def __init__(self, sources: list[MemorySource]) -> None:
        self._sources = sources
        self._began = time.monotonic()
        self.readings: list[Reading] = []

    @property
    def source_names(self) -> list[str]:
        return [source.name for source in self._sources]

    def mark(self, name: str, *, only: list[MemorySource] | None = None) -> list[Reading]:
        """Reads every source (or ``only`` these) now under ``name``."""
        now = []
        for source in self._sources if only is None else only:
            used, parts = source.read()
            seconds = time.monotonic() - self._began
            now.append(
                Reading(
                    mark=name, seconds=seconds, source=source.name, used_bytes=used, parts=parts
                )
            )
        self.readings += now
        return now
