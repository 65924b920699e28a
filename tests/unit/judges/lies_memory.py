"""Lies of servers that the checks ``memory/...`` have to refuse, and oddities that are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alterations import (
    Alteration,
    at,
    put,
)

from sglang_harness.suite.checks.memory.readings import MIB


def read_as(used: dict[str, int]) -> Callable[[dict[str, Any]], object]:
    """Other figures at given marks."""

    def alter(evidence: dict[str, Any]) -> None:
        for reading in evidence["readings"]:
            reading["used_bytes"] = used.get(reading["mark"], reading["used_bytes"])

    return alter


def too_many_kept(evidence: dict[str, Any]) -> None:
    """A server that keeps every checkpoint it was given."""
    before, weights = evidence["used_bytes"][0], 4 * 1024 * MIB
    evidence["weights_bytes"] = weights
    evidence["used_bytes"] = [before + n * weights for n in range(9)]


def half_kept(evidence: dict[str, Any]) -> None:
    """A tenth of the checkpoint stays behind in each push: slow, and still a leak."""
    too_many_kept(evidence)
    before, weights = evidence["used_bytes"][0], evidence["weights_bytes"]
    evidence["used_bytes"] = [before + n * weights // 10 for n in range(9)]


def noisy_allocator(evidence: dict[str, Any]) -> None:
    evidence["used_bytes"] = [n + (i % 3) * 9 * MIB for i, n in enumerate(evidence["used_bytes"])]


def settles_then_stays(evidence: dict[str, Any]) -> None:
    """The first push allocates a buffer as large as the weights, once."""
    before, weights = evidence["used_bytes"][0], 4 * 1024 * MIB
    put({"weights_bytes": weights, "used_bytes": [before, *[before + weights] * 8]})(evidence)


LIES = [
    Alteration(
        "memory/snapshots",
        "reads another process, where nothing is loaded",
        read_as({"ready": 40 * MIB, "started": 40 * MIB}),
        "expected at least the weights more, 2 MiB, got 0 MiB more",
    ),
    Alteration(
        "memory/snapshots",
        "nothing is read at all",
        put({"sources": [], "readings": []}),
        "expected at least the weights more",
    ),
    Alteration(
        "memory/updates-do-not-grow",
        "every checkpoint is kept",
        too_many_kept,
        "container memory after 8 pushes: expected at most 1024 MiB more",
    ),
    Alteration(
        "memory/updates-do-not-grow",
        "a tenth of every checkpoint is kept",
        half_kept,
        "(+2048 MiB)",
    ),
    Alteration(
        "memory/device-given-back",
        "a GPU keeps the weights",
        put({"after.GPU-2": 9000 * MIB}),
        "GPU GPU-2: expected at most 64 MiB within 30 s, got 9000 MiB",
    ),
    Alteration(
        "memory/device-given-back",
        "a context stays on one of two GPUs",
        put({"after.GPU-1": 1020 * MIB}),
        "GPU GPU-1: expected at most 664 MiB within 30 s, got 1020 MiB",
    ),
]

HARMLESS = [
    Alteration("memory/device-given-back", "as much as is allowed", put({"after.GPU-2": 64 * MIB})),
    Alteration(
        "memory/updates-do-not-grow",
        "as much as is allowed",
        put({"used_bytes": [500 * MIB] * 6 + [532 * MIB] * 3}),
    ),
    Alteration("memory/updates-do-not-grow", "noise of an allocator", noisy_allocator),
    Alteration(
        "memory/device-given-back",
        "less is in use than before, and a GPU is new",
        put({"after": {"GPU-1": 0, "GPU-2": 0, "GPU-3": 800 * MIB}}),
    ),
    Alteration("memory/updates-do-not-grow", "one buffer that is kept", settles_then_stays),
    Alteration(
        "memory/snapshots",
        "host memory beside the GPU's, and smaller than the weights",
        at(
            do=lambda e: (
                e["sources"].append("host"),
                e["readings"].extend(
                    {**r, "source": "host", "used_bytes": 1} for r in [*e["readings"]]
                ),
            )
        ),
    ),
]
