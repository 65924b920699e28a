"""The base class of a route, what it can need of a server, and the registry of all routes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from sglang_harness.errors import SpecError
from sglang_harness.weights.routes.buckets import Bucket
from sglang_harness.weights.routes.gpu_places import beside
from sglang_harness.weights.source.fitted import Source
from sglang_harness.weights.source.staging import Staged, stage

if TYPE_CHECKING:
    from sglang_harness.peer import Peer
    from sglang_harness.weights.target import Target


@dataclass
class Job:
    """What a route works with during one push.

    Attributes:
        target: the server that the weights go to.
        ranks: tensor-parallel ranks of the server: each gets an entry of its own.
        dtype: what the server holds floating-point weights in; ``None``: it is not known.
        version: the label that goes with every bucket.
        timeout: seconds for the server's answer to one bucket.
        any_peer: the peer next to the server, started for the first push that asks for it.
        peer_used: the peer that this push uses, if it uses one.
        seconds_staged: what a route spent on copying the checkpoint to where it is read.
        staged: copies of the checkpoint, to be removed when the push is over.
    """

    target: Target
    source: Source
    buckets: list[Bucket]
    ranks: int
    version: str
    timeout: float
    abort_all_requests: bool
    any_peer: Callable[[], Peer]
    dtype: str | None = None
    peer_used: Peer | None = None
    seconds_staged: float = 0.0
    staged: list[Staged] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def stage(self, *, reader: Literal["server", "peer"]) -> PurePosixPath:
        """The checkpoint's folder as ``reader`` sees it; removed when the push is over.

        Raises what :func:`.staging.stage` raises.
        """
        started = time.monotonic()
        staged = stage(self.source, self.target.running, reader=reader, dtype=self.dtype)
        self.staged.append(staged)
        self.seconds_staged += time.monotonic() - started
        return staged.inside

    def peer(self) -> Peer:
        """The peer next to the server.

        Raises:
            EngineError, PeerFailed: none can be started.
        """
        self.peer_used = self.any_peer()
        return self.peer_used


@dataclass(frozen=True)
class Sent:
    """One bucket, taken by the server. Seconds, as :class:`BucketSent` names them."""

    message: str
    read: float
    pack: float
    hand_over: float
    server: float


@dataclass(frozen=True)
class Needs:
    """What has to be true of a server for weights to get to it.

    Attributes:
        posts: paths that the server has to offer, by its ``/openapi.json``.
        gpu: it computes on a GPU.
        shared_folder: it reads a folder of this machine.
        peer: a process can be started next to it.
        one_replica: it has no data-parallel replicas: SGLang fails an assertion (0.5.23).
        gpu_beside: where it computes on GPUs, the run has one that none of its ranks is on (NCCL).
    """

    posts: tuple[str, ...] = ()
    gpu: bool = False
    shared_folder: bool = False
    peer: bool = False
    one_replica: bool = False
    gpu_beside: bool = False

    def lacking(self, target: Target) -> str | None:
        """Why ``target`` does not meet these; ``None``: it does."""
        if self.gpu and target.device != "gpu":
            return "the server runs on a CPU"
        for path in self.posts:
            if not target.client.has_route("POST", path):
                return f"this SGLang has no POST {path}"
        if self.shared_folder and (reason := target.running.why_no_files()):
            return reason
        if self.peer and (reason := target.running.why_no_sidecar()):
            return reason
        if not self.one_replica and not self.gpu_beside:
            return None
        about = target.client.server_info()
        size = int(about.get("dp_size") or 1)
        if self.one_replica and size != 1:
            return f"the server runs {size} data-parallel replicas (dp_size)"
        if self.gpu_beside and target.device == "gpu":
            place = beside(target, about)
            return place if isinstance(place, str) else None
        return None

    def described(self) -> list[str]:
        """Each of them for a reader."""
        told = {
            "a GPU": self.gpu,
            "a folder that both sides can read": self.shared_folder,
            "a server that this run started": self.peer,
            "no data-parallel replicas": self.one_replica,
            "with GPUs, one more than the server's ranks are on": self.gpu_beside,
        }
        return [
            *(f"`POST {path}`" for path in self.posts),
            *(what for what, needed in told.items() if needed),
        ]


class Route(ABC):
    """A way for weights to reach a server. One object is one push.

    Attributes:
        name: what callers, reports and documentation call it.
        title: how the weights travel; completes the sentence "Weights ... are served".
        needs: what has to be true of the server.
        needs_session: the server wants its weight-update session around the buckets, where it
            has one.
        in_one_piece: everything is one bucket, whatever the size.
        quick: a push of a small model takes seconds, the first one too.
        unverified: what of it this project has not run; empty: nothing.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[Needs]
    needs_session: ClassVar[bool] = True
    in_one_piece: ClassVar[bool] = False
    quick: ClassVar[bool] = True
    unverified: ClassVar[str] = ""

    def lacking(self, target: Target) -> str | None:
        """Why this route does not lead to ``target``; ``None``: it does."""
        return self.needs.lacking(target)

    def prepare(self, job: Job) -> None:  # noqa: B027 -- not every route has something to do
        """Everything that can fail without the server: memory, files, copies. Nothing was sent
        when this raises, and the server is as fit as before.

        Raises:
            ModelError, NotPrepared, EngineError, MissingExtra: it cannot be prepared.
        """

    def open(self, job: Job) -> None:  # noqa: B027 -- not every route has something to ask
        """What the server or the peer has to be asked for before the first bucket, while the
        server still generates. Raises what :meth:`send` raises."""

    @abstractmethod
    def send(self, bucket: Bucket) -> Sent:
        """One bucket. Raises what the client raises, and :class:`PeerFailed`."""

    def close(self) -> list[str]:
        """Releases what :meth:`open` took, whatever happened; returns what could not be."""
        return []


R = TypeVar("R", bound=type[Route])

_routes: dict[str, type[Route]] = {}


def register(route: R) -> R:
    """Adds a route under its name.

    Raises:
        ValueError: there is one of that name already.
    """
    if route.name in _routes:
        raise ValueError(
            f"two routes are named {route.name!r}: {_routes[route.name].__name__} and "
            f"{route.__name__}"
        )
    _routes[route.name] = route
    return route


def names(device: Literal["cpu", "gpu"] | None = None) -> list[str]:
    """Every route in alphabetical order.

    Args:
        device: only routes that can lead to a server on such a device.
    """
    return sorted(n for n, route in _routes.items() if device != "cpu" or not route.needs.gpu)


def kind(name: str) -> type[Route]:
    """The class of the route ``name``.

    Raises:
        SpecError: there is none.
    """
    if name not in _routes:
        raise SpecError(
            f"Unknown route {name!r} for weights.",
            advice=f"Choose one of {', '.join(names())}.",
        )
    return _routes[name]


def make(name: str) -> Route:
    """A new object of the route ``name``, for one push.

    Raises:
        SpecError: there is none.
    """
    return kind(name)()
