"""A scheduler is killed by SIGKILL, as the kernel does when memory runs out. How soon is that
noticed, what stays on the GPU for how long, and does a fresh server start there and answer?"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import psutil

from sglang_harness.errors import HarnessError, NotProvided, TelemetryError
from sglang_harness.gpu_check import served
from sglang_harness.gpu_check.device_timeline import (
    DeviceTimeline,
    in_mib,
    seconds_until_it_stays,
    thinned,
)
from sglang_harness.gpu_check.part import Context, Part
from sglang_harness.gpu_check.suite_questions import context_of, gpu_memory
from sglang_harness.memory.analysis.steady import settle
from sglang_harness.memory.gpu.driver import Driver
from sglang_harness.memory.gpu.guard import GIVEN_BACK_WITHIN, PATIENCE
from sglang_harness.memory.gpu.nvml import NvmlMemory
from sglang_harness.memory.gpu.owners import owners
from sglang_harness.server import Server
from sglang_harness.suite.checks.memory.release import scored_by, wrong_answers
from sglang_harness.suite.lib.scored import Scored

MIB = 1 << 20

#: As SGLang calls the processes of its schedulers (0.5.15 to 0.5.23); followed by their ranks.
TITLE = "sglang::scheduler"
#: Seconds from the end of a scheduler to its server's being reported dead. SGLang takes about six
#: (0.5.23); on a GPU with a core dump more.
NOTICED_WITHIN = 60.0


@dataclass(frozen=True)
class DeathSeen:
    """Bytes by UUID; empty where the server is on no GPU. Seconds are from the SIGKILL.

    Attributes:
        killed: title of the process.
        noticed_after: until the harness said that the server had died; ``None``: it did not.
        reason: what it said.
        before: before the server started.
        at_kill, at_notice: in use.
        freed_after: until every GPU stayed within the guard's bound of ``before``; ``None``: it did
            not within the guard's patience.
        after: in use at the end.
        holders: who was on the GPUs when the death was noticed, in words.
        restarted_after: seconds from the order for a fresh server to its first answer; ``None``:
            it did not start, and ``not_restarted`` says why.
        answers: of the fresh server.
    """

    killed: str
    noticed_after: float | None
    reason: str
    before: dict[str, int]
    at_kill: dict[str, int]
    at_notice: dict[str, int]
    freed_after: float | None
    after: dict[str, int]
    holders: list[str]
    readings_per_second: float
    line: list[tuple[float, float]]
    restarted_after: float | None
    not_restarted: str
    answers: list[Scored]


def observe(
    server: Server,
    *,
    start: Callable[[], Server],
    ask: Callable[[Server], list[Scored]],
    put: Callable[[str, Any], None] = lambda *_: None,
) -> DeathSeen:
    """Kills the scheduler of ``server``, which is stopped afterwards, and starts another.

    Args:
        start: a fresh server on the same GPUs; it is stopped in the end.
        ask: answers of a server, scored by the reference model.

    Raises:
        NotProvided: its scheduler cannot be found.
        HarnessError: as NVML does.
    """
    victim = scheduler_of(server)
    title = title_of(victim)
    source = gpu_memory(server)
    marks = {r.mark: r.parts for r in server.memory.readings if r.source == "nvml"}
    before = marks.get("before start", {})
    at_kill = source.read()[1] if source else {}
    timeline = DeviceTimeline(source) if source else None
    with timeline or nullcontext():
        killed = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        noticed, reason = _noticed(server, killed)
        at_notice = source.read()[1] if source else {}
        put("noticed_after_seconds", noticed)
        holders = _holders(before)
        freed, after = _freed(source, timeline, before, killed)
    samples = timeline.line.samples if timeline else []
    server.stop(at_once=True)
    restarted, why_not, answers = _again(start, ask)
    return DeathSeen(
        killed=title,
        noticed_after=noticed,
        reason=reason,
        before=before,
        at_kill=at_kill,
        at_notice=at_notice,
        freed_after=freed,
        after=after,
        holders=holders,
        readings_per_second=timeline.readings_per_second if timeline else 0.0,
        line=thinned(samples, origin=killed),
        restarted_after=restarted,
        not_restarted=why_not,
        answers=answers,
    )


def scheduler_of(server: Server) -> psutil.Process:
    """The process of the server's first scheduler, by its title.

    Raises:
        NotProvided: there is none to be seen from here.
    """
    seen = []
    for pid in server.running.host_pids():
        try:
            process = psutil.Process(pid)
            title = title_of(process)
        except psutil.Error:
            continue
        seen.append(title or process.name())
        if title.startswith(TITLE):
            return process
    raise NotProvided(
        f"No process of the server is called {TITLE!r}; it has {', '.join(seen) or 'none'}."
    )


def title_of(process: psutil.Process) -> str:
    """As the process calls itself."""
    return " ".join(process.cmdline()).strip()


def _noticed(server: Server, killed: float) -> tuple[float | None, str]:
    death = server.running.watch.wait(NOTICED_WITHIN)
    if death is None:
        return None, ""
    return time.monotonic() - killed, death.sentence()


def _holders(devices: dict[str, int]) -> list[str]:
    """Who is on the GPUs, in words; a driver that does not tell is one of the words."""
    found: list[str] = []
    for uuid in devices:
        try:
            with Driver() as driver:
                found += [str(owner) for owner in owners(driver.processes(uuid))]
        except TelemetryError as error:
            found.append(error.message)
    return found


def _freed(
    source: NvmlMemory | None,
    timeline: DeviceTimeline | None,
    before: dict[str, int],
    killed: float,
) -> tuple[float | None, dict[str, int]]:
    if source is None or timeline is None:
        return None, {}

    def free(parts: Mapping[str, int]) -> bool:
        return all(parts.get(u, 0) - used <= GIVEN_BACK_WITHIN for u, used in before.items())

    rest = settle(source.read, reached=free, timeout=PATIENCE, since=killed)
    return seconds_until_it_stays(timeline.line.samples, since=killed, there=free), rest.parts


def _again(
    start: Callable[[], Server], ask: Callable[[Server], list[Scored]]
) -> tuple[float | None, str, list[Scored]]:
    began = time.monotonic()
    try:
        with start() as fresh:
            took = time.monotonic() - began
            return took, "", ask(fresh)
    except HarnessError as error:
        return None, f"{type(error).__name__}: {error.message}", []


def wrong(seen: DeathSeen) -> list[str]:
    """An end that was not noticed, memory that stayed, a fresh server that is not right."""
    found = []
    if seen.noticed_after is None:
        found.append(f"the end of the server: expected within {NOTICED_WITHIN:g} s, got none")
    elif not seen.reason:
        found.append("the reason of the end: expected a sentence, got none")
    for uuid, used in seen.before.items():
        if seen.at_kill.get(uuid, 0) <= used + GIVEN_BACK_WITHIN:
            found.append(f"GPU {uuid} before the kill: expected the server on it, got none of it")
        left = seen.after.get(uuid)
        if left is None or left - used > GIVEN_BACK_WITHIN:
            got = "no reading" if left is None else f"{left / MIB:.0f} MiB"
            found.append(
                f"GPU {uuid}: expected at most {(used + GIVEN_BACK_WITHIN) / MIB:.0f} MiB within "
                f"{PATIENCE:g} s, got {got} ({'; '.join(seen.holders) or 'nobody is named'})"
            )
    if seen.restarted_after is None:
        found.append(f"a fresh server: expected to start, got {seen.not_restarted}")
    else:
        found += [str(each) for each in wrong_answers("of the fresh server", seen.answers)]
    return found


def figures(seen: DeathSeen) -> dict[str, Any]:
    """For the results."""
    on_gpu = bool(seen.before)
    return {
        "killed": seen.killed,
        "noticed_after_seconds": _rounded(seen.noticed_after),
        "reason": seen.reason,
        "before_mib": in_mib(seen.before) if on_gpu else None,
        "at_kill_mib": in_mib(seen.at_kill) if on_gpu else None,
        "at_notice_mib": in_mib(seen.at_notice) if on_gpu else None,
        "after_mib": in_mib(seen.after) if on_gpu else None,
        "free_after_seconds": _rounded(seen.freed_after),
        "holders": seen.holders,
        "readings_per_second": round(seen.readings_per_second, 1),
        "line": seen.line,
        "fresh_server_seconds": _rounded(seen.restarted_after),
        "fresh_server_answers": len(seen.answers),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def run(context: Context) -> dict[str, Any]:
    """The part ``death``."""
    server = context.server()

    def start() -> Server:
        context.close_server()
        return context.server()

    def ask(fresh: Server) -> list[Scored]:
        asked = context_of(fresh, served.scratch(context))
        return scored_by(asked, asked.oracle)

    with served.not_run_where_not_provided():
        seen = observe(server, start=start, ask=ask, put=context.put)
    told = figures(seen)
    line = f"noticed after {told['noticed_after_seconds']} s"
    if seen.before:
        line += f", GPU free after {told['free_after_seconds']} s"
    context.headline(f"{line}; a fresh server after {told['fresh_server_seconds']} s")
    context.note("death", "scheduler killed", line)
    context.note("death", "reason", seen.reason)
    return served.ended(context, told, wrong(seen))


PART = Part(
    "death",
    "Is a killed scheduler noticed, is its GPU freed, and does a fresh server start there?",
    150.0,
    run,
    needs=frozenset({"release"}),
    group="death",
    scope="release",
)
