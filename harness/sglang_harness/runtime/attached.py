"""A program that is spoken to in lines over its standard input and output.

Nothing is listened on, so it works with an engine anywhere; and when its input ends it ends, so it
does not outlive the harness.
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
from pathlib import Path
from typing import Any

import docker
import psutil
from docker.errors import APIError, DockerException, NotFound
from docker.utils.socket import frames_iter

from sglang_harness.errors import EngineError

#: Lines of its error output that are kept.
KEPT = 200


class Lines:
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


class AttachedContainer:
    """A container that runs such a program, and is removed when it ends.

    Args:
        what: the program, for messages: ``The peer``.
        how: as ``docker.containers.create`` takes it.

    Raises:
        EngineError: the engine refused.
    """

    def __init__(self, what: str, name: str, **how: Any) -> None:
        self.name = name
        self._what = what
        self._said = Lines()
        # Its own client: the connection is held for as long as the program runs.
        self._client = docker.from_env()
        try:
            self.container = self._client.containers.create(
                name=name,
                stdin_open=True,
                # Nothing of it stays on the engine, not even when the harness is killed.
                auto_remove=True,
                **how,
            )
            self._socket = self._client.api.attach_socket(
                str(self.container.id), params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
            )
            self.container.start()
        except DockerException as error:
            self.end()
            reason = getattr(error, "explanation", None) or error
            raise EngineError(f"{what} could not be started: {reason}.") from None
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
            raise EngineError(f"{self._what} {self.name} does not listen: {error}.") from None

    def read(self, timeout: float) -> bytes | None:
        return self._said.read(timeout)

    def words(self) -> str:
        return self._said.words()

    def end(self) -> list[str]:
        with suppress(OSError, AttributeError):
            self._socket.close()
        left = []
        container = getattr(self, "container", None)
        if container is not None:
            try:
                container.remove(force=True, v=True)
            except NotFound:
                pass
            except APIError as error:
                # 'Removal is already in progress': it ended by itself a moment ago.
                if error.status_code != 409:
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


class AttachedProcess:
    """The same as a process of this machine, with whatever it starts.

    Args:
        before: called in the child before it becomes the program.
        ends_within: seconds from the end of its input to SIGKILL.

    Raises:
        EngineError: it cannot be run.
    """

    def __init__(
        self,
        what: str,
        words: Sequence[str],
        *,
        name: str,
        environment: dict[str, str],
        folder: Path,
        before: Callable[[], None] | None = None,
        ends_within: float = 5.0,
    ) -> None:
        self.name = name
        self._what = what
        self._said = Lines()
        self._family: dict[int, psutil.Process] = {}
        self._ends_within = ends_within
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
            raise EngineError(f"{what} could not be started: {error}.") from None
        self.pid = self._process.pid
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
            raise EngineError(f"{self._what} {self.name} does not listen: {error}.") from None

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

    def kill(self) -> None:
        """Does not wait for the end of its input to be noticed."""
        self._process.kill()

    def end(self) -> list[str]:
        self._look()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=self._ends_within)
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
