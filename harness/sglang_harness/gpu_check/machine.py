"""This machine before anything runs: whether there is a GPU that is free, and what it is. Asks NVML
alone; never initialises CUDA."""

from __future__ import annotations

import importlib.metadata
import os
import time
from dataclasses import dataclass, field
from typing import Any

from sglang_harness._base import host
from sglang_harness.errors import HarnessError, TelemetryError
from sglang_harness.memory.gpu.driver import Driver, Gpu, GpuMemory
from sglang_harness.memory.gpu.guard import (
    GIVEN_BACK_WITHIN,
    IDLE_BELOW,
    IDLE_BELOW_FIRST_CALL,
    MIB,
    OWN_BOUND,
    idle_below,
)
from sglang_harness.memory.gpu.nvml import bounded
from sglang_harness.memory.gpu.owners import GpuProcess, owners
from sglang_harness.memory.gpu.selection import usable, visible

#: Seconds for everything that is asked of a driver.
ANSWERS_WITHIN = 30.0
#: Seconds for memory that is being freed.
SETTLES_WITHIN = 5.0


class NotRun(Exception):
    """Nothing can be run here. The message is one line that says why."""


@dataclass
class Machine:
    """This machine as a run finds it.

    Attributes:
        gpus: that CUDA can use here.
        at_rest: bytes in use by UUID.
        capabilities: compute capability by UUID, such as ``9.0``; missing where the driver does
            not tell.
        facts: for the results.
        idle_below: bytes below which its GPUs are idle, where that is more than the harness's own
            bound: a driver holds it at rest, with no process on the GPU.
    """

    gpus: list[Gpu] = field(default_factory=list)
    at_rest: dict[str, int] = field(default_factory=dict)
    capabilities: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    idle_below: int | None = None

    def left_on_gpus(self) -> list[str]:
        """Which GPUs hold more than before, a sentence each; asked when nothing of this run is on
        them any more. They have :data:`SETTLES_WITHIN` seconds. What was told is not told again.
        """
        if not self.at_rest:
            return []
        try:
            return bounded(self._left, ANSWERS_WITHIN + SETTLES_WITHIN)
        except HarnessError as error:
            return [error.message]

    def _left(self) -> list[str]:
        with Driver() as driver:
            until = time.monotonic() + SETTLES_WITHIN
            while True:
                used = {uuid: driver.memory(uuid).used for uuid in self.at_rest}
                more = [u for u, b in self.at_rest.items() if used[u] - b > GIVEN_BACK_WITHIN]
                if not more or time.monotonic() >= until:
                    break
                time.sleep(0.2)
            told = [
                f"GPU {uuid} has {used[uuid] / MIB:.0f} MiB in use, "
                f"{self.at_rest[uuid] / MIB:.0f} MiB before ({_holders(driver, uuid)})."
                for uuid in more
            ]
            self.at_rest |= {uuid: used[uuid] for uuid in more}
        return told


def of_cpu() -> Machine:
    """This machine for a rehearsal."""
    return Machine(facts=_host())


def of_gpu() -> Machine:
    """This machine, with at least one GPU, and none that is in use.

    Raises:
        NotRun: it has none, its driver does not answer, or one is in use.
        SpecError: ``SGLANG_HARNESS_GPU_IDLE_BELOW`` or ``CUDA_VISIBLE_DEVICES`` makes no sense.
    """
    try:
        return bounded(_look, ANSWERS_WITHIN + SETTLES_WITHIN)
    except TelemetryError as error:
        message = error.message.rstrip(".")
        raise NotRun(f"no GPU: {message[:1].lower()}{message[1:]}") from None


def _look() -> Machine:
    with Driver() as driver:
        found, failed = driver.gpus()
        seen = visible(found, os.environ)
        gpus = usable(found) if seen is None else seen
        if not gpus:
            if failed:
                raise failed[0]
            why = "CUDA_VISIBLE_DEVICES leaves none" if found else "the NVIDIA driver reports none"
            raise NotRun(f"no GPU: {why}")
        at_rest, idle = _at_rest(driver, gpus)
        versions = driver.versions()
        capabilities = {g.uuid: c for g in gpus if (c := driver.capability(g.uuid))}
    return Machine(
        gpus,
        at_rest,
        capabilities,
        {
            "device": [_device(g, capabilities.get(g.uuid, "")) for g in gpus],
            "driver": f"{versions.driver}, runs CUDA up to {versions.cuda}",
            "in use at rest": [f"{used / MIB:.1f} MiB" for used in at_rest.values()],
            **({"taken for idle below": f"{idle / MIB:.0f} MiB"} if idle is not None else {}),
            **_host(),
        },
        idle,
    )


def _device(gpu: Gpu, capability: str) -> str:
    told = f"{gpu.name}, {gpu.memory_bytes / 2**30:.1f} GiB"
    return f"{told}, compute capability {capability}" if capability else told


def _at_rest(driver: Driver, gpus: list[Gpu]) -> tuple[dict[str, int], int | None]:
    """Bytes in use by UUID, and the bound of idle where it has to be another than the harness's.

    A run must not be lost because a driver holds more at rest than was thought: up to 1 GiB on a
    GPU without a process is taken for the driver's own.
    """
    until = time.monotonic() + SETTLES_WITHIN
    while True:
        memory = [driver.memory(gpu.uuid) for gpu in gpus]
        busy = [m for m in memory if m.used > idle_below(first_call_only=m.call == 1)]
        used = {m.uuid: m.used for m in memory}
        if not busy:
            return used, None
        if time.monotonic() >= until:
            taken = [m for m in busy if not _is_the_drivers_own(driver, m)]
            if not taken:
                return used, max(m.used for m in busy) + IDLE_BELOW
            raise NotRun("; ".join(_in_use(driver, each) for each in taken))
        time.sleep(0.2)


def _is_the_drivers_own(driver: Driver, memory: GpuMemory) -> bool:
    if OWN_BOUND in os.environ or memory.used > IDLE_BELOW_FIRST_CALL:
        return False
    try:
        return not driver.processes(memory.uuid)
    except TelemetryError:
        return False


def _in_use(driver: Driver, memory: GpuMemory) -> str:
    limit = idle_below(first_call_only=memory.call == 1) / MIB
    return (
        f"GPU {memory.uuid} is in use: {memory.used / MIB:.0f} MiB by "
        f"{_holders(driver, memory.uuid)}; with at most {limit:.0f} MiB it is idle "
        "(SGLANG_HARNESS_GPU_IDLE_BELOW=MIB sets another bound, CUDA_VISIBLE_DEVICES names "
        "another GPU)"
    )


def _holders(driver: Driver, uuid: str) -> str:
    try:
        holders = [_words(each) for each in owners(driver.processes(uuid))]
    except TelemetryError as error:
        holders = [error.message.rstrip(".")]
    return ", ".join(holders) or "no process that the driver names"


def _words(process: GpuProcess) -> str:
    where = f" in container {process.container}" if process.container else ""
    return f"process {process.pid} ({process.command or 'not of this machine'}){where}"


def _host() -> dict[str, Any]:
    about = host.describe()
    return {
        "torch": _torch(),
        "Python": about["python"],
        "host": f"{about['platform']}, {about['cpus']} CPUs ({about['processor']}), "
        f"{about['memory_bytes'] / 2**30:.0f} GiB",
    }


def _torch() -> str:
    # From its metadata: importing torch would cost seconds, and must not happen in this process.
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
