"""Whether the driver's figures can be trusted, and what it costs to read them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sglang_harness.gpu_check import probes
from sglang_harness.gpu_check.part import Context, Part
from sglang_harness.memory.gpu.driver import Driver
from sglang_harness.memory.gpu.guard import GIVEN_BACK_WITHIN
from sglang_harness.memory.gpu.nvml import NvmlMemory
from sglang_harness.memory.sampler import Sampler
from sglang_harness.memory.timeline import Timeline

MIB = 1 << 20
GIB = 1 << 30
#: Allocations whose figures are compared.
SIZES = (MIB, 16 * MIB, 256 * MIB, GIB, 4 * GIB, 20 * GIB)
#: NVML's figure of an allocation may differ from it by 1 % or this. CUDA allocates pages of 2 MiB.
ALLOWED = 4 * MIB
#: Seconds that the driver has to free what a process held that has ended.
FREES_WITHIN = 15.0
#: Seconds of sampling.
SAMPLES_FOR = 5.0
#: Sampling has to cost less of one core than this.
OF_ONE_CORE = 0.01


def figures(context: Context) -> dict[str, Any]:
    """Allocations of known size as NVML and torch see them; and what a process with a CUDA context
    takes and leaves."""
    context.torch()
    with Driver() as driver:
        uuids = context.settings.gpus

        def used() -> dict[str, int]:
            return {uuid: driver.memory(uuid).used for uuid in uuids}

        before = used()
        # Without its cache torch asks the driver for each tensor, and gives each back.
        told = probes.run(
            "allocate",
            *map(str, SIZES),
            within=max(10.0, context.left() - FREES_WITHIN - 2.0),
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        context.put("allocations", told)
        uuid = told["uuid"]
        after, seconds = _settled(lambda: used()[uuid])
        residue = after - before[uuid]
    takes = told["with_context"] - before[uuid]
    context.put("context_bytes", takes)
    context.put("residue_bytes", residue)
    context.put("freed_after_seconds", seconds)
    context.note("memory", "a CUDA context of torch takes", f"{takes / MIB:.0f} MiB")
    context.note(
        "memory",
        "given-back residue, of a process that has ended",
        f"{residue / MIB:.1f} MiB {seconds:.2f} s after it",
    )
    rows = told["rows"]
    assert rows, "not one allocation fitted: the GPU is full"
    off = [abs(row["nvml"] - row["asked"]) for row in rows]
    context.note(
        "memory", "NVML against known allocations", f"off by at most {max(off) / MIB:.1f} MiB"
    )
    context.headline(
        f"{len(rows)} allocations up to {max(r['asked'] for r in rows) // MIB} MiB, NVML off by at "
        f"most {max(off) / MIB:.1f} MiB"
    )
    for row in rows:
        allowed = max(row["asked"] // 100, ALLOWED)
        for which in ("torch", "asked"):
            differs = abs(row["nvml"] - row[which])
            assert differs <= allowed, (
                f"{row['asked'] // MIB} MiB: NVML sees {row['nvml']}, {which} {row[which]} bytes: "
                f"off by {differs}, allowed {allowed}"
            )
        assert abs(row["kept"]) <= ALLOWED, f"{row['kept']} bytes are still in use after it"
    assert residue <= GIVEN_BACK_WITHIN, (
        f"{residue / MIB:.0f} MiB are still in use {seconds:.0f} s after the process ended, "
        f"allowed {GIVEN_BACK_WITHIN / MIB:.0f} MiB"
    )
    return {}


def _settled(used: Callable[[], int]) -> tuple[int, float]:
    """Bytes in use once they have not changed for a second, and after how many seconds they got
    there; waits for at most :data:`FREES_WITHIN`."""
    began = changed = time.monotonic()
    last = used()
    while (now := time.monotonic()) - changed < 1.0 and now - began < FREES_WITHIN:
        time.sleep(0.02)
        if (seen := used()) != last:
            last, changed = seen, time.monotonic()
    return last, changed - began


def sampler(context: Context) -> dict[str, Any]:
    """What sampling costs, and how long one reading of each device takes."""
    memory, line = NvmlMemory(), Timeline()
    memory.read()
    cpu, wall = time.process_time(), time.monotonic()
    running = Sampler(memory.read_partly, line.add).start()
    time.sleep(SAMPLES_FOR)
    running.stop()
    share = (time.process_time() - cpu) / (time.monotonic() - wall)
    with Driver() as driver:
        found, _ = driver.gpus()
        began = time.monotonic()
        for gpu in found:
            driver.memory(gpu.uuid)
        reading = time.monotonic() - began
    memory.close()
    context.put("devices", len(found))
    context.put("samples", running.taken)
    context.put("missed", running.missed)
    context.put("slowest_seconds", running.slowest)
    context.put("share_of_a_core", share)
    context.put("reading_seconds", reading)
    context.headline(f"{share:.2%} of a core at 10 Hz, one reading {reading * 1000:.2f} ms")
    context.note(
        "memory", "sampling at 10 Hz", f"{share:.2%} of a core, {reading * 1000:.2f} ms a reading"
    )
    assert not running.gaps, f"samples are missing: {running.gaps}"
    assert running.taken >= 9 * SAMPLES_FOR, (
        f"{running.taken} samples in {SAMPLES_FOR:g} s at 10 Hz, expected at least "
        f"{9 * SAMPLES_FOR:g}"
    )
    assert share < OF_ONE_CORE, (
        f"sampling costs {share:.2%} of a core, expected less than {OF_ONE_CORE:.0%}"
    )
    return {}


PARTS = (
    Part(
        "figures",
        "Are NVML's figures of memory those of torch.cuda, for allocations of known size?",
        60.0,
        figures,
        needs=frozenset({"cuda"}),
        group="driver",
    ),
    Part(
        "sampler",
        "What does it cost to sample the memory of every GPU at 10 Hz?",
        20.0,
        sampler,
        needs=frozenset({"cuda"}),
        group="driver",
        least=SAMPLES_FOR + 3.0,
    ),
)
