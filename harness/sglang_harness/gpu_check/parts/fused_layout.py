"""The server's checksums of its fused parameters beside those that are computed here, one by one.
The first witness of every push rests on their being equal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.client import Checksums
from sglang_harness.errors import NotProvided, Refused
from sglang_harness.gpu_check import served
from sglang_harness.gpu_check.part import Context, Part
from sglang_harness.server import Server
from sglang_harness.weights.proof.checksums import ServedLayout, expected_checksums
from sglang_harness.weights.proof.fused_layout import COMPUTED

#: Names that are written down of each kind.
NAMED = 10


@dataclass(frozen=True)
class LayoutSeen:
    """Checksums by parameter, rank by rank.

    Attributes:
        stated: by the server.
        computed: here, from its checkpoint.
        dtype: that they were computed in.
        server_seconds: of the server's answer.
        here_seconds: of computing them.
        bytes: of the checkpoint's tensors.
    """

    stated: list[dict[str, str]]
    computed: list[dict[str, str]]
    dtype: str
    server_seconds: float
    here_seconds: float
    bytes: int


def observe(server: Server) -> LayoutSeen:
    """Asks the server for its checksums, and computes them from its checkpoint.

    Raises:
        NotProvided: the layout of this model is not known here, or the server states no checksums.
        HarnessError: as the client, or where the checkpoint cannot be read.
    """
    if server.model is None:
        raise NotProvided("The served checkpoint is not on this machine.")
    layout = ServedLayout.of(server.model, server.client.server_info(), server.device)
    if layout.unknown:
        raise NotProvided(f"Checksums cannot be computed here: {layout.unknown}.")
    began = time.monotonic()
    stated = checksums(server)
    answered = time.monotonic()
    source = open_checkpoint(server.model)
    computed = expected_checksums(source, layout)
    done = time.monotonic()
    return LayoutSeen(
        stated=[dict(rank) for rank in stated.ranks],
        computed=[dict(rank) for rank in computed.ranks],
        dtype=layout.dtype,
        server_seconds=answered - began,
        here_seconds=done - answered,
        bytes=sum(tensor.nbytes for tensor in source.tensors.values()),
    )


def checksums(server: Server) -> Checksums:
    """Those that the server states.

    Raises:
        NotProvided: its SGLang has none; on a CPU also where it refuses them, as 0.5.15 does, which
            asks CUDA.
        HarnessError: as the client.
    """
    if not server.client.has_route("POST", "/weights_checker"):
        raise NotProvided("This SGLang has no POST /weights_checker.")
    try:
        return server.client.checksums()
    except Refused as error:
        if server.device == "gpu":
            raise
        raise NotProvided(f"This SGLang states no checksums on a CPU ({error.reason}).") from None


@dataclass(frozen=True)
class Compared:
    """Parameters by what their two checksums say; ``rankN:`` precedes those of further ranks."""

    equal: list[str]
    different: list[str]
    only_stated: list[str]
    only_computed: list[str]


def compared(seen: LayoutSeen) -> Compared:
    """Parameter by parameter. Buffers that the server computes are left out."""
    found = Compared([], [], [], [])
    for number in range(max(len(seen.stated), len(seen.computed))):
        stated = seen.stated[number] if number < len(seen.stated) else {}
        computed = seen.computed[number] if number < len(seen.computed) else {}
        on = f"rank{number}:" if number else ""
        for name in sorted(stated.keys() | computed.keys()):
            if name.endswith(COMPUTED):
                continue
            if name not in computed:
                found.only_stated.append(on + name)
            elif name not in stated:
                found.only_computed.append(on + name)
            elif stated[name] == computed[name]:
                found.equal.append(on + name)
            else:
                found.different.append(on + name)
    return found


def wrong(seen: LayoutSeen) -> list[str]:
    """Kinds of parameters that are not equal, with the first names."""
    result = compared(seen)
    found = [
        f"{len(names)} parameters {what}: {', '.join(names[:3])}{', ...' if names[3:] else ''}"
        for names, what in (
            (result.different, "with another checksum than computed here"),
            (result.only_stated, "that nothing was computed for"),
            (result.only_computed, "that the server does not have"),
        )
        if names
    ]
    if not result.equal:
        found.append("expected parameters with equal checksums, got none")
    return found


def figures(seen: LayoutSeen) -> dict[str, Any]:
    """For the results."""
    result = compared(seen)
    return {
        "dtype": seen.dtype,
        "ranks": len(seen.stated),
        "equal": len(result.equal),
        "different": len(result.different),
        "first_different": result.different[:NAMED],
        "only_stated": result.only_stated[:NAMED],
        "only_computed": result.only_computed[:NAMED],
        "server_seconds": round(seen.server_seconds, 3),
        "computed_in_seconds": round(seen.here_seconds, 3),
        "computed_gb_per_s": round(seen.bytes / max(seen.here_seconds, 1e-9) / 1e9, 3),
    }


def run(context: Context) -> dict[str, Any]:
    """The part ``fused-layout``."""
    with served.not_run_where_not_provided():
        seen = observe(served.shared(context))
    told = figures(seen)
    line = f"{told['equal']} equal, {told['different']} different ({told['dtype']})"
    context.headline(line)
    context.note("weights", "checksums of fused parameters", line)
    return served.ended(context, told, wrong(seen))


PART = Part(
    "fused-layout",
    "Does the server hold its fused parameters as the harness computes them?",
    70.0,
    run,
    needs=frozenset({"release"}),
    group="weights and memory",
    scope="release",
    disk_bytes=6_000_000_000,
)
