"""A server in a container of its own, by Testcontainers."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

import docker
from docker.errors import APIError, DockerException, NotFound
from docker.types import DeviceRequest, Mount, Ulimit
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer, Reaper

from sglang_harness import device as devices
from sglang_harness import shipped
from sglang_harness.errors import EngineError, SpecError
from sglang_harness.memory.container import ContainerMemory
from sglang_harness.permissions import check_readable
from sglang_harness.runtime import engine, images
from sglang_harness.runtime.death import Death, DeathWatch, read_death
from sglang_harness.runtime.reach import MODELS, FolderReach, VolumeReach
from sglang_harness.secrets import Redactor, new_api_key
from sglang_harness.spec import ServerSpec, command_line

PORT = 30000


class SGLangServerContainer(DockerContainer):
    """A Testcontainers container that runs SGLang as ``spec`` says.

    ``start`` returns when the container runs; a server that answers is another matter: see
    :class:`sglang_harness.SGLangContainer`, which waits for it. Loopback only, a fresh API
    key, no privileges, model mounted read-only.

    Args:
        spec: what to run.
        model: the model's folder on this machine, or ``None`` for a name on the hub.
        image: an image that is on the engine.
        device: what ``spec.device`` turned out to mean.
        run_id: goes into the labels, so that a whole run can be found and removed.
        held: the container is meant to outlive this process, so no reaper may take it.
    """

    def __init__(
        self,
        spec: ServerSpec,
        *,
        model: Path | None,
        image: str,
        device: Literal["cpu", "gpu"],
        run_id: str | None = None,
        held: bool = False,
    ) -> None:
        super().__init__(image)
        self.spec = spec
        self.device: Literal["cpu", "gpu"] = device
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self.held = held
        self.api_key = new_api_key()
        self._model = model
        self._model_inside: str | None = None
        self._exit_code: int | None = None
        self._logs_at_end: str | None = None
        self.started_at = 0.0
        """``time.monotonic()`` when ``start`` was called."""
        self._address: str | None = None
        self._watch: DeathWatch | None = None
        self._reach: FolderReach | VolumeReach | None = None
        # Hardening that would change somebody else's image is left to images made for it.
        ours = self._engine.images.get(image).labels.get(images.LABEL_DEVICE) == "cpu"
        self.with_command(self._command_words()).with_name(f"sglang-harness-{uuid.uuid4().hex[:8]}")
        self.ports = {f"{PORT}/tcp": (spec.publish_on, spec.port)}  # type: ignore[dict-item]
        self.env = self._environment()
        self._kwargs = {
            # Handed over as text: works in any image, with an engine anywhere.
            "entrypoint": ["python3", "-c", _launcher()],
            "labels": engine.labels(self.run_id, held=held),
            "init": True,
            "shm_size": spec.shm_size,
            "security_opt": ["no-new-privileges:true"],
            "ipc_mode": "shareable",
            "pids_limit": 4096,
            **({"mem_limit": spec.memory, "memswap_limit": spec.memory} if spec.memory else {}),
            **(self._cpu_kwargs() if ours else {}),
            **(self._gpu_kwargs() if device == "gpu" else {}),
        }

    @property
    def _engine(self) -> docker.DockerClient:
        return self.get_docker_client().client

    def _environment(self) -> dict[str, str]:
        passed = {n: os.environ[n] for n in self.spec.pass_environment if n in os.environ}
        # A read-only root with a model on disk must not look for a hub.
        offline = {"HF_HUB_OFFLINE": "1"} if self._model is not None else {}
        cache = {"HF_HOME": "/hub"} if self.spec.hub_cache else {}
        key = {"SGLANG_API_KEY": self.api_key}
        return {**offline, **cache, **passed, **self.spec.environment, **key}

    def _command_words(self) -> list[str]:
        return [
            *("--model-path", self.model_path()),
            *("--host", "0.0.0.0", "--port", str(PORT)),  # noqa: S104 -- inside the container
            *(("--device", "cpu") if self.device == "cpu" else ()),
            *command_line(self.spec.arguments(self.device)),
        ]

    @staticmethod
    def _cpu_kwargs() -> dict[str, Any]:
        return {
            "read_only": True,
            "cap_drop": ["ALL"],
            "tmpfs": {"/tmp": "rw,exec,nosuid,nodev,size=2g,mode=1777"},  # noqa: S108
        }

    def _gpu_kwargs(self) -> dict[str, Any]:
        wanted = self.spec.gpus
        request = (
            DeviceRequest(count=-1, capabilities=[["gpu"]])
            if wanted == "all"
            else DeviceRequest(device_ids=wanted.split(","), capabilities=[["gpu"]])
        )
        # As SGLang's own compose file sets them; NCCL pins memory.
        limits = [
            Ulimit(name="memlock", soft=-1, hard=-1),
            Ulimit(name="stack", soft=67108864, hard=67108864),
        ]
        return {"device_requests": [request], "ulimits": limits}

    def model_path(self) -> str:
        """The model as the server names it: a path inside, or a name on the hub."""
        if self._model_inside is not None:
            return self._model_inside
        return str(MODELS / self._model.name) if self._model is not None else self.spec.model

    def create(self) -> None:
        """Makes the container without starting it; what cannot be started can be read back.

        Raises:
            EngineError: the engine refused.
            SpecError: the port is taken.
        """
        kwargs = dict(self._kwargs)
        tmpfs = {**self.tmpfs, **kwargs.pop("tmpfs", {})}
        mounts = kwargs.pop("mounts", [])
        self._reach, own_mounts = self._make_reach()
        if self.spec.hub_cache is not None:
            own_mounts.append(Mount("/hub", str(self.spec.hub_cache.resolve()), type="bind"))
        try:
            self._container = self.get_docker_client().create(
                self.image,
                command=self._command,
                environment=self.env,
                ports=self.ports,
                name=self._name,
                tmpfs=tmpfs,
                mounts=[*mounts, *own_mounts],
                **kwargs,
            )
        except BaseException as error:
            self._reach.close()
            if isinstance(error, APIError):
                raise EngineError(
                    f"The engine refused to make the container: {error.explanation}."
                ) from None
            raise

    def _make_reach(self) -> tuple[FolderReach | VolumeReach, list[Mount]]:
        how = self.spec.model_mount
        folder = FolderReach(self._model)
        try:
            if how == "bind" or (
                how == "auto" and engine.sees_this_disk(self._engine, self.image, folder.folder)
            ):
                return folder, folder.mounts()
        except BaseException:
            folder.close()
            raise
        folder.close()
        volume = VolumeReach(self._engine, self.image, engine.labels(self.run_id, held=self.held))
        try:
            mounts = volume.mounts()
            if self._model is not None:
                self._model_inside = str(volume.upload(self._model, PurePosixPath("model")))
                self.with_command(self._command_words())
        except BaseException:
            volume.close()
            raise
        return volume, mounts

    def start(self) -> SGLangServerContainer:
        """Makes and starts the container, then watches it.

        Raises:
            EngineError: the engine refused.
            SpecError: the port on the host is taken.
        """
        self.started_at = time.monotonic()
        try:
            with self._reaper():
                self.create()
            assert self._container is not None
            self._container.start()
            self._watch = DeathWatch(self._wait_for_death)
        except APIError as error:
            self.stop()
            reason = error.explanation or str(error)
            if "port is already allocated" in reason or "address already in use" in reason:
                raise SpecError(
                    f"Port {self.spec.port} on {self.spec.publish_on} is in use.",
                    advice="Choose another with --port, or leave it out for a free one.",
                ) from None
            raise EngineError(f"The engine could not start the container: {reason}.") from None
        except BaseException:
            self.stop()
            raise
        if self._wait_strategy is not None:
            try:
                self._wait_strategy.wait_until_ready(self)
            except BaseException:
                self.stop()
                raise
        return self

    @contextmanager
    def _reaper(self) -> Iterator[None]:
        # Testcontainers' reaper needs an image of its own; where that is not on the engine
        # already, 'sglang-harness sweep' does its work.
        wanted = not testcontainers_config.ryuk_disabled and not self.held
        if wanted and images.is_present(self._engine, testcontainers_config.ryuk_image):
            Reaper.get_instance()
        yield

    def _wait_for_death(self) -> Death:
        try:
            # Its own client: this one waits without a time-out in a thread of its own.
            client = docker.from_env(timeout=None)  # type: ignore[arg-type]
            container = client.containers.get(self._id)
            container.wait(timeout=None)
            log = Redactor(self.api_key).text(container.logs().decode(errors="replace"))
            container.reload()
            state = container.attrs["State"]
        except (DockerException, OSError) as error:
            if isinstance(error, NotFound):
                return Death(None, False, "its container was removed by somebody else", "", ())
            return Death(None, False, f"the Docker engine stopped answering ({error})", "", ())
        death = read_death(state["ExitCode"], bool(state["OOMKilled"]), log)
        return Death(**{**vars(death), "noticed_after": engine.seconds_since(state["FinishedAt"])})

    @property
    def runtime(self) -> str:
        return "docker"

    @property
    def watch(self) -> DeathWatch:
        if self._watch is None:
            raise EngineError("The container was not started.")
        return self._watch

    @property
    def reach(self) -> FolderReach | VolumeReach:
        if self._reach is None:
            raise EngineError("The container was not made.")
        return self._reach

    @property
    def _id(self) -> str:
        if self._container is None or self._container.id is None:
            raise EngineError("The container is not there: never made, or gone already.")
        return self._container.id

    @property
    def address(self) -> str:
        """Base URL of the server, as seen from here; found out once."""
        if self._address is None:
            self._address = self._find_address()
        return self._address

    def get_container_host_ip(self) -> str:
        """Where the server is reached from here; Testcontainers' own waits ask for it."""
        return str(urlsplit(self.address).hostname)

    def get_exposed_port(self, port: int) -> int:
        """The port to reach ``port`` of the container at, beside ``get_container_host_ip``."""
        if port == PORT:
            return int(urlsplit(self.address).port or port)
        return int(super().get_exposed_port(port))

    def _find_address(self) -> str:
        assert self._container is not None
        self._container.reload()
        settings = self._container.attrs["NetworkSettings"]
        bindings = settings["Ports"].get(f"{PORT}/tcp")
        if not bindings:
            raise EngineError("The container ended before its port was published.")
        port = int(bindings[0]["HostPort"])
        if engine.is_remote():
            return f"http://{super().get_container_host_ip()}:{port}"
        everywhere = self.spec.publish_on == "0.0.0.0"  # noqa: S104 -- an address to replace
        host = "127.0.0.1" if everywhere else self.spec.publish_on
        inside = next((n["IPAddress"] for n in settings["Networks"].values() if n["IPAddress"]), "")
        # From a container of its own the harness does not reach the host's loopback.
        if engine.in_container() and inside and not _accepts(host, port):
            return f"http://{inside}:{PORT}"
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

    def memory(self) -> ContainerMemory:
        return ContainerMemory(self.stats)

    def stats(self) -> dict[str, Any]:
        """The engine's counters for the container, now."""
        return dict(self._engine.api.stats(self._id, stream=False, one_shot=True))

    def left_behind(self) -> list[str]:
        """What of this server is still on the engine or on disk after ``stop``."""
        mine = {self._name, *([self._reach.name] if isinstance(self._reach, VolumeReach) else [])}
        client = engine.connect()
        try:
            found = [f"{t.kind} {t.name}" for t in engine.ours(client) if t.name in mine]
        finally:
            client.close()
        if isinstance(self._reach, FolderReach) and self._reach.folder.exists():
            found.append(str(self._reach.folder))
        return found

    def end(self) -> int | None:
        """Ends the server within ``limits.stop`` seconds and removes what belongs to it.

        Returns its exit code; ``None`` where the engine could not tell. Again: the same.
        """
        if self._watch is not None and self._watch.death is None:
            self._watch.expected = True
        if self._container is not None:
            container = self._container
            try:
                container.stop(timeout=int(self.spec.limits.stop))
                self._logs_at_end = container.logs().decode(errors="replace")
                container.reload()
                self._exit_code = container.attrs["State"]["ExitCode"]
            except (APIError, OSError):
                self._logs_at_end = self._logs_at_end or ""
            finally:
                with suppress(NotFound):
                    container.remove(force=True, v=True)
                self._container = None
        if self._reach is not None:
            self._reach.close()
        return self._exit_code

    def stop(self, force: bool = True, delete_volume: bool = True) -> None:
        """Testcontainers' word for :meth:`end`. A server always ends politely first."""
        del force, delete_volume
        self.end()


class DockerRuntime:
    """Servers in containers of their own."""

    name = "docker"

    def prepare(
        self,
        spec: ServerSpec,
        *,
        model: Path | None,
        run_id: str,
        held: bool,
        say: Callable[[str], None],
    ) -> SGLangServerContainer:
        """See :class:`sglang_harness.runtime.Runtime`."""
        if model is not None:
            check_readable(model)
        device, image = prepare(spec, say)
        say(f"starting {spec.model} on {image.rsplit('/', 1)[-1]} ({device})")
        return SGLangServerContainer(
            spec, model=model, image=image, device=device, run_id=run_id, held=held
        )


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


def _launcher() -> str:
    """Starts SGLang with its key from the environment: see ``docker/launch.py``."""
    return (shipped.root() / "docker" / "launch.py").read_text(encoding="utf-8")


def prepare(spec: ServerSpec, say: Callable[[str], None]) -> tuple[Literal["cpu", "gpu"], str]:
    """Finds the engine, the device and the image for ``spec``; returns device and image.

    Raises:
        EngineError, ImageError, SpecError: as they say.
    """
    client = engine.connect()
    try:
        chosen = devices.choose(spec, client.info())
        if engine.is_remote() and spec.publish_on.startswith("127."):
            raise SpecError(
                "The Docker engine is on another machine, and the server would be published "
                "on that machine's loopback, out of reach from here.",
                advice="Set publish_on to an address of that machine that you trust.",
            )
        return chosen, images.for_spec(spec, chosen, client, say)
    except DockerException as error:
        raise EngineError(f"The Docker engine failed: {error}.") from None
    finally:
        client.close()
