"""Stands at the door of a GPU: nothing starts on one that is not idle, and one that was not given
back is reported, with the processes that hold it. It fails closed: without telemetry nothing is
started."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sglang_harness._base import shared_file
from sglang_harness.errors import DeviceNotIdle, HarnessError, SpecError, TelemetryError
from sglang_harness.memory.gpu import leases
from sglang_harness.memory.gpu.driver import Driver, Gpu
from sglang_harness.memory.gpu.nvml import ANSWERS_WITHIN, NvmlMemory, bounded
from sglang_harness.memory.gpu.owners import owners

MIB = 1 << 20

OWN_BOUND = "SGLANG_HARNESS_GPU_IDLE_BELOW"
#: A GPU with less in use is idle: a driver's and a desktop's own bits. Not measured on a GPU.
#: The variable :data:`OWN_BOUND` (MiB) sets another.
IDLE_BELOW = 256 * MIB
#: The same where the driver has only the first version of the call, which counts what it
#: reserves for itself as used.
IDLE_BELOW_FIRST_CALL = 1024 * MIB
#: A driver's own bookkeeping may differ by this much; a server's weights and cache do not.
GIVEN_BACK_WITHIN = 64 * MIB
#: Seconds that a driver gets to free what a dead process held.
PATIENCE = 30.0


@dataclass(frozen=True)
class Return:
    """What became of one device when its server had gone. Figures in bytes.

    Attributes:
        before: in use before the server started.
        after: in use at the end; ``None`` where the device did not answer, and ``unknown``
            says why.
        seconds: waited for it.
        holders: who is on it, in words.
    """

    uuid: str
    before: int
    after: int | None
    seconds: float
    holders: list[str] = field(default_factory=list)
    unknown: str = ""

    @property
    def given_back(self) -> bool:
        return self.after is not None and self.after - self.before <= GIVEN_BACK_WITHIN


@dataclass(frozen=True)
class _Debt:
    """That a server was started on a device, and what the device held before. In a file, so
    that the next run knows, even if this one is killed."""

    before: int
    run_id: str
    pid: int


class Guard:
    """Holds the GPUs of one server: leased, idle at the start, looked at after the end.

    Args:
        gpus: as ``--gpus`` names them.
        patience: seconds to wait for memory that is being freed; ``None``: :data:`PATIENCE`.
    """

    def __init__(
        self,
        gpus: str,
        *,
        run_id: str,
        patience: float | None = None,
        answers_within: float = ANSWERS_WITHIN,
    ) -> None:
        self.source = NvmlMemory(gpus, answers_within=answers_within)
        self.before: dict[str, int] = {}
        """Bytes in use by UUID when the server was allowed to start."""
        self.warnings: list[str] = []
        self._run_id = run_id
        self._patience = PATIENCE if patience is None else patience
        self._answers_within = answers_within
        self._leases: leases.GpuLeases | None = None
        self._returns: list[Return] | None = None

    def open(
        self, *, purpose: str, timeout: float, say: Callable[[str], None] = lambda _: None
    ) -> Guard:
        """Leases the devices, and waits until they are idle.

        Args:
            timeout: seconds to wait for other holders of a device.

        Raises:
            LeaseTaken: another process holds one of them.
            TelemetryError: a device or its driver does not answer.
            DeviceNotIdle: one is in use; names who holds it.
            SpecError: there is no such device.
        """
        devices = self.source.devices()
        if not devices:
            raise TelemetryError("The NVIDIA driver knows no GPU.")
        say(f"leasing {', '.join(g.uuid for g in devices)}")
        self._leases = leases.acquire(
            devices, run_id=self._run_id, purpose=purpose, timeout=timeout
        )
        self.warnings += self._leases.warnings
        try:
            fresh = [g for g in devices if g.uuid in self._leases.fresh]
            self._wait_until_idle(fresh)
            _, self.before = self.source.read()
            for gpu in fresh:
                _owe(gpu.uuid, _Debt(self.before[gpu.uuid], self._run_id, os.getpid()))
        except BaseException:
            self._let_go()
            raise
        return self

    def close(self) -> list[Return]:
        """Waits until the devices are back where they were, says what became of them, and gives
        the leases back. Again: the same answer. Never raises for what a driver does."""
        if self._returns is None:
            try:
                self._returns = self._look_back() if self.before else []
                for each in self._returns:
                    if each.given_back and self._leases and each.uuid in self._leases.fresh:
                        _settled(each.uuid)
            finally:
                self._let_go()
        return self._returns

    def _let_go(self) -> None:
        if self._leases is not None:
            self._leases.release()
        self.source.close()

    def _wait_until_idle(self, devices: Sequence[Gpu]) -> None:
        until = time.monotonic() + self._patience
        while devices:
            _, parts = self.source.read()
            limits = {g.uuid: self._idle_limit(g.uuid) for g in devices}
            busy = [g for g in devices if parts[g.uuid] > limits[g.uuid]]
            if not busy:
                return
            if time.monotonic() >= until:
                self._refuse(busy, parts, limits)
            time.sleep(0.2)

    def _idle_limit(self, uuid: str) -> int:
        limit = idle_below(first_call_only=self.source.first_call_only)
        debt = _debt(uuid)
        return limit if debt is None else min(limit, debt.before + GIVEN_BACK_WITHIN)

    def _refuse(
        self, busy: Sequence[Gpu], parts: Mapping[str, int], limits: Mapping[str, int]
    ) -> None:
        told = []
        for gpu in busy:
            holders = self._holders(gpu.uuid) or ["nobody that the driver names"]
            owed = ""
            if (debt := _debt(gpu.uuid)) is not None:
                owed = (
                    f"; run {debt.run_id} (process {debt.pid}) had found "
                    f"{debt.before / MIB:.0f} MiB and did not give the rest back"
                )
            told.append(
                f"GPU {gpu.uuid} has {parts[gpu.uuid] / MIB:.0f} MiB in use, and is idle with at "
                f"most {limits[gpu.uuid] / MIB:.0f} MiB{owed}: {'; '.join(holders)}"
            )
        files = ", ".join(str(_debt_file(g.uuid)) for g in busy if _debt(g.uuid) is not None)
        raise DeviceNotIdle(
            f"{'. '.join(told)}. Nothing was started.",
            advice="End what is on it, or name another GPU with --gpus."
            + (f" If it is meant to be there, remove {files}." if files else ""),
        )

    def _look_back(self) -> list[Return]:
        began = time.monotonic()
        while True:
            try:
                _, parts, reasons = bounded(self.source.read_partly, self._answers_within)
            except HarnessError as error:
                parts, reasons = {}, [error.message]
            waited = time.monotonic() - began
            found = [
                Return(
                    uuid,
                    used,
                    parts.get(uuid),
                    waited,
                    unknown="" if uuid in parts else "; ".join(reasons) or "it was not read",
                )
                for uuid, used in self.before.items()
            ]
            if waited >= self._patience or all(each.given_back for each in found):
                break
            time.sleep(0.2)
        return [
            each
            if each.given_back or each.after is None
            else Return(**{**asdict(each), "holders": self._holders(each.uuid)})
            for each in found
        ]

    def _holders(self, uuid: str) -> list[str]:
        """Who is on a device, in words; a driver that does not tell is one of the words."""

        def look() -> list[str]:
            with Driver() as driver:
                return [str(owner) for owner in owners(driver.processes(uuid))]

        try:
            return bounded(look, self._answers_within)
        except TelemetryError as error:
            return [error.message.rstrip(".")]


def idle_below(*, first_call_only: bool = False) -> int:
    """Bytes below which a GPU is idle.

    Raises:
        SpecError: ``SGLANG_HARNESS_GPU_IDLE_BELOW`` is not a number of MiB.
    """
    own = os.environ.get(OWN_BOUND)
    if own is None:
        return IDLE_BELOW_FIRST_CALL if first_call_only else IDLE_BELOW
    if not own.isdigit():
        raise SpecError(f"{OWN_BOUND}={own!r} is not a number of MiB.")
    return int(own) * MIB


def _debt_file(uuid: str) -> Path:
    return leases.folder() / f"{uuid}.owed"


def _owe(uuid: str, debt: _Debt) -> None:
    file = _debt_file(uuid)
    known = _debt(uuid)
    if known is not None:
        # The lowest that was seen is what the device is to come back to.
        debt = _Debt(min(debt.before, known.before), debt.run_id, debt.pid)
    try:
        shared_file.write(file, json.dumps(asdict(debt)))
    except OSError as error:
        raise HarnessError(f"{file} cannot be written: {error.strerror}.") from None


def _debt(uuid: str) -> _Debt | None:
    try:
        return _Debt(**json.loads(_debt_file(uuid).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _settled(uuid: str) -> None:
    try:
        shared_file.clear(_debt_file(uuid))
    except OSError:
        return
