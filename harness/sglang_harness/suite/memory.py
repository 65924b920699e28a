"""Does memory stay where it belongs? Read by NVML on a GPU, by the container's own count
without one; each figure says which."""

from __future__ import annotations

import statistics

from sglang_harness.memory import Reading
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, expect, register
from sglang_harness.suite.generate import PROMPTS, greedy
from sglang_harness.suite.needs import DISK_UPDATE
from sglang_harness.suite.weights import first_weights_afterwards, update_from_disk, variant
from sglang_harness.verdict import Figure

MIB = 1 << 20
PUSHES = 8


class Snapshots(Observation):
    readings: list[Reading]
    sources: list[str]
    weights_bytes: int
    """Size of the weights files that the server was started with."""


@register
class MemoryIsSeen(Check[Snapshots]):
    id = "memory/snapshots"
    sentence = (
        "Memory is read when the server is ready and after it has generated, and holds at least "
        "the weights."
    )
    observation = Snapshots

    def observe(self, context: Context) -> Snapshots:
        server = context.server
        server.client.generate(PROMPTS[1], sampling=greedy(8))
        server.memory.mark("after generation")
        files = (
            [*server.model.glob("*.safetensors"), *server.model.glob("*.bin")]
            if server.model
            else []
        )
        return Snapshots(
            readings=list(server.memory.readings),
            sources=server.memory.source_names,
            weights_bytes=sum(f.stat().st_size for f in files),
        )

    def judge(self, seen: Snapshots) -> list[Mismatch]:
        wrong = []
        for source in seen.sources:
            marks = [r.mark for r in seen.readings if r.source == source]
            for needed in ("ready", "after generation"):
                if needed not in marks:
                    wrong.append(Mismatch(source, f"a reading at '{needed}'", str(marks)))
        # On a GPU the weights are on the device, and the host side holds none of them.
        main = seen.sources[0] if seen.sources else ""
        for reading in seen.readings:
            too_little = reading.used_bytes < seen.weights_bytes
            if reading.mark == "ready" and reading.source == main and too_little:
                wrong.append(
                    Mismatch(
                        f"{main} at 'ready'",
                        f"at least the weights, {seen.weights_bytes / MIB:.0f} MiB",
                        f"{reading.used_bytes / MIB:.0f} MiB",
                    )
                )
        return wrong

    def figures(self, seen: Snapshots) -> list[Figure]:
        return [
            Figure.of(f"memory at ready ({r.source})", "MiB", "lower", r.used_bytes / MIB)
            for r in seen.readings
            if r.mark == "ready"
        ]


class Growth(Observation):
    source: str
    used_bytes: list[int]
    """Before the first push, then after each."""
    weights_bytes: int
    push_seconds: list[float]


@register
class UpdatesDoNotGrow(Check[Growth]):
    id = "memory/updates-do-not-grow"
    sentence = "Eight updates from disk leave no more memory in use than two."
    observation = Growth
    needs = (DISK_UPDATE,)

    def observe(self, context: Context) -> Growth:
        server, new = context.server, variant(context)
        used, seconds = [server.memory.mark("before pushes")[0].used_bytes], []
        with first_weights_afterwards(context) as old_path:
            for number in range(PUSHES):
                path = old_path if number % 2 else new.inside
                update = update_from_disk(context, path, f"push-{number}")
                seconds.append(update.seconds)
                used.append(server.memory.mark(f"after push {number + 1}")[0].used_bytes)
        return Growth(
            source=server.memory.source_names[0],
            used_bytes=used,
            weights_bytes=new.bytes,
            push_seconds=seconds,
        )

    def judge(self, seen: Growth) -> list[Mismatch]:
        wrong = list(expect("readings", PUSHES + 1, len(seen.used_bytes)))
        if wrong:
            return wrong
        # The first two pushes may settle buffers; a leak of one checkpoint in four pushes
        # shows as half of the weights in the medians, noise of allocators does not.
        early = statistics.median(seen.used_bytes[1:4])
        late = statistics.median(seen.used_bytes[-3:])
        allowed = max(32 * MIB, seen.weights_bytes // 4)
        if late - early > allowed:
            wrong.append(
                Mismatch(
                    f"{seen.source} memory after {PUSHES} pushes",
                    f"at most {allowed / MIB:.0f} MiB more than after the first ones "
                    f"({early / MIB:.0f} MiB)",
                    f"{late / MIB:.0f} MiB",
                    f"{(late - early) / MIB:+.0f} MiB",
                )
            )
        return wrong

    def figures(self, seen: Growth) -> list[Figure]:
        rates = [seen.weights_bytes / max(s, 1e-9) / 1e9 for s in seen.push_seconds]
        return [
            Figure.of(
                f"memory after {PUSHES} pushes ({seen.source})",
                "MiB",
                "lower",
                seen.used_bytes[-1] / MIB,
            ),
            Figure.of("repeated push from disk", "s", "lower", *seen.push_seconds),
            Figure.of("repeated push from disk, rate", "GB/s", "higher", *rates),
        ]
