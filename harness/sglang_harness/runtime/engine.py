"""The Docker engine: whether one answers, whether it runs on this machine, and what the harness
has made on it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import docker
import psutil
from docker.errors import APIError, DockerException, NotFound
from testcontainers.core.utils import inside_container

from sglang_harness.errors import EngineError

#: Everything that the harness makes on an engine carries these labels.
LABEL = "org.sglang-harness"
LABEL_RUN = f"{LABEL}.run"
LABEL_OWNER = f"{LABEL}.owner"
LABEL_HELD = f"{LABEL}.held"


def connect(*, timeout: int = 60) -> docker.DockerClient:
    """A client of the engine that ``DOCKER_HOST`` (or the default socket) names.

    Raises:
        EngineError: nothing answers there, or this user may not ask.
    """
    where = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    try:
        client = docker.from_env(timeout=timeout)
        client.ping()
    except (DockerException, OSError) as error:
        if "Permission denied" in str(error):
            raise EngineError(
                f"Permission denied: this user may not use the Docker engine at {where}.",
                advice="Add yourself to the group 'docker' and log in again.",
            ) from None
        raise EngineError(
            f"No Docker engine answers at {where}.",
            advice="Start it (systemctl start docker), or run docker/engine.sh as root; "
            "'sglang-harness doctor' shows what was found.",
        ) from None
    return client


def is_remote() -> bool:
    """Whether the engine runs on another machine, as far as ``DOCKER_HOST`` tells."""
    return not os.environ.get("DOCKER_HOST", "unix://").startswith(("unix://", "npipe://"))


def in_container() -> bool:
    """Whether the harness itself runs in a container (with the engine's socket, then)."""
    return bool(inside_container())


@dataclass(frozen=True)
class Owner:
    """The process that something belongs to; while it lives, ``sweep`` removes nothing of it."""

    host: str
    pid: int
    started: int
    """Start of the process in whole seconds since the epoch: distinguishes a reused pid."""

    @classmethod
    def this_process(cls) -> Owner:
        return cls(socket.gethostname(), os.getpid(), int(psutil.Process().create_time()))

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        try:
            host, pid, started = text.rsplit(":", 2)
            owner = cls(host, int(pid), int(started))
        except ValueError:
            return None
        return owner if 0 < owner.pid < 1 << 31 else None

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}:{self.started}"

    def is_gone(self) -> bool:
        """True only where this host can tell; another host's processes are never 'gone'."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            # Where no parent reaps (process 1 of a CI job's container), the dead stay listed.
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            return abs(int(process.create_time()) - self.started) > 1
        except psutil.NoSuchProcess:
            return True


def labels(run_id: str, *, held: bool = False) -> dict[str, str]:
    """The labels for something made by this process in the run ``run_id``.

    ``held``: it is meant to outlive this process, so ``sweep`` leaves it alone.
    """
    own = {LABEL: "1", LABEL_RUN: run_id, LABEL_OWNER: str(Owner.this_process())}
    return {**own, LABEL_HELD: "1"} if held else own


@dataclass(frozen=True)
class Leftover:
    """Something on the engine that the harness has made."""

    kind: str
    name: str
    run_id: str
    owner: Owner | None
    held: bool

    def is_abandoned(self) -> bool:
        """The process that made it has gone, and it was not meant to outlive it."""
        return not self.held and (self.owner is None or self.owner.is_gone())


def ours(client: docker.DockerClient) -> list[Leftover]:
    """Every container, volume and network that carries our label, stopped ones too."""
    query: dict[str, Any] = {"label": LABEL}
    found = [
        _leftover("container", c.name, c.labels)
        for c in client.containers.list(all=True, filters=query, ignore_removed=True)
    ]
    found += [
        _leftover("volume", v.name, v.attrs.get("Labels"))
        for v in client.volumes.list(filters=query)
    ]
    found += [
        _leftover("network", n.name, n.attrs.get("Labels"))
        for n in client.networks.list(filters=query)
    ]
    return found


def _leftover(kind: str, name: str | None, labelled: dict[str, str] | None) -> Leftover:
    marks = labelled or {}
    owner = Owner.parse(marks.get(LABEL_OWNER, ""))
    return Leftover(kind, name or "", marks.get(LABEL_RUN, ""), owner, LABEL_HELD in marks)


def remove(client: docker.DockerClient, things: Iterable[Leftover]) -> list[str]:
    """Removes ``things``, containers first; returns what could not be removed, with why."""
    order = {"container": 0, "network": 1, "volume": 2}
    failed: list[str] = []
    for thing in sorted(things, key=lambda t: order[t.kind]):
        try:
            discard(lambda: _remove(client, thing))  # noqa: B023 -- called at once
        except APIError as error:
            failed.append(f"{thing.kind} {thing.name}: {error.explanation or error}")
    return failed


def _remove(client: docker.DockerClient, thing: Leftover) -> None:
    if thing.kind == "container":
        client.containers.get(thing.name).remove(force=True, v=True)
    elif thing.kind == "network":
        client.networks.get(thing.name).remove()
    else:
        client.volumes.get(thing.name).remove(force=True)


def discard(remove: Callable[[], object]) -> None:
    """Removes something from the engine by ``remove``.

    That it is gone already (404), or that its removal is under way (409: it was removed with its
    container, or ended by itself a moment ago), is what was wanted.

    Raises:
        docker.errors.APIError: the engine refused for another reason.
    """
    try:
        remove()
    except NotFound:
        return
    except APIError as error:
        if error.status_code != 409 or "already in progress" not in str(error):
            raise


def sees_this_disk(client: docker.DockerClient, image: str, folder: Path) -> bool:
    """Whether a bind mount of ``folder`` would show this machine's files to a container.

    It would not on another machine, nor where the harness runs in a container whose paths
    the engine does not share. Found out by making (never starting) a container with it.

    Raises:
        EngineError: the engine failed in another way, so this is not known.
    """
    mount = docker.types.Mount("/probe", str(folder), type="bind", read_only=True)
    marker = folder / f".probe-{os.getpid()}"
    marker.touch()
    container = None
    try:
        container = client.containers.create(
            image, ["true"], mounts=[mount], labels=labels("probe"), entrypoint=[]
        )
        container.get_archive(f"/probe/{marker.name}")
        return True
    except (DockerException, OSError) as error:
        if isinstance(error, APIError) and _is_another_disk(error, made=container is not None):
            return False
        raise EngineError(
            f"The Docker engine could not be asked whether it sees the disk of this machine: "
            f"{error}."
        ) from None
    finally:
        marker.unlink(missing_ok=True)
        if container is not None:
            with suppress(DockerException, OSError):
                container.remove(force=True)


#: How engines refuse to make a container whose mount has a source that they do not have: Docker,
#: Podman, Docker Desktop.
_NO_SUCH_SOURCE = ("bind source path does not exist", "no such file or directory", "mounts denied")


def _is_another_disk(error: APIError, *, made: bool) -> bool:
    """Whether this refusal means that the engine's disk is not this machine's."""
    said = str(error.explanation or error).lower()
    if made:
        # The folder is there, by chance, and the file in it is not.
        return error.status_code == 404 and "no such container" not in said
    return any(words in said for words in _NO_SUCH_SOURCE)


def seconds_since(engine_time: str) -> float | None:
    """Seconds since a time as an engine writes it: RFC 3339 with nanoseconds, in UTC or
    (Podman) with an offset. ``None`` for a time that was never set or cannot be read."""
    found = re.fullmatch(
        r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)", engine_time
    )
    if found is None or engine_time.startswith("0001-"):
        return None
    whole, fraction, zone = found.groups()
    then = datetime.fromisoformat(whole + zone.replace("Z", "+00:00")).timestamp()
    return datetime.now(timezone.utc).timestamp() - then - float(f"0.{fraction or 0}")


def about(client: docker.DockerClient) -> dict[str, Any]:
    """What the engine reports about itself, for the verdict's environment."""
    info = client.info()
    return {
        "engine": info.get("ServerVersion"),
        "storage": info.get("Driver"),
        "cgroup": info.get("CgroupVersion"),
        "runtimes": sorted(info.get("Runtimes") or {}),
        "cpus": info.get("NCPU"),
        "memory_bytes": info.get("MemTotal"),
        "operating_system": info.get("OperatingSystem"),
    }
