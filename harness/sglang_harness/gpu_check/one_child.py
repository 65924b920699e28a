"""One child process of gpu-check: started, listened to, and ended with everything it started."""

from __future__ import annotations

import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

import psutil

from sglang_harness._base import bounded
from sglang_harness._base.living import lives, until_gone
from sglang_harness.gpu_check.part_log import PartLogs
from sglang_harness.gpu_check.settings import Job, Order

#: Seconds from SIGTERM to SIGKILL.
ENDS_WITHIN = 5.0
#: Seconds between two looks at a child that reports nothing.
LOOKS_EVERY = 0.5


class Child:
    """A process that runs parts of one group.

    What it starts stays below this process in the tree of processes only inside
    :func:`sglang_harness._base.descent.adopting_orphans`.

    Args:
        job: what it is told first.
        logs: where its output goes.
        first: key of its first part's log.

    Attributes:
        started_at: seconds since the epoch, not after its start.
        seen: numbers of the processes that it had started, as far as a look found them.
    """

    def __init__(self, job: Job, logs: PartLogs, first: str) -> None:
        self._before = {p.pid for p in _descendants()}
        self.seen: set[int] = set()
        self.started_at = time.time()
        reports, its_end = os.pipe()
        self._reports: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sglang_harness.gpu_check.child", str(its_end)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(its_end,),
                # It would remove the assertions that parts are made of: nothing could fail.
                env={k: v for k, v in os.environ.items() if k != "PYTHONOPTIMIZE"},
                # Ctrl-C on a terminal goes to this process alone, which ends the child in order.
                start_new_session=True,
            )
        except BaseException:
            os.close(reports)
            raise
        finally:
            os.close(its_end)
        self._listener = threading.Thread(target=self._listen, args=(reports,), daemon=True)
        self._listener.start()
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        self._output = logs.follow(self._process.stdout, job.border, first)
        self._told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._told.put(job.model_dump_json())
        threading.Thread(target=self._tell, args=(self._process.stdin,), daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def _listen(self, descriptor: int) -> None:
        with os.fdopen(descriptor, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with suppress(ValueError):  # half a line, of one that was killed
                    self._reports.put(json.loads(line))
        self._reports.put(None)

    def _tell(self, stream: IO[bytes]) -> None:
        """Writes what it is told, in a thread: one that hangs reads nothing, and a pipe is full
        after 64 KiB."""
        with suppress(OSError), stream:  # It has ended: its reports say so.
            while (line := self._told.get()) is not None:
                stream.write(f"{line}\n".encode())
                stream.flush()

    def order(self, order: Order) -> None:
        """Tells it to run a part."""
        self._told.put(order.model_dump_json())

    def no_more(self) -> None:
        """Tells it that no more parts follow: it ends its server, then itself."""
        self._told.put(None)

    def next_report(self, within: float) -> dict[str, Any] | None:
        """What it reports next; ``None`` where it has ended, and nothing more will come.

        Raises:
            TimeoutError: nothing came within so many seconds.
        """
        until = time.monotonic() + within
        while True:
            ended = self.has_ended
            try:
                left = until - time.monotonic()
                return self._reports.get(timeout=max(0.0, min(LOOKS_EVERY, left)))
            except queue.Empty:
                # What it has forked may hold its end of the pipe open after it.
                if ended:
                    return None
                if time.monotonic() >= until:
                    raise TimeoutError from None
            self._reap()

    def reports_left(self) -> Iterator[dict[str, Any]]:
        """What it had reported by the time it was ended."""
        with suppress(queue.Empty):
            while True:
                if (report := self._reports.get_nowait()) is not None:
                    yield report

    def say_where(self) -> None:
        """Has it write to its log where it is; waits a moment for that."""
        with suppress(OSError, subprocess.TimeoutExpired):
            self._process.send_signal(signal.SIGUSR1)
            self._process.wait(timeout=0.3)

    def how_it_ended(self) -> str:
        """In words, such as ``was ended by SIGSEGV``; waits a moment for its exit code."""
        try:
            code = self._process.wait(timeout=ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            return "closed its reports and did not end"
        return bounded.ending(code)

    def end(self) -> list[str]:
        """Ends it and everything that it started, also what has left its session: SIGTERM for the
        child, which ends its server in order, then SIGKILL for all.

        Returns:
            a line for each process that the child had left when it had ended by itself, and for
            each that cannot be killed.
        """
        self.no_more()
        orderly = self._process.poll() is not None
        if not orderly:
            with suppress(OSError):
                self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=ENDS_WITHIN)
            with suppress(OSError):
                self._process.kill()
        left = self._left()
        if orderly:
            # What watches over a process, as Python's resource tracker, ends a moment after it.
            left = until_gone(left, 1.0)
        told = [f"{_words(each)} was left, and killed" for each in left] if orderly else []
        until = time.monotonic() + ENDS_WITHIN
        while left and time.monotonic() < until:
            for each in left:
                with suppress(psutil.Error):
                    each.kill()
            until_gone(left, 1.0)
            left = self._left()  # what was forked meanwhile
        told += [f"{_words(each)} cannot be killed" for each in left]
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=ENDS_WITHIN)
        self._reap()
        for thread in (self._listener, self._output):
            thread.join(timeout=ENDS_WITHIN)
        return told

    def _left(self) -> list[psutil.Process]:
        return [each for each in self._started() if lives(each)]

    def _started(self) -> list[psutil.Process]:
        """What it has started, as far as it is there; the dead that nobody has reaped too."""
        known = {*self._before, self._process.pid}
        found = [each for each in _descendants() if each.pid not in known]
        self.seen |= {each.pid for each in found}
        return found

    def _reap(self) -> None:
        """Takes the exit codes of adopted processes, which would stay as zombies."""
        for each in self._started():
            with suppress(OSError):
                os.waitpid(each.pid, os.WNOHANG)


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _words(process: psutil.Process) -> str:
    try:
        command = " ".join(process.cmdline())[:120] or process.name()
    except psutil.Error:
        command = "ended meanwhile"
    return f"process {process.pid} ({command})"


def new_border() -> str:
    """Text that no output has by chance."""
    return f"--- part {secrets.token_hex(8)} "
