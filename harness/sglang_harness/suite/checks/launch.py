"""Does it come up as it was told to, and go down without a trace?"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict

from sglang_harness.server.readiness import PHASES
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, expect, register
from sglang_harness.suite.needs import STARTED_HERE


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


def _came_up(context: Context) -> CameUp:
    report = context.server.report
    return CameUp(
        phases={phase.name: phase.seconds for phase in report.phases},
        sightings=[Seen(**vars(sighting)) for sighting in report.sightings],
        premature=report.premature,
        ready_by=report.ready_by,
        ready_after=report.ready_after,
        first_tokens=report.first_tokens,
    )


@register
class StartsInPhases(Check[CameUp]):
    id = "launch/phases"
    sentence = "The server comes up through every phase and ends with a real generation."
    observation = CameUp
    needs = (STARTED_HERE,)

    def observe(self, context: Context) -> CameUp:
        return _came_up(context)

    def judge(self, seen: CameUp) -> list[Mismatch]:
        wrong = list(expect("phases", list(PHASES), list(seen.phases)))
        for name, seconds in seen.phases.items():
            if not seconds >= 0:
                wrong.append(Mismatch(name, "a duration", f"{seconds} s"))
        wrong += expect("tokens of the first generation", 2, seen.first_tokens)
        return wrong


@register
class ReadinessIsTrue(Check[CameUp]):
    id = "launch/readiness"
    sentence = (
        "The route that says 'ready' says so only once, after having refused, and routes that "
        "answer earlier are known for it."
    )
    observation = CameUp
    needs = (STARTED_HERE,)

    def observe(self, context: Context) -> CameUp:
        return _came_up(context)

    def judge(self, seen: CameUp) -> list[Mismatch]:
        answers = [s.answer for s in seen.sightings if s.route == seen.ready_by]
        wrong = []
        if not answers or answers[-1] != "200" or answers.count("200") != 1:
            wrong.append(
                Mismatch(seen.ready_by or "readiness", "200 once, as its last answer", str(answers))
            )
        early = {
            s.route
            for s in seen.sightings
            if s.answer == "200" and s.route != seen.ready_by and s.seconds < seen.ready_after
        }
        # What answered early must be on record as premature, or a reader would trust it.
        wrong += expect("routes known to answer too early", sorted(early), sorted(seen.premature))
        return wrong


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
            same = got == value or str(got) == str(value)
            if isinstance(value, int | float) and isinstance(got, int | float):
                same = float(value) == float(got)
            # Some flags have no field of their own (aliases, such as --tp): nothing to compare.
            if got is not None and not same:
                wrong.append(Mismatch(f"--{name}", str(value), str(got)))
        return wrong


class LogLines(Observation):
    lines: int
    alarming: list[str]


@register
class LogIsClean(Check[LogLines]):
    id = "launch/log"
    sentence = "The log of a server that was used as intended holds no traceback."
    observation = LogLines
    needs = (STARTED_HERE,)

    def observe(self, context: Context) -> LogLines:
        lines = context.server.logs().splitlines()
        alarming = [
            line[:300]
            for line in lines
            if re.search(r"Traceback \(most recent call last\)|Scheduler hit an exception", line)
        ]
        return LogLines(lines=len(lines), alarming=alarming[:20])

    def judge(self, seen: LogLines) -> list[Mismatch]:
        if not seen.lines:
            return [Mismatch("log", "at least one line", "none")]
        return [Mismatch("log", "no traceback", line) for line in seen.alarming]


class WentDown(Observation):
    exit_code: int | None
    seconds: float
    limit: float
    left_behind: list[str]


@register
class StopsCleanly(Check[WentDown]):
    id = "launch/stop"
    sentence = "Asked to end, the server ends with exit code 0 in time and leaves nothing behind."
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
