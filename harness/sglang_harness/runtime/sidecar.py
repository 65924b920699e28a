"""A sidecar: a program next to a server, with its user, ``/dev/shm``, loopback and ``TMPDIR``."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import docker
from docker.errors import DockerException
from docker.types import Mount

from sglang_harness.errors import EngineError
from sglang_harness.runtime.attached import AttachedContainer

#: Where the server and its sidecars keep their temporary files and sockets.
TEMPORARY = PurePosixPath("/sglang-harness-tmp")

#: Variables of the server that decide which devices there are, and in which order.
_DEVICES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


class ContainerSidecar(AttachedContainer):
    """A second container of the server's image and user that joins its namespaces.

    Args:
        server: the server's container as the engine describes it (``inspect``).
        script: Python, passed as text, so that any image's Python runs it.
        temporary: the volume that both see as ``TEMPORARY``; ``None``: there is none.
        folder: its ``TMPDIR``: ``TEMPORARY`` or a folder in it.
        shares_processes: join the server's process namespace too (CUDA IPC needs it).

    Raises:
        EngineError: the engine refused.
    """

    def __init__(
        self,
        server: dict[str, Any],
        script: str,
        *,
        name: str,
        labels: dict[str, str],
        temporary: str | None,
        shares_processes: bool,
        folder: PurePosixPath = TEMPORARY,
    ) -> None:
        super().__init__(
            "The peer",
            name,
            **_like(server, shares_processes, folder),
            entrypoint=["python3", "-c", script],
            labels=labels,
            mounts=_mounts(server, temporary),
        )


def _like(server: dict[str, Any], shares_processes: bool, folder: PurePosixPath) -> dict[str, Any]:
    """How the second container is made like the first, and joined to it."""
    config, host = server["Config"], server["HostConfig"]
    me = f"container:{server['Id']}"
    set_there = dict(entry.split("=", 1) for entry in config["Env"] or () if "=" in entry)
    devices = {name: set_there[name] for name in _DEVICES if name in set_there}
    return {
        "image": server["Image"],
        "user": config["User"] or None,
        "command": [],
        # Without the server's key and its other secrets.
        "environment": {**devices, "TMPDIR": str(folder), "GLOO_SOCKET_IFNAME": "lo"},
        "network_mode": me,
        "ipc_mode": me,
        "pid_mode": me if shares_processes else None,
        # The server's process namespace has an init process already.
        "init": not shares_processes,
        "read_only": host["ReadonlyRootfs"],
        "cap_drop": host["CapDrop"] or [],
        "security_opt": host["SecurityOpt"] or [],
        "tmpfs": host.get("Tmpfs") or {},
        "runtime": host.get("Runtime") or None,
        "device_requests": [
            docker.types.DeviceRequest(
                driver=each.get("Driver") or "",
                count=each.get("Count") or 0,
                device_ids=each.get("DeviceIDs") or [],
                capabilities=each.get("Capabilities") or [],
            )
            for each in host["DeviceRequests"] or ()
        ],
        "pids_limit": 4096,
    }


def _mounts(server: dict[str, Any], temporary: str | None) -> list[Mount]:
    """The server's mounts at the same places, so that a path means the same in both."""
    mounts = []
    for each in server["Mounts"]:
        if each["Type"] not in ("bind", "volume") or each["Destination"] == str(TEMPORARY):
            continue
        source = each["Name"] if each["Type"] == "volume" else each["Source"]
        mounts.append(Mount(each["Destination"], source, type=each["Type"], read_only=True))
    if temporary is not None:
        mounts.append(Mount(str(TEMPORARY), temporary, type="volume"))
    return mounts


def make_temporary_volume(
    client: docker.DockerClient, name: str, labels: dict[str, str]
) -> tuple[Any, Mount]:
    """A volume in memory that every user may write to, and how the server mounts it.

    Raises:
        EngineError: the engine refused.
    """
    try:
        volume = client.volumes.create(
            name=name,
            labels=labels,
            driver_opts={"type": "tmpfs", "device": "tmpfs", "o": "mode=1777,size=4g"},
        )
    except DockerException as error:
        raise EngineError(
            f"The engine could not create a volume for temporary files: {error}."
        ) from None
    return volume, Mount(str(TEMPORARY), name, type="volume")
