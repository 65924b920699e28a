"""Which process something belongs to, and whether that process still lives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from sglang_harness._base.living import is_zombie


@dataclass(frozen=True)
class Owner:
    """The process that something belongs to. While it lives, ``sweep`` leaves the thing alone.

    Attributes:
        host: host name, and behind an ``@`` the inode of the process namespace, where Linux tells
            it: a container on the host's network has the host's name, and its own process
            numbers.
        started: start of the process in whole seconds since the epoch: tells a reused pid apart.
    """

    host: str
    pid: int
    started: int

    @classmethod
    def this_process(cls) -> Owner:
        return cls(_this_host(), os.getpid(), int(psutil.Process().create_time()))

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """What :meth:`__str__` wrote; ``None`` for anything else."""
        try:
            host, pid, started = text.rsplit(":", 2)
            owner = cls(host, int(pid), int(started))
        except ValueError:
            return None
        return owner if 0 < owner.pid < 1 << 31 else None

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}:{self.started}"

    def is_gone(self) -> bool:
        """True only where this host can tell; another host's processes are never 'gone'."""
        # A record may have the name alone, of a host that told no namespace.
        if self.host not in (_this_host(), socket.gethostname()):
            return False
        try:
            process = psutil.Process(self.pid)
            # Where nobody reaps (process 1 of a CI job's container), the dead stay listed.
            if is_zombie(process):
                return True
            return abs(int(process.create_time()) - self.started) > 1
        except psutil.NoSuchProcess:
            return True


def _this_host() -> str:
    try:
        namespace = f"@{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        namespace = ""  # not Linux
    return socket.gethostname() + namespace
