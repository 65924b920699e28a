"""How much memory, disk and computing time this process may take: of the machine, of the control
groups (containers, batch jobs, systemd units) that it runs in, and of a folder's file system."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

#: File systems whose files are memory.
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")

#: cgroup v1 states 'no limit' as the largest multiple of a page below 2^63.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Memory:
    """What may still be taken.

    Attributes:
        available: bytes, those included that the kernel gets back from its file caches.
        limited_by: whose limit comes first, for messages: ``this machine``, or the memory limit
            of a control group with its size.
    """

    available: int
    limited_by: str


@dataclass(frozen=True)
class DiskRoom:
    """A folder's file system.

    Attributes:
        folder: the one asked about.
        free: bytes that this user may still write there.
        in_memory: the file system is a tmpfs: what is written there is taken from memory.
    """

    folder: Path
    free: int
    in_memory: bool


def memory(
    *, groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> Memory:
    """What this process may still take.

    A container that runs on a large machine sees all of its memory in ``/proc/meminfo`` and is
    killed at its own limit: the limits of all control groups around the process count (v2:
    ``memory.max``, v1: ``memory.limit_in_bytes``).

    Args:
        groups: the control groups of the process, as the kernel lists them.
        mount: where the control groups' file systems are mounted.
    """
    least = Memory(psutil.virtual_memory().available, "this machine")
    for folder, is_v2 in _around(groups, mount, "memory"):
        limit, used = _limit_and_use(folder, is_v2)
        if limit is not None and (left := max(0, limit - used)) < least.available:
            least = Memory(left, f"a memory limit of {limit / 1e9:.1f} GB (control group)")
    return least


def cores(*, groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """How many cores' time this process may take, at least 1: more threads that compute than that
    only take turns.

    Of the cores that it is bound to, as many as the control groups around it give time for (v2:
    ``cpu.max``, v1: ``cpu.cfs_quota_us`` of ``cpu.cfs_period_us``): a container that may use two
    cores' time of a large machine sees all of its cores.

    Args:
        groups: as of :func:`memory`.
        mount: as of :func:`memory`.
    """
    try:
        most = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        most = os.cpu_count() or 1
    for folder, is_v2 in _around(groups, mount, "cpu"):
        share = _share(folder, is_v2)
        if share is not None:
            most = min(most, math.ceil(share))
    return max(1, most)


def _share(folder: Path, is_v2: bool) -> float | None:
    """Cores' time that a group may take; ``None``: as much as there is."""
    try:
        if is_v2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = (
                (folder / name).read_text().strip() for name in ("cpu.cfs_quota_us", _PERIOD)
            )
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


_PERIOD = "cpu.cfs_period_us"


def disk(folder: Path) -> DiskRoom:
    """The file system that ``folder`` is on, or will be on when it is made."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    there = there.resolve()
    mounted = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    kind = next((mounted[each] for each in (there, *there.parents) if each in mounted), "")
    return DiskRoom(folder, shutil.disk_usage(there).free, kind in _IN_MEMORY)


def _around(groups: Path, mount: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of the groups of ``controller`` that the process is in, innermost first; and whether
    they are v2's."""
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        is_v2 = number == "0" and not controllers
        if not is_v2 and controller not in controllers.split(","):
            continue
        roots = (mount, mount / "unified") if is_v2 else (mount / controller, mount / controllers)
        inner = path.strip().lstrip("/")
        for root in roots:
            # In a container the path may be the host's, and the root the container's own group.
            for each in (root / inner, *(root / inner).parents):
                if each.is_relative_to(root):
                    yield each, is_v2


def _limit_and_use(folder: Path, is_v2: bool) -> tuple[int | None, int]:
    """Bytes; the limit is ``None`` where there is none. File caches are not in use: the kernel
    gives them up for the asking."""
    names = ("memory.max", "memory.current") if is_v2 else _V1
    try:
        limit, used = ((folder / name).read_text().strip() for name in names)
        if limit == "max" or int(limit) >= _NO_LIMIT:
            return None, 0
        pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
        total = "" if is_v2 else "total_"
        cached = stat.get(f"{total}inactive_file", 0) + stat.get(f"{total}active_file", 0)
        cached += stat.get("slab_reclaimable", 0)  # v2 alone tells it: names and places of files
        return int(limit), max(0, int(used) - cached)
    except (OSError, ValueError):
        return None, 0


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
