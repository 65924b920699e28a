"""The page that a person reads first."""

from __future__ import annotations

from sglang_harness.gpu_check.outcomes import TOPICS
from sglang_harness.gpu_check.results import PartResult, Results

WIDTH = 120


def line(part: PartResult) -> str:
    """One part in one line."""
    name = part.part if part.release is None else f"{part.part} ({part.release})"
    words = part.message or part.headline or _figures(part)
    return f"{part.outcome:8} {name:28} {part.seconds:6.1f} s  {' '.join(words.split())}".rstrip()


def _figures(part: PartResult) -> str:
    """The first figures that are numbers or words."""
    found = [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in part.figures.items()
        if isinstance(value, int | float | str) and len(str(value)) < 40
    ]
    return ", ".join(found[:5])


def page(results: Results) -> str:
    """The whole summary as text."""
    lines = []
    if results.device == "cpu":
        lines += ["A REHEARSAL ON THE CPU: no GPU was seen, and nothing here is said of one.", ""]
    lines.append(f"gpu-check, {results.date}, sglang-harness {results.harness}")
    lines += [f"  {name}: {_machine(value)}" for name, value in results.machine.items() if value]
    for version, caveats in results.releases.items():
        lines.append(f"  SGLang {version}")
        lines += [f"    {each}" for each in caveats]
    lines += ["", *(line(part) for part in results.parts)]
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
            lines += ["", f"{topic}:", *(f"  {what:44} {value}" for what, value in rows)]
    lines += ["", results.ended or "It has not ended yet."]
    return "\n".join(lines) + "\n"


def _machine(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
