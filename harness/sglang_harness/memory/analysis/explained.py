"""The memory that a server states, compared with what the device shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 1 << 30

#: SGLang rounds its figures to hundredths of a GiB (0.5.15; 0.5.23 to thousandths), so this is the
#: error of each at most.
ROUNDED_BY = GIB // 200


@dataclass(frozen=True)
class Said:
    """What one rank states to hold on its GPU, in bytes; ``None`` where it does not."""

    weights: int | None
    kv_cache: int | None
    graphs: int | None

    @property
    def known(self) -> int:
        """The sum of what is stated."""
        return sum(part or 0 for part in (self.weights, self.kv_cache, self.graphs))

    def of(self, tags: tuple[str, ...]) -> int | None:
        """Bytes that a release of ``tags`` should free; ``None`` where one is not stated."""
        parts = {"weights": self.weights, "kv_cache": self.kv_cache, "cuda_graph": self.graphs}
        found = [parts[tag] for tag in tags]
        return None if None in found else sum(part or 0 for part in found)


@dataclass(frozen=True)
class Explained:
    """How the memory of a device is used, in bytes.

    Attributes:
        unexplained: what the device shows beyond what the server states: CUDA's context and
            libraries, workspaces, fragmentation. Negative if the server states more than is used.
    """

    used: int
    weights: int
    kv_cache: int
    graphs: int
    unexplained: int


def said(server_info: Mapping[str, Any]) -> Said:
    """Reads ``internal_states[0].memory_usage`` of ``/server_info`` (SGLang 0.5.15 to 0.5.23):
    GiB of rank 0, graphs as one number or by phase."""
    states = server_info.get("internal_states")
    first = states[0] if isinstance(states, list) and states else {}
    usage = first.get("memory_usage") if isinstance(first, Mapping) else None
    usage = usage if isinstance(usage, Mapping) else {}
    graph = usage.get("graph")
    if isinstance(graph, Mapping):
        parts = [_bytes(value) for value in graph.values()]
        graphs = None if None in parts else sum(part or 0 for part in parts)
    else:
        graphs = _bytes(graph)
    return Said(_bytes(usage.get("weight")), _bytes(usage.get("kvcache")), graphs)


def explain(used: int, what: Said) -> Explained:
    """Splits ``used`` bytes of a device, above what it held before the server started."""
    return Explained(
        used=used,
        weights=what.weights or 0,
        kv_cache=what.kv_cache or 0,
        graphs=what.graphs or 0,
        unexplained=used - what.known,
    )


def _bytes(gib: object) -> int | None:
    if isinstance(gib, bool) or not isinstance(gib, int | float):
        return None
    return int(gib * GIB)
