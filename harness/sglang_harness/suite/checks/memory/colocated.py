"""Release, resume and push as trainers do it on the server's own GPUs: once, and again and again.

The order is that of slime, miles, NeMo-RL and verl: flush, release, resume the weights alone, push,
flush while the KV cache is still released, resume the rest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sglang_harness.memory.analysis.explained import said
from sglang_harness.memory.analysis.leak import Slope, slope
from sglang_harness.memory.analysis.steady import settle
from sglang_harness.suite.check import (
    Check,
    Context,
    Mismatch,
    NotProvided,
    Observation,
    expect,
    register,
)
from sglang_harness.suite.checks.memory.release import (
    ALL_TAGS,
    RELEASE,
    RESUME,
    back,
    devices_of,
    fallen,
    reader_of,
    release,
    resumed_afterwards,
    scored_by,
    until,
    wrong_answers,
)
from sglang_harness.suite.checks.weights.disk import (
    NEW_VERSION,
    first_weights_afterwards,
    try_update,
    update_from_disk,
    variant,
)
from sglang_harness.suite.lib.prompts import PROMPTS, greedy
from sglang_harness.suite.lib.scored import Scored
from sglang_harness.suite.needs import CHECKSUMS, LOADS_FROM_DISK, STARTED_HERE
from sglang_harness.verdict import Figure

if TYPE_CHECKING:
    from sglang_harness.memory import MemorySource

#: Cycles of release, resume and push, and those before them that may settle buffers.
CYCLES, WARM_UP = 20, 2
#: Fewer give no slope that can be trusted (``memory/leak.py``).
FEWEST_CYCLES = 12


class Colocated(Observation):
    source: str
    saver: bool
    """Started with --enable-memory-saver: the figures of the device have to follow."""
    devices: list[str]
    weights: int
    kv_cache: int
    steps: dict[str, dict[str, int]]
    """Bytes in use by part: ``before``, ``released``, ``weights resumed``, ``pushed``,
    ``all resumed``."""
    success: bool
    message: str
    unchanged: list[str]
    """Parameters that the push has left as they were."""
    version: str
    cached_tokens: int
    answers: list[Scored]
    """Scored by the oracle of the new weights."""


@register
class ColocatedOrder(Check[Colocated]):
    id = "memory/colocated-order"
    sentence = (
        "In the order of trainers on the server's own GPUs (flush, release all, resume weights, "
        "push, flush with the KV cache still released, resume the rest) memory follows each "
        "step, and the new weights are served."
    )
    observation = Colocated
    needs = (STARTED_HERE, *LOADS_FROM_DISK, CHECKSUMS, RELEASE, RESUME)
    changes = True

    def observe(self, context: Context) -> Colocated:
        server, new = context.server, variant(context)
        client, read, devices = server.client, reader_of(context), devices_of(context)
        info = client.server_info()
        saver, what = bool(info.get("enable_memory_saver")), said(info)
        weights, kv_cache = what.weights or 0, what.kv_cache or 0
        on_gpu = saver and server.device == "gpu"
        steps: dict[str, dict[str, int]] = {}
        sums = client.checksums()
        with first_weights_afterwards(context), resumed_afterwards(server) as still:
            client.flush_cache()
            steps["before"] = read()[1]
            release(server, still, ALL_TAGS)
            freed = weights + kv_cache

            def at_rest() -> dict[str, int]:
                # Host memory does not move here, and an engine takes a second to read it.
                return settle(read, timeout=5.0).parts if on_gpu else read()[1]

            steps["released"] = (
                until(fallen, read, devices, steps["before"], freed).parts if on_gpu else at_rest()
            )
            client.resume_memory(["weights"])
            still.remove("weights")
            steps["weights resumed"] = at_rest()
            update = try_update(context, new.inside, NEW_VERSION)
            client.flush_cache()
            steps["pushed"] = at_rest()
            client.resume_memory(list(still))
            still.clear()
            steps["all resumed"] = (
                until(back, read, devices, steps["before"], freed).parts if on_gpu else at_rest()
            )
            changed = set(client.checksums().changed_since(sums))
            first = client.generate(PROMPTS[0], sampling=greedy(1))
            return Colocated(
                source=server.memory.source_names[0],
                saver=on_gpu,
                devices=devices,
                weights=weights,
                kv_cache=kv_cache,
                steps=steps,
                success=update.success,
                message=update.message,
                unchanged=[n for n in sorted(sums.ranks[0]) if n not in changed],
                version=str(first.weight_version),
                cached_tokens=first.cached_tokens,
                answers=scored_by(context, new.oracle),
            )

    def judge(self, seen: Colocated) -> list[Mismatch]:
        wrong = [] if seen.success else [Mismatch("push", "success", seen.message or "none")]
        # Buffers (rotary tables) are computed, not loaded: they rightly stay.
        stale = [n for n in seen.unchanged if not n.endswith(("cos_sin_cache", "inv_freq"))]
        wrong += expect("parameters that stayed as they were", [], stale)
        wrong += expect("weight version in answers", NEW_VERSION, seen.version)
        wrong += expect("cached tokens of the first answer", 0, seen.cached_tokens)
        wrong += wrong_answers("with the new weights", seen.answers)
        order = ("before", "released", "weights resumed", "pushed", "all resumed")
        if missing := [step for step in order if step not in seen.steps]:
            return [*wrong, Mismatch("readings", ", ".join(order), f"none at {missing[0]!r}")]
        if not seen.saver:
            return wrong
        if not seen.devices:
            wrong.append(Mismatch("GPUs that the server is on", "some", "none"))
        before = seen.steps["before"]
        both = seen.weights + seen.kv_cache
        kept = {"released": both, "weights resumed": seen.kv_cache, "pushed": seen.kv_cache}
        for step, by in kept.items():
            wrong += fallen(step, seen.devices, before, seen.steps[step], by)
        wrong += back("all resumed", seen.devices, before, seen.steps["all resumed"], both)
        return wrong


def _named(sources: Sequence[MemorySource]) -> Iterator[tuple[str, int]]:
    """What each source reads, GPUs one by one and at rest."""
    for source in sources:
        if source.name == "nvml":
            rest = settle(source.read, timeout=2.0, flat_for=0.2)
            yield from ((f"GPU {uuid}", value) for uuid, value in rest.parts.items())
        else:
            yield source.name, source.read()[0]


class Cycles(Observation):
    saver: bool
    used_bytes: dict[str, list[int]]
    """By source and, for GPUs, device: at the end of each cycle, the first ones left out."""
    seconds: list[float]
    """Of each cycle."""


@register
class CyclesDoNotGrow(Check[Cycles]):
    id = "memory/cycles"
    sentence = (
        "Release, resume and push, again and again, leave no more memory in use: the slope over "
        "the cycles is zero."
    )
    observation = Cycles
    profile = "full"
    needs = (STARTED_HERE, *LOADS_FROM_DISK, RELEASE, RESUME)
    changes = True

    def observe(self, context: Context) -> Cycles:
        server, new = context.server, variant(context)
        client, ledger = server.client, server.memory
        sources = [ledger.source(name) for name in ledger.source_names]
        used: dict[str, list[int]] = {}
        seconds: list[float] = []
        until = time.monotonic() + 0.7 * server.spec.limits.check
        with first_weights_afterwards(context) as old, resumed_afterwards(server) as still:
            for number in range(WARM_UP + CYCLES):
                began = time.monotonic()
                client.flush_cache()
                release(server, still, ALL_TAGS)
                client.resume_memory(["weights"])
                still.remove("weights")
                update_from_disk(context, old if number % 2 else new.inside, f"cycle-{number}")
                client.resume_memory(list(still))
                still.clear()
                client.generate(PROMPTS[0], sampling=greedy(1))
                client.flush_cache()
                if number >= WARM_UP:
                    for name, value in _named(sources):
                        used.setdefault(name, []).append(value)
                seconds.append(time.monotonic() - began)
                if time.monotonic() > until:
                    break
        if len(seconds) < WARM_UP + FEWEST_CYCLES:
            raise NotProvided(
                f"Only {len(seconds)} cycles fit into {until - began:.0f} s, and a slope takes "
                f"{WARM_UP + FEWEST_CYCLES}.",
                advice="Raise --check-timeout.",
            )
        return Cycles(
            saver=bool(client.server_info().get("enable_memory_saver")),
            used_bytes=used,
            seconds=seconds,
        )

    def judge(self, seen: Cycles) -> list[Mismatch]:
        wrong = [] if seen.used_bytes else [Mismatch("sources of memory", "some", "none")]
        for source, values in seen.used_bytes.items():
            if len(values) < FEWEST_CYCLES:
                wrong.append(Mismatch(source, f"{FEWEST_CYCLES} readings", str(len(values))))
            elif (found := slope(values)).leaks:
                wrong.append(
                    Mismatch(f"{source} memory over cycles", "a slope of zero", str(found))
                )
        return wrong

    def figures(self, seen: Cycles) -> list[Figure]:
        found: list[tuple[str, Slope]] = [
            (source, slope(values))
            for source, values in seen.used_bytes.items()
            if len(values) >= FEWEST_CYCLES
        ]
        slopes = [
            Figure.of(f"memory a cycle ({source})", "MB", "lower", max(0.0, each.mb))
            for source, each in found
        ]
        if not seen.seconds:
            return slopes
        return [*slopes, Figure.of("release, resume and push", "s", "lower", *seen.seconds)]
