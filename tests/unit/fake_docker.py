"""A Docker engine's client, in memory: what was made and removed, and refusals on demand."""

from __future__ import annotations

import itertools
import socket
from types import SimpleNamespace
from typing import Any

import requests
from docker.errors import APIError, NotFound


def refusal(status: int, reason: str = "no reason") -> APIError:
    """An engine's error as the client raises it: 404 is a :class:`NotFound`."""
    response = requests.Response()
    response.status_code = status
    kind = NotFound if status == 404 else APIError
    return kind(f"{status} Error: {reason}", response=response, explanation=reason)


class FakeDocker:
    """As much of ``docker.DockerClient`` as the harness's runtimes use.

    Attributes:
        refuses: errors to raise, by what is called: ``container.remove``, ``volumes.create``.
        calls: everything that was called, in order.
    """

    def __init__(self) -> None:
        self.refuses: dict[str, BaseException] = {}
        self.calls: list[str] = []
        self.closed = 0
        self.waits_cut = 0
        self.containers = _Collection(self, "container")
        self.volumes = _Collection(self, "volume")
        self.networks = _Collection(self, "network")
        self.images = _Images()
        self.api = _Api(self)

    def called(self, what: str) -> None:
        self.calls.append(what)
        if what in self.refuses:
            raise self.refuses[what]

    def close(self) -> None:
        self.closed += 1

    def names(self) -> list[str]:
        """Everything that is on the engine."""
        return [
            f"{kind.kind} {thing.name}"
            for kind in (self.containers, self.volumes, self.networks)
            for thing in kind.there
        ]


class _Images:
    """Every image is there, and is one that this project builds."""

    def get(self, name: str) -> Any:
        return SimpleNamespace(id=f"id-of-{name}", labels={"org.sglang-harness.device": "cpu"})


class _Api:
    def __init__(self, engine: FakeDocker) -> None:
        self._engine = engine
        self.headers: dict[str, str] = {}

    def attach_socket(self, *_: Any, **__: Any) -> Any:
        """A connection whose other side has ended already."""
        self._engine.called("attach_socket")
        ours, theirs = socket.socketpair()
        theirs.close()
        return ours


class _Collection:
    def __init__(self, engine: FakeDocker, kind: str) -> None:
        self._engine, self.kind = engine, kind
        self._numbers = itertools.count(1)
        self.there: list[FakeThing] = []
        self.ran: list[dict[str, Any]] = []
        """What ``run`` was given: its command, and the keywords."""

    def create(self, *about: Any, name: str | None = None, **how: Any) -> FakeThing:
        self._engine.called(f"{self.kind}s.create")
        made = FakeThing(self._engine, self, name or f"{self.kind}-{next(self._numbers)}", how)
        self.there.append(made)
        return made

    def run(self, image: str, command: list[str], **how: Any) -> bytes:
        self._engine.called(f"{self.kind}s.run")
        self.ran.append({"image": image, "command": command, **how})
        return b""

    def get(self, name: str) -> FakeThing:
        self._engine.called(f"{self.kind}s.get")
        for thing in self.there:
            if name in (thing.name, thing.id):
                return thing
        raise refusal(404, f"No such {self.kind}: {name}")

    def list(self, **_: Any) -> list[FakeThing]:
        self._engine.called(f"{self.kind}s.list")
        return list(self.there)


class FakeThing:
    """A container, volume or network."""

    def __init__(
        self, engine: FakeDocker, among: _Collection, name: str, how: dict[str, Any]
    ) -> None:
        self._engine, self._among = engine, among
        self.name = name
        self.id = f"id-of-{name}"
        self.how = how
        self.labels = how.get("labels") or {}
        self.status = "running"
        self.archives: dict[str, bytes] = {}
        """What was put into it, by where."""
        self.attrs: dict[str, Any] = {
            "State": {"ExitCode": 0, "OOMKilled": False, "FinishedAt": "", "Status": "exited"}
        }

    def _called(self, what: str) -> None:
        self._engine.called(f"{self._among.kind}.{what}")

    def remove(self, **_: Any) -> None:
        self._called("remove")
        self._among.there.remove(self)

    def stop(self, **_: Any) -> None:
        self._called("stop")

    def start(self) -> None:
        self._called("start")

    def wait(self, **_: Any) -> dict[str, Any]:
        """Returns once it was asked as often as ``waits_cut`` says the connection is cut."""
        self._called("wait")
        if self._engine.waits_cut:
            self._engine.waits_cut -= 1
            raise requests.exceptions.ConnectionError("connection reset")
        return {"StatusCode": self.attrs["State"]["ExitCode"]}

    def reload(self) -> None:
        self._called("reload")

    def logs(self, **_: Any) -> bytes:
        self._called("logs")
        return b"a line\nthe last line\n"

    def put_archive(self, path: str, data: Any) -> bool:
        self._called("put_archive")
        self.archives[path] = data if isinstance(data, bytes) else data.read()
        return True
