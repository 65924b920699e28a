"""TCP ports of this machine's loopback interface, each given to one server at a time.

A server listens only after it has imported SGLang, so a port that is free when it is chosen may
be anybody's seconds later. A port is therefore reserved until the server has ended, for every
process of every user in the same network namespace: by the name of an abstract socket, which the
kernel frees when the process is gone. (Where there are no such names, as on macOS, only one
process at a time is safe.)

An SGLang server takes more ports than its own, at fixed distances from it (:data:`BESIDE`). A port
that is chosen here has all of them valid, free, and apart from those of every other candidate.
"""

from __future__ import annotations

import random
import re
import socket
import sys
from collections.abc import Iterable, Mapping

from sglang_harness.errors import EngineError

#: The highest port.
HIGHEST = 65535

#: Distance of the gRPC port (``srt/server_args.py``). 0.5.11 to 0.5.15 refuse to start where it is
#: above 65535, whether they use it or not; 0.5.10 has none, and from 0.5.16 on only a server that
#: was asked for gRPC has one.
GRPC = 10000
_GRPC_ALWAYS = ((0, 5, 11), (0, 5, 15))

#: Distances of all ports that SGLang 0.5.10 to 0.5.23 derive from ``--port``
#: (``srt/server_args.py``, ``srt/managers/data_parallel_controller.py``,
#: ``srt/entrypoints/grpc_server.py``): metrics of a gRPC server; handshake of data-parallel
#: controllers; the rendezvous of data-parallel attention, its six message queues and, with the
#: Rust server, one for each of eight ranks; gRPC.
BESIDE = (1, 13, *range(233, 248), GRPC)

#: Ports to choose from. With all of :data:`BESIDE` below the range that the kernel gives to
#: clients (from 32768), and at such distances that no two candidates have a port in common.
CANDIDATES = range(10050, 22700, 256)

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
    """Port ``number``, or one that is free with every port that SGLang may take beside it.

    Raises:
        EngineError: something listens there, or another server was given it; or none is free.
    """
    if number is not None:
        # Which of the others it needs depends on its flags: it says so itself.
        if (port := _try(number)) is not None:
            return port
        raise EngineError(f"Port {number} on 127.0.0.1 is in use.")
    for each in random.sample(CANDIDATES, len(CANDIDATES)):
        if (port := _try(each, BESIDE)) is not None:
            return port
    raise EngineError(
        f"None of {len(CANDIDATES)} ports from {CANDIDATES[0]} to {CANDIDATES[-1]} is free.",
        advice="End servers that nobody uses: 'sglang-harness sweep' ends those of runs that are "
        "gone.",
    )


def why_unusable(number: int, version: str | None, environment: Mapping[str, str]) -> str | None:
    """Why SGLang ``version`` would end at once with ``--port number``, as the rest of a sentence;
    ``None``: it would not, or nobody knows which version it is.

    Args:
        environment: of the server.
    """
    if number + GRPC <= HIGHEST or "SGLANG_GRPC_PORT" in environment or version is None:
        return None
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    first, last = _GRPC_ALWAYS
    if numbers is None or not first <= tuple(map(int, numbers.groups())) <= last:
        return None
    return (
        f"SGLang {version} also wants the port {GRPC} above it for gRPC, and {number + GRPC} is "
        f"not a port"
    )


def _try(number: int, beside: Iterable[int] = ()) -> Port | None:
    name = None
    if sys.platform == "linux":
        name = socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0{NAMES}/{number}")
        except OSError:
            name.close()
            return None
    if is_taken(number) or any(is_taken(number + distance) for distance in beside):
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
