"""Which device a server is to run on, found out and said before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sglang_harness.errors import SpecError
from sglang_harness.spec import ServerSpec


@dataclass(frozen=True)
class Gpu:
    """One device as NVML names it."""

    index: int
    uuid: str
    name: str
    memory_bytes: int


def gpus() -> tuple[list[Gpu], str]:
    """The GPUs of this host, and why there are none where there are none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"the NVIDIA driver library does not answer ({error})"
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            found.append(
                Gpu(
                    index,
                    pynvml.nvmlDeviceGetUUID(handle),
                    pynvml.nvmlDeviceGetName(handle),
                    int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                )
            )
        return found, "" if found else "the NVIDIA driver knows no GPU"
    except pynvml.NVMLError as error:
        return [], f"the NVIDIA driver library fails ({error})"
    finally:
        pynvml.nvmlShutdown()


def meant(names: str) -> list[Gpu]:
    """The GPUs of this host that ``gpus`` of a spec names: ``all``, or indices or UUIDs."""
    found, _ = gpus()
    wanted = None if names == "all" else {part.strip() for part in names.split(",")}
    return [gpu for gpu in found if wanted is None or {str(gpu.index), gpu.uuid} & wanted]


def engine_gives_gpus(info: dict[str, Any]) -> bool:
    """Whether the engine can hand GPUs to containers, by ``docker info``."""
    return "nvidia" in (info.get("Runtimes") or {}) or bool(info.get("DiscoveredDevices"))


def choose(spec: ServerSpec, engine_info: dict[str, Any]) -> Literal["cpu", "gpu"]:
    """``auto`` becomes ``gpu`` where a GPU and its container toolkit are present.

    Raises:
        SpecError: a GPU was asked for and is not to be had, or one of ``gpus`` is unknown.
    """
    if spec.device == "cpu":
        return "cpu"
    found, why_none = gpus()
    usable = bool(found) and engine_gives_gpus(engine_info)
    if spec.device == "auto" and not usable:
        return "cpu"
    if not found:
        raise SpecError(
            f"device is 'gpu', but {why_none}.", advice="Use --device cpu, or a host with a GPU."
        )
    if not usable:
        raise SpecError(
            "device is 'gpu', but the Docker engine cannot hand GPUs to containers.",
            advice="Install the NVIDIA container toolkit and restart the engine.",
        )
    if spec.gpus != "all":
        known = {str(gpu.index) for gpu in found} | {gpu.uuid for gpu in found}
        if unknown := [name for name in spec.gpus.split(",") if name.strip() not in known]:
            raise SpecError(
                f"gpus names {', '.join(unknown)}, which this host does not have "
                f"(it has {', '.join(sorted(known))})."
            )
    return "gpu"
