"""Programs for the Python of a release, which may not have the harness."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sglang_harness.gpu_check.part import NotHere
from sglang_harness.gpu_check.settings import Release

#: Seconds from SIGTERM to SIGKILL.
ENDS_WITHIN = 3.0


class ReleaseProgram:
    """A program of this package, run by the Python of ``release`` as a process of its own.

    It is handed over as text: run as a file, the folder that it lies in would be searched for
    modules before SGLang's.

    Args:
        source: the program's file.
        out: folder for its output, ``NAME.out`` and ``NAME.err``; it runs in there.
        environment: beside the release's.

    Raises:
        NotHere: the release has no Python on this machine: it is in an image.
    """

    def __init__(
        self,
        release: Release | None,
        source: Path,
        words: Sequence[str],
        *,
        out: Path,
        name: str,
        environment: dict[str, str] | None = None,
    ) -> None:
        if release is None or release.python is None:
            raise NotHere("the Python of this SGLang is not on this machine, but in an image")
        self.name = name
        self._output, self._errors = out / f"{name}.out", out / f"{name}.err"
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [str(release.python), "-c", source.read_text(encoding="utf-8"), *words],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                cwd=out,
                env={**os.environ, **release.environment, **(environment or {})},
                start_new_session=True,
            )

    def told(self) -> list[dict[str, Any]]:
        """The JSON objects that it has printed so far, a line each. What else is on its output,
        such as words of a library, is passed over."""
        found = []
        for line in self._output.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("{"):
                with suppress(ValueError):  # half a line
                    found.append(json.loads(line))
        return found

    def last_words(self, lines: int = 8) -> str:
        """The end of what it wrote to standard error."""
        text = self._errors.read_text(encoding="utf-8", errors="replace").strip()
        return "\n".join(text.splitlines()[-lines:])

    def wait(self, within: float) -> str:
        """Waits for its end; ends it, with all that it started, where it takes longer.

        Returns:
            how it ended in words; empty for exit code 0.
        """
        try:
            code = self.process.wait(timeout=max(0.0, within))
        except subprocess.TimeoutExpired:
            self.end()
            return f"did not end within {within:.0f} s"
        if code < 0:
            with suppress(ValueError):
                return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}" if code else ""

    def go_on(self) -> None:
        """Sends it a line, for which it waits."""
        assert self.process.stdin is not None
        with suppress(OSError):  # it has ended, which its exit code says
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()

    def next_line(self, count: int, within: float) -> dict[str, Any] | None:
        """The object number ``count`` (from 0) that it prints; ``None``: it has ended, or did not
        print so many within that time (seconds)."""
        until = time.monotonic() + within
        while True:
            ended = self.process.poll() is not None
            if len(told := self.told()) > count:
                return told[count]
            if ended or time.monotonic() > until:
                return None
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.05)

    def end(self) -> None:
        """Ends it and all processes of its session that live."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(OSError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=ENDS_WITHIN)
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()

    def __enter__(self) -> ReleaseProgram:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
