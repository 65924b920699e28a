"""Whose memory it is: the processes that a driver names, and the containers they are in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import docker
import psutil
from docker.errors import DockerException

from sglang_harness.memory.gpu.driver import ProcessUse

MIB = 1 << 20

#: As Docker, containerd, CRI-O and Podman write a container into a control group's path.
_IN_CGROUP = re.compile(r"(?:^|[/:-])([0-9a-f]{64})(?:\.scope)?(?:/|$)", re.MULTILINE)


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a GPU.

    Attributes:
        used: bytes; ``None`` where the driver does not tell.
        command: its name; empty where this machine does not know the process, as when the
            harness looks from within a container.
        container: name of its container, else its id; empty where it is in none.
    """

    pid: int
    used: int | None
    command: str = ""
    container: str = ""

    def __str__(self) -> str:
        held = "an untold amount" if self.used is None else f"{self.used / MIB:.0f} MiB"
        name = f" ({self.command})" if self.command else " (not of this machine's processes)"
        where = f" in container {self.container}" if self.container else ""
        return f"process {self.pid}{name}{where} holds {held}"


def owners(
    processes: Iterable[ProcessUse], containers: Mapping[int, str] | None = None
) -> list[GpuProcess]:
    """Names and containers of processes, by control group, else by ``containers``.

    Args:
        containers: names of containers by process id, as ``docker top`` gives them;
            ``None``: asked of the engine where there are processes to name.
    """
    uses = sorted(processes, key=lambda p: (-(p.used or 0), p.pid))
    if containers is None:
        containers = by_docker_top() if uses else {}
    found = []
    for use in uses:
        try:
            command = psutil.Process(use.pid).name()
        except (psutil.Error, OSError):
            command = ""
        container = containers.get(use.pid) or container_of(use.pid)[:12]
        found.append(GpuProcess(use.pid, use.used, command, container))
    return found


def container_of(pid: int, proc: Path = Path("/proc")) -> str:
    """Id of the container that a process of this machine is in, by its control groups; empty
    where it is in none, or is not there."""
    try:
        text = (proc / str(pid) / "cgroup").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = _IN_CGROUP.search(text)
    return found.group(1) if found else ""


def by_docker_top() -> dict[int, str]:
    """Names of containers by the process ids of the engine's host; empty without an engine."""
    found: dict[int, str] = {}
    try:
        client = docker.from_env(timeout=5)
    except DockerException:
        return found
    try:
        for container in client.containers.list():
            try:
                table = container.top()
            except DockerException:
                continue  # ended meanwhile
            column = table["Titles"].index("PID")
            found.update({int(row[column]): str(container.name) for row in table["Processes"]})
    except (DockerException, OSError, ValueError, KeyError):
        return found
    finally:
        client.close()
    return found
