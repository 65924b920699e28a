"""Host memory of a container, by the kernel's own count of its cgroup (v1 and v2)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sglang_harness.errors import HarnessError

#: Where Linux has the counters of all cgroups.
CGROUPS = Path("/sys/fs/cgroup")

#: The folder of a container below it: cgroup v1 and v2, with the engine's driver ``cgroupfs`` and
#: with ``systemd``.
_FOLDERS = (
    "memory/docker/{id}",
    "memory/system.slice/docker-{id}.scope",
    "docker/{id}",
    "system.slice/docker-{id}.scope",
)


class ContainerMemory:
    """Reads the counters that ``stats`` answers (the engine's ``/containers/ID/stats``); or, where
    the container runs on this very kernel, the file that the engine reads them from. An engine
    answers once a second (20.10), the file at once.

    Args:
        cgroups: where the kernel's counters are.
    """

    name = "container"

    def __init__(self, stats: Callable[[], dict[str, Any]], *, cgroups: Path = CGROUPS) -> None:
        self._stats = stats
        self._cgroups = cgroups
        self._file: Path | None = None

    def read(self) -> tuple[int, dict[str, int]]:
        """Anonymous plus shared memory in bytes, and these two and the page cache apart.

        Raises:
            HarnessError: the engine gave no counters, as for a container that has ended.
        """
        if self._file is not None:
            with suppress(OSError, ValueError, HarnessError):
                used, parts = _parts(_counters(self._file))
                if used:
                    return used, parts
            # Ended, which the engine is to say.
            self._file = None
        told = self._stats()
        self._file = self._kept_by_the_kernel(str(told.get("id") or ""))
        return parse(told)

    def _kept_by_the_kernel(self, container: str) -> Path | None:
        # The whole id, by which no other container anywhere goes.
        if not re.fullmatch(r"[0-9a-f]{64}", container):
            return None
        files = (self._cgroups / each.format(id=container) / "memory.stat" for each in _FOLDERS)
        return next((file for file in files if file.is_file()), None)


def parse(stats: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Pure part of :meth:`ContainerMemory.read`, from the engine's answer."""
    return _parts((stats.get("memory_stats") or {}).get("stats") or {})


def _counters(file: Path) -> dict[str, int]:
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {name: int(value) for name, value in lines}


def _parts(counters: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    if "anon" in counters:  # cgroup v2
        anonymous, shared, cache = counters["anon"], counters["shmem"], counters["file"]
    elif "total_rss" in counters:  # cgroup v1: tmpfs and /dev/shm are inside 'cache'
        anonymous = counters["total_rss"]
        shared = counters.get("total_shmem", counters.get("shmem", 0))
        cache = counters["total_cache"]
    else:
        raise HarnessError(
            "The engine gives no memory counters for the container.",
            advice="It has ended, or the engine's host keeps no memory cgroup.",
        )
    parts = {"anonymous": int(anonymous), "shared": int(shared), "page_cache": int(cache - shared)}
    return parts["anonymous"] + parts["shared"], parts
