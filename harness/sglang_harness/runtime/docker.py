"""A server in a container of its own, by Testcontainers."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

import docker
from docker.errors import APIError, DockerException
from docker.types import DeviceRequest, Mount, Ulimit
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer, Reaper

from sglang_harness._base import assets
from sglang_harness._base.permissions import check_readable
from sglang_harness._base.secrets import new_api_key
from sglang_harness._base.temporary import within_temporary_folder
from sglang_harness.errors import EngineError, SpecError
from sglang_harness.runtime import Kind, Order, cpu_binding, engine, images
from sglang_harness.runtime import device as devices
from sglang_harness.runtime.container import PORT, RunningContainer
from sglang_harness.runtime.death import DeathWatch
from sglang_harness.runtime.path_map import MODELS, FolderReach, VolumeReach
from sglang_harness.runtime.sidecar import TEMPORARY
from sglang_harness.runtime.warm import kept_parents, parent_container
from sglang_harness.runtime.warm.parents import Parents
from sglang_harness.runtime.warm.protocol import Recipe
from sglang_harness.runtime.warm.server import WarmServer, alike, warm_or
from sglang_harness.spec import ServerSpec, command_line


class SGLangServerContainer(RunningContainer, DockerContainer):
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

    runtime = "docker"

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
        self.model = model
        self.arguments = spec.arguments(device)
        self._model_inside: str | None = None
        self.started_at = 0.0
        """``time.monotonic()`` when ``start`` was called."""
        self._reach: FolderReach | VolumeReach | None = None
        # Only images made for it are hardened: other images may not run that way.
        ours = self._engine.images.get(image).labels.get(images.LABEL_DEVICE) == "cpu"
        self._command = self._command_words()
        self._name = f"sglang-harness-{uuid.uuid4().hex[:8]}"
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

    @cached_property
    def _engine(self) -> docker.DockerClient:
        # Testcontainers has made one.
        return self.get_docker_client().client

    def _environment(self) -> dict[str, str]:
        key = {"SGLANG_API_KEY": self.api_key or ""}
        bound = {}
        if self.device == "cpu" and cpu_binding.ranks(self.arguments) > 1:
            bound = cpu_binding.binding(self.arguments, cpu_binding.cores_of(self._engine))
        # torch's shared memory is found by a socket in here: a sidecar has to see it too.
        shared = {"TMPDIR": str(TEMPORARY)}
        own = environment_of(self.spec, has_model=self.model is not None)
        return {**bound, **shared, **own, **key}

    def _command_words(self) -> list[str]:
        return [
            *("--model-path", self.model_path()),
            *("--host", "0.0.0.0", "--port", str(PORT)),  # noqa: S104 -- inside the container
            *(("--device", "cpu") if self.device == "cpu" else ()),
            *command_line(self.arguments),
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
        return str(MODELS / self.model.name) if self.model is not None else self.spec.model

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
            own_mounts.append(self._make_temporary(str(self._name), held=self.held))
            self._container = self.get_docker_client().create(
                self.image,
                command=self._command,
                environment=self.env,
                ports=self.ports,
                name=self._name,
                tmpfs=tmpfs,
                mounts=[*mounts, *own_mounts],
                **{**kwargs, **self._added()},
            )
            self._fill()
        except BaseException as error:
            self.end()
            if isinstance(error, APIError):
                raise EngineError(
                    f"The engine refused to create the container: {error.explanation}."
                ) from None
            raise

    def _added(self) -> dict[str, Any]:
        """What a test author has added by Testcontainers' builders; none by default."""
        return {}

    def _fill(self) -> None:
        """Puts files into the container before it is started; none by default."""

    def _make_reach(self) -> tuple[FolderReach | VolumeReach, list[Mount]]:
        how = self.spec.model_mount
        folder = FolderReach(self.model)
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
            if self.model is not None:
                self._model_inside = str(volume.upload(self.model, PurePosixPath("model")))
                self._command = self._command_words()
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

    @property
    def reach(self) -> FolderReach | VolumeReach:
        if self._reach is None:
            raise EngineError("The container was not created.")
        return self._reach

    @property
    def shared_folder(self) -> Path | None:
        return self._reach.folder if self._reach is not None else None

    def get_container_host_ip(self) -> str:
        """Where the server is reached from here; Testcontainers' own waits ask for it."""
        return str(urlsplit(self.address).hostname)

    def get_exposed_port(self, port: int) -> int:
        """The port to reach ``port`` of the container at, beside ``get_container_host_ip``."""
        if port == PORT:
            return int(urlsplit(self.address).port or port)
        return int(super().get_exposed_port(port))

    def left_behind(self) -> list[str]:
        """What of this server is still on the engine or on disk after ``stop``."""
        mine = {self._name, f"{self._name}-tmp"}
        mine |= {self._reach.name} if isinstance(self._reach, VolumeReach) else set()
        client = engine.connect()
        try:
            found = [
                f"{t.kind} {t.name}"
                for t in engine.ours(client)
                if t.name in mine or t.name.startswith(f"{self._name}-peer-")
            ]
        finally:
            client.close()
        if isinstance(self._reach, FolderReach) and self._reach.folder.exists():
            found.append(str(self._reach.folder))
        return list(dict.fromkeys([*self._failures, *found]))

    def _clear_away(self) -> list[str]:
        return self._reach.close() if self._reach is not None else []

    def stop(self, force: bool = True, delete_volume: bool = True) -> None:
        """Testcontainers' name for :meth:`end`. A server always gets SIGTERM first."""
        del force, delete_volume
        self.end()


class DockerRuntime:
    """Servers in containers of their own; warm ones in the container of their parent."""

    name = "docker"
    starts = True
    decides_gpus = False
    decides_model = False
    caveats: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._images: dict[str, str] = {}
        self._parents = Parents(
            lambda recipe: kept_parents.find("docker", recipe),
            lambda recipe, run_id, say: parent_container.make(
                recipe, self._images[recipe.runs], run_id=run_id, say=say
            ),
            lambda: bool(kept_parents.on_record()),
        )

    def __reduce__(self) -> tuple[type[DockerRuntime], tuple[()]]:
        # In another process it has parents of its own.
        return DockerRuntime, ()

    def keeping_parents(self) -> AbstractContextManager[None]:
        """See :class:`sglang_harness.runtime.Runtime`."""
        return self._parents.keeping()

    def for_another_server(self) -> DockerRuntime:
        return self

    def prepare(self, order: Order) -> SGLangServerContainer | WarmServer:
        """See :class:`sglang_harness.runtime.Runtime`."""
        spec, model = order.spec, order.model
        if model is not None:
            check_readable(model)
        device, image = prepare(spec, order.say)

        def recipe() -> Recipe:
            made = recipe_of(spec, image)
            self._images[made.runs] = image
            return made

        return warm_or(
            lambda: SGLangServerContainer(
                spec,
                model=model,
                image=image,
                device=device,
                run_id=order.run_id,
                held=order.held,
            ),
            self._parents,
            order,
            recipe=recipe,
            what=f"starting {spec.model} on {image.rsplit('/', 1)[-1]} ({device})",
            runtime=self.name,
            device=device,
        )


KIND = Kind("docker", lambda _: DockerRuntime())


def recipe_of(spec: ServerSpec, image: str) -> Recipe:
    """What a parent of servers like this one is made from.

    Raises:
        EngineError: no engine answers, it does not see this machine's disk, or the image is not
            one that this project builds.
    """
    client = engine.connect()
    try:
        found = client.images.get(image)
        if found.labels.get(images.LABEL_DEVICE) != "cpu":
            raise EngineError("its image was not built by this project")
        if not _sees_this_disk(os.environ.get("DOCKER_HOST"), image):
            raise EngineError("The engine does not see this machine's disk.")
        return Recipe(
            runs=str(found.id),
            environment=alike(environment_of(spec, has_model=True)),
            version=found.labels.get(images.LABEL_VERSION, ""),
        )
    finally:
        client.close()


@lru_cache(maxsize=8)
def _sees_this_disk(docker_host: str | None, image: str) -> bool:
    """Asked once an engine and image: it takes a container to find out."""
    del docker_host
    if engine.is_remote():
        return False
    client = engine.connect()
    try:
        with within_temporary_folder("probe") as probe:
            return engine.sees_this_disk(client, image, probe)
    finally:
        client.close()


def environment_of(spec: ServerSpec, *, has_model: bool) -> dict[str, str]:
    """What a server's container has, beside its key and what depends on its flags.

    Args:
        has_model: the model is on disk, so that no hub is asked.
    """
    passed = {n: os.environ[n] for n in spec.pass_environment if n in os.environ}
    offline = {"HF_HUB_OFFLINE": "1"} if has_model else {}
    cache = {"HF_HOME": "/hub"} if spec.hub_cache else {}
    return {**offline, **cache, **passed, **spec.environment}


def _launcher() -> str:
    """Starts SGLang with its key from the environment: see ``docker/launch.py``."""
    return (assets.root() / "docker" / "launch.py").read_text(encoding="utf-8")


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
                "on that machine's loopback, which cannot be reached from here.",
                advice="Set publish_on to an address of that machine that you trust.",
            )
        return chosen, images.for_spec(spec, chosen, client, say)
    except DockerException as error:
        raise EngineError(f"The Docker engine failed: {error}.") from None
    finally:
        client.close()
