"""What a run has seen so far, and the verdict that follows from it whenever it ends."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime, timezone
from typing import Any, Literal, TypeVar

from sglang_harness import __version__
from sglang_harness._base import host
from sglang_harness._base.secrets import Redactor
from sglang_harness.errors import HarnessError, SpecError, TelemetryError
from sglang_harness.memory.gpu.driver import Driver
from sglang_harness.memory.gpu.selection import select
from sglang_harness.runtime import engine
from sglang_harness.server import Server
from sglang_harness.spec import ServerSpec
from sglang_harness.suite import installed, known_defects
from sglang_harness.suite.blame import place
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

T = TypeVar("T")

CPU_CAVEAT = (
    "CPU stand-in kernels: SGLang computed with plain torch; its own kernels were not exercised."
)

WARM_CAVEAT = (
    "{warm} of {all} servers were started warm, from a parent that had imported SGLang already: "
    "how these start was not judged (--start cold starts each as its image does)."
)

FIRST_CALL_CAVEAT = (
    "The NVIDIA driver has only the first version of the memory call: figures of use include what "
    "the driver reserves for itself."
)


@dataclass
class RunRecord:
    """Filled while a run goes on.

    Attributes:
        failure: what the harness itself did wrong, in one line; the verdict is then ``error``.
        shown: the server that the verdict names.
        started_here: this run's first server came up and was judged, so its phases count.
        not_asked: how many checks were not asked, by the reason: one line for a viewer, not many.
        caveats: what a reader has to know beside the outcomes.
        logs: what servers wrote, with secrets removed.
    """

    spec: ServerSpec
    runtime: str
    profile: ProfileName
    patterns: list[str]
    seed: int
    strict_known: bool
    defects: list[known_defects.KnownDefect]
    added: list[installed.Added]
    say: Callable[[CheckResult], None]
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    results: list[CheckResult] = field(default_factory=list)
    outside: list[Outside] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    servers: list[Server] = field(default_factory=list)
    starts: list[ServerStart] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    version: str | None = None
    shown: Server | None = None
    started_here: bool = False
    not_asked: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False
    failure: str = ""

    def __post_init__(self) -> None:
        self._started = datetime.now(timezone.utc)
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._began

    def started(self, server: Server, name: str) -> None:
        """A server came up."""
        how = server.running.started
        self.starts.append(
            ServerStart(name=name, how=how.how, why=how.why, seconds=server.report.seconds)
        )

    def add(self, result: CheckResult, figures: list[Figure]) -> CheckResult:
        """Files a result as the registry of known defects has it, and returns it so."""
        device = self.shown.device if self.shown else "cpu"
        result = known_defects.apply(
            result, self.defects, version=self.version, device=device, today=date.today()
        )
        self.results.append(result)
        self.figures += figures
        self.say(result)
        return result

    def file(self, result: CheckResult) -> None:
        """Files a result that follows from another one, without a line of its own for a viewer."""
        self.results.append(result)

    def not_run(self, check_id: str, reason: str, because: str | None = None) -> None:
        """A check that was not asked.

        Args:
            because: the check whose failure is the reason; ``None``: the reason is another one.
        """
        reason = self.redactor.text(reason)
        result = CheckResult(
            id=check_id, outcome=Outcome.NOT_RUN, seconds=0, message=reason, because=because
        )
        self.file(result)
        self.not_asked[reason] = self.not_asked.get(reason, 0) + 1

    def leave_out(self, check_id: str, reason: str) -> None:
        """The target lacks what the check needs."""
        self.outside.append(Outside(id=check_id, reason=self.redactor.text(reason)))

    def died(self, check_id: str, how: str) -> None:
        """The server ended by itself after a check that had passed: that is no pass."""
        last = self.results[-1]
        if last.id == check_id and last.outcome in (Outcome.PASS, Outcome.FIXED):
            message = self.redactor.text(f"the server died after this check: {how}")
            update = {"outcome": Outcome.FAIL, "message": message, "known_defect": None}
            self.results[-1] = last.model_copy(update=update)
            self.say(self.results[-1])

    def fails(self, error: BaseException) -> None:
        """The harness itself did something wrong."""
        told = f"{type(error).__name__} in {place(error)}: {error}"
        self.failure = self.redactor.text(told)

    @property
    def redactor(self) -> Redactor:
        """Knows the secrets of every server of this run."""
        servers = [*self.servers, *([self.shown] if self.shown else [])]
        return self.spec.redactor(*(server.running.api_key for server in servers))

    def log(self) -> str:
        """All logs as they are written down."""
        return self.redactor.text("\n".join(self.logs))

    @property
    def state(self) -> Literal["pass", "fail", "error"]:
        """The verdict over what was seen so far."""
        return self._overall()[0]

    def _overall(self) -> tuple[Literal["pass", "fail", "error"], str]:
        state, reason = overall(
            self.results, interrupted=self.interrupted, strict_known=self.strict_known
        )
        if self.failure and not self.interrupted:
            return "error", f"the harness failed: {self.failure}"
        return state, reason

    def verdict(self) -> Verdict:
        """The verdict as of now. What cannot be found out about the machine becomes a caveat."""
        server = self.shown
        state, reason = self._overall()
        device = server.device if server else "unknown"
        spec = server.spec if server else self.spec
        redactor = self.redactor
        phases = (
            [PhaseTime(name=p.name, seconds=p.seconds) for p in server.report.phases]
            if server and self.started_here
            else []
        )
        nothing: dict[str, Any] = {}
        told = {
            **self._tried("the host", host.describe, nothing),
            "docker": self._tried("the Docker engine", _engine, nothing),
        }
        about_device = self._tried("the GPUs", lambda: _device(device, spec), {"kind": device})
        about = self._tried("the image", server.about, None) if server else None
        caveats = [
            *([CPU_CAVEAT] if device == "cpu" else []),
            *self._warm_caveat(),
            *self.caveats,
            *(c for s in self.servers for c in _gaps(s)),
        ]
        return Verdict(
            run_id=self.run_id,
            started=self._started,
            seconds=self.seconds,
            verdict=state,
            reason=redactor.text(reason),
            profile="selected" if self.patterns else self.profile,
            selection=" or ".join(self.patterns) or None,
            interrupted=self.interrupted,
            strict_known=self.strict_known,
            harness_version=__version__,
            sglang_version=self.version,
            image=about,
            model={
                "name": spec.model,
                "folder": server.model.name if server and server.model else None,
            },
            device=about_device,
            runtime=self.runtime,
            spec=redactor.data(spec.written()),
            seed=self.seed,
            checks=self.results,
            outside_profile=self.outside,
            figures=[
                *[Figure.of(f"start: {p.name}", "s", "lower", p.seconds) for p in phases],
                *self.figures,
            ],
            phases=phases,
            servers=self.starts,
            memory=[r for s in self.servers for r in s.memory.readings],
            environment={**told, "checks_added": [vars(added) for added in self.added]},
            caveats=[redactor.text(caveat) for caveat in caveats],
        )

    def _warm_caveat(self) -> list[str]:
        warm = sum(start.how == "warm" for start in self.starts)
        return [WARM_CAVEAT.format(warm=warm, all=len(self.starts))] if warm else []

    def _tried(self, what: str, do: Callable[[], T], otherwise: T) -> T:
        try:
            return do()
        except Exception as error:
            self.caveats.append(
                f"{what} could not be described: {type(error).__name__} in {place(error)}: {error}"
            )
            return otherwise


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
