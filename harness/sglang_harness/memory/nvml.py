"""Device memory by NVML. Whole devices are the truth: a driver names host process ids, which
mean nothing inside a container."""

from __future__ import annotations

import pynvml

from sglang_harness.errors import HarnessError


class NvmlMemory:
    """Reads the devices of ``gpus``: ``all``, or indices or UUIDs joined by commas."""

    name = "nvml"

    def __init__(self, gpus: str = "all") -> None:
        self._wanted = None if gpus == "all" else {part.strip() for part in gpus.split(",")}

    def read(self) -> tuple[int, dict[str, int]]:
        """Bytes in use over the devices, and per device by UUID.

        Raises:
            HarnessError: the driver does not answer. Never a zero in its place.
        """
        try:
            pynvml.nvmlInit()
            try:
                parts = {}
                for index in range(pynvml.nvmlDeviceGetCount()):
                    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                    uuid = pynvml.nvmlDeviceGetUUID(handle)
                    if self._wanted is None or {str(index), uuid} & self._wanted:
                        parts[uuid] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
            finally:
                pynvml.nvmlShutdown()
        except pynvml.NVMLError as error:
            raise HarnessError(
                f"GPU memory cannot be read: {error}.",
                advice="Check the NVIDIA driver (nvidia-smi).",
            ) from None
        return sum(parts.values()), parts
