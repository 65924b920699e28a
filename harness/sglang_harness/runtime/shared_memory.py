"""What servers that were killed leave in ``/dev/shm``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

FOLDER = Path("/dev/shm")  # noqa: S108

#: What SGLang names the segments that its processes share (0.5.15 to 0.5.23,
#: ``srt/managers/load_snapshot.py``) and Python its semaphores. Neither name says whose it is, and
#: each is open or mapped in some process for as long as it is in use.
UNNAMED = ("sglang_loads_", "sem.mp-")

#: Seconds by which a file's time may be before the clock that was read earlier.
CLOCKS = 1.0


def remove(pids: Iterable[int], since: float) -> None:
    """Removes segments of processes that have ended: torch's by their number (``torch_PID_...``),
    SGLang's and Python's where no process has them any more.

    Args:
        pids: of the processes.
        since: seconds since the epoch: what is older is not theirs.
    """
    remove_torchs(pids)
    ours = []
    for path in FOLDER.iterdir():
        if path.name.startswith(UNNAMED):
            with suppress(FileNotFoundError):
                about = path.stat()
                if about.st_uid == os.getuid() and about.st_ctime >= since - CLOCKS:
                    ours.append(path)
    in_use = _in_use() if ours else set()
    for path in ours:
        if str(path) not in in_use:
            path.unlink(missing_ok=True)


def remove_torchs(pids: Iterable[int], folder: Path = FOLDER) -> None:
    """Removes torch's segments of processes that have gone (``torch_PID_...``)."""
    for pid in pids:
        for segment in folder.glob(f"torch_{pid}_*"):
            segment.unlink(missing_ok=True)


def _in_use() -> set[str]:
    """Files in the folder that a process has open or mapped, of those that this user may ask."""
    found = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    found.add(str(descriptor.readlink()))
        with suppress(OSError):
            for line in (process / "maps").read_text(errors="replace").splitlines():
                if str(FOLDER) in line:
                    found.add(line[line.index(str(FOLDER)) :])
    return found
