"""One process keeps a server, others use it: how pytest-xdist's workers share one.

The keeper answers what only it can (log, processes, memory, end); generations and pushes go
straight to the server.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from sglang_harness.errors import EngineError, HarnessError, SpecError
from sglang_harness.memory import MemoryLedger, MemorySource
from sglang_harness.runtime import Beside, Runtime, Started
from sglang_harness.runtime.death import Death, DeathWatch, Unknown
from sglang_harness.server import Server
from sglang_harness.server.readiness import StartReport
from sglang_harness.server.state import State
from sglang_harness.sharing.rpc import Counter
from sglang_harness.sharing.shared_server import LocalKeeper, Tally
from sglang_harness.spec import Argument, ServerSpec


@dataclass(frozen=True)
class Loan:
    """What a borrower has to know of the server."""

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


class Lender:
    """Keeps the server, and answers borrowers; its methods are their questions.

    The server is started in one thread that lives as long as this does: a process of the
    runtime ``process`` ends with the thread that made it.
    """

    def __init__(self) -> None:
        self.tally = Tally()
        self._keeper: LocalKeeper | None = None
        self._asked_for: tuple[ServerSpec, str] | None = None
        self._lock = threading.Lock()
        self._starter = ThreadPoolExecutor(1, "sglang-lender")
        self._parents = ExitStack()
        self._closed = threading.Event()

    def close(self) -> None:
        """Ends the server."""
        self._closed.set()
        if self._keeper is not None:
            self._starter.submit(self._keeper.close).result()
        self._starter.shutdown()
        self._parents.close()

    def configure(self, spec: ServerSpec, runtime: Runtime) -> None:
        """What to start; the first one says it, and the others have to mean the same.

        Raises:
            SpecError: this one means another server.
        """
        with self._lock:
            if self._keeper is None:
                self._parents.enter_context(runtime.keeping_parents())
                self._keeper = LocalKeeper(spec, runtime)
                self.tally = self._keeper.tally
                self._asked_for = spec, runtime.name
            elif self._asked_for != (spec, runtime.name):
                raise SpecError(
                    "Two workers of one run ask for different servers.",
                    advice="Let sglang_spec mean the same in each, or use --sglang-own-server.",
                )

    def loan(self) -> Loan:
        """The server, started where there is none. Raises what starting raises."""
        assert self._keeper is not None, "configured by whoever asks"
        server, first = self._starter.submit(self._keeper.server).result()
        running = server.running
        return Loan(
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
        server = None if self._keeper is None else self._keeper.current
        if self._keeper is not None and server is not None and server.running.run_id == run_id:
            self._starter.submit(self._keeper.replace, server, why).result()

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
        while not over.wait(1.0) and not self._closed.is_set():
            pass
        return watch.ended or Unknown("the process that keeps it has replaced or stopped it")

    def _current(self, run_id: str) -> Server:
        server = None if self._keeper is None else self._keeper.current
        if server is None or server.running.run_id != run_id:
            raise HarnessError("The server was replaced meanwhile.")
        return server


class BorrowedServer:
    """A :class:`sglang_harness.runtime.Running` that another process keeps."""

    def __init__(self, loan: Loan, counter: Counter) -> None:
        self._loan = loan
        self._counter = counter
        self.runtime = loan.runtime
        self.owned = loan.owned
        self.may_change = loan.may_change
        self.shared_folder = loan.shared_folder
        self.device = loan.device
        self.run_id = loan.run_id
        self.model = loan.model
        self.started = loan.started
        self.arguments = loan.arguments
        self.address = loan.address
        self.api_key = loan.api_key
        self.reach = self
        self.watch = DeathWatch(self._wait_for_death)

    def _ask(self, question: str, *arguments: Any) -> Any:
        return self._counter.ask(question, self.run_id, *arguments)

    def _wait_for_death(self) -> Death | Unknown:
        try:
            return self._ask("death")  # type: ignore[no-any-return]
        except HarnessError as error:
            return Unknown(error.message)

    def start(self) -> None:
        """Nothing: it runs."""

    def share(self, path: Path) -> PurePosixPath:
        return PurePosixPath(self._ask("share", str(path.resolve())))

    def unshare(self, inside: PurePosixPath) -> None:
        """See :class:`sglang_harness.runtime.Reach`."""
        self._ask("unshare", str(inside))

    def why_no_files(self) -> str | None:
        return self._loan.why_no_files

    def why_no_sidecar(self) -> str | None:
        return "the workers of pytest-xdist share this server, and another process started it"

    def cores(self) -> list[int]:
        return list(self._ask("cores"))

    def beside(self, script: str) -> Beside:
        """Raises :class:`EngineError`: only the process that started the server can."""
        del script
        raise EngineError(
            f"No sidecar can be started: {self.why_no_sidecar()}.",
            advice="Push from disk or in the body of the request, or use --sglang-own-server.",
        )

    def memory(self) -> list[MemorySource]:
        return [_BorrowedMemory(name, self._ask) for name in self._loan.memory]

    def model_path(self) -> str:
        return self._loan.model_path

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
        """Gives it back. The keeper ends it."""
        del at_once
        self.watch.expected = True
        return None

    def left_behind(self) -> list[str]:
        return []


@dataclass
class _BorrowedMemory:
    name: str
    ask: Callable[..., Any]

    def read(self) -> tuple[int, dict[str, int]]:
        used, parts = self.ask("memory", self.name)
        return int(used), dict(parts)


class Borrower:
    """A :class:`sglang_harness.sharing.shared_server.Keeper` whose server is another process's."""

    def __init__(self, counter: Counter) -> None:
        self.tally = Tally()
        self._counter = counter
        self._server: Server | None = None

    def server(self) -> tuple[Server, State | None]:
        """See :class:`Keeper`; any error of the keeper is raised as :class:`HarnessError`."""
        loan: Loan = self._counter.ask("loan")
        if self._server is None or self._server.running.run_id != loan.run_id:
            if self._server is not None:
                self._server.stop()
            running = BorrowedServer(loan, self._counter)
            self._server = Server(
                loan.spec,
                running,
                report=loan.report,
                memory=MemoryLedger(running.memory()),
            )
        return self._server, loan.first

    def replace(self, server: Server, why: str) -> None:
        self._counter.ask("replace", server.running.run_id, why)
