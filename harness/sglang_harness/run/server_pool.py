"""Servers of their own for checks that may kill theirs, or need one that runs otherwise.

The last one is kept, restored to its baseline, for the next check that asks for the same: a cold
start takes ten seconds, a warm one two, restoring a fraction of one. One that cannot be restored,
and one that died, is never handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from sglang_harness._base.teardown import Teardown
from sglang_harness.errors import (
    DidNotComeUp,
    HarnessError,
    Interrupted,
    NoAnswerInTime,
    NotProvided,
    ServerDied,
    StartTimeout,
    TimeIsOver,
)
from sglang_harness.runtime import Runtime
from sglang_harness.server import Server
from sglang_harness.server.state import State, restore, unresponsive
from sglang_harness.spec import Argument, ServerSpec
from sglang_harness.suite.blame import place


class ServerPool:
    """Starts servers in the image of the first one.

    Args:
        wanted: the spec of the first server.
        image: what that one turned out to run from; ``None``: what ``wanted`` means.
        started: told of each server, with its title.
        left: seconds that are left of the run.

    Attributes:
        logs: of every server that was started, with a title.
        stopped: those that have ended: whether they gave their GPUs back is judged afterwards.
        left_behind: what ending them could not remove, a line each.
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
        left: Callable[[], float],
    ) -> None:
        self._started = started
        self.logs: list[str] = []
        self.stopped: list[Server] = []
        self.left_behind: list[str] = []
        self._wanted = wanted
        self._runtime = runtime
        self._image = image
        self._run_id = run_id
        self._say = say
        self._left = left
        self._running: list[tuple[ServerSpec, Server]] = []
        """Every server that was started and not yet ended, whatever became of its check."""
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
        spec = variant_of(
            self._wanted,
            image=self._image,
            model=model,
            server_args=server_args,
            environment=environment,
        )
        server, first = self._take(spec) or self._start(spec)
        well = False
        try:
            with server.client.within(min(spec.limits.check, max(self._left(), 0.0))):
                yield server
            well = True
        except TimeIsOver as error:
            if stuck := unresponsive(server):
                raise NoAnswerInTime(error.call, stuck) from error
            raise
        finally:
            self._give_back(spec, server, first if well else None)

    def close(self) -> None:
        """Stops every server that still runs: the kept one, and one whose check was interrupted."""
        self._kept = None
        with Teardown() as down:
            for spec, server in list(self._running):
                down.step(title(spec), lambda spec=spec, server=server: self._stop(spec, server))  # type: ignore[misc]
        self.left_behind += down.failures

    def _take(self, spec: ServerSpec) -> tuple[Server, State] | None:
        if self._kept is not None:
            asked_for, server, first = self._kept
            if asked_for.model_dump() == spec.model_dump() and server.running.watch.ended is None:
                self._kept = None
                return server, first
            self._drop_kept()
        return None

    def _drop_kept(self) -> None:
        """Ends the kept one; others may be lent at this moment."""
        if self._kept is not None:
            (spec, server, _), self._kept = self._kept, None
            self._stop(spec, server)

    def _start(self, spec: ServerSpec) -> tuple[Server, State]:
        left = self._left()
        if left <= 0:
            raise NotProvided("The run's limit was over before the check's own server was started.")
        try:
            server = Server.start(
                spec, runtime=self._runtime, say=self._say, run_id=self._run_id, within=left
            )
        except (HarnessError, Interrupted) as error:
            if error.log or isinstance(error, ServerDied | StartTimeout):
                self.logs.append(
                    f"--- a server of its own that did not come up: {title(spec)} ---\n{error.log}"
                )
            if not isinstance(error, ServerDied | StartTimeout):
                raise
            if isinstance(error, StartTimeout) and self._left() <= 0:
                raise NotProvided(
                    "The run's limit was over before the check's own server had come up."
                ) from error
            raise DidNotComeUp(f"The check's own server did not come up. {error}") from error
        self._running.append((spec, server))
        try:
            self._started(server, title(spec))
            return server, State.of(server)
        except BaseException:
            self._stop(spec, server)
            raise

    def _give_back(self, spec: ServerSpec, server: Server, first: State | None) -> None:
        """Keeps the server for the next check, or ends it; whatever interrupts that."""
        try:
            alive = first is not None and server.running.watch.ended is None
            if first is not None and alive and self._restored(spec, server, first):
                self._drop_kept()
                self._kept = spec, server, first
        finally:
            if self._kept is None or self._kept[1] is not server:
                self._stop(spec, server)

    def _restored(self, spec: ServerSpec, server: Server, first: State) -> bool:
        try:
            restore(server, first)
        except HarnessError as error:
            why = error.message
        except Exception as error:
            why = f"{type(error).__name__} in {place(error)}: {error}"
        else:
            return True
        self.logs.append(f"--- not used again, as it was not restored: {title(spec)} ---\n{why}")
        return False

    def _stop(self, spec: ServerSpec, server: Server) -> None:
        with Teardown() as down:
            log = down.step("log", server.logs)
            ended = down.step("stop", lambda: server.stop(at_once=True))
            self._running = [each for each in self._running if each[1] is not server]
            self.stopped.append(server)
            self.left_behind += [*down.failures, *(ended.left_behind if ended else [])]
            self.logs.append(f"--- a server of its own: {title(spec)} ---\n{log or ''}")


def title(spec: ServerSpec) -> str:
    """The model and the flags, on one line."""
    return " ".join(
        [spec.model, *(f"--{name}={value}" for name, value in spec.server_args.items())]
    )


def variant_of(
    wanted: ServerSpec,
    *,
    image: str | None,
    model: str,
    server_args: Mapping[str, Argument] | None = None,
    environment: Mapping[str, str] | None = None,
) -> ServerSpec:
    """The spec of another server in the same image as the one that ``wanted`` describes.

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
