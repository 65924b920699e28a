"""A process of this machine with everything that it has started, until all of it has ended."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable
from contextlib import suppress

import psutil


class ProcessFamily:
    """A process and its descendants, as far as they were seen. May be used from many threads.

    A descendant whose parent has ended is no longer below the main process, so it is remembered
    from earlier looks.

    Args:
        pid: of the main process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._lock = threading.Lock()
        self._seen: dict[int, psutil.Process] = {}

    def living(self) -> list[psutil.Process]:
        """Looks for new ones; returns those that run, the main process first."""
        found: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self._pid)
            found = [main, *main.children(recursive=True)]
        with self._lock:
            self._seen |= {each.pid: each for each in found}
            seen = list(self._seen.values())
        return [each for each in seen if lives(each)]

    def pids(self) -> list[int]:
        """All that were ever seen, whether they run or not."""
        with self._lock:
            return list(self._seen)

    def kill(self, *, within: float) -> list[psutil.Process]:
        """SIGKILL for all that run; returns those that still do after ``within`` seconds."""
        for each in self.living():
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
        return until_gone(self.living(), within)


def lives(process: psutil.Process) -> bool:
    """Whether it runs. One that has ended and waits to be reaped (a zombie, for as long as a
    container without an init process runs) does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def lives_as(pid: int) -> bool:
    """:func:`lives`, of the process that has this number now."""
    try:
        return lives(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def until_gone(processes: Iterable[psutil.Process], within: float) -> list[psutil.Process]:
    """Waits until all have ended; returns those that run after ``within`` seconds.

    Reaps nothing, unlike ``psutil.wait_procs``: the exit code belongs to the one that started the
    process.
    """
    until = time.monotonic() + within
    left = list(processes)
    while True:
        left = [each for each in left if lives(each)]
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.02)
