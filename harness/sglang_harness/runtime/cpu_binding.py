"""Which processor cores each rank of a parallel server on a CPU computes on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from sglang_harness.runtime import engine
from sglang_harness.spec import Argument

#: Where SGLang reads the binding: for each rank its cores, with ``|`` between two ranks.
VARIABLE = "SGLANG_CPU_OMP_THREADS_BIND"

#: SGLang's flags for the sizes whose product is the number of ranks, with their other names.
SIZES = (
    ("tp-size", "tensor-parallel-size", "tp"),
    ("pp-size", "pipeline-parallel-size"),
    ("dp-size", "data-parallel-size", "dp"),
)


def cores_here() -> list[int]:
    """Numbers of the cores that this process may use."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return list(range(os.cpu_count() or 1))


def cores_of(client: Any) -> list[int]:
    """Numbers of the cores that a container of the engine behind ``client`` may use."""
    there = int(client.info().get("NCPU") or 1)
    mine = [] if engine.is_remote() else [core for core in cores_here() if core < there]
    return mine or list(range(there))


def ranks(arguments: Mapping[str, Argument]) -> int:
    """How many processes compute, by a server's flags; 1 where they say nothing."""
    return prod(_size(arguments, names) for names in SIZES)


def _size(arguments: Mapping[str, Argument], names: Sequence[str]) -> int:
    for name in names:
        try:
            return max(1, int(arguments.get(name, "")))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue  # SGLang will say what is wrong with it
    return 1


def binding(arguments: Mapping[str, Argument], cores: Sequence[int]) -> dict[str, str]:
    """The variable that a parallel server on a CPU needs; empty for one rank.

    Without it SGLang gives each rank a NUMA node, and dies at its start where there are more
    ranks than nodes (0.5.23). Each rank gets an equal part of ``cores``; where there are too
    few, ranks share them.
    """
    number = ranks(arguments)
    if number == 1 or not cores:
        return {}
    share = max(1, len(cores) // number)
    parts = [
        [cores[(rank * share + each) % len(cores)] for each in range(share)]
        for rank in range(number)
    ]
    return {VARIABLE: "|".join(",".join(map(str, part)) for part in parts)}
