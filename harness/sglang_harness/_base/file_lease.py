"""One thing, several processes, one user at a time: a lease that says who holds it."""

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

#: Seconds between two signs of life of a holder.
HEARTBEAT = 1.0


class LeaseTaken(HarnessError):
    """Somebody else has held the lease for as long as one was ready to wait."""


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
    """A file lock that the kernel gives back when its holder dies, with the holder's name and
    signs of life beside it.

    Args:
        path: of the lock; ``path.holder`` is written beside it.
        name: of whoever asks, such as ``gw1``.
    """

    def __init__(self, path: Path, name: str) -> None:
        # One lock for all threads of this process: whoever releases it need not be who took it.
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
            whoever held it before and died without giving it back; ``None`` when nobody did.

        Raises:
            LeaseTaken: the time is over; says who holds it, for what, and since when.
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
        """Gives it back. Again: nothing."""
        if not self.held:
            return
        self._over.set()
        if self._heart is not None:
            self._heart.join(HEARTBEAT)
        self._holder.unlink(missing_ok=True)
        self._lock.release()

    def holder(self) -> Holder | None:
        """Whoever is on record; ``None`` where nobody is, or the record is half written."""
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
            return LeaseTaken(f"The lease {self._lock.lock_file} was not free for {waited:g} s.")
        try:
            silent = time.time() - self._holder.stat().st_mtime
        except OSError:
            silent = 0.0
        return LeaseTaken(
            f"{holder.name} (process {holder.pid}) has held the server for "
            f"{time.time() - holder.since:.0f} s for {holder.purpose}; "
            f"its last sign of life was {silent:.0f} s ago.",
            advice="Wait longer, or give each worker a server of its own.",
        )
