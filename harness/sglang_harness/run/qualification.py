"""The main job: start a server, ask it every question, return a verdict with evidence."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from sglang_harness import __version__, oracle, suite
from sglang_harness._base import host
from sglang_harness._base.file_lease import LeaseTaken
from sglang_harness._base.secrets import Redactor, named_as_secrets
from sglang_harness._base.signals import interruptions
from sglang_harness.errors import (
    DeviceNotIdle,
    DidNotComeUp,
    HarnessError,
    Interrupted,
    ServerDied,
    SpecError,
    StartTimeout,
    TelemetryError,
)
from sglang_harness.memory.gpu.driver import Driver
from sglang_harness.memory.gpu.selection import select
from sglang_harness.report import junit
from sglang_harness.run.server_pool import OwnServers
from sglang_harness.runtime import Runtime, engine
from sglang_harness.runtime.docker import DockerRuntime
from sglang_harness.server import Server
from sglang_harness.spec import ServerSpec
from sglang_harness.suite import installed, known_defects
from sglang_harness.suite.check import Check, Context, run_check
from sglang_harness.suite.checks.memory.readings import DeviceIsGivenBack
from sglang_harness.upkeep import kept_servers
from sglang_harness.verdict import (
    CheckResult,
    Figure,
    Outcome,
    Outside,
    PhaseTime,
    ProfileName,
    ServerStart,
    Verdict,
    overall,
)

#: How often a server that died under a check is replaced, so that the rest can be asked.
REPLACEMENTS = 2

CPU_CAVEAT = (
    "CPU stand-in kernels: SGLang computed with plain torch; its own kernels were not exercised."
)

WARM_CAVEAT = (
    "{warm} of {all} servers were started warm, from a parent that had imported SGLang already: "
    "how these start was not judged (--start cold starts each as its image does)."
)

FIRST_CALL_CAVEAT = (
    "The NVIDIA driver has only the first version of the memory call: figures of use hold what "
    "the driver reserves for itself."
)

#: What keeps a server from being started that nobody can blame on it.
NO_GREEN_LIGHT = (LeaseTaken, TelemetryError, DeviceNotIdle)

RESULTS = ("verdict.json", "junit.xml", "server.log")


class Viewer(Protocol):
    """Shows a person what happens while it happens."""

    def say(self, message: str) -> None: ...

    def begin(self, check_id: str, number: int, total: int) -> None: ...

    def end(self, result: CheckResult) -> None: ...


@dataclass
class Request:
    """What to qualify, and how.

    Attributes:
        out: folder for the results; made where missing, results of an earlier run replaced.
        patterns: ``-k``; the profile is then ``selected``.
        keep_on_failure: leave the server running where the verdict is no pass.
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
    """One run. Whatever ends it, what was seen so far becomes the verdict.

    Attributes:
        kept: the server, where it was left running for a person.
    """

    def __init__(self, request: Request, viewer: Viewer) -> None:
        self._request = request
        self._viewer = viewer
        self._added = installed.load()
        self._checks = suite.select(request.profile, request.patterns)
        self._defects = known_defects.load(set(suite.registered()))
        self._run_id = uuid.uuid4().hex[:12]
        self._started = datetime.now(timezone.utc)
        self._began = time.monotonic()
        self._results: list[CheckResult] = []
        self._outside: list[Outside] = []
        self._figures: list[Figure] = []
        self._caveats: list[str] = []
        self._servers: list[Server] = []
        self._starts: list[ServerStart] = []
        self._stands_in: Server | None = None
        """One of the checks' own, where no other server was needed."""
        self._logs: list[str] = []
        self._version: str | None = None
        self._scratch = Path()
        self._replaced = 0
        self._own_servers: OwnServers | None = None
        self.kept: kept_servers.Held | None = None

    def run(self) -> Verdict:
        """Runs the suite; writes ``verdict.json``, ``junit.xml`` and ``server.log``.

        Raises:
            SpecError, EngineError, ImageError, ModelError, MissingExtra: nothing could be
                started; there is no verdict.
            Interrupted: after what was seen has been written, with the verdict ``error``.
        """
        _prepare(self._request.out)
        for added in self._added:
            self._viewer.say(f"with {len(added.checks)} checks of {added.package} {added.version}")
        self._scratch = Path(tempfile.mkdtemp(prefix="sglang-harness-scratch-"))
        with interruptions() as signals:
            with self._request.runtime.keeping_parents():
                try:
                    self._ask_everything()
                except Interrupted as error:
                    self._viewer.say(f"{error}; stopping what runs")
                finally:
                    signals.calm()
                    self._put_away(interrupted=signals.seen is not None)
            verdict = self._verdict(interrupted=signals.seen is not None)
            self._write(verdict)
        if signals.seen is not None:
            raise signals.seen
        return verdict

    # --- the way there ----------------------------------------------------------------------

    def _ask_everything(self) -> None:
        try:
            server, lacking = self._first_server()
        except (ServerDied, StartTimeout, DidNotComeUp) as error:
            self._never_came_up(f"expected a server that comes up; {error}", Outcome.FAIL)
            return
        except NO_GREEN_LIGHT as error:
            self._never_came_up(str(error), Outcome.ERROR)
            return
        context = Context(server, self._request.seed, self._own_server, self._scratch)
        asked = [c for c in self._checks if not c.after_stop]
        for number, check in enumerate(asked, start=1):
            if reason := lacking(check, context.server):
                self._outside.append(Outside(id=check.id, reason=reason))
                continue
            if reason := self._cannot_ask():
                self._record(
                    CheckResult(id=check.id, outcome=Outcome.NOT_RUN, seconds=0, message=reason),
                    [],
                )
                continue
            self._viewer.begin(check.id, number, len(asked))
            with context.server.client.within(self._request.spec.limits.check):
                result = run_check(check, context)
            self._record(*result)
            self._replace_if_dead(context, check)

    def _first_server(self) -> tuple[Server, Callable[[Check[Any], Server], str | None]]:
        """The server that checks are asked of, and how to tell what it lacks for one.

        Where every check has a server of its own, nobody would ask this one anything, so it is
        one of theirs, which the next check takes over.
        """
        if all(check.own_server for check in self._checks):
            with self._own_server() as server:
                self._stands_in = server
                self._version = _version(server)
                known = {check.id: self._lacking(check, server) for check in self._checks}
            return server, lambda check, _: known[check.id]
        # Its start is judged, so it is started as anybody would.
        spec = self._request.spec
        if self._request.runtime.starts:
            spec = spec.model_copy(update={"start": "cold"})
        server = self._start(spec)
        self._version = _version(server)
        return server, self._lacking

    def _start(self, spec: ServerSpec) -> Server:
        try:
            server = Server.start(
                spec,
                runtime=self._request.runtime,
                say=self._viewer.say,
                run_id=self._run_id,
                held=self._request.keep_on_failure,
            )
        except (HarnessError, Interrupted) as error:
            self._logs.append(error.log)
            raise
        self._servers.append(server)
        self._has_started(server, "the server")
        server.about()
        return server

    def _has_started(self, server: Server, name: str) -> None:
        started = server.running.started
        self._starts.append(
            ServerStart(name=name, how=started.how, why=started.why, seconds=server.report.seconds)
        )

    def _never_came_up(self, message: str, outcome: Outcome) -> None:
        launched = suite.registered()["launch/phases"]
        seconds = time.monotonic() - self._began
        result = CheckResult(id=launched.id, outcome=outcome, seconds=seconds, message=message)
        self._record(result, [])
        self._outside += [
            Outside(id=c.id, reason="the server never came up")
            for c in self._checks
            if c.id != launched.id
        ]

    def _own_server(self, **wanted: Any) -> AbstractContextManager[Server]:
        """See :class:`sglang_harness.suite.check.OwnServer`."""
        if self._own_servers is None:
            self._own_servers = OwnServers(
                self._request.spec,
                self._request.runtime.for_another_server(),
                image=self._servers[0].about().get("image") if self._servers else None,
                run_id=self._run_id,
                say=self._viewer.say,
                started=self._has_started,
            )
        return self._own_servers.lent(**wanted)

    @staticmethod
    def _lacking(check: Check[Any], server: Server) -> str | None:
        if check.own_server and not server.running.owned:
            return "it starts a server of its own, and this run was given one that runs already"
        if check.changes and not server.may_change:
            return "it changes the server for a while (--allow-changes was not given)"
        for need in check.needs:
            try:
                if reason := need.lacking(server):
                    return reason
            except HarnessError:
                # Cannot be asked now; the check itself will say what is wrong.
                return None
        return None

    def _cannot_ask(self) -> str | None:
        if time.monotonic() - self._began > self._request.spec.limits.run:
            return f"the run's limit of {self._request.spec.limits.run:g} s was over"
        if self._servers and self._servers[-1].running.watch.death is not None:
            return "the server had died, and was not replaced again"
        return None

    def _record(self, result: CheckResult, figures: list[Figure]) -> None:
        server = self._shown()
        device = server.device if server else "cpu"
        result = known_defects.apply(
            result, self._defects, version=self._version, device=device, today=date.today()
        )
        self._results.append(result)
        self._figures += figures
        self._viewer.end(result)

    def _shown(self) -> Server | None:
        """The server that the verdict names."""
        return self._servers[0] if self._servers else self._stands_in

    def _replace_if_dead(self, context: Context, check: Check[Any]) -> None:
        death = self._servers[-1].running.watch.death if self._servers else None
        if death is None or self._replaced >= REPLACEMENTS:
            return
        if not self._request.runtime.starts:
            self._replaced = REPLACEMENTS
            return
        self._replaced += 1
        self._caveats.append(f"The server died under {check.id} and was replaced.")
        self._viewer.say(f"{death.sentence()} Starting another for the remaining checks")
        self._stop(context.server)
        try:
            context.server = self._start(self._request.spec)
        except (ServerDied, StartTimeout):
            self._replaced = REPLACEMENTS
            return
        except NO_GREEN_LIGHT as error:
            self._caveats.append(f"It was not replaced: {error}")
            self._replaced = REPLACEMENTS
            return
        context.variants.clear()
        shutil.rmtree(self._scratch / "variant", ignore_errors=True)

    # --- the way back -----------------------------------------------------------------------

    def _put_away(self, *, interrupted: bool) -> None:
        try:
            if self._own_servers is not None:
                self._own_servers.close()
                self._logs += self._own_servers.logs
            running = [s for s in self._servers if s.stopped is None]
            state, _ = overall(self._results, interrupted=interrupted)
            if running and self._request.keep_on_failure and not interrupted and state != "pass":
                self._keep(running[-1])
                return
            for server in running:
                self._viewer.say("stopping the server" if server.running.owned else "detaching")
                judged = not interrupted and any(check.after_stop for check in self._checks)
                self._stop(server, at_once=not judged)
            if not interrupted and self._servers:
                self._ask_after_stop(self._servers[-1])
        finally:
            oracle.forget()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _keep(self, server: Server) -> None:
        self._logs.append(server.logs())
        self.kept = kept_servers.hold(server)
        self._outside += [
            Outside(id=c.id, reason="the server was kept for a person")
            for c in self._checks
            if c.after_stop
        ]

    def _stop(self, server: Server, *, at_once: bool = True) -> None:
        log = server.logs()
        server.stop(at_once=at_once)
        self._logs.append(server.logs() or log)

    def _ask_after_stop(self, server: Server) -> None:
        before = len(self._results)
        self._ask_of_stopped(server)
        # A GPU that was kept fails the run, whichever server kept it and whatever was asked.
        judged = {r.id for r in self._results[before:] if r.outcome is not Outcome.NOT_RUN}
        beside = self._own_servers.stopped if self._own_servers is not None else []
        for each in (*self._servers, *beside):
            kept = each.stopped is not None and not all(d.given_back for d in each.stopped.devices)
            if kept and not (each is server and DeviceIsGivenBack.id in judged):
                context = Context(each, self._request.seed, self._own_server, self._scratch)
                self._record(*run_check(DeviceIsGivenBack(), context))

    def _ask_of_stopped(self, server: Server) -> None:
        if server.stopped is None:
            return
        context = Context(server, self._request.seed, self._own_server, self._scratch)
        for check in (c for c in self._checks if c.after_stop):
            if reason := self._lacking(check, server):
                self._outside.append(Outside(id=check.id, reason=reason))
                continue
            if server.stopped.exit_code is None:
                reason = "how the server ended could not be told"
                result = CheckResult(
                    id=check.id, outcome=Outcome.NOT_RUN, seconds=0, message=reason
                )
                self._record(result, [])
                continue
            self._viewer.begin(check.id, len(self._checks), len(self._checks))
            self._record(*run_check(check, context))

    def _verdict(self, *, interrupted: bool) -> Verdict:
        request, server = self._request, self._shown()
        state, reason = overall(
            self._results,
            interrupted=interrupted,
            strict_known=request.strict_known,
        )
        device = server.device if server else "unknown"
        spec = server.spec if server else request.spec
        caveats = [
            *([CPU_CAVEAT] if device == "cpu" else []),
            *([request.runtime.caveat] if request.runtime.caveat else []),
            *self._warm_caveat(),
            *self._caveats,
            *(c for s in self._servers for c in _gaps(s)),
        ]
        phases = (
            [PhaseTime(name=p.name, seconds=p.seconds) for p in server.report.phases]
            if self._servers and server
            else []
        )
        return Verdict(
            run_id=self._run_id,
            started=self._started,
            seconds=time.monotonic() - self._began,
            verdict=state,
            reason=reason,
            profile="selected" if request.patterns else request.profile,
            selection=" or ".join(request.patterns) or None,
            interrupted=interrupted,
            harness_version=__version__,
            sglang_version=self._version,
            image=server.about() if server else None,
            model={
                "name": spec.model,
                "folder": server.model.name if server and server.model else None,
            },
            device=_device(device, spec),
            runtime=request.runtime.name,
            spec=Redactor(*named_as_secrets(spec.environment)).data(spec.model_dump(mode="json")),
            seed=request.seed,
            checks=self._results,
            outside_profile=self._outside,
            figures=[
                *[Figure.of(f"start: {p.name}", "s", "lower", p.seconds) for p in phases],
                *self._figures,
            ],
            phases=phases,
            servers=self._starts,
            memory=[r for s in self._servers for r in s.memory.readings],
            environment={
                **host.describe(),
                "docker": _engine(),
                "checks_added": [vars(added) for added in self._added],
            },
            caveats=caveats,
        )

    def _warm_caveat(self) -> list[str]:
        warm = sum(start.how == "warm" for start in self._starts)
        return [WARM_CAVEAT.format(warm=warm, all=len(self._starts))] if warm else []

    def _write(self, verdict: Verdict) -> None:
        out = self._request.out
        verdict.write(out / "verdict.json")
        junit.write(verdict, out / "junit.xml")
        (out / "server.log").write_text("\n".join(self._logs), encoding="utf-8", errors="replace")


def _version(server: Server) -> str | None:
    return str(server.client.server_info().get("version") or "") or None


def _prepare(out: Path) -> None:
    """Makes the folder and takes away what an earlier run left in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in RESULTS:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise SpecError(
            f"The results cannot be written to {out}: {error.strerror}.",
            advice="Give another folder with --out.",
        ) from None


def _gaps(server: Server) -> list[str]:
    """What is not known of the server's GPU memory, or known with less."""
    found = [
        f"{source} was not read {times} times while the server ran: {reason}"
        for source, sampler in server.memory.samplers.items()
        for reason, times in sampler.gaps.items()
    ]
    if server.memory.first_call_only:
        found.append(FIRST_CALL_CAVEAT)
    return found


def _device(kind: str, spec: ServerSpec) -> dict[str, Any]:
    if kind != "gpu":
        return {"kind": kind}
    try:
        with Driver() as driver:
            found, _ = driver.gpus()
            versions = driver.versions()
            chosen = select(found, spec.gpus)
    except (TelemetryError, SpecError) as error:
        return {"kind": kind, "gpus": [], "unknown": error.message}
    return {"kind": kind, "gpus": [vars(g) for g in chosen], **vars(versions)}


def _engine() -> dict[str, Any]:
    try:
        client = engine.connect()
    except HarnessError:
        return {}
    try:
        return engine.about(client)
    finally:
        client.close()
