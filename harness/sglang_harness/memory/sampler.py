"""One thread that reads memory at its own rate, off the measured path."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sglang_harness.errors import HarnessError
from sglang_harness.memory.timeline import Sample

#: Samples a second.
RATE = 10.0


class Sampler:
    """Reads until it is stopped. An error of a source never reaches the user of the server: what
    could not be read is a gap with a reason.

    Args:
        read: returns the bytes in use, in total and by part, and the reasons why parts could not be
            read. What it raises counts as such a reason.
        take: called with each sample.
        rate: samples a second.
        clock: gives the seconds of the samples.

    Attributes:
        taken: number of samples.
        missed: number of samples that were skipped because an earlier one took too long.
        gaps: reasons for missing data, and how often each occurred.
        slowest: seconds of the slowest reading.

    Raises:
        ValueError: a rate outside 0 to 1000.
    """

    def __init__(
        self,
        read: Callable[[], tuple[int, dict[str, int], list[str]]],
        take: Callable[[Sample], None],
        *,
        rate: float = RATE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < rate <= 1000:
            raise ValueError(f"a rate of {rate} samples a second")
        self._read = read
        self._take = take
        self._every = 1.0 / rate
        self._clock = clock
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        self.taken = 0
        self.missed = 0
        self.gaps: dict[str, int] = {}
        self.slowest = 0.0

    def start(self) -> Sampler:
        self._thread.start()
        return self

    def stop(self, timeout: float = 2.0) -> None:
        """Stops it, and waits ``timeout`` seconds at most: a driver that hangs blocks the thread,
        which ends with the process, and not the caller."""
        self._over.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._over.is_set():
            self._once()
            due += self._every
            late = time.monotonic() - due
            if late > 0:
                passed = int(late / self._every) + 1
                self.missed += passed
                due += passed * self._every
            self._over.wait(max(0.0, due - time.monotonic()))

    def _once(self) -> None:
        began = time.monotonic()
        try:
            used, parts, reasons = self._read()
            for reason in reasons:
                self._gap(reason)
            if self._over.is_set():
                return
            if parts or not reasons:
                self._take(Sample(self._clock(), used, parts))
                self.taken += 1
        except HarnessError as error:
            self._gap(error.message)
        except Exception as error:  # a defect here must not affect the server
            self._gap(f"{type(error).__name__}: {error}")
        finally:
            self.slowest = max(self.slowest, time.monotonic() - began)

    def _gap(self, reason: str) -> None:
        self.gaps[reason] = self.gaps.get(reason, 0) + 1
