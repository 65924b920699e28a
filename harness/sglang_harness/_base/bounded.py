"""Programs and calls that end within a time, whatever they wait for."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil

from sglang_harness._base.living import until_gone

T = TypeVar("T")

#: Seconds from SIGTERM to SIGKILL for a program that is over its time, or interrupted.
ENDS_WITHIN = 5.0


@dataclass(frozen=True)
class Finished:
    """A program that has ended.

    Attributes:
        code: its exit code; negative: the signal that killed it.
        output: what it wrote to its standard output, and its errors where they were ``merged``.
        errors: its error output; empty where ``merged``.
    """

    code: int
    output: list[str]
    errors: list[str]


def run(
    words: Sequence[str],
    *,
    within: float,
    merged: bool = False,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    line: Callable[[str], None] = lambda _: None,
) -> Finished:
    """Runs a program without input to its end.

    Over its time, or when this is interrupted, the program ends within :data:`ENDS_WITHIN` seconds
    with everything that it has started, also what is in another process group.

    Args:
        within: seconds that it may take.
        merged: error output and standard output are one.
        line: is given each line of output as it comes, in the thread that called.

    Raises:
        subprocess.TimeoutExpired: it took longer; ``output`` has the last lines, as text.
        OSError: it cannot be started.
    """
    process = subprocess.Popen(
        list(words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merged else subprocess.PIPE,
        cwd=cwd,
        env=None if environment is None else dict(environment),
        start_new_session=True,
    )
    until = time.monotonic() + within
    said: dict[str, list[str]] = {"output": [], "errors": []}
    come: queue.Queue[tuple[str, str | None]] = queue.Queue()
    open_streams = 0
    for name, stream in (("output", process.stdout), ("errors", process.stderr)):
        if stream is not None:
            open_streams += 1
            threading.Thread(target=_read, args=(stream, name, come), daemon=True).start()
    try:
        while open_streams:
            left = until - time.monotonic()
            try:
                name, text = come.get(timeout=max(0.0, min(0.5, left)))
            except queue.Empty:
                if left <= 0:
                    raise
                if process.poll() is not None:
                    break  # what it left behind holds its output open, and is silent
                continue
            if text is None:
                open_streams -= 1
                continue
            said[name].append(text)
            if name == "output":
                line(text)
        code = process.wait(timeout=max(0.0, until - time.monotonic()))
    except (queue.Empty, subprocess.TimeoutExpired):
        end(process)
        last = "\n".join((said["errors"] or said["output"])[-4:])
        raise subprocess.TimeoutExpired(list(words), within, output=last) from None
    except BaseException:
        end(process)
        raise
    return Finished(code, said["output"], said["errors"])


def ending(code: int) -> str:
    """How a program ended, in words: ``was ended by SIGKILL``, ``ended with exit code 2``.

    Args:
        code: as ``subprocess`` gives it: negative is the signal that killed it.
    """
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _read(stream: IO[bytes], name: str, come: queue.Queue[tuple[str, str | None]]) -> None:
    with stream, suppress(OSError, ValueError):
        for raw in stream:
            come.put((name, raw.decode(errors="replace").rstrip()))
    come.put((name, None))


def end(process: subprocess.Popen[Any]) -> None:
    """Ends a process that leads a session of its own, with every process of that session. One
    that has ended meanwhile is not an error."""
    family = _session(process.pid)
    for each in family:
        with suppress(psutil.Error):
            each.terminate()
    alive = until_gone(family, ENDS_WITHIN)
    for each in [*alive, *_session(process.pid)]:
        with suppress(psutil.Error):
            each.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=ENDS_WITHIN)


def _session(leader: int) -> list[psutil.Process]:
    found = []
    for pid in psutil.pids():
        with suppress(OSError, psutil.Error):
            if os.getsid(pid) == leader:
                found.append(psutil.Process(pid))
    return found


def call(do: Callable[[], T], *, within: float) -> T:
    """The result of ``do``, which is called in a thread and left behind where it takes longer.

    For calls that have no time-out of their own and that an interruption does not stop.

    Raises:
        TimeoutError: it took longer than ``within`` seconds.
        Exception: whatever ``do`` raises.
    """
    results: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def attempt() -> None:
        try:
            results.put((True, do()))
        except BaseException as error:
            results.put((False, error))

    threading.Thread(target=attempt, daemon=True, name="bounded-call").start()
    try:
        well, result = results.get(timeout=within)
    except queue.Empty:
        raise TimeoutError from None
    if not well:
        raise result
    return result  # type: ignore[no-any-return]
