"""A resource for one process at a time: a file lock with a record of its holder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from sglang_harness._base import shared_file
from sglang_harness._base.living import is_zombie
from sglang_harness.errors import HarnessError

#: Seconds between two heartbeats of a holder.
HEARTBEAT = 1.0

#: Seconds between two attempts to lock.
POLL = 0.02


class LeaseTaken(HarnessError):
    """Another process has held the lease for as long as this one was to wait."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, and for what."""

    name: str
    purpose: str
    pid: int
    started: float
    """Start of the process in seconds since the epoch: tells a reused pid apart."""
    since: float

    @classmethod
    def this_process(cls, name: str, purpose: str) -> Holder:
        me = psutil.Process()
        return cls(name, purpose, me.pid, me.create_time(), time.time())

    def is_alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return not is_zombie(process) and abs(process.create_time() - self.started) < 1
        except psutil.NoSuchProcess:
            return False


class Lease:
    """A file lock that the kernel releases when its holder dies, with the holder's name and
    heartbeat beside it.

    Args:
        path: of the lock; ``path.holder`` is written beside it.
        name: of this process, such as ``gw1``.
        what: what is leased, for messages.
        advice: what to do where it was not free.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        what: str = "the lease",
        advice: str = "Wait longer, or end that process.",
    ) -> None:
        self._what = what
        self._advice = advice
        self._path = path
        self._locked: int | None = None
        """The descriptor of the locked file."""
        self._holder = path.with_name(path.name + ".holder")
        self._name = name
        self._over = threading.Event()
        self._heart: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds it."""
        return self._locked is not None

    def acquire(self, purpose: str, *, timeout: float) -> Holder | None:
        """Waits up to ``timeout`` seconds.

        Returns:
            the previous holder, where it died without releasing the lease; else ``None``.

        Raises:
            LeaseTaken: the time is over; names the holder, its purpose, and since when.
        """
        until = time.monotonic() + timeout
        while (locked := _lock(self._path)) is None:
            if time.monotonic() >= until:
                raise self._taken(timeout)
            time.sleep(POLL)
        self._locked = locked
        before = self.holder()
        self._write(Holder.this_process(self._name, purpose))
        self._over.clear()
        self._heart = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._heart.start()
        return before

    def release(self) -> None:
        """Releases it, from any thread. Called again, it does nothing."""
        locked, self._locked = self._locked, None
        if locked is None:
            return
        self._over.set()
        if self._heart is not None:
            self._heart.join(HEARTBEAT)
        shared_file.clear(self._holder)
        # The lock is of the open file, which a child that was forked meanwhile may have, too.
        fcntl.flock(locked, fcntl.LOCK_UN)
        os.close(locked)

    def holder(self) -> Holder | None:
        """The holder on record; ``None`` where there is none, or the record is half written."""
        try:
            return Holder(**json.loads(self._holder.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _write(self, holder: Holder) -> None:
        shared_file.write(self._holder, json.dumps(asdict(holder)))

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self._holder)

    def _taken(self, waited: float) -> LeaseTaken:
        holder = self.holder()
        if holder is None:
            return LeaseTaken(
                f"{self._what[:1].upper()}{self._what[1:]} was not free within {waited:g} s "
                f"({self._path})."
            )
        try:
            silent = time.time() - self._holder.stat().st_mtime
        except OSError:
            silent = 0.0
        return LeaseTaken(
            f"{holder.name} (process {holder.pid}) has held {self._what} for "
            f"{time.time() - holder.since:.0f} s for {holder.purpose}; "
            f"last heartbeat {silent:.0f} s ago.",
            advice=self._advice,
        )


def _lock(path: Path) -> int | None:
    """The descriptor of ``path``, locked; ``None``: another has it.

    Another user's file may be locked as well, in a folder with the sticky bit, too: there its owner
    alone could remove it, and packages for file locks refuse it for that.

    Raises:
        OSError: it cannot be opened, or is a link.
    """
    descriptor = shared_file.opened(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A lock of a file that was removed meanwhile excludes nobody.
        if os.fstat(descriptor).st_nlink:
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
