"""The page that a person reads first."""

from __future__ import annotations

from collections import Counter

from sglang_harness.gpu_check.outcomes import TOPICS
from sglang_harness.gpu_check.results import PartResult, Results

#: Longer messages are cut here; ``results.json`` has them whole.
LONGEST = 400

REHEARSAL = "A REHEARSAL ON THE CPU: no GPU was seen, and nothing here is said of one."


def line(part: PartResult) -> str:
    """One part in one line."""
    words = " ".join((part.message or part.headline or _figures(part)).split())
    if len(words) > LONGEST:
        words = f"{words[:LONGEST]}... (the rest is in results.json)"
    return f"{part.outcome:8} {_name(part):26} {part.seconds:6.1f} s  {words}".rstrip()


def page(results: Results) -> str:
    """The whole summary as text."""
    lines = [REHEARSAL, ""] if results.device == "cpu" else []
    lines += [f"gpu-check of {results.date}: {_counts(results)}. {_ended(results)}"]
    lines += [f"  failed: {_name(p)}" for p in results.parts if p.outcome == "failed"]
    lines += ["", *_about(results), "", *(line(part) for part in results.parts)]
    return "\n".join([*lines, *findings(results)]) + "\n"


def findings(results: Results) -> list[str]:
    """What the run itself saw, and the figures by topic, as lines."""
    lines = []
    if results.notes:
        lines += ["", "What the run saw:", *(f"  {note}" for note in results.notes)]
    for topic in TOPICS:
        rows = [
            (f"{note.what} ({part.release})" if part.release else note.what, note.value)
            for part in results.parts
            for note in part.notes
            if note.topic == topic
        ]
        if rows:
            wide = max(len(what) for what, _ in rows)
            lines += ["", f"{topic}:", *(f"  {what:{wide}}  {value}" for what, value in rows)]
    return lines


def _about(results: Results) -> list[str]:
    rows: list[tuple[str, str]] = []
    for name, value in results.machine.items():
        told = value if isinstance(value, list) else [value]
        rows += [(name if number == 0 else "", str(each)) for number, each in enumerate(told)]
    for version, caveats in results.releases.items():
        rows += [("SGLang", version), *(("", f"caveat: {each}") for each in caveats)]
    if not results.releases:
        rows.append(("SGLang", "none: nothing was served"))
    rows.append(("harness", results.harness))
    if results.kit is not None:
        made_for = results.kit["made_for"]
        kernels = ", ".join(made_for["architectures"]) or "without kernels"
        rows.append(
            (
                "kit",
                f"{results.kit['name']}, made for Python {made_for['python']}, torch "
                f"{made_for['torch']}, {kernels}",
            )
        )
    wide = max(len(name) for name, _ in rows)
    return [f"  {name:{wide}}  {value}" for name, value in rows]


def _counts(results: Results) -> str:
    counted = Counter(part.outcome for part in results.parts)
    return f"{counted['held']} held, {counted['failed']} failed, {counted['not run']} not run"


def _ended(results: Results) -> str:
    return results.ended or "It has not ended yet."


def _name(part: PartResult) -> str:
    return part.part if part.release is None else f"{part.part} ({part.release})"


def _figures(part: PartResult) -> str:
    """The first figures that are numbers or words, for a part that has no line of its own."""
    found = [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in part.figures.items()
        if isinstance(value, int | float | str) and len(str(value)) < 40
    ]
    return ", ".join(found[:5])
