"""Servers of their own for checks that may kill theirs, or need one that runs otherwise.

The last one is kept, put back to how it was at first, for the next check that asks for the same:
a cold start takes ten seconds, a warm one two, putting back a fraction of one. One that
cannot be put back, and one that died, is never handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from sglang_harness.errors import (
    DidNotComeUp,
    HarnessError,
    MissingExtra,
    ServerDied,
    StartTimeout,
)
from sglang_harness.runtime import Runtime
from sglang_harness.server import Server
from sglang_harness.server.state import State, restore
from sglang_harness.spec import Argument, ServerSpec
from sglang_harness.suite.check import NotProvided


class OwnServers:
    """Starts servers in the image of the first one.

    Args:
        wanted: the spec of the first server.
        image: what that one turned out to run from; ``None``: what ``wanted`` means.
        started: told of each server, with its title.

    Attributes:
        logs: of every server that was started, with a title.
        stopped: those that have ended: whether they gave their GPUs back is judged afterwards.
    """

    def __init__(
        self,
        wanted: ServerSpec,
        runtime: Runtime,
        *,
        image: str | None,
        run_id: str,
        say: Callable[[str], None],
        started: Callable[[Server, str], None],
    ) -> None:
        self._started = started
        self.logs: list[str] = []
        self.stopped: list[Server] = []
        self._wanted = wanted
        self._runtime = runtime
        self._image = image
        self._run_id = run_id
        self._say = say
        self._kept: tuple[ServerSpec, Server, State] | None = None

    @contextmanager
    def lent(
        self,
        *,
        model: str = "tiny",
        server_args: Mapping[str, Argument] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Iterator[Server]:
        """See :class:`sglang_harness.suite.check.OwnServer`."""
        spec = beside(
            self._wanted,
            image=self._image,
            model=model,
            server_args=server_args,
            environment=environment,
        )
        server, first = self._take(spec) or self._start(spec)
        well = False
        try:
            with server.client.within(spec.limits.check):
                yield server
            well = True
        finally:
            if not (well and self._keep(spec, server, first)):
                self._stop(spec, server)

    def close(self) -> None:
        """Stops the one that was kept."""
        if self._kept is not None:
            spec, server, _ = self._kept
            self._kept = None
            self._stop(spec, server)

    def _take(self, spec: ServerSpec) -> tuple[Server, State] | None:
        if self._kept is not None:
            asked_for, server, first = self._kept
            if asked_for.model_dump() == spec.model_dump() and server.running.watch.death is None:
                self._kept = None
                return server, first
            self.close()
        return None

    def _start(self, spec: ServerSpec) -> tuple[Server, State]:
        try:
            server = Server.start(spec, runtime=self._runtime, say=self._say, run_id=self._run_id)
        except (ServerDied, StartTimeout) as error:
            self.logs.append(
                f"--- a server of its own that did not come up: {title(spec)} ---\n{error.log}"
            )
            raise DidNotComeUp(f"The check's own server did not come up. {error}") from error
        except MissingExtra as error:
            raise NotProvided(str(error)) from None
        self._started(server, title(spec))
        try:
            return server, State.of(server)
        except BaseException:
            self._stop(spec, server)
            raise

    def _keep(self, spec: ServerSpec, server: Server, first: State) -> bool:
        try:
            restore(server, first)
        except HarnessError:
            return False
        self._kept = spec, server, first
        return True

    def _stop(self, spec: ServerSpec, server: Server) -> None:
        self.logs.append(f"--- a server of its own: {title(spec)} ---\n{server.logs()}")
        server.stop(at_once=True)
        self.stopped.append(server)


def title(spec: ServerSpec) -> str:
    """The model and the flags, on one line."""
    return " ".join(
        [spec.model, *(f"--{name}={value}" for name, value in spec.server_args.items())]
    )


def beside(
    wanted: ServerSpec,
    *,
    image: str | None,
    model: str,
    server_args: Mapping[str, Argument] | None = None,
    environment: Mapping[str, str] | None = None,
) -> ServerSpec:
    """The spec of another server beside the one that ``wanted`` describes.

    Args:
        image: what the first one turned out to run from; ``None``: what ``wanted`` says.
        server_args: ``None``: those of ``wanted``.
        environment: added to that of ``wanted``.
    """
    given = wanted.model_dump(exclude_unset=True)
    given |= {"model": model, "port": None, "pull": "missing"}
    if image is not None:
        given |= {"image": image, "sglang_version": None}
    if server_args is not None:
        given["server_args"] = dict(server_args)
    if environment:
        given["environment"] = {**wanted.environment, **environment}
    return ServerSpec.make(**given)
