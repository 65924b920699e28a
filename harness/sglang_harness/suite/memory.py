"""Does memory stay where it belongs? Read by NVML on a GPU, by the container's own count
without one; each figure says which."""

from __future__ import annotations

import statistics
import time

from sglang_harness.memory import Reading
from sglang_harness.memory.nvml import NvmlMemory
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, expect, register
from sglang_harness.suite.generate import PROMPTS, greedy
from sglang_harness.suite.needs import GPU, STARTED_HERE
from sglang_harness.suite.weights import PUSHED, first_weights_afterwards, update_from_disk, variant
from sglang_harness.verdict import Figure

MIB = 1 << 20
PUSHES = 8
#: A driver's own bookkeeping may differ by this much; a server's weights and cache do not.
GIVEN_BACK_WITHIN = 64 * MIB


class Snapshots(Observation):
    readings: list[Reading]
    sources: list[str]
    weights_bytes: int
    """Size of the weights files that the server was started with."""


@register
class MemoryIsSeen(Check[Snapshots]):
    id = "memory/snapshots"
    sentence = (
        "Memory is read before the server loads, when it is ready and after it has generated; "
        "loading adds at least the weights."
    )
    observation = Snapshots
    needs = (STARTED_HERE,)

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
            for needed in ("started", "ready", "after generation"):
                if needed not in marks:
                    wrong.append(Mismatch(source, f"a reading at '{needed}'", str(marks)))
        # On a GPU the weights are on the device, and the host side holds none of them.
        main = seen.sources[0] if seen.sources else ""
        used = {r.mark: r.used_bytes for r in seen.readings if r.source == main}
        added = used.get("ready", 0) - used.get("started", 0)
        if added < seen.weights_bytes:
            wrong.append(
                Mismatch(
                    f"{main} from 'started' to 'ready'",
                    f"at least the weights more, {seen.weights_bytes / MIB:.0f} MiB",
                    f"{added / MIB:.0f} MiB more",
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
    needs = (*PUSHED, STARTED_HERE)
    changes = True

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
        if not seen.used_bytes or not seen.push_seconds:
            return []
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


class DeviceMemory(Observation):
    before: dict[str, int]
    """Bytes in use by device UUID before the server started."""
    after: dict[str, int]
    waited_seconds: float


@register
class DeviceIsGivenBack(Check[DeviceMemory]):
    id = "memory/device-given-back"
    sentence = "When the server is gone each GPU is back where it was before."
    observation = DeviceMemory
    needs = (GPU, STARTED_HERE)
    after_stop = True

    def observe(self, context: Context) -> DeviceMemory:
        source = NvmlMemory(context.server.spec.gpus)
        readings = context.server.memory.readings
        before = next(r.parts for r in readings if r.mark == "before start" and r.source == "nvml")
        began = time.monotonic()
        while True:
            # The driver frees a dead process's memory some time after its end.
            _, after = source.read()
            waited = time.monotonic() - began
            if waited > 30 or all(after[u] - before[u] <= GIVEN_BACK_WITHIN for u in before):
                return DeviceMemory(before=before, after=after, waited_seconds=waited)
            time.sleep(0.2)

    def judge(self, seen: DeviceMemory) -> list[Mismatch]:
        return [
            Mismatch(
                f"GPU {uuid}",
                f"at most {(used + GIVEN_BACK_WITHIN) / MIB:.0f} MiB within 30 s",
                f"{seen.after.get(uuid, 0) / MIB:.0f} MiB",
            )
            for uuid, used in seen.before.items()
            if seen.after.get(uuid, used + GIVEN_BACK_WITHIN + 1) - used > GIVEN_BACK_WITHIN
        ]
