"""Weights by every route that leads to the server, there and back: do they arrive, by both
witnesses, and how fast?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_harness.errors import HarnessError, ServerLost
from sglang_harness.gpu_check import served
from sglang_harness.gpu_check.device_timeline import DeviceTimeline, in_mib
from sglang_harness.gpu_check.part import Context, NotHere, Part
from sglang_harness.gpu_check.parts.fused_layout import checksums
from sglang_harness.gpu_check.suite_questions import gpu_memory
from sglang_harness.server import Server
from sglang_harness.weights import PushFailed, PushReport, routes

MIB = 1 << 20

#: Pushes by one route: there and back, so that each route begins with the first weights.
ROUND_TRIPS = 3
#: Seconds for the answer to one bucket, however little time is left.
LEAST_LIMIT = 15.0
#: First those whose speed a GPU host is for. Others follow by name.
FIRST = ("cuda-ipc", "disk", "shared-memory", "tensor-bucket", "tensor")
#: Seconds from a call that a server dies of to its end (about six in SGLang 0.5.23).
DIES_WITHIN = 10.0
#: The way back to the first weights where there is no time for the route's own.
QUICKEST = "disk"


@dataclass(frozen=True)
class OnePush:
    """One push. Sizes in bytes, times in seconds.

    Attributes:
        to: name of the checkpoint.
        scored: the second witness was asked for.
        checksums, logprobs: what the witnesses say.
        seconds: from the first call of the bracket to the last.
        outside: of the whole call, what is neither in the bracket nor staging: checksums here and
            on the server, checking of values, and the reference model where it was asked.
        peer_peak: the most that the peer held of host memory; ``None``: no peer.
        gpu_before, gpu_peak, gpu_after: in use on all GPUs; ``None`` where there is none.
    """

    to: str
    scored: bool
    outcome: str
    reason: str
    checksums: str
    logprobs: str
    bytes: int
    seconds: float
    staged: float
    read: float
    pack: float
    hand_over: float
    server: float
    outside: float
    buckets: int
    peer_peak: int | None
    gpu_before: int | None
    gpu_peak: int | None
    gpu_after: int | None
    unfit: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def took(self) -> float:
        """Without what was computed here beside it."""
        return self.seconds + self.staged

    @property
    def rate(self) -> float:
        """10^9 bytes a second over the whole bracket."""
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(frozen=True)
class RouteSeen:
    """All pushes by one route.

    Attributes:
        lacking: why it does not lead to this server; ``None``: it does.
        stopped: why fewer pushes were made than were meant; empty: all were.
        error: what stopped it that is no report of a push.
        checksum_seconds: of one answer of the server's checksums; ``None``: it states none.
    """

    route: str
    lacking: str | None
    meant: int
    pushes: list[OnePush] = field(default_factory=list)
    stopped: str = ""
    error: str = ""
    checksum_seconds: float | None = None


def names() -> list[str]:
    """The routes to be asked, those first that matter most on a GPU."""
    known = routes.names()
    return [*(n for n in FIRST if n in known), *(n for n in known if n not in FIRST)]


def observe(
    server: Server,
    other: Path,
    *,
    left: Callable[[], float],
    say: Callable[[str], None] = lambda _: None,
    each_seen: Callable[[RouteSeen], None] = lambda _: None,
    asked: Sequence[str] | None = None,
    round_trips: int = ROUND_TRIPS,
) -> list[RouteSeen]:
    """Pushes ``other`` and the first weights in turn, by every route.

    Args:
        left: seconds that are left for all of it; each route gets an even share.
        each_seen: told of each route when it is done.
        asked: routes; ``None``: all.

    Returns:
        What became of each; of fewer where the server died of one, or must not be used after it.
    """
    assert server.model is not None, "the first weights have to be on this machine"
    found: list[RouteSeen] = []
    wanted = list(names() if asked is None else asked)
    for number, route in enumerate(wanted):
        seen = RouteSeen(route, routes.make(route).lacking(server), 2 * round_trips)
        slowest = max((push.took for each in found for push in each.pushes), default=0.0)
        if seen.lacking is not None:
            say(f"{route}: {seen.lacking}")
        elif left() < 2 * slowest:
            seen = replace(seen, stopped=f"{left():.0f} s were left")
        else:
            share = left() / (len(wanted) - number)
            seen = _by(seen, server, server.model, other, share, left, say)
        found.append(seen)
        each_seen(seen)
        if seen.error or any(push.outcome == "failed" for push in seen.pushes):
            # The next route must not be blamed for its end.
            with suppress(ServerLost):
                server.running.watch.wait(min(DIES_WITHIN, left()))
        if server.running.watch.ended is not None or server.weights.unfit is not None:
            break
    return found


def _by(
    seen: RouteSeen,
    server: Server,
    first: Path,
    other: Path,
    share: float,
    left: Callable[[], float],
    say: Callable[[str], None],
) -> RouteSeen:
    route = seen.route
    until = time.monotonic() + share
    longest = 0.0
    for number in range(seen.meant):
        # Back to the first weights whatever the time, so that the next route has its control.
        there = number % 2 == 0
        if number and there and time.monotonic() + 2 * longest > until:
            return replace(seen, stopped=f"{share:.0f} s for this route were used up")
        began = time.monotonic()
        by = route
        if not there and left() < seen.pushes[-1].took:
            by = QUICKEST if routes.make(QUICKEST).lacking(server) is None else route
        try:
            limit = min(server.spec.limits.check, max(LEAST_LIMIT, until - began))
            push = _push(server, other if there else first, by, scored=number == 0, timeout=limit)
        except HarnessError as error:
            return replace(seen, error=f"{type(error).__name__}: {error.message}")
        if by != route:
            say(f"back by {by}: {_line(push)}")
            if push.outcome == "failed":
                return replace(seen, error=f"the way back by {by}: {push.reason}")
            return replace(seen, stopped=f"no time for the way back by it: back by {by}")
        if number:  # the first one asks the reference models, and loads them
            longest = max(longest, time.monotonic() - began)
        seen.pushes.append(push)
        say(f"{route} to {push.to}: {_line(push)}")
        if push.outcome == "failed":
            return replace(seen, stopped="a push failed")
        if number == 0:
            seen = replace(seen, checksum_seconds=_checksum_seconds(server))
    return seen


def _checksum_seconds(server: Server) -> float | None:
    began = time.monotonic()
    try:
        server.client.checksums()
    except HarnessError:
        return None
    return time.monotonic() - began


def _push(server: Server, checkpoint: Path, route: str, *, scored: bool, timeout: float) -> OnePush:
    source = gpu_memory(server)
    before = source.read()[0] if source else None
    began = time.monotonic()
    with DeviceTimeline(source) if source else nullcontext() as timeline:
        try:
            report = server.weights.push(checkpoint, route=route, logprobs=scored, timeout=timeout)
        except PushFailed as error:
            server.raise_if_dead()
            report = error.report
    wall = time.monotonic() - began
    after = source.read()[0] if source else None
    peak = max((s.used for s in timeline.line.samples), default=after) if timeline else None
    return of(report, to=checkpoint.name, scored=scored, wall=wall, gpu=(before, peak, after))


def of(
    report: PushReport,
    *,
    to: str,
    scored: bool,
    wall: float,
    gpu: tuple[int | None, int | None, int | None],
) -> OnePush:
    """What is kept of a report.

    Args:
        wall: seconds of the whole call.
        gpu: bytes in use before, at most, and after.
    """
    sent = report.buckets
    return OnePush(
        to=to,
        scored=scored,
        outcome=report.outcome,
        reason=report.reason,
        checksums=report.checksums.says,
        logprobs=report.logprobs.says if scored else "not asked for",
        bytes=report.bytes,
        seconds=report.seconds,
        staged=report.seconds_staged,
        read=sum(b.read for b in sent),
        pack=sum(b.pack for b in sent),
        hand_over=sum(b.hand_over for b in sent),
        server=sum(b.server for b in sent),
        outside=max(0.0, wall - report.seconds - report.seconds_staged),
        buckets=len(sent),
        peer_peak=report.peer_peak_bytes,
        gpu_before=gpu[0],
        gpu_peak=gpu[1],
        gpu_after=gpu[2],
        unfit=report.unfit,
        notes=list(report.notes),
    )


def wrong(seen: RouteSeen) -> list[str]:
    """Why a route did not hold; empty where it did or does not lead to the server.

    Each push needs matching checksums, and one of them both witnesses.
    """
    if seen.lacking is not None:
        return []
    if seen.error:
        return [f"{seen.route}: {seen.error}"]
    found = []
    for number, push in enumerate(seen.pushes):
        where = f"{seen.route}, push {number + 1} (to {push.to})"
        if push.scored and push.outcome != "good":
            found.append(f"{where}: expected good, got {push.outcome}: {push.reason}")
        elif push.outcome == "failed" or push.checksums != "agrees":
            found.append(
                f"{where}: expected checksums that agree, got {push.outcome}, checksums "
                f"{push.checksums}: {push.reason}"
            )
    if seen.pushes and not any(push.scored for push in seen.pushes):
        found.append(f"{seen.route}: expected one push with both witnesses, got none")
    return found


def not_pushed(seen: Sequence[RouteSeen]) -> list[str]:
    """Routes that lead to the server and were not tried, each with the reason."""
    return [
        f"{each.route}: {each.stopped or 'no push was made'}"
        for each in seen
        if each.lacking is None and not each.pushes and not each.error
    ]


def told(seen: RouteSeen) -> dict[str, Any]:
    """One route for the results."""
    if seen.lacking is not None:
        return {"route": seen.route, "lacking": seen.lacking}
    repeated = seen.pushes[1:] or seen.pushes
    middle = statistics.median([p.rate for p in repeated]) if repeated else None
    return {
        "route": seen.route,
        "held": not wrong(seen) and bool(seen.pushes),
        "gb_per_s": None if middle is None else round(middle, 4),
        "gb_per_s_first": round(seen.pushes[0].rate, 4) if seen.pushes else None,
        "pushes": len(seen.pushes),
        "stopped": seen.stopped,
        "error": seen.error,
        "server_checksums_seconds": _rounded(seen.checksum_seconds),
        **_medians(repeated),
        "peer_peak_mb": _most([p.peer_peak for p in seen.pushes], 1e6),
        "gpu_above_before_mib": _most(
            [
                None if p.gpu_peak is None or p.gpu_before is None else p.gpu_peak - p.gpu_before
                for p in seen.pushes
            ],
            MIB,
        ),
        "rows": [_row(push) for push in seen.pushes],
    }


def _medians(pushes: Sequence[OnePush]) -> dict[str, float]:
    names = ("seconds", "staged", "read", "pack", "hand_over", "server", "outside")
    if not pushes:
        return {}
    return {
        f"{name}_seconds".replace("seconds_seconds", "bracket_seconds"): round(
            statistics.median([getattr(push, name) for push in pushes]), 4
        )
        for name in names
    }


def _row(push: OnePush) -> dict[str, Any]:
    row = asdict(push)
    for name in ("gpu_before", "gpu_peak", "gpu_after"):
        used = row.pop(name)
        row[f"{name}_mib"] = None if used is None else in_mib([used])
    return {
        name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()
    } | {"gb_per_s": round(push.rate, 4)}


def _most(values: Sequence[int | None], unit: float) -> float | None:
    known = [value for value in values if value is not None]
    return round(max(known) / unit, 1) if known else None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


#: Seconds of a part's time that its end takes.
_END = 5.0


def run(context: Context) -> dict[str, Any]:
    """The part ``pushes``."""
    other = served.other_checkpoint(context)
    if not context.on_gpu:
        # Without the first witness no push is proven, and on a GPU that is a failure.
        with served.not_run_where_not_provided():
            checksums(served.shared(context))
    rows: dict[str, Any] = {}

    def each_seen(route: RouteSeen) -> None:
        rows[route.route] = told(route)
        context.put("routes", rows)

    seen: list[RouteSeen] = []
    while waiting := [route for route in names() if route not in rows]:
        # After a push that a server died of another one is started for the routes behind it.
        try:
            server = served.shared(context)
        except (HarnessError, NotHere) as error:
            if not seen:
                raise
            seen += [RouteSeen(n, None, 2 * ROUND_TRIPS, stopped=f"{error}") for n in waiting]
            break
        seen += observe(
            server,
            other,
            left=lambda: max(0.0, context.left() - _END),
            say=context.say,
            each_seen=each_seen,
            asked=waiting,
        )
    for route in seen:
        rows[route.route] = told(route)
        rate = rows[route.route].get("gb_per_s")
        context.note(
            "weights", f"push by {route.route}", route.lacking or f"{rate} GB/s ({_short(route)})"
        )
    context.headline(
        ", ".join(f"{r.route} {rows[r.route]['gb_per_s']} GB/s" for r in seen if r.pushes)
    )
    figures = served.ended(
        context,
        {"routes": rows},
        [each for route in seen for each in wrong(route)],
    )
    if missing := not_pushed(seen):
        raise NotHere("; ".join(missing))
    return figures


def _line(push: OnePush) -> str:
    scored = f", log-probabilities: {push.logprobs}" if push.scored else ""
    wrong_or_not = f" ({push.reason})" if push.scored or push.outcome == "failed" else ""
    return (
        f"{push.rate:.3f} GB/s, {push.seconds:.2f} s and {push.outside:.2f} s outside; checksums: "
        f"{push.checksums}{scored}{wrong_or_not if push.reason else ''}"
    )


def _short(seen: RouteSeen) -> str:
    if found := wrong(seen):
        return found[0]
    return f"{len(seen.pushes)} pushes" if seen.pushes else seen.stopped or "none"


PART = Part(
    "pushes",
    "Do weights arrive by every route that leads to the server, and how fast?",
    150.0,
    run,
    needs=frozenset({"release"}),
    group="weights and memory",
    scope="release",
    disk_bytes=6_000_000_000,
)
