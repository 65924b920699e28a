"""Host memory of a container, by the engine's own count (cgroup v1 and v2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_harness.errors import HarnessError


class ContainerMemory:
    """Reads the counters that ``stats`` answers (the engine's ``/containers/ID/stats``)."""

    name = "container"

    def __init__(self, stats: Callable[[], dict[str, Any]]) -> None:
        self._stats = stats

    def read(self) -> tuple[int, dict[str, int]]:
        """Anonymous plus shared memory in bytes, and these two and the page cache apart.

        Raises:
            HarnessError: the engine gave no counters, as for a container that has ended.
        """
        return parse(self._stats())


def parse(stats: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Pure part of :meth:`ContainerMemory.read`."""
    counters = (stats.get("memory_stats") or {}).get("stats") or {}
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
