"""Does the server come up as it was told to, stay ready, and go down without a trace?"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from typing import Any

from pydantic import BaseModel, ConfigDict

from sglang_harness.client import Call
from sglang_harness.errors import NoAnswerInTime, Refused, TimeIsOver, Unreachable
from sglang_harness.server import Server
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, expect, register
from sglang_harness.suite.needs import STARTED_HERE

#: Seconds for which a server that said "ready" has to keep saying so, and between two looks.
STAYS_READY, LOOKS_EVERY = 2.0, 0.05
#: Seconds for one answer; ``/health`` takes up to 20 s for a 503 (SGLang 0.5.23).
ANSWERS_WITHIN = 25.0


class Seen(BaseModel):
    """The first time a route gave an answer, in seconds from the start."""

    model_config = ConfigDict(extra="forbid")

    route: str
    answer: str
    seconds: float


class CameUp(Observation):
    phases: dict[str, float]
    sightings: list[Seen]
    premature: list[str]
    ready_by: str
    ready_after: float
    first_tokens: int


def _came_up(server: Server) -> dict[str, Any]:
    report = server.report
    return {
        "phases": {phase.name: phase.seconds for phase in report.phases},
        "sightings": [Seen(**vars(sighting)) for sighting in report.sightings],
        "premature": report.premature,
        "ready_by": report.ready_by,
        "ready_after": report.ready_after,
        "first_tokens": report.first_tokens,
    }


@register
class StartsInPhases(Check[CameUp]):
    id = "launch/phases"
    sentence = "The server comes up, and its first generation has the tokens that were asked for."
    observation = CameUp
    needs = (STARTED_HERE,)

    def observe(self, context: Context) -> CameUp:
        return CameUp(**_came_up(context.server))

    def judge(self, seen: CameUp) -> list[Mismatch]:
        return list(expect("tokens of the first generation", 2, seen.first_tokens))


class StayedReady(CameUp):
    afterwards: dict[str, int] | None = None
    """How often the route that said "ready" gave each answer when it was asked again for two
    seconds; ``None`` in verdicts that were written before it was asked again."""


@register
class ReadinessIsTrue(Check[StayedReady]):
    id = "launch/readiness"
    sentence = (
        "The route that says 'ready' refuses before the server can generate, and once it has said "
        "'ready' the first generation succeeds and the route does not take it back."
    )
    observation = StayedReady
    needs = (STARTED_HERE,)

    def observe(self, context: Context) -> StayedReady:
        server = context.server
        route = Call("GET", server.report.ready_by, lambda _: None, timeout=ANSWERS_WITHIN)
        answers: Counter[str] = Counter()
        until = time.monotonic() + STAYS_READY
        while True:
            answers[_answer(server, route)] += 1
            if time.monotonic() >= until:
                break
            server.running.watch.wait(LOOKS_EVERY)
            server.raise_if_dead()
        return StayedReady(**_came_up(server), afterwards=dict(answers))

    def judge(self, seen: StayedReady) -> list[Mismatch]:
        route, wrong = seen.ready_by or "readiness", []
        # A server without /ready answers 404 there, and is then asked for its /health.
        before = [s.answer for s in seen.sightings if s.route in (seen.ready_by, "/ready")]
        if not {"refused", "no answer", "503"} & set(before):
            wrong.append(Mismatch(route, "a refusal before the first 200", str(before)))
        failed = [s.answer for s in seen.sightings if s.route == "/generate" and s.answer != "200"]
        if failed:
            wrong.append(Mismatch(f"generation after {route}", "an answer", ", ".join(failed)))
        if seen.afterwards is not None and set(seen.afterwards) != {"200"}:
            told = ", ".join(f"{answer} x {n}" for answer, n in sorted(seen.afterwards.items()))
            wrong.append(Mismatch(f"{route} afterwards", "200 every time", told or "no answer"))
        return wrong


def _answer(server: Server, call: Call[None]) -> str:
    """As :class:`~sglang_harness.server.readiness.Sighting` names it."""
    try:
        server.client.send(call)
    except Refused as error:
        return str(error.status)
    except TimeIsOver:
        raise
    except NoAnswerInTime:
        return "no answer"
    except Unreachable:
        return "refused"
    return "200"


class InfoBesideSpec(Observation):
    asked: dict[str, Any]
    info: dict[str, Any]
    model_path: str
    info_model_path: str
    device: str
    info_device: str
    version: str


@register
class InfoAgreesWithSpec(Check[InfoBesideSpec]):
    id = "launch/server-info"
    sentence = "The server states the model, device and flags that it was started with."
    observation = InfoBesideSpec
    needs = (STARTED_HERE,)

    def observe(self, context: Context) -> InfoBesideSpec:
        server = context.server
        info = server.client.server_info()
        asked = server.running.arguments
        return InfoBesideSpec(
            asked=asked,
            info={name: info.get(name.replace("-", "_")) for name in asked},
            model_path=server.running.model_path(),
            info_model_path=str(server.client.model_info()["model_path"]),
            device="cuda" if server.device == "gpu" else server.device,
            info_device=str(info.get("device")),
            version=str(info.get("version", "")),
        )

    def judge(self, seen: InfoBesideSpec) -> list[Mismatch]:
        wrong = [
            *expect("model_path", seen.model_path, seen.info_model_path),
            *expect("device", seen.device, seen.info_device),
        ]
        if not re.match(r"\d+\.\d+", seen.version):
            wrong.append(Mismatch("version", "a version", repr(seen.version)))
        for name, value in seen.asked.items():
            got = seen.info.get(name)
            # Some flags have no field of their own (aliases, such as --tp): nothing to compare.
            if got is not None and not means(value, got):
                wrong.append(Mismatch(f"--{name}", str(value), str(got)))
        return wrong


def means(asked: Any, stated: Any) -> bool:
    """Whether ``stated``, a value of ``/server_info``, is what the flag ``asked`` for.

    A command line is text: ``.8`` is 0.8, ``1`` is 1.0, a flag that takes several values may have
    been given one, and an object is given as JSON.
    """
    if stated == asked or str(stated) == str(asked):
        return True
    if isinstance(stated, bool):
        return str(asked).lower() == str(stated).lower()
    if isinstance(stated, list | tuple):
        several = asked if isinstance(asked, list) else [asked]
        if len(several) == len(stated) and all(map(means, several, stated)):
            return True
    if isinstance(stated, int | float):
        number = _number(asked)
        return number is not None and number == float(stated)
    if isinstance(asked, str) and isinstance(stated, str | list | dict):
        one, other = _json(asked), _json(stated)
        return one is not None and one == other
    return False


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _json(value: Any) -> Any:
    """The object or list that ``value`` is or holds as JSON; ``None`` where it is neither."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list | dict) else None


class WentDown(Observation):
    exit_code: int | None
    seconds: float
    limit: float
    left_behind: list[str]


@register
class StopsCleanly(Check[WentDown]):
    id = "launch/stop"
    sentence = "Told to stop, the server exits with code 0 in time and leaves nothing behind."
    observation = WentDown
    needs = (STARTED_HERE,)
    after_stop = True

    def observe(self, context: Context) -> WentDown:
        stopped = context.server.stopped
        assert stopped is not None, "asked before the server was stopped"
        return WentDown(
            exit_code=stopped.exit_code,
            seconds=stopped.seconds,
            limit=context.server.spec.limits.stop,
            left_behind=stopped.left_behind,
        )

    def judge(self, seen: WentDown) -> list[Mismatch]:
        wrong = [
            *expect("exit code", 0, seen.exit_code),
            *expect("left behind", [], seen.left_behind),
        ]
        if seen.seconds > seen.limit:
            wrong.append(Mismatch("end", f"within {seen.limit:g} s", f"{seen.seconds:.1f} s"))
        return wrong
