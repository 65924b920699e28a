"""What this machine is, as far as it can be asked: the driver, torch, libraries, limits."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pynvml

from sglang_harness._base import bounded, headroom
from sglang_harness.gpu_check import probes
from sglang_harness.gpu_check.part import Context, Part
from sglang_harness.kit.describe import describe
from sglang_harness.memory.gpu.driver import Driver

MIB = 1 << 20

#: Variables whose values say where CUDA's libraries and devices are found, and nothing secret. Of
#: all others the names alone are written down.
TOLD = ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "LD_LIBRARY_PATH", "PATH", "TMPDIR")

#: Libraries that the loader's cache is asked for.
LIBRARIES = re.compile(r"lib(cuda|cudart|nvrtc|cublas|nccl|nvidia-ml|numa|stdc\+\+)\.so")

#: Seconds for each program that is asked.
ANSWERS_WITHIN = 20.0


def run(context: Context) -> dict[str, Any]:
    """Everything that can be asked, put down as it comes. Fails where torch was built for CUDA and
    cannot use the GPU that the driver has: nothing after this would run then."""
    context.put("described", described := describe(str(context.settings.models)))
    context.put("limits", _limits(context))
    context.put("environment", _environment())
    context.put("libraries", _libraries())
    if not context.on_gpu:
        context.headline(f"Python {described['python']}, torch {described['torch']}, no GPU")
        return {}
    context.put("nvml", nvml := _nvml())
    _nvidia_smi(context)
    context.put("torch", torch := probes.run("torch_sees", within=max(5.0, context.left() - 5.0)))
    for gpu in nvml["gpus"]:
        held = gpu["memory"].get("second call") or gpu["memory"].get("first call") or {}
        if "used" in held:
            context.note("memory", f"idle use of {gpu['name']}", f"{held['used'] / MIB:.1f} MiB")
    names = ", ".join(gpu["name"] for gpu in nvml["gpus"])
    context.headline(f"{names}, driver {nvml['driver']}, torch {torch['version']}")
    assert torch["cuda"] is None or torch["devices"], (
        f"torch {torch['version']} cannot use the GPU that the driver has: "
        f"{torch['why_not'] or 'it sees no device'}"
    )
    return {}


def _limits(context: Context) -> dict[str, Any]:
    room = headroom.memory()
    return {
        "memory_available_bytes": room.available,
        "memory_limited_by": room.limited_by,
        "disk_free_bytes": {
            str(folder): headroom.disk(folder).free
            for folder in (context.settings.models, context.settings.out, Path("/dev/shm"))  # noqa: S108
        },
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK),
        "ptrace_scope": _text("/proc/sys/kernel/yama/ptrace_scope"),
        "user": os.getuid(),
    }


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


def _environment() -> dict[str, Any]:
    return {
        "names": sorted(os.environ),
        **{name: os.environ[name] for name in TOLD if name in os.environ},
    }


def _libraries() -> list[str]:
    lines = _said(shutil.which("ldconfig") or "/sbin/ldconfig", "-p").splitlines()
    return [line.strip() for line in lines if LIBRARIES.search(line)]


def _said(*words: str) -> str:
    """What a program prints, or why it printed nothing."""
    try:
        done = bounded.run(words, within=ANSWERS_WITHIN, merged=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{words[0]}: {error}"
    return "\n".join(done.output)


def _nvidia_smi(context: Context) -> None:
    """Three pages for a person, as files."""
    if not (program := shutil.which("nvidia-smi")):
        context.say("nvidia-smi is not on the search path")
        return
    for name, words in (
        ("nvidia-smi.txt", ()),
        ("nvidia-smi-q.txt", ("-q",)),
        ("nvidia-smi-topo.txt", ("topo", "-m")),
    ):
        (context.out / name).write_text(_said(program, *words) + "\n", encoding="utf-8")


def _nvml() -> dict[str, Any]:
    with Driver() as driver:
        versions = driver.versions()
        return {
            "driver": versions.driver,
            "cuda": versions.cuda,
            "binding": getattr(pynvml, "__version__", None),
            "gpus": [
                {
                    "uuid": gpu.uuid,
                    "name": gpu.name,
                    "parent": gpu.parent,
                    "split": gpu.split,
                    "capability": driver.capability(gpu.uuid),
                    "memory": _memory(gpu.uuid),
                    **_state(gpu.uuid),
                }
                for gpu in driver.gpus()[0]
            ],
        }


def _memory(uuid: str) -> dict[str, Any]:
    """The device at rest by both versions of the call, which differ in what the driver reserves."""
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
    told: dict[str, Any] = {}
    for name, words in (("first call", {}), ("second call", {"version": pynvml.nvmlMemory_v2})):
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle, **words)
            fields = ("total", "used", "free", "reserved")
            told[name] = {f: int(getattr(memory, f)) for f in fields if hasattr(memory, f)}
        except pynvml.NVMLError as error:
            told[name] = {"error": str(error)}
    return told


def _state(uuid: str) -> dict[str, Any]:
    """What influences timings. What a device does not tell is left out."""
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
    asked: dict[str, Callable[[], Any]] = {
        "clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "highest_clock_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "temperature_celsius": lambda: pynvml.nvmlDeviceGetTemperature(
            handle, pynvml.NVML_TEMPERATURE_GPU
        ),
        "power_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "power_limit_watts": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "persistence": lambda: pynvml.nvmlDeviceGetPersistenceMode(handle),
        "ecc": lambda: pynvml.nvmlDeviceGetEccMode(handle)[0],
        "compute_mode": lambda: pynvml.nvmlDeviceGetComputeMode(handle),
        "pcie_generation": lambda: pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
        "pcie_width": lambda: pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
        "utilisation_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "processes": lambda: [p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)],
    }
    told = {}
    for name, ask in asked.items():
        with suppress(pynvml.NVMLError):
            told[name] = ask()
    return told


PART = Part("facts", "What is this machine?", 60.0, run, group="driver", least=5.0)
