"""The main job: start a server, ask it every question, return a verdict with evidence."""

from __future__ import annotations

import shutil
import tempfile
import traceback
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sglang_harness import oracle, report, suite
from sglang_harness._base import temporary
from sglang_harness._base.signals import interruptions
from sglang_harness._base.teardown import Teardown
from sglang_harness._base.temporary import temporary_folder
from sglang_harness._base.whole_file import write_whole
from sglang_harness.errors import (
    DidNotComeUp,
    HarnessError,
    Interrupted,
    MissingExtra,
    ModelError,
    RequestFailed,
    ServerDied,
    SpecError,
    StartTimeout,
    Unresponsive,
)
from sglang_harness.run.main_server import MainServer, log_of
from sglang_harness.run.record import RunRecord
from sglang_harness.run.server_pool import ServerPool
from sglang_harness.runtime import Runtime
from sglang_harness.runtime.docker import DockerRuntime
from sglang_harness.server import Server
from sglang_harness.spec import ServerSpec
from sglang_harness.suite import installed, known_defects
from sglang_harness.suite.check import Check, Context, run_check
from sglang_harness.suite.checks.memory.readings import DeviceIsGivenBack
from sglang_harness.upkeep import kept_servers
from sglang_harness.verdict import CheckResult, Outcome, ProfileName, Verdict

#: Seconds in which a server has to state its version.
STATES_ITSELF_WITHIN = 30.0

#: A mistake in the request, found before any server was started: there is nothing to judge.
MISTAKES = (SpecError, ModelError, MissingExtra)

#: What a server's start fails with where the server itself is at fault.
NEVER_CAME_UP = (ServerDied, StartTimeout, DidNotComeUp, Unresponsive)

#: Why a check was not asked any more. Argument: ``limits.run``.
TIME_IS_OVER = "the run's limit of {:g} s was over"

NOT_REMOVED = "could not be ended or removed: {}"

#: The file beside the reports: what the servers wrote.
LOG = "server.log"


class Viewer(Protocol):
    """Shows a person what happens while it happens."""

    def say(self, message: str) -> None: ...

    def begin(self, check_id: str, number: int, total: int) -> None: ...

    def end(self, result: CheckResult) -> None: ...


@dataclass
class Request:
    """What to qualify, and how.

    Attributes:
        out: folder for the results; made where missing. Results of an earlier run are replaced
            when those of this one are written.
        patterns: ``-k``; the profile is then ``selected``.
        keep_on_failure: leave the server running unless the verdict is ``pass``.
        strict_known: a listed defect that does not show fails the run.
    """

    spec: ServerSpec
    out: Path
    runtime: Runtime = field(default_factory=DockerRuntime)
    profile: ProfileName = "quick"
    patterns: list[str] = field(default_factory=list)
    seed: int = 0
    keep_on_failure: bool = False
    strict_known: bool = False


class Qualification:
    """One run. Whatever ends it, what was seen so far becomes the verdict and is written.

    Attributes:
        kept: the server, where it was left running for a person.
        no_server: why the first server could not be started, where that is no fault of its own (the
            engine, the image, a GPU, the address); the verdict is then ``error``.
        verdict: what was written; ``None`` before that.
    """

    def __init__(self, request: Request, viewer: Viewer) -> None:
        self._request = request
        self._viewer = viewer
        added = installed.load()
        self._checks = suite.select(request.profile, request.patterns)
        self._record = RunRecord(
            spec=request.spec,
            runtime=request.runtime.name,
            profile=request.profile,
            patterns=request.patterns,
            seed=request.seed,
            strict_known=request.strict_known,
            defects=known_defects.load(set(suite.registered())),
            added=added,
            say=viewer.end,
        )
        self._main = MainServer(
            request.spec,
            request.runtime,
            run_id=self._record.run_id,
            keep=request.keep_on_failure,
            say=viewer.say,
            started=self._record.started,
            left=self._left,
        )
        self._pool: ServerPool | None = None
        self._closed_gate: str | None = None
        """The check that failed so that what follows means nothing."""
        self.no_server: HarnessError | None = None
        self._scratch: Path | None = None
        self.verdict: Verdict | None = None
        self.kept: kept_servers.Held | None = None

    def run(self) -> Verdict:
        """Runs the suite; writes the reports and ``server.log``.

        Raises:
            SpecError, ModelError, MissingExtra: what was asked for is invalid or not here. Nothing
                was started, there is no verdict, and earlier results are left as they are.
            Interrupted: after what was seen has been written, with the verdict ``error``.
        """
        _can_be_written(self._request.out)
        for added in self._record.added:
            self._viewer.say(f"with {len(added.checks)} checks of {added.package} {added.version}")
        self._scratch = temporary_folder("scratch")
        with interruptions() as signals:
            try:
                with self._request.runtime.keeping_parents():
                    try:
                        self._ask_everything()
                    except Interrupted:
                        raise
                    except BaseException as error:
                        # Known before it is decided whether a server is kept.
                        self._record.fails(error)
                        raise
                    finally:
                        try:
                            signals.calm()
                        finally:
                            self._record.interrupted = signals.seen is not None
                            self._put_away()
            except Interrupted as error:
                self._tell(f"{error}; what ran was stopped")
            except MISTAKES as error:
                if not self._record.starts and not self._record.results:
                    raise
                self._failed(error)
            except BaseException as error:
                # Also what is no Exception: a closed terminal ends the program by SystemExit, and
                # extension modules in Rust panic.
                self._failed(error)
            finally:
                left = temporary.remove(self._scratch)
                self._record.caveats += [NOT_REMOVED.format(line) for line in left]
            self._record.interrupted = signals.seen is not None
            verdict = self._write()
        if signals.seen is not None:
            raise signals.seen
        return verdict

    # --- asking -----------------------------------------------------------------------------

    def _ask_everything(self) -> None:
        try:
            lacking = self._first_server()
        except NEVER_CAME_UP as error:
            # Cut short by the run's own limit, it says nothing about the server.
            cut_short = isinstance(error, StartTimeout) and self._left() <= 0
            outcome = Outcome.ERROR if cut_short else Outcome.FAIL
            self._never_came_up(f"expected a server that comes up; {error}", outcome)
            return
        except MISTAKES:
            raise
        except HarnessError as error:
            # The engine, the image, a GPU or the address: nothing was seen of the server.
            self._never_came_up(str(error), Outcome.ERROR)
            self.no_server = error
            return
        asked = [c for c in self._checks if not c.after_stop]
        context: Context | None = None
        for number, check in enumerate(asked, start=1):
            server = self._main.current or self._record.shown
            assert server is not None, "one of them came up"
            lacks = lacking[check.id] if check.id in lacking else self._lacking(check, server)
            if reason := lacks:
                self._record.leave_out(check.id, reason)
                continue
            if blocked := self._cannot_ask():
                self._record.not_run(check.id, *blocked)
                continue
            if context is None or context.server is not server:
                context = self._context(server)
            self._viewer.begin(check.id, number, len(asked))
            with server.client.within(min(self._request.spec.limits.check, self._left())):
                seen, figures = run_check(check, context)
            result = self._record.add(seen, figures)
            if check.gate and result.outcome is Outcome.FAIL:
                self._closed_gate = check.id
            if self._closed_gate and server.running.owned:
                continue  # nothing more is asked of it
            another = self._main.after(check, result)
            if died := self._main.deaths.get(check.id):
                self._record.died(check.id, died)
            if another:
                # The variants of the checkpoint lay where the server before could read them.
                shutil.rmtree(context.scratch / "variant", ignore_errors=True)

    def _context(self, server: Server) -> Context:
        assert self._scratch is not None, "made before anything is asked"
        return Context(server, self._request.seed, self._own_server, self._scratch)

    def _first_server(self) -> dict[str, str | None]:
        """Starts the server that checks are asked of, and returns what is known already to be
        lacking, by check.

        Where every check has a server of its own, nobody would ask this one anything, so it is
        one of theirs, which the next check takes over.
        """
        record = self._record
        if all(check.own_server for check in self._checks):
            with self._own_server() as server:
                record.shown = server
                record.version = _version(server)
                return {check.id: self._lacking(check, server) for check in self._checks}
        record.shown = self._main.start()
        record.started_here = True
        record.version = _version(record.shown)
        return {}

    def _own_server(self, **wanted: Any) -> AbstractContextManager[Server]:
        """See :class:`sglang_harness.suite.check.OwnServer`."""
        if self._pool is None:
            first = self._main.servers[0] if self._main.servers else None
            self._pool = ServerPool(
                self._request.spec,
                self._request.runtime.for_another_server(),
                image=first.about().get("image") if first else None,
                run_id=self._record.run_id,
                say=self._viewer.say,
                started=self._record.started,
                left=self._left,
            )
        return self._pool.lent(**wanted)

    @staticmethod
    def _lacking(check: Check[Any], server: Server) -> str | None:
        if check.own_server and not server.running.owned:
            return "it starts a server of its own, and this run was given one that runs already"
        if check.changes and not server.may_change:
            return "it modifies the server for a while (--allow-changes was not given)"
        for need in check.needs:
            try:
                with server.client.within(STATES_ITSELF_WITHIN):
                    if reason := need.lacking(server):
                        return reason
            except Exception:
                # It cannot be asked now; the check itself will say what is wrong.
                return None
        return None

    def _cannot_ask(self) -> tuple[str, str | None] | None:
        """Why no check can be asked any more, and which check's failure that is."""
        if self._closed_gate:
            reason = f"{self._closed_gate} failed, so what this check would see means nothing"
            return reason, self._closed_gate
        if self._main.unusable:
            return self._main.unusable, self._main.because
        if self._left() <= 0:
            return TIME_IS_OVER.format(self._request.spec.limits.run), None
        return None

    def _left(self) -> float:
        """Seconds that are left of ``limits.run``."""
        return self._request.spec.limits.run - self._record.seconds

    def _never_came_up(self, message: str, outcome: Outcome) -> None:
        launched, message = "launch/phases", self._record.redactor.text(message)
        seconds = self._record.seconds
        result = CheckResult(id=launched, outcome=outcome, seconds=seconds, message=message)
        self._record.file(result)
        if outcome is Outcome.FAIL:
            self._viewer.end(result)
        for check in self._checks:
            if check.id != launched:
                self._record.not_run(check.id, "the server never came up", launched)

    def _failed(self, error: BaseException) -> None:
        """An exception of the harness's own: told, kept beside the logs, and no reason to lose
        what was seen."""
        text = "".join(traceback.format_exception(error))
        self._record.fails(error)
        self._record.logs.append(f"--- the harness itself failed ---\n{text}")
        have = {r.id for r in self._record.results} | {o.id for o in self._record.outside}
        for check in self._checks:
            if check.id not in have:
                self._record.not_run(check.id, f"the harness failed: {self._record.failure}")

    # --- ending -----------------------------------------------------------------------------

    def _put_away(self) -> None:
        """Ends everything that this run started. Each step on its own; what failed is a caveat."""
        record, main = self._record, self._main
        with Teardown() as down:
            if self._pool is not None:
                down.step("the checks' own servers", self._pool.close)
            down.step("the server", self._end_main)
            down.step("the questions after the stop", self._ask_after_stop)
            down.step("the reference models", oracle.forget)
            record.servers = main.servers
            if not record.interrupted and main.servers:
                self._note_unasked(down.failures)
            record.logs += [*main.logs, *(self._pool.logs if self._pool else [])]
            left = [*main.left_behind, *(self._pool.left_behind if self._pool else [])]
            record.caveats += [
                *self._request.runtime.caveats,
                *main.caveats,
                *(NOT_REMOVED.format(line) for line in [*down.failures, *left]),
            ]

    def _note_unasked(self, failures: list[str]) -> None:
        """What should have been asked after the stop, and could not be, is no pass."""
        filed = {r.id for r in self._record.results} | {o.id for o in self._record.outside}
        for check in self._checks:
            if check.after_stop and check.id not in filed:
                why = failures[0] if failures else "how the server ended is not known"
                self._record.not_run(check.id, f"it could not be asked: {why}")

    def _end_main(self) -> None:
        record, main = self._record, self._main
        running = [s for s in main.servers if s.stopped is None]
        if not running:
            return
        lives = running[-1].running.watch.ended is None
        wanted = self._request.keep_on_failure and not record.interrupted and lives
        if wanted and record.state != "pass":
            try:
                self._keep(running[-1])
            except BaseException:
                # Nobody will look for it, so it is not left.
                main.stop(running[-1])
                raise
            return
        self._tell("stopping the server" if running[0].running.owned else "detaching")
        if record.interrupted or record.failure:
            main.give_back(running[-1])
        judged = not record.interrupted and any(check.after_stop for check in self._checks)
        for server in running:
            main.stop(server, at_once=not judged)

    def _keep(self, server: Server) -> None:
        self.kept = kept_servers.hold(server)
        self._record.logs.append(log_of(server))
        for check in self._checks:
            if check.after_stop:
                self._record.leave_out(check.id, "the server was kept running")

    def _ask_after_stop(self) -> None:
        record, main = self._record, self._main
        if record.interrupted or not main.servers:
            return
        before = len(record.results)
        last = main.servers[-1]
        if last.stopped is not None:
            self._ask_of_stopped(last)
        # A GPU that was not given back fails the run, whichever server kept it.
        judged = {r.id for r in record.results[before:] if r.outcome is not Outcome.NOT_RUN}
        for server in (*main.servers, *(self._pool.stopped if self._pool else ())):
            stopped = server.stopped
            if stopped is None or all(d.given_back for d in stopped.devices):
                continue
            if not (server is last and DeviceIsGivenBack.id in judged):
                context = self._context(server)
                record.add(*run_check(DeviceIsGivenBack(), context))

    def _ask_of_stopped(self, server: Server) -> None:
        assert server.stopped is not None
        record = self._record
        filed = {r.id for r in record.results} | {o.id for o in record.outside}
        context = self._context(server)
        for check in (c for c in self._checks if c.after_stop and c.id not in filed):
            if reason := self._lacking(check, server):
                record.leave_out(check.id, reason)
            elif (self._closed_gate or self._main.unusable) and (blocked := self._cannot_ask()):
                record.not_run(check.id, *blocked)
            elif server.stopped.exit_code is None:
                record.not_run(check.id, "how the server ended is not known")
            else:
                self._viewer.begin(check.id, len(self._checks), len(self._checks))
                record.add(*run_check(check, context))

    def _tell(self, message: str) -> None:
        """Says something while the run ends, which no viewer may prevent."""
        with suppress(Exception, SystemExit):
            self._viewer.say(message)

    def _write(self) -> Verdict:
        record, out = self._record, self._request.out
        for reason, number in record.not_asked.items():
            self._tell(f"{number} {'check' if number == 1 else 'checks'} not run: {reason}")
        # 'auto' says only now what it turned out to be.
        record.runtime = self._request.runtime.name
        verdict = record.verdict()
        with Teardown() as down:
            down.step(LOG, lambda: write_whole(out / LOG, record.log()))
        if down.failures:
            verdict.caveats.append(f"not written: {down.failures[0]}")
        self.verdict = verdict
        report.write_all(verdict, out)
        return verdict


def _version(server: Server) -> str | None:
    """The version that the server states; ``None`` where it does not: the checks say why."""
    try:
        with server.client.within(STATES_ITSELF_WITHIN):
            return str(server.client.server_info().get("version") or "") or None
    except RequestFailed:
        return None


def _can_be_written(out: Path) -> None:
    """Makes the folder, and finds out before a server is started whether results fit in there.

    Raises:
        SpecError: they cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out, prefix=".sglang-harness-"):
            pass
    except OSError as error:
        raise SpecError(
            f"The results cannot be written to {out}: {error.strerror}.",
            advice="Give another folder with --out.",
        ) from None
