"""A server without a container: a Python that has SGLang in it, as a process of this machine.

For machines where no Docker engine can be had. The same suite runs; what a container would
have kept apart (files, memory limits, users) is not kept apart here, and the verdict says so.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import psutil

from sglang_harness import checkpoint, shipped
from sglang_harness.device import cuda_environment, gpus
from sglang_harness.errors import EngineError, SpecError
from sglang_harness.memory import MemorySource
from sglang_harness.memory.process import ProcessMemory
from sglang_harness.runtime import cores, images
from sglang_harness.runtime.attached import AttachedProcess, remove_segments
from sglang_harness.runtime.death import Death, DeathWatch, read_death
from sglang_harness.secrets import Redactor, new_api_key
from sglang_harness.spec import ServerSpec, command_line

_PR_SET_PDEATHSIG = 1


class SGLangProcess:
    """One SGLang server as a child process, on loopback, with a key of its own.

    Its temporary files lie in one folder that goes with it; it ends with its parent.

    Args:
        python: a Python that can import sglang.
        model: the model's folder, or ``None`` for a name on the hub.
    """

    runtime = "process"

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
        self._folder = Path(tempfile.mkdtemp(prefix="sglang-harness-process-"))
        self._log = self._folder / "server.log"
        self._port = spec.port or _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: DeathWatch | None = None
        self._family: dict[int, psutil.Process] = {}
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
        if self.spec.port is not None and _is_taken(self.spec.port):
            self._remove_folder()
            raise SpecError(
                f"Port {self.spec.port} on 127.0.0.1 is in use.",
                advice="Choose another with --port, or leave it out for a free one.",
            )
        launcher = shipped.root() / "docker" / "launch.py"
        words = [
            *(str(self._python), str(launcher), "--model-path", self.model_path()),
            *("--host", "127.0.0.1", "--port", str(self._port)),
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
                    preexec_fn=_ends_with_parent(),
                )
        except OSError as error:
            self._remove_folder()
            raise EngineError(f"{self._python} cannot be run: {error.strerror}.") from None
        self._watch = DeathWatch(self._wait_for_death)

    def _environment(self) -> dict[str, str]:
        """For the server and what stands beside it; without the key."""
        passed = {n: os.environ[n] for n in self.spec.pass_environment if n in os.environ}
        cpu: dict[str, str] = {}
        if self.device == "cpu":
            bound = cores.binding(self.arguments, cores.cores_here())
            # As in the CPU image: torch would compile some functions, and a machine need not
            # have a C++ compiler.
            cpu = {"SGLANG_USE_CPU_ENGINE": "1", "TORCH_COMPILE_DISABLE": "1", **bound}
        offline = {"HF_HUB_OFFLINE": "1"} if self.model is not None else {}
        basics = {
            n: os.environ[n]
            for n in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
            if n in os.environ
        }
        devices = cuda_environment(self.spec.gpus) if self.device == "gpu" else {}
        return {
            **basics, **devices, **cpu, **offline, **passed, **self.spec.environment,
            "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false",
            "TMPDIR": str(self._folder),
        }  # fmt: skip

    def beside(self, script: str) -> AttachedProcess:
        """A second process of the same Python: see :class:`sglang_harness.runtime.Running`."""
        made = AttachedProcess(
            "The peer",
            [str(self._python), "-c", script],
            name=f"{self.name}-peer",
            environment={**self._environment(), "GLOO_SOCKET_IFNAME": "lo"},
            folder=self._folder,
            before=_ends_with_parent(),
        )
        self._beside.append(made)
        return made

    def _wait_for_death(self) -> Death:
        assert self._process is not None
        code = self._process.wait()
        seen = time.time()
        # A shell's way of writing a death by signal, as containers do.
        log = Redactor(self.api_key).text(self.logs())
        death = read_death(code if code >= 0 else 128 - code, False, log)
        return Death(**{**vars(death), "noticed_after": max(0.0, time.time() - seen)})

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def watch(self) -> DeathWatch:
        if self._watch is None:
            raise EngineError("The process was not started.")
        return self._watch

    def logs(self, *, tail: int | None = None) -> str:
        text = self._logs_at_end
        if text is None:
            try:
                text = self._log.read_text(encoding="utf-8", errors="replace")
            except OSError:
                text = ""
        return text if tail is None else "\n".join(text.splitlines()[-tail:])

    def memory(self) -> list[MemorySource]:
        return [ProcessMemory(self.host_pids)]

    def inspect(self) -> dict[str, Any]:
        words = self._process.args if self._process is not None else []
        assert isinstance(words, list)
        return {"name": self.name, "image": None, "python": str(self._python), "command": words[1:]}

    def processes(self) -> list[psutil.Process]:
        """The server's processes that live, its main process first."""
        if self._process is None:
            return []
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self._process.pid)
            for each in [main, *main.children(recursive=True)]:
                self._family[each.pid] = each
        return [p for p in self._family.values() if p.is_running() and p.status() != "zombie"]

    def host_pids(self) -> list[int]:
        return [p.pid for p in self.processes()]

    def end(self) -> int | None:
        """SIGTERM, ``limits.stop`` seconds, then SIGKILL for whatever of it is left."""
        if self._watch is not None and self._watch.death is None:
            self._watch.expected = True
        while self._beside:
            self._beside.pop().end()
        if self._process is None:
            self._remove_folder()
            return None
        family = self.processes()
        if self._process.poll() is None:
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=self.spec.limits.stop)
        _, alive = psutil.wait_procs(family, timeout=2)
        for each in alive:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(alive, timeout=5)
        self._logs_at_end = self.logs()
        self._remove_folder()
        _remove_shared_memory(p.pid for p in family)
        remove_segments(p.pid for p in family)
        return self._process.wait(timeout=5)

    def left_behind(self) -> list[str]:
        found = [f"process {p.pid}" for p in self._family.values() if p.is_running()]
        return [*found, *([str(self._folder)] if self._folder.exists() else [])]

    def _remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class ProcessRuntime:
    """Servers as processes of this machine.

    Args:
        python: one that can import sglang, such as a GPU installation of the user's own;
            ``None``: SGLang's CPU stack, made in the cache by ``docker/embedded.sh``.
    """

    name = "process"

    def __init__(self, python: Path | None = None) -> None:
        self._python = python

    def prepare(
        self,
        spec: ServerSpec,
        *,
        run_id: str,
        held: bool,
        say: Callable[[str], None],
    ) -> SGLangProcess:
        """See :class:`sglang_harness.runtime.Runtime`.

        Raises:
            SpecError: the spec asks for what only a container gives.
            ModelError: the model is not there.
            ImageError: the environment could not be made.
        """
        if spec.image is not None:
            raise SpecError(
                "An image was given, and the runtime 'process' runs no images.",
                advice="Leave --image out, or use --runtime docker.",
            )
        if held:
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
        python = self._python or images.run_script("embedded.sh", spec.sglang_version, say)
        model = checkpoint.locate(spec.model, say)
        say(f"starting {spec.model} with {python} ({device})")
        return SGLangProcess(spec, python=Path(python), model=model, device=device, run_id=run_id)


class SameMachine:
    """A local path is the server's path."""

    def share(self, path: Path) -> PurePosixPath:
        return PurePosixPath(path.resolve())


def _ends_with_parent() -> Callable[[], None]:
    """What a child does before it becomes another program: it is to end when this one does."""
    libc = ctypes.CDLL(None, use_errno=True) if platform.system() == "Linux" else None

    def end_with_parent() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return end_with_parent


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _remove_shared_memory(pids: Iterable[int]) -> None:
    """SGLang leaves ``sglang_loads_*`` segments behind when it is killed (0.5.23)."""
    numbers = {str(pid) for pid in pids}
    for segment in Path("/dev/shm").glob("sglang_loads_*"):  # noqa: S108
        if numbers & set(segment.stem.replace(".", "_").split("_")):
            segment.unlink(missing_ok=True)
