"""While a server has a GPU no other run gets it. When it has ended the next one does, and the
memory in use is what it was. Ends the server that it is given."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_harness.gpu_check import bounds, probes, served
from sglang_harness.gpu_check.device_timeline import (
    DeviceTimeline,
    in_mib,
    seconds_until_it_stays,
    thinned,
)
from sglang_harness.gpu_check.part import Context, Part
from sglang_harness.gpu_check.probes.second_run import SecondRun
from sglang_harness.gpu_check.suite_questions import gpu_memory
from sglang_harness.memory.gpu.guard import GIVEN_BACK_WITHIN, PATIENCE
from sglang_harness.server import Server

MIB = 1 << 20

#: Seconds for which a second run waits for a GPU that is in use.
REFUSED_WITHIN = 1.0
#: Seconds for its imports beside what it waits for.
IMPORTS_WITHIN = 40.0


@dataclass(frozen=True)
class OccupancySeen:
    """Bytes by UUID.

    Attributes:
        holder: id of the run that has the GPUs.
        holder_pid: of the process that holds their leases.
        before: before the server started.
        in_use: while it ran.
        leased: a second run while it ran.
        guarded: the same with leases of its own: the guard alone is in the way.
        after: when the harness had said that the server is down.
        next_run: a run after that.
        stop_seconds: from the order to stop to the end of the server's processes.
        seconds_to_bound: from that end until every GPU stayed within the guard's bound of
            ``before``; ``None``: it did not.
        first_call_only: see :class:`sglang_harness.memory.WatchedSource`.
    """

    holder: str
    holder_pid: int
    before: dict[str, int]
    in_use: dict[str, int]
    leased: SecondRun
    guarded: SecondRun
    after: dict[str, int]
    next_run: SecondRun
    stop_seconds: float
    seconds_to_bound: float | None
    readings_per_second: float
    line: list[tuple[float, float]]
    first_call_only: bool = False


def observe(server: Server, scratch: Path) -> OccupancySeen:
    """Tries second runs, and ends the server.

    Raises:
        HarnessError: as NVML does.
        AssertionError: a second run told nothing.
    """
    source = gpu_memory(server)
    assert source is not None, "asked of a server on a GPU"
    before = next(
        r.parts for r in server.memory.readings if (r.mark, r.source) == ("before start", "nvml")
    )
    _, in_use = source.read()
    gpus = server.spec.gpus
    own_leases = scratch / "other-leases"
    leased = second_run(gpus, wait=REFUSED_WITHIN, patience=REFUSED_WITHIN)
    guarded = second_run(gpus, wait=REFUSED_WITHIN, patience=REFUSED_WITHIN, leases=own_leases)
    with DeviceTimeline(source) as timeline:
        began = time.monotonic()
        stopped = server.stop()
        _, after = source.read()
    # It had been closed with the server, and the readings after that opened it again.
    source.close()
    server_gone = began + stopped.seconds
    samples = [s for s in timeline.line.samples if s.seconds >= server_gone]

    def within_bound(parts: Mapping[str, int]) -> bool:
        return all(parts.get(u, 0) - used <= GIVEN_BACK_WITHIN for u, used in before.items())

    seconds = seconds_until_it_stays(samples, since=server_gone, there=within_bound)
    if not samples and within_bound(after):
        seconds = 0.0
    return OccupancySeen(
        holder=server.running.run_id,
        holder_pid=os.getpid(),
        before=before,
        in_use=in_use,
        leased=leased,
        guarded=guarded,
        after=after,
        next_run=second_run(gpus, wait=REFUSED_WITHIN, patience=PATIENCE),
        stop_seconds=stopped.seconds,
        seconds_to_bound=seconds,
        readings_per_second=timeline.readings_per_second,
        line=thinned(timeline.line.samples, origin=server_gone),
        first_call_only=source.first_call_only,
    )


def second_run(gpus: str, *, wait: float, patience: float, leases: Path | None = None) -> SecondRun:
    """What becomes of another run on the same GPUs, in a process of its own.

    Args:
        wait: seconds for the lease.
        patience: seconds for the GPUs to become idle.
        leases: another folder of leases: then the guard alone is in the way; ``None``: the usual.

    Raises:
        AssertionError: that process told nothing.
    """
    told = probes.run(
        "second_run",
        *(gpus, str(wait), str(patience)),
        within=IMPORTS_WITHIN + wait + 2 * patience,
        environment={"SGLANG_HARNESS_GPU_LEASES": str(leases)} if leases else {},
    )
    return SecondRun(**told)


def wrong(seen: OccupancySeen) -> list[str]:
    """A run that was let in or refused wrongly, and memory that was not given back."""
    found = []
    if not any(used > seen.before.get(uuid, 0) for uuid, used in seen.in_use.items()):
        found.append("the server's GPU: expected more in use than before its start, got no more")
    if seen.leased.let_in or seen.leased.error != "LeaseTaken":
        found.append(f"second run, leases: expected LeaseTaken, got {_became(seen.leased)}")
    else:
        for word in (seen.holder, f"process {seen.holder_pid}"):
            if word not in seen.leased.message:
                found.append(
                    f"second run, leases: expected a message with {word!r}, got "
                    f"{seen.leased.message!r}"
                )
    if seen.guarded.let_in or seen.guarded.error != "DeviceNotIdle":
        found.append(f"second run, guard: expected DeviceNotIdle, got {_became(seen.guarded)}")
    elif not any(uuid in seen.guarded.message for uuid in seen.in_use):
        found.append(
            "second run, guard: expected a message with the GPU's UUID, got "
            f"{seen.guarded.message!r}"
        )
    for uuid, used in seen.before.items():
        left = seen.after.get(uuid)
        if left is None:
            found.append(f"GPU {uuid} after the server's end: expected a reading, got none")
        elif left - used > GIVEN_BACK_WITHIN:
            found.append(
                f"GPU {uuid} after the server's end: expected at most "
                f"{GIVEN_BACK_WITHIN / MIB:.0f} MiB above {used / MIB:.0f} MiB, got "
                f"{left / MIB:.0f} MiB"
            )
    if not seen.next_run.let_in:
        found.append(f"the next run: expected to be let in, got {_became(seen.next_run)}")
    return found


def _became(run: SecondRun) -> str:
    return "let in" if run.let_in else f"{run.error}: {run.message}"


def figures(seen: OccupancySeen) -> dict[str, Any]:
    """For the results, with the bounds that the harness uses."""
    left = [seen.after[uuid] - used for uuid, used in seen.before.items() if uuid in seen.after]
    return {
        "before_mib": in_mib(seen.before),
        "in_use_mib": in_mib(seen.in_use),
        "after_mib": in_mib(seen.after),
        "residue_mib": round(max(left, default=0) / MIB, 1),
        "stop_seconds": round(seen.stop_seconds, 2),
        "end_to_bound_seconds": seen.seconds_to_bound,
        "readings_per_second": round(seen.readings_per_second, 1),
        "line": seen.line,
        "second_run_by_lease": asdict(seen.leased),
        "second_run_by_guard": asdict(seen.guarded),
        "guard_names_a_process": "process " in seen.guarded.message,
        "next_run": asdict(seen.next_run),
        "constants": [
            bounds.idle(seen.before.values(), first_call_only=seen.first_call_only).told(),
            bounds.residue(left).told(),
        ],
    }


def run(context: Context) -> dict[str, Any]:
    """The part ``guard-and-leases``. The shared server has ended afterwards."""
    server = served.shared(context)
    try:
        seen = observe(server, served.scratch(context))
    finally:
        context.close_server()
    told = figures(seen)
    context.headline(
        f"{told['residue_mib']} MiB stay, within the bound {told['end_to_bound_seconds']} s after "
        "the end"
    )
    for bound in told["constants"]:
        context.note(
            "memory",
            bound["constant"],
            f"{bound['in_use_mib']} MiB in use, {bound['seen_mib']} seen, {bound['proposed_mib']} "
            "proposed",
        )
    return served.ended(context, told, wrong(seen))


PART = Part(
    "guard-and-leases",
    "Is a second run kept off a GPU that is in use, and let in when the server has ended?",
    80.0,
    run,
    needs=frozenset({"cuda", "release"}),
    group="weights and memory",
    scope="release",
)
