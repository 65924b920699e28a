"""Is memory released by tag, how long after the answer, and is it what the server said it holds?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_harness.gpu_check import bounds, served
from sglang_harness.gpu_check.device_timeline import Change, DeviceTimeline, change, in_mib
from sglang_harness.gpu_check.part import Context, NotHere, Part
from sglang_harness.gpu_check.suite_questions import ask, context_of, gpu_memory
from sglang_harness.memory.analysis.explained import said
from sglang_harness.memory.analysis.steady import settle
from sglang_harness.memory.gpu.nvml import NvmlMemory
from sglang_harness.suite import registered
from sglang_harness.suite.check import Context as Asked
from sglang_harness.suite.check import Mismatch
from sglang_harness.suite.checks.memory.release import (
    FREE_WITHIN,
    Released,
    ReleasedByTag,
    back,
    devices_of,
    fallen,
    release,
    resumed_afterwards,
    scored_by,
    tolerance,
    wrong_answers,
)
from sglang_harness.suite.checks.weights.disk import first_weights_afterwards, update_from_disk
from sglang_harness.suite.lib.scored import Scored
from sglang_harness.verdict import Outcome

MIB = 1 << 20

#: What is released at once, each in its turn. The graphs come last: they are in SGLang's memory
#: saver only with ``SGLANG_MEMORY_SAVER_CUDA_GRAPH`` (0.5.15 to 0.5.23), so what of them has to be
#: freed is not judged.
TAGS: tuple[tuple[str, ...], ...] = (
    ("kv_cache",),
    ("weights",),
    ("kv_cache", "weights"),
    ("cuda_graph",),
)
JUDGED = TAGS[:3]

#: Bytes by which a GPU may move and still count as settled.
STILL = 8 * MIB


@dataclass(frozen=True)
class TagsSeen:
    """One release of ``tags``, and the resume after it.

    Attributes:
        said: bytes that the server says these hold on each GPU; ``None``: it does not say.
        answers: afterwards, with weights pushed again where they were released.
    """

    tags: tuple[str, ...]
    said: int | None
    released: Change
    resumed: Change
    answers: list[Scored] = field(default_factory=list)


@dataclass(frozen=True)
class ReleasesSeen:
    """All of them, of one server.

    Attributes:
        devices: UUIDs of the GPUs that it is on.
        differing_checksums: parameters that are others than before the first release, when the
            weights had been pushed again.
    """

    devices: list[str]
    each: list[TagsSeen]
    differing_checksums: list[str]


def observe(
    context: Asked, *, each_seen: Callable[[TagsSeen], None] = lambda _: None
) -> ReleasesSeen:
    """Releases and resumes by tag; the server has its first weights afterwards.

    Args:
        each_seen: told of each set of tags when it was resumed.

    Raises:
        HarnessError: as the client and NVML do.
    """
    server = context.server
    source = gpu_memory(server)
    assert source is not None, "asked of a server on a GPU"
    devices = devices_of(context)
    sums = server.client.checksums()
    found = []
    with first_weights_afterwards(context) as path:
        for tags in TAGS:
            found.append(_once(context, tags, source, devices, path))
            each_seen(found[-1])
        differing = server.client.checksums().changed_since(sums)
    return ReleasesSeen(devices, found, differing)


def _once(
    context: Asked,
    tags: tuple[str, ...],
    source: NvmlMemory,
    devices: Sequence[str],
    path: str,
) -> TagsSeen:
    server = context.server
    holds = said(server.client.server_info()).of(tags)
    by = (holds or 0) if tags in JUDGED else 0
    server.client.flush_cache()
    before = settle(source.read, within=STILL).parts

    def has_fallen(now: dict[str, int]) -> bool:
        return not list(fallen("", devices, before, now, by))

    def is_back(now: dict[str, int]) -> bool:
        return not list(back("", devices, before, now, by))

    with resumed_afterwards(server) as still:
        released = _around(source, lambda: release(server, still, tags), before, has_fallen)
        resumed = _around(
            source, lambda: server.client.resume_memory(tags), released.settled, is_back
        )
        still.clear()
    if "weights" in tags:
        # They come back as whatever was in those pages: sgl-project/sglang issue 19442.
        update_from_disk(context, path, "harness-again")
    return TagsSeen(tags, holds, released, resumed, scored_by(context, context.oracle))


def _around(
    source: NvmlMemory,
    call: Callable[[], object],
    before: Mapping[str, int],
    reached: Callable[[dict[str, int]], bool],
) -> Change:
    with DeviceTimeline(source) as timeline:
        called = time.monotonic()
        call()
        answered = time.monotonic()
        rest = settle(
            source.read, reached=reached, within=STILL, timeout=FREE_WITHIN, since=answered
        )
    return change(
        timeline,
        before=before,
        settled=rest.parts,
        called=called,
        answered=answered,
        within=STILL,
    )


def wrong(seen: ReleasesSeen) -> list[str]:
    """Everything that is not as it has to be: as ``memory/release-by-tag`` of the suite judges,
    and what a release of the graphs leaves."""
    judged = [each for each in seen.each if each.tags in JUDGED]
    check = registered()["memory/release-by-tag"]
    found: list[Mismatch] = check.judge(
        ReleasedByTag(
            devices=seen.devices,
            releases=[_as_the_suite_has_it(each) for each in judged],
            differing_checksums=seen.differing_checksums,
            answers=[answer for each in judged for answer in each.answers],
        )
    )
    for missing in [tags for tags in TAGS if tags not in [each.tags for each in seen.each]]:
        found.append(Mismatch(f"release of {'+'.join(missing)}", "one", "none"))
    for each in seen.each:
        tags = "+".join(each.tags)
        if each.tags not in JUDGED:
            found += back(
                f"resume of {tags}", seen.devices, each.released.before, each.resumed.settled, 0
            )
            found += wrong_answers(f"after {tags}", each.answers)
        elif each.said is None:
            found.append(Mismatch(f"what the server says of {tags}", "a figure", "none"))
    return [str(each) for each in found]


def _as_the_suite_has_it(each: TagsSeen) -> Released:
    return Released(
        tags=list(each.tags),
        said=each.said or 0,
        before=each.released.before,
        released=each.released.settled,
        resumed=each.resumed.settled,
        seconds_to_free=each.released.settled_after,
    )


def told(each: TagsSeen) -> dict[str, Any]:
    """One release and resume, for the results."""
    freed = in_mib(each.released.before) - in_mib(each.released.settled)
    return {
        "tags": "+".join(each.tags),
        "said_mib": None if each.said is None else round(each.said / MIB, 1),
        "freed_mib": round(freed, 1),
        "back_off_mib": round(in_mib(each.resumed.settled) - in_mib(each.released.before), 1),
        "release": each.released.told(),
        "resume": each.resumed.told(),
        "answers_right": not list(wrong_answers("", each.answers)),
    }


def deviations(seen: ReleasesSeen) -> Iterator[tuple[int, int]]:
    """How far each release stayed behind what was said, and each resume was off; with what was
    said. Bytes, of each GPU."""
    for each in seen.each:
        by = each.said or 0
        for uuid in seen.devices:
            before = each.released.before.get(uuid, 0)
            if each.tags in JUDGED:
                yield max(0, by - (before - each.released.settled.get(uuid, before))), by
            yield abs(each.resumed.settled.get(uuid, 0) - before), by


def figures(seen: ReleasesSeen) -> dict[str, Any]:
    """For the results."""
    bound = bounds.of_release(deviations(seen))
    return {
        "gpus": len(seen.devices),
        "releases": [told(each) for each in seen.each],
        "constants": [bound.told()],
        "tolerance_mib": {
            "+".join(each.tags): round(tolerance(each.said or 0) / MIB, 1) for each in seen.each
        },
    }


COLOCATED = "memory/colocated-order"


def run(context: Context) -> dict[str, Any]:
    """The part ``release-resume``."""
    other = served.other_checkpoint(context)
    server = served.shared(context)
    if not server.client.server_info().get("enable_memory_saver"):
        raise NotHere("the server was started without --enable-memory-saver: it releases nothing")
    asked = context_of(server, served.scratch(context), other=other)
    rows: list[dict[str, Any]] = []

    def each_seen(one: TagsSeen) -> None:
        rows.append(told(one))
        context.put("releases", rows)
        context.say(f"{rows[-1]['tags']}: {_line(rows[-1])}")
        context.note("memory", f"release of {rows[-1]['tags']}", _line(rows[-1]))

    with served.not_run_where_not_provided():
        seen = observe(asked, each_seen=each_seen)
    found = wrong(seen)
    known = figures(seen)
    lacking, order, _ = ask(COLOCATED, asked)
    if order is None:
        known["colocated_order"] = {"outcome": "not run", "message": lacking}
    else:
        known["colocated_order"] = {
            "outcome": order.outcome.value,
            "message": order.message,
            "seconds": round(order.seconds, 2),
            "steps_mib": {
                step: in_mib(parts)
                for step, parts in (order.evidence or {}).get("steps", {}).items()
            },
        }
        if order.outcome is not Outcome.PASS:
            found.append(f"{COLOCATED}: {order.outcome.value}: {order.message}")
    context.headline("; ".join(f"{row['tags']}: {row['freed_mib']:.0f} MiB" for row in rows))
    (bound,) = known["constants"]
    context.note(
        "memory",
        "tolerance of releases",
        f"{bound['in_use_mib']} MiB in use, {bound['seen_mib']} seen, {bound['proposed_mib']} "
        "proposed",
    )
    return served.ended(context, known, found)


def _line(row: dict[str, Any]) -> str:
    release = row["release"]
    return (
        f"{row['freed_mib']:.0f} of {row['said_mib']} MiB said, free "
        f"{release['answer_to_settled_seconds']} s after the answer, off by "
        f"{row['back_off_mib']:+.1f} MiB when resumed"
    )


PART = Part(
    "release-resume",
    "Does a release free what the server says it holds, how soon, and is it right when resumed?",
    110.0,
    run,
    needs=frozenset({"cuda", "release"}),
    group="weights and memory",
    scope="release",
    disk_bytes=6_000_000_000,
)
