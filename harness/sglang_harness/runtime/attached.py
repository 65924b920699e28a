"""A program that is controlled by lines on its standard input and output.

It needs no port, so it works with an engine anywhere; and it ends when its input does, so it does
not outlive the harness.
"""

from __future__ import annotations

import collections
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException, NotFound
from docker.models.containers import Container
from docker.utils.socket import frames_iter

from sglang_harness._base.teardown import Teardown
from sglang_harness.errors import EngineError
from sglang_harness.runtime import engine, shared_memory
from sglang_harness.runtime.process_family import ProcessFamily

#: Lines of its error output that are kept.
KEPT = 200
#: Bytes of one that has not ended.
LONGEST = 64 << 10

#: Seconds from the end of a program's output to the end of its error output.
ERRORS_WITHIN = 1.0

#: Seconds from a container's removal to the engine's not knowing it any more.
GONE_WITHIN = 10.0


class Lines:
    """A program's output, joined to lines by a thread that reads it."""

    def __init__(self) -> None:
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._rest = b""
        self._errors: collections.deque[bytes] = collections.deque(maxlen=KEPT)
        self._rest_of_errors = b""
        self._ended = False

    def output(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._lines.put(line)

    def errors(self, data: bytes) -> None:
        *lines, rest = (self._rest_of_errors + data).split(b"\n")
        self._rest_of_errors = rest[-LONGEST:]
        self._errors.extend(lines)

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
        rest = [self._rest_of_errors] if self._rest_of_errors else []
        return b"\n".join([*self._errors, *rest]).decode(errors="replace")


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
        self._client: docker.DockerClient | None = None
        self._socket: Any = None
        self.container: Container | None = None
        try:
            # Its own client: the connection is held for as long as the program runs.
            self._client = docker.from_env()
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
        except BaseException as error:
            self.end()
            if isinstance(error, DockerException | OSError):
                reason = getattr(error, "explanation", None) or error
                raise EngineError(f"{what} could not be started: {reason}.") from None
            raise
        threading.Thread(target=self._listen, daemon=True, name=f"{name}-output").start()

    def _listen(self) -> None:
        try:
            with suppress(OSError, ValueError, DockerException):
                for stream, data in frames_iter(self._socket, tty=False):
                    (self._said.errors if stream == 2 else self._said.output)(data)
        finally:
            # Whatever ended this, a reader must not wait for ever.
            self._said.over()

    def write(self, line: bytes) -> None:
        try:
            getattr(self._socket, "_sock", self._socket).sendall(line + b"\n")
        except OSError as error:
            raise EngineError(f"{self._what} {self.name} takes no input: {error}.") from None

    def read(self, timeout: float) -> bytes | None:
        return self._said.read(timeout)

    def words(self) -> str:
        return self._said.words()

    def end(self) -> list[str]:
        with Teardown() as down:
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.close()
            client, container = self._client, self.container
            if client is not None and container is not None:
                name = f"container {self.name}"
                # By itself it is removed a moment after it ends.
                down.step(
                    name, lambda: engine.discard(lambda: container.remove(force=True, v=True))
                )
                if not down.failures:
                    down.step(name, lambda: self._wait_until_gone(client))
            if client is not None:
                down.step("the engine's client", client.close)
        return down.failures

    def _wait_until_gone(self, client: docker.DockerClient) -> None:
        until = time.monotonic() + GONE_WITHIN
        while time.monotonic() < until:
            try:
                client.containers.get(self.name)
            except NotFound:
                return
            time.sleep(0.1)
        raise EngineError(f"It is still there {GONE_WITHIN:g} s after its removal.")


class AttachedProcess:
    """The same as a process of this machine, with everything that it starts.

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
        self._family = ProcessFamily(self.pid)
        self._errors = threading.Thread(
            target=_read, args=(self._process.stderr, self._said.errors), daemon=True,
            name=f"{name}-errors",
        )  # fmt: skip
        self._errors.start()
        threading.Thread(target=self._listen, daemon=True, name=f"{name}-output").start()

    def _listen(self) -> None:
        try:
            _read(self._process.stdout, self._said.output)
            # Its last errors are asked for as soon as its end is known. Not for ever: a child of it
            # may keep the stream open.
            self._errors.join(ERRORS_WITHIN)
        finally:
            self._said.over()

    def write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise EngineError(f"{self._what} {self.name} takes no input: {error}.") from None

    def read(self, timeout: float) -> bytes | None:
        self._family.living()
        return self._said.read(timeout)

    def words(self) -> str:
        return self._said.words()

    def left_behind(self) -> list[str]:
        """What of it still runs."""
        return [f"process {each.pid}" for each in self._family.living()]

    def kill(self) -> None:
        """SIGKILL, without waiting until it notices the end of its input."""
        self._process.kill()

    def end(self) -> list[str]:
        with Teardown() as down:
            down.step(self.name, self._end_input)
            # torch's shared-memory manager makes itself a daemon, and outlives who started it.
            down.step(self.name, lambda: self._family.kill(within=5.0))
            down.step(self.name, self._reap)
            down.step("shared memory", lambda: shared_memory.remove_torchs(self._family.pids()))
            down.collect(self.name, self.left_behind)
        return down.failures

    def _end_input(self) -> None:
        self._family.living()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=self._ends_within)

    def _reap(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)


def _read(stream: Any, put: Callable[[bytes], None]) -> None:
    with suppress(OSError, ValueError):
        while data := stream.read1(1 << 16):
            put(data)
