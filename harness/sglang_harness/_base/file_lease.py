"""A resource for one process at a time: a file lock with a record of its holder."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from sglang_harness.errors import HarnessError

#: Seconds between two heartbeats of a holder.
HEARTBEAT = 1.0


class LeaseTaken(HarnessError):
    """Another process held the lease for all of the time that there was to wait."""


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
            alive = process.status() != psutil.STATUS_ZOMBIE
            return alive and abs(process.create_time() - self.started) < 1
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
        # One lock for all threads of this process: another one than took it may release it.
        self._lock = FileLock(path, thread_local=False)
        self._holder = path.with_name(path.name + ".holder")
        self._name = name
        self._over = threading.Event()
        self._heart: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds it."""
        return bool(self._lock.is_locked)

    def acquire(self, purpose: str, *, timeout: float) -> Holder | None:
        """Waits up to ``timeout`` seconds.

        Returns:
            the previous holder, where it died without releasing the lease; else ``None``.

        Raises:
            LeaseTaken: the time is over; names the holder, its purpose, and since when.
        """
        try:
            self._lock.acquire(timeout=timeout, poll_interval=0.02)
        except Timeout:
            raise self._taken(timeout) from None
        before = self.holder()
        self._write(Holder.this_process(self._name, purpose))
        self._over.clear()
        self._heart = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._heart.start()
        return before

    def release(self) -> None:
        """Releases it. Called again, it does nothing."""
        if not self.held:
            return
        self._over.set()
        if self._heart is not None:
            self._heart.join(HEARTBEAT)
        try:
            self._holder.unlink(missing_ok=True)
        finally:
            self._lock.release()

    def holder(self) -> Holder | None:
        """The holder on record; ``None`` where there is none, or the record is half written."""
        try:
            return Holder(**json.loads(self._holder.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _write(self, holder: Holder) -> None:
        beside = self._holder.with_name(f"{self._holder.name}.{os.getpid()}")
        beside.write_text(json.dumps(asdict(holder)), encoding="utf-8")
        beside.replace(self._holder)

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self._holder)

    def _taken(self, waited: float) -> LeaseTaken:
        holder = self.holder()
        if holder is None:
            return LeaseTaken(
                f"{self._what[:1].upper()}{self._what[1:]} was not free within {waited:g} s "
                f"({self._lock.lock_file})."
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
