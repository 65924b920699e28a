"""The output of a child process, as one log for each part: without secrets, and not without end."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

#: Bytes of a part's output that are kept, from its beginning.
KEPT = 8 << 20
#: Bytes of its end that are kept beyond that.
LAST = 256 << 10
#: A longer line is cut into several, so that one without end is written too.
LONGEST_LINE = 64 << 10


class PartLogs:
    """Logs of parts in one folder.

    Args:
        folder: made where it is missing.
        redact: removes secrets from a text; called for each line.
    """

    def __init__(self, folder: Path, redact: Callable[[str], str]) -> None:
        self._folder, self._redact = folder, redact

    def file(self, key: str) -> Path:
        """The log of the part ``key``; need not exist."""
        return self._folder / f"{key}.log"

    def last_line(self, key: str) -> str:
        """The last line that is not blank; empty where there is none."""
        try:
            lines = self.file(key).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        told = (line.strip() for line in reversed(lines))
        # The last line of what faulthandler writes names modules, and nothing of the crash.
        return next((x for x in told if x and not x.startswith("Extension modules:")), "")

    def follow(self, stream: IO[bytes], border: str, first: str) -> threading.Thread:
        """Starts a thread that writes ``stream`` to the log of the part that runs, until its end.

        Args:
            border: begins a line whose rest is the key of the part that follows.
            first: key of the first part: what comes before any border is its.
        """
        follower = _Follower(self, stream, border.encode(), first)
        thread = threading.Thread(target=follower.run, daemon=True, name="part-log")
        thread.start()
        return thread

    def redacted(self, line: bytes) -> bytes:
        return self._redact(line.decode("utf-8", "replace")).encode()


class _Follower:
    def __init__(self, logs: PartLogs, stream: IO[bytes], border: bytes, first: str) -> None:
        self._logs, self._stream, self._border = logs, stream, border
        self._key, self._log = first, _BoundedLog(logs.file(first))
        self._rest = b""

    def run(self) -> None:
        try:
            descriptor = self._stream.fileno()
            while True:
                ready, _, _ = select.select([descriptor], [], [], 0.5)
                # Half a line of a part that is silent is written all the same.
                data = os.read(descriptor, 1 << 16) if ready else b""
                if ready and not data:
                    break
                self._take(data, whole=not ready)
            if self._rest:
                self._line(self._rest)
        except (OSError, ValueError):
            return  # The stream was closed.
        finally:
            self._log.close()
            # Whoever still writes there ends of it, and is not held up by a pipe that is full.
            with suppress(OSError):
                self._stream.close()

    def _take(self, data: bytes, *, whole: bool) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line + b"\n")
        if self._rest and (whole or len(self._rest) > LONGEST_LINE):
            if whole and self._border.startswith(self._rest[: len(self._border)]):
                return  # the beginning of a border, maybe
            line, self._rest = self._rest, b""
            self._line(line)

    def _line(self, line: bytes) -> None:
        if line.startswith(self._border):
            if (key := line[len(self._border) :].strip().decode()) != self._key:
                self._log.close()
                self._key, self._log = key, _BoundedLog(self._logs.file(key))
        else:
            self._log.write(self._logs.redacted(line))


class _BoundedLog:
    """A file that keeps the beginning and the end of what is written to it. What a full disk does
    not take is lost: the part goes on, and whoever writes must not be held up."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] | None = None
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb", buffering=0)
        self._written = self._left_out = 0
        self._last = b""

    def _put(self, data: bytes) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.write(data)

    def write(self, data: bytes) -> None:
        if self._written < KEPT:
            self._put(data)
            self._written += len(data)
            return
        self._last += data
        if len(self._last) > 2 * LAST:
            self._left_out += len(self._last) - LAST
            self._last = self._last[-LAST:]

    def close(self) -> None:
        if self._left_out:
            self._put(f"\n--- {self._left_out} bytes are left out here ---\n".encode())
        self._put(self._last)
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
