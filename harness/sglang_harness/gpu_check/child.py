"""A child process that runs the parts of one group, one after another.

    python -m sglang_harness.gpu_check.child FD

Its standard input has the job as one line of JSON, then a line for each part that it is to run; it
is closed when there are no more. The child reports to file descriptor FD, one JSON object a line,
with a ``kind`` each: ``put``, ``note``, ``headline``, ``secret``, ``no server``, ``saw``, and
``end`` for each part. What it prints is the log of the part that runs; the job's ``border`` and the
key of a part's log on a line of its own tell where the next one's begins.

It ends with the process that started it. SIGTERM ends it in order: its server first. On SIGUSR1 it
writes to its log where each of its threads is.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from sglang_harness._base.descent import ending_with_parent
from sglang_harness._base.signals import interruptions
from sglang_harness.errors import HarnessError, Interrupted
from sglang_harness.gpu_check.context import Context
from sglang_harness.gpu_check.part import NotHere, Outcome, Part
from sglang_harness.gpu_check.results import plain
from sglang_harness.gpu_check.settings import Job, Order

if TYPE_CHECKING:
    from sglang_harness.gpu_check.servers import Servers


class Reporter:
    """Writes reports to a file descriptor. May be called from several threads."""

    def __init__(self, descriptor: int) -> None:
        # What a part starts is not to hold it open: that it is closed means that this has ended.
        os.set_inheritable(descriptor, False)
        self._file = os.fdopen(descriptor, "w", encoding="utf-8", errors="replace")
        self._lock = threading.Lock()

    def __call__(self, report: dict[str, Any]) -> None:
        line = json.dumps(report)
        with self._lock:
            self._file.write(f"{line}\n")
            self._file.flush()


class _Servers:
    """The servers of this process, once a part has asked for one: what starts them takes a second
    to be imported."""

    def __init__(self, job: Job, report: Reporter) -> None:
        self._job, self._report = job, report
        self._made: Servers | None = None

    def __call__(self) -> Servers:
        if self._made is None:
            from sglang_harness.gpu_check.servers import Servers

            job = self._job
            self._made = Servers(job.settings, job.release, self._report, dict(job.no_server))
        return self._made

    def close(self) -> None:
        if self._made is not None:
            self._made.close()


def main() -> int:
    """Runs the job; returns the exit code."""
    report, orders = Reporter(int(sys.argv[1])), _orders()
    job = Job.model_validate_json(orders.readline())
    ending_with_parent()()
    faulthandler.enable()  # a crash in native code leaves its stack in the log
    # In native code: also where a thread hangs and Python handles no signal.
    faulthandler.register(signal.SIGUSR1)
    try:
        with interruptions() as signals:
            servers = _Servers(job, report)
            try:
                _run(job, orders, report, servers)
            finally:
                signals.calm()
                servers.close()
    except Interrupted as error:
        return 128 + error.signal_number
    return 0


def _orders() -> TextIO:
    """The standard input, taken away from what parts start: they could read it empty."""
    own = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return os.fdopen(own, encoding="utf-8")


def _run(job: Job, orders: TextIO, report: Reporter, servers: _Servers) -> None:
    earlier = dict(job.earlier)
    for line in orders:
        wanted = Order.model_validate_json(line)
        _border(job.border, wanted.log)
        figures: dict[str, Any] = {}
        outcome, message = _one(job, wanted.part, wanted.seconds, report, servers, earlier, figures)
        _flush()
        report(
            {
                "kind": "end",
                "part": wanted.part,
                "outcome": outcome,
                "message": message,
                "figures": figures,
            }
        )
        earlier[wanted.part] = figures


def _one(
    job: Job,
    name: str,
    seconds: float,
    report: Reporter,
    servers: _Servers,
    earlier: dict[str, dict[str, Any]],
    figures: dict[str, Any],
) -> tuple[Outcome, str]:
    """Runs one part; its figures go into ``figures``, also those of one that fails."""

    def keeping(what: dict[str, Any]) -> None:
        if what["kind"] == "put":
            figures[what["key"]] = what["value"]
        report(what)

    context = Context(
        job.settings,
        job.release,
        name,
        ends_at=time.time() + seconds,
        report=keeping,
        servers=servers,
        earlier=earlier,
    )
    try:
        part: Part = {each.name: each for each in importlib.import_module(job.table).PARTS}[name]
        figures |= plain(part.run(context) or {})
    except NotHere as error:
        return "not run", str(error)
    except AssertionError as error:
        traceback.print_exc()
        return "failed", str(error) or f"an assertion without a message: {_where(error)}"
    except HarnessError as error:
        traceback.print_exc()
        return "failed", str(error)
    except Interrupted:
        raise
    except BaseException as error:
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error}"
    return "held", ""


def _where(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.name}, line {last.lineno}: {last.line}"


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def _border(border: str, name: str) -> None:
    _flush()
    os.write(1, f"\n{border}{name}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
