"""A leak of known size is planted beside the server: the detector has to claim it, and its interval
has to hold it. Without this nobody knows that a slope of zero means anything."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sglang_harness.errors import NotProvided
from sglang_harness.gpu_check import served
from sglang_harness.gpu_check.part import Context, Part
from sglang_harness.gpu_check.planter import ChildPlanter
from sglang_harness.gpu_check.suite_questions import gpu_memory
from sglang_harness.memory.analysis.leak import IGNORED, MB, Slope, slope
from sglang_harness.memory.analysis.steady import settle
from sglang_harness.server import Server
from sglang_harness.suite.checks.memory.colocated import CYCLES, FEWEST_CYCLES, WARM_UP
from sglang_harness.suite.checks.memory.release import release, resumed_afterwards
from sglang_harness.suite.lib.prompts import PROMPTS, greedy

#: Bytes that are planted in each cycle: whole pages of 2 MiB, as the driver hands them out.
PLANTED = 8 << 20


class Planter(Protocol):
    """Something that holds GPU memory beside the server.

    Attributes:
        uuid: of the GPU that it is on, as NVML names it.
    """

    uuid: str

    def keep(self, amount: int) -> None:
        """Holds ``amount`` bytes more from now on."""


@dataclass(frozen=True)
class PlantedSeen:
    """Readings after each cycle, in bytes, by UUID.

    Attributes:
        planted: bytes that were planted in each cycle on ``on``.
        released: each cycle released and resumed the KV cache; false: the server has no memory
            saver, and only generated.
        seconds: of each cycle.
    """

    on: str
    planted: int
    used: dict[str, list[int]]
    released: bool
    seconds: list[float]


def observe(
    server: Server, planter: Planter, *, within: float, planted: int = PLANTED
) -> PlantedSeen:
    """Cycles of release, resume, generation and a planted leak.

    Args:
        within: seconds for all of them.

    Raises:
        NotProvided: too few cycles fit into the time.
        HarnessError: as the client and NVML do.
    """
    source = gpu_memory(server)
    assert source is not None, "asked of a server on a GPU"
    saver = bool(server.client.server_info().get("enable_memory_saver"))
    used: dict[str, list[int]] = {}
    seconds: list[float] = []
    until = time.monotonic() + within
    for number in range(WARM_UP + CYCLES):
        began = time.monotonic()
        server.client.flush_cache()
        if saver:
            with resumed_afterwards(server) as still:
                release(server, still, ("kv_cache",))
                server.client.resume_memory(("kv_cache",))
                still.clear()
        server.client.generate(PROMPTS[0], sampling=greedy(1))
        server.client.flush_cache()
        planter.keep(planted)
        if number >= WARM_UP:
            for uuid, value in settle(source.read, timeout=2.0, flat_for=0.2).parts.items():
                used.setdefault(uuid, []).append(value)
        seconds.append(time.monotonic() - began)
        if time.monotonic() > until:
            break
    if len(seconds) < WARM_UP + FEWEST_CYCLES:
        raise NotProvided(
            f"Only {len(seconds)} cycles fit into {within:.0f} s, and a slope takes "
            f"{WARM_UP + FEWEST_CYCLES}."
        )
    return PlantedSeen(planter.uuid, planted, used, saver, seconds)


def slopes(used: Mapping[str, Sequence[int]]) -> dict[str, Slope]:
    """Of each GPU that has readings enough."""
    return {uuid: slope(values) for uuid, values in used.items() if len(values) >= FEWEST_CYCLES}


def wrong(seen: PlantedSeen) -> list[str]:
    """The planted leak that was not claimed or not measured, and any claim on another GPU."""
    found = []
    by_gpu = slopes(seen.used)
    mine = by_gpu.pop(seen.on, None)
    planted = seen.planted / MB
    if mine is None:
        return [
            f"GPU {seen.on}: expected {FEWEST_CYCLES} readings, got "
            f"{len(seen.used.get(seen.on, []))}"
        ]
    if not mine.leaks:
        found.append(
            f"GPU {seen.on}: expected a leak to be claimed, as {planted:.2f} MB a cycle were "
            f"planted, got none: {mine}"
        )
    # What does not matter in practice (memory/analysis/leak.py) does not here.
    if not mine.low - IGNORED <= planted <= mine.high + IGNORED:
        found.append(
            f"GPU {seen.on}: expected {planted:.2f} MB a cycle within the interval, got {mine}"
        )
    found += [
        f"GPU {uuid}: nothing was planted, and a leak is claimed: {other}"
        for uuid, other in by_gpu.items()
        if other.leaks
    ]
    return found


def figures(seen: PlantedSeen) -> dict[str, Any]:
    """For the results."""
    return {
        "planted_mb_a_cycle": round(seen.planted / MB, 4),
        "cycles": len(seen.used.get(seen.on, [])),
        "released_each_cycle": seen.released,
        "seconds_a_cycle": round(sum(seen.seconds) / max(1, len(seen.seconds)), 3),
        "slopes": {uuid: slope_told(each) for uuid, each in slopes(seen.used).items()},
    }


def slope_told(each: Slope) -> dict[str, Any]:
    """A slope for the results, in MB (10^6 bytes) a cycle."""
    return {
        "mb_a_cycle": round(each.mb, 4),
        "low": round(each.low, 4),
        "high": round(each.high, 4),
        "confidence": each.confidence,
        "halves": [round(half, 4) for half in each.halves],
        "cycles": each.cycles,
        "claimed": each.leaks,
    }


#: Seconds of a part's time that its end takes.
_END = 10.0


def run(context: Context) -> dict[str, Any]:
    """The part ``planted-leak``."""
    server = served.shared(context)
    with served.not_run_where_not_provided(), ChildPlanter(server.spec.gpus) as planter:
        seen = observe(server, planter, within=max(1.0, context.left() - _END))
    told = figures(seen)
    mine = told["slopes"].get(seen.on)
    if mine is not None:
        line = (
            f"{told['planted_mb_a_cycle']:.2f} MB a cycle planted, {mine['mb_a_cycle']:.2f} seen "
            f"({mine['low']:.2f} to {mine['high']:.2f})"
        )
        context.headline(line)
        context.note("memory", "planted leak", line)
    return served.ended(context, told, wrong(seen))


PART = Part(
    "planted-leak",
    "Is a leak of known size beside the server claimed, and measured right?",
    70.0,
    run,
    needs=frozenset({"cuda", "release"}),
    group="weights and memory",
    scope="release",
)
