"""A process of this machine with everything that it has started, until all of it has ended."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress

import psutil

from sglang_harness._base.living import is_zombie, lives, until_gone


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
        left = until_gone(self.living(), within)
        self.reap()
        return left

    def reap(self) -> None:
        """Takes the exit codes of descendants that have become children of this process, because
        their own parents ended first: of one that is process 1 of a container, or adopts orphans
        (:func:`sglang_harness._base.descent.adopting_orphans`). Nobody else would, and they would
        stay as zombies. The main process is left to whoever started it."""
        with self._lock:
            seen = [each for each in self._seen.values() if each.pid != self._pid]
        for each in seen:
            with suppress(psutil.NoSuchProcess, ChildProcessError):
                if is_zombie(each) and each.ppid() == os.getpid():
                    os.waitpid(each.pid, os.WNOHANG)
