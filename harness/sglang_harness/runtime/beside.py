"""A program put beside a server: same user, same ``/dev/shm``, same loopback, same ``TMPDIR``.

It is spoken to in lines over its standard input and output, so nothing is listened on and it
works with an engine anywhere. When its input ends it ends: it does not outlive the harness.
"""

from __future__ import annotations

import collections
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import docker
import psutil
from docker.errors import APIError, DockerException, NotFound
from docker.types import Mount
from docker.utils.socket import frames_iter

from sglang_harness.errors import EngineError

#: Where the server and what stands beside it keep their temporary files and sockets.
TEMPORARY = PurePosixPath("/sglang-harness-tmp")

#: Lines of its error output that are kept.
KEPT = 200

#: Variables of the server that decide which devices there are, and in which order.
_DEVICES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


class _Lines:
    """What a program says, put together to lines by a thread that reads."""

    def __init__(self) -> None:
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._rest = b""
        self._errors: collections.deque[str] = collections.deque(maxlen=KEPT)
        self._ended = False

    def output(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._lines.put(line)

    def errors(self, data: bytes) -> None:
        self._errors.extend(data.decode(errors="replace").splitlines())

    def over(self) -> None:
        self._lines.put(None)

    def read(self, timeout: float) -> bytes | None:
        if self._ended:
            return None
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None
        self._ended = line is None
        return line

    def words(self) -> str:
        return "\n".join(self._errors)


class ContainerBeside:
    """A second container of the server's image and user, joined to its namespaces.

    Args:
        server: the server's container as the engine describes it (``inspect``).
        script: Python, handed over as text: any image's Python runs it.
        temporary: the volume that both see as ``TMPDIR``; ``None``: there is none.
        shares_processes: join the server's process namespace too (CUDA's handles ask for it).

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
    ) -> None:
        self.name = name
        self._said = _Lines()
        # Its own client: the connection is held for as long as the program runs.
        self._client = docker.from_env()
        try:
            self._container = self._client.containers.create(
                **_like(server, shares_processes),
                entrypoint=["python3", "-c", script],
                name=name,
                labels=labels,
                mounts=_mounts(server, temporary),
                stdin_open=True,
                # Nothing of it stays on the engine, not even when the harness is killed.
                auto_remove=True,
            )
            self._socket = self._client.api.attach_socket(
                str(self._container.id), params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
            )
            self._container.start()
        except DockerException as error:
            self.end()
            reason = getattr(error, "explanation", None) or error
            raise EngineError(f"No peer could be put beside the server: {reason}.") from None
        threading.Thread(target=self._listen, daemon=True, name=f"{name}-output").start()

    def _listen(self) -> None:
        with suppress(OSError, ValueError, DockerException):
            for stream, data in frames_iter(self._socket, tty=False):
                (self._said.errors if stream == 2 else self._said.output)(data)
        self._said.over()

    def write(self, line: bytes) -> None:
        try:
            getattr(self._socket, "_sock", self._socket).sendall(line + b"\n")
        except OSError as error:
            raise EngineError(f"The peer {self.name} does not listen: {error}.") from None

    def read(self, timeout: float) -> bytes | None:
        return self._said.read(timeout)

    def words(self) -> str:
        return self._said.words()

    def end(self) -> list[str]:
        with suppress(OSError, AttributeError):
            self._socket.close()
        left = []
        container = getattr(self, "_container", None)
        if container is not None:
            with suppress(NotFound):
                try:
                    container.remove(force=True, v=True)
                except APIError as error:
                    # 'Removal is already in progress': it ended by itself a moment ago.
                    if getattr(error, "status_code", 0) != 409:
                        left.append(f"container {self.name}: {error.explanation or error}")
            if not left and not self._is_gone(within=10.0):
                left.append(f"container {self.name}: still there after 10 s")
        self._client.close()
        return left

    def _is_gone(self, within: float) -> bool:
        until = time.monotonic() + within
        while time.monotonic() < until:
            try:
                self._client.containers.get(self.name)
            except NotFound:
                return True
            except DockerException:
                return False
            time.sleep(0.1)
        return False


def _like(server: dict[str, Any], shares_processes: bool) -> dict[str, Any]:
    """How the second container is made like the first, and joined to it."""
    config, host = server["Config"], server["HostConfig"]
    me = f"container:{server['Id']}"
    set_there = dict(entry.split("=", 1) for entry in config["Env"] or () if "=" in entry)
    told = {name: set_there[name] for name in _DEVICES if name in set_there}
    return {
        "image": server["Image"],
        "user": config["User"] or None,
        "command": [],
        # Not the server's key, nor any other of its secrets.
        "environment": {**told, "TMPDIR": str(TEMPORARY), "GLOO_SOCKET_IFNAME": "lo"},
        "network_mode": me,
        "ipc_mode": me,
        "pid_mode": me if shares_processes else None,
        # A container in somebody else's process namespace has its init already.
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
        raise EngineError(f"The engine made no volume for temporary files: {error}.") from None
    return volume, Mount(str(TEMPORARY), name, type="volume")


class ProcessBeside:
    """A second process of the server's Python.

    Raises:
        EngineError: it cannot be run.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        name: str,
        environment: dict[str, str],
        folder: Path,
        before: Callable[[], None],
    ) -> None:
        self.name = name
        self._said = _Lines()
        self._family: dict[int, psutil.Process] = {}
        try:
            self._process = subprocess.Popen(
                list(words),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=environment,
                start_new_session=True,
                preexec_fn=before,
            )
        except OSError as error:
            raise EngineError(f"No peer could be put beside the server: {error}.") from None
        for stream, put in (
            (self._process.stdout, self._said.output),
            (self._process.stderr, self._said.errors),
        ):
            threading.Thread(
                target=self._listen, args=(stream, put), daemon=True, name=f"{name}-output"
            ).start()

    def _listen(self, stream: Any, put: Callable[[bytes], None]) -> None:
        with suppress(OSError, ValueError):
            while data := stream.read1(1 << 16):
                put(data)
        if put == self._said.output:
            self._said.over()

    def write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise EngineError(f"The peer {self.name} does not listen: {error}.") from None

    def read(self, timeout: float) -> bytes | None:
        self._look()
        return self._said.read(timeout)

    def words(self) -> str:
        return self._said.words()

    def _look(self) -> None:
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self._process.pid)
            for each in [main, *main.children(recursive=True)]:
                self._family[each.pid] = each

    def end(self) -> list[str]:
        self._look()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        # torch's shared-memory manager makes itself a daemon, and outlives who started it.
        for each in self._family.values():
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(list(self._family.values()), timeout=5)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        remove_segments(self._family)
        return [f"process {each.pid}" for each in alive]


def remove_segments(pids: Iterable[int], folder: Path = Path("/dev/shm")) -> None:  # noqa: S108
    """Removes torch's shared memory of processes that have gone (``torch_PID_...``)."""
    for pid in pids:
        for segment in folder.glob(f"torch_{pid}_*"):
            segment.unlink(missing_ok=True)
