"""Whose fault an error is: that of the server under test, or of what the harness stands on.

A server that dies, hangs, answers 5xx, cuts an answer off or answers what its API cannot mean has
failed at what it must do: ``fail``, exit code 1. A Docker engine, a GPU driver, a machine or the
harness that fails says nothing about the server: ``error``, exit code 2. What was never installed
or given, or does not fit on this machine, is ``not-run``.
"""

from __future__ import annotations

from pathlib import Path

from sglang_harness.errors import (
    BadAnswer,
    DidNotComeUp,
    HarnessError,
    MissingExtra,
    NoAnswerInTime,
    NotEnoughRoom,
    NotProvided,
    Refused,
    ServerDied,
    StartTimeout,
    TimeIsOver,
    Unreachable,
    Unresponsive,
)
from sglang_harness.verdict import Outcome


def blame(error: BaseException) -> tuple[Outcome, str]:
    """The outcome of a check that ended with ``error``, and the message for it."""
    if isinstance(error, NotProvided | MissingExtra | NotEnoughRoom):
        return Outcome.NOT_RUN, str(error)
    if isinstance(error, ServerDied):
        return Outcome.FAIL, f"the server died during this check: {error}"
    if isinstance(error, StartTimeout | DidNotComeUp | Unresponsive):
        return Outcome.FAIL, str(error)
    if isinstance(error, TimeIsOver):
        # Whether it hangs or is only slow is found out by asking it once more, not from this.
        return Outcome.ERROR, f"{error} Raise limits.check if the server is only slow."
    if isinstance(error, NoAnswerInTime | Unreachable | BadAnswer):
        return Outcome.FAIL, str(error)
    if isinstance(error, Refused):
        # 200 is an error inside a stream that had begun.
        failed = error.status >= 500 or error.status == 200
        return (Outcome.FAIL if failed else Outcome.ERROR), str(error)
    if isinstance(error, HarnessError):
        return Outcome.ERROR, str(error)
    return Outcome.ERROR, f"{type(error).__name__} in {place(error)}: {error}"


def place(error: BaseException) -> str:
    """File and line where ``error`` was raised."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    if step is None:
        return "an unknown place"
    return f"{Path(step.tb_frame.f_code.co_filename).name}:{step.tb_lineno}"
