"""The protocol of a route, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from sglang_harness.errors import SpecError
from sglang_harness.weights.routes.buckets import Bucket
from sglang_harness.weights.source.staging import Source

if TYPE_CHECKING:
    from sglang_harness.peer import Peer
    from sglang_harness.server import Server


@dataclass
class Job:
    """What a route works with during one push.

    Attributes:
        ranks: tensor-parallel ranks of the server: each gets an entry of its own.
        version: the label that goes with every bucket.
        timeout: seconds for the server's answer to one bucket.
        any_peer: what stands beside the server, started for the first push that asks for it.
        beside: the peer that this push uses, if it uses one.
        seconds_staged: what a route spent on copying the checkpoint to where it is read.
        staged: folders to be removed when the push is over.
    """

    server: Server
    source: Source
    buckets: list[Bucket]
    ranks: int
    version: str
    timeout: float
    abort_all_requests: bool
    any_peer: Callable[[], Peer]
    beside: Peer | None = None
    seconds_staged: float = 0.0
    staged: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def peer(self) -> Peer:
        """What stands beside the server.

        Raises:
            EngineError, PeerFailed: nothing can.
        """
        self.beside = self.any_peer()
        return self.beside


@dataclass(frozen=True)
class Sent:
    """One bucket, taken by the server. Seconds, as :class:`BucketSent` names them."""

    message: str
    read: float
    pack: float
    hand_over: float
    server: float


class Route(Protocol):
    """A way for weights to reach a server. One object is one push."""

    @property
    def name(self) -> str: ...

    @property
    def needs_session(self) -> bool:
        """Whether the server wants its session around the buckets, where it has one."""

    @property
    def in_one_piece(self) -> bool:
        """Everything is one bucket, whatever the size."""

    def lacking(self, server: Server) -> str | None:
        """Why this route does not lead to this server; ``None``: it does."""

    def open(self, job: Job) -> None:
        """Everything that can be done while the server still generates."""

    def send(self, bucket: Bucket) -> Sent:
        """One bucket. Raises what the client raises, and :class:`PeerFailed`."""

    def close(self) -> list[str]:
        """Gives back what :meth:`open` took, whatever happened; returns what stayed."""


R = TypeVar("R", bound="Callable[[], Route]")

_routes: dict[str, Callable[[], Route]] = {}


def register(name: str) -> Callable[[R], R]:
    """Adds a route under its name.

    Raises:
        ValueError: there is one of that name already.
    """

    def add(made: R) -> R:
        if name in _routes:
            raise ValueError(f"two routes are called {name!r}")
        _routes[name] = made
        return made

    return add


def names() -> list[str]:
    """Every route, in the order of the alphabet."""
    return sorted(_routes)


def make(name: str) -> Route:
    """A new object of the route ``name``.

    Raises:
        SpecError: there is none.
    """
    if name not in _routes:
        raise SpecError(
            f"There is no route {name!r} for weights.",
            advice=f"Choose one of {', '.join(names())}.",
        )
    return _routes[name]()
