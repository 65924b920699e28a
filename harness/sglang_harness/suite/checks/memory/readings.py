"""Does the server stay within its memory? Read by NVML on a GPU, otherwise from the memory
accounting of its container or processes; each figure says which."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from sglang_harness.checkpoint.formats.spans import SIZES
from sglang_harness.checkpoint.model_tensors import expected_by
from sglang_harness.errors import HarnessError, TelemetryError
from sglang_harness.memory.gpu.guard import GIVEN_BACK_WITHIN, PATIENCE
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, expect, register
from sglang_harness.suite.checks.weights.disk import (
    first_weights_afterwards,
    update_from_disk,
    variant,
)
from sglang_harness.suite.lib.prompts import PROMPTS, greedy
from sglang_harness.suite.needs import GPU, LOADS_FROM_DISK, STARTED_HERE
from sglang_harness.verdict import Figure, Reading

MIB = 1 << 20
PUSHES = 8


class Snapshots(Observation):
    readings: list[Reading]
    sources: list[str]
    weights_bytes: int
    """The least that the served weights take in the server's memory; 0 where it is not known."""


def least_bytes(model: Path | None, info: Mapping[str, Any]) -> int:
    """The least that the weights in ``model`` take in a server whose ``/server_info`` is ``info``.

    Not the size of the folder: it may hold the same weights in two formats, a float32 checkpoint
    is half as large in a server that computes in 16 bits, and tied embeddings are held once.
    """
    if model is None:
        return 0
    try:
        expected = expected_by(model)
    except HarnessError:
        return 0  # a layout that only the server reads
    # "auto" makes float32 checkpoints 16 bits wide (SGLang 0.5.23).
    width: float = SIZES.get(str(info.get("dtype")), 2)
    if info.get("quantization") or info.get("torchao_config"):
        width = 0.5
    least = sum(
        math.prod(tensor.shape) * min(width, SIZES[tensor.dtype])
        for name, tensor in expected.tensors.items()
        if name not in expected.tied
    )
    return max(0, int(least) - int(float(info.get("cpu_offload_gb") or 0) * (1 << 30)))


@register
class MemoryIsSeen(Check[Snapshots]):
    id = "memory/snapshots"
    sentence = "Loading the model adds at least the memory that the served weights take."
    observation = Snapshots
    needs = (STARTED_HERE,)

    def observe(self, context: Context) -> Snapshots:
        server = context.server
        server.client.generate(PROMPTS[1], sampling=greedy(8))
        server.memory.mark("after generation")
        return Snapshots(
            readings=list(server.memory.readings),
            sources=server.memory.source_names,
            weights_bytes=least_bytes(server.model, server.client.server_info()),
        )

    def judge(self, seen: Snapshots) -> list[Mismatch]:
        wrong = []
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
    needs = (*LOADS_FROM_DISK, STARTED_HERE)
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
    """The processes on a device whose memory was not released."""


@register
class DeviceIsGivenBack(Check[DeviceMemory]):
    id = "memory/device-given-back"
    sentence = "When the server has stopped, the memory in use on each GPU is what it was before."
    observation = DeviceMemory
    needs = (GPU, STARTED_HERE)
    after_stop = True

    def observe(self, context: Context) -> DeviceMemory:
        stopped = context.server.stopped
        devices = stopped.devices if stopped else []
        if not devices:
            raise TelemetryError("No GPU was read after the server had stopped.")
        for each in devices:
            if each.after is None:
                raise TelemetryError(f"GPU {each.uuid} could not be read: {each.unknown}")
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
