"""The protocol of a preloaded parent, which has imported SGLang and forks servers
(``docker/preload.py``).

Independent of containers: the connection is passed in.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sglang_harness._base import assets
from sglang_harness.errors import EngineError
from sglang_harness.runtime.attached import Lines

#: Seconds for an answer. A parent answers quickly, but its machine may be busy.
ANSWERS_WITHIN = 30.0

#: Seconds for its imports: nine on an idle core, several times that on a busy machine.
IMPORTS_WITHIN = 300.0


def script() -> str:
    """The parent's program as text, for the Python of any image."""
    return (assets.root() / "docker" / "preload.py").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Recipe:
    """What a parent is made from; it forks only servers of the same recipe.

    Attributes:
        runs: the image's id, or the path of the Python.
        environment: what SGLang finds while it is imported.
        version: of SGLang, as requested; for messages.
    """

    runs: str
    environment: tuple[tuple[str, str], ...]
    version: str = field(default="", compare=False)

    def digest(self) -> str:
        """Identifies the recipe without containing its environment, which may hold secrets."""
        made = json.dumps([self.runs, sorted(self.environment), script()])
        return hashlib.sha256(made.encode()).hexdigest()


class Link(Protocol):
    """A connection to a parent, in lines."""

    def write(self, line: bytes) -> None: ...

    def read(self, timeout: float) -> bytes | None: ...

    def words(self) -> str: ...

    def end(self) -> list[str]: ...


class SocketLink:
    """A connection to a parent that may have other connections.

    Raises:
        EngineError: nothing listens there.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(5.0)
            self._socket.connect(str(path))
            self._socket.settimeout(None)
        except OSError as error:
            self._socket.close()
            raise EngineError(f"No preloaded parent listens at {path}: {error}.") from None
        self._said = Lines()
        threading.Thread(target=self._listen, daemon=True, name="parent-connection").start()

    def _listen(self) -> None:
        with suppress(OSError):
            while data := self._socket.recv(1 << 16):
                self._said.output(data)
        self._said.over()

    def write(self, line: bytes) -> None:
        try:
            self._socket.sendall(line + b"\n")
        except OSError as error:
            raise EngineError(f"The preloaded parent takes no requests: {error}.") from None

    def read(self, timeout: float) -> bytes | None:
        return self._said.read(timeout)

    def words(self) -> str:
        return ""

    def end(self) -> list[str]:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        return []


@dataclass(frozen=True)
class Forked:
    """A server's main process, as a process id in its parent's namespace."""

    pid: int
    port: int | None
    """Chosen by the parent, where the arguments asked for one."""


@dataclass(frozen=True)
class Ended:
    """How a forked server ended.

    Attributes:
        exit_code: as a shell reports it: 128 plus the signal that killed it; ``None`` where its
            parent has ended too, and it is not known.
        at: seconds since the epoch.
        parent_gone: the parent ended, and its servers with it.
    """

    exit_code: int | None
    out_of_memory: bool
    at: float
    parent_gone: bool = False


class _Server:
    def __init__(self) -> None:
        self.pid = 0
        self.ended: Ended | None = None
        self.left: list[str] | None = None


class Preloaded:
    """One parent. Safe to use from several threads.

    Attributes:
        about: its own description, sent when it was ready.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._changed = threading.Condition()
        self._answers: dict[int, dict[str, Any] | None] = {}
        self._servers: dict[str, _Server] = {}
        self._number = 0
        self._gone = False
        self.about: dict[str, Any] = {}
        threading.Thread(target=self._listen, daemon=True, name="preloaded-parent").start()

    def wait_until_ready(self, within: float = IMPORTS_WITHIN) -> None:
        """Until it has imported SGLang.

        Raises:
            EngineError: it ended, took longer, or cannot be forked from.
        """
        with self._changed:
            self._changed.wait_for(lambda: bool(self.about) or self._gone, within)
        if not self.about:
            how = "ended" if self._gone else f"was not done within {within:g} s"
            raise EngineError(
                f"The preloaded parent {how} while it imported SGLang: {self.last_words()}."
            )
        if self.about.get("threads") != 1:
            raise EngineError(
                f"The preloaded parent has {self.about.get('threads')} Python threads after its "
                "imports; a server that is forked from it could hang."
            )

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        return self._gone

    def lost(self) -> list[int]:
        """Main processes of servers that were not cleaned up, because the parent ended first."""
        with self._changed:
            return [s.pid for s in self._servers.values() if s.ended and s.ended.parent_gone]

    def last_words(self) -> str:
        lines = [line.strip() for line in self._link.words().splitlines() if line.strip()]
        return lines[-1][:300].rstrip(".") if lines else "it printed nothing"

    def start(
        self, name: str, *, argv: list[str], environment: dict[str, str], log: str, folder: str
    ) -> Forked:
        """Forks a server.

        Args:
            argv: SGLang's arguments; ``{port}`` becomes a free port of the parent's.
            environment: in addition to the parent's.
            log: where it writes, as the parent sees it.
            folder: its ``TMPDIR``, which is made for it and goes with it.

        Raises:
            EngineError: the parent has ended, or refused.
        """
        with self._changed:
            self._servers[name] = _Server()
        try:
            told = self.ask(
                "start", name=name, argv=argv, environment=environment, log=log, folder=folder
            )
        except EngineError:
            with self._changed:
                del self._servers[name]
            raise
        with self._changed:
            self._servers[name].pid = int(told["pid"])
        return Forked(int(told["pid"]), told["port"])

    def wait_for_end(self, name: str) -> Ended:
        """Blocks until the server has ended."""
        with self._changed:
            server = self._servers[name]
            self._changed.wait_for(lambda: server.ended is not None)
            assert server.ended is not None
            return server.ended

    def end(self, name: str, *, within: float) -> tuple[Ended | None, list[str]]:
        """Ends a server, with SIGTERM first if ``within`` allows, and waits until it is cleaned up.

        Args:
            within: seconds to SIGKILL; 0: at once.

        Returns:
            how it ended, and what could not be removed.
        """
        with self._changed:
            server = self._servers[name]
        with suppress(EngineError):  # it has ended already, or its parent has
            self.ask("end", name=name, within=within)
        with self._changed:
            self._changed.wait_for(lambda: server.left is not None, within + ANSWERS_WITHIN)
            left = server.left
        if left is None:
            waited = within + ANSWERS_WITHIN
            left = [f"warm server {name}: not cleaned up {waited:g} s after it was ended"]
        return server.ended, left

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """One request and its answer.

        Raises:
            EngineError: it refused, has ended, or did not answer in time.
        """
        with self._changed:
            self._number += 1
            number = self._number
            self._answers[number] = None
        self._link.write(json.dumps({"id": number, "do": do, **fields}).encode())
        with self._changed:
            self._changed.wait_for(
                lambda: self._answers[number] is not None or self._gone, ANSWERS_WITHIN
            )
            answer = self._answers.pop(number)
        if answer is None:
            how = "has ended" if self._gone else f"did not answer within {ANSWERS_WITHIN:g} s"
            raise EngineError(f"The preloaded parent {how} ('{do}' was asked).")
        if "error" in answer:
            raise EngineError(f"The preloaded parent refused '{do}': {answer['error']}.")
        return answer

    def close(self) -> list[str]:
        """Disconnects: what was started over this connection ends, and so does the parent unless it
        is kept. Returns what could not be removed."""
        left = self._link.end()
        with self._changed:
            self._changed.wait_for(lambda: self._gone, 5.0)
        return left

    def _listen(self) -> None:
        while True:
            try:
                line = self._link.read(3600.0)
            except TimeoutError:
                continue
            if line is None:
                break
            with suppress(ValueError), self._changed:
                self._take(json.loads(line))
                self._changed.notify_all()
        now = time.time()
        with self._changed:
            self._gone = True
            for server in self._servers.values():
                server.ended = server.ended or Ended(None, False, now, parent_gone=True)
                server.left = server.left or []
            self._changed.notify_all()

    def _take(self, told: dict[str, Any]) -> None:
        if told.get("event") == "ready":
            self.about = told
        elif told.get("event") in ("ended", "cleared"):
            server = self._servers.get(str(told["name"]))
            if server is None:
                return
            if told["event"] == "cleared":
                server.left = list(told["left"])
                return
            code = os.waitstatus_to_exitcode(int(told["status"]))
            code = code if code >= 0 else 128 - code
            server.ended = Ended(code, bool(told["out_of_memory"]), float(told["at"]))
        elif told.get("id") in self._answers:
            self._answers[told["id"]] = told
