"""What every server in a container has in common, however the container was created."""

from __future__ import annotations

import socket
import time
import uuid
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import docker
from docker.errors import APIError, DockerException, NotFound
from docker.models.containers import Container
from docker.types import Mount
from testcontainers.core.docker_client import DockerClient

from sglang_harness._base.teardown import Teardown
from sglang_harness.errors import EngineError
from sglang_harness.memory import MemorySource
from sglang_harness.memory.host.container import ContainerMemory
from sglang_harness.runtime import Started, cpu_binding, engine, images
from sglang_harness.runtime.death import Death, DeathWatch, Unknown, read_death
from sglang_harness.runtime.sidecar import ContainerSidecar, make_temporary_volume
from sglang_harness.spec import ServerSpec

#: Where SGLang listens inside the containers that the harness sets up itself.
PORT = 30000

#: Seconds before a wait for a container's end is begun again after its connection was cut.
LOOK_AGAIN = 1.0


class RunningContainer:
    """Address, death, log, memory and end of a server in a container.

    A subclass makes the container, puts it into ``_container``, and sets ``_watch`` once it runs.
    """

    spec: ServerSpec
    image: str
    """What it runs from, as it was named."""
    api_key: str | None
    port: int = PORT
    """The server's port inside the container."""
    device: Literal["cpu", "gpu"]
    run_id: str
    started: Started = Started("cold")
    owned = True
    may_change = True
    _temporary: Any = None
    """The volume of :func:`make_temporary_volume`, where the server got one."""
    _container: Container | None = None
    _address: str | None = None
    _watch: DeathWatch | None = None
    _exit_code: int | None = None
    _logs_at_end: str | None = None

    @cached_property
    def _failures(self) -> list[str]:
        """What :meth:`end` could not do."""
        return []

    @cached_property
    def _beside(self) -> list[ContainerSidecar]:
        return []

    @cached_property
    def _engine(self) -> docker.DockerClient:
        return engine.connect()

    def _wait_for_death(self) -> Death | Unknown:
        name = self._id
        try:
            # Its own client: this one waits without a time-out in a thread of its own.
            with closing(docker.from_env(timeout=None)) as client:  # type: ignore[arg-type]
                container = client.containers.get(name)
                while not _has_ended(container):
                    time.sleep(LOOK_AGAIN)
                return self._read_death(container)
        except NotFound:
            return Unknown("its container was removed from outside this run")
        except (DockerException, OSError) as error:
            return Unknown(f"the Docker engine stopped answering ({error})")

    def _read_death(self, container: Container) -> Death | Unknown:
        log = self.spec.redactor(self.api_key).text(container.logs().decode(errors="replace"))
        container.reload()
        state = container.attrs["State"]
        if state.get("Status") == "removing":
            # Killed in order to be removed ('docker rm --force').
            raise NotFound("the container is being removed")
        death = read_death(state["ExitCode"], bool(state.get("OOMKilled")), log)
        noticed = engine.seconds_since(str(state.get("FinishedAt")))
        return replace(death, noticed_after=noticed)

    @property
    def watch(self) -> DeathWatch:
        if self._watch is None:
            raise EngineError("The container was not started.")
        return self._watch

    @property
    def _id(self) -> str:
        if self._container is None or self._container.id is None:
            raise EngineError("There is no container: it was not created, or is removed already.")
        return self._container.id

    @property
    def address(self) -> str:
        """Base URL of the server, as seen from here; looked up once."""
        if self._address is None:
            self._address = self._find_address()
        return self._address

    def _find_address(self) -> str:
        assert self._container is not None
        self._container.reload()
        settings = self._container.attrs["NetworkSettings"]
        bindings = settings["Ports"].get(f"{self.port}/tcp")
        if not bindings:
            raise EngineError("The container ended before its port was published.")
        port = int(bindings[0]["HostPort"])
        if engine.is_remote():
            asked = DockerClient()
            with closing(asked.client):
                return f"http://{asked.host()}:{port}"
        everywhere = self.spec.publish_on == "0.0.0.0"  # noqa: S104 -- an address to replace
        host = "127.0.0.1" if everywhere else self.spec.publish_on
        inside = next((n["IPAddress"] for n in settings["Networks"].values() if n["IPAddress"]), "")
        # From a container of its own the harness does not reach the host's loopback.
        if engine.in_container() and inside and not _accepts(host, port):
            return f"http://{inside}:{self.port}"
        return f"http://{host}:{port}"

    def logs(self, *, tail: int | None = None) -> str:
        if self._logs_at_end is not None:
            lines = self._logs_at_end.splitlines()
            return "\n".join(lines if tail is None else lines[-tail:])
        if self._container is None:
            return ""
        try:
            raw = self._container.logs(tail="all" if tail is None else tail)
        except (APIError, OSError):
            return ""
        return str(raw.decode(errors="replace"))

    def inspect(self) -> dict[str, Any]:
        attributes = self._engine.api.inspect_container(self._id)
        host = attributes["HostConfig"]
        return {
            "container": attributes["Name"].lstrip("/"),
            "image": self.image,
            "digest": images.digest(self._engine, self.image),
            "command": attributes["Config"]["Cmd"],
            "user": attributes["Config"]["User"] or "root",
            "init": host["Init"],
            "ipc_mode": host["IpcMode"],
            "shm_size": host["ShmSize"],
            "read_only_root": host["ReadonlyRootfs"],
            "cap_drop": host["CapDrop"] or [],
            "security_opt": host["SecurityOpt"] or [],
            "ulimits": host["Ulimits"] or [],
            "device_requests": host["DeviceRequests"] or [],
            "memory_limit": host["Memory"],
            "ports": host["PortBindings"],
        }

    def host_pids(self) -> list[int]:
        if self._container is None or engine.is_remote():
            return []
        try:
            table = self._container.top()
        except APIError:
            return []
        column = table["Titles"].index("PID")
        pids = [int(row[column]) for row in table["Processes"]]
        # The engine's numbers mean these processes only where this is the engine's host.
        return [pid for pid in pids if _belongs_to(pid, self._id)]

    def memory(self) -> list[MemorySource]:
        return [ContainerMemory(self.stats)]

    def stats(self) -> dict[str, Any]:
        """The engine's counters for the container, now."""
        return dict(self._engine.api.stats(self._id, stream=False, one_shot=True))

    def _make_temporary(self, name: str, *, held: bool) -> Mount:
        """The volume for ``TMPDIR``; goes with the server."""
        self._temporary, mount = make_temporary_volume(
            self._engine, f"{name}-tmp", engine.labels(self.run_id, held=held)
        )
        return mount

    def _remove_temporary(self) -> None:
        volume = self._temporary
        if volume is not None:
            engine.discard(lambda: volume.remove(force=True))

    def cores(self) -> list[int]:
        return cpu_binding.cores_of(self._engine)

    def why_no_files(self) -> str | None:
        return None

    def why_no_sidecar(self) -> str | None:
        try:
            host = self._engine.api.inspect_container(self._id)["HostConfig"]
        except (EngineError, DockerException, OSError):
            return None  # starting one will tell
        if host["IpcMode"] in ("private", "none"):
            return f"the server's container does not share its memory (ipc: {host['IpcMode']})"
        return None

    def start_sidecar(self, script: str) -> ContainerSidecar:
        """A sidecar of this image: see
        :class:`sglang_harness.runtime.Running`."""
        if reason := self.why_no_sidecar():
            raise EngineError(
                f"No sidecar can be started: {reason}.",
                advice="Set 'ipc: shareable' for the service in your compose file.",
            )
        attributes = self._engine.api.inspect_container(self._id)
        made = ContainerSidecar(
            attributes,
            script,
            name=f"{attributes['Name'].lstrip('/')}-peer-{uuid.uuid4().hex[:6]}",
            labels=engine.labels(self.run_id),
            temporary=self._temporary.name if self._temporary is not None else None,
            shares_processes=self.device == "gpu",
        )
        self._beside.append(made)
        return made

    def end(self, *, at_once: bool = False) -> int | None:
        """Ends the server within ``limits.stop`` seconds, or at once, and removes what belongs
        to it.

        Every step is tried, whatever became of the others; what failed is in ``_failures``, for
        ``left_behind``.

        Returns its exit code; ``None`` where the engine could not tell. Again: the same.
        """
        if self._watch is not None and self._watch.ended is None:
            self._watch.expected = True
        with Teardown(self._failures) as down:
            while self._beside:
                peer = self._beside.pop()
                down.collect(f"sidecar {peer.name}", peer.end)
            if self._container is not None:
                container, self._container = self._container, None
                name = f"container {container.name}"
                seconds = 0 if at_once else int(self.spec.limits.stop)
                down.step(
                    f"stopping the {name}",
                    lambda: engine.discard(lambda: self._stop_container(container, seconds)),
                )
                down.step(
                    name, lambda: engine.discard(lambda: container.remove(force=True, v=True))
                )
                self._logs_at_end = self._logs_at_end or ""
            down.collect("the server's folder or volume", self._clear_away)
            down.step("the volume for temporary files", self._remove_temporary)
            down.step("the engine's client", self._close_engine)
        return self._exit_code

    def _stop_container(self, container: Container, seconds: int) -> None:
        container.stop(timeout=seconds)
        self._logs_at_end = container.logs().decode(errors="replace")
        container.reload()
        self._exit_code = container.attrs["State"]["ExitCode"]

    def _clear_away(self) -> list[str]:
        """Removes what belongs to the server apart from its container; returns what could not be
        removed."""
        return []

    def _close_engine(self) -> None:
        # Whoever asks again gets another.
        if (client := self.__dict__.pop("_engine", None)) is not None:
            client.close()


def _has_ended(container: Container) -> bool:
    """Waits until the container has ended; false where only the wait has.

    A proxy before the engine may cut a connection on which nothing is said for long: then the
    engine is asked, and waited for again.
    """
    try:
        container.wait(timeout=None)
    except NotFound:
        raise
    except (DockerException, OSError):
        container.reload()
        return container.status in ("exited", "dead", "removing")
    return True


def _accepts(host: str, port: int) -> bool:
    """Whether something takes connections there."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def _belongs_to(pid: int, container_id: str) -> bool:
    """Whether a process of this machine is in a container, by its control groups."""
    try:
        return container_id in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8")
    except OSError:
        return False
