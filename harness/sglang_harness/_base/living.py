"""Whether processes run, told from whether the kernel still lists them."""

from __future__ import annotations

import time
from collections.abc import Iterable

import psutil


def lives(process: psutil.Process) -> bool:
    """Whether it runs. One that has ended and waits to be reaped (a zombie, for as long as a
    container without an init process runs) does not."""
    try:
        return process.is_running() and not is_zombie(process)
    except psutil.NoSuchProcess:
        return False


def is_zombie(process: psutil.Process) -> bool:
    """Whether it has ended and waits for its parent to ask how.

    Raises:
        psutil.NoSuchProcess: it is gone.
    """
    return bool(process.status() == psutil.STATUS_ZOMBIE)


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
