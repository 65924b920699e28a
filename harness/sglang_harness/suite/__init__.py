"""The checks, by subject. Importing this package registers all of them, cheapest first."""

from __future__ import annotations

from fnmatch import fnmatch
from importlib import import_module
from typing import Any

from sglang_harness.errors import SpecError
from sglang_harness.suite import checks
from sglang_harness.suite.check import (
    Check,
    Context,
    Mismatch,
    Observation,
    judge_again,
    register,
    registered,
    run_check,
)
from sglang_harness.suite.checks import SUBJECTS
from sglang_harness.verdict import CheckResult

__all__ = [
    "Check",
    "CheckResult",
    "Context",
    "Mismatch",
    "Observation",
    "as_markdown",
    "judge_again",
    "register",
    "registered",
    "run_check",
    "select",
]

for _name in SUBJECTS:
    import_module(f"{checks.__name__}.{_name}")


def select(profile: str, patterns: list[str]) -> list[Check[Any]]:
    """The checks of a profile, or those whose id holds one of ``patterns`` (globs work too).

    Raises:
        SpecError: a pattern matches no check.
    """
    all_checks = list(registered().values())
    if not patterns:
        return _together([c for c in all_checks if profile == "full" or c.profile == "quick"])
    chosen = []
    for pattern in patterns:
        found = [c for c in all_checks if pattern in c.id or fnmatch(c.id, pattern)]
        if not found:
            raise SpecError(
                f"No check matches {pattern!r}.",
                advice="'sglang-harness checks' lists them all.",
            )
        chosen += [c for c in found if c not in chosen]
    return _together(sorted(chosen, key=all_checks.index))


def _together(chosen: list[Check[Any]]) -> list[Check[Any]]:
    """Those that can share a server of their own come after one another, where the first is; what
    may end its server comes last."""
    first: dict[str, int] = {}
    for place, check in enumerate(chosen):
        first.setdefault(check.alike or check.id, place)
    return sorted(chosen, key=lambda c: (c.ends_its_server, first[c.alike or c.id]))


def as_markdown() -> str:
    """All checks as tables, one a subject."""
    by_subject: dict[str, list[str]] = {}
    for check in registered().values():
        needs = ", ".join(
            f"`{need.name}`" if need.name.startswith(("GET ", "POST ", "--")) else need.name
            for need in check.needs
        )
        row = f"| `{check.id}` | {check.sentence} | {needs} | {check.profile} |"
        by_subject.setdefault(check.id.split("/")[0], []).append(row)
    head = "| id | what must hold | needs | profile |\n|---|---|---|---|"
    return "\n\n".join(
        "\n".join([f"## {subject}\n\n{head}", *rows]) for subject, rows in by_subject.items()
    )
