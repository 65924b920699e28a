"""The server that the parts of one child process share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from sglang_harness._base.file_lease import LeaseTaken
from sglang_harness._base.teardown import Teardown
from sglang_harness._base.whole_file import write_whole
from sglang_harness.errors import (
    DeviceNotIdle,
    HarnessError,
    StartTimeout,
    TelemetryError,
)
from sglang_harness.gpu_check.outcomes import NotHere
from sglang_harness.gpu_check.results import PARTS
from sglang_harness.gpu_check.settings import Release, Settings
from sglang_harness.memory.gpu.guard import MIB
from sglang_harness.runtime import Order, Running, Runtime
from sglang_harness.runtime.docker import DockerRuntime
from sglang_harness.runtime.process import ProcessRuntime
from sglang_harness.server import Server
from sglang_harness.spec import ServerSpec

#: Seconds in which a server that will ever start has started, on the hosts that this is for: one
#: that had less is asked for again by the next part.
COMES_UP_WITHIN = 90.0

#: Reports something to the process that watches this one.
Report = Callable[[dict[str, Any]], None]


def passes(error: HarnessError, within: float, slow: float) -> bool:
    """Whether a server that did not start because of this may start all the same when it is asked
    for again.

    Args:
        within: seconds that it had.
        slow: factor of what it may need.
    """
    if isinstance(error, StartTimeout):
        return within < COMES_UP_WITHIN * slow
    return isinstance(error, DeviceNotIdle | LeaseTaken | TelemetryError)


class TellingRuntime:
    """A runtime that reports the key of each server before it starts, so that it is written
    nowhere, whatever becomes of the server."""

    def __init__(self, runtime: Runtime, report: Report) -> None:
        self._runtime, self._report = runtime, report

    @property
    def name(self) -> str:
        return self._runtime.name

    @property
    def starts(self) -> bool:
        return self._runtime.starts

    @property
    def decides_gpus(self) -> bool:
        return self._runtime.decides_gpus

    @property
    def decides_model(self) -> bool:
        return self._runtime.decides_model

    @property
    def caveats(self) -> tuple[str, ...]:
        return self._runtime.caveats

    def for_another_server(self) -> TellingRuntime:
        return TellingRuntime(self._runtime.for_another_server(), self._report)

    def prepare(self, order: Order) -> Running:
        """See :class:`sglang_harness.runtime.Runtime`."""
        running = self._runtime.prepare(order)
        self._report({"kind": "secret", "value": running.api_key or ""})
        return running

    def keeping_parents(self) -> AbstractContextManager[None]:
        """See :class:`sglang_harness.runtime.Runtime`."""
        return self._runtime.keeping_parents()


class Servers:
    """At most one running server. It is kept until another is asked for, or until the end.

    Args:
        failed: why a server did not start, by what was asked for; added to.
    """

    def __init__(
        self, settings: Settings, release: Release | None, report: Report, failed: dict[str, str]
    ) -> None:
        self._settings, self._release, self._report = settings, release, report
        self._failed = failed
        self._running: tuple[str, str, Server] | None = None

    def runtime(self) -> Runtime:
        """How servers of this release are started."""
        if self._settings.runtime == "docker":
            return TellingRuntime(DockerRuntime(), self._report)
        python = self._release.python if self._release else None
        return TellingRuntime(ProcessRuntime(python), self._report)

    def get(
        self, spec: ServerSpec, *, key: str, within: float, say: Callable[[str], None]
    ) -> Server:
        """The server that runs, if it is what ``spec`` asks for, lives, and was not left unfit by a
        push; else a new one.

        Args:
            key: names its log.
            within: seconds that it has to come up.

        Raises:
            HarnessError: it did not start.
            NotHere: it did not start in less time than one may need; or the same was asked for
                before, and did not start for a reason that lasts.
        """
        asked = spec.model_dump_json(exclude={"limits"})
        if self._running is not None:
            running, _, server = self._running
            fit = server.running.watch.ended is None and server.weights.unfit is None
            if running == asked and fit:
                return server
            self.close()
        if asked in self._failed:
            raise NotHere(f"no server: {self._failed[asked]}")
        try:
            server = Server.start(spec, runtime=self.runtime(), say=say, within=within)
        except HarnessError as error:
            if not passes(error, within, self._settings.slow):
                self._failed[asked] = error.message
                self._report({"kind": "no server", "asked": asked, "why": error.message})
            if error.log:
                self._keep_log(key, error.log)
            if isinstance(error, StartTimeout) and passes(error, within, self._settings.slow):
                raise NotHere(
                    f"the server did not start in the {within:.0f} s that were left for it"
                ) from error
            raise
        self._running = asked, key, server
        return server

    def close(self) -> None:
        """Ends the server, if one runs, and keeps its log; reports what it left."""
        if self._running is None:
            return
        (_, key, server), self._running = self._running, None
        with Teardown() as down:
            log = down.step("log", server.logs)
            stopped = down.step("server", lambda: server.stop(at_once=True))
            down.step("log", lambda: self._keep_log(key, log or ""))
        left = [*down.failures, *(stopped.left_behind if stopped else [])]
        for device in stopped.devices if stopped else []:
            if not device.given_back:
                used = "?" if device.after is None else f"{device.after / MIB:.0f}"
                left.append(
                    f"GPU {device.uuid} has {used} MiB in use {device.seconds:.0f} s after its "
                    f"server, {device.before / MIB:.0f} MiB before it"
                )
        for each in left:
            self._report({"kind": "saw", "text": f"the server of {key} left behind: {each}"})

    def _keep_log(self, key: str, log: str) -> None:
        folder = self._settings.out / PARTS
        number, file = 1, folder / f"{key}-server.log"
        while file.exists():
            number += 1
            file = folder / f"{key}-server-{number}.log"
        write_whole(file, log)
