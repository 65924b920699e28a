"""Host memory of processes by the kernel's proportional count (Linux only)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from sglang_harness.errors import HarnessError

#: The kernel's names for the parts of a reading.
FIELDS = {"Pss_Anon": "anonymous", "Pss_Shmem": "shared", "Pss_File": "page_cache"}


class ProcessMemory:
    """Memory of the processes that ``pids`` names at each reading."""

    name = "process"

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self._pids = pids

    def read(self) -> tuple[int, dict[str, int]]:
        """Anonymous plus shared memory in bytes, pages that several of them share counted once;
        and these two and mapped files apart.

        Raises:
            HarnessError: not one process could be read, as when all have ended.
        """
        parts = dict.fromkeys(FIELDS.values(), 0)
        read = 0
        for pid in self._pids():
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
            except OSError:
                continue  # ended meanwhile
            read += 1
            for line in rollup.splitlines():
                name, _, rest = line.partition(":")
                if name in FIELDS:
                    parts[FIELDS[name]] += int(rest.split()[0]) * 1024
        if not read:
            raise HarnessError(
                "The memory of the server's processes cannot be read.",
                advice="They have ended, or this user may not look at them.",
            )
        return parts["anonymous"] + parts["shared"], parts
