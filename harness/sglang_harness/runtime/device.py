"""Which device a server is to run on, decided before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from sglang_harness.errors import SpecError
from sglang_harness.memory.gpu.driver import Gpu, gpus
from sglang_harness.memory.gpu.selection import allotted, select, visible
from sglang_harness.spec import ServerSpec

__all__ = ["Gpu", "choose", "cuda_environment", "engine_gives_gpus", "gpus", "within_visible"]


def meant(names: str) -> list[Gpu]:
    """The GPUs of this host that ``gpus`` of a spec selects: ``all``, or indices or UUIDs.

    Raises:
        SpecError: one of them does not exist.
    """
    return select(gpus()[0], names)


def engine_gives_gpus(info: dict[str, Any]) -> bool:
    """Whether the engine can hand GPUs to containers, by ``docker info``."""
    return "nvidia" in (info.get("Runtimes") or {}) or bool(info.get("DiscoveredDevices"))


def choose(spec: ServerSpec, engine_info: dict[str, Any]) -> Literal["cpu", "gpu"]:
    """``auto`` becomes ``gpu`` where a GPU and its container toolkit are present.

    Raises:
        SpecError: a GPU was asked for and cannot be used, or one of ``gpus`` is unknown.
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
        select(found, spec.gpus)
    return "gpu"


def within_visible(spec: ServerSpec, environment: Mapping[str, str] = os.environ) -> ServerSpec:
    """The spec with no more GPUs than ``CUDA_VISIBLE_DEVICES`` allows: that is how a scheduler
    gives a job two of eight GPUs. ``all`` becomes their UUIDs; where none is allowed, ``auto``
    becomes ``cpu``.

    Raises:
        SpecError: a GPU is asked for that is not allowed.
    """
    if spec.device == "cpu" or "CUDA_VISIBLE_DEVICES" not in environment:
        return spec
    found, _ = gpus()
    if not found:
        return spec  # choosing the device will tell why
    if spec.device == "auto" and not visible(found, environment):
        return spec.model_copy(update={"device": "cpu"})
    left = allotted(found, spec.gpus, environment)
    return spec.model_copy(update={"gpus": ",".join(g.uuid for g in left)})


def cuda_environment(wanted: str) -> dict[str, str]:
    """What makes CUDA see the devices that ``--gpus wanted`` names and no others. Indices in the
    order of the bus, because SGLang (0.5.23, custom all-reduce) reads the values as numbers;
    MIG instances have only UUIDs.

    Raises:
        SpecError: no such device exists.
    """
    if wanted == "all":
        return {}
    chosen = select(gpus()[0], wanted)
    values = [g.uuid if g.parent else str(g.index) for g in chosen]
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(values)}
