"""Does memory stay where it belongs? Read by NVML on a GPU, by the container's own count
without one; each figure says which."""

from __future__ import annotations

import statistics

from pydantic import Field

from sglang_harness.errors import TelemetryError
from sglang_harness.memory.gpu.guard import GIVEN_BACK_WITHIN, PATIENCE
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, expect, register
from sglang_harness.suite.checks.generate import PROMPTS, greedy
from sglang_harness.suite.checks.weights.disk import (
    PUSHED,
    first_weights_afterwards,
    update_from_disk,
    variant,
)
from sglang_harness.suite.needs import GPU, STARTED_HERE
from sglang_harness.verdict import Figure, Reading

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
    holders: dict[str, list[str]] = Field(default_factory=dict)
    """Who is on a device that was not given back, in words."""


@register
class DeviceIsGivenBack(Check[DeviceMemory]):
    id = "memory/device-given-back"
    sentence = "When the server is gone each GPU is back where it was before."
    observation = DeviceMemory
    needs = (GPU, STARTED_HERE)
    after_stop = True

    def observe(self, context: Context) -> DeviceMemory:
        stopped = context.server.stopped
        devices = stopped.devices if stopped else []
        if not devices:
            raise TelemetryError("Nobody looked at the GPUs when the server had gone.")
        for each in devices:
            if each.after is None:
                raise TelemetryError(f"GPU {each.uuid} is out of sight: {each.unknown}")
        return DeviceMemory(
            before={each.uuid: each.before for each in devices},
            after={each.uuid: each.after for each in devices if each.after is not None},
            waited_seconds=max(each.seconds for each in devices),
            holders={each.uuid: each.holders for each in devices if not each.given_back},
        )

    def judge(self, seen: DeviceMemory) -> list[Mismatch]:
        wrong = []
        for uuid, used in seen.before.items():
            if seen.after.get(uuid, used + GIVEN_BACK_WITHIN + 1) - used <= GIVEN_BACK_WITHIN:
                continue
            holders = "; ".join(seen.holders.get(uuid, []))
            wrong.append(
                Mismatch(
                    f"GPU {uuid}",
                    f"at most {(used + GIVEN_BACK_WITHIN) / MIB:.0f} MiB within {PATIENCE:g} s",
                    f"{seen.after.get(uuid, 0) / MIB:.0f} MiB",
                    holders,
                )
            )
        return wrong

    def figures(self, seen: DeviceMemory) -> list[Figure]:
        return [Figure.of("end of the server to free GPU", "s", "lower", seen.waited_seconds)]
