"""Prints everything that the harness asks a driver, once; of the driver that the loader finds."""

from __future__ import annotations

import ctypes
import json

import pynvml

from sglang_harness.errors import TelemetryError
from sglang_harness.memory.gpu.driver import Driver

#: What the mock has and the harness cannot do without.
NEEDED = (
    "nvmlInitWithFlags",
    "nvmlShutdown",
    "nvmlErrorString",
    "nvmlDeviceGetCount_v2",
    "nvmlDeviceGetHandleByIndex_v2",
    "nvmlDeviceGetHandleByUUID",
    "nvmlDeviceGetUUID",
    "nvmlDeviceGetName",
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetComputeRunningProcesses_v2",
    "nvmlDeviceGetCudaComputeCapability",
)


def main() -> None:
    """Every device, and the sizes of the binding's structures."""
    devices = []
    with Driver() as driver:
        for gpu in driver.gpus()[0]:
            memory = driver.memory(gpu.uuid)
            devices.append(
                {
                    "uuid": gpu.uuid,
                    "name": gpu.name,
                    "parent": gpu.parent,
                    "capability": driver.capability(gpu.uuid),
                    "total": memory.total,
                    "reserved": memory.reserved,
                    "used": memory.used,
                    "call": memory.call,
                }
            )
            # A structure of another size is refused by the driver, so its answer is the proof.
            try:
                driver.processes(gpu.uuid)
            except TelemetryError as error:
                if error.code != pynvml.NVML_ERROR_NO_PERMISSION:
                    raise
        missing = [name for name in NEEDED if not hasattr(pynvml.nvmlLib, name)]
    structures = {
        "nvmlMemory_t": ctypes.sizeof(pynvml.c_nvmlMemory_t),
        "nvmlMemory_v2_t": ctypes.sizeof(pynvml.c_nvmlMemory_v2_t),
        "nvmlProcessInfo_t": ctypes.sizeof(pynvml.c_nvmlProcessInfo_v3_t),
    }
    print(json.dumps({"devices": devices, "missing": missing, "structures": structures}))


if __name__ == "__main__":
    main()
