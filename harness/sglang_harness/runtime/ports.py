"""TCP ports of this machine's loopback interface."""

from __future__ import annotations

import socket


class ReservedPort:
    """A free port that no other process of this machine is given before :meth:`release`.

    A server needs seconds from being told its port to listening there. Until then the port is
    bound here and not listened at: the kernel gives it to nobody who asks for any port, and a
    server that sets SO_REUSEADDR, as those of asyncio and uvicorn do, may still listen at it.

    Attributes:
        number: the port.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number = int(self._socket.getsockname()[1])

    def release(self) -> None:
        """Gives it up; a server that listens there goes on. Again: nothing."""
        self._socket.close()


def is_taken(port: int) -> bool:
    """Whether a process listens at ``port``."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
