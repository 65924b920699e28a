"""GPU memory as a source: whole devices, by UUID."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from sglang_harness.errors import TelemetryError
from sglang_harness.memory.gpu.driver import Driver, Gpu
from sglang_harness.memory.gpu.selection import select

T = TypeVar("T")

#: Seconds for one answer of the driver. One that hangs counts as none.
ANSWERS_WITHIN = 10.0
#: Seconds between two tries to find a device again that did not answer.
RETRY_AFTER = 1.0


def bounded(call: Callable[[], T], seconds: float = ANSWERS_WITHIN) -> T:
    """What ``call`` returns or raises, unless the driver hangs.

    Raises:
        TelemetryError: it did not return within ``seconds``; its thread is left behind.
    """
    answer: list[T] = []
    error: list[BaseException] = []

    def ask() -> None:
        try:
            answer.append(call())
        except BaseException as raised:
            error.append(raised)

    thread = threading.Thread(target=ask, name="nvml", daemon=True)
    thread.start()
    thread.join(seconds)
    if error:
        raise error[0]
    if not answer:
        raise TelemetryError(
            f"The NVIDIA driver has not answered for {seconds:g} s.",
            advice="Look at nvidia-smi and at the kernel's log; the machine may need a reboot.",
        )
    return answer[0]


class NvmlMemory:
    """Reads the devices of ``gpus``: ``all``, or indices or UUIDs joined by commas.

    The session with the driver is opened by the first reading and kept.
    """

    name = "nvml"

    def __init__(self, gpus: str = "all", *, answers_within: float = ANSWERS_WITHIN) -> None:
        self._wanted = gpus
        self._answers_within = answers_within
        self._lock = threading.Lock()
        self._driver: Driver | None = None
        self._devices: list[Gpu] = []
        self._unanswered: dict[str, tuple[float, str]] = {}
        self._failed_at, self._failure = -RETRY_AFTER, TelemetryError("The driver was not asked.")
        self.first_call_only = False
        """The driver has only the first version of the memory call: figures of use hold what
        the driver reserves."""

    def read(self) -> tuple[int, dict[str, int]]:
        """Bytes in use over the devices, and per device by UUID.

        Raises:
            TelemetryError: a device or the driver does not answer. Never a zero in its place.
        """
        used, parts, reasons = bounded(lambda: self._read(retry_after=0.0), self._answers_within)
        if reasons:
            raise TelemetryError(reasons[0], advice="Check the NVIDIA driver (nvidia-smi).")
        return used, parts

    def read_partly(self) -> tuple[int, dict[str, int], list[str]]:
        """The devices that answer, and why the others do not. One that is lost is tried again
        once a second. A driver that hangs is waited for: this is for threads that may.

        Raises:
            TelemetryError: the driver does not answer at all.
        """
        if self._driver is None and time.monotonic() - self._failed_at < RETRY_AFTER:
            raise self._failure
        return self._read(retry_after=RETRY_AFTER)

    def devices(self) -> list[Gpu]:
        """What ``gpus`` means here.

        Raises:
            TelemetryError: the driver does not answer.
            SpecError: there is no such device.
        """

        def ask() -> list[Gpu]:
            with self._lock:
                self._session()
                return list(self._devices)

        return bounded(ask, self._answers_within)

    def close(self) -> None:
        """Ends the session with the driver; the next reading opens another. One that hangs keeps
        its session."""
        if self._lock.acquire(timeout=1.0):
            try:
                self._forget()
            finally:
                self._lock.release()

    def _session(self) -> Driver:
        if self._driver is None:
            driver = Driver()
            try:
                driver.open()
                found, failed = driver.gpus()
                self._devices = select(found, self._wanted, failed=failed)
            except TelemetryError as error:
                self._failed_at, self._failure = time.monotonic(), error
                driver.close()
                raise
            except BaseException:
                driver.close()
                raise
            self._driver = driver
        return self._driver

    def _forget(self) -> None:
        if self._driver is not None:
            self._driver.close()
        self._driver = None
        self._unanswered.clear()

    def _read(self, *, retry_after: float) -> tuple[int, dict[str, int], list[str]]:
        with self._lock:
            driver = self._session()
            parts: dict[str, int] = {}
            reasons = []
            now = time.monotonic()
            for gpu in self._devices:
                since, why = self._unanswered.get(gpu.uuid, (0.0, ""))
                if why and now - since < retry_after:
                    reasons.append(why)
                    continue
                try:
                    memory = driver.memory(gpu.uuid)
                except TelemetryError as error:
                    self._unanswered[gpu.uuid] = (now, error.message)
                    reasons.append(error.message)
                    continue
                self._unanswered.pop(gpu.uuid, None)
                self.first_call_only = self.first_call_only or memory.call == 1
                parts[gpu.uuid] = memory.used
            if reasons and not parts:
                # A driver that was loaded again knows the old session no more.
                self._forget()
            return sum(parts.values()), parts, reasons
