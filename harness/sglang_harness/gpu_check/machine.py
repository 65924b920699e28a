"""This machine before anything runs: whether there is a GPU that is free, and what it is. Asks NVML
alone; never initialises CUDA."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from dataclasses import dataclass, field
from typing import Any

from sglang_harness._base import bounded, host
from sglang_harness.errors import HarnessError, TelemetryError
from sglang_harness.memory.gpu.driver import Driver, Gpu
from sglang_harness.memory.gpu.guard import GIVEN_BACK_WITHIN, MIB, idle_below
from sglang_harness.memory.gpu.owners import owners
from sglang_harness.memory.gpu.selection import usable, visible

#: Seconds for everything that is asked of a driver.
ANSWERS_WITHIN = 30.0
#: Seconds for memory that is being freed when the run begins.
SETTLES_WITHIN = 5.0


class NotRun(Exception):
    """Nothing can be run here. The message is one line that says why."""


@dataclass(frozen=True)
class Machine:
    """Attributes:
    gpus: that CUDA can use here.
    at_rest: bytes in use by UUID, when nothing ran yet.
    capabilities: compute capability by UUID, such as ``9.0``; missing where the driver does not
        tell.
    facts: for the results.
    """

    gpus: list[Gpu] = field(default_factory=list)
    at_rest: dict[str, int] = field(default_factory=dict)
    capabilities: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def of_cpu() -> Machine:
    """This machine for a rehearsal."""
    return Machine(facts={**_host(), "GPU": "none: a rehearsal on the CPU"})


def of_gpu() -> Machine:
    """This machine, with at least one GPU, none of which is in use.

    Raises:
        NotRun: it has none, its driver does not answer, or one is in use.
    """
    try:
        return bounded.call(_of_gpu, within=ANSWERS_WITHIN + SETTLES_WITHIN)
    except TimeoutError:
        raise NotRun(f"the NVIDIA driver did not answer within {ANSWERS_WITHIN:g} s") from None
    except HarnessError as error:
        message = error.message.rstrip(".")
        raise NotRun(f"no GPU: {message[:1].lower()}{message[1:]}") from None


def _of_gpu() -> Machine:
    with Driver() as driver:
        found, failed = driver.gpus()
        seen = visible(found, os.environ)
        gpus = usable(found) if seen is None else seen
        if not gpus:
            if failed:
                raise failed[0]
            why = "CUDA_VISIBLE_DEVICES leaves none" if found else "the driver reports none"
            raise NotRun(f"no GPU: {why}")
        at_rest = _at_rest(driver, gpus)
        versions = driver.versions()
        capabilities = {g.uuid: c for g in gpus if (c := driver.capability(g.uuid))}
    return Machine(
        gpus,
        at_rest,
        capabilities,
        {
            "GPU": [f"{g.name}, {g.memory_bytes / 2**30:.1f} GiB" for g in gpus],
            "driver": versions.driver,
            "CUDA of the driver": versions.cuda,
            "compute capability": sorted(set(capabilities.values())),
            **_host(),
        },
    )


def _at_rest(driver: Driver, gpus: list[Gpu]) -> dict[str, int]:
    until = time.monotonic() + SETTLES_WITHIN
    while True:
        memory = {g.uuid: driver.memory(g.uuid) for g in gpus}
        busy = [m for m in memory.values() if m.used > idle_below(first_call_only=m.call == 1)]
        if not busy:
            return {uuid: m.used for uuid, m in memory.items()}
        if time.monotonic() >= until:
            raise NotRun("; ".join(_in_use(driver, m.uuid, m.used, m.call) for m in busy))
        time.sleep(0.2)


def _in_use(driver: Driver, uuid: str, used: int, call: int) -> str:
    limit = idle_below(first_call_only=call == 1) / MIB
    return (
        f"GPU {uuid} is in use: {used / MIB:.0f} MiB by "
        f"{_holders(driver, uuid)}; a GPU with at most "
        f"{limit:.0f} MiB is idle (SGLANG_HARNESS_GPU_IDLE_BELOW sets another bound, in MiB)"
    )


def _holders(driver: Driver, uuid: str) -> str:
    try:
        holders = [str(each) for each in owners(driver.processes(uuid))]
    except TelemetryError as error:
        holders = [error.message.rstrip(".")]
    return ", ".join(holders) or "no process that the driver names"


def still_in_use(machine: Machine) -> list[str]:
    """Which GPUs hold more than when the run began, a sentence each, after they had a moment."""

    def look() -> list[str]:
        with Driver() as driver:
            until = time.monotonic() + SETTLES_WITHIN
            while True:
                used = {uuid: driver.memory(uuid).used for uuid in machine.at_rest}
                more = [u for u, b in machine.at_rest.items() if used[u] - b > GIVEN_BACK_WITHIN]
                if not more or time.monotonic() >= until:
                    break
                time.sleep(0.2)
            return [
                f"GPU {uuid} still has {used[uuid] / MIB:.0f} MiB in use, "
                f"{machine.at_rest[uuid] / MIB:.0f} MiB when the run began "
                f"({_holders(driver, uuid)})."
                for uuid in more
            ]

    if not machine.at_rest:
        return []
    try:
        return bounded.call(look, within=ANSWERS_WITHIN + SETTLES_WITHIN)
    except TimeoutError:
        return [f"the NVIDIA driver did not answer within {ANSWERS_WITHIN:g} s."]
    except HarnessError as error:
        return [error.message]


def _host() -> dict[str, Any]:
    about = host.describe()
    return {
        "torch": _version("torch"),
        "Python": about["python"],
        "host": f"{about['platform']}, {about['cpus']} CPUs ({about['processor']}), "
        f"{about['memory_bytes'] / 2**30:.0f} GiB",
        "machine": platform.machine(),
    }


def _version(package: str) -> str:
    # From its metadata: importing torch would cost seconds, and must not happen in this process.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
