"""A server without a container: a Python that has SGLang in it, as a process of this machine.

For machines without a Docker engine. The same suite runs; what a container isolates (files,
memory limits, users) is not isolated here, and the verdict says so.
"""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import psutil

from sglang_harness._base import assets, bounded, temporary
from sglang_harness._base.descent import ending_with_parent
from sglang_harness._base.living import until_gone
from sglang_harness._base.secrets import new_api_key
from sglang_harness._base.teardown import Teardown
from sglang_harness._base.temporary import temporary_folder
from sglang_harness.errors import EngineError, SpecError
from sglang_harness.memory import MemorySource
from sglang_harness.memory.host.process import ProcessMemory
from sglang_harness.runtime import (
    Kind,
    KindOption,
    Order,
    Started,
    cpu_binding,
    images,
    log_file,
    shared_memory,
)
from sglang_harness.runtime.attached import AttachedProcess
from sglang_harness.runtime.death import Death, DeathWatch, read_death
from sglang_harness.runtime.device import cuda_environment, gpus
from sglang_harness.runtime.path_map import SameMachine
from sglang_harness.runtime.ports import GRPC, HIGHEST, Port, reserve, why_unusable
from sglang_harness.runtime.process_family import ProcessFamily
from sglang_harness.runtime.warm import kept_parents, parent_process
from sglang_harness.runtime.warm.parents import Parents
from sglang_harness.runtime.warm.protocol import Recipe
from sglang_harness.runtime.warm.server import WarmServer, alike, warm_or
from sglang_harness.spec import ServerSpec, command_line

#: Variables of this process that a server has as well: where programs, libraries and the compiler
#: of its kernels are, and which GPUs it may use.
BASICS = (
    "PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH",
    "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip

NO_CONTAINER = (
    "No container: the server ran as a process of this machine, with the rights of the harness."
)


class SGLangProcess:
    """One SGLang server as a child process, on loopback, with a key of its own.

    Its temporary files lie in one folder that goes with it; it ends with its parent.

    Args:
        python: a Python that can import sglang.
        model: the model's folder, or ``None`` for a name on the hub.
    """

    runtime = "process"
    started = Started("cold")
    owned = True
    may_change = True
    shared_folder: Path | None = None
    """A local path is the server's."""

    def __init__(
        self,
        spec: ServerSpec,
        *,
        python: Path,
        model: Path | None,
        device: Literal["cpu", "gpu"],
        run_id: str,
    ) -> None:
        self.spec = spec
        self.device: Literal["cpu", "gpu"] = device
        self.run_id = run_id
        self.name = f"sglang-harness-{uuid.uuid4().hex[:8]}"
        self.api_key = new_api_key()
        self._python = python
        self.model = model
        self.arguments = spec.arguments(device)
        self._folder = temporary_folder("process")
        self._log = self._folder / "server.log"
        self._port: Port | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = time.time()
        self._watch: DeathWatch | None = None
        self._family: ProcessFamily | None = None
        self._exit_code: int | None = None
        self._failures: list[str] = []
        self._logs_at_end: str | None = None
        self._beside: list[AttachedProcess] = []
        self.reach = SameMachine()

    def model_path(self) -> str:
        return str(self.model) if self.model is not None else self.spec.model

    def start(self) -> None:
        """Starts the process.

        Raises:
            SpecError: the port is taken.
            EngineError: the Python cannot be run.
        """
        try:
            self._port = reserve(self.spec.port)
        except EngineError as error:
            # What stays is swept, and the error that is being raised says more.
            temporary.remove(self._folder)
            if self.spec.port is None:
                raise
            raise SpecError(
                error.message,
                advice="Choose another with --port, or leave it out for a free one.",
            ) from None
        launcher = assets.root() / "docker" / "launch.py"
        words = [
            *(str(self._python), str(launcher), "--model-path", self.model_path()),
            *("--host", "127.0.0.1", "--port", str(self._port.number)),
            *(("--device", "cpu") if self.device == "cpu" else ()),
            *command_line(self.arguments),
        ]
        environment = {**self._environment(), "SGLANG_API_KEY": self.api_key}

        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self._folder,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=ending_with_parent(),
                )
        except OSError as error:
            self._port.release()
            temporary.remove(self._folder)
            raise EngineError(f"{self._python} cannot be run: {error.strerror}.") from None
        self._family = ProcessFamily(self._process.pid)
        self._watch = DeathWatch(self._wait_for_death)

    def _environment(self) -> dict[str, str]:
        """For the server and its sidecars; without the key."""
        own = environment_of(self.spec, device=self.device, has_model=self.model is not None)
        on_cpu = self.device == "cpu"
        bound = cpu_binding.binding(self.arguments, cpu_binding.cores_here()) if on_cpu else {}
        return {**bound, **own, "TMPDIR": str(self._folder)}

    def cores(self) -> list[int]:
        return cpu_binding.cores_here()

    def why_no_files(self) -> str | None:
        return None

    def why_no_sidecar(self) -> str | None:
        return None

    def start_sidecar(self, script: str) -> AttachedProcess:
        """A sidecar process of the same Python: see :class:`sglang_harness.runtime.Running`."""
        made = AttachedProcess(
            "The peer",
            [str(self._python), "-c", script],
            name=f"{self.name}-peer",
            environment={**self._environment(), "GLOO_SOCKET_IFNAME": "lo"},
            folder=self._folder,
            before=ending_with_parent(),
        )
        self._beside.append(made)
        return made

    def _wait_for_death(self) -> Death:
        assert self._process is not None
        code = self._process.wait()
        seen = time.time()
        log = self.spec.redactor(self.api_key).text(self.logs())
        death = read_death(_told(code), False, log)
        return replace(death, noticed_after=max(0.0, time.time() - seen))

    @property
    def address(self) -> str:
        if self._port is None:
            raise EngineError("The process was not started.")
        return f"http://127.0.0.1:{self._port.number}"

    @property
    def watch(self) -> DeathWatch:
        if self._watch is None:
            raise EngineError("The process was not started.")
        return self._watch

    def logs(self, *, tail: int | None = None) -> str:
        return log_file.read(self._log, kept=self._logs_at_end, tail=tail)

    def memory(self) -> list[MemorySource]:
        return [ProcessMemory(self.host_pids)]

    def inspect(self) -> dict[str, Any]:
        words = self._process.args if self._process is not None else []
        assert isinstance(words, list)
        return {"name": self.name, "image": None, "python": str(self._python), "command": words[1:]}

    def processes(self) -> list[psutil.Process]:
        """The server's processes that live, its main process first."""
        return self._family.living() if self._family is not None else []

    def host_pids(self) -> list[int]:
        return [p.pid for p in self.processes()]

    def end(self, *, at_once: bool = False) -> int | None:
        """SIGTERM, ``limits.stop`` seconds, then SIGKILL for what is left of it; then its files.
        Every step is tried; what failed is in ``left_behind``."""
        if self._watch is not None and self._watch.ended is None:
            self._watch.expected = True
        with Teardown(self._failures) as down:
            while self._beside:
                peer = self._beside.pop()
                down.collect(f"sidecar {peer.name}", peer.end)
            process, family = self._process, self._family
            if process is not None and family is not None:
                down.step("server process", lambda: self._end_process(process, family, at_once))
                down.step("server process", lambda: family.kill(within=5.0))
                self._exit_code = down.step("exit code", lambda: _told(process.wait(timeout=5)))
                down.step("log", self._keep_log)
                down.step(
                    "shared memory", lambda: shared_memory.remove(family.pids(), self._started_at)
                )
            down.collect("the server's folder", lambda: temporary.remove(self._folder))
            if self._port is not None:
                down.step("port", self._port.release)
        return self._exit_code

    def _end_process(
        self, process: subprocess.Popen[bytes], family: ProcessFamily, at_once: bool
    ) -> None:
        living = family.living()
        if process.poll() is None:
            if at_once:
                process.kill()
            else:
                process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=self.spec.limits.stop)
        # The others end a moment after it.
        until_gone(living, within=2.0)

    def _keep_log(self) -> None:
        self._logs_at_end = self.logs()

    def left_behind(self) -> list[str]:
        running = [f"process {p.pid}" for p in self.processes()]
        told = any(str(self._folder) in failure for failure in self._failures)
        folder = [str(self._folder)] if self._folder.exists() and not told else []
        return [*self._failures, *running, *folder]


class ProcessRuntime:
    """Servers as processes of this machine.

    Args:
        python: one that can import sglang, such as a GPU installation of the user's own;
            ``None``: SGLang's CPU stack, made in the cache by ``docker/embedded.sh``.

    Raises:
        SpecError: see :func:`caveats_of`.
    """

    name = "process"
    starts = True
    decides_gpus = False
    decides_model = False

    def __init__(self, python: Path | None = None) -> None:
        self._python = python
        self.caveats: tuple[str, ...] = (NO_CONTAINER, *caveats_of(python))
        self._parents = Parents(
            lambda recipe: kept_parents.find("process", recipe),
            lambda recipe, _, say: parent_process.make(recipe, say=say),
            lambda: bool(kept_parents.on_record()),
        )

    def __reduce__(self) -> tuple[type[ProcessRuntime], tuple[Path | None]]:
        # In another process it has parents of its own.
        return ProcessRuntime, (self._python,)

    def keeping_parents(self) -> AbstractContextManager[None]:
        """See :class:`sglang_harness.runtime.Runtime`."""
        return self._parents.keeping()

    def for_another_server(self) -> ProcessRuntime:
        return self

    def prepare(self, order: Order) -> SGLangProcess | WarmServer:
        """See :class:`sglang_harness.runtime.Runtime`.

        Raises:
            SpecError: the spec asks for what only a container gives.
            ImageError: the environment could not be made.
        """
        spec = order.spec
        if spec.image is not None:
            raise SpecError(
                "An image was given, and the runtime 'process' runs no images.",
                advice="Leave --image out, or use --runtime docker.",
            )
        if order.held:
            raise SpecError(
                "A server of the runtime 'process' ends with the harness: it cannot be held.",
                advice="Use --runtime docker.",
            )
        device: Literal["cpu", "gpu"] = "cpu"
        if spec.device == "gpu" or (spec.device == "auto" and self._python and gpus()[0]):
            device = "gpu"
        if device == "gpu" and self._python is None:
            raise SpecError(
                "The harness makes a Python with SGLang for the CPU only.",
                advice="Name one of yours that serves on the GPU with --python.",
            )
        if self._python is not None and not os.access(self._python, os.X_OK):
            raise SpecError(f"{self._python} cannot be run.", advice="Give a Python with --python.")
        self._port_fits(order)
        python = self._python or Path(
            images.run_script("embedded.sh", spec.sglang_version, order.say, within=spec.limits.run)
        )
        return warm_or(
            lambda: SGLangProcess(
                spec, python=python, model=order.model, device=device, run_id=order.run_id
            ),
            self._parents,
            order,
            recipe=lambda: recipe_of(spec, python),
            what=f"starting {spec.model} with {python} ({device})",
            runtime=self.name,
            device=device,
        )

    def _port_fits(self, order: Order) -> None:
        """Raises :class:`SpecError` where this SGLang cannot start at the port of the spec, and
        tells where that cannot be known."""
        spec = order.spec
        if spec.port is None or spec.port + GRPC <= HIGHEST:
            return
        version = sglang_of(self._python) if self._python else pinned_version(spec)
        if version is None:
            order.say(
                f"Which SGLang {self._python} has could not be read: 0.5.11 to 0.5.15 cannot start "
                f"at a port above {HIGHEST - GRPC}"
            )
        if why := why_unusable(
            spec.port, version, environment_of(spec, device="cpu", has_model=True)
        ):
            raise SpecError(
                f"Port {spec.port} cannot be used: {why}.",
                advice=f"Choose one of at most {HIGHEST - GRPC} with --port, or leave it out for a "
                f"free one.",
            )


def caveats_of(python: Path | None) -> tuple[str, ...]:
    """What whoever made a Python says that a verdict on its servers cannot vouch for: stand-ins in
    it, kernels of another version. It is in the file ``<python>.caveats``, one sentence a line.

    Raises:
        SpecError: the file is there and cannot be read: a verdict without it would claim too much.
    """
    if python is None:
        return ()
    file = python.with_name(f"{python.name}.caveats")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SpecError(
            f"{file} cannot be read ({why}). It says what verdicts on servers of this Python "
            "cannot vouch for.",
            advice="Make it readable; for a kit, unpack it again.",
        ) from None
    return tuple(line.strip() for line in lines if line.strip())


KIND = Kind(
    "process",
    lambda given: ProcessRuntime(Path(given["python"]) if "python" in given else None),
    (KindOption("python", "a Python that has SGLang", is_path=True),),
)


def recipe_of(spec: ServerSpec, python: Path) -> Recipe:
    """What a parent of servers like this one is made from."""
    environment = environment_of(spec, device="cpu", has_model=True)
    return Recipe(runs=str(python), environment=alike(environment), version=pinned_version(spec))


def pinned_version(spec: ServerSpec) -> str:
    """The version that is meant where the Python is not the user's own."""
    return spec.sglang_version or assets.pins()["SGLANG_VERSION"]


def sglang_of(python: Path) -> str | None:
    """The version of SGLang that is installed for ``python``; ``None``: it does not say."""
    try:
        return ask_for_sglang(python, within=30.0)
    except (OSError, subprocess.TimeoutExpired):
        return None


def ask_for_sglang(python: Path, *, within: float) -> str | None:
    """The version of SGLang that is installed for ``python``; ``None``: none is.

    Raises:
        OSError: it cannot be run.
        subprocess.TimeoutExpired: it did not answer within so many seconds.
    """
    words = [str(python), "-c", "import importlib.metadata as m; print(m.version('sglang'))"]
    told = bounded.run(words, within=within)
    return told.output[-1].strip() if told.code == 0 and told.output else None


def environment_of(
    spec: ServerSpec, *, device: Literal["cpu", "gpu"], has_model: bool
) -> dict[str, str]:
    """The variables of a server's process, apart from its key, its folder and what depends on its
    flags.

    Args:
        has_model: the model is on disk, so that no hub is to be looked for.
    """
    passed = {n: os.environ[n] for n in spec.pass_environment if n in os.environ}
    # As in the CPU image: torch would compile some functions, and a machine need not have a C++
    # compiler; and threads that spin while they wait take the cores of what they wait for.
    cpu = {
        "SGLANG_USE_CPU_ENGINE": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    cpu = cpu if device == "cpu" else {}
    offline = {"HF_HUB_OFFLINE": "1"} if has_model else {}
    basics = {n: os.environ[n] for n in BASICS if n in os.environ}
    devices = cuda_environment(spec.gpus) if device == "gpu" else {}
    return {
        **basics, **devices, **cpu, **offline, **passed, **spec.environment,
        "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def _told(exit_code: int) -> int:
    """As shells and containers report it: 128 plus the number of the signal that ended it."""
    return exit_code if exit_code >= 0 else 128 - exit_code
