"""TCP ports of this machine's loopback interface, each given to one server at a time.

A server listens only after it has imported SGLang, so a port that is free when it is chosen may
be anybody's seconds later. A port is therefore reserved until the server has ended, for every
process of every user in the same network namespace: by the name of an abstract socket, which the
kernel frees when the process is gone. (Where there are no such names, as on macOS, only one
process at a time is safe.)
"""

from __future__ import annotations

import random
import socket
import sys

from sglang_harness.errors import EngineError

#: Ports to choose from. Below the range that the kernel gives to clients (from 32768). Far enough
#: apart for the ports that SGLang derives from its own (+233 and on, 0.5.23), and low enough for
#: the one that 0.5.11 to 0.5.15 derive (+10000).
CANDIDATES = range(10050, 32550, 250)

#: What the names of reserved ports begin with.
NAMES = "sglang-harness/port"


class Port:
    """A reserved port."""

    def __init__(self, number: int, name: socket.socket | None) -> None:
        self.number = number
        self._name = name

    def release(self) -> None:
        """Others may have it. Called again, it does nothing."""
        if self._name is not None:
            self._name.close()


def reserve(number: int | None = None) -> Port:
    """Port ``number``, or one that is free.

    Raises:
        EngineError: something listens there, or another server was given it; or none is free.
    """
    candidates = [number] if number is not None else random.sample(CANDIDATES, len(CANDIDATES))
    for each in candidates:
        if (port := _try(each)) is not None:
            return port
    if number is not None:
        raise EngineError(f"Port {number} on 127.0.0.1 is in use.")
    raise EngineError(
        f"None of {len(CANDIDATES)} ports from {CANDIDATES[0]} to {CANDIDATES[-1]} is free.",
        advice="End servers that nobody uses: 'sglang-harness sweep' ends those of runs that are "
        "gone.",
    )


def _try(number: int) -> Port | None:
    name = None
    if sys.platform == "linux":
        name = socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0{NAMES}/{number}")
        except OSError:
            name.close()
            return None
    if is_taken(number):
        if name is not None:
            name.close()
        return None
    return Port(number, name)


def is_taken(port: int) -> bool:
    """Whether something listens at ``port``."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
