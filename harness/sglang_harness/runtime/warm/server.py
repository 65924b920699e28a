"""A warm start: a server that is forked from a preloaded parent, so that it imports nothing."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from sglang_harness._base.secrets import new_api_key
from sglang_harness._base.teardown import Teardown
from sglang_harness.errors import EngineError
from sglang_harness.memory import MemorySource
from sglang_harness.memory.host.proportional import ProportionalMemory
from sglang_harness.runtime import Order, Reach, Sidecar, Started, log_file
from sglang_harness.runtime.death import Death, DeathWatch, Unknown, read_death
from sglang_harness.runtime.ports import Port
from sglang_harness.runtime.warm.parents import Parent, Parents
from sglang_harness.runtime.warm.protocol import Recipe
from sglang_harness.spec import ServerSpec, command_line

#: Largest model, in bytes, that a warm start copies where it cannot be linked.
COPIED_AT_MOST = 2 << 30

#: Fields of a spec that only a server in its own container can have, and what they set.
ITS_OWN_CONTAINERS = {
    "port": "its own host port",
    "publish_on": "its own publish address",
    "shm_size": "its own /dev/shm size",
    "memory": "its own memory limit",
    "hub_cache": "its own hub cache",
    "model_mount": "its own model mount",
}


class WarmServer:
    """One of several servers that one parent has forked, with the same protocol as any other.

    Args:
        give_back: ends the parent if no other server uses it; returns what could not be removed.
    """

    started = Started("warm")
    owned = True
    may_change = True

    def __init__(
        self,
        spec: ServerSpec,
        parent: Parent,
        *,
        runtime: str,
        model: Path,
        device: Literal["cpu", "gpu"],
        run_id: str,
        give_back: Callable[[Parent], list[str]],
    ) -> None:
        self.spec = spec
        self.runtime = runtime
        self.device: Literal["cpu", "gpu"] = device
        self.run_id = run_id
        self.model: Path | None = model
        self.name = f"sglang-harness-{uuid.uuid4().hex[:8]}"
        self.api_key = new_api_key()
        self.arguments = spec.arguments(device)
        self._parent = parent
        self._give_back = give_back
        self._model_inside = parent.share_model(model)
        self._reach = parent.reach(self.name, model, self._model_inside)
        self._log = parent.folders.root / "logs" / f"{self.name}.log"
        self._command: list[str] = []
        self._address: str | None = None
        self._port: Port | None = None
        self._watch: DeathWatch | None = None
        self._logs_at_end: str | None = None
        self._exit_code: int | None = None
        self._left: list[str] = []
        self._ended = False
        self._forked = False
        self._beside: list[Sidecar] = []

    @classmethod
    def of(
        cls,
        spec: ServerSpec,
        parent: Parent,
        *,
        give_back: Callable[[Parent], list[str]],
        **how: Any,
    ) -> WarmServer:
        """The constructor; returns the parent if it fails."""
        try:
            return cls(spec, parent, give_back=give_back, **how)
        except BaseException:
            give_back(parent)
            raise

    def start(self) -> None:
        """Forks it.

        Raises:
            EngineError: its parent has ended, or refused.
        """
        where, self._port = self._parent.address_words()
        self._command = [
            *("--model-path", self.model_path(), *where),
            *(("--device", "cpu") if self.device == "cpu" else ()),
            *command_line(self.arguments),
        ]
        self._log.touch()
        self._log.chmod(0o666)  # the server writes it as another user; others may not look in
        forked = self._parent.preloaded.start(
            self.name,
            argv=self._command,
            environment={
                **self._parent.binding(self.arguments),
                "SGLANG_API_KEY": self.api_key,
            },
            log=str(self._parent.folders.logs / self._log.name),
            folder=str(self._parent.temporary(self.name)),
        )
        self._forked = True
        chosen = forked.port or (self._port.number if self._port is not None else None)
        assert chosen is not None, "the parent gives one, or its place does"
        self._command = [str(chosen) if word == "{port}" else word for word in self._command]
        self._address = self._parent.address(chosen)
        self._watch = DeathWatch(self._wait_for_death)

    def _wait_for_death(self) -> Death | Unknown:
        ended = self._parent.preloaded.wait_for_end(self.name)
        noticed = max(0.0, time.time() - ended.at)
        if ended.parent_gone:
            # It alone knew how the server ended, and none of its servers outlives it.
            return Unknown("its preloaded parent ended, and every server of it with it")
        log = self.spec.redactor(self.api_key).text(self.logs())
        death = read_death(ended.exit_code, ended.out_of_memory, log)
        return replace(death, noticed_after=noticed)

    @property
    def watch(self) -> DeathWatch:
        if self._watch is None:
            raise EngineError("The server was not started.")
        return self._watch

    @property
    def address(self) -> str:
        if self._address is None:
            raise EngineError("The server was not started.")
        return self._address

    @property
    def reach(self) -> Reach:
        return self._reach

    def model_path(self) -> str:
        return str(self._model_inside)

    def logs(self, *, tail: int | None = None) -> str:
        return log_file.read(self._log, kept=self._logs_at_end, tail=tail)

    def inspect(self) -> dict[str, Any]:
        return {**self._parent.about(), "server": self.name, "command": self._command}

    def memory(self) -> list[MemorySource]:
        return [ProportionalMemory(lambda: self._ask("memory"))]

    def host_pids(self) -> list[int]:
        try:
            inside = [int(pid) for pid in self._ask("processes")["pids"]]
        except EngineError:
            return []
        return self._parent.host_pids(inside)

    def _ask(self, what: str) -> dict[str, Any]:
        return self._parent.preloaded.ask(what, name=self.name)

    def cores(self) -> list[int]:
        return self._parent.cores()

    def why_no_files(self) -> str | None:
        return None

    def why_no_sidecar(self) -> str | None:
        return None

    def start_sidecar(self, script: str) -> Sidecar:
        """A sidecar of this server: see :class:`sglang_harness.runtime.Running`."""
        made = self._parent.start_sidecar(self.name, script, run_id=self.run_id)
        self._beside.append(made)
        return made

    def end(self, *, at_once: bool = False) -> int | None:
        """See :class:`sglang_harness.runtime.Running`."""
        if self._ended:
            return self._exit_code
        self._ended = True
        if self._watch is not None and self._watch.ended is None:
            self._watch.expected = True
        with Teardown(self._left) as down:
            for peer in self._beside:
                down.collect(f"sidecar {peer.name}", peer.end)
            if self._forked:
                within = 0.0 if at_once else self.spec.limits.stop
                down.collect(f"server {self.name}", lambda: self._end_fork(within))
            down.step("log", self._keep_log)
            if (folder := self.shared_folder) is not None:
                down.step(str(folder), lambda: shutil.rmtree(folder, ignore_errors=True))
            if self._port is not None:
                down.step("port", self._port.release)
            down.collect(self._parent.name, lambda: self._give_back(self._parent))
        return self._exit_code

    def _end_fork(self, within: float) -> list[str]:
        ended, left = self._parent.preloaded.end(self.name, within=within)
        self._exit_code = ended.exit_code if ended else None
        return left

    def _keep_log(self) -> None:
        self._logs_at_end = self.logs()
        self._log.unlink(missing_ok=True)

    @property
    def shared_folder(self) -> Path | None:
        """A folder that is this server's alone."""
        return self._reach.folder

    def left_behind(self) -> list[str]:
        found = [*self._left, *self._parent.peers_left(self.name)]
        folder = self.shared_folder
        here = [p for p in (self._log, folder) if p is not None and p.exists()]
        return [*found, *map(str, here)]


class Cold(Protocol):
    """A server that starts without a parent."""

    started: Started


C = TypeVar("C", bound=Cold)


def warm_or(
    cold: Callable[[], C],
    parents: Parents,
    order: Order,
    *,
    recipe: Callable[[], Recipe],
    what: str,
    runtime: str,
    device: Literal["cpu", "gpu"],
) -> C | WarmServer:
    """A warm server if possible, else the one that ``cold`` creates, which then says why.

    Args:
        recipe: see :meth:`Parents.for_server`.
        what: the line that announces the start, without cold or warm.

    Raises:
        SpecError: a warm start was requested and is not possible.
    """
    found = parents.for_server(
        order.spec,
        lambda: why_cold(order.spec, model=order.model, device=device, held=order.held),
        recipe,
        run_id=order.run_id,
        say=order.say,
    )
    if isinstance(found, Started):
        order.say(f"{what}{f', cold: {found.why}' if found.why else ''}")
        server = cold()
        server.started = found
        return server
    try:
        order.say(f"{what}, warm")
    except BaseException:
        parents.give(found)
        raise
    assert order.model is not None, "why_cold has looked"
    return WarmServer.of(
        order.spec, found, runtime=runtime, model=order.model, device=device,
        run_id=order.run_id, give_back=parents.give,
    )  # fmt: skip


def why_cold(
    spec: ServerSpec, *, model: Path | None, device: Literal["cpu", "gpu"], held: bool
) -> str | None:
    """Why a server of this spec cannot be forked from a parent; ``None``: it can, as far as the
    spec tells."""
    if held:
        return "it must outlive this process"
    if device == "gpu":
        return "GPU servers cannot be forked: CUDA does not survive a fork"
    if model is None:
        return "its model comes from a hub, which its imports depend on"
    plain = ServerSpec()
    for field, what in ITS_OWN_CONTAINERS.items():
        if getattr(spec, field) not in (getattr(plain, field), None):
            return f"it has {what} ({field})"
    if (size := _copied(model)) > COPIED_AT_MOST:
        return f"its model ({size >> 30} GiB) is on another disk than the temporary files"
    return None


def _copied(model: Path) -> int:
    """Bytes that a warm start would have to copy; 0 if files can be linked."""
    import tempfile

    about = model.stat()
    linked = about.st_dev == Path(tempfile.gettempdir()).stat().st_dev
    if linked and os.geteuid() in (0, about.st_uid):
        return 0
    return sum(p.stat().st_size for p in model.rglob("*") if p.is_file())


def alike(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """An environment as a recipe holds it."""
    return tuple(sorted(environment.items()))
