"""From "created" to "answers a real generation": each phase timed, death told from slowness.

What SGLang 0.5.23 answers while it starts: the connection is refused for most of the time
(imports and loading), then ``/v1/models`` and ``/model_info`` answer 200 while ``/ready``
and ``/health`` still answer 503, then everything answers. So an open port and a listed
model prove nothing, ``/ready`` says when to try, and only a generated token ends the wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sglang_harness._base.secrets import Redactor
from sglang_harness.client import calls
from sglang_harness.client.call import Call, understand
from sglang_harness.client.transport import RequestsTransport, Transport
from sglang_harness.errors import (
    NoAnswerInTime,
    RequestFailed,
    ServerDied,
    StartTimeout,
    Unreachable,
)
from sglang_harness.runtime.death import DeathWatch

#: Seconds between two looks. A look costs a refused connection or a 503 of a millisecond.
INTERVAL = 0.05

#: Answers that are asked for beside ``/ready``, to record which of them would have lied.
BYSTANDERS = ("/v1/models", "/model_info")

PHASES = ("create", "import", "load", "first generation")


@dataclass(frozen=True)
class Phase:
    """One stretch of a start; ``seconds`` long, the phases following one another."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Sighting:
    """The first time a route gave an answer, ``seconds`` after the start began."""

    route: str
    answer: str
    """An HTTP status, ``refused`` or ``no answer``."""
    seconds: float


@dataclass
class StartReport:
    """How a server came up.

    Attributes:
        phases: ``create`` (until the container runs), ``import`` (connections refused),
            ``load`` (answers, but not yet ready), ``first generation``.
        sightings: each change of answer of each route that was looked at, in order.
        premature: routes that answered 200 before the server was ready.
        ready_by: the route that said so, ``/ready`` or ``/health``.
        first_tokens: how many tokens the first real generation gave.
        looks: how many times the server was looked at.
    """

    phases: list[Phase] = field(default_factory=list)
    sightings: list[Sighting] = field(default_factory=list)
    premature: list[str] = field(default_factory=list)
    ready_by: str = ""
    ready_after: float = 0.0
    first_tokens: int = 0
    looks: int = 0

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)


class _Looker:
    """Looks at routes and keeps what they answered, and when that changed."""

    def __init__(
        self, transport: Transport, started: float, until: float, report: StartReport
    ) -> None:
        self._transport = transport
        self._started = started
        self._until = until
        self._report = report
        self._last: dict[str, str] = {}

    def look(self, call: Call[None]) -> str:
        left = max(0.1, self._until - time.monotonic())
        call = replace(call, timeout=min(left, call.timeout or left))
        try:
            answer = str(self._transport.send(call).status)
        except Unreachable:
            answer = "refused"
        except NoAnswerInTime:
            answer = "no answer"
        self._report.looks += 1
        if self._last.get(call.path) != answer:
            self._last[call.path] = answer
            self._report.sightings.append(
                Sighting(call.path, answer, time.monotonic() - self._started)
            )
        return answer

    def generate(self) -> int:
        """Generates two tokens from ids that every vocabulary has; returns how many came."""
        left = max(0.1, self._until - time.monotonic())
        call = calls.generate(
            [1, 2, 3], sampling={"max_new_tokens": 2, "ignore_eos": True}, timeout=min(60.0, left)
        )
        try:
            return len(understand(call, self._transport.send(call)).output_ids)
        except RequestFailed as error:
            self._last[call.path] = error.message
            raise

    def last(self) -> str:
        return ", ".join(f"{path}: {answer}" for path, answer in self._last.items()) or "nothing"


def wait_until_ready(
    address: str,
    *,
    api_key: str | None,
    watch: DeathWatch,
    limit: float,
    started: float | None = None,
    last_log_line: Callable[[], str] = lambda: "",
    redactor: Redactor | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> StartReport:
    """Waits until the server at ``address`` has generated a token.

    Args:
        limit: seconds, counted from ``started`` (``time.monotonic()`` before the container
            was made; now, where it is ``None``).
        last_log_line: asked for when the time is up, for the message.
        redactor: knows the secrets that may stand in that line.

    Raises:
        ServerDied: at once, with the reason, when the server ends.
        StartTimeout: the server runs and ``limit`` seconds have passed, or it answered a generation
            with 200 and not one token.
    """
    created = time.monotonic()
    started = created if started is None else started
    report = StartReport(phases=[Phase("create", created - started)])
    transport = RequestsTransport(address, api_key=api_key, connect_timeout=2.0)
    looker = _Looker(transport, started, started + limit, report)

    def pause() -> None:
        if death := watch.wait(INTERVAL):
            raise ServerDied(death)
        if time.monotonic() - started > limit:
            # SGLang prints its key while it starts.
            line = (redactor or Redactor(api_key or "")).text(last_log_line())
            raise StartTimeout(
                f"The server process is running, but no generation succeeded within {limit:g} s "
                f"(last answers: {looker.last()}; last log line: {line or 'none'}).",
                advice="Raise limits.start if the model is large; the log shows how far it came.",
            )

    try:
        while looker.look(calls.ready()) in ("refused", "no answer"):
            pause()
        answered = time.monotonic()
        report.phases.append(Phase("import", answered - created))
        say("the server answers, and loads the model")
        report.ready_by = _wait_for_ready(looker, report, pause)
        ready = time.monotonic()
        report.ready_after = ready - started
        report.phases.append(Phase("load", ready - answered))
        report.first_tokens = _first_generation(looker, watch, pause)
        report.phases.append(Phase("first generation", time.monotonic() - ready))
        return report
    finally:
        transport.close()


def _wait_for_ready(looker: _Looker, report: StartReport, pause: Callable[[], None]) -> str:
    route = calls.ready()
    while True:
        answer = looker.look(route)
        if answer == "200":
            return route.path
        if answer == "404" and route.path == "/ready":
            # Before 0.5.20 there is no /ready; /health generates a token inside the server.
            route = calls.health()
            continue
        # Each is asked until it has answered too early once: asking on would hold up the looks
        # at the route that counts.
        for path in (p for p in BYSTANDERS if p not in report.premature):
            bystander: Call[None] = Call("GET", path, lambda _: None, timeout=2.0)
            if looker.look(bystander) == "200":
                report.premature.append(path)
        pause()


def _first_generation(looker: _Looker, watch: DeathWatch, pause: Callable[[], None]) -> int:
    while True:
        try:
            tokens = looker.generate()
        except RequestFailed as error:
            if death := watch.wait(1.0):
                raise ServerDied(death) from error
            pause()
            continue
        if not tokens:
            raise StartTimeout(
                "The server is ready and answered the first generation with 200 and no token.",
                advice="Its log may show what it generated; no check was asked of it.",
            )
        return tokens
