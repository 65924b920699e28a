"""Preloaded parents and where they run: what a server that is forked from one needs.

A parent and its servers share a folder of this machine with the harness: models and exchanged
files (read-only for them), their logs, and for a kept parent the socket that it listens on.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from sglang_harness._base import temporary
from sglang_harness._base.teardown import Teardown
from sglang_harness._base.temporary import temporary_folder
from sglang_harness.errors import EngineError, SpecError
from sglang_harness.runtime import Sidecar, Started, cpu_binding
from sglang_harness.runtime.path_map import FolderReach, SameMachine
from sglang_harness.runtime.ports import Port
from sglang_harness.runtime.warm.protocol import IMPORTS_WITHIN, Link, Preloaded, Recipe, SocketLink
from sglang_harness.spec import Argument, ServerSpec

Say = Callable[[str], None]

log = logging.getLogger(__name__)

#: How many parents one run has at most. One holds some 700 MB before it has a server.
MOST = 2


@dataclass(frozen=True)
class Folders:
    """The shared folder, as it is on this machine and as servers see its parts."""

    root: Path
    exchange: PurePosixPath
    models: PurePosixPath
    logs: PurePosixPath
    control: PurePosixPath

    @classmethod
    def same(cls, root: Path) -> Folders:
        """For servers that see this machine's disk under the same paths."""
        parts = (PurePosixPath(root / part) for part in ("exchange", "models", "logs", "control"))
        return cls(root, *parts)

    def make(self) -> None:
        """The parts, each with the mode that a server of another user needs."""
        for part, mode in (
            ("exchange", 0o755), ("models", 0o755), ("logs", 0o777), ("control", 0o777),
        ):  # fmt: skip
            folder = self.root / part
            folder.mkdir(exist_ok=True)
            folder.chmod(mode)

    def remove(self) -> list[str]:
        """Removes all of it; returns what could not be removed."""
        return temporary.remove(self.root)

    @property
    def socket(self) -> Path:
        return self.root / "control" / "socket"

    @property
    def log(self) -> Path:
        """The parent's own log."""
        return self.root / "logs" / "parent.log"

    def words(self) -> str:
        """The last line of the parent's own log."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            lines = []
        said = [line.strip() for line in lines if line.strip()]
        return said[-1][:300].rstrip(".") if said else "it printed nothing"


def new_root() -> Path:
    """A folder that only this user may enter, with contents that the server's user may read."""
    return temporary_folder("parent")


def new_name() -> str:
    return f"sglang-harness-parent-{uuid.uuid4().hex[:8]}"


def until_it_listens(
    folders: Folders, runs: Callable[[], bool], within: float = IMPORTS_WITHIN
) -> None:
    """Waits until a kept parent takes connections.

    Raises:
        EngineError: it ended, or took longer.
    """
    until = time.monotonic() + within
    while True:
        if folders.socket.exists():
            try:
                SocketLink(folders.socket).end()
                return
            except EngineError:
                pass  # bound but not listening yet
        ended = not runs()
        if ended or time.monotonic() > until:
            how = "ended" if ended else f"was not done within {within:g} s"
            raise EngineError(
                f"The preloaded parent {how} while it imported SGLang: {folders.words()}."
            )
        time.sleep(0.1)


P = TypeVar("P", bound="Parent")


class Parent(ABC):
    """A parent where it runs. Its last user ends it, unless it is kept.

    Args:
        kept: it outlives this process: ending it only disconnects.
        program: what runs it, if this process has started it.
    """

    def __init__(
        self,
        name: str,
        preloaded: Preloaded,
        folders: Folders,
        recipe: Recipe,
        *,
        kept: bool,
        program: Link | None = None,
    ) -> None:
        self.name, self.preloaded, self.folders, self.recipe = name, preloaded, folders, recipe
        self.kept = kept
        self.program = program
        self.since = time.time()
        self.users = 0

    @classmethod
    def found(cls: type[P], name: str, folders: Folders, recipe: Recipe) -> P:
        """A kept one, by the socket that it listens on.

        Raises:
            EngineError: it has ended.
        """
        preloaded = Preloaded(SocketLink(folders.socket))
        try:
            preloaded.wait_until_ready(10.0)
        except EngineError:
            preloaded.close()
            raise
        return cls(name, preloaded, folders, recipe, kept=True)

    @abstractmethod
    def address_words(self) -> tuple[list[str], Port | None]:
        """SGLang's arguments for where to listen, and the port where it is known already. It is
        the server's until that releases it.

        Raises:
            EngineError: no port is free.
        """

    @abstractmethod
    def address(self, port: int) -> str:
        """Base URL of a server that listens at ``port``, from here."""

    @abstractmethod
    def temporary(self, name: str) -> PurePosixPath:
        """The ``TMPDIR`` of the server ``name``, as it sees it."""

    @abstractmethod
    def cores(self) -> list[int]:
        """Numbers of the cores that its servers may use."""

    def binding(self, arguments: Mapping[str, Argument]) -> dict[str, str]:
        """Variables that bind a parallel server's ranks to cores."""
        if cpu_binding.ranks(arguments) == 1:
            return {}
        return cpu_binding.binding(arguments, self.cores())

    @abstractmethod
    def share_model(self, model: Path) -> PurePosixPath:
        """Makes a model readable for servers; returns its path there."""

    @abstractmethod
    def reach(self, name: str, model: Path, inside: PurePosixPath) -> FolderReach | SameMachine:
        """How local paths map to paths of the server ``name``."""

    @abstractmethod
    def host_pids(self, pids: Sequence[int]) -> list[int]:
        """Process ids on this machine, for process ids of the parent's namespace."""

    @abstractmethod
    def start_sidecar(self, name: str, script: str, *, run_id: str) -> Sidecar:
        """A sidecar of the server ``name``."""

    @abstractmethod
    def peers_left(self, name: str) -> list[str]:
        """What is left of its sidecars."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Where servers run, for the verdict."""

    @abstractmethod
    def end_place(self) -> list[str]:
        """Ends the parent, its servers, and what they run in."""

    @property
    def alive(self) -> bool:
        return not self.preloaded.gone

    def end(self) -> list[str]:
        """Ends it, or only disconnects if it is kept; returns what could not be removed."""
        with Teardown() as down:
            down.collect(f"connection to {self.name}", self.preloaded.close)
            if not self.kept:
                down.collect(self.name, self.end_place)
                down.collect("shared folder", self.folders.remove)
            down.step("the place's connections", self.close_place)
        return down.failures

    def close_place(self) -> None:  # noqa: B027 -- not every place has connections
        """Closes what this object has open to where the parent runs."""


class Parents:
    """The parents of one runtime: found, made, shared by servers, and ended.

    Args:
        find: returns a kept parent of a recipe, or ``None``.
        make: starts a new one.
        any_kept: whether any parent is kept, and so worth looking for.
    """

    def __init__(
        self,
        find: Callable[[Recipe], Parent | None],
        make: Callable[[Recipe, str, Say], Parent],
        any_kept: Callable[[], bool],
    ) -> None:
        self._find, self._make, self._any_kept = find, make, any_kept
        self._lock = threading.RLock()
        self._have: list[Parent] = []
        self._keeping = 0
        self._failed: dict[str, str] = {}

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, more than one server is expected: parents are started and stay."""
        with self._lock:
            self._keeping += 1
        try:
            yield
        finally:
            with self._lock:
                self._keeping -= 1
                for left in [] if self._keeping else self.close():
                    log.warning("a preloaded parent left behind: %s", left)

    def take(self, recipe: Recipe, *, make: bool, run_id: str, say: Say) -> Parent | None:
        """A parent of this recipe; ``None`` if there is none and none was to be started. The caller
        returns it with :meth:`give`.

        Args:
            make: whether to start one for a single server.

        Raises:
            EngineError: it could not be started; raised again at once for later callers.
        """
        with self._lock:
            self._bury()
            parent = next((p for p in self._have if p.recipe == recipe and p.alive), None)
            if parent is None:
                parent = self._find(recipe)
                if parent is None and not make and not self._keeping:
                    return None
                if parent is None:
                    parent = self._new(recipe, run_id, say)
                self._have.append(parent)
            parent.users += 1
            return parent

    def for_server(
        self,
        spec: ServerSpec,
        why_cold: Callable[[], str | None],
        recipe: Callable[[], Recipe],
        *,
        run_id: str,
        say: Say,
    ) -> Parent | Started:
        """A parent for a server of this spec, or why it starts cold.

        Args:
            why_cold: why it cannot start warm; called only if a warm start is possible.
            recipe: of the parent that it needs; called only if it can start warm.

        Raises:
            SpecError: a warm start was requested and is not possible.
        """
        if spec.start == "cold" or not (spec.start == "warm" or self._keeping or self._any_kept()):
            # Requested, or a single server: not worth a parent.
            return Started("cold")
        why = why_cold()
        if why is None:
            try:
                made = spec.start == "warm"
                parent = self.take(recipe(), make=made, run_id=run_id, say=say)
                if parent is not None:
                    return parent
            except EngineError as error:
                why = error.message.rstrip(".")
        if spec.start == "warm":
            raise SpecError(
                f"A warm start was requested and is not possible: {why}.",
                advice="Leave out --start warm, or use --start cold.",
            )
        return Started("cold", why or "")

    def _new(self, recipe: Recipe, run_id: str, say: Say) -> Parent:
        if why := self._failed.get(recipe.digest()):
            raise EngineError(why)
        own = [p for p in self._have if not p.kept]
        if len(own) >= MOST:
            idle = next((p for p in own if not p.users), None)
            if idle is None:
                raise EngineError(
                    f"{len(own)} preloaded parents of other images or environments are in use."
                )
            self._have.remove(idle)
            _ended(idle)
        try:
            return self._make(recipe, run_id, say)
        except EngineError as error:
            self._failed[recipe.digest()] = error.message
            raise

    def give(self, parent: Parent) -> list[str]:
        """Returns the parent of a server that has ended; returns what could not be removed."""
        with self._lock:
            parent.users -= 1
            if parent not in self._have or parent.users or (self._keeping and parent.alive):
                return []
            self._have.remove(parent)
            return _ended(parent)

    def _bury(self) -> None:
        for parent in [p for p in self._have if not p.alive and not p.users]:
            self._have.remove(parent)
            _ended(parent)

    def close(self) -> list[str]:
        """Ends all parents without servers; returns what could not be removed."""
        with self._lock, Teardown() as down:
            for parent in [p for p in self._have if not p.users]:
                self._have.remove(parent)
                down.collect(parent.name, parent.end)
        return down.failures


def _ended(parent: Parent) -> list[str]:
    """Ends it; returns what could not be removed, and raises nothing for it: a verdict is still
    to be written."""
    with Teardown() as down:
        down.collect(parent.name, parent.end)
    return down.failures


def place(model: Path, models: Path) -> str:
    """Puts a model into ``models``, by hard links where the disk allows; returns its name there.

    The same model is put there once, under its own name; another of that name gets one of its own.
    """
    for number in range(100):
        name = model.name if not number else f"{model.name}-{number}"
        target = models / name
        if not target.exists():
            made = Path(tempfile.mkdtemp(prefix=".placing-", dir=models))
            try:
                shutil.copytree(model, made, copy_function=_link_or_copy, dirs_exist_ok=True)
                for each in (made, *(p for p in made.rglob("*") if p.is_dir())):
                    each.chmod(0o755)
                made.rename(target)
            except FileExistsError:
                pass  # another process was first: compare with its copy
            except OSError:
                if not target.exists():
                    raise
            finally:
                shutil.rmtree(made, ignore_errors=True)
        if _is_same(model, target):
            return name
    raise EngineError(f"A hundred other models named {model.name} are in {models}.")


def _link_or_copy(source: str, target: str) -> None:
    real = Path(os.path.realpath(source))
    if real.stat().st_mode & 0o004:
        try:
            os.link(real, target)
            return
        except OSError:
            pass  # another disk, or one without links
    shutil.copy2(real, target)
    Path(target).chmod(0o644)


def _is_same(model: Path, placed: Path) -> bool:
    """Whether what was placed is this model: the same files, by identity or by time and size."""

    def files(folder: Path) -> dict[str, os.stat_result]:
        return {
            str(p.relative_to(folder)): p.stat() for p in sorted(folder.rglob("*")) if p.is_file()
        }

    ours, theirs = files(model), files(placed)
    return ours.keys() == theirs.keys() and all(
        (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
        or (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)
        for a, b in ((ours[name], theirs[name]) for name in ours)
    )
