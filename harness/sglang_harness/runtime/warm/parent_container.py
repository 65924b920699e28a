"""A preloaded parent in a container; its servers run in that container, each on its own port."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import docker
from docker.errors import APIError, DockerException, NotFound
from docker.types import DriverConfig, Mount

from sglang_harness._base.teardown import Teardown
from sglang_harness.errors import EngineError
from sglang_harness.runtime import cpu_binding, engine, images
from sglang_harness.runtime.attached import AttachedContainer
from sglang_harness.runtime.path_map import EXCHANGE, MODELS, FolderReach
from sglang_harness.runtime.ports import Port
from sglang_harness.runtime.sidecar import TEMPORARY, ContainerSidecar
from sglang_harness.runtime.warm.parents import (
    Folders,
    Parent,
    Say,
    new_name,
    new_root,
    place,
    until_it_listens,
)
from sglang_harness.runtime.warm.protocol import Preloaded, Recipe, script

#: Ports inside the container. As :data:`sglang_harness.runtime.ports.CANDIDATES`: with all that
#: SGLang derives from them below the range that the kernel assigns to clients (32768), and apart.
PORTS = tuple(range(12000, 20000, 500))

#: Shared by all servers of a container: an upper bound, not a reservation.
SHM_SIZE = "8g"


class ContainerParent(Parent):
    """A parent that was started by this process, or a kept one that was found."""

    @cached_property
    def _engine(self) -> docker.DockerClient:
        return engine.connect()

    @cached_property
    def _attributes(self) -> dict[str, Any]:
        return dict(self._engine.api.inspect_container(self.name))

    def address_words(self) -> tuple[list[str], Port | None]:
        return ["--host", "0.0.0.0", "--port", "{port}"], None  # noqa: S104 -- inside the container

    def address(self, port: int) -> str:
        bindings = self._attributes["NetworkSettings"]["Ports"].get(f"{port}/tcp")
        if not bindings:
            raise EngineError(f"The container {self.name} does not publish port {port}.")
        return f"http://127.0.0.1:{bindings[0]['HostPort']}"

    def temporary(self, name: str) -> PurePosixPath:
        return TEMPORARY / name

    def cores(self) -> list[int]:
        return cpu_binding.cores_of(self._engine)

    def share_model(self, model: Path) -> PurePosixPath:
        return self.folders.models / place(model, self.folders.root / "models")

    def reach(self, name: str, model: Path, inside: PurePosixPath) -> FolderReach:
        folder = self.folders.root / "exchange" / name
        folder.mkdir()
        folder.chmod(0o755)
        return FolderReach(
            model, folder=folder, inside=self.folders.exchange / name, model_inside=inside
        )

    def host_pids(self, pids: Sequence[int]) -> list[int]:
        try:
            table = self._engine.api.top(self.name)
        except APIError:
            return []
        column = table["Titles"].index("PID")
        by_inside = {}
        for row in table["Processes"]:
            if inside := _number_inside(int(row[column])):
                by_inside[inside] = int(row[column])
        return [by_inside[pid] for pid in pids if pid in by_inside]

    def start_sidecar(self, name: str, script: str, *, run_id: str) -> ContainerSidecar:
        (temporary,) = [m for m in self._attributes["Mounts"] if m["Destination"] == str(TEMPORARY)]
        return ContainerSidecar(
            self._attributes,
            script,
            name=f"{name}-peer-{uuid.uuid4().hex[:6]}",
            labels=engine.labels(run_id),
            temporary=temporary["Name"],
            shares_processes=False,
            folder=self.temporary(name),
        )

    def peers_left(self, name: str) -> list[str]:
        with suppress(DockerException):
            return [
                f"{t.kind} {t.name}"
                for t in engine.ours(self._engine)
                if t.name.startswith(f"{name}-peer-")
            ]
        return []

    def about(self) -> dict[str, Any]:
        made = self._attributes
        host = made["HostConfig"]
        image = made["Config"]["Image"]
        return {
            "container": self.name,
            "image": image,
            "digest": images.digest(self._engine, image),
            "user": made["Config"]["User"] or "root",
            "init": host.get("Init"),
            "ipc_mode": host.get("IpcMode"),
            "shm_size": host.get("ShmSize"),
            "read_only_root": host.get("ReadonlyRootfs"),
            "cap_drop": host.get("CapDrop") or [],
            "security_opt": host.get("SecurityOpt") or [],
            "memory_limit": host.get("Memory"),
        }

    def close_place(self) -> None:
        if (client := self.__dict__.pop("_engine", None)) is not None:
            client.close()

    def end_place(self) -> list[str]:
        return self.program.end() if self.program is not None else remove(self.name)


def make(recipe: Recipe, image: str, *, run_id: str, say: Say) -> ContainerParent:
    """A parent for this run, ready to fork; it ends with this process.

    Raises:
        EngineError: the engine refused, or SGLang could not be imported.
    """
    name = new_name()
    folders = _folders(new_root())
    began = time.monotonic()
    say("starting a parent for warm servers; it imports SGLang once")
    container: AttachedContainer | None = None
    preloaded: Preloaded | None = None
    try:
        folders.make()
        container = AttachedContainer(
            "The preloaded parent",
            name,
            **_how(recipe, image, folders, labels=engine.labels(run_id)),
        )
        preloaded = Preloaded(container)
        preloaded.wait_until_ready()
    except BaseException:
        with Teardown() as down:
            if container is not None:
                down.collect(name, container.end)
            down.step("shared folder", folders.remove)
        raise
    say(f"the parent is ready after {time.monotonic() - began:.1f} s")
    return ContainerParent(name, preloaded, folders, recipe, kept=False, program=container)


def make_kept(recipe: Recipe, image: str, *, run_id: str, idle: float) -> tuple[str, Folders]:
    """A parent that outlives this process, and ends by itself after ``idle`` seconds without use.

    Raises:
        EngineError: the engine refused, or SGLang could not be imported.
    """
    name = new_name()
    client = engine.connect()
    folders = _folders(new_root())
    try:
        folders.make()
        how = _how(recipe, image, folders, labels=engine.labels(run_id, held=True))
        how["command"] += [
            *("--listen", str(folders.control / "socket"), "--idle", f"{idle:g}"),
            *("--log", str(folders.logs / "parent.log")),
        ]
        try:
            container = client.containers.create(name=name, auto_remove=True, **how)
            container.start()
        except DockerException as error:
            reason = getattr(error, "explanation", None) or error
            raise EngineError(f"The preloaded parent could not be started: {reason}.") from None
        until_it_listens(folders, lambda: _runs(client, name))
    except BaseException:
        with Teardown() as down:
            down.step(name, lambda: remove(name))
            down.step("shared folder", folders.remove)
        raise
    finally:
        client.close()
    return name, folders


def find(name: str, root: Path, recipe: Recipe) -> ContainerParent:
    """A kept parent. Raises :class:`EngineError`: it has ended."""
    return ContainerParent.found(name, _folders(root), recipe)


def remove(name: str) -> list[str]:
    """Removes a parent's container and what goes with it; returns what could not be removed."""
    with Teardown() as down:
        down.step(f"container {name}", lambda: _remove(name))
    return down.failures


def _remove(name: str) -> None:
    with closing(engine.connect()) as client:
        engine.discard(lambda: client.containers.get(name).remove(force=True, v=True))


def _folders(root: Path) -> Folders:
    return Folders(
        root,
        exchange=EXCHANGE,
        models=MODELS,
        logs=PurePosixPath("/sglang-harness-logs"),
        control=PurePosixPath("/sglang-harness-control"),
    )


def _how(recipe: Recipe, image: str, folders: Folders, *, labels: dict[str, str]) -> dict[str, Any]:
    root = folders.root
    return {
        "image": image,
        "entrypoint": ["python3", "-c", script()],
        "command": ["--ports", ",".join(map(str, PORTS))],
        "environment": {**dict(recipe.environment), "TMPDIR": str(TEMPORARY)},
        "labels": labels,
        "init": True,
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "tmpfs": {"/tmp": "rw,exec,nosuid,nodev,size=8g,mode=1777"},  # noqa: S108
        "shm_size": SHM_SIZE,
        "ipc_mode": "shareable",
        "pids_limit": 32768,
        "ports": {f"{port}/tcp": ("127.0.0.1", None) for port in PORTS},
        "mounts": [
            Mount(str(folders.exchange), str(root / "exchange"), type="bind", read_only=True),
            Mount(str(folders.models), str(root / "models"), type="bind", read_only=True),
            Mount(str(folders.logs), str(root / "logs"), type="bind"),
            Mount(str(folders.control), str(root / "control"), type="bind"),
            # An anonymous volume is removed with the container, by whatever removes that.
            Mount(
                str(TEMPORARY),
                None,
                type="volume",
                labels=labels,
                driver_config=DriverConfig(
                    "local", {"type": "tmpfs", "device": "tmpfs", "o": "mode=1777,size=4g"}
                ),
            ),
        ],
    }


def _runs(client: docker.DockerClient, name: str) -> bool:
    try:
        return bool(client.containers.get(name).status in ("created", "running"))
    except NotFound:
        return False


def _number_inside(pid: int) -> int | None:
    """A process's number in its own namespace; ``None`` where it has gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    except OSError:
        pass
    return None
