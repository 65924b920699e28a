"""Programs that parts start: each has a CUDA context, or a session with a driver, of its own, and
prints what it saw as one line of JSON.

    python -m sglang_harness.gpu_check.probes.NAME WORDS
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from sglang_harness._base import bounded


def command(name: str, *words: str) -> list[str]:
    """The command that starts a probe."""
    return [sys.executable, "-m", f"{__name__}.{name}", *words]


def run(
    name: str, *words: str, within: float, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What a probe says; it is ended with everything that it has started where it takes longer.

    Args:
        environment: added to this process's own.

    Raises:
        AssertionError: it failed, was killed, or did not end ``within`` so many seconds.
    """
    try:
        done = bounded.run(
            command(name, *words), within=within, environment={**os.environ, **(environment or {})}
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(
            f"{name} did not end within {within:.0f} s: {error.output or 'it said nothing'}"
        ) from None
    for line in (*done.output[:-1], *done.errors):
        print(line)
    if done.code:
        raise AssertionError(
            f"{name} {bounded.ending(done.code)}: {' '.join(done.errors[-3:])[-500:]}"
        )
    return read(done.output[-1] if done.output else "", name)


def read(line: str, name: str) -> dict[str, Any]:
    """The JSON that a probe has printed.

    Raises:
        AssertionError: it is none.
    """
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise AssertionError(f"{name} has said {line[:200]!r} in place of its figures")
    return answer
