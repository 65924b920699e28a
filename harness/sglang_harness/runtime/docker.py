"""A server in a container of its own, by Testcontainers."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import docker
from docker.errors import APIError, DockerException, NotFound
from docker.types import DeviceRequest, Mount, Ulimit
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer, Reaper

from sglang_harness import device as devices
from sglang_harness.errors import EngineError, SpecError
from sglang_harness.permissions import make_readable
from sglang_harness.runtime import engine, images
from sglang_harness.runtime.death import Death, DeathWatch, read_death
from sglang_harness.secrets import new_api_key
from sglang_harness.spec import ServerSpec, command_line

PORT = 30000
EXCHANGE = PurePosixPath("/exchange")
MODELS = PurePosixPath("/models")

#: Hands the API key to SGLang from the environment: SGLang itself only takes it as an
#: argument, where every process list would show it. Runs in any image that has SGLang.
LAUNCHER = (
    "import os, runpy, sys; "
    "sys.argv = ['sglang.launch_server', *sys.argv[1:], "
    "'--api-key', os.environ.pop('SGLANG_HARNESS_API_KEY')]; "
    "runpy.run_module('sglang.launch_server', run_name='__main__', alter_sys=True)"
)


class SGLangServerContainer(DockerContainer):  # type: ignore[misc]
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
        self.device = device
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self.held = held
        self.api_key = new_api_key()
        self._model = model
        self._model_inside: str | None = None
        self._stopped: int | None = None
        self._logs_at_stop: str | None = None
        self.watch: DeathWatch | None = None
        self.reach: FolderReach | VolumeReach | None = None
        # Hardening that would change somebody else's image is left to images made for it.
        ours = self._engine.images.get(image).labels.get(images.LABEL_DEVICE) == "cpu"
        self.with_command(self._command_words()).with_name(f"sglang-harness-{uuid.uuid4().hex[:8]}")
        self.ports = {f"{PORT}/tcp": (spec.publish_on, spec.port)}  # type: ignore[dict-item]
        self.env = self._environment()
        self._kwargs = {
            "entrypoint": ["python3", "-c", LAUNCHER],
            "labels": engine.labels(self.run_id),
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
        key = {"SGLANG_HARNESS_API_KEY": self.api_key}
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
        limits = [Ulimit(name="memlock", soft=-1, hard=-1), Ulimit(name="stack", soft=67108864, hard=67108864)]
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
        self.reach, own_mounts = self._make_reach()
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
            self.reach.close()
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
        volume = VolumeReach(self._engine, self.image, engine.labels(self.run_id))
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
        try:
            with self._reaper():
                self.create()
            assert self._container is not None
            self._container.start()
            self.watch = DeathWatch(self._wait_for_death)
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
        assert self._container is not None
        try:
            client = docker.from_env(timeout=None)
            container = client.containers.get(self._container.id)
            container.wait(timeout=None)
            log = container.logs().decode(errors="replace")
            state = client.api.inspect_container(container.id)["State"]
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
    def address(self) -> str:
        """Base URL of the server, as seen from here."""
        assert self._container is not None
        self._container.reload()
        settings = self._container.attrs["NetworkSettings"]
        if engine.in_container() and not engine.is_remote():
            # A port published on the engine host's loopback is out of reach from a container.
            networks = settings["Networks"].values()
            if ip := next((n["IPAddress"] for n in networks if n["IPAddress"]), None):
                return f"http://{ip}:{PORT}"
        bindings = settings["Ports"].get(f"{PORT}/tcp")
        if not bindings:
            raise EngineError("The container ended before its port was published.")
        host = self.get_container_host_ip() if engine.is_remote() else self.spec.publish_on
        return f"http://{'127.0.0.1' if host in ('0.0.0.0', 'localhost') else host}:{bindings[0]['HostPort']}"  # noqa: S104

    def logs(self, *, tail: int | None = None) -> str:
        if self._logs_at_stop is not None:
            lines = self._logs_at_stop.splitlines()
            return "\n".join(lines if tail is None else lines[-tail:])
        if self._container is None:
            return ""
        try:
            raw = self._container.logs(tail="all" if tail is None else tail)
        except (APIError, OSError):
            return ""
        return str(raw.decode(errors="replace"))

    def inspect(self) -> dict[str, Any]:
        assert self._container is not None
        attributes = self._engine.api.inspect_container(self._container.id)
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
        if self._container is None or engine.is_remote() or engine.in_container():
            return []
        try:
            table = self._container.top()
        except APIError:
            return []
        column = table["Titles"].index("PID")
        return [int(row[column]) for row in table["Processes"]]

    def stats(self) -> dict[str, Any]:
        """The engine's counters for the container, now."""
        assert self._container is not None
        return dict(self._engine.api.stats(self._container.id, stream=False, one_shot=True))

    def left_behind(self) -> list[str]:
        """What of this server is still on the engine or on disk after ``stop``."""
        mine = {self._name, *([self.reach.name] if isinstance(self.reach, VolumeReach) else [])}
        client = engine.connect()
        try:
            found = [f"{t.kind} {t.name}" for t in engine.ours(client) if t.name in mine]
        finally:
            client.close()
        if isinstance(self.reach, FolderReach) and self.reach.folder.exists():
            found.append(str(self.reach.folder))
        return found

    def stop(self, force: bool = True, delete_volume: bool = True) -> int | None:
        """Ends the server within ``limits.stop`` seconds and removes what belongs to it."""
        del force, delete_volume  # Testcontainers' words; a server always ends politely first
        if self.watch is not None:
            already = self.watch.death
            self.watch.expected = already is None
        if self._container is not None:
            container, self._container = self._container, None
            try:
                container.stop(timeout=int(self.spec.limits.stop))
                self._logs_at_stop = container.logs().decode(errors="replace")
                container.reload()
                self._stopped = container.attrs["State"]["ExitCode"]
            except (APIError, OSError):
                self._logs_at_stop = self._logs_at_stop or ""
            finally:
                try:
                    container.remove(force=True, v=True)
                except NotFound:
                    pass
        if self.reach is not None:
            self.reach.close()
        return self._stopped


class FolderReach:
    """Local folders, bind-mounted read-only: the model and a folder for exchange."""

    def __init__(self, model: Path | None) -> None:
        self._model = model
        self.folder = Path(tempfile.mkdtemp(prefix="sglang-harness-exchange-"))
        self.folder.chmod(0o755)

    def mounts(self) -> list[Mount]:
        mounts = [Mount(str(EXCHANGE), str(self.folder), type="bind", read_only=True)]
        if self._model is not None:
            inside = str(MODELS / self._model.name)
            mounts.append(Mount(inside, str(self._model), type="bind", read_only=True))
        return mounts

    def share(self, path: Path) -> PurePosixPath:
        """The path inside; copied into the exchange folder where it lies elsewhere."""
        path = path.resolve()
        if path.is_relative_to(self.folder):
            return EXCHANGE / path.relative_to(self.folder)
        if self._model is not None and path.is_relative_to(self._model.resolve()):
            return MODELS / self._model.name / path.relative_to(self._model.resolve())
        copy = self.folder / f"{path.name}-{uuid.uuid4().hex[:6]}"
        if path.is_dir():
            shutil.copytree(path, copy)
        else:
            shutil.copy2(path, copy)
        make_readable(copy)
        return EXCHANGE / copy.name

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class VolumeReach:
    """A named volume, filled over the engine's API: works for an engine anywhere."""

    def __init__(self, client: docker.DockerClient, image: str, labels: dict[str, str]) -> None:
        self._client = client
        self._volume = client.volumes.create(
            name=f"sglang-harness-{uuid.uuid4().hex[:8]}", labels=labels
        )
        self.name = str(self._volume.name)
        # Never started: the engine fills a volume through any container that mounts it.
        self._helper = client.containers.create(
            image,
            ["true"],
            entrypoint=[],
            labels=labels,
            mounts=[Mount(str(EXCHANGE), self._volume.name, type="volume")],
        )

    def mounts(self) -> list[Mount]:
        return [Mount(str(EXCHANGE), self._volume.name, type="volume", read_only=True)]

    def share(self, path: Path) -> PurePosixPath:
        return self.upload(path, PurePosixPath(f"{path.name}-{uuid.uuid4().hex[:6]}"))

    def upload(self, path: Path, name: PurePosixPath) -> PurePosixPath:
        """Copies a file or folder into the volume; returns its path inside the server."""

        def readable(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mode |= 0o555 if member.isdir() else 0o444
            member.uid = member.gid = 0
            member.uname = member.gname = "root"
            return member

        with tempfile.TemporaryFile() as packed:
            with tarfile.open(fileobj=packed, mode="w", dereference=True) as tar:
                tar.add(path, arcname=str(name), filter=readable)
            packed.seek(0)
            if not self._helper.put_archive(str(EXCHANGE), io.BufferedReader(packed)):  # type: ignore[arg-type]
                raise EngineError(f"The engine did not take {path} into the volume.")
        return EXCHANGE / name

    def close(self) -> None:
        for remove in (lambda: self._helper.remove(force=True), lambda: self._volume.remove(force=True)):
            try:
                remove()
            except NotFound:
                pass


def prepare(
    spec: ServerSpec, say: Callable[[str], None]
) -> tuple[Literal["cpu", "gpu"], str]:
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

