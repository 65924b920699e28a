"""Twenty cycles of release, resume and push: the slope of memory over them, and its interval."""

from __future__ import annotations

from typing import Any

from sglang_harness.gpu_check import served
from sglang_harness.gpu_check.part import Context, NotHere, Part
from sglang_harness.gpu_check.parts.planted_leak import slope_told, slopes
from sglang_harness.gpu_check.suite_questions import ask, context_of
from sglang_harness.verdict import CheckResult, Outcome

CHECK = "memory/cycles"


def figures(result: CheckResult) -> dict[str, Any]:
    """Of the suite's check, for the results: slope and interval by source."""
    seen = result.evidence or {}
    seconds = seen.get("seconds", [])
    used = seen.get("used_bytes", {})
    return {
        "saver": seen.get("saver"),
        "cycles": len(seconds),
        "seconds_a_cycle": round(sum(seconds) / len(seconds), 3) if seconds else None,
        "slopes": {source: slope_told(each) for source, each in slopes(used).items()},
    }


def headline(told: dict[str, Any]) -> str:
    """One line: each source's slope."""
    return "; ".join(
        f"{source}: {each['mb_a_cycle']:+.2f} MB a cycle ({each['low']:+.2f} to "
        f"{each['high']:+.2f}, {each['cycles']} cycles)"
        for source, each in told["slopes"].items()
    )


def run(context: Context) -> dict[str, Any]:
    """The part ``cycles``."""
    other = served.other_checkpoint(context)
    server = served.shared(context)
    lacking, result, _ = ask(CHECK, context_of(server, served.scratch(context), other=other))
    if result is None:
        raise NotHere(lacking or "the server lacks what it takes")
    told = figures(result)
    context.headline(headline(told))
    context.note("memory", "slope over cycles", headline(told))
    good = result.outcome is Outcome.PASS
    wrong = [] if good else [f"{result.outcome.value}: {result.message}"]
    return served.ended(context, told, wrong)


PART = Part(
    "cycles",
    "Do twenty cycles of release, resume and push leave no more memory in use?",
    110.0,
    run,
    needs=frozenset({"release"}),
    group="weights and memory",
    scope="release",
    disk_bytes=6_000_000_000,
)
