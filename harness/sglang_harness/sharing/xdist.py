"""How the workers of pytest-xdist share one server: a process owns it, workers have handles.

The owner answers what only it can (log, processes, memory, end); generations and pushes go
straight to the server.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn, TypeVar

from sglang_harness._base.teardown import Teardown
from sglang_harness.errors import EngineError, HarnessError, SpecError
from sglang_harness.memory import MemoryLedger, MemorySource
from sglang_harness.runtime import Runtime, Sidecar, Started
from sglang_harness.runtime.death import Death, DeathWatch, Unknown
from sglang_harness.server import Server
from sglang_harness.server.readiness import StartReport
from sglang_harness.server.state import State
from sglang_harness.sharing.rpc import RpcClient
from sglang_harness.sharing.shared_server import LocalKeeper
from sglang_harness.sharing.tally import Tally
from sglang_harness.spec import Argument, ServerSpec

T = TypeVar("T")

#: Seconds for what copies a checkpoint, or ends a server.
MOVES_WITHIN = 900.0


@dataclass(frozen=True)
class ServerHandle:
    """What a worker has to know of the shared server."""

    spec: ServerSpec
    run_id: str
    runtime: str
    device: Literal["cpu", "gpu"]
    address: str
    api_key: str | None = field(repr=False)
    model: Path | None
    model_path: str
    started: Started
    arguments: dict[str, Argument]
    owned: bool
    shared_folder: Path | None
    why_no_files: str | None
    memory: tuple[str, ...]
    report: StartReport
    may_change: bool
    first: State | None


class ServerOwner:
    """Owns the shared server, and answers the workers.

    Workers are answered in threads; starting and ending happens in the thread that calls
    :meth:`work`. In a main thread, a signal interrupts a start wherever it is. And that thread
    outlives the server: a process of the runtime ``process`` ends with the thread that made it.
    """

    def __init__(self) -> None:
        self.tally = Tally()
        self._keeper: LocalKeeper | None = None
        self._asked_for: tuple[ServerSpec, type] | None = None
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._parents = ExitStack()

    def answers(self) -> dict[str, Callable[..., Any]]:
        """What workers can ask, for :class:`sglang_harness.sharing.rpc.RpcServer`."""
        asked = (
            *(self.configure, self.handle, self.replace, self.logs, self.inspect, self.host_pids),
            *(self.cores, self.share, self.unshare, self.memory, self.death),
        )
        return {each.__name__: each for each in asked}

    def work(self) -> NoReturn:
        """Starts and ends servers as workers ask for it. Returns only by an interruption."""
        while True:
            job, done = self._jobs.get()
            try:
                done.set_result(job())
            except Exception as error:
                done.set_exception(error)
            except BaseException:
                done.set_exception(HarnessError("The test run is ending."))
                raise

    def close(self) -> list[str]:
        """Ends the server; returns what could not be removed, with why."""
        with Teardown() as down:
            if self._keeper is not None:
                down.collect("the shared server", self._keeper.close)
            down.step("preloaded parents", self._parents.close)
        return down.failures

    def _in_order(self, job: Callable[[], T]) -> T:
        done: Future[T] = Future()
        self._jobs.put((job, done))
        return done.result()

    # --- what workers ask -------------------------------------------------------------------

    def configure(self, spec: ServerSpec, runtime: Runtime) -> None:
        """What to start; the first worker decides, and the others have to ask for the same.

        Raises:
            SpecError: this one asks for another server.
        """
        with self._lock:
            if self._keeper is None:
                self._parents.enter_context(runtime.keeping_parents())
                self._keeper = LocalKeeper(spec, runtime)
                self.tally = self._keeper.tally
                self._asked_for = spec, type(runtime)
            elif self._asked_for != (spec, type(runtime)):
                raise SpecError(
                    "Two workers of one run ask for different servers.",
                    advice="Let sglang_spec give the same in each, or use --sglang-own-server.",
                )

    def handle(self) -> ServerHandle:
        """The server, started where there is none. Raises what starting raises."""
        assert self._keeper is not None, "each worker configures before it asks"
        server, first = self._in_order(self._keeper.server)
        running = server.running
        return ServerHandle(
            spec=server.spec,
            run_id=running.run_id,
            runtime=running.runtime,
            device=running.device,
            address=running.address,
            api_key=running.api_key,
            model=running.model,
            model_path=running.model_path(),
            started=running.started,
            arguments=running.arguments,
            owned=running.owned,
            shared_folder=running.shared_folder,
            why_no_files=running.why_no_files(),
            memory=tuple(source.name for source in running.memory()),
            report=server.report,
            may_change=server.may_change,
            first=first,
        )

    def replace(self, run_id: str, why: str) -> None:
        """Ends the server of that run, unless it is gone already."""
        self._in_order(lambda: self._replace(run_id, why))

    def _replace(self, run_id: str, why: str) -> None:
        server = None if self._keeper is None else self._keeper.current
        if self._keeper is not None and server is not None and server.running.run_id == run_id:
            self._keeper.replace(server, why)

    def logs(self, run_id: str, tail: int | None) -> str:
        return self._current(run_id).running.logs(tail=tail)

    def inspect(self, run_id: str) -> dict[str, Any]:
        return self._current(run_id).running.inspect()

    def host_pids(self, run_id: str) -> list[int]:
        return self._current(run_id).running.host_pids()

    def cores(self, run_id: str) -> list[int]:
        return self._current(run_id).running.cores()

    def share(self, run_id: str, path: str) -> str:
        return str(self._current(run_id).reach.share(Path(path)))

    def unshare(self, run_id: str, inside: str) -> None:
        self._current(run_id).reach.unshare(PurePosixPath(inside))

    def memory(self, run_id: str, name: str) -> tuple[int, dict[str, int]]:
        sources = self._current(run_id).running.memory()
        return next(source for source in sources if source.name == name).read()

    def death(self, run_id: str) -> Death | Unknown:
        """Waits until the server has ended, or was replaced."""
        watch = self._current(run_id).running.watch
        over = threading.Event()
        watch.call_on_end(over.set)
        over.wait()
        return watch.ended or Unknown("the process that owns it has replaced or stopped it")

    def _current(self, run_id: str) -> Server:
        server = None if self._keeper is None else self._keeper.current
        if server is None or server.running.run_id != run_id:
            raise HarnessError("The server was replaced meanwhile.")
        return server


class RemoteServer:
    """A :class:`sglang_harness.runtime.Running` that another process owns."""

    def __init__(self, handle: ServerHandle, owner: RpcClient) -> None:
        self._handle = handle
        self._owner = owner
        self.runtime = handle.runtime
        self.owned = handle.owned
        self.may_change = handle.may_change
        self.shared_folder = handle.shared_folder
        self.device = handle.device
        self.run_id = handle.run_id
        self.model = handle.model
        self.started = handle.started
        self.arguments = handle.arguments
        self.address = handle.address
        self.api_key = handle.api_key
        self.reach = self
        self.watch = DeathWatch(self._wait_for_death)

    def _ask(self, question: str, *arguments: Any, **options: float | None) -> Any:
        return self._owner.ask(question, self.run_id, *arguments, **options)

    def _wait_for_death(self) -> Death | Unknown:
        try:
            return self._ask("death", timeout=None)  # type: ignore[no-any-return]
        except HarnessError as error:
            return Unknown(error.message)

    def start(self) -> None:
        """Nothing: it runs."""

    def share(self, path: Path) -> PurePosixPath:
        return PurePosixPath(self._ask("share", str(path.resolve()), timeout=MOVES_WITHIN))

    def unshare(self, inside: PurePosixPath) -> None:
        """See :class:`sglang_harness.runtime.Reach`."""
        self._ask("unshare", str(inside), timeout=MOVES_WITHIN)

    def why_no_files(self) -> str | None:
        return self._handle.why_no_files

    def why_no_sidecar(self) -> str | None:
        return "the workers of pytest-xdist share this server, and another process owns it"

    def cores(self) -> list[int]:
        return list(self._ask("cores"))

    def start_sidecar(self, script: str) -> Sidecar:
        """Raises :class:`EngineError`: only the process that owns the server can."""
        del script
        raise EngineError(
            f"No sidecar can be started: {self.why_no_sidecar()}.",
            advice="Push from disk or in the body of the request, or use --sglang-own-server.",
        )

    def memory(self) -> list[MemorySource]:
        return [_RemoteMemory(name, self._ask) for name in self._handle.memory]

    def model_path(self) -> str:
        return self._handle.model_path

    def logs(self, *, tail: int | None = None) -> str:
        try:
            return str(self._ask("logs", tail))
        except HarnessError:
            return ""

    def inspect(self) -> dict[str, Any]:
        return dict(self._ask("inspect"))

    def host_pids(self) -> list[int]:
        return list(self._ask("host_pids"))

    def end(self, *, at_once: bool = False) -> int | None:
        """Detaches; the owner ends the server."""
        del at_once
        self.watch.expected = True
        return None

    def left_behind(self) -> list[str]:
        return []


@dataclass
class _RemoteMemory:
    name: str
    ask: Callable[..., Any]

    def read(self) -> tuple[int, dict[str, int]]:
        used, parts = self.ask("memory", self.name)
        return int(used), dict(parts)


class RemoteKeeper:
    """A :class:`sglang_harness.sharing.shared_server.Keeper` whose server another process owns."""

    def __init__(self, owner: RpcClient) -> None:
        self.tally = Tally()
        self._owner = owner
        self._server: Server | None = None

    def server(self) -> tuple[Server, State | None]:
        """See :class:`Keeper`; any error of the owner is raised as :class:`HarnessError`."""
        # As long as a start takes, and the build of an image before it.
        handle: ServerHandle = self._owner.ask("handle", timeout=None)
        if self._server is None or self._server.running.run_id != handle.run_id:
            if self._server is not None:
                self._server.stop()
            running = RemoteServer(handle, self._owner)
            self._server = Server(
                handle.spec,
                running,
                report=handle.report,
                memory=MemoryLedger(running.memory()),
            )
        return self._server, handle.first

    def replace(self, server: Server, why: str) -> None:
        self._owner.ask("replace", server.running.run_id, why, timeout=MOVES_WITHIN)
