"""What the NVIDIA driver says of its devices, through NVIDIA's own binding.

Figures of whole devices are reliable. Figures by process are not: only some drivers give them, and
by process ids of the host, which are not valid inside a container.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

from sglang_harness.errors import TelemetryError

T = TypeVar("T")

#: Error codes for a call that the driver does not have, or that this device does not support.
NOT_TOLD = frozenset(
    {
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        pynvml.NVML_ERROR_DEPRECATED,
    }
)

#: NVML's error codes as messages: what happened, and what to do about it.
_MESSAGES: dict[int, tuple[str, str]] = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
        "the NVIDIA driver library (libnvidia-ml.so.1) is not installed",
        "Use a machine with an NVIDIA driver, or device=cpu.",
    ),
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: (
        "the NVIDIA kernel driver is not loaded",
        "Load it (nvidia-smi says more), or use device=cpu.",
    ),
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "the NVIDIA library and the kernel driver are of different versions",
        "The driver was updated while the system was running: reboot.",
    ),
    pynvml.NVML_ERROR_NO_PERMISSION: (
        "the driver denies access to this user",
        "Run as a user who may open /dev/nvidia*, or ask the administrator.",
    ),
    pynvml.NVML_ERROR_GPU_IS_LOST: (
        "the GPU has fallen off the bus",
        "It needs a reset or a reboot; look for 'Xid' in the kernel's log.",
    ),
    pynvml.NVML_ERROR_RESET_REQUIRED: (
        "the GPU needs a reset",
        "Run nvidia-smi --gpu-reset as an administrator.",
    ),
    pynvml.NVML_ERROR_NOT_FOUND: (
        "the device does not exist",
        "See nvidia-smi -L.",
    ),
    pynvml.NVML_ERROR_INVALID_ARGUMENT: (
        "the driver rejected the argument",
        "See nvidia-smi -L.",
    ),
    pynvml.NVML_ERROR_NOT_SUPPORTED: ("this device does not report it", ""),
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: (
        "the driver is too old for this call",
        "Install a newer driver.",
    ),
    pynvml.NVML_ERROR_TIMEOUT: ("the driver did not answer in time", "Check nvidia-smi."),
}


@dataclass(frozen=True)
class Gpu:
    """A device, or a MIG instance of one, as NVML names it.

    Attributes:
        index: NVML's, which is the order of the PCI bus; a MIG instance has its parent's.
        parent: UUID of the whole GPU that a MIG instance is of; empty for a whole GPU.
        split: MIG is enabled: the memory is in its instances, and CUDA can use only these.
        instance: number of the MIG instance on its parent; ``None`` for a whole GPU.
    """

    index: int
    uuid: str
    name: str
    memory_bytes: int
    parent: str = ""
    split: bool = False
    instance: int | None = None


@dataclass(frozen=True)
class GpuMemory:
    """Memory of one device, in bytes.

    Attributes:
        used: allocated by all processes. With ``call`` 1 it includes what the driver reserves.
        reserved: by driver and firmware; ``None`` where the driver has only the first call.
        call: version of ``nvmlDeviceGetMemoryInfo`` that answered, 1 or 2.
    """

    uuid: str
    total: int
    used: int
    free: int
    reserved: int | None
    call: int


@dataclass(frozen=True)
class ProcessUse:
    """One process on a device.

    Attributes:
        pid: as the driver's host counts processes.
        used: bytes; ``None`` where the driver does not report them.
    """

    pid: int
    used: int | None


@dataclass(frozen=True)
class Versions:
    """Of the driver, such as ``570.86.15``, and the newest CUDA that it runs, such as ``12.8``."""

    driver: str
    cuda: str


def _code(error: Any) -> int:
    return int(getattr(error, "value", pynvml.NVML_ERROR_UNKNOWN))


def telemetry_error(error: Any, what: str) -> TelemetryError:
    """An ``NVMLError`` as one sentence that begins with ``what``."""
    code = _code(error)
    message, advice = _MESSAGES.get(code, (f"{error}", "Check nvidia-smi."))
    return TelemetryError(f"{what}: {message} (NVML error {code}).", advice=advice, code=code)


class Driver:
    """A session with the driver: ``with Driver() as driver``. Safe from several threads.

    Raises:
        TelemetryError: entering, where no driver answers; calls, where a device does not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = False
        self._handles: dict[str, Any] = {}
        self._no_second_call: set[str] = set()

    def __enter__(self) -> Driver:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> Driver:
        """Opens the session; does nothing if it is open.

        Raises:
            TelemetryError: no driver answers.
        """
        with self._lock:
            if not self._open:
                try:
                    pynvml.nvmlInit()
                except pynvml.NVMLError as error:
                    raise telemetry_error(error, "The NVIDIA driver cannot be asked") from None
                self._open = True
        return self

    def close(self) -> None:
        """Closes the session; does nothing if it is closed. Errors of the driver are ignored."""
        with self._lock:
            self._handles.clear()
            if self._open:
                self._open = False
                try:
                    pynvml.nvmlShutdown()
                except pynvml.NVMLError:
                    return

    def versions(self) -> Versions:
        """Versions of driver and CUDA; empty where the driver does not report them."""
        cuda = self._optional(pynvml.nvmlSystemGetCudaDriverVersion_v2)
        return Versions(
            driver=str(self._optional(pynvml.nvmlSystemGetDriverVersion) or ""),
            cuda="" if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        )

    def gpus(self) -> tuple[list[Gpu], list[TelemetryError]]:
        """Every whole device, each followed by its MIG instances; and the errors of those that do
        not answer.

        Raises:
            TelemetryError: the driver cannot count them.
        """
        found: list[Gpu] = []
        failed: list[TelemetryError] = []
        for index in range(self._ask("The GPUs cannot be counted", pynvml.nvmlDeviceGetCount)):
            try:
                found += self._look(index)
            except TelemetryError as error:
                failed.append(error)
        return found, failed

    def _look(self, index: int) -> list[Gpu]:
        what = f"GPU {index} cannot be asked"
        handle = self._ask(what, pynvml.nvmlDeviceGetHandleByIndex, index)
        mode = self._optional(pynvml.nvmlDeviceGetMigMode, handle)
        split = mode is not None and mode[0] == 1
        whole = self._describe(what, handle, index, split=split)
        return [whole, *(self._instances(whole, handle) if split else ())]

    def _instances(self, whole: Gpu, handle: Any) -> list[Gpu]:
        found = []
        most = self._optional(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
        for number in range(most):
            try:
                instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            except pynvml.NVMLError as error:
                if _code(error) == pynvml.NVML_ERROR_NOT_FOUND:  # a place that is not filled
                    continue
                raise telemetry_error(error, f"MIG instance {whole.index}:{number}") from None
            what = f"MIG instance {whole.index}:{number} cannot be asked"
            found.append(
                self._describe(what, instance, whole.index, parent=whole.uuid, instance=number)
            )
        return found

    def _describe(self, what: str, handle: Any, index: int, **more: Any) -> Gpu:
        uuid = str(self._ask(what, pynvml.nvmlDeviceGetUUID, handle))
        self._handles[uuid] = handle
        name = str(self._ask(what, pynvml.nvmlDeviceGetName, handle))
        return Gpu(index, uuid, name, self.memory(uuid).total, **more)

    def memory(self, uuid: str) -> GpuMemory:
        """Memory of the device or MIG instance ``uuid``, by the second version of the call
        where the driver has it.

        Raises:
            TelemetryError: it does not answer.
        """
        handle, what = self._handle(uuid), f"The memory of {uuid} cannot be read"
        if uuid not in self._no_second_call:
            try:
                told = pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2)
                return GpuMemory(
                    uuid, int(told.total), int(told.used), int(told.free), int(told.reserved), 2
                )
            except pynvml.NVMLError as error:
                if _code(error) not in NOT_TOLD:
                    raise telemetry_error(error, what) from None
                self._no_second_call.add(uuid)
        told = self._ask(what, pynvml.nvmlDeviceGetMemoryInfo, handle)
        return GpuMemory(uuid, int(told.total), int(told.used), int(told.free), None, 1)

    def capability(self, uuid: str) -> str:
        """Compute capability such as ``9.0``; empty where the driver does not report it."""
        told = self._optional(pynvml.nvmlDeviceGetCudaComputeCapability, self._handle(uuid))
        return "" if told is None else f"{told[0]}.{told[1]}"

    def processes(self, uuid: str) -> tuple[ProcessUse, ...]:
        """The processes on the device (compute, graphics and MPS); each is listed once.

        Raises:
            TelemetryError: the driver does not report them, or not to this user.
        """
        handle = self._handle(uuid)
        found: dict[int, int | None] = {}
        answered, last = False, None
        for kind in ("Compute", "Graphics", "MPSCompute"):
            for version in ("_v3", "_v2"):
                call = getattr(pynvml, f"nvmlDeviceGet{kind}RunningProcesses{version}", None)
                if call is None:
                    continue
                try:
                    told = call(handle)
                except pynvml.NVMLError as error:
                    last = error
                    if _code(error) in NOT_TOLD:
                        continue
                    raise telemetry_error(
                        error, f"The processes of {uuid} cannot be read"
                    ) from None
                answered = True
                for each in told:
                    used = None if each.usedGpuMemory is None else int(each.usedGpuMemory)
                    found[int(each.pid)] = max(found.get(int(each.pid)) or 0, used or 0) or used
                break
        if not answered:
            raise telemetry_error(last, f"The processes of {uuid} cannot be read")
        return tuple(ProcessUse(pid, found[pid]) for pid in sorted(found))

    def _handle(self, uuid: str) -> Any:
        if uuid not in self._handles:
            self._handles[uuid] = self._ask(
                f"GPU {uuid} cannot be found", pynvml.nvmlDeviceGetHandleByUUID, uuid.encode()
            )
        return self._handles[uuid]

    @staticmethod
    def _ask(what: str, call: Callable[..., T], *arguments: Any) -> T:
        try:
            return call(*arguments)
        except pynvml.NVMLError as error:
            raise telemetry_error(error, what) from None

    @staticmethod
    def _optional(call: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return call(*arguments)
        except pynvml.NVMLError as error:
            if _code(error) == pynvml.NVML_ERROR_GPU_IS_LOST:
                raise telemetry_error(error, "A GPU does not answer") from None
            return None


def gpus() -> tuple[list[Gpu], str]:
    """The whole devices and MIG instances of this machine that answer; where there are none, the
    reason."""
    try:
        with Driver() as driver:
            found, failed = driver.gpus()
    except TelemetryError as error:
        return [], _without_capital(error.message)
    if found:
        return found, ""
    return [], _without_capital(failed[0].message) if failed else "the NVIDIA driver reports no GPU"


def _without_capital(sentence: str) -> str:
    """For use within another sentence."""
    first = sentence[:1].lower() if sentence.startswith("The ") else sentence[:1]
    return (first + sentence[1:]).rstrip(".")
