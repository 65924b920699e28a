"""The suite's own checks and observations, asked by a part of one server."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from sglang_harness import oracle as oracles
from sglang_harness.memory.gpu.nvml import NvmlMemory
from sglang_harness.server import Server
from sglang_harness.suite import registered
from sglang_harness.suite.check import Context, NotProvided, run_check
from sglang_harness.suite.checks.weights.disk import Variant
from sglang_harness.verdict import CheckResult, Figure

SEED = 11


def context_of(server: Server, scratch: Path, *, other: Path | None = None) -> Context:
    """What the suite's observations work with.

    Args:
        other: a checkpoint of the same shape as the served one; ``None``: the suite makes one
            from it where it needs one.

    Raises:
        MissingExtra: torch is missing, which the reference model of ``other`` takes.
        ModelError: ``other`` cannot be loaded.
        EngineError: the server cannot be given ``other``.
    """
    context = Context(server, SEED, _no_other_server, scratch, {})
    if other is not None:
        size = sum(file.stat().st_size for file in other.glob("*.safetensors"))
        inside = str(server.reach.share(other))
        context.variants[SEED] = Variant(other, inside, size, oracles.for_folder(other))
    return context


def ask(check_id: str, context: Context) -> tuple[str | None, CheckResult | None, list[Figure]]:
    """Why the server lacks what a check of the suite needs, or its result and figures.

    Raises:
        KeyError: there is no such check.
    """
    check = registered()[check_id]
    for need in check.needs:
        if reason := need.lacking(context.server):
            return reason, None, []
    result, figures = run_check(check, context)
    return None, result, figures


def gpu_memory(server: Server) -> NvmlMemory | None:
    """What reads the GPUs of a server; ``None``: it is on none."""
    if "nvml" not in server.memory.source_names:
        return None
    source = server.memory.source("nvml")
    assert isinstance(source, NvmlMemory)
    return source


def _no_other_server(**_: object) -> NoReturn:
    raise NotProvided("This question is asked of the server that is there.")
