"""Everything that the harness asks a driver, once, as data; of the driver that the loader finds."""

from __future__ import annotations

import ctypes
import json

import bare

bare.prepare()

import pynvml  # noqa: E402

from sglang_harness.errors import TelemetryError  # noqa: E402
from sglang_harness.memory.gpu.driver import Driver  # noqa: E402

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
)

devices = []
with Driver() as driver:
    for gpu in driver.gpus()[0]:
        memory = driver.memory(gpu.uuid)
        devices.append(
            {
                "uuid": gpu.uuid,
                "name": gpu.name,
                "parent": gpu.parent,
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
